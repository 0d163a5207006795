"""From a batch of completions to scores of tokens under policy and reference: which forward passes, in which order."""

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from hf_delta._compat.trl_dpo import DPOHooks
from hf_delta.ops.token_kl import sampled_kl
from hf_delta.preference.weights import TokenBatch, TokenTerms, TokenWeights, terms_of
from hf_delta.preference.weights.activations import KINDS, activation_means


# What TRL's metrics want to know of the policy's next-token distribution.
STATISTICS = ("entropy", "mean_logits", "is_top1")


@dataclass(frozen=True)
class ScoredTokens:
    """
    `N` completions with `T` positions, each of which predicts the next token.

    Args:
        mask (`torch.Tensor` of shape `(N, T)`, bool): Where the next token belongs to the completion.
        logps (`torch.Tensor` of shape `(N, T)`): Of the policy, in nats, with gradient; 0 outside of the mask, as all below.
        ref_logps (`torch.Tensor` of shape `(N, T)`): Of the reference.
        statistics (`dict[str, torch.Tensor]`): [`STATISTICS`] of the policy, `(N, T)` each, without gradient.
        kl (`torch.Tensor` of shape `(N, T)`, *optional*): `KL(pi_ref || pi)` in nats, with gradient.
        masks (`tuple[torch.Tensor, torch.Tensor]`, *optional*): What the mask network gave, `(N, T)` each, with gradient.
        activations (`Mapping[str, list[torch.Tensor]]`, *optional*): See [`~hf_delta.preference.weights.TokenBatch`].
    """

    mask: torch.Tensor
    logps: torch.Tensor
    ref_logps: torch.Tensor
    statistics: dict[str, torch.Tensor]
    kl: torch.Tensor | None = None
    masks: tuple[torch.Tensor, torch.Tensor] | None = None
    activations: Mapping[str, list[torch.Tensor]] | None = None


class CompletionScoring(DPOHooks):
    """Forward passes of DPO for a rule of token weights.

    Attributes:
        rule ([`TokenWeights`], *optional*): What it needs is computed, and nothing else.
        exact_kl (`bool`): Whether the KL term is a sum over the vocabulary.
    """

    rule: TokenWeights | None = None
    exact_kl: bool = True

    def scored_tokens(self, model: torch.nn.Module, inputs: dict[str, Any]) -> ScoredTokens:
        """Policy and reference on a batch of the collator."""
        needs = frozenset() if self.rule is None else self.rule.needs
        kwargs = self.model_inputs(inputs)
        mask = kwargs["labels"][:, 1:] != -100
        exact = "kl" in needs and self.exact_kl
        if not exact and not needs & {"hidden_states", "activations"}:
            # TRL's order: with dropout on, the random numbers are its too.
            policy = model(**kwargs)
            with self.reference() as reference:
                ref_logps = reference(**kwargs).log_probs
            return self._scored(mask, policy, ref_logps)
        found, activations = self._reference_pass(kwargs, exact, needs)
        extra = {"ref_hidden": found.last_hidden_state} if exact else {}
        if "hidden_states" in needs:
            extra["mask_inputs"] = self._mask_inputs(found.hidden_states, mask)
        policy = model(**kwargs, **extra)
        return self._scored(mask, policy, policy.ref_log_probs if exact else found.log_probs, activations)

    def _reference_pass(self, kwargs: dict[str, Any], exact: bool, needs: frozenset[str]):
        """What comes of the reference before the policy's turn, and its activations."""
        wanted = {"backbone_only": exact, "output_hidden_states": "hidden_states" in needs}
        with self.reference() as reference:
            watching = (
                activation_means(reference, getattr(self.rule, "kinds", KINDS))
                if "activations" in needs
                else nullcontext()
            )
            with watching as activations:
                return reference(**kwargs, **wanted), activations

    def _mask_inputs(self, hidden_states: tuple[torch.Tensor, ...], mask: torch.Tensor) -> torch.Tensor:
        """Hidden states `(n, L, d)` at the positions that count; the embeddings are none of the layers."""
        return torch.stack([states[:, :-1][:, -mask.shape[1] :][mask] for states in hidden_states[1:]], dim=1)

    def _scored(self, mask, policy, ref_logps, activations=None) -> ScoredTokens:
        size = mask.shape[1]
        # Prompt learning puts virtual tokens first.
        logps, ref_logps = policy.log_probs[:, -size:], ref_logps[:, -size:]
        statistics = {name: getattr(policy, name)[:, -size:].detach() for name in STATISTICS}
        kl, masks = getattr(policy, "kl", None), getattr(policy, "masks", None)
        if kl is not None:
            kl = kl[:, -size:]
        if self.rule is not None and "kl" in self.rule.needs and not self.exact_kl:
            kl = sampled_kl(ref_logps, logps)
        if masks is not None:
            masks = tuple(logps.new_zeros(mask.shape).masked_scatter(mask, m.to(logps.dtype)) for m in masks)
        if activations is not None:
            activations = {k: [layer[:, :-1][:, -size:] for layer in layers] for k, layers in activations.items()}
        return ScoredTokens(mask, logps, ref_logps, statistics, kl, masks, activations)

    def token_terms(self, scored: ScoredTokens, inputs: dict[str, Any]) -> TokenTerms | None:
        """What the rule says of a batch, checked; `None` without a rule."""
        if self.rule is None:
            return None
        columns = inputs.get("token_weights")
        batch = TokenBatch(
            tokens=inputs["input_ids"][:, 1:],
            mask=scored.mask,
            logps=scored.logps.detach(),
            ref_logps=scored.ref_logps,
            kl=None if scored.kl is None else scored.kl.detach(),
            columns=None if columns is None else columns[:, 1:],
            activations=scored.activations,
            masks=scored.masks,
        )
        return terms_of(self.rule, batch, self.args.rule_name)
