"""Lists against TRL's own pairs: the same texts must become the same tokens."""

import inspect
import json
import logging
from types import SimpleNamespace

import pytest
from datasets import Dataset
from trl import DPOConfig, DPOTrainer

from hf_delta._compat import trl_lists
from hf_delta._compat.trl_lists import prepare_lists
from hf_delta.playground.tokenizer import build_tokenizer


# Says what it is given, and shows a prompt alone with an end that no conversation has.
TEMPLATE = (
    "{%- for tool in tools or [] %}{{ tool['name'] }}|{% endfor %}{{ note or '' }}"
    "{%- for message in messages %}{{ message['role'][0] }}:{{ message['content'] }};{% endfor %}"
    "{%- if add_generation_prompt %}a:{{ thought or '' }}{% endif %}"
)


@pytest.fixture
def tokenizer():
    return build_tokenizer("abcdefghijklmnopqrstuvwxyz0123456789+|:;= ")


def user(text):
    return [{"role": "user", "content": text}]


def assistant(text):
    return [{"role": "assistant", "content": text}]


def options(tmp_path, **changes):
    return DPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none", **changes)


def of_pairs(rows, tokenizer, args):
    """What TRL makes of lists of two."""
    pairs = [{**row, "chosen": row["completions"][0], "rejected": row["completions"][1]} for row in rows]
    pairs = Dataset.from_list([{key: row[key] for key in row if key != "completions"} for row in pairs])
    found = DPOTrainer._prepare_dataset(SimpleNamespace(_tokenizer=tokenizer), pairs, tokenizer, args, "train")
    return [(row["prompt_ids"], [row["chosen_ids"], row["rejected_ids"]]) for row in found]


def of_lists(rows, tokenizer, args):
    found = prepare_lists(Dataset.from_list(rows), tokenizer, tokenizer, args, "train")
    return [(row["prompt_ids"], row["completion_ids"]) for row in found]


PLAIN = [
    {"prompt": "1+1:", "completions": ["2", "3<eos>"]},
    {"prompt": "12345678+1:", "completions": ["12345679", "no idea"]},
]
CHAT = [{"prompt": user(row["prompt"]), "completions": [assistant(t) for t in row["completions"]]} for row in PLAIN]
TOOLS = [{"name": "add"}, {"name": "see"}]


@pytest.mark.parametrize(
    "rows",
    [
        PLAIN,
        CHAT,
        [{**row, "tools": TOOLS} for row in CHAT],
        [{**row, "tools": json.dumps(TOOLS)} for row in CHAT],
        [{**row, "chat_template_kwargs": {"note": "so "}} for row in CHAT],
        [{**row, "chat_template_kwargs": {"thought": "x"}} for row in CHAT],
        [{"prompt": user("p"), "completions": [assistant("a") + user("q") + assistant("b"), assistant("c")]}],
    ],
    ids=["plain", "chat", "tools", "tools as text", "note", "thought", "turns"],
)
@pytest.mark.parametrize("changes", [{}, {"max_length": 9}, {"max_length": 9, "truncation_mode": "keep_end"}])
def test_lists_of_two_are_pairs(tmp_path, tokenizer, rows, changes):
    tokenizer.chat_template = TEMPLATE
    args = options(tmp_path, **changes)
    assert of_lists(rows, tokenizer, args) == of_pairs(rows, tokenizer, args)


def test_prompts_that_fill_the_length_are_left_out_as_their_pairs_are(tmp_path, tokenizer):
    lengths = {mode: options(tmp_path, max_length=4, truncation_mode=mode) for mode in ("keep_start", "keep_end")}
    assert [len(of_lists(PLAIN, tokenizer, args)) for args in lengths.values()] == [0, 2]
    # One more, and a token is left of each completion.
    assert len(of_lists(PLAIN, tokenizer, options(tmp_path, max_length=5))) == 1


def test_completions_start_where_any_of_them_leaves_the_prompt(tmp_path, tokenizer):
    tokenizer.chat_template = TEMPLATE
    # After the thought "x" alone, the first completion goes on as the prompt did and the second does not.
    row = {**CHAT[0], "completions": [assistant("xy"), assistant("z"), assistant("xw")]}
    row["chat_template_kwargs"] = {"thought": "x"}
    ((prompt, completions),) = of_lists([row], tokenizer, options(tmp_path))
    assert tokenizer.decode(prompt) == "u:1+1:;a:"
    assert [tokenizer.decode(ids) for ids in completions] == ["xy;", "z;", "xw;"]


def test_other_columns_stay_and_the_row_says_what_it_said(tmp_path, tokenizer):
    rows = [{**row, "list_labels": [0.0, 1.0], "sample_key": 3} for row in PLAIN]
    found = prepare_lists(Dataset.from_list(rows), tokenizer, tokenizer, options(tmp_path), "train")
    assert [{key: row[key] for key in rows[0]} for row in found] == rows
    stream = prepare_lists(
        Dataset.from_list(rows).to_iterable_dataset(), tokenizer, tokenizer, options(tmp_path), "train"
    )
    assert list(stream) == list(found)


def test_prompts_that_end_differently_are_told_of_once(tmp_path, tokenizer, caplog):
    trl_lists.logger.warning_once.cache_clear()
    tokenizer.chat_template = TEMPLATE
    with caplog.at_level(logging.WARNING, logger=trl_lists.logger.name):
        of_lists(CHAT, tokenizer, options(tmp_path))
        assert not caplog.records
        of_lists([{**row, "chat_template_kwargs": {"thought": "h"}} for row in CHAT], tokenizer, options(tmp_path))
    (record,) = caplog.records
    assert "without the end 'h' that it sees before it generates" in record.getMessage()


@pytest.mark.parametrize("function", trl_lists.SEAMS, ids=lambda function: function.__name__)
def test_signatures_are_the_recorded_ones(function):
    assert tuple(inspect.signature(function).parameters) == trl_lists.SEAMS[function]
