"""TRL's client of a vLLM server, with the engine behind it in place of HTTP and NCCL."""

from collections.abc import Iterator
from functools import partial

import torch

from tests.standin_vllm.engine import LLM
from tests.standin_vllm.sampling import SamplingParams


class Client:
    """The methods of TRL's `VLLMClient` that its trainers call; `serves` is the model that the server was started with."""

    def __init__(self, serves: str, base_url: str, group_port: int = 51216, connection_timeout: float = 0.0):
        self.llm = LLM(serves, logprobs_mode="processed_logprobs")

    def init_communicator(self, device: torch.device) -> None:
        pass

    def get_server_info(self) -> dict:
        return {"model_config": {"logprobs_mode": "processed_logprobs"}}

    def update_named_params(
        self, metadata: list[tuple[str, str, list[int]]], named_params: Iterator[tuple[str, torch.Tensor]]
    ) -> None:
        """
        Raises:
            `ValueError`: what comes is not what was announced.
        """
        weights = [(name, weight.detach().clone()) for name, weight in named_params]
        found = [(name, str(weight.dtype).removeprefix("torch."), list(weight.shape)) for name, weight in weights]
        if found != metadata:
            raise ValueError(f"Weights were announced as {metadata} and came as {found}.")
        self.llm.model.load_weights(weights)

    def reset_prefix_cache(self) -> None:
        self.llm.reset_prefix_cache()

    def generate(
        self,
        prompts: list[list[int]],
        features: list[dict | None] | None = None,
        structured_outputs_regex: str | None = None,
        generation_kwargs: dict | None = None,
        **params,
    ) -> dict[str, list]:
        if features is not None or structured_outputs_regex is not None:
            raise ValueError("The stand-in engine has no images and no structured outputs.")
        params = SamplingParams(**{**params, **(generation_kwargs or {})})
        requests = self.llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
        outputs = [output for request in requests for output in request.outputs]
        by_rank = partial(sorted, key=lambda item: item[1].rank)
        tables = [[by_rank(table.items()) for table in output.logprobs] for output in outputs]
        return {
            "prompt_ids": [request.prompt_token_ids for request in requests],
            "completion_ids": [output.token_ids for output in outputs],
            "logprobs": [[[found.logprob for _, found in place] for place in table] for table in tables],
            "logprob_token_ids": [[[token for token, _ in place] for place in table] for table in tables],
        }
