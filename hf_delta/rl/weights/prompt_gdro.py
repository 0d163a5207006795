"""Prompt-GDRO: sequences weighted by an adversary that moves mass to the difficulty groups that fare worst."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch

from hf_delta.errors import InputError
from hf_delta.rl.weights.base import RolloutBatch


SIGNALS = ("failure", "std", "loss")
FORMS = ("objective", "mean_one", "unnormalised")


def group_signal(batch: RolloutBatch, signal: str = "failure") -> torch.Tensor:
    """What a batch says about each difficulty group: a mean over the group's prompts, each prompt counted once.

    Args:
        batch (`RolloutBatch`):
            Rollouts with `groups`. Sequences without a score, or for `"failure"` without one to judge by, are left out.
        signal (`str`, *optional*, defaults to `"failure"`):
            `"failure"`: one minus the share of a prompt's rollouts that are correct. `"std"`: their standard deviation of
            `reward` (in units of reward, with Bessel's correction as in TRL); prompts with one score are left out.

    Returns:
        `torch.Tensor` of shape `(K,)`, float64: NaN for groups about which the batch says nothing.
    """
    scored = ~batch.reward.isnan()
    if signal == "failure" and batch.judged is not None:
        scored = batch.judged
    scored = scored & (batch.groups >= 0)
    prompts = int(batch.group_ids.max()) + 1 if len(batch) else 0
    of_prompt = torch.full((prompts,), -1, dtype=torch.long)
    of_prompt[batch.group_ids[scored]] = batch.groups[scored]
    value = 1.0 - batch.correct.double() if signal == "failure" else batch.reward.double()
    total, count = _sums(value[scored], batch.group_ids[scored], prompts)
    mean = total / count
    if signal == "std":
        squares, _ = _sums((value[scored] - mean[batch.group_ids[scored]]) ** 2, batch.group_ids[scored], prompts)
        mean = torch.where(count > 1, squares / (count - 1), torch.nan).sqrt()
    usable = mean.isfinite() & (of_prompt >= 0)
    total, count = _sums(mean[usable], of_prompt[usable], batch.num_groups)
    return total / count


def _sums(values: torch.Tensor, index: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    total = torch.zeros(size, dtype=torch.float64).index_add_(0, index, values)
    return total, torch.bincount(index, minlength=size).double()


def learn_scores(
    total: torch.Tensor, mass: torch.Tensor, signal: torch.Tensor, beta: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """One step of the scores `S_b = total_b / mass_b`; groups whose signal is not finite stay as they are.

    With `beta` a debiased exponential average, `total <- (1 - beta) total + beta signal` and
    `mass <- (1 - beta) mass + beta`, so that after `n` visits of a group `mass = 1 - (1 - beta)^n`. With `None` the
    plain sum of all signals.

    Args:
        total, mass (`torch.Tensor` of shape `(K,)`, float64): State, zero for groups never visited.
        signal (`torch.Tensor` of shape `(K,)`, float64): What was seen now.
        beta (`float` or `None`): Weight of the newest signal, in (0, 1].

    Returns:
        Two `torch.Tensor` of shape `(K,)`, float64: the new `total` and `mass`.
    """
    present = signal.isfinite()
    kept, taken = (1.0, 1.0) if beta is None else (1.0 - beta, beta)
    new_mass = torch.ones_like(mass) if beta is None else kept * mass + taken
    return torch.where(present, kept * total + taken * signal, total), torch.where(present, new_mass, mass)


def current_scores(total: torch.Tensor, mass: torch.Tensor) -> torch.Tensor:
    """Scores `(K,)`, float64: `total / mass`; a group never visited stands at the mean of those that were, or at 0."""
    seen = mass > 0
    scores = torch.where(seen, total / mass, 0.0)
    neutral = scores[seen].mean() if bool(seen.any()) else scores.new_zeros(())
    return torch.where(seen, scores, neutral)


def multiplicative_weights(
    scores: torch.Tensor, eta: float, gamma: float = 0.0, score_clip: float | None = None
) -> torch.Tensor:
    """The adversary's distribution, `q_b = (1 - gamma) exp(eta S_b) / sum_c exp(eta S_c) + gamma / B`.

    If `S_b` is the *sum* of the losses of group `b` in rounds 1 to `T`, all in [0, 1], this is Hedge, and
    `max_b S_b - sum_t q_t . l_t <= log(B) / eta + eta T / 8 + gamma T`, which is `sqrt(T log(B) / 2)` at
    `eta = sqrt(8 log(B) / T)` and `gamma = 0`. With an exponential average for `S_b`, as in the paper, no such bound
    holds: the scores stay within [0, 1], and `q_b / q_c` within `exp(eta)`, however long a group does badly.

    Args:
        scores (`torch.Tensor` of shape `(B,)`): Scores of the groups that take part.
        eta (`float`): Strength of the adversary, per unit of score; 0 gives the uniform distribution.
        gamma (`float`, *optional*, defaults to `0.0`): Share spread evenly, in [0, 1]: no group falls below `gamma / B`.
        score_clip (`float`, *optional*): Scores are clipped to `[-score_clip, score_clip]`.

    Returns:
        `torch.Tensor` of shape `(B,)`, float64, with sum 1.
    """
    if not len(scores):
        return scores.double()
    return (1.0 - gamma) * torch.softmax(eta * _clipped(scores, score_clip), 0) + gamma / len(scores)


def _clipped(scores: torch.Tensor, score_clip: float | None) -> torch.Tensor:
    return scores.double() if score_clip is None else scores.double().clamp(-score_clip, score_clip)


def objective_weights(q: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
    """Weights of Group DRO's objective, `w_b = q_b / share_b`: the weighted mean loss of the batch is `sum_b q_b mean_b`.

    Args:
        q (`torch.Tensor` of shape `(B,)`): The adversary's distribution.
        share (`torch.Tensor` of shape `(B,)`): Share of each group in the batch, positive, with sum 1.
    """
    return q / share


def mean_one_weights(q: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
    """Weights in proportion to `q_b` with mean 1 over the batch, `w_b = q_b / sum_c share_c q_c`.

    What a group gets in all, `share_b w_b`, is then proportional to `share_b q_b`: rare groups stay rare.
    """
    return q / (share * q).sum()


def unnormalised_weights(scores: torch.Tensor, eta: float, score_clip: float | None = None) -> torch.Tensor:
    """Weights `w_b = exp(eta S_b)`, float64: their mean is not 1, so that they change the size of the step as well."""
    return (eta * _clipped(scores, score_clip)).exp()


PAPER = ("Group Distributionally Robust Optimization-Driven Reinforcement Learning for LLM Reasoning", "2601.19280")


class PromptGDROWeights:
    """The weight rule `prompt_gdro`: prompts of difficulty groups that fare worse weigh more.

    Prompt-GDRO of "Group Distributionally Robust Optimization-Driven Reinforcement Learning for LLM Reasoning" (arXiv
    2601.19280). Per generation batch, over the `B` groups that are in it: scores from *earlier* batches ([`current_scores`]), the
    adversary's `q` ([`multiplicative_weights`]), weights `w_b` in one of three forms, and `min(w_b, max_weight)` for each
    sequence of the group. Only then does the rule learn from the batch, so that a batch's luck is not in its own weights.
    Sequences in no group (-1) get weight 1 and are outside the shares.

    The cap comes last and nothing is scaled up after it: with `"objective"` and `"mean_one"` the mean weight of a batch is
    1 unless the cap binds, and then below 1 by what was cut off. Scaling up would break the cap, and handing the rest to
    other groups would be another game.

    Args:
        signal (`str`, *optional*, defaults to `"failure"`):
            What the adversary learns from, see [`group_signal`]; or `"loss"`, the paper's: the mean clipped surrogate loss
            of a group's sequences over the updates of one generation window. With advantages that are centred in each
            prompt's rollouts this is inert: at ratio 1 a sequence's loss is `-A_i`, and the `A_i` of a prompt add up to
            exactly 0, whether its rollouts are all wrong or half right. Where a window serves several updates the ratio
            drifts and the mean turns slightly negative, first where the policy improves.
        weights (`str`, *optional*, defaults to `"objective"`):
            `"objective"`: [`objective_weights`]; `"mean_one"`: [`mean_one_weights`], as in the paper's released code;
            `"unnormalised"`: [`unnormalised_weights`], as in its text, which use neither `q` nor `gamma`.
        eta (`float`, *optional*, defaults to `0.65`):
            Strength of the adversary per unit of score, at least 0. With `"objective"`, 0 is pure balancing: every group
            in the batch counts the same.
        gamma (`float`, *optional*, defaults to `0.01`):
            Share of `q` that is spread evenly, in [0, 1].
        beta (`float`, *optional*, defaults to `0.12`):
            Weight of the newest signal in a group's score, in (0, 1]. `None` sums all signals: then the adversary has the
            regret bound of [`multiplicative_weights`], and ends with all weight on one group.
        max_weight (`float`, *optional*, defaults to `15.0`):
            Largest weight, at least 1.
        score_clip (`float`, *optional*):
            Scores are clipped to `[-score_clip, score_clip]`; not with `beta=None`.

    Raises:
        `InputError`: an argument is out of its range, or a batch has no groups.
    """

    paper = PAPER

    def __init__(
        self,
        signal: str = "failure",
        weights: str = "objective",
        eta: float = 0.65,
        gamma: float = 0.01,
        beta: float | None = 0.12,
        max_weight: float = 15.0,
        score_clip: float | None = None,
    ):
        _check_choice("signal", signal, SIGNALS)
        _check_choice("weights", weights, FORMS)
        _check_number("eta", eta, "a number of at least 0", lambda x: 0 <= x < math.inf)
        _check_number("gamma", gamma, "a number in [0, 1]", lambda x: 0 <= x <= 1)
        _check_number("max_weight", max_weight, "a number of at least 1", lambda x: x >= 1)
        if beta is not None:
            _check_number("beta", beta, "a number in (0, 1], or null for the sum of all signals", lambda x: 0 < x <= 1)
        if score_clip is not None:
            _check_number("score_clip", score_clip, "a positive number, or null for none", lambda x: x > 0)
        if beta is None and (score_clip is not None or weights == "unnormalised"):
            raise InputError(
                "prompt_gdro: beta: null sums the signals of the whole run, so that score_clip, or the cap of weights: "
                "unnormalised, makes all groups equal in the end. Give beta a number in (0, 1], or drop the other key."
            )
        self.signal, self.weights = signal, weights
        self.eta, self.gamma, self.beta = eta, gamma, beta
        self.max_weight, self.score_clip = max_weight, score_clip
        self.needs = frozenset({"groups", "losses"} if signal == "loss" else {"groups"})
        self._total = self._mass = torch.zeros(0, dtype=torch.float64)
        self._used: dict[str, torch.Tensor] = {}

    def __call__(self, batch: RolloutBatch) -> torch.Tensor:
        if batch.groups is None:
            raise InputError("prompt_gdro needs batches with difficulty groups, and this one has none.")
        self._grow(batch.num_groups)
        weights = self._weights(batch)
        if self.signal != "loss":
            self._learn(group_signal(batch, self.signal))
        return weights

    def on_losses(self, sums: torch.Tensor, counts: torch.Tensor) -> None:
        """Learn from the surrogate losses of one generation window, already added up over processes.

        Args:
            sums (`torch.Tensor` of shape `(K,)`): Sum over each group's sequences of their mean loss.
            counts (`torch.Tensor` of shape `(K,)`): How many sequences that were; 0 for groups that had none.
        """
        if self.signal == "loss":
            self._grow(len(sums))
            self._learn(sums.double().cpu() / counts.double().cpu())

    def group_weights(self) -> torch.Tensor:
        """Weight of each group in the last batch, `(K,)` float64, NaN for those that were not in it."""
        return self._used.get("weight", torch.full_like(self._total, torch.nan))

    def log_metrics(self, batch: RolloutBatch) -> dict[str, float]:
        """Weight, score and `q` of each group in the last batch, as they were used, as `gdro/weight/<group>` and so on."""
        return {
            f"gdro/{key}/{name}": value
            for key, values in self._used.items()
            for name, value in zip(batch.group_names, values.tolist())
            if not math.isnan(value)
        }

    def state_dict(self) -> dict[str, Any]:
        summed = self.beta is None
        return {"signal": self.signal, "summed": summed, "total": self._total, "mass": self._mass}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for key, here in (("signal", self.signal), ("summed", self.beta is None)):
            if state[key] != here:
                raise InputError(
                    f"prompt_gdro: the checkpoint's scores have {key}: {state[key]} and this run has {key}: {here}; they "
                    "are not on one scale. Resume with the signal and the beta (a number or null) that wrote it."
                )
        self._total, self._mass = state["total"].clone(), state["mass"].clone()

    def _weights(self, batch: RolloutBatch) -> torch.Tensor:
        grouped = batch.groups >= 0
        row_weights = torch.ones(len(batch)) if batch.row_weights is None else batch.row_weights
        amount, _ = _sums(row_weights.double()[grouped], batch.groups[grouped], batch.num_groups)
        present = amount > 0
        share = amount[present] / amount.sum()
        scores = current_scores(self._total, self._mass)[: batch.num_groups][present]
        used = {"score": scores}
        if self.weights == "unnormalised":
            weights = unnormalised_weights(scores, self.eta, self.score_clip)
        else:
            used["q"] = multiplicative_weights(scores, self.eta, self.gamma, self.score_clip)
            form = objective_weights if self.weights == "objective" else mean_one_weights
            weights = form(used["q"], share)
        used["weight"] = weights.clamp(max=self.max_weight)
        nothing = torch.full((batch.num_groups,), torch.nan, dtype=torch.float64)
        self._used = {key: nothing.masked_scatter(present, value) for key, value in used.items()}
        rows = torch.ones(len(batch), dtype=torch.float64)
        rows[grouped] = self._used["weight"][batch.groups[grouped]]
        return rows

    def _learn(self, signal: torch.Tensor) -> None:
        signal = torch.cat([signal, signal.new_full((len(self._total) - len(signal),), torch.nan)])
        self._total, self._mass = learn_scores(self._total, self._mass, signal, self.beta)

    def _grow(self, groups: int) -> None:
        # Groups named by a column of a stream come up during the run.
        missing = self._total.new_zeros(max(0, groups - len(self._total)))
        self._total, self._mass = torch.cat([self._total, missing]), torch.cat([self._mass, missing])


def _check_choice(key: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise InputError(f"prompt_gdro: {key} must be one of {', '.join(choices)}, got {value!r}.")


def _check_number(key: str, value: Any, what: str, fits: Callable[[float], bool]) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not fits(value):
        raise InputError(f"prompt_gdro: {key} must be {what}, got {value!r}.")
