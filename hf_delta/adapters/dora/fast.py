"""Fast DoRA on and off."""

from collections.abc import Iterator
from contextlib import contextmanager

from hf_delta._compat.dora import install, installed, uninstall
from hf_delta.adapters.dora import layer, merging
from hf_delta.adapters.dora.cache import NORMS
from hf_delta.errors import InputError


REPLACEMENTS = {
    "DoraLinearLayer.forward": layer.dora_forward,
    "DoraLinearLayer.update_layer": layer.dora_update_layer,
    "DoraLinearLayer.train": layer.dora_train,
    "Linear.forward": layer.linear_forward,
    "Linear.merge": merging.merge,
    "Linear.unmerge": merging.unmerge,
    "Linear4bit.merge": merging.merge,
    "Linear4bit.unmerge": merging.unmerge,
    "Linear8bitLt.merge": merging.merge,
    "Linear8bitLt.unmerge": merging.unmerge,
    "BaseTunerLayer.enable_adapters": merging.enable_adapters,
    "BaseTuner.merge_and_unload": merging.merge_and_unload,
    "GenerationMixin.generate": layer.generate,
}


def enable_fast_dora(cache: bool = True) -> None:
    """Compute PEFT's DoRA (`LoraConfig(use_dora=True)`) without a tensor of the size of the weight; checkpoints stay PEFT's.

    Works on models that exist already and on those made later, in this process. Called again, it only sets `cache`.

    Args:
        cache (`bool`, *optional*, defaults to `True`):
            Whether the norm of the weight may be used again while nothing can have changed it: between two steps of a
            `torch.optim` optimizer, and inside `generate`. With `False` it is computed in every forward.

    Raises:
        `ImportError`: the installed PEFT is not the one whose methods are replaced.
    """
    NORMS.start(enabled=cache)
    install(REPLACEMENTS)


def disable_fast_dora() -> None:
    """Put PEFT's own methods back; nothing happens if they are in place.

    Raises:
        `InputError`: a model has adapters merged, whose original weights only fast DoRA can put back.
    """
    if merging.any_merged():
        raise InputError("A model has DoRA adapters merged: call its unmerge_adapter() before disable_fast_dora().")
    uninstall()
    NORMS.stop()


@contextmanager
def fast_dora(cache: bool = True) -> Iterator[None]:
    """Context with fast DoRA on; off again afterwards if it was off before."""
    was_on = installed()
    enable_fast_dora(cache)
    try:
        yield
    finally:
        if not was_on:
            disable_fast_dora()
