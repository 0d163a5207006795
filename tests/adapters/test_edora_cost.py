"""EDoRA: what a step allocates and saves, and what a forward without gradients keeps."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from tests.adapters.test_edora import layer_of, linear_of, model_of, rows, trained


class Largest(TorchDispatchMode):
    """Number of elements of the largest tensor that any operation made."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and not function.is_view and result.is_contiguous():
            self.elements = max(self.elements, result.numel())
        return result


@pytest.mark.parametrize("way", ["fused", "plain"])
def test_a_step_makes_nothing_of_the_size_of_the_weight(way):
    layer = layer_of(model_of(linear_of(90, 80)))
    if way == "plain":
        layer.base_layer.register_forward_hook(lambda *_: None)
    x = rows(5, 90).requires_grad_()
    layer(x)
    with Largest() as largest:
        layer(x).sum().backward()
    assert 0 < largest.elements <= 5 * 90 < 80 * 90 / 8


@pytest.mark.parametrize("magnitude, kept", [(True, 32 * 40 + 32 * 4), (False, 32 * 4)])
def test_what_is_saved_for_the_backward_pass(magnitude, kept):
    layer = layer_of(model_of(linear_of(30, 40, bias=False), magnitude=magnitude))
    x = rows(32, 30).requires_grad_()
    saved = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.setdefault(t.data_ptr(), t), lambda t: t):
        output = layer(x)
    assert x.data_ptr() not in saved
    assert sum(tensor.numel() for tensor in saved.values() if len(tensor) == 32) == kept
    assert (output.data_ptr() in saved) == magnitude


def _fused_adamw(layer):
    optimizer = torch.optim.AdamW(trained(layer), lr=0.1, fused=True)
    for parameter in trained(layer):
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()


def _data(layer):
    for parameter in trained(layer):
        parameter.data.mul_(1.5)


def _load_state_dict(layer):
    layer.load_state_dict({name: 0.9 * t if "hfd_edora" in name else t for name, t in layer.state_dict().items()})


def _load_factors(layer):
    layer.load_state_dict({n: 0.9 * t if "left" in n or "norm" in n else t for n, t in layer.state_dict().items()})


def _load_right(layer):
    layer.load_state_dict({n: 0.9 * t if "right" in n else t for n, t in layer.state_dict().items()}, assign=True)


def _exchange(layer):
    layer.hfd_edora_magnitude["default"].weight = nn.Parameter(trained(layer)[1].detach() * 2)


WRITES = [_fused_adamw, _data, _load_state_dict, _load_factors, _load_right, _exchange]


@pytest.mark.parametrize("write", WRITES)
def test_nothing_stale_without_gradients(write):
    layer = layer_of(model_of(linear_of()))
    x = rows(3, 12)
    with torch.no_grad():
        before = layer(x)
        write(layer)
        after = layer(x)
        fresh = layer_of(model_of(linear_of()))
        fresh.load_state_dict(layer.state_dict())
        assert not torch.allclose(before, after)
        assert torch.equal(after, fresh(x))


@pytest.mark.parametrize("gradients", [False, True])
def test_nothing_stale_when_the_weight_is_written(gradients):
    layer, fresh = layer_of(model_of(linear_of())), layer_of(model_of(linear_of()))
    x = rows(3, 12)
    for each in (layer, fresh):
        with torch.no_grad():
            for parameter in trained(each):
                parameter.add_(0.3)
    with torch.set_grad_enabled(gradients):
        before = layer(x)
        for each in (layer, fresh):
            with torch.no_grad():
                each.base_layer.weight.mul_(1.1)
        after = layer(x)
        assert not torch.allclose(before, after)
        assert torch.equal(after, fresh(x))


def test_its_dora_has_its_gain_also_over_a_weight_that_was_rounded():
    """DoRA divides by the norms of the weight at hand, EDoRA by those that were saved."""
    layer = layer_of(model_of(linear_of()))
    with torch.no_grad():
        for parameter in trained(layer):
            parameter.add_(0.3)
        layer.base_layer.weight.copy_(layer.base_layer.weight.bfloat16())
        a, b, magnitude = layer.dora_factors("default")
        weight, x = layer.base_layer.weight + b @ a, rows(3, 12)
        dense = weight * (magnitude / weight.norm(dim=1))[:, None]
        assert torch.allclose(layer(x) - layer(torch.zeros_like(x)), x @ dense.T, atol=1e-5)
        saved = layer.hfd_edora_magnitude["default"].weight
        assert not torch.allclose(magnitude, saved, atol=1e-6)
