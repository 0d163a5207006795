"""Merging and unmerging under fast DoRA, and layers that bitsandbytes quantised."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_delta import InputError
from hf_delta._compat.bitsandbytes import dequantised_weight
from hf_delta.adapters.dora import base_weight, disable_fast_dora, merging
from tests.adapters.dora import (
    assert_all_close,
    fast_dora,
    gradients,
    layer_of,
    linear_of,
    llama,
    model_of,
    move,
    tokens,
)


x = torch.randn(5, 37, generator=torch.Generator().manual_seed(3))
dy = torch.randn(5, 53, generator=torch.Generator().manual_seed(4))
LINEARS = {"linear": linear_of, "conv1d": lambda: Conv1D(53, 37)}


def with_three(linear):
    """DoRA, LoRA, and DoRA of another rank on one layer."""
    model = model_of(linear, fan_in_fan_out=isinstance(linear, Conv1D))
    for name, use_dora in (("lora", False), ("dora", True)):
        config = LoraConfig(target_modules=["0"], r=3, use_dora=use_dora, init_lora_weights=False)
        config.fan_in_fan_out = isinstance(linear, Conv1D)
        model.add_adapter(name, config)
    return move(model, 0.1, seed=5)


ORDERS = [["default"], ["default", "lora"], ["lora", "dora"], ["dora", "lora", "default"]]


@pytest.mark.parametrize("names", ORDERS, ids="+".join)
@pytest.mark.parametrize("kind", LINEARS)
@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize("together", [False, True])
def test_merged_weights_are_peft_s_and_the_original_comes_back(names, kind, safe, together):
    model = with_three(LINEARS[kind]())
    layer, peft_layer = layer_of(model), layer_of(copy.deepcopy(model))
    for name in names:
        peft_layer.merge(safe_merge=safe, adapter_names=[name])
    original = layer.base_layer.weight
    before = original.detach().clone()
    with fast_dora():
        layer.set_adapter(names)
        unmerged = model(x)
        for some in [names] if together else [[name] for name in names]:
            layer.merge(safe_merge=safe, adapter_names=some)
        assert layer.merged_adapters == names
        torch.testing.assert_close(layer.base_layer.weight, peft_layer.base_layer.weight, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(model(x), unmerged, rtol=1e-4, atol=1e-5)
        layer.unmerge()
        assert layer.base_layer.weight is original and torch.equal(original, before)
        assert torch.equal(model(x), unmerged) and not layer.merged_adapters


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_hundred_merges_leave_every_bit(fast, dtype):
    model = model_of(linear_of(dtype=dtype))
    before = layer_of(model).base_layer.weight.detach().clone()
    for _ in range(100):
        model.merge_adapter()
        assert not torch.equal(layer_of(model).base_layer.weight, before)
        model.unmerge_adapter()
    assert torch.equal(layer_of(model).base_layer.weight, before)


def test_a_16_bit_merge_is_rounded_once(fast):
    model = model_of(linear_of(dtype=torch.bfloat16))
    layer = layer_of(model)
    weight = layer.base_layer.weight.detach().double()
    a, b = (part["default"].weight.detach().double() for part in (layer.lora_A, layer.lora_B))
    changed = weight + layer.scaling["default"] * b @ a
    magnitude = layer.lora_magnitude_vector["default"].weight.detach().double()
    truth = (magnitude / changed.norm(dim=1)).unsqueeze(1) * changed
    model.merge_adapter()
    differing = (layer.base_layer.weight != truth.bfloat16()).double().mean()
    # Float32 and float64 fall on two sides of a rounding border now and then.
    assert differing < 1e-3


def test_tied_weights_stay_tied_and_the_other_end_is_not_touched(fast):
    model = llama(std=0.2, tie=True, target_modules=["lm_head", "q_proj"])
    head, embedding = model.base_model.model.lm_head.base_layer, model.base_model.model.model.embed_tokens
    assert head.weight is embedding.weight
    before, logits = embedding.weight.detach().clone(), model(tokens()).logits
    model.merge_adapter()
    assert torch.equal(embedding.weight, before) and not torch.equal(head.weight, before)
    torch.testing.assert_close(model(tokens()).logits, logits, rtol=0, atol=1e-5)
    model.unmerge_adapter()
    assert head.weight is embedding.weight and torch.equal(head.weight, before)


def test_a_merge_that_fails_changes_nothing(fast):
    model = model_of(linear_of())
    layer = layer_of(model)
    with torch.no_grad():
        layer.lora_B["default"].weight[0] = torch.nan
    original = layer.base_layer.weight
    with pytest.raises(ValueError, match="NaNs detected in the merged weights. The adapter default"):
        model.merge_adapter(safe_merge=True)
    assert layer.base_layer.weight is original and not layer.merged and not merging.any_merged()


def test_copies_of_a_merged_model_unmerge_by_themselves(fast):
    model = model_of(linear_of())
    before = layer_of(model).base_layer.weight.detach().clone()
    model.merge_adapter()
    twin = copy.deepcopy(model)
    twin.unmerge_adapter()
    assert torch.equal(layer_of(twin).base_layer.weight, before) and layer_of(model).merged
    model.unmerge_adapter()
    assert torch.equal(layer_of(model).base_layer.weight, before)


def test_merge_and_unload_keeps_nothing(fast):
    model = llama(std=0.2)
    logits = model(tokens()).logits
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(tokens()).logits, logits, rtol=0, atol=1e-5)
    assert not hasattr(merged, "peft_config") or not any("lora" in name for name, _ in merged.named_parameters())
    del model
    assert not merging.any_merged()


def test_it_stays_on_while_original_weights_are_kept(fast):
    model = model_of(linear_of())
    model.merge_adapter()
    with pytest.raises(InputError, match="unmerge_adapter"):
        disable_fast_dora()
    model.unmerge_adapter()
    disable_fast_dora()


def test_what_peft_merged_peft_unmerges():
    model = model_of(linear_of())
    before = layer_of(model).base_layer.weight.detach().clone()
    model.merge_adapter()
    with fast_dora():
        model.unmerge_adapter()
    torch.testing.assert_close(layer_of(model).base_layer.weight, before)


def test_layers_without_dora_merge_as_peft_does(fast, monkeypatch):
    monkeypatch.setattr(merging, "_merge", lambda *args: pytest.fail("not for LoRA"))
    model = model_of(linear_of(), use_dora=False)
    original = layer_of(model).base_layer.weight
    model.merge_adapter()
    assert layer_of(model).base_layer.weight is original
    model.unmerge_adapter()


# -- bitsandbytes ---------------------------------------------------------------------------------------------------
def quantised(kind, bias=True, dropout=0.0):
    bnb = pytest.importorskip("bitsandbytes")
    dense = linear_of(64, 128, bias=bias)
    if kind == "int8":
        linear = bnb.nn.Linear8bitLt(64, 128, bias=bias, has_fp16_weights=False)
    else:
        linear = bnb.nn.Linear4bit(64, 128, bias=bias, compute_dtype=torch.float32, quant_type=kind)
    linear.load_state_dict(dense.state_dict())
    base = nn.Sequential(linear.to("cpu"))
    base.is_loaded_in_8bit, base.is_loaded_in_4bit = kind == "int8", kind != "int8"
    config = LoraConfig(target_modules=["0"], r=4, use_dora=True, lora_dropout=dropout)
    return move(get_peft_model(base, config))


KINDS = ["nf4", "fp4", "int8"]
wide_x = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(3))
wide_dy = torch.randn(2, 5, 128, generator=torch.Generator().manual_seed(4))


def dense_twin(model):
    """The same adapter over the dequantised weight, without quantisation."""
    layer = layer_of(model)
    weight = dequantised_weight(layer.base_layer).detach().clone()
    twin = model_of(linear_of(64, 128, bias=layer.base_layer.bias is not None), std=0)
    layer_of(twin).scaling["default"] = layer.scaling["default"]
    adapter = {k: v for k, v in model.state_dict().items() if "lora_" in k}
    twin.load_state_dict(adapter, strict=False)
    with torch.no_grad():
        layer_of(twin).base_layer.weight.copy_(weight)
        if layer.base_layer.bias is not None:
            layer_of(twin).base_layer.bias.copy_(layer.base_layer.bias)
    return twin


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bias", [True, False])
def test_quantised_layers_are_peft_s_dora_over_the_dequantised_weight(kind, bias):
    model = quantised(kind, bias)
    assert type(layer_of(model)).__name__ in ("Linear4bit", "Linear8bitLt")
    slow = gradients(dense_twin(model), wide_x, wide_dy)
    with fast_dora():
        assert_all_close(gradients(model, wide_x, wide_dy), slow)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_equal_to_peft_on_quantised_layers_with_dropout(kind):
    model = quantised(kind, dropout=0.3)
    torch.manual_seed(5)
    slow = gradients(model, wide_x, wide_dy)
    torch.manual_seed(5)
    with fast_dora():
        assert_all_close(gradients(model, wide_x, wide_dy), slow)


@pytest.mark.parametrize("kind", KINDS)
def test_quantised_layers_are_dequantised_once(kind, fast, evaluations, monkeypatch):
    calls, dequantise = [], base_weight.dequantised_weight
    monkeypatch.setattr(base_weight, "dequantised_weight", lambda *a: calls.append(1) or dequantise(*a))
    model = quantised(kind)
    for _ in range(3):
        gradients(model, wide_x, wide_dy)
    assert len(evaluations) == 3 and len(calls) == (0 if kind == "int8" else 1)


@pytest.mark.parametrize("kind", KINDS)
def test_quantised_layers_merge_into_a_dense_one_and_back(kind, fast):
    model = quantised(kind).eval()
    layer = layer_of(model)
    original = layer.base_layer
    # The first evaluation may lay a 4-bit weight out anew.
    before = model(wide_x)
    state = {k: v.clone() for k, v in original.state_dict().items() if isinstance(v, torch.Tensor)}
    model.merge_adapter()
    assert type(layer.base_layer) is not type(original) and layer.base_layer.weight.is_floating_point()
    # The kernels of 4-bit layers compute in bfloat16 on some processors.
    torch.testing.assert_close(model(wide_x), before, rtol=0, atol=0.03)
    model.unmerge_adapter()
    assert layer.base_layer is original
    assert all(torch.equal(v, state[k]) for k, v in original.state_dict().items() if k in state)
    assert torch.equal(model(wide_x), before)
    merged = model.merge_and_unload()[0]
    assert isinstance(merged, nn.Linear) and merged.weight.is_floating_point()
