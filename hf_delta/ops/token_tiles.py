"""What `token_kl` computes: sums over the vocabulary, a tile at a time, and gradients."""

from dataclasses import dataclass

import torch
from torch.autograd import Function

from hf_delta.errors import InputError
from hf_delta.ops.gather import gathered
from hf_delta.ops.norms import widened
from hf_delta.ops.token_sides import Logits, Side, spans, view_of
from hf_delta.ops.token_statistics import ObservedSide


@dataclass(frozen=True)
class Plan:
    """Settings of one call."""

    policy: Logits
    reference: Logits
    tile: tuple[int, int]
    # For the backward pass: "nothing", "gradients" (of a frozen head), or "inputs".
    keep: str
    statistics: bool = False


class ScoresFunction(Function):
    """`logps`, `ref_logps`, `kl` and the statistics `(N,)` of rows; `None` without a reference, or where not asked for."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, ref_hidden, ref_weight, ref_bias, targets, plan):
        ctx.set_materialize_grads(False)
        ctx.plan = plan
        _check(hidden, weight, bias, ref_hidden, ref_weight, ref_bias, targets)
        kind = ObservedSide if plan.statistics else Side
        policy, reference = _sides(kind, hidden, weight, bias, ref_hidden, ref_weight, ref_bias, plan)
        gap, means = _scan(policy, reference, targets, plan)
        if plan.keep == "gradients":
            ctx.dtype = hidden.dtype
            ctx.save_for_backward(*_hidden_gradients(policy, reference, targets, means))
        logps = (policy.chosen - policy.log_total()).squeeze(1)
        ref_logps = kl = None
        if reference is not None:
            ref_logps = (reference.chosen - reference.log_total()).squeeze(1)
            # Differences of like quantities: the KL of equal models is 0, not the rounding of two large logarithms.
            kl = gap / reference.total + (policy.peak - reference.peak) + (policy.total / reference.total).log()
            kl = kl.squeeze(1).clamp_(min=0)
        if plan.keep == "inputs":
            lse, ref_lse = policy.log_total(), None if reference is None else reference.log_total()
            ctx.save_for_backward(hidden, weight, bias, ref_hidden, ref_weight, ref_bias, targets, lse, ref_lse)
        statistics = policy.statistics() if plan.statistics else ()
        ctx.mark_non_differentiable(*(found for found in (ref_logps, *statistics) if found is not None))
        return logps, ref_logps, kl, *(statistics or (None,) * 4)

    @staticmethod
    def backward(ctx, grad_logps, _, grad_kl, *__):
        # Gradients are recorded here with `create_graph` only. torch's own `once_differentiable` lets a gradient pass as a
        # constant where the incoming one is a constant.
        if torch.is_grad_enabled():
            raise RuntimeError(
                "token_logps_and_kl cannot be differentiated twice: call backward without create_graph, or compute the "
                "log-probabilities from logits"
            )
        grads = [None] * 8
        if grad_logps is None and grad_kl is None:
            return tuple(grads)
        if ctx.plan.keep == "gradients":
            pairs = zip((grad_logps, grad_kl), ctx.saved_tensors)
            total = sum(grad[:, None] * kept for grad, kept in pairs if grad is not None)
            grads[0] = total.to(ctx.dtype)
        else:
            grads[:3] = _recomputed(ctx, grad_logps, grad_kl)
        return tuple(grads)


def _sides(
    kind: type[Side], hidden, weight, bias, ref_hidden, ref_weight, ref_bias, plan: Plan
) -> tuple[Side, Side | None]:
    given = [t.dtype for t in (hidden, weight, ref_hidden, ref_weight) if t is not None]
    wide = torch.float64 if torch.float64 in given else widened(given[0])
    rows, columns = plan.tile
    tile = (min(rows, len(hidden)), columns)
    policy = kind(hidden, weight, bias, plan.policy, tile, wide)
    if ref_hidden is None:
        return policy, None
    return policy, Side(ref_hidden, ref_weight, ref_bias, plan.reference, tile, wide)


def _scan(policy: Side, reference: Side | None, targets: torch.Tensor, plan: Plan):
    """Once through the vocabulary: `sum_v exp(x_v - peak) (x_v - z_v)` `(N, 1)` with the reference's logits `x`, and for a
    frozen head `sum_v exp(. - peak) bend_v W_v` `(N, d)` of both sides.
    """
    sides = [side for side in (policy, reference) if side is not None]
    gap, learning = torch.zeros_like(policy.total), plan.keep == "gradients"
    spare = torch.empty_like(policy.buffer) if reference is not None or plan.statistics else None
    bends = torch.empty_like(policy.buffer) if learning and plan.policy.softcap is not None else None
    means = [torch.zeros_like(policy.hidden, dtype=policy.wide) for _ in sides] if learning else []
    for columns in spans(len(policy.weight), plan.tile[1]):
        for side in sides:
            side.enter(columns)
        for rows in spans(len(targets), plan.tile[0]):
            tiles = [side.tile(rows) for side in sides]
            third, bend = (None if buffer is None else view_of(buffer, *tiles[0].shape) for buffer in (spare, bends))
            for side, tile in zip(sides, tiles):
                side.choose(rows, tile, targets[rows])
            shrinks = []
            if reference is not None:
                torch.sub(tiles[1], tiles[0], out=third)
                shrinks.append(reference.fold(rows, tiles[1]))
                gap[rows] = gap[rows].mul_(shrinks[0]).add_(third.mul_(tiles[1]).sum(1, keepdim=True))
            if bend is not None:
                plan.policy.bend(tiles[0], out=bend)
            shrinks.insert(0, policy.fold(rows, tiles[0], third))
            for mean, tile, shrink in zip(means, tiles, shrinks):
                mean[rows].mul_(shrink).addmm_(tile if bend is None else tile.mul_(bend), policy.block)
    return gap, means


def _hidden_gradients(policy: Side, reference: Side | None, targets: torch.Tensor, means: list[torch.Tensor]):
    """`d logps / d h` and `d kl / d h`, `(N, d)` each: `W_y - E_pi[W]` and `E_pi[W] - E_ref[W]`."""
    factor = policy.logits.factor
    expected = means[0].div_(policy.total)
    own = policy.weight[targets].to(policy.wide)
    if policy.logits.softcap is not None:
        own = own.mul_(policy.logits.bend(policy.chosen))
    of_logps = own.sub_(expected).mul_(factor)
    if reference is None:
        return (of_logps,)
    return of_logps, expected.sub_(means[1].div_(reference.total)).mul_(factor)


def _recomputed(ctx, grad_logps, grad_kl) -> tuple[torch.Tensor | None, ...]:
    """Gradients of hidden states, head and bias: `dz_v = g_logp (1[v = y] - pi_v) + g_kl (pi_v - ref_v)`, tile by tile."""
    hidden, weight, bias, ref_hidden, ref_weight, ref_bias, targets, lse, ref_lse = ctx.saved_tensors
    plan = ctx.plan
    policy, reference = _sides(Side, hidden, weight, bias, ref_hidden, ref_weight, ref_bias, plan)
    of_logps = torch.zeros_like(lse) if grad_logps is None else grad_logps[:, None] * plan.policy.factor
    of_kl = None if grad_kl is None else grad_kl[:, None] * plan.policy.factor
    of_policy = -of_logps if of_kl is None else of_kl - of_logps
    spare = torch.empty_like(policy.buffer) if plan.policy.softcap is not None else None
    with gathered(weight, bias, ref_weight, ref_bias):
        grads = [
            torch.zeros_like(hidden, dtype=policy.wide) if ctx.needs_input_grad[0] else None,
            *(torch.empty_like(t) if needed else None for t, needed in zip((weight, bias), ctx.needs_input_grad[1:3])),
        ]
        for columns in spans(len(weight), plan.tile[1]):
            policy.enter(columns)
            sums = [torch.zeros_like(policy.block), policy.block.new_zeros(len(policy.block))]
            if of_kl is not None:
                reference.enter(columns)
            for rows in spans(len(hidden), plan.tile[0]):
                tile = policy.tile(rows)
                bend = None if spare is None else plan.policy.bend(tile, out=view_of(spare, *tile.shape))
                tile.sub_(lse[rows]).exp_().mul_(of_policy[rows])
                if of_kl is not None:
                    tile.sub_(reference.tile(rows).sub_(ref_lse[rows]).exp_().mul_(of_kl[rows]))
                place, found = policy.here(targets[rows])
                tile.scatter_add_(1, place, of_logps[rows] * found)
                if bend is not None:
                    tile.mul_(bend)
                if grads[0] is not None:
                    grads[0][rows].addmm_(tile, policy.block)
                if grads[1] is not None:
                    sums[0].addmm_(tile.T, hidden[rows].to(policy.wide))
                if grads[2] is not None:
                    sums[1].add_(tile.sum(0))
            for grad, whole in zip(grads[1:], sums):
                if grad is not None:
                    grad[columns] = whole
    return (None if grads[0] is None else grads[0].to(hidden.dtype), *grads[1:])


def _check(hidden, weight, bias, ref_hidden, ref_weight, ref_bias, targets) -> None:
    if targets.ndim != 1 or targets.is_floating_point():
        raise InputError(f"targets must be (N,) token ids, not {_shape(targets)} of {targets.dtype}")
    sides = {"": (hidden, weight, bias), "ref_": (ref_hidden, ref_weight, ref_bias)}
    for name, (states, head, offset) in sides.items():
        if states is None:
            continue
        if states.ndim != 2 or len(states) != len(targets):
            raise InputError(
                f"{name}hidden is {_shape(states)}: it must have a row for each of the {len(targets)} targets"
            )
        if head.ndim != 2 or head.shape[1] != states.shape[1]:
            raise InputError(f"{name}head_weight is {_shape(head)} and {name}hidden {_shape(states)}: widths differ")
        if head.shape[0] != weight.shape[0]:
            raise InputError(
                f"the head of the policy has {len(weight)} tokens and the reference's {len(head)}: KL needs one vocabulary"
            )
        if offset is not None and offset.shape != head.shape[:1]:
            raise InputError(f"{name}bias is {_shape(offset)}: it must have one value for each of {len(head)} tokens")
    if len(targets) and not 0 <= int(targets.min()) <= int(targets.max()) < len(weight):
        raise InputError(
            f"targets from {int(targets.min())} to {int(targets.max())} do not fit a vocabulary of {len(weight)}: "
            "leave out rows without a target, as masked_token_scores does"
        )


def _shape(tensor: torch.Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "a scalar"
