"""TRL's kernels for log-probabilities and divergences with the contract of `hf_delta.ops.token_kl`, and which of the two.

TRL computes 4096 x 32768 logits at a time. With Triton that is quick; elsewhere it costs more time and memory than all
logits at once.
"""

from collections.abc import Callable

import torch
from trl.kernels.chunked_divergence import ChunkedDivergenceFunction
from trl.kernels.chunked_logprob import OPTIONAL_OUTPUTS, ChunkedLogProbFunction, _use_triton
from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE

from hf_delta.errors import InputError
from hf_delta.ops.gather import gathered, whole
from hf_delta.ops.token_kl import TokenScores, token_logps_and_kl


LOGPS_KERNELS: tuple[str, ...] = ("trl", "chunked")

# Parameters of the `forward` of TRL's functions, as of TRL 1.16; they are given by position.
SEAMS: dict[type, tuple[str, ...]] = {
    ChunkedLogProbFunction: (
        "ctx",
        "hidden",
        "weight",
        "bias",
        "targets",
        "temperature",
        "chunk_size",
        "final_logit_softcapping",
        "logit_scale",
        "outputs",
    ),
    ChunkedDivergenceFunction: (
        "ctx",
        "student_hidden",
        "student_weight",
        "student_bias",
        "teacher_hidden",
        "teacher_weight",
        "teacher_bias",
        "beta",
        "temperature",
        "student_logit_scale",
        "student_final_logit_softcapping",
        "teacher_logit_scale",
        "teacher_final_logit_softcapping",
    ),
}


def has_triton(device: torch.device) -> bool:
    """Whether TRL's kernels run in Triton there."""
    return _use_triton(device)


def scores_function(logps_kernel: str, device: torch.device, kl: bool) -> Callable[..., TokenScores]:
    """[`trl_logps_and_kl`] or [`~hf_delta.ops.token_kl.token_logps_and_kl`], which take and give the same.

    `chunked` is ours everywhere. `trl` is TRL's, but for the KL on a device without Triton: there ours computes it.

    Args:
        logps_kernel (`str`): `trl` or `chunked`.
        device (`torch.device`): Of the head.
        kl (`bool`): Whether the KL is wanted, and not log-probabilities alone.

    Raises:
        `InputError`: another `logps_kernel`.
    """
    if logps_kernel not in LOGPS_KERNELS:
        raise InputError(f"logps_kernel: {logps_kernel!r} is none of {', '.join(LOGPS_KERNELS)}")
    trl_has_it = logps_kernel == "trl" and (has_triton(device) or not kl)
    return trl_logps_and_kl if trl_has_it else token_logps_and_kl


def trl_logps_and_kl(
    hidden: torch.Tensor,
    head_weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    ref_hidden: torch.Tensor | None = None,
    ref_head_weight: torch.Tensor | None = None,
    ref_bias: torch.Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ref_logit_scale: float = 1.0,
    ref_softcap: float | None = None,
    temperature: float = 1.0,
    statistics: bool = False,
) -> TokenScores:
    """[`~hf_delta.ops.token_kl.token_logps_and_kl`] by TRL's kernels, in float32; see there for arguments and shapes."""
    trained = torch.is_grad_enabled()
    head_weight, bias = whole(head_weight, trained), whole(bias, trained)
    own = (head_weight, bias, logit_scale, softcap)
    if ref_head_weight is None:
        reference = own
    else:
        reference = (whole(ref_head_weight, False), whole(ref_bias, False), ref_logit_scale, ref_softcap)
    logps, *found = _scores(hidden, targets, temperature, *own, OPTIONAL_OUTPUTS if statistics else ())
    observed = {name: each.detach() for name, each in zip(OPTIONAL_OUTPUTS, found) if each is not None}
    if ref_hidden is None:
        return TokenScores(logps, **observed)
    with torch.no_grad():
        ref_logps = _scores(ref_hidden, targets, temperature, *reference)[0]
    heads = (hidden, *own[:2], ref_hidden, *reference[:2])
    # 0.0 is KL(teacher || student).
    kl, _ = ChunkedDivergenceFunction.apply(*heads, 0.0, temperature, *own[2:], *reference[2:])
    return TokenScores(logps, ref_logps, kl, **observed)


def _scores(hidden, targets, temperature, weight, bias, logit_scale, softcap, outputs=()) -> tuple:
    with gathered(weight, bias):
        return ChunkedLogProbFunction.apply(
            hidden, weight, bias, targets, temperature, _CHUNKED_LOGPROB_CHUNK_SIZE, softcap, logit_scale, outputs
        )


def head_arguments(model: torch.nn.Module, prefix: str = "") -> dict[str, torch.Tensor | float | None]:
    """What the functions above need to know of a causal language model's head: weight, bias, logit scale and soft-cap.

    TRL reads the same fields of the configuration, inside of `add_fused_lm_head`.

    Args:
        model (`PreTrainedModel` or `PeftModel`): Whose head it is.
        prefix (`str`, *optional*): `ref_` for the head of the reference.
    """
    head, config = model.get_output_embeddings(), model.config.get_text_config()
    return {
        f"{prefix}head_weight": head.weight,
        f"{prefix}bias": head.bias,
        f"{prefix}logit_scale": _logit_scale(config),
        f"{prefix}softcap": getattr(config, "final_logit_softcapping", None),
    }


def _logit_scale(config) -> float:
    # Cohere, Muse Glimmer and Falcon-H1 multiply; None is what models have that inherit the field and do not scale.
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        if (value := getattr(config, name, None)) is not None:
            return value
    scaling = getattr(config, "logits_scaling", None)
    if scaling is None:
        return 1.0
    # Granite and MiniCPM3 divide by what HyperCLOVA X multiplies with.
    return scaling if config.model_type == "hyperclovax" else 1 / scaling
