"""Rows, steps, checkpoints and launches of a plan, against samplers and files."""

import pytest
from accelerate.data_loader import BatchSamplerShard
from torch.utils.data import BatchSampler, SequentialSampler
from trl.trainer.utils import RepeatSampler

from hf_delta.plan.lengths import Lengths, local_tokenizer, measure
from hf_delta.plan.steps import checkpoints, pair_batches, rollout_batches
from hf_delta.recipe.launch import read_launch


def test_lengths_are_those_of_the_rows(playground):
    from datasets import Dataset

    tokenizer = local_tokenizer(str(playground / "model"), None)
    rows = Dataset.from_list(
        [{"prompt": "1+1:", "chosen": "2", "rejected": "23"}, {"prompt": "12+1:", "chosen": "1", "rejected": "2"}]
    )
    # Every character is a token, and an answer has one more for its end.
    assert measure(rows, tokenizer) == Lengths(prompt=5, sequence=7, answers=2)
    listed = Dataset.from_list([{"prompt": "1+1:", "completions": ["2", "345", "1"]}])
    assert measure(listed, tokenizer) == Lengths(prompt=4, sequence=8, answers=3)
    assert measure(Dataset.from_list([{"prompt": "1+1:", "answer": "2"}]), tokenizer) == Lengths(4, 4, 1)
    assert local_tokenizer("no/such-model", None) is None


@pytest.mark.parametrize("rows", [1, 7, 64, 65, 100])
@pytest.mark.parametrize("processes", [1, 3])
def test_steps_of_an_epoch_are_those_of_the_samplers(rows, processes):
    sampler = BatchSampler(SequentialSampler(range(rows)), 4, drop_last=False)
    micro = len(BatchSamplerShard(sampler, processes, 0))
    found = pair_batches(rows, 4, processes, 2, -1, 3, drop_last=False)
    assert found.steps == 3 * -(-micro // 2) and found.epochs == 3
    if rows >= 6:
        # 24 rollouts of 6 prompts at a time, in two micro-batches for each process, each generation used twice.
        batch = 12 // processes
        repeated = len(RepeatSampler(range(rows), 4, 6, repeat_count=2 * 2))
        micro = repeated // (batch * 2 * processes) * 1
        found = rollout_batches(rows, batch, processes, 4, -1, 1, generations=4, generation_batch=24, steps_per_generation=2, iterations=2)  # fmt: skip
        assert found.steps == -(-micro // 4) and found.generations == found.steps


def test_steps_and_checkpoints_that_are_given():
    assert pair_batches(None, 4, 8, 2, -1, 1, drop_last=False).steps is None
    assert pair_batches(None, 4, 8, 2, 30, 1, drop_last=False).steps == 30
    assert checkpoints(500, "steps", 50, None, None) == 10
    assert checkpoints(510, "steps", 50, None, None) == 11
    assert checkpoints(510, "steps", 0.1, None, 3) == 3
    assert checkpoints(None, "steps", 50, 1.0, None) is None
    assert checkpoints(100, "epoch", 50, 2.5, None) == 3 and checkpoints(100, "no", 50, 1, None) == 0


@pytest.mark.parametrize(
    ("name", "processes", "strategy"),
    [("single", 1, "DDP"), ("cpu", 2, "DDP"), ("ddp", 8, "DDP"), ("fsdp2", 8, "FSDP2"), ("zero2", 8, "ZeRO-2"), ("zero3", 8, "ZeRO-3")],
)  # fmt: skip
def test_configurations_of_accelerate(name, processes, strategy):
    found = read_launch(f"accelerate_configs/{name}.yaml")
    assert (found.processes, found.strategy) == (processes, strategy)
