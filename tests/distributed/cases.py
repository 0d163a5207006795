"""Cases that run in two processes. A case is a function `(world, folder) -> dict`, and one line in `CASES`.

Each process returns its own dict; `test_two_processes.py` compares them with each other and with one process.
"""

from functools import partial

import trl
from peft import LoraConfig
from torch.distributed.tensor import DTensor

from hf_delta import DeltaGRPOConfig, DeltaGRPOTrainer
from hf_delta.checkpoint import STATE_FILE, load_state
from tests.adapters.life import DORA, KINDS
from tests.distributed import preference
from tests.distributed.fsdp_on_cpu import FSDP2, fsdp_on_cpu
from tests.distributed.interrupted import CASES as INTERRUPTED
from tests.distributed.matrix import CASES as MATRIX
from tests.distributed.preference_sharded import FAST as PREFERENCE_SHARDED
from tests.distributed.preference_sharded import untied_world
from tests.distributed.saving import CASES as SAVING
from tests.distributed.sharded_adapters import left_whole, sharded_adapter
from tests.distributed.through_vllm import CASES as VLLM
from tests.rl.frozen import GENERATIONS, PROMPTS, GradientRecorder, frozen_rollouts
from tests.rl.gdro import GDRO, binary_reward, frozen_groups
from tests.rl.test_gdro import LEARNING as LEARNING_GDRO
from tests.rl.test_gdro import PlanRecorder
from tests.rl.test_resume import StopAt
from tests.rl.test_trainer import build as build_trainer
from tests.rl.test_trainer import lora


FROZEN = {
    "loss_type": "delta_l",
    "delta_l_alpha": 0.75,
    "delta_l_scope": "group",
    "mask_truncated_completions": True,
    "rollout_func": partial(frozen_rollouts, fraction_truncated=0.3),
    "learning_rate": 0.0,
    "optim": "sgd",
}
ROWS = PROMPTS * GENERATIONS // 2
LEARNING = {
    "loss_type": "delta_l",
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "steps_per_generation": 4,
    "num_iterations": 2,
    "max_steps": 6,
    "learning_rate": 3e-3,
    "save_strategy": "steps",
    "save_steps": 1,
}


KEPT = []


def build(*args, **kwargs):
    """A trainer that lives as long as its process: freeing what holds process groups races with gloo's threads."""
    KEPT.append(build_trainer(*args, **kwargs))
    return KEPT[-1]


def full(tensor):
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def trained(trainer):
    """Trained parameters, gathered (a collective), under the names of the unwrapped model."""
    return {n: full(p) for n, p in trainer.model.named_parameters() if p.requires_grad}


def frozen_gradient(world, folder, **changes):
    recorder = GradientRecorder()
    settings = {"per_device_train_batch_size": ROWS, **FROZEN, **changes}
    trainer = build(world, folder, callbacks=[recorder], **settings)
    trainer.train()
    return {
        "sharded": trainer.accelerator.is_fsdp2 and all(isinstance(p, DTensor) for p in trainer.model.parameters()),
        "gradient": {n: full(g) for n, g in recorder.gradients[0].items()},
    }


def head_gradient(world, folder, **changes):
    """An adapter, and a head of its own that is trained beside it."""
    adapter = LoraConfig(r=4, target_modules="all-linear", modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    return frozen_gradient(untied_world(world, folder), folder, peft_config=adapter, **changes)


def what_a_rule_sees(world, folder):
    trainer = build(
        world,
        folder,
        per_device_train_batch_size=8,
        steps_per_generation=2,
        max_steps=2,
        rollout_func=frozen_rollouts,
        advantage_transforms=["tests.rl.test_trainer.CountingRule"],
    )
    trainer.train()
    return {"batch": vars(trainer.advantage_transforms[0].batches[0])}


def features_off(world, folder):
    settings = {**LEARNING, "loss_type": "dapo", "save_strategy": "no"}
    theirs = build(world, folder / "theirs", trl.GRPOTrainer, trl.GRPOConfig, **settings)
    theirs.train()
    ours = build(world, folder / "ours", DeltaGRPOTrainer, DeltaGRPOConfig, **settings)
    ours.train()
    return {"theirs": trained(theirs), "ours": trained(ours)}


def resume(world, folder, cut=3, **changes):
    """A window is 4 optimizer steps of 2 micro-batches, so step 3 lies inside one."""
    settings = {**LEARNING, **changes}
    straight = build(world, folder / "straight", peft_config=lora(0.2), **settings)
    straight.train()
    build(world, folder / "cut", peft_config=lora(0.2), callbacks=[StopAt(cut)], **settings).train()
    again = build(world, folder / "cut", peft_config=lora(0.2), **settings)
    again.train(resume_from_checkpoint=True)
    return {
        "sharded": again.accelerator.is_fsdp2 and all(isinstance(p, DTensor) for p in again.model.parameters()),
        "steps": again.state.global_step,
        "straight": trained(straight),
        "resumed": trained(again),
    }


def gdro_gradient(world, folder, **changes):
    """Gradient of the second step, with weights learnt in the first and groups that reach over both processes."""
    recorder = GradientRecorder()
    settings = {
        "per_device_train_batch_size": ROWS,
        "max_steps": 2,
        "learning_rate": 0.0,
        "optim": "sgd",
        **GDRO,
        **changes,
    }
    trainer = build(world, folder, callbacks=[recorder], rollout_func=frozen_groups, reward=binary_reward, **settings)
    trainer.train()
    return {
        "sharded": trainer.accelerator.is_fsdp2 and all(isinstance(p, DTensor) for p in trainer.model.parameters()),
        "gradient": {n: full(g) for n, g in recorder.gradients[1].items()},
    }


def gdro_resume(world, folder, cut=7, controller="variance"):
    """A window has 4 steps; what each run handed out, what it ends with, and what it knows then."""
    settings = {
        **LEARNING_GDRO,
        "per_device_train_batch_size": 4,
        "rollout_allocation_kwargs": {"controller": controller},
    }
    plans, runs = [PlanRecorder(), PlanRecorder()], []
    runs.append(plans[0].of(build(world, folder / "straight", peft_config=lora(0.2), **settings)))
    runs[0].train()
    build(world, folder / "cut", peft_config=lora(0.2), callbacks=[StopAt(cut)], **settings).train()
    runs.append(plans[1].of(build(world, folder / "cut", peft_config=lora(0.2), **settings)))
    runs[1].train(resume_from_checkpoint=True)
    return {
        "plans": [plan.counts for plan in plans],
        "parameters": [trained(run) for run in runs],
        "here": [
            {"curriculum": r.curriculum.state_dict(), "rules": r.advantage_transforms[1].state_dict()} for r in runs
        ],
        "saved": [
            load_state(folder / run / "checkpoint-10" / STATE_FILE)["curriculum"] for run in ("straight", "cut")
        ],
    }


def under_fsdp2(case):
    def run(world, folder):
        with fsdp_on_cpu():
            return case(world, folder, **FSDP2)

    return run


CASES = {
    "delta_l": frozen_gradient,
    "delta_l_batch": partial(frozen_gradient, delta_l_scope="batch"),
    # Generation batches of one group of 4, of which each process holds 2: only there is a group split over processes.
    "delta_l_split_groups": partial(
        frozen_gradient, per_device_train_batch_size=2, gradient_accumulation_steps=8, steps_per_generation=1
    ),
    "rule": what_a_rule_sees,
    "features_off": features_off,
    "resume": resume,
    "gdro": gdro_gradient,
    "gdro_fsdp2": under_fsdp2(gdro_gradient),
    "gdro_resume": gdro_resume,
    "gdro_resume_exp3": partial(gdro_resume, controller="exp3"),
    "delta_l_fsdp2": under_fsdp2(frozen_gradient),
    "resume_fsdp2": under_fsdp2(resume),
    "head": head_gradient,
    "head_fsdp2": under_fsdp2(head_gradient),
    **{f"dpo_{method}": partial(preference.frozen, method=method) for method in preference.METHODS},
    "dpo_evaluated": preference.evaluated,
    "dpo_features_off": preference.features_off,
    "dpo_resume": preference.resumed,
    **INTERRUPTED,
    **PREFERENCE_SHARDED,
    **{f"fully_shard_{kind}": partial(sharded_adapter, kind=kind) for kind in [*KINDS, *DORA]},
    "left_whole_bone": partial(left_whole, kind="bone"),
    "left_whole_dora": partial(left_whole, kind="dora"),
    **SAVING,
    **VLLM,
    **MATRIX,
}
