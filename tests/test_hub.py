"""Runs, adapters and exports on the Hub, against a stand-in that keeps every byte: what goes there, what never does."""

import errno
import hashlib
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import constants
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer

import hf_delta.train
from hf_delta import PmssConfig
from hf_delta.cli import main
from hf_delta.errors import InputError
from hf_delta.recipe import load_recipe
from hf_delta.run.directory import finish_manifest, is_finished, write_manifest
from hf_delta.run.result import read_result
from hf_delta.run.shareable import check_nothing_private, shareable
from tests.hub_server import READ_ONLY, TOKEN, running_hub
from tests.running import LORA, keys, train, write


CONFIGS = Path(__file__).parent.parent / "accelerate_configs"
PMSS = {"method": "pmss", "r": 4, "target_modules": ["q_proj", "v_proj"]}
PUSH = {"push_to_hub": True, "hub_model_id": "me/it", "base_model_id": "me/base"}
# What a directory of a run may hold that is nobody's business, by name.
PRIVATE = {
    "runs/Nov21_12-00-00_node-17.example.org/events.out.tfevents.1.node-17.example.org.7.0": b"node-17.example.org",
    "checkpoint-2/optimizer.pt": b"optimizer-state",
    "checkpoint-2/rng_state.pth": b"random-state",
    "completions/completions_00001.parquet": b"what-it-wrote",
    "training_args.bin": b"pickled-arguments",
    "notes.txt": b"a-note-to-myself",
}


@pytest.fixture(scope="module")
def finished(playground, tmp_path_factory):
    """A finished run of PMSS, evaluated, with what else may lie in its directory."""
    folder = tmp_path_factory.mktemp("somewhere")
    held_out = folder / "held_out.jsonl"
    held_out.write_text("\n".join((playground / "eval.jsonl").read_text().splitlines()[:6]))
    evaluation = {"evaluate_pass_at": [1], "evaluate_reward": "playground_reward", "evaluate_max_new_tokens": 4}
    content = keys("sft", playground, folder / "trained", peft_config=PMSS, learning_rate=1e-2)
    out = train(folder, {**content, **evaluation, "eval_file": str(held_out), "hub_token": "hf_" + "s" * 34})
    for name, data in PRIVATE.items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_bytes(data)
    return out


def refused(capsys, *command):
    """The one line that a command that is refused says."""
    capsys.readouterr()
    assert main([str(part) for part in command]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


def push(out, *flags):
    return main(["push", str(out), "--repo", "me/it", "--base_model_id", "me/base", *flags])


def metadata(card):
    return yaml.safe_load(card.split("---\n")[1])


def changed_logits(folder, playground):
    """Logits of an adapter on the playground's model."""
    model = AutoModelForCausalLM.from_pretrained(playground / "model")
    with torch.no_grad():
        return PeftModel.from_pretrained(model, str(folder))(torch.arange(1, 9)[None]).logits


# -- what is pushed -------------------------------------------------------------------------------------------------
def test_a_run_is_pushed_with_what_others_need_and_nothing_else(hub, finished, playground):
    assert push(finished) == 0
    files = hub.repos["me/it"].files
    expected = {"adapter_config.json", "adapter_model.safetensors", "run.json", "README.md", "curves.png"}
    tokenizer = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    assert set(files) == expected | tokenizer | {".gitattributes"}
    assert files["adapter_model.safetensors"] == (finished / "adapter_model.safetensors").read_bytes()
    config = json.loads(files["adapter_config.json"])
    assert config["base_model_name_or_path"] == "me/base" and config["peft_type"] == "HFD_PMSS"
    # What is here stays as it was, so that it loads here.
    assert json.loads((finished / "adapter_config.json").read_text())["base_model_name_or_path"] == str(
        playground / "model"
    )


def test_nothing_private_is_pushed(hub, finished, playground, tmp_path):
    assert push(finished, "--lora") == 0
    sent = hub.uploaded()
    assert len(sent) > 10_000 and b"HFD_PMSS" in sent
    secrets = [TOKEN, "hf_" + "s" * 34, str(finished), str(finished.parent), str(playground), str(Path.home()) + "/"]
    secrets += [data.decode() for data in PRIVATE.values()]
    for secret in [*secrets, *PRIVATE, "optimizer", "rng_state", "events.out"]:
        assert secret.encode() not in sent, secret
    text = b"\n".join(data for name, data in hub.repos["me/it"].files.items() if name.endswith((".json", ".md")))
    assert not re.search(rf"\b{re.escape(socket.gethostname())}\b".encode(), text)
    # A token goes to the Hub alone, and never to the storage behind it.
    assert {token for line, token, _ in hub.requests if line.startswith("PUT /upload")} == {""}
    assert not any(TOKEN in line or TOKEN in agent for line, _, agent in hub.requests)


def test_the_manifest_that_is_pushed_says_how_it_was_trained(hub, finished):
    assert push(finished) == 0
    manifest = json.loads(hub.repos["me/it"].files["run.json"])
    values = manifest["values"]
    assert values["model_name_or_path"] == "me/base" and manifest["method"]["model_name_or_path"] == "me/base"
    assert values["train_file"] == "sft.jsonl" and values["eval_file"] == "held_out.jsonl"
    assert values["peft_config"] == PMSS and values["learning_rate"] == 1e-2
    assert not {"output_dir", "hub_token", "push_to_hub"} & values.keys() and manifest["recipe"] == "recipe.yaml"
    assert manifest["versions"]["torch"] == torch.__version__


def test_the_card_says_what_the_adapter_is(hub, finished):
    assert push(finished, "--lora") == 0
    card = hub.repos["me/it"].files["README.md"].decode()
    data = metadata(card)
    assert data["base_model"] == "me/base" and data["base_model_relation"] == "adapter"
    assert data["library_name"] == "peft" and data["pipeline_tag"] == "text-generation"
    assert {"hf_delta", "trl", "sft", "pmss"} <= set(data["tags"]) and "license" not in data
    assert hub.seen("POST /api/validate-yaml")
    report = (finished / "report.md").read_text().strip()
    assert report in card and "pass@1" in report and "with 95 % intervals" in report
    for said in ("import hf_delta", 'AutoPeftModelForCausalLM.from_pretrained("me/it")', "papers/2409.16722"):
        assert said in card
    for said in (
        "| Method | supervised fine-tuning (`DeltaSFTTrainer`), `loss_type: nll`, PMSS adapter of rank 4 |",
        "| Optimizer steps | 2 |",
        "| Paper | [PMSS: Pretrained Matrices Skeleton Selection for LLM Fine-tuning]",
        "(arXiv:2409.16722)",
        "[me/base](https://huggingface.co/me/base)",
        "`sft.jsonl`",
        f"torch {torch.__version__}",
        'subfolder="lora"',
    ):
        assert said in card
    # The local one is as it was.
    assert str(finished.resolve()) in (finished / "README.md").read_text()


def test_the_lora_copy_is_the_adapter(hub, finished, playground, tmp_path):
    assert push(finished, "--lora") == 0
    files = hub.repos["me/it"].files
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / name).write_bytes(files[f"lora/{name}"])
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA" and config["base_model_name_or_path"] == "me/base"
    expected = changed_logits(finished, playground)
    assert torch.allclose(changed_logits(tmp_path, playground), expected, atol=1e-5)
    base = AutoModelForCausalLM.from_pretrained(playground / "model")
    assert (base(torch.arange(1, 9)[None]).logits - expected).abs().max() > 1e-3


def test_the_card_has_the_lora_copy_of_a_method_of_pefts_own(hub, playground, tmp_path):
    content = keys("sft", playground, tmp_path / "dora", peft_config={**LORA, "method": "dora"}, max_steps=1)
    assert main(["run", str(write(tmp_path, {**content, **PUSH, "push_lora": True}))]) == 0
    card = hub.repos["me/it"].files["README.md"].decode()
    assert "The folder `lora/` holds it as a plain LoRA (nearly so: it leaves out up to" in card
    assert 'PeftModel.from_pretrained(base, "me/it", subfolder="lora")' in card


def test_a_card_that_somebody_wrote_on_is_kept(hub, finished):
    path = finished / "README.md"
    ours = path.read_text()
    try:
        assert "pipeline_tag:" in ours and "train_file:" in ours
        path.write_text(ours.replace("pipeline_tag:", "license: mit\npipeline_tag:") + "\nTrained on a rainy day.\n")
        assert push(finished) == 0
    finally:
        path.write_text(ours)
    card = hub.repos["me/it"].files["README.md"].decode()
    data = metadata(card)
    assert "Trained on a rainy day." in card and (data["license"], data["base_model"]) == ("mit", "me/base")
    assert 'from_pretrained("me/it")' in card and "train_file: sft.jsonl" in card


def test_a_second_push_sends_only_what_changed_and_drops_old_weights(hub, finished):
    assert push(finished, "--lora") == 0
    commits = len(hub.repos["me/it"].commits)
    uploads = len(hub.seen("PUT /upload"))
    assert push(finished, "--lora") == 0
    assert len(hub.repos["me/it"].commits) == commits and len(hub.seen("PUT /upload")) == uploads
    assert push(finished) == 0
    files = hub.repos["me/it"].files
    assert "lora/adapter_model.safetensors" not in files and "adapter_model.safetensors" in files


def test_private_repositories_and_branches(hub, finished):
    assert push(finished, "--private", "--revision", "try") == 0
    repo = hub.repos["me/it"]
    assert repo.private and "adapter_model.safetensors" in repo.at("try")
    assert "adapter_model.safetensors" not in repo.files


def test_an_adapter_without_a_run(hub, playground, tmp_path, capsys):
    model = AutoModelForCausalLM.from_pretrained(playground / "model")
    cache = str(tmp_path / "selections")
    config = PmssConfig(r=4, target_modules=["q_proj"], cache_dir=cache, task_type="CAUSAL_LM")
    get_peft_model(model, config).save_pretrained(tmp_path / "mine")
    said = refused(capsys, "push", tmp_path / "mine", "--repo", "me/mine")
    assert "is a local directory" in said and "--base_model_id <owner>/<name>" in said and not hub.requests
    assert main(["push", str(tmp_path / "mine"), "--repo", "me/mine", "--base-model-id", "me/base"]) == 0
    files = hub.repos["me/mine"].files
    # PEFT's card is a form with nothing filled in.
    card = files["README.md"].decode()
    assert "[More Information Needed]" not in card and "import hf_delta" in card
    assert json.loads(files["adapter_config.json"])["cache_dir"] == PmssConfig().cache_dir
    assert str(tmp_path).encode() not in hub.uploaded()


def test_an_export_is_pushed_where_it_is_written(hub, finished, tmp_path, capsys):
    command = ["export", "--adapter", str(finished), "--format", "lora", "--out", str(tmp_path / "lora")]
    assert "--base_model_id" in refused(capsys, *command, "--push_to_hub", "me/plain")
    assert not (tmp_path / "lora").exists()
    assert main([*command, "--push_to_hub", "me/plain", "--base_model_id", "me/base"]) == 0
    files = hub.repos["me/plain"].files
    assert files["adapter_model.safetensors"] == (tmp_path / "lora" / "adapter_model.safetensors").read_bytes()
    card = files["README.md"].decode()
    assert "import hf_delta" not in card and 'from_pretrained("me/plain")' in card and "pmss" in card
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == "me/base"
    assert str(finished.parent).encode() not in hub.uploaded()
    merged = ["export", "--adapter", str(finished), "--format", "merged", "--out", str(tmp_path / "merged")]
    assert main([*merged, "--push_to_hub", "me/merged", "--base_model_id", "me/base"]) == 0
    files = hub.repos["me/merged"].files
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(files)
    assert metadata(files["README.md"].decode())["library_name"] == "transformers"


def test_what_peft_itself_pushes_of_our_adapters(hub, playground, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(playground / "model")
    # The Hub takes no card whose base model is a path, and PEFT writes what the model remembers.
    model.config._name_or_path = model.name_or_path = "me/base"
    model = get_peft_model(model, PmssConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    model.push_to_hub("me/native")
    files = hub.repos["me/native"].files
    assert json.loads(files["adapter_config.json"])["peft_type"] == "HFD_PMSS"
    weights = tmp_path / "weights.safetensors"
    weights.write_bytes(files["adapter_model.safetensors"])
    assert any(name.endswith("core") or "pmss" in name for name in load_file(weights))


# -- the last look --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("chat_template.jinja", "{{ 'hf_" + "A" * 34 + "' }}", "holds a token"),
        ("chat_template.jinja", "{# {home}/templates #}", "holds the local path"),
        ("README.md", "See {out}-2/notes and {base}_old", "holds the local path"),
    ],
)
def test_what_names_this_disk_or_a_token_is_not_pushed(hub, finished, playground, capsys, name, text, said):
    path = finished / name
    before = path.read_text()
    names = {"home": Path.home(), "out": finished.resolve(), "base": playground / "model"}
    for key, value in names.items():
        text = text.replace(f"{{{key}}}", str(value))
    try:
        path.write_text(text)
        assert said in refused(capsys, "push", finished, "--repo", "me/it", "--base_model_id", "me/base")
    finally:
        path.write_text(before)
    assert "me/it" not in hub.repos or set(hub.repos["me/it"].files) == {".gitattributes"}


def test_a_run_that_was_moved_does_not_name_where_it_was(hub, finished, tmp_path):
    moved = tmp_path / "moved"
    shutil.copytree(finished, moved)
    files = shareable(read_result(moved), "me/it", "me/base")
    check_nothing_private(files, read_result(moved))
    assert not any(str(finished).encode() in data for data in files.values() if isinstance(data, bytes))
    (moved / "README.md").write_text(f"Trained in {finished}-old")
    with pytest.raises(InputError, match="README.md holds the local path"):
        check_nothing_private(shareable(read_result(moved), "me/it", "me/base"), read_result(moved))


# -- failures -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("pattern", "status", "said"),
    [
        ("POST /api/models/me/it/commit", 500, "the Hub answered 500"),
        ("POST /api/models/me/it/commit", None, "cannot be reached"),
        ("PUT /upload", 503, "the Hub answered 503"),
        ("PUT /upload", None, "cannot be reached"),
        ("preupload", 503, "the Hub answered 503"),
        ("objects/batch", 401, "refuses the token (401)"),
        ("POST /api/repos/create", 403, "may not write there (403)"),
        ("GET /api/whoami-v2", None, "cannot be reached"),
    ],
)
def test_a_push_that_fails_is_one_line_and_goes_on_later(hub, finished, capsys, pattern, status, said):
    hub.fail(pattern, status)
    line = refused(capsys, "push", finished, "--repo", "me/it", "--base_model_id", "me/base")
    assert said in line and TOKEN not in line
    repo = hub.repos.get("me/it")
    assert repo is None or set(repo.files) == {".gitattributes"}
    hub.heal()
    sent = len(hub.blobs)
    assert push(finished) == 0
    assert "adapter_model.safetensors" in hub.repos["me/it"].files
    if "commit" in pattern:
        # What had arrived was not sent again.
        assert sent == len(hub.blobs) == len(hub.seen("PUT /upload"))


@pytest.mark.parametrize("status", [409, 412])
def test_two_pushes_at_once_do_not_mix(hub, finished, capsys, status):
    hub.fail("POST /api/models/me/it/commit", status)
    line = refused(capsys, "push", finished, "--repo", "me/it", "--base_model_id", "me/base")
    assert f"the repository was changed at the same time ({status}): push again" in line


def test_a_commit_is_made_on_top_of_what_was_looked_at(hub, finished, capsys, monkeypatch):
    # Somebody else commits while the files are on their way.
    preupload = hub.preupload

    def meanwhile(**asked):
        repo = hub.repos["me/it"]
        repo.commit({**repo.files, "theirs.txt": b"more"}, "main", "theirs")
        return preupload(**asked)

    monkeypatch.setattr(hub, "preupload", meanwhile)
    assert "was changed at the same time (412)" in refused(
        capsys, "push", finished, "--repo", "me/it", "--base_model_id", "me/base"
    )
    assert set(hub.repos["me/it"].files) == {".gitattributes", "theirs.txt"}


@pytest.mark.parametrize(
    ("pattern", "when"),
    [("PUT /upload", "midst"), ("PUT /upload", "after"), ("preupload", "after"), ("/commit/", "after")],
)
def test_a_connection_may_be_cut_at_any_moment(hub, finished, capsys, pattern, when):
    hub.fail(pattern, None, when=when)
    assert "cannot be reached" in refused(capsys, "push", finished, "--repo", "me/it", "--base_model_id", "me/base")
    hub.heal()
    commits = len(hub.repos["me/it"].commits)
    assert push(finished) == 0
    # A commit whose answer was lost is there, and not made twice.
    assert len(hub.repos["me/it"].commits) == (commits if pattern == "/commit/" else commits + 1) == 2
    assert (
        hub.repos["me/it"].files["adapter_model.safetensors"] == (finished / "adapter_model.safetensors").read_bytes()
    )


def test_what_has_arrived_is_not_sent_again(hub, finished, capsys):
    arrived = hashlib.sha256((finished / "adapter_model.safetensors").read_bytes()).hexdigest()
    picture = hashlib.sha256((finished / "curves.png").read_bytes()).hexdigest()
    hub.fail(f"PUT /upload/{picture}", 503)
    refused(capsys, "push", finished, "--repo", "me/it", "--base_model_id", "me/base")
    assert arrived in hub.blobs and picture not in hub.blobs
    hub.heal()
    assert push(finished) == 0
    assert len(hub.seen(f"PUT /upload/{arrived}")) == 1 and "curves.png" in hub.repos["me/it"].files


def test_large_files_go_in_parts(hub, finished):
    weights = (finished / "adapter_model.safetensors").read_bytes()
    hub.part_size = len(weights) // 2 - 1
    assert push(finished) == 0
    assert len(hub.seen("PUT /part/")) >= 3 and hub.seen("POST /complete/")
    assert hub.repos["me/it"].files["adapter_model.safetensors"] == weights


def test_a_full_disk_is_one_line(hub, finished, capsys, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("hf_delta.run.publish.TemporaryDirectory", full)
    line = refused(capsys, "push", finished, "--repo", "me/it", "--base_model_id", "me/base", "--lora")
    assert "cannot be made ready for the Hub" in line and "No space left on device" in line


def test_xet_that_fails_is_one_line(hub, finished, capsys, monkeypatch):
    pytest.importorskip("hf_xet")
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    line = refused(capsys, "push", finished, "--repo", "me/it", "--base_model_id", "me/base")
    assert "the push to me/it failed: " in line and "xet-write-token" in line and TOKEN not in line
    assert set(hub.repos["me/it"].files) == {".gitattributes"}


def test_an_export_that_could_not_be_pushed_is_pushed_with_its_card(hub, finished, tmp_path, capsys):
    out = tmp_path / "plain lora"
    hub.fail("POST /api/models/me/plain/commit", 500)
    command = ["export", "--adapter", finished, "--format", "lora", "--out", out, "--push_to_hub", "me/plain"]
    line = refused(capsys, *command, "--base_model_id", "me/base", "--private")
    again = shlex.split(line.partition("again: ")[2])
    assert again[:3] == ["hf-delta", "push", str(out)] and "--private" in again
    hub.heal()
    assert main(again[1:]) == 0
    card = hub.repos["me/plain"].files["README.md"].decode()
    assert "pass@1" in card and "`sft.jsonl`" in card
    assert "holds no run.json" in refused(capsys, "push", out, "--repo", "me/plain", "--run", tmp_path)


@pytest.mark.parametrize(
    ("token", "repo", "said"),
    [
        (None, "me/it", "there is no token of the Hub: run `hf auth login`, or set HF_TOKEN"),
        ("hf_wrong", "me/it", "the Hub refuses the token (401)"),
        (READ_ONLY, "me/it", "the token may only read"),
        (TOKEN, "you/theirs", "may not write there (403)"),
        (TOKEN, "you/public", "may not write there (403)"),
        (TOKEN, "me/it/else", "--repo: "),
    ],
)
def test_who_may_not_write_is_told_before_anything_is_sent(
    hub, finished, capsys, monkeypatch, tmp_path, token, repo, said
):
    hub.add("you/public", finished)
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    assert said in refused(capsys, "push", finished, "--repo", repo, "--base_model_id", "me/base")
    assert not hub.seen("preupload|PUT|commit")


# -- the key of a recipe --------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"base_model_id": None}, "model_name_or_path: .*/model is a local directory.*--base_model_id <owner>/<name>"),
        ({"base_model_id": "./model"}, "base_model_id: ./model is a path here"),
        ({"base_model_id": "a b"}, "base_model_id: .*a b"),
        ({"hub_model_id": "a/b/c"}, "hub_model_id: "),
        (
            {"hub_strategy": "checkpoint"},
            "hub_strategy: checkpoint would push while training.*Write hub_strategy: end",
        ),
        ({"hub_strategy": "every_save"}, "hub_strategy: every_save would push"),
        ({"hub_always_push": True}, "hub_always_push would push"),
        ({"push_to_hub": None}, "base_model_id needs push_to_hub: true"),
        ({"push_lora": True}, "push_lora: the adapter is a plain LoRA already"),
        ({"push_lora": True, "peft_config": None}, "push_lora: there is no adapter"),
        ({"push_lora": True, "peft_config": {**PMSS, "modules_to_save": ["lm_head"]}}, "push_lora: modules_to_save"),
    ],
)
def test_what_cannot_be_pushed_is_refused_before_anybody_is_asked(hub, tmp_path, playground, changes, said):
    content = {**PUSH, "peft_config": LORA, **changes}
    with pytest.raises(InputError, match=said):
        train(tmp_path, keys("sft", playground, tmp_path / "out", **content))
    assert not hub.requests and not (tmp_path / "out" / "run.json").exists()


@pytest.mark.parametrize("token", [None, READ_ONLY])
def test_a_token_that_will_not_do_is_found_before_training(hub, tmp_path, playground, monkeypatch, capsys, token):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    monkeypatch.setattr(Trainer, "train", None)
    content = keys("sft", playground, tmp_path / "out", **PUSH, hub_token=token)
    assert hf_delta.train.main([str(write(tmp_path, content))]) == 2
    assert "push_to_hub: " in capsys.readouterr().err and not (tmp_path / "out" / "model.safetensors").exists()
    assert not hub.repos


def test_a_repository_of_somebody_else_is_found_before_training(hub, tmp_path, playground, monkeypatch):
    monkeypatch.setattr(Trainer, "train", None)
    content = keys("sft", playground, tmp_path / "out", **{**PUSH, "hub_model_id": "you/theirs"})
    with pytest.raises(InputError, match="you/theirs: the token may not write there"):
        train(tmp_path, content)


def test_a_run_pushes_at_its_end_and_once_more_without_training(hub, tmp_path, playground, monkeypatch, capsys):
    pushed = []
    monkeypatch.setattr(Trainer, "push_to_hub", lambda *_, **__: pushed.append("TRL's"))
    content = keys("sft", playground, tmp_path / "out", peft_config=PMSS, save_strategy="steps", save_steps=1)
    content |= {**PUSH, "push_lora": True, "hub_token": TOKEN, "hub_private_repo": True}
    monkeypatch.setenv("HF_TOKEN", "hf_of_somebody_else")
    hub.fail("POST /api/models/me/it/commit", 500)
    recipe = str(write(tmp_path, content))
    assert hf_delta.train.main([recipe]) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    out = tmp_path / "out"
    command = f"hf-delta push {out} --repo me/it --base_model_id me/base"
    assert len(said) == 1 and command in said[0] and f"The result is safe in {out}" in said[0]
    weights = (out / "adapter_model.safetensors").read_bytes()
    assert set(hub.repos["me/it"].files) == {".gitattributes"} and hub.repos["me/it"].private
    assert TOKEN.encode() not in b"".join(path.read_bytes() for path in out.rglob("*") if path.is_file())

    hub.heal()
    monkeypatch.setattr(Trainer, "train", None)
    assert hf_delta.train.main([recipe]) == 0
    files = hub.repos["me/it"].files
    assert files["adapter_model.safetensors"] == weights == (out / "adapter_model.safetensors").read_bytes()
    assert "lora/adapter_model.safetensors" in files and not pushed
    assert not [name for name in files if "checkpoint" in name or name.endswith((".bin", ".pt", ".pth"))]
    # Another recipe in the same directory is another run.
    with pytest.raises(InputError, match="holds another run"):
        train(tmp_path, {**content, "learning_rate": 0.5})


def test_only_the_main_process_pushes(hub, finished, monkeypatch, tmp_path, playground):
    content = keys("sft", playground, tmp_path / "out", **PUSH, max_steps=1)
    out = train(tmp_path, {key: value for key, value in content.items() if key not in PUSH})
    hub.requests.clear()
    monkeypatch.setattr("hf_delta.train.is_main_process", lambda: False)
    assert train(tmp_path, content) == out and not hub.requests
    monkeypatch.setattr("hf_delta.train.is_main_process", lambda: True)
    train(tmp_path, content)
    files = hub.repos["me/it"].files
    assert {"config.json", "generation_config.json", "model.safetensors"} <= set(files)
    assert "training_args.bin" not in files and metadata(files["README.md"].decode())["base_model"] == "me/base"


def test_a_base_of_the_hub_is_named_with_its_revision(hub, tmp_path, playground, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    hub.add("me/base", playground / "model")
    base = hub.repos["me/base"]
    base.branches["v1"] = base.branches["main"]
    base.commit({**base.files, "later.txt": b"more"}, "main", "goes on")
    content = keys("sft", playground, tmp_path / "out", peft_config=LORA, max_steps=1, push_to_hub=True)
    train(tmp_path, {**content, "model_name_or_path": "me/base", "model_revision": "v1"})
    files = hub.repos["me/out"].files
    config = json.loads(files["adapter_config.json"])
    assert (config["base_model_name_or_path"], config["revision"]) == ("me/base", "v1")
    card = files["README.md"].decode()
    assert f"revision `v1`, commit `{base.branches['v1']}`" in card and metadata(card)["base_model"] == "me/base"


def test_a_run_that_did_not_finish_is_trained_again(hub, tmp_path, playground):
    recipe = load_recipe(str(write(tmp_path, keys("sft", playground, tmp_path / "out", **PUSH))))
    assert not is_finished(recipe)
    write_manifest(recipe, None)
    assert not is_finished(recipe)
    finish_manifest(recipe.output_dir)
    assert not is_finished(recipe)
    (recipe.output_dir / "model.safetensors").write_bytes(b"weights")
    assert is_finished(recipe)
    for flag in (["--max_steps", "9"], ["--overwrite_output_dir"], ["--learning_rate", "0.5"]):
        assert not is_finished(load_recipe(str(tmp_path / "recipe.yaml"), flag))
    assert is_finished(load_recipe(str(tmp_path / "recipe.yaml"), ["--hub_model_id", "me/other", "--resume"]))


# -- end to end -----------------------------------------------------------------------------------------------------
PROMPT = "1+2:"
# The lines of a card, and then what their model says; both are given by the test.
PRINT_LOGITS = """
import json, torch
ids = torch.tensor([{ids}])
print(json.dumps(model(ids).logits[0, -1].tolist()))
"""
WITHOUT_HF_DELTA = "import sys\nsys.modules['hf_delta'] = None\n"


def lines_of(card):
    """The blocks of Python in a card."""
    return re.findall(r"```python\n(.*?)```", card, re.DOTALL)


def logits_of(model, ids):
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0, -1].tolist()


def test_the_lines_of_the_card_load_it(hub, finished, playground, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    hub.add("me/base", playground / "model")
    assert push(finished, "--lora") == 0
    ids = AutoTokenizer.from_pretrained(playground / "model").encode(PROMPT)
    base = AutoModelForCausalLM.from_pretrained(playground / "model")
    plain = logits_of(base, ids)
    expected = logits_of(PeftModel.from_pretrained(base, str(finished)), ids)
    native, lora = lines_of(hub.repos["me/it"].files["README.md"].decode())
    assert native.startswith("import hf_delta") and "hf_delta" not in lora
    for lines, tolerance in ((native, 1e-6), (lora, 1e-5)):
        names = {}
        exec(lines, names)
        assert logits_of(names["model"], ids) == pytest.approx(expected, abs=tolerance)
        if "tokenizer" in names:
            assert names["tokenizer"].encode(PROMPT) == ids
    assert max(abs(one - other) for one, other in zip(plain, expected)) > 1e-3


@pytest.mark.slow
def test_runs_go_to_the_hub_and_come_back_in_fresh_processes_by_the_lines_of_their_cards(tmp_path, playground):
    with running_hub() as hub:
        hub.add("me/base", playground / "model")
        environment = {key: value for key, value in os.environ.items() if key != "HF_HUB_OFFLINE"}
        environment |= {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1", "OMP_NUM_THREADS": "1"}
        environment |= {"HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_TELEMETRY": "1"}

        def python(*command, status=0):
            found = subprocess.run(
                [sys.executable, *command], env=environment, capture_output=True, text=True, cwd=tmp_path, timeout=600
            )
            assert bool(found.returncode) == bool(status), found.stderr[-3000:]
            return found.stderr if status else found.stdout

        def run_by(lines, before=""):
            return json.loads(python("-c", before + lines + PRINT_LOGITS.format(ids=ids)).splitlines()[-1])

        ids = AutoTokenizer.from_pretrained(playground / "model").encode(PROMPT)
        content = keys("sft", playground, "out", peft_config=PMSS, learning_rate=1e-2, **PUSH, push_lora=True)
        launch = [
            *"-m accelerate.commands.launch --main_process_port 0 --config_file".split(),
            str(CONFIGS / "cpu.yaml"),
        ]
        # Neither process waits for the other when the upload fails, and the result is there.
        hub.fail("POST /api/models/me/it/commit", 500)
        said = python(*launch, "-m", "hf_delta.train", str(write(tmp_path, content)), status=2)
        assert said.count("the Hub answered 500") == 1
        again = shlex.split(re.search(r"hf-delta push .*", said)[0])
        hub.heal()
        uploads = len(hub.seen("PUT /upload"))
        python("-m", "hf_delta.cli", *again[1:])
        assert len(hub.seen("POST /api/models/me/it/commit")) == 2 and len(hub.seen("PUT /upload")) == uploads
        assert str(tmp_path).encode() not in hub.uploaded() and b"lora_A" in hub.uploaded()

        full = keys("sft", playground, "full", learning_rate=1e-3, **{**PUSH, "hub_model_id": "me/full"})
        python("-m", "hf_delta.train", str(write(tmp_path, full)))

        model = AutoModelForCausalLM.from_pretrained(playground / "model")
        base = logits_of(model, ids)
        expected = logits_of(PeftModel.from_pretrained(model, str(tmp_path / "out")), ids)
        expected_full = logits_of(AutoModelForCausalLM.from_pretrained(tmp_path / "full"), ids)
        native, lora = lines_of(hub.repos["me/it"].files["README.md"].decode())
        (whole,) = lines_of(hub.repos["me/full"].files["README.md"].decode())
        assert run_by(native) == pytest.approx(expected, abs=1e-6)
        assert run_by(lora, before=WITHOUT_HF_DELTA) == pytest.approx(expected, abs=1e-5)
        assert run_by(whole, before=WITHOUT_HF_DELTA) == pytest.approx(expected_full, abs=1e-6)
    for trained in (expected, expected_full):
        assert max(abs(one - other) for one, other in zip(base, trained)) > 1e-3
