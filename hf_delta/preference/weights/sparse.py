"""SparsePO: masks that are learned with the policy."""

import torch

from hf_delta.errors import InputError
from hf_delta.preference.weights.base import TokenBatch, TokenTerms, TokenWeights
from hf_delta.preference.weights.mask_nets import HIDDEN_WIDTH, TokenMasks


PAPER = ("SparsePO: Controlling Preference Alignment of LLMs via Sparse Token Masks", "2410.05102")


class SparsePOWeights(TokenWeights):
    """Masks `m_u` of the reward and `m_d` of the KL that a network learns from the reference's hidden states.

    The margin is TDPO1's with masks, `sum_t m_u r_t + sum_t m_d KL(pi_ref || pi)_t` for chosen minus the same for rejected. Masks
    are 0 or more, without an upper bound, and start at about 1.

    SparsePO: Controlling Preference Alignment of LLMs via Sparse Token Masks (https://huggingface.co/papers/2410.05102). Unlike
    the published two-layer network, this one has a ReLU in between, without which it is linear; and networks that look at the
    last layer only normalise it as the others do.

    Args:
        layers (`str`, *optional*, defaults to `"all"`): Hidden states that the network sees: of `all` layers, or the `last`.
        net (`str`, *optional*, defaults to `"simple"`): `simple`, one linear map a layer, or `two_layer`, with 200 numbers between.
        sharing (`str`, *optional*, defaults to `"common"`): `common`, one mask for reward and KL, or `independent`, two.
        dropout (`float`, *optional*, defaults to `0.01`): Dropout in the network.
        l1_reward (`float`, *optional*, defaults to `0.0`): Times the sum of reward masks of a pair, added to its loss.
        l1_kl (`float`, *optional*, defaults to `0.0`): The same for KL masks. Both are halved for a common mask.
        weight_decay (`float`, *optional*, defaults to `0.01`): Weight decay of the network, in place of the policy's.
    """

    needs = frozenset({"kl", "hidden_states"})
    paper = PAPER

    def __init__(
        self,
        layers: str = "all",
        net: str = "simple",
        sharing: str = "common",
        dropout: float = 0.01,
        l1_reward: float = 0.0,
        l1_kl: float = 0.0,
        weight_decay: float = 0.01,
    ):
        choices = {"layers": ("all", "last"), "net": ("simple", "two_layer"), "sharing": ("common", "independent")}
        for key, value in (("layers", layers), ("net", net), ("sharing", sharing)):
            if value not in choices[key]:
                raise InputError(f"sparse_po: {key} takes {' or '.join(choices[key])}, got {value!r}.")
        for key, value in (("l1_reward", l1_reward), ("l1_kl", l1_kl), ("weight_decay", weight_decay)):
            if not 0 <= value < float("inf"):
                raise InputError(f"sparse_po: {key} must be 0 or more, got {value!r}.")
        if not 0 <= dropout < 1:
            raise InputError(f"sparse_po: dropout is a probability below 1, got {dropout!r}.")
        self.layers, self.net, self.sharing, self.dropout = layers, net, sharing, dropout
        self.l1_reward, self.l1_kl, self.weight_decay = l1_reward, l1_kl, weight_decay

    def weights(self, batch: TokenBatch) -> TokenTerms:
        """The masks that the network gave, `(N, T)` each."""
        return TokenTerms(*batch.masks)

    def network(self, width: int, layers: int) -> TokenMasks:
        """The network for hidden states `(n, layers, width)`, in float32."""
        return TokenMasks(
            width,
            layers,
            last=self.layers == "last",
            hidden=HIDDEN_WIDTH if self.net == "two_layer" else 0,
            common=self.sharing == "common",
            dropout=self.dropout,
        )

    def penalty(self, terms: TokenTerms, mask: torch.Tensor) -> torch.Tensor | None:
        """`l1_reward sum_t m_u + l1_kl sum_t m_d` over both completions of each pair, `(B,)`; `None` if both are 0."""
        if not self.l1_reward and not self.l1_kl:
            return None
        # A common mask counts in both terms.
        share = 0.5 if self.sharing == "common" else 1.0
        sums = [torch.where(mask.bool(), masks, 0.0).sum(1) for masks in terms]
        chosen, rejected = (share * (self.l1_reward * sums[0] + self.l1_kl * sums[1])).chunk(2)
        return chosen + rejected
