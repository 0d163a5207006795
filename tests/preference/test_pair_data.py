"""Rows with pairs: what is refused, how columns and streams are checked, and which rows share a key."""

import random
import subprocess
import sys

import pytest
from datasets import Dataset
from trl import extract_prompt

from hf_delta.errors import InputError
from hf_delta.preference import pair_data
from hf_delta.preference.pair_data import check_pair_rows, check_weight_lengths, with_sample_keys


def message(text, role="assistant"):
    return [{"role": role, "content": text}]


TEXT = {"prompt": "p", "chosen": "a", "rejected": "b"}
CHAT = {"prompt": message("p", "user"), "chosen": message("a"), "rejected": message("b")}
IMPLICIT = {"chosen": "p a", "rejected": "p b"}
IMPLICIT_CHAT = {key: [*CHAT["prompt"], *CHAT[key]] for key in ("chosen", "rejected")}
WEIGHTS = {"chosen_weights": [0.0, 2.5], "rejected_weights": [1.0]}
CALL = [{"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "look"}}]}]


def refusal(rows, **options):
    """What is said of rows, which is the same however they come."""
    said = set()
    for form in (list, Dataset.from_list, lambda rows: Dataset.from_list(rows).to_iterable_dataset()):
        with pytest.raises(InputError) as caught:
            for _ in check_pair_rows(form(rows), "rows.jsonl", **options):
                pass
        said.add(str(caught.value))
    (said,) = said
    return said


class TestChecks:
    @pytest.mark.parametrize("row", [TEXT, CHAT, IMPLICIT, IMPLICIT_CHAT], ids=["text", "chat", "implicit", "chats"])
    @pytest.mark.parametrize(
        "weights", [{}, WEIGHTS, {"chosen_weights": 3, "rejected_weights": 0}], ids=["none", "lists", "numbers"]
    )
    def test_good_rows(self, row, weights):
        row = {**row, **weights}
        rows = [row, {**row, "other": None}]
        assert check_pair_rows(rows, weights=bool(weights)) is rows
        dataset = Dataset.from_list(rows)
        assert check_pair_rows(dataset, weights=bool(weights)) is dataset
        stream = dataset.to_iterable_dataset()
        checked = check_pair_rows(stream, weights=bool(weights))
        assert list(checked) == list(stream) and checked.features == stream.features

    @pytest.mark.parametrize(
        ("good", "change", "said"),
        [
            (TEXT, {"prompt": None}, "row 2: 'prompt' is None"),
            (TEXT, {"prompt": ""}, "row 2: 'prompt' is ''"),
            (CHAT, {"prompt": []}, "row 2: 'prompt' is []"),
            (TEXT, {"chosen": ""}, "row 2: 'chosen' is empty"),
            (TEXT, {"rejected": ""}, "row 2: 'rejected' is empty"),
            (TEXT, {"rejected": None}, "row 2: 'rejected' is None, which is neither text nor"),
            (CHAT, {"chosen": message("")}, "row 2: 'chosen' is empty"),
            (CHAT, {"rejected": []}, "row 2: 'rejected' is empty"),
            (TEXT, {"rejected": "a"}, "row 2: 'chosen' and 'rejected' are equal; remove the row"),
            (CHAT, {"rejected": message("a")}, "row 2: 'chosen' and 'rejected' are equal"),
            (IMPLICIT, {"rejected": "q b"}, "row 2: 'chosen' and 'rejected' begin with nothing in common"),
            (
                IMPLICIT,
                {"chosen": " a", "rejected": " b"},
                "row 2: 'chosen' and 'rejected' begin with nothing in common",
            ),
            (
                IMPLICIT,
                {"chosen": "p", "rejected": "p b"},
                "row 2: 'chosen' and 'rejected' begin with nothing in common",
            ),
            (IMPLICIT, {"chosen": "p b"}, "row 2: 'chosen' and 'rejected' are equal"),
            (
                IMPLICIT_CHAT,
                {"chosen": message("x", "user") + message("a")},
                "row 2: 'chosen' and 'rejected' begin with",
            ),
        ],
    )
    def test_bad_rows(self, good, change, said):
        assert refusal([good, {**good, **change}, good]).startswith(f"rows.jsonl, {said}")

    @pytest.mark.parametrize("key", ["prompt", "chosen", "rejected"])
    def test_text_and_messages_in_one_row(self, key):
        with pytest.raises(
            InputError, match="row 1: one of 'prompt' and '(chosen|rejected)' is text and the other messages"
        ):
            check_pair_rows(Dataset.from_list([{**TEXT, key: CHAT[key]}]))

    def test_calls_of_tools_say_something(self):
        check_pair_rows([{**CHAT, "chosen": CALL}])

    @pytest.mark.parametrize("key", ["chosen_weights", "rejected_weights"])
    @pytest.mark.parametrize(
        ("good", "bad", "said"),
        [
            (1.0, None, "row 2 has no '{key}'"),
            (1.0, -0.5, "row 2: '{key}' is -0.5; a weight must be a finite number, 0 or more"),
            (1.0, float("nan"), "row 2: '{key}' is nan"),
            (1.0, float("inf"), "row 2: '{key}' is inf"),
            (False, True, "row 1: '{key}' is False"),
            ("1", "2", "row 1: '{key}' is '1'"),
            (3, -3, "row 2: '{key}' is -3"),
            ([1.0], None, "row 2 has no '{key}'"),
            ([1.0, 2.0], [], "row 2: '{key}' is an empty list"),
            ([1.0, 2.0], [1.0, None], "row 2: '{key}[1]' is None"),
            ([1.0, 2.0], [0.0, 1.0, float("-inf")], "row 2: '{key}[2]' is -inf"),
            ([1, 2], [-1, 2], "row 2: '{key}[0]' is -1"),
            ([True], [True], "row 1: '{key}[0]' is True"),
            ([[1.0]], [[1.0]], "row 1: '{key}[0]' is [1.0]"),
        ],
    )
    def test_bad_weights(self, key, good, bad, said):
        rows = [{**TEXT, **WEIGHTS, key: value} for value in (good, bad, good)]
        assert refusal(rows, weights=True).startswith(f"rows.jsonl, {said.format(key=key)}")
        check_pair_rows(Dataset.from_list(rows))

    @pytest.mark.parametrize("key", ["chosen_weights", "rejected_weights", "chosen", "rejected"])
    def test_a_column_that_is_not_there(self, key):
        row = {name: value for name, value in {**TEXT, **WEIGHTS}.items() if name != key}
        assert f"'{key}'" in refusal([row], weights=True)

    def test_no_rows(self):
        for rows in ([], Dataset.from_dict({"prompt": [], "chosen": [], "rejected": []})):
            with pytest.raises(InputError, match="the dataset has no rows"):
                check_pair_rows(rows)

    def test_columns_find_what_rows_find(self):
        """Every column of random rows as a whole, against row by row."""
        draw = random.Random(0)
        refused = 0
        for _ in range(100):
            rows = [
                {
                    **{
                        key: draw.choice(["p", "q", "p a", "p b", "pq", "é ", *[""] * (draw.random() < 0.1)])
                        for key in names
                    },
                    "chosen_weights": draw.choice([[1.0], [0.0, 2.0]] + [[-1.0], [], None] * (draw.random() < 0.05)),
                    "rejected_weights": draw.choice([1.0, 0.0] + [float("nan")] * (draw.random() < 0.05)),
                }
                for names in [draw.choice([("prompt", "chosen", "rejected"), ("chosen", "rejected")])]
                for _ in range(draw.randrange(1, 3))
            ]
            said = []
            for form in (
                rows,
                Dataset.from_list(rows),
                Dataset.from_list(rows + rows).select(range(len(rows), 2 * len(rows))),
            ):
                try:
                    said.append(check_pair_rows(form, weights=True) and None)
                except InputError as error:
                    said.append(str(error))
            assert said[0] == said[1] == said[2]
            refused += said[0] is not None
        assert 20 < refused < 80

    def test_good_texts_and_numbers_are_not_looked_at_one_by_one(self, monkeypatch):
        dataset = Dataset.from_list([{**TEXT, **WEIGHTS}] * 3)
        monkeypatch.setattr(pair_data, "_checked", None)
        check_pair_rows(dataset, weights=True)

    def test_a_prompt_is_there_where_trl_finds_one(self):
        draw = random.Random(0)
        found = {True: 0, False: 0}
        for _ in range(500):
            row = {key: "".join(draw.choices("a b", k=draw.randrange(1, 4))) for key in ("chosen", "rejected")}
            if row["chosen"] == row["rejected"] or row["chosen"][0] != row["rejected"][0]:
                continue  # of texts that differ at once, TRL takes all but the end of one for the prompt
            has_prompt = extract_prompt(row)["prompt"] != ""
            found[has_prompt] += 1
            if has_prompt:
                check_pair_rows([row])
            else:
                assert "begin with nothing in common" in refusal([row])
        assert min(found.values()) > 20


class TestLengths:
    ROW = {"prompt": "1+1:", "chosen_ids": [4, 5, 1], "rejected_ids": [6, 1], "chosen_weights": [1.0, 0, 1]}

    @pytest.mark.parametrize("rejected", [[0.5, 0.5], 0.5], ids=["list", "number"])
    def test_good_rows(self, rejected):
        dataset = Dataset.from_list([{**self.ROW, "rejected_weights": rejected}] * 2)
        assert check_weight_lengths(dataset) is dataset
        assert list(check_weight_lengths(dataset.to_iterable_dataset())) == list(dataset)

    @pytest.mark.parametrize("weights", [[0.5], [0.5] * 3])
    def test_the_row_key_and_lengths_are_named(self, weights):
        good = {**self.ROW, "rejected_weights": [0.5, 0.5]}
        dataset = Dataset.from_list([{**good, "rejected_weights": [2.0]}, good, {**good, "rejected_weights": weights}])
        # What was left out before does not count.
        dataset = dataset.select([1, 2])
        for rows in (dataset, dataset.to_iterable_dataset()):
            with pytest.raises(InputError) as caught:
                list(check_weight_lengths(rows, "eval rows"))
            assert str(caught.value) == (
                f"eval rows, row 2 (prompt '1+1:'): 'rejected_weights' has {len(weights)} numbers, and 'rejected' 2 tokens, "
                "the end token among them. Give one number for each, or one for all."
            )


ROWS = [{**TEXT, "chosen": f"a{i}", "name": f"n{i}", "number": i} for i in range(20)]


def keys(dataset, column=None):
    return {row["chosen"]: row["sample_key"] for row in with_sample_keys(dataset, column)}


class TestSampleKeys:
    @pytest.mark.parametrize("column", [None, "name", "number"])
    def test_a_key_stays_with_its_row(self, column):
        dataset = Dataset.from_list(ROWS)
        found = keys(dataset, column)
        assert len(set(found.values())) == len(ROWS) and all(isinstance(key, int) for key in found.values())
        assert keys(dataset.shuffle(seed=1), column) == found
        assert keys(dataset.to_iterable_dataset(num_shards=3).shuffle(seed=1), column) == found
        assert keys(dataset.shard(2, 1), column).items() <= found.items()
        assert with_sample_keys(dataset, column).features["sample_key"].dtype == "int64"
        assert with_sample_keys(dataset.to_iterable_dataset(), column).features["sample_key"].dtype == "int64"

    def test_another_process_gives_the_same(self):
        rows = [TEXT, CHAT, {"prompt": "p", "completions": ["a", "b"]}]
        code = (
            "from datasets import Dataset; from hf_delta.preference.pair_data import with_sample_keys\n"
            f"for row in {rows!r}:\n    d = with_sample_keys(Dataset.from_list([row])); print(d[0]['sample_key'], d._fingerprint)"
        )
        found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
        here = [with_sample_keys(Dataset.from_list([row])) for row in rows]
        assert found == [text for dataset in here for text in (str(dataset[0]["sample_key"]), dataset._fingerprint)]

    @pytest.mark.parametrize("key", ["prompt", "chosen", "rejected"])
    def test_what_a_row_says_is_its_key(self, key):
        rows = [TEXT, {**TEXT, "other": 1}, {**TEXT, key: "x"}, {**TEXT, key: "x", "other": 2}]
        first, second, third, fourth = with_sample_keys(Dataset.from_list(rows))["sample_key"]
        assert first == second != third == fourth

    def test_the_order_of_a_pair_counts(self):
        first, second = with_sample_keys(Dataset.from_list([TEXT, {**TEXT, "chosen": "b", "rejected": "a"}]))[
            "sample_key"
        ]
        assert first != second

    def test_fields_that_other_messages_have_do_not_count(self):
        alone = with_sample_keys(Dataset.from_list([CHAT]))["sample_key"][0]
        assert with_sample_keys(Dataset.from_list([{**CHAT, "chosen": CALL}, CHAT]))["sample_key"][1] == alone

    @pytest.mark.parametrize("value", [None, "", 1.5, True])
    def test_an_id_that_is_none(self, value):
        row = 2 if isinstance(value, str) or value is None else 1
        dataset = Dataset.from_list([{**TEXT, "name": "x" if row == 2 else value}, {**TEXT, "name": value}])
        for rows in (dataset, dataset.to_iterable_dataset()):
            with pytest.raises(
                InputError, match=f"sample_id_column: row {row} has {value!r} as 'name'; an id must be"
            ):
                list(with_sample_keys(rows, "name"))

    def test_no_such_column(self):
        for dataset in (Dataset.from_list([TEXT]), Dataset.from_list([TEXT]).to_iterable_dataset()):
            with pytest.raises(
                InputError, match="sample_id_column: the dataset has no column 'id'; it has chosen, prompt"
            ):
                with_sample_keys(dataset, "id")

    def test_an_id_of_two_rows(self):
        rows = [{**TEXT, "id": "x"}, {**TEXT, "id": "y"}, {**TEXT, "id": "x"}, {**TEXT, "id": "y", "chosen": "c"}]
        with pytest.raises(InputError, match="sample_id_column: id 'y' names two different rows, 2 and 4"):
            with_sample_keys(Dataset.from_list(rows), "id")
        first, second, third = with_sample_keys(Dataset.from_list(rows[:3]), "id")["sample_key"]
        assert first == third != second

    def test_keys_that_are_there_stay(self):
        dataset = Dataset.from_list([{**TEXT, "sample_key": 7}])
        assert with_sample_keys(dataset) is dataset
        with pytest.raises(InputError, match=r"a column 'sample_key' of its own \(string\)"):
            with_sample_keys(Dataset.from_list([{**TEXT, "sample_key": "x"}]))
        with pytest.raises(InputError, match="Row 2 of the dataset has no 'sample_key'"):
            with_sample_keys(Dataset.from_list([{**TEXT, "sample_key": 7}, {**TEXT, "sample_key": None}]))
