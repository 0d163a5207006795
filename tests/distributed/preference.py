"""Cases of `DeltaDPOTrainer`, for one process and for two: the same 8 rows in every step, whoever has which."""

import trl
from datasets import Dataset

import hf_delta.preference.resume as resume_module
from hf_delta import DeltaDPOTrainer
from tests.preference.dpo import build as build_trainer
from tests.preference.dpo import lora, mask_parameters, metrics, pair_rows, parameters, perturb
from tests.rl.frozen import GradientRecorder
from tests.rl.test_resume import StopAt


KEPT = []

FEASIBLE = {"feasible": True, "feasible_kwargs": {"epsilon": 0.6, "eta": 0.7}}
SPARSE = {
    "loss_type": ["sparse_po"],
    "token_weights_kwargs": {"dropout": 0.0, "sharing": "independent", "l1_reward": 0.01},
}
METHODS = {
    "sparse_po": SPARSE,
    # Of DDP, that all parameters are used; the reference is a model of its own.
    "sparse_po_checkpointed": {**SPARSE, "gradient_checkpointing": True, "peft": False, "logps_kernel": "chunked"},
    "lipo_lambda": {"loss_type": ["lipo_lambda"]},
    "feasible": FEASIBLE,
    "tdpo2": {"loss_type": ["tdpo2"]},
    "tdpo2_full": {"loss_type": ["tdpo2"], "peft": False},
}


def build(*args, **kwargs):
    """A trainer that lives as long as its process, see `cases.build`."""
    KEPT.append(build_trainer(*args, **kwargs))
    return KEPT[-1]


def frozen(world, folder, method, processes=2):
    """Two steps of SGD: the second one's gradient, after multipliers and masks have moved."""
    settings = {"optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0.0, **METHODS[method]}
    recorder = GradientRecorder()
    peft_config = lora() if settings.pop("peft", True) else None
    trainer = build(
        world,
        folder,
        callbacks=[recorder],
        peft_config=peft_config,
        per_device_train_batch_size=8 // processes,
        **settings,
    )
    perturb(trainer)
    trainer.train()
    return {
        "gradient": recorder.gradients[1],
        "parameters": parameters(trainer),
        "masks": mask_parameters(trainer) if trainer.mask_network is not None else {},
        "multipliers": trainer.multipliers.state_dict() if trainer.multipliers is not None else {},
        "metrics": metrics(trainer),
    }


def evaluated(world, folder, processes=2):
    """7 rows: two processes have one twice."""
    rows = Dataset.from_list(pair_rows(7))
    settings = {**FEASIBLE, "per_device_eval_batch_size": 2, "per_device_train_batch_size": 8 // processes}
    trainer = build(world, folder, eval_dataset=rows, peft_config=lora(), **settings)
    perturb(trainer)
    return {"metrics": {k: v for k, v in trainer.evaluate().items() if "feasible" in k}}


def features_off(world, folder):
    settings = {"max_steps": 3, "per_device_train_batch_size": 2}
    runs = {}
    for name, cls, config_cls, changes in (
        ("theirs", trl.DPOTrainer, trl.DPOConfig, {}),
        ("plain", DeltaDPOTrainer, trl.DPOConfig, {}),
        ("eta_0", DeltaDPOTrainer, None, {**FEASIBLE, "feasible_kwargs": {"epsilon": 0.6, "eta": 0.0}}),
    ):
        kinds = {"cls": cls} if config_cls is None else {"cls": cls, "config_cls": config_cls}
        trainer = build(world, folder / name, peft_config=lora(0.2), **kinds, **settings, **changes)
        trainer.train()
        runs[name] = {"parameters": parameters(trainer), "metrics": metrics(trainer)}
    return runs


def resumed(world, folder, cut=4):
    """3 steps an epoch, in the middle of the second of which it is stopped; and who wrote what."""
    settings = {**SPARSE, **FEASIBLE, "max_steps": 7, "per_device_train_batch_size": 1, "rows": pair_rows(10)}
    settings |= {"gradient_accumulation_steps": 2, "save_strategy": "steps", "save_steps": 1}
    settings["token_weights_kwargs"] = {**SPARSE["token_weights_kwargs"], "dropout": 0.1}
    written = []
    originals = {name: getattr(resume_module, name) for name in ("save_file", "save_state")}

    def counted(name):
        return lambda *args: (written.append(name), originals[name](*args))[1]

    runs = [build(world, folder / "straight", peft_config=lora(0.2), **settings)]
    runs[0].train()
    for name in originals:
        setattr(resume_module, name, counted(name))
    try:
        build(world, folder / "cut", peft_config=lora(0.2), callbacks=[StopAt(cut)], **settings).train()
    finally:
        for name, function in originals.items():
            setattr(resume_module, name, function)
    runs.append(build(world, folder / "cut", peft_config=lora(0.2), **settings))
    runs[1].train(resume_from_checkpoint=True)
    return {
        "written": sorted(set(written)),
        "steps": [run.state.global_step for run in runs],
        "parameters": [parameters(run) for run in runs],
        "masks": [mask_parameters(run) for run in runs],
        "multipliers": [run.multipliers.state_dict() for run in runs],
        "metrics": [metrics(run) for run in runs],
    }
