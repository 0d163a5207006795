"""Fast DoRA in rollouts: one norm per layer, and nothing left behind."""

import pytest
import torch

from hf_delta.adapters.dora import reuse_dora_norms
from hf_delta.adapters.dora.cache import NORMS
from tests.adapters.dora import (
    LLAMA_LAYERS,
    a_b_m,
    assert_right,
    fast_dora,
    layer_of,
    linear_of,
    llama,
    load,
    model_of,
    tokens,
)


def test_a_rollout_computes_once_and_ends(fast, evaluations, no_comparing):
    model, x = model_of(linear_of()), torch.ones(2, 37)
    evaluations.clear()
    with torch.no_grad():
        with reuse_dora_norms():
            model(x)
            with reuse_dora_norms():
                model(x)
            model(x)
            assert len(evaluations) == 1
            with torch.enable_grad():
                model(x)
            assert len(evaluations) == 2
        model(x)
        assert len(evaluations) == 3
        a_b_m(model)[0].data.add_(0.1)
        with reuse_dora_norms():
            assert_right(model)
    with pytest.raises(ZeroDivisionError), reuse_dora_norms():
        1 / 0  # noqa: B018
    assert NORMS.scope == 0


IN_A_ROLLOUT = {
    "load_state_dict": load,
    "scaling": lambda model: layer_of(model).set_scale("default", 3.0),
    "merge": lambda model: model.merge_adapter(),
    "merge and unmerge": lambda model: (model.merge_adapter(), model.unmerge_adapter()),
    "mode": lambda model: model.train(not model.training),
    "step of an optimizer": lambda model: model.optimizer.step(),
}


@pytest.mark.parametrize("name", IN_A_ROLLOUT)
def test_what_may_change_inside_a_rollout_is_seen(trained, name):
    with torch.no_grad(), reuse_dora_norms():
        assert_right(trained)
        assert NORMS.plans
        for parameter in a_b_m(trained):
            parameter.grad = torch.ones_like(parameter)
        IN_A_ROLLOUT[name](trained)
        if name != "merge":
            assert_right(trained)
        else:
            x = torch.ones(2, 37)
            assert torch.equal(trained(x), layer_of(trained).base_layer(x))
            trained.unmerge_adapter()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert trained(torch.ones(2, 37)).dtype == torch.bfloat16
        with torch.enable_grad():
            assert trained(torch.ones(2, 37)).requires_grad
    assert not NORMS.plans


def test_generate_is_a_rollout(fast, evaluations, no_comparing):
    model = llama(std=0.2)
    expected = None
    for generating in (model, model.base_model.model):
        evaluations.clear()
        out = generating.generate(input_ids=tokens(), max_new_tokens=5, do_sample=False)
        assert len(evaluations) == LLAMA_LAYERS
        expected = out if expected is None else expected
        assert torch.equal(out, expected)
    with fast_dora(cache=False):
        evaluations.clear()
        assert torch.equal(model.generate(input_ids=tokens(), max_new_tokens=5, do_sample=False), expected)
        assert len(evaluations) == 5 * LLAMA_LAYERS
