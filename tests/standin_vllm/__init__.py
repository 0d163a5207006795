"""A stand-in for vLLM: the part of its surface that TRL uses, on CPU, strict where vLLM is or should be.

```python
with standin_vllm():
    trainer = DeltaGRPOTrainer(..., args=DeltaGRPOConfig(use_vllm=True, ...))
    trainer.train()
    engine = trainer.vllm_generation.llm  # records every call
```

With `vllm_mode="server"` it is `standin_vllm(serves=path)`, and the engine is `trainer.vllm_generation.vllm_client.llm`.

It shows which weights and prompts reach the engine, in which order, and whether the log-probabilities fit the trained
model. It says nothing of vLLM's kernels, memory, tensor parallelism, HTTP or NCCL, or its own names for fused weights.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from unittest.mock import patch

from trl.generation import vllm_generation

from tests.standin_vllm.engine import LLM, GenerateCall
from tests.standin_vllm.outputs import CompletionOutput, Logprob, RequestOutput
from tests.standin_vllm.sampling import SamplingParams, StructuredOutputsParams
from tests.standin_vllm.server import Client


__all__ = [
    "LLM",
    "Client",
    "CompletionOutput",
    "GenerateCall",
    "Logprob",
    "RequestOutput",
    "SamplingParams",
    "StructuredOutputsParams",
    "standin_vllm",
]


@contextmanager
def standin_vllm(serves: str | None = None) -> Iterator[None]:
    """For one trainer, built and trained inside: TRL's generation backend finds this engine in place of vLLM.

    One module of TRL imports vLLM for generation, and only if it is installed, so replacing the names there is enough,
    with or without a real vLLM, and leaves `sys.modules` alone. TRL also writes `RANK`, `LOCAL_RANK`, `WORLD_SIZE` and an
    address to the environment, which the next trainer would take for a launch; they are gone at the end.
    """
    names = {
        "is_vllm_available": lambda *args, **kwargs: True,
        "LLM": LLM,
        "RequestOutput": RequestOutput,
        "SamplingParams": SamplingParams,
        "StructuredOutputsParams": StructuredOutputsParams,
        "VLLMClient": partial(Client, serves),
    }
    with patch.dict(os.environ), patch.multiple(vllm_generation, create=True, **names):
        yield
