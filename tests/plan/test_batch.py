"""What one process has at a time, by recipe."""

from dataclasses import replace

import pytest
import torch
from transformers import AutoConfig

from hf_delta.plan.batch import MicroBatch, micro_batch, step_of
from hf_delta.plan.lengths import Lengths
from hf_delta.plan.parts import Activations, Head, Rollouts
from hf_delta.plan.shapes import cache_values, largest_packed, shapes_of, weights_of
from hf_delta.recipe import load_recipe
from tests.running import LORA, keys, write


@pytest.fixture
def recipe(tmp_path, playground):
    return lambda trainer, **changes: load_recipe(
        str(write(tmp_path, keys(trainer, playground, tmp_path / "out", **changes)))
    )


@pytest.fixture
def step(recipe, playground):
    """A step of a recipe on the playground's model, for rows of 30 tokens of which 10 are the prompt's."""

    def build(trainer, unpacked=0, answers=2, **changes):
        found = recipe(trainer, **changes)
        config = AutoConfig.from_pretrained(playground / "model")
        weights = weights_of(shapes_of(config, torch.float32))
        batch = micro_batch(found, Lengths(10, 30, answers), on_cpu=True)
        return step_of(found, config, weights, torch.float32, batch, unpacked)[0]

    return build


def test_rows_and_tokens(recipe):
    known = Lengths(prompt=10, sequence=30, answers=4)
    # Every token but the first has a probability.
    assert micro_batch(recipe("sft"), known, True) == MicroBatch(4, 30, 4 * 29, 10, True)
    assert micro_batch(recipe("sft", max_length=20), known, True) == MicroBatch(4, 20, 4 * 19, 10, True)
    assert micro_batch(recipe("sft", max_length=512), None, True) == MicroBatch(4, 512, 4 * 511, 0, False)
    # Rows are put together until they are full.
    assert micro_batch(recipe("sft", max_length=512, packing=True), known, True).tokens == 512
    # Both answers of a pair, and all of a list.
    assert micro_batch(recipe("dpo"), replace(known, answers=2), True) == MicroBatch(8, 30, 8 * 29, 10, True)
    assert micro_batch(recipe("dpo"), known, True) == MicroBatch(16, 30, 16 * 29, 10, True)
    assert micro_batch(recipe("dpo"), None, True).sequences == 8


def test_rollouts_at_a_time(recipe):
    # The rows of GRPO are prompts; completions are as long as they may be.
    known = Lengths(prompt=10, sequence=10, answers=1)
    assert micro_batch(recipe("grpo"), known, True) == MicroBatch(4, 18, 4 * 17, 10, True)
    # A GPU computes the head for completions alone.
    assert micro_batch(recipe("grpo"), known, False) == MicroBatch(4, 18, 4 * 8, 10, True)
    assert micro_batch(recipe("grpo"), None, True) == MicroBatch(4, 520, 4 * 519, 512, False)


def test_a_step_of_supervised_fine_tuning(step):
    found = step("sft")
    assert found.tokens == 4 * 30 and found.rollouts is None and found.extra == 0
    assert not (found.accumulates or found.reference or found.second_pass or found.autocast)
    assert found.head == Head(4 * 29, 21, 64, compute=4, weight=4, hidden=4, trained=True, fused=False)
    assert step("sft", gradient_accumulation_steps=2).accumulates
    half = step("sft", bf16=True)
    assert half.autocast and half.head.compute == 2 and half.head.weight == 4
    unpacked = step("sft", unpacked=1000).activations
    assert unpacked == replace(
        found.activations, forward=found.activations.forward + 1000, backward=found.activations.backward + 1000
    )


def test_a_reference(step):
    whole = step("dpo")
    assert whole.reference and whole.second_pass and whole.tokens == 8 * 30
    # With an adapter it is the same model.
    adapted = step("dpo", peft_config=LORA)
    assert adapted.second_pass and not adapted.reference
    known = step("dpo", precompute_ref_log_probs=True)
    assert not (known.reference or known.second_pass)
    assert not step("grpo").reference and step("grpo", beta=0.1).reference


def test_what_masks_look_at(step):
    states = 8 * 29 * 64 * 4
    # Hidden states of two blocks and their input, and those of the tokens that count: of all blocks, or of the last.
    assert step("dpo", loss_type="sparse_po").extra == states * (3 + 2)
    assert step("dpo", loss_type="sparse_po", token_weights_kwargs={"layers": "last"}).extra == states * (3 + 1)
    assert step("dpo", loss_type="tdpo2").extra == states
    assert step("dpo").extra == 0


def test_rollouts_of_the_process(step, playground):
    values = cache_values(AutoConfig.from_pretrained(playground / "model"))
    found = step("grpo", gradient_accumulation_steps=2).rollouts
    assert found == Rollouts(sequences=8, tokens=18, prompt=10, kv_values=values, width=4, vocabulary=21)
    merged = step("grpo", peft_config=LORA, merged_rollouts=True)
    # Nothing is frozen in these weights, which are those of the model alone.
    assert merged.rollouts.merged_bytes == merged.weights.frozen_bytes
    assert step("grpo").rollouts.sequences == 4


def test_caches_and_weights_in_four_bits(playground):
    config = AutoConfig.from_pretrained(playground / "model")
    config.num_attention_heads, config.num_key_value_heads, config.head_dim = 8, 2, 16
    # Keys and values of two heads of 16.
    assert cache_values(config) == 2 * 2 * 16
    # Of all heads, where it is not said which are kept and how large they are.
    assert cache_values(AutoConfig.for_model("gpt2", n_embd=64, n_head=4)) == 2 * 64
    model = shapes_of(AutoConfig.from_pretrained(playground / "model"), torch.bfloat16)
    largest = max(p.numel() for name, p in model.named_parameters() if "layers" in name)
    assert largest_packed(model) == 2 * largest


def test_rollouts_by_hand():
    found = Rollouts(sequences=5, tokens=20, prompt=4, kv_values=8, width=2, vocabulary=3)
    cache = 5 * 20 * 8 * 2
    # The larger of five copies of the last logits and the forward pass of the prompts.
    assert found.bytes(10, 0.0) == 11 * cache + 5 * 4 * 5 * 3
    assert found.bytes(10, 100.0) == 11 * cache + 100 * 5 * 4


def test_activations_with_more():
    assert Activations(1, 2, 3, 4, 5).with_more(10) == Activations(1, 2, 13, 14, 5)
