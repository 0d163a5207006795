"""Time and bytes of the adapters beside PEFT's, on one linear layer and in a small Llama.

    python benchmarks/adapters.py --out docs/adapters

Times are CPU time of one thread (or CUDA events with `--device cuda`), as ratios to a named peer within each of several
interleaved rounds: median and quartiles. Bytes do not vary: the most that the allocator had handed out at any moment of a
forward and backward pass, and what the forward pass keeps for the backward pass. All of it is float32.
"""

import argparse
import importlib.util
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import peft
import torch
from adapters_cases import FULL, GROUPS, QUICK, Sizes
from adapters_report import draw, markdown
from timing import Spread, interleaved, peak_bytes, ratio, saved_bytes, spread
from tqdm import tqdm


@dataclass(frozen=True)
class Row:
    """A line of the table: a ratio of `ours` to `peer`, and the most that it should be; None where it is for orientation.

    A target that is text is the name of another case: its own ratio to the peer in the same rounds.
    """

    what: str
    group: str
    ours: str
    peer: str
    target: float | str | None
    kind: str = "time"


ROWS = [
    Row("train step", "dora", "DoRA, norm in the step", "PEFT LoRA", 1.15),
    Row("train step", "dora", "DoRA, norm cached", "PEFT LoRA", 1.05),
    Row("train step", "dora", "PEFT DoRA", "PEFT LoRA", None),
    Row("train step, peak", "dora", "DoRA, norm in the step", "PEFT LoRA", 1.10, "peak"),
    Row("train step, peak", "dora", "PEFT DoRA", "PEFT LoRA", None, "peak"),
    Row("decode, one linear", "decode", "DoRA", "base linear", 1.05),
    Row("decode, one linear", "decode", "PEFT LoRA", "base linear", None),
    Row("decode, one linear", "decode", "PEFT DoRA", "base linear", None),
    Row("train step", "bone", "Bone", "PEFT MiSS", 1.00),
    Row("train step, peak", "bone", "Bone", "PEFT MiSS", 0.75, "peak"),
    Row("train step", "bat", "bat_row", "PEFT LoRA", 1.20),
    Row("train step", "bat", "bat_col", "PEFT bat", 0.80),
    Row("train step", "bat", "trained weight", "PEFT bat", None),
    Row("train step, peak", "bat", "bat_col", "PEFT bat", 0.30, "peak"),
    Row("train step", "pmss", "PMSS", "PEFT LoRA", 1.00),
    Row("train step, saved activations", "pmss", "PMSS", "T×k", 1.00, "saved"),
    Row("train step, saved activations", "pmss", "PEFT LoRA", "T×k", None, "saved"),
    Row("128 columns of 2048²", "selection", "PMSS", "geqp3", 0.05),
    Row("128 columns of 4096²", "large_selection", "PMSS", "", None, "seconds"),
    Row("train step", "edora", "EDoRA", "PEFT LoRA", 1.10),
    *(
        Row("4-layer Llama, decode", "model", name, "merged", target)
        for name, target in {
            "PEFT LoRA": None,
            "PEFT DoRA": None,
            **dict.fromkeys(
                ["DoRA", "Bone", "row", "mini", "bat_row", "PMSS", "EDoRA", "bat_col, merged"], "PEFT LoRA"
            ),
        }.items()
    ),
]


@dataclass(frozen=True)
class Measured:
    """A row with its numbers: a ratio, or seconds for the kind of that name."""

    row: Row
    value: Spread
    target: float | None = None
    note: str = ""

    @property
    def met(self) -> bool | None:
        return None if self.target is None else self.value.median <= self.target


def measure(name: str, sizes: Sizes, rounds: int, device: str) -> list[Measured]:
    """All rows of one group; its cases are measured in the same rounds."""
    group = GROUPS[name](sizes, device)
    peaks = {case: peak_bytes(group.cases[case], device) for case in group.cases if group.peaks}
    saved = {case: saved_bytes(*forward) for case, forward in group.forwards.items()} | group.bytes
    seconds = interleaved(group.cases, rounds, device, group.passes)
    found = {"time": seconds, "seconds": seconds, "peak": peaks, "saved": saved}
    return [_measured(row, found, group.note) for row in ROWS if row.group == name]


def _measured(row: Row, found: dict[str, dict], note: str) -> Measured:
    values = found[row.kind]
    if row.kind == "seconds":
        return Measured(row, spread(values[row.ours]))
    if row.kind == "time":
        target = ratio(values, row.target, row.peer).median if isinstance(row.target, str) else row.target
        return Measured(row, ratio(values, row.ours, row.peer), target, note)
    ours, theirs = values[row.ours], values[row.peer]
    return Measured(row, spread([ours / theirs]), row.target, f"{ours / 2**20:.2f} / {theirs / 2**20:.2f} MiB")


def as_json(measured: list[Measured]) -> list[dict]:
    return [{**asdict(found.row), **asdict(found.value), "limit": found.target, "met": found.met, "note": found.note}
            for found in measured]  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--only", nargs="+", choices=GROUPS, default=list(GROUPS), help="groups of rows to measure")
    parser.add_argument(
        "--quick", action="store_true", help="tiny sizes and one round: does it run? no numbers to quote"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--out", type=Path, help="folder for speed.json and speed.png")
    args = parser.parse_args(argv)
    if "selection" in args.only and importlib.util.find_spec("scipy") is None:
        parser.error("the peer of `selection` is scipy's: pip install scipy, or name the other groups with --only.")
    torch.set_num_threads(1)
    sizes, rounds = (QUICK, 1) if args.quick else (FULL, args.rounds)
    measured = [row for name in tqdm(args.only) for row in measure(name, sizes, rounds, args.device)]
    print(f"torch {torch.__version__}, peft {peft.__version__}, {args.device}, {rounds} rounds, float32\n")
    print(markdown(measured))
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        draw(measured, args.out / "speed.png")
        (args.out / "speed.json").write_text(json.dumps(as_json(measured), indent=1))


if __name__ == "__main__":
    main()
