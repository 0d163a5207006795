"""DeepSpeed ZeRO-2 and ZeRO-3 on two processes against DDP on two, in launches of their own."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_delta.checkpoint import written_under
from tests.distributed.launching import needs_deepspeed
from tests.distributed.zero_cases import FULL, KINDS
from tests.distributed.zero_checks import STAGES, assert_as_ddp, assert_same_learnt, assert_saved, assert_sharded
from tests.rl.test_gdro import assert_same
from tests.rl.test_trainer import assert_identical


pytestmark = [pytest.mark.slow, *needs_deepspeed]


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("kind", KINDS)
def test_adapters_are_made_of_the_whole_weights(zero, kind, stage):
    """A model that is read in shards: what is derived from its weights is the same on all ranks and as in one process."""
    expected = zero("constructed", 0)[0][kind]
    assert not expected["empty"]
    for rank in zero("constructed", stage):
        found = rank[kind]
        assert found["empty"] == (stage == 3)
        assert_identical(found["buffers"], expected["buffers"])
        assert found["parameters"].keys() == expected["parameters"].keys()
        for name, value in expected["parameters"].items():
            # The start of these is random, and the ranks have other random numbers here.
            assert found["parameters"][name].shape == value.shape
            assert "lora_A" in name or torch.equal(found["parameters"][name], value), name


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("kind", [*KINDS, FULL])
def test_sft_is_that_of_ddp(zero, kind, stage):
    case = f"sft_{kind}"
    expected = zero(case, 0)[0]
    assert expected["sharding"]["wrapper"] == "DistributedDataParallel"
    for rank in zero(case, stage):
        assert_sharded(rank, stage)
        assert_as_ddp(rank["parameters"], expected["parameters"], stage)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("kind", KINDS)
def test_what_was_saved_is_the_whole_adapter(zero, world, kind, stage):
    found, expected = zero(f"sft_{kind}", stage)[0], zero(f"sft_{kind}", 0)[0]
    assert_saved(world, found["saved"], found["parameters"], expected["saved"])
    # That of the checkpoint is a step younger.
    assert_saved(world, f"{found['saved']}/checkpoint-2", {}, f"{expected['saved']}/checkpoint-2")


@pytest.mark.parametrize("stage", STAGES)
def test_a_model_without_an_adapter_is_saved_whole(zero, stage):
    found = zero(f"sft_{FULL}", stage)[0]
    assert_identical(
        dict(AutoModelForCausalLM.from_pretrained(found["saved"]).named_parameters()), found["parameters"]
    )


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("kind", KINDS)
def test_grpo_with_both_games_is_that_of_ddp(zero, kind, stage):
    case = f"grpo_{kind}"
    expected, ranks = zero(case, 0)[0], zero(case, stage)
    for rank in ranks:
        assert_sharded(rank, stage)
        assert_as_ddp(rank["parameters"], expected["parameters"], stage)
        assert_same_learnt(rank["learnt"], expected["learnt"], stage)
        assert rank["plans"] == expected["plans"]
    assert_identical(ranks[0]["parameters"], ranks[1]["parameters"])
    assert_same(ranks[0]["learnt"], ranks[1]["learnt"])
    assert len({tuple(counts) for _, counts, _ in expected["plans"]}) > 1, "the allocation never changed"
    assert expected["learnt"]["weights"]["total"].abs().max() > 0.1, "every prompt weighs the same"
    start, moved = zero("constructed", 0)[0][kind]["parameters"], expected["parameters"]
    assert max((moved[name] - start[name]).abs().max() for name in moved if "lora_A" not in name) > 5e-3


@pytest.mark.parametrize("stage", STAGES)
def test_grpo_with_both_games_resumes_bit_for_bit(zero, world, stage):
    ranks = zero("resumed", stage)
    for rank in ranks:
        assert_sharded(rank, stage)
        straight, resumed = rank["plans"]
        assert straight[-len(resumed) :] == resumed
        assert_identical(*rank["parameters"])
        assert_same(*rank["here"])
        assert_same(*rank["kept"])
    assert ranks[0]["plans"] == ranks[1]["plans"]
    assert_same(ranks[0]["here"], ranks[1]["here"])
    assert_saved(world, ranks[0]["saved"], ranks[0]["parameters"][1], zero("resumed", 0)[0]["saved"])
    assert written_under(ranks[0]["saved"]) == ("DeepSpeed ZeRO-3" if stage == 3 else "DeepSpeed with whole weights")


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("kind", ["pmss", "edora"])
def test_a_reference_adapter_is_that_of_ddp(zero, kind, stage):
    """Made by TRL of an adapter that is on a base in shards; the Kullback-Leibler divergence to it counts."""
    expected, ranks = zero(f"reference_{kind}", 0)[0], zero(f"reference_{kind}", stage)
    assert expected["adapters"] == ["default", "ref"] and len(expected["kl"]) == 3 and expected["kl"][-1] > 0
    for rank in ranks:
        assert_sharded(rank, stage)
        assert rank["adapters"] == expected["adapters"]
        assert_as_ddp(rank["parameters"], expected["parameters"], stage)
        assert rank["kl"] == pytest.approx(
            expected["kl"], rel=0 if stage == 2 else 1e-3, abs=0 if stage == 2 else 1e-8
        )


@pytest.mark.parametrize("stage", (0, *STAGES))
@pytest.mark.parametrize("kind", ["bone", "edora"])
def test_an_adapter_that_is_not_a_number_is_refused(zero, kind, stage):
    for rank in zero(f"broken_{kind}", stage):
        assert "weight holds NaN or infinite values" in rank["said"]


def test_sampling_and_adamw_under_zero_2_are_those_of_ddp(zero):
    for rank, expected in zip(zero("resumed", 2), zero("resumed", 0)):
        assert_identical(rank["parameters"][1], expected["parameters"][1])
        assert rank["plans"] == expected["plans"]
        assert_same(rank["here"], expected["here"])
    assert all(torch.isfinite(p).all() for p in expected["parameters"][1].values())
