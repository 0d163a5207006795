"""Cases of runs that are told to leave, and of runs that go on with another number of processes."""

import os
import signal
from functools import partial

from transformers import TrainerCallback

from hf_delta.run.leaving import StopOnSigterm
from tests.distributed.matrix import build_sft
from tests.preference.dpo import build as build_dpo
from tests.preference.dpo import lora, mask_parameters, parameters
from tests.rl.gdro import GDRO, binary_reward, frozen_groups
from tests.rl.test_resume import StopAt
from tests.rl.test_trainer import build as build_grpo


KEPT = []
STEPS, CUT = 6, 3
SAVING = {"max_steps": STEPS, "save_strategy": "steps", "save_steps": 1, "optim": "sgd", "learning_rate": 0.05}
# Rows of a step, and of a GRPO generation, which two processes share and one takes in two passes.
ROWS = {"sft": 8, "dpo": 8, "grpo": 32}
MASKS = {
    "loss_type": ["sparse_po"],
    "token_weights_kwargs": {"dropout": 0.0, "sharing": "independent", "l1_reward": 0.01},
    "feasible": True,
    "feasible_kwargs": {"epsilon": 0.6, "eta": 0.7},
}
LEARNT = {**GDRO, "prompt_groups": "pass_rate", "difficulty_kwargs": {"prior_column": "level"}}


class Told(TrainerCallback):
    """One process gets SIGTERM in the middle of a step."""

    def __init__(self, rank, step):
        self.rank, self.step = rank, step

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if args.process_index == self.rank and state.global_step + 1 == self.step:
            os.kill(os.getpid(), signal.SIGTERM)


def told_to_leave(world, folder):
    trainer = build_sft(world, folder, lora(), callbacks=[Told(1, CUT)], **{**SAVING, "save_steps": 100})
    KEPT.append(trainer)
    leaving = StopOnSigterm(trainer.accelerator)
    trainer.add_callback(leaving)
    before = signal.getsignal(signal.SIGTERM)
    with leaving.listening():
        trainer.train()
    return {
        "stopped": leaving.stopped,
        "step": trainer.state.global_step,
        "checkpoints": sorted(path.name for path in folder.glob("checkpoint-*")),
        "listens_no_more": signal.getsignal(signal.SIGTERM) == before,
    }


def build(trainer, world, folder, processes, passes=None, **changes):
    passes = passes or 2 // processes
    rows = {"per_device_train_batch_size": ROWS[trainer] // 2, "gradient_accumulation_steps": passes}
    settings = {**SAVING, **rows, "peft_config": lora(), **changes}
    if trainer == "sft":
        found = build_sft(world, folder, settings.pop("peft_config"), **settings)
    elif trainer == "dpo":
        found = build_dpo(world, folder, **MASKS, **settings)
    else:
        settings["steps_per_generation"] = settings.get("steps_per_generation", passes)
        found = build_grpo(world, folder, rollout_func=frozen_groups, reward=binary_reward, **LEARNT, **settings)
    KEPT.append(found)
    return found


def learnt(trainer):
    """What a run has made of its parameters, and what it knows besides."""
    found = {"parameters": {n: p.detach().clone() for n, p in parameters(trainer).items()}}
    if getattr(trainer, "mask_network", None) is not None:
        found |= {"masks": mask_parameters(trainer), "multipliers": trainer.multipliers.state_dict()}
    if getattr(trainer, "curriculum", None) is not None:
        found["curriculum"] = trainer.curriculum.state_dict()
        found["rules"] = [rule.state_dict() for rule in trainer.advantage_transforms if hasattr(rule, "state_dict")]
    return found


def cut_for_one(world, folder, trainer):
    """A straight run of two processes, and one that stops, with which one process is to go on."""
    straight = build(trainer, world, folder / "straight", 2)
    straight.train()
    build(trainer, world, folder / "cut", 2, callbacks=[StopAt(CUT)]).train()
    return {"folder": str(folder / "cut"), **learnt(straight)}


CASES = {
    "told_to_leave": told_to_leave,
    **{f"cut_for_one_{trainer}": partial(cut_for_one, trainer=trainer) for trainer in ROWS},
}
