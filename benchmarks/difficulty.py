"""Bytes and milliseconds of the pass rates of many prompts.

    python benchmarks/difficulty.py --prompts 1000000

Prompts arrive in batches of 1,024 until all were seen. What counts as a prompt's id is the 8 bytes of its digest; all else
that the arrays hold, with the slots of the table and the room kept ready for more prompts, is what it costs beside its id.
"""

import argparse
import statistics
import tempfile
import time
import tracemalloc
from pathlib import Path

import torch

from hf_delta.checkpoint import load_state, save_state
from hf_delta.rl.difficulty import Difficulty


ID_BYTES = 8
BATCH = 1024
ROLLOUTS = 8
WAYS = {
    "decay": {},
    "decay, pools": {"prior_column": "level"},
    "window of 8": {"window": 8},
}


def batch(numbers: list[int], difficulty: Difficulty) -> dict[str, list[str] | None]:
    columns = [str(number % 10) for number in numbers]
    return {"prompt_ids": [f"prompt-{n}" for n in numbers], "columns": columns if difficulty.prior_column else None}


def step(difficulty: Difficulty, numbers: list[int]) -> float:
    """Milliseconds of processor time of what a training step asks: estimate, groups, update; all of it is one thread."""
    given = batch(numbers, difficulty)
    correct, rollouts = torch.randint(ROLLOUTS + 1, (len(numbers),)), torch.full((len(numbers),), ROLLOUTS)
    start = time.process_time()
    difficulty.estimate(**given)
    difficulty.groups(**given)
    difficulty.update(correct=correct, rollouts=rollouts, **given)
    return 1e3 * (time.process_time() - start)


def filled(settings: dict, prompts: int) -> tuple[Difficulty, list[float], float]:
    """All prompts seen once, milliseconds of each step, and the most bytes a prompt at any time from a tenth of them on."""
    difficulty, times, most = Difficulty(**settings), [], 0.0
    for first in range(0, prompts, BATCH):
        times.append(step(difficulty, list(range(first, min(first + BATCH, prompts)))))
        if difficulty.num_prompts >= prompts / 10:
            most = max(most, difficulty.nbytes / difficulty.num_prompts - ID_BYTES)
    return difficulty, times, most


def traced_bytes(settings: dict, prompts: int) -> float:
    """What Python and numpy have allocated and not freed, per prompt beside its id."""
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        difficulty = filled(settings, prompts)[0]
        return (tracemalloc.get_traced_memory()[0] - before) / difficulty.num_prompts - ID_BYTES
    finally:
        tracemalloc.stop()


def checkpoint(difficulty: Difficulty, settings: dict) -> tuple[float, float, float]:
    """MB on disk, seconds to write and seconds to read back into a new object."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "state.safetensors"
        start = time.perf_counter()
        save_state(path, difficulty.state_dict())
        written = time.perf_counter()
        Difficulty(**settings).load_state_dict(load_state(path))
        return path.stat().st_size / 1e6, written - start, time.perf_counter() - written


def measure(settings: dict, prompts: int, rounds: int) -> dict[str, float]:
    """All numbers of one way to forget."""
    torch.manual_seed(0)
    difficulty, growing, most = filled(settings, prompts)
    seen = [step(difficulty, torch.randint(prompts, (BATCH,)).tolist()) for _ in range(rounds)]
    size, write, read = checkpoint(difficulty, settings)
    return {
        "bytes": traced_bytes(settings, prompts),
        "most bytes": most,
        "CPU ms": statistics.median(seen),
        "CPU ms, worst": max(seen),
        "CPU ms while growing, worst": max(growing),
        "MB": size,
        "s to write": write,
        "s to read": read,
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=200, help="steps timed once all prompts were seen")
    arguments = parser.parse_args(argv)
    for i, (name, settings) in enumerate(WAYS.items()):
        found = measure(settings, arguments.prompts, arguments.rounds)
        if i == 0:
            print(f"{arguments.prompts:,} prompts, a step of {BATCH:,}: estimate, groups and update\n")
            print("| | " + " | ".join(found) + " |\n|---|" + "---:|" * len(found))
        print(f"| {name} | " + " | ".join(f"{value:.1f}" for value in found.values()) + " |", flush=True)


if __name__ == "__main__":
    main()
