"""Small models, and one entry for each kind of adapter, for the tests of the whole life of an adapter."""

import peft
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, Qwen2Config, Qwen2ForCausalLM

from hf_delta import BoneConfig, EdoraConfig, PmssConfig
from hf_delta.adapters.base import DeltaLinear


# Every kind of adapter that hf_delta has, by a name for the test's id.
KINDS = {
    "pmss": (PmssConfig, {"r": 8}),
    "pmss_normalised": (PmssConfig, {"r": 8, "normalize": True, "selection": "norm"}),
    "bone": (BoneConfig, {"r": 8}),
    "row": (BoneConfig, {"r": 8, "mode": "row"}),
    "mini": (BoneConfig, {"r": 8, "mode": "mini", "mini_r": 4}),
    "bat_row": (BoneConfig, {"r": 8, "mode": "bat_row"}),
    "bat_col": (BoneConfig, {"r": 8, "mode": "bat_col"}),
    "edora": (EdoraConfig, {"r": 4}),
    "lora_xs": (EdoraConfig, {"r": 4, "magnitude": False}),
}
# PEFT's classes with a computation of ours.
DORA = {"dora": (peft.LoraConfig, {"r": 4, "use_dora": True})}

IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6], [5, 3, 5, 8, 9, 7, 9, 3], [2, 7, 1, 8, 2, 8, 1, 8]])


def base_model(dtype=torch.float32, seed=0) -> nn.Module:
    """A Qwen2 with tied embeddings, and biases on q, k and v."""
    torch.manual_seed(seed)
    config = Qwen2Config(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=24,
        tie_word_embeddings=True,
        pad_token_id=0,
    )
    model = Qwen2ForCausalLM(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.1)
        elif "norm" not in name:
            nn.init.normal_(parameter, std=0.15)
    return model.to(dtype)


def gpt2_model() -> nn.Module:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=24, n_positions=16))


def config_of(kind, **changes):
    cls, fields = (KINDS | DORA)[kind]
    return cls(**{"target_modules": "all-linear", "task_type": "CAUSAL_LM", **fields, **changes})


def adapted(kind, model=None, seed=1, std=0.05, **changes):
    """A model with one adapter, away from its start unless `std` is 0."""
    model = peft.get_peft_model(base_model() if model is None else model, config_of(kind, **changes))
    perturb(model, seed, std)
    return model


def perturb(model, seed=1, std=0.05, adapter="default"):
    """Move every trained weight of one adapter; the same seed moves it alike."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if f".{adapter}." in name and "modules_to_save" not in name and parameter.requires_grad:
                parameter += std * torch.randn(parameter.shape, generator=generator).to(parameter)
    return model


def logits(model, ids=IDS):
    with torch.no_grad():
        return model(input_ids=ids).logits


def layers(model):
    return [module for module in model.modules() if isinstance(module, DeltaLinear)]
