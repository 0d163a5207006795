"""Every recipe that is shipped passes its dry run, and what a plan says of some of them."""

import json
from pathlib import Path

import pytest

from hf_delta.plan.report import counted, size
from hf_delta.recipe import list_recipes
from hf_delta.recipe.find import find_recipe
from hf_delta.recipe.source import read_recipe
from tests.running import keys, write


RECIPES = Path(__file__).parent.parent.parent / "recipes"
NAMES = list(list_recipes())
HUB = [name for name in NAMES if "model_name_or_path" in read_recipe(find_recipe(name))]
PLAYGROUND = [name for name in NAMES if name not in HUB]


def test_all_that_is_shipped_is_here():
    files = {path.relative_to(RECIPES).with_suffix("").as_posix() for path in RECIPES.rglob("*.yaml")}
    assert files == set(HUB) | set(PLAYGROUND) and len(HUB) >= 14 and len(PLAYGROUND) >= 15


@pytest.fixture
def with_files(tmp_path):
    """What recipes expect in the working directory."""
    for name in ("positive", "negative"):
        (tmp_path / "runs" / name).mkdir(parents=True)
    row = {"prompt": "1", "chosen": "2", "rejected": "3"}
    files = {
        "weighted_pairs": row | {"chosen_weights": 1.0, "rejected_weights": 0.5},
        "lists": {"prompt": "1", "completions": ["2", "3"], "scores": [1.0, 0.0]},
        "delta_pairs": row,
    }
    for name, content in files.items():
        (tmp_path / "runs" / f"{name}.jsonl").write_text((json.dumps(content) + "\n") * 100)


def launch_of(name):
    """The configuration of accelerate in the command that stands at the top of a recipe."""
    return find_recipe(name).read_text().partition("accelerate_configs/")[2].partition(".yaml")[0]


def shown(answer):
    """The lines of a plan by their names, and the columns of its table."""
    lines = {line.split("  ")[0]: line.partition("  ")[2].strip() for line in answer.out.splitlines() if "  " in line}
    return {name: text for name, text in lines.items() if name}


@pytest.mark.parametrize("name", HUB)
def test_every_hub_recipe_passes_its_dry_run(dry_run, equipped, with_files, name):
    launch = launch_of(name)
    answer = dry_run(name, "--accelerate_config", launch)
    assert answer.status == 0 and not answer.err and not answer.new
    said = shown(answer)
    assert f"shapes from {RECIPES / 'configs'}" in said["model"]
    strategy = "FSDP2" if launch == "fsdp2" else "DDP"
    assert said["launch"].startswith(f"8 processes, {strategy} (")
    assert "a GPU needs" in answer.out
    check_peaks(answer.plan)


def check_peaks(plan):
    ddp, two, three, fsdp = (plan.estimates[strategy].peak for strategy in ("DDP", "ZeRO-2", "ZeRO-3", "FSDP2"))
    # Recipes are for GPUs of 80 GB.
    assert plan.estimates[plan.launch.strategy].peak < 80e9
    assert all(found.peak > found.weights + found.optimizer for found in plan.estimates.values())
    # An adapter has little to share, and weights in 4 bits are gathered as a whole.
    assert fsdp < ddp and (three < two or plan.recipe.model.load_in_4bit)
    assert plan.recipe.peft is not None or two < ddp


@pytest.mark.parametrize("name", PLAYGROUND)
def test_every_playground_recipe_passes_its_dry_run(dry_run, name):
    answer = dry_run(name)
    assert answer.status == 0 and not answer.err and not answer.new
    said = shown(answer)
    assert "the playground, which the run would build" in said["model"]
    weights = answer.plan.weights
    assert weights.all - weights.trained * (answer.plan.recipe.peft is not None) == 132_800
    assert said["launch"] == "1 process (this launch)" and "GPU" not in answer.out


def test_a_playground_that_is_there_is_looked_at(dry_run, playground):
    there, absent = (
        shown(dry_run("preference/lipo_tiny", *flags))
        for flags in (["--playground", playground, "--playground_pretrain_steps", "20"], [])
    )
    assert "rows not known" in absent["data"] and "rows not known" not in there["data"]
    # Lists of four.
    assert "each of 4 answers" in there["step"] and "each of 4 answers" in absent["step"]


# -- words, with numbers by hand --------------------------------------------------------------------------------------
def test_supervised_fine_tuning_of_a_lora(dry_run, equipped):
    answer = dry_run("sft/sft", "--num_processes", "4")
    said = shown(answer)
    # 28 blocks with seven layers; 16 * (inputs + outputs) each, which is 66.5 MiB of float32, and two states of it.
    inputs_and_outputs = 2 * (2048 + 2048) + 2 * (2048 + 1024) + 3 * (2048 + 6144)
    trained = 28 * 16 * inputs_and_outputs
    assert said["trains"].startswith(
        f"lora: {trained:,} of {trained + 1_720_574_976:,} parameters (1.00%), 66.5 MiB in float32"
    )
    assert said["trains"].endswith("3.2 GiB are frozen; computes in bfloat16")
    assert said["launch"] == "4 processes, DDP (this launch, num_processes 4)"
    assert said["step"] == "32 rows (4 processes x 2 at a time x 4); at most 2,048 tokens each, 65,536 in all"
    assert said["steps"] == "1 epoch, with a step for every 32 rows"
    assert said["saved"] == "runs/sft: adapter (66.5 MiB), tokenizer, run.json, README.md"
    assert said["checkpoints"] == "200 MiB every 100 steps"
    weights, optimizer, gradients = 2 * 1_720_574_976 + 4 * trained, 8 * trained, 2 * 4 * trained
    assert said["weights"].split("  ")[0] == size(weights) == "3.27 GiB"
    assert said["optimizer"].split("  ")[0] == size(optimizer) == "133 MiB"
    assert said["gradients"].split("  ")[0] == size(gradients) == "133 MiB"
    peak = 4.696
    assert said["peak"].startswith(f"{peak:.3g} GiB") and f"a GPU needs {(peak + 0.5) / 0.9:.3g} GiB" in answer.out


def test_pairs_with_masks(dry_run, equipped):
    said = shown(dry_run("preference/sparse_po", "--accelerate_config", "zero3"))
    assert said["trains"] == "all 1,720,574,976 parameters, 6.41 GiB in float32; computes in bfloat16"
    assert said["step"] == (
        "128 rows (8 processes x 4 at a time x 4); at most 1,024 tokens of each of 2 answers with its prompt, 262,144 in all"
    )
    assert said["steps"] == "3 epochs, with a step for every 128 rows"
    # float32 weights, and those of DeepSpeed with two states.
    assert said["checkpoints"] == f"{size(16 * 1_720_574_976)} every 200 steps"
    assert "reference" in said


def test_rollouts_by_vllm(dry_run, equipped):
    answer = dry_run("rl/delta_l", "--accelerate_config", "ddp")
    said = shown(answer)
    assert (
        said["step"]
        == "512 rollouts of 64 prompts (8 processes x 8 at a time x 8); at most 3,584 tokens each, 1,835,008 in all"
    )
    assert said["steps"] == "500"
    assert (
        said["rollouts"]
        == "512 at a time, 8 for each of 64 prompts, 500 times, of at most 3,072 tokens; vLLM takes 30% of each GPU"
    )
    one = 12 * 1_720_574_976
    assert said["checkpoints"] == f"{size(one)} every 50 steps; 10 stay, {size(10 * one)} in all"
    assert (
        "With vLLM's 30%, half a GiB of CUDA itself and a tenth for fragmentation, a GPU needs 74.9 GiB." in answer.out
    )
    asleep = dry_run("rl/delta_l", "--accelerate_config", "ddp", "--vllm_enable_sleep_mode")
    assert (
        f"With half a GiB of CUDA itself and a tenth for fragmentation, a GPU needs {(44.46 + 0.5) / 0.9:.3g} GiB"
        in asleep.out
    )
    full = dry_run("rl/delta_l", "--vllm_gpu_memory_utilization", "0.9")
    assert "nothing is left for training: lower vllm_gpu_memory_utilization." in full.out


def test_a_run_of_local_files(dry_run, tmp_path, playground):
    recipe = write(tmp_path, keys("sft", playground, tmp_path / "out", max_steps=-1, num_train_epochs=2))
    answer = dry_run(recipe, "--save_strategy", "epoch")
    said = shown(answer)
    assert answer.status == 0 and not answer.new
    assert said["trains"] == "all 132,800 parameters, 519 KiB in float32"
    # 64 rows, 4 at a time, twice.
    assert said["data"].endswith("sft.jsonl: 64 rows") and said["steps"] == "32, 2 epochs"
    assert said["checkpoints"] == f"{size(12 * 132_800)} every epoch; 2 stay, {size(24 * 132_800)} in all"
    assert shown(dry_run(recipe))["checkpoints"] == "none"


def test_words_of_numbers():
    assert size(1024) == "1 KiB" and size(3 * 2**30) == "3 GiB" and size(812 * 2**20) == "812 MiB" and size(0) == "0 B"
    assert (
        counted(1, "epoch") == "1 epoch"
        and counted(2.5, "epoch") == "2.5 epochs"
        and counted(1024, "row") == "1,024 rows"
    )
