"""PMSS: its formulas against brute force, what it saves and keeps, and what it chooses when. The PEFT life is in test_life."""

import peft
import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from hf_delta import InputError
from hf_delta.adapters.base import model as base_of_tuners
from hf_delta.adapters.pmss import PmssConfig, PmssLinear
from hf_delta.adapters.pmss.functions import (
    PmssFunction,
    pmss_delta,
    pmss_linear,
    pmss_output,
)
from tests.adapters.life import IDS, base_model, layers, logits, perturb


TOKENS, OUT, IN, K = 7, 11, 9, 4


def operands(dtype=torch.float64, bias=True, sizes=(TOKENS, OUT, IN, K)):
    tokens, o, i, k = sizes
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    x, weight, core = normal(tokens, i), normal(o, i), normal(k, k)
    rows, columns = (torch.randperm(n, generator=generator)[:k] for n in (o, i))
    return x, weight, normal(o) if bias else None, core, rows, columns


def config(**changes):
    return PmssConfig(**{"r": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **changes})


def adapted(model=None, std=0.05, **changes):
    return perturb(get_peft_model(base_model() if model is None else model, config(**changes)), std=std)


def linear(o=OUT, i=IN, bias=True, **changes):
    """One adapted layer with a core away from zero."""
    torch.manual_seed(0)
    layer = PmssLinear(nn.Linear(i, o, bias=bias).requires_grad_(False), "default", config(**{"r": K, **changes}))
    nn.init.normal_(layer.core("default"))
    return layer


# -- functions ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("input_grad", [True, False])
def test_derivatives_of_the_fused_function(bias, input_grad):
    x, weight, b, core, rows, columns = operands(bias=bias)
    arguments = (weight, b, core.requires_grad_(), rows, columns, weight[:, columns].clone(), 0.7)
    assert torch.autograd.gradcheck(
        lambda x, *a: PmssFunction.apply(x, *a), (x.requires_grad_(input_grad), *arguments)
    )


@pytest.mark.parametrize("input_grad", [True, False])
def test_the_fused_function_equals_three_linears(input_grad):
    x, weight, b, core, rows, columns = operands()
    x.requires_grad_(input_grad)
    core.requires_grad_()
    fused = PmssFunction.apply(x, weight, b, core, rows, columns, weight[:, columns].clone(), 0.7)
    plain = nn.functional.linear(x, weight, b) + pmss_output(x @ weight[rows].T, core, weight[:, columns], 0.7)
    upstream = torch.randn(TOKENS, OUT, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    inputs = [core, x] if input_grad else [core]
    assert torch.allclose(fused, plain, atol=1e-12)
    pairs = zip(torch.autograd.grad(fused, inputs, upstream), torch.autograd.grad(plain, inputs, upstream))
    assert all(torch.allclose(one, other, atol=1e-12) for one, other in pairs)
    assert torch.equal(pmss_linear(x.detach(), weight, b, core, rows, weight[:, columns], 0.7)[0], fused)


def test_a_core_in_single_precision_over_bfloat16():
    x, weight, b, core, rows, columns = operands(torch.bfloat16, sizes=(32, 40, 48, 8))
    core = core.float().requires_grad_()
    x.requires_grad_()
    output = PmssFunction.apply(x, weight, b, core, rows, columns, weight[:, columns].clone(), 0.05)
    output.sum().backward()
    exact = [t.detach().double() for t in (x, weight, b, core)]
    dense = (exact[1] + pmss_delta(exact[1][:, columns], exact[3], exact[1][rows], 0.05)).requires_grad_()
    assert output.dtype == torch.bfloat16 and core.grad.dtype == torch.float32
    reference = nn.functional.linear(exact[0], dense, exact[2])
    assert (output - reference).norm() < 0.01 * reference.norm()
    g = torch.ones(32, 40, dtype=torch.float64)
    expected = 0.05 * (g @ exact[1][:, columns]).T @ (exact[0] @ exact[1][rows].T)
    assert (core.grad - expected).norm() < 0.02 * expected.norm()
    assert (x.grad - g @ dense).norm() < 0.01 * (g @ dense).norm()


def test_the_change_has_rank_k_and_is_made_of_columns_and_rows():
    _, weight, _, core, rows, columns = operands()
    delta = pmss_delta(weight[:, columns], core, weight[rows], 0.7)
    by_element = sum(
        0.7 * weight[:, [columns[a]]] * core[a, b] * weight[[rows[b]]] for a in range(K) for b in range(K)
    )
    assert torch.allclose(delta, by_element, atol=1e-12) and torch.linalg.matrix_rank(delta) == K


# -- what is saved and what is formed -------------------------------------------------------------------------------
class Formed(TorchDispatchMode):
    """Elements of the largest storage that an operation has newly made."""

    def __init__(self, *known):
        super().__init__()
        self.known = {t.untyped_storage().data_ptr() for t in known}
        self.largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in self.known:
                self.largest = max(self.largest, tensor.untyped_storage().nbytes() // tensor.element_size())
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_saves_k_values_for_each_token_and_forms_nothing_of_the_size_of_the_weight(dtype):
    layer = linear(o=128, i=96, r=16)
    layer.base_layer.to(dtype)
    x = torch.randn(20, 96, dtype=dtype, requires_grad=True)
    layer(x)
    kept = [*layer.parameters(), *layer.buffers(), layer.hfd_pmss_gathered["default"].columns]
    known = {t.untyped_storage().data_ptr() for t in kept}
    saved = {}

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in known:
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        with Formed(*kept) as formed:
            output = layer(x)
            output.sum().backward()
    assert sum(saved.values()) == 20 * 16 * x.element_size()
    assert 0 < formed.largest <= 20 * 128 < 96 * 128


def test_columns_are_gathered_once_and_again_when_the_weight_or_the_indices_change():
    layer, x = linear(), torch.randn(TOKENS, IN)
    held = []

    def gathered_anew():
        output = layer(x)
        held.append(layer.hfd_pmss_gathered["default"].columns)
        weight = layer.original_weight()
        changed = weight + layer.delta_weight("default", weight)
        assert torch.allclose(output, nn.functional.linear(x, changed, layer.base_bias), atol=1e-5)
        return len(held) == 1 or held[-1] is not held[-2]

    assert gathered_anew() and not gathered_anew()
    with torch.no_grad():
        layer.core("default").mul_(2)
    assert not gathered_anew()
    with torch.no_grad():
        layer.base_layer.weight.mul_(1.001)
    assert gathered_anew()
    layer.base_layer.weight = nn.Parameter(layer.base_layer.weight * 1.001, requires_grad=False)
    assert gathered_anew()
    layer.hfd_pmss_columns["default"].copy_(layer.hfd_pmss_columns["default"].flip(0))
    assert gathered_anew() and not gathered_anew()


def test_training_goes_on_after_a_first_forward_in_inference_mode():
    layer = linear()
    with torch.inference_mode():
        layer(torch.randn(TOKENS, IN))
    layer(torch.randn(TOKENS, IN)).sum().backward()
    assert layer.core("default").grad.any()


def test_adapters_with_the_same_skeleton_share_columns():
    model = adapted()
    model.add_adapter("ref", model.peft_config["default"])
    logits(model)
    model.set_adapter("ref")
    logits(model)
    layer = layers(model)[0]
    assert layer.hfd_pmss_gathered["ref"].columns is layer.hfd_pmss_gathered["default"].columns
    model.delete_adapter("ref")
    assert "ref" not in layer.hfd_pmss_gathered and "ref" not in layer.hfd_pmss_rows


# -- fields ---------------------------------------------------------------------------------------------------------
def test_dropout_is_on_the_values_that_are_read():
    layer, x = linear(dropout=0.5), torch.randn(1, IN).expand(4000, IN)
    layer.train()
    base = layer.base_layer(x)
    added = layer(x) - base
    # What is added is a sum over subsets of K values, each doubled: only 2^K outcomes, their mean is that of eval.
    assert len(torch.unique(added.mul(1e4).round(), dim=0)) == 2**K
    expected = (layer.eval()(x) - base).detach()
    assert torch.allclose(added.mean(0), expected[0], atol=0.1 * float(expected.abs().max()))
    assert torch.allclose(expected[0], layer.delta_weight("default", layer.original_weight()) @ x[0], atol=1e-5)


@pytest.mark.parametrize("alpha", [1.0, 0.25])
def test_alpha_is_the_scaling_and_normalising_divides_by_mean_norms(alpha):
    plain, normalised = linear(alpha=alpha), linear(alpha=alpha, normalize=True)
    weight = plain.original_weight()
    columns, rows = plain.hfd_pmss_columns["default"], plain.hfd_pmss_rows["default"]
    core = plain.core("default")
    expected = alpha * weight[:, columns] @ core @ weight[rows]
    assert torch.allclose(plain.delta_weight("default", weight), expected, atol=1e-6)
    expected /= weight[:, columns].norm(dim=0).mean() * weight[rows].norm(dim=1).mean()
    assert torch.allclose(normalised.delta_weight("default", weight), expected, atol=1e-6)
    x = torch.randn(TOKENS, IN)
    assert torch.allclose(normalised(x), nn.functional.linear(x, weight + expected, plain.base_bias), atol=1e-5)


@pytest.mark.parametrize("normalize", [True, False])
def test_lora_factors_are_the_change(normalize):
    layer = linear(normalize=normalize, alpha=0.3)
    a, b = layer.lora_factors("default")
    assert a.shape == (K, IN) and b.shape == (OUT, K) and a.dtype == b.dtype == torch.float32
    assert torch.allclose(b @ a, layer.delta_weight("default", layer.original_weight()), atol=1e-6)


@pytest.mark.parametrize(
    "changes,said",
    [
        ({"selection": "best"}, "selection is 'best': write one of pivoted_qr, sketched_qr, norm, leverage, uniform"),
        ({"alpha": 0}, "alpha is 0: write a number above 0"),
        ({"alpha": float("nan")}, "alpha is nan"),
        ({"seed": -1}, "seed is -1"),
        ({"sketch_oversample": 1.5}, "sketch_oversample is 1.5"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"normalize": "yes"}, "normalize is 'yes': write true or false"),
        ({"cache_dir": ""}, "cache_dir is '': write a folder, or null"),
    ],
)
def test_wrong_fields_are_refused(changes, said):
    with pytest.raises(InputError, match=said):
        config(**changes)


def test_more_rows_than_there_are_is_refused_with_what_fits():
    with pytest.raises(InputError, match="r is 10, and a 11x9 weight .* write r: 9 or less"):
        linear(r=10)


# -- selection in a model -------------------------------------------------------------------------------------------
def test_a_second_adapter_takes_the_indices_of_the_first():
    model = adapted()
    for layer in layers(model):
        layer.hfd_pmss_rows["default"].copy_(layer.hfd_pmss_rows["default"].flip(0))
    model.add_adapter("ref", model.peft_config["default"])
    model.add_adapter("other", config(selection="uniform"))
    for layer in layers(model):
        assert torch.equal(layer.hfd_pmss_rows["ref"], layer.hfd_pmss_rows["default"])
        assert not torch.equal(layer.hfd_pmss_rows["other"], layer.hfd_pmss_rows["default"])


def test_an_adapter_made_for_inference_chooses_when_it_is_used():
    model = get_peft_model(base_model(), config(inference_mode=True))
    assert all((layer.hfd_pmss_rows["default"] == -1).all() for layer in layers(model))
    with torch.inference_mode():
        assert torch.equal(model(input_ids=IDS).logits, base_model()(input_ids=IDS).logits)
    for layer, trained in zip(layers(model), layers(adapted())):
        assert torch.equal(layer.hfd_pmss_rows["default"], trained.hfd_pmss_rows["default"])


def test_loading_chooses_nothing(tmp_path, monkeypatch):
    model = adapted()
    expected = logits(model)
    model.save_pretrained(tmp_path)
    monkeypatch.setattr("hf_delta.adapters.pmss.layer.cached_selection", None)
    assert torch.equal(logits(PeftModel.from_pretrained(base_model(), tmp_path)), expected)
    low = PeftModel.from_pretrained(base_model(), tmp_path, low_cpu_mem_usage=True, is_trainable=True)
    assert torch.equal(logits(low), expected)


def test_the_bar_counts_the_layers(monkeypatch):
    bars = []

    class Bar(base_of_tuners.tqdm):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            bars.append(self)

    monkeypatch.setattr(base_of_tuners, "tqdm", Bar)
    adapted()
    adapted(target_modules=["q_proj", "down_proj"], exclude_modules=["model.layers.0.mlp.down_proj"])
    assert [(bar.n, bar.total) for bar in bars] == [(14, 14), (3, 3)] and all(bar.delay > 0 for bar in bars)


def test_over_another_kind_of_adapter_the_rows_are_those_of_the_weight():
    torch.manual_seed(0)
    lora = peft.tuners.lora.Linear(nn.Linear(IN, OUT), "default", peft.LoraConfig(r=2, init_lora_weights=False), r=2)
    layer = PmssLinear(lora, "default", config(r=K))
    nn.init.normal_(layer.core("default"))
    x, weight = torch.randn(TOKENS, IN), layer.original_weight()
    assert torch.equal(weight, lora.base_layer.weight) and not layer.reads_output
    expected = lora(x) + x @ layer.delta_weight("default", weight).T
    assert torch.allclose(layer(x), expected, atol=1e-5)
