"""What a causal language model's forward gives besides TRL's fused head: token scores against a reference, and masks.

TRL's `add_fused_lm_head` wraps `model.forward`; [`add_token_head`] wraps it once more, so that everything that has
parameters runs inside of the forward pass that DDP, FSDP and DeepSpeed wrap.
"""

import functools
import types
from collections.abc import Callable
from dataclasses import dataclass

import torch
from peft.utils.other import ModulesToSaveWrapper
from torch.distributed.tensor import DTensor
from transformers.utils import ModelOutput

from hf_delta._compat.kernels import head_arguments, scores_function


# Child of the model whose forward is wrapped: the network that makes masks of the reference's hidden states.
MASK_NETWORK = "hfd_token_mask"


@dataclass
class TokenOutput(ModelOutput):
    """
    As [`~trl.trainer.utils.FusedCausalLMOutput`], and what a reference adds; zero where the label is `-100`.

    Args:
        log_probs (`torch.Tensor` of shape `(B, T)`): Log-probabilities of the labels, nats, `T` one less than there are labels.
        ref_log_probs (`torch.Tensor` of shape `(B, T)`, *optional*): Those of the reference.
        kl (`torch.Tensor` of shape `(B, T)`, *optional*): `KL(pi_ref || pi)`, nats.
        entropy, log_sum_sq_probs, mean_logits, is_top1 (`torch.Tensor` of shape `(B, T)`, *optional*): As TRL's.
        masks (`tuple[torch.Tensor, torch.Tensor]`, *optional*): Of reward and KL, `(n,)` each, one for every label that counts.
        hidden_states (`tuple[torch.Tensor, ...]`, *optional*): Of the backbone, `(B, T + 1, d)` each, the embeddings first.
    """

    log_probs: torch.Tensor | None = None
    ref_log_probs: torch.Tensor | None = None
    kl: torch.Tensor | None = None
    entropy: torch.Tensor | None = None
    log_sum_sq_probs: torch.Tensor | None = None
    mean_logits: torch.Tensor | None = None
    is_top1: torch.Tensor | None = None
    masks: tuple[torch.Tensor, torch.Tensor] | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None


def add_token_head(
    model: torch.nn.Module, logps_kernel: str = "trl", reference_head: Callable[[], dict] | None = None
) -> None:
    """Wrap the forward of a model that has TRL's fused head; without the keywords below it stays what it was.

    With `fused_lm_head=True`:
        `backbone_only=True` gives the outputs of the backbone, hidden states and no head;
        `ref_hidden (B, T + 1, d)`, last hidden states of the reference, gives a [`TokenOutput`] with `ref_log_probs` and `kl`;
        `mask_inputs (n, L, d)`, hidden states of the reference at labels that count, gives `masks`;
        `output_hidden_states=True` gives them.

    Args:
        model (`PreTrainedModel`): The base model, below PEFT's wrapper.
        logps_kernel (`str`, *optional*, defaults to `"trl"`): See [`~hf_delta._compat.kernels.scores_function`].
        reference_head (`Callable`, *optional*): Gives the head of the reference, as `head_arguments(..., "ref_")`, where it is
            not the model's own.
    """
    fused_forward = model.forward

    @functools.wraps(type(model).forward)
    def forward(
        self, *args, fused_lm_head=False, backbone_only=False, ref_hidden=None, mask_inputs=None, labels=None, **kwargs
    ):
        more = backbone_only or ref_hidden is not None or kwargs.get("output_hidden_states")
        own = fused_lm_head and (more or logps_kernel == "chunked")
        masks = None if mask_inputs is None else getattr(self, MASK_NETWORK)(mask_inputs)
        if not own:
            if labels is not None:
                kwargs["labels"] = labels
            found = fused_forward(*args, fused_lm_head=fused_lm_head, **kwargs)
            return found if masks is None else TokenOutput(**_shared(found), masks=masks)
        # As in TRL's: the backbone is looked up on each call, since FSDP and PEFT replace it.
        backbone = self.base_model(*args, **(kwargs | {"use_cache": False}))
        if backbone_only:
            return backbone
        heads = head_arguments(self)
        if ref_hidden is not None and reference_head is not None:
            heads |= _alike(reference_head(), heads["head_weight"])
        scores = _scores(backbone.last_hidden_state, labels, ref_hidden, heads, logps_kernel, self.training)
        return TokenOutput(**scores, masks=masks, hidden_states=backbone.hidden_states)

    model.forward = types.MethodType(forward, model)


def _alike(heads: dict, own: torch.Tensor) -> dict:
    """The head of a reference that FSDP2 has sharded, in the dtype in which it gives the policy's inside of its forward."""
    return {name: value.to(own.dtype) if isinstance(value, DTensor) else value for name, value in heads.items()}


def _scores(hidden, labels, ref_hidden, heads: dict, logps_kernel: str, training: bool) -> dict[str, torch.Tensor]:
    device = heads["head_weight"].device
    hidden, labels = hidden[:, :-1].to(device), labels[:, 1:].to(device)
    if ref_hidden is not None:
        # Prompt learning puts virtual tokens before the policy's, and none before the reference's.
        ref_hidden = ref_hidden[:, :-1].to(device)
        hidden, labels = hidden[:, -ref_hidden.shape[1] :], labels[:, -ref_hidden.shape[1] :]
    # In training a pass without gradients is the reference's, and nobody asks how sure it is.
    statistics = torch.is_grad_enabled() or not training
    function = scores_function(logps_kernel, device, kl=ref_hidden is not None)
    counts = labels != -100
    rows = None if ref_hidden is None else ref_hidden[counts]
    found = function(hidden[counts], targets=labels[counts], ref_hidden=rows, statistics=statistics, **heads)
    # Scattered and not indexed: without a single label the zeros still hang on the model.
    spread = {
        name: None if value is None else value.new_zeros(counts.shape).masked_scatter(counts, value)
        for name, value in found._asdict().items()
    }
    return {"log_probs": spread.pop("logps"), "ref_log_probs": spread.pop("ref_logps"), **spread}


def _shared(found: ModelOutput) -> dict:
    names = TokenOutput.__dataclass_fields__
    return {name: value for name, value in found.items() if name in names}


def head_of_adapter(model: torch.nn.Module, adapter: str | None) -> dict | None:
    """The head of a PEFT model's reference, as `head_arguments(..., "ref_")`, if the adapter in training has one of its own.

    Args:
        model (`PeftModel`): Policy.
        adapter (`str`, *optional*): The reference's adapter; `None` is the base model.
    """
    head = model.get_output_embeddings()
    if not isinstance(head, ModulesToSaveWrapper):
        return None
    own = head.modules_to_save[adapter] if adapter in head.modules_to_save else head.original_module
    return head_arguments(model, "ref_") | {"ref_head_weight": own.weight, "ref_bias": own.bias}
