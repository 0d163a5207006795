"""The micro-batch of a recipe: rows and tokens that one process has at a time, and what it keeps of them."""

from dataclasses import dataclass

import torch
from transformers import PretrainedConfig

from hf_delta.plan.lengths import Lengths
from hf_delta.plan.parts import Head, Rollouts, Step, Weights
from hf_delta.plan.shapes import cache_values
from hf_delta.plan.trace import Pass, activations
from hf_delta.recipe import Recipe
from hf_delta.recipe.peft import wants_fast_dora


# Tokens that a prompt is taken to have where the rows are not here to be counted.
UNKNOWN_PROMPT = 512
# What transformers takes where max_length is null.
UNKNOWN_SEQUENCE = 2048


@dataclass(frozen=True)
class MicroBatch:
    """
    Args:
        sequences (`int`): Rows of tokens; both answers of a pair are one each.
        tokens (`int`): Of the longest, prompt and answer.
        scored (`int`): Positions that the head computes.
        prompt (`int`): Tokens of the longest prompt.
        counted (`bool`): Whether the lengths are those of the data, or bounds.
    """

    sequences: int
    tokens: int
    scored: int
    prompt: int
    counted: bool


def micro_batch(recipe: Recipe, lengths: Lengths | None, on_cpu: bool) -> MicroBatch:
    """The largest one; lengths that are not known are those that the recipe allows."""
    training, batch = recipe.training, recipe.training.per_device_train_batch_size
    if recipe.trainer == "grpo":
        prompt = UNKNOWN_PROMPT if lengths is None else lengths.prompt
        tokens = prompt + training.max_completion_length
        scored = batch * (tokens - 1 if on_cpu else training.max_completion_length)
        return MicroBatch(batch, tokens, scored, prompt, lengths is not None)
    limit = training.max_length
    tokens = (limit or UNKNOWN_SEQUENCE) if lengths is None else min(lengths.sequence, limit or lengths.sequence)
    if getattr(training, "packing", False):
        tokens = limit or tokens
    answers = 1 if recipe.trainer == "sft" else 2 if lengths is None else max(lengths.answers, 2)
    sequences = batch * answers
    return MicroBatch(
        sequences, tokens, sequences * (tokens - 1), lengths.prompt if lengths else 0, lengths is not None
    )


def computes_in(recipe: Recipe) -> torch.dtype | None:
    """Dtype of autocast."""
    return torch.bfloat16 if recipe.training.bf16 else torch.float16 if recipe.training.fp16 else None


def step_of(
    recipe: Recipe, config: PretrainedConfig, weights: Weights, dtype: torch.dtype, batch: MicroBatch, unpacked: int
) -> tuple[Step, bool]:
    """A training step, and whether the adapter's activations are in it.

    Args:
        unpacked (`int`): Bytes of a weight that a quantised layer unpacks for a moment.
    """
    training, on_cpu = recipe.training, recipe.training.use_cpu
    autocast = computes_in(recipe)
    seen = Pass(
        sequences=batch.sequences,
        tokens=batch.tokens,
        dtype=dtype,
        autocast=autocast,
        checkpointing=training.gradient_checkpointing,
        attention=recipe.model.attn_implementation,
        fast_dora=wants_fast_dora(recipe.values),
    )
    acts, whole = activations(config, recipe.peft, seen)
    acts = acts.with_more(unpacked)
    text = config.get_text_config()
    head = Head(
        tokens=batch.scored,
        vocabulary=text.vocab_size,
        width=text.hidden_size,
        compute=2 if autocast is not None else dtype.itemsize,
        weight=dtype.itemsize,
        hidden=dtype.itemsize,
        trained=weights.head_trained,
        fused=not on_cpu,
        entropy=bool(getattr(training, "entropy_coef", 0.0)),
    )
    reference = _has_reference(recipe)
    step = Step(
        weights=weights,
        activations=acts,
        head=head,
        optimizer=str(getattr(training.optim, "value", training.optim)),
        accumulates=training.gradient_accumulation_steps > 1,
        tokens=batch.sequences * batch.tokens,
        reference=reference and recipe.peft is None,
        second_pass=reference and recipe.trainer == "dpo",
        extra=_extra(recipe, config, batch, head.compute),
        rollouts=_rollouts(recipe, config, weights, batch, head.compute),
        autocast=autocast is not None or dtype.itemsize == 2,
    )
    return step, whole


def _has_reference(recipe: Recipe) -> bool:
    if recipe.trainer == "dpo":
        return not recipe.training.precompute_ref_log_probs
    return recipe.trainer == "grpo" and recipe.training.beta != 0.0


def _extra(recipe: Recipe, config: PretrainedConfig, batch: MicroBatch, width: int) -> int:
    """Hidden states of the reference that rules of token weights look at."""
    rule = recipe.training.build_rule() if recipe.trainer == "dpo" else None
    needs = getattr(rule, "needs", frozenset())
    text = config.get_text_config()
    states = batch.scored * text.hidden_size * width
    if "hidden_states" in needs:
        layers = 1 if getattr(rule, "layers", "all") == "last" else text.num_hidden_layers
        # All of them, and once more those of tokens that count.
        return states * (text.num_hidden_layers + 1 + layers)
    return states if "kl" in needs else 0


def _rollouts(
    recipe: Recipe, config: PretrainedConfig, weights: Weights, batch: MicroBatch, width: int
) -> Rollouts | None:
    training = recipe.training
    if recipe.trainer != "grpo" or training.use_vllm:
        return None
    merged = weights.frozen_bytes if training.merged_rollouts and recipe.peft is not None else 0
    return Rollouts(
        sequences=training.per_device_train_batch_size * training.steps_per_generation,
        tokens=batch.tokens,
        prompt=batch.prompt,
        kv_values=cache_values(config),
        width=width,
        vocabulary=config.get_text_config().vocab_size,
        merged_bytes=merged,
    )
