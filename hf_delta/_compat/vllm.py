"""The releases of vLLM that TRL supports."""

import importlib.metadata

from packaging.version import Version


# First and last, as of TRL 1.16, which warns of others and goes on.
SUPPORTED_VLLM = ("0.22.0", "0.31.0")
INSTALL_VLLM = "pip install -c constraints-vllm.txt 'hf_delta[vllm]', or write use_vllm: false"


def vllm_mismatch(installed: str | None = None) -> str | None:
    """What to say if the vLLM that is installed is not one that TRL supports; `None` if it is, or there is none."""
    try:
        installed = installed or importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        return None
    first, last = SUPPORTED_VLLM
    # Without "+cu129" and the like, which would count as newer than the release.
    if Version(first) <= Version(Version(installed).base_version) <= Version(last):
        return None
    return f"vllm {installed} is installed, and TRL 1.16 supports {first} to {last}: {INSTALL_VLLM}."
