"""Users' own rules: a plain function made a rule, and what every rule must give."""

from collections.abc import Callable

import torch

from hf_delta.errors import InputError, said_by
from hf_delta.preference.weights.base import NEEDS, TokenBatch, TokenTerms, TokenWeights


class FunctionWeights(TokenWeights):
    """The rule `weights(batch) -> reward` or `-> (reward, kl)` as a plain function gives it, `(N, T)` each.

    Args:
        function (`Callable`): The function. What it wants of the batch it says in an attribute `needs`, a set of names.

    Raises:
        `InputError`: `needs` holds something that there is not, or `hidden_states`, which are for rules with a network.
    """

    def __init__(self, function: Callable[[TokenBatch], torch.Tensor | tuple[torch.Tensor, torch.Tensor]]):
        self.function = function
        self.name = rule_name(function)
        self.needs = checked_needs(getattr(function, "needs", frozenset()), self.name)
        if "hidden_states" in self.needs:
            raise InputError(
                f"token weights {self.name}: a function has no network to give hidden_states to; "
                "write a subclass of TokenWeights with a method network."
            )

    def weights(self, batch: TokenBatch) -> TokenTerms:
        """What the function gives, checked as in [`checked_terms`]."""
        terms = self.function(batch)
        return checked_terms(terms if isinstance(terms, tuple) else (terms,), batch, self.name)


def token_rule(rule: TokenWeights | Callable) -> TokenWeights:
    """A rule as it is, and a plain function as [`FunctionWeights`].

    Raises:
        `InputError`: it is neither, or needs what there is not.
    """
    if isinstance(rule, TokenWeights):
        checked_needs(rule.needs, rule_name(rule))
        if hasattr(rule, "state_dict") and not hasattr(rule, "load_state_dict"):
            raise InputError(
                f"token weights {rule_name(rule)}: it has a state_dict and no load_state_dict, so that no run could be resumed. "
                "Write both, or neither."
            )
        return rule
    if isinstance(rule, type) or not callable(rule):
        raise InputError(
            f"token weights: {rule_name(rule)} is neither an instance of TokenWeights nor a function of the batch."
        )
    return FunctionWeights(rule)


def checked_needs(needs, name: str) -> frozenset[str]:
    """What a rule needs, as a set of names that exist.

    Raises:
        `InputError`: a name does not exist.
    """
    names = frozenset({needs} if isinstance(needs, str) else needs)
    if foreign := names - NEEDS:
        raise InputError(
            f"token weights {name}: there is no {', '.join(sorted(map(repr, foreign)))} to need, "
            f"only {', '.join(sorted(NEEDS))}."
        )
    return names


def terms_of(rule: TokenWeights, batch: TokenBatch, name: str) -> TokenTerms:
    """What a rule gives for a batch, checked as in [`checked_terms`].

    Raises:
        `InputError`: the rule raised, or what it gave cannot be used.
    """
    try:
        terms = rule.weights(batch)
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"token weights {name}: it raised {said_by(error)}") from error
    return checked_terms(terms, batch, name)


def checked_terms(terms: tuple, batch: TokenBatch, name: str) -> TokenTerms:
    """What a rule gave, if it can be used: `(N, T)`, and finite and 0 or more in the completions.

    There must be a KL term if and only if the batch has the KL, that is, if the rule needs it. Weights of integers and of truth
    values become those of the log-probabilities' dtype.

    Args:
        terms (`TokenTerms` or `tuple`): Reward weights, and KL weights or nothing.
        batch (`TokenBatch`): What they were computed for.
        name (`str`): Of the rule, for the message.

    Raises:
        `InputError`: naming the rule, the term and what is wrong with it.
    """
    if not isinstance(terms, tuple) or not 1 <= len(terms) <= 2:
        raise InputError(
            f"token weights {name}: it must give weights or (reward, kl) weights, got {type(terms).__name__}."
        )
    terms = TokenTerms(*terms)
    if (terms.kl is None) != (batch.kl is None):
        raise InputError(
            f"token weights {name}: it gave KL weights without 'kl' in what it needs."
            if batch.kl is None
            else f"token weights {name}: it needs 'kl' and gave no KL weights; give (reward, kl)."
        )
    reward = _checked(terms.reward, batch, name, "reward")
    return TokenTerms(reward, None if terms.kl is None else _checked(terms.kl, batch, name, "KL"))


def _checked(weights: torch.Tensor, batch: TokenBatch, name: str, term: str) -> torch.Tensor:
    if not isinstance(weights, torch.Tensor):
        raise InputError(f"token weights {name}: the {term} weights are no tensor but {type(weights).__name__}.")
    if weights.shape != batch.mask.shape:
        raise InputError(
            f"token weights {name}: the {term} weights are {tuple(weights.shape)} and must be (N, T), "
            f"here {tuple(batch.mask.shape)}."
        )
    inside = weights.detach()[batch.mask.bool()]
    if not torch.isfinite(inside).all():
        raise InputError(
            f"token weights {name}: the {term} weights are not finite in {_row(~torch.isfinite(weights), batch)}."
        )
    if (inside < 0).any():
        raise InputError(
            f"token weights {name}: the {term} weights are negative in {_row(weights < 0, batch)}; weights are 0 or more."
        )
    return weights if weights.is_floating_point() else weights.to(batch.logps.dtype)


def _row(wrong: torch.Tensor, batch: TokenBatch) -> str:
    """Where the first wrong weight is, as `the chosen completion of pair 0, token 3`."""
    row, column = (wrong & batch.mask.bool()).nonzero()[0].tolist()
    pairs = batch.mask.shape[0] // 2
    token = int(batch.mask[row, :column].sum())
    return (
        f"the {'chosen' if row < pairs else 'rejected'} completion of pair {row % pairs} of the batch, token {token}"
    )


def rule_name(rule) -> str:
    """How a rule is called in messages."""
    named = rule if hasattr(rule, "__qualname__") else type(rule)
    return f"{named.__module__}.{named.__qualname__}"
