"""Pre-training of the base model on demonstrations, some careful and some sloppy."""

from collections.abc import Callable, Iterator
from random import Random

import torch
from torch.nn.functional import cross_entropy
from torch.nn.utils import clip_grad_norm_
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_delta.playground.muon import Muon
from hf_delta.playground.tasks import Problem, Task


STEPS = 750
BATCH_SIZE = 32
BUCKET_BATCHES = 32  # demonstrations of this many batches are sorted by length together
WARMUP_STEPS = 30
MATRIX_LR, OTHER_LR = 0.02, 4e-3
IGNORED = -100


def demonstrations(task: Task, seed: int) -> Iterator[tuple[Problem, str]]:
    """Endless (problem, response) pairs, never of a held-out problem.

    Levels come in proportion to their `share`, and a response is careful with the probability `care` of its level.
    """
    rng = Random(f"{task.name} pre-training {seed}")
    shares = [level.share for level in task.levels]
    while True:
        (level,) = rng.choices(task.levels, shares)
        problem = task.sample(level.name, rng)
        if not problem.held_out:
            yield problem, problem.careful if rng.random() < level.care else problem.sloppy


def pretrain(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    *,
    seed: int,
    steps: int = STEPS,
    on_step: Callable[[float], None] = lambda loss: None,
) -> None:
    """Trains the model in place on the responses; the loss is the mean negative log-likelihood per token, in nats.

    Matrices inside the blocks are trained by Muon, embeddings and norms by AdamW; the learning rates warm up, stay
    until half of the steps and fall linearly to 2 %.

    Args:
        model (`PreTrainedModel`): trained in place, in float32 on the CPU.
        tokenizer (`PreTrainedTokenizerBase`): must know the alphabet of the task.
        task (`Task`): where demonstrations come from.
        seed (`int`): decides the demonstrations and their order.
        steps (`int`, *optional*, defaults to 750): optimizer steps.
        on_step (`Callable[[float], None]`, *optional*): called after each step with its loss.
    """
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    chosen = set(map(id, matrices))
    others = [p for p in model.parameters() if id(p) not in chosen]
    optimizers = [
        Muon(matrices, lr=MATRIX_LR),
        torch.optim.AdamW(others, lr=OTHER_LR, betas=(0.9, 0.98), weight_decay=0.01, foreach=True),
    ]
    schedulers = [torch.optim.lr_scheduler.LambdaLR(o, lambda step: lr_factor(step, steps)) for o in optimizers]
    model.train()
    for batch in batches(task, tokenizer, seed, steps):
        loss = response_loss(model, *batch)
        loss.backward()
        clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, scheduler in zip(optimizers, schedulers):
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
        on_step(loss.item())
    model.eval()


def lr_factor(step: int, steps: int) -> float:
    """What the learning rates of a step, counted from 0, are multiplied by."""
    warm = min(1.0, (step + 1) / min(WARMUP_STEPS, max(1, steps // 4)))
    return warm * min(1.0, 1 - 0.98 * (step - steps / 2) / (steps / 2))


def response_loss(model: PreTrainedModel, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Mean negative log-likelihood of the targets `(B, T)` that are not `IGNORED`, in nats per token."""
    # Padding is on the right, where a causal model does not see it: no attention mask, hence the fast kernel.
    logits = model(input_ids=tokens, use_cache=False).logits
    return cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED)


def batches(
    task: Task, tokenizer: PreTrainedTokenizerBase, seed: int, steps: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yields `steps` pairs of tokens and next-token targets, `(B, T)` each, of responses of similar length."""
    source = demonstrations(task, seed)
    rng = Random(f"{task.name} order {seed}")
    for start in range(0, steps, BUCKET_BATCHES):
        count = min(BUCKET_BATCHES, steps - start)
        rows = [next(source) for _ in range(count * BATCH_SIZE)]
        prompts = tokenizer([problem.prompt for problem, _ in rows])["input_ids"]
        responses = tokenizer([response + tokenizer.eos_token for _, response in rows])["input_ids"]
        pairs = sorted(zip(prompts, responses), key=lambda pair: len(pair[0]) + len(pair[1]))
        order = rng.sample(range(count), count)
        for index in order:
            yield collate(pairs[index * BATCH_SIZE : (index + 1) * BATCH_SIZE], tokenizer.pad_token_id)


def collate(pairs: list[tuple[list[int], list[int]]], pad_token_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and next-token targets, `(B, T)` each, of (prompt, response) token lists; padded on the right."""
    length = max(len(prompt) + len(response) for prompt, response in pairs)
    tokens = torch.full((len(pairs), length), pad_token_id)
    targets = torch.full((len(pairs), length), IGNORED)
    for row, (prompt, response) in enumerate(pairs):
        end = len(prompt) + len(response)
        tokens[row, :end] = torch.tensor(prompt + response)
        targets[row, len(prompt) - 1 : end - 1] = torch.tensor(response)
    return tokens, targets
