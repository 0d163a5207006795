"""The wheel, away from the checkout: it installs, lists its recipes, and trains one by name."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest


ROOT = Path(__file__).parent.parent

pytestmark = pytest.mark.slow


def run(*command, cwd, **environment):
    found = subprocess.run(command, cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True)
    assert found.returncode == 0, f"{command}\n{found.stdout[-2000:]}\n{found.stderr[-4000:]}"
    return found.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    out = tmp_path_factory.mktemp("wheel")
    # Without isolation: the build backend is part of the test extra, and tests have no network.
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), cwd=ROOT)
    return next(out.glob("hf_delta-*.whl"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    target = tmp_path_factory.mktemp("installed")
    run(
        sys.executable,
        "-m",
        "pip",
        "install",
        "--no-deps",
        "--no-index",
        "--target",
        str(target),
        str(wheel),
        cwd=target,
    )
    return target


def test_the_wheel_holds_recipes_configs_and_the_typing_marker(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    shipped = [*(ROOT / "recipes").rglob("*.yaml"), *(ROOT / "accelerate_configs").glob("*.yaml")]
    shapes = list((ROOT / "recipes" / "configs").glob("*.json"))
    assert shapes and {f"hf_delta/{path.relative_to(ROOT).as_posix()}" for path in [*shipped, *shapes]} <= names
    assert "hf_delta/py.typed" in names
    assert not [n for n in names if n.startswith(("tests/", "docs/", "benchmarks/"))]


def test_a_recipe_of_the_hub_is_planned_from_the_installed_wheel(installed, tmp_path):
    command = [sys.executable, "-m", "hf_delta.cli", "run", "sft/sft", "--dry_run", "--accelerate_config", "fsdp2"]
    plan = run(*command, cwd=tmp_path, PYTHONPATH=str(installed), COLUMNS="200")
    assert f"shapes from {installed / 'hf_delta' / 'recipes' / 'configs' / 'Qwen--Qwen3-1.7B-Base.json'}" in plan
    assert f"8 processes, FSDP2 ({installed / 'hf_delta' / 'accelerate_configs' / 'fsdp2.yaml'})" in plan
    assert "17,432,576 of 1,738,007,552 parameters" in plan and not list(tmp_path.iterdir())


def test_a_recipe_runs_by_name_from_the_installed_wheel(installed, playground, tmp_path):
    environment = {"PYTHONPATH": str(installed)}
    where = run(sys.executable, "-c", "import hf_delta; print(hf_delta.__file__)", cwd=tmp_path, **environment)
    assert Path(where.strip()).is_relative_to(installed)
    listed = run(sys.executable, "-m", "hf_delta.cli", "recipes", cwd=tmp_path, **environment)
    assert "quickstart" in listed and "rl/delta_l_tiny" in listed
    overrides = [
        *("--playground", str(playground), "--playground_pretrain_steps", "20"),
        *("--model_name_or_path", str(playground / "model"), "--train_file", str(playground / "train.jsonl")),
        *("--max_steps", "2", "--output_dir", str(tmp_path / "out")),
    ]
    run(sys.executable, "-m", "hf_delta.cli", "run", "rl/delta_l_tiny", *overrides, cwd=tmp_path, **environment)
    assert (tmp_path / "out" / "run.json").exists() and (tmp_path / "out" / "README.md").exists()
