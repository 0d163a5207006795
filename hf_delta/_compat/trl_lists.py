"""Lists of completions, tokenised as TRL's `DPOTrainer` tokenises pairs.

`tests/preference/test_trl_lists.py` compares what comes out with TRL's own, and signatures with those of the installed TRL.
"""

import json
from typing import Any

from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase, ProcessorMixin
from transformers.utils import logging
from trl import DPOConfig
from trl.data_utils import _tokenize, common_prefix_length, is_conversational
from trl.trainer.utils import global_then_local_main_first


logger = logging.get_logger(__name__)

# Parameters of TRL's functions, as of TRL 1.16.
SEAMS: dict[Any, tuple[str, ...]] = {
    _tokenize: ("processing_class", "input", "apply_chat_template_kwargs"),
    common_prefix_length: ("ids", "other_ids"),
    is_conversational: ("example",),
    global_then_local_main_first: (),
}


def prepare_lists(
    dataset: Dataset | IterableDataset,
    processing_class: PreTrainedTokenizerBase | ProcessorMixin,
    tokenizer: PreTrainedTokenizerBase,
    args: DPOConfig,
    dataset_name: str,
) -> Dataset | IterableDataset:
    """Add `prompt_ids` (`list[int]`) and `completion_ids` (`K` of `list[int]`) to rows with `prompt` and `completions`.

    The end token is added to texts that lack it, messages go through the chat template with the row's `tools` and
    `chat_template_kwargs`, and the completions start where the prompt alone and the prompt with any of them first differ.
    With `truncation_mode="keep_start"`, rows whose prompt fills `max_length` are left out, since nothing would be left of any
    completion; with `"keep_end"` something is left of each.

    Args:
        dataset (`Dataset` or `IterableDataset`): Other columns stay.
        processing_class (`PreTrainedTokenizerBase` or `ProcessorMixin`): The trainer's.
        tokenizer (`PreTrainedTokenizerBase`): The same, or the processor's.
        args (`DPOConfig`): `max_length`, `truncation_mode` and `dataset_num_proc` are read.
        dataset_name (`str`): For the progress bars, `train` or `eval`.
    """
    mapped = isinstance(dataset, Dataset)

    def options(doing: str) -> dict[str, Any]:
        # What streams do not know.
        return {"num_proc": args.dataset_num_proc, "desc": f"{doing} {dataset_name} dataset"} if mapped else {}

    with global_then_local_main_first():
        kwargs = {"processing_class": processing_class, "eos_token": tokenizer.eos_token}
        dataset = dataset.map(_tokenize_list, fn_kwargs=kwargs, **options("Tokenizing"))
        if args.max_length is not None and args.truncation_mode == "keep_start":
            limit = {"max_length": args.max_length}
            dataset = dataset.filter(
                _leaves_room, fn_kwargs=limit, **options("Dropping fully truncated examples from")
            )
    return dataset


def _tokenize_list(example: dict[str, Any], processing_class: Any, eos_token: str) -> dict[str, list]:
    prompt, completions = example["prompt"], example["completions"]
    tools = example.get("tools")
    options = {}
    if is_conversational({"prompt": prompt}):
        options = {
            "tools": json.loads(tools) if isinstance(tools, str) else tools,
            **(example.get("chat_template_kwargs") or {}),
        }
        prompt_ids = _tokenize(processing_class, prompt, add_generation_prompt=True, **options)["input_ids"]
    else:
        completions = [text if text.endswith(eos_token) else text + eos_token for text in completions]
        prompt_ids = _tokenize(processing_class, prompt)["input_ids"]
    sequences = [
        _tokenize(processing_class, prompt + completion, **options)["input_ids"] for completion in completions
    ]
    start = min(common_prefix_length(prompt_ids, sequence) for sequence in sequences)
    if start < len(prompt_ids):
        logger.warning_once(
            "Tokenised alone, a prompt ends differently from how it goes on with a completion: the model is trained without "
            f"the end {processing_class.decode(prompt_ids[start:])!r} that it sees before it generates. End prompts where a "
            "token ends, or use a chat template that shows prompts alone as it shows them before a completion. Other rows "
            "are likely to have this too."
        )
    return {"prompt_ids": prompt_ids[:start], "completion_ids": [sequence[start:] for sequence in sequences]}


def _leaves_room(example: dict[str, Any], max_length: int) -> bool:
    return len(example["prompt_ids"]) < max_length
