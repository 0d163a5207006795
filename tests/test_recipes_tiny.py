"""The recipes that are shipped: each can be read, each tiny one trains, each big one has its small twin and its page."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from hf_delta.recipe import list_recipes, load_recipe
from hf_delta.recipe.find import find_recipe
from hf_delta.recipe.source import read_recipe
from hf_delta.run.console import is_main_process
from hf_delta.train import run


ROOT = Path(__file__).parent.parent
NAMES = list(list_recipes())
TINY = [name for name in NAMES if name.endswith("_tiny")]
BIG = [name for name in NAMES if not name.endswith("_tiny")]


@pytest.mark.parametrize("name", NAMES)
def test_recipes_are_valid(name):
    # The machine of the tests has no GPU that could do bf16.
    recipe = load_recipe(name, ["--use_cpu"])
    assert recipe.values["output_dir"].startswith("runs/")


@pytest.mark.parametrize("name", BIG)
def test_a_recipe_has_its_page(name):
    page = ROOT / "docs" / f"{name}.md"
    assert page.is_file() and f"{name}.yaml" in page.read_text()


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_that_names_a_hub_model_has_a_twin_of_the_same_method(name):
    keys = read_recipe(find_recipe(name))
    if "model_name_or_path" not in keys:
        assert "playground" in keys
        return
    twin = load_recipe(f"{name}_tiny", ["--use_cpu"])
    big = load_recipe(name, ["--use_cpu"])
    assert twin.trainer == big.trainer and twin.training.loss_type == big.training.loss_type
    assert type(twin.peft) is type(big.peft)


# Recipes that differ from another one by a rule, which has its own tests.
VARIANTS = [f"preference/{rule}_tiny" for rule in ("mapo", "d2po", "tis_dpo", "token_weights")]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in VARIANTS else []) for name in TINY]
)
def test_tiny_recipes_train(tmp_path, playground, name):
    flags = ["--playground", str(playground), "--playground_pretrain_steps", "20", "--disable_tqdm"]
    out = run(load_recipe(name, [*flags, "--max_steps", "2", "--output_dir", str(tmp_path / "out")]))
    state = json.loads((out / "trainer_state.json").read_text())
    assert state["global_step"] == 2 and is_main_process()
    weights = [load_file(path) for path in out.glob("*model.safetensors")]
    assert len(weights) == 1 and all(value.isfinite().all() for value in weights[0].values())
