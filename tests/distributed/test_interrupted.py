"""Two processes of which one is told to leave, and runs that go on with another number of processes."""

import shutil
from pathlib import Path

import pytest
import torch

from hf_delta.errors import InputError
from tests.distributed.interrupted import CUT, ROWS, STEPS, build, learnt


def test_both_processes_leave_after_the_step_in_which_one_was_told(two_processes):
    for rank in two_processes("told_to_leave"):
        assert rank["stopped"] and rank["listens_no_more"]
        assert rank["step"] == CUT and rank["checkpoints"] == [f"checkpoint-{CUT}"]


def assert_close(found, expected, tolerance, where=""):
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for key in expected:
            assert_close(found[key], expected[key], tolerance, f"{where}.{key}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), where
        for place, (one, other) in enumerate(zip(found, expected)):
            assert_close(one, other, tolerance, f"{where}[{place}]")
    elif isinstance(expected, torch.Tensor):
        torch.testing.assert_close(found, expected, rtol=0, atol=tolerance, msg=lambda m: f"{where}: {m}")
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, abs=tolerance), where
    else:
        assert found == expected, where


@pytest.fixture
def cut(two_processes, tmp_path):
    """`trainer -> (what a straight run of two processes ends with, a copy of the run that was cut)`."""

    def of(trainer):
        straight = two_processes(f"cut_for_one_{trainer}")[0]
        shutil.copytree(straight["folder"], tmp_path / "cut")
        return straight, tmp_path / "cut"

    return of


@pytest.mark.parametrize("trainer", ROWS)
def test_one_process_goes_on_where_two_stopped(world, cut, trainer, caplog):
    """The rows, and rollouts that are a function of their prompt, are those of two processes, so all that is learnt is."""
    straight, folder = cut(trainer)
    at_the_cut = build(trainer, world, folder, 1)
    with caplog.at_level("WARNING", "hf_delta"):
        at_the_cut.train(resume_from_checkpoint=True)
    assert at_the_cut.state.global_step == STEPS
    assert "was written by 2 processes with" in caplog.text
    found = learnt(at_the_cut)
    expected = {key: straight[key] for key in found}
    assert any(not torch.equal(value, torch.zeros_like(value)) for value in expected["parameters"].values())
    assert_close(found, expected, 2e-6)


@pytest.mark.parametrize("trainer", ROWS)
def test_other_rows_a_step_are_refused(world, cut, trainer):
    _, folder = cut(trainer)
    other = build(trainer, world, folder, 1, passes=1)
    rows = ROWS[trainer]
    with pytest.raises(InputError) as refusal:
        other.train(resume_from_checkpoint=str(Path(folder) / f"checkpoint-{CUT}"))
    said = f"was written by 2 processes with {rows} rows a step, and this run is 1 process with {rows // 2}"
    assert said in str(refusal.value) and "Write gradient_accumulation_steps: 2." in str(refusal.value)


def test_other_generations_are_refused(world, cut):
    _, folder = cut("grpo")
    other = build("grpo", world, folder, 1, steps_per_generation=4)
    with pytest.raises(InputError, match="32 completions a generation, and this run is 1 process with 64"):
        other.train(resume_from_checkpoint=True)
