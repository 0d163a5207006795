"""The shape of the house: which way imports point, and where private names may stand."""

import ast
import subprocess
import sys
from pathlib import Path

import peft  # noqa: F401 (first: the import hook of hf_delta must not find _compat.peft half imported)
import pytest

from hf_delta._compat import peft as peft_compat
from hf_delta._compat import trl as compat
from hf_delta._compat import trl_dpo


ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "hf_delta"
MODULES = sorted(PACKAGE.rglob("*.py"))
UPSTREAM = ("trl", "peft", "transformers", "accelerate")
TRL_NAMES = {*compat.ATTRIBUTES, *compat.SEAMS, *trl_dpo.ATTRIBUTES, *trl_dpo.SEAMS}
PEFT_NAMES = {*peft_compat.TUNER_SEAMS, *peft_compat.LAYER_SEAMS, *peft_compat.ATTRIBUTES}

# Pure functions: tensors in, tensors out. They may import torch and numpy, and one another.
FUNCTIONS = [
    "rl/weights",
    "rl/advantages.py",
    "rl/difficulty",
    "rl/allocation",
    "evaluation/estimates.py",
    "ops",
    "ids.py",
    "preference/lists.py",
    "preference/losses.py",
    "preference/feasible.py",
    "preference/weights",
    *(path.relative_to(PACKAGE).as_posix() for path in sorted(PACKAGE.glob("adapters/*/functions.py"))),
    "adapters/bone/additive.py",
    "adapters/bone/bat.py",
    "adapters/pmss/selection.py",
    "plan/held.py",
    "plan/memory.py",
    "plan/parts.py",
    "plan/steps.py",
]
# Rooms from the ground up: a module may import from its own floor and from those before it.
FLOORS = [
    ["errors.py", "__init__.py", "_compat/__init__.py", "_compat/imports.py", "_compat/versions.py"],
    [
        "imports.py",
        "paths.py",
        "disk.py",
        "checkpoint.py",
        "private.py",
        "public.py",
        "resume.py",
        "ids.py",
        "rules.py",
        "ops",
        "_compat",
    ],
    ["adapters/base"],
    ["adapters/bone", "adapters/dora", "adapters/edora", "adapters/pmss"],
    ["adapters"],
    [
        "rl/weights",
        "rl/advantages.py",
        "rl/difficulty",
        "rl/rewards.py",
        "rl/prompt_ids.py",
        "rl/merged.py",
    ],
    ["rl/allocation", "playground", "evaluation"],
    [
        "preference/weights",
        "preference/lists.py",
        "preference/losses.py",
        "preference/feasible.py",
        "preference/list_data.py",
        "preference/list_convert.py",
        "preference/pair_data.py",
    ],
    ["preference/config.py"],
    ["rl/config.py", "rl/curriculum.py"],
    ["rl/resume.py", "rl/configured.py"],
    ["rl/trainer.py", "rl/__init__.py", "preference", "sft.py", "plot"],
    ["recipe", "recipe.py", "data"],
    ["train.py", "run", "plan"],
    ["cli.py"],
]


def relative(path):
    return path.relative_to(PACKAGE).as_posix()


def inside(path, rooms):
    return any(relative(path) == room or relative(path).startswith(f"{room}/") for room in rooms)


def imported(path):
    """Every module that a file imports, also as `from package import module` and relative to itself."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = list(package[: len(package) - node.level + 1]) if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


def module_path(name):
    base = ROOT / Path(*name.split("."))
    return base.with_suffix(".py") if base.with_suffix(".py").exists() else base / "__init__.py"


def floor(path):
    found = [i for i, rooms in enumerate(FLOORS) if inside(path, rooms)]
    assert found, f"{relative(path)} stands on no floor: give it one in FLOORS"
    return found[0]


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_imports_point_down(path):
    for name in imported(path):
        if name.startswith("hf_delta.") and (target := module_path(name)).exists():
            assert floor(target) <= floor(path), f"{relative(path)} imports {name}, which stands above it"


@pytest.mark.parametrize("path", [p for p in MODULES if inside(p, FUNCTIONS)], ids=relative)
def test_pure_functions_import_no_framework(path):
    assert not [n for n in imported(path) if n.split(".")[0] in (*UPSTREAM, "datasets", "pandas")]


@pytest.mark.parametrize("path", [p for p in MODULES if not inside(p, ["_compat"])], ids=relative)
def test_private_upstream_names_stand_in_compat_only(path):
    tree = ast.parse(path.read_text())
    foreign = [name.split(".") for name in imported(path) if name.split(".")[0] in UPSTREAM]
    assert not [name for name in foreign if any(part.startswith("_") for part in name)]
    # TRL documents its top-level names and trl.rewards; what lies deeper may move in any release.
    assert not [name for name in foreign if name[0] == "trl" and len(name) > 2 and name[1] != "rewards"]
    own = {n.name for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))}
    attributes = [n for n in ast.walk(tree) if isinstance(n, ast.Attribute)]
    own |= {a.attr for a in attributes if isinstance(a.ctx, ast.Store)}
    # Class attributes that TRL documents for subclasses.
    own |= {"_tag_names", "_name", "_paper", "_template_file"}
    own -= {*TRL_NAMES, *PEFT_NAMES}
    strings = {n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)}
    assert not strings & {*TRL_NAMES, *PEFT_NAMES}
    assert not {n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)} & PEFT_NAMES
    # argparse gives the type of sub-parsers no public name.
    foreign = [a for a in attributes if a.attr.startswith("_") and ast.unparse(a.value) != "argparse"]
    for attribute in foreign:
        if not attribute.attr.startswith("__"):
            assert attribute.attr in own, f"line {attribute.lineno}: .{attribute.attr} is not ours"


def test_importing_the_package_is_cheap():
    code = "import sys, hf_delta; print([m for m in ('torch', 'trl', 'peft', 'transformers', 'datasets') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_every_public_name_resolves():
    import hf_delta

    for name in hf_delta.__all__:
        assert getattr(hf_delta, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        hf_delta.Nothing  # noqa: B018
