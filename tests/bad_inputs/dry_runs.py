"""Bad plans and launches: what a dry run finds without weights, and settings of launches in recipes."""

from tests.bad_inputs.case import copied, run, slow
from tests.bad_inputs.checkpoints import thesis
from tests.bad_inputs.hub import HUB
from tests.bad_inputs.models import config, model, text


ON_GPU = {"use_cpu": False}


def dry(id, trainer, changes, says, *flags, **kwargs):
    return run(f"dry-run-{id}", trainer, changes, says, "--dry_run", *flags, **kwargs)


def launch(id, content, given, says, **changes):
    """A dry run for a configuration of accelerate."""
    return run(
        f"launch-{id}",
        "sft",
        changes,
        says,
        "--dry_run",
        "--accelerate_config",
        "launch.yaml",
        given=f"`--accelerate_config` with {given}",
        files={"launch.yaml": content},
    )


def shapes(id, content, given, says):
    """A dry run with a file of shapes."""
    return dry(
        f"shapes-{id}",
        "sft",
        {"model_name_or_path": "me/large"},
        says,
        given=f"`configs/me--large.json` {given}",
        files={"configs/me--large.json": content},
    )


PLANS = [
    run("dry-run-typo", "sft", {}, "--dry_rn: unknown key 'dry_rn'; did you mean 'dry_run'?", "--dry_rn"),
    dry("maybe", "sft", {}, "--dry_run: dry_run must be true or false, got the text 'maybe'.", "maybe"),
    dry("no-rows", "sft", {"train_file": "rows.jsonl"}, "train_file: rows.jsonl does not exist."),
    dry("no-rows", "dpo", {"train_file": "rows.jsonl"}, "train_file: rows.jsonl does not exist."),
    dry("no-rows", "grpo", {"train_file": "rows.jsonl"}, "train_file: rows.jsonl does not exist."),
    dry(
        "no-model",
        "sft",
        {"model_name_or_path": "nowhere"},
        "model_name_or_path: nowhere is no directory here and no model of the Hub (We couldn't connect to 'https://huggingface.co' to load the files, and couldn't find them in the cached files.). For a dry run without network, write its shapes to configs/nowhere.json, as in its config.json: model_type, hidden_size, num_hidden_layers, ...",
    ),
    dry(
        "no-reward",
        "grpo",
        {"reward_funcs": ["playground_rewrd"]},
        "reward_funcs: no reward function 'playground_rewrd'; did you mean 'playground_reward'?",
    ),
    dry(
        "rows-without-answer",
        "grpo",
        {"train_file": "rows.jsonl"},
        "The reward function playground_reward needs the column 'answer', and the dataset has prompt, prompt_id. Map one to it: dataset_columns: {answer: <its name in the dataset>}.",
        files={"rows.jsonl": [{"prompt": "1+1:"}]},
    ),
    dry(
        "no-vllm",
        "grpo",
        {"use_vllm": True},
        "recipe.yaml: vllm is not installed: pip install -c constraints-vllm.txt 'hf_delta[vllm]', or write use_vllm: false.",
    ),
    dry(
        "that-does-not-divide",
        "grpo",
        {"per_device_train_batch_size": 2},
        "recipe.yaml: generation_batch_size (2) must be divisible by num_generations (4).",
        "--num_processes",
        "1",
    ),
    dry(
        "too-few-rows",
        "grpo",
        {"max_train_rows": 3, "per_device_train_batch_size": 16},
        "recipe.yaml: the data has 3 rows, and a generation batch takes 4 prompts (16 rollouts, num_generations 4): an epoch would be empty. Lower per_device_train_batch_size or steps_per_generation, or add rows.",
    ),
    dry(
        "no-such-layer",
        "sft",
        {"peft_config": {"method": "lora", "target_modules": ["query"]}},
        "peft_config: target_modules: there is no layer 'query' in the model. Its linear layers are down_proj, gate_proj, k_proj, lm_head, o_proj, q_proj, up_proj, v_proj.",
    ),
    dry(
        "norm",
        "dpo",
        {"peft_config": {"method": "pmss", "target_modules": ["input_layernorm"]}},
        "peft_config: model.layers.0.input_layernorm: a Qwen3RMSNorm cannot be adapted: name linear layers in target_modules (nn.Linear, Conv1D or quantised ones) and leave this one out with exclude_modules; modules_to_save trains others whole.",
    ),
    dry(
        "rank",
        "sft",
        {"peft_config": {"method": "pmss", "r": 65, "target_modules": ["q_proj"]}},
        "peft_config: model.layers.0.self_attn.q_proj: r is 65, and a 64x64 weight has no 65 rows and columns to choose: write r: 64 or less, or leave this layer out with exclude_modules.",
    ),
    dry(
        "rank-of-lora",
        "sft",
        {**HUB, "push_lora": True, "peft_config": {"method": "dora", "r": 513, "target_modules": ["gate_proj"]}},
        "recipe.yaml: push_lora: rank 513 is above 512, the largest that vLLM takes: give a rank up to 512, which leaves out the smallest singular values, or use the format merged.",
    ),
    dry(
        "over-a-run",
        "sft",
        {},
        "output_dir: out holds another run. Go on with it: --resume. Keep it: --output_dir <another directory>. Delete it: --overwrite_output_dir true.",
        given="`--dry_run`, and `output_dir` holds another run",
        files={"out": copied("sft_run")},
    ),
    dry(
        "resume",
        "sft",
        {},
        "output_dir: out holds no run to resume (chapter-1). Choose another output_dir.",
        "--resume",
        given="`--dry_run --resume`, and `output_dir` holds no run",
        files={"out": thesis},
    ),
    dry(
        "heads",
        "sft",
        {"model_name_or_path": "model"},
        "model_name_or_path: no causal language model can be built of the configuration (qwen3; ZeroDivisionError: integer division or modulo by zero).",
        given="`--dry_run` of a model with `num_attention_heads: 0`",
        files=model(config(num_attention_heads=0)),
    ),
    dry(
        "no-layers",
        "sft",
        {"model_name_or_path": "model"},
        "qwen3: its blocks were not found; a plan cannot be made for it.",
        given="`--dry_run` of a model with `num_hidden_layers: 0`",
        files=model(config(num_hidden_layers=0, layer_types=[])),
    ),
    dry(
        "broken-config",
        "sft",
        {"model_name_or_path": "model"},
        "model_name_or_path: model has no usable config.json (It looks like the config file at 'model/config.json' is not a valid JSON file.).",
        given="`--dry_run` of a model whose `config.json` is no JSON",
        files=model(text("config.json", "{")),
    ),
    shapes(
        "broken",
        "{",
        "is no JSON",
        "configs/me--large.json: no configuration of a model (Expecting property name enclosed in double quotes: line 1 column 2 (char 1)).",
    ),
    shapes(
        "without-type",
        "{}",
        "has no `model_type`",
        "configs/me--large.json: no configuration of a model (it has no model_type).",
    ),
    shapes(
        "of-unknown-type",
        '{"model_type": "lamma"}',
        "has `model_type: lamma`",
        "configs/me--large.json: no configuration of a model (Unrecognized model identifier: lamma).",
    ),
    shapes(
        "negative",
        '{"model_type": "llama", "hidden_size": -4}',
        "has `hidden_size: -4`",
        "configs/me--large.json: no configuration of a model (Class validation error for validator 'validate_architecture': ValueError: The hidden size (-4) is not a multiple of the number of attention heads (32)).",
    ),
    shapes(
        "of-no-language-model",
        '{"model_type": "vit"}',
        "has `model_type: vit`, which makes no text",
        "model_name_or_path: no causal language model can be built of the configuration (vit; ValueError: Unrecognized configuration class <class 'transformers.models.vit.configuration_vit.ViTConfig'> for this kind of AutoModel: AutoModelForCausalLM).",
    ),
]

LAUNCHES = [
    dry(
        "no-processes", "sft", {}, "--num_processes: num_processes must be at least 1, got 0.", "--num_processes", "0"
    ),
    dry(
        "processes-as-text",
        "grpo",
        {},
        "--num_processes: num_processes must be a whole number or null, got the text 'two'.",
        "--num_processes",
        "two",
    ),
    dry(
        "half-a-process",
        "sft",
        {},
        "--num_processes: num_processes must be a whole number or null, got the number 2.5.",
        "--num_processes",
        "2.5",
    ),
    dry(
        "processes-typo",
        "dpo",
        {},
        "--num_proceses: unknown key 'num_proceses'; did you mean 'num_processes'?",
        "--num_proceses",
        "2",
    ),
    run(
        "processes-without-dry-run",
        "dpo",
        {},
        "recipe.yaml: num_processes goes with dry_run alone. It is a setting of `accelerate launch`: give it there, before `-m hf_delta.train`.",
        "--num_processes",
        "2",
    ),
    run(
        "launch-without-dry-run",
        "sft",
        {},
        "recipe.yaml: accelerate_config goes with dry_run alone. It is a setting of `accelerate launch`: give it there, before `-m hf_delta.train`.",
        "--accelerate_config",
        "ddp",
    ),
    dry(
        "launch-typo",
        "sft",
        {},
        "--accelerate_config: dpp is no file and none of cpu, ddp, fsdp2, single, zero2, zero3.",
        "--accelerate_config",
        "dpp",
    ),
    dry(
        "launch-as-number",
        "sft",
        {},
        "--accelerate_config: 3 is no file and none of cpu, ddp, fsdp2, single, zero2, zero3.",
        "--accelerate_config",
        "3",
    ),
    dry(
        "launch-without-name",
        "sft",
        {},
        "--accelerate_config: accelerate_config must be text or null, got true.",
        "--accelerate_config",
    ),
    dry(
        "launch-that-is-a-directory",
        "sft",
        {},
        "--accelerate_config: playground is no file and none of cpu, ddp, fsdp2, single, zero2, zero3.",
        "--accelerate_config",
        "playground",
    ),
    dry(
        "sharding-on-cpu",
        "sft",
        {},
        "…/fsdp2.yaml: FSDP2 is for GPUs, and the recipe says use_cpu: true.",
        "--accelerate_config",
        "fsdp2",
    ),
    dry(
        "deepspeed",
        "sft",
        ON_GPU,
        "…/zero3.yaml: deepspeed is not installed: pip install 'hf_delta[deepspeed]', or take another configuration of accelerate.",
        "--accelerate_config",
        "zero3",
    ),
    dry(
        "evaluation-of-shards",
        "grpo",
        {"evaluate_pass_at": [1], **ON_GPU},
        "evaluate_pass_at needs the whole model in each process, which FSDP and DeepSpeed shard. Leave it out, and run `hf-delta eval` before and after.",
        "--accelerate_config",
        "fsdp2",
    ),
    launch(
        "of-tpus",
        "distributed_type: TPU\n",
        "`distributed_type: TPU`",
        "--accelerate_config: launch.yaml has distributed_type TPU; a plan can be made for NO, MULTI_GPU, MULTI_CPU, FSDP, DEEPSPEED.",
    ),
    launch(
        "empty",
        "",
        "an empty file",
        "--accelerate_config: launch.yaml has distributed_type None; a plan can be made for NO, MULTI_GPU, MULTI_CPU, FSDP, DEEPSPEED.",
    ),
    launch(
        "list",
        "- FSDP\n",
        "a list",
        "--accelerate_config: launch.yaml has distributed_type None; a plan can be made for NO, MULTI_GPU, MULTI_CPU, FSDP, DEEPSPEED.",
    ),
    launch(
        "broken",
        "a: [\n",
        "a bracket that is not closed",
        "--accelerate_config: launch.yaml:2 is not YAML: expected the node content, but found '<stream end>'.",
    ),
    launch(
        "not-utf-8",
        b"\xff\xfe\x00",
        "bytes that are no text",
        "--accelerate_config: launch.yaml is not UTF-8 text (invalid start byte).",
    ),
    launch(
        "deep",
        "[" * 5000,
        "5000 nested lists",
        "--accelerate_config: launch.yaml is not YAML: maximum recursion depth exceeded while calling a Python object.",
    ),
    launch(
        "processes",
        "distributed_type: MULTI_GPU\nnum_processes: many\n",
        "`num_processes: many`",
        "--accelerate_config: launch.yaml has num_processes 'many'; write a whole number from 1 up.",
    ),
    launch(
        "deepspeed",
        "distributed_type: DEEPSPEED\ndeepspeed_config: 3\n",
        "`deepspeed_config: 3`",
        "--accelerate_config: launch.yaml has deepspeed_config 3; write a block of keys.",
        **ON_GPU,
    ),
    run(
        "fsdp-in-one-process",
        "sft",
        {"fsdp": "full_shard"},
        "recipe.yaml: Using fsdp only works in distributed training. That takes several processes: start them with `accelerate launch`, or leave it out.",
    ),
    run("fsdp-as-bool", "sft", {"fsdp": True}, "recipe.yaml:15: fsdp must be text or null, got true."),
    run("fsdp-typo", "sft", {"fsdp": "fully_shard"}, "recipe.yaml: Unknown `fsdp` option: fully_shard"),
    run(
        "fsdp-file",
        "sft",
        {"fsdp": "full_shard", "fsdp_config": "fsdp.json"},
        "recipe.yaml: fsdp.json cannot be read (No such file or directory).",
    ),
    run(
        "fsdp-launch-file",
        "sft",
        {"fsdp": "full_shard", "config_file": "fsdp2.yaml"},
        "recipe.yaml:16: config_file is not a key here. It is a setting of `accelerate launch`: give it there, before `-m hf_delta.train`.",
    ),
    run(
        "deepspeed-block",
        "sft",
        {"deepspeed": {"zero_optimization": {"stage": 3}}},
        "recipe.yaml:15: deepspeed is not installed: pip install 'hf_delta[deepspeed]', or leave it out.",
    ),
    run(
        "tensor-parallel",
        "sft",
        {"parallelism_config": {"tp_size": 2}},
        "recipe.yaml: Error initializing torch.distributed using env:// rendezvous: environment variable RANK expected, but not set. That takes several processes: start them with `accelerate launch`, or leave it out.",
    ),
    run(
        "backend-typo",
        "sft",
        {"ddp_backend": "ncll"},
        "recipe.yaml:15: ddp_backend is the text 'ncll', which it does not take; did you mean 'nccl' or 'cncl'?",
    ),
    run(
        "backend-in-one-process",
        "sft",
        {"ddp_backend": "nccl"},
        "recipe.yaml: Default process group has not been initialized, please make sure to call init_process_group. That takes several processes: start them with `accelerate launch`, or leave it out.",
    ),
    run(
        "accelerator-file",
        "sft",
        {"accelerator_config": "accelerator.json"},
        "recipe.yaml: accelerator.json cannot be read (No such file or directory).",
    ),
]

_LONG = {"sft-dry-run-shapes-of-no-language-model", "sft-launch-deep", "sft-tensor-parallel"}
PLANS = slow(PLANS, but=[case.id for case in PLANS if case.id not in _LONG])
LAUNCHES = slow(LAUNCHES, but=[case.id for case in LAUNCHES if case.id not in _LONG])
