"""pass@k of a model on problems with a verifiable answer."""

import math
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from hf_delta.errors import InputError
from hf_delta.evaluation.loading import load_model_and_tokenizer
from hf_delta.evaluation.report import Example, Problem, Report
from hf_delta.evaluation.rows import checked_rows, fingerprint, load_rows, natural_key
from hf_delta.evaluation.sampling import complete, prompt_ids, sampling_config, undisturbed
from hf_delta.evaluation.scoring import judge, load_reward, reward_name


EXAMPLES_PER_LEVEL = 3


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Iterable[dict[str, Any]],
    *,
    score: str | Callable = "playground_reward",
    ks: Sequence[int] = (1, 8),
    samples: int = 8,
    temperature: float = 1.0,
    max_new_tokens: int = 64,
    batch_size: int = 256,
    seed: int = 0,
    progress: bool = True,
    source: dict[str, Any] | None = None,
) -> Report:
    """Sample completions of each problem and count the correct ones.

    The same model, rows and settings give the same report on one machine, whatever was drawn before; the model's mode
    and torch's random state are left as they were. Of several processes each must call it, and each gets the report.

    Args:
        model: a transformers or PEFT model, e.g. `trainer.model`; on its device already.
        tokenizer: its tokenizer.
        rows (iterable of `dict`): `prompt`, `answer`, optionally `level` and `prompt_id`; other columns go to `score`.
        score (`str` or `Callable`): reward function in TRL's form, by name, dotted path or itself; above 0.5 is correct.
        ks (sequence of `int`): each k of pass@k; at most `samples`.
        samples (`int`): completions per problem.
        temperature (`float`): of the softmax; 0 is greedy decoding and takes one sample.
        max_new_tokens (`int`): longer completions are cut, and judged as they are.
        batch_size (`int`): completions at a time; another value gives other draws.
        seed (`int`): of the draws.
        progress (`bool`): whether to show a bar with the time left.
        source (`dict`, *optional*): what to note in the report about where model and rows came from.

    Raises:
        InputError: if a setting, row or the reward function cannot be used; settings and rows before any sampling.
    """
    _check_settings(ks, samples, temperature, max_new_tokens, batch_size, seed)
    rows = checked_rows(rows, str((source or {}).get("data") or "the evaluation data"))
    reward = load_reward(score)
    tokens = [prompt_ids(tokenizer, row["prompt"]) for row in rows]
    for row, ids in zip(rows, tokens):
        if not ids:
            raise InputError(f"The prompt of prompt_id {row['prompt_id']!r} has no tokens: {row['prompt']!r}.")
    config = sampling_config(model, tokenizer, temperature, max_new_tokens)
    tallies = [_Tally(row, ids) for row, ids in zip(rows, tokens)]
    with undisturbed(model, seed), tqdm(total=len(rows) * samples, unit="sample", disable=not progress) as bar:
        _sample(model, tokenizer, tallies, config, reward, samples, batch_size, bar)
    by_level = sorted(tallies, key=lambda tally: natural_key(tally.row["level"]))
    return Report(
        settings={
            "ks": list(ks),
            "samples": samples,
            "temperature": temperature,
            "max_new_tokens": max_new_tokens,
            "reward": reward_name(reward),
            "batch_size": batch_size,
            "seed": seed,
        },
        fingerprint=fingerprint(rows),
        problems=[tally.problem() for tally in by_level],
        examples=_examples(by_level),
        source={**(source or {}), **{name: version(name) for name in ("hf_delta", "torch", "transformers")}},
    )


def evaluate_files(
    model: str | Path,
    data: str | Path,
    *,
    adapter: str | Path | None = None,
    ks: Sequence[int] = (1, 8),
    samples: int = 8,
    temperature: float = 1.0,
    max_new_tokens: int = 64,
    batch_size: int = 256,
    seed: int = 0,
    reward: str | Callable = "playground_reward",
    device: str | None = None,
    progress: bool = True,
) -> Report:
    """[`evaluate`] for a saved model or adapter and a JSON lines file.

    Args:
        model (`str` or `Path`): a model directory or hub name, or a PEFT adapter directory that names its base.
        data (`str` or `Path`): JSON lines with `prompt`, `answer`, optionally `level` and `prompt_id`.
        adapter (`str` or `Path`, *optional*): a PEFT adapter directory to put on `model`.
        device (`str`, *optional*): `cuda` if there is one, else `cpu`, by default.

    Other arguments are those of [`evaluate`], `reward` being its `score`.

    Raises:
        InputError: if a file, setting, row or the reward function cannot be used; all but the model before it loads.
    """
    _check_settings(ks, samples, temperature, max_new_tokens, batch_size, seed)
    rows = load_rows(data)
    reward = load_reward(reward)
    network, tokenizer = load_model_and_tokenizer(model, adapter, device)
    return evaluate(
        network,
        tokenizer,
        rows,
        score=reward,
        ks=ks,
        samples=samples,
        temperature=temperature,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        seed=seed,
        progress=progress,
        source={
            "model": str(model),
            "adapter": None if adapter is None else str(adapter),
            "data": str(data),
            "device": str(network.device),
        },
    )


class _Tally:
    """Counts of one problem while it is sampled."""

    def __init__(self, row: dict[str, Any], prompt: list[int]) -> None:
        self.row = row
        self.prompt = prompt
        self.lengths: list[int] = []
        self.correct = 0
        self.truncated = 0

    def add(self, text: str, length: int, truncated: bool, correct: bool) -> None:
        if not self.lengths:
            self.first = (text, correct)
        self.lengths.append(length)
        self.truncated += truncated
        self.correct += correct

    def problem(self) -> Problem:
        samples = len(self.lengths)
        mean = sum(self.lengths) / samples
        return Problem(self.row["prompt_id"], self.row["level"], samples, self.correct, self.truncated, mean)

    def example(self) -> Example:
        text, correct = self.first
        row = self.row
        return Example(row["prompt_id"], row["level"], row["prompt"], row["answer"], text, correct)


def _sample(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tallies: list[_Tally],
    config: GenerationConfig,
    reward: Callable,
    samples: int,
    batch_size: int,
    bar: tqdm,
) -> None:
    # Short ones together: a batch takes as long as its longest completion.
    order = sorted(tallies, key=lambda tally: (natural_key(tally.row["level"]), len(tally.prompt)))
    queue = [tally for tally in order for _ in range(samples)]
    for start in range(0, len(queue), batch_size):
        batch = queue[start : start + batch_size]
        bar.set_description(f"evaluate {batch[0].row['level']}")
        found = complete(model, tokenizer, [tally.prompt for tally in batch], config)
        verdicts = judge(reward, [tally.row for tally in batch], found.texts, found.ids)
        for tally, text, ids, cut, correct in zip(batch, found.texts, found.ids, found.truncated, verdicts):
            tally.add(text, len(ids), cut, correct)
        bar.update(len(batch))


def _examples(tallies: list[_Tally]) -> list[Example]:
    """Problems evenly spread over each level in the order of the data: positions, not outcomes, decide."""
    by_level: dict[str, list[_Tally]] = {}
    for tally in tallies:
        by_level.setdefault(tally.row["level"], []).append(tally)
    examples = []
    for level in by_level.values():
        count = min(EXAMPLES_PER_LEVEL, len(level))
        examples += [level[(2 * part + 1) * len(level) // (2 * count)].example() for part in range(count)]
    return examples


def _check_settings(
    ks: Sequence[int], samples: int, temperature: float, max_new_tokens: int, batch_size: int, seed: int
) -> None:
    if not ks or len(set(ks)) < len(ks):
        raise InputError(f"k: name at least one k and none twice, got {', '.join(map(str, ks)) or 'none'}.")
    for name, value in (
        ("k", min(ks)),
        ("samples", samples),
        ("max_new_tokens", max_new_tokens),
        ("batch_size", batch_size),
    ):
        if value < 1:
            raise InputError(f"{name} must be at least 1, got {value}.")
    if max(ks) > samples:
        raise InputError(
            f"pass@{max(ks)} cannot be estimated from {samples} samples per problem: raise samples, or leave that k out."
        )
    if not 0 <= temperature < math.inf:
        raise InputError(f"temperature must be a finite number from 0 up, got {temperature}.")
    if not 0 <= seed < 2**63:
        raise InputError(f"seed must lie in [0, 2**63), got {seed}.")
    if temperature == 0 and samples > 1:
        raise InputError(f"temperature {temperature} with {samples} samples: use above 0, or 0 with one sample.")
