"""What a run of DPO knows besides the model: multipliers and mask network, in every checkpoint."""

import logging
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from hf_delta import __version__
from hf_delta.checkpoint import STATE_FILE, load_state, save_state, steps_of
from hf_delta.errors import InputError
from hf_delta.ops.gather import is_partitioned
from hf_delta.preference.examples import TokenExamples
from hf_delta.preference.feasible import Multipliers
from hf_delta.resume import Resumable, batches, check_method, optimizer_settings, reading, state_of


logger = logging.getLogger(__name__)

MASK_FILE = "hfd_token_mask.safetensors"


class ResumableDPO(Resumable, TokenExamples):
    """DPO whose multipliers, rule, mask network and metrics are in its checkpoints.

    Attributes:
        multipliers ([`Multipliers`], *optional*): Of feasible learning.
    """

    multipliers: Multipliers | None = None

    def save_extra_state(self, checkpoint: Path) -> None:
        network, metrics = self.mask_network, self.running_metrics()
        # Every rank: the parameters may be sharded.
        mask = None if network is None else network.mask_state()
        if not self.args.should_save:
            return
        if mask is not None:
            save_file({name: tensor.cpu().contiguous() for name, tensor in mask.items()}, checkpoint / MASK_FILE)
        state = {
            "hf_delta": __version__,
            "method": self._method(),
            "settings": self._settings(),
            "layout": batches(self.args),
            "optimizer": optimizer_settings(self.args),
            "metrics": metrics,
            "multipliers": None if self.multipliers is None else self.multipliers.state_dict(),
            "rule": None if self.rule is None else state_of(self.rule, f"rule of token weights {self.args.rule_name}"),
        }
        save_state(checkpoint / STATE_FILE, state)

    def load_extra_weights(self, checkpoint: Path) -> None:
        path = checkpoint / STATE_FILE
        if path.exists():
            check_method(path, load_state(path), self._method(), self._settings())
        elif self.replaces_loss:
            raise InputError(
                f"{path} is not there: the checkpoint was written by another loss. Resume with the recipe that wrote it, or "
                "start a new run in another output_dir."
            )
        if self.mask_network is not None:
            self._load_masks(checkpoint / MASK_FILE)

    def _load_masks(self, path: Path) -> None:
        saved = _masks(path)
        if not any(map(is_partitioned, self.mask_network.parameters())):
            self.mask_network.load_mask_state(saved)
            return
        # ZeRO-3 has nothing but the partitions that it trains, which it has put back when it loaded its checkpoint.
        found = self.mask_network.mask_state()
        if found.keys() != saved.keys() or not all(torch.equal(found[name], saved[name]) for name in saved):
            raise InputError(
                f"{path} and the mask network that DeepSpeed has restored differ: files of {path.parent} are damaged or of "
                "another run. Resume from an earlier checkpoint."
            )

    def load_extra_state(self, checkpoint: Path) -> None:
        self.resumed_step = steps_of(checkpoint)
        path = checkpoint / STATE_FILE
        if not path.exists():  # of TRL
            return
        state = load_state(path)
        with reading(path):
            self.load_running_metrics(state["metrics"])
            if self.multipliers is not None:
                self.multipliers.load_state_dict(state["multipliers"])
            if state["rule"]:
                self.rule.load_state_dict(state["rule"])

    def _method(self) -> dict[str, Any]:
        return {
            "loss_type": list(self.args.loss_type),
            "token_weights": getattr(self.args, "token_weights", None),
            "feasible": self.multipliers is not None,
        }

    def _settings(self) -> dict[str, Any]:
        """What may be changed on resume, and is said when it is."""
        keys = ("token_weights_kwargs", "feasible_kwargs", "kl", "beta", "sample_id_column")
        keys += ("loss_weights", "list_rescale", "label_smoothing")
        return {key: getattr(self.args, key, None) for key in keys}


def _masks(path: Path) -> dict:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"{path}: the mask network cannot be read ({error}). Resume from an earlier checkpoint."
        ) from error
