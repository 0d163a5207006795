"""Cases that run under DDP, ZeRO-2 and ZeRO-3. A case is a function `(world, folder, stage) -> dict`; stage 0 is DDP.

One line in `CASES` adds one. Recordings are gathered, so that the same names have the same shapes under every stage;
`test_zero.py` compares them. A trainer needs `use_cpu=stage == 0`; everything else comes from the launch.
"""

import json
from contextlib import nullcontext
from functools import partial
from unittest.mock import patch

import torch
from accelerate import PartialState
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_delta import DeltaGRPOConfig, DeltaGRPOTrainer, InputError
from hf_delta import train as training
from hf_delta.adapters.dora import fast_dora
from hf_delta.checkpoint import STATE_FILE, load_state
from hf_delta.recipe import load_recipe
from tests.adapters.life import perturb
from tests.distributed.cases import KEPT, build
from tests.distributed.through_vllm import FAST_DORA, peft_config_of
from tests.rl.frozen import dataset, frozen_reward, frozen_rollouts
from tests.rl.gdro import binary_reward, frozen_groups
from tests.rl.test_gdro import LEARNING, PlanRecorder
from tests.rl.test_resume import StopAt
from tests.rl.test_trainer import config
from tests.running import CPU, write


KINDS = ["lora", FAST_DORA, "bone", "bat_row", "pmss", "edora"]
SGD = {"optim": "sgd", "max_steps": 3, "max_grad_norm": 0.0}
# PMSS changes a weight by products of three matrices of which two are small.
RATES = {"pmss": 20.0}
# Of SFT only, without an adapter.
FULL = "full"


def sgd(kind):
    return {**SGD, "learning_rate": RATES.get(kind, 0.5)}


# -- what was trained, and whether it was sharded -------------------------------------------------------------------
def whole(tensors):
    """Copies of tensors by name, gathered where DeepSpeed has partitioned them; a collective."""
    partitioned = [t for t in tensors.values() if hasattr(t, "ds_id")]
    if not partitioned:
        return {name: tensor.detach().clone() for name, tensor in tensors.items()}
    import deepspeed

    with deepspeed.zero.GatheredParameters(partitioned):
        return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def trained(trainer):
    """Trained parameters, whole, under the names of the unwrapped model; a collective."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    return whole({name: p for name, p in model.named_parameters() if p.requires_grad})


def is_partitioned(trainer):
    """Whether each parameter of the model belongs to DeepSpeed, and nothing of it is there outside of a forward."""
    return all(hasattr(p, "ds_id") and p.numel() == 0 for p in trainer.model.parameters())


def sharding(trainer):
    """What says that a trainer was sharded: kind of launch, wrapper, stage, and how much one process has of a whole."""
    found = {
        "kind": trainer.accelerator.distributed_type.value,
        "wrapper": type(trainer.model_wrapped).__name__,
        "partitioned": is_partitioned(trainer),
        "trained": sum(getattr(p, "ds_numel", p.numel()) for p in trainer.model.parameters() if p.requires_grad),
    }
    if found["wrapper"] != "DeepSpeedEngine":
        return {**found, "stage": 0, "optimized": found["trained"]}
    engine = trainer.model_wrapped
    states = engine.optimizer.fp32_partitioned_groups_flat if engine.zero_optimization_stage() == 3 else (
        engine.optimizer.single_partition_of_fp32_groups
    )  # fmt: skip
    return {**found, "stage": engine.zero_optimization_stage(), "optimized": sum(s.numel() for s in states)}


# -- cases ----------------------------------------------------------------------------------------------------------
def sft(world, folder, stage, kind):
    """A recipe through [`hf_delta.train.run`], with a checkpoint on the way; what is saved is looked at afterwards."""
    rows = [{"prompt": f"{7 * i}+{i}:", "completion": f"{8 * i};"} for i in range(24)]
    data = folder / "rows.jsonl"
    with PartialState().main_process_first():
        if not data.exists():
            data.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    values = {
        "trainer": "sft",
        "model_name_or_path": world,
        "train_file": str(data),
        "output_dir": str(folder / "out"),
    }
    values |= {**CPU, "use_cpu": stage == 0, **sgd(kind), "per_device_train_batch_size": 4, "logging_steps": 1}
    # As TRL has it by default: what a layer reads has to be gathered in the backward pass too.
    values["gradient_checkpointing"] = True
    values |= {"save_strategy": "steps", "save_steps": 2, **({} if kind == FULL else {"peft_config": recipe_of(kind)})}
    mine = folder / str(PartialState().process_index)
    mine.mkdir()
    # The launch goes on after this run: its process group stays.
    with patch.object(training, "_end", KEPT.append):
        training.run(load_recipe(str(write(mine, values)), []))
    return {"sharding": sharding(KEPT[-1]), "parameters": trained(KEPT[-1]), "saved": str(folder / "out")}


def recipe_of(kind):
    """As `peft_config_of`, in the words of a recipe."""
    method, changes = {
        FAST_DORA: ("lora", {"use_dora": True}),
        "bat_row": ("bone", {"mode": "bat_row"}),
    }.get(kind, (kind, {}))
    return {"method": method, "r": 8, "target_modules": "all-linear", **changes}


def grpo(world, folder, stage, kind):
    """Delta-L, weights of Prompt-GDRO and budgets of Rollout-GDRO at once: rollouts that are a function of the prompt."""
    # Each process draws other numbers for the start of an adapter, of which one start must become.
    torch.manual_seed(PartialState().process_index)
    settings = {**LEARNING, **sgd(kind), "save_strategy": "no", "use_cpu": stage == 0, "reward": binary_reward}
    settings |= {"per_device_train_batch_size": 16, "steps_per_generation": 1, "num_iterations": 1}
    # The loss of rollouts of the present policy is 0, and weights by it would all be 1.
    settings |= {"prompt_weighting_kwargs": {"signal": "failure", "eta": 2.0}}
    plans = PlanRecorder()
    with fast_dora() if kind == FAST_DORA else nullcontext():
        trainer = plans.of(
            build(world, folder, rollout_func=frozen_groups, peft_config=peft_config_of(kind), **settings)
        )
        trainer.train()
    return {"sharding": sharding(trainer), "parameters": trained(trainer), **learnt(trainer), "plans": plans.counts}


def reference(world, folder, stage, kind):
    """An adapter that is in the model already, of which TRL makes a second one as the reference."""
    model = perturb(get_peft_model(AutoModelForCausalLM.from_pretrained(world), peft_config_of(kind)))
    settings = {
        **sgd(kind),
        "beta": 0.3,
        "use_cpu": stage == 0,
        "per_device_train_batch_size": 16,
        "num_iterations": 1,
    }
    args, tokenizer = config(folder, **settings), AutoTokenizer.from_pretrained(world)
    kwargs = {"processing_class": tokenizer, "rollout_func": frozen_rollouts}
    trainer = DeltaGRPOTrainer(model, frozen_reward, args, dataset(), **kwargs)
    KEPT.append(trainer)
    trainer.train()
    names = set(trainer.model.peft_config)
    model = {n: p for n, p in trainer.model.named_parameters() if any(f".{name}." in n for name in names)}
    return {
        "sharding": sharding(trainer),
        "adapters": sorted(names),
        "parameters": whole(model),
        "kl": [row["kl"] for row in trainer.state.log_history if "kl" in row],
    }


def broken(world, folder, stage, kind):
    """What a forward says of an adapter with a value that is not a number."""
    settings = {**LEARNING, **sgd(kind), "save_strategy": "no", "use_cpu": stage == 0, "reward": binary_reward}
    settings |= {"per_device_train_batch_size": 16, "steps_per_generation": 1, "num_iterations": 1}
    trainer = build(world, folder, rollout_func=frozen_groups, peft_config=peft_config_of(kind), **settings)
    with torch.no_grad():
        next(p for p in trainer.model.parameters() if p.requires_grad).fill_(float("nan"))
    try:
        trainer.train()
    except InputError as error:
        return {"said": str(error), "sharding": sharding(trainer)}
    return {"said": None}


def learnt(trainer):
    """What both games know."""
    return {
        "learnt": {
            "curriculum": trainer.curriculum.state_dict(),
            "weights": trainer.advantage_transforms[1].state_dict(),
        }
    }


def resumed(world, folder, stage, kind, cut=7):
    """Sampled rollouts and AdamW. A window has 4 steps, so that step 7 lies inside of one."""
    settings = {**LEARNING, "per_device_train_batch_size": 4, "use_cpu": stage == 0}
    plans, runs = [PlanRecorder(), PlanRecorder()], []

    def run(name, **changes):
        return build(world, folder / name, peft_config=peft_config_of(kind), **settings, **changes)

    runs.append(plans[0].of(run("straight")))
    runs[0].train()
    run("cut", callbacks=[StopAt(cut)]).train()
    runs.append(plans[1].of(run("cut")))
    runs[1].train(resume_from_checkpoint=True)
    return {
        "sharding": sharding(runs[1]),
        "plans": [plan.counts for plan in plans],
        "parameters": [trained(run) for run in runs],
        "here": [learnt(run) for run in runs],
        "kept": [
            load_state(folder / name / "checkpoint-10" / STATE_FILE)["curriculum"] for name in ("straight", "cut")
        ],
        "saved": str(folder / "cut" / "checkpoint-10"),
    }


def constructed(world, folder, stage):
    """Adapters on a model that is read as the launch says, with other random numbers in each process.

    What they are made of on each rank, before any trainer sees them.
    """
    KEPT.append(config(folder, DeltaGRPOConfig, use_cpu=stage == 0))
    return {kind: made(world, kind) for kind in KINDS}


def made(world, kind):
    torch.manual_seed(PartialState().process_index)
    with fast_dora() if kind == FAST_DORA else nullcontext():
        base = AutoModelForCausalLM.from_pretrained(world)
        empty = all(p.numel() == 0 for p in base.parameters())
        model = get_peft_model(base, peft_config_of(kind))
    KEPT.append(model)
    return {
        "empty": empty,
        "adapter_empty": all(p.numel() == 0 for p in model.parameters() if p.requires_grad),
        "parameters": whole({n: p for n, p in model.named_parameters() if p.requires_grad}),
        "buffers": {n: b.clone() for n, b in model.named_buffers()},
    }


CASES = {
    "constructed": constructed,
    **{f"sft_{kind}": partial(sft, kind=kind) for kind in [*KINDS, FULL]},
    **{f"grpo_{kind}": partial(grpo, kind=kind) for kind in KINDS},
    **{f"reference_{kind}": partial(reference, kind=kind) for kind in ("pmss", "edora")},
    "resumed": partial(resumed, kind="edora"),
    # Last, because an error in the middle of a step leaves an engine there.
    **{f"broken_{kind}": partial(broken, kind=kind) for kind in ("bone", "edora")},
}
