"""Feasible learning: a bound on the loss of every sample instead of on their mean, by multipliers that stay with the samples.

Feasible Learning (https://huggingface.co/papers/2501.14912).
"""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from typing import Any

import numpy as np
import torch

from hf_delta.errors import InputError
from hf_delta.ids import KeyTable, digests, with_room


logger = logging.getLogger(__name__)

PAPER = ("Feasible Learning", "2501.14912")
VERSION = 1


def dual_ascent(
    multipliers: torch.Tensor, losses: torch.Tensor, epsilon: float, eta: float, alpha: float | None = None
) -> torch.Tensor:
    """One step of the multipliers: `max(0, lambda_i + eta (l_i - epsilon - lambda_i / alpha))`.

    Without `alpha` the last term is absent: a multiplier grows for as long as its bound is broken, and is 0 in the end or
    its loss is `epsilon`. With `alpha`, the resilient form, bounds may be broken by slacks `s_i` at the cost
    `alpha / 2 sum_i s_i^2`, and a multiplier settles at `alpha max(0, l_i - epsilon)`, if `eta < 2 alpha`.

    Args:
        multipliers (`torch.Tensor` of shape `(B,)`): `lambda_i`, at least 0.
        losses (`torch.Tensor` of shape `(B,)`): `l_i`; for DPO's losses in nats.
        epsilon (`float`): Bound on every loss.
        eta (`float`): Step size.
        alpha (`float`, *optional*): Cost of slack.

    Returns:
        `torch.Tensor` of shape `(B,)`.
    """
    excess = losses.detach() - epsilon
    if alpha is not None:
        excess = excess - multipliers / alpha
    return (multipliers + eta * excess).clamp(min=0)


def tail_report(losses: torch.Tensor, epsilon: float, tail: float = 0.1) -> dict[str, float]:
    """How many samples keep the bound, and how bad the worst are; the same for any trainer, to compare with.

    Args:
        losses (`torch.Tensor` of shape `(N,)`): Loss of each sample.
        epsilon (`float`): Bound.
        tail (`float`, *optional*, defaults to `0.1`): Share of the samples that count as the worst, in (0, 1].

    Returns:
        `dict`: `satisfied` (share with `l_i <= epsilon`), `loss_mean`, `loss_max`, and `loss_cvar`, the mean loss of the worst
        `tail N` samples, the last of which counts in part where `tail N` is not whole. Empty without samples.
    """
    _check("tail", tail, "a share in (0, 1]", lambda x: 0 < x <= 1)
    losses = losses.detach().cpu()
    if not len(losses):
        return {}
    # Before they are widened: 0.3 in float32 is more than 0.3.
    satisfied = (losses <= epsilon).double().mean().item()
    losses = losses.double()
    worst = losses.sort(descending=True).values
    share = torch.clamp(tail * len(losses) - torch.arange(len(losses), dtype=torch.float64), 0, 1)
    # What has no share is left out and not multiplied by 0: an infinite loss may stand in either part.
    worst, share = worst[share > 0], share[share > 0]
    return {
        "satisfied": satisfied,
        "loss_mean": losses.mean().item(),
        "loss_max": losses.max().item(),
        "loss_cvar": ((worst * share).sum() / share.sum()).item(),
    }


def sample_keys(ids: Sequence[str | int]) -> torch.Tensor:
    """Keys of samples by their ids, `(N,)` int64: a tensor that can be gathered, the same in every process and every run.

    Raises:
        `InputError`: an id is neither a string nor a whole number.
    """
    return torch.from_numpy(digests(ids, "the sample ids"))


class Multipliers:
    """One multiplier for each sample of a dataset, under the key of its id.

    In training, a batch's loss is `mean(lambda_i l_i)` with [`Multipliers.weights`] as they were before the batch, and then
    [`Multipliers.update`] is given the pairs (key, loss) gathered over all processes: each process holds the whole vector, and
    after equal updates they are equal. Nothing else changes it; an evaluation calls neither.

    With `eta=0` every multiplier stays 1: the mean loss (ERM), with the same report.

    Args:
        epsilon (`float`): Bound on the loss of every sample, in the units of the loss.
        eta (`float`, *optional*, defaults to `1.0`): Step size of the multipliers, at least 0.
        alpha (`float`, *optional*): Cost of slack of the resilient form, above `eta / 2`, see [`dual_ascent`]. At `alpha = eta`
            a multiplier is what its sample's last loss had too much, times `alpha`, and remembers nothing further back.
        initial (`float`, *optional*, defaults to `1.0`): Multiplier of samples that were never updated.

    Raises:
        `InputError`: an argument is out of its range.
    """

    def __init__(self, epsilon: float, eta: float = 1.0, alpha: float | None = None, initial: float = 1.0):
        _check("epsilon", epsilon, "a finite number", math.isfinite)
        _check("eta", eta, "a finite number of at least 0", lambda x: 0 <= x < math.inf)
        _check("initial", initial, "a finite number of at least 0", lambda x: 0 <= x < math.inf)
        if alpha is not None:
            _check("alpha", alpha, "a positive finite number, or null for none", lambda x: 0 < x < math.inf)
            if eta >= 2 * alpha:
                raise InputError(
                    f"feasible: eta ({eta}) must be less than twice alpha ({alpha}): otherwise multipliers swing to and fro "
                    "and never settle. Lower eta."
                )
        self.epsilon, self.eta, self.alpha, self.initial = epsilon, eta, alpha, initial
        self._table = KeyTable()
        # Multiplier and last loss of each row, float64.
        self._values = np.zeros((0, 2))
        self._warned = False

    def __len__(self) -> int:
        """How many samples were updated."""
        return len(self._table)

    def weights(self, keys: torch.Tensor) -> torch.Tensor:
        """Multipliers of samples, `(B,)` float32 on the device of `keys`, `(B,)` int64; changes nothing."""
        rows = self._table.find(_array(keys, "keys", np.int64))
        found = np.full(len(rows), float(self.initial))
        found[rows >= 0] = self._values[rows[rows >= 0], 0]
        return torch.from_numpy(found).to(keys.device, torch.float32)

    def update(self, keys: torch.Tensor, losses: torch.Tensor) -> None:
        """One step of [`dual_ascent`] for each sample of a batch that was gathered over all processes.

        A sample that is there several times makes one step with its mean loss: samplers repeat some to fill the last batch. One
        whose loss is not finite is passed over, as the optimizer's step is under fp16. The order does not matter.

        Args:
            keys (`torch.Tensor` of shape `(N,)`, int64): See [`sample_keys`].
            losses (`torch.Tensor` of shape `(N,)`): Not weighted.

        Raises:
            `InputError`: not one whole key and one loss per sample.
        """
        keys, losses = _array(keys, "keys", np.int64), _array(losses, "losses", np.float64)
        if keys.shape != losses.shape:
            raise InputError(f"feasible: {len(losses)} losses for {len(keys)} samples; there must be one for each.")
        finite = np.isfinite(losses)
        if not finite.all() and not self._warned:
            logger.warning("A loss is %s: the multiplier of its sample stays as it is.", losses[~finite][0])
            self._warned = True
        keys, losses = _means(keys[finite], losses[finite])
        before = self._table.find(keys)
        used = len(self._table)
        rows = self._table.add(keys, before)
        self._values = with_room(self._values, used, len(self._table))
        self._values[rows[before < 0], 0] = self.initial
        multipliers = torch.from_numpy(self._values[rows, 0])
        stepped = dual_ascent(multipliers, torch.from_numpy(losses), self.epsilon, self.eta, self.alpha)
        self._values[rows] = np.stack([stepped.numpy(), losses], axis=1)

    def report(self, tail: float = 0.1) -> dict[str, float]:
        """[`tail_report`] of the samples seen so far, each with its last loss, and what their multipliers are.

        Losses are those of the step at which a sample came by, and not all of the present model.

        Returns:
            `dict`: also `samples`, `multiplier_mean`, `multiplier_max` and `multiplier_zero` (share). Empty without samples.
        """
        # In order of keys: a sum then is the same after a resume.
        state = self.state_dict()
        multipliers = state["multipliers"]
        report = tail_report(state["losses"], self.epsilon, tail)
        if report:
            report |= {
                "samples": float(len(self)),
                "multiplier_mean": multipliers.mean().item(),
                "multiplier_max": multipliers.max().item(),
                "multiplier_zero": (multipliers == 0).double().mean().item(),
            }
        return report

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Keys in ascending order, with multiplier and last loss of each, for [`~hf_delta.checkpoint.save_state`]."""
        order = self._table.keys.argsort()
        return {
            "version": torch.tensor(VERSION),
            "keys": torch.from_numpy(self._table.keys[order]),
            "multipliers": torch.from_numpy(self._values[order, 0]),
            "losses": torch.from_numpy(self._values[order, 1]),
        }

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Replace everything by what [`Multipliers.state_dict`] gave.

        Raises:
            `InputError`: the state is damaged, or of a newer format; then nothing is changed.
        """
        try:
            if int(state["version"]) != VERSION:
                raise InputError(
                    f"The multipliers of the checkpoint are in format {int(state['version'])}, and this hf_delta reads format "
                    f"{VERSION}: resume with the version of hf_delta that wrote it."
                )
            keys, multipliers, losses = (state[name].cpu().numpy() for name in ("keys", "multipliers", "losses"))
        except (AttributeError, KeyError, TypeError, RuntimeError) as error:
            raise _damaged(f"{type(error).__name__}: {error}") from error
        if keys.ndim != 1 or keys.dtype != np.int64 or (keys[1:] <= keys[:-1]).any():
            raise _damaged("keys are not ascending")
        for name, values in (("multipliers", multipliers), ("losses", losses)):
            if values.shape != keys.shape or values.dtype != np.float64 or not np.isfinite(values).all():
                raise _damaged(f"{name} are not one finite number per key")
        if (multipliers < 0).any():
            raise _damaged("a multiplier is negative")
        self._table = KeyTable()
        self._table.add(keys)
        self._values = np.stack([multipliers, losses], axis=1)


def _means(keys: np.ndarray, losses: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Every key once, ascending, and the mean of its losses."""
    # Losses in order too: a sum then does not depend on which process had which sample.
    order = np.lexsort((losses, keys))
    keys, starts, counts = np.unique(keys[order], return_index=True, return_counts=True)
    return keys, np.add.reduceat(losses[order], starts) / counts if len(keys) else losses[order]


def _array(values: torch.Tensor, what: str, dtype: type) -> np.ndarray:
    if values.ndim != 1 or (dtype is np.int64 and values.dtype != torch.int64):
        kind = " of int64" if dtype is np.int64 else ""
        raise InputError(
            f"feasible: {what} must be a tensor{kind} of shape (N,), got {values.dtype} {tuple(values.shape)}."
        )
    # bfloat16 is unknown to numpy.
    return values.detach().cpu().to(torch.int64 if dtype is np.int64 else torch.float64).numpy()


def _check(key: str, value: Any, what: str, fits: Callable[[float], bool]) -> None:
    if isinstance(value, bool) or not isinstance(value, Real) or not fits(value):
        raise InputError(f"feasible: {key} must be {what}, got {value!r}.")


def _damaged(what: str) -> InputError:
    return InputError(f"The multipliers of the checkpoint are damaged ({what}): resume from an earlier checkpoint.")
