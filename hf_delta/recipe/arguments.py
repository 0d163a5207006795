"""Keys of a recipe that are ours: the data, and what happens around training."""

from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass
class DataArguments:
    """
    Where rows come from and what their columns are called. Give `dataset_name` or `train_file`.

    Parameters:
        dataset_name (`str`, *optional*):
            Id of a dataset on the Hugging Face Hub.
        dataset_config (`str`, *optional*):
            Configuration of that dataset.
        dataset_split (`str`, *optional*, defaults to `"train"`):
            Split to train on.
        eval_split (`str`, *optional*):
            Split for the evaluation that `eval_strategy` asks for.
        train_file (`str` or `list[str]`, *optional*):
            Local files to train on: JSON lines, JSON, CSV or Parquet.
        eval_file (`str` or `list[str]`, *optional*):
            Local files for `eval_strategy` and for `evaluate_pass_at`.
        dataset_columns (`dict[str, str]`, *optional*):
            Columns to rename, as `{name here: name in the dataset}`; for example `{prompt: question, answer: target}`.
        prompt_style (`str`, *optional*, defaults to `"as_is"`):
            `"as_is"`, or `"conversational"`, which turns text prompts into a user message (and text in `completion`,
            `completions`, `chosen` and `rejected` into assistant messages), so that the model's chat template is applied.
        system_prompt (`str`, *optional*):
            System message in front of every conversational prompt.
        drop_equal_pairs (`bool`, *optional*, defaults to `False`):
            Leave out rows whose `chosen` and `rejected` are equal, and say how many; they are refused otherwise.
        max_train_rows (`int`, *optional*):
            Train on the first so many rows only.
    """

    dataset_name: str | None = field(default=None, metadata={"help": "Id of a dataset on the Hugging Face Hub."})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of that dataset."})
    dataset_split: str = field(default="train", metadata={"help": "Split to train on."})
    eval_split: str | None = field(
        default=None, metadata={"help": "Split for the evaluation that eval_strategy asks for."}
    )
    train_file: str | list[str] | None = field(
        default=None, metadata={"help": "Local files to train on: JSON lines, JSON, CSV or Parquet."}
    )
    eval_file: str | list[str] | None = field(
        default=None, metadata={"help": "Local files for eval_strategy and for evaluate_pass_at."}
    )
    dataset_columns: dict[str, str] | None = field(
        default=None, metadata={"help": "Columns to rename, as {name here: name in the dataset}."}
    )
    prompt_style: Literal["as_is", "conversational"] = field(
        default="as_is", metadata={"help": "as_is, or conversational to wrap text prompts into a user message."}
    )
    system_prompt: str | None = field(
        default=None, metadata={"help": "System message in front of every conversational prompt."}
    )
    drop_equal_pairs: bool = field(
        default=False, metadata={"help": "Leave out rows whose chosen and rejected are equal; refused otherwise."}
    )
    max_train_rows: int | None = field(default=None, metadata={"help": "Train on the first so many rows only."})

    def __post_init__(self):
        if self.dataset_name is not None and self.train_file is not None:
            raise ValueError("give dataset_name or train_file, not both.")
        if self.eval_split is not None and self.dataset_name is None:
            raise ValueError("eval_split is a split of dataset_name, which is not given.")
        if self.eval_split is not None and self.eval_file is not None:
            raise ValueError("give eval_split or eval_file, not both.")
        if self.system_prompt is not None and self.prompt_style != "conversational":
            raise ValueError("system_prompt needs prompt_style: conversational.")
        if self.max_train_rows is not None and self.max_train_rows < 1:
            raise ValueError(f"max_train_rows must be at least 1, got {self.max_train_rows}.")


@dataclass
class RunArguments:
    """
    What happens around training.

    Parameters:
        playground (`str`, *optional*):
            Directory of a playground, built when it is not there. It gives defaults for `model_name_or_path`,
            `train_file` (`train.jsonl`, `sft.jsonl` or `preference.jsonl`, by trainer; `lists.jsonl` for a list loss and
            `weighted.jsonl` for token weights from columns) and `eval_file`.
        playground_seed (`int`, *optional*, defaults to `0`):
            Seed of the playground.
        playground_task (`str`, *optional*, defaults to `"addition"`):
            Task family of the playground.
        playground_pretrain_steps (`int`, *optional*):
            Pre-training steps of its base model, where they are not the default.
        reward_funcs (`list`, *optional*):
            Reward functions of `trainer: grpo`: names in `trl.rewards`, `playground_reward`, or dotted paths of your own
            functions. A function that is made by another one is written `{name: {argument: value}}`.
        peft_config (`dict`, *optional*):
            `method:`, any PEFT method by name, and the fields of its configuration. Absent: full fine-tuning.
        evaluate_pass_at (`list[int]`, *optional*):
            Evaluate pass@k on `eval_file` before and after training, for these k.
        evaluate_samples (`int`, *optional*):
            Answers per problem in that evaluation; the largest k when absent.
        evaluate_reward (`str` or `dict`, *optional*):
            The function that judges answers in that evaluation (above 0.5 is right), written as in `reward_funcs`; the
            first of `reward_funcs` when absent.
        evaluate_max_new_tokens (`int`, *optional*):
            Tokens that an answer may have in that evaluation; `max_completion_length` of the trainer when absent, or 64.
        resume_from_checkpoint (`bool` or `str`, *optional*, defaults to `False`):
            `True` goes on from the newest complete checkpoint in `output_dir`, or starts when there is none; a path goes
            on from that checkpoint.
        overwrite_output_dir (`bool`, *optional*, defaults to `False`):
            Delete an earlier run of hf_delta in `output_dir` first. Other directories are never deleted.
        base_model_id (`str`, *optional*):
            With `push_to_hub`: id of the base model on the Hub, for what is uploaded. Needed where `model_name_or_path` is a
            directory.
        push_lora (`bool`, *optional*, defaults to `False`):
            With `push_to_hub`: upload the adapter as a plain LoRA too, in the folder `lora/`.
        dry_run (`bool`, *optional*, defaults to `False`):
            Check everything that needs no network, print the plan (parameters, memory, steps, files) and write nothing.
        num_processes (`int`, *optional*):
            With `dry_run`: processes to plan for; those of `accelerate_config`, or of this launch, when absent.
        accelerate_config (`str`, *optional*):
            With `dry_run`: the configuration file that `accelerate launch` will get, or the name of a shipped one.
    """

    playground: str | None = field(
        default=None, metadata={"help": "Directory of a playground (model and data), built when it is not there."}
    )
    playground_seed: int = field(default=0, metadata={"help": "Seed of the playground."})
    playground_task: str = field(default="addition", metadata={"help": "Task family of the playground."})
    playground_pretrain_steps: int | None = field(
        default=None, metadata={"help": "Pre-training steps of its base model, where they are not the default."}
    )
    reward_funcs: list[str | dict[str, dict[str, Any]]] | None = field(
        default=None, metadata={"help": "Names in trl.rewards, playground_reward, or dotted paths."}
    )
    peft_config: dict[str, Any] | None = field(
        default=None, metadata={"help": "method: (any PEFT method by name) and the fields of its configuration."}
    )
    evaluate_pass_at: list[int] | None = field(
        default=None, metadata={"help": "Evaluate pass@k on eval_file before and after training, for these k."}
    )
    evaluate_samples: int | None = field(
        default=None, metadata={"help": "Answers per problem in that evaluation; the largest k when absent."}
    )
    evaluate_reward: str | dict[str, dict[str, Any]] | None = field(
        default=None, metadata={"help": "The function that judges answers; the first of reward_funcs when absent."}
    )
    evaluate_max_new_tokens: int | None = field(
        default=None, metadata={"help": "Tokens that an answer may have in that evaluation."}
    )
    resume_from_checkpoint: bool | str | None = field(
        default=False, metadata={"help": "true: the newest complete checkpoint in output_dir; or a path."}
    )
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Delete an earlier run of hf_delta in output_dir first."}
    )
    base_model_id: str | None = field(
        default=None, metadata={"help": "With push_to_hub: id of the base model on the Hub, where it is local here."}
    )
    push_lora: bool = field(
        default=False, metadata={"help": "With push_to_hub: upload the adapter as a plain LoRA too, in lora/."}
    )
    dry_run: bool = field(default=False, metadata={"help": "Check, print the plan, and write nothing."})
    num_processes: int | None = field(default=None, metadata={"help": "With dry_run: processes to plan for."})
    accelerate_config: str | None = field(
        default=None, metadata={"help": "With dry_run: the configuration that accelerate launch will get."}
    )

    def __post_init__(self):
        for key in ("num_processes", "accelerate_config"):
            if getattr(self, key) is not None and not self.dry_run:
                raise ValueError(
                    f"{key} goes with dry_run alone. It is a setting of `accelerate launch`: give it there, before "
                    "`-m hf_delta.train`."
                )
        if self.evaluate_pass_at is None:
            self._check_no_evaluation()
            return
        ks = self.evaluate_pass_at
        if not ks or min(ks) < 1 or len(set(ks)) < len(ks):
            raise ValueError(f"evaluate_pass_at must list numbers from 1 on, each once, got {ks}.")
        if self.evaluate_max_new_tokens is not None and self.evaluate_max_new_tokens < 1:
            raise ValueError(f"evaluate_max_new_tokens must be at least 1, got {self.evaluate_max_new_tokens}.")
        largest = max(self.evaluate_pass_at)
        self.evaluate_samples = largest if self.evaluate_samples is None else self.evaluate_samples
        if self.evaluate_samples < largest:
            raise ValueError(
                f"evaluate_samples must be at least the largest k, {largest}, got {self.evaluate_samples}."
            )

    def _check_no_evaluation(self) -> None:
        for key in ("evaluate_samples", "evaluate_reward", "evaluate_max_new_tokens"):
            if getattr(self, key) is not None:
                raise ValueError(f"{key} needs evaluate_pass_at.")
