"""DoRA of PEFT with a factored norm, computed once per optimizer step where that is known to be right."""

from hf_delta.adapters.dora.cache import reuse_dora_norms
from hf_delta.adapters.dora.fast import disable_fast_dora, enable_fast_dora, fast_dora


__all__ = ["disable_fast_dora", "enable_fast_dora", "fast_dora", "reuse_dora_norms"]
