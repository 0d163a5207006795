"""Fast DoRA against PEFT's own DoRA, and against float64."""

import pytest
import torch
from peft import LoraConfig
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.pytorch_utils import Conv1D

from hf_delta.adapters.dora import layer
from hf_delta.adapters.dora.functions import FusedDora, compose_change, usable_norm
from tests.adapters.dora import (
    assert_all_close,
    fast_dora,
    gradients,
    layer_of,
    linear_of,
    llama,
    model_of,
    tokens,
)


def random(*shape, seed=3, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def both(model, x, dy):
    """What PEFT computes and what fast DoRA computes; dropout draws the same."""
    torch.manual_seed(5)
    slow = gradients(model, x, dy)
    with fast_dora():
        torch.manual_seed(5)
        return gradients(model, x, dy), slow


def fused_calls(monkeypatch):
    calls, apply = [], FusedDora.apply
    monkeypatch.setattr(layer.FusedDora, "apply", lambda *args: calls.append(1) or apply(*args))
    return calls


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(7,), (1,), (3, 5), (0,), (2, 0)], ids=str)
def test_equal_to_peft_in_any_shape(bias, shape, monkeypatch):
    calls = fused_calls(monkeypatch)
    assert_all_close(*both(model_of(linear_of(bias=bias)), random(*shape, 37), random(*shape, 53)))
    assert len(calls) == 1


@pytest.mark.parametrize("fields", [{"use_rslora": True}, {"r": 60}, {"lora_alpha": -3}], ids=str)
def test_equal_to_peft_with_other_scalings_and_ranks(fields):
    assert_all_close(*both(model_of(linear_of(), **fields), random(2, 5, 37), random(2, 5, 53)))


@pytest.mark.parametrize(
    "linear", [linear_of(), linear_of(bias=False), Conv1D(53, 37)], ids=["bias", "bare", "conv1d"]
)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_equal_to_peft_where_modules_compute_one_by_one(linear, dropout, monkeypatch):
    calls = fused_calls(monkeypatch)
    model = model_of(linear, lora_dropout=dropout, fan_in_fan_out=isinstance(linear, Conv1D))
    assert_all_close(*both(model, random(2, 5, 37), random(2, 5, 53)))
    assert len(calls) == (not dropout and isinstance(linear, nn.Linear))


def test_dropout_is_off_in_evaluation(monkeypatch):
    calls = fused_calls(monkeypatch)
    model = model_of(linear_of(), lora_dropout=0.3).eval()
    assert_all_close(*both(model, random(5, 37), random(5, 53)))
    assert calls


@pytest.mark.parametrize("second", [{"use_dora": True, "r": 3}, {"use_dora": False, "r": 3}], ids=str)
def test_equal_to_peft_with_several_active_adapters(second):
    model = model_of(linear_of())
    model.add_adapter("second", LoraConfig(target_modules=["0"], init_lora_weights=False, **second))
    layer_of(model).set_adapter(["default", "second"])
    assert_all_close(*both(model, random(5, 37), random(5, 53)))


def test_strided_inputs_and_gradients():
    model = model_of(linear_of())
    x, dy = random(37, 3, 4).permute(1, 2, 0), random(53, 3, 4).permute(1, 2, 0)
    assert_all_close(*both(model, x, dy))
    assert_all_close(*both(model, x, random(3, 1, 1).expand(3, 4, 53)))
    model = model_of(linear_of(bias=False))
    assert_all_close(*both(model, x.transpose(0, 1), dy.transpose(0, 1)))


@pytest.mark.parametrize("trained", [["lora_A"], ["lora_B"], ["magnitude"], ["lora_A", "magnitude"], []], ids=str)
@pytest.mark.parametrize("needs_x", [True, False])
def test_only_what_needs_a_gradient_gets_one(fast, trained, needs_x):
    model = model_of(linear_of())
    expected = dict(zip([n for n, p in model.named_parameters() if p.requires_grad], both_gradients(model)))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(part in name for part in trained))
    x = random(5, 37).requires_grad_(needs_x)
    y = model(x)
    assert y.requires_grad == bool(trained or needs_x)
    if y.requires_grad:
        y.backward(random(5, 53))
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, expected[name])


def both_gradients(model):
    found = gradients(model, random(5, 37), random(5, 53))[2:]
    model.zero_grad()
    return found


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("zeros", [False, True])
def test_gradients_are_right_in_float64(bias, zeros):
    x, weight, a, b = (random(*s, dtype=torch.float64) for s in ((2, 3, 5), (7, 5), (2, 5), (7, 2)))
    magnitude = random(7, dtype=torch.float64)
    if zeros:
        magnitude[[1, 4]] = 0
    shift = random(7, seed=9, dtype=torch.float64) if bias else None
    norm = random(7, dtype=torch.float64).abs() + 0.5
    for tensor in (x, a, b, magnitude):
        tensor.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x, a, b, m: FusedDora.apply(x, weight, shift, a, b, m, norm, 0.7, zeros), (x, a, b, magnitude)
    )


def test_magnitudes_of_zero_and_rows_of_zeros_are_finite_and_right(fast):
    linear = linear_of()
    with torch.no_grad():
        linear.weight[3] = 0
    model = model_of(linear, std=0)
    adapter = layer_of(model)
    assert adapter.lora_magnitude_vector["default"].weight[3] == 0
    with torch.no_grad():
        adapter.lora_magnitude_vector["default"].weight[5] = 0
    x, dy = random(6, 37), random(6, 53)
    y, dx, da, db, dm = gradients(model, x, dy)
    assert all(torch.isfinite(tensor).all() for tensor in (y, dx, da, db, dm))
    torch.testing.assert_close(y[:, [3, 5]], linear.bias[[3, 5]].expand(6, 2))
    direction = linear.weight[5] / linear.weight[5].norm()
    torch.testing.assert_close(dm[5], (dy[:, 5] * (x @ direction)).sum())
    assert torch.equal(usable_norm(torch.tensor([0.0, 2.0])), torch.tensor([torch.inf, 2.0]))


def reference(model, x, dy):
    """The same in float64, with PEFT's code."""
    wide = model_of(linear_of(dtype=torch.float64), std=0)
    wide.load_state_dict({k: v.double() for k, v in model.state_dict().items()})
    return gradients(wide.double(), x.double(), dy.double())


def relative_errors(found, truth):
    return [((f.double() - t).norm() / t.norm()).item() for f, t in zip(found, truth)]


@pytest.mark.parametrize("adapter_dtype", ["float32", "base"])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("base", [torch.bfloat16, torch.float32])
def test_no_less_exact_than_peft(base, adapter_dtype, autocast):
    model = model_of(linear_of(dtype=base))
    model = model.to(base) if adapter_dtype == "base" else model
    x, dy = random(40, 37, dtype=base), random(40, 53, dtype=base)
    with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
        slow = gradients(model, x, dy)
        with fast_dora():
            found = gradients(model, x, dy)
    truth = reference(model, x, dy)
    floor = 1e-6 if base == torch.float32 and autocast is None else 6e-3
    for mine, theirs in zip(relative_errors(found, truth), relative_errors(slow, truth)):
        assert mine < max(1.3 * theirs, floor)
    assert [t.dtype for t in found] == [t.dtype for t in slow]


@pytest.mark.parametrize("autocast", [False, True])
def test_gains_between_two_16_bit_numbers_are_not_rounded(fast, autocast):
    model = model_of(linear_of(i=64, o=64, bias=False, dtype=torch.bfloat16), std=0)
    magnitude, weight = layer_of(model).lora_magnitude_vector["default"].weight, layer_of(model).base_layer.weight
    # Half way from 1 + 2/128 to 1 + 3/128: rounded, a gain would be wrong by 4e-3.
    with torch.no_grad():
        magnitude.copy_(weight.double().norm(dim=1) * (1 + 2.5 / 128))
    x = random(2048, 64, dtype=torch.bfloat16)
    truth = x.double() @ weight.double().T
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        grown = (model(x).double() * truth).sum(0) / (truth * truth).sum(0)
    assert (grown - (1 + 2.5 / 128)).abs().max() < 1e-3


def test_small_changes_of_16_bit_outputs_are_kept_in_float32():
    base, magnitude = random(9, 8, dtype=torch.bfloat16), torch.full((8,), 1.0015)
    change = compose_change(base, torch.zeros_like(base), magnitude, torch.ones(8), 1.0)
    torch.testing.assert_close(change, (magnitude - 1) * base.float())


@pytest.mark.parametrize("bias", [True, False])
def test_the_start_is_the_base_model_to_the_last_bit_in_float32(fast, bias):
    model, x = model_of(linear_of(bias=bias), std=0), random(9, 37)
    base = layer_of(model).base_layer(x)
    assert torch.equal(model(x), base)
    with torch.no_grad():
        assert torch.equal(model(x), base)
    model = llama()
    ids = tokens()
    with torch.no_grad(), model.disable_adapter():
        base = model(ids).logits
    assert torch.equal(model(ids).logits, base)


class SizeWatch(TorchDispatchMode):
    """The largest number of elements of an operator's output that is not its input."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        inputs = {a.untyped_storage().data_ptr() for a in args if isinstance(a, torch.Tensor)}
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in inputs:
                self.largest = max(self.largest, tensor.numel())
        return out


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("size, dtype", [((130, 120), torch.float32), ((2100, 2048), torch.bfloat16)], ids=str)
def test_training_makes_no_tensor_of_the_size_of_the_weight(size, dtype, dropout):
    i, o = size
    model = model_of(linear_of(i, o, dtype=dtype), lora_dropout=dropout)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])

    def step():
        with SizeWatch() as watch:
            gradients(model, random(3, i, dtype=dtype), random(3, o, dtype=dtype))
            optimizer.step()
        return watch.largest

    with fast_dora():
        assert max(step() for _ in range(2)) < i * o
    assert step() >= i * o


def test_compiled_models_compute_the_same(fast):
    model, x = model_of(linear_of()), random(5, 37)
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(compiled(x), model(x))


def test_hooks_of_modules_are_called(fast):
    model, x, seen = model_of(linear_of()), random(5, 37), []
    expected = model(x)
    for module in (layer_of(model).base_layer, layer_of(model).lora_A["default"], layer_of(model).lora_B["default"]):
        handle = module.register_forward_hook(lambda *args: seen.append(1))
        torch.testing.assert_close(model(x), expected)
        assert seen
        seen.clear()
        handle.remove()
