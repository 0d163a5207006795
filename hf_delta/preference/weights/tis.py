"""TIS-DPO: tokens weighted by what two contrasting models think of them."""

from collections.abc import Sequence
from numbers import Real
from typing import Any

import torch

from hf_delta.errors import InputError
from hf_delta.preference.weights.columns import ColumnWeights


class TISDPOWeights(ColumnWeights):
    """Weights `w_t` from the columns `chosen_weights` and `rejected_weights`, or from two contrast models; no KL term.

    The columns hold what the score is multiplied with, nothing is done to them. Without them, two models make them once, before
    training, by [`contrast_weights`]. The term that the published code can add has the other divergence, `KL(pi || pi_ref)`, and
    the other sign; for `KL(pi_ref || pi)` with these weights use `token_weights: columns` with `kl: true`.

    TIS-DPO: Token-level Importance Sampling for Direct Preference Optimization (https://huggingface.co/papers/2410.04350).

    Args:
        positive (`str`, *optional*): Directory of the model or adapter that makes good tokens likelier.
        negative (`str`, *optional*): Directory of the one that makes bad tokens likelier; both or none.
        low, high, scale (*optional*): See [`contrast_weights`]; only with models.

    Attributes:
        contrast (`dict`, *optional*): Arguments of [`~hf_delta.preference.contrast.add_contrast_weights`].
    """

    paper = (
        "TIS-DPO: Token-level Importance Sampling for Direct Preference Optimization With Estimated Weights",
        "2410.04350",
    )

    def __init__(self, positive: str | None = None, negative: str | None = None, **transform):
        super().__init__(kl=False)
        self.contrast = None
        if (positive is None) != (negative is None):
            raise InputError(
                "tis_dpo: positive and negative are two models that are compared; write both, or neither."
            )
        if positive is not None:
            if unknown := transform.keys() - {"low", "high", "scale"}:
                raise InputError(f"tis_dpo: there is no {', '.join(sorted(unknown))}; it takes low, high and scale.")
            none = torch.zeros(0)
            contrast_weights(none, none, chosen=True, **transform)
            self.contrast = {"positive": positive, "negative": negative, **transform}
        elif transform:
            raise InputError(f"tis_dpo: {', '.join(sorted(transform))} does nothing without positive and negative.")


def contrast_weights(
    positive_logps: torch.Tensor,
    negative_logps: torch.Tensor,
    *,
    chosen: bool,
    low: float = -1.5,
    high: float = 1.5,
    scale: tuple[float, float] | None = (0.7, 1.3),
) -> torch.Tensor:
    """Weights of tokens out of the log-probabilities that a model of good answers and a model of bad ones give them.

    With `d_t = log pi_+ - log pi_-` for chosen completions and its negative for rejected ones, clipped to `[low, high]`:
    `w_t = s_0 + (s_1 - s_0) (d_t - low) / (high - low)`, or `w_t = exp(d_t)` if `scale` is `None`. So a chosen token weighs more
    if the good model likes it better, a rejected one if the bad model does.

    The published code stores `log pi_- - log pi_+` for both sides and negates it for chosen ones, which is the same.

    Args:
        positive_logps (`torch.Tensor`): Log-probabilities under the model of good answers, nats, any shape.
        negative_logps (`torch.Tensor`): Those under the model of bad answers, of the same shape.
        chosen (`bool`): Whether the tokens are those of chosen completions.
        low (`float`, *optional*, defaults to `-1.5`): Lower bound of `d_t`, nats.
        high (`float`, *optional*, defaults to `1.5`): Upper bound of `d_t`, nats.
        scale (`tuple[float, float]`, *optional*, defaults to `(0.7, 1.3)`): Weights at the two bounds, or `None` for `exp(d_t)`.

    Returns:
        Weights, of the shape of the log-probabilities.

    Raises:
        `InputError`: the bounds or the scale are not in order, or the shapes differ.
    """
    if not (isinstance(low, Real) and isinstance(high, Real) and low < high):
        raise InputError(f"contrast weights: low must be below high, got low={low!r} and high={high!r}.")
    if scale is not None and not _is_scale(scale):
        raise InputError(f"contrast weights: scale takes two weights, 0 or more and in order, got {scale!r}.")
    if positive_logps.shape != negative_logps.shape:
        raise InputError(
            f"contrast weights: the two models scored {tuple(positive_logps.shape)} and {tuple(negative_logps.shape)} "
            "tokens; both must score the same ones."
        )
    scores = positive_logps - negative_logps if chosen else negative_logps - positive_logps
    scores = scores.clamp(low, high)
    if scale is None:
        return scores.exp()
    return scale[0] + (scale[1] - scale[0]) * (scores - low) / (high - low)


def _is_scale(scale: Any) -> bool:
    if not isinstance(scale, Sequence) or len(scale) != 2 or not all(isinstance(weight, Real) for weight in scale):
        return False
    return 0 <= scale[0] <= scale[1] < float("inf")
