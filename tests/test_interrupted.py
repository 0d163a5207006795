"""Runs that are killed, told to leave, or have no room left on the disk, and go on as if nothing had been."""

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.running import LORA, keys, write


GDRO = {
    "loss_type": "delta_l",
    "prompt_weighting": "prompt_gdro",
    "rollout_allocation": "rollout_gdro",
    "steps_per_generation": 2,
    "num_iterations": 2,
    "reward_funcs": ["tests.running.length"],
    "correct_threshold": 4,
    "max_train_rows": 16,
    "per_device_train_batch_size": 8,
}
MASKS = {"loss_type": "sparse_po", "feasible": True, "feasible_kwargs": {"epsilon": 0.6}, "max_train_rows": 16}
RUNS = {
    "grpo": {**GDRO, "max_steps": 10},
    "dpo": {**MASKS, "max_steps": 12},
    "sft": {"max_steps": 12},
}
SAVING = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 2, "learning_rate": 3e-3, "peft_config": LORA}


def at(place, call, when="before", number=signal.SIGKILL):
    """Of the calls since training began or was resumed; a checkpoint is written in every step."""
    return {"at": place, "call": call, "when": when, "signal": number}


KILLS = {
    "grpo": [
        at("generation", 3, "before"),
        at("step", 2, "before"),
        at("state file", 3, "half"),
        at("rotation", 1, "half"),
        at("torch file", 5, "half"),
    ],
    "dpo": [
        at("backward", 3, "before"),
        at("last file", 2, "half"),
        at("model file", 2, "before"),
        at("state file", 2, "half"),
    ],
    "sft": [
        at("backward", 4, "after"),
        at("last file", 2, "before"),
        at("rotation", 1, "before"),
        at("torch file", 4, "half"),
    ],
}
AT_RANDOM = {"grpo": 3, "dpo": 2, "sft": 2}


def run_job(folder, recipe, kills):
    job = folder / "job.json"
    job.write_text(json.dumps({"recipe": str(recipe), "out": str(folder), "kills": kills}))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, "-m", "tests.killed", str(job)]
    found = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert found.returncode == 0, found.stderr[-3000:]
    return json.loads((folder / "statuses.json").read_text()), found.stderr


def without_times(row):
    return {key: value for key, value in row.items() if "time" not in key and "per_second" not in key}


def assert_same_run(one: Path, other: Path):
    newest = max((path.name for path in one.glob("checkpoint-*")), key=lambda name: int(name.split("-")[1]))
    for folder in ("", newest):
        for path in sorted((one / folder).glob("*.safetensors")):
            # The directory is part of no tensor.
            there, here = load_file(path), load_file(other / folder / path.name)
            assert there.keys() == here.keys()
            assert all(torch.equal(value, here[name]) for name, value in there.items()), path
    states = [json.loads((run / newest / "trainer_state.json").read_text()) for run in (one, other)]
    assert states[0]["global_step"] == states[1]["global_step"]
    logs = [[without_times(row) for row in state["log_history"]] for state in states]
    assert logs[0] == logs[1]


@pytest.mark.slow
@pytest.mark.parametrize("trainer", RUNS)
def test_killed_again_and_again_a_run_ends_where_a_straight_one_does(tmp_path, playground, trainer):
    moments = random.Random(trainer)
    kills = KILLS[trainer] + [at("operation", moments.randrange(5000)) for _ in range(AT_RANDOM[trainer])]
    recipe = write(tmp_path, keys(trainer, playground, tmp_path / "out", **SAVING, **RUNS[trainer]))
    statuses, said = run_job(tmp_path, recipe, kills)
    assert statuses[0] == statuses[-1] == 0, said[-3000:]
    assert statuses[1:-1] == [-signal.SIGKILL] * len(kills), said[-3000:]
    assert_same_run(tmp_path / "straight", tmp_path / "killed")


def test_there_are_twenty_kills():
    assert sum(map(len, KILLS.values())) + sum(AT_RANDOM.values()) >= 20


@pytest.mark.parametrize("trainer", RUNS)
def test_told_to_leave_a_run_saves_and_goes_on_from_there(tmp_path, playground, trainer):
    content = keys(trainer, playground, tmp_path / "out", **{**SAVING, "save_steps": 100}, **RUNS[trainer])
    leave = at("backward", 6, number=signal.SIGTERM)
    statuses, said = run_job(tmp_path, write(tmp_path, content), [leave])
    assert statuses == [0, 128 + signal.SIGTERM, 0], said[-3000:]
    assert "Stopped by SIGTERM after step" in said and "Traceback" not in said
    assert_same_run(tmp_path / "straight", tmp_path / "killed")
