"""Rollouts through vLLM: what the engine is asked, which weights it holds, and what the trainer makes of its answers."""

from collections import Counter, defaultdict
from contextlib import contextmanager
from copy import deepcopy
from zlib import crc32

import peft
import pytest
import torch
import trl
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_delta import DeltaGRPOConfig, DeltaGRPOTrainer
from hf_delta.rl.allocation import RolloutGDRO
from tests.adapters.life import config_of
from tests.rl.frozen import GENERATIONS, PROMPTS, build_world, dataset, frozen_reward
from tests.rl.test_trainer import config, lora
from tests.standin_vllm import standin_vllm


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return build_world(tmp_path_factory.mktemp("world"))


@contextmanager
def built(world, out, cls=DeltaGRPOTrainer, config_cls=DeltaGRPOConfig, reward=frozen_reward, rows=PROMPTS, **changes):
    """A trainer whose rollouts come from the stand-in engine."""
    kwargs = {"peft_config": changes.pop("peft_config", None)}
    args = config(out, config_cls, use_vllm=True, **{"vllm_mode": "colocate", **changes})
    data = dataset(rows)
    data = data.add_column("prompt_id", data["prompt"][:])
    with standin_vllm(serves=world):
        model = AutoModelForCausalLM.from_pretrained(world)
        yield cls(model, reward, args, data, processing_class=AutoTokenizer.from_pretrained(world), **kwargs)


def engine_of(trainer):
    backend = trainer.vllm_generation
    return backend.llm if backend.mode == "colocate" else backend.vllm_client.llm


def logged(trainer, name):
    found = [row[name] for row in trainer.state.log_history if name in row]
    assert len(found) == trainer.state.global_step
    return found


def assert_ratio_is_one(trainer):
    for end in ("min", "max"):
        ratios = logged(trainer, f"sampling/importance_sampling_ratio/{end}")
        assert ratios == pytest.approx([1.0] * len(ratios), abs=1e-4)


# -- the engine under TRL's own trainer -----------------------------------------------------------------------------
@pytest.mark.parametrize("changes", [{}, {"vllm_enable_sleep_mode": True}, {"vllm_mode": "server"}], ids=str)
def test_trls_own_trainer_trains_and_its_importance_ratio_is_one(world, tmp_path, changes):
    with built(world, tmp_path, trl.GRPOTrainer, trl.GRPOConfig, max_steps=3, **changes) as trainer:
        trainer.train()
    assert_ratio_is_one(trainer)
    assert max(logged(trainer, "sampling/sampling_logp_difference/max")) < 1e-4
    calls = engine_of(trainer).calls
    assert [call.syncs for call in calls] == [1, 2, 3]
    # A server is asked once for each prompt, and the colocated engine for each row.
    per_request = GENERATIONS if "vllm_mode" in changes else 1
    assert {(call.params.n, len(call.prompts)) for call in calls} == {
        (per_request, PROMPTS * GENERATIONS // per_request)
    }
    start = AutoModelForCausalLM.from_pretrained(world).state_dict()
    assert not any(torch.equal(weight, start[name]) for name, weight in trainer.model.named_parameters())


def test_without_synchronisation_the_importance_ratio_is_not_one(world, tmp_path):
    with built(world, tmp_path, trl.GRPOTrainer, trl.GRPOConfig, max_steps=3) as trainer:
        trainer.vllm_generation.sync_weights = lambda: None
        trainer.train()
    assert max(logged(trainer, "sampling/sampling_logp_difference/max")) > 0.1


# -- different numbers of rollouts ----------------------------------------------------------------------------------
class FromOneToTheNext:
    """An allocation that differs from prompt to prompt and from batch to batch."""

    def __init__(self):
        self.handed_out = []

    def __call__(self, batch):
        counts = torch.tensor([2, 7, 4, 3, 5, 2, 6, 3]).roll(3 * len(self.handed_out))
        self.handed_out.append(dict(zip(batch.prompt_ids, counts.tolist(), strict=True)))
        return counts


class Recorded(RolloutGDRO):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.handed_out = []

    def __call__(self, batch):
        counts = super().__call__(batch)
        self.handed_out.append(dict(zip(batch.prompt_ids, counts.tolist(), strict=True)))
        return counts


class Watched(DeltaGRPOTrainer):
    """Keeps what its rollouts became."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.seen = []

    def on_rollouts(self, rollouts, rewards_per_func, rows):
        super().on_rollouts(rollouts, rewards_per_func, rows)
        kept = {key: rollouts[key].clone() for key in ("advantages", "completion_mask")}
        self.seen.append({"reward": rewards_per_func[:, 0].tolist(), **kept})


class Judge:
    """Right for some prompts, wrong for others, and by chance for the rest; keeps the rows as a reward function gets them."""

    __name__ = "judge"

    def __init__(self):
        self.batches = []

    def __call__(self, prompts, completions, completion_ids, prompt_id, answer, **kwargs):
        self.batches.append({"prompts": prompts, "ids": completion_ids, "prompt_id": prompt_id, "answer": answer})
        return [self.score(prompt, ids) for prompt, ids in zip(prompts, completion_ids)]

    @staticmethod
    def score(prompt, ids):
        kind = crc32(prompt.encode()) % 4
        return float(crc32(str(ids).encode()) % 2) if kind > 1 else float(kind)


MERGED = {"merged_rollouts": True, "peft_config": lora(0.0), "learning_rate": 0.1}
RULE = f"{__name__}.FromOneToTheNext"
VARIABLE = {
    "a fixed rule": {"rollout_allocation": RULE},
    "every sample counts the same": {"rollout_allocation": RULE, "rollout_weighting": "sample"},
    "truncated": {"rollout_allocation": RULE, "mask_truncated_completions": True},
    "rollout_gdro": {"rollout_allocation": f"{__name__}.Recorded", "rows": PROMPTS + 3, "max_steps": 6},
    "server": {"rollout_allocation": RULE, "vllm_mode": "server"},
    "adapter": {"rollout_allocation": RULE, **MERGED, "vllm_enable_sleep_mode": True},
    "adapter, server": {"rollout_allocation": RULE, **MERGED, "vllm_mode": "server"},
}


@pytest.fixture(scope="module", params=VARIABLE)
def run(request, world, tmp_path_factory):
    """One run of each kind: the trainer, its engine, its judge, and the key of the kind."""
    judge = Judge()
    changes = {"max_steps": 3, **VARIABLE[request.param]}
    with built(world, tmp_path_factory.mktemp("variable"), Watched, reward=judge, **changes) as trainer:
        trainer.train()
    return trainer, engine_of(trainer), judge, request.param


def test_each_row_is_a_request_of_its_own_and_each_prompt_is_asked_as_often_as_allocated(run):
    trainer, engine, judge, kind = run
    tokenizer = trainer.processing_class
    handed_out = trainer.curriculum.allocation.handed_out
    assert len(engine.calls) == len(handed_out) == trainer.state.global_step
    for call, counts in zip(engine.calls, handed_out):
        assert call.params.n == 1 and len(call.prompts) == PROMPTS * GENERATIONS
        asked = Counter(map(tuple, call.prompts))
        assert asked == {tuple(tokenizer(prompt)["input_ids"]): count for prompt, count in counts.items()}
    assert any(len(set(counts.values())) > 1 for counts in handed_out)
    assert handed_out[0] != handed_out[-1]


def test_the_completions_stay_with_their_prompts_and_columns(run):
    trainer, engine, judge, _ = run
    answers = dict(zip(trainer.train_dataset["prompt"], trainer.train_dataset["answer"]))
    for call, batch in zip(engine.calls, judge.batches, strict=True):
        assert call.prompts == trainer.processing_class(batch["prompts"])["input_ids"]
        assert [completion for (completion,) in call.completions] == batch["ids"]
        assert batch["prompt_id"] == batch["prompts"]
        assert batch["answer"] == [answers[prompt] for prompt in batch["prompts"]]


def test_the_importance_ratio_is_one_with_weights_sent_before_each_generation(run):
    trainer, engine, _, _ = run
    assert_ratio_is_one(trainer)
    assert [call.syncs for call in engine.calls] == list(range(1, 1 + trainer.state.global_step))
    for names in engine.syncs:
        assert sorted(names) == sorted(engine.weights())


def test_advantages_are_those_of_the_true_groups(run):
    trainer, _, judge, kind = run
    differing = 0
    for batch, seen in zip(judge.batches, trainer.seen, strict=True):
        groups = defaultdict(list)
        for row, prompt in enumerate(batch["prompts"]):
            groups[prompt].append(row)
        for prompt, rows in groups.items():
            rewards = torch.tensor([Judge.score(prompt, batch["ids"][row]) for row in rows])
            assert rewards.tolist() == [seen["reward"][row] for row in rows]
            expected = (rewards - rewards.mean()) / (rewards.std() + 1e-4)
            if "sample" not in kind:
                expected *= GENERATIONS / len(rows)
            torch.testing.assert_close(seen["advantages"][rows], expected, rtol=0, atol=1e-5)
            differing += bool(expected.abs().max() > 0.1)
    assert differing >= 3


def test_truncated_completions_are_masked_row_by_row(run):
    trainer, _, judge, kind = run
    # TRL takes a pad at the end, which an untrained model writes too, for an end.
    ends_with = (trainer.processing_class.eos_token_id, trainer.processing_class.pad_token_id)
    ended = [[ids[-1] in ends_with for ids in batch["ids"]] for batch in judge.batches]
    assert {True, False} == {e for batch in ended for e in batch}
    for batch, seen, ends in zip(judge.batches, trainer.seen, ended):
        kept = [len(ids) if end or kind != "truncated" else 0 for ids, end in zip(batch["ids"], ends)]
        assert seen["completion_mask"].sum(1).tolist() == kept


# -- weights --------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def bf16_world(world, tmp_path_factory):
    path = tmp_path_factory.mktemp("bf16_world")
    AutoModelForCausalLM.from_pretrained(world, dtype=torch.bfloat16).save_pretrained(path)
    AutoTokenizer.from_pretrained(world).save_pretrained(path)
    return str(path)


class Weights:
    """A reward function that looks at engine and model when a rollout is done, and the step that uses it is not."""

    __name__ = "weights"

    def __init__(self):
        self.trainer = None
        self.received, self.merged, self.base = [], [], []

    def __call__(self, completions, **kwargs):
        model = self.trainer.model
        self.received.append(self.trainer.vllm_generation.llm.weights())
        self.merged.append(dict(deepcopy(model).merge_and_unload().named_parameters()))
        self.base.append({n: p.clone() for n, p in model.named_parameters() if not p.requires_grad})
        return frozen_reward(completions)


ADAPTERS = {
    "lora": lambda: lora(0.0),
    "dora": lambda: peft.LoraConfig(r=4, use_dora=True, target_modules="all-linear", task_type="CAUSAL_LM"),
    "bat_row": lambda: config_of("bat_row"),
}
SYNCS = 10


def synchronised(world, out, kind, **changes):
    """What [`Weights`] saw in a run whose weights go to the engine `SYNCS` times."""
    weights = Weights()
    settings = {"max_steps": SYNCS, "per_device_train_batch_size": 8, "max_completion_length": 3}
    with built(
        world, out, reward=weights, peft_config=ADAPTERS[kind](), lr_scheduler_type="constant", **settings, **changes
    ) as trainer:
        weights.trainer = trainer
        trainer.train()
    assert len(trainer.vllm_generation.llm.syncs) == SYNCS == len(weights.received)
    return weights


def unequal(one, other):
    assert one.keys() == other.keys()
    return [name for name in one if not torch.equal(one[name], other[name])]


@pytest.mark.parametrize("kind", ADAPTERS)
def test_merged_rollouts_send_the_merged_weights_and_leave_the_base_bit_for_bit(bf16_world, tmp_path, kind):
    weights = synchronised(bf16_world, tmp_path, kind, merged_rollouts=True)
    start = weights.base[0]
    assert {p.dtype for p in start.values()} == {torch.bfloat16}
    for received, merged, base in zip(weights.received, weights.merged, weights.base):
        assert unequal(base, start) == []
        assert unequal(received, merged) == []
    assert unequal(weights.received[0], weights.received[-1])


def test_without_merged_rollouts_the_base_drifts(bf16_world, tmp_path):
    weights = synchronised(bf16_world, tmp_path, "lora")
    drift = [(weights.base[-1][n].float() - p.float()).norm() / p.float().norm() for n, p in weights.base[0].items()]
    assert max(drift) > 1e-3
