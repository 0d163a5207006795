"""The main job as a newcomer runs it, and what becomes of it under `kill -9`."""

import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file


ROOT = Path(__file__).parent.parent

pytestmark = pytest.mark.slow


def hf_delta(*arguments):
    return [sys.executable, "-m", "hf_delta.cli", *map(str, arguments)]


def environment():
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def run(command):
    found = subprocess.run(command, timeout=1200, capture_output=True, text=True, cwd=ROOT, env=environment())
    assert found.returncode == 0, f"{command}\n{found.stdout[-3000:]}\n{found.stderr[-5000:]}"
    return found


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_held_out_problems_improve_on_every_seed(tmp_path, seed):
    """Mean over levels of pass@1 on problems that neither pre-training nor training saw: at least +0.15."""
    from hf_delta.evaluation import Report

    out = tmp_path / "out"
    found = run(
        hf_delta(
            *("run", ROOT / "recipes" / "quickstart.yaml", "--playground", tmp_path / "playground"),
            *("--playground_seed", seed, "--seed", seed, "--output_dir", out),
        )
    )
    before, after = Report.load(out / "eval_before.json"), Report.load(out / "eval_after.json")
    assert after.over_levels.pass_at_k[1].mean >= before.over_levels.pass_at_k[1].mean + 0.15
    for name in ("run.json", "README.md", "report.md", "curves.png", "trainer_state.json", "tokenizer.json"):
        assert (out / name).stat().st_size > 0, name
    assert "How to load" in (out / "README.md").read_text()
    assert "add6" in found.stdout + found.stderr
    # Kilobytes on Linux; the largest of all children so far.
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss < 2e6


def test_kill_minus_nine_of_the_command_and_resume(playground, tmp_path):
    def command(out, *more):
        return hf_delta(
            *("run", ROOT / "recipes" / "rl" / "delta_l_tiny.yaml", "--playground", playground),
            *("--playground_pretrain_steps", 20, "--max_steps", 20, "--save_steps", 3, "--output_dir", out, *more),
        )

    run(command(tmp_path / "straight"))
    out = tmp_path / "killed"
    with subprocess.Popen(
        command(out), cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        while process.poll() is None and not (out / "checkpoint-6" / "trainer_state.json").exists():
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    refused = subprocess.run(command(out), cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert refused.returncode == 2 and "--resume." in refused.stderr
    run(command(out, "--resume_from_checkpoint", "true"))
    one, other = (load_file(folder / "model.safetensors") for folder in (tmp_path / "straight", out))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
