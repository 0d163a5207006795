"""FSDP2 in two processes: checkpoints and final saves can be loaded in one, whatever kind of state dict they are of."""

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import trl
from peft import AdaLoraConfig, LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Trainer

from hf_delta import DeltaSFTTrainer, InputError
from hf_delta._compat import peft as compat
from hf_delta._compat import whole_saves
from hf_delta._compat.whole_saves import adapter_state_dict
from hf_delta.checkpoint import written_under
from tests.distributed.saving import IDS, SAVED_AT, STEPS, build, files
from tests.rl.test_trainer import assert_identical


ADAPTERS = ["saved_sft_lora", "saved_sft_pmss", "saved_grpo_edora", "saved_dpo_bat_row"]
SHARDS = {"optimizer_0", "pytorch_model_fsdp_0"}


def loaded(world, folder):
    base = AutoModelForCausalLM.from_pretrained(world)
    return PeftModel.from_pretrained(base, folder, is_trainable=True).eval()


def assert_is_the_trained_model(model, rank):
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert_identical({name: p.detach() for name, p in trained.items()}, rank["parameters"])
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=IDS).logits, rank["logits"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("case", ADAPTERS)
def test_sharded_checkpoints_and_final_saves_hold_the_adapter(two_processes, world, case):
    ranks = two_processes(case)
    for rank in ranks:
        assert rank["sharded"] and SHARDS <= set(rank["checkpoint"]["names"])
        for where in ("checkpoint", "last", "final"):
            assert {"adapter_config.json", "adapter_model.safetensors"} <= set(rank[where]["names"])
    folder, rank = Path(ranks[0]["folder"]), ranks[0]
    for saved in (folder / "run" / f"checkpoint-{STEPS}", folder / "final"):
        model = loaded(world, saved)
        assert_is_the_trained_model(model, rank)
        # With the buffers, which a model without them in its file derives once more.
        assert_identical(load_file(saved / "adapter_model.safetensors"), get_peft_model_state_dict(model))
    early = loaded(world, folder / "run" / f"checkpoint-{SAVED_AT}")
    found = {name: p.detach() for name, p in early.named_parameters() if p.requires_grad}
    assert found.keys() == rank["parameters"].keys()
    assert not any(torch.equal(found[name], value) for name, value in rank["parameters"].items())


@pytest.mark.parametrize("case", ["saved_sft_lora", "saved_sft_full", "saved_grpo_edora", "saved_dpo_bat_row"])
def test_sharded_checkpoints_resume_bit_for_bit(two_processes, case):
    for rank in two_processes(case):
        assert rank["sharded"] and rank["steps"] == STEPS
        assert_identical(rank["resumed"], rank["parameters"])


def test_a_model_is_saved_whole_at_the_end_and_in_shards_before(two_processes):
    for rank in two_processes("saved_sft_full"):
        assert rank["checkpoint"]["weights"] == {} and SHARDS <= set(rank["checkpoint"]["names"])
        model = AutoModelForCausalLM.from_pretrained(Path(rank["folder"]) / "final").eval()
        assert_is_the_trained_model(model, rank)


def test_either_kind_of_state_dict_gives_the_same_adapter(two_processes):
    for sharded, full in zip(two_processes("saved_sft_lora"), two_processes("saved_as_full"), strict=True):
        assert full["sharded"] and not SHARDS & set(full["checkpoint"]["names"])
        for where in ("checkpoint", "last", "final"):
            assert sharded[where]["weights"] == full[where]["weights"] != {}
            assert set(sharded[where]["names"]) - SHARDS == {
                name for name in full[where]["names"] if not name.endswith(".bin") or name == "training_args.bin"
            }


def test_trl_alone_trains_the_same_and_saves_no_adapter(two_processes):
    """The control."""
    for ours, theirs in zip(two_processes("saved_sft_lora"), two_processes("saved_by_trl"), strict=True):
        assert_identical(ours["parameters"], theirs["parameters"])
        assert theirs["last"]["weights"] == {} and theirs["final"] is None


SPREADS = {"saved_sft_lora": "FSDP with SHARDED_STATE_DICT", "saved_as_full": "FSDP with FULL_STATE_DICT"}


@pytest.mark.parametrize("case", SPREADS)
def test_a_run_that_is_spread_otherwise_does_not_resume(two_processes, world, tmp_path, case):
    checkpoint = str(Path(two_processes(case)[0]["folder"]) / "run" / f"checkpoint-{SAVED_AT}")
    trainer = build(DeltaSFTTrainer, world, tmp_path, "lora")
    with pytest.raises(InputError, match=f"was written under {SPREADS[case]}, and this run has no sharding"):
        trainer.train(resume_from_checkpoint=checkpoint)
    plugin = SimpleNamespace(state_dict_type=SimpleNamespace(name="FULL_STATE_DICT"))
    trainer.accelerator = SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin), num_processes=2)
    trainer.is_fsdp_enabled = True
    with pytest.raises(InputError, match="SHARDED" if case == "saved_sft_lora" else "written by 2 processes"):
        # What is of the same kind comes to the next question.
        trainer.train(resume_from_checkpoint=checkpoint)


@pytest.mark.parametrize(
    "names, expected",
    [
        (["optimizer.pt", "adapter_model.safetensors"], "no sharding"),
        (["global_step4/mp_rank_00_model_states.pt", "latest"], "DeepSpeed with whole weights"),
        (["global_step4/zero_pp_rank_0_mp_rank_00_model_states.pt", "latest"], "DeepSpeed ZeRO-3"),
        (["model.safetensors"], None),
        (["pytorch_model_fsdp_0", "optimizer_0"], "FSDP with SHARDED_STATE_DICT"),
        (["pytorch_model_fsdp.bin", "optimizer.bin"], "FSDP with FULL_STATE_DICT"),
    ],
)
def test_a_checkpoint_tells_how_its_run_was_spread(tmp_path, names, expected):
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert written_under(tmp_path) == expected


def test_fsdp1_is_refused_in_one_line(two_processes):
    for rank in two_processes("saved_by_fsdp1"):
        assert rank["message"].startswith("FSDP version 1:") and "fsdp_version: 2" in rank["message"]


# -- in one process ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("gathers", [True, False, None])
@pytest.mark.parametrize("adapter", [True, False])
def test_zero3_that_would_save_no_model_is_refused(world, monkeypatch, stage, gathers, adapter):
    monkeypatch.setattr(Trainer, "create_accelerator_and_postprocess", lambda self: None)
    model = AutoModelForCausalLM.from_pretrained(world)
    model = get_peft_model(model, LoraConfig(target_modules=["q_proj"])) if adapter else model
    trainer = object.__new__(DeltaSFTTrainer)
    zero = {"stage": stage, "stage3_gather_16bit_weights_on_model_save": gathers}
    plugin = SimpleNamespace(zero_stage=stage, deepspeed_config={"zero_optimization": zero})
    trainer.accelerator = SimpleNamespace(state=SimpleNamespace(deepspeed_plugin=plugin))
    trainer.model, trainer.is_fsdp_enabled, trainer.is_deepspeed_enabled = model, False, True
    refused = stage == 3 and not gathers and not adapter
    with pytest.raises(InputError, match="zero3_save_16bit_model: true") if refused else nullcontext():
        trainer.create_accelerator_and_postprocess()


@pytest.mark.parametrize("adapter", ["lora", "full"])
def test_in_one_process_everything_is_as_with_trl(world, tmp_path, adapter):
    trainers = []
    for cls in (trl.SFTTrainer, DeltaSFTTrainer):
        trainers.append(build(cls, world, tmp_path / cls.__name__, adapter))
        trainers[-1].train()
        trainers[-1].save_model(tmp_path / cls.__name__ / "final")
    theirs, ours = ({n: p.detach() for n, p in t.model.named_parameters()} for t in trainers)
    assert_identical(ours, theirs)
    for where in ("final", f"checkpoint-{SAVED_AT}"):
        theirs, ours = (files(Path(t.args.output_dir) / where) for t in trainers)
        assert ours == theirs and ours["weights"]


def test_what_a_method_computes_to_be_saved_is_computed_from_everything(world):
    """AdaLoRA saves pruned ranks, which are no tensors of the model."""
    config = AdaLoraConfig(init_r=4, target_r=2, total_step=10, target_modules=["q_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(world), config)
    ranks = {
        n.removeprefix("base_model.model."): [True, False, True, False]
        for n, _ in model.named_parameters()
        if "lora_E" in n
    }
    config = model.peft_config["default"]
    config.rank_pattern = ranks
    found, expected = adapter_state_dict(model), get_peft_model_state_dict(model)
    assert_identical(get_peft_model_state_dict(model, state_dict=found), expected)
    assert {value.shape[0] for name, value in expected.items() if "lora_A" in name} == {2}


@pytest.mark.parametrize("writes", [True, False])
@pytest.mark.parametrize("adapter", [True, False])
def test_one_process_writes_what_all_have_gathered(world, monkeypatch, adapter, writes):
    """With a `_save` that writes in every process, which transformers 5.17 has."""
    written = []
    monkeypatch.setattr(Trainer, "_save", lambda self, output_dir, state_dict: written.append(set(state_dict)))
    model = AutoModelForCausalLM.from_pretrained(world)
    model = get_peft_model(model, LoraConfig(target_modules=["q_proj"])) if adapter else model
    trainer = object.__new__(DeltaSFTTrainer)
    plugin = SimpleNamespace(state_dict_type="StateDictType.SHARDED_STATE_DICT")
    trainer.accelerator = SimpleNamespace(
        state=SimpleNamespace(fsdp_plugin=plugin), get_state_dict=lambda model: model.state_dict()
    )
    trainer.model, trainer.is_fsdp_enabled, trainer.is_deepspeed_enabled = model, True, False
    trainer.args = SimpleNamespace(should_save=writes, output_dir="unused", push_to_hub=False)
    trainer.save_model()
    everything = {name for name in model.state_dict() if not adapter or "lora_" in name}
    assert written == [everything] * writes


def test_the_first_process_says_what_is_gathered(world, monkeypatch):
    """What PEFT saves may hang on an answer from the Hub, and processes that gather different tensors wait for ever."""
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(world), LoraConfig(target_modules=["q_proj"]))
    names = [name for name in model.state_dict() if "lora_" in name or "embed_tokens" in name]
    monkeypatch.setattr(whole_saves, "broadcast_object_list", lambda mine: [names])
    assert list(adapter_state_dict(model)) == names


def test_only_who_writes_keeps_what_all_gather(world, monkeypatch):
    """A trained head in the memory of each process of a machine would be as much as a model."""
    model, gathered = get_peft_model(AutoModelForCausalLM.from_pretrained(world), LoraConfig(r=4)), []
    monkeypatch.setattr(whole_saves, "full_tensor", lambda tensor: gathered.append(tensor) or tensor)
    assert adapter_state_dict(model, keep=False) == {}
    found = len(gathered)
    assert found == len(adapter_state_dict(model)) > 0


def test_only_what_is_saved_is_gathered(world):
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(world), LoraConfig(target_modules=["q_proj"]))
    model.add_adapter("other", LoraConfig(target_modules=["v_proj"], modules_to_save=["norm"]))
    found = adapter_state_dict(model)
    assert set(found) == {n for n in model.state_dict() if "lora_" in n or "modules_to_save.other" in n}


def test_saved_buffers_are_sent_in_one_piece(monkeypatch):
    """As NCCL wants them."""
    buffers, sent = compat.SavedBuffers(), []
    buffers["default"] = torch.arange(6.0).view(2, 3).T
    buffers.to("meta")
    monkeypatch.setattr(compat, "broadcast", lambda value: sent.append(value) or value)
    buffers.load_state_dict({}, assign=True)
    assert [value.is_contiguous() for value in sent] == [True]
    assert buffers["default"].tolist() == [[0, 3], [1, 4], [2, 5]]
