"""Which columns and rows of a weight make its skeleton; torch only.

Columns are chosen among the columns of `W`, rows among those of `W^T`. The functions below choose among the rows of a
matrix `items` `(n, d)`, which is `W` or a transposed view of it.
"""

from collections.abc import Callable

import torch


# Items whose residuals a round of the greedy selection follows at least.
CANDIDATES = 128
# A squared norm that fell to this part of what it last was when computed afresh is computed afresh again. Each
# subtraction may be wrong by an epsilon of the old value: in float32 this keeps about five digits.
CANCELLATION = 1e-2


def select_skeleton(
    weight: torch.Tensor, k: int, method: str = "pivoted_qr", seed: int = 0, oversample: int = 16
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose `k` rows and `k` columns of a weight.

    The same weight gives the same choice on the same device; arithmetic is in float32, or in float64 for float64.

    Args:
        weight: `(o, i)`, `k <= min(o, i)`, any floating dtype.
        method: a name in [`SELECTIONS`].
        seed: of the random numbers, where the method uses any.
        oversample: columns of a sketch beyond `k`, where the method uses one.

    Returns:
        Indices of rows and of columns, int64 `(k,)` each, in the order of choice.
    """
    device = weight.device
    # Metal has no float64, which norms are kept in.
    weight = weight.detach().to(
        "cpu" if device.type == "mps" else device, torch.promote_types(weight.dtype, torch.float32)
    )
    with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
        rows, columns = SELECTIONS[method](weight, k, seed, oversample)
    return rows.to(device), columns.to(device)


def pivoted_qr(weight: torch.Tensor, k: int, seed: int, oversample: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The first `k` pivots of QR with column pivoting, of `W^T` for rows and of `W` for columns."""
    return greedy_pivots(weight, k), greedy_pivots(weight.T, k)


def sketched_qr(weight: torch.Tensor, k: int, seed: int, oversample: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The same of a Gaussian sketch with `k + oversample` entries for each row or column."""
    return tuple(
        greedy_pivots(items @ _gaussian(items.shape[1], k + oversample, seed + side, weight), k)
        for side, items in enumerate((weight, weight.T))
    )


def largest_norms(weight: torch.Tensor, k: int, seed: int, oversample: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows and columns of largest norm."""
    return _largest(_square_norms(weight), k), _largest(_square_norms(weight.T), k)


def leverage(weight: torch.Tensor, k: int, seed: int, oversample: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows and columns of largest leverage on the `k` leading singular vectors: `sum_j V_aj^2`.

    Singular vectors come from a random range finder with one power step (https://huggingface.co/papers/0909.4061).
    """
    size = min(k + oversample, *weight.shape)
    basis = torch.linalg.qr(weight @ _gaussian(weight.shape[1], size, seed, weight)).Q
    basis = torch.linalg.qr(weight @ torch.linalg.qr(weight.T @ basis).Q).Q
    left, _, right = torch.linalg.svd(basis.T @ weight, full_matrices=False)
    return _largest(_square_norms(basis @ left[:, :k]), k), _largest(_square_norms(right[:k].T), k)


def uniform(weight: torch.Tensor, k: int, seed: int, oversample: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Any rows and columns, each set of them as likely as another."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randperm(n, generator=generator)[:k].to(weight.device) for n in weight.shape)


SELECTIONS: dict[str, Callable[[torch.Tensor, int, int, int], tuple[torch.Tensor, torch.Tensor]]] = {
    "pivoted_qr": pivoted_qr,
    "sketched_qr": sketched_qr,
    "norm": largest_norms,
    "leverage": leverage,
    "uniform": uniform,
}


def greedy_pivots(items: torch.Tensor, k: int) -> torch.Tensor:
    """Choose `k` times the item that is farthest from the span of those chosen before; of equal ones the first.

    These are the first `k` pivots of Businger and Golub's QR of `items^T` (LAPACK's geqp3), in order, without the QR.
    A residual never grows, so the norms of an earlier round are bounds: as long as the farthest of some candidates is
    farther than the bound of all others, no other item is looked at. The new directions are then taken out of all norms
    by one matrix product.

    Args:
        items: `(n, d)`, `k <= n`, float32 or float64.

    Returns:
        int64 `(k,)`.
    """
    # Gathering items out of a transposed view takes several times as long as the copy.
    greedy = _Greedy(items.contiguous(), k)
    while greedy.count < k:
        greedy.update_norms()
        greedy.choose_among_candidates()
    return greedy.chosen


class _Greedy:
    def __init__(self, items: torch.Tensor, k: int):
        self.items, self.k = items, k
        self.chosen = torch.empty(k, dtype=torch.long, device=items.device)
        # Row `j` is the part of choice `j` that is orthogonal to the earlier ones, of norm 1.
        self.directions = items.new_zeros(k, items.shape[1])
        self.count = 0
        # Squared residual norms of all items after the first `followed` directions; -inf for those chosen.
        self.norms = _square_norms(items)
        self.fresh = self.norms.clone()
        self.followed = 0

    def update_norms(self) -> None:
        """Take the directions of the last round out of the norms of all items."""
        new = self.directions[self.followed : self.count]
        if len(new):
            self.norms -= _square_norms(self.items @ new.T)
            self.followed = self.count
        self.norms[self.chosen[: self.count]] = -torch.inf
        _renew_norms(self.norms, self.fresh, self.items, self.directions[: self.count])

    def choose_among_candidates(self) -> None:
        """Choose items for as long as the candidates of largest norm are certain to hold the largest of all."""
        size = min(len(self.norms), max(CANDIDATES, 2 * (self.k - self.count)))
        order = torch.sort(self.norms, descending=True, stable=True).indices
        # By index, so that of equal norms the first is the smallest.
        candidates = order[:size].sort().values
        bound = self.norms[order[size]] if size < len(order) else self.norms.new_tensor(-torch.inf)
        vectors = self.items.index_select(0, candidates)
        norms, fresh = self.norms[candidates], self.fresh[candidates]
        first = self.count
        while self.count < self.k:
            best = norms.argmax()
            if self.count > first and not bool(norms[best] > bound):
                return
            direction = self._add(candidates[best], vectors[best])
            norms -= (vectors @ direction).to(norms.dtype).square_()
            norms[best] = -torch.inf
            _renew_norms(norms, fresh, vectors, self.directions[: self.count])

    def _add(self, index: torch.Tensor, vector: torch.Tensor) -> torch.Tensor:
        directions = self.directions[: self.count]
        residual = vector
        # The second time takes out what rounding left of the directions.
        for _ in range(2):
            residual = residual - directions.T @ (directions @ residual)
        # A residual of zero, in a matrix of lower rank than `k`, adds no direction.
        direction = torch.nn.functional.normalize(residual, dim=0, eps=torch.finfo(vector.dtype).tiny)
        self.directions[self.count] = direction
        self.chosen[self.count] = index
        self.count += 1
        return direction


def _renew_norms(norms: torch.Tensor, fresh: torch.Tensor, items: torch.Tensor, directions: torch.Tensor) -> None:
    """Compute squared norms from the residuals, in place, where subtraction has cancelled too much of them."""
    lost = torch.nonzero((norms < CANCELLATION * fresh) & (norms > -torch.inf)).flatten()
    if len(lost):
        vectors = items.index_select(0, lost)
        vectors = vectors - (vectors @ directions.T) @ directions
        norms[lost] = fresh[lost] = _square_norms(vectors)


def _square_norms(items: torch.Tensor) -> torch.Tensor:
    """Squared norm of each row, in float64: `(n,)`."""
    if items.is_contiguous():
        return torch.linalg.vector_norm(items, dim=1).double().square_()
    return items.square().sum(dim=1).double()


def _largest(values: torch.Tensor, k: int) -> torch.Tensor:
    return torch.sort(values, descending=True, stable=True).indices[:k]


def _gaussian(rows: int, columns: int, seed: int, like: torch.Tensor) -> torch.Tensor:
    # From a generator on the CPU, so that every device sees the same numbers.
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator, dtype=torch.float32).to(like)
