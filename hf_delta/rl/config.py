"""Configuration of [`DeltaGRPOTrainer`]."""

import json
from dataclasses import dataclass, field
from typing import Any

from trl import GRPOConfig

from hf_delta._compat.trl import GRPO_LOSS_TYPES
from hf_delta.errors import InputError
from hf_delta.imports import load_object
from hf_delta.rl.weights import WEIGHT_RULES


@dataclass
class DeltaGRPOConfig(GRPOConfig):
    """
    Configuration class for the [`DeltaGRPOTrainer`]: TRL's [`~trl.GRPOConfig`] and the keys below. Every default is
    TRL's, so that nothing of hf_delta is on unless a key says so; the one exception is `rollout_dropout`.

    Parameters:
        loss_type (`str`, *optional*, defaults to `"dapo"`):
            One of TRL's, or `"delta_l"`: Dr.GRPO with sequences weighted by `L_i^-alpha`, see
            [`~hf_delta.rl.weights.delta_l_weights`].
        delta_l_alpha (`float`, *optional*, defaults to `1.0`):
            Exponent of `loss_type="delta_l"`, in [0, 1]. 0 is Dr.GRPO.
        delta_l_scope (`str`, *optional*, defaults to `"batch"`):
            Sequences over which the weights of `loss_type="delta_l"` have mean 1: `"batch"`, the generation batch of all
            processes, or `"group"`, the rollouts of one prompt.
        advantage_transforms (`list[str]`, *optional*):
            Weight rules, by name in `WEIGHT_RULES` or by dotted path for your own, see
            [`~hf_delta.rl.weights.AdvantageTransform`]: functions, or classes that are instantiated with their entry in
            `advantage_transform_kwargs`. Their weights are multiplied.
        advantage_transform_kwargs (`dict` or `str`, *optional*):
            Keyword arguments for the classes in `advantage_transforms`, by the same name.
        rollout_dropout (`bool`, *optional*, defaults to `False`):
            Whether rollouts made with transformers keep dropout on, as TRL does. Off by default, because dropout makes
            the policy that generates another than the policy that is trained.
        correctness_threshold (`float`, *optional*, defaults to `0.5`):
            Weighted sum of rewards above which a rollout counts as correct, for weight rules that ask.
    """

    loss_type: str = field(
        default="dapo",
        metadata={"help": f"Loss: one of {', '.join(GRPO_LOSS_TYPES)}, or delta_l (Dr.GRPO with weights L_i^-alpha)."},
    )
    delta_l_alpha: float = field(
        default=1.0, metadata={"help": "Exponent of loss_type='delta_l', in [0, 1]. 0 is Dr.GRPO."}
    )
    delta_l_scope: str = field(
        default="batch",
        metadata={"help": "Where the weights of loss_type='delta_l' have mean 1.", "choices": ["batch", "group"]},
    )
    advantage_transforms: list[str] | None = field(
        default=None, metadata={"help": "Weight rules by name, or your own by dotted path; weights are multiplied."}
    )
    advantage_transform_kwargs: dict | str | None = field(
        default=None, metadata={"help": "Keyword arguments for the classes in advantage_transforms, by the same name."}
    )
    rollout_dropout: bool = field(
        default=False, metadata={"help": "Whether rollouts made with transformers keep dropout on, as TRL does."}
    )
    correctness_threshold: float = field(
        default=0.5, metadata={"help": "Weighted sum of rewards above which a rollout counts as correct."}
    )

    def __post_init__(self):
        self._check_loss()
        self._check_transforms()
        super().__post_init__()

    def _check_loss(self) -> None:
        known = (*GRPO_LOSS_TYPES, "delta_l")
        if self.loss_type not in known:
            raise InputError(f"loss_type: {self.loss_type!r} is not one of {', '.join(known)}.")
        if self.loss_type != "delta_l":
            if self.delta_l_alpha != 1.0 or self.delta_l_scope != "batch":
                raise InputError(
                    f"delta_l_alpha and delta_l_scope do nothing with loss_type: {self.loss_type}. Write loss_type: "
                    "delta_l, or remove them."
                )
            return
        if not 0.0 <= self.delta_l_alpha <= 1.0:
            raise InputError(f"delta_l_alpha must lie in [0, 1], got {self.delta_l_alpha}.")
        if self.delta_l_scope not in ("batch", "group"):
            raise InputError(f"delta_l_scope must be batch or group, got {self.delta_l_scope!r}.")
        if self.beta != 0.0:
            raise InputError(
                f"loss_type: delta_l weights the advantages, and the KL term of beta: {self.beta} is outside them, so it "
                "would keep another normalisation. Write beta: 0.0, or take loss_type: dr_grpo for a KL term."
            )

    def _check_transforms(self) -> None:
        if isinstance(self.advantage_transform_kwargs, str):
            try:
                self.advantage_transform_kwargs = json.loads(self.advantage_transform_kwargs)
            except json.JSONDecodeError as error:
                raise InputError(f"advantage_transform_kwargs is not JSON: {error}.") from error
        names, kwargs = self.advantage_transforms or [], self.advantage_transform_kwargs or {}
        unused = sorted(set(kwargs) - set(names))
        if unused:
            raise InputError(
                f"advantage_transform_kwargs names {', '.join(unused)}, which advantage_transforms does not list."
            )
        for name in names:
            rule = weight_rule(name)
            if not callable(rule):
                raise InputError(f"advantage_transforms: {name} is neither a function nor a class.")
            if name in kwargs and not isinstance(rule, type):
                raise InputError(f"advantage_transform_kwargs: {name} is a function and takes none; make it a class.")


def weight_rule(name: str) -> Any:
    """The weight rule of that name in `WEIGHT_RULES`, or of that dotted path: a class or a function.

    Raises:
        `InputError`: there is none.
    """
    return WEIGHT_RULES.get(name) or load_object(name, key="advantage_transforms")
