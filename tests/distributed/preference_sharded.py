"""Cases of `DeltaDPOTrainer` under FSDP2 and DeepSpeed, and the same under DDP, to which they are compared."""

import os
from contextlib import contextmanager, nullcontext
from functools import partial
from unittest.mock import patch

import torch
from accelerate import PartialState
from datasets import Dataset
from peft import get_peft_model
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_delta._compat import kernels
from hf_delta.adapters.dora import fast_dora
from hf_delta.preference.weights import SparsePOWeights
from tests.adapters.life import config_of
from tests.distributed import preference
from tests.distributed.deepspeed_on_cpu import not_partitioned
from tests.distributed.fsdp_on_cpu import FSDP2, fsdp_on_cpu
from tests.preference.dpo import lora, metrics, pair_rows, perturb
from tests.rl.frozen import GradientRecorder
from tests.rl.test_resume import StopAt


SPARSE = preference.SPARSE
COMMON = {"loss_type": ["sparse_po"], "token_weights_kwargs": {"dropout": 0.0, "net": "two_layer", "l1_kl": 0.01}}
SGD = {"optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0.0}


def weighted_rows():
    """Weights that differ from side to side, one for each completion."""
    return [
        row | {"chosen_weights": 0.5 + 0.1 * i, "rejected_weights": 1.4 - 0.1 * i} for i, row in enumerate(pair_rows())
    ]


# What a run is, besides the settings of its trainer: `adapter` (a kind, or None for all weights), `untied` (a head of its own),
# `trained` (an adapter that is there before, and so a second one for the reference), `head` (trained beside the adapter), `triton`
# (TRL's kernels as on a device with Triton).
METHODS = {
    **preference.METHODS,
    "sparse_po_common": COMMON,
    "sparse_po_untied": {**SPARSE, "adapter": None, "untied": True},
    "mapo": {"loss_type": ["mapo"]},
    "mapo_full": {"loss_type": ["mapo"], "adapter": None, "logps_kernel": "chunked"},
    "tdpo2_untied": {"loss_type": ["tdpo2"], "adapter": None, "untied": True},
    "tdpo2_untied_chunked": {"loss_type": ["tdpo2"], "adapter": None, "untied": True, "logps_kernel": "chunked"},
    "tdpo2_triton": {"loss_type": ["tdpo2"], "adapter": None, "untied": True, "triton": True},
    "tdpo2_head": {"loss_type": ["tdpo2"], "untied": True, "head": True},
    "tdpo2_sampled": {"loss_type": ["tdpo2"], "kl": "sampled", "adapter": None},
    "tdpo1_trained": {"loss_type": ["tdpo1"], "trained": True},
    "columns": {"loss_type": ["ipo"], "token_weights": "columns", "rows": weighted_rows()},
    "feasible_full": {**preference.FEASIBLE, "adapter": None},
    "lipo_feasible": {**preference.FEASIBLE, "loss_type": ["lipo_lambda"], "adapter": None},
    **{f"sparse_po_{kind}": {**SPARSE, "adapter": kind} for kind in ("pmss", "bone", "bat_row", "edora", "dora")},
}


@contextmanager
def sharding(kind, config=None):
    """Settings of a trainer that is to be sharded as `kind` says, and may only be built and used inside of this."""
    if kind == "fsdp2":
        with fsdp_on_cpu(), patch.dict(os.environ, {"ACCELERATE_USE_FSDP": "true"}):
            yield {**FSDP2, "fsdp_config": FSDP2["fsdp_config"] | (config or {})}
    else:
        # What DeepSpeed is to do stands in the launch.
        yield {"use_cpu": kind == "ddp"}


def full(tensor):
    """A whole copy; a collective."""
    if hasattr(tensor, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([tensor]):
            return tensor.detach().clone()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def name_of(name):
    """Without what wrappers add to it."""
    return name.removeprefix("module.").replace("_checkpoint_wrapped_module.", "")


class Recorder(GradientRecorder):
    """Also whether all is sharded at that time: a forward without a backward leaves FSDP2's root as a whole."""

    def __init__(self):
        super().__init__()
        self.sharded = []

    def of(self, trainer):
        self.trainer = trainer
        return trainer

    def on_pre_optimizer_step(self, *args, **kwargs):
        super().on_pre_optimizer_step(*args, **kwargs)
        self.sharded.append(is_sharded(self.trainer))


def is_sharded(trainer):
    """Whether every parameter is, or under ZeRO-2 half of the optimizer's copies; those of masks and of a reference too."""
    models = [trainer.model, *([] if trainer.ref_model is None else [trainer.ref_model])]
    parameters = [p for model in models for p in model.parameters()]
    if not trainer.is_deepspeed_enabled:
        return trainer.accelerator.is_fsdp2 and all(isinstance(p, DTensor) for p in parameters)
    engine = trainer.model_wrapped
    if engine.zero_optimization_stage() == 3:
        return all(hasattr(p, "ds_id") and p.numel() == 0 for p in parameters)
    kept = sum(part.numel() for part in engine.optimizer.single_partition_of_fp32_groups)
    return engine.zero_optimization_stage() == 2 and kept <= 0.51 * sum(
        p.numel() for p in trainer.model.parameters() if p.requires_grad
    )


def untied_world(world, folder):
    """Where the same model is with a head of its own."""
    path, state = folder / "untied", PartialState()
    if state.is_main_process and not path.exists():
        with not_partitioned():
            torch.manual_seed(3)
            AutoModelForCausalLM.from_pretrained(world, tie_word_embeddings=False).save_pretrained(path)
            AutoTokenizer.from_pretrained(world).save_pretrained(path)
    state.wait_for_everyone()
    return str(path)


def model_of(world, folder, untied=False, trained=False):
    # A reference is read from where the policy was.
    model = AutoModelForCausalLM.from_pretrained(untied_world(world, folder) if untied else world)
    if trained:
        torch.manual_seed(4)
        model = get_peft_model(model, lora(init_lora_weights=False))
    return model


def build(world, folder, adapter="lora", untied=False, trained=False, head=False, peft=True, **settings):
    with fast_dora() if adapter == "dora" else nullcontext():
        if adapter is None or not peft or trained:
            config = None
        else:
            extra = {"modules_to_save": ["lm_head"]} if head else {}
            config = lora(**extra) if adapter == "lora" else config_of(adapter)
        model = partial(model_of, world, folder, untied, trained)
        return preference.build(world, folder, model=model, peft_config=config, **settings)


def found_in(trainer):
    """What training has made, whole; a collective."""
    named = {name_of(name): p for name, p in trainer.model.named_parameters()}
    network = {} if trainer.mask_network is None else dict(trainer.mask_network.named_parameters())
    return {
        "parameters": {n: full(p) for n, p in named.items() if "hfd_token_mask" not in n},
        "masks": {n: full(p) for n, p in network.items()},
        "multipliers": {} if trainer.multipliers is None else trainer.multipliers.state_dict(),
        "metrics": metrics(trainer),
    }


@torch.no_grad()
def moved(trainer):
    """As `perturb`, for parameters that are partitioned before the training starts too."""
    partitioned = [p for p in trainer.model.parameters() if hasattr(p, "ds_id")]
    if not partitioned:
        perturb(trainer)
        return trainer
    import deepspeed

    with deepspeed.zero.GatheredParameters(partitioned, modifier_rank=0):
        perturb(trainer)
    return trainer


def frozen(world, folder, method, kind="ddp", config=None, **changes):
    """Two steps of SGD from a place away from the reference; the second one's gradient, and what came of both."""
    recorder, settings = Recorder(), {**SGD, "per_device_train_batch_size": 4, **METHODS[method], **changes}
    triton = settings.pop("triton", False)
    with sharding(kind, config) as sharded, patch.object(kernels, "has_triton", lambda device: triton):
        settings |= sharded
        trainer = moved(recorder.of(build(world, folder, callbacks=[recorder], **settings)))
        trainer.train()
        gradient = {} if kind == "zero" else {name_of(n): full(g) for n, g in recorder.gradients[1].items()}
        return {"sharded": recorder.sharded, "gradient": gradient, **found_in(trainer)}


# 3 steps an epoch, the last of which has rows twice; stopped before its end.
RESUMED = {
    **SPARSE,
    **preference.FEASIBLE,
    "token_weights_kwargs": {**SPARSE["token_weights_kwargs"], "dropout": 0.1},
    "rows": pair_rows(10),
    "max_steps": 4,
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 2,
    "save_strategy": "steps",
    "save_steps": 1,
}


def resumed(world, folder, kind="ddp", config=None, cut=2, **changes):
    """A run that is not stopped and one that is and goes on; and what lies in a checkpoint and in a saved model."""
    recorder, settings = Recorder(), {**RESUMED, **changes}
    with sharding(kind, config) as sharded:
        run = partial(build, world, **settings, **sharded)
        straight = run(folder=folder / "straight", save_strategy="no")
        straight.train()
        run(folder=folder / "cut", callbacks=[StopAt(cut)]).train()
        again = recorder.of(run(folder=folder / "cut", callbacks=[recorder]))
        again.train(resume_from_checkpoint=True)
        again.save_model(str(folder / "final"))
        return {
            "sharded": recorder.sharded,
            "runs": [found_in(straight), found_in(again)],
            "running": [straight.running_metrics(), again.running_metrics()],
            "saved": str(folder),
        }


def started(world, folder, kind="ddp", config=None):
    """A mask network of which every process draws other numbers, after a step of nothing."""
    drawn = []

    def network(self, *sizes, original=SparsePOWeights.network):
        torch.manual_seed(PartialState().process_index)
        made = original(self, *sizes)
        drawn.append({name: p.detach().clone() for name, p in made.named_parameters()})
        return made

    with sharding(kind, config) as sharded, patch.object(SparsePOWeights, "network", network):
        settings = {**SGD, **SPARSE, "learning_rate": 0.0, "max_steps": 1, "per_device_train_batch_size": 4, **sharded}
        trainer = build(world, folder, **settings)
        trainer.train()
        masks = found_in(trainer)["masks"]
        if kind == "zero":
            return {"drawn": drawn[0], "masks": masks}
        # The examples of token weights were a forward without a backward, after which FSDP2 leaves the root whole.
        whole = not any(isinstance(p, DTensor) for p in trainer.mask_network.parameters())
        trainer.mask_network.load_mask_state({name: 2 * value for name, value in masks.items()})
        trainer.model.state_dict()
        return {"drawn": drawn[0], "masks": masks, "whole": whole, "loaded": found_in(trainer)["masks"]}


def evaluated(world, folder, kind="ddp", config=None, **changes):
    """7 rows: two processes have one twice. Before and after a step, with a sharded model and a whole one."""
    rows = Dataset.from_list(pair_rows(7))
    settings = {**SPARSE, **preference.FEASIBLE, "per_device_eval_batch_size": 2, "per_device_train_batch_size": 4}
    with sharding(kind, config) as sharded:
        settings |= {**SGD, "eval_strategy": "steps", "eval_steps": 1, **changes, **sharded}
        trainer = moved(build(world, folder, eval_dataset=rows, **settings))
        trainer.train()
        evaluation = {name: value for name, value in trainer.evaluate().items() if "feasible" in name}
        return {"evaluation": evaluation, **found_in(trainer)}


def contrasted(world, folder, kind="ddp", config=None, **changes):
    """TIS-DPO by two models, which each process runs on rows of its own: 7, so that one has more of them."""
    state, sides = PartialState(), {side: str(folder / side) for side in ("positive", "negative")}
    if state.is_main_process:
        with not_partitioned():
            for seed, path in enumerate(sides.values()):
                model = AutoModelForCausalLM.from_pretrained(world)
                generator = torch.Generator().manual_seed(seed)
                for parameter in model.parameters():
                    parameter.data += 0.03 * torch.randn(parameter.shape, generator=generator)
                model.save_pretrained(path)
                AutoTokenizer.from_pretrained(world).save_pretrained(path)
    state.wait_for_everyone()
    with sharding(kind, config) as sharded:
        settings = {**SGD, "loss_type": ["tis_dpo"], "token_weights_kwargs": sides, "rows": pair_rows(7)}
        settings |= {"per_device_train_batch_size": 4, **changes, **sharded}
        trainer = moved(build(world, folder, **settings))
        trainer.train()
        columns = {side: trainer.train_dataset[f"{side}_weights"][:] for side in ("chosen", "rejected")}
        return {"columns": columns, **found_in(trainer)}


def mixed(world, folder, kind="ddp", **changes):
    """bfloat16 by Accelerate, with weights in float32; the policy starts as its reference."""
    recorder = Recorder()
    with sharding(kind) as sharded:
        settings = {**SGD, **SPARSE, "bf16": True, "per_device_train_batch_size": 4, **changes, **sharded}
        trainer = recorder.of(build(world, folder, callbacks=[recorder], **settings))
        trainer.train()
        return {"sharded": recorder.sharded, **found_in(trainer)}


SHARDED = {"state_dict_type": "SHARDED_STATE_DICT"}
# Compared with cases of `preference.py` under DDP.
FAST_METHODS = ["sparse_po", "sparse_po_checkpointed", "lipo_lambda", "feasible", "tdpo2_full"]
FAST = {
    **{f"dpo_{method}_fsdp2": partial(frozen, method=method, kind="fsdp2") for method in FAST_METHODS},
    **{f"dpo_head_{kind}": partial(frozen, method="tdpo2_head", kind=kind) for kind in ("ddp", "fsdp2")},
    **{f"dpo_mixed_{kind}": partial(mixed, kind=kind) for kind in ("ddp", "fsdp2")},
    "dpo_started_fsdp2": partial(started, kind="fsdp2"),
    "dpo_resumed_fsdp2": partial(resumed, kind="fsdp2", config=SHARDED),
}

SLOW_METHODS = [name for name in METHODS if name not in (*FAST_METHODS, "tdpo2_head")]
# How FSDP2 may be set up otherwise, and the methods that tell.
SET_UPS = {
    "loaded": ({"cpu_ram_efficient_loading": True}, ["sparse_po", "sparse_po_untied"]),
    "checkpointed": ({"activation_checkpointing": True}, ["sparse_po_untied", "mapo_full"]),
    "kept": ({"reshard_after_forward": False}, ["sparse_po"]),
}
RESUMED_AS = {
    "lora_full": {},
    "full_full": {"adapter": None},
    "full_sharded": {"adapter": None, "config": SHARDED},
    "untied_head_sharded": {"untied": True, "head": True, "config": SHARDED},
}
BOTH = {"evaluated": evaluated, "contrasted": contrasted}
CASES = {
    **{f"{method}_ddp": partial(frozen, method=method) for method in METHODS},
    **{f"{method}_fsdp2": partial(frozen, method=method, kind="fsdp2") for method in SLOW_METHODS},
    **{
        f"{method}_{name}": partial(frozen, method=method, kind="fsdp2", config=config)
        for name, (config, methods) in SET_UPS.items()
        for method in methods
    },
    **{f"{name}_{kind}": partial(case, kind=kind) for name, case in BOTH.items() for kind in ("ddp", "fsdp2")},
    **{f"resumed_{name}": partial(resumed, kind="fsdp2", **changes) for name, changes in RESUMED_AS.items()},
    **{f"mixed_{kind}": partial(mixed, kind=kind, adapter=None) for kind in ("ddp", "fsdp2")},
}
