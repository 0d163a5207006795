"""How long the rows of a data set are, in tokens of the model."""

from dataclasses import dataclass
from typing import Any

from datasets import Dataset
from transformers import AutoTokenizer, PreTrainedTokenizerBase


# Rows that are looked at, evenly spread.
LOOKED_AT = 2000

_COMPLETIONS = ("completion", "chosen", "rejected")


@dataclass(frozen=True)
class Lengths:
    """
    Args:
        prompt (`int`): Tokens of the longest prompt; 0 where rows have none.
        sequence (`int`): Tokens of the longest row, prompt and answer.
        answers (`int`): Most answers of a row: 1, 2 of a pair, more of a list.
    """

    prompt: int
    sequence: int
    answers: int = 1


def local_tokenizer(name: str, revision: str | None, trust: bool = False) -> PreTrainedTokenizerBase | None:
    """The tokenizer of a model, if it is on this machine."""
    try:
        return AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=trust, local_files_only=True)
    except (OSError, ValueError, TypeError):
        return None


def measure(rows: Dataset, tokenizer: PreTrainedTokenizerBase) -> Lengths:
    """Tokens of the longest rows, each answer with one token for its end."""
    some = rows.select(range(0, len(rows), max(1, len(rows) // LOOKED_AT)))
    found = [_of_row(row, tokenizer) for row in some]
    return Lengths(*(max(getattr(one, name) for one in found) for name in ("prompt", "sequence", "answers")))


def _of_row(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> Lengths:
    if row.get("input_ids") is not None:
        return Lengths(0, len(row["input_ids"]))
    for whole in ("messages", "text"):
        if row.get(whole) is not None and row.get("prompt") is None:
            return Lengths(0, _count(row[whole], tokenizer) + 1)
    answers = [row[name] for name in _COMPLETIONS if row.get(name) is not None] or row.get("completions") or []
    prompt = _count(row.get("prompt"), tokenizer)
    longest = max((_count(answer, tokenizer) + 1 for answer in answers), default=0)
    return Lengths(prompt, prompt + longest, max(len(answers), 1))


def _count(value: Any, tokenizer: PreTrainedTokenizerBase) -> int:
    if value is None:
        return 0
    if isinstance(value, str):
        return len(tokenizer(value)["input_ids"])
    if tokenizer.chat_template is not None:
        try:
            return len(tokenizer(tokenizer.apply_chat_template(value, tokenize=False))["input_ids"])
        except Exception:  # a template that does not like half of a conversation
            pass
    return sum(len(tokenizer(str(message.get("content")))["input_ids"]) for message in value)
