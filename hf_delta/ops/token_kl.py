"""Log-probabilities of tokens and the exact KL between two models, without the logits `(N, V)` of either.

The vocabulary is read once, a block at a time, for all rows: the largest buffer is a tile of `rows x columns`. Sums run
in float32, or float64 if an input has it, whatever the dtype of hidden states and head.
"""

from typing import NamedTuple

import torch

from hf_delta.errors import InputError
from hf_delta.ops.gather import gathered, whole
from hf_delta.ops.token_sides import Logits
from hf_delta.ops.token_tiles import Plan, ScoresFunction


class TokenScores(NamedTuple):
    """Per token, in nats, float32 or wider; of one shape, `(N,)` or `(B, T)`.

    `logps` is `log pi(y)`; `ref_logps` is `log pi_ref(y)`; `kl` is `KL(pi_ref || pi)` over the whole vocabulary. The last
    two are `None` without a reference.

    Statistics of the policy, without gradient, `None` where not asked for: `entropy` is `-sum_v pi(v) log pi(v)`,
    `log_sum_sq_probs` is `log sum_v pi(v)^2`, `mean_logits` is the mean of the logits, divided by the temperature, and
    `is_top1` (bool) says whether `y` is the most likely token, the first one of equals.
    """

    logps: torch.Tensor
    ref_logps: torch.Tensor | None = None
    kl: torch.Tensor | None = None
    entropy: torch.Tensor | None = None
    log_sum_sq_probs: torch.Tensor | None = None
    mean_logits: torch.Tensor | None = None
    is_top1: torch.Tensor | None = None


def token_logps_and_kl(
    hidden: torch.Tensor,
    head_weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    ref_hidden: torch.Tensor | None = None,
    ref_head_weight: torch.Tensor | None = None,
    ref_bias: torch.Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ref_logit_scale: float = 1.0,
    ref_softcap: float | None = None,
    temperature: float = 1.0,
    statistics: bool = False,
    rows: int = 512,
    columns: int = 1024,
) -> TokenScores:
    """`log pi(y)`, `log pi_ref(y)` and `KL(pi_ref || pi) = sum_v pi_ref(v) (log pi_ref(v) - log pi(v))` of each row, with

    `log pi = log_softmax(c tanh(s (W h + b) / c) / temperature)`.

    Gradients go to `hidden`, `head_weight` and `bias`, as far as they ask for them; the reference has none. With a frozen
    head they are made in the forward pass, `2 (N, d)` are kept and the backward pass costs no product; with a trained head
    the backward pass computes the tiles again. A second derivative is refused with a `RuntimeError`.

    Args:
        hidden (`torch.Tensor`): `(N, d)`, last hidden states of the rows that are scored, and of no others.
        head_weight (`torch.Tensor`): `(V, d)`; may be the embedding, a `DTensor`, or partitioned by ZeRO-3.
        targets (`torch.Tensor`): `(N,)`, tokens `y` in `[0, V)`.
        bias (`torch.Tensor`, *optional*): `(V,)`.
        ref_hidden (`torch.Tensor`, *optional*): `(N, d')`; without it there is neither `ref_logps` nor `kl`.
        ref_head_weight (`torch.Tensor`, *optional*):
            `(V, d')`. By default the reference has the head of the policy: its bias, scale and cap, too.
        ref_bias (`torch.Tensor`, *optional*): `(V,)`, of `ref_head_weight`.
        logit_scale (`float`, *optional*, defaults to `1.0`): `s`; see [`Logits`].
        softcap (`float`, *optional*): `c`.
        ref_logit_scale (`float`, *optional*, defaults to `1.0`): `s` of `ref_head_weight`.
        ref_softcap (`float`, *optional*): `c` of `ref_head_weight`.
        temperature (`float`, *optional*, defaults to `1.0`): Of both models.
        statistics (`bool`, *optional*, defaults to `False`): Whether to fill the statistics of [`TokenScores`] as well.
        rows (`int`, *optional*, defaults to `512`): Rows of a tile.
        columns (`int`, *optional*, defaults to `1024`): Tokens of the vocabulary in a tile.

    Raises:
        `InputError`: shapes that do not fit, targets outside of the vocabulary, settings out of range.
    """
    policy = Logits(logit_scale, softcap, temperature)
    reference = Logits(ref_logit_scale, ref_softcap, temperature)
    trained = torch.is_grad_enabled()
    head_weight, bias = whole(head_weight, trained), whole(bias, trained)
    if ref_hidden is not None and ref_head_weight is None:
        if ref_bias is not None or ref_logit_scale != 1.0 or ref_softcap is not None:
            raise InputError("ref_bias, ref_logit_scale and ref_softcap belong to ref_head_weight: give it as well")
        ref_head_weight, ref_bias, reference = head_weight, bias, policy
    ref_head_weight, ref_bias = whole(ref_head_weight, False), whole(ref_bias, False)
    _check_settings(policy, reference, rows, columns)
    head_trained = head_weight.requires_grad or (bias is not None and bias.requires_grad)
    if not trained or not (head_trained or hidden.requires_grad):
        keep = "nothing"
    else:
        keep = "inputs" if head_trained else "gradients"
    plan = Plan(policy, reference, (rows, columns), keep, statistics)
    with gathered(head_weight, bias, ref_head_weight, ref_bias):
        found = ScoresFunction.apply(hidden, head_weight, bias, ref_hidden, ref_head_weight, ref_bias, targets, plan)
    return TokenScores(*found)


def masked_token_scores(
    hidden: torch.Tensor,
    head_weight: torch.Tensor,
    targets: torch.Tensor,
    mask: torch.Tensor,
    *,
    ref_hidden: torch.Tensor | None = None,
    **settings,
) -> TokenScores:
    """[`token_logps_and_kl`] of the positions where `mask` is set: `(B, T)` each, exactly 0, or False, elsewhere.

    What is masked costs nothing, and no gradient comes from it; its targets may be anything, -100 for instance.

    Args:
        hidden (`torch.Tensor`): `(B, T, d)`; position `t` scores `targets[:, t]`, so the caller has shifted them.
        head_weight (`torch.Tensor`): `(V, d)`.
        targets (`torch.Tensor`): `(B, T)`.
        mask (`torch.Tensor`): `(B, T)`, 0 or False for prompt and padding.
        ref_hidden (`torch.Tensor`, *optional*): `(B, T, d')`.
        **settings: Further arguments of [`token_logps_and_kl`].

    Raises:
        `InputError`: as [`token_logps_and_kl`].
    """
    chosen = mask != 0
    for name, tensor in {"hidden": hidden, "targets": targets, "ref_hidden": ref_hidden}.items():
        if tensor is not None and tensor.shape[:2] != mask.shape:
            raise InputError(f"mask is {_shape(mask)} and {name} is {_shape(tensor)}: the first two sizes must agree")
    rows = None if ref_hidden is None else ref_hidden[chosen]
    found = token_logps_and_kl(hidden[chosen], head_weight, targets[chosen], ref_hidden=rows, **settings)
    # Scattered and not indexed: without a single row the zeros still hang on the model.
    spread = (None if rows is None else rows.new_zeros(mask.shape).masked_scatter(chosen, rows) for rows in found)
    return TokenScores(*spread)


def sampled_kl(logps: torch.Tensor, ref_logps: torch.Tensor) -> torch.Tensor:
    """An estimate of `KL(pi || pi_ref)` from tokens that `pi` drew: `exp(r) - 1 - r` with `r = ref_logps - logps`.

    Unbiased, and never negative (Schulman's k3, http://joschu.net/blog/kl-approx.html). For `KL(pi_ref || pi)` from tokens
    that `pi_ref` drew, exchange the two. Tokens of a data set are drawn by neither: there it is a penalty, and no estimate.

    Args:
        logps (`torch.Tensor`): Log-probabilities of the model that drew the tokens, any shape, in nats.
        ref_logps (`torch.Tensor`): Those of the other model, the same shape.
    """
    ratio = ref_logps - logps
    return torch.expm1(ratio) - ratio


def _check_settings(policy: Logits, reference: Logits, rows: int, columns: int) -> None:
    for name, value in {"temperature": policy.temperature, "rows": rows, "columns": columns}.items():
        if not value > 0:
            raise InputError(f"{name} must be positive, not {value}")
    for name, value in {"softcap": policy.softcap, "ref_softcap": reference.softcap}.items():
        if value is not None and not value > 0:
            raise InputError(f"{name} must be positive, or None for no cap, not {value}")


def _shape(tensor: torch.Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "a scalar"
