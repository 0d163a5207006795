"""DeepSpeed ZeRO-3 on two processes: as `test_through_vllm.py`, in a launch of its own."""

import importlib.util
import os
import shutil
import socket
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.distributed.through_vllm import STEPS
from tests.distributed.zero3_worker import KINDS


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed"),
    pytest.mark.skipif(
        shutil.which("g++") is None, reason="DeepSpeed compiles a kernel for a CPU, and there is no g++"
    ),
]


@pytest.fixture(scope="module")
def ranks(world, tmp_path_factory):
    out = tmp_path_factory.mktemp("zero3")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    command = [sys.executable, "-m", "accelerate.commands.launch", "--use_deepspeed", "--zero_stage", "3"]
    command += ["--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    command += ["--main_process_port", port, "-m", "tests.distributed.zero3_worker", str(out), world]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    found = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert found.returncode == 0, found.stderr[-5000:]
    return [torch.load(out / f"result_{rank}.pt", weights_only=False) for rank in (0, 1)]


@pytest.mark.parametrize("run", [f"{kind}, colocate" for kind in KINDS] + ["peft_dora, server"])
def test_the_engine_has_exactly_the_merged_weights(ranks, world, run):
    names = [name for name, _ in AutoModelForCausalLM.from_pretrained(world).named_parameters()]
    for index, rank in enumerate(ranks):
        found = rank[run]
        assert "error" not in found, found["error"]
        with_engine = index == 0 or "server" not in run
        assert found["partitioned"]
        assert found["wrong"] == [[]] * STEPS * with_engine
        assert found["touched"] == [] and found["merged"] == 0
        assert found["syncs"] == ([names] * STEPS if with_engine else None)
        assert found["ratios"] == pytest.approx([1.0] * STEPS * (index == 0), abs=1e-5)
