"""The configurations for `accelerate launch`: its own parser reads them, and two processes start where two are promised."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser

from tests.running import keys, write


CONFIGS = Path(__file__).parent.parent / "accelerate_configs"

# name: (use_deepspeed, use_fsdp, multi_gpu, processes, mixed precision)
EXPECTED = {
    "single": (False, False, False, 1, "bf16"),
    "ddp": (False, False, True, 8, "bf16"),
    "fsdp2": (False, True, False, 8, "bf16"),
    "zero2": (True, False, False, 8, "bf16"),
    "zero3": (True, False, False, 8, "bf16"),
    "cpu": (False, False, True, 2, "no"),
}


def launched(name):
    arguments = launch_command_parser().parse_args(
        ["--config_file", str(CONFIGS / f"{name}.yaml"), "-m", "hf_delta.train"]
    )
    return _validate_launch_command(arguments)[0]


def test_they_are_all_here():
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == set(EXPECTED)


@pytest.mark.parametrize("name", EXPECTED)
def test_accelerate_reads_them_as_meant(name):
    assert load_config_from_file(str(CONFIGS / f"{name}.yaml")).num_processes == EXPECTED[name][3]
    found = launched(name)
    assert (
        found.use_deepspeed,
        found.use_fsdp,
        found.multi_gpu,
        found.num_processes,
        found.mixed_precision,
    ) == EXPECTED[name]


def test_what_the_sharded_ones_shard():
    fsdp = launched("fsdp2")
    assert (fsdp.fsdp_version, fsdp.fsdp_reshard_after_forward) == (2, True)
    # With sharded checkpoints `save_model` writes nothing.
    assert fsdp.fsdp_state_dict_type == "FULL_STATE_DICT"
    assert launched("zero2").zero_stage == 2
    zero3 = launched("zero3")
    assert (zero3.zero_stage, zero3.zero3_init_flag, zero3.zero3_save_16bit_model) == (3, True, True)


@pytest.mark.slow
def test_cpu_starts_two_processes_that_train_one_model(tmp_path, playground):
    script = tmp_path / "spy.py"
    script.write_text(
        "import json, os, pathlib, sys, torch.distributed as dist, transformers\n"
        "class Spy(transformers.TrainerCallback):\n"
        "    def on_train_end(self, args, state, control, model=None, **kwargs):\n"
        "        total = sum(p.double().sum() for p in model.parameters())\n"
        "        found = [args.world_size, dist.get_backend(), args.process_index, total.item()]\n"
        "        pathlib.Path(os.environ['SPY'], f'{args.process_index}.json').write_text(json.dumps(found))\n"
        "import trl\n"
        "init = trl.SFTTrainer.__init__\n"
        "def spied(self, *a, **k):\n"
        "    init(self, *a, **k)\n"
        "    self.add_callback(Spy())\n"
        "trl.SFTTrainer.__init__ = spied\n"
        "from hf_delta.train import main\n"
        "sys.exit(main())\n"
    )
    recipe = write(tmp_path, keys("sft", playground, tmp_path / "out"))
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(CONFIGS / "cpu.yaml")]
    command = [*launch, "--main_process_port", "0", str(script), str(recipe), "--learning_rate", "1e-3"]
    # A file for each process: lines that two processes print into one pipe can run into one another.
    spies = tmp_path / "spies"
    spies.mkdir()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "SPY": str(spies)}
    found = subprocess.run(command, timeout=600, capture_output=True, text=True, env=environment)
    assert found.returncode == 0, found.stderr[-3000:]
    seen = [json.loads(path.read_text()) for path in sorted(spies.iterdir())]
    assert [spy[:3] for spy in seen] == [[2, "gloo", 0], [2, "gloo", 1]]
    assert seen[0][3] == seen[1][3]
    assert found.stderr.count("README.md says how to load it") == 1
    # The same command again: both processes stop with one message.
    again = subprocess.run(
        command, timeout=600, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert again.returncode != 0 and again.stderr.count("holds another run") == 1
