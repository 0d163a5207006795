"""The task of `adapter_quality.py`: a model that can add, and has seen a few subtractions, learns to subtract."""

from itertools import islice
from random import Random

import torch

from hf_delta.evaluation.sampling import complete, prompt_ids, sampling_config, undisturbed
from hf_delta.playground import Level, Problem, Task, playground_reward
from hf_delta.playground.pretrain import collate
from hf_delta.playground.tasks.addition import Addition


DIGITS = (1, 2, 3, 4)
BATCH_SIZE = 32
EVALUATED = 160  # held-out problems of each level but the first


class CarefulAddition(Addition):
    """The old task: additions that are always worked out, so that a lost answer is lost skill and not a guess."""

    name = "careful_addition"
    levels = tuple(Level(f"add{n}", share=3, care=1.0) for n in DIGITS)


class Subtraction(Task):
    """The new task: larger minus smaller number, column by column as additions are.

    A column is the two digits, the borrow that it causes and the digit that it leaves, from the right:
    `523-178:` is answered by `3815;2714;5103#345`.
    """

    name = "subtraction"
    levels = tuple(Level(f"sub{n}", share=1, care=0.3) for n in DIGITS)

    def sample(self, level: str, rng: Random) -> Problem:
        digits = int(level.removeprefix("sub"))
        low = 10 ** (digits - 1) if digits > 1 else 0
        b, a = sorted((rng.randrange(low, 10**digits), rng.randrange(low, 10**digits)))
        return Problem(
            level=level,
            expression=f"{a}-{b}",
            answer=str(a - b),
            careful=f"{';'.join(_columns(a, b, digits))}#{a - b:0{digits}d}",
            sloppy=f"#{a}",
        )


class Arithmetic(Task):
    """Pre-training: three worked additions to one subtraction, of which 30 % are worked out and the others guessed."""

    name = "arithmetic"
    levels = CarefulAddition.levels + Subtraction.levels

    def sample(self, level: str, rng: Random) -> Problem:
        return (CarefulAddition() if level.startswith("add") else Subtraction()).sample(level, rng)


def _columns(a, b, digits):
    written, borrow = [], 0
    for _ in range(digits):
        (a, x), (b, y) = divmod(a, 10), divmod(b, 10)
        difference = x - y - borrow
        borrow = int(difference < 0)
        written.append(f"{x}{y}{borrow}{difference % 10}")
    return written


def training_batches(tokenizer, seed, steps):
    """`steps` pairs of tokens and targets `(B, T)`: worked subtractions, all levels alike, none of them held out."""
    task, rng = Subtraction(), Random(f"subtraction training {seed}")
    for _ in range(steps):
        problems = list(islice(_problems(task, None, rng, held_out=False), BATCH_SIZE))
        prompts = tokenizer([p.prompt for p in problems])["input_ids"]
        answers = tokenizer([p.careful + tokenizer.eos_token for p in problems])["input_ids"]
        yield collate(list(zip(prompts, answers)), tokenizer.pad_token_id)


def held_out(task, seed, count=EVALUATED):
    """`count` different held-out problems of every level from the second one up; the first has a handful only."""
    rng = Random(f"{task.name} held out {seed}")
    rows = []
    for level in task.levels[1:]:
        found = {}
        for problem in _problems(task, level.name, rng, held_out=True):
            found.setdefault(problem.expression, problem)
            if len(found) == count:
                break
        rows += found.values()
    return rows


def _problems(task, level, rng, *, held_out):
    while True:
        problem = task.sample(level or rng.choice(task.levels).name, rng)
        if problem.held_out == held_out:
            yield problem


def accuracy(model, tokenizer, problems):
    """Share of the problems whose greedy answer is right."""
    config = sampling_config(model, tokenizer, 0.0, max_new_tokens=30)
    prompts = [prompt_ids(tokenizer, problem.prompt) for problem in problems]
    with undisturbed(model, seed=0):
        texts = complete(model, tokenizer, prompts, config).texts
    rewards = playground_reward(texts, [problem.answer for problem in problems])
    return torch.tensor(rewards).mean().item()
