"""Ratios of time from interleaved rounds, and bytes as the allocator and autograd see them."""

import gc
import json
import random
import statistics
import tempfile
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile


def nothing():
    pass


@dataclass
class Case:
    """Something to measure: `run`, `repeat` times in one sample; `before` and `after` are outside of the measurement.

    Args:
        seconds: what of the last run counts, for cases that know it better than a clock around `run`.
        cold: whether the first run is as good as any other.
        allocates: whether what it allocates is seen from here.
    """

    run: Callable[[], object]
    before: Callable[[], object] = nothing
    after: Callable[[], object] = nothing
    repeat: int = 1
    seconds: Callable[[], float] | None = None
    cold: bool = False
    allocates: bool = True


class CaseFailed(Exception):
    """A case raised an error, which is the cause of this one."""

    def __init__(self, name: str):
        super().__init__(name)
        self.name = name


def inside(case: Case, context: Callable[[], AbstractContextManager]) -> Case:
    """The case with a context around each of its samples, entered and left outside of the measurement."""
    stack = ExitStack()

    def before():
        stack.enter_context(context())
        case.before()

    def after():
        try:
            case.after()
        finally:
            stack.close()

    return replace(case, before=before, after=after)


@dataclass(frozen=True)
class Spread:
    median: float
    q25: float
    q75: float


def spread(values: list[float]) -> Spread:
    if len(values) == 1:
        return Spread(*values * 3)
    q25, median, q75 = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(median, q25, q75)


def ratio(seconds: dict[str, list[float]], name: str, peer: str) -> Spread:
    """Ratio of two cases, round by round: what slows a round down slows both down."""
    return spread([ours / theirs for ours, theirs in zip(seconds[name], seconds[peer])])


def interleaved(
    cases: dict[str, Case], rounds: int, device: str, passes: int = 1, seed: int = 0
) -> dict[str, list[float]]:
    """Seconds of every case in every round; a round goes `passes` times through all in a random order and back."""
    for case in cases.values():
        _sample(case, device)
    found = list(islice(rounds_of(cases, device, passes, seed), rounds))
    return {name: [seconds[name] for seconds in found] for name in cases}


def rounds_of(cases: dict[str, Case], device: str, passes: int = 1, seed: int = 0) -> Iterator[dict[str, float]]:
    """Seconds of every case, round after round without an end, of cases that ran before.

    Raises:
        `CaseFailed`: a case did; the others can go on in rounds of their own.
    """
    order, generator = list(cases), random.Random(seed)
    while True:
        totals = dict.fromkeys(order, 0.0)
        gc.collect()
        for _ in range(passes):
            generator.shuffle(order)
            for name in order + order[::-1]:
                try:
                    totals[name] += _sample(cases[name], device)
                except Exception as error:
                    raise CaseFailed(name) from error
        yield {name: totals[name] / (2 * passes * case.repeat) for name, case in cases.items()}


def _sample(case: Case, device: str) -> float:
    watch = Stopwatch(device)
    gc.disable()
    try:
        case.before()
        watch.start()
        for _ in range(case.repeat):
            case.run()
        seconds = watch.stop()
        return seconds if case.seconds is None else case.seconds()
    finally:
        gc.enable()
        case.after()


class Stopwatch:
    """Seconds from `start` to `stop`: CPU time of this process, or on CUDA until all work that was queued is done."""

    def __init__(self, device: str):
        self.on_cuda = device == "cuda"

    def start(self) -> None:
        if not self.on_cuda:
            self.began = time.process_time()
            return
        self.began, self.ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        self.began.record()

    def stop(self) -> float:
        if not self.on_cuda:
            return time.process_time() - self.began
        self.ended.record()
        torch.cuda.synchronize()
        return self.began.elapsed_time(self.ended) / 1e3


def peak_bytes(case: Case, device: str) -> int:
    """Most bytes allocated at any moment of one run beyond what was allocated before it.

    Compilation and autotuning, which a first run may have, are in a run before that one.
    """
    if not case.cold:
        _around(case, case.run)
    return _around(case, lambda: (_cuda_peak if device == "cuda" else _cpu_peak)(case.run))


def _around(case: Case, measure: Callable[[], object]):
    try:
        case.before()
        return measure()
    finally:
        case.after()


def _cuda_peak(run: Callable[[], object]) -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    start = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - start


def _cpu_peak(run: Callable[[], object]) -> int:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    return peak_of(profiler)


def peak_of(profiler: profile) -> int:
    """Most bytes allocated at any moment under a profiler that was told to `profile_memory`."""
    now = peak = 0
    for event in _memory_events(profiler):
        now += event["args"]["Bytes"]
        peak = max(peak, now)
    return peak


def _memory_events(profiler: profile) -> list[dict]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    return sorted((event for event in events if event["name"] == "[memory]"), key=lambda event: event["ts"])


class _Saved:
    """A tensor that autograd keeps; as an object of its own it can be referred to weakly."""

    def __init__(self, tensor: torch.Tensor):
        self.tensor = tensor


def saved_bytes(forward: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> int:
    """Bytes of the storages that one forward pass keeps for its backward pass, the input among them if it is kept.

    Weights and what a layer derived from them once is no activation: it is what two passes with different inputs share.
    """
    keeping = []
    storages = [_kept_storages(forward, x.clone().detach().requires_grad_(), keeping) for _ in range(3)]
    return sum(size for place, size in storages[2].items() if place not in storages[1])


def _kept_storages(forward, x, keeping):
    saved = weakref.WeakSet()

    def pack(tensor):
        box = _Saved(tensor)
        saved.add(box)
        return box

    with saved_tensors_hooks(pack, lambda box: box.tensor):
        # Graph and input stay alive, so that no address is used twice.
        keeping.append((x, forward(x)))
    return {box.tensor.untyped_storage().data_ptr(): box.tensor.untyped_storage().nbytes() for box in saved}
