"""A resumed run continues as if never stopped: same parameters to the last bit, wherever it was cut."""

import json
import os
import shutil
import signal
import subprocess
import sys

import pandas
import pytest
import torch
from safetensors.torch import save_file
from torch.utils.data import RandomSampler
from transformers import TrainerCallback

from hf_delta import DeltaGRPOTrainer
from hf_delta._compat.hub_pushes import SharedPushes
from hf_delta.checkpoint import STATE_FILE, is_complete, load_state, newest_complete_checkpoint, save_state
from hf_delta.errors import InputError
from tests.rl.frozen import build_world
from tests.rl.test_trainer import assert_identical, build, lora, parameters


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return build_world(tmp_path_factory.mktemp("world"))


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = control.should_training_stop or state.global_step == self.step


# 8 rows in micro-batches of 8 (2 prompts a micro-batch): with 8 prompts an epoch has 8 optimizer steps.
WINDOW = {
    "loss_type": "delta_l",
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "steps_per_generation": 2,
    "num_iterations": 2,
    "max_steps": 20,
    "learning_rate": 3e-3,
    "save_strategy": "steps",
    "save_steps": 1,
    "logging_steps": 3,
}


@pytest.fixture(scope="module")
def straight(world, tmp_path_factory):
    trainer = build(world, tmp_path_factory.mktemp("straight"), peft_config=lora(0.2), **WINDOW)
    trainer.train()
    return trainer


# 4 is the end of a window, 5 to 7 lie inside one, 8 is the end of an epoch, 10 and 19 lie in later epochs.
@pytest.mark.parametrize("cut", [4, 5, 7, 8, 10, 19])
def test_resumed_parameters_are_bit_identical(world, straight, tmp_path, cut):
    first = build(world, tmp_path, peft_config=lora(0.2), callbacks=[StopAt(cut)], **WINDOW)
    first.train()
    assert first.state.global_step == cut
    second = build(world, tmp_path, peft_config=lora(0.2), **WINDOW)
    second.train(resume_from_checkpoint=True)
    assert second.state.global_step == 20
    assert_identical(parameters(straight), parameters(second))
    # The logged averages span the cut as well; only what measures time may differ.
    assert [without_times(row) for row in straight.state.log_history[:-1]] == [
        without_times(row) for row in second.state.log_history[:-1]
    ]


def without_times(row):
    return {key: value for key, value in row.items() if "time" not in key and "per_second" not in key}


@pytest.mark.parametrize("forgotten", ["rng_state.pth", STATE_FILE, "hf_delta_rollouts_0.safetensors"])
def test_what_the_checkpoint_holds_is_needed(world, straight, tmp_path, forgotten):
    """Negative control: without any one of these files the resumed run is another run, or no run."""
    build(world, tmp_path, peft_config=lora(0.2), callbacks=[StopAt(6)], **WINDOW).train()
    (tmp_path / "checkpoint-6" / forgotten).unlink()
    second = build(world, tmp_path, peft_config=lora(0.2), **WINDOW)
    try:
        second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    except InputError as error:
        assert forgotten in str(error)
        return
    other = parameters(second)
    assert any(not torch.equal(p, other[n]) for n, p in parameters(straight).items())


def test_a_half_used_window_cannot_be_taken_up_in_another_layout(world, tmp_path):
    build(world, tmp_path, callbacks=[StopAt(6)], **WINDOW).train()
    changed = build(world, tmp_path, **{**WINDOW, "num_iterations": 4})
    with pytest.raises(InputError, match="saved with rollouts still to be trained on"):
        changed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    # At the end of a window nothing is pending, and another layout may go on from there.
    at_boundary = build(world, tmp_path, **{**WINDOW, "num_iterations": 4, "max_steps": 5})
    at_boundary.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert at_boundary.state.global_step == 5


@pytest.mark.parametrize(
    "change", [{"loss_type": "dapo"}, {"advantage_transforms": ["tests.rl.test_trainer.CountingRule"]}]
)
def test_a_checkpoint_of_another_method_is_refused(world, tmp_path, change):
    build(world, tmp_path, callbacks=[StopAt(1)], **WINDOW).train()
    with pytest.raises(InputError, match="belongs to another method"):
        build(world, tmp_path, **{**WINDOW, **change}).train(resume_from_checkpoint=True)


def test_a_damaged_state_file_is_refused(world, tmp_path):
    build(world, tmp_path, callbacks=[StopAt(1)], **WINDOW).train()
    path = tmp_path / "checkpoint-1" / STATE_FILE
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(InputError, match="cut short or damaged"):
        build(world, tmp_path, **WINDOW).train(resume_from_checkpoint=True)


def test_resume_without_a_checkpoint_says_so(world, tmp_path):
    with pytest.raises(InputError, match="holds no complete checkpoint"):
        build(world, tmp_path, **WINDOW).train(resume_from_checkpoint=True)


# -- the files ------------------------------------------------------------------------------------------------------
def test_state_round_trip(tmp_path):
    state = {
        "a": torch.arange(4).view(2, 2),
        "nested": [{"x": torch.tensor(2.5, dtype=torch.float64), "none": None}, 3, "text", True],
        "slices": list(torch.arange(6).split(3)),
        "strided": [torch.tensor(7).expand(1), torch.tensor([8]).expand(3), torch.arange(6).view(3, 2)[:, 1]],
        "odd keys": {"1+2:": torch.ones(1), "__tensor__ ": 0.1},
    }
    save_state(tmp_path / "s.safetensors", state)
    loaded = load_state(tmp_path / "s.safetensors")
    assert torch.equal(loaded["a"], state["a"]) and loaded["nested"][0]["x"].dtype == torch.float64
    assert loaded["nested"][1:] == [3, "text", True] and loaded["nested"][0]["none"] is None
    assert [s.tolist() for s in loaded["slices"]] == [[0, 1, 2], [3, 4, 5]]
    assert [s.tolist() for s in loaded["strided"]] == [[7], [8, 8, 8], [1, 3, 5]]
    assert loaded["odd keys"]["__tensor__ "] == 0.1 and list(tmp_path.iterdir()) == [tmp_path / "s.safetensors"]


def test_a_state_without_tensors_and_what_a_state_may_hold(tmp_path):
    save_state(tmp_path / "s", {"steps": 3})
    assert load_state(tmp_path / "s") == {"steps": 3}
    with pytest.raises(TypeError, match="got set"):
        save_state(tmp_path / "s", {"x": {1, 2}})
    with pytest.raises(TypeError, match="must be strings"):
        save_state(tmp_path / "s", {1: 2})


def test_files_of_another_format_or_version(tmp_path, monkeypatch):
    save_file({"w": torch.ones(1)}, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match="not a state file of hf_delta"):
        load_state(tmp_path / "model.safetensors")
    monkeypatch.setattr("hf_delta.checkpoint.FORMAT_VERSION", 7)
    save_state(tmp_path / "s", {})
    monkeypatch.undo()
    with pytest.raises(InputError, match="state format 7"):
        load_state(tmp_path / "s")


def test_checkpoints_cut_off_while_saving_are_passed_over(world, tmp_path):
    build(world, tmp_path, callbacks=[StopAt(3)], **WINDOW).train()
    assert newest_complete_checkpoint(tmp_path).name == "checkpoint-3"
    optimizer = tmp_path / "checkpoint-3" / "optimizer.pt"
    optimizer.write_bytes(optimizer.read_bytes()[:-100])
    assert newest_complete_checkpoint(tmp_path).name == "checkpoint-2"
    (tmp_path / "checkpoint-2" / "trainer_state.json").unlink()
    assert newest_complete_checkpoint(tmp_path).name == "checkpoint-1"
    shutil.rmtree(tmp_path / "checkpoint-1")
    assert newest_complete_checkpoint(tmp_path) is None
    assert newest_complete_checkpoint(tmp_path / "nowhere") is None


def test_another_layout_goes_on_in_the_order_of_its_epoch(world, tmp_path):
    """8 prompts: an epoch has 8 steps of this layout, and 2 of one with 4 prompts a step and windows of one step."""
    build(world, tmp_path, callbacks=[StopAt(8)], **WINDOW).train()
    changed = {
        **WINDOW,
        "per_device_train_batch_size": 16,
        "steps_per_generation": 1,
        "num_iterations": 1,
        "max_steps": 9,
    }
    resumed = build(world, tmp_path, **changed)
    straight = build(world, tmp_path / "straight", **changed)
    seen = {}
    for name, trainer in (("resumed", resumed), ("straight", straight)):
        reward = trainer.reward_funcs[0]
        prompts = seen[name] = []
        trainer.reward_funcs = [
            lambda prompts, _seen=prompts, _reward=reward, **kw: (
                _seen.append(set(prompts)),
                _reward(prompts=prompts, **kw),
            )[1]
        ]
    straight.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
    # Step 9 is the first of the fifth epoch of this layout in either run.
    assert seen["resumed"][0] == seen["straight"][8]


def test_a_model_only_checkpoint_says_what_it_lacks(world, tmp_path, caplog):
    build(world, tmp_path, callbacks=[StopAt(4)], **WINDOW, save_only_model=True).train()
    build(world, tmp_path, **{**WINDOW, "max_steps": 5}).train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert "not as if it had never stopped" in caplog.text


def test_a_changed_exponent_is_said(world, tmp_path, caplog):
    build(world, tmp_path, callbacks=[StopAt(4)], **WINDOW).train()
    build(world, tmp_path, **{**WINDOW, "max_steps": 5, "delta_l_alpha": 0.5}).train(resume_from_checkpoint=True)
    assert "delta_l_alpha 1.0; the run goes on with 0.5" in caplog.text


def test_a_sampler_of_ones_own_may_be_resumed(world, tmp_path):
    class Curriculum(DeltaGRPOTrainer):
        def _get_train_sampler(self, dataset=None):
            return RandomSampler(self.train_dataset, replacement=True, num_samples=32, generator=torch.Generator())

    build(world, tmp_path, Curriculum, callbacks=[StopAt(1)], **WINDOW).train()
    again = build(world, tmp_path, Curriculum, **{**WINDOW, "max_steps": 2})
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 2


def test_a_checkpoint_of_fewer_processes_is_complete_for_more(tmp_path):
    """What counts is how many processes wrote it."""
    (tmp_path / "trainer_state.json").write_text('{"global_step": 1}')
    save_file({"weight": torch.ones(1)}, tmp_path / "model.safetensors")
    save_state(tmp_path / STATE_FILE, {"layout": {"num_processes": 2}})
    torch.save(0, tmp_path / "rng_state_0.pth")
    assert not is_complete(tmp_path, world_size=4)
    torch.save(0, tmp_path / "rng_state_1.pth")
    assert is_complete(tmp_path, world_size=4)


def test_a_checkpoint_of_two_processes_needs_the_random_states_of_both(tmp_path):
    (tmp_path / "trainer_state.json").write_text('{"global_step": 1}')
    save_file({"weight": torch.ones(1)}, tmp_path / "model.safetensors")
    torch.save(0, tmp_path / "rng_state_0.pth")
    assert not is_complete(tmp_path, world_size=2)
    torch.save(0, tmp_path / "rng_state_1.pth")
    assert is_complete(tmp_path, world_size=2)


KILLED = """
import os, signal, sys
from transformers import TrainerCallback
from tests.rl.test_resume import WINDOW
from tests.rl.test_trainer import build, lora

class Kill(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 11:
            os.kill(os.getpid(), signal.SIGKILL)

build(sys.argv[1], sys.argv[2], peft_config=lora(0.2), callbacks=[Kill()], **{**WINDOW, "save_steps": 5}).train()
"""


def test_kill_minus_nine_and_resume(world, straight, tmp_path):
    """Ten steps, `kill -9` in the eleventh, and a new process' resume to twenty equal twenty straight."""
    command = [sys.executable, "-c", KILLED, world, str(tmp_path)]
    killed = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    newest = newest_complete_checkpoint(tmp_path)
    assert newest.name == "checkpoint-10"
    assert json.loads((newest / "trainer_state.json").read_text())["global_step"] == 10
    second = build(world, tmp_path, peft_config=lora(0.2), **{**WINDOW, "save_steps": 5})
    second.train(resume_from_checkpoint=True)
    assert_identical(parameters(straight), parameters(second))


def test_our_files_are_there_when_transformers_pushes_and_rotates(world, tmp_path, monkeypatch):
    """Both happen inside its own saving, so the files must have been written before."""
    pushed = []
    monkeypatch.setattr(
        SharedPushes, "_push_from_checkpoint", lambda self, folder: pushed.append(sorted(os.listdir(folder)))
    )
    monkeypatch.setattr(SharedPushes, "init_hf_repo", lambda self, *_, **__: None)
    trainer = build(world, tmp_path, **{**WINDOW, "max_steps": 3, "save_total_limit": 1, "push_to_hub": True})
    trainer.train()
    assert len(pushed) == 3 and all(STATE_FILE in files for files in pushed)
    assert "hf_delta_rollouts_0.safetensors" in pushed[0]
    assert [p.name for p in tmp_path.glob("checkpoint-*")] == ["checkpoint-3"]


def test_the_table_of_completions_of_an_open_window_is_the_same_after_a_stop(world, tmp_path):
    settings = {**WINDOW, "log_completions": True, "max_steps": 3, "logging_steps": 1, "num_completions_to_print": 0}
    build(world, tmp_path / "straight", **settings).train()
    build(world, tmp_path / "cut", callbacks=[StopAt(1)], **settings).train()
    build(world, tmp_path / "cut", **settings).train(resume_from_checkpoint=True)
    names = sorted(p.name for p in (tmp_path / "straight" / "completions").glob("*.parquet"))
    assert len(names) == 3
    for name in names:
        one, other = (pandas.read_parquet(tmp_path / run / "completions" / name) for run in ("straight", "cut"))
        assert len(one) == 16
        pandas.testing.assert_frame_equal(one, other)


def test_another_division_of_a_window_of_the_same_length_is_refused(world, tmp_path):
    settings = {**WINDOW, "steps_per_generation": 2, "num_iterations": 2}
    build(world, tmp_path, callbacks=[StopAt(2)], **settings).train()
    with pytest.raises(InputError, match="rollouts still to be trained on"):
        build(world, tmp_path, **{**settings, "steps_per_generation": 4, "num_iterations": 1}).train(
            resume_from_checkpoint=True
        )
