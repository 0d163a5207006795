"""Configuration of [`DeltaGRPOTrainer`]."""

from dataclasses import dataclass, field

from trl import GRPOConfig

from hf_delta._compat.trl import GRPO_LOSS_TYPES
from hf_delta.errors import InputError
from hf_delta.rl.allocation import ALLOCATION_RULES, AllocationRule
from hf_delta.rl.difficulty import Difficulty
from hf_delta.rl.weights import WEIGHT_RULES
from hf_delta.rl.weights.base import transform_name
from hf_delta.rules import as_dict, build, build_rule, named_rule


# What `prompt_weighting` takes by name: the weight rules over groups of prompts.
GROUP_RULES = {name: rule for name, rule in WEIGHT_RULES.items() if name != "delta_l"}


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
        prompt_weighting (`str`, *optional*):
            Weight rule over groups of prompts: `"prompt_gdro"`, see [`~hf_delta.rl.weights.PromptGDROWeights`], or a dotted
            path.
        prompt_weighting_kwargs (`dict` or `str`, *optional*):
            Its keyword arguments.
        rollout_allocation (`str`, *optional*):
            Rule that gives prompts different numbers of rollouts, `num_generations` in the mean: `"rollout_gdro"`, see
            [`~hf_delta.rl.allocation.RolloutGDRO`], or a dotted path. The rollouts of a generation batch are as many as ever.
        rollout_allocation_kwargs (`dict` or `str`, *optional*):
            Its keyword arguments.
        rollout_weighting (`str`, *optional*, defaults to `"prompt"`):
            With `rollout_allocation`: `"prompt"`, the rollouts of a prompt together weigh as much as those of any other
            (each `num_generations / n`), or `"sample"`, every rollout weighs the same.
        prompt_groups (`str`, *optional*, defaults to `"pass_rate"`):
            Groups of prompts for both: `"pass_rate"`, bins of the posterior of each prompt's pass rate, or the name of a
            column of the dataset.
        difficulty_kwargs (`dict` or `str`, *optional*):
            Keyword arguments of that posterior, see [`~hf_delta.rl.difficulty.Difficulty`].
        merged_rollouts (`bool`, *optional*, defaults to `False`):
            Whether rollouts run on a copy of the adapted weights with the adapter merged, see
            [`~hf_delta.rl.merged.merged_rollouts`]: the cost of the base model, and a base that is bit for bit untouched.
            Changes nothing with vLLM, which has merged weights of its own.
        correct_threshold (`float`, *optional*):
            A rollout is correct if its reward is above; 0.5 by default, for which rewards must lie in [0, 1].
        correct_reward_func (`str`, *optional*):
            Name of the reward function that decides; by default the weighted sum of all.
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
    prompt_weighting: str | None = field(
        default=None, metadata={"help": "Weight rule over groups of prompts: prompt_gdro, or a dotted path."}
    )
    prompt_weighting_kwargs: dict | str | None = field(
        default=None, metadata={"help": "Keyword arguments of prompt_weighting."}
    )
    rollout_allocation: str | None = field(
        default=None,
        metadata={"help": "Rule for the number of rollouts of each prompt: rollout_gdro, or a dotted path."},
    )
    rollout_allocation_kwargs: dict | str | None = field(
        default=None, metadata={"help": "Keyword arguments of rollout_allocation."}
    )
    rollout_weighting: str = field(
        default="prompt",
        metadata={"help": "What weighs the same under rollout_allocation.", "choices": ["prompt", "sample"]},
    )
    prompt_groups: str = field(
        default="pass_rate", metadata={"help": "Groups of prompts: pass_rate, or a column of the dataset."}
    )
    difficulty_kwargs: dict | str | None = field(
        default=None, metadata={"help": "Keyword arguments of the posterior of pass rates."}
    )
    merged_rollouts: bool = field(
        default=False, metadata={"help": "Whether rollouts run on merged copies of the adapted weights."}
    )
    correct_threshold: float | None = field(
        default=None, metadata={"help": "Reward above which a rollout is correct; 0.5 for rewards in [0, 1]."}
    )
    correct_reward_func: str | None = field(
        default=None, metadata={"help": "Name of the reward function that decides what is correct; all by default."}
    )

    def __post_init__(self):
        self._check_loss()
        self._check_transforms()
        super().__post_init__()
        # TRL works out the size of a generation batch.
        self._check_curriculum()

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
        self.advantage_transform_kwargs = as_dict(self.advantage_transform_kwargs, "advantage_transform_kwargs")
        names, kwargs = self.advantage_transforms or [], self.advantage_transform_kwargs
        unused = sorted(set(kwargs) - set(names))
        if unused:
            raise InputError(
                f"advantage_transform_kwargs names {', '.join(unused)}, which advantage_transforms does not list."
            )
        for name in names:
            rule = named_rule(name, WEIGHT_RULES, "advantage_transforms")
            if name in kwargs and not isinstance(rule, type):
                raise InputError(f"advantage_transform_kwargs: {name} is a function and takes none; make it a class.")

    @property
    def uses_curriculum(self) -> bool:
        """Whether something of the recipe learns about prompts."""
        return self.prompt_weighting is not None or self.rollout_allocation is not None

    def _check_curriculum(self) -> None:
        for key in ("prompt_weighting_kwargs", "rollout_allocation_kwargs", "difficulty_kwargs"):
            setattr(self, key, as_dict(getattr(self, key), key))
        self._check_keys_that_do_nothing()
        if self.prompt_weighting is not None and self.prompt_weighting in (self.advantage_transforms or []):
            raise InputError(
                f"{self.prompt_weighting} is in prompt_weighting and in advantage_transforms, so that it would weigh twice."
            )
        if self.rollout_weighting not in ("prompt", "sample"):
            raise InputError(f"rollout_weighting must be prompt or sample, got {self.rollout_weighting!r}.")
        if self.merged_rollouts and self.use_transformers_continuous_batching:
            raise InputError(
                "merged_rollouts does not work with use_transformers_continuous_batching, which casts the model that it "
                "generates with. Leave one of them out."
            )
        if not self.uses_curriculum:
            return
        build(Difficulty, self.difficulty_kwargs, "difficulty_kwargs")
        check_prompts(self)
        if self.prompt_weighting is not None:
            build_rule(self.prompt_weighting, self.prompt_weighting_kwargs, GROUP_RULES, "prompt_weighting")
        if self.rollout_allocation is not None:
            rule = build_rule(
                self.rollout_allocation, self.rollout_allocation_kwargs, ALLOCATION_RULES, "rollout_allocation"
            )
            check_budget(rule, self)

    def _check_keys_that_do_nothing(self) -> None:
        """Arguments of a rule that is not there; other keys are the trainer's to judge, which knows all rules."""
        for key, default, wanted in (
            ("prompt_weighting_kwargs", {}, "prompt_weighting"),
            ("rollout_allocation_kwargs", {}, "rollout_allocation"),
        ):
            if getattr(self, key) != default and getattr(self, wanted) is None:
                raise InputError(f"{key} does nothing without {wanted}. Write that, or remove {key}.")


def check_prompts(config: GRPOConfig) -> int:
    """Prompts of a generation batch.

    Raises:
        `InputError`: there is only one, so that rules which compare prompts do nothing.
    """
    prompts = config.generation_batch_size // config.num_generations
    if prompts < 2:
        raise InputError(
            f"A generation batch of {config.generation_batch_size} rollouts has one prompt of num_generations "
            f"{config.num_generations}, and prompt weights and budgets compare prompts with one another. Raise "
            "per_device_train_batch_size or steps_per_generation."
        )
    return prompts


def check_budget(rule: AllocationRule | None, config: GRPOConfig) -> None:
    """Let an allocation rule refuse the budget of a generation batch.

    Raises:
        `InputError`: it does.
    """
    if not hasattr(rule, "check"):
        return
    try:
        rule.check(config.generation_batch_size, check_prompts(config))
    except Exception as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"rollout_allocation: {transform_name(rule)} refuses: {error}") from error
