"""From a config and a dataset to rules that fit each other, before a model is loaded."""

from collections.abc import Sequence
from typing import Any

from datasets import Dataset, IterableDataset

from hf_delta.errors import InputError
from hf_delta.rl.allocation import ALLOCATION_RULES, AllocationRule
from hf_delta.rl.config import GROUP_RULES, DeltaGRPOConfig, check_budget, check_prompts
from hf_delta.rl.curriculum import PASS_RATE, Curriculum
from hf_delta.rl.difficulty import Difficulty
from hf_delta.rl.prompt_ids import column_values, with_prompt_ids
from hf_delta.rl.weights import WEIGHT_RULES, AdvantageTransform
from hf_delta.rl.weights.base import OPTIONAL_FIELDS, transform_name
from hf_delta.rules import build, build_rule


# Keys of `difficulty_kwargs` that are about bins of pass rates.
_OF_BINS = ("edges", "hysteresis", "exclude_extremes")


class Rules:
    """The rules of a run.

    Args:
        config ([`~trl.GRPOConfig`], *optional*):
            Names and arguments of rules, if it is a [`DeltaGRPOConfig`].
        transforms (`Sequence[AdvantageTransform]`, *optional*):
            More weight rules, as objects.
        allocation ([`~hf_delta.rl.allocation.AllocationRule`], *optional*):
            An allocation rule, as an object.

    Raises:
        `InputError`: a rule cannot be built, or a key does nothing.
    """

    def __init__(
        self, config: Any, transforms: Sequence[AdvantageTransform] = (), allocation: AllocationRule | None = None
    ):
        self.config = config
        self.transforms = [*_configured_transforms(config), *transforms]
        self.needs = frozenset().union(*map(_needs, self.transforms))
        self.allocation = _allocation(config, allocation)
        self.uses_curriculum = self.allocation is not None or bool(self.needs & {"groups", "losses"})
        self._check_keys()
        if self.uses_curriculum:
            self._check_batch()

    def _get(self, key: str, default: Any = None) -> Any:
        return getattr(self.config, key, default)

    def _check_keys(self) -> None:
        """Keys of groups and of correctness that no rule asks for."""
        for key, default in (("prompt_groups", PASS_RATE), ("difficulty_kwargs", {})):
            if self._get(key, default) == default or self.uses_curriculum:
                continue
            if self.transforms:
                names = ", ".join(map(transform_name, self.transforms))
                raise InputError(
                    f"{key} does nothing: no weight rule ({names}) asks for groups. A rule of your own does with "
                    'needs = frozenset({"groups"}).'
                )
            raise InputError(
                f"{key} does nothing without prompt_weighting or rollout_allocation. Write one of them, or remove {key}."
            )
        if self._get("rollout_weighting", "prompt") != "prompt" and self.allocation is None:
            raise InputError(
                "rollout_weighting does nothing without rollout_allocation. Write that, or remove rollout_weighting."
            )
        for key in ("correct_threshold", "correct_reward_func"):
            if self._get(key) is not None and not self.transforms and self.allocation is None:
                raise InputError(f"{key} does nothing without a rule that asks what is correct. Remove it.")
        if self._get("prompt_groups", PASS_RATE) != PASS_RATE:
            unused = [key for key in _OF_BINS if key in (self._get("difficulty_kwargs") or {})]
            if unused:
                raise InputError(
                    f"difficulty_kwargs: {unused[0]} is about bins of pass rates, and prompt_groups: "
                    f"{self._get('prompt_groups')} makes groups of a column. Remove one of them."
                )
        if (self.uses_curriculum or "prompt_ids" in self.needs) and self._get("remove_unused_columns", False):
            raise InputError("A weight rule needs prompt ids; remove_unused_columns: true would remove them.")

    def _check_batch(self) -> None:
        """Whether generation batches have something to compare."""
        self.difficulty = build(Difficulty, self._get("difficulty_kwargs") or {}, "difficulty_kwargs")
        if self.config is None:
            return
        check_prompts(self.config)
        check_budget(self.allocation, self.config)

    def prepared(self, dataset: Any) -> Any:
        """The dataset with what the rules need, checked.

        Raises:
            `InputError`: a column or a value is missing, or an id names two prompts.
        """
        if not isinstance(dataset, (Dataset, IterableDataset)):
            return dataset
        if self.uses_curriculum or "prompt_ids" in self.needs:
            dataset = with_prompt_ids(dataset)
        if self.uses_curriculum:
            for key, column in self._columns().items():
                column_values(dataset, column, key)
        return dataset

    def curriculum(self, dataset: Dataset | IterableDataset, reward_names: list[str]) -> Curriculum | None:
        """What learns about the prompts of a dataset that is [`prepared`], if a rule asks for it.

        Raises:
            `InputError`: there is no reward function of the name in `correct_reward_func`.
        """
        judge = self._get("correct_reward_func")
        if judge is not None and judge not in reward_names:
            names = ", ".join(reward_names)
            raise InputError(f"correct_reward_func: no reward function is called {judge!r}; there are {names}.")
        if not self.uses_curriculum:
            return None
        groups = self._get("prompt_groups", PASS_RATE)
        names = () if groups == PASS_RATE else column_values(dataset, groups, "prompt_groups")
        return Curriculum(self.difficulty, groups, names, self.allocation, self._get("rollout_weighting", "prompt"))

    def _columns(self) -> dict[str, str]:
        groups = self._get("prompt_groups", PASS_RATE)
        prior = (self._get("difficulty_kwargs") or {}).get("prior_column")
        found = {} if groups == PASS_RATE else {"prompt_groups": groups}
        return found if prior is None else {**found, "difficulty_kwargs: prior_column": prior}


def _configured_transforms(config: Any) -> list[AdvantageTransform]:
    if not isinstance(config, DeltaGRPOConfig):
        if getattr(config, "loss_type", None) == "delta_l":
            raise InputError("loss_type delta_l needs a DeltaGRPOConfig, and args is a plain GRPOConfig.")
        return []
    transforms = []
    if config.loss_type == "delta_l":
        transforms.append(WEIGHT_RULES["delta_l"](alpha=config.delta_l_alpha, scope=config.delta_l_scope))
    if config.prompt_weighting is not None:
        kwargs = config.prompt_weighting_kwargs
        transforms.append(build_rule(config.prompt_weighting, kwargs, GROUP_RULES, "prompt_weighting"))
    for name in config.advantage_transforms or []:
        kwargs = config.advantage_transform_kwargs.get(name, {})
        transforms.append(build_rule(name, kwargs, WEIGHT_RULES, "advantage_transforms"))
    return transforms


def _allocation(config: Any, given: AllocationRule | None) -> AllocationRule | None:
    name = getattr(config, "rollout_allocation", None)
    if name is None:
        return given
    if given is not None:
        raise InputError(f"rollout_allocation is {name} in the config and an object of the trainer: leave one out.")
    return build_rule(name, config.rollout_allocation_kwargs, ALLOCATION_RULES, "rollout_allocation")


def _needs(transform: AdvantageTransform) -> frozenset[str]:
    needs = frozenset(getattr(transform, "needs", ()))
    if unknown := needs - OPTIONAL_FIELDS:
        raise InputError(
            f"The advantage transform {transform_name(transform)} needs {', '.join(sorted(unknown))}; it can ask for "
            f"{', '.join(sorted(OPTIONAL_FIELDS))}, and the other fields of a RolloutBatch are always there."
        )
    if "losses" in needs and not hasattr(transform, "on_losses"):
        raise InputError(
            f"The advantage transform {transform_name(transform)} needs losses and has no method on_losses(sums, counts)."
        )
    return needs
