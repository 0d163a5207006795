"""One launch of two processes for all tests of this folder."""

import os
import socket
import subprocess
import sys
import warnings

import pytest
import torch

from tests.rl.frozen import build_world


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    return build_world(tmp_path_factory.mktemp("world"))


def launch(out, world):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # `--cpu --num_processes 2` would start one process; `--multi_gpu` starts two, and `use_cpu` puts them on gloo.
    command = [
        *(sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"),
        *(
            "--num_machines",
            "1",
            "--mixed_precision",
            "no",
            "--dynamo_backend",
            "no",
            "--main_process_port",
            str(port),
        ),
        *("-m", "tests.distributed.worker", str(out), world),
    ]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONFAULTHANDLER": "1",
        "ACCELERATE_USE_CPU": "true",
        "ACCELERATE_TORCH_DEVICE": "cpu",
    }
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)


@pytest.fixture(scope="session")
def two_processes(world, tmp_path_factory):
    """Runs every case once and returns `case -> [result of rank 0, result of rank 1]`."""
    out = tmp_path_factory.mktemp("two_processes")
    found = launch(out, world)
    if found.returncode != 0 and "exitcode: -11" in found.stderr:
        # torch's gloo threads crashed a process in one of fifteen launches, after its case; no Python of ours can do that.
        warnings.warn(f"A process died of SIGSEGV, launching once more:\n{found.stderr[-3000:]}", stacklevel=1)
        out = tmp_path_factory.mktemp("two_processes")
        found = launch(out, world)

    def results(case):
        paths = [out / case / f"result_{rank}.pt" for rank in (0, 1)]
        if not all(p.exists() for p in paths):
            pytest.fail(f"The case {case} left no result (exit {found.returncode}):\n{found.stderr[-5000:]}")
        ranks = [torch.load(p, weights_only=False) for p in paths]
        for rank, result in enumerate(ranks):
            assert "error" not in result, f"rank {rank}:\n{result['error']}"
            assert result["num_processes"] == 2
        return ranks

    return results
