"""Networks that learn token masks from a reference's hidden states, and are never part of a model's checkpoint."""

import math
from collections.abc import Mapping

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

from hf_delta.errors import InputError
from hf_delta.ops.gather import full_tensor, gathered, into_shards, is_sharded
from hf_delta.ops.norms import widened


HIDDEN_WIDTH = 200
# How far from 1 a mask can be at most at the start, whatever the hidden states are.
START_SPREAD = 0.5


class HiddenStateModule(nn.Module):
    """A module whose parameters are trained with those of the model that it is part of, and left out of its `state_dict`.

    No checkpoint, `save_pretrained` or push of the model around it ever holds them, and loading expects none. They are in
    [`mask_state`] instead, and stay where they are when that model is moved to the `meta` device. Modules inside of it that have
    parameters must be of this class as well.
    """

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        pass

    def _load_from_state_dict(self, *args, **kwargs):
        pass

    def _apply(self, fn, recurse=True):
        # Accelerate's FSDP2 empties a model and fills it from its state dict, which would leave these parameters empty.
        return self if fn(torch.empty(0)).is_meta else super()._apply(fn, recurse)

    def mask_state(self) -> dict[str, torch.Tensor]:
        """Whole copies of all parameters on the CPU, by name. Collective where they are sharded."""
        named = dict(self.named_parameters())
        with gathered(*named.values()):
            return {name: full_tensor(parameter).to("cpu", copy=True) for name, parameter in named.items()}

    @torch.no_grad()
    def load_mask_state(self, state: Mapping[str, torch.Tensor]) -> None:
        """Take parameters over from [`mask_state`], where all ranks call this with the same state.

        Raises:
            `InputError`: the state is of another network: it lacks parameters, or has others, or other shapes.
            `RuntimeError`: DeepSpeed ZeRO-3 has partitioned the parameters; load them before.
        """
        into_shards(*self.modules())
        named = dict(self.named_parameters())
        for what, names in (("lacks", named.keys() - state.keys()), ("has", state.keys() - named.keys())):
            if names:
                tail = "" if what == "lacks" else ", which this network has not"
                raise InputError(f"mask network: the saved state {what} {', '.join(sorted(names))}{tail}.{_SAME}")
        for name, parameter in named.items():
            if not isinstance(parameter, DTensor) and is_sharded(parameter):
                raise RuntimeError("mask network: load its state before DeepSpeed partitions its parameters")
            if state[name].shape != parameter.shape:
                raise InputError(
                    f"mask network: {name} is {tuple(state[name].shape)} in the saved state and "
                    f"{tuple(parameter.shape)} here.{_SAME}"
                )
        for name, parameter in named.items():
            saved = state[name].to(parameter.device, parameter.dtype)
            if isinstance(parameter, DTensor):
                saved = distribute_tensor(saved, parameter.device_mesh, parameter.placements)
            parameter.copy_(saved)


_SAME = " Use the model and the layers, net and sharing that it was saved with."


class MaskNet(HiddenStateModule):
    """One mask from hidden states: `m = relu(sum_l a_l relu(f_l(norm(h_l))))`, or `m = relu(f(norm(h)))` for one layer.

    `f_l` is a linear map to a number, or with `hidden` one to `hidden` numbers, ReLU, and a linear map to one. `norm` is a layer
    norm that all layers share. In training every `relu(..)` is followed by dropout.

    It starts between 0.5 and 1.5 for all hidden states whatsoever (the last map is as long as `|norm(h)| <= sqrt(width)` lets it
    be, with a bias of 1, and `a_l = 1 / layers`), so that without dropout no mask is 0, and the first step is about TDPO1's. The published networks start as torch's linear layers do, with about half of the tokens at 0, and sometimes with all
    of them, from where nothing leads back.

    Args:
        width (`int`): Features of a hidden state.
        layers (`int`): Layers that it gets.
        hidden (`int`): Width in between, 0 for linear maps.
        dropout (`float`): Probability of dropout.
    """

    def __init__(self, width: int, layers: int, hidden: int = 0, dropout: float = 0.0):
        super().__init__()
        # Most that can go into the last map: |norm(h)| <= sqrt(width).
        largest = torch.full((layers, 1), math.sqrt(width))
        self.norm_weight = nn.Parameter(torch.ones(width))
        self.norm_bias = nn.Parameter(torch.zeros(width))
        if hidden:
            bound = 1 / math.sqrt(width)
            weight = torch.empty(layers, hidden, width).uniform_(-bound, bound)
            bias = torch.empty(layers, hidden).uniform_(-bound, bound)
            largest = torch.linalg.matrix_norm(weight, 2)[:, None] * largest + bias.norm(dim=1, keepdim=True)
            self.hidden_weight, self.hidden_bias = nn.Parameter(weight), nn.Parameter(bias)
        direction = nn.functional.normalize(torch.randn(layers, hidden or width), dim=1)
        self.weight = nn.Parameter(START_SPREAD * direction / largest)
        self.bias = nn.Parameter(torch.ones(layers))
        self.mixer = nn.Parameter(torch.full((layers,), 1 / layers)) if layers > 1 else None
        self.hidden, self.dropout = hidden, nn.Dropout(dropout)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """Masks `(n,)`, 0 or more, of hidden states `(n, layers, width)`."""
        states = states.to(self.norm_weight.dtype)
        states = nn.functional.layer_norm(states, states.shape[-1:], self.norm_weight, self.norm_bias)
        if self.hidden:
            states = torch.einsum("nld,lhd->nlh", states, self.hidden_weight) + self.hidden_bias
            states = self.dropout(states.relu())
        masks = self.dropout((torch.einsum("nld,ld->nl", states, self.weight) + self.bias).relu())
        if self.mixer is None:
            return masks[:, 0].to(widened(masks.dtype))
        return self.dropout((masks @ self.mixer.to(masks.dtype)).relu()).to(widened(masks.dtype))


class TokenMasks(HiddenStateModule):
    """Masks of reward and KL from hidden states, by one network or by two.

    Args:
        width (`int`): Features of a hidden state.
        layers (`int`): Layers of the model.
        last (`bool`, *optional*, defaults to `False`): Whether only the last layer is looked at.
        hidden (`int`, *optional*, defaults to 0): Width of the layer in between, 0 for none.
        common (`bool`, *optional*, defaults to `True`): Whether one mask serves both.
        dropout (`float`, *optional*, defaults to 0.0): Probability of dropout.
    """

    def __init__(
        self,
        width: int,
        layers: int,
        *,
        last: bool = False,
        hidden: int = 0,
        common: bool = True,
        dropout: float = 0.0,
    ):
        super().__init__()
        self.last = last
        self.reward = MaskNet(width, 1 if last else layers, hidden, dropout)
        self.kl = None if common else MaskNet(width, 1 if last else layers, hidden, dropout)

    def forward(self, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Masks `(n,)` of reward and KL, from hidden states `(n, layers, width)` of any floating dtype."""
        if self.last:
            states = states[:, -1:]
        reward = self.reward(states)
        return reward, reward if self.kl is None else self.kl(states)
