"""What a model does on the held-out problems of a playground: how often it is right, and how often it shows its work.

    python benchmarks/playground_profile.py runs/playground
    python benchmarks/playground_profile.py runs/playground --model runs/quickstart

prints a Markdown table: pass@1, share of the samples with working, pass@1 among those, mean tokens. A sample that
starts with `#` is a guess. The last line is the mean over levels, and then the mean pass@1 if every sample were worked
out as accurately as those that were.
"""

import argparse
from collections import defaultdict
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from hf_delta.evaluation import evaluate, load_rows
from hf_delta.evaluation.loading import load_model_and_tokenizer
from hf_delta.playground import playground_reward


class Recorder:
    """A reward function that keeps, for every level, (right, worked out, tokens) of each sample."""

    def __init__(self) -> None:
        self.samples: dict[str, list[tuple[float, bool, int]]] = defaultdict(list)

    def __call__(
        self,
        completions: list[str],
        answer: list[str],
        level: list[str],
        completion_ids: list[list[int]],
        **kwargs: Any,
    ) -> list[float]:
        rewards = playground_reward(completions, answer)
        for name, reward, text, ids in zip(level, rewards, completions, completion_ids, strict=True):
            self.samples[name].append((reward, not text.startswith("#"), len(ids)))
        return rewards


def profile(model: Path, data: Path, samples: int, seed: int) -> dict[str, list[tuple[float, bool, int]]]:
    """Samples of every level, see `Recorder`."""
    network, tokenizer = load_model_and_tokenizer(model, device="cpu")
    recorder = Recorder()
    evaluate(network, tokenizer, load_rows(data), score=recorder, ks=(1,), samples=samples, seed=seed)
    return dict(sorted(recorder.samples.items()))


def table(levels: dict[str, list[tuple[float, bool, int]]]) -> str:
    """The Markdown table."""
    lines = ["| level | pass@1 | worked out | pass@1 of these | tokens |", "|---|---|---|---|---|"]
    rows = []
    for name, samples in levels.items():
        worked = [right for right, work, _ in samples if work]
        right, tokens = fmean(s[0] for s in samples), fmean(s[2] for s in samples)
        rows.append((right, len(worked) / len(samples), fmean(worked or [0.0]), tokens))
        lines.append("| {} | {:.2f} | {:.2f} | {:.2f} | {:.1f} |".format(name, *rows[-1]))
    lines.append("| mean | {:.3f} | {:.2f} | {:.3f} | {:.1f} |".format(*map(fmean, zip(*rows))))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("playground", type=Path, help="directory of a playground")
    parser.add_argument(
        "--model", type=Path, help="a run on it, or another model or adapter (default: its base model)"
    )
    parser.add_argument("--samples", type=int, default=8, help="per problem (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model = arguments.model or arguments.playground / "model"
    print(table(profile(model, arguments.playground / "eval.jsonl", arguments.samples, arguments.seed)))


if __name__ == "__main__":
    main()
