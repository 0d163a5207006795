"""What is in the directory, that it is the same every time, and what happens to directories that are not one."""

import json
import os
import random
from collections import Counter
from zlib import crc32

import numpy as np
import pytest
import torch
from datasets import load_dataset
from transformers.utils.logging import is_progress_bar_enabled

from hf_delta.errors import InputError
from hf_delta.playground import build, build_playground
from hf_delta.playground.rewards import playground_reward
from tests.playground.helpers import file_bytes, read_rows


COLUMNS = {
    "train.jsonl": ["prompt", "answer", "level", "prompt_id"],
    "eval.jsonl": ["prompt", "answer", "level", "prompt_id"],
    "sft.jsonl": ["prompt", "completion", "level", "prompt_id"],
    "preference.jsonl": ["prompt", "chosen", "rejected", "level", "prompt_id"],
    "weighted.jsonl": ["prompt", "chosen", "rejected", "chosen_weights", "rejected_weights", "level", "prompt_id"],
    "lists.jsonl": ["prompt", "completions", "scores", "level", "prompt_id"],
}
LEVELS = [f"add{digits}" for digits in range(1, 7)]


def total(prompt):
    left, right = prompt.removesuffix(":").split("+")
    return str(int(left) + int(right))


@pytest.mark.parametrize("name", COLUMNS)
def test_files_load_with_datasets(playground, tmp_path, name):
    dataset = load_dataset("json", data_files=str(playground / name), split="train", cache_dir=str(tmp_path))
    assert dataset.column_names == COLUMNS[name]
    assert len(dataset) == json.loads((playground / "playground.json").read_text())["rows"][name]
    for row in dataset:
        assert row["prompt_id"] == f"addition/{row['level']}/{row['prompt'].removesuffix(':')}"
        assert row["level"] == f"add{row['prompt'].index('+')}"


def test_answers_and_levels(playground):
    train, evaluation = read_rows(playground / "train.jsonl"), read_rows(playground / "eval.jsonl")
    assert all(row["answer"] == total(row["prompt"]) for row in train + evaluation)
    assert Counter(row["level"] for row in train) == dict.fromkeys(LEVELS, 512)
    # Of the 100 problems of add1, 16 are held out.
    assert Counter(row["level"] for row in evaluation) == {"add1": 16, **dict.fromkeys(LEVELS[1:], 48)}
    assert len({row["prompt_id"] for row in evaluation}) == len(evaluation)
    # Any short stretch of the training file has every level.
    assert {row["level"] for row in train[:64]} == set(LEVELS)


def test_demonstrations_are_right_and_rejected_answers_wrong(playground):
    demonstrated, preferences = read_rows(playground / "sft.jsonl"), read_rows(playground / "preference.jsonl")
    for rows, column, reward in (
        (demonstrated, "completion", 1.0),
        (preferences, "chosen", 1.0),
        (preferences, "rejected", 0.0),
    ):
        rewards = playground_reward([row[column] for row in rows], [total(row["prompt"]) for row in rows])
        assert rewards == [reward] * len(rows)
    assert set(LEVELS) == {row["level"] for row in demonstrated} == {row["level"] for row in preferences}


def test_tokens_of_the_working_weigh_half(playground):
    # A character is a token, and one more ends the response.
    pairs, rows = read_rows(playground / "preference.jsonl"), read_rows(playground / "weighted.jsonl")
    assert len(rows) == len(pairs) and all(pair.items() <= row.items() for pair, row in zip(pairs, rows))
    for row in rows:
        working, answer = row["chosen"].split("#")
        assert row["chosen_weights"] == [0.5] * len(working) + [1.0] * (len(answer) + 2)
        assert row["rejected_weights"] == [1.0] * (len(row["rejected"]) + 1)


def test_lists_go_from_right_to_far_off(playground):
    pairs, lists = read_rows(playground / "preference.jsonl"), read_rows(playground / "lists.jsonl")
    assert [row["prompt_id"] for row in lists] == [row["prompt_id"] for row in pairs]
    places = Counter()
    for pair, row in zip(pairs, lists):
        scored = dict(zip(row["completions"], row["scores"]))
        working, answer = pair["chosen"].split("#")
        assert len(scored) == len(row["completions"]) == 4
        assert scored.pop(pair["chosen"]) == 1.0
        assert scored.pop(pair["rejected"]) < 1.0
        slips = {}
        for completion, score in scored.items():
            assert completion.startswith(f"{working}#") and score < 1.0
            slips[sum(a != b for a, b in zip(completion.partition("#")[2], answer, strict=True))] = score
        assert slips.keys() == {1, len(answer)}
        assert slips[len(answer)] == 0.0
        places[row["completions"].index(pair["chosen"])] += 1
    # Where the right one stands says nothing.
    assert min(places.values()) > len(lists) / 8 and len(places) == 4


def test_held_out_problems_are_in_the_evaluation_file_only(playground):
    prompts = {name: {row["prompt"] for row in read_rows(playground / name)} for name in COLUMNS}
    evaluation = prompts.pop("eval.jsonl")
    for name, others in prompts.items():
        assert not evaluation & others, name
        assert all(crc32(prompt.removesuffix(":").encode()) % 5 for prompt in others)
    assert not any(crc32(prompt.removesuffix(":").encode()) % 5 for prompt in evaluation)


def test_a_tilde_is_the_home_directory(playground, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(playground.parent))
    monkeypatch.chdir(tmp_path)
    steps = json.loads((playground / "playground.json").read_text())["pretrain_steps"]
    assert build_playground(f"~/{playground.name}", pretrain_steps=steps) == playground
    assert not list(tmp_path.iterdir())


@pytest.fixture
def two_threads():
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


def test_same_seed_same_bytes_whatever_the_process_did_before(playground, tmp_path, two_threads):
    random.seed(1)
    torch.manual_seed(1)
    again = build_playground(tmp_path / "again", pretrain_steps=20, progress=False)
    expected, found = file_bytes(playground), file_bytes(again)
    assert expected.keys() == found.keys()
    assert [name for name in expected if expected[name] != found[name]] == []


def test_another_seed_gives_another_model_and_other_problems(playground, tmp_path):
    other = build_playground(tmp_path / "other", seed=1, pretrain_steps=20, progress=False)
    expected, found = file_bytes(playground), file_bytes(other)
    same = {name for name in expected if expected[name] == found[name]}
    assert not same & {"model/model.safetensors", *COLUMNS}
    # The split is a property of the problem: no evaluation problem of one seed is a training problem of another.
    assert not {row["prompt"] for row in read_rows(playground / "eval.jsonl")} & {
        row["prompt"] for row in read_rows(other / "train.jsonl")
    }


def test_state_of_the_process_is_left_alone_and_nothing_is_printed(tmp_path, capfd, two_threads):
    python, numpy_, torch_ = random.getstate(), np.random.get_state(), torch.get_rng_state()
    build_playground(tmp_path / "out", pretrain_steps=2, progress=False)
    assert random.getstate() == python
    assert str(np.random.get_state()) == str(numpy_)
    assert torch.equal(torch.get_rng_state(), torch_)
    assert torch.get_num_threads() == 2
    assert is_progress_bar_enabled()
    assert sorted(os.listdir(tmp_path)) == ["out"]
    assert capfd.readouterr() == ("", "")


def test_pretraining_uses_one_thread(tmp_path, monkeypatch, two_threads):
    used = []
    monkeypatch.setattr(build, "pretrain", lambda *args, **kwargs: used.append(torch.get_num_threads()))
    build_playground(tmp_path / "out", pretrain_steps=2, progress=False)
    assert used == [1]


def test_progress_is_shown_on_the_error_stream(tmp_path, capfd):
    build_playground(tmp_path / "out", pretrain_steps=2)
    shown = capfd.readouterr()
    assert shown.out == ""
    assert "Pre-training the base model: 100%" in shown.err
    assert "2/2" in shown.err


def test_a_finished_playground_is_returned_as_it_is(playground, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("built again")

    monkeypatch.setattr(build, "pretrain", refuse)
    before = {path: path.stat().st_mtime_ns for path in playground.rglob("*")}
    assert build_playground(str(playground), pretrain_steps=20, progress=False) == playground
    assert {path: path.stat().st_mtime_ns for path in playground.rglob("*")} == before


def test_an_interrupted_build_leaves_nothing_in_the_way(tmp_path, monkeypatch):
    out = tmp_path / "out"

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(build, "pretrain", interrupt)
        with pytest.raises(KeyboardInterrupt):
            build_playground(out, pretrain_steps=2, progress=False)
    assert not out.exists()
    (tmp_path / ".out.unfinished" / "left_over").write_text("from a build that was killed")
    build_playground(out, pretrain_steps=2, progress=False)
    assert not (out / "left_over").exists()
    assert sorted(os.listdir(tmp_path)) == ["out"]


def test_an_empty_directory_is_filled(tmp_path):
    (tmp_path / "out").mkdir()
    assert (build_playground(tmp_path / "out", pretrain_steps=2, progress=False) / "playground.json").is_file()


def without_manifest(out):
    (out / "playground.json").unlink()


def without_weights(out):
    (out / "model" / "model.safetensors").unlink()


def cut_short(out):
    content = (out / "train.jsonl").read_bytes()
    (out / "train.jsonl").write_bytes(content[: len(content) // 2])


def foreign(out):
    for path in sorted(out.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    (out / "thesis.txt").write_text("do not touch")


def broken_manifest(out):
    (out / "playground.json").write_text('{"seed": 0')


def manifest_of_something_else(out):
    (out / "playground.json").write_text('{"name": "a swing and a slide"}')


def newer_format(out):
    manifest = json.loads((out / "playground.json").read_text())
    (out / "playground.json").write_text(json.dumps({**manifest, "format_version": 3}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (without_manifest, "half-written.*no playground.json"),
        (without_weights, "half-written.*model/model.safetensors is missing"),
        (cut_short, "train.jsonl is not the file that was built"),
        (foreign, "something other than a playground"),
        (broken_manifest, "not the manifest"),
        (manifest_of_something_else, "not the manifest.*format_version"),
        (newer_format, "format_version 3, not 2"),
    ],
)
def test_a_directory_that_is_not_this_playground_is_refused_and_kept(playground, tmp_path, damage, message):
    out = tmp_path / "out"
    for name, content in file_bytes(playground).items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_bytes(content)
    damage(out)
    before = file_bytes(out)
    with pytest.raises(InputError, match=message) as error:
        build_playground(out, pretrain_steps=20, progress=False)
    assert str(out) in str(error.value)
    assert "Delete it" in str(error.value)
    assert file_bytes(out) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seed": 1}, "seed 0, not 1"),
        ({"pretrain_steps": 21}, "pretrain_steps 20, not 21"),
        ({"pretrain_steps": None}, "pretrain_steps 20, not 750"),
        ({"task": "tests.playground.test_tasks.Reversal"}, "task 'addition'"),
    ],
)
def test_another_playground_is_not_overwritten(playground, arguments, message):
    with pytest.raises(InputError, match=message):
        build_playground(playground, **{"pretrain_steps": 20, "progress": False, **arguments})


def test_places_and_numbers_that_cannot_be_used(tmp_path):
    (tmp_path / "file").write_text("")
    for out, arguments, message in (
        ("file", {}, "is a file"),
        ("file/below", {}, "cannot be written"),
        ("out", {"pretrain_steps": 0}, "at least 1"),
        ("out", {"seed": -1}, "must lie in"),
    ):
        with pytest.raises(InputError, match=message):
            build_playground(tmp_path / out, progress=False, **arguments)
    assert os.listdir(tmp_path) == ["file"]
