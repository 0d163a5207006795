"""Launches of two processes by Accelerate, on the CPU, and what their cases found."""

import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
import warnings

import pytest
import torch

from tests.distributed.deepspeed_on_cpu import zero


# Of the tests that launch DeepSpeed, which compiles a kernel when it starts on a CPU.
needs_deepspeed = [
    pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed"),
    pytest.mark.skipif(
        None in (shutil.which(os.environ.get("CXX", "c++")), shutil.which("ninja")),
        reason="DeepSpeed compiles a kernel for a CPU, and there is no C++ compiler or no ninja",
    ),
]


def launch(module, out, world, stage=None):
    """Run the `CASES` of a module in two processes, see `worker.py`; a `stage` of ZeRO makes it a launch by DeepSpeed."""
    # `--cpu --num_processes 2` would start one process; `--multi_gpu` starts two, and `use_cpu` puts them on gloo.
    flags, environment = ["--multi_gpu"], {"ACCELERATE_USE_CPU": "true", "ACCELERATE_TORCH_DEVICE": "cpu"}
    if stage:
        # A file and not `--zero_stage`, because only there thresholds can be given.
        config = out / "deepspeed.json"
        config.write_text(json.dumps(zero(stage)))
        flags = ["--use_deepspeed", "--deepspeed_config_file", str(config), "--zero3_init_flag", str(stage == 3)]
        environment = {"DS_ACCELERATOR": "cpu"}
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        flags += ["--main_process_port", str(probe.getsockname()[1])]
    if not stage:
        flags += ["--mixed_precision", "no"]
    flags += ["--num_processes", "2", "--num_machines", "1", "--dynamo_backend", "no"]
    command = [sys.executable, "-m", "accelerate.commands.launch", *flags, "-m", "tests.distributed.worker"]
    command += [module, str(out), world, *([] if stage is None else [str(stage)])]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1", **environment}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)


def launched(module, folder_of, world, stage=None):
    """Run every case of a module once, and return `case -> [result of rank 0, result of rank 1]`."""
    out = folder_of(module.rpartition(".")[-1])
    found = launch(module, out, world, stage)
    if found.returncode != 0 and "exitcode: -11" in found.stderr:
        # torch's gloo threads crashed a process in one of fifteen launches, after its case; no Python of ours can do that.
        warnings.warn(f"A process died of SIGSEGV, launching once more:\n{found.stderr[-3000:]}", stacklevel=1)
        out = folder_of(module.rpartition(".")[-1])
        found = launch(module, out, world, stage)

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
