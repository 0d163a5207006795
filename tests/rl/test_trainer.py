"""The trainer against TRL's own and against a brute-force evaluation of the objective."""

import asyncio
import json
from functools import partial

import pytest
import torch
import trl
from datasets import IterableDataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_delta import DeltaGRPOConfig, DeltaGRPOTrainer
from hf_delta.errors import InputError
from hf_delta.rl.prompt_ids import with_prompt_ids
from hf_delta.rl.rewards import checked_reward
from tests.rl.frozen import (
    GENERATIONS,
    MAX_COMPLETION,
    PROMPTS,
    GradientRecorder,
    brute_force_gradient,
    build_world,
    dataset,
    frozen_reward,
    frozen_rollouts,
)
from tests.running import CPU


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return build_world(tmp_path_factory.mktemp("world"))


def config(out, cls=DeltaGRPOConfig, **changes):
    settings = {
        "output_dir": str(out),
        "per_device_train_batch_size": PROMPTS * GENERATIONS,
        "num_generations": GENERATIONS,
        "max_completion_length": MAX_COMPLETION,
        "max_steps": 1,
        "learning_rate": 1e-2,
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        **CPU,
    }
    return cls(**{**settings, **changes})


def build(world, out, cls=DeltaGRPOTrainer, config_cls=DeltaGRPOConfig, reward=frozen_reward, rows=PROMPTS, **changes):
    trainer_kwargs = {k: changes.pop(k) for k in ("rollout_func", "callbacks", "peft_config") if k in changes}
    args = config(out, config_cls, **changes)
    model = AutoModelForCausalLM.from_pretrained(world)
    tokenizer = AutoTokenizer.from_pretrained(world)
    return cls(model, reward, args, dataset(rows), processing_class=tokenizer, **trainer_kwargs)


def parameters(trainer):
    return {n: p.detach().clone() for n, p in trainer.model.named_parameters()}


def assert_identical(one, other):
    assert one.keys() == other.keys()
    assert [n for n in one if not torch.equal(one[n], other[n])] == []


# -- features off ---------------------------------------------------------------------------------------------------
OFF = {
    "learning_rate": 1e-3,
    "max_steps": 6,
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "steps_per_generation": 4,
    "num_iterations": 2,
    "max_grad_norm": 1.0,
}


@pytest.mark.parametrize("loss_type", ["dapo", "grpo"])
@pytest.mark.parametrize("config_cls", [DeltaGRPOConfig, trl.GRPOConfig])
def test_with_our_features_off_parameters_are_bit_identical_to_trl(world, tmp_path, loss_type, config_cls):
    theirs = build(world, tmp_path / "a", trl.GRPOTrainer, trl.GRPOConfig, loss_type=loss_type, **OFF)
    before = parameters(theirs)
    theirs.train()
    ours = build(world, tmp_path / "b", config_cls=config_cls, loss_type=loss_type, **OFF)
    ours.train()
    assert_identical(parameters(theirs), parameters(ours))
    assert any(not torch.equal(before[n], p) for n, p in parameters(ours).items())


def lora(dropout):
    from peft import LoraConfig

    return LoraConfig(r=4, target_modules="all-linear", lora_dropout=dropout, task_type="CAUSAL_LM")


def test_rollout_dropout_true_is_trl_and_false_is_not(world, tmp_path):
    """With adapter dropout TRL samples from a policy with dropout; only `rollout_dropout: true` repeats its draws."""
    # The adapter must matter for its dropout to matter, hence the large steps before the second rollout.
    settings = {"max_steps": 3, "learning_rate": 0.5, "peft_config": lora(0.5)}
    runs = []
    for name, cls, config_cls, extra in (
        ("theirs", trl.GRPOTrainer, trl.GRPOConfig, {}),
        ("same", DeltaGRPOTrainer, DeltaGRPOConfig, {"rollout_dropout": True}),
        ("without", DeltaGRPOTrainer, DeltaGRPOConfig, {}),
    ):
        # Each is built just before it trains: the constructor seeds the random state that the training goes on with.
        runs.append(build(world, tmp_path / name, cls, config_cls, **settings, **extra))
        runs[-1].train()
    theirs, same, without = map(parameters, runs)
    assert_identical(theirs, same)
    assert any(not torch.equal(p, without[n]) for n, p in theirs.items())


def test_rollouts_run_without_dropout_and_every_module_gets_its_mode_back(world, tmp_path):
    trainer = build(world, tmp_path, peft_config=lora(0.5))
    frozen_module = trainer.model.get_submodule("base_model.model.model.norm")
    seen = []
    generate = trainer.model.base_model.model.generate

    def spy(*args, **kwargs):
        seen.append(any(m.training for m in trainer.model.modules()))
        return generate(*args, **kwargs)

    trainer.model.base_model.model.generate = spy
    trainer.model.train()
    frozen_module.training = False
    rows = [row for row in dataset(2) for _ in range(GENERATIONS)]
    trainer._generate_and_score_completions(rows)
    assert seen == [False]
    assert trainer.model.training and not frozen_module.training


# -- the objective --------------------------------------------------------------------------------------------------
def delta_l_by_definition(alpha, scope):
    """`x_i = (1 / M) L_i^-alpha / sum_j L_j^-alpha`, times the share of sequences that take part (Dr.GRPO counts all)."""

    def weigh(lengths, groups):
        weights = []
        for length, group in zip(lengths, groups):
            peers = [p for p, g in zip(lengths, groups) if p and (scope == "batch" or g == group)]
            x = length**-alpha / sum(p**-alpha for p in peers) if length else 0.0
            weights.append(x * len(peers) / (len(lengths) * MAX_COMPLETION))
        return weights

    return weigh


CASES = {
    "alpha 1": {"delta_l_alpha": 1.0},
    "alpha .75": {"delta_l_alpha": 0.75},
    "group": {"delta_l_alpha": 0.75, "delta_l_scope": "group"},
    "truncated": {"delta_l_alpha": 0.5, "mask_truncated_completions": True},
    "truncated, group, environment": {
        "delta_l_alpha": 1.0,
        "delta_l_scope": "group",
        "mask_truncated_completions": True,
    },
}
# Rows a micro-batch, micro-batches a step, micro-batches a generation.
LAYOUTS = [(32, 1, 1), (4, 8, 8), (8, 2, 4), (8, 1, 4)]


def frozen_run(world, out, layout, **changes):
    rows, accumulate, per_generation = layout
    recorder = GradientRecorder()
    trainer = build(
        world,
        out,
        loss_type="delta_l",
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=accumulate,
        steps_per_generation=per_generation,
        max_steps=per_generation // accumulate,
        callbacks=[recorder],
        optim="sgd",
        **changes,
    )
    start = parameters(trainer)
    trainer.train()
    return trainer, start, recorder


@pytest.mark.parametrize("case", CASES)
def test_gradient_and_sgd_step_equal_brute_force_in_every_layout(world, tmp_path, case):
    settings = CASES[case]
    world_settings = {
        "fraction_truncated": 0.3 if "truncated" in case else 0.0,
        "with_environment": "environment" in case,
    }
    weigh = delta_l_by_definition(settings["delta_l_alpha"], settings.get("delta_l_scope", "batch"))
    model, tokenizer = AutoModelForCausalLM.from_pretrained(world), AutoTokenizer.from_pretrained(world)
    expected = brute_force_gradient(model, tokenizer, dataset()["prompt"], weigh, **world_settings)
    rollouts = partial(frozen_rollouts, **world_settings)
    largest = max(g.abs().max().item() for g in expected.values())
    assert largest > 1e-3  # or the comparison below would hold for no gradient at all
    for i, layout in enumerate(LAYOUTS if case == "alpha .75" else LAYOUTS[:2]):
        # At learning rate 0 the steps of one window see the same parameters, so their gradients average to the batch's.
        _, _, recorder = frozen_run(
            world, tmp_path / f"g{i}", layout, rollout_func=rollouts, learning_rate=0.0, **settings
        )
        found = recorder.mean()
        assert found.keys() == expected.keys()
        for name in expected:
            torch.testing.assert_close(
                found[name], expected[name], rtol=0, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
            )
    rate = 0.5
    trainer, start, _ = frozen_run(
        world, tmp_path / "step", LAYOUTS[0], rollout_func=rollouts, learning_rate=rate,
        lr_scheduler_type="constant", **settings,
    )  # fmt: skip
    for name, parameter in parameters(trainer).items():
        torch.testing.assert_close(parameter, start[name] - rate * expected[name], rtol=0, atol=1e-6)


def test_alpha_zero_is_dr_grpo_bit_for_bit(world, tmp_path):
    rollouts = partial(frozen_rollouts, fraction_truncated=0.3)
    common = {"mask_truncated_completions": True, "rollout_func": rollouts, "max_steps": 3, "learning_rate": 1e-2}
    theirs = build(world, tmp_path / "a", trl.GRPOTrainer, trl.GRPOConfig, loss_type="dr_grpo", **common)
    theirs.train()
    ours = build(world, tmp_path / "b", loss_type="delta_l", delta_l_alpha=0.0, **common)
    ours.train()
    assert_identical(parameters(theirs), parameters(ours))


# -- users' own rules -----------------------------------------------------------------------------------------------
class CountingRule:
    """A rule with a state; weights the correct sequences by how often it was called."""

    needs = frozenset({"prompt_ids", "logps"})

    def __init__(self, slope=1.0):
        self.slope, self.calls, self.batches = slope, torch.zeros(1, dtype=torch.long), []

    def __call__(self, batch):
        self.calls += 1
        self.batches.append(batch)
        return torch.where(batch.correct, 1.0 + self.slope * self.calls, 1.0)

    def state_dict(self):
        return {"calls": self.calls}

    def load_state_dict(self, state):
        self.calls = state["calls"]


RULE = "tests.rl.test_trainer.CountingRule"


def test_a_rule_by_dotted_path_sees_the_batch_and_its_state_survives(world, tmp_path):
    settings = {
        "advantage_transforms": [RULE],
        "advantage_transform_kwargs": {RULE: {"slope": 2.0}},
        "loss_type": "delta_l",
        "rollout_func": frozen_rollouts,
        "per_device_train_batch_size": 16,
        "gradient_accumulation_steps": 1,
        "steps_per_generation": 2,
        "max_steps": 4,
        "save_strategy": "steps",
        "save_steps": 4,
    }
    trainer = build(world, tmp_path, **settings)
    trainer.train()
    rule = trainer.advantage_transforms[1]
    batch = rule.batches[0]
    assert rule.slope == 2.0 and len(batch) == PROMPTS * GENERATIONS
    assert batch.group_ids.tolist() == [i // GENERATIONS for i in range(len(batch))]
    assert len(set(batch.prompt_ids)) == PROMPTS and set(batch.prompt_ids) <= {str(i) for i in range(PROMPTS)}
    # Two steps use one generation, so TRL computes the old log-probabilities.
    assert batch.logps.shape == batch.mask.shape and torch.equal(batch.mask.sum(1), batch.lengths)
    assert bool((batch.logps[batch.mask.bool()] < 0).all())
    assert torch.equal(batch.correct, batch.reward > 0.5)
    resumed = build(world, tmp_path, **{**settings, "max_steps": 6})
    resumed.train(resume_from_checkpoint=True)
    assert resumed.advantage_transforms[1].calls.item() == 3
    # Step 5 generated, step 6 used the same rollouts, and the last row sums up the run.
    assert {"weights/min", "weights/mean", "weights/max", "weights/std"} <= resumed.state.log_history[-3].keys()


def test_a_rule_by_name_is_the_rule_by_its_key(world, tmp_path):
    frozen = {"rollout_func": frozen_rollouts, "optim": "sgd"}
    key = build(world, tmp_path / "a", loss_type="delta_l", delta_l_alpha=0.5, **frozen)
    key.train()
    name = build(
        world,
        tmp_path / "b",
        loss_type="dr_grpo",
        advantage_transforms=["delta_l"],
        advantage_transform_kwargs='{"delta_l": {"alpha": 0.5}}',
        **frozen,
    )
    name.train()
    assert_identical(parameters(key), parameters(name))


def test_ids_of_a_stream_name_the_prompt_and_not_its_place():
    rows = dataset(8)
    expected = {row["prompt"]: row["prompt_id"] for row in with_prompt_ids(rows.to_iterable_dataset())}
    assert len(set(expected.values())) == 8
    shuffled = with_prompt_ids(rows.to_iterable_dataset(num_shards=4).shuffle(seed=1, buffer_size=3))
    assert {row["prompt"]: row["prompt_id"] for row in shuffled} == expected
    own = IterableDataset.from_generator(lambda: iter([{"prompt": "1+1:", "prompt_id": "mine"}]))
    assert [row["prompt_id"] for row in with_prompt_ids(own)] == ["mine"]


def test_prompt_ids_are_strings_and_must_not_be_removed(world, tmp_path):
    with_numbers = dataset(PROMPTS).add_column("prompt_id", list(range(PROMPTS)))
    trainer = build(world, tmp_path, advantage_transforms=[RULE], rollout_func=frozen_rollouts)
    trainer.train_dataset = with_numbers
    trainer.train()
    assert set(trainer.advantage_transforms[0].batches[0].prompt_ids) == {str(i) for i in range(PROMPTS)}
    with pytest.raises(InputError, match="remove_unused_columns: true would remove them"):
        build(world, tmp_path, advantage_transforms=[RULE], remove_unused_columns=True)


def test_the_table_of_completions_holds_no_weights_for_evaluation_rows(world, tmp_path):
    trainer = build(world, tmp_path, loss_type="delta_l", rollout_func=frozen_rollouts)
    trainer.train()
    columns = trainer._logs["extra"]
    assert len(columns["weight"]) == PROMPTS * GENERATIONS and None not in columns["weight"]
    trainer.evaluate(dataset(2))
    assert list(columns["weight"])[-2 * GENERATIONS :] == [None] * (2 * GENERATIONS)
    assert len(columns["weight"]) == len(trainer._logs["advantages"])


def test_every_completion_truncated_far_into_a_run_costs_a_step_only(world, tmp_path, caplog):
    rollouts = partial(frozen_rollouts, fraction_truncated=1.1)
    trainer = build(world, tmp_path, rollout_func=rollouts, mask_truncated_completions=True, loss_type="delta_l")
    trainer._check_rollouts({"num_items_in_batch": torch.tensor(5)}, torch.zeros(32, 1))
    start = parameters(trainer)
    trainer.train()
    assert "This step changes nothing" in caplog.text
    assert_identical(start, parameters(trainer))


def test_prompt_ids_are_kept_when_the_dataset_has_them():
    rows = dataset(3).add_column("prompt_id", ["x", "y", "z"])
    assert with_prompt_ids(rows)["prompt_id"] == ["x", "y", "z"]
    assert list(with_prompt_ids(dataset(3))["prompt_id"]) == ["0", "1", "2"]


# -- bad input ------------------------------------------------------------------------------------------------------
def raises(completions, **kwargs):
    raise ZeroDivisionError("by zero")


def nan(completions, **kwargs):
    return [0.0] * (len(completions) - 1) + [float("nan")]


def too_few(completions, **kwargs):
    return [1.0]


def no_list(completions, **kwargs):
    return None


def text(completions, **kwargs):
    return ["1.0"] * len(completions)


def none_for_all(completions, **kwargs):
    return [None] * len(completions)


async def async_raises(completions, **kwargs):
    raise ZeroDivisionError("by zero")


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (raises, "'raises' raised ZeroDivisionError: by zero"),
        (async_raises, "'async_raises' raised ZeroDivisionError: by zero"),
        (nan, "'nan' returned nan for the completion"),
        (too_few, "returned 1 rewards for 32 completions"),
        (no_list, "returned NoneType; it must return a list"),
        (text, "'text' returned '1.0' for the completion"),
        (none_for_all, "None of the reward functions"),
    ],
)
def test_a_bad_reward_function_is_one_clear_error(world, tmp_path, reward, message):
    with pytest.raises(InputError, match=message):
        build(world, tmp_path, reward=reward, rollout_func=frozen_rollouts).train()


class AsyncReward:
    async def __call__(self, completions, **kwargs):
        return frozen_reward(completions)


@pytest.mark.parametrize("wrap", [lambda f: f, partial, lambda f: partial(partial(f))])
def test_async_rewards_are_awaited_however_they_are_wrapped(wrap):
    checked = checked_reward(wrap(AsyncReward()), "reward")
    assert asyncio.run(checked(prompts=["a"], completions=["b"])) == frozen_reward(["b"])


class UnsavableRule(CountingRule):
    def state_dict(self):
        return {"score": float("-inf")}


class WrongNeeds(CountingRule):
    needs = frozenset({"prompt_id"})


def test_a_state_that_cannot_be_saved_names_its_rule(world, tmp_path):
    trainer = build(
        world,
        tmp_path,
        advantage_transforms=["tests.rl.test_trainer.UnsavableRule"],
        rollout_func=frozen_rollouts,
        save_strategy="steps",
        save_steps=1,
    )
    with pytest.raises(InputError, match="UnsavableRule cannot be saved"):
        trainer.train()


def test_a_rule_that_asks_for_what_there_is_not_is_refused(world, tmp_path):
    with pytest.raises(
        InputError, match="WrongNeeds needs prompt_id; it can ask for groups, logps, losses, prompt_ids"
    ):
        build(world, tmp_path, advantage_transforms=["tests.rl.test_trainer.WrongNeeds"])


def test_none_for_some_rows_is_trls_none(world, tmp_path):
    def some(completions, **kwargs):
        return [None if i % 5 == 0 else r for i, r in enumerate(frozen_reward(completions))]

    theirs = build(world, tmp_path / "a", trl.GRPOTrainer, trl.GRPOConfig, reward=some, rollout_func=frozen_rollouts)
    theirs.train()
    ours = build(world, tmp_path / "b", reward=some, rollout_func=frozen_rollouts)
    ours.train()
    assert_identical(parameters(theirs), parameters(ours))


def test_every_completion_truncated(world, tmp_path):
    rollouts = partial(frozen_rollouts, fraction_truncated=1.1)
    with pytest.raises(InputError, match="Every one of the 32 completions was cut at max_completion_length = 12"):
        build(world, tmp_path, rollout_func=rollouts, mask_truncated_completions=True).train()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss_type": "delta-l"}, "'delta-l' is not one of .*delta_l"),
        ({"loss_type": "delta_l", "delta_l_alpha": 1.5}, r"\[0, 1\], got 1.5"),
        ({"loss_type": "delta_l", "delta_l_scope": "row"}, "batch or group"),
        ({"loss_type": "delta_l", "beta": 0.04}, "beta: 0.0"),
        ({"loss_type": "dapo", "delta_l_alpha": 0.5}, "do nothing with loss_type: dapo"),
        ({"advantage_transforms": ["nowhere.Rule"]}, "cannot import nowhere"),
        ({"advantage_transforms": ["tests.rl.test_trainer.Missing"]}, "no name 'Missing'"),
        ({"advantage_transforms": ["Rule"]}, "there is no 'Rule'. Write one of .*delta_l.*, or a dotted path"),
        ({"advantage_transform_kwargs": {"a.b": {}}}, "does not list"),
        ({"advantage_transform_kwargs": "{"}, "not JSON"),
        (
            {
                "advantage_transforms": ["tests.rl.test_delta_l.negative"],
                "advantage_transform_kwargs": {"tests.rl.test_delta_l.negative": {"x": 1}},
            },
            "is a function and takes none",
        ),
        ({"num_generations": 5}, "divisible by num_generations"),
    ],
)
def test_a_wrong_config_is_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **changes)


def test_delta_l_in_a_plain_config_says_which_config_to_take(world, tmp_path):
    with pytest.raises(InputError, match="needs a DeltaGRPOConfig"):
        build(world, tmp_path, config_cls=trl.GRPOConfig, loss_type="delta_l")


def test_the_config_is_json(tmp_path):
    args = config(tmp_path, loss_type="delta_l", advantage_transforms=[RULE])
    assert json.loads(args.to_json_string())["advantage_transforms"] == [RULE]
