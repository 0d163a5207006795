"""Reward functions by name, and what they ask of the data."""

import importlib.util

import pytest
import trl.rewards

from hf_delta.errors import InputError
from hf_delta.playground import playground_reward
from hf_delta.recipe.rewards import columns_needed, resolve_reward


MINE = """
def plain(completions, **kwargs):
    return [1.0 for _ in completions]

def scaled(by=2.0):
    return lambda completions, **kwargs: [by for _ in completions]

class Length:
    def __init__(self, unit):
        self.unit = unit
    def __call__(self, completions, **kwargs):
        return [len(c) / self.unit for c in completions]

def picky(limit):
    raise RuntimeError(f"{limit} is too much")

made = Length(1.0)
number = 3
"""


@pytest.fixture
def mine(tmp_path, monkeypatch):
    (tmp_path / "my_rewards_of_test.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return "my_rewards_of_test"


def test_names():
    assert resolve_reward("think_format_reward") is trl.rewards.think_format_reward
    assert resolve_reward("playground_reward") is playground_reward
    made = resolve_reward({"get_soft_overlong_punishment": {"max_completion_len": 8, "soft_punish_cache": 4}})
    # Eq. (13) of the DAPO paper: 0 up to 4 tokens, then down to -1 at 8.
    assert made(completion_ids=[[0] * 4, [0] * 6, [0] * 9]) == [0, -0.5, -1]


def test_dotted_paths(mine):
    assert resolve_reward(f"{mine}.plain")(completions=["a"]) == [1.0]
    assert resolve_reward(f"{mine}.made")(completions=["ab"]) == [2.0]
    assert resolve_reward({f"{mine}.scaled": {"by": 3.0}})(completions=["a"]) == [3.0]
    assert resolve_reward({f"{mine}.Length": {"unit": 4}})(completions=["ab"]) == [0.5]


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ("playgroud_reward", "no reward function 'playgroud_reward'; did you mean 'playground_reward'?"),
        ("{mine}.nothing", "has no name 'nothing'"),
        ("no_such_module.reward", "cannot import no_such_module"),
        ("{mine}.number", "is not a function"),
        ("{mine}.Length", "takes arguments; write {{{mine}.Length: {{unit: …}}}}"),
        ("get_soft_overlong_punishment", "max_completion_len: …, soft_punish_cache: …"),
        ({"get_soft_overlong_punishment": {"max_len": 3}}, "missing a required argument"),
        ({"{mine}.plain": {}}, "missing a required argument"),
        ({"a": {}, "b": {}}, "must have one name"),
        ({"{mine}.picky": {"limit": 3}}, "raised RuntimeError: 3 is too much"),
    ],
)
def test_refusals(mine, entry, said):
    def fill(text):
        return text.replace("{mine}", mine).replace("{{", "{").replace("}}", "}")

    entry = fill(entry) if isinstance(entry, str) else {fill(name): value for name, value in entry.items()}
    with pytest.raises(InputError) as caught:
        resolve_reward(entry)
    assert fill(said) in str(caught.value) and str(caught.value).startswith("reward_funcs: ")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("def reward(:\n", "fails when it is imported (SyntaxError: "),
        ("reward = undefined\n", "fails when it is imported (NameError: name 'undefined' is not defined)"),
        ("import no_such_module_at_all\n", "cannot import {module} (No module named 'no_such_module_at_all')"),
    ],
)
def test_modules_that_cannot_be_imported(tmp_path, monkeypatch, text, said, request):
    module = f"broken_rewards_{request.node.callspec.indices['text']}"
    (tmp_path / f"{module}.py").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(InputError) as caught:
        resolve_reward(f"{module}.reward")
    assert said.format(module=module) in str(caught.value) and module in str(caught.value)


def test_rewards_of_trl_that_need_a_package_say_which(monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "math_verify" else find_spec(name))
    for name in ("accuracy_reward", "reasoning_accuracy_reward"):
        with pytest.raises(InputError, match=r"pip install 'hf_delta\[math\]'"):
            resolve_reward(name)


def test_columns_needed():
    assert columns_needed(playground_reward, ["prompt", "answer"]) == ["answer"]
    assert columns_needed(trl.rewards.accuracy_reward, ["prompt", "solution"]) == ["solution"]
    assert columns_needed(trl.rewards.think_format_reward, ["prompt"]) == []
    with pytest.raises(InputError, match=r"needs the column 'solution', and the dataset has prompt, answer"):
        columns_needed(trl.rewards.accuracy_reward, ["prompt", "answer"])


def test_a_function_that_cannot_be_called_by_trl_is_refused():
    def strict(completions, prompts):
        return [0.0] * len(completions)

    with pytest.raises(InputError, match=r"strict has no parameter for answer, completion_ids, .*add \*\*kwargs"):
        columns_needed(strict, ["prompt", "answer"])
