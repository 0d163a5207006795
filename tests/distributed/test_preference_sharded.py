"""DPO with token weights, lists and bounds under FSDP2 and DeepSpeed against two processes of DDP, on the same batches."""

from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.distributed import zero_preference
from tests.distributed.launching import launched, needs_deepspeed
from tests.distributed.preference_sharded import BOTH, FAST_METHODS, RESUMED_AS, SET_UPS, SLOW_METHODS
from tests.distributed.test_two_processes import assert_near
from tests.rl.test_gdro import assert_same
from tests.rl.test_trainer import assert_identical


# What a case is about, besides what was trained.
SEEN = {"evaluated": ["evaluation"], "contrasted": ["columns"]}
WHAT = ("gradient", "parameters", "masks", "multipliers")
MASK_FILE = "hfd_token_mask.safetensors"


@pytest.fixture(scope="session")
def slow_cases(world, tmp_path_factory):
    """`case -> [result of rank 0, result of rank 1]` of a launch under DDP and FSDP2 that is not among the fast ones."""
    launch = cache(lambda: launched("tests.distributed.preference_sharded", tmp_path_factory.mktemp, world))
    return lambda case: launch()(case)


@pytest.fixture(scope="session")
def zero_cases(world, tmp_path_factory):
    """The same of a case and a stage of ZeRO, each of which has a launch."""
    launch = cache(lambda stage: launched("tests.distributed.zero_preference", tmp_path_factory.mktemp, world, stage))
    return lambda case, stage: launch(stage)(case)


def assert_as_ddp(ranks, alone, tolerance=0.0):
    for rank in ranks:
        assert rank["sharded"] == [True] * len(rank["sharded"]) != []
        for what in WHAT:
            if rank.get(what) or what != "gradient":
                assert_near(rank[what], alone[what], tolerance)
    for what in ("parameters", "masks", "multipliers"):
        assert_identical(ranks[0][what], ranks[1][what])
    assert [row.keys() for row in ranks[0]["metrics"]] == [row.keys() for row in alone["metrics"]]
    for one, other in zip(ranks[0]["metrics"], alone["metrics"]):
        assert one == pytest.approx(other, abs=1e-5)


def assert_resumed(ranks, full):
    """As if it had not been stopped, and masks are in the checkpoint and in nothing that is deployed."""
    for rank in ranks:
        straight, again = rank["runs"]
        assert rank["sharded"] and all(rank["sharded"])
        assert len(again["multipliers"]["keys"]) == 10
        assert_same(straight, again)
        assert_same(*rank["running"])
    for what in ("parameters", "masks", "multipliers"):
        assert_identical(ranks[0]["runs"][1][what], ranks[1]["runs"][1][what])
    folder = Path(ranks[0]["saved"])
    assert_identical(load_file(folder / "cut" / "checkpoint-4" / MASK_FILE), ranks[0]["runs"][1]["masks"])
    saved = load_file(folder / "final" / ("model.safetensors" if full else "adapter_model.safetensors"))
    for file in folder.rglob("*model*.safetensors"):
        assert not [name for name in load_file(file) if "hfd_token_mask" in name], file
    named = {name.replace(".default", ""): value for name, value in again["parameters"].items()}
    assert saved and all(torch.equal(value, named.get(name, value)) for name, value in saved.items())
    assert len(saved.keys() & named.keys()) > 20


@pytest.mark.parametrize("method", FAST_METHODS)
def test_fsdp2_is_ddp_bit_for_bit(two_processes, method):
    assert_as_ddp(two_processes(f"dpo_{method}_fsdp2"), two_processes(f"dpo_{method}")[0])


def test_the_gradient_of_a_trained_head_is_that_of_all_processes(two_processes):
    ranks, alone = two_processes("dpo_head_fsdp2"), two_processes("dpo_head_ddp")[0]
    assert any("lm_head" in name for name in alone["gradient"])
    assert_as_ddp(ranks, alone)


def test_the_gradient_of_a_trained_head_is_that_of_all_processes_under_grpo(two_processes):
    alone = two_processes("head")[0]["gradient"]
    assert alone["base_model.model.lm_head.modules_to_save.default.weight"].abs().max() > 1e-3
    for rank in two_processes("head_fsdp2"):
        assert rank["sharded"]
        assert_near(rank["gradient"], alone)


def assert_as_ddp_in_bfloat16(ranks, alone):
    """The policy starts as its reference, and its log-probabilities are not rounded: steps of 1/64 would be 2e-3 of the loss."""
    for rank in ranks:
        assert rank["sharded"] == [True, True]
    first, expected = ranks[0]["metrics"][0], alone["metrics"][0]
    assert first["loss"] == pytest.approx(expected["loss"], abs=2e-4)
    assert first["kl/chosen"] == first["kl/rejected"] == first["rewards/chosen"] == first["rewards/rejected"] == 0
    assert first["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-2)
    second, expected = ranks[0]["metrics"][1], alone["metrics"][1]
    assert second["loss"] == pytest.approx(expected["loss"], abs=3e-3)
    assert second["kl/chosen"] == pytest.approx(expected["kl/chosen"], rel=2e-2) and second["kl/chosen"] > 1e-3


def test_fsdp2_trains_in_bfloat16(two_processes):
    assert_as_ddp_in_bfloat16(two_processes("dpo_mixed_fsdp2"), two_processes("dpo_mixed_ddp")[0])


def assert_first_started(ranks):
    assert not torch.equal(ranks[0]["drawn"]["reward.weight"], ranks[1]["drawn"]["reward.weight"])
    for rank in ranks:
        assert_identical(rank["masks"], ranks[0]["drawn"])


def test_the_mask_network_is_that_of_the_first_process(two_processes):
    ranks = two_processes("dpo_started_fsdp2")
    assert_first_started(ranks)
    for rank in ranks:
        # Into shards, and not into what FSDP2 had gathered of them.
        assert rank["whole"]
        assert_identical(rank["loaded"], {name: 2 * value for name, value in rank["masks"].items()})


def test_fsdp2_resumes_bit_for_bit_from_shards(two_processes):
    assert_resumed(two_processes("dpo_resumed_fsdp2"), full=False)


@pytest.mark.slow
class TestFSDP2:
    @pytest.mark.parametrize("method", SLOW_METHODS)
    def test_it_is_ddp_bit_for_bit(self, slow_cases, method):
        assert_as_ddp(slow_cases(f"{method}_fsdp2"), slow_cases(f"{method}_ddp")[0])

    @pytest.mark.parametrize("case", [f"{method}_{name}" for name in SET_UPS for method in SET_UPS[name][1]])
    def test_however_it_is_set_up(self, slow_cases, case):
        ranks = slow_cases(case)
        assert_as_ddp(ranks, slow_cases(f"{case.rpartition('_')[0]}_ddp")[0])

    @pytest.mark.parametrize("case", BOTH)
    def test_evaluations_and_contrast_models(self, slow_cases, case):
        alone = slow_cases(f"{case}_ddp")[0]
        for rank in slow_cases(f"{case}_fsdp2"):
            for what in ("parameters", "masks", "multipliers"):
                assert_identical(rank[what], alone[what])
            assert_same([rank.get(what) for what in SEEN[case]], [alone[what] for what in SEEN[case]])

    @pytest.mark.parametrize("case", RESUMED_AS)
    def test_it_resumes_bit_for_bit(self, slow_cases, case):
        assert_resumed(slow_cases(f"resumed_{case}"), full="adapter" in RESUMED_AS[case])

    def test_all_weights_in_bfloat16(self, slow_cases):
        assert_as_ddp_in_bfloat16(slow_cases("mixed_fsdp2"), slow_cases("mixed_ddp")[0])


@pytest.mark.slow
class TestZeRO:
    pytestmark = needs_deepspeed

    @pytest.mark.parametrize(
        ("method", "stage"),
        [(method, 2) for method in zero_preference.OF_STAGE_2]
        + [(method, 3) for method in zero_preference.OF_STAGE_3],
    )
    def test_it_is_ddp(self, zero_cases, slow_cases, method, stage):
        assert_as_ddp(zero_cases(method, stage), slow_cases(f"{method}_ddp")[0], 1e-6)

    @pytest.mark.parametrize("case", BOTH)
    def test_evaluations_and_contrast_models(self, zero_cases, slow_cases, case):
        alone = slow_cases(f"{case}_ddp")[0]
        for rank in zero_cases(case, 3):
            for what in ("parameters", "masks", "multipliers"):
                assert_near(rank[what], alone[what], 2e-6)
            for what in SEEN[case]:
                # Weights are of models that each process has whole.
                assert rank[what] == (alone[what] if what == "columns" else pytest.approx(alone[what], abs=1e-5))

    @pytest.mark.parametrize("stage", [2, 3])
    def test_the_mask_network_is_that_of_the_first_process(self, zero_cases, stage):
        assert_first_started(zero_cases("started", stage))

    @pytest.mark.parametrize("case", zero_preference.RESUMED_AS)
    @pytest.mark.parametrize("stage", [2, 3])
    def test_it_resumes_bit_for_bit(self, zero_cases, case, stage):
        assert_resumed(zero_cases(f"resumed_{case}", stage), full=case == "full")
