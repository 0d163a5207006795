"""A world for tests of the trainer: a random model, rollouts that are a function of the prompt, and a brute-force loss."""

from functools import partial
from zlib import crc32

import torch
from datasets import Dataset
from transformers import TrainerCallback

from hf_delta.playground.model import build_model
from hf_delta.playground.tokenizer import build_tokenizer


PROMPTS = 8
GENERATIONS = 4
MAX_COMPLETION = 12


def build_world(path):
    """Save an untrained model and its tokenizer, and return the directory as a string."""
    tokenizer = build_tokenizer("0123456789+-*=:;#")
    build_model(tokenizer, seed=1).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


def dataset(rows=PROMPTS):
    return Dataset.from_list(
        [{"prompt": f"{7 * i}+{i}:", "answer": str(8 * i), "level": f"add{i % 2}"} for i in range(rows)]
    )


def frozen_completion(prompt, index, eos, fraction_truncated=0.0):
    """Token ids of the `index`-th completion of a prompt: lengths 2 to 12, most of them ended by `eos`."""
    generator = torch.Generator().manual_seed(crc32(f"{prompt}/{index}".encode()))
    length = int(torch.randint(1, MAX_COMPLETION, (1,), generator=generator))
    tokens = torch.randint(4, 20, (length,), generator=generator).tolist()
    truncated = bool(torch.rand((), generator=generator) < fraction_truncated)
    return (tokens * MAX_COMPLETION)[:MAX_COMPLETION] if truncated else [*tokens, eos]


def frozen_environment_mask(completion):
    """1 at tokens of the model, 0 at every third token, as if an environment had written it."""
    return [int(i % 3 != 2) for i in range(len(completion))]


def frozen_rollouts(prompts, trainer, fraction_truncated=0.0, with_environment=False):
    """A TRL `rollout_func`; the place of a row in its group follows from its place in the global batch."""
    tokenizer = trainer.processing_class
    first = trainer.accelerator.process_index * len(prompts)
    complete = partial(frozen_completion, eos=tokenizer.eos_token_id, fraction_truncated=fraction_truncated)
    completions = [complete(p, (first + i) % trainer.num_generations) for i, p in enumerate(prompts)]
    rollouts = {
        "prompt_ids": tokenizer(prompts)["input_ids"],
        "completion_ids": completions,
        "logprobs": None,
    }
    if with_environment:
        rollouts["env_mask"] = [frozen_environment_mask(c) for c in completions]
    return rollouts


def frozen_reward(completions, **kwargs):
    return [(crc32(c.encode()) % 7) / 3 for c in completions]


class GradientRecorder(TrainerCallback):
    """Keeps a copy of the gradients of every optimizer step, by parameter name."""

    def __init__(self):
        self.gradients = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.gradients.append(
            {n.removeprefix("module."): p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        )

    def mean(self):
        return {n: torch.stack([g[n] for g in self.gradients]).mean(0) for n in self.gradients[0]}


def brute_force_gradient(model, tokenizer, prompts, weigh, fraction_truncated=0.0, with_environment=False):
    """Gradient of `-sum_i weight_i A_i sum_t logp_it` by one unpadded forward pass a sequence.

    `weigh(lengths, groups)` gives the weights with every constant inside.
    """
    rows = []
    for group, prompt in enumerate(prompts):
        for index in range(GENERATIONS):
            ids = frozen_completion(prompt, index, tokenizer.eos_token_id, fraction_truncated)
            reward = frozen_reward([tokenizer.decode(ids, skip_special_tokens=True)])[0]
            keep = [1] * len(ids) if not with_environment else frozen_environment_mask(ids)
            if fraction_truncated and ids[-1] != tokenizer.eos_token_id:
                keep = [0] * len(ids)
            rows.append((group, prompt, ids, keep, reward))
    rewards = torch.tensor([row[4] for row in rows]).view(len(prompts), GENERATIONS)
    advantages = ((rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)).view(-1)
    lengths = [sum(row[3]) for row in rows]
    weights = weigh(lengths, [row[0] for row in rows])
    model.zero_grad()
    for weight, advantage, (_, prompt, ids, keep, _) in zip(weights, advantages, rows):
        prompt_ids = tokenizer(prompt)["input_ids"]
        logits = model(input_ids=torch.tensor([prompt_ids + ids])).logits[0, len(prompt_ids) - 1 : -1]
        logps = logits.log_softmax(-1).gather(1, torch.tensor(ids)[:, None])[:, 0]
        (-weight * advantage * (logps * torch.tensor(keep)).sum()).backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
