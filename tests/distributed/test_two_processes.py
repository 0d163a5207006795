"""Two processes over gloo against one, and against each other."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.adapters.life import DORA, KINDS
from tests.distributed import preference
from tests.distributed.cases import FROZEN, LEARNING, ROWS
from tests.rl.frozen import GENERATIONS, PROMPTS, GradientRecorder, frozen_rollouts
from tests.rl.gdro import gdro_objective
from tests.rl.test_gdro import assert_same, rows_with_ids
from tests.rl.test_trainer import assert_identical, build


@pytest.fixture(scope="module")
def one_process_gradient(world, tmp_path_factory):
    """Gradient of all 32 sequences in one process, by `delta_l_scope`."""
    found = {}
    for scope in ("group", "batch"):
        recorder = GradientRecorder()
        settings = {**FROZEN, "per_device_train_batch_size": 2 * ROWS, "delta_l_scope": scope}
        build(world, tmp_path_factory.mktemp("one"), callbacks=[recorder], **settings).train()
        found[scope] = recorder.gradients[0]
    return found


@pytest.mark.parametrize("case", ["delta_l", "delta_l_batch", "delta_l_split_groups", "delta_l_fsdp2"])
def test_gradient_of_two_processes_is_that_of_one(two_processes, one_process_gradient, case):
    expected = one_process_gradient["batch" if case == "delta_l_batch" else "group"]
    ranks = two_processes(case)
    assert [r["sharded"] for r in ranks] == [case == "delta_l_fsdp2"] * 2
    assert max(g.abs().max().item() for g in expected.values()) > 1e-3
    for rank in ranks:
        assert rank["gradient"].keys() == expected.keys()
        for name, gradient in expected.items():
            torch.testing.assert_close(rank["gradient"][name], gradient, rtol=0, atol=1e-6)


@pytest.mark.parametrize("case", ["gdro", "gdro_fsdp2"])
def test_gradient_with_variable_groups_is_that_of_brute_force(world, two_processes, case):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(world), AutoTokenizer.from_pretrained(world)
    expected = gdro_objective(model, tokenizer, rows_with_ids(), eta=2.0, alpha=0.75)
    for rank in two_processes(case):
        assert rank["sharded"] == (case == "gdro_fsdp2")
        assert rank["gradient"].keys() == expected.keys()
        for name, gradient in expected.items():
            torch.testing.assert_close(rank["gradient"][name], gradient, rtol=0, atol=2e-6)


@pytest.mark.parametrize("case", ["gdro_resume", "gdro_resume_exp3"])
def test_budgets_are_the_same_on_both_ranks_and_after_a_stop(two_processes, case):
    ranks = two_processes(case)
    for rank in ranks:
        straight, resumed = rank["plans"]
        assert straight[-len(resumed) :] == resumed
        assert_identical(*rank["parameters"])
        assert_same(*rank["here"])
        assert_same(*rank["saved"])
        assert_same(rank["saved"][0], rank["here"][0]["curriculum"])
    assert_same(ranks[0]["here"], ranks[1]["here"])
    assert ranks[0]["plans"] == ranks[1]["plans"]
    assert len({tuple(counts) for _, counts, _ in ranks[0]["plans"][0]}) > 1, "the allocation never changed"


def test_a_rule_sees_the_whole_batch_on_both_ranks_as_in_one_process(world, two_processes, tmp_path):
    trainer = build(world, tmp_path, advantage_transforms=["tests.rl.test_trainer.CountingRule"],
                    rollout_func=frozen_rollouts, per_device_train_batch_size=16, steps_per_generation=2, max_steps=2)  # fmt: skip
    trainer.train()
    rule = trainer.advantage_transforms[0]
    alone = vars(rule.batches[0])
    for rank in two_processes("rule"):
        seen = rank["batch"]
        assert len(seen["prompt_ids"]) == PROMPTS * GENERATIONS and seen["prompt_ids"] == alone["prompt_ids"]
        for field in ("group_ids", "lengths", "rewards", "reward", "correct", "mask"):
            assert torch.equal(seen[field], alone[field]), field
        torch.testing.assert_close(seen["advantages"], alone["advantages"], rtol=0, atol=1e-6)
        torch.testing.assert_close(seen["logps"] * seen["mask"], alone["logps"] * alone["mask"], rtol=0, atol=1e-5)


def test_with_our_features_off_two_processes_are_bit_identical_to_trl(two_processes):
    for rank in two_processes("features_off"):
        assert_identical(rank["theirs"], rank["ours"])


@pytest.mark.parametrize("case", ["resume", "resume_fsdp2"])
def test_two_processes_resume_bit_for_bit_inside_a_window(two_processes, case):
    ranks = two_processes(case)
    assert [r["sharded"] for r in ranks] == [case == "resume_fsdp2"] * 2
    for rank in ranks:
        assert rank["steps"] == LEARNING["max_steps"]
        assert_identical(rank["straight"], rank["resumed"])
    assert_identical(ranks[0]["resumed"], ranks[1]["resumed"])


@pytest.mark.parametrize("kind", [*KINDS, *DORA])
def test_sharded_adapters_are_what_they_are_in_one_process(two_processes, kind):
    for rank in two_processes(f"fully_shard_{kind}"):
        assert rank["sharded"]
        for what in ("gradients", "stepped", "merged"):
            found, expected = rank["found"][what], rank["expected"][what]
            assert found.keys() == expected.keys() and found
            for name, value in expected.items():
                assert (found[name] - value).abs().max() < 1e-6, f"{what}: {name}"
        assert any(not torch.equal(rank["found"]["merged"][n], v) for n, v in rank["found"]["unmerged"].items()), (
            "merging changed nothing"
        )
        for name, value in rank["expected"]["unmerged"].items():
            assert torch.equal(rank["found"]["unmerged"][name], value), name
        assert rank["forward"] < 1e-5 and rank["forward_merged"] < 1e-5


@pytest.mark.parametrize("kind", ["bone", "dora"])
def test_adapters_are_merged_and_disabled_in_shards_and_not_in_what_a_forward_left_whole(two_processes, kind):
    for rank in two_processes(f"left_whole_{kind}"):
        assert len(rank["errors"]) == 18 and max(rank["errors"].values()) < 1e-5, rank["errors"]
        assert kind == "dora" or "lm_head: its weight is sharded and tied" in rank["refused"]


# -- preference -----------------------------------------------------------------------------------------------------
def assert_near(found, expected, tolerance=1e-6):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("method", preference.METHODS)
def test_dpo_in_two_processes_is_dpo_in_one(world, two_processes, tmp_path, method):
    """Gradients of the second step and what SGD made of them, masks, multipliers, and what is logged."""
    alone = preference.frozen(world, tmp_path, method, processes=1)
    assert max(g.abs().max().item() for g in alone["gradient"].values()) > 1e-2
    assert bool(alone["masks"]) == ("sparse" in method) and bool(alone["multipliers"]) == (method == "feasible")
    ranks = two_processes(f"dpo_{method}")
    for rank in ranks:
        for what in ("gradient", "parameters", "masks", "multipliers"):
            # Multipliers are of losses of two steps, which are float32.
            assert_near(rank[what], alone[what], 3e-6 if what == "multipliers" else 1e-6)
        for one, other in zip(rank["metrics"], alone["metrics"], strict=True):
            assert one.keys() == other.keys()
            for key, value in other.items():
                assert one[key] == pytest.approx(value, abs=1e-4), key
    for what in ("parameters", "masks", "multipliers"):
        assert_identical(ranks[0][what], ranks[1][what])


def test_an_evaluation_counts_every_sample_once(world, two_processes, tmp_path):
    alone = preference.evaluated(world, tmp_path, processes=1)["metrics"]
    assert "eval_feasible/loss_cvar" in alone
    for rank in two_processes("dpo_evaluated"):
        assert rank["metrics"] == pytest.approx(alone, abs=1e-6)


def test_dpo_with_our_features_off_is_trl_in_two_processes(two_processes):
    for rank in two_processes("dpo_features_off"):
        theirs = rank["theirs"]
        for name in ("plain", "eta_0"):
            assert_identical(theirs["parameters"], rank[name]["parameters"])
        assert rank["plain"]["metrics"] == theirs["metrics"]
        for ours, other in zip(rank["eta_0"]["metrics"], theirs["metrics"], strict=True):
            assert {key: ours[key] for key in other} == pytest.approx(other, rel=1e-6, abs=1e-7)


def test_dpo_resumes_in_two_processes_bit_for_bit(two_processes):
    ranks = two_processes("dpo_resume")
    assert [rank["written"] for rank in ranks] == [["save_file", "save_state"], []]
    for rank in ranks:
        assert rank["steps"] == [7, 7] and len(rank["multipliers"][0]["keys"]) == 10
        for what in ("parameters", "masks", "multipliers"):
            assert_identical(*rank[what])
    # Only the first process logs.
    straight, resumed = ranks[0]["metrics"]
    assert len(straight) == 7 and straight == resumed
    for what in ("parameters", "masks", "multipliers"):
        assert_identical(ranks[0][what][1], ranks[1][what][1])
