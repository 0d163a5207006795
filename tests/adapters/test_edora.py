"""EDoRA against dense weights in float64, and PEFT's DoRA and PSOFT."""

import pytest
import torch
from peft import LoraConfig, PsoftConfig, get_peft_model
from torch import nn

from hf_delta import EdoraConfig
from hf_delta.adapters.edora.functions import EdoraFunction, as_divisor, changed_row_norms, top_factors
from hf_delta.errors import InputError


def model_of(linear, std=0.3, **fields):
    """One linear layer with an adapter away from its start, unless `std` is 0."""
    model = get_peft_model(nn.Sequential(linear), EdoraConfig(target_modules=["0"], **{"r": 4, "alpha": 8, **fields}))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad and std:
                parameter += std * torch.randn(parameter.shape, generator=generator).to(parameter)
    return model


def layer_of(model):
    return model.base_model.model[0]


def linear_of(i=12, o=10, bias=True, dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    return nn.Linear(i, o, bias=bias, dtype=dtype)


def rows(*shape, dtype=torch.float64, seed=2):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def dense_output(layer, x, core, magnitude):
    """The formula of the paper with every matrix written out."""
    weight, bias = layer.base_layer.weight.to(x.dtype), layer.base_layer.bias
    left, right = layer.hfd_edora_left["default"].to(x.dtype), layer.hfd_edora_right["default"].to(x.dtype)
    changed = weight + layer.hfd_edora_scaling["default"] * left @ core @ right
    if magnitude is not None:
        changed = (magnitude / changed.norm(dim=1).detach())[:, None] * changed
    return x @ changed.T + (0 if bias is None else bias.to(x.dtype))


def trained(layer):
    return [c["default"].weight for c in (layer.hfd_edora_core, layer.hfd_edora_magnitude) if "default" in c]


# -- factors and norms ------------------------------------------------------------------------------------------------
def test_full_factors_are_those_of_the_singular_value_decomposition():
    weight = rows(20, 14)
    left, right = top_factors(weight, 5, "full", 10, 0)
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    torch.testing.assert_close(left @ right, u[:, :5] * s[:5] @ v[:5])
    torch.testing.assert_close(right @ right.T, torch.diag(s[:5] ** 2))
    torch.testing.assert_close(weight @ right.T, left * s[:5] ** 2)


@pytest.mark.parametrize("shape", [(300, 400), (400, 300)])
def test_lowrank_factors_span_the_same_space(shape):
    u = torch.linalg.qr(rows(shape[0], 300)).Q
    v = torch.linalg.qr(rows(shape[1], 300, seed=3)).Q
    weight = (u * torch.arange(1, 301, dtype=torch.float64) ** -0.6) @ v.T
    state = torch.get_rng_state()
    left, right = top_factors(weight, 8, "lowrank", 10, 0)
    assert torch.equal(torch.get_rng_state(), state)
    assert (left.T @ u[:, :8]).square().sum() > 8 * (1 - 1e-4)
    torch.testing.assert_close(left.T @ left, torch.eye(8, dtype=torch.float64))
    assert torch.equal(right, left.T @ weight)
    assert torch.equal(left, top_factors(weight, 8, "lowrank", 10, 0)[0])
    assert not torch.equal(left, top_factors(weight, 8, "lowrank", 10, 1)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_are_those_of_the_dense_sum_in_float64(dtype):
    weight = rows(40, 60, dtype=dtype)
    right, change = rows(4, 60, dtype=torch.float32), rows(40, 4, dtype=torch.float32, seed=3)
    wide = weight.float()
    found = changed_row_norms(wide.norm(dim=1), 2 * wide @ right.T, right @ right.T, change)
    expected = (weight.double() + change.double() @ right.double()).norm(dim=1)
    assert ((found - expected) / expected).abs().max() < 2e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_without_a_change_norms_keep_their_bits(dtype):
    norms = rows(100_000, dtype=dtype).abs() * torch.tensor(10.0, dtype=dtype) ** rows(100_000, dtype=dtype, seed=3)
    cross, gram = rows(100_000, 2, dtype=dtype), torch.eye(2, dtype=dtype)
    assert torch.equal(changed_row_norms(norms, cross, gram, torch.zeros_like(cross)), norms)


# -- outputs and gradients --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("magnitude", [False, True])
def test_gradcheck(bias, magnitude):
    weight, left, right = rows(6, 5), rows(6, 3, seed=3), rows(3, 5, seed=4)
    b = rows(6, seed=5) if bias else None
    norms = as_divisor(rows(6, seed=6).abs()) if magnitude else None
    inputs = [rows(4, 5, seed=7).requires_grad_(), rows(3, 3, seed=8).requires_grad_()]
    inputs.append(rows(6, seed=9).requires_grad_() if magnitude else None)
    torch.autograd.gradcheck(
        lambda x, core, m: EdoraFunction.apply(x, weight, b, right, left, core, m, norms, 0.7), inputs
    )


@pytest.mark.parametrize("way", ["fused", "plain"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("magnitude", [False, True])
def test_output_and_gradients_are_those_of_the_dense_form(way, bias, magnitude):
    layer = layer_of(model_of(linear_of(bias=bias), magnitude=magnitude))
    if way == "plain":
        layer.base_layer.register_forward_hook(lambda *_: None)
    if magnitude:
        with torch.no_grad():
            layer.hfd_edora_magnitude["default"].weight[3] = 0
    x = rows(2, 5, 12).requires_grad_()
    output = layer(x)
    pull = rows(2, 5, 10, seed=3)
    found = torch.autograd.grad(output, [x, *trained(layer)], pull)
    inputs = [t.detach().clone().requires_grad_() for t in (x, *trained(layer))]
    expected = dense_output(layer, *inputs, *([] if magnitude else [None]))
    torch.testing.assert_close(output, expected)
    for one, other in zip(found, torch.autograd.grad(expected, inputs, pull)):
        torch.testing.assert_close(one, other)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), expected)
        change = layer.delta_weight("default", layer.original_weight())
        merged = nn.functional.linear(x, layer.original_weight() + change, layer.base_bias)
        torch.testing.assert_close(merged, expected)


def test_rows_of_zeros_stay_finite():
    linear = linear_of(bias=False)
    with torch.no_grad():
        linear.weight[2:4] = 0
    layer = layer_of(model_of(linear, std=0))
    x = rows(3, 12)
    assert torch.equal(layer(x)[:, 2:4], torch.zeros(3, 2, dtype=torch.float64))
    layer(x).sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in trained(layer))


@pytest.mark.parametrize("autocast_adapter_dtype", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_start_is_the_base_layer_bit_for_bit(dtype, bias, autocast_adapter_dtype):
    linear = linear_of(70, 50, bias=bias, dtype=dtype)
    x = rows(3, 7, 70, dtype=dtype)
    expected = linear(x)
    config = EdoraConfig(r=8, target_modules=["0"])
    layer = layer_of(get_peft_model(nn.Sequential(linear), config, autocast_adapter_dtype=autocast_adapter_dtype))
    assert torch.equal(layer(x), expected)
    with torch.no_grad():
        assert torch.equal(layer(x), expected)
    assert not layer.delta_weight("default", layer.original_weight()).any()
    layer.base_layer.register_forward_hook(lambda *_: None)
    assert torch.equal(layer(x), expected)


def test_with_sigma_the_core_starts_at_random():
    layer = layer_of(model_of(linear_of(200, 200), std=0, r=64, sigma=1e-3))
    assert layer.hfd_edora_core["default"].weight.std().item() == pytest.approx(1e-3, rel=0.1)


@pytest.mark.parametrize("way", ["fused", "plain"])
def test_small_gains_survive_bfloat16(way):
    layer = layer_of(model_of(linear_of(64, 64, bias=False, dtype=torch.bfloat16), std=0))
    if way == "plain":
        layer.base_layer.register_forward_hook(lambda *_: None)
    x = rows(4096, 64, dtype=torch.bfloat16)
    before = layer(x).float()
    with torch.no_grad():
        layer.hfd_edora_magnitude["default"].weight *= 1.003
    after = layer(x).float()
    # In bfloat16 1.003 is 1: a gain that is rounded would leave the output as it was.
    assert ((after * before).sum() / before.square().sum()).item() == pytest.approx(1.003, abs=1e-3)


def test_bfloat16_is_near_float64():
    layer = layer_of(model_of(linear_of(64, 48, dtype=torch.bfloat16)))
    x = rows(50, 64, dtype=torch.bfloat16)
    expected = dense_output(layer, x.double(), *(parameter.double() for parameter in trained(layer)))
    for output in (layer(x), layer.base_layer(x) + layer.delta_output("default", x, layer.base_layer(x))):
        assert (output - expected).norm() < 1e-2 * expected.norm()


def test_dropout_is_on_the_low_rank_path_only():
    start = layer_of(model_of(linear_of(), std=0, dropout=0.5))
    x = rows(9, 12)
    assert torch.equal(start.train()(x), start.base_layer(x))
    layer = layer_of(model_of(linear_of(), dropout=0.5))
    torch.testing.assert_close(layer.eval()(x), dense_output(layer, x, *trained(layer)))
    assert not torch.allclose(layer.train()(x), layer.eval()(x))


# -- against PEFT -----------------------------------------------------------------------------------------------------
def test_it_is_a_dora_of_peft_with_these_factors():
    layer = layer_of(model_of(linear_of()))
    a, b, magnitude = layer.dora_factors("default")
    config = LoraConfig(r=4, lora_alpha=4, use_dora=True, target_modules=["0"])
    dora = get_peft_model(nn.Sequential(linear_of()), config).base_model.model[0]
    with torch.no_grad():
        dora.lora_A["default"].weight.copy_(a)
        dora.lora_B["default"].weight.copy_(b)
        dora.lora_magnitude_vector["default"].weight.copy_(magnitude)
    x = rows(7, 12)
    torch.testing.assert_close(dora(x), layer(x))
    torch.testing.assert_close(magnitude, trained(layer)[1].detach())
    dora(x).square().sum().backward()
    layer(x).square().sum().backward()
    torch.testing.assert_close(trained(layer)[1].grad, dora.lora_magnitude_vector["default"].weight.grad)


def test_without_magnitude_it_is_psoft_without_its_constraints():
    linear = linear_of(dtype=torch.float32)
    settings = {"psoft_orth": False, "psoft_mag_a": False, "psoft_mag_b": False, "psoft_svd": "full"}
    psoft = get_peft_model(nn.Sequential(linear), PsoftConfig(r=4, target_modules=["0"], **settings))
    layer = layer_of(model_of(linear_of(dtype=torch.float32), magnitude=False, svd="full"))
    values = torch.linalg.svdvals(linear.weight)[:4]
    with torch.no_grad():
        # PSOFT has U S (R - 1) V^T, with the singular values on the other side of the core.
        core = layer.hfd_edora_core["default"].weight * values / values[:, None]
        psoft.base_model.model[0].psoft_R["default"].weight.copy_(torch.eye(4) + 2 * core)
    x = rows(7, 12, dtype=torch.float32)
    torch.testing.assert_close(psoft(x), layer(x))
    a, b = layer.lora_factors("default")
    torch.testing.assert_close(b @ a, layer.delta_weight("default", layer.original_weight()))
    assert torch.linalg.matrix_rank(b @ a) == 4
    with pytest.raises(InputError, match="no magnitude"):
        layer.dora_factors("default")


def test_parameters_of_roberta_base():
    base = nn.ModuleList([nn.Linear(768, 768, device="meta") for _ in range(48)])
    model = get_peft_model(base, EdoraConfig(r=16, target_modules=[str(n) for n in range(48)]))
    assert sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad) == 49_152
