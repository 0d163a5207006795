"""Dry runs by their command line, on a machine that has the packages of all recipes."""

import importlib.util
from dataclasses import dataclass
from pathlib import Path

import pytest

from hf_delta.cli import main
from hf_delta.plan.run import Plan
from hf_delta.plan.run import dry_run as plan_of


FIND_SPEC = importlib.util.find_spec
PACKAGES = ("vllm", "math_verify", "deepspeed", "bitsandbytes", "liger_kernel")


@dataclass(frozen=True)
class Answer:
    """What a command answered: its status, both streams, what is new in the directory, and the plan that it printed."""

    status: int
    out: str
    err: str
    new: set[Path]
    plan: Plan | None


@pytest.fixture
def dry_run(tmp_path, monkeypatch, capsys):
    """`hf-delta run RECIPE --dry_run` in an empty directory, or one with what a test has put there."""
    monkeypatch.chdir(tmp_path)
    # As wide as a plan needs.
    monkeypatch.setenv("COLUMNS", "200")
    plans = []
    monkeypatch.setattr("hf_delta.plan.run.dry_run", lambda recipe: plans.append(plan_of(recipe)) or plans[-1])

    def command(recipe, *flags):
        before = set(tmp_path.rglob("*"))
        plans.clear()
        capsys.readouterr()
        status = main(["run", str(recipe), *map(str, flags), "--dry_run"])
        return Answer(status, *capsys.readouterr(), set(tmp_path.rglob("*")) - before, plans[0] if plans else None)

    return command


def pretend(monkeypatch, *there, absent=()):
    """Have packages be there or absent, as far as a dry run looks."""

    def find(name, *package):
        if name in there:
            return object()
        return None if name in absent else FIND_SPEC(name, *package)

    monkeypatch.setattr(importlib.util, "find_spec", find)


@pytest.fixture
def equipped(monkeypatch):
    """Packages that recipes want, which the machine of the tests need not have."""
    pretend(monkeypatch, *PACKAGES)
    monkeypatch.setattr("hf_delta.run.extras.vllm_mismatch", lambda: None)
    monkeypatch.setattr("hf_delta.plan.run.resolve_reward", lambda entry: entry)
