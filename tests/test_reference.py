"""The reference of a trained adapter is that adapter, whatever the method: the first DPO loss is log 2, the first KL 0."""

import math
import os
from contextlib import nullcontext

import peft
import pytest
import torch
import trl
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_delta import DeltaDPOTrainer, DeltaGRPOConfig, DeltaGRPOTrainer
from hf_delta._compat.reference import REFERENCE, ReferenceRepair, copy_adapter, has_reference
from hf_delta._compat.transformers import EMPTYING
from hf_delta._compat.trl import GRPOHooks
from hf_delta.errors import InputError
from tests.adapters.life import KINDS, config_of
from tests.rl.frozen import build_world, frozen_reward


ALL = {"r": 4, "target_modules": "all-linear"}
ATTENTION = {"r": 4, "target_modules": ["q_proj", "v_proj"]}

# Methods that TRL copies right by itself: their parameters are modules, and `.default.` is in the names.
COPIED_BY_TRL = {
    "lora": lambda: peft.LoraConfig(**ALL),
    "dora": lambda: peft.LoraConfig(**ALL, use_dora=True),
    "modules_to_save": lambda: peft.LoraConfig(**ATTENTION, modules_to_save=["lm_head"]),
    "prompt tuning": lambda: peft.PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"),
}
# Methods with dictionaries of parameters, shared buffers, or tables of indices drawn at random.
COPIED_BY_US = {
    "miss": lambda: peft.MissConfig(**ALL),
    "bat": lambda: peft.MissConfig(**ALL, init_weights="bat"),
    "vera": lambda: peft.VeraConfig(**ATTENTION),
    "loha": lambda: peft.LoHaConfig(**ALL),
    "ia3": lambda: peft.IA3Config(target_modules="all-linear", feedforward_modules=[]),
    "shira": lambda: peft.ShiraConfig(**ALL),
    "randlora": lambda: peft.RandLoraConfig(**ALL),
}
# Ours keep each weight in a module of its own, so that TRL's copy of names is right too; what is not trained, a second
# adapter of the same configuration takes from the first.
OURS = {kind: lambda kind=kind: config_of(kind, r=4) for kind in KINDS}
ADAPTERS = {**COPIED_BY_TRL, **COPIED_BY_US, **OURS}

ROWS = [{"prompt": f"{i}+{i}:", "chosen": f"{2 * i}", "rejected": f"{3 * i + 1}"} for i in range(1, 5)]
SETTINGS = {
    "max_steps": 1,
    "per_device_train_batch_size": 4,
    "logging_steps": 1,
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "report_to": "none",
    "save_strategy": "no",
    "disable_tqdm": True,
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return build_world(tmp_path_factory.mktemp("world"))


def trained(world, config):
    """A model with an adapter that has left its initialisation, the same one at every call."""
    torch.manual_seed(0)
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(world), config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
        adapted = model(tokens()).logits
        with model.disable_adapter():
            # Otherwise the base model would pass for the reference.
            assert (model(tokens()).logits - adapted[:, -10:]).abs().max() > 1e-2
    return model


def dpo(cls, world, model, out, ref_model=None, peft_config=None, **changes):
    args = trl.DPOConfig(**{"output_dir": str(out), "learning_rate": 0.0, **SETTINGS, **changes})
    rows, tokenizer = Dataset.from_list(ROWS), AutoTokenizer.from_pretrained(world)
    return cls(model, ref_model, args, train_dataset=rows, processing_class=tokenizer, peft_config=peft_config)


def first_loss(trainer):
    trainer.train()
    return trainer.state.log_history[0]["loss"]


def tokens():
    return torch.arange(4, 14)[None]


def weights(model):
    return {name: tensor.detach().clone() for name, tensor in [*model.named_parameters(), *model.named_buffers()]}


# -- the reference is the adapter -----------------------------------------------------------------------------------
@pytest.mark.parametrize("method", ADAPTERS)
def test_first_dpo_loss_is_log_2(world, tmp_path, method):
    trainer = dpo(DeltaDPOTrainer, world, trained(world, ADAPTERS[method]()), tmp_path)
    assert first_loss(trainer) == pytest.approx(math.log(2), abs=1e-6)


@pytest.mark.parametrize("method", OURS)
def test_ours_need_no_repair(world, tmp_path, method):
    trainer = dpo(trl.DPOTrainer, world, trained(world, ADAPTERS[method]()), tmp_path)
    assert first_loss(trainer) == pytest.approx(math.log(2), abs=1e-6)


@pytest.mark.parametrize("method", ["miss", "vera", "loha"])
def test_first_dpo_loss_of_trl_is_not(world, tmp_path, method):
    """If this fails, TRL has repaired its copy: then hf_delta/_compat/reference.py can go."""
    trainer = dpo(trl.DPOTrainer, world, trained(world, ADAPTERS[method]()), tmp_path)
    assert abs(first_loss(trainer) - math.log(2)) > 1e-4


@pytest.mark.parametrize("method", ["dora", "miss", "vera", "pmss", "edora"])
def test_an_adapter_loaded_from_disk(world, tmp_path, method):
    trained(world, ADAPTERS[method]()).save_pretrained(tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(world)
    model = peft.PeftModel.from_pretrained(base, tmp_path / "adapter", is_trainable=True)
    assert first_loss(dpo(DeltaDPOTrainer, world, model, tmp_path)) == pytest.approx(math.log(2), abs=1e-6)


def test_log_probabilities_computed_in_advance_are_those_of_the_copy(world, tmp_path):
    model = trained(world, ADAPTERS["miss"]())
    trainer = dpo(DeltaDPOTrainer, world, model, tmp_path, precompute_ref_log_probs=True)
    assert "ref_chosen_logps" in trainer.train_dataset.column_names
    assert first_loss(trainer) == pytest.approx(math.log(2), abs=1e-6)


@pytest.mark.parametrize("method", ["lora", "miss", "pmss", "bat_row", "edora"])
def test_first_kl_of_grpo_is_0(world, tmp_path, method):
    def first_kl(cls, config_cls):
        args = config_cls(
            **{**SETTINGS, "output_dir": str(tmp_path / cls.__name__), "learning_rate": 0.0},
            beta=0.1,
            num_generations=4,
            max_completion_length=8,
        )
        model, rows = trained(world, ADAPTERS[method]()), Dataset.from_list(ROWS).select_columns("prompt")
        trainer = cls(model, frozen_reward, args, rows, processing_class=AutoTokenizer.from_pretrained(world))
        trainer.train()
        return trainer.state.log_history[0]["kl"]

    assert first_kl(DeltaGRPOTrainer, DeltaGRPOConfig) == pytest.approx(0.0, abs=1e-7)
    if method in COPIED_BY_US:
        assert first_kl(trl.GRPOTrainer, trl.GRPOConfig) > 1e-4


def test_the_reference_stays_while_the_policy_moves(world, tmp_path):
    model = trained(world, ADAPTERS["miss"]())
    before = weights(model)
    dpo(DeltaDPOTrainer, world, model, tmp_path, learning_rate=1e-2, max_steps=3).train()
    after = weights(model)
    names = [name for name in before if name.endswith(".default")]
    assert names and all(torch.equal(after[name.replace(".default", ".ref")], before[name]) for name in names)
    assert not any(torch.equal(after[name], before[name]) for name in names)


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_adding_the_reference_leaves_the_policy_as_it_was(world, tmp_path, start):
    """Such a start is taken out of the base weights; TRL's second adapter takes it out twice."""

    def drift(cls):
        model = trained(world, peft.LoraConfig(**ALL, init_lora_weights=start))
        with torch.no_grad():
            before = model(tokens()).logits
            dpo(cls, world, model, tmp_path)
            assert model.peft_config["default"].init_lora_weights == start
            return (model(tokens()).logits - before).abs().max().item()

    assert drift(DeltaDPOTrainer) == 0.0
    assert drift(trl.DPOTrainer) > 1e-2


# -- nothing to repair ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("case", ["full", "new adapter", "trained adapter"])
def test_otherwise_training_is_trl_bit_for_bit(world, tmp_path, case):
    def run(cls):
        config = peft.LoraConfig(**ALL, lora_dropout=0.1)
        settings = {"learning_rate": 1e-2, "max_steps": 4, "disable_dropout": False}
        model = trained(world, config) if case == "trained adapter" else world
        new = config if case == "new adapter" else None
        trainer = dpo(cls, world, model, tmp_path, peft_config=new, **settings)
        trainer.train()
        return weights(trainer.model)

    theirs, ours = run(trl.DPOTrainer), run(DeltaDPOTrainer)
    assert theirs.keys() == ours.keys() and all(torch.equal(theirs[name], ours[name]) for name in theirs)


def test_an_adapter_of_the_users_with_that_name_is_left_alone(world, tmp_path):
    model = trained(world, ADAPTERS["miss"]())
    model.add_adapter("ref", ADAPTERS["miss"]())
    before = weights(model)
    dpo(DeltaDPOTrainer, world, model, tmp_path, ref_model=AutoModelForCausalLM.from_pretrained(world))
    after = weights(model)
    assert all(torch.equal(before[name], after[name]) for name in before)


# -- what cannot be copied ------------------------------------------------------------------------------------------
def test_adalora_fails_as_it_does_with_trl(world, tmp_path):
    model = trained(world, peft.AdaLoraConfig(target_modules="all-linear", total_step=10))
    with pytest.raises(ValueError, match="AdaLoraModel supports only 1 trainable adapter"):
        dpo(DeltaDPOTrainer, world, model, tmp_path)


def two_adapters(world):
    model = trained(world, ADAPTERS["miss"]())
    model.add_adapter(REFERENCE, model.peft_config["default"])
    assert has_reference(model)
    return model, model.base_model.model.model.layers[0].self_attn.q_proj


def test_another_shape_is_refused_with_the_place(world):
    model, layer = two_adapters(world)
    layer.miss_block["default"] = torch.nn.Parameter(torch.zeros(2, 3))
    with pytest.raises(InputError, match=r"layers\.0\.self_attn\.q_proj\.miss_block is 2x3 in it and 4x\d+ in a new"):
        copy_adapter(model, "default", "ref")


def test_a_missing_tensor_is_refused_with_the_place(world):
    model, layer = two_adapters(world)
    del layer.miss_block["ref"]
    with pytest.raises(
        InputError, match=r"q_proj\.miss_block: its weight is in one of the two only.*merge_and_unload"
    ):
        copy_adapter(model, "default", "ref")


# -- a model of its own ---------------------------------------------------------------------------------------------
def with_reference(name, world, out):
    """A trainer that reads policy and reference from a path."""
    if name == "dpo":
        args = trl.DPOConfig(str(out), **SETTINGS)
        return DeltaDPOTrainer(world, args=args, train_dataset=Dataset.from_list(ROWS))
    prompts = Dataset.from_list([{"prompt": row["prompt"]} for row in ROWS])
    args = DeltaGRPOConfig(str(out), beta=0.1, num_generations=2, max_completion_length=4, **SETTINGS)
    return DeltaGRPOTrainer(world, frozen_reward, args, prompts)


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("name", ["dpo", "grpo"])
def test_a_reference_is_loaded_with_its_weights_in_every_process(world, tmp_path, monkeypatch, name, fails):
    """Not as Accelerate has a policy loaded, which it sends to all processes, where the first one alone has weights."""
    module, seen = {"dpo": trl.trainer.dpo_trainer, "grpo": trl.trainer.grpo_trainer}[name], []
    create = module.create_model_from_path

    def load(*args, **kwargs):
        seen.append(os.environ.get(EMPTYING))
        if fails and len(seen) == 2:
            raise OSError("no such model")
        return create(*args, **kwargs)

    monkeypatch.setattr(module, "create_model_from_path", load)
    monkeypatch.setenv(EMPTYING, "true")
    with pytest.raises(OSError) if fails else nullcontext():
        with_reference(name, world, tmp_path)
    assert seen == ["true", None] and os.environ[EMPTYING] == "true"


# -- the seam -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("cls,theirs", [(DeltaDPOTrainer, trl.DPOTrainer), (GRPOHooks, trl.GRPOTrainer)])
def test_the_repair_stands_between_trl_and_transformers(cls, theirs):
    order = cls.__mro__
    assert all(order.index(base) < order.index(ReferenceRepair) for base in theirs.__mro__ if "trl" in base.__module__)
