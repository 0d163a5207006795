"""What `adapters.py` measures: layers, models and functions, ours beside PEFT's."""

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from copy import deepcopy
from dataclasses import dataclass, field, replace

import torch
from models import Sizes, llama, trained
from peft import LoraConfig, MissConfig, get_peft_model
from timing import Case, nothing
from torch import nn
from torch.autograd.graph import get_gradient_edge
from transformers import DynamicCache

from hf_delta import BoneConfig, EdoraConfig, PmssConfig, disable_fast_dora, enable_fast_dora
from hf_delta.adapters.dora import reuse_dora_norms
from hf_delta.adapters.pmss.selection import greedy_pivots


FULL = Sizes()
QUICK = replace(FULL, features=128, tokens=(2, 16), r=8, skeleton=16, pivots=16, large=192, llama=(1, 64, 128, 256))


@dataclass
class Group:
    """Cases that are measured in the same rounds.

    Args:
        forwards: forward passes and their inputs, for those whose saved bytes are a row.
        peaks: whether the rows have peaks.
        passes: how often a round goes through all cases; short ones need more.
        bytes: sizes that are known, as peers.
        note: what else is to be said of the rows.
    """

    cases: dict[str, Case]
    forwards: dict[str, tuple[Callable, torch.Tensor]] = field(default_factory=dict)
    peaks: bool = False
    passes: int = 1
    bytes: dict[str, int] = field(default_factory=dict)
    note: str = ""


class Layers:
    """Adapted linear layers over one and the same frozen weight; `autocast` is around their forward passes."""

    def __init__(
        self,
        sizes: Sizes,
        device: str,
        dtype: torch.dtype = torch.float32,
        autocast: Callable[[], AbstractContextManager] = nullcontext,
    ):
        torch.manual_seed(0)
        self.sizes, self.device, self.dtype, self.autocast = sizes, device, dtype, autocast
        shape = (sizes.features, sizes.features)
        self.base = nn.Linear(*shape, bias=False, device=device, dtype=dtype).requires_grad_(False)

    def adapted(self, config) -> nn.Module:
        linear = nn.Linear(*self.base.weight.shape, bias=False, device="meta")
        linear.weight = self.base.weight
        config.target_modules = {"linear"}
        model = get_peft_model(nn.ModuleDict({"linear": linear}), config)
        return trained(model).base_model.model["linear"]

    def lora(self, **options) -> nn.Module:
        return self.adapted(LoraConfig(r=self.sizes.r, lora_alpha=self.sizes.r, **options))

    def train(self, layer: nn.Module, prepare: Callable = lambda x: None) -> Case:
        """Forward and backward pass, with the gradient of the input."""
        shape = (*self.sizes.tokens, self.sizes.features)
        x = torch.randn(*shape, device=self.device, dtype=self.dtype, requires_grad=True)
        gradient = torch.randn_like(x)

        def before():
            x.grad = None
            layer.zero_grad(set_to_none=True)
            prepare(x)

        def run():
            # The output itself is let go, as most that follows a linear layer does: keeping it is on the layer's account.
            with self.autocast():
                edge = get_gradient_edge(layer(x))
            torch.autograd.backward(edge, gradient)

        return Case(run, before)

    def decode(self, layer: nn.Module, switch: Callable = nothing, steps: int | None = None) -> Case:
        """Some tokens one after the other."""
        x = torch.randn(*self.sizes.decoded, self.sizes.features, device=self.device)
        layer.eval()

        def first():
            switch()
            layer(x)

        return generation(first, lambda: layer(x), steps or self.sizes.decode_steps)


def generation(first: Callable, step: Callable, steps: int) -> Case:
    """`steps` calls of `step` inside of what `generate` opens, in which `first` has come before."""
    context = ExitStack()

    def before():
        context.enter_context(torch.no_grad())
        context.enter_context(reuse_dora_norms())
        first()

    return Case(step, before, context.close, steps)


def dora(sizes: Sizes, device: str) -> Group:
    """The norm is taken in the first forward pass after an optimizer step and kept until the next."""
    layers = Layers(sizes, device)
    ours = {name: layers.lora(use_dora=True) for name in ("DoRA, norm in the step", "DoRA, norm cached")}

    def fast(layer, stale):
        optimizer = torch.optim.SGD([p for p in layer.parameters() if p.requires_grad], lr=0.0)

        def prepare(x):
            enable_fast_dora()
            optimizer.step()
            layer(x)
            if stale:
                optimizer.step()

        return prepare

    cases = {name: layers.train(layer, fast(layer, stale="cached" not in name)) for name, layer in ours.items()}
    cases |= {
        "PEFT LoRA": layers.train(layers.lora()),
        "PEFT DoRA": layers.train(layers.lora(use_dora=True), lambda x: disable_fast_dora()),
    }
    return Group(cases, peaks=True)


def decode(sizes: Sizes, device: str) -> Group:
    layers = Layers(sizes, device)
    cases = {
        "base linear": layers.decode(layers.base),
        "DoRA": layers.decode(layers.lora(use_dora=True), enable_fast_dora),
        "PEFT LoRA": layers.decode(layers.lora()),
        "PEFT DoRA": layers.decode(layers.lora(use_dora=True), disable_fast_dora, steps=1),
    }
    return Group(cases, passes=8)


def bone(sizes: Sizes, device: str) -> Group:
    layers = Layers(sizes, device)
    cases = {
        "Bone": layers.train(layers.adapted(BoneConfig(r=sizes.r))),
        "PEFT MiSS": layers.train(layers.adapted(MissConfig(r=sizes.r))),
    }
    return Group(cases, peaks=True)


def bat(sizes: Sizes, device: str) -> Group:
    """A weight that is trained itself takes three dense products, and `bat_col` needs the same three."""
    layers = Layers(sizes, device)
    cases = {
        "bat_row": layers.train(layers.adapted(BoneConfig(r=sizes.r, mode="bat_row"))),
        "bat_col": layers.train(layers.adapted(BoneConfig(r=sizes.r, mode="bat_col"))),
        "PEFT LoRA": layers.train(layers.lora()),
        "PEFT bat": layers.train(layers.adapted(MissConfig(r=sizes.r, init_weights="bat"))),
        "trained weight": layers.train(deepcopy(layers.base).requires_grad_()),
    }
    return Group(cases, peaks=True)


def pmss(sizes: Sizes, device: str) -> Group:
    layers = Layers(sizes, device)
    ours, theirs = layers.adapted(PmssConfig(r=sizes.skeleton)), layers.lora()
    x = torch.randn(*sizes.tokens, sizes.features, device=device)
    kept = x[..., 0].numel() * sizes.skeleton * x.element_size()
    return Group(
        {"PMSS": layers.train(ours), "PEFT LoRA": layers.train(theirs)},
        forwards={"PMSS": (ours, x), "PEFT LoRA": (theirs, x)},
        peaks=True,
        bytes={"T×k": kept},
    )


def edora(sizes: Sizes, device: str) -> Group:
    layers = Layers(sizes, device)
    cases = {
        "EDoRA": layers.train(layers.adapted(EdoraConfig(r=sizes.r))),
        "PEFT LoRA": layers.train(layers.lora()),
    }
    return Group(cases, peaks=True)


def heavy_tailed(size: int, device: str) -> torch.Tensor:
    """A matrix whose rows and columns differ in scale, as those of trained models do."""
    generator = torch.Generator().manual_seed(0)
    scales = torch.randn(2, size, generator=generator).mul(0.5).exp()
    return (scales[0][:, None] * torch.randn(size, size, generator=generator) * scales[1]).to(device)


def selection(sizes: Sizes, device: str) -> Group:
    """Pivoted QR stopped after `k` columns, against LAPACK's, which knows no stop."""
    weight = heavy_tailed(sizes.features, device)
    os.environ["OPENBLAS_NUM_THREADS"] = "1"
    from scipy.linalg import qr

    matrix, k = weight.cpu().numpy(), sizes.pivots
    cases = {
        "PMSS": Case(lambda: greedy_pivots(weight.T, k)),
        "geqp3": Case(lambda: qr(matrix, mode="r", pivoting=True, check_finite=False)),
    }
    theirs = torch.from_numpy(cases["geqp3"].run()[1][:k])
    same = (cases["PMSS"].run().cpu() == theirs).sum()
    return Group(cases, note=f"{same} of {k} pivots the same, in order")


def large_selection(sizes: Sizes, device: str) -> Group:
    weight = heavy_tailed(sizes.large, device)
    return Group({"PMSS": Case(lambda: greedy_pivots(weight.T, sizes.pivots))})


def model(sizes: Sizes, device: str) -> Group:
    """Decoding steps of a whole model with a cache of keys and values; every linear layer of its blocks is adapted."""
    base = llama(sizes).to(device)
    r, common = sizes.r, {"target_modules": "all-linear"}
    configs = {
        "PEFT LoRA": LoraConfig(r=r, **common),
        "PEFT DoRA": LoraConfig(r=r, use_dora=True, **common),
        "DoRA": LoraConfig(r=r, use_dora=True, **common),
        "Bone": BoneConfig(r=r, **common),
        "row": BoneConfig(r=r, mode="row", **common),
        "mini": BoneConfig(r=r, mode="mini", mini_r=r, **common),
        "bat_row": BoneConfig(r=r, mode="bat_row", **common),
        "PMSS": PmssConfig(r=sizes.skeleton, **common),
        "EDoRA": EdoraConfig(r=r, **common),
        "bat_col, merged": BoneConfig(r=r, mode="bat_col", **common),
    }
    models = {name: trained(get_peft_model(deepcopy(base), config)).eval() for name, config in configs.items()}
    models["bat_col, merged"].merge_adapter()
    switches = {"DoRA": enable_fast_dora, "PEFT DoRA": disable_fast_dora}
    models["merged"] = base
    cases = {name: _decoding(model, sizes, switches.get(name, nothing)) for name, model in models.items()}
    return Group(cases, passes=2)


def _decoding(model: nn.Module, sizes: Sizes, switch: Callable) -> Case:
    batch, vocabulary = sizes.decoded[0], sizes.llama[-1]
    prompt = torch.randint(vocabulary, (batch, 16), device=model.device)
    token = prompt[:, :1].clone()
    state = {}

    def first():
        switch()
        state["cache"] = model(prompt, past_key_values=DynamicCache(config=model.config)).past_key_values

    return generation(first, lambda: model(token, past_key_values=state["cache"]), sizes.decode_steps)


GROUPS: dict[str, Callable[[Sizes, str], Group]] = {
    build.__name__: build for build in (dora, decode, bone, bat, pmss, selection, large_selection, edora, model)
}
