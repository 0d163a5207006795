"""Right and wrong rollouts by key, and how they are forgotten: arrays of all keys, read and changed many at a time."""

from dataclasses import dataclass

import numpy as np

from hf_delta.ids import KeyTable, with_room


@dataclass(frozen=True)
class Decay:
    """At each visit, what was there counts `rate` times as much: `c <- rate c + new`. Kept in 16 bytes."""

    rate: float

    def empty(self, rows: int = 0) -> np.ndarray:
        return np.zeros((rows, 2), dtype=np.float64)

    def total(self, kept: np.ndarray) -> np.ndarray:
        return kept

    def visited(self, kept: np.ndarray, new: np.ndarray) -> np.ndarray:
        return self.rate * kept + new


@dataclass(frozen=True)
class Window:
    """The last `visits` visits count in full, those before not at all. Kept newest first, in 4 bytes a visit for int16."""

    visits: int
    dtype: type = np.int16

    @property
    def limit(self) -> int:
        """Rollouts of one visit that can be kept."""
        return int(np.iinfo(self.dtype).max)

    def empty(self, rows: int = 0) -> np.ndarray:
        return np.zeros((rows, 2, self.visits), dtype=self.dtype)

    def total(self, kept: np.ndarray) -> np.ndarray:
        return kept.sum(axis=2, dtype=np.float64)

    def visited(self, kept: np.ndarray, new: np.ndarray) -> np.ndarray:
        return np.concatenate([new[:, :, None].astype(self.dtype), kept[:, :, :-1]], axis=2)


class Counts:
    """Right and wrong rollouts of every key seen, and one small number to go with it: the label, -1 until it is set."""

    def __init__(self, forgetting: Decay | Window):
        self.forgetting = forgetting
        self._table = KeyTable()
        # There is always room for one more key. So the last row is zero, and what -1 finds is what a key never seen has.
        self._kept = forgetting.empty(1)
        # One more than the label, so that room held ready is -1.
        self._labels = np.zeros(1, dtype=np.int8)

    def __len__(self) -> int:
        return len(self._table)

    @property
    def nbytes(self) -> int:
        return self._table.nbytes + self._kept.nbytes + self._labels.nbytes

    def find(self, keys: np.ndarray) -> np.ndarray:
        """Row of each key, `(P,)` int64, -1 for one never seen."""
        return self._table.find(keys)

    def read(self, rows: np.ndarray) -> np.ndarray:
        """Right and wrong rollouts with forgetting, `(P, 2)` float64; zero in row -1."""
        return self.forgetting.total(self._kept.take(rows, 0))

    def add(self, keys: np.ndarray, new: np.ndarray, found: np.ndarray) -> np.ndarray:
        """One visit of each key, which brings `new` (`(P, 2)` int64: right, wrong); no key twice. Returns the rows.

        `found` is what [`Counts.find`] gave for the keys.
        """
        before = len(self._table)
        rows = self._table.add(keys, found)
        self._kept = with_room(self._kept, before, len(self._table) + 1)
        self._labels = with_room(self._labels, before, len(self._table) + 1)
        self._kept[rows] = self.forgetting.visited(self._kept.take(rows, 0), new)
        return rows

    def labels(self, rows: np.ndarray) -> np.ndarray:
        """Label of each row, `(P,)` int64; -1 in row -1."""
        return self._labels.take(rows).astype(np.int64) - 1

    def set_labels(self, rows: np.ndarray, labels: np.ndarray) -> None:
        self._labels[rows] = labels + 1

    def export(self) -> dict[str, np.ndarray]:
        """`keys`, ascending, and `counts` and `labels` of each."""
        order = np.argsort(self._table.keys)
        return {
            "keys": self._table.keys[order],
            "counts": self._kept[order],
            "labels": self._labels[order] - np.int8(1),
        }

    @classmethod
    def restored(cls, forgetting: Decay | Window, keys: np.ndarray, kept: np.ndarray, labels: np.ndarray) -> "Counts":
        """Counts with what [`Counts.export`] gave."""
        counts = cls(forgetting)
        counts._table.add(keys)
        counts._kept = np.concatenate([kept, forgetting.empty(1)])
        counts._labels = np.append(labels + np.int8(1), np.int8(0))
        return counts
