"""Recipes and checkpoints of nonsense: they load as what they are, or are refused in words, and nothing else happens."""

import json
import shutil
import zlib

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from hf_delta.checkpoint import STATE_FILE, is_complete, load_state, newest_complete_checkpoint, save_state, steps_of
from hf_delta.errors import InputError
from hf_delta.recipe import TRAINERS, load_recipe
from hf_delta.recipe.find import shipped
from hf_delta.recipe.load import key_owners
from tests.running import CPU


def tried(examples):
    """The same examples in every run."""
    checks = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]
    return settings(
        max_examples=examples, derandomize=True, deadline=None, database=None, suppress_health_check=checks
    )


# -- recipes --------------------------------------------------------------------------------------------------------
TEXTS = [path.read_text(encoding="utf-8") for path in sorted(shipped("recipes").rglob("*_tiny.yaml"))]
SNIPPETS = [
    "\t",
    "\x00",
    ":",
    ": ",
    "- ",
    "[",
    "]",
    "{",
    "}",
    "'",
    '"',
    "\n",
    "  ",
    "#",
    "&a ",
    "*a",
    "!!int ",
    "!x ",
    "<<: ",
    "|",
    ">",
]
SNIPPETS += [
    "---\n",
    "null",
    "true",
    "yes",
    ".nan",
    "-.inf",
    "1e400",
    "-1",
    "0",
    "9" * 30,
    "2026-01-31",
    "é",
    "\ufeff",
    "\ud7ff",
    "~",
]

edits = st.lists(
    st.tuples(st.integers(0, 2000), st.integers(0, 40), st.sampled_from(SNIPPETS) | st.text(max_size=4)),
    min_size=1,
    max_size=4,
)
scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-3, 3)
    | st.sampled_from([10**30, -(10**30), 2**31, 2**63])
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(
        ["", "no", "auto", "none", "lora", "all-linear", "1e-4", "../x", "a.b", ".", "{}", "[1]", '{"a": 1}', "steps"]
    )
)
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["method", "r", "a", ""]), inner, max_size=3)
    ),
    max_leaves=6,
)
KEYS = {trainer: sorted(key_owners(trainer)) for trainer in TRAINERS}
GOOD = {"model_name_or_path": "model", "train_file": "rows.jsonl", "output_dir": "out", **CPU}


def edited(text, changes):
    for place, length, inserted in changes:
        place %= len(text) + 1
        text = text[:place] + inserted + text[place + length :]
    return text


def loads_or_says(folder, content):
    path = folder / "recipe.yaml"
    path.write_text(content, encoding="utf-8", errors="surrogatepass")
    try:
        recipe = load_recipe(str(path))
    except InputError as error:
        assert str(error).strip()
        return
    assert recipe.trainer in TRAINERS
    assert sorted(entry.name for entry in folder.iterdir()) == ["recipe.yaml"]


def mutate_text(folder, index, changes):
    loads_or_says(folder, edited(TEXTS[index % len(TEXTS)], changes))


def change_values(folder, trainer, changes):
    chosen = {KEYS[trainer][index % len(KEYS[trainer])]: value for index, value in changes}
    loads_or_says(folder, yaml.safe_dump({"trainer": trainer, **GOOD, **chosen}, allow_unicode=True))


texts = given(index=st.integers(0, 100), changes=edits)
keys_and_values = given(
    trainer=st.sampled_from(sorted(TRAINERS)),
    changes=st.lists(st.tuples(st.integers(0, 1000), values), min_size=1, max_size=2),
)


@tried(100)
@texts
def test_recipes_whose_text_was_edited(tmp_path, index, changes):
    mutate_text(tmp_path, index, changes)


@tried(200)
@keys_and_values
def test_recipes_with_any_value(tmp_path, trainer, changes):
    change_values(tmp_path, trainer, changes)


@pytest.mark.slow
@tried(1500)
@texts
def test_many_recipes_whose_text_was_edited(tmp_path, index, changes):
    mutate_text(tmp_path, index, changes)


@pytest.mark.slow
@tried(3000)
@keys_and_values
def test_many_recipes_with_any_value(tmp_path, trainer, changes):
    change_values(tmp_path, trainer, changes)


# -- checkpoints ----------------------------------------------------------------------------------------------------
STATE = {
    "hf_delta": "0.1.0",
    "method": {"loss_type": "delta_l", "transforms": ["delta_l"], "groups": None},
    "layout": {"num_processes": 1, "num_generations": 8},
    "curriculum": {
        "counts": torch.arange(12.0).reshape(3, 4),
        "eta": 0.1,
        "seen": torch.tensor([1, 2], dtype=torch.int8),
    },
    "rules": [torch.tensor(True), "mine", 3],
}


def equal(one, other):
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return isinstance(other, dict) and one.keys() == other.keys() and all(equal(one[k], other[k]) for k in one)
    if isinstance(one, list):
        return isinstance(other, list) and len(one) == len(other) and all(map(equal, one, other))
    return one == other


flips = st.lists(st.tuples(st.integers(0, 10_000), st.integers(1, 255)), min_size=1, max_size=3)
damages = (
    st.tuples(st.just("flip"), flips)
    | st.tuples(st.just("cut"), st.integers(0, 10_000))
    | st.tuples(st.just("insert"), st.tuples(st.integers(0, 10_000), st.binary(min_size=1, max_size=9)))
    | st.tuples(st.just("length"), st.integers(0, 2**64 - 1))
)


def damaged(content, kind, what):
    content = bytearray(content)
    if kind == "flip":
        for place, mask in what:
            content[place % len(content)] ^= mask
    elif kind == "cut":
        del content[what % len(content) :]
    elif kind == "insert":
        content[what[0] % len(content) : what[0] % len(content)] = what[1]
    else:
        content[:8] = what.to_bytes(8, "little")
    return bytes(content)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """The files of a checkpoint, with little in them."""
    path = tmp_path_factory.mktemp("run") / "checkpoint-7"
    path.mkdir()
    save_state(path / STATE_FILE, STATE)
    save_file({"weight": torch.ones(3)}, path / "model.safetensors")
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        torch.save({"step": torch.tensor(7)}, path / name)
    state = {"global_step": 7, "max_steps": 9, "log_history": [{"step": 7, "loss": 0.5}]}
    (path / "trainer_state.json").write_text(json.dumps(state, indent=2))
    return path


def read_state(folder, original, damage):
    path = folder / STATE_FILE
    path.write_bytes(damaged(original, *damage))
    try:
        found = load_state(path)
    except InputError as error:
        assert str(path) in str(error)
    else:
        # Some bytes say nothing: spaces in the header, for instance.
        assert equal(found, STATE)


def read_trainer_state(folder, content):
    (folder / "trainer_state.json").write_bytes(content)
    if is_complete(folder):
        assert steps_of(folder) >= 0
        assert newest_complete_checkpoint(folder.parent) == folder
    else:
        assert newest_complete_checkpoint(folder.parent) is None


def copied(checkpoint, folder):
    there = folder / "checkpoint-7"
    if not there.exists():
        shutil.copytree(checkpoint, there)
    return there


@tried(200)
@given(damage=damages)
def test_a_damaged_state_is_refused(checkpoint, tmp_path, damage):
    read_state(tmp_path, (checkpoint / STATE_FILE).read_bytes(), damage)


@tried(200)
@given(structure=values, version=st.sampled_from(["1", "2", "", "one"]), crc=st.sampled_from(["right", "0", None]))
def test_a_state_with_any_structure_is_refused_or_read(tmp_path, structure, version, crc):
    header = {"format": "hf_delta.state", "version": version, "structure": json.dumps(structure)}
    if crc == "right":
        of_structure = zlib.crc32(b"0 torch.float32 (2,)", zlib.crc32(header["structure"].encode()))
        header["crc32"] = f"{zlib.crc32(torch.ones(2).numpy().tobytes(), of_structure):08x}"
    elif crc is not None:
        header["crc32"] = crc
    save_file({"0": torch.ones(2)}, tmp_path / STATE_FILE, metadata=header)
    try:
        found = load_state(tmp_path / STATE_FILE)
    except InputError:
        assert version != "1" or crc != "right"
    else:
        # NaN is not equal to itself.
        assert version == "1" and crc == "right" and repr(found) == repr(json.loads(json.dumps(structure)))


@tried(200)
@given(damage=damages)
def test_a_damaged_trainer_state_is_no_checkpoint(checkpoint, tmp_path, damage):
    folder = copied(checkpoint, tmp_path)
    read_trainer_state(folder, damaged((checkpoint / "trainer_state.json").read_bytes(), *damage))


@tried(200)
@given(content=values | st.fixed_dictionaries({"global_step": values}))
def test_any_trainer_state_is_one_or_none(checkpoint, tmp_path, content):
    read_trainer_state(copied(checkpoint, tmp_path), json.dumps(content).encode())


@tried(100)
@given(
    name=st.sampled_from(["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"]),
    kept=st.integers(0, 10_000),
)
def test_a_file_that_is_cut_off_is_no_checkpoint(checkpoint, tmp_path, name, kept):
    folder = copied(checkpoint, tmp_path)
    original = (checkpoint / name).read_bytes()
    (folder / name).write_bytes(original[: kept % len(original)])
    assert not is_complete(folder) and newest_complete_checkpoint(tmp_path) is None
    (folder / name).write_bytes(original)
    assert is_complete(folder)


@pytest.mark.slow
@tried(20_000)
@given(damage=damages)
def test_many_damaged_states_are_refused(checkpoint, tmp_path, damage):
    read_state(tmp_path, (checkpoint / STATE_FILE).read_bytes(), damage)
