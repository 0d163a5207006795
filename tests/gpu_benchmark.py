"""The modules of the benchmark for a GPU, and a clock that a test moves."""

import gc
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace


BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
MODULES = ("gpu", "gpu_grpo", "gpu_report", "gpu_rows", "gpu_sections", "gpu_setup", "timing")


@contextmanager
def loaded(monkeypatch):
    """The modules by name."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    # Another test may have loaded one of them once more: all of these belong together.
    for name in MODULES:
        monkeypatch.delitem(sys.modules, name, raising=False)
    modules = SimpleNamespace(**{name: __import__(name) for name in MODULES})
    # As in a run: what the other tests left is not looked through before every round.
    gc.freeze()
    try:
        yield modules
    finally:
        gc.unfreeze()


class Clock:
    """Time that passes only where a test says so."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    def takes(self, seconds):
        def run():
            self.now += seconds

        return run


def comparison(bench, cases, **options):
    return bench.gpu_rows.Comparison("adapters", "what", next(iter(cases)), cases, **options)
