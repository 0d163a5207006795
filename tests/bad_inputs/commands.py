"""Bad command lines: words that are missing or unknown, numbers out of range, files that are not there or in the way."""

import json

import torch
from safetensors.torch import load_file, save_file

from tests.bad_inputs.case import command, copied, slow
from tests.bad_inputs.models import cut, drop_a_layer
from tests.bad_inputs.models import tensors as tensors_of_model


GOOD = [{"prompt": "1+1:", "answer": "2", "level": "add1"}, {"prompt": "1+2:", "answer": "3", "level": "add1"}]
EVAL = "eval --model playground/model --data rows.jsonl --out report.json"
EXPORT = "export --adapter adapter --format lora --out lora"
PAIRS = "pairs --strong adapter --weak playground/model --prompts rows.jsonl --out pairs.jsonl --max-new-tokens 4"
ROWS = {"rows.jsonl": GOOD}
ADAPTER = {"adapter": copied("adapter")}
TWO = {**ROWS, **ADAPTER}
LOG = {"global_step": 2, "log_history": [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 0.5}]}


def adapter(change, name="adapter"):
    return {name: copied("adapter", change)}


def config(**changes):
    """Keys of `adapter_config.json`, changed; `None` removes them."""

    def change(path, world):
        content = {**json.loads((path / "adapter_config.json").read_text()), **changes}
        (path / "adapter_config.json").write_text(json.dumps({k: v for k, v in content.items() if v is not None}))

    return change


def tensors(edit):
    def change(path, world):
        content = {name: edit(tensor) for name, tensor in load_file(path / "adapter_model.safetensors").items()}
        save_file(content, path / "adapter_model.safetensors", metadata={"format": "pt"})

    return change


def pickled(path, world):
    (path / "adapter_model.safetensors").unlink()
    (path / "adapter_model.bin").write_bytes(b"\x80\x04")


def without(*names):
    return lambda path, world: [(path / name).unlink() for name in names]


def thesis(path, world):
    path.mkdir()
    (path / "chapter-1").write_text("It was a dark and stormy night.")


WORDS = [
    command(
        "no-command",
        "",
        "the following arguments are required: COMMAND. `hf-delta --help` says what there is.",
        "`hf-delta` alone",
    ),
    command(
        "unknown-command",
        "train recipe.yaml",
        "argument COMMAND: invalid choice: 'train' (choose from 'run', 'recipes', 'keys', 'playground', 'eval', 'export', 'pairs', 'push', 'plot'). `hf-delta --help` says what there is.",
    ),
    command(
        "unknown-option",
        "--verbose run quickstart",
        "unrecognized arguments: --verbose. `hf-delta run --help` says what there is.",
    ),
    command(
        "recipes-with-a-word",
        "recipes rl",
        "unrecognized arguments: rl. `hf-delta recipes --help` says what there is.",
    ),
    command(
        "keys-without-trainer",
        "keys",
        "the following arguments are required: trainer. `hf-delta keys --help` says what there is.",
    ),
    command(
        "keys-typo", "keys gropo", "gropo: no such file, and no recipe of that name. Did you mean rl/prompt_gdro?"
    ),
    command(
        "keys-of-a-bad-recipe",
        "keys recipe.yaml",
        "recipe.yaml: trainer is missing; write `trainer: sft | dpo | grpo`.",
        "`hf-delta keys` of a recipe without trainer",
        {"recipe.yaml": "max_steps: 3\n"},
    ),
    command(
        "playground-without-out",
        "playground",
        "the following arguments are required: --out. `hf-delta playground --help` says what there is.",
    ),
    command(
        "playground-seed-text",
        "playground --out p --seed one",
        "argument --seed: invalid int value: 'one'. `hf-delta playground --help` says what there is.",
    ),
    command(
        "playground-seed-negative", "playground --out p --seed -1", "playground: seed must lie in [0, 2**32), got -1."
    ),
    command(
        "playground-task",
        "playground --out p --task subtraction",
        "There is no playground task 'subtraction'. Use one of: addition, faulty_table; or a path: package.module.Class.",
    ),
    command(
        "playground-own-task",
        "playground --out p --task my_tasks.Mine",
        "task: my_tasks.Mine: cannot import my_tasks (No module named 'my_tasks').",
    ),
    command(
        "playground-no-task",
        "playground --out p --task json.dumps",
        "task: json.dumps is not a subclass of hf_delta.playground.Task with a method `sample`.",
    ),
    command(
        "playground-in-the-way",
        "playground --out mine",
        "mine holds something other than a playground: it has no playground.json. Delete it, or build the playground elsewhere.",
        "`hf-delta playground --out mine`, which holds something else",
        {"mine": thesis},
    ),
    command(
        "playground-file",
        "playground --out rows.jsonl",
        "playground: rows.jsonl is a file. Name another directory.",
        "`hf-delta playground --out rows.jsonl`, which is a file",
        ROWS,
    ),
    command(
        "playground-link",
        "playground --out loop",
        "playground: loop cannot be written: it is a link to what is not there.",
        "`hf-delta playground --out loop`, a link to itself",
        {"loop": lambda path, world: path.symlink_to("loop")},
    ),
    command(
        "playground-below-file",
        "playground --out rows.jsonl/p",
        "playground: rows.jsonl/p cannot be written: rows.jsonl is no directory that you may write to.",
        "`hf-delta playground --out rows.jsonl/p` below a file",
        ROWS,
    ),
]

EVALUATIONS = [
    command(
        "eval-missing-weight",
        EVAL.replace("playground/model", "model"),
        "The weights in model lack model.layers.0.mlp.down_proj.weight, which would be drawn at random. Save or download the model again.",
        "`hf-delta eval` of a model whose weights lack a layer",
        {**ROWS, "model": copied("model", tensors_of_model(drop_a_layer))},
    ),
    command(
        "eval-nothing",
        "eval",
        "the following arguments are required: --model, --data. `hf-delta eval --help` says what there is.",
    ),
    command(
        "eval-no-data",
        "eval --model playground/model",
        "the following arguments are required: --data. `hf-delta eval --help` says what there is.",
    ),
    command(
        "eval-option-typo",
        f"{EVAL} --sample 4",
        "unrecognized arguments: --sample 4. `hf-delta eval --help` says what there is.",
        files=ROWS,
    ),
    command(
        "eval-k-text",
        f"{EVAL} --k one",
        "argument --k: invalid int value: 'one'. `hf-delta eval --help` says what there is.",
        files=ROWS,
    ),
    command("eval-k-zero", f"{EVAL} --k 0", "k must be at least 1, got 0.", files=ROWS),
    command("eval-k-negative", f"{EVAL} --k -1", "k must be at least 1, got -1.", files=ROWS),
    command("eval-k-twice", f"{EVAL} --k 1 1", "k: name at least one k and none twice, got 1, 1.", files=ROWS),
    command(
        "eval-k-none",
        f"{EVAL} --k",
        "argument --k: expected at least one argument. `hf-delta eval --help` says what there is.",
        files=ROWS,
    ),
    command(
        "eval-fewer-samples",
        f"{EVAL} --k 8 --samples 4",
        "pass@8 cannot be estimated from 4 samples per problem: raise samples, or leave that k out.",
        files=ROWS,
    ),
    command("eval-no-samples", f"{EVAL} --samples 0", "samples must be at least 1, got 0.", files=ROWS),
    command(
        "eval-cold", f"{EVAL} --temperature -1", "temperature must be a finite number from 0 up, got -1.0.", files=ROWS
    ),
    command(
        "eval-nan", f"{EVAL} --temperature nan", "temperature must be a finite number from 0 up, got nan.", files=ROWS
    ),
    command(
        "eval-infinite",
        f"{EVAL} --temperature inf",
        "temperature must be a finite number from 0 up, got inf.",
        files=ROWS,
    ),
    command(
        "eval-greedy-samples",
        f"{EVAL} --temperature 0",
        "temperature 0.0 with 8 samples: use above 0, or 0 with one sample.",
        files=ROWS,
    ),
    command("eval-no-tokens", f"{EVAL} --max-new-tokens 0", "max_new_tokens must be at least 1, got 0.", files=ROWS),
    command("eval-no-batch", f"{EVAL} --batch-size 0", "batch_size must be at least 1, got 0.", files=ROWS),
    command("eval-seed-negative", f"{EVAL} --seed -1", "seed must lie in [0, 2**63), got -1.", files=ROWS),
    command(
        "eval-seed-huge",
        f"{EVAL} --seed {10**20}",
        "seed must lie in [0, 2**63), got 100000000000000000000.",
        files=ROWS,
    ),
    command(
        "eval-device",
        f"{EVAL} --device gpu",
        "The model does not go to device 'gpu' (…). Write cpu, cuda or cuda:<number>.",
        files=ROWS,
    ),
    command(
        "eval-device-that-is-not-there",
        f"{EVAL} --device cuda:7",
        "The model does not go to device 'cuda:7' (…). Write cpu, cuda or cuda:<number>.",
        files=ROWS,
    ),
    command(
        "eval-reward",
        f"{EVAL} --reward playground_rewrd",
        "--reward: no reward function 'playground_rewrd'; did you mean 'playground_reward'?",
        files=ROWS,
    ),
    command(
        "eval-reward-file",
        f"{EVAL} --reward my_rewards.py",
        "--reward: my_rewards.py: cannot import my_rewards (No module named 'my_rewards').",
        files=ROWS,
    ),
    command(
        "eval-no-model",
        EVAL.replace("playground/model", "nowhere"),
        "No tokenizer could be loaded from nowhere (no such directory here; as a hub name: We couldn't connect to 'https://huggingface.co' to load the files, and couldn't find them in the cached files.). If nowhere stands in an adapter_config.json, give the base as the model and that directory as its adapter.",
        files=ROWS,
    ),
    command(
        "eval-no-rows-file",
        EVAL,
        "Evaluation data rows.jsonl cannot be read ([Errno 2] No such file or directory: 'rows.jsonl'). Give a JSON lines file.",
        f"`hf-delta {EVAL}` without a file `rows.jsonl`",
    ),
    command(
        "eval-rows-directory",
        EVAL.replace("rows.jsonl", "playground"),
        "Evaluation data playground cannot be read ([Errno 21] Is a directory: 'playground'). Give a JSON lines file.",
    ),
    command(
        "eval-empty",
        EVAL,
        "rows.jsonl holds no rows: there is nothing to evaluate.",
        "`hf-delta eval` of an empty file",
        {"rows.jsonl": ""},
    ),
    command(
        "eval-broken-row",
        EVAL,
        "rows.jsonl, row 2: not JSON (Expecting ':' delimiter: line 1 column 10 (char 9)). Each line is one JSON object.",
        "`hf-delta eval` of a broken row 2",
        {"rows.jsonl": '{"prompt": "1", "answer": "2"}\n{"prompt"\n'},
    ),
    command(
        "eval-nan-row",
        EVAL,
        "rows.jsonl, row 1: not JSON (NaN is no number in JSON). Each line is one JSON object.",
        "`hf-delta eval` of NaN in row 1",
        {"rows.jsonl": '{"prompt": "1", "answer": NaN}\n'},
    ),
    command(
        "eval-deep-row",
        EVAL,
        "rows.jsonl, row 1: not JSON (maximum recursion depth exceeded while decoding a JSON array from a unicode string). Each line is one JSON object.",
        "`hf-delta eval` of 100000 nested lists",
        {"rows.jsonl": '{"prompt": "1", "answer": ' + "[" * 100000 + "]" * 100000 + "}\n"},
    ),
    command(
        "eval-list-row",
        EVAL,
        "rows.jsonl, row 1: a list where a JSON object should be.",
        "`hf-delta eval` of a list in row 1",
        {"rows.jsonl": "[1]\n"},
    ),
    command(
        "eval-no-answer",
        EVAL,
        "rows.jsonl, row 1: `answer` is missing.",
        "`hf-delta eval` of a row without answer",
        {"rows.jsonl": [{"prompt": "1+1:"}]},
    ),
    command(
        "eval-number-prompt",
        EVAL,
        "rows.jsonl, row 1: `prompt` must be a string or a list of messages with role and content.",
        "`hf-delta eval` of a number as prompt",
        {"rows.jsonl": [{"prompt": 11, "answer": "2"}]},
    ),
    command(
        "eval-half-levels",
        EVAL,
        "rows.jsonl, row 3: no `level`, but other rows have one.",
        "`hf-delta eval` of rows with and without level",
        {"rows.jsonl": [*GOOD, {"prompt": "2+2:", "answer": "4"}]},
    ),
    command(
        "eval-id-twice",
        EVAL,
        "rows.jsonl, row 2: prompt_id 'a' is that of row 1 too; make them unique or leave the column out.",
        "`hf-delta eval` of rows with one `prompt_id`",
        {"rows.jsonl": [{**row, "prompt_id": "a"} for row in GOOD]},
    ),
    command(
        "eval-surrogate",
        EVAL,
        "rows.jsonl, row 1: half of a surrogate pair, which is no text ('utf-8' codec can't encode character '\\ud800' in position 2: surrogates not allowed).",
        "`hf-delta eval` of half a surrogate pair",
        {"rows.jsonl": '{"prompt": "1\\ud800", "answer": "2"}\n'},
    ),
    command(
        "eval-report-exists",
        EVAL,
        "report.json exists: give another --out, or --overwrite.",
        "`hf-delta eval --out report.json`, which exists",
        {**ROWS, "report.json": "{}"},
    ),
    command(
        "eval-report-directory",
        f"{EVAL} --overwrite",
        "--out: report.json is a directory; write the name of a file.",
        "`hf-delta eval --out report.json --overwrite`, which is a directory",
        {**ROWS, "report.json": thesis},
    ),
    command(
        "eval-report-below-file",
        EVAL.replace("report.json", "rows.jsonl/report.json"),
        "--out: rows.jsonl/report.json cannot be written: rows.jsonl is no directory that you may write to.",
        files=ROWS,
    ),
    command(
        "eval-report-of-the-hub",
        "eval --model some/model --data rows.jsonl",
        "--out: some/model is no directory here; say where the report is to go.",
        files=ROWS,
    ),
    command(
        "eval-no-adapter",
        f"{EVAL} --adapter playground/model",
        "playground/model is no PEFT adapter: it has no adapter_config.json.",
        files=ROWS,
    ),
    command(
        "eval-two-adapters",
        EVAL.replace("playground/model", "adapter") + " --adapter adapter",
        "adapter and adapter are both adapters; give the base model and one adapter.",
        files=TWO,
    ),
    command(
        "eval-adapter-without-base",
        EVAL.replace("playground/model", "adapter"),
        "adapter/adapter_config.json names no base model: give the base as the model and adapter as its adapter.",
        "`hf-delta eval` of an adapter that names no base",
        {**ROWS, **adapter(config(base_model_name_or_path=None))},
    ),
    command(
        "eval-adapter-of-another-base",
        f"{EVAL} --adapter adapter",
        "The adapter in adapter does not load onto playground/model (size mismatch for base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight: copying a param with shape torch.Size([4, 64]) from checkpoint, the shape in current model is torch.Size([8, 64])). It is damaged, or of another base model.",
        "`hf-delta eval` of an adapter of another rank than its weights",
        {**ROWS, **adapter(config(r=8))},
    ),
    command(
        "eval-adapter-cut",
        f"{EVAL} --adapter adapter",
        "The adapter in adapter does not load onto playground/model (Error while deserializing header: incomplete metadata, file not fully covered). It is damaged, or of another base model.",
        "`hf-delta eval` of an adapter that is cut off",
        {**ROWS, **adapter(cut("adapter_model.safetensors", -9))},
    ),
    command(
        "eval-adapter-config",
        EVAL.replace("playground/model", "adapter"),
        "adapter/adapter_config.json cannot be read (AttributeError(\"'list' object has no attribute 'get'\")): it is damaged.",
        "`hf-delta eval` of an adapter whose `adapter_config.json` is a list",
        {**ROWS, **adapter(lambda path, world: (path / "adapter_config.json").write_text("[]"))},
    ),
    command(
        "eval-adapter-config-number",
        EVAL.replace("playground/model", "adapter"),
        "adapter/adapter_config.json names no base model: give the base as the model and adapter as its adapter.",
        "`hf-delta eval` of an adapter whose base is a number",
        {**ROWS, **adapter(config(base_model_name_or_path=3))},
    ),
]

PLOTS = [
    command(
        "plot-huge-value",
        "plot run",
        "Nothing to plot in run: looked for logged values in trainer_state.json there and in its checkpoint-*, and for eval_before.json and eval_after.json.",
        "`hf-delta plot` of a loss of 400 digits",
        {"run/trainer_state.json": '{"log_history": [{"step": 1, "loss": 1' + "0" * 400 + "}]}"},
    ),
    command(
        "plot-nothing",
        "plot",
        "the following arguments are required: run_dir. `hf-delta plot --help` says what there is.",
    ),
    command(
        "plot-nowhere", "plot nowhere", "Nothing to plot in nowhere: it is no directory. Give the output_dir of a run."
    ),
    command(
        "plot-file",
        "plot rows.jsonl",
        "Nothing to plot in rows.jsonl: it is no directory. Give the output_dir of a run.",
        files=ROWS,
    ),
    command(
        "plot-empty",
        "plot mine",
        "Nothing to plot in mine: looked for logged values in trainer_state.json there and in its checkpoint-*, and for eval_before.json and eval_after.json.",
        "`hf-delta plot` of a directory without a run",
        {"mine": thesis},
    ),
    command(
        "plot-format",
        "plot run --out curves.gif",
        "Cannot draw curves.gif: the name must end in .png, .pdf or .svg.",
        files={"run/trainer_state.json": LOG},
    ),
    command(
        "plot-no-format",
        "plot run --out curves",
        "Cannot draw curves: the name must end in .png, .pdf or .svg.",
        files={"run/trainer_state.json": LOG},
    ),
    command(
        "plot-directory",
        "plot run --out curves.png",
        "--out: curves.png is a directory; write the name of a file.",
        "`hf-delta plot --out curves.png`, which is a directory",
        {"run/trainer_state.json": LOG, "curves.png": thesis},
    ),
    command(
        "plot-below-file",
        "plot run --out run/trainer_state.json/curves.png",
        "--out: run/trainer_state.json/curves.png cannot be written: run/trainer_state.json is no directory that you may write to.",
        files={"run/trainer_state.json": LOG},
    ),
    command(
        "plot-broken-log",
        "plot run",
        "Nothing to plot in run: looked for logged values in trainer_state.json there and in its checkpoint-*, and for eval_before.json and eval_after.json.",
        "`hf-delta plot` of a `trainer_state.json` that is cut off",
        {"run/trainer_state.json": '{"global_step"'},
    ),
    command(
        "plot-log-list",
        "plot run",
        "Nothing to plot in run: looked for logged values in trainer_state.json there and in its checkpoint-*, and for eval_before.json and eval_after.json.",
        "`hf-delta plot` of a `trainer_state.json` that is a list",
        {"run/trainer_state.json": "[]"},
    ),
    command(
        "plot-log-of-nothing",
        "plot run",
        "Nothing to plot in run: looked for logged values in trainer_state.json there and in its checkpoint-*, and for eval_before.json and eval_after.json.",
        "`hf-delta plot` of a log that is null",
        {"run/trainer_state.json": '{"global_step": 2, "log_history": null}'},
    ),
    command(
        "plot-log-of-text",
        "plot run",
        "Nothing to plot in run: looked for logged values in trainer_state.json there and in its checkpoint-*, and for eval_before.json and eval_after.json.",
        "`hf-delta plot` of a log of texts",
        {"run/trainer_state.json": '{"global_step": 2, "log_history": ["loss"]}'},
    ),
    command(
        "plot-step-of-text",
        "plot run",
        "Nothing to plot in run: looked for logged values in trainer_state.json there and in its checkpoint-*, and for eval_before.json and eval_after.json.",
        "`hf-delta plot` of a step that is a text",
        {"run/trainer_state.json": '{"global_step": 2, "log_history": [{"step": "one", "loss": 1.0}]}'},
    ),
    command(
        "plot-report",
        "plot run",
        "The evaluation report run/eval_before.json cannot be read (Expecting property name enclosed in double quotes: line 1 column 2 (char 1)): remove it, or evaluate again.",
        "`hf-delta plot` of a damaged report",
        {"run/eval_before.json": "{"},
    ),
    command(
        "plot-foreign-report",
        "plot run",
        "run/eval_after.json is not an evaluation report of hf_delta.",
        "`hf-delta plot` of a report of something else",
        {"run/eval_after.json": "{}"},
    ),
    command(
        "plot-newer-report",
        "plot run",
        "run/eval_after.json is in report format 2, and this hf_delta reads format 1: evaluate again.",
        "`hf-delta plot` of a report in a newer format",
        {"run/eval_after.json": {"format": "hf_delta.evaluation", "version": 2}},
    ),
    command(
        "plot-token-weights",
        "plot run",
        "run/token_weights.json cannot be read (Expecting property name enclosed in double quotes: line 1 column 2 (char 1)). Move it out of the directory to draw the rest.",
        "`hf-delta plot` of damaged token weights",
        {"run/trainer_state.json": LOG, "run/token_weights.json": "{"},
    ),
    command(
        "plot-newer-token-weights",
        "plot run",
        "run/token_weights.json has format version 2, and this hf_delta reads 1: update hf_delta. Move it out of the directory to draw the rest.",
        "`hf-delta plot` of token weights in a newer format",
        {"run/trainer_state.json": LOG, "run/token_weights.json": {"format": "hf_delta.token_weights", "version": 2}},
    ),
]

EXPORTS = [
    command(
        "export-base-as-number",
        EXPORT,
        "adapter does not say what its base model is: name it with --base.",
        "`hf-delta export` of an adapter whose base is a number",
        adapter(config(base_model_name_or_path=3)),
    ),
    command(
        "export-pattern",
        EXPORT,
        "The adapter was made for another base model than playground/model, or its file is damaged (unterminated character set at position …).",
        "`hf-delta export` of an adapter whose `rank_pattern` is no regular expression",
        adapter(config(rank_pattern={"[": 3})),
    ),
    command(
        "export-nothing",
        "export",
        "the following arguments are required: --adapter, --format, --out. `hf-delta export --help` says what there is.",
    ),
    command(
        "export-format",
        EXPORT.replace("lora --out", "gguf --out"),
        "argument --format: invalid choice: 'gguf' (choose from 'lora', 'merged'). `hf-delta export --help` says what there is.",
        files=ADAPTER,
    ),
    command(
        "export-no-adapter",
        EXPORT,
        "adapter: adapter is no directory; give the directory that save_pretrained or a trainer wrote.",
        f"`hf-delta {EXPORT}` without a directory `adapter`",
    ),
    command(
        "export-model",
        EXPORT.replace("--adapter adapter", "--adapter playground/model"),
        "adapter: playground/model holds no adapter_config.json; give the directory that save_pretrained or a trainer wrote.",
    ),
    command(
        "export-in-the-way",
        EXPORT,
        "lora is not empty: give another directory, or empty it. Nothing was written.",
        "`hf-delta export --out lora`, which is not empty",
        {**ADAPTER, "lora": thesis},
    ),
    command(
        "export-file",
        EXPORT,
        "out: lora cannot be written: lora is no directory that you may write to.",
        "`hf-delta export --out lora`, which is a file",
        {**ADAPTER, "lora": "mine"},
    ),
    command(
        "export-rank-text",
        f"{EXPORT} --rank four",
        "argument --rank: invalid int value: 'four'. `hf-delta export --help` says what there is.",
        files=ADAPTER,
    ),
    command("export-rank-zero", f"{EXPORT} --rank 0", "rank is 0: write a whole number from 1 to 512.", files=ADAPTER),
    command(
        "export-rank-negative", f"{EXPORT} --rank -4", "rank is -4: write a whole number from 1 to 512.", files=ADAPTER
    ),
    command(
        "export-rank-above-vllm",
        f"{EXPORT} --rank 1000",
        "rank 1000 is above 512, the largest that vLLM takes: give a rank up to 512, which leaves out the smallest singular values, or use the format merged.",
        files=ADAPTER,
    ),
    command(
        "export-error-negative",
        f"{EXPORT} --max-error -1",
        "max_error is -1.0: write a number from 0 up.",
        files=ADAPTER,
    ),
    command(
        "export-error-nan", f"{EXPORT} --max-error nan", "max_error is nan: write a number from 0 up.", files=ADAPTER
    ),
    command(
        "export-error-exceeded",
        f"{EXPORT} --rank 1 --max-error 1e-9",
        "rank 1 leaves out more than 1e-09 of the change in 14 of 14 modules, most in …: give a larger rank, or use the format merged, which is exact.",
        files=ADAPTER,
    ),
    command(
        "export-rank-of-merged",
        f"{EXPORT} --rank 8".replace("lora --out", "merged --out"),
        "--rank goes with --format lora; merging leaves nothing out.",
        files=ADAPTER,
    ),
    command(
        "export-dtype",
        f"{EXPORT} --dtype float8",
        "argument --dtype: invalid choice: 'float8' (choose from 'float32', 'bfloat16', 'float16'). `hf-delta export --help` says what there is.",
        files=ADAPTER,
    ),
    command(
        "export-quant-type-alone",
        f"{EXPORT} --bnb-4bit-quant-type fp4",
        "--bnb-4bit-quant-type and --use-bnb-nested-quant go with --load-in-4bit.",
        files=ADAPTER,
    ),
    command(
        "export-two-quantisations",
        f"{EXPORT} --load-in-4bit --load-in-8bit",
        "a base model is loaded in 4 bits or in 8 bits, not both.",
        files=ADAPTER,
    ),
    command(
        "export-no-base",
        f"{EXPORT} --base ./nowhere",
        "base model: there is no directory ./nowhere; say where it is with --base.",
        files=ADAPTER,
    ),
    command(
        "export-empty-base",
        f"{EXPORT} --base mine",
        "base model: mine holds no config.json, so it is no model.",
        "`hf-delta export --base mine`, which holds no model",
        {**ADAPTER, "mine": thesis},
    ),
    command(
        "export-base-that-moved",
        EXPORT,
        "base model: there is no directory /models/gone; say where it is with --base.",
        "`hf-delta export` of an adapter whose base is not where it was",
        adapter(config(base_model_name_or_path="/models/gone")),
    ),
    command(
        "export-base-unnamed",
        EXPORT,
        "adapter does not say what its base model is: name it with --base.",
        "`hf-delta export` of an adapter that names no base",
        adapter(config(base_model_name_or_path=None)),
    ),
    command(
        "export-another-base",
        f"{EXPORT} --base other",
        "The adapter was made for another base model than other, or its file is damaged (size mismatch for base_model.model.model.layers.0.mlp.gate_proj.lora_B.default.weight: copying a param with shape torch.Size([256, 4]) from checkpoint, the shape in current model is torch.Size([128, 4])).",
        "`hf-delta export` of an adapter onto another base",
        {**ADAPTER, "other": copied("model", lambda path, world: narrower(path))},
    ),
    command(
        "export-method",
        EXPORT,
        "adapter/adapter_config.json: neither PEFT nor hf_delta knows the method 'LORRA'.",
        "`hf-delta export` of a method that nobody knows",
        adapter(config(peft_type="LORRA")),
    ),
    command(
        "export-config",
        EXPORT,
        "adapter/adapter_config.json cannot be read: Unterminated string starting at: line 3 column 3 (char 39).",
        "`hf-delta export` of an `adapter_config.json` that is cut off",
        adapter(cut("adapter_config.json", 40)),
    ),
    command(
        "export-config-rank",
        EXPORT,
        "The adapter was made for another base model than playground/model, or its file is damaged (size mismatch for base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight: copying a param with shape torch.Size([4, 64]) from checkpoint, the shape in current model is torch.Size([8, 64])).",
        "`hf-delta export` of an adapter of another rank than its weights",
        adapter(config(r=8)),
    ),
    command(
        "export-config-text-rank",
        EXPORT,
        "The adapter was made for another base model than playground/model, or its file is damaged ('<=' not supported between instances of 'str' and 'int').",
        "`hf-delta export` of an adapter whose rank is a text",
        adapter(config(r="four")),
    ),
    command(
        "export-cut",
        EXPORT,
        "adapter/adapter_model.safetensors cannot be read (Error while deserializing header: incomplete metadata, file not fully covered): it is cut short or damaged.",
        "`hf-delta export` of an adapter that is cut off",
        adapter(cut("adapter_model.safetensors", -9)),
    ),
    command(
        "export-no-weights",
        EXPORT,
        "adapter holds no adapter_model.safetensors.",
        "`hf-delta export` of an adapter without weights",
        adapter(without("adapter_model.safetensors")),
    ),
    command(
        "export-pickled",
        EXPORT,
        "adapter holds pickled weights, which are not read: load the adapter with PEFT where you trust it, and save it again.",
        "`hf-delta export` of pickled weights",
        adapter(pickled),
    ),
    command(
        "export-nan",
        EXPORT,
        "adapter/adapter_model.safetensors: base_model.model.model.layers.0.mlp.down_proj.lora_A.weight holds NaN or infinite values: the file is broken, or training diverged.",
        "`hf-delta export` of an adapter of NaN",
        adapter(tensors(lambda t: t * float("nan"))),
    ),
    command(
        "export-prompts",
        EXPORT,
        "PROMPT_TUNING changes no weights of the model, so there is nothing to export.",
        "`hf-delta export` of tuned prompts",
        adapter(
            lambda path, world: (path / "adapter_config.json").write_text(
                '{"peft_type": "PROMPT_TUNING", "base_model_name_or_path": "playground/model", "num_virtual_tokens": 3, "task_type": "CAUSAL_LM"}'
            )
        ),
    ),
    command(
        "export-cut-base",
        EXPORT,
        "base/model.safetensors cannot be read (Error while deserializing header: incomplete metadata, file not fully covered): it is missing or cut short.",
        "`hf-delta export` onto a base that is cut off",
        {**adapter(config(base_model_name_or_path="base")), "base": copied("model", cut("model.safetensors", -9))},
    ),
]

PAIRS_CASES = [
    command(
        "pairs-nothing",
        "pairs",
        "the following arguments are required: --strong, --weak, --prompts, --out. `hf-delta pairs --help` says what there is.",
    ),
    command(
        "pairs-suffix",
        PAIRS.replace("pairs.jsonl", "pairs.json"),
        "--out: pairs.json must end in .jsonl, by which trainers know JSON lines.",
        files=TWO,
    ),
    command(
        "pairs-in-the-way",
        PAIRS,
        "--out: pairs.jsonl exists: remove it, or choose another name.",
        "`hf-delta pairs --out pairs.jsonl`, which exists",
        {**TWO, "pairs.jsonl": "{}\n"},
    ),
    command(
        "pairs-provenance-in-the-way",
        PAIRS,
        "--out: pairs.provenance.json exists: remove it, or choose another name.",
        "`hf-delta pairs --out pairs.jsonl`, and `pairs.provenance.json` exists",
        {**TWO, "pairs.provenance.json": "{}\n"},
    ),
    command(
        "pairs-below-file",
        PAIRS.replace("pairs.jsonl", "rows.jsonl/pairs.jsonl"),
        "--out: rows.jsonl/pairs.jsonl cannot be written: rows.jsonl is no directory that you may write to.",
        files=TWO,
    ),
    command(
        "pairs-one-model",
        PAIRS.replace("--strong adapter", "--strong playground/model"),
        "--strong playground/model and --weak playground/model are one model: all answers would be identical.",
        files=ROWS,
    ),
    command(
        "pairs-no-model",
        PAIRS.replace("--strong adapter", "--strong nowhere"),
        "--strong: there is no directory nowhere, and the Hub does not give it (Cannot find an appropriate cached snapshot folder for the specified revision on the local disk and outgoing traffic has been disabled. To enable repo look-ups and downloads online, set 'HF_HUB_OFFLINE=0' as environment variable.).",
        files=ROWS,
    ),
    command(
        "pairs-no-student",
        f"{PAIRS} --student nowhere",
        "--student: there is no directory nowhere, and the Hub does not give it (Cannot find an appropriate cached snapshot folder for the specified revision on the local disk and outgoing traffic has been disabled. To enable repo look-ups and downloads online, set 'HF_HUB_OFFLINE=0' as environment variable.).",
        files=TWO,
    ),
    command(
        "pairs-no-tokens",
        PAIRS.replace("tokens 4", "tokens 0"),
        "--max-new-tokens must be at least 1, got 0.",
        files=TWO,
    ),
    command("pairs-no-batch", f"{PAIRS} --batch-size -3", "--batch-size must be at least 1, got -3.", files=TWO),
    command(
        "pairs-device",
        f"{PAIRS} --device gpu",
        "The model does not go to device 'gpu' (…). Write cpu, cuda or cuda:<number>.",
        files=TWO,
    ),
    command(
        "pairs-reward",
        f"{PAIRS} --reward exact",
        "--reward: no reward function 'exact'; there are accuracy_reward, get_cosine_scaled_reward, get_repetition_penalty_reward, get_soft_overlong_punishment, playground_digit_reward, playground_reward, reasoning_accuracy_reward, think_format_reward.",
        files=TWO,
    ),
    command(
        "pairs-no-prompts",
        PAIRS,
        "The file of prompts rows.jsonl cannot be read ([Errno 2] No such file or directory: 'rows.jsonl'). Give a JSON lines file.",
        "`hf-delta pairs` without the file of prompts",
        ADAPTER,
    ),
    command(
        "pairs-empty",
        PAIRS,
        "rows.jsonl holds no rows: there is nothing to answer.",
        "`hf-delta pairs` of an empty file",
        {**ADAPTER, "rows.jsonl": ""},
    ),
    command(
        "pairs-broken-row",
        PAIRS,
        "rows.jsonl, row 2: not JSON (Expecting value: line 1 column 12 (char 11)). Each line is one JSON object.",
        "`hf-delta pairs` of a broken row 2",
        {**ADAPTER, "rows.jsonl": '{"prompt": "1+1:"}\n{"prompt": \n'},
    ),
    command(
        "pairs-number-row",
        PAIRS,
        "rows.jsonl, row 1: `prompt` must be a string or a list of messages with role and content.",
        "`hf-delta pairs` of a number as prompt",
        {**ADAPTER, "rows.jsonl": [{"prompt": 3}]},
    ),
    command(
        "pairs-two-kinds",
        PAIRS,
        "rows.jsonl, row 2: `prompt` is a list of messages, and in row 1 it is text: write all alike.",
        "`hf-delta pairs` of texts and messages",
        {**ADAPTER, "rows.jsonl": [{"prompt": "1+1:"}, {"prompt": [{"role": "user", "content": "1+1:"}]}]},
    ),
    command(
        "pairs-one-id",
        PAIRS,
        "rows.jsonl, row 2: prompt_id 'a' is that of row 1 too, which has another prompt; make them unique or leave the column out.",
        "`hf-delta pairs` of two prompts with one `prompt_id`",
        {**ADAPTER, "rows.jsonl": [{**row, "prompt_id": "a"} for row in GOOD]},
    ),
    command(
        "pairs-list-id",
        PAIRS,
        "rows.jsonl, row 1: `prompt_id` is [1]; it must be a string or a whole number.",
        "`hf-delta pairs` of a list as `prompt_id`",
        {**ADAPTER, "rows.jsonl": [{"prompt": "1+1:", "prompt_id": [1]}]},
    ),
    command(
        "pairs-no-answer",
        f"{PAIRS} --reward playground_reward",
        "The reward function playground_reward needs the column 'answer', and the dataset has prompt. Map one to it: dataset_columns: {answer: <its name in the dataset>}.",
        "`hf-delta pairs --reward playground_reward` of rows without `answer`",
        {**ADAPTER, "rows.jsonl": [{"prompt": "1+1:"}]},
    ),
    command(
        "pairs-half-answers",
        f"{PAIRS} --reward playground_reward",
        "rows.jsonl, prompt_id '2': no `answer`, which --reward playground_reward needs.",
        "`hf-delta pairs --reward playground_reward` of a row 2 without `answer`",
        {**ADAPTER, "rows.jsonl": [GOOD[0], {"prompt": "1+2:"}]},
    ),
    command(
        "pairs-foreign-partial",
        PAIRS,
        "pairs.jsonl.partial is no unfinished file of `hf-delta pairs`: move it, or choose another --out.",
        "`hf-delta pairs`, and `pairs.jsonl.partial` is something else",
        {**TWO, "pairs.jsonl.partial": '{"a": 1}\n'},
    ),
    command(
        "pairs-damaged-partial",
        PAIRS,
        "pairs.jsonl.partial, line 1 is damaged: delete the file to start from the beginning.",
        "`hf-delta pairs`, and `pairs.jsonl.partial` is damaged",
        {**TWO, "pairs.jsonl.partial": "{{{\n"},
    ),
    command(
        "pairs-adapter-cut",
        PAIRS,
        "--strong: The adapter in adapter does not load onto playground/model (Error while deserializing header: incomplete metadata, file not fully covered). It is damaged, or of another base model.",
        "`hf-delta pairs` of an adapter that is cut off",
        {**ROWS, **adapter(cut("adapter_model.safetensors", -9))},
    ),
    command(
        "pairs-no-template",
        PAIRS.replace("--weak playground/model", "--weak plain"),
        "--weak, prompt_id '1': The chat template cannot render the prompt [{'role': 'user', 'content': '1+1:'}]: the tokenizer has none",
        "`hf-delta pairs` of messages, and a tokenizer without chat template",
        {
            **ADAPTER,
            "plain": copied("model", lambda path, world: plain(path, world)),
            "rows.jsonl": [{"prompt": [{"role": "user", "content": "1+1:"}]}],
        },
    ),
]

_LOADING = {"pairs-foreign-partial", "pairs-damaged-partial", "pairs-no-template"}
PAIRS_CASES = slow(PAIRS_CASES, but=[case.id for case in PAIRS_CASES if case.id not in _LOADING])


def plain(path, world):
    from tests.bad_inputs.models import without_template

    without_template(path, world)


def narrower(path):
    from transformers import AutoConfig, AutoModelForCausalLM

    found = AutoConfig.from_pretrained(path)
    found.intermediate_size //= 2
    with torch.device("cpu"):
        AutoModelForCausalLM.from_config(found).save_pretrained(path)
