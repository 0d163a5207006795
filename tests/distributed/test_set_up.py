"""How a trainer is set up for its kind of sharding, as far as one process can tell."""

import os
from types import SimpleNamespace

import pytest
import torch
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers import Trainer
from transformers.integrations import deepspeed

from hf_delta import DeltaDPOTrainer, DeltaGRPOTrainer, DeltaSFTTrainer, InputError
from hf_delta._compat.transformers import loaded_whole


def trainer_of(cls, monkeypatch, fsdp=None, zero=None, **attributes):
    """One that has an accelerator and nothing else."""
    monkeypatch.setattr(Trainer, "create_accelerator_and_postprocess", lambda self: None)
    trainer = object.__new__(cls)
    trainer.accelerator = SimpleNamespace(state=SimpleNamespace(fsdp_plugin=fsdp, deepspeed_plugin=zero))
    trainer.is_fsdp_enabled, trainer.is_deepspeed_enabled = fsdp is not None, zero is not None
    trainer.model, trainer.args = torch.nn.Linear(1, 1), None
    vars(trainer).update(attributes)
    return trainer


@pytest.mark.parametrize(
    "cls, attributes, expected",
    [
        (DeltaSFTTrainer, {}, torch.bfloat16),
        (DeltaDPOTrainer, {"replaces_loss": False}, torch.bfloat16),
        (DeltaDPOTrainer, {"replaces_loss": True}, None),
        (DeltaGRPOTrainer, {}, None),
    ],
)
def test_what_fsdp2_rounds(monkeypatch, cls, attributes, expected):
    """Not what losses of ours are computed from; TRL's own get what they get from TRL."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, output_dtype=torch.bfloat16)
    plugin = SimpleNamespace(fsdp_version=2, activation_checkpointing=False, mixed_precision_policy=policy)
    trainer_of(cls, monkeypatch, fsdp=plugin, **attributes).create_accelerator_and_postprocess()
    found = plugin.mixed_precision_policy
    assert found.param_dtype == torch.bfloat16 and found.output_dtype == expected
    plugin.mixed_precision_policy = None
    trainer_of(cls, monkeypatch, fsdp=plugin, **attributes).create_accelerator_and_postprocess()
    assert plugin.mixed_precision_policy is None


@pytest.mark.parametrize("parts", ["mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt"])
@pytest.mark.parametrize("stage", [2, 3])
def test_a_checkpoint_of_deepspeed_goes_on_where_weights_are_as_they_were(monkeypatch, tmp_path, parts, stage):
    (tmp_path / "global_step2").mkdir()
    (tmp_path / "global_step2" / parts).touch()
    monkeypatch.setattr(Trainer, "train", lambda self, checkpoint, *args, **kwargs: checkpoint)
    trainer = trainer_of(DeltaSFTTrainer, monkeypatch, zero=SimpleNamespace(zero_stage=stage))
    trainer.accelerator.num_processes = 2
    if parts.startswith("zero_pp") == (stage == 3):
        assert trainer.train(str(tmp_path)) == str(tmp_path)
    else:
        with pytest.raises(InputError, match="was written under DeepSpeed .*, and this run has DeepSpeed"):
            trainer.train(str(tmp_path))


def test_a_checkpoint_without_an_optimizer_says_nothing_of_sharding(monkeypatch, tmp_path):
    monkeypatch.setattr(Trainer, "train", lambda self, checkpoint, *args, **kwargs: checkpoint)
    assert trainer_of(DeltaSFTTrainer, monkeypatch).train(str(tmp_path)) == str(tmp_path)


@pytest.mark.parametrize("said", ["true", None])
def test_models_that_are_loaded_whole(monkeypatch, said):
    """Neither partitioned nor left empty while it lasts, and what was said before is said after, also after an error."""
    name, partitioning = "FSDP_CPU_RAM_EFFICIENT_LOADING", SimpleNamespace()
    monkeypatch.setattr(deepspeed, "_hf_deepspeed_config_weak_ref", partitioning)
    monkeypatch.setenv(name, said) if said else monkeypatch.delenv(name, raising=False)
    with pytest.raises(ZeroDivisionError), loaded_whole():
        assert name not in os.environ and deepspeed._hf_deepspeed_config_weak_ref is None
        raise ZeroDivisionError
    assert os.environ.get(name) == said and deepspeed._hf_deepspeed_config_weak_ref is partitioning


@pytest.mark.parametrize("stage", [2, 3])
def test_states_that_deepspeed_has_divided_are_not_divided_anew(monkeypatch, tmp_path, stage):
    (tmp_path / "global_step2").mkdir()
    weights = "zero_pp_rank_0_mp_rank_00_model_states.pt" if stage == 3 else "mp_rank_00_model_states.pt"
    for name in (weights, *(f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in range(4))):
        (tmp_path / "global_step2" / name).touch()
    monkeypatch.setattr(Trainer, "train", lambda self, checkpoint, *args, **kwargs: checkpoint)
    trainer = trainer_of(DeltaSFTTrainer, monkeypatch, zero=SimpleNamespace(zero_stage=stage))
    trainer.accelerator.num_processes = 4
    assert trainer.train(str(tmp_path)) == str(tmp_path)
    trainer.accelerator.num_processes = 2
    with pytest.raises(
        InputError, match="the states of 4 processes of DeepSpeed, and this run has 2, .*Launch 4 processes"
    ):
        trainer.train(str(tmp_path))
