"""Runs from a recipe: what they write, what they can be resumed from, and what they refuse to touch."""

import json
import logging
import re
import shutil

import pytest
import torch
from datasets import load_dataset
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from hf_delta.errors import InputError
from hf_delta.evaluation import Report
from hf_delta.recipe import load_recipe
from hf_delta.run.directory import check_output_dir, clear, write_manifest
from hf_delta.train import main
from tests.running import LORA, keys, train, write


def weights(folder):
    name = "adapter_model.safetensors" if (folder / "adapter_config.json").exists() else "model.safetensors"
    return load_file(folder / name)


def assert_equal(one, other):
    assert one.keys() == other.keys() and len(one) > 0
    assert all(torch.equal(one[name], other[name]) for name in one)


def snapshot(folder):
    return {path.relative_to(folder): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def card_code(folder):
    return re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), flags=re.DOTALL).group(1)


@pytest.mark.parametrize(("trainer", "adapter"), [("sft", None), ("dpo", LORA), ("grpo", LORA)])
def test_a_run_leaves_a_result_that_loads_as_its_card_says(tmp_path, playground, monkeypatch, trainer, adapter):
    monkeypatch.chdir(tmp_path)
    world = snapshot(playground)
    rewards = {"reward_funcs": ["tests.running.length"]} if trainer == "grpo" else {}
    out = train(tmp_path, keys(trainer, playground, "out", peft_config=adapter, learning_rate=1e-2, **rewards))
    assert {path.name for path in tmp_path.iterdir()} == {"out", "recipe.yaml"}
    assert snapshot(playground) == world
    scope = {}
    exec(card_code(out), scope)
    ids = torch.tensor([scope["tokenizer"].encode("1+2:")])
    base = AutoModelForCausalLM.from_pretrained(playground / "model")
    with torch.no_grad():
        assert (scope["model"](ids).logits - base(ids).logits).abs().max() > 1e-4
    saved = weights(out)
    loaded = scope["model"].state_dict()
    assert len(saved) > 0
    for name, value in saved.items():
        found = loaded.get(name, loaded.get(re.sub(r"lora_([AB])\.", r"lora_\1.default.", name)))
        assert torch.equal(value, found), name
    assert json.loads((out / "trainer_state.json").read_text())["global_step"] == 2
    assert (out / "curves.png").stat().st_size > 0


def test_the_manifest_says_what_was_run(tmp_path, playground):
    content = keys("sft", playground, tmp_path / "out", peft_config=LORA, hub_token="secret")
    out = train(tmp_path, content, "--learning_rate", "3e-4")
    manifest = json.loads((out / "run.json").read_text())
    assert manifest["values"]["learning_rate"] == 3e-4 and manifest["values"]["trainer"] == "sft"
    assert manifest["values"]["model_name_or_path"] == str(playground / "model")
    assert manifest["method"]["peft_config.r"] == 4 and manifest["method"]["loss_type"] == "nll"
    assert manifest["versions"]["torch"] == torch.__version__ and manifest["world_size"] == 1
    assert manifest["resumed_from"] is None and "secret" not in (out / "run.json").read_text()


def test_evaluation_before_and_after(tmp_path, playground, capsys):
    rows = [json.loads(line) for line in (playground / "eval.jsonl").read_text().splitlines()]
    held_out = tmp_path / "few.jsonl"
    held_out.write_text("".join(json.dumps(row) + "\n" for row in rows[:12]))
    evaluation = {"evaluate_pass_at": [1, 2], "evaluate_samples": 3, "eval_file": str(held_out)}
    content = keys("grpo", playground, tmp_path / "out", reward_funcs=["tests.running.length"], **evaluation)
    out = train(tmp_path, content, "--learning_rate", "1e-2")
    before, after = Report.load(out / "eval_before.json"), Report.load(out / "eval_after.json")
    assert before.settings == after.settings and before.fingerprint == after.fingerprint
    assert before.settings["ks"] == [1, 2] and before.settings["samples"] == 3
    # As long as the rollouts may be.
    assert before.settings["max_new_tokens"] == 8 and before.settings["reward"] == "length"
    assert before.problems != after.problems
    table = (out / "report.md").read_text()
    assert "pass@2" in table and table.strip() in (out / "README.md").read_text()
    assert "pass@2" in capsys.readouterr().out


def test_a_supervised_run_is_judged_by_the_reward_it_names(tmp_path, playground):
    evaluation = {"evaluate_pass_at": [1], "evaluate_max_new_tokens": 4, "evaluate_reward": "playground_reward"}
    out = train(tmp_path, keys("sft", playground, tmp_path / "out", max_steps=1, **evaluation))
    assert Report.load(out / "eval_after.json").settings["max_new_tokens"] == 4
    with pytest.raises(InputError, match="needs evaluate_reward"):
        train(tmp_path, keys("sft", playground, tmp_path / "other", evaluate_pass_at=[1]))


def test_evaluation_while_training(tmp_path, playground):
    content = keys("grpo", playground, tmp_path / "out", eval_strategy="steps", eval_steps=1)
    out = train(tmp_path, content | {"eval_file": small(tmp_path, playground), "per_device_eval_batch_size": 4})
    logged = json.loads((out / "trainer_state.json").read_text())["log_history"]
    assert any("eval_reward" in row for row in logged)


def small(folder, playground, rows=4):
    path = folder / "small.jsonl"
    path.write_text("\n".join((playground / "eval.jsonl").read_text().splitlines()[:rows]))
    return str(path)


def test_prompts_become_messages_where_the_recipe_says_so(tmp_path, playground, monkeypatch):
    (tmp_path / "my_judge.py").write_text(
        "seen = []\n"
        "def reward(prompts, completions, answer, **kwargs):\n"
        "    seen.append((prompts[0], completions[0]))\n"
        "    return [float(len(c[0]['content'])) for c in completions]\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    content = keys("grpo", playground, "out", prompt_style="conversational", reward_funcs=["my_judge.reward"])
    train(tmp_path, content, "--max_steps", "1")
    import my_judge

    prompt, completion = my_judge.seen[0]
    assert [m["role"] for m in prompt] == ["user"] and prompt[0]["content"].endswith(":")
    assert [m["role"] for m in completion] == ["assistant"]


def test_a_model_can_be_loaded_quantised_under_an_adapter(tmp_path, playground):
    out = train(
        tmp_path, keys("sft", playground, tmp_path / "out", peft_config=LORA, load_in_4bit=True, dtype="float32")
    )
    assert all("lora" in name for name in weights(out))


# -- the output directory -------------------------------------------------------------------------------------------
def test_another_run_is_not_overwritten_unless_told_to(tmp_path, playground):
    content = keys("sft", playground, tmp_path / "out", max_steps=1)
    out = train(tmp_path, content)
    before = snapshot(out)
    with pytest.raises(InputError) as caught:
        train(tmp_path, content)
    for way_out in ("--resume.", "--output_dir", "--overwrite_output_dir true"):
        assert way_out in str(caught.value)
    assert snapshot(out) == before
    (out / "left-over").write_text("")
    (out / "checkpoint-7").mkdir()
    train(tmp_path, content, "--overwrite_output_dir")
    assert not (out / "left-over").exists() and not (out / "checkpoint-7").exists() and (out / "run.json").exists()


def test_a_run_that_ended_before_its_first_checkpoint_may_simply_start_again(tmp_path, playground, monkeypatch):
    (tmp_path / "broken_reward.py").write_text("def reward(completions, **kwargs):\n    raise KeyError('oops')\n")
    monkeypatch.chdir(tmp_path)
    content = keys("grpo", playground, tmp_path / "out", max_steps=1, reward_funcs=["broken_reward.reward"])
    with pytest.raises(InputError, match="'reward' raised KeyError"):
        train(tmp_path, content)
    assert not (tmp_path / "out").exists()
    good = {**content, "reward_funcs": ["playground_reward"]}
    # As a kill during the first rollouts leaves it.
    write_manifest(load(tmp_path, good), None)
    out = train(tmp_path, good)
    assert (out / "trainer_state.json").exists()


def test_a_directory_that_is_no_run_is_never_deleted(tmp_path, playground):
    out = tmp_path / "out"
    (out / "thesis").mkdir(parents=True)
    (out / "thesis" / "chapter").write_text("1")
    for flags in ([], ["--overwrite_output_dir"], ["--resume_from_checkpoint"]):
        with pytest.raises(InputError, match="thesis"):
            train(tmp_path, keys("sft", playground, out), *flags)
    assert [path.name for path in out.rglob("*")] == ["thesis", "chapter"]


def test_bad_data_deletes_nothing_even_where_overwriting_is_asked_for(tmp_path, playground):
    out = train(tmp_path, keys("sft", playground, tmp_path / "out", max_steps=1))
    before = snapshot(out)
    with pytest.raises(InputError, match="does not exist"):
        train(tmp_path, keys("sft", playground, out, train_file="missing.jsonl"), "--overwrite_output_dir")
    assert snapshot(out) == before


def test_a_run_that_is_deleted_stays_a_run_to_the_end(tmp_path, monkeypatch):
    (tmp_path / "run.json").write_text("{}")
    (tmp_path / "zoo").mkdir()

    def killed(path):
        raise KeyboardInterrupt

    monkeypatch.setattr("hf_delta.run.directory.shutil.rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        clear(tmp_path)
    assert (tmp_path / "run.json").exists()
    monkeypatch.undo()
    clear(tmp_path)
    assert not list(tmp_path.iterdir())


# -- resuming -------------------------------------------------------------------------------------------------------
CONSTANT = {"lr_scheduler_type": "constant", "learning_rate": 1e-2, "save_strategy": "steps", "save_steps": 2}


@pytest.mark.parametrize("explicit", [True, False], ids=["by path", "newest"])
def test_a_resumed_run_ends_where_a_straight_one_does(tmp_path, playground, explicit):
    content = keys("sft", playground, tmp_path / "straight", peft_config=LORA, **CONSTANT)
    straight = train(tmp_path, content, "--max_steps", "4")
    content["output_dir"] = str(tmp_path / "cut")
    out = train(tmp_path, content, "--max_steps", "2")
    checkpoint = str(out / "checkpoint-2") if explicit else "true"
    train(tmp_path, content, "--max_steps", "4", "--resume_from_checkpoint", checkpoint)
    assert_equal(weights(straight), weights(out))
    assert json.loads((out / "run.json").read_text())["resumed_from"] == str(out / "checkpoint-2")


@pytest.mark.parametrize("trainer", ["sft", "grpo"])
def test_a_finished_run_given_again_trains_no_further_step(tmp_path, playground, trainer):
    content = keys(trainer, playground, tmp_path / "out", max_steps=2, **CONSTANT)
    out = train(tmp_path, content)
    finished = weights(out)
    (out / "model.safetensors").unlink()  # as if it had been killed between its last checkpoint and the end
    for steps in ("2", "1"):
        train(tmp_path, content, "--resume_from_checkpoint", "true", "--max_steps", steps)
        assert_equal(weights(out), finished)
        assert json.loads((out / "trainer_state.json").read_text())["global_step"] == 2
    assert sorted(path.name for path in out.glob("checkpoint-*")) == ["checkpoint-2"]


def test_an_adapter_knows_its_base_from_any_directory(tmp_path, playground, monkeypatch):
    monkeypatch.chdir(playground.parent)
    content = keys("sft", playground.name, "out", max_steps=1, peft_config=LORA, output_dir=str(tmp_path / "out"))
    out = train(tmp_path, content)
    monkeypatch.chdir(tmp_path)
    assert AutoPeftModelForCausalLM.from_pretrained(out) is not None
    assert str(out.resolve()) in (out / "README.md").read_text()


def test_what_the_constructor_of_the_trainer_refuses_is_one_line(tmp_path, playground):
    wrong = {"method": "lora", "target_modules": ["nope_proj"]}
    with pytest.raises(InputError, match="recipe.yaml: .*nope_proj"):
        train(tmp_path, keys("sft", playground, tmp_path / "out", peft_config=wrong))


def test_an_output_directory_that_cannot_be_made(tmp_path, playground):
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(InputError, match="cannot be written"):
            train(tmp_path, keys("sft", playground, out))


def test_an_interrupted_run_says_how_to_go_on(monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("hf_delta.train.load_recipe", interrupted)
    assert main(["quickstart"]) == 130
    assert "The same command with --resume goes on" in capsys.readouterr().err


def test_a_run_may_go_on_in_another_directory(tmp_path, playground):
    content = keys("sft", playground, tmp_path / "first", max_steps=2, **CONSTANT)
    first = train(tmp_path, content)
    flags = ["--output_dir", str(tmp_path / "second"), "--resume_from_checkpoint", str(first / "checkpoint-2")]
    second = train(tmp_path, content, "--max_steps", "3", *flags)
    assert json.loads((second / "trainer_state.json").read_text())["global_step"] == 3


def test_a_checkpoint_that_was_cut_off_is_skipped(tmp_path, playground, caplog):
    content = keys("sft", playground, tmp_path / "out", **CONSTANT)
    out = train(tmp_path, content, "--max_steps", "2")
    shutil.copytree(out / "checkpoint-2", out / "checkpoint-4")
    (out / "checkpoint-4" / "trainer_state.json").unlink()
    with caplog.at_level(logging.WARNING, logger="hf_delta"):
        found = check_output_dir(load(tmp_path, content, "--resume_from_checkpoint"))
    assert found == str(out / "checkpoint-2") and "checkpoint-4 was cut off" in caplog.text
    with pytest.raises(InputError, match="checkpoint-4 was not written to its end"):
        check_output_dir(load(tmp_path, content, "--resume_from_checkpoint", str(out / "checkpoint-4")))


def load(folder, content, *flags):
    return load_recipe(str(write(folder, content)), flags)


def test_resuming_where_there_is_nothing_yet_starts(tmp_path, playground, caplog):
    content = keys("sft", playground, tmp_path / "out")
    with caplog.at_level(logging.WARNING, logger="hf_delta"):
        assert check_output_dir(load(tmp_path, content, "--resume_from_checkpoint")) is None
    assert "starts from the beginning" in caplog.text


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"trainer": "dpo", "loss_type": None}, "trainer is 'sft' there and 'dpo' here"),
        ({"loss_type": "dft"}, "loss_type is 'nll' there and 'dft' here"),
        ({"peft_config": {"method": "miss", "r": 4}}, "peft_config.method is 'lora' there and 'miss' here"),
        ({"peft_config": {**LORA, "r": 8}}, "peft_config.r is 4 there and 8 here"),
        ({"peft_config": None}, "peft_config.method is 'lora' there and None here"),
        ({"model_name_or_path": "gpt2"}, "model_name_or_path"),
    ],
)
def test_a_run_of_another_method_is_not_taken_up(tmp_path, playground, changes, key):
    content = keys("sft", playground, tmp_path / "out", peft_config=LORA)
    write_manifest(load(tmp_path, content), None)
    with pytest.raises(InputError) as caught:
        check_output_dir(
            load(
                tmp_path,
                {k: v for k, v in {**content, **changes}.items() if v is not None},
                "--resume_from_checkpoint",
            )
        )
    assert key in str(caught.value) and "belongs to another method" in str(caught.value)
    same = {**content, "learning_rate": 1.0, "max_steps": 7}
    assert check_output_dir(load(tmp_path, same, "--resume_from_checkpoint")) is None


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "is damaged"),
        ("[]", "is damaged"),
        ('{"format_version": 99, "method": {}, "hf_delta": "9"}', "another version of hf_delta, 9"),
    ],
)
def test_a_manifest_that_cannot_be_read(tmp_path, playground, text, said):
    content = keys("sft", playground, tmp_path / "out")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "run.json").write_text(text)
    with pytest.raises(InputError, match=said):
        check_output_dir(load(tmp_path, content, "--resume_from_checkpoint"))


def test_resuming_and_overwriting_exclude_each_other(tmp_path, playground):
    with pytest.raises(InputError, match="exclude each other"):
        check_output_dir(
            load(
                tmp_path,
                keys("sft", playground, tmp_path / "out"),
                "--resume_from_checkpoint",
                "--overwrite_output_dir",
            )
        )


def test_train_rows_are_what_the_trainer_gets(tmp_path, playground, monkeypatch):
    import trl

    seen = {}
    original = trl.SFTTrainer.__init__

    def spy(self, *args, **kwargs):
        seen.update(kwargs)
        original(self, *args, **kwargs)

    monkeypatch.setattr(trl.SFTTrainer, "__init__", spy)
    train(tmp_path, keys("sft", playground, tmp_path / "out", max_steps=1, max_train_rows=9, model_revision="main"))
    expected = load_dataset(
        "json", data_files=str(playground / "sft.jsonl"), split="train[:9]", cache_dir=str(tmp_path / "c")
    )
    assert seen["train_dataset"].to_list() == expected.to_list()
    assert seen["args"].model_init_kwargs == {"revision": "main", "attn_implementation": None, "dtype": "float32"}
