"""Stable names for prompts, for rules that learn something about each."""

import hashlib
import json
from typing import Any

from datasets import Dataset, IterableDataset


def with_prompt_ids(dataset: Dataset | IterableDataset) -> Dataset | IterableDataset:
    """Add the column `prompt_id` where a dataset has none: the row's index, or in a stream a hash of its prompt.

    A row of a stream has no stable place: shards are shuffled and each counts from 0.
    """
    if isinstance(dataset, IterableDataset):
        return dataset.map(lambda row: {"prompt_id": _prompt_hash(row["prompt"]), **row})
    if "prompt_id" in dataset.column_names:
        return dataset
    return dataset.add_column("prompt_id", [str(i) for i in range(len(dataset))])


def _prompt_hash(prompt: Any) -> str:
    return hashlib.sha256(json.dumps(prompt, sort_keys=True, default=str).encode()).hexdigest()[:16]
