"""Models with random weights, and adapters for them, that benchmarks share; nothing is downloaded."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from dataclasses import dataclass

import torch
from peft import LoraConfig, MissConfig, PeftConfig, get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hf_delta import BoneConfig, EdoraConfig, PmssConfig
from hf_delta.adapters.dora import fast_dora


@dataclass(frozen=True)
class Sizes:
    features: int = 2048
    tokens: tuple[int, int] = (4, 128)
    decoded: tuple[int, int] = (8, 1)
    r: int = 16
    skeleton: int = 64
    pivots: int = 128
    large: int = 4096
    llama: tuple[int, int, int, int] = (4, 512, 1408, 8192)  # layers, hidden, MLP, vocabulary
    decode_steps: int = 4


# Configuration, and whether fast DoRA is on.
METHODS: dict[str, tuple[Callable[[Sizes], PeftConfig], bool]] = {
    "LoRA": (lambda s: LoraConfig(r=s.r, target_modules="all-linear"), False),
    "DoRA of PEFT": (lambda s: LoraConfig(r=s.r, use_dora=True, target_modules="all-linear"), False),
    "fast DoRA": (lambda s: LoraConfig(r=s.r, use_dora=True, target_modules="all-linear"), True),
    "Bone": (lambda s: BoneConfig(r=s.r, target_modules="all-linear"), False),
    "bat_row": (lambda s: BoneConfig(r=s.r, mode="bat_row", target_modules="all-linear"), False),
    "bat_col": (lambda s: BoneConfig(r=s.r, mode="bat_col", target_modules="all-linear"), False),
    "PMSS": (lambda s: PmssConfig(r=s.skeleton, cache_dir=None, target_modules="all-linear"), False),
    "EDoRA": (lambda s: EdoraConfig(r=s.r, target_modules="all-linear"), False),
    "MiSS of PEFT": (lambda s: MissConfig(r=s.r, target_modules="all-linear"), False),
    "MiSS bat of PEFT": (lambda s: MissConfig(r=s.r, init_weights="bat", target_modules="all-linear"), False),
}


def switched(method: str) -> AbstractContextManager:
    return fast_dora() if METHODS[method][1] else nullcontext()


def llama(sizes: Sizes) -> nn.Module:
    layers, hidden, mlp, vocabulary = sizes.llama
    torch.manual_seed(0)
    config = LlamaConfig(
        num_hidden_layers=layers,
        hidden_size=hidden,
        intermediate_size=mlp,
        vocab_size=vocabulary,
        num_attention_heads=hidden // 32,
        num_key_value_heads=hidden // 32,
    )
    return LlamaForCausalLM(config).eval()


def adapted(base: nn.Module, method: str, sizes: Sizes) -> nn.Module:
    """A copy of the base with the adapter."""
    config, _ = METHODS[method]
    torch.manual_seed(0)
    return trained(get_peft_model(deepcopy(base), config(sizes))).eval()


def trained(model: nn.Module) -> nn.Module:
    """Adapters moved away from where they start, where some of their tensors are zeros."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=1e-3)
    return model


def word_tokenizer() -> PreTrainedTokenizerFast:
    """Four tokens, whatever the vocabulary of the model."""
    words = {"<pad>": 0, "<eos>": 1, "a": 2, "b": 3}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")
