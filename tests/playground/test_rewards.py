"""The reward on right, wrong and senseless responses, plain and conversational."""

from collections import defaultdict

import pytest

from hf_delta.playground import playground_reward
from hf_delta.playground.rewards import playground_digit_reward


@pytest.mark.parametrize(
    ("completion", "reward"),
    [
        ("5813;4712;3610#1023", 1.0),
        ("#1023", 1.0),
        ("#0001023", 1.0),
        ("#1#22#1023", 1.0),
        ("#1024", 0.0),
        ("#1023#", 0.0),
        ("#1023;", 0.0),
        ("#1023 ", 0.0),
        ("#10230", 0.0),
        ("#-1023", 0.0),
        ("#+1023", 0.0),
        ("#1_023", 0.0),
        ("#１０２３", 0.0),
        ("1023", 0.0),
        ("#", 0.0),
        ("", 0.0),
        ("#" + "9" * 5000, 0.0),
    ],
)
def test_the_text_after_the_last_mark_must_be_the_number(completion, reward):
    assert playground_reward([completion], ["1023"]) == [reward]
    assert playground_reward([[{"role": "assistant", "content": completion}]], ["1023"]) == [reward]


@pytest.mark.parametrize(
    ("completion", "answer", "reward"),
    [
        ("#00", "0", 1.0),
        ("#", "0", 0.0),
        ("#-07", "-7", 1.0),
        ("#7", "-7", 0.0),
        ("a;b#ba", "ba", 1.0),
        ("#ab", "ba", 0.0),
        ("#0x", "x", 0.0),
        # Columns of digits in a CSV file are numbers.
        ("#7", 7, 1.0),
        ("#8", 7, 0.0),
    ],
)
def test_answers_other_than_positive_numbers(completion, answer, reward):
    assert playground_reward([completion], [answer]) == [reward]


def test_every_completion_is_judged_by_its_own_answer():
    assert playground_reward(["#1", "#2", "#3"], answer=["1", "3", "3"], prompts=["", "", ""]) == [1.0, 0.0, 1.0]
    with pytest.raises(ValueError, match="zip"):
        playground_reward(["#1", "#2"], answer=["1"])


def test_pass_rates_are_logged_per_level():
    logged = defaultdict(list)
    playground_reward(
        ["#1", "#2", "#3"], ["1", "2", "4"], level=["a", "b", "a"], log_metric=lambda name, x: logged[name].append(x)
    )
    assert logged == {"pass_rate/a": [1.0, 0.0], "pass_rate/b": [1.0]}


def test_without_levels_nothing_is_logged():
    def refuse(name, value):
        raise AssertionError(name)

    assert playground_reward(["#1"], ["1"], log_metric=refuse) == [1.0]


@pytest.mark.parametrize(
    ("completion", "reward"),
    [
        ("5813;4712;3610#1023", 1.0),
        ("#0001023", 1.0),
        ("#1022", 0.75),
        ("#1923", 0.75),
        # Compared from the right: units, tens, hundreds, and a missing thousand.
        ("#023", 0.5),
        ("#21023", 0.8),
        # Not shifted into place.
        ("#102", 0.0),
        ("#10230", 0.0),
        ("#1023;", 0.0),
        ("#", 0.0),
        ("1023", 0.0),
        ("", 0.0),
    ],
)
def test_digits_are_counted_in_their_places(completion, reward):
    assert playground_digit_reward([completion], ["1023"]) == [reward]
    assert playground_digit_reward([[{"role": "assistant", "content": completion}]], [1023]) == [reward]


def test_all_digits_are_right_exactly_if_the_answer_is():
    numbers = [*range(12), 90, 99, 100, 101, 109, 110, 900, 1000]
    completions = [f"#{text}" for number in numbers for text in (number, f"00{number}")]
    for answer in numbers:
        answers = [str(answer)] * len(completions)
        shares = playground_digit_reward(completions, answers)
        assert [float(share == 1.0) for share in shares] == playground_reward(completions, answers)
        assert all(0.0 <= share <= 1.0 for share in shares)
