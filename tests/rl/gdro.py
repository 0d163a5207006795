"""Rules and rollouts for tests of variable groups, and the objective with all weights by brute force."""

import math

import torch

from hf_delta.rl.weights import PromptGDROWeights
from tests.rl.frozen import MAX_COMPLETION, frozen_completion, frozen_reward


# Rollouts by prompt id: 32 for the 8 prompts of `frozen.dataset`, and one of them has more than any row of its rank.
COUNTS = {"0": 2, "1": 6, "2": 4, "3": 3, "4": 2, "5": 8, "6": 2, "7": 5}


class ByPromptId:
    """An allocation rule without a choice."""

    def __call__(self, batch):
        return torch.tensor([COUNTS[name] for name in batch.prompt_ids])


class Remembering(PromptGDROWeights):
    """Keeps what it saw and what it gave."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.seen = []

    def __call__(self, batch):
        weights = super().__call__(batch)
        self.seen.append((batch, weights))
        return weights


def places(group_ids):
    """Place of each row in its group."""
    return [int((group_ids[:i] == g).sum()) for i, g in enumerate(group_ids)]


def frozen_groups(prompts, trainer, fraction_truncated=0.3):
    """A TRL `rollout_func`: the k-th rollout of a prompt is a function of the prompt and of k."""
    tokenizer = trainer.processing_class
    first = trainer.accelerator.process_index * len(prompts)
    indices = places(trainer._plan.group_ids)[first : first + len(prompts)]
    completions = [
        frozen_completion(p, i, tokenizer.eos_token_id, fraction_truncated) for p, i in zip(prompts, indices)
    ]
    return {"prompt_ids": tokenizer(prompts)["input_ids"], "completion_ids": completions, "logprobs": None}


def binary_reward(completions, **kwargs):
    return [float(r > 1.0) for r in frozen_reward(completions)]


def gdro_objective(model, tokenizer, rows, eta, alpha, fraction_truncated=0.3):
    """Gradient of the second step with `prompt_gdro` (objective, failure), Delta-L and a weight of 1 for every prompt.

    `rows`: dicts with `prompt`, `prompt_id`, `level`. Every formula is written out in plain Python.
    """
    rollouts = []
    for row in rows:
        n = COUNTS[row["prompt_id"]]
        for index in range(n):
            ids = frozen_completion(row["prompt"], index, tokenizer.eos_token_id, fraction_truncated)
            reward = binary_reward([tokenizer.decode(ids, skip_special_tokens=True)])[0]
            length = len(ids) if ids[-1] == tokenizer.eos_token_id else 0
            rollouts.append({**row, "n": n, "ids": ids, "reward": reward, "length": length})
    by_prompt = {row["prompt_id"]: [r for r in rollouts if r["prompt_id"] == row["prompt_id"]] for row in rows}
    levels = sorted({row["level"] for row in rows})
    failure = {}
    for level in levels:
        rates = [1 - sum(r["reward"] for r in g) / len(g) for g in by_prompt.values() if g[0]["level"] == level]
        failure[level] = sum(rates) / len(rates)
    total = sum(math.exp(eta * failure[level]) for level in levels)
    mean = len(rollouts) / len(rows)
    share = {x: sum(mean / r["n"] for r in rollouts if r["level"] == x) / len(rollouts) for x in levels}
    with_tokens = [r for r in rollouts if r["length"]]
    mean_power = sum(r["length"] ** -alpha for r in with_tokens) / len(with_tokens)
    model.zero_grad()
    for r in rollouts:
        rewards = [x["reward"] for x in by_prompt[r["prompt_id"]]]
        centre = sum(rewards) / len(rewards)
        deviation = math.sqrt(sum((x - centre) ** 2 for x in rewards) / (len(rewards) - 1))
        weight = (r["reward"] - centre) / (deviation + 1e-4) * mean / r["n"]
        weight *= math.exp(eta * failure[r["level"]]) / total / share[r["level"]]
        weight *= r["length"] ** -alpha / mean_power if r["length"] else 0.0
        if not weight:
            continue
        prompt_ids = tokenizer(r["prompt"])["input_ids"]
        logits = model(input_ids=torch.tensor([prompt_ids + r["ids"]])).logits[0, len(prompt_ids) - 1 : -1]
        logps = logits.log_softmax(-1).gather(1, torch.tensor(r["ids"])[:, None])[:, 0]
        (-weight * logps.sum() / (len(rollouts) * MAX_COMPLETION)).backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


# Everything on at once.
GDRO = {
    "loss_type": "delta_l",
    "delta_l_alpha": 0.75,
    "mask_truncated_completions": True,
    "prompt_weighting": "prompt_gdro",
    "prompt_weighting_kwargs": {"eta": 2.0, "gamma": 0.0, "max_weight": 100.0},
    "prompt_groups": "level",
    "rollout_allocation": "tests.rl.gdro.ByPromptId",
}
