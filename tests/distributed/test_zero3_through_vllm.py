"""DeepSpeed ZeRO-3 on two processes: as `test_through_vllm.py`, in a launch of its own."""

import pytest
from transformers import AutoModelForCausalLM

from tests.distributed.launching import needs_deepspeed
from tests.distributed.through_vllm import STEPS
from tests.distributed.zero3_through_vllm import CASES


pytestmark = [pytest.mark.slow, *needs_deepspeed]


@pytest.mark.parametrize("case", CASES)
def test_the_engine_has_exactly_the_merged_weights(zero3_through_vllm, world, case):
    names = [name for name, _ in AutoModelForCausalLM.from_pretrained(world).named_parameters()]
    for index, found in enumerate(zero3_through_vllm(case)):
        with_engine = index == 0 or "server" not in case
        assert found["partitioned"]
        assert found["wrong"] == [[]] * STEPS * with_engine
        assert found["touched"] == [] and found["merged"] == 0
        assert found["syncs"] == ([names] * STEPS if with_engine else None)
        assert found["ratios"] == pytest.approx([1.0] * STEPS * (index == 0), abs=1e-5)
