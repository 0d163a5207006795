"""Rows from files and the Hub: what is loaded, renamed, numbered and wrapped."""

import importlib
import json
import re

import datasets
import pytest
from datasets import Dataset

from hf_delta.data import CACHE, Source, as_conversation, check_rows, load_eval_rows, load_train_rows
from hf_delta.errors import InputError
from hf_delta.preference.lists import LIST_LOSSES
from hf_delta.preference.uses import USES, preference_use
from hf_delta.recipe.arguments import DataArguments


ROWS = [{"prompt": f"{i}+1:", "answer": str(i + 1), "level": "one"} for i in range(4)]


def write(path, rows):
    if path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        table = Dataset.from_list(rows)
        (table.to_csv if path.suffix == ".csv" else table.to_parquet)(str(path))
    return str(path)


def load(folder, trainer="grpo", rewards=(), **keys):
    return load_train_rows(DataArguments(**keys), trainer, folder / "out" / CACHE, rewards)


@pytest.mark.parametrize("suffix", ["json", "jsonl", "csv", "parquet"])
def test_formats(tmp_path, suffix):
    rows = load(tmp_path, train_file=write(tmp_path / f"rows.{suffix}", ROWS))
    assert [row["prompt"] for row in rows] == [row["prompt"] for row in ROWS]
    assert [str(row["answer"]) for row in rows] == ["1", "2", "3", "4"]


def test_files_are_joined_and_what_is_written_stays_in_the_cache_directory(tmp_path):
    files = [write(tmp_path / "a.jsonl", ROWS[:1]), write(tmp_path / "b.jsonl", ROWS[1:])]
    elsewhere = sorted(map(str, datasets.config.HF_DATASETS_CACHE.rglob("*")))
    before = sorted(tmp_path.iterdir())
    assert load(tmp_path, train_file=files)["answer"] == ["1", "2", "3", "4"]
    assert sorted(tmp_path.iterdir()) == sorted([*before, tmp_path / "out"])
    assert [path.name for path in (tmp_path / "out").iterdir()] == [CACHE]
    assert elsewhere == sorted(map(str, datasets.config.HF_DATASETS_CACHE.rglob("*")))


def test_a_changed_file_is_read_again(tmp_path):
    file = tmp_path / "rows.jsonl"
    assert load(tmp_path, train_file=write(file, ROWS))["answer"] == ["1", "2", "3", "4"]
    assert load(tmp_path, train_file=write(file, [{**ROWS[0], "answer": "changed"}]))["answer"] == ["changed"]


def test_prompt_ids_are_row_numbers_where_there_are_none(tmp_path):
    def reward(completions, **kwargs):
        return [0.0] * len(completions)

    files = [write(tmp_path / "a.jsonl", ROWS[:1]), write(tmp_path / "b.jsonl", ROWS[1:])]
    assert load(tmp_path, rewards=[reward], train_file=files)["prompt_id"] == ["0", "1", "2", "3"]
    named = [{**row, "prompt_id": f"p{i}"} for i, row in enumerate(ROWS)]
    assert load(tmp_path, rewards=[reward], train_file=write(tmp_path / "c.jsonl", named))["prompt_id"] == [
        "p0",
        "p1",
        "p2",
        "p3",
    ]


def test_columns_are_renamed_and_the_one_of_that_name_gives_way(tmp_path):
    rows = [{"prompt": "no", "question": "yes", "target": "1"}]
    mapping = {"prompt": "question", "answer": "target"}
    found = load(tmp_path, train_file=write(tmp_path / "rows.jsonl", rows), dataset_columns=mapping)
    assert found[0] == {"prompt": "yes", "answer": "1"}


def test_columns_can_change_places(tmp_path):
    file = write(tmp_path / "rows.jsonl", ROWS[:1])
    found = load(tmp_path, train_file=file, dataset_columns={"prompt": "answer", "answer": "prompt"})
    assert found[0] == {"prompt": "1", "answer": "0+1:", "level": "one"}
    assert load(tmp_path, train_file=file, dataset_columns={"prompt": "prompt"})[0] == ROWS[0]


def test_a_column_cannot_have_two_names(tmp_path):
    file = write(tmp_path / "rows.jsonl", ROWS)
    with pytest.raises(InputError, match="dataset_columns: prompt and foo are both 'answer'"):
        load(tmp_path, train_file=file, dataset_columns={"prompt": "answer", "foo": "answer"})


@pytest.mark.parametrize(("name", "text"), [("rows.csv", "prompt,answer\n"), ("rows.json", "[]")])
def test_a_header_or_brackets_without_rows(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=f"{name} has no rows"):
        load(tmp_path, train_file=str(tmp_path / name))


def test_empty_values_are_found_in_text_and_numbers(tmp_path):
    def reward(completions, answer, **kwargs):
        return [0.0] * len(completions)

    for i, answers in enumerate((["1", None], ["1", ""], [1, None])):
        rows = [{"prompt": "a", "answer": answer} for answer in answers]
        with pytest.raises(InputError, match="row 2 has no 'answer'"):
            load(tmp_path, rewards=[reward], train_file=write(tmp_path / f"{i}.jsonl", rows))


def test_text_is_checked_as_a_whole(monkeypatch):
    def refuse(source, column):
        raise AssertionError(column)

    monkeypatch.setattr("hf_delta.data.checks._check_each", refuse)
    check_rows(Source("rows", Dataset.from_list(ROWS)), ["prompt", "answer"])
    # Rows that were picked are checked, not those that lie behind them.
    picked = Dataset.from_list([{"prompt": ""}, {"prompt": "a"}, {"prompt": ""}]).select([1, 2])
    with pytest.raises(InputError, match="row 2 has no 'prompt'"):
        check_rows(Source("rows", picked), ["prompt"])


USER = {"role": "user", "content": "a"}


@pytest.mark.parametrize(
    ("trainer", "good", "changes", "said"),
    [
        ("grpo", {"prompt": 1}, {"prompt": 2}, "row 1: 'prompt' is 1, which is neither text nor a list of messages"),
        ("grpo", {"prompt": [USER]}, {"prompt": [{"rol": "user", "content": "a"}]}, "row 2: 'prompt' is"),
        ("grpo", {"prompt": [USER]}, {"prompt": [USER, {"role": "user"}]}, "row 2: 'prompt' is"),
        ("grpo", {"prompt": [USER]}, {"prompt": []}, "row 2 has no 'prompt'"),
        ("grpo", {"prompt": USER}, {}, "row 1: 'prompt' is"),
        ("grpo", {"prompt": ["a"]}, {}, "row 1: 'prompt' is"),
        ("sft", {"prompt": "a", "completion": 1.5}, {}, "row 1: 'completion' is 1.5"),
        ("dpo", {"chosen": "a", "rejected": True}, {}, "row 1: 'rejected' is True"),
        ("dpo", {"chosen": 3, "rejected": "a"}, {}, "row 1: 'chosen' is 3"),
    ],
)
def test_prompts_and_replies_are_text_or_messages(tmp_path, trainer, good, changes, said):
    file = write(tmp_path / "rows.jsonl", [good, {**good, **changes}])
    with pytest.raises(InputError) as caught:
        load(tmp_path, trainer, train_file=file)
    assert f"rows.jsonl: {said}" in str(caught.value)


def test_messages_with_images_and_tool_calls_are_messages(tmp_path):
    seen = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what?"}]}
    call = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "look"}}]}
    for i, message in enumerate((seen, call)):
        assert len(load(tmp_path, train_file=write(tmp_path / f"{i}.jsonl", [{"prompt": [USER, message]}]))) == 1


def test_first_rows_only(tmp_path):
    file = write(tmp_path / "rows.jsonl", ROWS)
    assert load(tmp_path, train_file=file, max_train_rows=2)["answer"] == ["1", "2"]
    assert len(load(tmp_path, train_file=file, max_train_rows=9)) == 4


def test_conversations():
    row = {"prompt": "p", "completion": "c", "chosen": "x", "rejected": "y", "answer": "a"}
    user, system = {"role": "user", "content": "p"}, {"role": "system", "content": "s"}
    assert as_conversation({"prompt": "p", "answer": "a"}) == {"prompt": [user]}
    assert as_conversation(row, "s") == {
        "prompt": [system, user],
        "completion": [{"role": "assistant", "content": "c"}],
        "chosen": [{"role": "assistant", "content": "x"}],
        "rejected": [{"role": "assistant", "content": "y"}],
    }
    assert as_conversation({"prompt": [user]}, "s") == {}
    said = [[{"role": "assistant", "content": text}] for text in "xy"]
    assert as_conversation({"prompt": [user], "completions": ["x", "y"]}) == {"completions": said}
    assert as_conversation({"completions": said}) == {"completions": said}


def test_conversational_rows_reach_the_trainer_as_messages(tmp_path):
    file = write(tmp_path / "rows.jsonl", ROWS)
    rows = load(tmp_path, train_file=file, prompt_style="conversational", system_prompt="Add.")
    assert rows[2]["prompt"] == [{"role": "system", "content": "Add."}, {"role": "user", "content": "2+1:"}]
    assert rows[2]["answer"] == "3"


def test_hub_datasets_are_asked_for_by_name_config_and_split(tmp_path, monkeypatch):
    asked = []

    def hub(name, config, split):
        asked.append((name, config, split))
        return Dataset.from_list(ROWS)

    monkeypatch.setattr("hf_delta.data.files.load_dataset", hub)
    args = DataArguments(dataset_name="some/where", dataset_config="en", dataset_split="train[:4]", eval_split="test")
    assert len(load_train_rows(args, "grpo", tmp_path)) == len(load_eval_rows(args, ["evaluation"], tmp_path)) == 4
    assert asked == [("some/where", "en", "train[:4]"), ("some/where", "en", "test")]


def test_a_hub_dataset_that_cannot_be_had_is_named(tmp_path):
    with pytest.raises(InputError, match=r"dataset_name: no/such-thing \(train\) cannot be loaded"):
        load(tmp_path, dataset_name="no/such-thing")


def test_evaluation_rows_are_loaded_only_for_a_use(tmp_path):
    file = write(tmp_path / "rows.jsonl", ROWS)
    args = DataArguments(train_file=file, eval_file=file)
    assert load_eval_rows(args, [], tmp_path) is None
    assert len(load_eval_rows(args, ["grpo", "evaluation"], tmp_path)) == 4
    with pytest.raises(InputError, match="trainer dpo needs prompt, chosen, rejected or chosen, rejected"):
        load_eval_rows(args, ["evaluation", "dpo"], tmp_path)


PAIR = {"prompt": "p", "chosen": "a", "rejected": "b"}
WEIGHTED = {**PAIR, "chosen_weights": [1.0, 0.5], "rejected_weights": [1.0]}
LISTED = {"prompt": "p", "completions": ["a", "b", "c"], "scores": [1, 0.5, 0.0]}


@pytest.mark.parametrize(
    ("use", "good", "changes", "said"),
    [
        ("dpo", PAIR, {"rejected": "a"}, "row 2: 'chosen' and 'rejected' are equal"),
        ("dpo", {**PAIR, "prompt": [USER]}, {}, "row 1: one of 'prompt' and 'chosen' is text and the other messages"),
        ("dpo_weights", WEIGHTED, {"chosen_weights": [1.0, -1.0]}, "row 2: 'chosen_weights[1]' is -1.0"),
        ("dpo_weights", WEIGHTED, {"rejected_weights": []}, "row 2 has no 'rejected_weights'"),
        ("dpo_weights", WEIGHTED, {"rejected": "a"}, "row 2: 'chosen' and 'rejected' are equal"),
        ("dpo_lists", LISTED, {"completions": ["a"]}, "row 2: 'completions' must be a list of 2 or more, got 1"),
        ("dpo_lists", LISTED, {"completions": []}, "row 2 has no 'completions'"),
        ("dpo_lists", LISTED, {"scores": [1.0, None, 0.0]}, "row 2: 'scores[1]' is None"),
        ("dpo_lists", LISTED, {"scores": None}, "row 2 has neither of 'scores' and 'ranks'"),
        ("dpo_labelled_lists", LISTED, {"scores": [0.0, 1.0, 1.5]}, "row 2: 'scores[2]' is 1.5; without rescaling"),
    ],
)
def test_bad_rows_of_preferences_are_named(tmp_path, use, good, changes, said):
    fine, bad = write(tmp_path / "fine.jsonl", [LISTED | WEIGHTED] * 3), [good, {**good, **changes}]
    with pytest.raises(InputError) as caught:
        load(tmp_path, use, train_file=[fine, write(tmp_path / "rows.jsonl", bad)])
    assert f"rows.jsonl, {said}" in str(caught.value) or f"rows.jsonl: {said}" in str(caught.value)


@pytest.mark.parametrize(
    ("use", "row", "said"),
    [
        ("dpo", LISTED, "trainer dpo needs prompt, chosen, rejected or chosen, rejected. Rows with completions need"),
        (
            "dpo_weights",
            LISTED,
            "weights from columns needs prompt, chosen, rejected, chosen_weights, rejected_weights or",
        ),
        ("dpo_weights", PAIR, "Map them with dataset_columns"),
        ("dpo_lists", PAIR, "a list loss needs prompt, completions. Make lists of pairs with"),
        ("dpo_labelled_lists", {"prompt": "p", "completion": "a", "score": 1.0}, "Make lists of samples with"),
        ("dpo_lists", {"prompt": "p", "answers": ["a", "b"]}, "Map them with dataset_columns"),
    ],
)
def test_rows_of_another_kind_of_loss_say_what_to_do(tmp_path, use, row, said):
    with pytest.raises(InputError) as caught:
        load(tmp_path, use, train_file=write(tmp_path / "rows.jsonl", [row]))
    assert said in str(caught.value)


def test_what_to_do_about_lists_can_be_done():
    for remedy in (remedy for use in USES.values() for remedy in use.remedies.values()):
        for path in re.findall(r"hf_delta[\w.]+", remedy):
            module, _, name = path.strip(".").rpartition(".")
            assert callable(getattr(importlib.import_module(module), name))


@pytest.mark.parametrize("loss", [*LIST_LOSSES, "sigmoid", "sparse_po", "sigmoid_norm"])
def test_losses_say_what_rows_they_take(loss):
    uses = [
        preference_use([loss], weights=weights, rescale=rescale)
        for weights in (False, True)
        for rescale in (False, True)
    ]
    if loss in LIST_LOSSES:
        assert uses == ["dpo_labelled_lists", "dpo_lists"] * 2
    else:
        assert uses == ["dpo", "dpo", "dpo_weights", "dpo_weights"]
    assert preference_use([loss, "sft"]) == preference_use([loss])


@pytest.mark.parametrize(
    ("trainer", "row"),
    [
        ("sft", {"text": "a"}),
        ("sft", {"messages": [{"role": "user", "content": "a"}]}),
        ("sft", {"prompt": "a", "completion": "b"}),
        ("dpo", {"chosen": "p a", "rejected": "p b"}),
        (
            "dpo_weights",
            {"prompt": "p", "chosen": "a", "rejected": "b", "chosen_weights": [1, 2], "rejected_weights": 0.5},
        ),
        ("dpo_weights", {"chosen": "p a", "rejected": "p b", "chosen_weights": 1, "rejected_weights": 0.5}),
        ("dpo_lists", {"prompt": "p", "completions": ["a", "b"], "scores": [3, -4]}),
        ("dpo_labelled_lists", {"prompt": "p", "completions": ["a", "b"], "ranks": [3, 1]}),
        ("grpo", {"prompt": "a"}),
    ],
)
def test_columns_that_trainers_take(tmp_path, trainer, row):
    assert load(tmp_path, trainer, train_file=write(tmp_path / "rows.jsonl", [row])).column_names == list(row)


def test_equal_pairs_are_left_out_where_a_recipe_says_so(tmp_path, caplog):
    pairs = [("a", "b"), ("c", "c"), ("d", "e"), ("f", "f")]
    rows = [{"prompt": "p:", "chosen": chosen, "rejected": rejected} for chosen, rejected in pairs]
    file = write(tmp_path / "pairs.jsonl", rows)
    with pytest.raises(InputError, match=r"row 2.*drop_equal_pairs: true"):
        load(tmp_path, "dpo", train_file=file)
    with caplog.at_level("INFO"):
        kept = load(tmp_path, "dpo", train_file=file, drop_equal_pairs=True)
    assert kept["chosen"] == ["a", "d"]
    assert "2 of 4 rows left out" in caplog.text
    with pytest.raises(InputError, match="drop_equal_pairs"):
        load(tmp_path, "grpo", train_file=write(tmp_path / "p.jsonl", [{"prompt": "p"}]), drop_equal_pairs=True)
