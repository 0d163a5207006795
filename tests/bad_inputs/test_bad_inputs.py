"""Every bad input of the table: one line that says what, where and what to do; status 2, and nothing is changed."""

import importlib.util
import os
import subprocess
import sys

import pytest

from hf_delta.cli import build_parser
from tests.bad_inputs.case import write
from tests.bad_inputs.page import PAGE, TABLE, cases, page
from tests.bad_inputs.trying import matches, outcome, tree
from tests.bad_inputs.world import World


EXTRAS = ("vllm", "deepspeed")


@pytest.fixture(scope="session")
def world(playground, tmp_path_factory):
    return World(tmp_path_factory.mktemp("world"), playground)


@pytest.fixture(autouse=True)
def no_extras(monkeypatch):
    """Packages that are extras are not there, wherever the tests run."""
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name in EXTRAS else find_spec(name, *a))


def parameters():
    return [pytest.param(case, id=case.id, marks=[pytest.mark.slow] * case.slow) for case in cases()]


@pytest.mark.parametrize("case", parameters())
def test_bad_input(case, world, tmp_path):
    found = outcome(tmp_path, case, world)
    assert found.status == 2, found.stderr
    assert found.error is not None and "Traceback" not in found.stderr, found.stderr
    assert matches(case.says, found.error), f"{case.says}\n{found.error}"
    assert found.changed == []


def test_the_page_is_that_of_the_table():
    assert PAGE.read_text(encoding="utf-8") == page(), "python -m tests.bad_inputs.page writes it anew"


def test_no_row_is_there_twice():
    ids = [case.id for case in cases()]
    assert len(ids) >= 100 and len(set(ids)) == len(ids)


def test_the_fast_tier_has_every_command_and_trainer():
    fast = [case for case in cases() if not case.slow]
    assert len(fast) >= 150 and all(any(not case.slow for case in rows) for rows in TABLE.values())
    commands = next(action for action in build_parser()._actions if action.choices).choices
    assert commands.keys() <= {word for case in fast for word in case.argv[:1]}
    for command in ([], ["--dry_run"], ["--resume"]):
        tried = [case for case in fast if case.argv[:1] == ("run",) and {*command} <= {*case.argv}]
        trainers = {
            case.files["recipe.yaml"]["trainer"] for case in tried if isinstance(case.files.get("recipe.yaml"), dict)
        }
        assert trainers == {"sft", "dpo", "grpo"}


@pytest.mark.slow
@pytest.mark.parametrize(
    "id", ["sft-typo", "grpo-raises", "eval-k-text", "eval-no-model", "export-no-adapter", "plot-empty"]
)
def test_bad_input_in_a_process_of_its_own(id, world, tmp_path):
    case = next(case for case in cases() if case.id == id)
    (tmp_path / "playground").symlink_to(world.playground)
    write(tmp_path, case.files, world)
    before = tree(tmp_path)
    command = [sys.executable, "-m", "hf_delta.cli", *case.argv]
    path = os.pathsep.join(filter(None, [os.getcwd(), os.environ.get("PYTHONPATH")]))
    found = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True
    )
    assert found.returncode == 2 and "Traceback" not in found.stderr, found.stderr
    said = found.stderr.splitlines()[-1].replace(f"{tmp_path}/", "").replace(str(world.playground), "playground")
    assert said.startswith("error: ") and matches(case.says, said.removeprefix("error: "))
    assert tree(tmp_path) == before
