"""Bone: every mode against a dense weight written down block by block, and against PEFT's MiSS where PEFT has it."""

import pytest
import torch
from peft import MissConfig, get_peft_model
from torch import nn
from torch.autograd import gradcheck
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from hf_delta import BoneConfig, InputError
from hf_delta.adapters.bone import BoneLinear, bat
from hf_delta.adapters.bone.additive import AdditiveLinear, add_folded_, fold, tile
from hf_delta.adapters.bone.bat import BatColLinear


MODES = {
    "bone": {"mode": "bone"},
    "row": {"mode": "row"},
    "mini": {"mode": "mini", "mini_r": 2},
    "wide mini": {"mode": "mini", "mini_r": 8},
    "bat_row": {"mode": "bat_row"},
    "bat_col": {"mode": "bat_col"},
}
every_mode = pytest.mark.parametrize("fields", MODES.values(), ids=MODES)


def layer_of(fields, i=12, o=16, r=4, bias=True, dtype=torch.float64, std=0.3, seed=0, **changes):
    torch.manual_seed(seed)
    base = nn.Linear(i, o, bias=bias, dtype=dtype).requires_grad_(False)
    layer = BoneLinear(base, "default", BoneConfig(r=r, **fields, **changes))
    nn.init.normal_(layer.hfd_bone_block["default"].weight, std=std)
    return layer


def block_of(layer, adapter="default"):
    return layer.hfd_bone_block[adapter].weight


def dense_change(fields, weight, d, r):
    """The definition, one number at a time."""
    (o, i), mode = weight.shape, fields["mode"]
    change = torch.zeros_like(weight)
    for a in range(o):
        for j in range(i):
            if mode == "bone":
                change[a, j] = d[j % r, a]
            elif mode == "mini":
                change[a, j] = d[j % r, a % d.shape[1]]
            elif mode == "row":
                change[a, j] = d[a // (o // r), j]
            else:
                block = d[j // r] if mode == "bat_row" else d[a // r]
                first = j - j % r
                change[a, j] = weight[a, first : first + r] @ block[:, j % r] + block[a % r, j % r]
    return change


# -- every mode against the definition --------------------------------------------------------------------------------
@every_mode
@pytest.mark.parametrize("tokens", [1, 2, 7])
@pytest.mark.parametrize("bias", [True, False])
def test_output_and_gradients_are_those_of_the_changed_weight(fields, tokens, bias):
    layer = layer_of(fields, bias=bias)
    x = torch.randn(tokens, 3, 12, dtype=torch.float64, requires_grad=True)
    onto = torch.randn(tokens, 3, 16, dtype=torch.float64)
    d = block_of(layer).detach().clone().requires_grad_()
    weight = layer.base_layer.weight
    expected = F.linear(x, weight + dense_change(fields, weight, d, 4), layer.base_layer.bias)
    wanted = torch.autograd.grad((expected * onto).sum(), [x, d])
    output = layer(x)
    found = torch.autograd.grad((output * onto).sum(), [x, block_of(layer)])
    assert torch.allclose(output, expected, atol=1e-12)
    for one, other in zip(found, wanted):
        assert torch.allclose(one, other, atol=1e-12)


@every_mode
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(12,), (0, 12), (2, 3, 12)])
def test_output_without_gradients_is_that_of_the_changed_weight(fields, bias, shape):
    """It takes shorter ways than training does."""
    layer = layer_of(fields, bias=bias)
    x = torch.randn(shape, dtype=torch.float64)
    weight = layer.base_layer.weight
    expected = F.linear(x, weight + dense_change(fields, weight, block_of(layer).detach(), 4), layer.base_layer.bias)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), expected)
    with torch.inference_mode():
        torch.testing.assert_close(layer(x), expected)


@every_mode
def test_the_change_of_the_weight_and_its_factors(fields):
    layer = layer_of(fields, dtype=torch.float32)
    weight = layer.base_layer.weight
    expected = dense_change(fields, weight, block_of(layer).detach(), 4)
    change = layer.delta_weight("default", weight)
    assert torch.allclose(change, expected, atol=1e-6) and change.dtype == torch.float32
    factors = layer.lora_factors("default")
    if fields["mode"].startswith("bat"):
        assert factors is None
        assert torch.linalg.matrix_rank(change) > 4
    else:
        a, b = factors
        assert torch.equal(b @ a, expected)
        assert len(a) == min(4, fields.get("mini_r", 4)) == torch.linalg.matrix_rank(change)


@every_mode
def test_what_is_added_to_an_output_is_the_change_times_the_input(fields):
    """The way of several adapters, mixed batches and layers with hooks."""
    layer = layer_of(fields)
    x = torch.randn(5, 12, dtype=torch.float64)
    output = layer.base_layer(x)
    expected = F.linear(x, layer.delta_weight("default", layer.base_layer.weight))
    assert torch.allclose(layer.delta_output("default", x, output), expected, atol=1e-12)


@pytest.mark.parametrize("size", [8, 9, 10, 11])
@pytest.mark.parametrize("fields", [MODES["bone"], MODES["mini"]], ids=["bone", "mini"])
def test_inputs_that_r_does_not_divide(fields, size):
    layer = layer_of(fields, i=size)
    x = torch.randn(3, size, dtype=torch.float64, requires_grad=True)
    d = block_of(layer).detach().clone().requires_grad_()
    weight = layer.base_layer.weight
    expected = F.linear(x, weight + dense_change(fields, weight, d, 4), layer.base_layer.bias)
    wanted = torch.autograd.grad(expected.square().sum(), [x, d])
    for found in (layer(x), layer.base_layer(x) + layer.delta_output("default", x, None)):
        assert torch.allclose(found, expected, atol=1e-12)
        for one, other in zip(torch.autograd.grad(found.square().sum(), [x, block_of(layer)]), wanted):
            assert torch.allclose(one, other, atol=1e-12)


@pytest.mark.parametrize(
    "fields,size", [*((fields, 12) for fields in MODES.values()), (MODES["bone"], 11), (MODES["mini"], 11)]
)
def test_no_tokens_at_all(fields, size):
    layer = layer_of(fields, i=size)
    x = torch.zeros(2, 0, size, dtype=torch.float64, requires_grad=True)
    output = layer(x)
    with torch.no_grad():
        assert output.shape == layer(x).shape == (2, 0, 16)
    output.sum().backward()
    assert not block_of(layer).grad.any()


def test_adapters_of_different_modes_add_up_in_one_layer():
    layer = layer_of(MODES["bone"])
    weight = layer.base_layer.weight
    changes = layer.delta_weight("default", weight)
    for seed, (name, fields) in enumerate(MODES.items()):
        layer.update_layer(name, BoneConfig(r=4, **fields))
        block = block_of(layer, name)
        block.data = 0.3 * torch.randn(block.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        changes = changes + dense_change(fields, weight, block.detach(), 4)
    layer.set_adapter(["default", *MODES])
    x = torch.randn(5, 12, dtype=torch.float64)
    expected = F.linear(x, weight + changes, layer.base_layer.bias)
    assert torch.allclose(layer(x), expected, atol=1e-11)
    layer.merge()
    assert torch.allclose(layer(x), expected, atol=1e-11)


# -- PEFT's MiSS ------------------------------------------------------------------------------------------------------
PEFT_MODES = {
    "bone": (True, {"mode": "bone"}, 12),
    "bone, ragged": (True, {"mode": "bone"}, 10),
    "mini": ("mini", {"mode": "mini", "mini_r": 4}, 12),
    "bat": ("bat", {"mode": "bat_col"}, 12),
}


@pytest.mark.parametrize("init_weights,fields,size", PEFT_MODES.values(), ids=PEFT_MODES)
@pytest.mark.parametrize("dtype,accuracy", [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_numbers_are_those_of_miss(init_weights, fields, size, dtype, accuracy):
    layer = layer_of(fields, i=size, dtype=dtype)
    peft_fields = {"init_weights": init_weights, "mini_r": fields.get("mini_r", 1), "target_modules": ["0"]}
    base = nn.Sequential(nn.Linear(size, 16, dtype=dtype))
    base[0].load_state_dict(layer.base_layer.state_dict())
    theirs = get_peft_model(base, MissConfig(r=4, **peft_fields)).base_model.model[0]
    theirs.miss_block["default"].data = block_of(layer).detach().clone()
    inputs = [torch.randn(2, 9, size, dtype=dtype, generator=torch.Generator().manual_seed(5)) for _ in range(2)]
    outputs = [module(x.requires_grad_()) for module, x in zip((layer, theirs), inputs)]
    for output in outputs:
        output.square().mean().backward()
    pairs = [outputs, [x.grad for x in inputs], [block_of(layer).grad, theirs.miss_block["default"].grad]]
    layer.merge()
    theirs.merge()
    pairs.append([layer.get_base_layer().weight, theirs.get_base_layer().weight])
    for one, other in pairs:
        assert one.shape == other.shape and torch.allclose(one, other, atol=accuracy, rtol=accuracy)


# -- own gradients ----------------------------------------------------------------------------------------------------
def doubles(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("i,width", [(9, 8), (9, 4), (12, 8), (8, 2)])
def test_gradients_of_the_additive_function(i, width):
    weight, bias = torch.randn(8, i).double(), torch.randn(8).double()
    for b in (bias, None):
        assert gradcheck(lambda x, d, b=b: AdditiveLinear.apply(x, weight, b, d), (doubles(5, i), doubles(4, width)))


@pytest.mark.parametrize("only_change", [False, True])
@pytest.mark.parametrize("tokens", [1, 5])
def test_gradients_of_the_bat_col_function(tokens, only_change, monkeypatch):
    """Several row parts with a shorter last one, and a weight that is made again in the backward pass."""
    monkeypatch.setattr(bat, "ROWS", 6)
    weight, asked = torch.randn(15, 9).double(), []
    inputs = doubles(tokens, 9), doubles(5, 3, 3)
    assert gradcheck(lambda x, d: BatColLinear.apply(x, weight, None, d, only_change), inputs)

    def dequantised():
        asked.append(1)
        return weight

    assert gradcheck(lambda x, d: BatColLinear.apply(x, dequantised, None, d, only_change), inputs)
    assert len(asked) > 2


@pytest.mark.parametrize("function", ["bone", "bat_col"])
def test_only_the_gradients_that_are_needed(function):
    layer = layer_of(MODES[function])
    x = torch.randn(5, 12, dtype=torch.float64)
    layer(x).sum().backward()
    assert block_of(layer).grad is not None and x.grad is None
    block_of(layer).requires_grad_(False)
    x.requires_grad_()
    layer(x).sum().backward()
    expected = layer.base_layer.weight + layer.delta_weight("default", layer.base_layer.weight)
    assert torch.allclose(x.grad, expected.sum(0).expand(5, -1), atol=1e-12)


def test_fold_and_its_transpose():
    x, y = torch.randn(3, 11).double(), torch.randn(3, 4).double()
    assert torch.allclose((fold(x, 4) * y).sum(), (x * add_folded_(torch.zeros_like(x), y)).sum())
    assert torch.equal(fold(torch.arange(7.0), 3), torch.tensor([0.0 + 3 + 6, 1 + 4, 2 + 5]))
    assert torch.equal(tile(torch.tensor([1.0, 2]), 6), torch.tensor([1.0, 2, 1, 2, 1, 2]))


# -- memory -----------------------------------------------------------------------------------------------------------
def saved_sizes(layer, x):
    """Sizes of the storages kept for the backward pass, without parameters and the input."""
    held = {p.untyped_storage().data_ptr() for p in [*layer.parameters(), x]}
    sizes = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in held:
            sizes[storage.data_ptr()] = storage.nbytes() // tensor.element_size()
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        output = layer(x)
    return sorted(sizes.values()), output


class LargestTensor(TorchDispatchMode):
    """The number of elements of the largest storage that an operation returns, base weights aside."""

    def __init__(self, layer):
        super().__init__()
        self.weight, self.largest = layer.get_base_layer().weight.untyped_storage().data_ptr(), 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() != self.weight:
                self.largest = max(self.largest, tensor.untyped_storage().nbytes() // tensor.element_size())
        return result


KEPT = {"bone": [10 * 4], "mini": [10 * 4], "row": [], "bat_row": [], "bat_col": []}


@pytest.mark.parametrize("mode", KEPT)
def test_what_is_kept_for_the_backward_pass(mode):
    layer = layer_of(MODES[mode], i=32, o=64, dtype=torch.float32)
    x = torch.randn(10, 32, requires_grad=True)
    sizes, output = saved_sizes(layer, x)
    # The sum over blocks is T x r; the input is an activation that exists anyway.
    assert sizes == KEPT[mode]
    output.sum().backward()


@pytest.mark.parametrize("mode", KEPT)
def test_no_second_weight_is_formed(mode, monkeypatch):
    monkeypatch.setattr(bat, "ROWS", 16)
    layer = layer_of(MODES[mode], i=64, o=128, dtype=torch.float32)
    x = torch.randn(10, 64, requires_grad=True)
    with LargestTensor(layer) as largest:
        layer(x).sum().backward()
    assert largest.largest < 64 * 128 / 2


# -- dtypes, dropout, hooks -------------------------------------------------------------------------------------------
@every_mode
def test_bfloat16(fields):
    layer = layer_of(fields, i=32, o=64, dtype=torch.bfloat16, std=0.05)
    block = block_of(layer)
    layer.hfd_bone_block["default"].weight = nn.Parameter(block.detach().float())
    exact = layer_of(fields, i=32, o=64, dtype=torch.float32)
    exact.base_layer.load_state_dict(layer.base_layer.state_dict())
    exact.hfd_bone_block["default"].weight = nn.Parameter(block.detach().float())
    x = torch.randn(50, 32).bfloat16()
    results = []
    for module, given in ((layer, x), (exact, x.float())):
        output = module(given.requires_grad_())
        output.float().square().sum().backward()
        results.append((output.float(), block_of(module).grad))
    assert results[0][1].dtype == torch.float32
    for one, other in zip(*results):
        assert (one - other).norm() < 0.02 * other.norm()


@every_mode
def test_dropout_takes_the_input_of_the_adapter_only(fields):
    layer = layer_of(fields, dropout=0.5)
    x = torch.ones(400, 12, dtype=torch.float64)
    frozen, weight = layer.base_layer(x[:1]), layer.base_layer.weight
    changed = F.linear(x[:1], layer.delta_weight("default", weight))
    dropped = layer(x)
    assert not torch.allclose(dropped, frozen + changed, atol=1e-3)
    # Twice each input or nothing: right on average.
    assert torch.allclose((dropped - frozen).mean(0), changed[0], atol=0.6)
    layer.eval()
    assert torch.allclose(layer(x), frozen + changed, atol=1e-12)


def test_a_trained_bias_gets_its_gradient():
    for fields in MODES.values():
        layer = layer_of(fields)
        layer.base_layer.bias.requires_grad_()
        layer(torch.randn(5, 12, dtype=torch.float64)).sum().backward()
        assert torch.allclose(layer.base_layer.bias.grad, torch.full((16,), 5.0, dtype=torch.float64))


@pytest.mark.parametrize("mode", ["bone", "bat_col"])
def test_backward_under_autocast(mode):
    layer = layer_of(MODES[mode], dtype=torch.float32)
    x = torch.randn(9, 12, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        layer(x).sum().backward()
    found = block_of(layer).grad.clone()
    block_of(layer).grad = None
    layer(x).sum().backward()
    assert (found - block_of(layer).grad).norm() < 0.03 * found.norm()


# -- bad input --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "fields,said",
    [
        ({"mode": "col"}, "mode is 'col': write one of bone, row, mini, bat_row, bat_col"),
        ({"mode": "mini"}, "mini needs mini_r, and it is None"),
        ({"mode": "mini", "mini_r": 0}, "mini_r, and it is 0"),
        ({"mini_r": 4}, "mini_r goes with mode: mini, and mode is bone"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"dropout": "high"}, "dropout is 'high'"),
    ],
)
def test_wrong_fields_are_refused(fields, said):
    with pytest.raises(InputError, match=said):
        BoneConfig(**fields)


@pytest.mark.parametrize(
    "fields,r,said",
    [
        ({"mode": "bone"}, 13, "r = 13 is larger than the 12 inputs"),
        ({"mode": "mini", "mini_r": 16}, 13, "r = 13 is larger than the 12 inputs"),
        ({"mode": "row"}, 5, "r = 5 does not divide the 16 outputs of this layer: take r = 4"),
        ({"mode": "mini", "mini_r": 7}, 4, "mini_r = 7 does not divide the 16 outputs of this layer: take mini_r = 4"),
        ({"mode": "bat_row"}, 3, "the 12 inputs and the 16 outputs of this layer: take r = 2, or mode: bone"),
        ({"mode": "bat_col"}, 8, "the 12 inputs and the 16 outputs of this layer: take r = 4, or mode: bone"),
    ],
)
def test_sizes_that_do_not_fit_say_what_would(fields, r, said):
    with pytest.raises(InputError, match=said):
        layer_of(fields, r=r)


def test_bat_col_is_refused_where_nothing_can_be_dequantised(monkeypatch):
    class ForwardOnly:
        backend_name, supports_merge = "some backend", False

    layer = layer_of(MODES["bat_row"])
    monkeypatch.setattr(layer, "quantization_backend", ForwardOnly())
    with pytest.raises(InputError, match="some backend cannot dequantise it: take mode: bat_row"):
        layer.update_layer("second", BoneConfig(r=4, mode="bat_col"))
