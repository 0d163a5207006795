"""The tuner: puts adapted layers into a model."""

import logging
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from peft.utils import (
    TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING,
    get_quantization_kwargs,
    resolve_quantization_backend,
)
from torch import nn
from tqdm.auto import tqdm
from transformers.pytorch_utils import Conv1D

from hf_delta._compat.bitsandbytes import declare_dense
from hf_delta._compat.peft import TunerHooks
from hf_delta.adapters.base.config import DeltaAdapterConfig
from hf_delta.adapters.base.layer import DeltaLinear
from hf_delta.errors import InputError
from hf_delta.ops.gather import is_sharded


logger = logging.getLogger(__name__)

# Seconds after which a bar shows.
PATIENCE = 2


class DeltaModel(TunerHooks):
    """Base of the tuners; a method gives `prefix`, which is `"hfd_<method>_"`, and `tuner_layer_cls`."""

    tuner_layer_cls: ClassVar[type[DeltaLinear]]
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Put an adapter into every target, with a bar if what is derived from the weights takes long."""
        # Without weights nothing is derived from them.
        hidden = int(os.environ.get("LOCAL_RANK", "0")) != 0 or next(model.parameters()).is_meta
        with tqdm(desc=f"Adapter {adapter_name}", unit="layer", delay=PATIENCE, leave=False, disable=hidden) as bar:
            self.bar = bar
            try:
                super().inject_adapter(model, adapter_name, *args, **kwargs)
            finally:
                del self.bar
        _warn_of_fused_experts(model)

    def adapt(self, config: DeltaAdapterConfig, adapter_name: str, module: nn.Module, key: str) -> nn.Module:
        """
        Raises:
            `InputError`: the module is of no kind that can be adapted, or the adapter does not fit its size.
        """
        if self.bar.total is None:
            # Counted here, because PEFT has written the names of the targets into the configuration by now.
            names = [name for name, _ in self.model.named_modules() if name]
            self.bar.total = sum(bool(check_target_module_exists(config, name)) for name in names)
        try:
            if isinstance(module, self.tuner_layer_cls):
                module.update_layer(adapter_name, config)
            else:
                _check_kind(module.get_base_layer() if isinstance(module, BaseTunerLayer) else module)
                module = self.tuner_layer_cls(module, adapter_name, config, **get_quantization_kwargs(self))
        except InputError as error:
            raise InputError(f"{key}: {error}") from error
        module.path = key
        self.bar.update()
        return module

    @contextmanager
    def mixed_batch(self, adapter_names: list[str], beams: int) -> Iterator[None]:
        """Context in which row `n` of a batch has adapter `adapter_names[n]`, or none for `"__base__"`.

        Raises:
            `ValueError`: the model is in training mode, or there is no adapter of a name.
        """
        if self.training:
            raise ValueError(
                "Cannot pass `adapter_names` when the model is in training mode. Call model.eval() first."
            )
        layers = self.adapted_layers()
        known = {name for layer in layers for name in layer.adapters}
        if unknown := set(adapter_names) - known - {"__base__"}:
            raise ValueError(
                f"Trying to infer with non-existing adapter(s): {', '.join(sorted(unknown))}. "
                f"There are: {', '.join(sorted(known))}."
            )
        for layer in layers:
            layer.mixed_adapters = (adapter_names, beams)
        try:
            yield
        finally:
            for layer in layers:
                layer.mixed_adapters = None

    def merge_adapter(self, *args: Any, **kwargs: Any) -> None:
        """
        Raises:
            `InputError`: a sharded weight is tied to another one, which merging would change with it.
        """
        self._check_tied_shards()
        super().merge_adapter(*args, **kwargs)

    def merge_and_unload(self, *args: Any, **kwargs: Any) -> nn.Module:
        """PEFT's; of a quantised model, the layers that had an adapter become dense, and its configuration says so.

        Raises:
            `InputError`: as [`merge_adapter`].
        """
        self._check_tied_shards()
        model = super().merge_and_unload(*args, **kwargs)
        declare_dense(model)
        return model

    def _check_tied_shards(self) -> None:
        for layer in self.adapted_layers():
            layer.into_shards()
        holders = Counter(id(parameter) for _, parameter in self.model.named_parameters(remove_duplicate=False))
        for layer in self.adapted_layers():
            weight = layer.get_base_layer().weight
            if is_sharded(weight) and holders[id(weight)] > 1:
                raise InputError(
                    f"{layer.path}: its weight is sharded and tied to that of another module, which merging would change "
                    "too. Save the adapter, and merge it with hf-delta export --format merged."
                )

    @classmethod
    def check_state(cls, model: nn.Module, adapter_name: str, state: dict[str, torch.Tensor]) -> None:
        """Have every layer check this adapter again before its next use, now that saved values come in."""
        for module in model.modules():
            if isinstance(module, cls.tuner_layer_cls):
                module.unchecked.add(adapter_name)

    def adapted_layers(self) -> list[DeltaLinear]:
        return [module for module in self.model.modules() if isinstance(module, self.tuner_layer_cls)]


def _warn_of_fused_experts(model: nn.Module) -> None:
    fused = [
        name for name, parameter in model.named_parameters() if parameter.dim() == 3 and ".experts." in f".{name}"
    ]
    if fused:
        logger.warning(
            "Experts of a mixture that are kept in one tensor are no linear layers and get no adapter: %s and %d more. "
            "PEFT's LoRA can adapt them.",
            fused[0],
            len(fused) - 1,
        )


def _check_kind(module: nn.Module) -> None:
    kinds = (nn.Linear, Conv1D)
    # The output projection of nn.MultiheadAttention is read, not called: an adapter on it would be ignored.
    read_only = type(module).__name__ == "NonDynamicallyQuantizableLinear"
    if read_only or not (isinstance(module, kinds) or resolve_quantization_backend(module) is not None):
        raise InputError(
            f"a {type(module).__name__} cannot be adapted: name linear layers in target_modules (nn.Linear, Conv1D or "
            "quantised ones) and leave this one out with exclude_modules; modules_to_save trains others whole."
        )
