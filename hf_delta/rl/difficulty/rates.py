"""What is believed of the pass rates of some prompts."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class PassRates:
    """Posterior `Beta(alpha, beta)` of the pass rate of each of `P` prompts; every tensor is `(P,)`, float64, on CPU.

    Args:
        alpha (`torch.Tensor`): Prior's rollouts that are right, plus `solved`.
        beta (`torch.Tensor`): Prior's rollouts that are wrong, plus `seen - solved`.
        seen (`torch.Tensor`): Rollouts seen, with forgetting; 0 for a prompt never seen.
        solved (`torch.Tensor`): Those of them that were right.
    """

    alpha: torch.Tensor
    beta: torch.Tensor
    seen: torch.Tensor
    solved: torch.Tensor

    @property
    def mean(self) -> torch.Tensor:
        """Expected pass rate, `alpha / (alpha + beta)`."""
        return self.alpha / (self.alpha + self.beta)

    @property
    def variance_of_reward(self) -> torch.Tensor:
        """Expected variance of a right-or-wrong reward, `E[p (1 - p)] = a b / ((a + b) (a + b + 1))`."""
        strength = self.alpha + self.beta
        return self.alpha * self.beta / (strength * (strength + 1))

    def __len__(self) -> int:
        return len(self.alpha)
