"""What `test_zero.py` and others ask of the cases of `zero_cases.py`."""

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from tests.rl.test_trainer import assert_identical


STAGES = (2, 3)


def assert_sharded(found, stage):
    """DeepSpeed has cut what this stage cuts: states of the optimizer in two, and in stage 3 every parameter too."""
    sharding = found["sharding"]
    assert (sharding["kind"], sharding["wrapper"], sharding["stage"]) == ("DEEPSPEED", "DeepSpeedEngine", stage)
    # Shares are rounded up to whole units of memory.
    assert 0 <= 2 * sharding["optimized"] - sharding["trained"] <= 64
    assert sharding["partitioned"] == (stage == 3)


def assert_as_ddp(found, expected, stage):
    """Tensors by name: to the last bit under ZeRO-2, within rounding under ZeRO-3, which adds up in another order."""
    if stage == 2:
        return assert_identical(found, expected)
    assert found.keys() == expected.keys()
    size = max(value.abs().max().item() for value in expected.values())
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name], value, rtol=0, atol=min(1e-6, 1e-5 * size), msg=lambda m, n=name: f"{n}: {m}"
        )


def assert_same_learnt(found, expected, stage):
    """States of games, as `assert_as_ddp`."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert_same_learnt(found[key], value, stage)
    elif isinstance(expected, list):
        assert len(found) == len(expected)
        for one, other in zip(found, expected):
            assert_same_learnt(one, other, stage)
    elif isinstance(expected, torch.Tensor) or isinstance(expected, float):
        one, other = torch.as_tensor(found), torch.as_tensor(expected)
        torch.testing.assert_close(one, other, rtol=0 if stage == 2 else 1e-5, atol=0 if stage == 2 else 1e-6)
    else:
        assert found == expected


def loaded(world, folder):
    """A model in one process with an adapter that was saved."""
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(world), folder).eval()


def assert_saved(world, folder, parameters, expected):
    """An adapter in a directory is all of what was trained, and makes of the model what that in another directory does."""
    model, other = loaded(world, folder), loaded(world, expected)
    found = dict(model.named_parameters())
    for name, value in parameters.items():
        assert torch.equal(found[name], value), name
    buffers, others = dict(model.named_buffers()), dict(other.named_buffers())
    assert_identical(buffers, others)
    ids = torch.arange(4, 20).view(2, 8)
    with torch.no_grad(), model.disable_adapter():
        base = model(input_ids=ids).logits
    with torch.no_grad():
        logits, theirs = model(input_ids=ids).logits, other(input_ids=ids).logits
    assert (theirs - base).abs().max() > 1e-3, "the adapter that was saved changes nothing"
    torch.testing.assert_close(logits, theirs, rtol=0, atol=1e-5)
