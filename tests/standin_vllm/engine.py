"""The engine: vLLM's `LLM` as far as TRL 1.16 calls it in colocate mode, with a record of every call."""

from dataclasses import dataclass
from types import SimpleNamespace

import torch

from tests.standin_vllm.decoding import Row, decode
from tests.standin_vllm.outputs import RequestOutput
from tests.standin_vllm.sampling import SamplingParams
from tests.standin_vllm.weights import EngineModel


@dataclass
class GenerateCall:
    """One call of `generate`.

    Attributes:
        prompts (`list[list[int]]`): token ids of each request.
        completions (`list[list[list[int]]]`): token ids of the `n` completions of each request.
        params (`SamplingParams`): what was asked for.
        syncs (`int`): how many times the weights had been synchronised before.
    """

    prompts: list[list[int]]
    completions: list[list[list[int]]]
    params: SamplingParams
    syncs: int


class LLM:
    """
    Attributes:
        calls (`list[GenerateCall]`): every call of `generate`.
        syncs (`list[list[str]]`): names of the weights loaded between two resets of the prefix cache, in order.

    Raises:
        `ValueError`: the engine is to have what the stand-in has not.
    """

    def __init__(
        self,
        model: str,
        *,
        tensor_parallel_size: int = 1,
        gpu_memory_utilization: float = 0.9,
        max_model_len: int | None = None,
        max_num_seqs: int | None = None,
        enable_sleep_mode: bool = False,
        model_impl: str = "auto",
        distributed_executor_backend: str | None = None,
        seed: int = 0,
        max_num_batched_tokens: int | None = None,
        logprobs_mode: str = "raw_logprobs",
        quantization: str | None = None,
        trust_remote_code: bool = False,
    ):
        if tensor_parallel_size != 1 or logprobs_mode != "processed_logprobs" or quantization is not None:
            raise ValueError("The stand-in engine has one process, processed_logprobs, and no quantisation.")
        self.model = EngineModel(model)
        self.calls: list[GenerateCall] = []
        self.syncs: list[list[str]] = []
        self._rng = torch.Generator().manual_seed(seed)
        self._can_sleep = enable_sleep_mode
        self._cache_asleep = False
        config, generation_config = self.model.hf.config, self.model.hf.generation_config
        self._max_model_len = max_model_len or config.max_position_embeddings
        self._stop = as_set(config.eos_token_id) | as_set(generation_config.eos_token_id)
        self.llm_engine = SimpleNamespace(
            model_config=SimpleNamespace(max_model_len=self._max_model_len),
            model_executor=SimpleNamespace(
                driver_worker=SimpleNamespace(model_runner=SimpleNamespace(model=self.model))
            ),
        )

    def weights(self) -> dict[str, torch.Tensor]:
        """A copy of the weights that the engine generates with. Not part of vLLM."""
        return {name: parameter.clone() for name, parameter in self.model.hf.named_parameters()}

    def sleep(self, level: int = 1) -> None:
        """Level 1 gives the cache away and keeps the weights elsewhere; level 2 loses both."""
        if not self._can_sleep or level not in (1, 2):
            raise ValueError(f"sleep(level={level}) with enable_sleep_mode={self._can_sleep}.")
        self.model.asleep = self._cache_asleep = True
        if level == 2:
            self.model.discard()

    def wake_up(self, tags: list[str] | None = None) -> None:
        tags = {"weights", "kv_cache"} if tags is None else set(tags)
        if not self._can_sleep or not tags <= {"weights", "kv_cache"}:
            raise ValueError(f"wake_up(tags={sorted(tags)}) with enable_sleep_mode={self._can_sleep}.")
        self.model.asleep &= "weights" not in tags
        self._cache_asleep &= "kv_cache" not in tags

    def reset_prefix_cache(self) -> bool:
        if self.model.loaded:
            self.syncs.append(self.model.loaded)
        self.model.loaded = []
        return True

    def generate(
        self, prompts: list[dict], sampling_params: SamplingParams | None = None, *, use_tqdm: bool = True
    ) -> list[RequestOutput]:
        """
        Raises:
            `RuntimeError`: the engine is asleep, has lost its weights, or has a cache of other weights.
            `ValueError`: a prompt leaves no room for a completion, or comes with more than token ids.
        """
        if self.model.asleep or self._cache_asleep:
            raise RuntimeError("generate while the engine is asleep.")
        if self.model.loaded:
            raise RuntimeError("Weights were loaded, and the prefix cache still holds keys of the old ones.")
        params = sampling_params or SamplingParams()
        requests = [self._token_ids(prompt) for prompt in prompts]
        rows = [
            [Row(min(params.max_tokens, self._max_model_len - len(ids)), self._stop) for _ in range(params.n)]
            for ids in requests
        ]
        repeated = [ids for ids in requests for _ in range(params.n)]
        decode(self.model.hf, repeated, [row for group in rows for row in group], params, self._rng)
        completions = [[row.token_ids for row in group] for group in rows]
        self.calls.append(GenerateCall(requests, completions, params, len(self.syncs)))
        return [
            RequestOutput(
                str(i), None, ids, None, [row.output(j, params.logprobs is not None) for j, row in enumerate(group)]
            )
            for i, (ids, group) in enumerate(zip(requests, rows))
        ]

    def _token_ids(self, prompt: dict) -> list[int]:
        if set(prompt) != {"prompt_token_ids"}:
            raise ValueError(f"A prompt of the stand-in engine is token ids, not {', '.join(prompt)}.")
        ids = list(prompt["prompt_token_ids"])
        if not 0 < len(ids) < self._max_model_len:
            raise ValueError(f"A prompt of {len(ids)} tokens, and the model takes {self._max_model_len} in all.")
        return ids


def as_set(ids: int | list[int] | None) -> set[int]:
    return set() if ids is None else set(ids) if isinstance(ids, list) else {ids}
