"""From two models and a file of prompts to a file of preference pairs."""

import gc
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from hf_delta.errors import InputError
from hf_delta.evaluation.loading import check_device, default_device, load_model_and_tokenizer, load_tokenizer
from hf_delta.evaluation.scoring import reward_name
from hf_delta.paths import expanded
from hf_delta.preference.pairs.assemble import make_pairs
from hf_delta.preference.pairs.delta import Delta, measure_delta
from hf_delta.preference.pairs.files import check_out, partial_path, provenance_path, write_pairs
from hf_delta.preference.pairs.generate import encode_prompts, generate, plan_batches
from hf_delta.preference.pairs.models import Source, file_digest, locate, same_model
from hf_delta.preference.pairs.partial import SIDES, Partial, locked
from hf_delta.preference.pairs.prompts import check_columns, load_prompts


FORMAT = "hf_delta.pairs"
FORMAT_VERSION = 1
_PACKAGES = ("hf_delta", "torch", "transformers", "peft")


@dataclass(frozen=True)
class Built:
    """What [`build_pairs`] wrote."""

    path: Path
    provenance: Path
    prompts: int  # that were answered
    pairs: int
    dropped: dict[str, int]  # prompts without a pair, by reason
    delta: Delta


def build_pairs(
    strong: str | Path,
    weak: str | Path,
    prompts: str | Path,
    out: str | Path,
    *,
    max_new_tokens: int = 2048,
    batch_size: int = 64,
    reward: Callable | None = None,
    reward_columns: tuple[str, ...] = ("answer",),
    student: str | Path | None = None,
    device: str | None = None,
    progress: bool = True,
) -> Built:
    """Write pairs whose chosen answer is the strong model's greedy one and whose rejected answer is the weak model's.

    Answers are kept in `<out>.partial` batch by batch, and the same call goes on there after whatever ended the last one; with
    the same batch size it writes the same bytes as a call that nothing ended. `out` appears complete, next to
    `<stem>.provenance.json`, which says what it was made of.

    Args:
        strong, weak (`str` or `Path`): model directories, PEFT adapter directories that name their base, or models of the Hub.
        prompts (`str` or `Path`): JSON lines with `prompt`; see [`load_prompts`] for the other columns.
        out (`str` or `Path`): a `.jsonl` file that does not exist.
        max_new_tokens (`int`): longer answers are cut.
        batch_size (`int`): answers at a time; another one changes them by rounding at most.
        reward (`Callable`, *optional*): judges the answers for the diagnostic.
        reward_columns (`tuple[str, ...]`): columns that it needs in each row.
        student (`str` or `Path`, *optional*): model to be trained, for the diagnostic; loaded after the answers.
        device (`str`, *optional*): `cuda` if there is one, else `cpu`, by default.
        progress (`bool`): whether to show bars with the time left.

    Raises:
        InputError: something cannot be used or is there already. What can be known beforehand is checked beforehand.
    """
    for name, value in (("--max-new-tokens", max_new_tokens), ("--batch-size", batch_size)):
        if value < 1:
            raise InputError(f"{name} must be at least 1, got {value}.")
    check_device(device or default_device())
    out = expanded(out)
    check_out(out)
    rows, repeated = load_prompts(prompts)
    if reward is not None:
        check_columns(rows, list(reward_columns), prompts, f"--reward {reward_name(reward)}")
    sources = _locate(strong, weak, student)
    settings = {"decoding": "greedy", "max_new_tokens": max_new_tokens, "device": device or default_device()}
    header = _header(sources, prompts, rows, settings)
    # Before any model is loaded: what a tokenizer cannot take should not be found after hours of the other model.
    tokenizers = {name: _load(load_tokenizer, source) for name, source in sources.items()}
    encoded = {side: encode_prompts(tokenizers[side], rows, sources[side].option) for side in SIDES}
    out.parent.mkdir(parents=True, exist_ok=True)
    with locked(out):
        check_out(out)
        partial = Partial(partial_path(out), header)
        try:
            for side in SIDES:
                _answer(sources[side], side, encoded[side], partial, batch_size, settings, progress)
        finally:
            partial.close()
        pairs = make_pairs(rows, *([partial.responses[side][i] for i in range(len(rows))] for side in SIDES))
        if not pairs.rows:
            raise InputError(f"None of {len(rows)} prompts gives a pair: {dropped_text(pairs.dropped)}.")
        model = _load(load_model_and_tokenizer, sources["student"], device)[0] if "student" in sources else None
        tokenizer = tokenizers.get("student", tokenizers["strong"])
        delta = measure_delta(pairs, tokenizer, reward=reward, student=model, progress=progress)
        dropped = {**pairs.dropped, "repeated": repeated}
        result = {"pairs": len(pairs.rows), "dropped": dropped, "delta": delta.to_dict()}
        judged = {
            "student": sources["student"].identity if "student" in sources else None,
            "reward": None if reward is None else reward_name(reward),
        }
        write_pairs(out, pairs.rows, {**header, "batch_sizes": sorted(partial.batch_sizes), **judged, **result})
    return Built(out, provenance_path(out), len(rows), len(pairs.rows), dropped, delta)


def dropped_text(dropped: dict[str, int]) -> str:
    """`3 identical, 1 empty`; `none` if none were dropped."""
    return ", ".join(f"{count} {reason}" for reason, count in dropped.items() if count) or "none"


def _locate(strong: str | Path, weak: str | Path, student: str | Path | None) -> dict[str, Source]:
    named = {"strong": strong, "weak": weak, **({} if student is None else {"student": student})}
    sources = {name: locate(model, f"--{name}") for name, model in named.items()}
    if same_model(sources["strong"].identity, sources["weak"].identity):
        raise InputError(f"--strong {strong} and --weak {weak} are one model: all answers would be identical.")
    return sources


def _header(
    sources: dict[str, Source], prompts: str | Path, rows: list[dict[str, Any]], settings: dict[str, Any]
) -> dict[str, Any]:
    """What decides the answers, and must be the same for a run to go on with those of another."""
    return {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        **{side: sources[side].identity for side in SIDES},
        "prompts": {"path": str(prompts), "sha256": file_digest(Path(prompts)), "rows": len(rows)},
        "settings": settings,
        "versions": {name: version(name) for name in _PACKAGES},
    }


def _load(load: Callable, source: Source, *arguments: Any) -> Any:
    # A model that was let go may wait for the collector, and two do not always fit.
    gc.collect()
    try:
        return load(source.base, source.adapter, *arguments)
    except InputError as error:
        raise InputError(f"{source.option}: {error}") from error


def _answer(
    source: Source,
    side: str,
    prompts: list[list[int]],
    partial: Partial,
    batch_size: int,
    settings: dict[str, Any],
    progress: bool,
) -> None:
    """All answers of one model that the partial file lacks."""
    done = partial.responses[side]
    batches = [[i for i in batch if i not in done] for batch in plan_batches([*map(len, prompts)], batch_size)]
    batches = [batch for batch in batches if batch]
    if not batches:
        return
    model, tokenizer = _load(load_model_and_tokenizer, source, settings["device"])
    bar = tqdm(total=len(prompts), initial=len(done), desc=f"{side}: answers", unit="prompt", disable=not progress)
    with bar:
        found = generate(model, tokenizer, prompts, batches, settings["max_new_tokens"], source.option)
        for positions, responses in found:
            partial.add(side, batch_size, positions, responses)
            bar.update(len(positions))
