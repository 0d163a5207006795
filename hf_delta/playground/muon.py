"""Muon for a handful of small matrices on a CPU: equal shapes are orthogonalised together."""

from collections import defaultdict
from collections.abc import Iterable

import torch


_COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def orthogonalise(matrices: torch.Tensor, steps: int = 4) -> torch.Tensor:
    """Moves the singular values of each matrix towards 1 by the quintic Newton-Schulz iteration.

    Args:
        matrices (`torch.Tensor` of shape `(N, rows, columns)`): with rows <= columns, in float32.
        steps (`int`, *optional*, defaults to `4`): iterations; after 4, singular values that were not tiny lie in
            about [0.6, 1.2].

    Returns:
        `torch.Tensor` of shape `(N, rows, columns)`.
    """
    a, b, c = _COEFFICIENTS
    x = matrices / (matrices.flatten(1).norm(dim=1)[:, None, None] + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + torch.baddbmm(b * gram, gram, gram, beta=1, alpha=c) @ x
    return x


class Muon(torch.optim.Optimizer):
    """Momentum whose update is orthogonalised, for 2-D weights (https://kellerjordan.github.io/posts/muon/).

    `torch.optim.Muon` works in bfloat16 and one matrix at a time, which costs more than the model's own forward pass
    when the model is tiny and runs on a CPU.

    Args:
        params (`Iterable[torch.nn.Parameter]`): 2-D weights in float32.
        lr (`float`): the learning rate; a matrix with more rows than columns gets sqrt(rows / columns) times as much.
        momentum (`float`, *optional*, defaults to `0.95`): Nesterov momentum.
    """

    def __init__(self, params: Iterable[torch.nn.Parameter], lr: float, momentum: float = 0.95):
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            by_shape = defaultdict(list)
            for parameter in group["params"]:
                by_shape[tuple(sorted(parameter.shape))].append(parameter)
            for parameters in by_shape.values():
                self._step_together(parameters, group["lr"], group["momentum"])

    def _step_together(self, parameters: list[torch.nn.Parameter], lr: float, momentum: float) -> None:
        gradients = torch.stack([_wide(parameter.grad) for parameter in parameters])
        state = self.state[parameters[0]]
        average = state.setdefault("momentum", torch.zeros_like(gradients))
        average.lerp_(gradients, 1 - momentum)
        updates = orthogonalise(gradients.lerp(average, momentum))
        for parameter, update in zip(parameters, updates):
            rows, columns = parameter.shape
            scale = max(1.0, rows / columns) ** 0.5
            parameter.add_(update.mT if rows > columns else update, alpha=-lr * scale)


def _wide(matrix: torch.Tensor) -> torch.Tensor:
    return matrix.mT if matrix.shape[0] > matrix.shape[1] else matrix
