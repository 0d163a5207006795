"""Ratios of time from interleaved rounds, and bytes as the allocator and autograd see them."""

import gc
import json
import random
import statistics
import tempfile
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile


def nothing():
    pass


@dataclass
class Case:
    """Something to measure: `run`, `repeat` times in one sample; `before` and `after` are outside of the measurement."""

    run: Callable[[], object]
    before: Callable[[], object] = nothing
    after: Callable[[], object] = nothing
    repeat: int = 1


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
    order, generator = list(cases), random.Random(seed)
    for name in order:
        _sample(cases[name], device)
    found = {name: [] for name in cases}
    for _ in range(rounds):
        totals = dict.fromkeys(order, 0.0)
        gc.collect()
        for _ in range(passes):
            generator.shuffle(order)
            for name in order + order[::-1]:
                totals[name] += _sample(cases[name], device)
        for name, total in totals.items():
            found[name].append(total / (2 * passes * cases[name].repeat))
    return found


def _sample(case: Case, device: str) -> float:
    case.before()
    gc.disable()
    try:
        return (_cuda_seconds if device == "cuda" else _cpu_seconds)(case)
    finally:
        gc.enable()
        case.after()


def _cpu_seconds(case: Case) -> float:
    start = time.process_time()
    for _ in range(case.repeat):
        case.run()
    return time.process_time() - start


def _cuda_seconds(case: Case) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for _ in range(case.repeat):
        case.run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3


def peak_bytes(case: Case, device: str) -> int:
    """Most bytes allocated at any moment of one run beyond what was allocated before it."""
    case.before()
    case.run()
    case.before()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        start = torch.cuda.memory_allocated()
        case.run()
        return torch.cuda.max_memory_allocated() - start
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        case.run()
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
