"""`push_to_hub=True` of the trainers in scripts: what they upload while they train and at the end, and what never."""

import json
import logging

import pytest
from datasets import Dataset
from huggingface_hub import constants
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from hf_delta import DeltaDPOConfig, DeltaDPOTrainer, DeltaGRPOConfig, DeltaGRPOTrainer, DeltaSFTTrainer
from hf_delta.errors import InputError
from tests.hub_server import TOKEN
from tests.preference.dpo import pair_rows
from tests.running import CPU, length


TOKENIZER = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
MODEL = {"config.json", "generation_config.json", "model.safetensors"}
ADAPTER = {"adapter_config.json", "adapter_model.safetensors"}
# Trainer, its configuration and settings, columns, and whether it trains an adapter.
KINDS = {
    "sft": (DeltaSFTTrainer, SFTConfig, {}, ("prompt", "completion"), False),
    "dpo": (DeltaDPOTrainer, DeltaDPOConfig, {"loss_type": "sparse_po"}, ("prompt", "chosen", "rejected"), True),
    "grpo": (
        DeltaGRPOTrainer,
        DeltaGRPOConfig,
        {"num_generations": 2, "max_completion_length": 4, "loss_type": "delta_l"},
        ("prompt",),
        True,
    ),
}


@pytest.fixture(autouse=True)
def no_token_but_the_given_one(hub, monkeypatch, tmp_path):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))


def build(playground, out, kind, cls=None, base="me/base", **changes):
    ours, config, settings, columns, adapter = KINDS[kind]
    rows = [{**row, "completion": row["chosen"]} for row in pair_rows()]
    model = AutoModelForCausalLM.from_pretrained(playground / "model")
    if base is not None:
        model.config._name_or_path = model.name_or_path = base
    common = {"max_steps": 2, "save_steps": 1, "logging_steps": 1, "per_device_train_batch_size": 2, **CPU}
    push = {"push_to_hub": True, "hub_model_id": "me/it", "hub_token": TOKEN}
    return (cls or ours)(
        model,
        args=config(output_dir=str(out), **{**common, **push, **settings, **changes}),
        train_dataset=Dataset.from_list([{name: row[name] for name in columns} for row in rows]),
        processing_class=AutoTokenizer.from_pretrained(playground / "model"),
        **({"peft_config": LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")} if adapter else {}),
        **({"reward_funcs": [length]} if kind == "grpo" else {}),
    )


@pytest.mark.parametrize("kind", KINDS)
def test_only_what_others_need_is_uploaded_while_and_after_training(hub, playground, tmp_path, kind):
    out = tmp_path / "out"
    trainer = build(playground, out, kind, hub_strategy="every_save", hub_always_push=True, save_total_limit=1)
    (out / "runs").mkdir(parents=True)
    (out / "runs" / "events.out.tfevents.1.node-17").write_text("tensorboard of node-17")
    (out / "notes.txt").write_text("a-note-to-myself")
    trainer.train()
    trainer.push_to_hub()
    weights = "adapter_model.safetensors" if KINDS[kind][4] else "model.safetensors"
    files = hub.repos["me/it"].files
    assert set(files) == {".gitattributes", "README.md"} | TOKENIZER | (ADAPTER if KINDS[kind][4] else MODEL)
    assert files[weights] == (out / weights).read_bytes()
    # Two while it trained, of which the last may be what the last commit has.
    first = next(found for _, found in hub.repos["me/it"].commits if weights in found)
    assert len(hub.seen("POST /api/models/me/it/commit")) >= 2 and first[weights] != files[weights]
    sent = hub.uploaded()
    for secret in (
        TOKEN,
        str(tmp_path),
        "node-17",
        "a-note",
        "optimizer",
        "rng_state",
        "training_args",
        "trainer_state",
    ):
        assert secret.encode() not in sent, secret
    assert not list(out.glob("_push-*"))
    if KINDS[kind][4]:
        assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == "me/base"


def test_trl_itself_uploads_all_that_there_is(hub, playground, tmp_path):
    # What the test above would find if nobody stood in the way.
    trainer = build(playground, tmp_path / "out", "sft", cls=SFTTrainer, max_steps=1, save_strategy="no")
    trainer.train()
    trainer.push_to_hub()
    assert "training_args.bin" in hub.repos["me/it"].files and TOKEN.encode() in hub.uploaded()


@pytest.mark.parametrize("strategy", ["checkpoint", "all_checkpoints"])
def test_strategies_that_upload_states_are_refused(hub, playground, tmp_path, strategy):
    with pytest.raises(InputError, match=f"hub_strategy: {strategy} would upload optimizer and random states"):
        build(playground, tmp_path / "out", "sft", hub_strategy=strategy)
    assert not hub.repos


def test_an_adapter_of_a_local_model_is_refused(hub, playground, tmp_path):
    with pytest.raises(InputError, match="is a local directory.*--base_model_id"):
        build(playground, tmp_path / "out", "dpo", base=None)
    assert not hub.repos


def test_a_push_that_fails_while_training_is_made_up_for(hub, playground, tmp_path, caplog):
    trainer = build(playground, tmp_path / "out", "sft", hub_strategy="every_save", max_steps=1)
    hub.fail("POST /api/models/me/it/commit", 500)
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert "A push to me/it failed" in caplog.text
    hub.heal()
    trainer.push_to_hub(blocking=False).result()
    assert "model.safetensors" in hub.repos["me/it"].files


def test_a_file_that_holds_a_token_stops_the_push_and_not_the_training(hub, playground, tmp_path, caplog):
    trainer = build(playground, tmp_path / "out", "sft", hub_strategy="every_save", max_steps=1)
    trainer.processing_class.chat_template = f"{{# {TOKEN} #}}"
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert trainer.state.global_step == 1 and "chat_template.jinja holds a token" in caplog.text
    with pytest.raises(InputError, match="chat_template.jinja holds a token"):
        trainer.push_to_hub()
    assert set(hub.repos["me/it"].files) == {".gitattributes"}
