"""Two processes: the engine has exactly the merged weights, and the model that is trained is not touched."""

import pytest
from transformers import AutoModelForCausalLM

from tests.distributed.through_vllm import STEPS, STREAMED


def test_shards_are_streamed_as_one_piece_is_merged(two_processes):
    for rank in two_processes("streamed"):
        assert list(rank["kinds"]) == STREAMED
        kinds = dict(rank["kinds"])
        # One bank of vectors for all blocks, which FSDP2 would shard once for each of them.
        assert "unshardable" in kinds.pop("vblora")
        expected = {"sharded": True, "names": True, "wrong": [], "touched": []}
        assert {kind: found for kind, found in kinds.items() if found != expected} == {}


@pytest.mark.parametrize(
    "case", ["vllm_ddp", "vllm_fsdp2", "vllm_server_fsdp2", "vllm_sleep_fsdp2", "vllm_variable_fsdp2"]
)
def test_the_engine_has_exactly_the_merged_weights(two_processes, world, case):
    names = [name for name, _ in AutoModelForCausalLM.from_pretrained(world).named_parameters()]
    for index, rank in enumerate(two_processes(case)):
        with_engine = index == 0 or "server" not in case
        for kind, found in rank["kinds"].items():
            assert found["sharded"] == case.endswith("fsdp2"), kind
            assert found["wrong"] == [[]] * STEPS * with_engine, kind
            assert found["touched"] == [] and found["merged"] == 0, kind
            assert found["syncs"] == ([names] * STEPS if with_engine else None), kind
            assert found["ratios"] == pytest.approx([1.0] * len(found["ratios"]), abs=1e-5), kind
        assert any(len(found["ratios"]) == 2 * STEPS for found in rank["kinds"].values()) == (index == 0)


def test_without_us_the_engine_has_the_base_model(two_processes):
    """The control: TRL's own synchronisation under FSDP2 merges DoRA and MiSS into nothing."""
    for rank in two_processes("vllm_trl_fsdp2"):
        for kind, found in rank["kinds"].items():
            assert found["sharded"] and found["merged"] > 0, kind
            assert all(found["wrong"][1:]), kind
            assert found["ratios"] == [] or max(abs(ratio - 1) for ratio in found["ratios"]) > 1e-3, kind
