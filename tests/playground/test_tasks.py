"""Addition against arithmetic done another way; a second task in one class; what a task must not do."""

import re
from collections import Counter
from pathlib import Path
from random import Random
from zlib import crc32

import pytest

from hf_delta.errors import InputError
from hf_delta.playground import TASKS, Level, Problem, Task, build_playground
from hf_delta.playground.pretrain import demonstrations
from hf_delta.playground.rewards import playground_reward
from hf_delta.playground.tasks import load_task
from tests.playground.helpers import read_rows


class Reversal(Task):
    """Says a word backwards, after spelling it: the whole of a second task."""

    name = "reversal"
    alphabet = "abcde:;#"
    levels = (Level("short", share=1, care=0.9), Level("long", share=1, care=0.5))

    def sample(self, level, rng):
        word = "".join(rng.choices("abcde", k=5 if level == "short" else 12))
        return Problem(level, word, word[::-1], f"{';'.join(word)}#{word[::-1]}", f"#{word}")


class WrongCareful(Reversal):
    def sample(self, level, rng):
        word = "".join(rng.choices("abcde", k=5))
        return Problem(level, word, word[::-1], f"#{word}", "#a")


class OutsideAlphabet(Reversal):
    alphabet = "abcd:;#"


class WrongLevel(Reversal):
    def sample(self, level, rng):
        return super().sample("short", rng)


class TooLong(Reversal):
    def sample(self, level, rng):
        word = "".join(rng.choices("abcde", k=300))
        return Problem(level, word, "a", "#a", "#b")


class OneProblem(Reversal):
    def sample(self, level, rng):
        return Problem(level, "abc", "cba", "#cba", "#abc")


class NoSample(Task):
    name = "nothing"


@pytest.mark.parametrize("digits", range(1, 7))
def test_addition_writes_down_every_column(digits):
    rng = Random(0)
    for _ in range(300):
        problem = TASKS["addition"]().sample(f"add{digits}", rng)
        left, right = problem.expression.split("+")
        assert len(left) == len(right) == digits
        assert digits == 1 or "0" not in (left[0], right[0])
        columns, _, total = problem.careful.partition("#")
        columns = columns.split(";")
        assert [c[0] for c in columns] == list(reversed(left))
        assert [c[1] for c in columns] == list(reversed(right))
        assert "".join(c[3] for c in reversed(columns)) == total[1:]
        # A column carries exactly if the numbers cut off there overflow.
        for place, column in enumerate(columns, start=1):
            assert int(column[2]) == (int(left[-place:]) + int(right[-place:])) // 10**place
        assert int(total) == int(problem.answer) == int(left) + int(right)
        assert len(total) == digits + 1
        assert problem.sloppy == f"#{left}"


def test_addition_has_six_levels_whose_answers_differ_fourfold_in_length():
    task = TASKS["addition"]()
    lengths = [len(task.sample(level.name, Random(0)).careful) + 1 for level in task.levels]
    assert [level.name for level in task.levels] == ["add1", "add2", "add3", "add4", "add5", "add6"]
    assert lengths == [8, 14, 20, 26, 32, 38]
    assert [level.care for level in task.levels] == sorted((level.care for level in task.levels), reverse=True)


def test_pretraining_draws_levels_by_share_and_answers_with_care():
    task, draws = TASKS["addition"](), 24_000
    source = demonstrations(task, seed=5)
    seen, careful = Counter(), Counter()
    for _ in range(draws):
        problem, response = next(source)
        assert response in (problem.careful, problem.sloppy)
        seen[problem.level] += 1
        careful[problem.level] += response == problem.careful
    total = sum(level.share for level in task.levels)
    # Held-out problems of add1 are 16 of 100, not one in five: its share among what is left is a little larger.
    kept = {level.name: level.share * (0.84 if level.name == "add1" else 0.8) / total for level in task.levels}
    for level in task.levels:
        expected = kept[level.name] / sum(kept.values())
        assert abs(seen[level.name] / draws - expected) < 4 * (expected * (1 - expected) / draws) ** 0.5
        error = (level.care * (1 - level.care) / seen[level.name]) ** 0.5
        assert abs(careful[level.name] / seen[level.name] - level.care) < 4 * error


def test_pretraining_never_sees_a_held_out_problem(playground):
    evaluated = {row["prompt"] for row in read_rows(playground / "eval.jsonl")}
    source = demonstrations(TASKS["addition"](), seed=0)
    prompts = {next(source)[0].prompt for _ in range(24_000)}
    assert not evaluated & prompts
    assert all(crc32(prompt.removesuffix(":").encode()) % 5 for prompt in prompts)


def test_a_second_task_is_one_class(tmp_path):
    out = build_playground(tmp_path / "words", task=f"{__name__}.Reversal", pretrain_steps=2, progress=False)
    train, evaluation = read_rows(out / "train.jsonl"), read_rows(out / "eval.jsonl")
    assert Counter(row["level"] for row in train) == {"short": 512, "long": 512}
    assert Counter(row["level"] for row in evaluation) == {"short": 48, "long": 48}
    assert train[0]["prompt_id"].startswith("reversal/")
    for row in train + evaluation:
        assert row["answer"] == row["prompt"].removesuffix(":")[::-1]
    demonstrated = read_rows(out / "sft.jsonl")
    answers = [row["prompt"].removesuffix(":")[::-1] for row in demonstrated]
    assert playground_reward([row["completion"] for row in demonstrated], answers) == [1.0] * len(answers)


def test_the_task_of_the_documentation_builds(tmp_path, monkeypatch):
    page = (Path(__file__).parents[2] / "docs" / "playground.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    (tmp_path / "my_tasks.py").write_text(code, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    out = build_playground(tmp_path / "words", task="my_tasks.Reversal", pretrain_steps=2, progress=False)
    assert {row["level"] for row in read_rows(out / "eval.jsonl")} == {"short", "long"}


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ("subtraction", "Use one of: addition"),
        ("no_such_module.Task", "no_such_module"),
        (f"{__name__}.Absent", "Absent"),
        (f"{__name__}.Problem", "not a subclass"),
        (f"{__name__}.NoSample", "sample"),
    ],
)
def test_unknown_tasks_are_refused(task, message):
    with pytest.raises(InputError, match=message):
        load_task(task)


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ("WrongCareful", "careful response"),
        ("OutsideAlphabet", "'e' is not in the alphabet"),
        ("WrongLevel", "level 'long'.*'short'"),
        ("TooLong", "shorter than 256"),
        ("OneProblem", "no (held-out|training) problem"),
    ],
)
def test_unusable_tasks_are_refused_before_training(tmp_path, task, message):
    with pytest.raises(InputError, match=message):
        build_playground(tmp_path / "out", task=f"{__name__}.{task}", pretrain_steps=2, progress=False)
    assert not (tmp_path / "out").exists()
