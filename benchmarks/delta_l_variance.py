"""Noise and scale of one policy-gradient update under six ways of adding up sequences, measured and in closed form.

    python benchmarks/delta_l_variance.py --seeds 0 1 2 --out docs/rl

For each seed: a playground, 8 rollouts of each of 256 training prompts from its base model, and the exact gradient
`g_i = A_i * grad sum_t log p(o_it)` of every sequence. A batch is 8 prompts (64 sequences) drawn without replacement, an
update is `sum_i c_i g_i` with the coefficients of the method, and over many batches

    CV = sqrt(E |u - E u|^2) / |E u|          scale = |E u| / |E u of Dr.GRPO|.

All of it follows from the Gram matrix of the gradients, so the resampling is exact linear algebra and no training. The
closed form is the paper's: E g_i = mu for all lengths and Var g_i = V L_i with V >> mu^2, with the lengths that were sampled.
"""

import argparse
import json
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_delta.playground import build_playground, playground_reward
from hf_delta.rl.weights import delta_l_weights


PROMPTS, GENERATIONS, BATCH_PROMPTS, BATCHES, MAX_LENGTH = 256, 8, 8, 4000, 54

# 97.5 % quantiles for 1 to 9 degrees of freedom, for intervals over 2 to 10 seeds.
STUDENT_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


def grpo(lengths):
    return 1 / (lengths * len(lengths))


def dapo(lengths):
    return torch.full_like(lengths, 1 / lengths.sum().item())


def dr_grpo(lengths):
    return torch.full_like(lengths, 1 / (len(lengths) * MAX_LENGTH))


def delta_l(alpha):
    return lambda lengths: delta_l_weights(lengths.long(), alpha).to(lengths) / (len(lengths) * MAX_LENGTH)


METHODS = {
    "Dr.GRPO": dr_grpo,
    "GRPO": grpo,
    "DAPO": dapo,
    "ΔL α = 1": delta_l(1.0),
    "ΔL α = 0.75": delta_l(0.75),
    "ΔL α = 0.5": delta_l(0.5),
}


def sample_rollouts(model, tokenizer, rows, seed):
    """Completions `(N,)` as token ids, and rewards `(N,)`, prompt by prompt."""
    torch.manual_seed(seed)
    completions, rewards = [], []
    for start in tqdm(range(0, len(rows), 32), desc="rollouts", leave=False):
        part = [row for row in rows[start : start + 32] for _ in range(GENERATIONS)]
        prompt = tokenizer([row["prompt"] for row in part], return_tensors="pt", padding=True)
        ids = model.generate(**prompt, do_sample=True, top_k=0, max_new_tokens=MAX_LENGTH)[
            :, prompt["input_ids"].shape[1] :
        ]
        for row, tokens in zip(part, ids.tolist()):
            end = tokens.index(tokenizer.eos_token_id) + 1 if tokenizer.eos_token_id in tokens else len(tokens)
            completions.append(tokens[:end])
            text = tokenizer.decode(tokens[:end], skip_special_tokens=True)
            rewards += playground_reward(completions=[text], answer=[row["answer"]])
    return completions, torch.tensor(rewards)


def sequence_gradients(model, tokenizer, rows, completions, rewards):
    """`A_i grad sum_t log p(o_it)` for every sequence, `(N, D)`, with TRL's group advantages."""
    grouped = rewards.view(-1, GENERATIONS)
    advantages = ((grouped - grouped.mean(1, keepdim=True)) / (grouped.std(1, keepdim=True) + 1e-4)).view(-1)
    parameters = list(model.parameters())
    gradients = torch.zeros(len(completions), sum(p.numel() for p in parameters))
    for i, completion in enumerate(tqdm(completions, desc="gradients", leave=False)):
        if advantages[i] == 0:
            continue
        prompt = tokenizer(rows[i // GENERATIONS]["prompt"])["input_ids"]
        logits = model(input_ids=torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
        logps = logits.log_softmax(-1).gather(1, torch.tensor(completion)[:, None])
        found = torch.autograd.grad(advantages[i] * logps.sum(), parameters)
        gradients[i] = torch.cat([g.flatten() for g in found])
    return gradients


def measured(gradients, lengths, seed):
    """CV and scale of each method over random batches of whole groups."""
    gram = (gradients @ gradients.T).double()
    generator = torch.Generator().manual_seed(seed)
    groups = torch.stack([torch.randperm(PROMPTS, generator=generator)[:BATCH_PROMPTS] for _ in range(BATCHES)])
    rows = (groups[:, :, None] * GENERATIONS + torch.arange(GENERATIONS)).flatten(1)
    result = {}
    for name, coefficients in METHODS.items():
        weights = torch.stack([coefficients(lengths[r].double()) for r in rows])
        second = torch.stack([w @ gram[r][:, r] @ w for w, r in zip(weights, rows)]).mean()
        mean = torch.zeros(len(lengths), dtype=torch.float64)
        mean.index_add_(0, rows.flatten(), weights.flatten() / BATCHES)
        square_of_mean = mean @ gram @ mean
        result[name] = {
            "cv": ((second - square_of_mean) / square_of_mean).sqrt().item(),
            "norm": square_of_mean.sqrt().item(),
        }
    return _relative(result), rows


def closed_form(lengths, rows):
    """The same under `E g_i = mu`, `Var g_i = V L_i`, up to the common factor `sqrt(V) / mu`."""
    result = {}
    for name, coefficients in METHODS.items():
        weights = torch.stack([coefficients(lengths[r].double()) for r in rows])
        variance = (weights**2 * lengths[rows]).sum(1).mean()
        total = weights.sum(1).mean()
        result[name] = {"cv": (variance.sqrt() / total).item(), "norm": total.item()}
    return _relative(result)


def _relative(result):
    base = result["Dr.GRPO"]
    return {
        name: {**row, "relative_cv": row["cv"] / base["cv"], "scale": row["norm"] / base["norm"]}
        for name, row in result.items()
    }


def run_seed(seed, playgrounds):
    folder = build_playground(playgrounds / f"playground-{seed}", seed=seed)
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    every = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    order = torch.randperm(len(every), generator=torch.Generator().manual_seed(seed))[:PROMPTS]
    rows = [every[i] for i in order]
    completions, rewards = sample_rollouts(model, tokenizer, rows, seed)
    gradients = sequence_gradients(model, tokenizer, rows, completions, rewards)
    lengths = torch.tensor([len(c) for c in completions], dtype=torch.float64)
    found, batches = measured(gradients, lengths, seed)
    return {
        "seed": seed,
        "reward": rewards.mean().item(),
        "length": {"min": lengths.min().item(), "mean": lengths.mean().item(), "max": lengths.max().item()},
        "measured": found,
        "closed_form": closed_form(lengths, batches),
        "square_by_length": _square_by_length(gradients, lengths),
    }


def _square_by_length(gradients, lengths):
    squares = gradients.double().square().sum(1)
    used = squares > 0
    return [
        {"length": length.item(), "mean_square": squares[used & (lengths == length)].mean().item(),
         "n": int((used & (lengths == length)).sum())}
        for length in lengths[used].unique()
    ]  # fmt: skip


def markdown(runs):
    """One row a method: mean over the seeds and half of its 95 % interval."""
    lines = [
        "| | CV, measured | relative to Dr.GRPO | scale, measured | relative CV, closed form | scale, closed form |",
        "|---|---|---|---|---|---|",
    ]
    for name in METHODS:
        cells = [
            spread([run["measured"][name]["cv"] for run in runs]),
            spread([run["measured"][name]["relative_cv"] for run in runs]),
            spread([run["measured"][name]["scale"] for run in runs]),
            spread([run["closed_form"][name]["relative_cv"] for run in runs]),
            spread([run["closed_form"][name]["scale"] for run in runs]),
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def spread(values):
    values = torch.tensor(values)
    if len(values) == 1:
        return f"{values[0]:.3f}"
    half = STUDENT_T[len(values) - 2] * (values.std() / len(values) ** 0.5).item()
    return f"{values.mean():.3f} ± {half:.3f}"


def draw(runs, path):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    _draw_noise(left, runs)
    _draw_squares(right, runs)
    figure.savefig(path, dpi=130)


def _draw_noise(axes, runs):
    places = torch.arange(len(METHODS))
    for offset, kind, label, colour in (
        (-0.12, "measured", "measured", "#0072B2"),
        (0.12, "closed_form", "closed form", "#E69F00"),
    ):
        values = torch.tensor([[run[kind][name]["relative_cv"] for name in METHODS] for run in runs])
        for seed in values:
            axes.plot(places + offset, seed, ".", color=colour, alpha=0.45, markersize=6)
        axes.plot(places + offset, values.mean(0), "_", color=colour, markersize=18, markeredgewidth=3, label=label)
    axes.axhline(1, color="grey", linewidth=0.8)
    axes.set_xticks(places, METHODS, rotation=20, ha="right")
    axes.set_ylabel("coefficient of variation / Dr.GRPO's")
    axes.set_title("Noise of one update (dots: seeds, bars: their mean)")
    axes.set_ylim(bottom=axes.get_ylim()[0] - 0.03)
    axes.legend(loc="lower left", ncols=2)


def _draw_squares(axes, runs):
    kept = [[p for p in run["square_by_length"] if p["n"] >= 5] for run in runs]
    pooled = torch.tensor([[p["length"], p["mean_square"]] for points in kept for p in points]).log()
    axes.loglog(*pooled.exp().T, "o", color="#0072B2", markersize=5, alpha=0.5, label="one length of one seed")
    slope_one = (pooled[:, 1] - pooled[:, 0]).mean().exp()
    ends = pooled[:, 0].exp().aminmax()
    axes.loglog(ends, [end * slope_one for end in ends], "--", color="grey", label="proportional to L")
    axes.set_xticks([4, 8, 16, 32], ["4", "8", "16", "32"])
    axes.minorticks_off()
    axes.set_xlabel("length L (tokens)")
    axes.set_ylabel("mean of |g|²")
    axes.set_title("Squared gradient of a sequence by its length")
    axes.legend(loc="lower right")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("docs/rl"))
    parser.add_argument("--playgrounds", type=Path, default=Path("runs"))
    args = parser.parse_args()
    runs = [run_seed(seed, args.playgrounds) for seed in args.seeds]
    for run in runs:
        length = run["length"]
        print(
            f"seed {run['seed']}: mean reward {run['reward']:.3f}, lengths {length['min']:.0f} to {length['max']:.0f}, mean {length['mean']:.1f}"
        )
    print(markdown(runs))
    args.out.mkdir(parents=True, exist_ok=True)
    draw(runs, args.out / "delta_l_variance.png")
    (args.out / "delta_l_variance.json").write_text(json.dumps(runs, indent=1))


if __name__ == "__main__":
    main()
