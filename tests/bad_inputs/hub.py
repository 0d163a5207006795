"""Bad pushes: keys, commands and results that cannot go to the Hub, refused before anybody there is asked."""

import json

from tests.bad_inputs.case import command, copied, run
from tests.bad_inputs.checkpoints import manifest
from tests.bad_inputs.commands import ADAPTER, EXPORT, ROWS, adapter, config, thesis, without
from tests.bad_inputs.models import cut
from tests.running import LORA


HUB = {"push_to_hub": True, "hub_model_id": "me/mine", "base_model_id": "me/base"}
PMSS = {"method": "pmss", "r": 4, "target_modules": ["q_proj"]}
PUSH = "push adapter --repo me/mine --base_model_id me/base"


def finished(change=None):
    """A finished run as the directory `out`."""
    return {"out": copied("finished_run", change)}


def text(name, content):
    return lambda path, world: (path / name).write_text(content)


KEYS = [
    run(
        "base-id-without-push",
        "sft",
        {"base_model_id": "me/base"},
        "recipe.yaml: base_model_id needs push_to_hub: true.",
    ),
    run("push-lora-without-push", "grpo", {"push_lora": True}, "recipe.yaml: push_lora needs push_to_hub: true."),
    run(
        "base-id-that-is-a-path",
        "sft",
        {**HUB, "base_model_id": "./model"},
        "base_model_id: ./model is a path here; write the id of the base model on the Hub.",
    ),
    run(
        "base-id-with-spaces",
        "dpo",
        {**HUB, "base_model_id": "my base"},
        "base_model_id: 'my base' is no id of the Hub. Write <owner>/<name> with letters, digits, '-', '_' and '.', at most 96 in all, without '--' and '..'.",
    ),
    run(
        "base-id-that-is-an-address",
        "sft",
        {**HUB, "base_model_id": "https://huggingface.co/me/base"},
        "base_model_id: 'https://huggingface.co/me/base' is no id of the Hub. Write <owner>/<name> with letters, digits, '-', '_' and '.', at most 96 in all, without '--' and '..'.",
    ),
    run(
        "base-id-that-is-empty",
        "sft",
        {**HUB, "base_model_id": ""},
        "base_model_id: '' is no id of the Hub. Write <owner>/<name> with letters, digits, '-', '_' and '.', at most 96 in all, without '--' and '..'.",
    ),
    run(
        "base-id-as-number",
        "sft",
        {**HUB, "base_model_id": 3},
        "recipe.yaml:17: base_model_id must be text or null, got the number 3.",
    ),
    run(
        "hub-id-of-three-parts",
        "grpo",
        {**HUB, "hub_model_id": "me/mine/too"},
        "hub_model_id: 'me/mine/too' is no id of the Hub. Write <owner>/<name> with letters, digits, '-', '_' and '.', at most 96 in all, without '--' and '..'.",
    ),
    run(
        "push-lora-of-a-whole-model",
        "sft",
        {**HUB, "push_lora": True},
        "push_lora: there is no adapter that could be written as a LoRA.",
    ),
    run(
        "push-lora-of-a-lora",
        "dpo",
        {**HUB, "push_lora": True, "peft_config": LORA},
        "push_lora: the adapter is a plain LoRA already; leave it out.",
    ),
    run(
        "push-lora-with-a-trained-head",
        "sft",
        {**HUB, "push_lora": True, "peft_config": {**PMSS, "modules_to_save": ["lm_head"]}},
        "push_lora: modules_to_save: ['lm_head'] cannot be part of a LoRA adapter for vLLM; use the format merged.",
    ),
    run(
        "push-lora-of-prompts",
        "sft",
        {**HUB, "push_lora": True, "peft_config": {"method": "prompt_tuning", "num_virtual_tokens": 3}},
        "push_lora: PROMPT_TUNING changes no weights of the model, so there is nothing to export.",
    ),
    run(
        "push-lora-as-text",
        "sft",
        {**HUB, "push_lora": "yes"},
        "recipe.yaml:18: push_lora must be true or false, got the text 'yes'.",
    ),
    run(
        "push-while-training",
        "sft",
        {**HUB, "hub_strategy": "every_save"},
        "recipe.yaml: hub_strategy: every_save would push while training, with optimizer states and training_args.bin. Write hub_strategy: end, or leave it out; a run that was stopped goes on from its own disk.",
    ),
    run(
        "push-always",
        "grpo",
        {**HUB, "hub_always_push": True},
        "recipe.yaml: hub_always_push would push while training, with optimizer states and training_args.bin. Write hub_strategy: end, or leave it out; a run that was stopped goes on from its own disk.",
    ),
    run(
        "hub-strategy-typo",
        "sft",
        {**HUB, "hub_strategy": "ende"},
        "recipe.yaml:18: hub_strategy is the text 'ende', which it does not take; did you mean 'end'?",
    ),
    run(
        "push-offline",
        "dpo",
        HUB,
        "push_to_hub: HF_HUB_OFFLINE is set, so that nothing can be pushed: unset it.",
        given="`push_to_hub: true`, and `HF_HUB_OFFLINE=1` in the environment",
    ),
]

PUSHES = [
    command(
        "push-nothing",
        "push",
        "the following arguments are required: directory. `hf-delta push --help` says what there is.",
    ),
    command(
        "push-nowhere", "push nowhere", "nowhere is no directory here; give that of a run, an adapter or a model."
    ),
    command(
        "push-file",
        "push rows.jsonl",
        "rows.jsonl is no directory here; give that of a run, an adapter or a model.",
        files=ROWS,
    ),
    command(
        "push-thesis",
        "push mine",
        "mine holds no adapter_config.json and no config.json: there is no result in it.",
        "`hf-delta push` of a directory with something else",
        {"mine": thesis},
    ),
    command(
        "push-two",
        "push adapter adapter",
        "unrecognized arguments: adapter. `hf-delta push --help` says what there is.",
        files=ADAPTER,
    ),
    command(
        "push-option-typo",
        "push adapter --rep me/mine",
        "unrecognized arguments: --rep me/mine. `hf-delta push --help` says what there is.",
        files=ADAPTER,
    ),
    command(
        "push-repo-of-three-parts",
        "push playground/model --repo me/mine/too",
        "--repo: 'me/mine/too' is no id of the Hub. Write <owner>/<name> with letters, digits, '-', '_' and '.', at most 96 in all, without '--' and '..'.",
    ),
    command(
        "push-repo-of-nonsense",
        "push playground/model --repo me--mine",
        "--repo: 'me--mine' is no id of the Hub. Write <owner>/<name> with letters, digits, '-', '_' and '.', at most 96 in all, without '--' and '..'.",
    ),
    command(
        "push-directory-as-repo",
        "push my+adapter --base_model_id me/base",
        "--repo: 'my+adapter' is no id of the Hub. Write <owner>/<name> with letters, digits, '-', '_' and '.', at most 96 in all, without '--' and '..'.",
        "`hf-delta push my+adapter`, whose name no repository can have",
        {"my+adapter": copied("adapter")},
    ),
    command(
        "push-local-base",
        "push adapter --repo me/mine",
        "adapter: playground/model is a local directory, which nobody else can load. Say what the base model is called on the Hub: --base_model_id <owner>/<name>.",
        files=ADAPTER,
    ),
    command(
        "push-run-with-local-base",
        "push out --repo me/mine",
        "out: playground/model is a local directory, which nobody else can load. Say what the base model is called on the Hub: --base_model_id <owner>/<name>.",
        files=finished(),
    ),
    command(
        "push-base-that-is-a-path",
        "push adapter --repo me/mine --base_model_id ./base",
        "base_model_id: ./base is a path here; write the id of the base model on the Hub.",
        files=ADAPTER,
    ),
    command(
        "push-lora-of-a-lora",
        f"{PUSH} --lora",
        "--lora: the adapter is a plain LoRA already; leave it out.",
        files=ADAPTER,
    ),
    command(
        "push-lora-of-a-model",
        "push playground/model --repo me/mine --lora",
        "--lora: there is no adapter that could be written as a LoRA.",
    ),
    command(
        "push-no-weights",
        PUSH,
        "adapter holds no adapter_model*.safetensors: there are no weights in it that could be shared.",
        "`hf-delta push` of an adapter without weights",
        adapter(without("adapter_model.safetensors")),
    ),
    command(
        "push-cut-weights",
        PUSH,
        "adapter/adapter_model.safetensors cannot be read (Error while deserializing header: incomplete metadata, file not fully covered): it is cut short or damaged.",
        "`hf-delta push` of an adapter that is cut off",
        adapter(cut("adapter_model.safetensors", -9)),
    ),
    command(
        "push-config",
        PUSH,
        "adapter/adapter_config.json cannot be read (Unterminated string starting at: line 3 column 3 (char 39)): it is damaged.",
        "`hf-delta push` of an adapter whose `adapter_config.json` is cut off",
        adapter(cut("adapter_config.json", 40)),
    ),
    command(
        "push-config-list",
        PUSH,
        "adapter/adapter_config.json cannot be read: it holds no JSON object.",
        "`hf-delta push` of an adapter whose `adapter_config.json` is a list",
        adapter(text("adapter_config.json", "[]")),
    ),
    command(
        "push-base-as-number",
        "push adapter --repo me/mine",
        "adapter/adapter_config.json is damaged: base_model_name_or_path is 3, and must be text.",
        "`hf-delta push` of an adapter whose base is a number",
        adapter(config(base_model_name_or_path=3)),
    ),
    command(
        "push-unknown-method",
        f"{PUSH} --lora",
        "adapter/adapter_config.json is no configuration that PEFT or hf_delta knows ('LORRA').",
        "`hf-delta push --lora` of a method that nobody knows",
        adapter(config(peft_type="LORRA")),
    ),
    command(
        "push-unfinished",
        "push out --repo me/mine",
        "out holds no adapter_config.json and no config.json: there is no result in it.",
        "`hf-delta push` of a run that did not come to its end",
        {"out": copied("sft_run")},
    ),
    command(
        "push-manifest",
        "push out --repo me/mine",
        "out/run.json cannot be read (JSONDecodeError('Expecting property name enclosed in double quotes: line 1 column 2 (char 1)')): it is damaged. Start in another output_dir.",
        "`hf-delta push` of a run whose `run.json` is no JSON",
        finished(text("run.json", "{")),
    ),
    command(
        "push-manifest-of-lists",
        "push out --repo me/mine",
        "out/run.json cannot be read (TypeError('method and values are no blocks of keys')): it is damaged. Start in another output_dir.",
        "`hf-delta push` of a run whose `run.json` has a list as `values`",
        finished(manifest(values=[])),
    ),
    command(
        "push-repo-as-number",
        "push out",
        "--repo: 3 is no id of the Hub. Write <owner>/<name> with letters, digits, '-', '_' and '.', at most 96 in all, without '--' and '..'.",
        "`hf-delta push` of a run whose `run.json` has a number as `hub_model_id`",
        finished(text("run.json", json.dumps({"format_version": 1, "method": {}, "values": {"hub_model_id": 3}}))),
    ),
    command(
        "push-trainer-state",
        "push out --repo me/mine",
        "out/trainer_state.json cannot be read: it holds no JSON object.",
        "`hf-delta push` of a run whose `trainer_state.json` is a list",
        finished(text("trainer_state.json", "[]")),
    ),
    command(
        "push-offline",
        PUSH,
        "push_to_hub: HF_HUB_OFFLINE is set, so that nothing can be pushed: unset it.",
        "`hf-delta push`, and `HF_HUB_OFFLINE=1` in the environment",
        ADAPTER,
    ),
    command(
        "export-push-nowhere",
        f"{EXPORT} --push_to_hub",
        "argument --push-to-hub/--push_to_hub: expected one argument. `hf-delta export --help` says what there is.",
        files=ADAPTER,
    ),
    command(
        "export-push-local-base",
        f"{EXPORT} --push_to_hub me/mine",
        "adapter: playground/model is a local directory, which nobody else can load. Say what the base model is called on the Hub: --base_model_id <owner>/<name>.",
        files=ADAPTER,
    ),
    command(
        "export-push-merged",
        f"{EXPORT} --push_to_hub me/mine".replace("lora --out", "merged --out"),
        "adapter: playground/model is a local directory, which nobody else can load. Say what the base model is called on the Hub: --base_model_id <owner>/<name>.",
        files=ADAPTER,
    ),
    command(
        "export-push-repo",
        f"{EXPORT} --push_to_hub me/mine/too --base_model_id me/base",
        "--push_to_hub: 'me/mine/too' is no id of the Hub. Write <owner>/<name> with letters, digits, '-', '_' and '.', at most 96 in all, without '--' and '..'.",
        files=ADAPTER,
    ),
    command(
        "export-push-base-path",
        f"{EXPORT} --push_to_hub me/mine --base_model_id playground/model",
        "base_model_id: playground/model is a path here; write the id of the base model on the Hub.",
        files=ADAPTER,
    ),
    command(
        "export-push-no-adapter",
        f"{EXPORT} --push_to_hub me/mine --base_model_id me/base",
        "adapter is no directory here; give that of a run, an adapter or a model.",
        f"`hf-delta {EXPORT} --push_to_hub me/mine` without a directory `adapter`",
    ),
    command(
        "export-push-offline",
        f"{EXPORT} --push_to_hub me/mine --base_model_id me/base",
        "push_to_hub: HF_HUB_OFFLINE is set, so that nothing can be pushed: unset it.",
        f"`hf-delta {EXPORT} --push_to_hub me/mine`, and `HF_HUB_OFFLINE=1` in the environment",
        ADAPTER,
    ),
    command(
        "export-base-id-without-push",
        f"{EXPORT} --base_model_id me/base",
        "--base_model_id needs --push_to_hub.",
        files=ADAPTER,
    ),
    command("export-private-without-push", f"{EXPORT} --private", "--private needs --push_to_hub.", files=ADAPTER),
    command(
        "export-revision-without-push", f"{EXPORT} --revision v1", "--revision needs --push_to_hub.", files=ADAPTER
    ),
]
