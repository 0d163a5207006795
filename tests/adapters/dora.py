"""What the tests of fast DoRA share."""

from contextlib import contextmanager

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from hf_delta.adapters.dora import disable_fast_dora, enable_fast_dora


@contextmanager
def fast_dora(**options):
    enable_fast_dora(**options)
    try:
        yield
    finally:
        disable_fast_dora()


def move(model, std=0.2, seed=1):
    """Put the adapters of a model away from their start."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_magnitude" in name:
                parameter *= 1 + std * torch.rand(parameter.shape, generator=generator).to(parameter)
            elif "lora_" in name:
                parameter += std * torch.randn(parameter.shape, generator=generator).to(parameter)
    return model


def model_of(linear, std=0.2, **fields):
    """One linear layer under DoRA."""
    fields = {"r": 4, "lora_alpha": 6, "use_dora": True, **fields}
    model = get_peft_model(nn.Sequential(linear), LoraConfig(target_modules=["0"], **fields))
    return move(model, std) if std else model


def layer_of(model):
    return model.base_model.model[0]


def linear_of(i=37, o=53, bias=True, dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    return nn.Linear(i, o, bias=bias, dtype=dtype)


def llama(std=0.0, tie=False, **fields):
    """A language model of two layers under DoRA on all its linear layers."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=24,
        pad_token_id=0,
        tie_word_embeddings=tie,
    )
    fields = {"r": 4, "use_dora": True, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **fields}
    model = get_peft_model(LlamaForCausalLM(config), LoraConfig(**fields))
    return move(model, std) if std else model


LLAMA_LAYERS = 14


def tokens(batch=2, length=6, seed=0):
    return torch.randint(1, 24, (batch, length), generator=torch.Generator().manual_seed(seed))


def gradients(model, x, dy):
    """Output, gradient of the input, and gradients of what is trained."""
    model.zero_grad()
    x = x.detach().requires_grad_()
    y = model(x)
    y.backward(dy.to(y.dtype))
    return [y.detach(), x.grad, *[p.grad for p in model.parameters() if p.requires_grad]]


def assert_all_close(found, expected, tolerance=1e-5):
    assert len(found) == len(expected)
    for one, other in zip(found, expected):
        assert one.dtype == other.dtype and one.shape == other.shape
        scale = other.double().norm(p=torch.inf).item() if other.numel() else 0.0
        torch.testing.assert_close(one.double(), other.double(), rtol=0, atol=tolerance * max(scale, 1e-3))


def a_b_m(model):
    layer = layer_of(model)
    return [part["default"].weight for part in (layer.lora_A, layer.lora_B, layer.lora_magnitude_vector)]


def exact(model, x):
    """Dense, in float64."""
    layer = layer_of(model)
    a, b, m = (tensor.detach().double() for tensor in a_b_m(model))
    changed = layer.base_layer.weight.detach().double() + layer.scaling["default"] * b @ a
    weight = m.unsqueeze(1) * changed / changed.norm(dim=1, keepdim=True)
    return nn.functional.linear(x.double(), weight, layer.base_layer.bias.detach().double())


def assert_right(model):
    x = torch.randn(6, 37, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(model(x).double(), exact(model, x), rtol=1e-5, atol=1e-5)


def load(model, **options):
    state = {k: v + 0.1 if "lora_" in k else v for k, v in model.state_dict().items()}
    model.load_state_dict(state, **options)
