"""The configurations for `accelerate launch`: its own parser reads them, and two processes start where two are promised."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command, launch_command_parser
from accelerate.utils import DeepSpeedPlugin, DistributedType, FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_auto_wrap_policy
from torch.distributed.fsdp import CPUOffloadPolicy, StateDictType
from transformers.integrations.deepspeed import propagate_args_to_deepspeed
from trl import SFTConfig

from hf_delta.run.processes import parallelism
from tests.adapters.life import adapted
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


# -- what `accelerate launch` starts --------------------------------------------------------------------------------
@pytest.fixture
def started(monkeypatch):
    """`(name, *flags) -> arguments of torch's launcher` with which each machine is started; their environment is set here."""

    def start(name, *flags):
        seen = []
        monkeypatch.setattr("torch.distributed.run.run", lambda args: seen.append((args, dict(os.environ))))
        command = ["--config_file", str(CONFIGS / f"{name}.yaml"), "--main_process_port", "0", *flags]
        launch_command(launch_command_parser().parse_args([*command, "-m", "hf_delta.train", "recipe.yaml"]))
        for key, value in seen[0][1].items():
            monkeypatch.setenv(key, value)
        return seen[0][0]

    return start


@pytest.mark.parametrize("name", EXPECTED)
def test_every_key_is_one_that_accelerate_knows(name):
    """It refuses others at the top by itself, and ignores them below."""
    config = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    known = vars(launch_command_parser().parse_args(["-m", "x"]))
    below = [key for value in config.values() if isinstance(value, dict) for key in value]
    assert not [key for key in below if key not in known]
    assert all(key.startswith("fsdp_") for key in config.get("fsdp_config", {}))


def test_a_key_that_accelerate_does_not_know_is_refused_by_it(tmp_path):
    path = tmp_path / "wrong.yaml"
    path.write_text((CONFIGS / "ddp.yaml").read_text() + "num_process: 8\n")
    with pytest.raises(ValueError, match="num_process"):
        load_config_from_file(str(path))


@pytest.mark.parametrize("name", ["ddp", "fsdp2"])
@pytest.mark.parametrize("machines", [1, 2])
def test_eight_processes_are_started_on_each_machine(started, name, machines):
    several = ["--num_machines", "2", "--num_processes", "16", "--machine_rank", "1", "--main_process_ip", "10.0.0.1"]
    args = started(name, *(several if machines == 2 else []))
    assert int(args.nproc_per_node) == 8 and args.module and args.training_script == "hf_delta.train"
    if machines == 2:
        assert (int(args.nnodes), int(args.node_rank)) == (2, 1) and args.rdzv_endpoint.startswith("10.0.0.1:")


def test_fsdp2_is_what_each_process_builds_of_it(started):
    started("fsdp2")
    plugin = FullyShardedDataParallelPlugin()
    assert (plugin.fsdp_version, plugin.reshard_after_forward) == (2, True)
    assert plugin.state_dict_type == StateDictType.FULL_STATE_DICT
    # TRL checkpoints activations by itself, and twice would be an error.
    assert not plugin.activation_checkpointing and not isinstance(plugin.cpu_offload, CPUOffloadPolicy)
    plugin.set_mixed_precision(os.environ["ACCELERATE_MIXED_PRECISION"])
    assert plugin.mixed_precision_policy.param_dtype == torch.bfloat16


@pytest.mark.parametrize("kind", ["bone", "pmss", "edora", "dora"])
def test_fsdp2_shards_each_block_with_the_adapters_in_it(started, kind):
    """Adapters read the base weight in a forward, where it is whole in the unit of the block and sharded in one of its own."""
    started("fsdp2")
    model, plugin = adapted(kind), FullyShardedDataParallelPlugin()
    plugin.set_auto_wrap_policy(model)
    is_unit = fsdp2_prepare_auto_wrap_policy(plugin, model)
    blocks = list(model.base_model.model.model.layers)
    assert [module for module in model.modules() if is_unit(module)] == blocks


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")
@pytest.mark.parametrize("name, stage", [("zero2", 2), ("zero3", 3)])
def test_deepspeed_is_what_each_process_builds_of_it(started, monkeypatch, tmp_path, name, stage):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert int(started(name).nproc_per_node) == 8
    plugin = DeepSpeedPlugin()
    assert plugin.zero_stage == stage and plugin.zero3_init_flag == (stage == 3)
    recipe = SFTConfig(tmp_path, gradient_accumulation_steps=4, max_grad_norm=0.5, bf16=False, use_cpu=True)
    propagate_args_to_deepspeed(SimpleNamespace(state=SimpleNamespace(deepspeed_plugin=plugin)), recipe)
    # What the recipe says is what is trained with.
    assert (plugin.deepspeed_config["gradient_accumulation_steps"], plugin.deepspeed_config["gradient_clipping"]) == (
        4,
        0.5,
    )
    zero = plugin.deepspeed_config["zero_optimization"]
    assert zero["stage"] == stage and zero["stage3_gather_16bit_weights_on_model_save"] == (stage == 3)
    assert zero["offload_optimizer"]["device"] == zero["offload_param"]["device"] == "none"


@pytest.mark.parametrize(
    "kind, count, expected",
    [
        (DistributedType.NO, 1, "one process"),
        (DistributedType.MULTI_GPU, 8, "data parallel, 8 processes"),
        (DistributedType.FSDP, 8, "FSDP2, 8 processes"),
        (DistributedType.DEEPSPEED, 8, "ZeRO-3, 8 processes"),
    ],
)
def test_a_run_says_how_it_is_spread(kind, count, expected):
    plugins = {"fsdp_plugin": SimpleNamespace(fsdp_version=2), "deepspeed_plugin": SimpleNamespace(zero_stage=3)}
    accelerator = SimpleNamespace(state=SimpleNamespace(distributed_type=kind, **plugins), num_processes=count)
    assert parallelism(accelerator) == expected


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


@pytest.fixture(scope="module")
def two_runs(playground, tmp_path_factory):
    """`(configuration, *flags) -> (output directory, what was said)` of one recipe, in two processes on a CPU."""
    folder = tmp_path_factory.mktemp("two_runs")
    script = folder / "main.py"
    script.write_text(
        "import sys, torch, transformers\n"
        "from tests.distributed.fsdp_on_cpu import fsdp_on_cpu\n"
        "class Spy(transformers.TrainerCallback):\n"
        "    def on_train_end(self, args, state, control, model=None, **kwargs):\n"
        "        kinds = {type(parameter).__name__ for parameter in model.parameters()}\n"
        "        open(f'{args.output_dir}/kinds_{args.process_index}', 'w').write(' '.join(kinds))\n"
        "from hf_delta import DeltaSFTTrainer\n"
        "init = DeltaSFTTrainer.__init__\n"
        "def spied(self, *a, **k):\n"
        "    init(self, *a, **k)\n"
        "    self.add_callback(Spy())\n"
        "DeltaSFTTrainer.__init__ = spied\n"
        "from hf_delta.train import main\n"
        "with fsdp_on_cpu():\n"
        "    sys.exit(main())\n"
    )
    saving = {"save_strategy": "steps", "save_steps": 2, "max_steps": 3, "learning_rate": 1e-3}
    adapter = {"method": "pmss", "r": 4, "target_modules": "all-linear"}
    recipe = write(folder, keys("sft", playground, folder, peft_config=adapter, **saving))
    cpu = {"ACCELERATE_USE_CPU": "true", "ACCELERATE_TORCH_DEVICE": "cpu", "OMP_NUM_THREADS": "1"}
    source = str(CONFIGS.parent)
    cpu["PYTHONPATH"] = os.pathsep.join([source, *filter(None, [os.environ.get("PYTHONPATH")])])

    def run(name, *flags):
        out = folder / "_".join([name, *flags[1:]])
        launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(CONFIGS / f"{name}.yaml")]
        launch += ["--num_processes", "2", "--mixed_precision", "no", "--main_process_port", "0", *flags]
        command = [*launch, str(script), str(recipe), "--output_dir", str(out)]
        found = subprocess.run(command, timeout=600, capture_output=True, text=True, env={**os.environ, **cpu})
        assert found.returncode == 0, found.stderr[-3000:]
        return out, found.stderr

    return run


@pytest.mark.slow
def test_fsdp2_trains_and_saves_what_data_parallel_does(two_runs):
    """The file as it is, but for the number of processes and the precision; PMSS, whose buffers each process derives."""
    expected, said = two_runs("cpu")
    assert "(data parallel, 2 processes)" in said
    assert (expected / "kinds_0").read_text() == "Parameter"
    for kind in ("FULL_STATE_DICT", "SHARDED_STATE_DICT"):
        out, said = two_runs("fsdp2", "--fsdp_state_dict_type", kind)
        assert "(FSDP2, 2 processes)" in said
        assert [(out / f"kinds_{rank}").read_text() for rank in (0, 1)] == ["DTensor"] * 2
        assert (out / "checkpoint-2" / "pytorch_model_fsdp_0").exists() == (kind == "SHARDED_STATE_DICT")
        for file in ("checkpoint-2/adapter_model.safetensors", "adapter_model.safetensors"):
            assert (out / file).read_bytes() == (expected / file).read_bytes(), (kind, file)
