"""Snapshots of token weights: what is written, kept, and read again."""

import json
import logging
import math
import os

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hf_delta.errors import InputError
from hf_delta.playground.tokenizer import build_tokenizer
from hf_delta.preference.snapshots import (
    Example,
    Snapshot,
    TokenSnapshots,
    examples_of,
    prompt_texts,
    read_snapshots,
    token_texts,
)


EXAMPLE = Example("2+2=", "chosen", 0, ["4", "\ud800\n"], [0.5, None], [1, 0.0])


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run" / "token_weights.json"


def steps(path):
    return [snapshot["step"] for snapshot in json.loads(path.read_text())["snapshots"]]


def test_the_format(path):
    snapshots = TokenSnapshots(path, "sparse_po")
    snapshots.add(10, [EXAMPLE])
    assert json.loads(path.read_text()) == {
        "format": "hf_delta.token_weights",
        "version": 1,
        "rule": "sparse_po",
        "snapshots": [
            {
                "step": 10,
                "examples": [
                    {
                        "prompt": "2+2=",
                        "side": "chosen",
                        "pair": 0,
                        "tokens": ["4", "\ud800\n"],
                        "reward": [0.5, None],
                        "kl": [1, 0.0],
                    }
                ],
            }
        ],
    }
    assert read_snapshots(path) == ("sparse_po", [Snapshot(10, [EXAMPLE])])
    assert os.listdir(path.parent) == ["token_weights.json"]


def test_a_step_replaces_itself(path):
    snapshots = TokenSnapshots(path, "mapo")
    for step, prompt in ((5, "a"), (10, "b"), (5, "c")):
        snapshots.add(step, [Example(prompt, "rejected", 0, ["x"], [1.0])])
    found = read_snapshots(path)[1]
    assert [(snapshot.step, snapshot.examples[0].prompt) for snapshot in found] == [(5, "c"), (10, "b")]


@pytest.mark.parametrize(("limit", "count"), [(2, 7), (5, 5), (8, 100), (50, 1000)])
def test_snapshots_are_thinned_out_evenly(path, monkeypatch, limit, count):
    snapshots = TokenSnapshots(path, "mapo", limit=limit)
    monkeypatch.setattr(TokenSnapshots, "_write", lambda self: None)
    for step in range(10, 10 * count + 1, 10):
        snapshots.add(step, [EXAMPLE])
        found = [snapshot.step for snapshot in snapshots.snapshots]
        assert len(found) == min(limit, step // 10)
        assert found[0] == 10 and found[-1] == step and found == sorted(set(found))
        gaps = [later - earlier for earlier, later in zip(found, found[1:])]
        # The last may have come just now; the others are of two sizes at most, and one being merged.
        assert len(gaps) < 3 or max(gaps[:-1]) <= 4 * min(gaps[:-1])


def test_going_on(path, caplog):
    first = TokenSnapshots(path, "mapo")
    for step in (5, 10, 15, 20):
        first.add(step, [EXAMPLE])
    again = TokenSnapshots(path, "mapo", resumed_step=10)
    assert steps(path) == [5, 10, 15, 20]
    again.add(12, [EXAMPLE])
    assert steps(path) == [5, 10, 12]
    assert not caplog.records and os.listdir(path.parent) == ["token_weights.json"]


@pytest.mark.parametrize(
    ("before", "rule", "resumed", "reason"),
    [
        ("own", "mapo", 0, "of an older training"),
        ("own", "sparse_po", 10, "those of mapo, not of sparse_po"),
        ('{"format": "hf_delta.tok', "mapo", 10, "cannot be read"),
        ('{"snapshots": []}', "mapo", 10, "holds no token weights"),
    ],
)
def test_nothing_is_overwritten(path, caplog, before, rule, resumed, reason):
    if before == "own":
        TokenSnapshots(path, "mapo").add(5, [EXAMPLE])
    else:
        path.parent.mkdir()
        path.write_text(before)
    old = path.read_text()
    path.with_name("token_weights.old-1.json").write_text("older")
    with caplog.at_level(logging.WARNING):
        TokenSnapshots(path, rule, resumed_step=resumed).add(11, [EXAMPLE])
    assert reason in caplog.text and "token_weights.old-2.json" in caplog.text
    assert steps(path) == [11]
    assert path.with_name("token_weights.old-1.json").read_text() == "older"
    assert path.with_name("token_weights.old-2.json").read_text() == old


def test_a_training_goes_on_without_them(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    TokenSnapshots(tmp_path / "file" / "token_weights.json", "mapo").add(3, [EXAMPLE])
    assert "step 3 were not written" in caplog.text


def test_a_reader_never_sees_half(path, monkeypatch):
    snapshots = TokenSnapshots(path, "mapo")
    snapshots.add(1, [EXAMPLE])
    whole = path.read_text()

    def cut(partial, target):
        assert path.read_text() == whole and str(target) == str(path)
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", cut)
    snapshots.add(2, [EXAMPLE])
    assert path.read_text() == whole


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "other"}, "holds no token weights of hf_delta"),
        ({"version": 2}, "has format version 2, and this hf_delta reads 1"),
        ({"snapshots": [{"step": 1}]}, "is damaged"),
        ({"rule": None, "snapshots": 3}, "is damaged"),
        ({"side": "left"}, "is damaged.*left"),
        ({"reward": [1.0]}, "is damaged.*1 weights for 2 tokens"),
        ({"kl": [1.0, 2.0, 3.0]}, "is damaged.*3 weights for 2 tokens"),
        ({"reward": ["1", 2]}, "is damaged.*no number"),
        ({"reward": None}, "is damaged"),
        ({"tokens": [1, 2]}, "is damaged.*no text"),
        ({"prompt": 1}, "is damaged.*no text"),
        ({"more": 1}, "is damaged.*more"),
    ],
)
def test_a_damaged_file(path, change, message):
    TokenSnapshots(path, "mapo").add(1, [EXAMPLE])
    content = json.loads(path.read_text())
    place = content if change.keys() <= content.keys() else content["snapshots"][0]["examples"][0]
    place.update(change)
    path.write_text(json.dumps(content))
    with pytest.raises(InputError, match=f"{path} {message}.*Move it out of the directory"):
        read_snapshots(path)


@pytest.mark.parametrize("text", ["", "[1, 2]", "\x80"])
def test_a_foreign_file(tmp_path, text):
    path = tmp_path / "token_weights.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(InputError, match="Move it out of the directory"):
        read_snapshots(path)


def test_the_limit(path):
    with pytest.raises(InputError, match="at least 2"):
        TokenSnapshots(path, "mapo", limit=1)


def batch():
    """Three pairs, padded on the left and on the right."""
    tokenizer = build_tokenizer("0123456789+=")
    texts = ["1+1=|2", "<pad>20+3=|23", "3=|3", "1+1=|34", "<pad>20+3=|9", "3=|333"]
    rows = [[tokenizer(part)["input_ids"] for part in text.split("|")] for text in texts]
    rows = [(prompt, [*completion, tokenizer.eos_token_id]) for prompt, completion in rows]
    length = max(len(prompt) + len(completion) for prompt, completion in rows)
    ids, mask = torch.zeros(2, 6, length, dtype=torch.long)
    for row, (prompt, completion) in enumerate(rows):
        ids[row, : len(prompt) + len(completion)] = torch.tensor(prompt + completion)
        mask[row, len(prompt) : len(prompt) + len(completion)] = 1
    return tokenizer, ids, mask


def test_examples_of_a_batch():
    tokenizer, ids, mask = batch()
    reward = torch.arange(ids.numel()).reshape(ids.shape) / 7
    reward[0, 4] = math.nan
    prompts = prompt_texts(ids, mask, tokenizer)
    assert prompts == ["1+1=", "20+3="]
    examples = examples_of(ids[:, 1:], mask[:, 1:].bool(), reward[:, 1:], 2 * reward[:, 1:], tokenizer, prompts)
    assert [(e.pair, e.side, e.prompt, e.tokens) for e in examples] == [
        (0, "chosen", "1+1=", ["2", "<eos>"]),
        (0, "rejected", "1+1=", ["3", "4", "<eos>"]),
        (1, "chosen", "20+3=", ["2", "3", "<eos>"]),
        (1, "rejected", "20+3=", ["9", "<eos>"]),
    ]
    assert examples[0].reward == [None, pytest.approx(5 / 7, abs=1e-5)]
    for row, example in zip((0, 3, 1, 4), examples):
        assert example.reward[1:] == pytest.approx(reward[row][mask[row] == 1][1:].tolist(), rel=1e-5)
        assert example.kl[1:] == pytest.approx([2 * weight for weight in example.reward[1:]], rel=1e-5)
    one = examples_of(ids, mask, reward, None, tokenizer, ["x" * 5000], pairs=1)
    assert [example.kl for example in one] == [None, None]
    assert len(one[0].prompt) == 1000 and one[0].prompt.startswith("…x")


def test_long_completions_are_cut():
    tokenizer, length = build_tokenizer("0123456789"), 700
    ids, ones = torch.full((2, length), 5), torch.ones(2, length)
    places = torch.arange(length).expand(2, -1) / 8
    (chosen, _) = examples_of(ids, ones, places, ones, tokenizer, ["p"])
    assert len(chosen.tokens) == len(chosen.reward) == len(chosen.kl) == 512
    assert chosen.reward[:2] == [0.0, 0.125]


def byte_tokenizer():
    """One token for each byte, as the rarest characters have in every byte-level tokenizer."""
    vocabulary = {char: index for index, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=True)


def word_tokenizer():
    """Words that begin with a mark for the space before them, which decoding drops at the very beginning."""
    tokenizer = Tokenizer(models.WordLevel({"▁to": 0, "▁be": 1, "▁.": 2}, unk_token="▁."))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁")
    tokenizer.decoder = decoders.Metaspace(replacement="▁")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def test_texts_of_tokens():
    tokenizer = byte_tokenizer()
    assert token_texts(tokenizer, tokenizer("a b .")["input_ids"]) == ["a", " ", "b", " ", "."]
    # Parts of a character: as many texts as tokens, and nothing twice.
    texts = token_texts(tokenizer, tokenizer("aé")["input_ids"])
    assert len(texts) == 3 and texts[0] == "a" and all("\ufffd" in text or text == "é" for text in texts[1:])
    tokenizer = word_tokenizer()
    assert token_texts(tokenizer, [0, 1, 2, 0, 1, 1, 0]) == ["to", " be", " .", " to", " be", " be", " to"]
    assert token_texts(tokenizer, []) == []
