"""Adapters, token KL, steps of GRPO and rollouts on one GPU: a table, a picture and the raw figures, in ten minutes.

    python benchmarks/gpu.py --out docs/gpu

On a GPU: bfloat16 and a Qwen3 of 0.6 billion random parameters. `--device cpu` runs small sizes in float32 to show that all of it works; its
files have other names and say so in every table. Times are of CUDA events in interleaved rounds, as ratios to a named peer within each
round; peaks are the CUDA allocator's. A row that fails, or for which no time is left, is a row that says so.
"""

import argparse
import gc
import importlib.metadata
import json
import logging
import platform
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from gpu_grpo import grpo
from gpu_report import draw, markdown
from gpu_rows import FAILED, Budget, Comparison, Progress, Row, described, free, measure, with_ratios
from gpu_sections import adapters, rollout, token_kl
from gpu_setup import ON_CPU, ON_GPU, QUICK, Setup
from tqdm import tqdm


# What follows a section gets what it leaves over. Rollouts are last, because of vLLM, which takes memory and a while.
SECTIONS: dict[str, tuple[Callable[[Setup], list[Comparison]], float]] = {
    "adapters": (adapters, 2.0),
    "token_kl": (token_kl, 1.5),
    "grpo": (grpo, 3.0),
    "rollout": (rollout, 3.5),
}
PACKAGES = ("torch", "triton", "transformers", "trl", "peft", "accelerate", "vllm", "hf_delta")
NOT_A_GPU = "CPU RUN WITH SMALL SIZES: no figure here says anything about a GPU"


class Bar(Progress):
    """Rows and rounds on a bar, with what is left of the budget."""

    def __init__(self, steps: int, budget: Budget):
        self.bar, self.budget, self.planned = tqdm(total=steps, unit="row", smoothing=0.1), budget, 0

    def about(self, text: str) -> None:
        self.bar.set_description(text[:50])

    def done(self, steps: int = 1) -> None:
        self.bar.update(steps)
        self.bar.set_postfix_str(f"at most {max(self.budget.left(), 0) / 60:.1f} min left")

    def over(self, steps: int) -> None:
        """As if all `steps` that were planned for something had been taken."""
        self.planned += steps
        self.done(self.planned - self.bar.n)


def run(setup: Setup, names: list[str], rounds: int, budget: Budget) -> list[Row]:
    """Rows of all sections, in the order of `SECTIONS`."""
    sections, rows = {}, []
    for name in (name for name in SECTIONS if name in names):
        try:
            sections[name] = SECTIONS[name][0](setup)
        except Exception as error:
            rows.append(Row(name, "all of it", "all", "all"))
            rows[-1].end(FAILED, described(error))
    steps = sum(len(comparison.cases) for section in sections.values() for comparison in section) * (1 + rounds)
    bar = Bar(steps, budget)
    weights = {name: SECTIONS[name][1] for name in sections}
    while sections:
        name, *following = sections
        own = budget.share(weights[name], sum(weights[other] for other in following))
        comparisons = sections.pop(name)
        while comparisons:
            # Let go when it is done, with what its cases keep.
            comparison = comparisons.pop(0)
            rows += measure(comparison, setup.device, rounds, own, len(comparisons), bar)
            bar.over(len(comparison.cases) * (1 + rounds))
            del comparison
            free(setup.device)
    bar.bar.close()
    return rows


def machine(device: str) -> dict:
    """What ran it; `gpu` is None on a CPU."""
    versions = {name: _version(name) for name in PACKAGES}
    found = {"gpu": None, "warning": NOT_A_GPU, "python": platform.python_version(), "versions": versions}
    found["versions"]["cuda"] = torch.version.cuda
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        capability = f"{properties.major}.{properties.minor}"
        found["gpu"] = {"name": properties.name, "bytes": properties.total_memory, "capability": capability}
        found["warning"] = None
    return found


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def write(report: dict, folder: Path) -> None:
    """A run on a CPU never has the names of the files of a GPU, and cannot be written over them."""
    stem = "gpu" if report["gpu"] else "cpu_run_of_gpu_benchmark"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{stem}.json").write_text(json.dumps(report, indent=1) + "\n")
    (folder / f"{stem}.md").write_text(markdown(report))
    draw(report, folder / f"{stem}.png")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: small sizes, no GPU figures")
    parser.add_argument("--quick", action="store_true", help="tiny sizes and one round: does it run?")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS), help="sections to measure")
    parser.add_argument("--minutes", type=float, default=10.0, help="no row is started that would take longer")
    parser.add_argument("--rounds", type=int, default=7, help="at most; there and back is one round")
    parser.add_argument("--out", type=Path, help="folder for gpu.json, gpu.md and gpu.png")
    args = parser.parse_args(argv)
    if args.rounds < 1 or args.minutes <= 0:
        parser.error("--rounds and --minutes are 1 or more, and more than 0.")
    if args.device == "cuda":
        found = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if found != 1:
            advice = "--device cpu shows that it runs" if found == 0 else "choose one with CUDA_VISIBLE_DEVICES=0"
            parser.error(f"this takes one CUDA device, and there are {found}: {advice}.")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    # Before anything else, so that what models take to build counts; the rest is for a row that runs over and the report.
    budget = Budget(0.95 * 60 * args.minutes)
    transformers.logging.set_verbosity_error()
    logging.getLogger("hf_delta").setLevel(logging.ERROR)
    # What was imported stays; between rows only what they left is looked through.
    gc.freeze()
    if args.device == "cpu":
        torch.set_num_threads(1)
    scale = QUICK if args.quick else ON_GPU if args.device == "cuda" else ON_CPU
    rounds = 1 if args.quick else args.rounds
    with tempfile.TemporaryDirectory() as folder:
        setup = Setup(args.device, scale, Path(folder))
        rows = run(setup, args.only, rounds, budget)
    settings = {"rounds": rounds, "minutes": args.minutes, "quick": args.quick, "only": args.only, **setup.described()}
    report = machine(args.device) | {"settings": settings, "seconds": budget.spent(), "rows": with_ratios(rows)}
    if args.out is not None:
        write(report, args.out)
    print(markdown(report))


if __name__ == "__main__":
    main()
