"""Weights on their way to the engine from two processes: DDP, FSDP2 by Accelerate, and `fully_shard` without a trainer."""

import copy
from contextlib import nullcontext
from functools import partial

import torch
import trl
from torch.distributed.tensor import DTensor

from hf_delta import DeltaGRPOConfig, DeltaGRPOTrainer
from hf_delta.adapters.dora import fast_dora
from hf_delta.adapters.stream import merged_weights
from tests.adapters.life import DORA, KINDS, config_of
from tests.distributed.fsdp_on_cpu import FSDP2, fsdp_on_cpu
from tests.distributed.sharded_adapters import shard
from tests.rl.engine import Syncs, built, engine_of, local, logged
from tests.rl.merged import METHODS, model_of


FAST_DORA = "fast_dora"
# Two names for one weight, which no engine that ties them can hold.
STREAMED = [*(kind for kind in METHODS if kind != "head_trained"), *KINDS, FAST_DORA]
STEPS = 2
KEPT = []


def peft_config_of(kind):
    if kind in KINDS | DORA:
        return config_of(kind)
    cls, fields = METHODS["peft_dora" if kind == FAST_DORA else kind]
    return cls(**{"target_modules": "all-linear", "task_type": "CAUSAL_LM", **fields})


def streamed(world, folder):
    """For each kind of adapter, what differs between shards that are streamed and one piece that is merged."""
    return {"kinds": {kind: compare(kind) for kind in STREAMED}}


def compare(kind):
    with fast_dora() if kind == FAST_DORA else nullcontext():
        model = model_of("dora" if kind == FAST_DORA else kind)
        expected = dict(copy.deepcopy(model).merge_and_unload().named_parameters())
        try:
            shard(model)
        except (TypeError, ValueError) as error:
            return {"unshardable": str(error)}
        before = {n: (p, local(p).clone()) for n, p in model.named_parameters()}
        found = {name: tensor.clone() for name, tensor in merged_weights(model)}
    now = dict(model.named_parameters())
    return {
        "sharded": all(isinstance(p, DTensor) for p in now.values()),
        "names": list(found) == list(expected),
        "wrong": [n for n, w in expected.items() if not torch.equal(found.get(n, torch.zeros(())), w)],
        "touched": [n for n, (p, value) in before.items() if now[n] is not p or not torch.equal(local(p), value)],
    }


def trained(world, folder, kinds, sharded, ours=True, **changes):
    """What [`Syncs`] saw in a run with each kind of adapter, under DDP or FSDP2."""
    found = {}
    classes = (DeltaGRPOTrainer, DeltaGRPOConfig) if ours else (trl.GRPOTrainer, trl.GRPOConfig)
    settings = {"max_steps": STEPS, "per_device_train_batch_size": 4, "max_completion_length": 4, **changes}
    settings |= FSDP2 if sharded else {}
    for kind in kinds:
        with fsdp_on_cpu() if sharded else nullcontext(), fast_dora() if kind == FAST_DORA else nullcontext():
            with built(world, folder / kind, *classes, peft_config=peft_config_of(kind), **settings) as trainer:
                syncs = Syncs(trainer, world, partial(peft_config_of, kind))
                trainer.train()
            KEPT.append(trainer)
            engine = trainer.vllm_mode == "colocate" or trainer.accelerator.is_main_process
            found[kind] = {
                "sharded": trainer.accelerator.is_fsdp2
                and all(isinstance(p, DTensor) for p in trainer.model.parameters()),
                "syncs": engine_of(trainer).syncs if engine else None,
                "wrong": syncs.wrong,
                "touched": syncs.touched,
                "merged": syncs.merged,
                "ratios": [
                    ratio
                    for end in ("min", "max")
                    for ratio in logged(trainer, f"sampling/importance_sampling_ratio/{end}")
                ]
                if trainer.accelerator.is_main_process
                else [],
            }
    return {"kinds": found}


SENT = ["lora", "rslora", "peft_dora", FAST_DORA, "miss", "pmss", "bone", "bat_row", "edora"]
RULE = "tests.rl.test_vllm.FromOneToTheNext"
VARIABLE = {
    "rollout_allocation": RULE,
    "correct_threshold": 1.0,
    "mask_truncated_completions": True,
    "per_device_train_batch_size": 16,
}
CASES = {
    "streamed": streamed,
    "vllm_ddp": partial(trained, kinds=SENT, sharded=False),
    "vllm_fsdp2": partial(trained, kinds=SENT, sharded=True),
    "vllm_server_fsdp2": partial(trained, kinds=["peft_dora", "bat_row"], sharded=True, vllm_mode="server"),
    "vllm_sleep_fsdp2": partial(trained, kinds=["miss"], sharded=True, vllm_enable_sleep_mode=True),
    "vllm_variable_fsdp2": partial(trained, kinds=["edora"], sharded=True, **VARIABLE),
    "vllm_trl_fsdp2": partial(trained, kinds=["peft_dora", "miss"], sharded=True, ours=False),
}
