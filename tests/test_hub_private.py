"""What is nobody's business is planted wherever a run can carry it, and searched for in every byte that is pushed."""

import json
import os
import re
import shutil
import socket
from pathlib import Path

import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from hf_delta import private
from hf_delta.cli import main
from hf_delta.errors import InputError
from hf_delta.public import check_files
from hf_delta.run.card import write_card
from hf_delta.run.result import read_result
from tests.hub_server import TOKEN
from tests.running import keys, train


HOST = "node-17.cluster.example"
WANDB = "0123456789abcdef" * 2 + "deadbeef"
OTHER = "hf_" + "Stolen" * 6
PASSWORD = "correct-horse"


@pytest.fixture
def here(monkeypatch, tmp_path):
    """A home, a working directory, a machine and an environment with things to hide; returns the directory around them."""
    home = tmp_path / "home" / "mallory"
    work = tmp_path / "work of mallory"
    for folder in (home / "data", work / "data"):
        folder.mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("WANDB_API_KEY", WANDB)
    monkeypatch.setenv("DB_PASSWORD", PASSWORD)
    monkeypatch.setattr(socket, "gethostname", lambda: HOST)
    monkeypatch.chdir(work)
    return tmp_path


def secrets(here):
    """Whatever must not be in a single byte."""
    return [TOKEN, OTHER, WANDB, PASSWORD, HOST, "node-17", "mallory", str(here), here.name]


def assert_clean(hub, here):
    sent = hub.uploaded()
    assert len(sent) > 10_000
    assert b"k" * 9 not in sent and b"vllm_server" not in sent
    for secret in secrets(here):
        assert secret.encode() not in sent, secret
        assert not any(secret in line or secret in agent for line, _, agent in hub.requests), secret


def nasty(here):
    """Values of a recipe in which paths, hosts and tokens stand in every form."""
    work = here / "work of mallory"
    return {
        "trainer": "grpo",
        "model_name_or_path": "../models of mallory/base",
        "train_file": ["~/data/train.jsonl", str(work / "data" / "more rows.jsonl")],
        "eval_file": "C:\\Users\\mallory\\held out.jsonl",
        "dataset_name": f"https://mallory:{PASSWORD}@data.example/rows",
        "dataset_columns": {"prompt": "question"},
        "reward_funcs": [
            {"rewards.judge": {"path": f"{work}/rubric.json", "api_key": "k" * 9, "token": OTHER, "n": 3}}
        ],
        "token_weights_kwargs": {
            "positive": "../models of mallory/good",
            "negative": "~mallory/models/bad",
            "third": "mallory-models/third",
        },
        "advantage_transform_kwargs": [
            {"file": "file:///home/mallory/x.json"},
            {"file": "\\\\nas-of-mallory\\share\\y"},
        ],
        "vllm_server_host": HOST,
        "vllm_server_base_url": f"http://{HOST}:8000",
        "run_name": f"run {OTHER} {WANDB}",
        "optim_args": f"table={here}/deep/er/table.json,eps=1e-8",
        "deepspeed": f"{here}/ds.json",
        "system_prompt": f"Notes are in {here}/notes/a.txt, and 1/2 is a half. /no_think",
        "model_init_kwargs": {"token": OTHER, "cache_dir": "~/cache", "device_map": "auto"},
        "output_dir": "~/runs/one",
        "hub_token": "***",
        "hub_model_id": "me/it",
        "learning_rate": 0.5,
    }


def planted_run(here, playground):
    """A finished full fine-tuning with such a recipe, in a directory behind a link."""
    real = here / "disk of mallory" / "run"
    shutil.copytree(playground / "model", real)
    for name, key in (("config.json", "_name_or_path"), ("tokenizer_config.json", "name_or_path")):
        content = json.loads((real / name).read_text())
        content |= {key: "/scratch/mallory/models/base", "tokenizer_file": "~/t/tokenizer.json", "auth_token": OTHER}
        (real / name).write_text(json.dumps(content))
    values = nasty(here)
    method = {"trainer": "grpo", "loss_type": "dapo", "model_name_or_path": str(here / "models of mallory" / "base")}
    method["advantage_transform_kwargs"] = values["advantage_transform_kwargs"]
    local = [values["model_name_or_path"], "../models of mallory", "mallory-models/third"]
    manifest = {"format_version": 1, "hf_delta": "1", "recipe": str(here / "my recipe.yaml"), "values": values}
    manifest |= {"method": method, "papers": [], "base_commit": None, "local_paths": local, "world_size": 1}
    manifest |= {"output_dir": str(real), "resumed_from": f"{real}/checkpoint-2", "versions": {"torch": "2"}}
    (real / "run.json").write_text(json.dumps({**manifest, "finished": True}))
    (real / "README.md").write_text(f"# Mine\n\nTrained in {real} on ../models of mallory/base.\n")
    for name in ("training_args.bin", "optimizer.pt", "notes.json", "tokenizer_old.json", "model.bin"):
        (real / name).write_bytes(f"{OTHER} {here}".encode())
    link = here / "link"
    link.symlink_to(real.parent)
    return link / "run"


def test_a_recipe_full_of_them_is_pushed_without(hub, here, playground):
    run = planted_run(here, playground)
    (run / "README.md").unlink()
    assert main(["push", str(run), "--repo", "me/it", "--base_model_id", "me/base"]) == 0
    assert_clean(hub, here)
    files = hub.repos["me/it"].files
    assert not {"training_args.bin", "optimizer.pt", "notes.json", "tokenizer_old.json", "model.bin"} & files.keys()
    values = json.loads(files["run.json"])["values"]
    # What says how it was trained is still there.
    assert values["train_file"] == ["train.jsonl", "more rows.jsonl"] and values["eval_file"] == "held out.jsonl"
    assert values["learning_rate"] == 0.5 and values["dataset_columns"] == {"prompt": "question"}
    assert values["reward_funcs"] == [{"rewards.judge": {"path": "rubric.json", "n": 3}}]
    assert values["token_weights_kwargs"] == {"positive": "good", "negative": "bad", "third": "third"}
    assert values["optim_args"] == "table=table.json,eps=1e-8"
    assert values["system_prompt"] == "Notes are in a.txt, and 1/2 is a half. /no_think"
    assert values["model_init_kwargs"] == {"cache_dir": "cache", "device_map": "auto"}
    assert not {"vllm_server_host", "vllm_server_base_url", "output_dir", "hub_token"} & values.keys()
    card = yaml.safe_load(files["README.md"].decode().split("---\n")[1])
    assert card["base_model"] == "me/base" and "datasets" not in card and "license" not in card
    assert json.loads(files["config.json"])["_name_or_path"] == "base"
    assert json.loads(files["tokenizer_config.json"])["tokenizer_file"] == "tokenizer.json"
    with safe_open(run / "model.safetensors", "pt") as weights:
        assert weights.metadata() == {"format": "pt"}


def test_an_edited_card_gets_the_names_of_the_hub(hub, here, playground):
    run = planted_run(here, playground)
    # With the recipe in it, of an adapter's card as it lies on the disk.
    own = (run / "README.md").read_text()
    (run / "README.md").write_text(f"{own}\n{write_card(read_result(run)).read_text().partition('The recipe:')[2]}")
    assert main(["push", str(run), "--repo", "me/it", "--base_model_id", "me/base"]) == 0
    assert_clean(hub, here)
    card = hub.repos["me/it"].files["README.md"].decode()
    assert "Trained in me/it on me/base." in card and "learning_rate: 0.5" in card and "path: rubric.json" in card
    assert "k" * 9 not in card and "vllm_server" not in card


PLACES = {
    "chat template": ("chat_template.jinja", lambda path, text: path.write_text(f"{{# {text} #}}")),
    "card": ("README.md", lambda path, text: path.write_text(f"# Mine\n\nSee {text} for more.\n")),
    "vocabulary": ("tokenizer.json", lambda path, text: path.write_text(json.dumps([text]))),
    "head of the weights": (
        "model.safetensors",
        lambda path, text: save_file({"a": torch.zeros(2)}, path, metadata={"format": "pt", "from": text}),
    ),
}
NEEDLES = {
    "own token": (TOKEN, "holds a token"),
    "token of somebody else": ("hf_" + "Strange" * 5, "holds a token"),
    "token of a variable": (WANDB, "holds a token"),
    "home": ("{here}/home/mallory/x", "holds the local path"),
    "working directory": ("{here}/work of mallory", "holds the local path"),
    "its own directory": ("{here}/disk of mallory/run", "holds the local path"),
    "its own directory by a link": ("{here}/link/run", "holds the local path"),
    "host": (HOST, "the name of this machine"),
    "short host": ("node-17", "the name of this machine"),
}
# In a vocabulary anybody's name may be a word, and a machine's too; a card gets the name of the Hub.
ALLOWED = {("vocabulary", name) for name in ("home", "host", "short host")} | {("card", "its own directory")}


@pytest.mark.parametrize(
    ("place", "needle"), [(place, needle) for place in PLACES for needle in NEEDLES if (place, needle) not in ALLOWED]
)
def test_what_cannot_be_left_out_is_refused(hub, here, playground, capsys, place, needle):
    run = planted_run(here, playground)
    text, said = NEEDLES[needle]
    name, plant = PLACES[place]
    plant(run / name, text.replace("{here}", str(here)))
    assert main(["push", str(run), "--repo", "me/it", "--base_model_id", "me/base"]) == 2
    error = capsys.readouterr().err
    assert said in error and name in error and "Nothing was pushed." in error
    assert TOKEN not in error and OTHER not in error and WANDB not in error
    assert not hub.seen("preupload|PUT|commit")


def test_adapters_do_not_carry_paths_in_nested_fields(hub, here, playground):
    model = AutoModelForCausalLM.from_pretrained(playground / "model")
    get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")).save_pretrained("mine")
    path = Path("mine/adapter_config.json")
    config = json.loads(path.read_text())
    config["corda_config"] = {"cache_file": f"{here}/home/mallory/cache.pt", "corda_method": "ipm"}
    config["layer_replication"], config["revision"] = None, f"{here}/x/y"
    path.write_text(json.dumps(config))
    assert main(["push", "mine", "--repo", "me/mine", "--base_model_id", "me/base"]) == 0
    shared = json.loads(hub.repos["me/mine"].files["adapter_config.json"])
    assert shared["corda_config"] == {"cache_file": "cache.pt", "corda_method": "ipm"}
    assert shared["revision"] is None and shared["r"] == 2
    assert_clean(hub, here)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/no_think", "/no_think"),
        (r".*\.(q|v)_proj", r".*\.(q|v)_proj"),
        ("me/base", "me/base"),
        ("<think></think> and/or 1/2 km/h", "<think></think> and/or 1/2 km/h"),
        ("https://example.org/a/b", "https://example.org/a/b"),
        ("https://me:pw@example.org/a", "https://example.org/a"),
        ("https://me:pw@example.org:80/a", "https://example.org:80/a"),
        ("~/a b/c", "c"),
        ("./rows", "rows"),
        ("D:/rows/x", "x"),
        ("/data/my models/base/", "base"),
        ("see /data/models/base now", "see base now"),
        ("mallory@node-17:/data/x/y", "y"),
        ("ssh://mallory@node-17:22/data/x", "x"),
        ("\\\\?\\C:\\Users\\mallory\\x", "x"),
        ("http://node-17:8000/v1 or https://10.0.0.3/v1", "http://…:8000/v1 or https://…/v1"),
        (f"-I{os.path.expanduser('~')}/include", "-Iinclude"),
        ("/home/mallory/x\n/home/mallory/y", "x\ny"),
    ],
)
def test_texts_that_are_no_paths_stay(text, expected):
    assert private.shared(text) == expected


def test_a_machine_with_an_everyday_name_is_not_looked_for(monkeypatch):
    # Its name would be found in any text.
    monkeypatch.setattr(socket, "gethostname", lambda: "model")
    monkeypatch.delenv("HOSTNAME", raising=False)
    assert private.machine() == []
    check_files({"README.md": b"a model"}, Path("x"), [])
    monkeypatch.setattr(socket, "gethostname", lambda: "model-7")
    with pytest.raises(InputError, match="holds model-7, the name of this machine"):
        check_files({"README.md": b"a model, on model-7."}, Path("x"), [])
    check_files({"README.md": b"a model-70b"}, Path("x"), [])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sft", "dpo", "grpo"])
def test_whole_runs_carry_nothing(hub, here, playground, kind):
    shutil.copytree(playground, here / "disk of mallory" / "playground")
    (here / "link").symlink_to(here / "disk of mallory")
    world = here / "link" / "playground"
    changes = {
        "sft": {},
        "dpo": {"loss_type": "sparse_po", "peft_config": {"method": "edora", "r": 4, "target_modules": ["q_proj"]}},
        "grpo": {"peft_config": {"method": "pmss", "r": 4, "target_modules": ["q_proj"], "cache_dir": "~/cache"}},
    }[kind]
    evaluation = {"evaluate_pass_at": [1], "evaluate_reward": "playground_reward", "evaluate_max_new_tokens": 4}
    content = keys(kind, world, "~/runs/one", **changes, **evaluation, run_name=f"{OTHER}", save_strategy="steps")
    content |= {"save_steps": 1, "push_to_hub": True, "hub_model_id": "me/it", "hub_token": TOKEN}
    content |= {"base_model_id": "me/base"} | ({"push_lora": True} if kind == "grpo" else {})
    train(here / "work of mallory", content)
    assert_clean(hub, here)
    files = hub.repos["me/it"].files
    assert not [name for name in files if "checkpoint" in name or name.endswith((".bin", ".pt", ".pth", ".jsonl"))]
    cited = set(re.findall(r"huggingface.co/papers/([\d.]+)", files["README.md"].decode()))
    assert cited == {"sft": set(), "dpo": {"2410.05102", "2501.12067"}, "grpo": {"2402.03300", "2409.16722"}}[kind]
    if kind == "dpo":
        exported = [
            "export",
            "--adapter",
            str(here / "home/mallory/runs/one"),
            "--format",
            "merged",
            "--out",
            "merged",
        ]
        assert main([*exported, "--push_to_hub", "me/merged", "--base_model_id", "me/base"]) == 0
        assert_clean(hub, here)
