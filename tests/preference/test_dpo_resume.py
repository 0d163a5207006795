"""A run that was stopped ends as one that was not: parameters, masks, multipliers and what was logged, to the last bit."""

import logging
import shutil

import pytest
import torch
import trl

from hf_delta.checkpoint import STATE_FILE, load_state
from hf_delta.errors import InputError
from hf_delta.preference.resume import MASK_FILE
from tests.preference.dpo import build, list_rows, lora, mask_parameters, metrics, pair_rows, parameters, trained
from tests.rl.frozen import build_world
from tests.rl.test_resume import StopAt
from tests.rl.test_trainer import assert_identical


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return build_world(tmp_path_factory.mktemp("world"))


# 10 rows in batches of 2 with two batches a step: an epoch is 3 steps, the last of which has one batch only.
RUN = {
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "max_steps": 8,
    "save_strategy": "steps",
    "save_steps": 1,
    "weight_decay": 0.05,
}
SPARSE = {
    "loss_type": ["sparse_po"],
    "token_weights_kwargs": {"dropout": 0.1, "sharing": "independent", "l1_reward": 0.01, "weight_decay": 0.2},
}
PLAIN = {"feasible": True, "feasible_kwargs": {"epsilon": 0.6, "eta": 0.7}}
RESILIENT = {"feasible": True, "feasible_kwargs": {"epsilon": 0.6, "eta": 0.5, "alpha": 0.8}}
CASES = {
    "sparse_lora": {**SPARSE, "peft": True},
    "sparse_full": {**SPARSE, "peft": False},
    "sparse_feasible_lora": {**SPARSE, **PLAIN, "peft": True},
    "plain_lora": {**PLAIN, "peft": True},
    "resilient_full": {**RESILIENT, "peft": False},
    "plain_lists_full": {**PLAIN, "loss_type": ["lipo_lambda"], "peft": False},
    "resilient_lists_lora": {**RESILIENT, "loss_type": ["plackett_luce"], "peft": True},
    "tdpo2_lora": {"loss_type": ["tdpo2"], "peft": True},
}
# Another place in an epoch each, but for the slow tier all of them.
FAST = {"sparse_lora": 4, "resilient_full": 5, "resilient_lists_lora": 3}


def settings_of(case):
    settings = {**RUN, **CASES[case]}
    peft = settings.pop("peft")
    lists = any(name in ("lipo_lambda", "plackett_luce") for name in settings.get("loss_type", []))
    settings["rows"] = list_rows((2, 4, 3, 2, 3, 4, 2, 3, 2, 3)) if lists else pair_rows(10)
    # Of the trainer's own, one each.
    return lambda: settings | {"peft_config": lora(0.2) if peft else None}


def cases():
    for case in CASES:
        for cut in (2, 3, 4, 5, 7):
            marks = () if FAST.get(case) == cut else pytest.mark.slow
            yield pytest.param(case, cut, marks=marks)


@pytest.fixture(scope="module")
def straight(world, tmp_path_factory):
    """Runs that were never stopped, each made once."""
    found = {}

    def of(case):
        if case not in found:
            found[case] = trained(world, tmp_path_factory.mktemp(case), **settings_of(case)())
        return found[case]

    return of


def assert_same_rows(found, expected):
    assert len(found) == len(expected) and found[0].keys() == expected[0].keys()
    differing = [
        (place, {key: (one.get(key), value) for key, value in other.items() if one.get(key) != value})
        for place, (one, other) in enumerate(zip(found, expected))
        if one != other
    ]
    assert differing == []


@pytest.mark.parametrize(("case", "cut"), cases())
def test_a_resumed_run_is_the_straight_one(world, straight, tmp_path, case, cut):
    settings, expected = settings_of(case), straight(case)
    first = trained(world, tmp_path, callbacks=[StopAt(cut)], **settings())
    assert first.state.global_step == cut
    second = trained(world, tmp_path, resume=True, **settings())
    assert second.state.global_step == 8
    assert_identical(parameters(expected), parameters(second))
    assert_same_rows(metrics(second), metrics(expected))
    before, after = parameters(first), parameters(second)
    assert any(not torch.equal(before[name], p) for name, p in after.items())
    if "sparse" in case:
        assert_identical(mask_parameters(expected), mask_parameters(second))
        assert any(not torch.equal(p, mask_parameters(first)[name]) for name, p in mask_parameters(second).items())
    if expected.multipliers is not None:
        assert len(expected.multipliers) == 10
        assert_identical(expected.multipliers.state_dict(), second.multipliers.state_dict())


@pytest.mark.parametrize("forgotten", [MASK_FILE, STATE_FILE])
def test_what_the_checkpoint_holds_is_needed(world, straight, tmp_path, forgotten):
    """Without the file there is no run; and with another's masks or multipliers it is another run."""
    settings = settings_of("sparse_lora")
    trained(world, tmp_path, callbacks=[StopAt(4)], **settings())
    (tmp_path / "checkpoint-4" / forgotten).unlink()
    with pytest.raises(InputError, match=forgotten.replace(".", r"\.")):
        trained(world, tmp_path, resume=str(tmp_path / "checkpoint-4"), **settings())
    (tmp_path / "checkpoint-3" / forgotten).rename(tmp_path / "checkpoint-4" / forgotten)
    if forgotten == MASK_FILE:
        second = trained(world, tmp_path, resume=str(tmp_path / "checkpoint-4"), **settings())
        expected, found = parameters(straight("sparse_lora")), parameters(second)
        assert any(not torch.equal(p, found[name]) for name, p in expected.items())


def test_a_mask_file_that_is_cut_short_or_of_another_network(world, tmp_path):
    settings = settings_of("sparse_lora")
    trained(world, tmp_path, callbacks=[StopAt(2)], **settings())
    changed = {**settings(), "token_weights_kwargs": {**SPARSE["token_weights_kwargs"], "sharing": "common"}}
    with pytest.raises(InputError, match="has kl.*Use the model and the layers, net and sharing"):
        trained(world, tmp_path, resume=True, **changed)
    path = tmp_path / "checkpoint-2" / MASK_FILE
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(InputError, match="the mask network cannot be read.*Resume from an earlier"):
        trained(world, tmp_path, resume=str(path.parent), **settings())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("saved", "resumed", "said"),
    [
        (PLAIN, {"loss_type": ["tdpo1"]}, "loss_type: ['sigmoid'] there, ['tdpo1'] here; feasible: True there"),
        (PLAIN, {}, "feasible: True there, False here"),
        ({"loss_type": ["tdpo1"]}, {"loss_type": ["tdpo2"]}, "loss_type: ['tdpo1'] there, ['tdpo2'] here"),
        ({"loss_type": ["tdpo1"]}, {"plain": True}, "loss_type: ['tdpo1'] there, ['sigmoid'] here"),
        ({"plain": True}, {"loss_type": ["tdpo1"]}, "loss_type: ['sigmoid'] there, ['tdpo1'] here"),
        ({}, PLAIN, "feasible: False there, True here"),
        # Whose optimizers have other parameters.
        (SPARSE, {"loss_type": ["tdpo1"]}, "loss_type: ['sparse_po'] there, ['tdpo1'] here"),
        ({"loss_type": ["tdpo1"]}, SPARSE, "loss_type: ['tdpo1'] there, ['sparse_po'] here"),
        (SPARSE, {"plain": True}, "loss_type: ['sparse_po'] there, ['sigmoid'] here"),
        ({"plain": True}, SPARSE, "loss_type: ['sigmoid'] there, ['sparse_po'] here"),
    ],
)
def test_a_checkpoint_of_another_method_is_refused(world, tmp_path, saved, resumed, said):
    def settings(changes):
        changes = dict(changes)
        plain = changes.pop("plain", False)
        return {**RUN, **changes, "peft_config": lora(), "config_cls": trl.DPOConfig} if plain else {**RUN, **changes, "peft_config": lora()}  # fmt: skip

    trained(world, tmp_path, callbacks=[StopAt(2)], **settings(saved))
    with pytest.raises(InputError) as refusal:
        trained(world, tmp_path, resume=True, **settings(resumed))
    assert said in str(refusal.value) and "start a new run in another output_dir" in str(refusal.value)


def test_a_plain_run_resumes_as_trls_does_and_counts_on(world, tmp_path):
    run = {**RUN, "rows": pair_rows(10), "config_cls": trl.DPOConfig}
    theirs = trained(world, tmp_path / "a", trl.DPOTrainer, peft_config=lora(0.2), **run)
    trained(world, tmp_path / "b", peft_config=lora(0.2), callbacks=[StopAt(4)], **run)
    ours = trained(world, tmp_path / "b", resume=True, peft_config=lora(0.2), **run)
    assert_identical(parameters(theirs), parameters(ours))
    assert_same_rows(metrics(ours), metrics(theirs))


def test_a_checkpoint_of_trl_is_taken_up(world, tmp_path):
    run = {**RUN, "rows": pair_rows(10), "config_cls": trl.DPOConfig}
    theirs = trained(world, tmp_path, trl.DPOTrainer, peft_config=lora(0.2), **run)
    newest = max(tmp_path.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    shutil.rmtree(newest)
    ours = trained(world, tmp_path, resume=True, peft_config=lora(0.2), **run)
    assert_identical(parameters(theirs), parameters(ours))


@pytest.mark.slow
def test_averages_span_the_stop(world, tmp_path):
    settings = {**RUN, **PLAIN, "logging_steps": 3, "rows": pair_rows(10)}
    straight = trained(world, tmp_path / "a", **settings)
    trained(world, tmp_path / "b", callbacks=[StopAt(4)], **settings)
    resumed = trained(world, tmp_path / "b", resume=True, **settings)
    assert_same_rows(*map(metrics, (resumed, straight)))


@pytest.mark.slow
def test_changed_settings_are_logged_and_taken(world, tmp_path, caplog):
    trained(world, tmp_path, callbacks=[StopAt(2)], peft_config=lora(), **RUN, **PLAIN)
    changed = {"feasible": True, "feasible_kwargs": {"epsilon": 0.2, "eta": 0.7}, "beta": 0.3}
    with caplog.at_level(logging.WARNING, "hf_delta"):
        trainer = trained(world, tmp_path, resume=True, peft_config=lora(), **{**RUN, **changed})
    said = " ".join(record.getMessage() for record in caplog.records)
    assert "was saved with feasible_kwargs {'epsilon': 0.6, 'eta': 0.7}; the run goes on with" in said
    assert "was saved with beta 0.5; the run goes on with 0.3" in said
    assert trainer.multipliers.epsilon == 0.2 and trainer.state.global_step == 8


def test_true_takes_the_newest_checkpoint_that_is_complete(world, straight, tmp_path):
    settings = settings_of("sparse_lora")
    trained(world, tmp_path, callbacks=[StopAt(4)], **settings())
    (tmp_path / "checkpoint-4" / "trainer_state.json").unlink()
    second = build(world, tmp_path, **settings())
    second.train(resume_from_checkpoint=True)
    assert second.resumed_step == 3
    assert_identical(parameters(straight("sparse_lora")), parameters(second))
    with pytest.raises(InputError, match="holds no complete checkpoint"):
        trained(world, tmp_path / "empty", resume=True, **settings())


def test_the_state_holds_every_sample_that_was_seen(world, tmp_path):
    trainer = trained(world, tmp_path, callbacks=[StopAt(3)], **settings_of("plain_lora")())
    saved = load_state(tmp_path / "checkpoint-3" / STATE_FILE)
    assert_identical(saved["multipliers"], trainer.multipliers.state_dict())
    assert len(saved["multipliers"]["keys"]) == 10 and saved["method"]["feasible"] is True
