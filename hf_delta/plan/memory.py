"""Bytes of a training step on one process, from shapes alone.

What is always there (weights, reference, optimizer states) and what comes and goes (gradients, activations, the head's
tiles, keys and values of rollouts) are added up at each moment where they can be at their most; the largest sum is the peak.
`docs/dry_run.md` has the formulas.
"""

from dataclasses import dataclass

from hf_delta.plan.held import Held, held
from hf_delta.plan.parts import Step


@dataclass(frozen=True)
class Estimate:
    """Bytes on one process: what there is always, what there is at the most, and the peak with its moment."""

    weights: int
    reference: int
    optimizer: int
    gradients: int
    activations: int
    head: int
    rollouts: int
    peak: int
    moment: str


def estimate(step: Step, strategy: str = "DDP", processes: int = 1) -> Estimate:
    """Memory of one process under a strategy of `STRATEGIES`; one process shards nothing, whatever the strategy."""
    has = held(step, strategy if processes > 1 else "DDP", processes)
    moments = _moments(step, has)
    moment = max(moments, key=lambda name: moments[name])
    return Estimate(
        weights=has.weights + has.gathered,
        reference=has.reference,
        optimizer=has.optimizer,
        gradients=has.gradients,
        activations=_waiting(step) + step.activations.backward,
        head=max(step.head.forward, step.head.backward),
        rollouts=_rollout_bytes(step),
        peak=has.weights + has.gathered + has.reference + has.optimizer + moments[moment],
        moment=moment,
    )


def _moments(step: Step, has: Held) -> dict[str, int]:
    """Bytes beside those that are always there, by name of the moment."""
    weights, acts, head = step.weights, step.activations, step.head
    waiting, lasting = _waiting(step), has.gradients if has.lasting else 0
    earlier = has.gradients if step.accumulates else lasting
    embeddings = round(weights.embedding_trained * weights.embedding_values * weights.width)
    from_head = round(head.trained * head.vocabulary * head.width * weights.width)
    # With those of an earlier micro-batch, a gradient of the head of its own waits only where it is tied to the embeddings'.
    new_from_head = from_head if weights.tied or not step.accumulates else 0
    second = max(head.forward, acts.forward) + acts.base if step.second_pass else 0
    return {
        # Of the last block `acts.forward` has them.
        "forward": earlier + waiting + max(acts.forward - acts.casts, head.forward) + step.weights.layers * acts.casts,
        "reference": earlier + waiting + second,
        "head": earlier + waiting + head.backward,
        "backward": earlier + new_from_head + waiting + acts.backward,
        "end of backward": has.gradients + embeddings + acts.base + (new_from_head if step.accumulates else 0),
        "optimizer": has.gradients + _update_bytes(step),
        "rollouts": lasting + _rollout_bytes(step),
    }


def _waiting(step: Step) -> int:
    """Activations of all blocks, which wait for the backward pass."""
    acts = step.activations
    return acts.base + step.weights.layers * acts.saved + step.extra


def _rollout_bytes(step: Step) -> int:
    if step.rollouts is None:
        return 0
    return step.rollouts.bytes(step.weights.layers, step.activations.forward / max(step.tokens, 1))


def _update_bytes(step: Step) -> int:
    """Temporaries of the optimizer's step."""
    # One tensor after the other, and Adafactor's arithmetic has three copies of it in float32.
    return 3 * 4 * step.weights.largest_trained if step.optimizer.lower().startswith("adafactor") else 0
