"""Configuration of [`DeltaDPOTrainer`]."""

from dataclasses import dataclass, field
from difflib import get_close_matches

from trl import DPOConfig

from hf_delta._compat.kernels import LOGPS_KERNELS
from hf_delta._compat.trl_dpo import DPO_LOSS_TYPES
from hf_delta.errors import InputError
from hf_delta.preference.feasible import Multipliers
from hf_delta.preference.lists import LIST_LOSSES
from hf_delta.preference.losses import PAIR_LOSSES
from hf_delta.preference.weights import TOKEN_WEIGHTS, TokenWeights, token_rule
from hf_delta.rules import as_dict, build, build_rule


# Values of `loss_type` that are DPO's `sigmoid` with a rule of token weights.
TOKEN_OBJECTIVES = tuple(name for name in TOKEN_WEIGHTS if name != "columns")


@dataclass
class DeltaDPOConfig(DPOConfig):
    """
    Configuration class for the [`DeltaDPOTrainer`]: TRL's [`~trl.DPOConfig`] and the keys below. Every default is TRL's,
    so that nothing of hf_delta is on unless a key says so.

    Parameters:
        loss_type (`list[str]`, *optional*, defaults to `["sigmoid"]`):
            TRL's, or one of ours: `tdpo1`, `tdpo2`, `sparse_po`, `mapo`, `tis_dpo` and `d2po` are `sigmoid` with token
            weights; `lipo_lambda`, `list_logistic`, `list_hinge`, `list_softmax` and `plackett_luce` take rows with lists of
            completions, see [`~hf_delta.preference.lists`]. With token weights or `feasible`, the losses of TRL in
            [`~hf_delta.preference.losses.PAIR_LOSSES`] can be had, and `sft` beside them.
        token_weights (`str`, *optional*):
            Weights of tokens for the losses of TRL: `columns`, the data set's `chosen_weights` and `rejected_weights`, or the
            dotted path of your own rule, see [`~hf_delta.preference.weights.TokenWeights`].
        token_weights_kwargs (`dict` or `str`, *optional*):
            Arguments of the rule, be it in `token_weights` or in `loss_type`.
        kl (`str`, *optional*, defaults to `"exact"`):
            For rules with a KL term: `exact` sums over the vocabulary, `sampled` takes `exp(r) - 1 - r` of each token,
            `r = log pi - log pi_ref`, which is cheaper and on tokens of a data set a penalty rather than an estimate.
        logps_kernel (`str`, *optional*, defaults to `"trl"`):
            What computes log-probabilities: `trl`, or `chunked`, [`~hf_delta.ops.token_kl.token_logps_and_kl`], which on a CPU
            takes a fraction of the time and memory.
        feasible (`bool`, *optional*, defaults to `False`):
            Whether every sample gets a multiplier that grows while its loss is above a bound, see
            [`~hf_delta.preference.feasible.Multipliers`].
        feasible_kwargs (`dict` or `str`, *optional*):
            Its arguments: `epsilon`, the bound, in nats for the losses here, must be given; `eta`, `alpha`, `initial`.
        sample_id_column (`str`, *optional*):
            For `feasible`: column with the id of a sample. By default what is in the row identifies it.
        list_rescale (`bool`, *optional*, defaults to `True`):
            For list losses: whether the scores of each list are spread over [0, 1], see
            [`~hf_delta.preference.list_data.add_labels`].
    """

    token_weights: str | None = field(
        default=None, metadata={"help": "Token weights for TRL's losses: columns, or your own rule by dotted path."}
    )
    token_weights_kwargs: dict | str | None = field(
        default=None, metadata={"help": "Arguments of the rule of token weights, in token_weights or in loss_type."}
    )
    kl: str = field(
        default="exact",
        metadata={
            "help": "KL term of token weights: over the vocabulary or of tokens.",
            "choices": ["exact", "sampled"],
        },
    )
    logps_kernel: str = field(
        default="trl", metadata={"help": "What computes log-probabilities.", "choices": list(LOGPS_KERNELS)}
    )
    feasible: bool = field(
        default=False, metadata={"help": "Whether every sample gets a multiplier for a bound on its loss."}
    )
    feasible_kwargs: dict | str | None = field(
        default=None, metadata={"help": "Arguments of the multipliers: epsilon (the bound), eta, alpha, initial."}
    )
    sample_id_column: str | None = field(
        default=None, metadata={"help": "For feasible: column with the id of a sample; by default its content."}
    )
    list_rescale: bool = field(
        default=True, metadata={"help": "For list losses: whether scores are spread over [0, 1] in each list."}
    )

    def __post_init__(self):
        super().__post_init__()
        for key in ("token_weights_kwargs", "feasible_kwargs"):
            setattr(self, key, as_dict(getattr(self, key), key))
        self._check_choices()
        self._check_losses()
        self._check_rule()
        self._check_feasible()
        if not self.uses_lists and not self.list_rescale:
            raise InputError("list_rescale does nothing without a list loss. Remove it.")
        if self.replaces_loss:
            self._check_what_is_left_out()

    @property
    def uses_lists(self) -> bool:
        """Whether rows are lists of completions."""
        return any(name in LIST_LOSSES for name in self.loss_type)

    @property
    def rule_name(self) -> str | None:
        """Name or dotted path of the rule of token weights."""
        return next((name for name in self.loss_type if name in TOKEN_OBJECTIVES), self.token_weights)

    @property
    def replaces_loss(self) -> bool:
        """Whether the loss is ours, and not TRL's."""
        return self.uses_lists or self.rule_name is not None or self.feasible

    @property
    def pair_losses(self) -> list[str]:
        """`loss_type` with token objectives replaced by the loss under their weights."""
        return ["sigmoid" if name in TOKEN_OBJECTIVES else name for name in self.loss_type]

    def build_rule(self) -> TokenWeights | None:
        """The rule of token weights.

        Raises:
            `InputError`: there is none of that name, or it refuses its arguments.
        """
        if self.rule_name is None:
            return None
        key = "token_weights" if self.token_weights is not None else "loss_type"
        return token_rule(
            build_rule(self.rule_name, self.token_weights_kwargs, TOKEN_WEIGHTS, key, "token_weights_kwargs")
        )

    def build_multipliers(self) -> Multipliers | None:
        """Multipliers of feasible learning; see [`DeltaDPOConfig.build_rule`] for what is raised."""
        return build(Multipliers, self.feasible_kwargs, "feasible_kwargs") if self.feasible else None

    def _check_choices(self) -> None:
        for key, choices in {"kl": ("exact", "sampled"), "logps_kernel": LOGPS_KERNELS}.items():
            if getattr(self, key) not in choices:
                raise InputError(f"{key} must be {' or '.join(choices)}, got {getattr(self, key)!r}.")

    def _check_losses(self) -> None:
        ours = [name for name in self.loss_type if name in TOKEN_OBJECTIVES or name in LIST_LOSSES]
        known = (*DPO_LOSS_TYPES, *TOKEN_OBJECTIVES, *LIST_LOSSES)
        if not self.loss_type:
            raise InputError(f"loss_type is an empty list. Write one of {', '.join(known)}.")
        if unknown := [name for name in self.loss_type if name not in known]:
            # lipo is lipo_lambda, whatever else has letters in common with it.
            begun = [name for name in known if name.startswith(f"{unknown[0]}_")]
            near = begun or get_close_matches(str(unknown[0]), known, n=1)
            meant = f"did you mean {near[0]}?" if near else f"write one of {', '.join(known)}."
            raise InputError(f"loss_type: there is no {unknown[0]!r}; {meant}")
        if len(ours) > 1:
            raise InputError(f"loss_type: {ours[0]} and {ours[1]} cannot be trained on together. Write one of them.")
        if "robust" in self.loss_type and not 0 <= self.label_smoothing < 0.5:
            # TRL divides by 1 - 2 label_smoothing.
            raise InputError(
                f"label_smoothing must lie in [0, 0.5) with loss_type: robust, got {self.label_smoothing}."
            )
        if not self.replaces_loss:
            return
        rest = [name for name in self.loss_type if name not in ours]
        if self.uses_lists and rest:
            raise InputError(
                f"loss_type: {ours[0]} takes lists and {rest[0]} takes pairs. Write one of them; list_logistic is the sum of "
                "sigmoid over the pairs of a list."
            )
        if ours and set(rest) - {"sft"}:
            raise InputError(
                f"loss_type: {ours[0]} is a preference loss itself; only sft goes with it, not {', '.join(rest)}."
            )
        unknown = [name for name in rest if name not in PAIR_LOSSES and name != "sft"]
        if unknown:
            why = "token_weights" if self.token_weights is not None else "feasible"
            raise InputError(
                f"loss_type: {unknown[0]} does not go with {why}; write one of {', '.join(PAIR_LOSSES)}, or one of ours."
            )
        if not ours and rest == ["sft"]:
            raise InputError(
                "loss_type: sft alone has no preference in it. Write sigmoid beside it, or train with SFT."
            )
        if "sft" in rest and self.feasible:
            raise InputError(
                "feasible bounds the preference loss of each sample, and sft is a mean over tokens. Remove one."
            )

    def _check_rule(self) -> None:
        if self.token_weights is not None:
            if any(name in TOKEN_OBJECTIVES for name in self.loss_type):
                raise InputError(
                    f"loss_type: {self.rule_name} has token weights of its own. Remove token_weights, or write loss_type: sigmoid."
                )
            if self.uses_lists:
                raise InputError(
                    "token_weights weigh the tokens of pairs, and a list loss has none. Remove one of them."
                )
        rule = self.build_rule()
        if rule is None and self.token_weights_kwargs:
            raise InputError("token_weights_kwargs does nothing without a rule of token weights. Remove it.")
        if self.kl == "sampled" and (rule is None or "kl" not in rule.needs):
            raise InputError("kl: sampled does nothing, because nothing here has a KL term. Remove it.")

    def _check_feasible(self) -> None:
        if self.feasible:
            if "epsilon" not in self.feasible_kwargs:
                raise InputError("feasible needs its bound: write feasible_kwargs: {epsilon: 0.3}, for instance.")
            self.build_multipliers()
            return
        for key in ("feasible_kwargs", "sample_id_column"):
            if getattr(self, key):
                raise InputError(f"{key} does nothing without feasible: true. Write that, or remove it.")

    def _check_what_is_left_out(self) -> None:
        """Keys of TRL that act inside of its own loss."""
        what = "feasible" if self.feasible else self.rule_name or self.loss_type[0]
        for key, default, why in (
            ("precompute_ref_log_probs", False, "needs the reference token by token, and not its sums"),
            ("padding_free", False, "needs sequences apart"),
            ("use_weighting", False, "has weights of its own"),
            ("ld_alpha", None, "has weights of its own"),
            ("f_divergence_type", "reverse_kl", "is defined for log-ratios"),
        ):
            if getattr(self, key) != default:
                raise InputError(f"{key}: {getattr(self, key)} does not go with {what}, which {why}. Remove {key}.")
