"""Rules for code that meets sharded parameters, over the source of the package."""

import ast

import pytest

from tests.test_structure import MODULES, relative


GATHER = "ops/gather.py"
PARTITIONED = ("ds_id", "ds_numel", "ds_shape", "ds_tensor", "ds_status")

# Who asks for the whole base weight: at construction, in a forward, when an adapter is checked before its first one, or to
# merge and export. Elsewhere it is sharded, and under ZeRO-3 empty. `tests/distributed` runs them all in shards.
READERS = {
    "adapters/base/layer.py": {"merge", "get_delta_weight"},
    "adapters/bone/layer.py": {"_bat_col_change"},
    "adapters/edora/layer.py": {"_frozen", "check_adapter", "_norm_constants", "dora_factors"},
    "adapters/pmss/layer.py": {"_select", "check_adapter", "_gather", "lora_factors"},
    "adapters/export/change.py": {"weight_change", "merged_parameters"},
}


def attribute_data(node):
    return isinstance(node, ast.Attribute) and node.attr == "data"


def stored(target):
    """What an assignment writes to: through subscripts, unpacking and stars."""
    if isinstance(target, (ast.Tuple, ast.List)):
        return [found for part in target.elts for found in stored(part)]
    if isinstance(target, (ast.Subscript, ast.Starred)):
        return stored(target.value)
    return [target]


def writes_through_data(tree):
    """Lines that assign `.data` or write to it in place; a `DTensor` ignores the first without a word."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.Assign, ast.AugAssign, ast.AnnAssign, ast.For, ast.NamedExpr)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            if any(attribute_data(found) for target in targets for found in stored(target)):
                yield node.lineno
        elif isinstance(node, (ast.With, ast.AsyncWith)):
            targets = [item.optional_vars for item in node.items if item.optional_vars is not None]
            if any(attribute_data(found) for target in targets for found in stored(target)):
                yield node.lineno
        elif isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            named = [a.value for a in node.args if isinstance(a, ast.Constant)]
            in_place = isinstance(node.func, ast.Attribute) and attribute_data(node.func.value) and name.endswith("_")
            by_name = name in ("setattr", "__setattr__") and "data" in named
            if in_place or by_name or name in ("set_", "swap_tensors"):
                yield node.lineno


def gathers(tree):
    """Lines that gather a tensor, or look into what DeepSpeed has partitioned."""
    for node in ast.walk(tree):
        called = (
            isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "full_tensor"
        )
        name = getattr(node, "attr", None) or getattr(node, "id", None) or getattr(node, "value", None)
        imports = isinstance(node, ast.Import) and any(a.name.split(".")[0] == "deepspeed" for a in node.names)
        imports |= isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "deepspeed"
        if called or imports or (isinstance(name, str) and name in (*PARTITIONED, "GatheredParameters")):
            yield node.lineno


def lines(rule):
    found = {relative(path): list(rule(ast.parse(path.read_text()))) for path in MODULES}
    return {path: numbers for path, numbers in found.items() if numbers}


def test_nothing_writes_through_data():
    assert lines(writes_through_data) == {}


def test_one_module_gathers():
    assert list(lines(gathers)) == [GATHER]


def test_base_weights_are_read_where_they_are_whole():
    found = {}
    for path in MODULES:
        for function in ast.walk(ast.parse(path.read_text())):
            if isinstance(function, ast.FunctionDef):
                reads = [n for n in ast.walk(function) if isinstance(n, ast.Attribute) and n.attr == "original_weight"]
                # `rl/merged.py` and the hooks of PEFT have an attribute of this name.
                if reads and relative(path).startswith("adapters/"):
                    found.setdefault(relative(path), set()).add(function.name)
    assert found == READERS


@pytest.mark.parametrize(
    "line",
    [
        "p.data = q",
        "p.data += q",
        "p.data[0] = q",
        "(a, p.data), b = q",
        "p.data: object = q",
        "setattr(p, 'data', q)",
        "object.__setattr__(p, 'data', q)",
        "p.data.copy_(q)",
        "p.set_(q)",
        "torch.utils.swap_tensors(p, q)",
        "for p.data in q: pass",
    ],
)
def test_writing_is_seen(line):
    assert list(writes_through_data(ast.parse(line))) == [1]


@pytest.mark.parametrize("line", ["p.data.dim()", "q = p.data", "p.copy_(q)", "config.data.name = 1", "data = q"])
def test_reading_is_no_writing(line):
    assert not list(writes_through_data(ast.parse(line)))


@pytest.mark.parametrize(
    "line",
    [
        "p.full_tensor()",
        "hasattr(p, 'ds_id')",
        "p.ds_numel",
        "import deepspeed",
        "from deepspeed.zero import GatheredParameters",
        "deepspeed.zero.GatheredParameters(p)",
    ],
)
def test_gathering_is_seen(line):
    assert list(gathers(ast.parse(line)))


@pytest.mark.parametrize("line", ["full_tensor(p)", "from transformers.integrations import deepspeed"])
def test_the_helper_is_no_gathering(line):
    assert not list(gathers(ast.parse(line)))
