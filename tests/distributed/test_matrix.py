"""SFT and GRPO with every adapter in two processes: FSDP2 is DDP bit for bit, DDP is one process, and runs resume."""

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from tests.adapters.life import IDS
from tests.distributed.launching import launched
from tests.distributed.matrix import CASES, FAST, HEADS, READ_WEIGHTS, SLOW, SPREAD, run, spread
from tests.rl.test_gdro import assert_same
from tests.rl.test_trainer import assert_identical


RESUMES = [name for name in CASES if name.startswith("resume")]


@pytest.fixture(scope="module")
def slow_half(world, tmp_path_factory):
    return launched("tests.distributed.matrix_slow", tmp_path_factory.mktemp, world)


def marked(names):
    return [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in names]


@pytest.fixture
def ranks_of(request):
    """`case -> [result of rank 0, result of rank 1]`, from the launch of that case."""
    return lambda case: request.getfixturevalue("slow_half" if case in SLOW else "two_processes")(case)


@pytest.mark.parametrize("case", marked([*FAST, *HEADS, *(name for name in SLOW if not name.startswith("resume"))]))
def test_fsdp2_is_ddp_bit_for_bit(ranks_of, case):
    """Gradients of every step, what SGD makes of them, and with GRPO the rollouts' prompts, their budgets and weights."""
    ranks = ranks_of(case)
    for rank in ranks:
        ddp, fsdp2 = rank["ddp"], rank["fsdp2"]
        assert (ddp.pop("mode"), fsdp2.pop("mode")) == ("ddp", "fsdp2")
        assert len(ddp["gradients"]) == len(fsdp2["gradients"]) == (2 if case.startswith("sft") else 6)
        for one, other in zip(ddp["gradients"], fsdp2["gradients"]):
            assert_identical(one, other)
            assert all(bool(gradient.any()) for gradient in one.values())
        assert_identical(ddp["parameters"], fsdp2["parameters"])
        assert_same(ddp["learnt"], fsdp2["learnt"])
        assert ddp["plans"] == fsdp2["plans"]
    for way in ("ddp", "fsdp2"):
        one, other = (rank[way] for rank in ranks)
        assert_identical(one["parameters"], other["parameters"])
        assert_same(one["learnt"], other["learnt"])
        assert one["plans"] == other["plans"]
    if case.startswith("grpo"):
        assert_has_learnt(ranks[0]["fsdp2"])


def assert_has_learnt(found):
    """Budgets, posteriors and prompt weights have moved."""
    counts = [tuple(counts) for _, counts, _ in found["plans"]]
    assert set(counts[0]) == {4} and counts[1] != counts[0] and sum(counts[1]) == 32
    rule, prompts = found["learnt"]["rule"], found["learnt"]["curriculum"]["difficulty"]["prompts"]
    assert bool(rule["mass"].all()) and rule["total"][0] != rule["total"][1]
    assert len(prompts["keys"]) == 8 and len(set(prompts["labels"].tolist())) > 1


@pytest.mark.parametrize("task", SPREAD)
def test_two_processes_are_one(two_processes, world, tmp_path, task):
    alone = run(world, tmp_path, task, SPREAD[task], **spread(task, 1))
    assert alone["mode"] == "alone"
    for rank in two_processes(f"spread_{task}"):
        assert rank["mode"] == "ddp" and rank["plans"] == alone["plans"]
        assert len(rank["gradients"]) == len(alone["gradients"]) >= 2
        for found, expected in zip(
            [*rank["gradients"], rank["parameters"]], [*alone["gradients"], alone["parameters"]]
        ):
            assert found.keys() == expected.keys()
            for name, value in expected.items():
                torch.testing.assert_close(found[name], value, rtol=0, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("case", marked([*RESUMES, *(name for name in SLOW if name.startswith("resume"))]))
def test_fsdp2_resumes_bit_for_bit(ranks_of, case):
    ranks = ranks_of(case)
    for rank in ranks:
        straight, resumed = rank["runs"]
        assert straight["mode"] == resumed["mode"] == "fsdp2" and straight["steps"] == resumed["steps"] > 2
        assert_identical(straight["parameters"], resumed["parameters"])
        assert_same(straight["learnt"], resumed["learnt"])
        assert_same(straight["saved"], resumed["saved"])
        if "grpo" in case:
            assert straight["plans"][-len(resumed["plans"]) :] == resumed["plans"] and resumed["plans"]
            assert_same(resumed["saved"]["curriculum"], resumed["learnt"]["curriculum"])
            assert_same(resumed["saved"]["transforms"][-1], resumed["learnt"]["rule"])
    one, other = (rank["runs"][1] for rank in ranks)
    assert_identical(one["parameters"], other["parameters"])
    assert_same(one["learnt"], other["learnt"])


@pytest.mark.parametrize("case", marked([*RESUMES, *(name for name in SLOW if name.startswith("resume"))]))
def test_the_adapter_of_a_sharded_checkpoint_is_the_trained_one(ranks_of, world, case):
    for rank in ranks_of(case):
        base = AutoModelForCausalLM.from_pretrained(world).eval()
        with torch.no_grad():
            untrained = base(input_ids=IDS).logits
            found = PeftModel.from_pretrained(base, rank["checkpoint"]).eval()(input_ids=IDS).logits
        torch.testing.assert_close(found, rank["logits"], rtol=0, atol=1e-5)
        assert (found - untrained).abs().max() > 1e-3


@pytest.mark.parametrize("kind", READ_WEIGHTS)
def test_what_is_derived_from_weights_comes_from_the_process_that_has_them(two_processes, kind):
    for rank in two_processes(f"read_by_one_{kind}"):
        assert rank["one"]["mode"] == rank["all"]["mode"] == "fsdp2"
        for one, other in zip(rank["one"]["gradients"], rank["all"]["gradients"], strict=True):
            assert_identical(one, other)
        assert_identical(rank["one"]["parameters"], rank["all"]["parameters"])


def test_log_probabilities_are_not_rounded_in_mixed_precision(two_processes):
    """Accelerate has FSDP2 give them in bfloat16, whose steps are 1/64 where a token has 3 nats."""
    for rank in two_processes("grpo_bfloat16"):
        assert rank["modes"] == {"ddp": "ddp", "fsdp2": "fsdp2"} and len(rank["logps"]) == 4
        for ddp, fsdp2 in zip(rank["logps"][:2], rank["logps"][2:]):
            assert ddp.dtype == fsdp2.dtype == torch.float32
            torch.testing.assert_close(fsdp2, ddp, rtol=0, atol=1e-3)


def test_what_fsdp2_cannot_shard_or_save_is_refused(two_processes):
    """PEFT saves an empty adapter where FSDP has renamed its modules; a tied weight would be in two units."""
    for rank in two_processes("refused_by_fsdp2"):
        said = rank["said"]
        assert "gradient_checkpointing: true" in said["checkpointing"]
        assert "lm_head is tied" in said["head"] and "embed_tokens is tied" in said["embedding"]
        assert said["checkpointing of a model"] == said["norms"] == ""
