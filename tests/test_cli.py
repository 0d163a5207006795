"""The commands: what they print, how they fail, and what they leave alone."""

import json
import resource
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

import hf_delta.train
from hf_delta.cli import main
from hf_delta.errors import InputError
from hf_delta.evaluation import Report
from hf_delta.run.console import fail
from hf_delta.run.processes import naming_the_process
from tests.running import keys, write


def test_help_and_lists_import_no_framework():
    heavy = "('torch', 'transformers', 'trl', 'peft', 'datasets', 'accelerate')"
    code = (
        "import sys, hf_delta.cli\n"
        "for argv in (['recipes'], ['--help'], ['run', '--help'], ['--version']):\n"
        "    try: hf_delta.cli.main(argv)\n"
        "    except SystemExit as end: assert end.code == 0\n"
        f"print([m for m in {heavy} if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.splitlines()[-1] == "[]"


def test_help_after_a_recipe_is_help(capsys):
    for word in ("--help", "-h"):
        assert main(["run", "quickstart", word]) == 0
        assert "hf-delta keys RECIPE" in capsys.readouterr().out


def test_recipes_are_listed_with_one_line_each(capsys):
    assert main(["recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    named = {line.split()[0]: line for line in lines if line}
    assert "Supervised fine-tuning" in named["sft/sft"] and "on the playground" in named["rl/delta_l_tiny"]
    assert "accelerate_configs" in lines[-1]


def test_keys_are_listed_with_type_default_and_meaning(capsys):
    assert main(["keys", "dpo"]) == 0
    out = capsys.readouterr().out
    assert "  beta: a number; 0.1" in out and "  train_file: text or a list of texts or null" in out
    assert main(["keys", "dpoo"]) == 2
    assert "no recipe of that name" in capsys.readouterr().err


def test_both_commands_run_the_same_recipe(tmp_path, playground, monkeypatch):
    seen = []
    monkeypatch.setattr(hf_delta.train, "run", seen.append)
    path = str(write(tmp_path, keys("sft", playground, tmp_path / "out")))
    flags = ["--learning-rate", "1e-3", "--peft_config.method", "lora"]
    assert main(["run", path, *flags]) == 0
    assert hf_delta.train.main([path, *flags]) == 0
    assert seen[0].values == seen[1].values and seen[0].values["learning_rate"] == 1e-3
    assert seen[0].training.to_dict() == seen[1].training.to_dict() and seen[0].peft == seen[1].peft


def test_bad_input_is_one_line_and_status_2(tmp_path):
    path = write(tmp_path, "trainer: sft\nlerning_rate: 1\n")
    for command in (["-m", "hf_delta.cli", "run", str(path)], ["-m", "hf_delta.train", str(path)]):
        found = subprocess.run([sys.executable, *command], capture_output=True, text=True)
        assert found.returncode == 2 and "Traceback" not in found.stderr
        assert found.stderr.splitlines()[-1].startswith(f"error: {path}:2: unknown key 'lerning_rate'")


class Killed(Exception):
    """By the launcher, because another process has ended."""


def test_one_process_of_a_launch_speaks(monkeypatch, capsys):
    def killed(seconds):
        raise Killed

    monkeypatch.setattr("time.sleep", killed)
    monkeypatch.setenv("RANK", "0")
    assert hf_delta.train.main(["no-such-recipe"]) == 2
    assert capsys.readouterr().err.startswith("error: no-such-recipe")
    # The main process may be slower, and must not be killed before it has spoken because another one has ended.
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(Killed):
        hf_delta.train.main(["no-such-recipe"])
    assert not capsys.readouterr().err


def test_a_process_that_nobody_ends_met_something_of_its_own(monkeypatch, capsys):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    monkeypatch.setenv("RANK", "1")
    assert hf_delta.train.main(["no-such-recipe"]) == 2
    assert capsys.readouterr().err.startswith("error: process 1: no-such-recipe")


def test_what_only_one_process_knows_that_process_says(monkeypatch, capsys):
    class SecondOfTwo:
        num_processes, process_index = 2, 1

    monkeypatch.setattr("hf_delta.run.processes.PartialState", SecondOfTwo)
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(InputError) as caught, naming_the_process():
        raise InputError("row 7 is bad")
    assert fail(caught.value) == 2
    assert capsys.readouterr().err == "error: process 1: row 7 is bad\n"


def test_a_run_needs_a_recipe(capsys):
    assert hf_delta.train.main([]) == 2
    assert hf_delta.train.main(["--max_steps", "2"]) == 2
    assert "the first argument is a recipe" in capsys.readouterr().err


def test_eval_writes_a_report_and_a_table(tmp_path, playground, capsys):
    out = tmp_path / "report.json"
    rows = [json.loads(line) for line in (playground / "eval.jsonl").read_text().splitlines()]
    few = write_rows(tmp_path, [row for row in rows if row["level"] in ("add1", "add2")][:20])
    command = ["eval", "--model", str(playground / "model"), "--data", str(few), "--k", "1", "2", "--samples", "3"]
    assert main([*command, "--max-new-tokens", "8", "--out", str(out)]) == 0
    report = Report.load(out)
    assert report.settings["ks"] == [1, 2] and report.settings["samples"] == 3
    assert len(report.problems) == 20
    printed = capsys.readouterr().out
    assert "pass@2" in printed and "add1" in printed and str(out) in printed
    written = out.read_bytes()
    assert main([*command, "--out", str(out)]) == 2
    assert "exists" in capsys.readouterr().err and out.read_bytes() == written


def test_eval_says_where_a_report_goes_by_itself(tmp_path, capsys):
    assert main(["eval", "--model", "some/model", "--data", "x"]) == 2
    assert "--out: some/model is no directory here" in capsys.readouterr().err
    (tmp_path / "eval.json").write_text("{}")
    assert main(["eval", "--model", str(tmp_path), "--data", "x"]) == 2
    assert f"{tmp_path / 'eval.json'} exists" in capsys.readouterr().err


def test_plot(tmp_path, capsys):
    log = [{"step": step, "loss": 1.0 / step} for step in (1, 2, 3)]
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": log}))
    assert main(["plot", str(tmp_path)]) == 0
    assert (tmp_path / "curves.png").stat().st_size > 0
    assert main(["plot", str(tmp_path / "nothing")]) == 2
    assert "error: " in capsys.readouterr().err


def test_playground_is_built_once_and_another_one_is_refused(playground, capsys):
    # The fixture was pre-trained for fewer steps than the command takes.
    assert main(["playground", "--out", str(playground)]) == 2
    assert "pretrain_steps" in capsys.readouterr().err


@pytest.mark.slow
def test_playground(tmp_path, capsys):
    out = tmp_path / "world"
    assert main(["playground", "--out", str(out), "--seed", "3"]) == 0
    assert str(out) in capsys.readouterr().out and json.loads((out / "playground.json").read_text())["seed"] == 3
    assert main(["playground", "--out", str(out), "--seed", "4"]) == 2


def write_rows(folder, rows):
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("command", [["recipes"], ["run", "quickstart"]], ids=" ".join)
def test_a_command_that_is_interrupted_says_so(monkeypatch, capsys, command):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("hf_delta.recipe.find.list_recipes", interrupted)
    # In the middle of an import, too.
    monkeypatch.setitem(sys.modules, "hf_delta.train", None)
    monkeypatch.setattr("builtins.__import__", interrupting(interrupted, "hf_delta.train"))
    assert main(command) == 130
    assert capsys.readouterr().err == "Interrupted.\n"


def interrupting(interrupted, name):
    imports = __import__
    return lambda module, *rest: interrupted() if module == name else imports(module, *rest)


def test_a_disk_without_room_is_one_line(tmp_path, capsys):
    adapter = small_adapter(tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        status = main(["export", "--adapter", str(adapter), "--format", "lora", "--out", str(tmp_path / "lora")])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    said = capsys.readouterr().err.splitlines()[-1]
    assert (
        status == 1 and "there is no room on the disk" in said and said.endswith("Make room; give the command again.")
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


def small_adapter(folder):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2}
    base = LlamaForCausalLM(LlamaConfig(vocab_size=16, num_hidden_layers=1, **sizes))
    base.save_pretrained(folder / "base")
    base.name_or_path = str(folder / "base")
    model = get_peft_model(base, LoraConfig(r=8, target_modules=["q_proj"], init_lora_weights=False))
    model.save_pretrained(folder / "adapter")
    return folder / "adapter"
