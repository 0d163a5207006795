"""What `gpu.py` compares: adapters, token KL and rollouts; steps of GRPO are in `gpu_grpo.py`."""

import importlib.util
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
from adapters_cases import Layers
from gpu_rows import Comparison, Skipped
from gpu_setup import ADAPTERS, Setup
from merged_rollouts import exchange
from models import METHODS, switched, word_tokenizer
from timing import Case, inside
from token_kl import PEERS, full_logits, inputs, kernel_case
from torch import nn

from hf_delta import merged_rollouts


# -- adapters ------------------------------------------------------------------------------------------------------------
def adapters(setup: Setup) -> list[Comparison]:
    layers = Layers(setup.sizes, setup.device, setup.dtype, setup.autocast)
    features, (sequences, length) = setup.scale.linear
    blocks = setup.scale.model["num_hidden_layers"]
    step = f"{blocks} blocks of the model, {setup.scale.step[0] * setup.scale.step[1]} tokens, with the optimizer"
    return [
        Comparison(
            "adapters",
            f"train step of one linear layer, {features} x {features}, {sequences * length} tokens",
            "LoRA",
            {method: partial(_layer_step, setup, layers, method) for method in ADAPTERS},
            passes=4,
        ),
        Comparison(
            "adapters", f"train step of {step}", "LoRA", {name: partial(_model_step, setup, name) for name in ADAPTERS}
        ),
    ]


def _layer_step(setup: Setup, layers: Layers, method: str) -> Case:
    layer = layers.adapted(METHODS[method][0](setup.sizes))
    return inside(layers.train(layer), lambda: switched(method))


def _model_step(setup: Setup, method: str) -> Case:
    """Forward and backward pass and optimizer step, without the head, whose logits would hide everything else."""
    model = setup.adapted(method).train()
    blocks, ids = model.get_base_model().model, setup.tokens(*setup.scale.step)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)
    gradient = torch.randn(*ids.shape, setup.scale.model["hidden_size"], device=setup.device, dtype=setup.dtype)

    def run():
        with setup.autocast():
            hidden = blocks(input_ids=ids, use_cache=False).last_hidden_state
        hidden.backward(gradient.to(hidden.dtype))
        optimizer.step()

    return inside(Case(run, optimizer.zero_grad), lambda: switched(method))


# -- token KL ------------------------------------------------------------------------------------------------------------
def token_kl(setup: Setup) -> list[Comparison]:
    return [
        _scores(setup, vocabulary, *kind)
        for vocabulary in setup.scale.vocabularies
        for kind in ((False, False), (True, False), (True, True))
    ]


def _scores(setup: Setup, vocabulary: int, kl: bool, trained_head: bool) -> Comparison:
    given = None

    def build(compute) -> Case:
        nonlocal given
        if given is None:
            given = inputs(vocabulary, trained_head, setup.scale.kl, setup.device, setup.dtype)
        return kernel_case(compute, given, kl)

    def difference(compute) -> str:
        some = (given.hidden[:64].detach(), given.head.detach(), given.targets[:64])
        with torch.no_grad():
            found = (compute(*some).logps - full_logits(*some).logps).abs().max().item()
        return f"within {found:.1g} nats of full logits"

    what = (
        f"{'log-probabilities and KL' if kl else 'log-probabilities'}, {'trained' if trained_head else 'frozen'} head"
    )
    return Comparison(
        "token_kl",
        f"{what}, V = {vocabulary:,}, {setup.scale.kl[0]} tokens",
        "full logits",
        {name: partial(build, compute) for name, compute in PEERS.items()},
        passes=2,
        notes={name: partial(difference, compute) for name, compute in PEERS.items() if compute is not full_logits},
    )


# -- rollouts ------------------------------------------------------------------------------------------------------------
def rollout(setup: Setup) -> list[Comparison]:
    models = {}

    def model_of(method: str) -> nn.Module:
        if method not in models:
            models[method] = setup.adapted(method).eval()
        return models[method]

    sequences, prompt, new = setup.scale.rollout
    cases = {"merged model": lambda: _generation(setup, setup.base, "LoRA", lambda _: nullcontext())}
    for method in ADAPTERS:
        for name, around in {method: lambda _: nullcontext(), f"{method}, merged_rollouts": merged_rollouts}.items():
            cases[name] = lambda m=method, around=around: _generation(setup, model_of(m), m, around)
    cases["vLLM, merged model"] = lambda: vllm_generation(setup)
    return [
        Comparison(
            "rollout",
            "entering and leaving merged_rollouts",
            "LoRA",
            {method: lambda m=method: exchange(model_of(m), m) for method in ADAPTERS},
        ),
        Comparison(
            "rollout",
            f"generate, {sequences} sequences, {prompt} tokens of prompt, {new} new",
            "merged model",
            cases,
            sequences * new,
        ),
    ]


def _generation(
    setup: Setup, model: nn.Module, method: str, around: Callable[[nn.Module], AbstractContextManager]
) -> Case:
    """One `generate` with sampling; merging is part of it where rollouts are merged."""
    sequences, prompt, new = setup.scale.rollout
    ids = setup.tokens(sequences, prompt)
    lengths = {"min_new_tokens": new, "max_new_tokens": new}

    def run():
        with torch.no_grad(), around(model):
            model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=True, **lengths)

    return inside(Case(run), lambda: switched(method))


def vllm_generation(setup: Setup) -> Case:
    """The same tokens from vLLM with its defaults, prefixes uncached because every run has the same prompts."""
    if importlib.util.find_spec("vllm") is None:
        raise Skipped("vLLM is not installed")
    if setup.device != "cuda":
        raise Skipped("vLLM is measured on a GPU only")
    from vllm import LLM, SamplingParams

    folder = setup.folder / "merged"
    setup.base.save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    sequences, prompt, new = setup.scale.rollout
    engine = LLM(
        model=str(folder),
        dtype=str(setup.dtype).removeprefix("torch."),
        max_model_len=prompt + new,
        gpu_memory_utilization=0.3,
        enable_prefix_caching=False,
        skip_tokenizer_init=True,
    )
    prompts = [{"prompt_token_ids": ids} for ids in setup.tokens(sequences, prompt).tolist()]
    params = SamplingParams(max_tokens=new, ignore_eos=True, detokenize=False)
    # Its memory is reserved beforehand, and by another process.
    return Case(lambda: engine.generate(prompts, params, use_tqdm=False), allocates=False)
