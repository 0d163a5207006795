"""Bad input: one clear error that says where and what to do, before anything is computed or touched.

Unknown keys and wrong types are in `test_recipe.py`, resuming another method in `test_train.py`.
"""

import importlib.metadata
import importlib.util
import json
import shutil

import pytest

import hf_delta.train
from hf_delta.checkpoint import STATE_FILE
from tests.running import LORA, keys, train, write


FIND_SPEC, VERSION = importlib.util.find_spec, importlib.metadata.version


def refusal(folder, content, capsys, *flags):
    """The one line that the command says; nothing is left behind in the output directory."""
    before = left(folder)
    capsys.readouterr()
    assert hf_delta.train.main([str(write(folder, content)), *flags]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert left(folder) == before
    return lines[0]


def left(folder):
    """Files in the folder other than the recipe and the caches."""
    return sorted(
        p for p in folder.rglob("*") if p.is_file() and "_datasets" not in p.parts and p.name != "recipe.yaml"
    )


def rows(folder, lines):
    path = folder / "rows.jsonl"
    path.write_text("".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines))
    return str(path)


GOOD = {"prompt": "1+1:", "answer": "2", "level": "add1"}


# -- data -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ([], "rows.jsonl has no rows"),
        (["\n", "  \n"], "rows.jsonl has no rows"),
        ([GOOD, {**GOOD, "prompt": None}], "rows.jsonl: row 2 has no 'prompt'"),
        ([GOOD, GOOD, {**GOOD, "prompt": ""}], "rows.jsonl: row 3 has no 'prompt'"),
        ([GOOD, {"prompt": "1+2:", "level": "add1"}], "rows.jsonl: row 2 has no 'answer'"),
        ([GOOD, {**GOOD, "answer": ""}], "rows.jsonl: row 2 has no 'answer'"),
        ([GOOD, '{"prompt": "1+\n', GOOD], "rows.jsonl:2: not valid JSON"),
        ([GOOD, GOOD, "[1]\n"], "rows.jsonl:3: a line must be a JSON object"),
        ([{"question": "1+1:", "answer": "2"}], "trainer grpo needs prompt. Map them with dataset_columns"),
        ([{"prompt": "1+1:", "target": "2"}], "playground_reward needs the column 'answer'"),
    ],
)
def test_rows(tmp_path, playground, capsys, lines, said):
    content = keys("grpo", playground, tmp_path / "out", train_file=rows(tmp_path, lines))
    assert said in refusal(tmp_path, content, capsys)


PAIR = {"prompt": "1+1:", "chosen": "2", "rejected": "3"}
WEIGHTED = {**PAIR, "chosen_weights": [1.0, 0.5], "rejected_weights": 0.5}
LISTED = {"prompt": "1+1:", "completions": ["2", "3"], "scores": [1.0, 0.0]}
COLUMNS = {"token_weights": "columns"}
LISTS = {"loss_type": "lipo_lambda"}


@pytest.mark.parametrize(
    ("changes", "good", "bad", "said"),
    [
        ({}, PAIR, {"rejected": "2"}, "rows.jsonl, row 2: 'chosen' and 'rejected' are equal; remove the row"),
        ({}, PAIR, {"chosen": ""}, "rows.jsonl: row 2 has no 'chosen'"),
        (COLUMNS, WEIGHTED, {"chosen_weights": [1.0, -1.0]}, "rows.jsonl, row 2: 'chosen_weights[1]' is -1.0"),
        (COLUMNS, WEIGHTED, {"rejected_weights": None}, "rows.jsonl: row 2 has no 'rejected_weights'"),
        (
            COLUMNS,
            WEIGHTED,
            {"chosen_weights": [1.0, 0.5, 2.0]},
            "train_dataset, row 2 (prompt '1+1:'): 'chosen_weights' has 3 numbers, and 'chosen' 2 tokens",
        ),
        (COLUMNS, PAIR, {}, "needs prompt, chosen, rejected, chosen_weights, rejected_weights"),
        (
            LISTS,
            LISTED,
            {"completions": ["2"], "scores": [1.0]},
            "rows.jsonl, row 2: 'completions' must be a list of 2",
        ),
        (LISTS, LISTED, {"scores": [1.0, None]}, "rows.jsonl, row 2: 'scores[1]' is None"),
        (LISTS, PAIR, {}, "Make lists of pairs with hf_delta.preference.list_convert.lists_from_pairs"),
        ({}, LISTED, {}, "Rows with completions need a loss_type for lists: lipo_lambda"),
    ],
)
def test_rows_of_preferences(tmp_path, playground, capsys, changes, good, bad, said):
    file = rows(tmp_path, [good, {**good, **bad}])
    assert said in refusal(tmp_path, keys("dpo", playground, tmp_path / "out", train_file=file, **changes), capsys)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"train_file": "nowhere.jsonl"}, "train_file: nowhere.jsonl does not exist"),
        ({"eval_file": "nowhere.jsonl", "evaluate_pass_at": [1]}, "eval_file: nowhere.jsonl does not exist"),
        ({"train_file": __file__}, "is none of .jsonl, .json, .csv, .parquet"),
        ({"dataset_columns": {"prompt": "promt"}}, "has no column 'promt'; did you mean 'prompt'?"),
        ({"model_name_or_path": "no/such-model"}, "model_name_or_path: no/such-model is no directory here"),
        ({"reward_funcs": ["playground_rewards"]}, "did you mean 'playground_reward'?"),
        ({"num_generations": 3}, "divisible by num_generations (3)"),
        ({"use_vllm": True}, "vllm is not installed: pip install -c constraints-vllm.txt 'hf_delta[vllm]'"),
        (
            {"load_in_4bit": True, "peft_config": LORA},
            "bitsandbytes is not installed: pip install 'hf_delta[quantization]'",
        ),
        ({"use_liger_kernel": True}, "liger_kernel is not installed: pip install liger-kernel, or leave"),
        ({"playground_task": "subtractoin"}, "subtractoin"),
    ],
)
def test_names_and_numbers(tmp_path, playground, capsys, monkeypatch, changes, said):
    find_spec = importlib.util.find_spec
    absent = ("vllm", "bitsandbytes", "liger_kernel")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name in absent else find_spec(name, *a))
    assert said in refusal(tmp_path, keys("grpo", playground, tmp_path / "out", **changes), capsys)


def test_prompts_that_fill_max_length(tmp_path, playground, capsys):
    content = keys("dpo", playground, tmp_path / "out", max_length=3)
    assert "no row is left to train on: every prompt alone has max_length (3)" in refusal(tmp_path, content, capsys)


def test_a_vllm_that_trl_does_not_support(tmp_path, playground, capsys, monkeypatch):
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: object() if name == "vllm" else FIND_SPEC(name, *a)
    )
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.33.0" if name == "vllm" else VERSION(name))
    said = refusal(tmp_path, keys("grpo", playground, tmp_path / "out", use_vllm=True), capsys)
    assert "vllm 0.33.0 is installed, and TRL 1.16 supports 0.22.0 to 0.31.0: pip install -c constraints-vllm" in said


def test_a_model_directory_without_a_model(tmp_path, playground, capsys):
    (tmp_path / "model").mkdir()
    content = keys("sft", playground, tmp_path / "out", model_name_or_path=str(tmp_path / "model"))
    assert "has no usable config.json" in refusal(tmp_path, content, capsys)


def test_json_that_is_not_lines(tmp_path, playground, capsys):
    (tmp_path / "rows.json").write_text('[{"prompt": "1",\n "answer": }]')
    content = keys("grpo", playground, tmp_path / "out", train_file=str(tmp_path / "rows.json"))
    assert "rows.json:2: not valid JSON" in refusal(tmp_path, content, capsys)


def test_bytes_that_are_no_text(tmp_path, playground, capsys):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(json.dumps(GOOD).encode() + b'\n{"prompt": "\xff\xfe", "answer": "1"}\n')
    content = keys("grpo", playground, tmp_path / "out", train_file=str(path))
    assert "rows.jsonl:2: not UTF-8 text" in refusal(tmp_path, content, capsys)


# -- rewards --------------------------------------------------------------------------------------------------------
def raises(completions, **kwargs):
    raise KeyError("level")


def not_a_number(completions, **kwargs):
    return [float("nan")] * len(completions)


def too_few(completions, **kwargs):
    return [1.0] * (len(completions) - 1)


def none_for_all(completions, **kwargs):
    return [None] * len(completions)


@pytest.mark.parametrize(
    ("reward", "said"),
    [
        (raises, "The reward function 'raises' raised KeyError: 'level'"),
        (not_a_number, "The reward function 'not_a_number' returned nan for the completion"),
        (too_few, "The reward function 'too_few' returned 3 rewards for 4 completions"),
        (none_for_all, "None of the reward functions (none_for_all) gave a score"),
    ],
)
def test_reward_functions_that_fail(tmp_path, playground, capsys, reward, said):
    content = keys("grpo", playground, tmp_path / "out", reward_funcs=[f"{__name__}.{reward.__name__}"])
    assert hf_delta.train.main([str(write(tmp_path, content))]) == 2
    assert f"error: {said}" in capsys.readouterr().err


def test_every_completion_cut_off(tmp_path, playground, capsys):
    content = keys("grpo", playground, tmp_path / "out", max_completion_length=1, mask_truncated_completions=True)
    assert hf_delta.train.main([str(write(tmp_path, content))]) == 2
    assert "Raise max_completion_length" in capsys.readouterr().err


# -- directories ----------------------------------------------------------------------------------------------------
def test_a_playground_that_was_written_half(tmp_path, playground, capsys):
    half = tmp_path / "half"
    shutil.copytree(playground, half)
    (half / "playground.json").unlink()
    content = keys("grpo", half, tmp_path / "out")
    assert "half-written" in refusal(tmp_path, content, capsys)


def test_a_directory_that_is_no_playground(tmp_path, playground, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter").write_text("dear")
    assert "mine" in refusal(tmp_path, keys("grpo", tmp_path / "mine", tmp_path / "out"), capsys)


def test_a_corrupted_state_file(tmp_path, playground, capsys):
    content = keys("grpo", playground, tmp_path / "out", save_strategy="steps", save_steps=2, loss_type="delta_l")
    out = train(tmp_path, content)
    state = out / "checkpoint-2" / STATE_FILE
    state.write_bytes(state.read_bytes()[:-7])
    assert hf_delta.train.main([str(tmp_path / "recipe.yaml"), "--resume_from_checkpoint", "--max_steps", "3"]) == 2
    assert f"{state} cannot be read" in capsys.readouterr().err
    assert json.loads((out / "trainer_state.json").read_text())["global_step"] == 2
