"""Cases of saving under FSDP2: what checkpoints and `save_model` hold, in either kind of state dict, and what is resumed."""

import copy
import hashlib
from functools import partial
from pathlib import Path

import torch
import trl
from datasets import Dataset
from peft import LoraConfig
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_delta import DeltaDPOTrainer, DeltaGRPOTrainer, DeltaSFTTrainer, InputError
from hf_delta.checkpoint import STATE_FILE
from tests.adapters.life import config_of
from tests.distributed.fsdp_on_cpu import FSDP2, fsdp_on_cpu
from tests.preference.dpo import config as dpo_config
from tests.preference.dpo import pair_rows
from tests.rl.frozen import dataset, frozen_reward, frozen_rollouts
from tests.rl.test_trainer import config as grpo_config


KEPT = []
STEPS, SAVED_AT = 3, 2
IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6], [5, 3, 5, 8, 9, 7, 9, 3]])
SETTINGS = {
    "per_device_train_batch_size": 4,
    "max_steps": STEPS,
    "learning_rate": 3e-3,
    "save_strategy": "steps",
    "save_steps": SAVED_AT,
    "report_to": "none",
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "disable_tqdm": True,
}
LORA = {"r": 4, "target_modules": ["q_proj", "down_proj"], "lora_dropout": 0.1, "task_type": "CAUSAL_LM"}
ADAPTERS = {
    "lora": lambda: LoraConfig(**LORA, modules_to_save=["norm"]),
    **{kind: partial(config_of, kind) for kind in ("pmss", "edora", "bat_row")},
    "full": lambda: None,
}


def sharding(kind):
    settings = copy.deepcopy(FSDP2)
    settings["fsdp_config"]["state_dict_type"] = f"{kind}_STATE_DICT"
    return settings


def build(cls, world, folder, adapter, seed=0, **changes):
    """A trainer of a fresh model that lives as long as its process."""
    torch.manual_seed(seed)
    settings, model = {**SETTINGS, **changes}, AutoModelForCausalLM.from_pretrained(world)
    given = {"processing_class": AutoTokenizer.from_pretrained(world), "peft_config": ADAPTERS[adapter]()}
    if issubclass(cls, trl.GRPOTrainer):
        args = grpo_config(folder, steps_per_generation=1, **settings)
        trainer = cls(model, frozen_reward, args, dataset(), rollout_func=frozen_rollouts, **given)
    elif issubclass(cls, trl.DPOTrainer):
        trainer = cls(
            model, args=dpo_config(folder, **settings), train_dataset=Dataset.from_list(pair_rows()), **given
        )
    else:
        rows = Dataset.from_list([{"input_ids": [3 + (7 * i + k) % 17 for k in range(4 + i % 5)]} for i in range(24)])
        trainer = cls(model, trl.SFTConfig(str(folder), **settings), train_dataset=rows, **given)
    KEPT.append(trainer)
    return trainer


def trained(trainer):
    named = trainer.model.named_parameters()
    return {
        n: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone() for n, p in named if p.requires_grad
    }


def logits(trainer):
    with torch.no_grad():
        return trainer.model.eval()(input_ids=IDS).logits.clone()


def files(folder):
    """Bytes of weights, and the names of all else that stands in a directory, but for the state that is ours."""
    paths = sorted(path for path in Path(folder).iterdir() if path.name != STATE_FILE)
    weights = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in paths if p.suffix == ".safetensors"}
    return {"weights": weights, "names": [p.name for p in paths]}


def saved(world, folder, cls, adapter, kind="SHARDED", resumes=True):
    """Train, save, resume from the checkpoint in the middle, and what was found where."""
    with fsdp_on_cpu():
        straight = build(cls, world, folder / "run", adapter, **sharding(kind))
        straight.train()
        straight.save_model(folder / "final")
        found = {
            "sharded": straight.accelerator.is_fsdp2
            and all(isinstance(p, DTensor) for p in straight.model.parameters()),
            "parameters": trained(straight),
            "logits": logits(straight),
        }
        if resumes:
            again = build(cls, world, folder / "run", adapter, seed=1, **sharding(kind))
            again.train(resume_from_checkpoint=str(folder / "run" / f"checkpoint-{SAVED_AT}"))
            found |= {"resumed": trained(again), "steps": again.state.global_step}
        straight.accelerator.wait_for_everyone()
    final = folder / "final"
    return found | {
        "folder": str(folder),
        "checkpoint": files(folder / "run" / f"checkpoint-{SAVED_AT}"),
        "last": files(folder / "run" / f"checkpoint-{STEPS}"),
        "final": files(final) if final.exists() else None,
    }


def refused(world, folder):
    """What a trainer says to FSDP of version 1."""
    old = {"version": 1, "sync_module_states": False, "transformer_layer_cls_to_wrap": ["Qwen3DecoderLayer"]}
    with fsdp_on_cpu():
        try:
            build(DeltaSFTTrainer, world, folder, "lora", fsdp=True, fsdp_config=old)
        except InputError as error:
            return {"message": str(error)}
    return {"message": ""}


CASES = {
    **{f"saved_sft_{a}": partial(saved, cls=DeltaSFTTrainer, adapter=a) for a in ("lora", "full")},
    "saved_sft_pmss": partial(saved, cls=DeltaSFTTrainer, adapter="pmss", resumes=False),
    "saved_grpo_edora": partial(saved, cls=DeltaGRPOTrainer, adapter="edora"),
    "saved_dpo_bat_row": partial(saved, cls=DeltaDPOTrainer, adapter="bat_row"),
    "saved_as_full": partial(saved, cls=DeltaSFTTrainer, adapter="lora", kind="FULL", resumes=False),
    "saved_by_trl": partial(saved, cls=trl.SFTTrainer, adapter="lora", resumes=False),
    "saved_by_fsdp1": refused,
}
