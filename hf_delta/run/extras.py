"""Packages that some recipes need and that hf_delta does not bring along."""

import importlib.util

from hf_delta._compat.vllm import INSTALL_VLLM, vllm_mismatch
from hf_delta.errors import InputError
from hf_delta.recipe import Recipe


_INSTALL = {
    "vllm": INSTALL_VLLM,
    "bitsandbytes": "pip install 'hf_delta[quantization]', or leave load_in_4bit and load_in_8bit out",
    "liger_kernel": "pip install liger-kernel, or leave use_liger_kernel out",
}


def check_packages(recipe: Recipe) -> None:
    """
    Raises:
        `InputError`: a package that the run needs is missing, or a version that does not work.
    """
    model, training = recipe.model, recipe.training
    needed = {
        "vllm": getattr(training, "use_vllm", False),
        "bitsandbytes": model.load_in_4bit or model.load_in_8bit,
        "liger_kernel": training.use_liger_kernel,
    }
    for package, is_needed in needed.items():
        if is_needed and importlib.util.find_spec(package) is None:
            raise InputError(f"{recipe.source}: {package} is not installed: {_INSTALL[package]}.")
    if needed["vllm"] and (mismatch := vllm_mismatch()):
        raise InputError(f"{recipe.source}: {mismatch}")
