"""The teacher with the faulty table: right demonstrations by arithmetic, wrong ones by the table and nothing else."""

from collections import Counter
from random import Random
from zlib import crc32

import pytest

from hf_delta.playground import TASKS, build_playground
from hf_delta.playground.pretrain import demonstrations
from hf_delta.playground.rewards import final_answer
from hf_delta.playground.tasks.faulty_table import FAULTY_SUMS, faulty_sums
from tests.playground.helpers import read_rows


TASK = TASKS["faulty_table"]()
NAMES = ["sum1", "sum2", "sum3", "sum4", "sum5", "sum6"]


def columns_of(response):
    """(digit, digit, carry in, what was said of them) of every column, and what follows `#`."""
    columns, _, total = response.partition("#")
    said, carry = [], 0
    for x, y, c, d in columns.split(";"):
        said.append((int(x), int(y), carry, int(c + d)))
        carry = int(c)
    return said, total


@pytest.mark.parametrize("digits", range(1, 7))
def test_careful_answers_are_the_written_addition(digits):
    rng = Random(0)
    for _ in range(300):
        problem = TASK.sample(f"sum{digits}", rng)
        left, right = problem.expression.split("+")
        assert len(left) == len(right) == digits
        assert digits == 1 or "0" not in (left[0], right[0])
        said, total = columns_of(problem.careful)
        assert "".join(str(x) for x, *_ in reversed(said)) == left
        assert "".join(str(y) for _, y, *_ in reversed(said)) == right
        assert all(x + y + carry == value for x, y, carry, value in said)
        assert len(total) == digits + 1
        assert int(total) == int(problem.answer) == int(left) + int(right)


def test_the_teacher_is_wrong_only_by_the_table_and_as_often_as_it_says():
    rng, seen, wrong = Random(1), Counter(), Counter()
    for _ in range(12_000):
        problem = TASK.sample("sum6", rng)
        said, total = columns_of(problem.sloppy)
        # A mistake is carried on: the total is what the columns say.
        assert total == f"{said[-1][3] // 10}" + "".join(str(value % 10) for *_, value in reversed(said))
        for x, y, carry, value in said:
            key = (min(x, y), max(x, y), carry)
            assert value in (x + y + carry, FAULTY_SUMS[key][1])
            seen[key] += 1
            wrong[key] += value != x + y + carry
    assert len(seen) == 110
    for key, (rate, _) in FAULTY_SUMS.items():
        # 110 comparisons, hence five standard errors.
        error = (rate * (1 - rate) / seen[key]) ** 0.5
        assert abs(wrong[key] / seen[key] - rate) < 5 * error, key


def test_the_table_has_one_wrong_value_for_each_sum_and_is_always_the_same():
    assert faulty_sums() == FAULTY_SUMS
    for (x, y, carry), (rate, wrong) in FAULTY_SUMS.items():
        assert 0 <= wrong <= 19 and wrong != x + y + carry
        low, high = ((0.0, 0.2), (0.5, 0.9))[carry]
        assert low <= rate <= high
    # Written down once: another generator would make another world of the same name.
    assert FAULTY_SUMS[3, 4, 0] == (pytest.approx(0.1025189510), 3)
    assert FAULTY_SUMS[7, 8, 1] == (pytest.approx(0.7630152382), 19)


def test_demonstrations_show_their_work_and_are_wrong_more_often_on_long_problems():
    source, seen, right = demonstrations(TASK, seed=5), Counter(), Counter()
    for _ in range(12_000):
        problem, response = next(source)
        assert response.count(";") == int(problem.level[3:]) - 1 and not response.startswith("#")
        assert not problem.held_out
        seen[problem.level] += 1
        right[problem.level] += final_answer(response) == problem.answer
    rates = [right[name] / seen[name] for name in NAMES]
    assert rates == sorted(rates, reverse=True)
    assert rates[0] > 0.85 and rates[-1] < 0.1


def test_sampling_depends_on_the_generator_alone():
    rng, twin = Random(7), Random(7)
    problems = [TASK.sample("sum4", rng) for _ in range(50)]
    assert problems == [TASK.sample("sum4", twin) for _ in range(50)]
    assert len({problem.expression for problem in problems}) > 45


def test_levels_and_split(tmp_path):
    out = build_playground(tmp_path / "table", task="faulty_table", pretrain_steps=2, progress=False)
    train, evaluation = read_rows(out / "train.jsonl"), read_rows(out / "eval.jsonl")
    assert Counter(row["level"] for row in train) == dict.fromkeys(NAMES, 512)
    assert Counter(row["level"] for row in evaluation) == {**dict.fromkeys(NAMES, 48), "sum1": 16}
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in evaluation}
    for rows, held_out in ((train, False), (evaluation, True)):
        assert all((crc32(row["prompt"].removesuffix(":").encode()) % 5 == 0) == held_out for row in rows)
    assert train[0]["prompt_id"] == f"faulty_table/{train[0]['level']}/{train[0]['prompt'].removesuffix(':')}"
    for row in read_rows(out / "sft.jsonl"):
        left, right = row["prompt"].removesuffix(":").split("+")
        assert final_answer(row["completion"]) == str(int(left) + int(right))
    preferences = read_rows(out / "preference.jsonl")
    assert len({row["level"] for row in preferences}) == 6
    for row in preferences:
        assert row["chosen"][0] != "#" and row["rejected"][0] != "#"
        assert final_answer(row["rejected"]) != final_answer(row["chosen"])
