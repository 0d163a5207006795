"""Rows with lists of completions: what is refused, what labels they get, and what pairs and samples become."""

import itertools
import math
import random

import pytest
import torch
from datasets import Dataset

from hf_delta.errors import InputError
from hf_delta.preference.list_convert import lists_from_pairs, lists_from_scored
from hf_delta.preference.list_data import (
    DataCollatorForLists,
    add_labels,
    check_list_rows,
    list_labels,
    rank_scores,
)
from hf_delta.preference.lists import into_lists, list_logistic


def message(text, role="assistant"):
    return [{"role": role, "content": text}]


ROW = {"prompt": "p", "completions": ["a", "b", "c"], "scores": [1, 0.5, -2.0]}
CHAT = {"prompt": message("p", "user"), "completions": [message("a"), message("b")], "ranks": [2, 1]}


class TestChecks:
    def test_good_rows(self):
        as_loaded = {**ROW, "completions": ["a", "b"], "scores": None, "ranks": [1, 1]}
        check_list_rows(iter([ROW, CHAT, as_loaded]))
        check_list_rows([{**ROW, "scores": [0, 0.5, 1]}, CHAT], rescale=False)
        dataset = Dataset.from_list([ROW, ROW])
        assert check_list_rows(dataset) is dataset
        assert list(check_list_rows(dataset.to_iterable_dataset())) == list(dataset)

    def test_streams_are_checked_as_they_come_by(self):
        stream = Dataset.from_list([ROW, {**ROW, "scores": [1.0, 1.0, math.nan]}]).to_iterable_dataset()
        rows = iter(check_list_rows(stream, "mine"))
        assert next(rows) == ROW
        with pytest.raises(InputError, match=r"^mine, row 2: 'scores\[2\]' is nan"):
            next(rows)
        with pytest.raises(InputError, match=r"row 1: 'scores\[2\]' is -2.0; without rescaling"):
            next(iter(check_list_rows(stream, rescale=False)))

    @pytest.mark.parametrize(
        "change, message",
        [
            ({"prompt": None}, "row 2: 'prompt' is None"),
            ({"prompt": ""}, "row 2: 'prompt' is ''"),
            ({"prompt": message("p", "user")}, r"row 2: one of 'prompt' and 'completions\[0\]' is text"),
            (
                {"completions": ["a"], "scores": [1.0]},
                "row 2: 'completions' must be a list of 2 or more, got 1 of them",
            ),
            ({"completions": "ab"}, "row 2: 'completions' must be a list of 2 or more, got 'ab'"),
            ({"completions": None}, "row 2: 'completions' must be a list of 2 or more, got None"),
            ({"completions": ["a", "", "c"]}, r"row 2: 'completions\[1\]' is empty"),
            ({"completions": ["a", None, "c"]}, r"row 2: 'completions\[1\]' is None, which is neither"),
            ({"completions": ["a", "b", 3]}, r"row 2: 'completions\[2\]' is 3, which is neither"),
            ({"completions": ["a", "b", "a"]}, r"row 2: 'completions\[0\]' and 'completions\[2\]' are equal"),
            ({"completions": ["a", "b", message("c")]}, r"row 2: one of 'prompt' and 'completions\[2\]' is text"),
            ({"scores": None}, "row 2 has neither of 'scores' and 'ranks'"),
            ({"ranks": [1, 2, 3]}, "row 2 has both of 'scores' and 'ranks'"),
            ({"scores": [1.0, 2.0]}, "row 2: 'scores' must be one number for each of 3 completions, got 2"),
            ({"scores": 1.0}, "row 2: 'scores' must be one number for each of 3 completions, got 1.0"),
            ({"scores": [1.0, math.nan, 2.0]}, r"row 2: 'scores\[1\]' is nan"),
            ({"scores": [1.0, 2.0, math.inf]}, r"row 2: 'scores\[2\]' is inf"),
            ({"scores": [None, 2.0, 1.0]}, r"row 2: 'scores\[0\]' is None"),
            ({"scores": [1.0, "2", 1.0]}, r"row 2: 'scores\[1\]' is '2'"),
            ({"scores": None, "ranks": [1, 2, math.nan]}, r"row 2: 'ranks\[2\]' is nan"),
        ],
    )
    def test_a_bad_row_is_named(self, change, message):
        with pytest.raises(InputError, match=f"^mine, {message}"):
            check_list_rows([ROW, {**ROW, **change}], "mine")

    def test_other_bad_rows(self):
        with pytest.raises(InputError, match="the dataset has no rows"):
            check_list_rows([])
        with pytest.raises(InputError, match=r"'completions\[1\]' is empty"):
            check_list_rows([{**CHAT, "completions": [message("a"), message("")]}])
        with pytest.raises(InputError, match=r"'completions\[0\]' is empty"):
            check_list_rows([{**CHAT, "completions": [[], message("a")]}])
        with pytest.raises(InputError, match=r"row 1: 'scores\[2\]' is -2.0; without rescaling"):
            check_list_rows([ROW], rescale=False)


class TestLabels:
    def test_of_scores(self):
        assert list_labels([3.0, 1.0, 2.0]) == [1.0, 0.0, 0.5]
        assert list_labels([-7, 4]) == [0.0, 1.0]
        assert list_labels([0.3, 0.3, 0.3]) == [0.5, 0.5, 0.5]
        assert list_labels([-1.7e308, 1.7e308, 0.0]) == [0.0, 1.0, 0.5]

    def test_unit_and_zero_of_a_scale_do_not_matter(self):
        scores = torch.randn(7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        assert list_labels((40 * scores - 9).tolist()) == pytest.approx(list_labels(scores.tolist()))

    def test_of_ranks(self):
        """The paper's: a completion's mean win rate over the list, one half against itself and against equals."""
        ranks = [2, 1, 3, 2]
        wins = {True: 1.0, False: 0.0}
        expected = [sum(0.5 if a == b else wins[a < b] for b in ranks) / 4 for a in ranks]
        assert rank_scores(ranks) == expected
        assert add_labels({"ranks": ranks}, rescale=False) == {"ranks": ranks, "list_labels": expected}
        assert add_labels({"ranks": ranks})["list_labels"] == [0.5, 1.0, 0.0, 0.5]
        assert add_labels({"scores": None, "ranks": [2, 1]})["list_labels"] == [0.0, 1.0]

    def test_of_rows(self):
        assert add_labels(ROW) == {**ROW, "list_labels": pytest.approx([1.0, 2.5 / 3, 0.0])}
        assert add_labels({**ROW, "scores": [1, 0.5, 0]}, rescale=False)["list_labels"] == [1.0, 0.5, 0.0]


class TestFromScored:
    def test_by_prompt(self):
        rows = [("p", "a", 1), ("q", "x", 0.0), ("p", "b", 0.0), ("q", "y", 3), ("p", "a", 2), ("p", "c", 0.0)]
        found = lists_from_scored({"prompt": p, "completion": c, "score": s} for p, c, s in rows)
        assert found.rows == [
            {"prompt": "p", "completions": ["a", "b", "c"], "scores": [1.5, 0.0, 0.0]},
            {"prompt": "q", "completions": ["x", "y"], "scores": [0.0, 3.0]},
        ]
        assert (found.duplicates, found.single, found.tied) == (1, 0, 0)
        check_list_rows(found.rows)

    def test_what_is_left_out_is_counted(self):
        rows = [("p", "a", 1), ("p", "a", 1), ("q", "x", 0.1), ("q", "y", 0.1), ("q", "x", 0.1), ("r", "a", 3)]
        found = lists_from_scored({"prompt": p, "completion": c, "score": s} for p, c, s in rows)
        assert (found.rows, found.duplicates, found.single, found.tied) == ([], 2, 2, 1)

    def test_messages_are_told_apart_whatever_the_order_of_their_keys(self):
        same = [{"content": "a", "role": "assistant"}]
        rows = [(message("p", "user"), c, s) for c, s in [(message("a"), 1), (same, 3), (message("b"), 0)]]
        found = lists_from_scored({"prompt": p, "completion": c, "score": s} for p, c, s in rows)
        assert found.rows == [
            {"prompt": message("p", "user"), "completions": [message("a"), message("b")], "scores": [2.0, 0.0]}
        ]

    @pytest.mark.parametrize(
        "change, message",
        [
            ({"score": math.nan}, "row 2: 'score' is nan"),
            ({"score": None}, "row 2: 'score' is None"),
            ({"score": True}, "row 2: 'score' is True"),
            ({"completion": ""}, "row 2: 'completion' is empty"),
            ({"completion": None}, "row 2: 'completion' is None"),
            ({"prompt": None}, "row 2: 'prompt' is None"),
        ],
    )
    def test_a_bad_row_is_named(self, change, message):
        row = {"prompt": "p", "completion": "a", "score": 1.0}
        with pytest.raises(InputError, match=f"^mine, {message}"):
            lists_from_scored([row, {**row, **change}], "mine")


def from_pairs(*pairs):
    return lists_from_pairs({"prompt": "p", "chosen": pair[0], "rejected": pair[1]} for pair in pairs)


def ranks_of(*pairs):
    """Completions and ranks of each list, as one dict each."""
    return [dict(zip(row["completions"], row["ranks"])) for row in from_pairs(*pairs).rows]


class TestFromPairs:
    @pytest.mark.parametrize(
        "pairs, expected",
        [
            (["ab"], [{"a": 1, "b": 2}]),
            (["ab", "ac", "ad"], [{"a": 1, "b": 2, "c": 2, "d": 2}]),
            (["bc", "ab"], [{"b": 2, "c": 3, "a": 1}]),
            (["ab", "bc", "ac", "ad", "dc"], [{"a": 1, "b": 2, "c": 3, "d": 2}]),
            (["ab", "cd"], [{"a": 1, "b": 2}, {"c": 1, "d": 2}]),
            (["ab", "cd", "bd"], [{"a": 1, "b": 2, "c": 1, "d": 3}]),
            # x beats more than y does, and yet y beat x.
            (["xp", "xq", "xr", "yx"], [{"x": 2, "p": 3, "q": 3, "r": 3, "y": 1}]),
            (["ab", "ab", "ba"], [{"a": 1, "b": 2}]),
            (["ab", "bc", "ca", "cd"], [{"a": 1, "b": 1, "c": 1, "d": 2}]),
            (["ab", "ba", "bc"], [{"a": 1, "b": 1, "c": 2}]),
        ],
    )
    def test_ranks(self, pairs, expected):
        assert ranks_of(*pairs) == expected

    def test_what_is_left_out_or_repeated_is_counted(self):
        found = from_pairs("ab", "ba", "cd", "cd", "cd")
        assert (len(found.rows), found.tied, found.duplicates) == (1, 1, 2)

    def test_any_acyclic_pairs_are_kept_to(self):
        draw = random.Random(0)
        for _ in range(50):
            names = draw.sample("abcdefg", 7)
            pairs = draw.sample(["".join(pair) for pair in itertools.combinations(names, 2)], draw.randint(1, 12))
            found = {name: (i, rank) for i, ranks in enumerate(ranks_of(*pairs)) for name, rank in ranks.items()}
            assert set(found) == set("".join(pairs))
            assert all(found[a][0] == found[b][0] and found[a][1] < found[b][1] for a, b in pairs)

    def test_one_against_the_others_has_the_loss_of_its_pairs(self):
        row = add_labels(from_pairs("ab", "ac", "ad").rows[0])
        scores = torch.tensor([[0.3, -0.2, 1.1, 0.0]], dtype=torch.float64)
        pairs = -torch.nn.functional.logsigmoid(scores[0, 0] - scores[0, 1:]).sum()
        torch.testing.assert_close(list_logistic(scores, torch.tensor([row["list_labels"]]))[0], pairs)

    def test_prompts_stay_apart(self):
        rows = [{"prompt": prompt, "chosen": "a", "rejected": "b"} for prompt in ("p", "q", "p")]
        found = lists_from_pairs(rows)
        assert [row["prompt"] for row in found.rows] == ["p", "q"] and found.duplicates == 1

    @pytest.mark.parametrize(
        "change, message",
        [
            ({"rejected": "a"}, "row 2: 'chosen' and 'rejected' are equal"),
            ({"chosen": ""}, "row 2: 'chosen' is empty"),
            ({"rejected": None}, "row 2: 'rejected' is None"),
            ({"prompt": None}, "row 2: 'prompt' is None"),
        ],
    )
    def test_a_bad_row_is_named(self, change, message):
        row = {"prompt": "p", "chosen": "a", "rejected": "b"}
        with pytest.raises(InputError, match=f"^mine, {message}"):
            lists_from_pairs([row, {**row, **change}], "mine")


EXAMPLES = [
    {"prompt_ids": [1, 2], "completion_ids": [[3], [4, 5, 6]], "list_labels": [1.0, 0.0]},
    {
        "prompt_ids": [7],
        "completion_ids": [[8], [9], [10, 11]],
        "list_labels": [0.0, 0.5, 1.0],
    },
]


class TestCollator:
    def test_a_batch(self):
        batch = DataCollatorForLists(pad_token_id=0)(EXAMPLES)
        assert batch["input_ids"].tolist() == [
            [1, 2, 3, 0, 0],
            [1, 2, 4, 5, 6],
            [7, 8, 0, 0, 0],
            [7, 9, 0, 0, 0],
            [7, 10, 11, 0, 0],
        ]
        assert batch["attention_mask"].sum(1).tolist() == [3, 5, 2, 2, 3]
        assert batch["completion_mask"].tolist() == [
            [0, 0, 1, 0, 0],
            [0, 0, 1, 1, 1],
            [0, 1, 0, 0, 0],
            [0, 1, 0, 0, 0],
            [0, 1, 1, 0, 0],
        ]
        assert batch["list_mask"].tolist() == [[True, True, False], [True, True, True]]
        assert batch["list_labels"].tolist() == [[1.0, 0.0, 0.0], [0.0, 0.5, 1.0]]
        assert into_lists(torch.tensor([-1, -2, 0, -3, 1]), batch["list_mask"]).tolist() == [[-1, -2, 0], [0, -3, 1]]

    def test_cut_and_padded(self):
        start = DataCollatorForLists(pad_token_id=0, max_length=3, pad_to_multiple_of=4)(EXAMPLES)
        assert start["input_ids"][1].tolist() == [1, 2, 4, 0] and start["completion_mask"][1].tolist() == [0, 0, 1, 0]
        end = DataCollatorForLists(pad_token_id=0, max_length=4, truncation_mode="keep_end")(EXAMPLES)
        assert end["input_ids"][1].tolist() == [2, 4, 5, 6] and end["completion_mask"][1].tolist() == [0, 1, 1, 1]
        with pytest.raises(InputError, match="keep_start or keep_end, got 'middle'"):
            DataCollatorForLists(pad_token_id=0, truncation_mode="middle")

    @pytest.mark.parametrize(
        "settings", [{}, {"max_length": 4}, {"max_length": 3, "truncation_mode": "keep_end", "pad_to_multiple_of": 8}]
    )
    def test_pairs_are_those_of_trl(self, settings):
        """Lists of 2 are TRL's batch of pairs, whose first half holds the chosen ones."""
        trl = pytest.importorskip("trl.trainer.dpo_trainer")
        draw = random.Random(0)
        ids = lambda: [draw.randint(1, 9) for _ in range(draw.randint(1, 4))]  # noqa: E731
        pairs = [{"prompt_ids": ids(), "chosen_ids": ids(), "rejected_ids": ids()} for _ in range(5)]
        theirs = trl.DataCollatorForPreference(pad_token_id=0, **settings)(pairs)
        lists = [
            {
                "prompt_ids": p["prompt_ids"],
                "completion_ids": [p["chosen_ids"], p["rejected_ids"]],
                "list_labels": [1, 0],
            }
            for p in pairs
        ]
        ours = DataCollatorForLists(pad_token_id=0, **settings)(lists)
        for key, value in theirs.items():
            assert torch.equal(torch.cat([ours[key][0::2], ours[key][1::2]]), value)
