"""What [`Difficulty`] has learnt as tensors, and back."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from hf_delta.errors import InputError
from hf_delta.rl.difficulty.counts import Counts, Decay, Window


VERSION = 1


def packed(settings: Mapping[str, Any], prompts: Counts, pools: Counts) -> dict[str, Any]:
    """Settings that decide what the numbers mean, and both counts by ascending key."""
    return {
        "version": torch.tensor(VERSION),
        "window": torch.tensor(settings["window"] or 0),
        "edges": torch.tensor(settings["edges"], dtype=torch.float64),
        "prior_column": torch.tensor(list((settings["prior_column"] or "").encode()), dtype=torch.uint8),
        "prompts": {name: torch.from_numpy(array) for name, array in prompts.export().items()},
        "pools": {name: torch.from_numpy(array) for name, array in pools.export().items()},
    }


def unpacked(
    state: Mapping[str, Any], settings: Mapping[str, Any], prompts: Decay | Window, pools: Decay | Window
) -> tuple[Counts, Counts]:
    """Counts of prompts and of pools.

    Raises:
        `InputError`: the state was made with other settings, by a newer version, or is damaged.
    """
    try:
        if int(state["version"]) != VERSION:
            raise InputError(
                f"The prompt difficulties of the checkpoint are in format {int(state['version'])}, and this hf_delta reads "
                f"format {VERSION}: resume with the version of hf_delta that wrote it."
            )
        found = {
            "window": int(state["window"]) or None,
            "edges": state["edges"].tolist(),
            "prior_column": bytes(state["prior_column"].tolist()).decode() or None,
        }
        for name, value in settings.items():
            if found[name] != value:
                raise InputError(
                    f"The prompt difficulties of the checkpoint were learnt with {name}={found[name]!r}, and this run has "
                    f"{name}={value!r}: resume with the same setting, or start anew."
                )
        bins = len(found["edges"]) + 1
        return _restored(state["prompts"], prompts, bins), _restored(state["pools"], pools, bins)
    except (AttributeError, KeyError, TypeError, UnicodeDecodeError, RuntimeError) as error:
        raise _damaged(f"{type(error).__name__}: {error}") from error


def _restored(state: Mapping[str, torch.Tensor], forgetting: Decay | Window, bins: int) -> Counts:
    keys, kept, labels = (state[name].cpu().numpy() for name in ("keys", "counts", "labels"))
    empty = forgetting.empty()
    if keys.ndim != 1 or keys.dtype != np.int64 or (keys[1:] <= keys[:-1]).any():
        raise _damaged("keys are not ascending")
    if kept.shape != (len(keys), *empty.shape[1:]) or kept.dtype != empty.dtype:
        raise _damaged(f"counts have shape {kept.shape} and type {kept.dtype}")
    if not np.isfinite(kept).all() or (kept < 0).any():
        raise _damaged("a count is negative or not finite")
    if labels.shape != keys.shape or labels.dtype != np.int8 or (labels < -1).any() or (labels >= bins).any():
        raise _damaged("there is not one bin per key")
    return Counts.restored(forgetting, keys, kept, labels)


def _damaged(what: str) -> InputError:
    return InputError(
        f"The prompt difficulties of the checkpoint are damaged ({what}): resume from an earlier checkpoint."
    )
