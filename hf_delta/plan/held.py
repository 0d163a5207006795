"""What a process holds of weights, gradients and optimizer states for as long as it trains, under each way to share them."""

from dataclasses import dataclass

from hf_delta.plan.parts import Step


STRATEGIES = ("DDP", "ZeRO-2", "ZeRO-3", "FSDP2")
# What DeepSpeed has by default: values of the bucket that gradients are reduced in, and within how many values of the
# order of computation ZeRO-3 keeps what it will need again, there and back.
ZERO_BUCKET = 500_000_000
ZERO_REUSE = 1_000_000_000

# Name of an optimizer begins with -> values of the parameter's dtype that it keeps for each value, and bytes on top.
_STATES = {
    "adamw_bnb_8bit": (0, 2),
    "adamw_8bit": (0, 2),
    "adamw_torch_8bit": (0, 2),
    "adamw_torch_4bit": (0, 1),
    "paged_adamw_8bit": (0, 2),
    "ademamix": (3, 0),
    "ademamix_8bit": (0, 3),
    "paged_ademamix_32bit": (3, 0),
    "paged_ademamix_8bit": (0, 3),
    "lion": (1, 0),
    "lion_8bit": (0, 1),
    "paged_lion": (1, 0),
    "paged_lion_8bit": (0, 1),
    "adafactor": (0, 0),
    "sgd": (0, 0),
    "adagrad": (1, 0),
    "rmsprop": (1, 0),
    "rmsprop_bnb_8bit": (0, 1),
}


def state_bytes(optimizer: str, values: int, width: float) -> int:
    """Bytes of the states of an optimizer; one that is not in the table counts as AdamW."""
    begins = [start for start in _STATES if optimizer.lower().startswith(start)]
    kept, more = _STATES[max(begins, key=len)] if begins else (2, 0)
    return round(values * (kept * width + more))


@dataclass(frozen=True)
class Held:
    """
    Bytes on one process.

    Args:
        weights (`int`): Of the model that is trained, with its buffers and what its adapters derive from it.
        reference (`int`): Of a second model.
        optimizer (`int`): States, and weights in float32 that the optimizer has for itself.
        gradients (`int`): All that there are at the end of a backward pass, with the buckets that they are reduced in.
        gathered (`int`, *optional*, defaults to `0`): Weights of other processes that are here for a moment.
        lasting (`bool`, *optional*, defaults to `False`): Whether the room for gradients is there all the time.
    """

    weights: int
    reference: int
    optimizer: int
    gradients: int
    gathered: int = 0
    lasting: bool = False


def held(step: Step, strategy: str, processes: int) -> Held:
    """What one of so many processes holds under a strategy of `STRATEGIES`."""
    # Neither is sharded: each process has them as a whole.
    whole = step.weights.buffer_bytes + step.weights.layers * step.activations.derived
    if strategy == "DDP":
        return _replicated(step, processes, whole)
    if strategy == "FSDP2":
        return _fsdp(step, processes, whole)
    return _zero(step, int(strategy[-1]), processes, whole)


def saved_states(step: Step, strategy: str) -> int:
    """Bytes of the optimizer in a checkpoint, over all processes."""
    w = step.weights
    if strategy.startswith("ZeRO"):
        return _zero_states(step)
    return state_bytes(step.optimizer, w.trained, _fsdp_width(step) if strategy == "FSDP2" else w.width)


def _replicated(step: Step, processes: int, whole: int) -> Held:
    w = step.weights
    # DDP reduces copies of the gradients, its buckets.
    copies = 2 if processes > 1 else 1
    states = state_bytes(step.optimizer, w.trained, w.width)
    return Held(w.bytes + whole, step.reference * w.bytes, states, copies * w.trained_bytes)


def _compute(step: Step) -> int:
    """Bytes of a value that is computed with."""
    return 2 if step.autocast else 4


def _zero(step: Step, stage: int, processes: int, whole: int) -> Held:
    w, compute = step.weights, _compute(step)
    # Weights in the dtype of the computation, and the float32 ones beside the states, which are sharded.
    weights = compute * (w.trained + w.frozen_values) + w.packed_bytes
    states = _zero_states(step) // processes
    # The bucket is one buffer of its full size, whatever there is to reduce.
    gradients = compute * w.trained // processes + compute * ZERO_BUCKET
    if stage == 2:
        return Held(weights + whole, step.reference * weights, states, gradients)
    again = round(_block_width(step) * (w.layer_values + ZERO_REUSE // 2))
    gathered = min(max(_two_blocks(step), again), weights)
    reference = step.reference * weights // processes
    return Held(weights // processes + whole, reference, states, gradients, gathered, lasting=True)


def _two_blocks(step: Step) -> int:
    """Bytes of a block, the next one, and all that is outside of blocks."""
    w = step.weights
    return round(2 * _block_width(step) * w.layer_values) + _compute(step) * w.root_values


def _block_width(step: Step) -> float:
    """Bytes of a value in a block that computes: less where most of them are quantised."""
    w = step.weights
    values = w.all - w.root_values
    packed = w.all - w.trained - w.frozen_values
    return (w.packed_bytes + _compute(step) * (values - packed)) / max(values, 1)


def _zero_states(step: Step) -> int:
    values = step.weights.trained
    return values * (4 if _compute(step) == 2 else 0) + state_bytes(step.optimizer, values, 4)


def _fsdp(step: Step, processes: int, whole: int) -> Held:
    w = step.weights
    trained = w.trained * _fsdp_width(step)
    return Held(
        weights=round((w.frozen_bytes + trained) / processes) + whole,
        reference=step.reference * w.bytes // processes,
        optimizer=state_bytes(step.optimizer, w.trained, _fsdp_width(step)) // processes,
        gradients=round(trained / processes) + _compute(step) * w.layer_values,
        gathered=_two_blocks(step),
    )


def _fsdp_width(step: Step) -> float:
    """Bytes of a trained value: under mixed precision accelerate makes them float32."""
    return 4 if step.autocast else step.weights.width
