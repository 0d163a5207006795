"""Runs that are killed, told to leave, or have no room left on the disk, and go on as if nothing had been."""

import errno
import json
import os
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback, trainer

import hf_delta.train
from hf_delta.checkpoint import newest_complete_checkpoint
from hf_delta.disk import finds_no_room
from hf_delta.errors import InputError
from hf_delta.train import main
from tests.running import LORA, keys, train, write


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
    assert resumed_from(tmp_path / "killed").startswith("checkpoint-")
    assert_same_run(tmp_path / "straight", tmp_path / "killed")


def launch(folder, *arguments, kill=None):
    """Two processes by Accelerate, of which the second one may be killed."""
    job = folder / "job.json"
    job.write_text(json.dumps({"arguments": [str(a) for a in arguments], "rank": 1, "kill": kill}))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    flags = [
        "--multi_gpu",
        "--num_processes",
        "2",
        "--num_machines",
        "1",
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
    ]
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        *flags,
        "--main_process_port",
        port,
        "-m",
        "tests.killed",
    ]
    environment = {
        **os.environ,
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    return subprocess.run([*command, str(job)], env=environment, capture_output=True, text=True, timeout=900)


@pytest.mark.slow
def test_one_of_two_processes_killed_while_it_writes_its_part_of_a_checkpoint(tmp_path, playground):
    """The first process has written its part then, and must not call the checkpoint complete."""
    changes = {**SAVING, **RUNS["grpo"], "per_device_train_batch_size": 4}
    recipe = write(tmp_path, keys("grpo", playground, tmp_path / "out", **changes))
    straight = launch(tmp_path, recipe, "--output_dir", tmp_path / "straight")
    assert straight.returncode == 0 and "2 processes" in straight.stderr, straight.stderr[-3000:]
    # Of the second process a checkpoint has one torch file, its random state.
    killed = launch(tmp_path, recipe, kill=at("torch file", 4, "half"))
    assert killed.returncode != 0 and f"exitcode: -{signal.SIGKILL}" in killed.stderr.replace(
        "exitcode  ", "exitcode"
    ), killed.stderr[-3000:]
    assert newest_complete_checkpoint(tmp_path / "out", 2) == tmp_path / "out" / "checkpoint-3"
    assert [path.name for path in (tmp_path / "out" / "checkpoint-4").glob("*.json") if "state" in path.name] == []
    assert (tmp_path / "out" / "checkpoint-4" / "rng_state_0.pth").exists()
    resumed = launch(tmp_path, recipe, "--resume")
    assert resumed.returncode == 0 and "was cut off while it was written" in resumed.stderr, resumed.stderr[-3000:]
    assert_same_run(tmp_path / "straight", tmp_path / "out")


@pytest.mark.slow
def test_two_processes_go_on_where_one_stopped(tmp_path, playground):
    constant = {**SAVING, "lr_scheduler_type": "constant", "optim": "sgd", "learning_rate": 0.05}
    recipe = write(tmp_path, keys("sft", playground, tmp_path / "out", **constant, max_steps=6))
    assert main([str(recipe), "--output_dir", str(tmp_path / "straight")]) == 0
    assert main([str(recipe), "--max_steps", "3"]) == 0
    resumed = launch(tmp_path, recipe, "--resume", "--per_device_train_batch_size", 2)
    assert resumed.returncode == 0 and "was written by 1 process with 4 rows a step" in resumed.stderr, resumed.stderr[
        -3000:
    ]
    one, two = (load_file(tmp_path / run / "adapter_model.safetensors") for run in ("straight", "out"))
    assert one.keys() == two.keys() and any(tensor.abs().max() > 1e-3 for tensor in one.values())
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=0, atol=1e-6)


def test_there_are_twenty_kills():
    assert sum(map(len, KILLS.values())) + sum(AT_RANDOM.values()) >= 20


class ToldToLeave(TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step == 2:
            os.kill(os.getpid(), signal.SIGTERM)


def test_a_run_that_is_told_to_leave_saves_the_step_it_is_in(tmp_path, playground, monkeypatch, capsys):
    recipe = write(tmp_path, keys("sft", playground, tmp_path / "out", **{**SAVING, "save_steps": 100}, max_steps=5))
    monkeypatch.setattr(trainer, "DEFAULT_CALLBACKS", [*trainer.DEFAULT_CALLBACKS, ToldToLeave])
    before = signal.getsignal(signal.SIGTERM)
    assert main([str(recipe)]) == 128 + signal.SIGTERM
    assert "Stopped by SIGTERM after step 3, which is saved. The same command with --resume" in capsys.readouterr().err
    assert newest_complete_checkpoint(tmp_path / "out") == tmp_path / "out" / "checkpoint-3"
    assert not (tmp_path / "out" / "adapter_model.safetensors").exists()
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.slow
@pytest.mark.parametrize("trainer", RUNS)
def test_told_to_leave_a_run_saves_and_goes_on_from_there(tmp_path, playground, trainer):
    content = keys(trainer, playground, tmp_path / "out", **{**SAVING, "save_steps": 100}, **RUNS[trainer])
    leave = at("backward", 6, number=signal.SIGTERM)
    statuses, said = run_job(tmp_path, write(tmp_path, content), [leave])
    assert statuses == [0, 128 + signal.SIGTERM, 0], said[-3000:]
    assert "Stopped by SIGTERM after step" in said and "Traceback" not in said
    assert resumed_from(tmp_path / "killed").startswith("checkpoint-")
    assert_same_run(tmp_path / "straight", tmp_path / "killed")


# -- a full disk ----------------------------------------------------------------------------------------------------
class FullDisk(TrainerCallback):
    """From the end of a step on no file may become larger than so many bytes, which for who writes one is a full disk."""

    def __init__(self, step, size):
        self.step, self.size = step, size

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


@contextmanager
def full_disk(step, size):
    class Now(FullDisk):
        def __init__(self):
            super().__init__(step, size)

    trainer.DEFAULT_CALLBACKS.append(Now)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        trainer.DEFAULT_CALLBACKS.pop()


@pytest.mark.parametrize(
    "too_large",
    [
        "optimizer.pt",
        pytest.param("hf_delta_state.safetensors", marks=pytest.mark.slow),
        pytest.param("adapter_model.safetensors", marks=pytest.mark.slow),
    ],
)
def test_on_a_full_disk_the_last_good_checkpoint_stays(tmp_path, playground, capsys, too_large):
    saving = {**SAVING, "save_steps": 2, "max_steps": 4}
    recipe = write(tmp_path, keys("sft", playground, tmp_path / "out", **saving))
    assert main([str(recipe), "--output_dir", str(tmp_path / "straight")]) == 0
    size = (tmp_path / "straight" / "checkpoint-2" / too_large).stat().st_size
    capsys.readouterr()
    with full_disk(4, size - 1):
        status = main([str(recipe)])
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert status == 1 and len(errors) == 1, errors
    assert (
        f"{tmp_path / 'out' / 'checkpoint-4'} could not be written, because there is no room on the disk" in errors[0]
    )
    assert f"The last good one is {tmp_path / 'out' / 'checkpoint-2'}. Make room, and resume." in errors[0]
    assert [path.name for path in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-2"]
    assert main([str(recipe), "--resume"]) == 0
    assert_same_run(tmp_path / "straight", tmp_path / "out")


def test_on_a_disk_that_was_full_from_the_first_checkpoint_on(tmp_path, playground, capsys):
    recipe = write(tmp_path, keys("sft", playground, tmp_path / "out", **SAVING, max_steps=2))
    with full_disk(1, 100):
        assert main([str(recipe)]) == 1
    assert "There is no earlier one. Make room, and resume." in capsys.readouterr().err
    assert not list((tmp_path / "out").glob("checkpoint-*"))
    assert main([str(recipe), "--resume"]) == 0


def test_a_final_model_for_which_there_is_no_room(tmp_path, playground, capsys, monkeypatch):
    recipe = write(tmp_path, keys("sft", playground, tmp_path / "out", **{**SAVING, "save_steps": 2}, max_steps=2))
    monkeypatch.setattr(hf_delta.train, "_save", no_room_left)
    assert main([str(recipe)]) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert (
        last.startswith("error: there/model: there is no room on the disk")
        and "--resume goes on from the last checkpoint" in last
    )
    monkeypatch.undo()
    assert main([str(recipe), "--resume"]) == 0 and (tmp_path / "out" / "adapter_model.safetensors").exists()


def no_room_left(_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "there/model")


def test_a_full_disk_is_found_behind_other_errors():
    full = OSError(errno.ENOSPC, "no room")
    wrapped, later = ValueError("wrapped"), KeyError("later")
    wrapped.__cause__, later.__context__ = full, wrapped
    assert finds_no_room(later) == finds_no_room(full) == "[Errno 28] no room"
    # A ring of errors has an end.
    one, other = ValueError("one"), ValueError("other")
    one.__context__, other.__context__ = other, one
    assert finds_no_room(one) is None and finds_no_room(OSError(errno.EACCES, "not allowed")) is None


def test_other_errors_are_not_taken_for_a_full_disk(tmp_path, playground, monkeypatch):
    def fails(_):
        raise RuntimeError("something else")

    monkeypatch.setattr(hf_delta.train, "_save", fails)
    recipe = write(tmp_path, keys("sft", playground, tmp_path / "out", max_steps=1))
    with pytest.raises(RuntimeError, match="something else"):
        main([str(recipe)])


# -- which checkpoint -----------------------------------------------------------------------------------------------
class Interrupted(TrainerCallback):
    def on_save(self, args, state, control, **kwargs):
        if state.global_step == 3:
            raise KeyboardInterrupt


def test_what_a_run_writes_anew_is_taken_even_if_it_is_the_same(tmp_path, playground, monkeypatch):
    """The second try has the bits of the first one, and must not begin again for ever."""
    content = keys("sft", playground, tmp_path / "out", **{**SAVING, "save_total_limit": None}, max_steps=4)
    recipe, out = str(write(tmp_path, content)), tmp_path / "out"
    assert main([recipe]) == 0
    first = (out / "checkpoint-3" / "trainer_state.json").read_bytes()
    monkeypatch.setattr(trainer, "DEFAULT_CALLBACKS", [*trainer.DEFAULT_CALLBACKS, Interrupted])
    assert main([recipe, "--resume_from_checkpoint", str(out / "checkpoint-1")]) == 130
    monkeypatch.undo()
    assert (out / "checkpoint-3" / "trainer_state.json").read_bytes() == first
    assert main([recipe, "--resume"]) == 0
    assert resumed_from(out) == "checkpoint-3"


@pytest.fixture(scope="module")
def saved(tmp_path_factory, playground):
    """A run with two checkpoints."""
    folder = tmp_path_factory.mktemp("saved")
    assert main([str(write(folder, keys("sft", playground, folder / "out", **SAVING, max_steps=2)))]) == 0
    return folder / "out"


@pytest.mark.parametrize(
    "lost", ["trainer_state.json", "optimizer.pt", "scheduler.pt", "rng_state.pth", "adapter_model.safetensors"]
)
def test_a_checkpoint_that_lost_a_part_while_it_was_deleted_hides_no_other(tmp_path, saved, lost):
    out = shutil.copytree(saved, tmp_path / "out")
    assert newest_complete_checkpoint(out) == out / "checkpoint-2"
    (out / "checkpoint-2" / lost).unlink()
    assert newest_complete_checkpoint(out) == out / "checkpoint-1"


def test_a_checkpoint_of_a_model_alone_counts(tmp_path, saved):
    out = shutil.copytree(saved, tmp_path / "out")
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        (out / "checkpoint-2" / name).unlink()
    assert newest_complete_checkpoint(out) == out / "checkpoint-2"


def resumed_from(out):
    return Path(json.loads((out / "run.json").read_text())["resumed_from"]).name


def test_checkpoints_that_a_run_was_told_not_to_take_are_not_taken_later(tmp_path, playground):
    """A run goes on from an earlier checkpoint, and stops before it has written all later ones anew."""
    content = keys("sft", playground, tmp_path / "out", **{**SAVING, "save_total_limit": None}, max_steps=4)
    recipe, out = str(write(tmp_path, content)), tmp_path / "out"
    assert main([recipe]) == 0
    earlier = str(out / "checkpoint-1")
    assert main([recipe, "--max_steps", "2", "--resume_from_checkpoint", earlier]) == 0
    assert resumed_from(out) == "checkpoint-1"
    # What has been written anew is taken, and what is there of later steps is not.
    assert main([recipe, "--max_steps", "3", "--resume"]) == 0
    assert resumed_from(out) == "checkpoint-2"
    assert json.loads((out / "run.json").read_text())["superseded"].keys() == {"checkpoint-3", "checkpoint-4"}


def test_what_is_left_of_an_earlier_try_is_not_mixed_with_what_is_written(tmp_path, playground):
    content = keys("sft", playground, tmp_path / "out", **SAVING, max_steps=2)
    recipe, left = str(write(tmp_path, content)), tmp_path / "out" / "checkpoint-2"
    assert main([recipe, "--max_steps", "1"]) == 0
    left.mkdir()
    (left / "rng_state_1.pth").write_bytes(b"of another launch")
    assert main([recipe, "--resume"]) == 0
    assert not (left / "rng_state_1.pth").exists() and (left / "rng_state.pth").exists()


def log(out):
    return json.loads((out / "trainer_state.json").read_text())["log_history"]


def test_the_loss_of_a_part_is_the_mean_of_its_steps(tmp_path, playground):
    """A log line that spans the stop has losses of steps before it."""
    content = keys("sft", playground, tmp_path / "out", **SAVING, lr_scheduler_type="constant", max_steps=6)
    train(tmp_path, content, "--output_dir", str(tmp_path / "straight"))
    losses = [row["loss"] for row in log(tmp_path / "straight") if "loss" in row]
    train(tmp_path, content, "--logging_steps", "6", "--max_steps", "4")
    train(tmp_path, content, "--logging_steps", "6", "--resume")
    assert log(tmp_path / "out")[-1]["train_loss"] == pytest.approx(sum(losses[4:]) / 2, rel=1e-5)
    assert [row["loss"] for row in log(tmp_path / "out") if "loss" in row] == pytest.approx(
        [sum(losses) / 6], rel=1e-5
    )


@pytest.mark.parametrize(
    ("trainer", "flags", "says"),
    [
        ("sft", ("--learning_rate", "1e-5"), "its optimizer has learning_rate 0.003, which it would keep"),
        ("dpo", ("--weight_decay", "0.1"), "this run has 0.1. Write weight_decay: 0.0"),
        (
            "grpo",
            ("--optim", "sgd"),
            "its optimizer has optim 'adamw_torch', which it would keep, and this run has 'sgd'",
        ),
    ],
)
def test_an_optimizer_that_would_not_become_another_one(tmp_path, playground, trainer, flags, says):
    content = keys(trainer, playground, tmp_path / "out", **SAVING, max_steps=1)
    out = train(tmp_path, content)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with pytest.raises(InputError, match=re.escape(says)):
        train(tmp_path, content, "--max_steps", "2", "--resume", *flags)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_weights_without_an_optimizer_take_any(tmp_path, playground):
    content = keys("sft", playground, tmp_path / "out", **SAVING, save_only_model=True, max_steps=1)
    train(tmp_path, content)
    out = train(tmp_path, content, "--max_steps", "2", "--resume", "--optim", "sgd", "--learning_rate", "0.25")
    assert [row["learning_rate"] for row in log(out) if "loss" in row][-1] == 0.25


def test_a_checkpoint_from_elsewhere_says_itself_how_its_adapter_counts(tmp_path, playground):
    content = keys("sft", playground, tmp_path / "out", **SAVING, max_steps=1)
    (train(tmp_path, content) / "checkpoint-1").rename(tmp_path / "checkpoint-1")
    other = {
        **content,
        "output_dir": str(tmp_path / "other"),
        "peft_config": {**LORA, "lora_alpha": 32},
        "max_steps": 2,
    }
    with pytest.raises(InputError, match="lora_alpha is 8 there and 32 here"):
        train(tmp_path, other, "--resume_from_checkpoint", str(tmp_path / "checkpoint-1"))
    other["peft_config"] = LORA
    assert train(tmp_path, other, "--resume_from_checkpoint", str(tmp_path / "checkpoint-1")) == tmp_path / "other"
