"""Pass rates of prompts, learnt from their rollouts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import is_
from typing import Any

import numpy as np
import torch

from hf_delta.errors import InputError
from hf_delta.ids import digests
from hf_delta.rl.difficulty import state as state_format
from hf_delta.rl.difficulty.bins import PassRateBins
from hf_delta.rl.difficulty.counts import Counts, Window
from hf_delta.rl.difficulty.rates import PassRates
from hf_delta.rl.difficulty.settings import checked_forgetting, checked_prior
from hf_delta.rl.difficulty.visits import merged_visits, right_and_wrong


# Under a decay nothing ever counts zero. Where "all right" or "all wrong" is asked, rollouts that count less than this
# together are forgotten; a single one does after 9 more visits at the default decay.
FORGOTTEN = 0.05


class Difficulty:
    """A posterior of the pass rate of every prompt seen, with forgetting, and the bin of pass rates that it is in.

    A visit is one generation batch that brings `n > 0` scored rollouts of a prompt, `c` of them right. What is remembered is

        decay:   solved <- d solved + c,   seen <- d seen + n
        window:  solved = sum of c,        seen = sum of n     over the last `window` visits

    and the posterior is `Beta(a + solved, b + seen - solved)`. Time counts in visits of that prompt, not in steps: a prompt
    that is not visited is not forgotten. With `prior_column`, `a + b` stays and the prior's mean becomes the pass rate of all
    prompts with the same value of that column,

        m = (a + solved_v) / (a + b + seen_v),   Beta((a + b) m + solved, (a + b) (1 - m) + seen - solved)

    where `solved_v` and `seen_v` forget as above and a visit is a batch with rollouts of that value. The pool holds the
    prompt's own rollouts too. In a run of one epoch every prompt is new, and this is all that tells them apart.

    A prompt never seen is in the bin of its prior's mean. From its first visit on it leaves its bin only when its mean has
    passed the boundary of that bin by `hysteresis`, see [`PassRateBins`]; it goes to the bin that holds the mean. Bins move
    in [`Difficulty.update`] and nowhere else.

    The defaults: a pass rate that drifts by `x` per visit is followed with a lag of `x d / (1 - d)` and, with `n` rollouts a
    visit, a standard deviation of `sqrt(p (1 - p) (1 - d) / (n (1 + d)))`. For `n = 8` and `p = 0.5`, `d = 0.7` has a lag of
    2.3 visits and a deviation of 0.074, `d = 0.9` a lag of 9 visits and a deviation of 0.041; where a visit is an epoch, nine
    of them are long. The prior `(1, 1)` is uniform and weighs two rollouts, so that the first visit outvotes it. Edges in
    fifths leave 13 prompts to a bin if 64 spread evenly. A hysteresis of 0.03 is 0.4 of that deviation.

    Every process that gets the same calls holds the same state, bit for bit. 64 bits of a hash stand for an id.

    Args:
        decay (`float`, *optional*):
            `d` in (0, 1]; 1 forgets nothing. 0.7 if neither `decay` nor `window` is given.
        window (`int`, *optional*):
            Visits remembered, 1 to 8, instead of a decay; a visit may have up to 32767 rollouts.
        prior (`Sequence[float]`, *optional*, defaults to `(1.0, 1.0)`):
            `(a, b)`: right and wrong rollouts that a prompt starts with, both positive.
        prior_column (`str`, *optional*):
            Name of the dataset column whose values pool. Every call then needs `columns`.
        edges (`Sequence[float]`, *optional*, defaults to `(0.2, 0.4, 0.6, 0.8)`):
            Inner edges of the bins, ascending.
        hysteresis (`float`, *optional*, defaults to `0.03`):
            In pass rate, at least 0 and less than the width of the first and of the last bin.
        exclude_extremes (`bool`, *optional*, defaults to `False`):
            Whether prompts whose remembered rollouts are all right or all wrong are in no bin. Under a decay, rollouts are
            forgotten here once they count less than 0.05 together. A prompt never seen is not extreme.

    Raises:
        `InputError`: an argument is out of its range, or both `decay` and `window` are given.

    Paper: "Group Distributionally Robust Optimization-Driven Reinforcement Learning for LLM Reasoning" (arXiv 2601.19280),
    which counts whether any rollout of a visit was right; here every rollout counts, so that the pass rate does not depend on
    how many a prompt was given.
    """

    def __init__(
        self,
        *,
        decay: float | None = None,
        window: int | None = None,
        prior: Sequence[float] = (1.0, 1.0),
        prior_column: str | None = None,
        edges: Sequence[float] = (0.2, 0.4, 0.6, 0.8),
        hysteresis: float = 0.03,
        exclude_extremes: bool = False,
    ):
        self.prior = checked_prior(prior)
        if prior_column is not None and (not isinstance(prior_column, str) or not prior_column):
            raise InputError(f"prior_column must be the name of a dataset column, got {prior_column!r}.")
        if not isinstance(exclude_extremes, bool):
            raise InputError(f"exclude_extremes must be true or false, got {exclude_extremes!r}.")
        self.prior_column = prior_column
        self.exclude_extremes = exclude_extremes
        self.bins = PassRateBins(edges, hysteresis)
        forgetting = checked_forgetting(decay, window)
        # All prompts of a value together may have more rollouts in a batch than 16 bits hold; values are few.
        pooled = Window(forgetting.visits, np.int64) if isinstance(forgetting, Window) else forgetting
        self._prompts = Counts(forgetting)
        self._pools = Counts(pooled)
        self._asked: _Asked | None = None

    @property
    def num_prompts(self) -> int:
        """Prompts seen."""
        return len(self._prompts)

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays, with the room they hold ready and the 8 bytes of each id."""
        return self._prompts.nbytes + self._pools.nbytes

    @property
    def num_groups(self) -> int:
        return len(self.bins)

    @property
    def group_names(self) -> list[str]:
        """Such as `"0.0-0.2"`, from the lowest pass rates to the highest."""
        return list(self.bins.names)

    def estimate(self, prompt_ids: Sequence[str], columns: Sequence[str] | None = None) -> PassRates:
        """Posterior of each prompt; changes nothing.

        Args:
            prompt_ids (`Sequence[str]` of length `P`): Stable ids; one may occur more than once.
            columns (`Sequence[str]` of length `P`, *optional*): Each prompt's value of `prior_column`, if there is one.

        Raises:
            `InputError`: an id or a value is missing, or the lengths differ.
        """
        asked = self._look_up(prompt_ids, columns)
        right, wrong = asked.counts.T
        arrays = (*asked.posterior.T, right + wrong, right)
        return PassRates(*(torch.from_numpy(array.copy()) for array in arrays))

    def groups(self, prompt_ids: Sequence[str], columns: Sequence[str] | None = None) -> torch.Tensor:
        """Bin of each prompt, `(P,)` int64, and -1 for those that `exclude_extremes` leaves out; changes nothing.

        Raises:
            `InputError`: as [`Difficulty.estimate`].
        """
        asked = self._look_up(prompt_ids, columns)
        found = self.bins.of(_means(asked.posterior), self._prompts.labels(asked.rows))
        if self.exclude_extremes:
            right, wrong = asked.counts.T
            seen = right + wrong
            found[(seen > 0) & ((right < FORGOTTEN) | (seen - right < FORGOTTEN))] = -1
        return torch.from_numpy(found)

    def update(
        self,
        prompt_ids: Sequence[str],
        correct: torch.Tensor,
        rollouts: torch.Tensor,
        columns: Sequence[str] | None = None,
    ) -> None:
        """Learn from one generation batch, which is one visit of each prompt and of each value of `prior_column` in it.

        Args:
            prompt_ids (`Sequence[str]` of length `P`):
                Stable ids. The rollouts of a prompt that occurs more than once add up.
            correct (`torch.Tensor` of shape `(P,)`):
                Right rollouts, whole numbers.
            rollouts (`torch.Tensor` of shape `(P,)`):
                Scored rollouts, whole numbers; a prompt with 0 is not visited.
            columns (`Sequence[str]` of length `P`, *optional*):
                Each prompt's value of `prior_column`, if there is one.

        Raises:
            `InputError`: as [`Difficulty.estimate`], and if not `0 <= correct <= rollouts` in whole numbers. Nothing has
                changed then.
        """
        asked = self._look_up(prompt_ids, columns)
        values = asked.values
        new = right_and_wrong(correct, rollouts, len(asked.keys))
        visited, counts, first = merged_visits(asked.keys, new)
        limit = self._prompts.forgetting.limit if isinstance(self._prompts.forgetting, Window) else None
        if limit is not None and (counts > limit).any():
            raise InputError(
                f"Prompt {prompt_ids[first[(counts > limit).any(1)][0]]!r} has more than {limit} rollouts in one batch, "
                "which a window cannot hold: use decay instead of window, or check the prompt ids."
            )
        self._asked = None
        if values is not None:
            pools, pool_counts, pool_first = merged_visits(values, new)
            self._pools.add(pools, pool_counts, asked.pool_rows[pool_first])
        rows = self._prompts.add(visited, counts, asked.rows[first])
        pool_rows = None if values is None else self._pools.find(values[first])
        means = _means(self._posterior(self._prompts.read(rows), pool_rows))
        self._prompts.set_labels(rows, self.bins.of(means, self._prompts.labels(rows)))

    def state_dict(self) -> dict[str, Any]:
        """Everything learnt, as tensors in nested dicts; the same for any order in which prompts came."""
        return state_format.packed(self._settings(), self._prompts, self._pools)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what [`Difficulty.state_dict`] gave; decay, prior, hysteresis and `exclude_extremes` may be other ones.

        Raises:
            `InputError`: the state is of another window, of a decay instead of a window or the reverse, of other edges or of
                another `prior_column`, or it is damaged. Nothing has changed then.
        """
        self._prompts, self._pools = state_format.unpacked(
            state, self._settings(), self._prompts.forgetting, self._pools.forgetting
        )
        self._asked = None

    def _settings(self) -> dict[str, Any]:
        forgetting = self._prompts.forgetting
        return {
            "window": forgetting.visits if isinstance(forgetting, Window) else None,
            "edges": self.bins.edges.tolist(),
            "prior_column": self.prior_column,
        }

    def _keys(self, prompt_ids: Sequence[str], columns: Sequence[str] | None) -> tuple[np.ndarray, np.ndarray | None]:
        keys = digests(prompt_ids, "the prompt ids")
        if self.prior_column is None:
            return keys, None
        if columns is None or len(columns) != len(keys):
            raise InputError(
                f"prior_column is {self.prior_column!r}, so the value of that column is needed for each of the {len(keys)} "
                f"prompts; got {'none' if columns is None else len(columns)}."
            )
        return keys, digests(columns, f"the column {self.prior_column!r}")

    def _look_up(self, prompt_ids: Sequence[str], columns: Sequence[str] | None) -> "_Asked":
        """What is known of these prompts; in a step that asks, asks again and learns, looked up once."""
        if self.prior_column is None:
            columns = None
        if self._asked is None or not self._asked.is_about(prompt_ids, columns):
            keys, values = self._keys(prompt_ids, columns)
            rows = self._prompts.find(keys)
            pool_rows = None if values is None else self._pools.find(values)
            counts = self._prompts.read(rows)
            self._asked = _Asked(
                tuple(prompt_ids),
                None if columns is None else tuple(columns),
                keys,
                values,
                rows,
                pool_rows,
                counts,
                self._posterior(counts, pool_rows),
            )
        return self._asked

    def _posterior(self, counts: np.ndarray, pool_rows: np.ndarray | None) -> np.ndarray:
        """`alpha` and `beta` of prompts with these right and wrong rollouts, `(P, 2)`."""
        if pool_rows is None:
            return self.prior + counts
        pool = self._pools.read(pool_rows)
        strength = sum(self.prior)
        # Both from counts, not one as the rest of the other, so that neither can round to zero.
        return strength * ((self.prior + pool) / (strength + pool.sum(1, keepdims=True))) + counts


@dataclass(frozen=True)
class _Asked:
    """Prompts that were asked for, and what was known of them: it holds until something is learnt."""

    prompt_ids: tuple[str, ...]
    columns: tuple[str, ...] | None
    keys: np.ndarray
    values: np.ndarray | None
    rows: np.ndarray
    pool_rows: np.ndarray | None
    counts: np.ndarray
    posterior: np.ndarray

    def is_about(self, prompt_ids: Sequence[str], columns: Sequence[str] | None) -> bool:
        """Whether these are the very objects asked for; equal ones need not be the same id, as 1 and True."""
        return _are(self.prompt_ids, prompt_ids) and _are(self.columns, columns)


def _are(first: Sequence[str] | None, second: Sequence[str] | None) -> bool:
    if first is None or second is None:
        return first is second
    return len(first) == len(second) and all(map(is_, first, second))


def _means(posterior: np.ndarray) -> np.ndarray:
    alpha, beta = posterior.T
    return alpha / (alpha + beta)
