"""Bad models: directories that hold none, or not all of it, or one that does not fit the data, the method or the adapter."""

import json

from safetensors.torch import load_file, save_file

from tests.bad_inputs.case import copied, run
from tests.running import LORA


WEIGHTS = "model.safetensors"


def model(change):
    """The playground's model, changed, as the directory `model`."""
    return {"model": copied("model", change)}


def without(*names):
    def change(path, world):
        for name in names:
            (path / name).unlink()

    return change


def cut(name, kept):
    def change(path, world):
        (path / name).write_bytes((path / name).read_bytes()[:kept])

    return change


def text(name, content):
    return lambda path, world: (path / name).write_text(content)


def config(**changes):
    """Keys of `config.json`, changed; `None` removes them."""

    def change(path, world):
        content = {**json.loads((path / "config.json").read_text()), **changes}
        (path / "config.json").write_text(json.dumps({k: v for k, v in content.items() if v is not None}))

    return change


def tensors(edit):
    def change(path, world):
        content = load_file(path / WEIGHTS)
        edit(content)
        save_file(content, path / WEIGHTS, metadata={"format": "pt"})

    return change


def drop_a_layer(content):
    name = next(name for name in content if "mlp" in name)
    del content[name]


def not_a_number(content):
    for tensor in content.values():
        tensor[...] = float("nan")


def without_template(path, world):
    for name in ("chat_template.jinja", "chat_template.json"):
        (path / name).unlink(missing_ok=True)
    content = json.loads((path / "tokenizer_config.json").read_text())
    content.pop("chat_template", None)
    (path / "tokenizer_config.json").write_text(json.dumps(content))


def index(path, world):
    (path / WEIGHTS).unlink()
    content = {"metadata": {}, "weight_map": {"model.norm.weight": "model-00001-of-00001.safetensors"}}
    (path / "model.safetensors.index.json").write_text(json.dumps(content))


def pickled(path, world):
    (path / WEIGHTS).unlink()
    (path / "pytorch_model.bin").write_bytes(b"\x80\x04not a pickle")


def nothing(path, world):
    path.mkdir()


def more_tokens(path, world):
    content = json.loads((path / "tokenizer.json").read_text())
    taken = (
        len(json.loads((path / "config.json").read_text()))
        and json.loads((path / "config.json").read_text())["vocab_size"]
    )
    content["added_tokens"].append(
        {
            "id": taken + 7,
            "content": "é",
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": False,
        }
    )
    (path / "tokenizer.json").write_text(json.dumps(content))


def case(id, trainer, given, says, change, **changes):
    return run(
        f"model-{id}", trainer, {"model_name_or_path": "model", **changes}, says, given=given, files=model(change)
    )


CASES = [
    run(
        "model-that-is-not-there",
        "sft",
        {"model_name_or_path": "models/mine"},
        "model_name_or_path: models/mine is no directory here and no model of the Hub (We couldn't connect to 'https://huggingface.co' to load the files, and couldn't find them in the cached files).",
    ),
    run(
        "model-name-of-nonsense",
        "sft",
        {"model_name_or_path": "my model!"},
        "model_name_or_path: my model! is no directory here and no model of the Hub (Repo id must use alphanumeric chars, '-', '_' or '.'. The name cannot start or end with '-' or '.' and the maximum length is 96: 'my model!').",
    ),
    run(
        "model-path-that-is-not-there",
        "dpo",
        {"model_name_or_path": "./a/b/c"},
        "model_name_or_path: ./a/b/c is no directory here and no model of the Hub (Repo id must be in the form 'repo_name' or 'namespace/repo_name': './a/b/c'. Use `repo_type` argument if needed).",
    ),
    run(
        "model-that-is-a-file",
        "sft",
        {"model_name_or_path": "recipe.yaml"},
        "model_name_or_path: recipe.yaml is no directory here and no model of the Hub (It looks like the config file at 'recipe.yaml' is not a valid JSON file).",
    ),
    run(
        "model-empty-name",
        "sft",
        {"model_name_or_path": ""},
        "recipe.yaml: model_name_or_path is missing; write a directory, or the id of a model of the Hub.",
    ),
    run(
        "model-directory-empty",
        "grpo",
        {"model_name_or_path": "model"},
        "model_name_or_path: model has no usable config.json (Unrecognized model in model. Should have a `model_type` key in its config.json).",
        given="an empty directory",
        files={"model": nothing},
    ),
    case(
        "no-config",
        "sft",
        "a model without `config.json`",
        "model_name_or_path: model has no usable config.json (Unrecognized model in model. Should have a `model_type` key in its config.json).",
        without("config.json"),
    ),
    case(
        "broken-config",
        "sft",
        "`config.json` is no JSON",
        "model_name_or_path: model has no usable config.json (It looks like the config file at 'model/config.json' is not a valid JSON file).",
        text("config.json", "{"),
    ),
    case(
        "config-list",
        "sft",
        "`config.json` is a list",
        "model_name_or_path: model has no usable config.json (Unrecognized model in model. Should have a `model_type` key in its config.json).",
        text("config.json", "[]"),
    ),
    case(
        "config-without-type",
        "sft",
        "`config.json` without `model_type`",
        "model_name_or_path: model has no usable config.json (Unrecognized model in model. Should have a `model_type` key in its config.json).",
        config(model_type=None),
    ),
    case(
        "config-of-unknown-type",
        "sft",
        "`model_type: lamma`",
        "model_name_or_path: model has no usable config.json (The checkpoint you are trying to load has model type `lamma` but Transformers does not recognize this architecture. This could be because of an issue with the checkpoint, or because your version of Transformers is out of date).",
        config(model_type="lamma"),
    ),
    case(
        "config-of-no-language-model",
        "sft",
        "`model_type: vit`, which makes no text",
        "model_name_or_path: model is a vit, which does not continue texts. Take a causal language model.",
        config(model_type="vit", architectures=["ViTModel"]),
    ),
    case(
        "config-of-encoder",
        "grpo",
        "`model_type: t5`, an encoder and decoder",
        "model_name_or_path: model is a t5, which does not continue texts. Take a causal language model.",
        config(model_type="t5", architectures=["T5ForConditionalGeneration"]),
    ),
    case(
        "config-of-own-code",
        "sft",
        "a model with code of its own, and no `trust_remote_code`",
        "model_name_or_path: model has no usable config.json (The repository model contains custom code which must be executed to correctly load the model. You can inspect the repository content at model ).",
        config(model_type="mine", auto_map={"AutoConfig": "configuration_mine.MyConfig"}),
    ),
    case(
        "config-with-text-for-number",
        "sft",
        "`hidden_size: wide` in `config.json`",
        "model_name_or_path: model has no usable config.json (Validation error for field 'hidden_size': TypeError: Field 'hidden_size' expected int, got str (value: 'wide')).",
        config(hidden_size="wide"),
    ),
    case(
        "heads-that-do-not-divide",
        "sft",
        "`config.json` of another size than the weights",
        "model_name_or_path: model/model.safetensors has model.embed_tokens.weight of shape [21, 64], and config.json says [21, 128]: they are not of one model.",
        config(hidden_size=128),
    ),
    case(
        "no-weights",
        "sft",
        "a model without weights",
        "model_name_or_path: model has no weights, neither model.safetensors nor an index of several files.",
        without(WEIGHTS),
    ),
    case(
        "cut-weights",
        "sft",
        "weights that are cut off",
        "model/model.safetensors cannot be read (Error while deserializing header: incomplete metadata, file not fully covered): it is missing or cut short.",
        cut(WEIGHTS, 5000),
    ),
    case(
        "cut-weights",
        "dpo",
        "weights that are cut off",
        "model/model.safetensors cannot be read (Error while deserializing header: incomplete metadata, file not fully covered): it is missing or cut short.",
        cut(WEIGHTS, -10),
    ),
    case(
        "empty-weights",
        "grpo",
        "weights of 0 bytes",
        "model/model.safetensors cannot be read (Error while deserializing header: header too small): it is missing or cut short.",
        cut(WEIGHTS, 0),
    ),
    case(
        "text-as-weights",
        "sft",
        "a page of HTML instead of weights",
        "model/model.safetensors cannot be read (Error while deserializing header: header too large): it is missing or cut short.",
        text(WEIGHTS, "<!DOCTYPE html><html>404</html>"),
    ),
    case(
        "missing-tensor",
        "sft",
        "weights that lack a layer",
        "model_name_or_path: the weights in model lack model.layers.0.mlp.down_proj.weight, which would be drawn at random. Save or download the model again.",
        tensors(drop_a_layer),
    ),
    case(
        "missing-tensor",
        "grpo",
        "weights that lack a layer",
        "model_name_or_path: the weights in model lack model.layers.0.mlp.down_proj.weight, which would be drawn at random. Save or download the model again.",
        tensors(drop_a_layer),
    ),
    case(
        "nan-weights",
        "grpo",
        "weights that are NaN",
        "model_name_or_path: model.embed_tokens.weight holds NaN or infinite values: the file is broken, or its training diverged.",
        tensors(not_a_number),
    ),
    case(
        "missing-shard",
        "sft",
        "an index that names a file which is not there",
        "model/model-00001-of-00001.safetensors cannot be read (No such file or directory: model/model-00001-of-00001.safetensors): it is missing or cut short.",
        index,
    ),
    case(
        "pickle",
        "sft",
        "a file that is no pickle as `pytorch_model.bin`",
        "model_name_or_path: model/pytorch_model.bin holds no weights that torch.save wrote: it is cut short, or something else. Save or download the model again.",
        pickled,
    ),
    case(
        "no-tokenizer",
        "sft",
        "a model without tokenizer",
        "model_name_or_path: model has no tokenizer. Save it there: tokenizer.save_pretrained('model').",
        without("tokenizer.json", "tokenizer_config.json"),
    ),
    case(
        "broken-tokenizer",
        "dpo",
        "`tokenizer.json` is cut off",
        "model_name_or_path: the tokenizer in model cannot be loaded (Expecting value: line 7 column 12 (char 100)). Save or download it again.",
        cut("tokenizer.json", 100),
    ),
    case(
        "no-chat-template",
        "sft",
        "messages, and a tokenizer without chat template",
        "recipe.yaml: the rows are messages, and the tokenizer of the model has no chat template: write chat_template_path, or take rows of text and leave prompt_style out.",
        without_template,
        prompt_style="conversational",
    ),
    case(
        "no-chat-template",
        "dpo",
        "messages, and a tokenizer without chat template",
        "recipe.yaml: the rows are messages, and the tokenizer of the model has no chat template: write chat_template_path, or take rows of text and leave prompt_style out.",
        without_template,
        prompt_style="conversational",
    ),
    case(
        "no-chat-template",
        "grpo",
        "messages, and a tokenizer without chat template",
        "the rows are messages, and the tokenizer of the model has no chat template: write chat_template_path, or take rows of text and leave prompt_style out.",
        without_template,
        prompt_style="conversational",
    ),
    case(
        "broken-chat-template",
        "sft",
        "a chat template that is broken",
        "recipe.yaml: the chat template of the tokenizer fails: unexpected end of template, expected 'end of print statement'. Correct it, or write chat_template_path: <another>.",
        text("chat_template.jinja", "{% for message in messages %}{{ message"),
        prompt_style="conversational",
    ),
    case(
        "template-that-refuses",
        "grpo",
        "a chat template that raises",
        "The chat template cannot render the prompt [{'role': 'user', 'content': '662576+323739:'}]: no users here",
        text("chat_template.jinja", "{{ raise_exception('no users here') }}"),
        prompt_style="conversational",
    ),
    case(
        "more-tokens-than-embeddings",
        "sft",
        "a tokenizer with more tokens than the model",
        "model_name_or_path: model/model.safetensors has model.embed_tokens.weight of shape [21, 64], and config.json says [8, 64]: they are not of one model.",
        config(vocab_size=8),
    ),
    case(
        "token-beyond-embeddings",
        "sft",
        "a token without embedding",
        "model_name_or_path: the model has embeddings for 21 tokens, and its tokenizer gives 'é' the number 21. Take the tokenizer of this model, or resize the embeddings (resize_token_embeddings) and save it.",
        more_tokens,
    ),
    run(
        "adapter-as-model",
        "sft",
        {"model_name_or_path": "adapter", "peft_config": LORA},
        "model_name_or_path: adapter has no usable config.json (Unrecognized model in adapter. Should have a `model_type` key in its config.json).",
        given="an adapter of another base as model",
        files={
            "adapter": copied(
                "adapter",
                lambda path, world: (path / "adapter_config.json").write_text(
                    (path / "adapter_config.json").read_text().replace("playground/model", "gone")
                ),
            )
        },
    ),
]
