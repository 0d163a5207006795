"""The table of adapters and tasks in two processes: each run under DDP and under FSDP2, and what each of them ends with.

SFT is TRL's own trainer, as `hf_delta.train` uses it. GRPO is Delta-L with both GDRO games, whose state is learnt.
"""

import os
from contextlib import contextmanager, nullcontext
from functools import partial
from unittest.mock import patch
from zlib import crc32

import torch
import trl
from accelerate import PartialState
from datasets import Dataset
from peft import LoraConfig
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl.trainer import sft_trainer
from trl.trainer.sft_trainer import create_model_from_path

from hf_delta import DeltaGRPOConfig, DeltaGRPOTrainer, InputError
from hf_delta.adapters.dora import fast_dora
from hf_delta.checkpoint import STATE_FILE, load_state
from hf_delta.rl.prompt_ids import with_prompt_ids
from hf_delta.sft import DeltaSFTTrainer
from tests.adapters.life import IDS, config_of, perturb
from tests.distributed.fsdp_on_cpu import FSDP2, fsdp_on_cpu
from tests.rl.frozen import dataset
from tests.rl.gdro import frozen_groups
from tests.rl.test_gdro import PlanRecorder
from tests.rl.test_resume import StopAt
from tests.running import CPU


FULL, FAST_DORA = "full", "fast_dora"
ADAPTERS = [FULL, "lora", FAST_DORA, "bone", "bat_row", "pmss", "edora"]

# SGD, because Adam takes a step of one size where two gradients are zero but for rounding.
SETTINGS = {
    "optim": "sgd",
    "learning_rate": 0.1,
    "max_grad_norm": 0.0,
    "gradient_accumulation_steps": 2,
    "logging_steps": 1,
    "save_strategy": "no",
    **CPU,
}
SFT = {**SETTINGS, "per_device_train_batch_size": 2, "max_steps": 2, "max_length": 32}
GRPO = {
    **SETTINGS,
    "mask_truncated_completions": True,
    "merged_rollouts": True,
    "prompt_weighting": "prompt_gdro",
    "prompt_weighting_kwargs": {"signal": "loss", "eta": 50.0},
    "rollout_allocation": "rollout_gdro",
    "prompt_groups": "level",
    "difficulty_kwargs": {"prior_column": "level"},
    "per_device_train_batch_size": 4,
    "num_generations": 4,
    "max_completion_length": 12,
    # A window of 4 optimizer steps: the second one has weights and budgets that the first has taught.
    "steps_per_generation": 4,
    "num_iterations": 2,
    "max_steps": 6,
}
DELTA_L = {"loss_type": "delta_l", "delta_l_alpha": 0.75}
# Delta-L refuses a KL term, for which the adapter is switched off in every micro-step.
WITH_KL = {"loss_type": "dr_grpo", "beta": 0.05}
KINDS_WITH_KL = ("bat_row", "pmss")
# As accelerate_configs/fsdp2.yaml has it.
RAM_EFFICIENT = {"cpu_ram_efficient_loading": True}
KEPT = []


def some_solved(completions, prompt_id, **kwargs):
    """Prompts with even ids are never solved, the others by every second completion or so."""
    return [float(int(p) % 2 and crc32(c.encode()) % 2) for p, c in zip(prompt_id, completions)]


def peft_config(kind, **changes):
    if kind == FULL:
        return None
    if kind == "lora":
        return LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", **changes)
    return config_of("dora" if kind == FAST_DORA else kind, **changes)


def sft_rows():
    return Dataset.from_list([{"prompt": f"{7 * i}+{i}:", "completion": f"{8 * i};"} for i in range(16)])


def build_sft(world, folder, peft, **changes):
    settings = {**SFT, "output_dir": str(folder), "model_init_kwargs": {"dtype": "float32"}, **changes}
    callbacks, tokenizer = settings.pop("callbacks", []), AutoTokenizer.from_pretrained(world)
    return DeltaSFTTrainer(
        world,
        args=trl.SFTConfig(**settings),
        train_dataset=sft_rows(),
        processing_class=tokenizer,
        peft_config=peft,
        callbacks=callbacks,
    )


def build_grpo(world, folder, peft, **changes):
    loss = {} if "loss_type" in changes else DELTA_L
    settings = {**GRPO, **loss, "output_dir": str(folder), "model_init_kwargs": {"dtype": "float32"}, **changes}
    given = {name: settings.pop(name) for name in ("callbacks", "rollout_func") if name in settings}
    return DeltaGRPOTrainer(
        world,
        some_solved,
        DeltaGRPOConfig(**settings),
        with_prompt_ids(dataset()),
        processing_class=AutoTokenizer.from_pretrained(world),
        peft_config=peft,
        **given,
    )


BUILD = {"sft": build_sft, "grpo": build_grpo}


def build(world, folder, task, peft, **settings):
    """A trainer that lives as long as its process, see `cases.build`."""
    KEPT.append(BUILD[task](world, folder, peft, **settings))
    return KEPT[-1]


@contextmanager
def launched_with(sharded, kind, **fsdp):
    """As if by `accelerate launch`, with or without FSDP2, and as `hf_delta.train` computes this kind of adapter."""
    settings = {"fsdp": True, "fsdp_config": {**FSDP2["fsdp_config"], **fsdp}} if sharded else {}
    try:
        with fsdp_on_cpu() if sharded else nullcontext(), fast_dora() if kind == FAST_DORA else nullcontext():
            if sharded:
                # Here and not by the trainer, because a model is loaded before that.
                os.environ["ACCELERATE_USE_FSDP"] = "true"
            yield settings
    finally:
        for name in ("ACCELERATE_USE_FSDP", "FSDP_CPU_RAM_EFFICIENT_LOADING"):
            os.environ.pop(name, None)


# -- what is looked at ----------------------------------------------------------------------------------------------
def full(tensor):
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


class Gradients(TrainerCallback):
    """Whole gradients of every optimizer step, by the names of the unwrapped model; collective."""

    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        named = {n.removeprefix("module."): p.grad for n, p in model.named_parameters()}
        self.steps.append({n: full(g) for n, g in named.items() if g is not None})


def parameters(trainer):
    """Trained parameters, whole; collective."""
    return {n: full(p) for n, p in trainer.model.named_parameters() if p.requires_grad}


def mode_of(trainer):
    """Which way of several processes a trainer that has trained used, all of it."""
    if trainer.accelerator.is_fsdp2 and all(isinstance(p, DTensor) for p in trainer.model.parameters()):
        return "fsdp2"
    if isinstance(trainer.model_wrapped, DistributedDataParallel) and trainer.accelerator.num_processes == 2:
        return "ddp"
    return "alone" if trainer.accelerator.num_processes == 1 else "neither"


def learnt(trainer):
    """What the rules and the curriculum of GRPO know; nothing of SFT."""
    if not isinstance(trainer, DeltaGRPOTrainer):
        return {}
    return {"curriculum": trainer.curriculum.state_dict(), "rule": trainer.advantage_transforms[-1].state_dict()}


def logits(model):
    """Collective."""
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits.clone()


# -- cases ----------------------------------------------------------------------------------------------------------
def run(world, folder, task, kind, sharded=False, fsdp=None, adapter=None, **changes):
    """One run from an adapter that is not at its start, where some gradients are zero."""
    gradients, plans = Gradients(), PlanRecorder()
    with launched_with(sharded, kind, **(fsdp or {})) as settings:
        trainer = build(
            world, folder, task, peft_config(kind, **(adapter or {})), callbacks=[gradients], **settings, **changes
        )
        if kind != FULL:
            perturb(trainer.model)
        if task == "grpo":
            plans.of(trainer)
        trainer.train()
        return {
            "mode": mode_of(trainer),
            "gradients": gradients.steps,
            "parameters": parameters(trainer),
            "learnt": learnt(trainer),
            "plans": plans.counts,
        }


def cell(world, folder, task, kind, **changes):
    """The same run under DDP and under FSDP2."""
    changes |= WITH_KL if task == "grpo" and kind in KINDS_WITH_KL else {}
    return {
        way: run(world, folder / way, task, kind, sharded=way == "fsdp2", fsdp=RAM_EFFICIENT, **changes)
        for way in ("ddp", "fsdp2")
    }


def trained_head(world, folder, task, kind):
    """The same with a head that is trained whole beside the adapter, and whose weight is not that of the embedding."""
    with PartialState().main_process_first():
        if not (folder / "world").exists():
            model = AutoModelForCausalLM.from_pretrained(world)
            model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach() * 1.3)
            model.config.tie_word_embeddings = False
            model.save_pretrained(folder / "world")
            AutoTokenizer.from_pretrained(world).save_pretrained(folder / "world")
    return cell(str(folder / "world"), folder, task, kind, adapter={"modules_to_save": ["lm_head"]})


def read_by_one(world, folder, kind):
    """FSDP2 where, as with older versions of transformers, all weights of the second process are zeros until it is sharded."""

    def load(*args, **kwargs):
        model = create_model_from_path(*args, **kwargs)
        with torch.no_grad():
            for parameter in model.parameters() if PartialState().process_index else ():
                parameter.zero_()
        return model

    with patch.object(sft_trainer, "create_model_from_path", load):
        one = run(world, folder / "one", "sft", kind, sharded=True, fsdp=RAM_EFFICIENT)
    return {"one": one, "all": run(world, folder / "all", "sft", kind, sharded=True, fsdp=RAM_EFFICIENT)}


def in_bfloat16(world, folder):
    """Log-probabilities of GRPO in mixed precision, as accelerate_configs/fsdp2.yaml has it."""
    seen, on_loss = [], DeltaGRPOTrainer.on_loss

    def watched(self, rows, logps):
        seen.append((logps * rows["completion_mask"]).detach().clone())
        on_loss(self, rows, logps)

    settings = {
        "bf16": True,
        "model_init_kwargs": {"dtype": "bfloat16"},
        "max_steps": 1,
        "rollout_func": frozen_groups,
    }
    with patch.object(DeltaGRPOTrainer, "on_loss", watched):
        found = {
            way: run(world, folder / way, "grpo", "bone", sharded=way == "fsdp2", fsdp=RAM_EFFICIENT, **settings)[
                "mode"
            ]
            for way in ("ddp", "fsdp2")
        }
    return {"modes": found, "logps": seen}


def spread(task, processes):
    """Settings with which every optimizer step has the same rows, of however many processes."""
    if task == "sft":
        return {"per_device_train_batch_size": 4 // processes}
    one = dict.fromkeys(("gradient_accumulation_steps", "steps_per_generation", "num_iterations"), 1)
    return {**one, "per_device_train_batch_size": 32 // processes, "max_steps": 3, "rollout_func": frozen_groups}


def spread_over_two(world, folder, task, kind):
    return run(world, folder, task, kind, **spread(task, 2))


def refused(world, folder):
    """What trainers say to FSDP2 with activation checkpointing of its own, and with a tied head that is trained; "" is nothing."""
    said = {}
    for name, kind, fsdp, adapter in (
        ("checkpointing", "lora", {"activation_checkpointing": True}, {}),
        ("checkpointing of a model", FULL, {"activation_checkpointing": True}, {}),
        ("head", "lora", {}, {"modules_to_save": ["lm_head"]}),
        ("embedding", "bone", RAM_EFFICIENT, {"modules_to_save": ["embed_tokens"]}),
        ("norms", "bone", RAM_EFFICIENT, {"modules_to_save": ["norm"]}),
    ):
        with launched_with(True, kind, **fsdp) as settings:
            try:
                build(world, folder / name, "sft", peft_config(kind, **adapter), **settings)
                said[name] = ""
            except InputError as error:
                said[name] = str(error)
    return {"said": said}


LEARNING = {
    "optim": "adamw_torch",
    "learning_rate": 1e-2,
    "max_grad_norm": 1.0,
    "save_strategy": "steps",
}
# GRPO is cut in the middle of its second window.
CUTS = {
    "sft": {"save_steps": 2, "max_steps": 4},
    "grpo": {"save_steps": 6, "max_steps": 9, "prompt_groups": "pass_rate"},
}


def resumed(world, folder, task, kind, **fsdp):
    """Under FSDP2: a run that is never stopped, and one that is and goes on from its checkpoint."""
    cut, peft = CUTS[task]["save_steps"], partial(peft_config, kind, dropout=0.2)
    plans, found = [PlanRecorder(), PlanRecorder()], {"runs": [], "checkpoint": str(folder / f"cut/checkpoint-{cut}")}
    with launched_with(True, kind, **fsdp) as settings:
        settings = {**settings, **LEARNING, **CUTS[task]}
        for name, plan in zip(("straight", "cut"), plans):
            if name == "cut":
                stopped = build(world, folder / name, task, peft(), callbacks=[StopAt(cut)], **settings)
                stopped.train()
                found["logits"] = logits(stopped.model)
            trainer = build(world, folder / name, task, peft(), **settings)
            if task == "grpo":
                plan.of(trainer)
            trainer.train(resume_from_checkpoint=name == "cut")
            state = folder / name / f"checkpoint-{CUTS[task]['max_steps']}" / STATE_FILE
            found["runs"].append(
                {
                    "mode": mode_of(trainer),
                    "steps": trainer.state.global_step,
                    "parameters": parameters(trainer),
                    "learnt": learnt(trainer),
                    "saved": load_state(state) if task == "grpo" else {},
                    "plans": plan.counts,
                }
            )
    return found


FAST = ["sft_full", "sft_bone", "sft_pmss", "grpo_fast_dora", "grpo_bone", "grpo_bat_row", "grpo_edora"]
TABLE = {f"{task}_{kind}": partial(cell, task=task, kind=kind) for kind in ADAPTERS for task in BUILD}
# What of their weights is kept outside of parameters.
READ_WEIGHTS = ["pmss", "edora"]
HEADS = {
    "sft_lora_head": partial(trained_head, task="sft", kind="lora"),
    "grpo_bone_head": partial(trained_head, task="grpo", kind="bone"),
}
SPREAD = {"sft": "edora", "grpo": "bone"}
CASES = {
    **{name: TABLE[name] for name in FAST},
    **{f"spread_{task}": partial(spread_over_two, task=task, kind=kind) for task, kind in SPREAD.items()},
    **HEADS,
    **{f"read_by_one_{kind}": partial(read_by_one, kind=kind) for kind in READ_WEIGHTS},
    "resume_grpo_pmss": partial(resumed, task="grpo", kind="pmss", **RAM_EFFICIENT),
    "refused_by_fsdp2": refused,
    "grpo_bfloat16": in_bfloat16,
}
# In a launch of their own.
SLOW = {
    **{name: case for name, case in TABLE.items() if name not in FAST},
    "resume_sft_bone": partial(resumed, task="sft", kind="bone"),
    "resume_sft_edora": partial(resumed, task="sft", kind="edora", **RAM_EFFICIENT),
    "resume_grpo_bone": partial(resumed, task="grpo", kind="bone"),
}
