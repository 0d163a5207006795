"""When fast DoRA computes norms: as seldom as is right, and never one time less."""

import pytest
import torch
from peft import LoraConfig
from torch import nn

from hf_delta.adapters.dora import reuse_dora_norms
from hf_delta.adapters.dora.cache import NORMS
from tests.adapters.dora import (
    LLAMA_LAYERS,
    a_b_m,
    assert_all_close,
    assert_right,
    fast_dora,
    layer_of,
    linear_of,
    llama,
    load,
    model_of,
    move,
    tokens,
)


STEPS, ACCUMULATED = 4, 4


class PastTheOptimizer:
    """An optimizer that torch does not know of, as DeepSpeed's is to the modules: it writes where nobody counts."""

    def __init__(self, parameters, lr):
        self.parameters, self.lr = list(parameters), lr

    def step(self):
        for parameter in self.parameters:
            parameter.data.sub_(parameter.grad, alpha=self.lr)


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.3),
    "adamw": lambda p: torch.optim.AdamW(p, lr=3e-3, eps=1e-3, foreach=False),
    "fused adamw": lambda p: torch.optim.AdamW(p, lr=3e-3, eps=1e-3, fused=True),
    "past the optimizer": lambda p: PastTheOptimizer(p, lr=0.3),
}


def train(model, make_optimizer, checkpointing=None, after_step=None):
    """Loss of every micro batch, and what was trained."""
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
        model.enable_input_require_grads()
    model.train()
    optimizer = make_optimizer([p for p in model.parameters() if p.requires_grad])
    losses = []
    for step in range(STEPS):
        model.zero_grad()
        for micro in range(ACCUMULATED):
            ids = tokens(seed=10 * step + micro)
            # As the trainer of transformers does before every micro batch.
            model.train()
            loss = model(ids, labels=ids).loss / ACCUMULATED
            loss.backward()
            losses.append(loss.detach())
        optimizer.step()
        if after_step is not None:
            after_step(model)
    return losses, [p.detach() for p in model.parameters() if p.requires_grad]


@pytest.fixture(scope="module")
def trained_by_peft():
    return {name: train(llama(std=0.05), make) for name, make in OPTIMIZERS.items()}


def assert_same_training(found, expected, tolerance):
    assert_all_close(found[0], expected[0], tolerance)
    assert_all_close(found[1], expected[1], tolerance)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["plain", "checkpointing", "reentrant"])
def test_training_is_peft_s(name, checkpointing, trained_by_peft, fast, evaluations, no_comparing):
    found = train(llama(std=0.05), OPTIMIZERS[name], checkpointing)
    assert_same_training(found, trained_by_peft[name], 1e-5)
    forwards = ACCUMULATED * (1 if checkpointing is None else 2)
    # No optimizer has been seen to step during the first step.
    seen = 1 if name != "past the optimizer" else forwards
    initial = LLAMA_LAYERS
    assert len(evaluations) == initial + LLAMA_LAYERS * (forwards + (STEPS - 1) * seen)


def test_without_the_count_of_steps_a_fused_optimizer_leaves_old_norms(
    trained_by_peft,
    fast,
    no_comparing,
    monkeypatch,
):
    def forget(model):
        NORMS.watch.steps = 0

    found = train(llama(std=0.05), OPTIMIZERS["fused adamw"], after_step=forget)
    with pytest.raises(AssertionError):
        assert_same_training(found, trained_by_peft["fused adamw"], 1e-5)


def test_without_reuse_there_is_one_norm_in_every_forward(trained_by_peft, evaluations, no_comparing):
    with fast_dora(cache=False):
        found = train(llama(std=0.05), OPTIMIZERS["sgd"])
    assert_same_training(found, trained_by_peft["sgd"], 1e-5)
    assert len(evaluations) == LLAMA_LAYERS * (1 + STEPS * ACCUMULATED)


CHANGES = {
    "load_state_dict": load,
    "load_state_dict(assign=True)": lambda model: load(model, assign=True),
    "in place": lambda model: move(model, seed=7),
    "new storage": lambda model: [setattr(p, "data", p.data + 0.1) for p in a_b_m(model)],
    "to another dtype and back": lambda model: model.bfloat16().float(),
    "scaling": lambda model: layer_of(model).set_scale("default", 3.0),
    "base weight": lambda model: layer_of(model).base_layer.weight.mul_(2.0),
    "new base weight": lambda model: setattr(layer_of(model).base_layer, "weight", linear_of(seed=4).weight),
    "base storage": lambda model: setattr(layer_of(model).base_layer.weight, "data", linear_of(seed=4).weight.data),
    "merge and unmerge": lambda model: (model.merge_adapter(), model.unmerge_adapter()),
    "written past everything, then evaluated": lambda model: (model.eval(), a_b_m(model)[1].data.add_(1.0)),
}


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("mode", ["training", "rollout", "evaluation"])
def test_a_change_is_seen(trained, name, mode, monkeypatch):
    if mode == "evaluation":
        monkeypatch.undo()
        trained.eval()
    with torch.set_grad_enabled(mode == "training"):
        assert_right(trained)
        with torch.no_grad():
            CHANGES[name](trained)
        if mode == "rollout":
            with reuse_dora_norms():
                assert_right(trained)
                assert_right(trained)
        assert_right(trained)


def test_values_are_compared_on_the_cpu(fast, evaluations):
    model = model_of(linear_of()).eval()
    with torch.no_grad():
        assert_right(model)
        evaluations.clear()
        assert_right(model)
        assert not evaluations
        a_b_m(model)[1].data.add_(1.0)
        assert_right(model)
        assert evaluations


def test_micro_batches_share_a_norm_until_the_step(trained, evaluations):
    for _ in range(3):
        trained.train()
        assert_right(trained)
    assert not evaluations
    trained.optimizer.step()
    assert_right(trained)
    assert_right(trained)
    assert len(evaluations) == 1


def test_an_optimizer_that_is_gone_vouches_for_nothing(trained, evaluations):
    del trained.optimizer
    for count in (1, 2):
        assert_right(trained)
        assert len(evaluations) == count


def test_parameters_of_the_same_values_are_not_the_optimizer_s(trained, evaluations):
    layer_of(trained).lora_A["default"].weight = nn.Parameter(a_b_m(trained)[0].detach().clone())
    for count in (1, 2):
        assert_right(trained)
        assert len(evaluations) == count


def test_only_a_change_of_the_mode_forgets(trained, evaluations):
    trained.train()
    assert_right(trained)
    assert not evaluations
    trained.eval().train()
    assert_right(trained)
    assert len(evaluations) == 1


def test_adapters_have_norms_of_their_own(trained):
    trained.add_adapter("second", LoraConfig(target_modules=["0"], use_dora=True, r=3, init_lora_weights=False))
    x = torch.ones(2, 37)
    with reuse_dora_norms(), torch.no_grad():
        first = trained(x)
        trained.set_adapter("second")
        second = trained(x)
        assert not torch.allclose(first, second)
        trained.set_adapter("default")
        assert torch.equal(trained(x), first)
        with trained.disable_adapter():
            assert torch.equal(trained(x), layer_of(trained).base_layer(x))
        assert torch.equal(trained(x), first)
    trained.delete_adapter("default")
    trained.add_adapter("default", LoraConfig(target_modules=["0"], use_dora=True, r=4, init_lora_weights=False))
    trained.set_adapter("default")
    layer_of(trained).set_scale("default", 1.0)
    assert_right(trained)


def test_generating_between_steps_leaves_training_as_it_was(trained_by_peft, fast, no_comparing):
    def roll_out(model):
        model.generate(input_ids=tokens(), max_new_tokens=3)

    found = train(llama(std=0.05), OPTIMIZERS["fused adamw"], after_step=roll_out)
    assert_same_training(found, trained_by_peft["fused adamw"], 1e-5)
