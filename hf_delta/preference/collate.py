"""What the trainer needs beside the tokens of a batch: keys of the samples, and weights of the tokens."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from hf_delta.errors import InputError
from hf_delta.preference.pair_data import SAMPLE_KEY, WEIGHT_COLUMNS


@dataclass
class DataCollatorWithColumns:
    """A collator that adds `sample_keys` and `token_weights` to the batches of another one.

    - `sample_keys` `(B,)` int64, if the examples have `sample_key`;
    - `token_weights` `(2B, T)` float32, if they have `chosen_weights` and `rejected_weights`: at the tokens of the completions
      their weights, elsewhere 0. Rows and positions are those of the batch's `completion_mask`: first all chosen, then all
      rejected. A number counts for every token, and of a list those numbers stay whose tokens do.

    Args:
        collator (`Callable`):
            TRL's `DataCollatorForPreference`, [`DataCollatorForLists`] or one's own. It gets the examples without these
            columns. For `token_weights` its batches must have `completion_mask`; if it cuts completions, it must have the
            attribute `truncation_mode`.

    Raises:
        `InputError`: weights do not fit the tokens that the collator gives.
    """

    collator: Callable[[list[dict[str, Any]]], dict[str, Any]]

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        added = {SAMPLE_KEY, *WEIGHT_COLUMNS}
        batch = self.collator([{key: example[key] for key in example if key not in added} for example in examples])
        if SAMPLE_KEY in examples[0]:
            batch["sample_keys"] = torch.tensor([example[SAMPLE_KEY] for example in examples], dtype=torch.long)
        if WEIGHT_COLUMNS.keys() <= examples[0].keys():
            weights = [example[column] for column in WEIGHT_COLUMNS for example in examples]
            batch["token_weights"] = self._placed(weights, batch.get("completion_mask"))
        return batch

    def _placed(self, weights: list[float | list[float]], mask: torch.Tensor | None) -> torch.Tensor:
        if mask is None or len(mask) != len(weights):
            found = "none" if mask is None else f"one of shape {tuple(mask.shape)}"
            raise InputError(
                f"data_collator: weights of tokens need a completion_mask with {len(weights)} rows, first all chosen and "
                f"then all rejected; {type(self.collator).__name__} gives {found}."
            )
        mask = mask.bool()
        placed = torch.zeros(mask.shape, dtype=torch.float32)
        for row, (values, count) in enumerate(zip(weights, mask.sum(1).tolist())):
            values = [values] * count if isinstance(values, (int, float)) else self._cut(list(values), count)
            placed[row, mask[row]] = torch.tensor(values, dtype=torch.float32)
        return placed

    def _cut(self, values: list[float], count: int) -> list[float]:
        """Those of a completion's weights whose `count` tokens were not cut off."""
        mode = getattr(self.collator, "truncation_mode", None)
        if len(values) < count or (len(values) > count and mode not in ("keep_start", "keep_end")):
            raise InputError(
                f"data_collator: a completion has {len(values)} weights and {count} tokens in the batch of "
                f"{type(self.collator).__name__}, which has no truncation_mode to say which ones were cut off."
                if len(values) > count
                else f"A completion of {count} tokens has {len(values)} weights; give one for each token, or one for all."
            )
        return values[:count] if mode == "keep_start" else values[len(values) - count :]
