"""Bone: adapters of every mode in one layer, one at a time, together, and in one batch; weights of several row parts."""

import pytest
import torch
from peft import get_peft_model
from torch import nn
from torch.nn import functional as F

from hf_delta import BoneConfig
from hf_delta.adapters.bone import bat
from tests.adapters.test_bone import block_of, dense_change, every_mode, layer_of


# An adapter for each mode; PEFT warns of names that a parameter's name contains.
ADAPTERS = {
    "BONE": {"mode": "bone"},
    "ROW": {"mode": "row"},
    "MINI": {"mode": "mini", "mini_r": 8},
    "BAT_ROW": {"mode": "bat_row"},
    "BAT_COL": {"mode": "bat_col"},
}


def model_of_modes():
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(12, 16, dtype=torch.float64))
    configs = {name: BoneConfig(r=4, target_modules=["0"], **fields) for name, fields in ADAPTERS.items()}
    model = get_peft_model(base, configs.pop("BONE"), adapter_name="BONE")
    for name, config in configs.items():
        model.add_adapter(name, config)
    model.double()
    layer = model.base_model.model[0]
    for name in ADAPTERS:
        nn.init.normal_(block_of(layer, name), std=0.3)
    return model, layer


def expected(layer, names, x):
    weight = layer.original_weight()
    changes = [dense_change(ADAPTERS[name], weight, block_of(layer, name).detach(), 4) for name in names]
    return F.linear(x, weight + sum(changes), layer.base_bias)


def test_one_at_a_time_together_and_without_some():
    model, layer = model_of_modes()
    x = torch.randn(5, 12, dtype=torch.float64)
    for name in ADAPTERS:
        model.set_adapter(name)
        torch.testing.assert_close(model(x), expected(layer, [name], x))
    model.base_model.set_adapter(list(ADAPTERS))
    torch.testing.assert_close(model(x), expected(layer, ADAPTERS, x))
    model.set_adapter("MINI")
    for name in ("BONE", "ROW", "BAT_COL"):
        model.delete_adapter(name)
    assert layer.adapters == list(layer.hfd_bone_mode) == list(layer.hfd_bone_dropout) == ["MINI", "BAT_ROW"]
    model.base_model.set_adapter(["MINI", "BAT_ROW"])
    torch.testing.assert_close(model(x), expected(layer, ["MINI", "BAT_ROW"], x))


def test_a_batch_with_another_mode_in_every_row():
    model, layer = model_of_modes()
    x = torch.randn(6, 3, 12, dtype=torch.float64)
    output = model.eval()(x, adapter_names=[*ADAPTERS, "__base__"])
    for row, name in enumerate(ADAPTERS):
        torch.testing.assert_close(output[row], expected(layer, [name], x[row]))
    torch.testing.assert_close(output[5], layer.base_layer(x[5]))


@pytest.mark.parametrize("tokens", [2, 7], ids=["few", "many"])
@pytest.mark.parametrize("way", ["fused", "change alone"])
def test_bat_col_in_several_row_parts(monkeypatch, tokens, way):
    """Three parts, of 8, 8 and 4 rows."""
    monkeypatch.setattr(bat, "ROWS", 8)
    layer = layer_of({"mode": "bat_col"}, o=20)
    if way == "change alone":
        layer.base_layer.register_forward_hook(lambda *_: None)
    weight, d = layer.base_layer.weight, block_of(layer).detach().clone().requires_grad_()
    x = torch.randn(tokens, 12, dtype=torch.float64, requires_grad=True)
    wanted = F.linear(x, weight + dense_change({"mode": "bat_col"}, weight, d, 4), layer.base_bias)
    found = layer(x)
    torch.testing.assert_close(found, wanted)
    gradients = torch.autograd.grad(found.square().sum(), [x, block_of(layer)])
    torch.testing.assert_close(gradients, torch.autograd.grad(wanted.square().sum(), [x, d]))


@every_mode
def test_the_rank_of_the_change_is_the_promised_one(fields):
    layer = layer_of(fields)
    change = layer.delta_weight("default", layer.base_layer.weight)
    full = fields["mode"].startswith("bat")
    assert torch.linalg.matrix_rank(change) == (12 if full else min(4, fields.get("mini_r", 4)))
