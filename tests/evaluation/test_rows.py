import json

import pytest

from hf_delta.errors import InputError
from hf_delta.evaluation.rows import checked_rows, fingerprint, load_rows, natural_key


@pytest.fixture
def file(tmp_path):
    def write(*lines):
        path = tmp_path / "problems.jsonl"
        path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
        return path

    return write


def test_levels_and_identifiers_are_filled_in(file):
    rows = load_rows(file({"prompt": "1+1=", "answer": 2}, "", {"prompt": "2+2=", "answer": 0, "hint": "x"}))
    assert rows == [
        {"prompt": "1+1=", "answer": 2, "level": "all", "prompt_id": "1"},
        {"prompt": "2+2=", "answer": 0, "hint": "x", "level": "all", "prompt_id": "2"},
    ]
    kept = load_rows(file({"prompt": "1", "answer": "2", "level": 3, "prompt_id": 7}))
    assert kept == [{"prompt": "1", "answer": "2", "level": "3", "prompt_id": "7"}]


def test_rows_of_the_caller_are_not_changed():
    rows = [{"prompt": "1", "answer": "2"}]
    checked_rows(rows)
    assert rows == [{"prompt": "1", "answer": "2"}]


GOOD = {"prompt": "1", "answer": "2"}


@pytest.mark.parametrize(
    "lines, message",
    [
        ([], "holds no rows"),
        ([""], "holds no rows"),
        ([GOOD, "{"], "row 2: not JSON"),
        ([GOOD, "[1]"], "row 2: a list where a JSON object should be"),
        ([GOOD, {"answer": "2"}], "row 2: `prompt` is missing"),
        ([{"prompt": " ", "answer": "2"}], "row 1: `prompt` is empty"),
        ([{"prompt": [], "answer": "2"}], "row 1: `prompt` is empty"),
        ([{"prompt": "1", "answer": ""}], "row 1: `answer` is empty"),
        ([{"prompt": "1", "answer": None}], "row 1: `answer` is empty"),
        ([{"prompt": 1, "answer": "2"}], "row 1: `prompt` must be a string or a list of messages"),
        ([{"prompt": [{"role": "user"}], "answer": "2"}], "row 1: `prompt` must be"),
        ([{**GOOD, "level": "a"}, GOOD], "row 2: no `level`"),
        ([{**GOOD, "prompt_id": "a"}, {**GOOD, "prompt_id": "a"}], "row 2: prompt_id 'a' is that of row 1 too"),
        ([{**GOOD, "prompt_id": "2"}, GOOD], "row 2: prompt_id '2' is that of row 1 too"),
    ],
)
def test_what_is_wrong_is_named_with_file_and_row(file, lines, message):
    with pytest.raises(InputError, match=message) as error:
        load_rows(file(*lines))
    assert "problems.jsonl" in str(error.value)


def test_a_directory_or_nothing_instead_of_a_file(tmp_path):
    for path in (tmp_path, tmp_path / "none.jsonl"):
        with pytest.raises(InputError, match="cannot be read"):
            load_rows(path)


def test_the_fingerprint_is_of_content_and_order():
    rows = checked_rows([GOOD, {"answer": "2", "prompt": "3"}])
    assert fingerprint(rows) == fingerprint(
        checked_rows([{"answer": "2", "prompt": "1"}, {"prompt": "3", "answer": "2"}])
    )
    assert fingerprint(rows) != fingerprint(rows[::-1])
    assert fingerprint(rows) != fingerprint([rows[0], {**rows[1], "answer": "4"}])
    with pytest.raises(InputError, match="JSON cannot"):
        fingerprint([{"prompt": object()}])


def test_numbers_in_names_sort_as_numbers():
    names = ["add10", "add2", "10", "9", "b", "add", "a1b2", "a1b10"]
    assert sorted(names, key=natural_key) == ["9", "10", "a1b2", "a1b10", "add", "add2", "add10", "b"]
