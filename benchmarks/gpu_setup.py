"""Sizes of `gpu.py` on a GPU and on a CPU, and what its sections share."""

from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from models import METHODS, Sizes, trained
from peft import get_peft_model
from torch import nn
from transformers import Qwen3Config, Qwen3ForCausalLM


ADAPTERS = ("LoRA", "DoRA of PEFT", "fast DoRA", "Bone", "bat_row", "bat_col", "PMSS", "EDoRA")


@dataclass(frozen=True)
class Scale:
    """Sizes of one run; `model` are fields of a `Qwen3Config`.

    Args:
        linear: features in and out, and tokens, of the single layer.
        step: sequences and tokens of a train step of the blocks.
        kl: rows and width of hidden states.
        rollout: sequences, tokens of a prompt, and tokens that are generated.
        grpo: completions of a step, and how many of them are in a forward pass.
    """

    model: dict[str, int | bool]
    linear: tuple[int, tuple[int, int]]
    step: tuple[int, int]
    kl: tuple[int, int]
    vocabularies: tuple[int, ...]
    rollout: tuple[int, int, int]
    grpo: tuple[int, int]
    r: int = 16
    skeleton: int = 64


def _qwen3(layers: int, hidden: int, mlp: int, vocabulary: int, heads: int, kv_heads: int, head: int) -> dict:
    return {
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "vocab_size": vocabulary,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head,
        "tie_word_embeddings": True,
    }


ON_GPU = Scale(
    model=_qwen3(28, 1024, 3072, 151_936, 16, 8, 128),
    linear=(4096, (4, 2048)),
    step=(4, 512),
    kl=(2048, 1024),
    vocabularies=(32_768, 131_072),
    rollout=(32, 64, 64),
    grpo=(64, 32),
)
ON_CPU = Scale(
    model=_qwen3(4, 256, 768, 8192, 4, 2, 64),
    linear=(512, (2, 64)),
    step=(2, 32),
    kl=(128, 64),
    vocabularies=(32_768, 131_072),
    rollout=(4, 16, 16),
    grpo=(16, 16),
)
QUICK = Scale(
    model=_qwen3(1, 32, 64, 128, 2, 1, 16),
    linear=(64, (2, 8)),
    step=(2, 8),
    kl=(16, 16),
    vocabularies=(512, 1024),
    rollout=(2, 4, 4),
    grpo=(16, 8),
    r=4,
    skeleton=8,
)


@dataclass
class Setup:
    """What all sections share: device, sizes, and one base model, which is frozen."""

    device: str
    scale: Scale
    folder: Path
    sizes: Sizes = field(init=False)

    def __post_init__(self):
        features, tokens = self.scale.linear
        self.sizes = Sizes(features=features, tokens=tokens, r=self.scale.r, skeleton=self.scale.skeleton)

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.device == "cuda" else torch.float32

    def autocast(self) -> AbstractContextManager:
        return torch.autocast("cuda", torch.bfloat16) if self.device == "cuda" else nullcontext()

    @cached_property
    def base(self) -> nn.Module:
        torch.manual_seed(0)
        with torch.device(self.device):
            model = Qwen3ForCausalLM(Qwen3Config(**self.scale.model, eos_token_id=1, pad_token_id=0))
        return model.to(self.dtype).eval().requires_grad_(False)

    def shared_base(self) -> nn.Module:
        """The modules of the base once more, around its very parameters."""
        return deepcopy(self.base, {id(parameter): parameter for parameter in self.base.parameters()})

    def adapted(self, method: str) -> nn.Module:
        torch.manual_seed(0)
        return trained(get_peft_model(self.shared_base(), METHODS[method][0](self.sizes)))

    def tokens(self, sequences: int, length: int) -> torch.Tensor:
        return torch.randint(2, self.scale.model["vocab_size"], (sequences, length), device=self.device)

    def described(self) -> dict:
        return {
            "dtype": str(self.dtype).removeprefix("torch."),
            "autocast": self.device == "cuda",
            **asdict(self.scale),
        }
