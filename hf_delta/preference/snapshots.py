"""Token weights of a few completions over a training, in a file that `hf-delta plot` draws.

Reading the file imports neither torch nor transformers.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hf_delta.errors import InputError


if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase


logger = logging.getLogger(__name__)

SNAPSHOTS = "token_weights.json"
FORMAT, FORMAT_VERSION = "hf_delta.token_weights", 1

# What is kept of one completion and of its prompt: more than a picture shows, and little enough to write at every log.
_MOST_TOKENS, _MOST_PROMPT = 512, 1000
# Tokens whose text depends on those before them: words of SentencePiece, and characters of several byte tokens.
_CONTEXT = 4


@dataclass(frozen=True)
class Example:
    """Weights of one completion; `None` stands for a weight that is no finite number.

    Args:
        prompt (`str`): text before it, its end if it is long.
        side (`str`): `chosen` or `rejected`.
        pair (`int`): position of the pair in its snapshot.
        tokens (`list[str]`): texts of its tokens.
        reward (`list[float | None]`): their weights in the reward term.
        kl (`list[float | None]`, *optional*): their weights in the KL term, for rules that have one.
    """

    prompt: str
    side: str
    pair: int
    tokens: list[str]
    reward: list[float | None]
    kl: list[float | None] | None = None

    def __post_init__(self) -> None:
        if self.side not in ("chosen", "rejected"):
            raise ValueError(f"side is {self.side!r}")
        if not (isinstance(self.prompt, str) and all(isinstance(token, str) for token in self.tokens)):
            raise ValueError("a prompt or token that is no text")
        for weights in (self.reward, *([] if self.kl is None else [self.kl])):
            if len(weights) != len(self.tokens):
                raise ValueError(f"{len(weights)} weights for {len(self.tokens)} tokens")
            if not all(weight is None or isinstance(weight, int | float) for weight in weights):
                raise ValueError("a weight that is no number")


@dataclass(frozen=True)
class Snapshot:
    """The examples of one optimizer step."""

    step: int
    examples: list[Example]


class TokenSnapshots:
    """Keeps snapshots of token weights in a file, which is whole at any time.

    Above the limit, the snapshot goes that leaves the smallest gap; the first and the last stay. Nothing here stops a
    training: what cannot be read or belongs to another run is moved aside, and what cannot be written is left out, with a
    warning.

    Args:
        path (`str` or `Path`): the file, `token_weights.json` in the output directory.
        rule (`str`): name of the rule that gives the weights.
        limit (`int`, *optional*, defaults to `50`): most snapshots to keep, at least 2.
        resumed_step (`int`, *optional*, defaults to `0`):
            Step of the checkpoint that the training goes on from. Snapshots up to it are kept, later ones are those of a
            training that was given up. 0 for a new training, to which no older file belongs.

    Attributes:
        snapshots (`list[Snapshot]`): by step.
    """

    def __init__(self, path: str | Path, rule: str, limit: int = 50, resumed_step: int = 0) -> None:
        if limit < 2:
            raise InputError(f"limit: at least 2 snapshots must be kept, the first and the last, not {limit}.")
        self.path, self.rule, self.limit = Path(path), rule, limit
        self.snapshots = self._of_before(resumed_step)

    def add(self, step: int, examples: Sequence[Example]) -> None:
        """Add the snapshot of a step, in the place of an older one of that step, and write the file."""
        kept = [snapshot for snapshot in self.snapshots if snapshot.step != step]
        self.snapshots = sorted([*kept, Snapshot(step, list(examples))], key=lambda snapshot: snapshot.step)
        while len(self.snapshots) > self.limit:
            del self.snapshots[_most_crowded([snapshot.step for snapshot in self.snapshots])]
        self._write()

    def _of_before(self, resumed_step: int) -> list[Snapshot]:
        if not self.path.exists():
            return []
        if resumed_step > 0:
            try:
                rule, snapshots = read_snapshots(self.path)
                if rule == self.rule:
                    return [snapshot for snapshot in snapshots if snapshot.step <= resumed_step]
                reason = f"its token weights are those of {rule}, not of {self.rule}"
            except InputError as error:
                reason = str(error)
        else:
            reason = "it is of an older training"
        self._move_aside(reason)
        return []

    def _move_aside(self, reason: str) -> None:
        number = 1
        while (aside := self.path.with_name(f"{self.path.stem}.old-{number}{self.path.suffix}")).exists():
            number += 1
        try:
            os.replace(self.path, aside)
        except OSError as error:
            logger.warning("%s stays as it is, and token weights are not written: %s.", self.path, error)
            self.path = None
            return
        logger.warning("Moved %s to %s and began anew: %s", self.path, aside.name, reason)

    def _write(self) -> None:
        if self.path is None:
            return
        content = {
            "format": FORMAT,
            "version": FORMAT_VERSION,
            "rule": self.rule,
            "snapshots": [asdict(snapshot) for snapshot in self.snapshots],
        }
        partial = self.path.with_name(self.path.name + ".partial")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # Lone surrogates, which a tokenizer may give, are escaped and not encoded.
            partial.write_text(json.dumps(content, allow_nan=False), encoding="utf-8")
            os.replace(partial, self.path)
        except OSError as error:
            logger.warning("Token weights of step %d were not written: %s.", self.snapshots[-1].step, error)


def read_snapshots(path: str | Path) -> tuple[str, list[Snapshot]]:
    """The rule and the snapshots, by step, in a file that [`TokenSnapshots`] wrote.

    Raises:
        InputError: the file cannot be read, is damaged or not one of ours, or was written in a newer format.
    """
    advice = "Move it out of the directory to draw the rest."
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read ({error}). {advice}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise InputError(f"{path} holds no token weights of hf_delta. {advice}")
    if content.get("version") != FORMAT_VERSION:
        raise InputError(
            f"{path} has format version {content.get('version')}, and this hf_delta reads {FORMAT_VERSION}: update hf_delta. "
            f"{advice}"
        )
    try:
        snapshots = [
            Snapshot(int(entry["step"]), [Example(**example) for example in entry["examples"]])
            for entry in content["snapshots"]
        ]
        return str(content["rule"]), sorted(snapshots, key=lambda snapshot: snapshot.step)
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path} is damaged ({error!r}). {advice}") from error


def examples_of(
    tokens: torch.Tensor,
    mask: torch.Tensor,
    reward: torch.Tensor,
    kl: torch.Tensor | None,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    pairs: int = 2,
) -> list[Example]:
    """Examples of the first pairs of a batch: chosen and rejected of the first, then of the second, and so on.

    The first 512 tokens of a completion and the last 1000 characters of a prompt are kept.

    Args:
        tokens (`torch.Tensor` of shape `(2B, T)`): Token ids, first all chosen, then all rejected.
        mask (`torch.Tensor` of shape `(2B, T)`): Where a token belongs to the completion.
        reward (`torch.Tensor` of shape `(2B, T)`): Weights of the reward term.
        kl (`torch.Tensor` of shape `(2B, T)`, *optional*): Weights of the KL term.
        tokenizer (`PreTrainedTokenizerBase`): Whose ids they are.
        prompts (sequence of `str`): Texts of at least the first `pairs` of the B prompts, see [`prompt_texts`].
        pairs (`int`, *optional*, defaults to `2`): How many pairs, at most.
    """
    count = len(tokens) // 2
    examples = []
    for pair in range(min(pairs, count)):
        for side, row in (("chosen", pair), ("rejected", count + pair)):
            where = mask[row].bool().nonzero()[:_MOST_TOKENS, 0]
            prompt = prompts[pair]
            if len(prompt) > _MOST_PROMPT:
                prompt = "…" + prompt[1 - _MOST_PROMPT :]
            texts = token_texts(tokenizer, tokens[row, where].tolist())
            numbers = (None if weights is None else _numbers(weights[row, where]) for weights in (reward, kl))
            examples.append(Example(prompt, side, pair, texts, *numbers))
    return examples


def prompt_texts(
    input_ids: torch.Tensor, completion_mask: torch.Tensor, tokenizer: PreTrainedTokenizerBase, pairs: int = 2
) -> list[str]:
    """Texts before the completions of the first pairs, without special tokens.

    Args:
        input_ids (`torch.Tensor` of shape `(2B, L)`): Prompt and completion, padded on either side with special tokens.
        completion_mask (`torch.Tensor` of shape `(2B, L)`): 1 where a token belongs to the completion.
    """
    rows = range(min(pairs, len(input_ids) // 2))
    starts = [int(completion_mask[row].bool().int().argmax()) for row in rows]
    return [tokenizer.decode(input_ids[row, :start], skip_special_tokens=True) for row, start in zip(rows, starts)]


def token_texts(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    """The text that each token adds to those before it, or its own where it changes theirs, as bytes of one character do."""
    texts = []
    for place, token in enumerate(ids):
        before = list(ids[max(place - _CONTEXT, 0) : place])
        shorter, longer = (
            tokenizer.decode(part, clean_up_tokenization_spaces=False) if part else ""
            for part in (before, [*before, token])
        )
        own = not longer.startswith(shorter)
        texts.append(tokenizer.decode([token], clean_up_tokenization_spaces=False) if own else longer[len(shorter) :])
    return texts


def _numbers(weights: torch.Tensor) -> list[float | None]:
    return [float(f"{weight:.6g}") if math.isfinite(weight) else None for weight in weights.tolist()]


def _most_crowded(steps: Sequence[int]) -> int:
    """Position of the inner step without which the gap is smallest."""
    return min(range(1, len(steps) - 1), key=lambda place: steps[place + 1] - steps[place - 1])
