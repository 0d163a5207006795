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
    farther than the bound of all others, no other item is looked at. Among candidates, inner products say everything: a
    round is a pivoted Cholesky factorisation of a small Gram matrix. The new directions are then taken out of all norms
    by one matrix product.

    Args:
        items: `(n, d)`, `k <= n`, float32 or float64.

    Returns:
        int64 `(k,)`.
    """
    greedy = _Greedy(items, k)
    greedy.choose_among_candidates()
    while greedy.count < k:
        greedy.update_norms()
        if greedy.only_rounding_is_left():
            greedy.choose_the_rest()
        else:
            greedy.choose_among_candidates()
    return greedy.chosen


class _Greedy:
    def __init__(self, items: torch.Tensor, k: int):
        self.items, self.k = items, k
        self.chosen = torch.empty(k, dtype=torch.long, device=items.device)
        # An orthonormal basis of the choices: the first `j` rows span the first `j` of them.
        self.directions = items.new_zeros(k, items.shape[1])
        self.count = 0
        # How many the next round may well choose.
        self.expected = k
        # Squared norms of the residuals of all items at the start of this round; -inf for those chosen.
        self.norms = _square_norms(items)
        self.whole = self.norms.clone()
        self.fresh = self.norms.clone()

    def choose_among_candidates(self) -> None:
        """Choose items for as long as the candidates of largest norm are certain to hold the largest of all."""
        size = min(len(self.norms), max(CANDIDATES, 2 * self.expected))
        order = torch.sort(self.norms, descending=True, stable=True).indices
        # By index, so that of equal norms the first is the smallest.
        candidates = order[:size].sort().values
        bound = float(self.norms[order[size]]) if size < len(order) else -torch.inf
        vectors = self._residuals(candidates)
        # On the CPU, where a step of the factorisation takes no launches.
        gram = (vectors @ vectors.T).to("cpu", torch.float64)
        gram.diagonal()[self.norms[candidates].cpu() == -torch.inf] = -torch.inf
        places, factor = pivoted_cholesky(gram, self.k - self.count, bound)
        places = places.to(candidates.device)
        self.new = slice(self.count, self.count + len(places))
        self.count += len(places)
        self.chosen[self.new] = candidates[places]
        if self.count < self.k:
            self.directions[self.new] = _orthonormal(vectors[places], factor.to(vectors))
        self.expected = min(2 * len(places), self.k - self.count)

    def update_norms(self) -> None:
        """Take the directions of the last round out of the norms of all items."""
        # Faster from here on than products with a transposed view.
        self.items = self.items.contiguous()
        self.norms -= _square_norms(self.items @ self.directions[self.new].T)
        self.norms[self.chosen[: self.count]] = -torch.inf
        # Where subtraction has cancelled too much of a norm, it is computed from the residual.
        lost = torch.nonzero((self.norms < CANCELLATION * self.fresh) & (self.norms > -torch.inf)).flatten()
        if len(lost):
            self.norms[lost] = self.fresh[lost] = _square_norms(self._residuals(lost))

    def only_rounding_is_left(self) -> bool:
        """Whether the choices span all items, to the digits that there are: the weight is of lower rank than `k`."""
        precision = 10 * torch.finfo(self.items.dtype).eps
        return bool((self.norms <= precision**2 * self.whole).all())

    def choose_the_rest(self) -> None:
        order = torch.sort(self.norms, descending=True, stable=True).indices
        self.chosen[self.count :] = order[: self.k - self.count]
        self.count = self.k

    def _residuals(self, indices: torch.Tensor) -> torch.Tensor:
        """What the directions leave of some items."""
        if self.items.is_contiguous():
            vectors = self.items.index_select(0, indices)
        else:
            # Several times as fast as out of the transposed view.
            vectors = self.items.T.index_select(1, indices).T.contiguous()
        directions = self.directions[: self.count]
        # The second time takes out what rounding left of the directions.
        for _ in range(2 if self.count else 0):
            vectors = vectors - (vectors @ directions.T) @ directions
        return vectors


def pivoted_cholesky(gram: torch.Tensor, steps: int, bound: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Pivots of a Gram matrix: each time the first item of largest squared residual.

    It ends early where the largest residual is not above `bound`, or fell so far below that of the first pivot that
    subtraction has cancelled its digits; there is always one pivot.

    Args:
        gram: `(m, m)`, float64 on the CPU. Items with `-inf` on the diagonal are not chosen.

    Returns:
        int64 `(s,)`, `1 <= s <= steps`, and the factor `L` `(s, s)` of the Gram matrix of these items.
    """
    residuals = gram.diagonal().clone()
    first = float(residuals.max())
    bound = max(bound, CANCELLATION * first)
    factor = gram.new_zeros(len(gram), steps)
    pivots = []
    for step in range(steps):
        pivot = residuals.argmax()
        largest = residuals[pivot]
        if step and not largest > bound:
            break
        pivots.append(pivot)
        known = factor[:, :step]
        column = torch.addmv(gram[:, pivot], known, known[pivot], alpha=-1)
        column.mul_(largest.clamp_(min=torch.finfo(torch.float64).tiny).rsqrt())
        factor[:, step] = column
        residuals -= column.square_()
        residuals[pivot] = -torch.inf
    pivots = torch.stack(pivots)
    return pivots, factor[pivots, : len(pivots)]


def _orthonormal(vectors: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """`L^-1 V`, which spans what `V` `(s, d)` spans; zeros in place of a direction where there is none."""
    smallest = torch.finfo(factor.dtype).tiny ** 0.5
    factor.diagonal().clamp_(min=smallest)
    rows = torch.linalg.solve_triangular(factor, vectors, upper=False)
    # `L` knows the products of the vectors to some digits only; a step of Newton's iteration doubles them.
    overlap = rows @ rows.T
    overlap.diagonal().sub_(1)
    return rows - overlap @ rows / 2


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
