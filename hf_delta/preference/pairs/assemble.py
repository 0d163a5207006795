"""Two answers to each prompt in, preference pairs out."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hf_delta.preference.pairs.partial import Response


@dataclass(frozen=True)
class Pairs:
    """Rows for DPO, and what did not become one.

    Attributes:
        rows (`list[dict]`): `prompt`, `chosen`, `rejected`, then the other columns of the prompts.
        strong, weak (`list[Response]`): the answers in `rows`, in its order.
        dropped (`dict[str, int]`): number of prompts by why there is no pair: `empty` if one or both answered nothing but
            white space, `identical` if the answers differ at most by white space around them.
    """

    rows: list[dict[str, Any]]
    strong: list[Response]
    weak: list[Response]
    dropped: dict[str, int]


def make_pairs(rows: Sequence[dict[str, Any]], strong: Sequence[Response], weak: Sequence[Response]) -> Pairs:
    """The answer of the strong model as chosen and that of the weak one as rejected, prompt by prompt.

    Args:
        rows (sequence of N `dict`): with `prompt`; conversations get conversations as answers.
        strong, weak (sequence of N [`Response`]): of each model to these prompts.
    """
    pairs = Pairs([], [], [], {"identical": 0, "empty": 0})
    for row, better, worse in zip(rows, strong, weak, strict=True):
        texts = better.text.strip(), worse.text.strip()
        if not all(texts):
            pairs.dropped["empty"] += 1
        elif texts[0] == texts[1]:
            pairs.dropped["identical"] += 1
        else:
            others = {key: value for key, value in row.items() if key != "prompt"}
            chosen, rejected = (_reply(row["prompt"], response.text) for response in (better, worse))
            pairs.rows.append({"prompt": row["prompt"], "chosen": chosen, "rejected": rejected, **others})
            pairs.strong.append(better)
            pairs.weak.append(worse)
    return pairs


def _reply(prompt: str | list[dict[str, Any]], text: str) -> str | list[dict[str, str]]:
    return text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
