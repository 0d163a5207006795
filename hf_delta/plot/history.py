"""What a trainer logged, from its trainer_state.json."""

import json
import logging
import math
from pathlib import Path
from typing import Any

import numpy as np

from hf_delta.evaluation.rows import natural_key


logger = logging.getLogger(__name__)


class History:
    """The scalars a trainer logged, by key."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self._rows = rows

    def keys(self, prefix: str) -> list[str]:
        """Keys that begin with a prefix, `add2` before `add10`."""
        return sorted({key for row in self._rows for key in row if key.startswith(prefix)}, key=natural_key)

    def series(self, key: str) -> tuple[np.ndarray, np.ndarray]:
        """Steps and values of a key, both `(N,)`, without what is no finite number."""
        points = [
            (row["step"], row[key]) for row in self._rows if is_number(row.get("step")) and is_number(row.get(key))
        ]
        steps, values = np.array(points, dtype=float).reshape(-1, 2).T
        return steps, values

    def has(self, key: str) -> bool:
        """Whether there is anything to draw for a key."""
        return len(self.series(key)[0]) > 0


def newest_log(run_dir: Path) -> list[dict[str, Any]]:
    """The log of the furthest `trainer_state.json` in a directory and its checkpoints, empty if there is none."""
    newest: dict[str, Any] = {}
    for path in [run_dir / "trainer_state.json", *sorted(run_dir.glob("checkpoint-*/trainer_state.json"))]:
        if not path.is_file():
            continue
        try:
            state = json.loads(path.read_text(encoding="utf-8"))
            if not all(isinstance(row, dict) for row in state.get("log_history", [])):
                raise TypeError("a row of the log is no block of keys")
            if not newest or state["global_step"] > newest["global_step"]:
                newest = state
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            # A run that was killed while it saved leaves one, and older ones that can be read.
            logger.warning("Left out %s, which cannot be read (%r).", path, error)
    return newest.get("log_history", [])


def together(history: History, first: str, second: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Steps at which two keys were both logged, and their values."""
    a, b = (dict(zip(*history.series(key))) for key in (first, second))
    steps = np.array(sorted(a.keys() & b.keys()))
    return steps, np.array([a[step] for step in steps]), np.array([b[step] for step in steps])


def is_number(value: Any) -> bool:
    """Whether something is a finite number; neither True nor False is one."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number of hundreds of digits
        return False
