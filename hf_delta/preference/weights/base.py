"""What a rule of token weights sees and gives; torch only.

A completion's score is

`s(y) = sum_t w_t (log pi(y_t) - log pi_ref(y_t)) + sum_t v_t KL(pi_ref || pi)_t`

with reward weights `w` and KL weights `v`, one for each token of the completion, and the loss compares
`beta s(chosen)` with `beta s(rejected)`. DPO is `w = 1, v = 0`, TDPO1 is `w = v = 1`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn


NEEDS = frozenset({"kl", "columns", "activations", "hidden_states"})


@dataclass(frozen=True)
class TokenBatch:
    """A batch of pairs: `N = 2B` completions, first all chosen, then all rejected; nothing in it has a gradient but `masks`.

    Args:
        tokens (`torch.Tensor` of shape `(N, T)`): Token ids that are scored; position `t` is predicted from all before it.
        mask (`torch.Tensor` of shape `(N, T)`, bool): Where a token belongs to the completion.
        logps (`torch.Tensor` of shape `(N, T)`): Log-probabilities of the policy, nats, 0 outside of the mask.
        ref_logps (`torch.Tensor` of shape `(N, T)`): Those of the reference.
        kl (`torch.Tensor` of shape `(N, T)`, *optional*): `KL(pi_ref || pi)` in nats, for rules that need `kl`.
        columns (`torch.Tensor` of shape `(N, T)`, *optional*):
            The data set's `chosen_weights` and `rejected_weights`, for rules that need `columns`.
        activations (`Mapping[str, list[torch.Tensor]]`, *optional*):
            Mean over the features of activations of the reference, kind by kind, one `(N, T)` for each layer, for rules that
            need `activations`.
        masks (`tuple[torch.Tensor, torch.Tensor]`, *optional*):
            What the rule's network gave for the reward and the KL term, `(N, T)` each, 0 outside of the mask.
    """

    tokens: torch.Tensor
    mask: torch.Tensor
    logps: torch.Tensor
    ref_logps: torch.Tensor
    kl: torch.Tensor | None = None
    columns: torch.Tensor | None = None
    activations: Mapping[str, list[torch.Tensor]] | None = None
    masks: tuple[torch.Tensor, torch.Tensor] | None = None


class TokenTerms(NamedTuple):
    """Weights `(N, T)` of the reward term, and of the KL term for rules that need `kl`."""

    reward: torch.Tensor
    kl: torch.Tensor | None = None


class TokenWeights:
    """Base of rules. A rule of your own is a subclass, or a function `weights(batch) -> reward` or `-> (reward, kl)`.

    Attributes:
        needs (`frozenset[str]`): Of `kl`, `columns`, `activations` and `hidden_states`; what is not asked for is not computed.
        constant_chosen_kl (`bool`): Whether no gradient flows through the KL of chosen completions, as in TDPO2.
        paper (`tuple[str, str]`, *optional*): Title and number on arXiv, for the model card.
    """

    needs: frozenset[str] = frozenset()
    constant_chosen_kl: bool = False
    paper: tuple[str, str] | None = None

    def weights(self, batch: TokenBatch) -> TokenTerms:
        """Weights of every token, all 1 by default; outside of `batch.mask` they do not matter."""
        return TokenTerms(torch.ones_like(batch.logps))

    def network(self, width: int, layers: int) -> nn.Module | None:
        """A network to train with the policy, for rules that need `hidden_states`.

        It is called in the policy's forward pass with the reference's hidden states `(n, layers, width)` of the `n` tokens of
        the completions, without gradient, and gives the masks of reward and KL, `(n,)` each.
        """
        return None

    def penalty(self, terms: TokenTerms, mask: torch.Tensor) -> torch.Tensor | None:
        """What is added to the loss of each pair, `(B,)`, or `None`."""
        return None
