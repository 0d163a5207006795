"""Rollout budgets on prompts whose pass rates are known to the simulation: variance, signal and exploration.

    python benchmarks/gdro_sim.py --seeds 10 --batches 320 --out docs/rl

1,024 prompts in ten bins of pass rates from 0.02 (half of the prompts) to 0.9 are visited epoch by epoch, 64 to a batch, with 4
rollouts each in the mean and 2 to 12 for one prompt. Every allocation sees the same batches and spends the same number of
rollouts in each of them, which is asserted. Reported for each, from the true pass rates `p` and the rollouts `n` it gave:

    variance      sum_i p_i (1 - p_i) / n_i over all visits, relative to that of the uniform allocation
    no signal     share of visits whose rollouts are all right or all wrong, mean of p^n + (1 - p)^n, and minus uniform's
    hard          rollouts per visit of prompts of the hardest bin, and the share of those prompts ever solved

in four worlds: `known`, where allocations are told `p`; `learnt`, where they have what `Difficulty` makes of the rollouts of
their own run, with its defaults but for the edges; `pooled`, learnt with a `prior_column` that tells the bin; and `drifting`,
learnt while the log odds of every prompt rise by a normal number, 2 ± 1, over the run. A last table has other decays.
"""

import argparse
import json
from pathlib import Path

import gdro_sim_world as sim
import torch
from adapter_quality_report import interval
from tqdm import tqdm

from hf_delta.rl.allocation import RolloutGDRO


def gdro(**settings):
    return RolloutGDRO(n_min=sim.N_MIN, n_max=sim.N_MAX, **settings)


METHODS = {
    "uniform": lambda seed: sim.Uniform(),
    "variance": lambda seed: gdro(exploration=0.0),
    "variance, floor 0.5": lambda seed: gdro(exploration=0.5),
    "variance, floor 1": lambda seed: gdro(exploration=1.0),
    "exp3": lambda seed: gdro(controller="exp3", seed=seed),
    "variance by position": sim.ByPosition,
}
WORLDS = {
    "known": (False, sim.Known),
    "pooled": (False, lambda world: sim.Learnt(world, pooled=True)),
    "learnt": (False, sim.Learnt),
    "drifting": (True, sim.Learnt),
}
DECAYS = (0.5, 0.7, 0.9, 1.0)
COLOURS = dict(zip(METHODS, ("#7F7F7F", "#0072B2", "#56B4E9", "#009E73", "#E69F00", "#D55E00")))


def run_seed(seed, batches):
    """What is reported of every world and allocation, and its course in quarters of an epoch."""
    result = {}
    for world_name, (drifting, knowledge) in WORLDS.items():
        world = sim.World(seed, batches, drifting)
        runs = {}
        for name, build in METHODS.items():
            # Nothing is unsolved where pass rates are known, and a floor for what is unsolved does nothing.
            if world_name != "known" or "floor" not in name:
                runs[name] = sim.simulate(world, knowledge(world), build(seed), seed)
        result[world_name] = {name: summary(run, runs["uniform"]) for name, run in runs.items()}
    result["decays"] = {world: by_decay(seed, batches, world == "drifting") for world in ("learnt", "drifting")}
    return result


def by_decay(seed, batches, drifting):
    """Variance against uniform of `variance` with its default floor, by the decay of the posterior."""
    world = sim.World(seed, batches, drifting)
    uniform = sum(sim.simulate(world, sim.Known(world), sim.Uniform(), seed).proxy)
    runs = {decay: sim.simulate(world, sim.Learnt(world, decay=decay), gdro(), seed) for decay in DECAYS}
    return {str(decay): sum(run.proxy) / uniform - 1 for decay, run in runs.items()}


def summary(run, uniform):
    window = min(16, len(run.proxy))
    ours, theirs = (torch.tensor(r.proxy).unfold(0, window, window).sum(1) for r in (run, uniform))
    by_bin = run.rollouts_by_bin / run.visits_by_bin.clamp(min=1)
    return {
        "variance": sum(run.proxy) / sum(uniform.proxy) - 1,
        "no_signal": sum(run.zero_signal) / len(run.zero_signal),
        "no_signal_against_uniform": (sum(run.zero_signal) - sum(uniform.zero_signal)) / len(run.zero_signal),
        "hard_rollouts": by_bin[0].item(),
        "hard_solved": run.solved_hard,
        "hard_solved_against_uniform": run.solved_hard - uniform.solved_hard,
        "rollouts_by_bin": by_bin.tolist(),
        "variance_by_window": (ours / theirs - 1).tolist(),
    }


def values(runs, world, method, key):
    return [run[world][method][key] for run in runs]


def markdown(runs):
    """One table a world and one of decays: means over the seeds and halves of their 95 % intervals."""
    parts = []
    for world in WORLDS:
        lines = [
            f"{world}:",
            "",
            "| | variance against uniform | no signal | against uniform | rollouts of the hardest bin | of it ever solved |",
            "|---|---|---|---|---|---|",
        ]
        for method in runs[0][world]:
            cells = [
                spread(values(runs, world, method, "variance"), "+.1%"),
                spread(values(runs, world, method, "no_signal"), ".1%"),
                spread(values(runs, world, method, "no_signal_against_uniform"), "+.1%"),
                spread(values(runs, world, method, "hard_rollouts"), ".2f"),
                spread(values(runs, world, method, "hard_solved"), ".1%"),
            ]
            lines.append(f"| {method} | " + " | ".join(cells) + " |")
        parts.append("\n".join(lines))
    lines = ["variance against uniform, floor 0.5, by decay:", "", "| | " + " | ".join(map(str, DECAYS)) + " |"]
    lines.append("|---" * (len(DECAYS) + 1) + "|")
    for world in runs[0]["decays"]:
        cells = [spread(values(runs, "decays", world, str(decay)), "+.1%") for decay in DECAYS]
        lines.append(f"| {world} | " + " | ".join(cells) + " |")
    return "\n\n".join([*parts, "\n".join(lines)])


def spread(numbers, form):
    mean, half = interval(numbers)
    return f"{mean:{form}}" if half is None else f"{mean:{form}} ± {half:{form.removeprefix('+')}}"


def draw(runs, path):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(11.5, 8.2), layout="constrained")
    _draw_rollouts(axes[0, 0], runs)
    _draw_price(axes[0, 1], runs)
    _draw_course(axes[1, 0], runs, "learnt")
    _draw_course(axes[1, 1], runs, "drifting")
    for place in axes.flat:
        place.grid(alpha=0.25)
        place.spines[["top", "right"]].set_visible(False)
    handles, labels = axes[1, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    figure.savefig(path, dpi=130)


def _draw_rollouts(axes, runs):
    for method in runs[0]["known"]:
        if method != "variance by position":
            mean = torch.tensor(values(runs, "known", method, "rollouts_by_bin")).mean(0)
            axes.plot(sim.BINS, mean, "o-", color=COLOURS[method], markersize=4)
    root = (sim.BINS * (1 - sim.BINS)).sqrt()
    axes.plot(sim.BINS, sim.MEAN * root / (sim.SHARES @ root), "k:", label="4 √v / E √v")
    axes.set(
        title="Rollouts of a prompt, pass rates known", xlabel="pass rate", ylabel="mean rollouts", ylim=(0, None)
    )
    axes.legend(loc="lower right", frameon=False)


def _draw_price(axes, runs):
    for world, marker in (("pooled", "s"), ("learnt", "o"), ("drifting", "^")):
        axes.plot([], [], marker, color="black", label=world)
        # Hollow where the floor is 0, because one of 0.5 may change nothing.
        for method, filled in (("variance", False), ("variance, floor 0.5", True), ("variance, floor 1", True)):
            solved, solved_half = interval(values(runs, world, method, "hard_solved_against_uniform"))
            variance, variance_half = interval(values(runs, world, method, "variance"))
            place = [100 * v if v is not None else None for v in (solved, variance, variance_half, solved_half)]
            look = {"color": COLOURS[method], "markersize": 6 if filled else 11}
            axes.errorbar(*place, fmt=marker, fillstyle="full" if filled else "none", **look)
    axes.plot(0, 0, "*", color=COLOURS["uniform"], markersize=12)
    axes.set(
        title="The price of a floor for unsolved prompts",
        xlabel="hardest bin: prompts ever solved, against uniform, percentage points",
        ylabel="variance against uniform, %",
    )
    axes.legend(frameon=False)


def _draw_course(axes, runs, world):
    for method in METHODS:
        course = 100 * torch.tensor(values(runs, world, method, "variance_by_window"))
        epochs = torch.arange(course.shape[1]) + 1
        width = 4 if method == "variance" else 1.5
        axes.plot(epochs, course.mean(0), color=COLOURS[method], linewidth=width, label=method)
        axes.fill_between(epochs, course.amin(0), course.amax(0), color=COLOURS[method], alpha=0.12, linewidth=0)
    axes.locator_params(axis="x", integer=True)
    axes.set(title=f"Pass rates {world} (bands: all seeds)", xlabel="epoch", ylabel="variance against uniform, %")


def rounded(content):
    """The same content with five decimals, which is more than the seeds agree on."""
    if isinstance(content, dict):
        return {key: rounded(value) for key, value in content.items()}
    if isinstance(content, list):
        return [rounded(value) for value in content]
    return round(content, 5) if isinstance(content, float) else content


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=10, help="How many, at most 10.")
    parser.add_argument("--batches", type=int, default=320, help="Batches of 64 prompts; 16 are an epoch.")
    parser.add_argument("--out", type=Path, default=Path("docs/rl"))
    args = parser.parse_args(argv)
    runs = [run_seed(seed, args.batches) for seed in tqdm(range(args.seeds), desc="seeds")]
    print(markdown(runs))
    args.out.mkdir(parents=True, exist_ok=True)
    draw(runs, args.out / "gdro_sim.png")
    (args.out / "gdro_sim.json").write_text(json.dumps({"batches": args.batches, "seeds": rounded(runs)}) + "\n")


if __name__ == "__main__":
    main()
