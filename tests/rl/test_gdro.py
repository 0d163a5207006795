"""Prompt weights and rollout budgets in the trainer: against brute force, TRL's own trainer, and a run never stopped."""

import math
import re
from functools import partial

import pytest
import torch
import trl
from datasets import Dataset, IterableDataset
from PIL import Image
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from hf_delta import DeltaGRPOConfig, DeltaGRPOTrainer, RolloutGDRO
from hf_delta.checkpoint import STATE_FILE, load_state
from hf_delta.errors import InputError
from hf_delta.rl.advantages import mean_surrogate_loss
from hf_delta.rl.prompt_ids import with_prompt_ids
from tests.rl.frozen import (
    GENERATIONS,
    PROMPTS,
    GradientRecorder,
    build_world,
    dataset,
    frozen_reward,
    frozen_rollouts,
)
from tests.rl.gdro import COUNTS, GDRO, ByPromptId, Remembering, binary_reward, frozen_groups, gdro_objective
from tests.rl.test_resume import StopAt
from tests.rl.test_trainer import assert_identical, build, config, lora, parameters


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return build_world(tmp_path_factory.mktemp("world"))


def rows_with_ids():
    return [{**row, "prompt_id": str(i)} for i, row in enumerate(dataset())]


# -- the objective --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("layout", [(32, 1, 1), (4, 8, 8), (8, 2, 4)])
def test_gradient_with_everything_on_equals_brute_force(world, tmp_path, layout):
    """Variable groups, prompt weights that were learnt, Delta-L and masks of truncation, in every layout."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(world), AutoTokenizer.from_pretrained(world)
    expected = gdro_objective(model, tokenizer, rows_with_ids(), eta=2.0, alpha=0.75)
    rows, accumulate, per_generation = layout
    recorder = GradientRecorder()
    steps = per_generation // accumulate
    trainer = build(
        world,
        tmp_path,
        reward=binary_reward,
        rollout_func=frozen_groups,
        callbacks=[recorder],
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=accumulate,
        steps_per_generation=per_generation,
        max_steps=2 * steps,
        learning_rate=0.0,
        optim="sgd",
        **GDRO,
    )
    trainer.train()
    recorder.gradients = recorder.gradients[steps:]
    found = recorder.mean()
    largest = max(g.abs().max().item() for g in expected.values())
    assert largest > 1e-3
    assert max((found[n] - g).abs().max().item() for n, g in expected.items()) < 2e-6 * max(1.0, largest)


def test_an_allocation_of_equal_numbers_is_trl_bit_for_bit(world, tmp_path):
    """Without a posterior to tell prompts apart everyone gets the mean; two windows with their own generation."""
    settings = {"max_steps": 2, "learning_rate": 1e-3, "shuffle_dataset": True}
    theirs = build(world, tmp_path / "a", trl.GRPOTrainer, trl.GRPOConfig, **settings)
    theirs.train()
    ours = build(
        world, tmp_path / "b", rollout_allocation="tests.rl.test_gdro.equal", correct_threshold=1.0, **settings
    )
    ours.train()
    assert ours.single_rows
    assert_identical(parameters(theirs), parameters(ours))


def equal(batch):
    return torch.full((len(batch.prompt_ids),), GENERATIONS)


def other_metrics(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("aggregation", ["sum_then_normalize", "normalize_then_sum"])
def test_advantages_are_those_of_the_true_groups(world, tmp_path, scale, aggregation):
    """Oracle: TRL's formulas on each group by itself, with rows that no function scores."""

    def some(completions, **kwargs):
        return [None if i % 7 == 0 else r for i, r in enumerate(frozen_reward(completions))]

    def second(completions, **kwargs):
        return [len(c) / 20 for c in completions]

    both = aggregation == "normalize_then_sum"
    trainer = build(
        world,
        tmp_path,
        reward=[some, second] if both else some,
        rollout_func=frozen_groups,
        scale_rewards=scale,
        multi_objective_aggregation=aggregation,
        rollout_allocation="tests.rl.gdro.ByPromptId",
        correct_threshold=1.0,
    )
    trainer.model.train()
    raw = []
    calculate = trainer._calculate_rewards
    trainer._calculate_rewards = lambda *a: raw.append(calculate(*a)) or raw[-1]
    rows = [row for row in trainer.train_dataset for _ in range(GENERATIONS)]
    found = trainer._generate_and_score_completions(rows)["advantages"]
    groups = [list(range(*span)) for span in spans([COUNTS[str(i)] for i in range(PROMPTS)])]
    expected = by_hand(raw[0], groups, scale, aggregation, torch.ones(raw[0].shape[1]))
    weights = torch.tensor([GENERATIONS / len(g) for g in groups for _ in g])
    torch.testing.assert_close(found, expected * weights, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.tensor(trainer._logs["advantages"]), expected, rtol=1e-4, atol=1e-5)


def spans(counts):
    start = 0
    for count in counts:
        yield start, start + count
        start += count


def normalised(values):
    known = values[~values.isnan()]
    return (values - known.mean()) / (known.std() + 1e-4)


def by_hand(rewards, groups, scale, aggregation, weights):
    unscored = rewards.isnan().all(1)
    if aggregation == "normalize_then_sum":
        columns = [torch.cat([normalised(rewards[g, f]) for g in groups]) for f in range(rewards.shape[1])]
        total = (torch.stack(columns, 1) * weights).nansum(1)
        total[unscored] = torch.nan
        return normalised(total).nan_to_num()
    total = (rewards * weights).nansum(1)
    total[unscored] = torch.nan
    centred = torch.cat([total[g] - total[g].nanmean() for g in groups])
    if scale == "group":
        centred = torch.cat([normalised(total[g]) for g in groups])
    if scale == "batch":
        centred = centred / (total[~unscored].std() + 1e-4)
    return centred.nan_to_num()


# -- rows -----------------------------------------------------------------------------------------------------------
class RowRecorder:
    """A reward function that keeps the columns it was given."""

    __name__ = "row_recorder"

    def __init__(self):
        self.batches = []

    def __call__(self, prompts, completions, answer, prompt_id, **kwargs):
        self.batches.append(list(zip(prompt_id, prompts, answer)))
        return [float(i % 2) for i in range(len(prompts))]


def test_every_prompt_gets_its_own_number_of_rows_and_keeps_its_columns(world, tmp_path):
    recorder = RowRecorder()
    trainer = build(world, tmp_path, reward=recorder, rollout_allocation="tests.rl.gdro.ByPromptId", max_steps=2)
    trainer.train()
    assert len(recorder.batches) == 2
    known = {row["prompt_id"]: (row["prompt"], row["answer"]) for row in rows_with_ids()}
    for batch in recorder.batches:
        assert {name: sum(b[0] == name for b in batch) for name in COUNTS} == COUNTS
        assert all(known[name] == (prompt, answer) for name, prompt, answer in batch)
    assert other_metrics(trainer, "rollouts/max") == [8, 8]


def test_weights_of_a_prompt_add_up_to_the_same_or_every_rollout_counts_once(world, tmp_path):
    for weighting in ("prompt", "sample"):
        rule = Remembering(eta=0.0, max_weight=100.0)
        args = config(
            tmp_path,
            rollout_allocation="tests.rl.gdro.ByPromptId",
            rollout_weighting=weighting,
            prompt_groups="level",
        )
        model = AutoModelForCausalLM.from_pretrained(world)
        trainer = DeltaGRPOTrainer(
            model,
            binary_reward,
            args,
            dataset(),
            processing_class=AutoTokenizer.from_pretrained(world),
            rollout_func=frozen_groups,
            advantage_transforms=[rule],
        )
        trainer.train()
        ((batch, weights),) = rule.seen
        if weighting == "sample":
            assert batch.row_weights.eq(1).all()
            continue
        sums = torch.zeros(PROMPTS, dtype=torch.float64).index_add_(0, batch.group_ids, batch.row_weights)
        torch.testing.assert_close(sums, torch.full((PROMPTS,), float(GENERATIONS), dtype=torch.float64))


def hard_or_even(completions, prompt_id, **kwargs):
    """Prompts with even ids are never solved, the others every second time."""
    return [float(int(p) % 2 and i % 2) for i, p in enumerate(prompt_id)]


def test_the_budget_of_a_real_run_is_exact_and_follows_the_posterior(world, tmp_path):
    """All prompts are seen by the second step: those with mixed results get more from then on."""

    trainer = build(
        world,
        tmp_path,
        reward=hard_or_even,
        rollout_allocation="rollout_gdro",
        rollout_allocation_kwargs={"exploration": 0.0},
        max_steps=4,
    )
    trainer.train()
    plan = trainer._plan
    assert int(plan.counts.sum()) == PROMPTS * GENERATIONS
    odd = torch.tensor([int(name) % 2 == 1 for name in plan.prompt_ids])
    assert plan.counts[odd].min() > plan.counts[~odd].max()
    assert other_metrics(trainer, "rollouts/max")[0] == GENERATIONS


@pytest.mark.parametrize("solved", [0.0, 1.0])
def test_all_solved_or_all_failed_stays_uniform_and_finite(world, tmp_path, solved):
    trainer = build(
        world,
        tmp_path,
        reward=lambda completions, **kwargs: [solved] * len(completions),
        rollout_allocation="rollout_gdro",
        prompt_weighting="prompt_gdro",
        max_steps=3,
    )
    trainer.train()
    assert trainer._plan.counts.eq(GENERATIONS).all()
    assert all(p.isfinite().all() for p in parameters(trainer).values())


def test_evaluation_is_left_alone(world, tmp_path):
    """Rows of an evaluation are not shared out, and nothing is learnt from them."""
    settings = {"rollout_allocation": "rollout_gdro", "prompt_weighting": "prompt_gdro", "prompt_groups": "level"}
    trainer = build(world, tmp_path, reward=binary_reward, eval_strategy="no", **settings)
    trainer.train()
    before = trainer.curriculum.state_dict()
    trainer.eval_dataset = trainer.train_dataset
    trainer.evaluate()
    assert_same(before, trainer.curriculum.state_dict())


class Listening(Remembering):
    """Keeps the surrogate losses that it is told."""

    def __init__(self):
        super().__init__(signal="loss")
        self.heard = []

    def on_losses(self, sums, counts):
        self.heard.append((sums, counts))


def surrogate(logps, old, advantage, mask, low, high):
    """Mean clipped surrogate loss of one sequence, in plain Python."""
    terms = []
    for new, before, counts in zip(logps, old, mask):
        ratio = math.exp(new - before)
        clipped = min(max(ratio, 1 - low), 1 + high)
        terms += [min(ratio * advantage, clipped * advantage)] if counts else []
    return -sum(terms) / len(terms) if terms else 0.0


def test_surrogate_losses_by_hand():
    generator = torch.Generator().manual_seed(0)
    old = torch.randn(6, 5, generator=generator)
    logps = old + torch.randn(6, 5, generator=generator)
    advantages = torch.tensor([1.0, -1.0, 0.5, -2.0, 1.0, 1.0])
    mask = (torch.rand(6, 5, generator=generator) > 0.3).long()
    mask[5] = 0
    found = mean_surrogate_loss(logps, old, advantages, mask, 0.2, 0.3)
    expected = [
        surrogate(*row, 0.2, 0.3) for row in zip(logps.tolist(), old.tolist(), advantages.tolist(), mask.tolist())
    ]
    torch.testing.assert_close(found.tolist(), expected, rtol=1e-5, atol=1e-6)
    ratios = (logps - old).exp()[mask.bool()]
    assert (ratios < 0.8).any() and (ratios > 1.3).any(), "nothing was clipped"


def test_the_loss_signal_is_the_surrogate_of_the_window(world, tmp_path):
    """Two windows of 4 updates, with rows cut off and tokens of an environment: from what the loss was computed with."""
    rule = Listening()
    args = config(
        tmp_path,
        prompt_groups="level",
        mask_truncated_completions=True,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=1,
        steps_per_generation=4,
        max_steps=8,
        learning_rate=1e-2,
        epsilon=0.02,
        epsilon_high=0.05,
        correct_threshold=1.0,
    )
    trainer = DeltaGRPOTrainer(
        AutoModelForCausalLM.from_pretrained(world),
        frozen_reward,
        args,
        dataset(),
        processing_class=AutoTokenizer.from_pretrained(world),
        rollout_func=partial(frozen_rollouts, fraction_truncated=0.3, with_environment=True),
        advantage_transforms=[rule],
    )
    micro_batches, on_loss = [], trainer.on_loss
    trainer.on_loss = lambda rows, logps: micro_batches.append((rows, logps)) or on_loss(rows, logps)
    trainer.train()
    assert len(rule.heard) == 2 and len(micro_batches) == 8
    for window, (sums, counts) in enumerate(rule.heard):
        expected, present = [0.0, 0.0], [0, 0]
        for rows, logps in micro_batches[4 * window : 4 * window + 4]:
            mask = rows["completion_mask"] * rows["tool_mask"]
            for i, group in enumerate(rows["difficulty_groups"].tolist()):
                advantage = rows["plain_advantages"][i].item()
                old = rows["old_per_token_logps"][i].tolist()
                expected[group] += surrogate(logps[i].tolist(), old, advantage, mask[i].tolist(), 0.02, 0.05)
                present[group] += bool(mask[i].any())
        assert counts.tolist() == present and sum(present) < 32, "no row was cut off"
        torch.testing.assert_close(sums.tolist(), expected, atol=1e-4, rtol=0)
    first = micro_batches[0]
    torch.testing.assert_close(
        first[1] * first[0]["completion_mask"],
        first[0]["old_per_token_logps"] * first[0]["completion_mask"],
        atol=1e-5,
        rtol=0,
    )
    assert max(abs(x) for x in rule.heard[0][0].tolist()) > 1e-3


def test_what_is_logged(world, tmp_path):
    """Rollouts by group and what is known, and TRL's share of prompts without a signal, on the true groups."""
    trainer = build(
        world,
        tmp_path,
        reward=hard_or_even,
        rollout_allocation="tests.rl.gdro.ByPromptId",
        prompt_groups="level",
        max_steps=2,
    )
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "rollouts/max" in entry]
    of_level = {level: [COUNTS[str(i)] for i in range(PROMPTS) if i % 2 == level] for level in (0, 1)}
    for entry in logs:
        for level, counts in of_level.items():
            assert entry[f"gdro/rollouts/add{level}"] == pytest.approx(sum(counts) / len(counts))
    assert [entry["difficulty/unseen"] for entry in logs] == [1.0, 0.0]
    assert logs[0]["difficulty/pass_rate"] == pytest.approx(0.5) and logs[1]["difficulty/pass_rate"] < 0.45
    # Odd prompts have two outcomes among at least 3 rollouts, even ones only one.
    zero = sum(of_level[0]) / sum(COUNTS.values())
    assert logs[0]["frac_reward_zero_std"] == pytest.approx(zero)


# -- state ----------------------------------------------------------------------------------------------------------
LEARNING = {
    "reward": hard_or_even,
    "loss_type": "delta_l",
    "prompt_weighting": "prompt_gdro",
    "prompt_weighting_kwargs": {"signal": "loss", "eta": 50.0},
    "rollout_allocation": "rollout_gdro",
    "difficulty_kwargs": {"prior_column": "level"},
    "per_device_train_batch_size": 8,
    "steps_per_generation": 2,
    "num_iterations": 2,
    "max_steps": 10,
    "learning_rate": 3e-3,
    "save_strategy": "steps",
    "save_steps": 1,
}


class PlanRecorder(TrainerCallback):
    """What was handed out before each step."""

    def __init__(self):
        self.counts = []

    def of(self, trainer):
        plan = trainer.curriculum.plan

        def remembered(*args):
            found = plan(*args)
            self.counts.append((found.prompt_ids, found.counts.tolist(), found.groups.tolist()))
            return found

        trainer.curriculum.plan = remembered
        return trainer


@pytest.mark.parametrize(
    "controller,cut", [("variance", 4), ("variance", 5), ("variance", 6), ("variance", 7), ("exp3", 7)]
)
def test_a_resumed_run_hands_out_what_one_never_stopped_does(world, tmp_path, controller, cut):
    """A window has 4 steps: cut at its end and inside it, where losses of half a window are still to be learnt from."""
    settings = {**LEARNING, "rollout_allocation_kwargs": {"controller": controller}}
    straight = PlanRecorder()
    whole = straight.of(build(world, tmp_path / "straight", peft_config=lora(0.2), **settings))
    whole.train()
    assert len({tuple(counts) for _, counts, _ in straight.counts}) > 1, "the allocation never changed"
    build(world, tmp_path / "cut", peft_config=lora(0.2), callbacks=[StopAt(cut)], **settings).train()
    again = PlanRecorder()
    resumed = again.of(build(world, tmp_path / "cut", peft_config=lora(0.2), **settings))
    resumed.train(resume_from_checkpoint=True)
    assert straight.counts[-len(again.counts) :] == again.counts
    assert_identical(parameters(whole), parameters(resumed))
    state = [load_state(tmp_path / run / "checkpoint-10" / STATE_FILE) for run in ("straight", "cut")]
    assert_same(state[0]["curriculum"], state[1]["curriculum"])
    assert_same(state[0]["transforms"], state[1]["transforms"])


def assert_same(one, other):
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, list):
        assert len(one) == len(other)
        for a, b in zip(one, other):
            assert_same(a, b)
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    else:
        assert one == other


def test_another_curriculum_is_refused_on_resume(world, tmp_path):
    settings = {"reward": binary_reward, "max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    build(world, tmp_path, rollout_allocation="rollout_gdro", **settings).train()
    for changes in ({}, {"rollout_allocation": "rollout_gdro", "prompt_groups": "level"}):
        with pytest.raises(InputError, match="belongs to another method"):
            build(world, tmp_path, **settings, **changes).train(resume_from_checkpoint=True)


# -- bad input ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "changes,message",
    [
        ({"prompt_weighting": "gdro"}, "prompt_weighting: there is no 'gdro'. Write one of .*prompt_gdro"),
        ({"rollout_allocation": "gdro"}, "rollout_allocation: there is no 'gdro'. Write one of rollout_gdro"),
        (
            {"prompt_weighting": "prompt_gdro", "prompt_weighting_kwargs": {"etta": 1}},
            "prompt_weighting_kwargs: .*'etta'.*takes: signal.*Did you mean eta?",
        ),
        (
            {"prompt_weighting": "prompt_gdro", "prompt_weighting_kwargs": {"eta": -1}},
            "prompt_weighting_kwargs: .*eta",
        ),
        ({"prompt_weighting": "prompt_gdro", "prompt_weighting_kwargs": "{"}, "prompt_weighting_kwargs is not JSON"),
        ({"prompt_weighting": "prompt_gdro", "prompt_weighting_kwargs": [1]}, "must map names to values"),
        ({"rollout_allocation": "rollout_gdro", "rollout_allocation_kwargs": {"n_min": 5}}, "n_min is 5"),
        ({"rollout_allocation": "rollout_gdro", "rollout_allocation_kwargs": {"n_max": 3}}, "n_max is 3"),
        ({"rollout_allocation": "rollout_gdro", "rollout_weighting": "token"}, "prompt or sample, got 'token'"),
        ({"prompt_weighting": "delta_l"}, "prompt_weighting: there is no 'delta_l'. Write one of prompt_gdro, or"),
        (
            {"prompt_weighting": "prompt_gdro", "advantage_transforms": ["prompt_gdro"]},
            "prompt_gdro is in prompt_weighting and in advantage_transforms",
        ),
        ({"rollout_allocation": equal}, "give objects to the trainer, as its rollout_allocation"),
        ({"rollout_allocation": "rollout_gdro", "difficulty_kwargs": {"edge": [0.5]}}, "difficulty_kwargs: .*'edge'"),
        (
            {"prompt_weighting": "prompt_gdro", "difficulty_kwargs": {"edges": [0.5, 0.2]}},
            "difficulty_kwargs: .*edges",
        ),
        (
            {"prompt_weighting": "prompt_gdro", "per_device_train_batch_size": GENERATIONS},
            "one prompt of num_generations 4",
        ),
        (
            {"merged_rollouts": True, "use_transformers_continuous_batching": True},
            "merged_rollouts does not work with use_transformers_continuous_batching",
        ),
    ],
)
def test_a_wrong_config_is_refused(tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        config(tmp_path, DeltaGRPOConfig, **changes)


def without_groups(batch):
    return torch.ones(len(batch))


WITHOUT_GROUPS = "tests.rl.test_gdro.without_groups"


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"prompt_groups": "level"}, "prompt_groups does nothing without prompt_weighting or rollout_allocation"),
        ({"difficulty_kwargs": {"decay": 0.5}}, "difficulty_kwargs does nothing without prompt_weighting or rollout"),
        ({"rollout_weighting": "sample"}, "rollout_weighting does nothing without rollout_allocation"),
        ({"correct_threshold": 0.3}, "correct_threshold does nothing without a rule"),
        ({"correct_reward_func": "nobody"}, "correct_reward_func does nothing without a rule"),
        (
            {"prompt_groups": "level", "prompt_weighting": WITHOUT_GROUPS},
            r"no weight rule \(tests.rl.test_gdro.without_groups\) asks for groups. .*needs = frozenset",
        ),
        (
            {
                "prompt_groups": "level",
                "prompt_weighting": "prompt_gdro",
                "difficulty_kwargs": {"exclude_extremes": True},
            },
            "difficulty_kwargs: exclude_extremes is about bins of pass rates",
        ),
        (
            {"advantage_transforms": [WITHOUT_GROUPS], "correct_reward_func": "accuracy"},
            "no reward function is called 'accuracy'; there are frozen_reward",
        ),
    ],
)
def test_keys_without_a_rule_for_them_are_refused(world, tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        build(world, tmp_path, **changes)


def test_a_rule_may_be_an_object_and_is_checked_too(world, tmp_path):
    trainer = DeltaGRPOTrainer(world, binary_reward, config(tmp_path), dataset(), rollout_allocation=ByPromptId())
    trainer.train()
    assert sorted(trainer._plan.counts.tolist()) == sorted(COUNTS.values())
    with pytest.raises(InputError, match="n_min is 5"):
        DeltaGRPOTrainer(world, binary_reward, config(tmp_path), dataset(), rollout_allocation=RolloutGDRO(n_min=5))
    with pytest.raises(InputError, match="leave one out"):
        args = config(tmp_path, rollout_allocation="rollout_gdro")
        DeltaGRPOTrainer(world, binary_reward, args, dataset(), rollout_allocation=ByPromptId())


def test_wrong_data_is_refused_before_a_model_is_looked_for(tmp_path):
    args = config(tmp_path, prompt_weighting="prompt_gdro", prompt_groups="levle")
    with pytest.raises(InputError, match="prompt_groups: the dataset has no column 'levle'"):
        DeltaGRPOTrainer("no/such/model", binary_reward, args, dataset())


def with_column(name, values):
    found = dataset()
    return found.remove_columns([name] if name in found.column_names else []).add_column(name, values)


@pytest.mark.parametrize(
    "data,changes,message",
    [
        (
            dataset(),
            {"prompt_groups": "topic"},
            "prompt_groups: the dataset has no column 'topic'; it has answer, level",
        ),
        (
            with_column("level", ["a", None, "b", None, "a", "a", "a", "a"]),
            {"prompt_groups": "level"},
            "prompt_groups: row 1 has no level, nor have 1 more of 8 rows",
        ),
        (with_column("prompt_id", ["a", "b", "c", None, "e", "f", "g", "h"]), {}, "prompt_id: row 3 has no prompt_id"),
        (
            with_column("level", ["a", "", "b", "a", "a", "a", "a", "a"]),
            {"prompt_groups": "level"},
            "row 1 has no level",
        ),
        (with_column("level", [1.0, 2.0, float("nan"), *[1.0] * 5]), {"prompt_groups": "level"}, "row 2 has no level"),
        (
            with_column("prompt_id", ["a", "b", "c", "a", "e", "f", "g", "h"]),
            {},
            "prompt_id 'a' names two different prompts, in rows 0 and 3",
        ),
        (
            dataset(),
            {"difficulty_kwargs": {"prior_column": "topic"}},
            "prior_column: the dataset has no column 'topic'",
        ),
        (dataset(), {"correct_reward_func": "accuracy"}, "no reward function is called 'accuracy'; there are binary"),
        (dataset(), {"remove_unused_columns": True}, "remove_unused_columns: true would remove them"),
    ],
)
def test_wrong_data_is_refused_before_training(world, tmp_path, data, changes, message):
    args = config(tmp_path, prompt_weighting="prompt_gdro", **changes)
    with pytest.raises(InputError, match=re.escape(message).replace(r"\.\*", ".*")):
        DeltaGRPOTrainer(world, binary_reward, args, data)


def test_the_same_prompt_twice_may_share_an_id(world, tmp_path):
    data = Dataset.from_list([*rows_with_ids(), rows_with_ids()[0]])
    args = config(tmp_path, prompt_weighting="prompt_gdro")
    assert DeltaGRPOTrainer(world, binary_reward, args, data).curriculum is not None


def test_rewards_outside_of_0_and_1_need_a_threshold(world, tmp_path):
    def wide(completions, **kwargs):
        return [float(i % 3 - 1) for i in range(len(completions))]

    settings = {"reward": wide, "rollout_allocation": "rollout_gdro"}
    with pytest.raises(InputError, match="lies between -1 and 1, .*Write correct_threshold"):
        build(world, tmp_path, **settings).train()
    build(world, tmp_path, correct_threshold=0.5, **settings).train()


def test_weighted_sums_of_right_answers_miss_1_by_rounding(world, tmp_path):
    right = [lambda completions, **kwargs: [1.0] * len(completions) for _ in range(4)]
    for index, function in enumerate(right):
        function.__name__ = f"right{index}"
    trainer = build(
        world, tmp_path, reward=right, reward_weights=[0.6, 0.1, 0.1, 0.2], rollout_allocation="rollout_gdro"
    )
    trainer.train()
    assert trainer.curriculum.difficulty.estimate(["0"]).solved.item() == GENERATIONS


def test_one_function_may_decide_what_is_correct(world, tmp_path):
    def accuracy(completions, **kwargs):
        """Rows of two wrong and two right, of which one has no verdict."""
        return [None if i % 4 == 3 else float(i % 2) for i in range(len(completions))]

    def style(completions, **kwargs):
        return [-3.0] * len(completions)

    trainer = build(
        world,
        tmp_path,
        reward=[style, accuracy],
        rollout_allocation="rollout_gdro",
        correct_reward_func="accuracy",
    )
    trainer.train()
    rates = trainer.curriculum.difficulty.estimate([str(i) for i in range(PROMPTS)])
    assert rates.seen.tolist() == [3.0] * PROMPTS and rates.solved.tolist() == [1.0] * PROMPTS


def wrong_sum(batch):
    return torch.full((len(batch.prompt_ids),), 3)


def failing(batch):
    raise KeyError("x")


@pytest.mark.parametrize(
    "rule,message", [("wrong_sum", "at least 2 rollouts, 32 in all"), ("failing", "raised KeyError")]
)
def test_a_broken_allocation_rule_is_named(world, tmp_path, rule, message):
    trainer = build(world, tmp_path, reward=binary_reward, rollout_allocation=f"tests.rl.test_gdro.{rule}")
    with pytest.raises(InputError, match=message):
        trainer.train()


@pytest.mark.parametrize("cut", [None, 2])
def test_streams_have_groups_that_come_as_they_come(world, tmp_path, cut):
    stream = IterableDataset.from_generator(lambda: iter(dataset(16).to_list()))
    args = config(
        tmp_path,
        prompt_weighting="prompt_gdro",
        prompt_groups="level",
        rollout_allocation="rollout_gdro",
        max_steps=3,
        accelerator_config={"dispatch_batches": False},
        save_strategy="steps",
        save_steps=1,
    )
    trainer = DeltaGRPOTrainer(world, binary_reward, args, stream, callbacks=[StopAt(cut)])
    trainer.train()
    names = trainer.curriculum.group_names
    assert set(names) == {"add0", "add1"}
    if cut:
        again = DeltaGRPOTrainer(world, binary_reward, args, stream)
        # Groups in another order would give the weights of one to the other.
        again.curriculum._index = {"add1": 0, "add0": 1} if names[0] == "add0" else {"add0": 0, "add1": 1}
        again.train(resume_from_checkpoint=True)
        assert again.curriculum.group_names == names


def test_a_rule_that_needs_losses_must_hear_them(world, tmp_path):
    with pytest.raises(InputError, match="needs losses and has no method on_losses"):
        build(world, tmp_path, advantage_transforms=["tests.rl.test_gdro.WithoutEar"])


class WithoutEar:
    needs = frozenset({"groups", "losses"})

    def __call__(self, batch):
        return torch.ones(len(batch))


def test_images_are_told_apart_by_what_they_show():
    black, white = (Image.new("RGB", (2, 2), colour) for colour in ("black", "white"))
    rows = [{"prompt": "what?", "image": image} for image in (black, white, black.copy())]
    stream = with_prompt_ids(IterableDataset.from_generator(lambda: iter(rows)))
    ids = [row["prompt_id"] for row in stream]
    assert ids[0] == ids[2] != ids[1]


# -- merged rollouts ------------------------------------------------------------------------------------------------
def test_rollouts_run_merged_and_leave_the_base_as_it_was(world, tmp_path):
    trainer = build(world, tmp_path, peft_config=lora(0.0), merged_rollouts=True, max_steps=3, learning_rate=0.1)
    layer = trainer.model.get_submodule("base_model.model.model.layers.0.mlp.up_proj")
    base, before = layer.base_layer.weight, layer.base_layer.weight.detach().clone()
    generate, seen = trainer.model.generate, []

    def spy(*args, **kwargs):
        seen.append((layer.merged_adapters[:], layer.base_layer.weight is base, layer.base_layer.weight.clone()))
        return generate(*args, **kwargs)

    trainer.model.generate = spy
    trainer.train()
    assert [names for names, _, _ in seen] == [["default"]] * 3
    assert not any(same for _, same, _ in seen)
    assert not torch.equal(seen[2][2], before), "nothing was merged"
    assert layer.base_layer.weight is base and torch.equal(base, before) and not layer.merged_adapters


def test_merged_rollouts_without_an_adapter_say_so(world, tmp_path, caplog):
    build(world, tmp_path, merged_rollouts=True)
    assert "there is no adapter to merge" in caplog.text


def test_merged_rollouts_off_never_merges(world, tmp_path):
    trainer = build(world, tmp_path, peft_config=lora(0.0), max_steps=1)
    layer = trainer.model.get_submodule("base_model.model.model.layers.0.mlp.up_proj")
    generate, seen = trainer.model.generate, []
    trainer.model.generate = lambda *a, **k: seen.append(layer.merged_adapters[:]) or generate(*a, **k)
    trainer.train()
    assert seen == [[]]
