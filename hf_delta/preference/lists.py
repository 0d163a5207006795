"""Losses over lists of completions: scores and labels in, one loss a list out.

A list is a prompt with `K` completions. Its scores are what DPO calls rewards, `s_i = beta (log pi(y_i) - log pi_ref(y_i))`
(summed over tokens, nats), and its labels say how good each completion is, `psi_i` in [0, 1]. Lists of different lengths are
padded to the longest, and `mask` says which entries are there; what stands in the others, NaN included, changes nothing.

Every function here has the same signature:

    loss(scores (B, K) float, labels (B, K), mask (B, K) bool, optional) -> (B,)

in float32 or, for float64 scores, in float64. Each is a function of the set of (score, label) pairs: the order in a list does
not matter, neither to the loss nor to gradients. Labels get no gradient. Completions with equal labels are not compared with one
another, and a list in which all are equal has loss 0; what that means is said with each loss.

LiPO: Listwise Preference Optimization through Learning-to-Rank (https://huggingface.co/papers/2402.01878).
"""

from collections.abc import Callable

import torch
from torch.nn.functional import logsigmoid

from hf_delta.ops.norms import widened


PAPER = ("LiPO: Listwise Preference Optimization through Learning-to-Rank", "2402.01878")


def list_logistic(scores: torch.Tensor, labels: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """DPO's loss of every pair with different labels, summed: `sum_{psi_i > psi_j} log(1 + exp(-(s_i - s_j)))`.

    With `K = 2` it is DPO's `sigmoid`. Of the labels only the order counts; pairs with equal labels are left out. See the head
    of this module for shapes.
    """
    margins, better = _compared(scores, labels, mask)[2:]
    return torch.where(better, -logsigmoid(margins), 0.0).sum((1, 2))


def list_hinge(scores: torch.Tensor, labels: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """SLiC's loss of every pair with different labels, summed: `sum_{psi_i > psi_j} max(0, 1 - (s_i - s_j))`.

    With `K = 2` it is DPO's `hinge`. Of the labels only the order counts; pairs with equal labels are left out.
    """
    margins, better = _compared(scores, labels, mask)[2:]
    return torch.where(better, (1.0 - margins).relu(), 0.0).sum((1, 2))


def lipo_lambda(scores: torch.Tensor, labels: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """LiPO-lambda: [`list_logistic`] with each pair weighted by what swapping it would change of the DCG.

    `sum_{psi_i > psi_j} |2^psi_i - 2^psi_j| |1 / log(1 + tau_i) - 1 / log(1 + tau_j)| log(1 + exp(-(s_i - s_j)))`

    `tau_i` is the rank by current scores, 1 for the highest; the weights get no gradient. With `K = 2` and labels {1, 0} it is
    DPO's loss times `1 / log 2 - 1 / log 3 = 0.5325`. Pairs with equal labels are left out: their weight is 0.

    Among equal scores (at the first step all are 0) the better label ranks first, and completions equal in both share the mean
    discount of their places. Were all discounts shared instead, a list without differences would never get any.
    """
    scores, labels, margins, better = _compared(scores, labels, mask)
    valid = torch.ones_like(scores, dtype=torch.bool) if mask is None else mask.bool()
    with torch.no_grad():
        gains = torch.exp2(labels.to(scores.dtype))
        discounts = _discounts(scores, labels, valid)
        weights = (_differences(gains) * _differences(discounts)).abs()
    return torch.where(better, -weights * logsigmoid(margins), 0.0).sum((1, 2))


def list_softmax(scores: torch.Tensor, labels: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Cross entropy between labels and scores: `-sum_i psi_i / (sum_k psi_k) log softmax(s)_i`.

    Labels must not be negative. With `K = 2` and labels {1, 0} it is DPO's `sigmoid`. Completions with equal labels have equal
    shares of the target, so that next to others this loss does draw them together; a list of equal labels alone has loss 0.
    """
    scores, labels, margins, better = _compared(scores, labels, mask)
    labels = labels.to(scores.dtype)
    targets = torch.where(better.any(2).any(1, keepdim=True), labels / labels.sum(1, keepdim=True), 0.0)
    return (targets * _against(margins, _others(scores, mask))).sum(1)


def plackett_luce(scores: torch.Tensor, labels: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Each completion against all that are worse: `sum_i log(1 + sum_{j: psi_j < psi_i} exp(s_j - s_i))`.

    Without equal labels that is the negative log-likelihood (nats) of the ranking under Plackett and Luce's model, DPO's own
    form for rankings (https://huggingface.co/papers/2305.18290, A.3); with `K = 2` it is DPO's `sigmoid`. Of the labels only
    the order counts. Completions with equal labels are each compared with all that are worse and never with one another: a
    composite likelihood. The likelihood of a ranking with ties would be a sum over all ways to break them.
    """
    margins, better = _compared(scores, labels, mask)[2:]
    return _against(margins, better).sum(1)


# One line per loss: the key is what a recipe writes under `loss_type:`.
LIST_LOSSES: dict[str, Callable[..., torch.Tensor]] = {
    "lipo_lambda": lipo_lambda,
    "list_hinge": list_hinge,
    "list_logistic": list_logistic,
    "list_softmax": list_softmax,
    "plackett_luce": plackett_luce,
}


def into_lists(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Values of completions as lists: what [`~hf_delta.preference.list_data.DataCollatorForLists`] put one after another.

    Args:
        values (`torch.Tensor` of shape `(N,)`): One for each completion, list by list; gradients pass.
        mask (`torch.Tensor` of shape `(B, K)`, bool): Which entries are there, `N` in all.

    Returns:
        `torch.Tensor` of shape `(B, K)`: 0 in entries that are not there.
    """
    return values.new_zeros(mask.shape).masked_scatter(mask, values)


def _compared(
    scores: torch.Tensor, labels: torch.Tensor, mask: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Scores and labels with 0 where nothing is, `s_i - s_j` and `psi_i > psi_j`, the last two `(B, K, K)`."""
    if scores.ndim != 2 or any(given.shape != scores.shape for given in (labels, mask) if given is not None):
        shapes = [None if given is None else tuple(given.shape) for given in (scores, labels, mask)]
        raise ValueError(f"scores, labels and mask must have one shape (B, K), got {shapes}")
    scores = scores.to(widened(scores.dtype))
    labels = labels.detach()
    if mask is not None:
        # Also for the backward: a gradient that is masked out after an infinity is NaN.
        scores, labels = scores.masked_fill(~mask.bool(), 0.0), labels.masked_fill(~mask.bool(), 0.0)
    better = (_differences(labels) > 0) & _others(labels, mask)
    return scores, labels, _differences(scores), better


def _differences(values: torch.Tensor) -> torch.Tensor:
    return values.unsqueeze(2) - values.unsqueeze(1)


def _others(like: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Pairs of different entries that are there, `(B, K, K)`."""
    pairs = ~torch.eye(like.shape[1], dtype=torch.bool, device=like.device).expand(len(like), -1, -1)
    return pairs if mask is None else pairs & mask.bool().unsqueeze(2) & mask.bool().unsqueeze(1)


def _against(margins: torch.Tensor, rivals: torch.Tensor) -> torch.Tensor:
    """Minus the log-probability of each entry among itself and its rivals, `log(1 + sum_j exp(s_j - s_i))`, `(B, K)`."""
    # An entry is always among those it is drawn from, so that no sum is empty.
    itself = torch.eye(margins.shape[1], dtype=torch.bool, device=margins.device)
    return torch.logsumexp((-margins).masked_fill(~(rivals | itself), -torch.inf), dim=2)


def _discounts(scores: torch.Tensor, labels: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """`1 / log(1 + tau_i)`, `(B, K)`, averaged over the places of entries that are equal in score and label."""
    there = mask.unsqueeze(1)
    tied = _differences(scores) == 0
    ahead = there & ((_differences(scores) < 0) | (tied & (_differences(labels) < 0)))
    same = there & tied & (_differences(labels) == 0)
    first, count = ahead.sum(2, keepdim=True), same.sum(2, keepdim=True)
    places = torch.arange(scores.shape[1], device=scores.device)
    held = (places >= first) & (places < first + count)
    of_place = 1.0 / torch.log(places.to(scores.dtype) + 2.0)
    return (held * of_place).sum(2) / count.squeeze(2).clamp(min=1)
