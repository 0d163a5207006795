"""From names to rows of an array: 64-bit digests in an open-addressing table, many at a time."""

import hashlib
from collections.abc import Sequence

import numpy as np

from hf_delta.errors import InputError


# At a third more than half full, steps of 1, 2, 3, ... look at 3.4 slots in the mean for a key that is not there.
MAX_LOAD = 2 / 3
# By a quarter and not by half: room that nothing uses yet counts in the bytes of a prompt as well.
GROWTH = 1.25
FIRST_ROWS = 1024
PIECE = 32_768


def digests(names: Sequence[str], what: str) -> np.ndarray:
    """The first 64 bits of the BLAKE2b hash of each name, `(P,)` int64, the same in every process and on every machine.

    Among a million names, two share a digest with probability 3e-8; what is kept about them would then be shared too.

    Raises:
        `InputError`: a name is neither a string nor a whole number, which counts as its decimal digits.
    """
    for position, name in enumerate(names):
        if not isinstance(name, (str, int)):
            raise InputError(
                f"Entry {position} of {what} is {name!r}: it must be a string or a whole number. Fill the column in the "
                "dataset, or drop the rows without a value."
            )
    # A lone surrogate is a string that UTF-8 alone cannot write.
    data = (str(name).encode("utf-8", "surrogatepass") for name in names)
    joined = b"".join(hashlib.blake2b(name, digest_size=8).digest() for name in data)
    return np.frombuffer(joined, dtype="<i8").astype(np.int64)


def with_room(array: np.ndarray, used: int, rows: int) -> np.ndarray:
    """An array whose first `used` rows are those of `array` and that has at least `rows`: itself while it is long enough."""
    if rows <= len(array):
        return array
    longer = np.zeros((max(rows, int(GROWTH * len(array))), *array.shape[1:]), dtype=array.dtype)
    longer[:used] = array[:used]
    return longer


class KeyTable:
    """Rows 0, 1, 2, ... of 64-bit keys in the order in which they were added.

    A slot holds the row of the key whose probing ended there, or -1. Besides the 8 bytes of a key, which are its id, a key
    costs 4 bytes a slot, at least `1 / MAX_LOAD` and at most `2 / MAX_LOAD` slots, hence 6 to 12 bytes.
    """

    def __init__(self):
        self._keys = np.zeros(FIRST_ROWS, dtype=np.int64)
        self._slots = np.full(2 * FIRST_ROWS, -1, dtype=np.int32)
        self._used = 0

    def __len__(self) -> int:
        return self._used

    @property
    def keys(self) -> np.ndarray:
        """`(len(self),)` int64."""
        return self._keys[: self._used]

    @property
    def nbytes(self) -> int:
        return self._keys.nbytes + self._slots.nbytes

    def find(self, keys: np.ndarray) -> np.ndarray:
        """Row of each key, `(P,)` int64, and -1 for a key that was never added."""
        mask = len(self._slots) - 1
        rows = self._slots.take(keys & mask).astype(np.int64)
        # Whose slot is another key's looks 1 slot further, then 2, 3, ..., until it meets itself or a free one.
        left = ((rows >= 0) & (self._keys.take(rows) != keys)).nonzero()[0]
        wanted, step, offset = keys.take(left), 0, 0
        while len(left):
            step += 1
            offset += step
            found = self._slots.take((wanted + offset) & mask)
            rows[left] = found
            further = ((found >= 0) & (self._keys.take(found) != wanted)).nonzero()[0]
            left, wanted = left.take(further), wanted.take(further)
        return rows

    def add(self, keys: np.ndarray, found: np.ndarray | None = None) -> np.ndarray:
        """Row of each key, `(P,)` int64, with new rows for those never added; `keys` must hold no key twice.

        Whoever just asked [`KeyTable.find`] can pass what it gave.
        """
        rows = self.find(keys) if found is None else found.copy()
        new = (rows < 0).nonzero()[0]
        if not len(new):
            return rows
        total = self._used + len(new)
        rows[new] = np.arange(self._used, total)
        self._keys = with_room(self._keys, self._used, total)
        self._keys[rows[new]] = keys[new]
        self._used = total
        if total > MAX_LOAD * len(self._slots):
            size = len(self._slots)
            while total > MAX_LOAD * size:
                size *= 2
            self._slots = np.full(size, -1, dtype=np.int32)
            # In pieces whose arrays stay in the processor's cache: three fifths of the time of all at once.
            for first in range(0, total, PIECE):
                self._place(np.arange(first, min(first + PIECE, total)))
        else:
            self._place(rows[new])
        return rows

    def _place(self, rows: np.ndarray) -> None:
        mask = len(self._slots) - 1
        slots = self._keys[rows] & mask
        step = 0
        while len(rows):
            step += 1
            there = self._slots.take(slots)
            self._slots[slots] = np.where(there < 0, rows, there)
            # A slot was taken before, or in this very round by another of these rows.
            lost = (self._slots.take(slots) != rows).nonzero()[0]
            rows, slots = rows.take(lost), (slots.take(lost) + step) & mask
