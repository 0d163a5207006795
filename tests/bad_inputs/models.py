"""Bad models: directories that hold none, or not all of it, or one that does not fit the data, the method or the adapter."""

import json

import torch
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


def tokenizer(**changes):
    """Keys of `tokenizer_config.json`, changed; `None` removes them."""

    def change(path, world):
        content = {**json.loads((path / "tokenizer_config.json").read_text()), **changes}
        content = {key: value for key, value in content.items() if value is not None}
        (path / "tokenizer_config.json").write_text(json.dumps(content))

    return change


def no_vocabulary(path, world):
    content = json.loads((path / "tokenizer.json").read_text())
    content["model"]["vocab"] = {}
    (path / "tokenizer.json").write_text(json.dumps(content))


def a_directory(name):
    return lambda path, world: ((path / name).unlink(), (path / name).mkdir())


def other_index(content):
    return lambda path, world: ((path / WEIGHTS).unlink(), (path / f"{WEIGHTS}.index.json").write_text(content))


def saved(content):
    return lambda path, world: ((path / WEIGHTS).unlink(), torch.save(content, path / "pytorch_model.bin"))


def no_rows(content):
    for name in content:
        content[name] = content[name][:0].contiguous()


def transposed(content):
    name = next(name for name in content if "down_proj" in name)
    content[name] = content[name].T.contiguous()


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
    *(
        case(
            "no-end",
            trainer,
            "a tokenizer without `eos_token`",
            "model_name_or_path: the tokenizer in model has no eos_token, so that no text would end. Write it into tokenizer_config.json.",
            tokenizer(eos_token=None, pad_token=None),
        )
        for trainer in ("sft", "dpo", "grpo")
    ),
    case(
        "tokenizer-list",
        "sft",
        "`tokenizer_config.json` is a list",
        "model_name_or_path: the tokenizer in model cannot be loaded ('list' object has no attribute 'get'). Save or download it again.",
        text("tokenizer_config.json", "[]"),
    ),
    case(
        "tokenizer-empty",
        "grpo",
        "`tokenizer.json` of 0 bytes",
        "model_name_or_path: the tokenizer in model cannot be loaded (Expecting value: line 1 column 1 (char 0)). Save or download it again.",
        text("tokenizer.json", ""),
    ),
    case(
        "tokenizer-without-vocabulary",
        "sft",
        "a tokenizer without vocabulary",
        "model_name_or_path: the tokenizer in model cannot be loaded (WordLevel error: Missing [UNK] token from the vocabulary). Save or download it again.",
        no_vocabulary,
    ),
    case(
        "end-as-number",
        "sft",
        "`eos_token: 3` in `tokenizer_config.json`",
        "model_name_or_path: the tokenizer in model cannot be loaded (Special token eos_token has to be either str or AddedToken but got: <class 'int'>). Save or download it again.",
        tokenizer(eos_token=3),
    ),
    case(
        "end-that-is-no-token",
        "grpo",
        "`eos_token: <nope>`, which is no token of the model",
        "model_name_or_path: the model has embeddings for 21 tokens, and its tokenizer gives '<nope>' the number 21. Take the tokenizer of this model, or resize the embeddings (resize_token_embeddings) and save it.",
        tokenizer(eos_token="<nope>"),
    ),
    case(
        "pad-beyond-embeddings",
        "dpo",
        "`pad_token_id: 999` in `config.json`",
        "model/config.json describes no model that transformers can build (AssertionError: Padding_idx must be within num_embeddings).",
        config(pad_token_id=999),
    ),
    case(
        "no-vocabulary",
        "sft",
        "`vocab_size: 0` in `config.json`",
        "model/config.json describes no model that transformers can build (IndexError: index 0 is out of bounds for dimension 0 with size 0).",
        config(vocab_size=0),
    ),
    case(
        "no-heads",
        "sft",
        "`num_attention_heads: 0` in `config.json`",
        "model/config.json describes no model that transformers can build (ZeroDivisionError: integer division or modulo by zero).",
        config(num_attention_heads=0),
    ),
    case(
        "activation-typo",
        "sft",
        "`hidden_act: gelluu` in `config.json`",
        "model/config.json describes no model that transformers can build (KeyError: 'gelluu').",
        config(hidden_act="gelluu"),
    ),
    case(
        "other-layers",
        "sft",
        "`num_hidden_layers: 9` in `config.json`",
        "model_name_or_path: model has no usable config.json (Class validation error for validator 'validate_layer_type': ValueError: `num_hidden_layers` (9) must be equal to the number of `layer_types` (2)).",
        config(num_hidden_layers=9),
    ),
    case(
        "architecture-typo",
        "sft",
        "`architectures: [Qwen3ForCasualLM]` in `config.json`",
        "model_name_or_path: model/config.json names the architecture 'Qwen3ForCasualLM', which this transformers does not have.",
        config(architectures=["Qwen3ForCasualLM"]),
    ),
    case(
        "dtype-typo",
        "sft",
        "`dtype: float12` in `config.json`",
        "model_name_or_path: model has no usable config.json (module 'torch' has no attribute 'float12').",
        config(dtype="float12"),
    ),
    case(
        "config-directory",
        "sft",
        "`config.json` is a directory",
        "model_name_or_path: model has no usable config.json (Unrecognized model in model. Should have a `model_type` key in its config.json).",
        a_directory("config.json"),
    ),
    case(
        "weights-directory",
        "sft",
        "`model.safetensors` is a directory",
        "model holds no model.safetensors and no model.safetensors.index.json. Pickled weights are not read: load the model with transformers and save it again, save_pretrained writes safetensors.",
        a_directory(WEIGHTS),
    ),
    case(
        "generation-list",
        "grpo",
        "`generation_config.json` is a list",
        "model_name_or_path: model/generation_config.json is damaged ('list' object is not a mapping). Delete it, or save the model again.",
        text("generation_config.json", "[]"),
    ),
    case(
        "index-of-nothing",
        "sft",
        "an index without `weight_map`",
        "model/model.safetensors.index.json is damaged: its weight_map does not name a file for each tensor.",
        other_index("{}"),
    ),
    case(
        "index-of-numbers",
        "sft",
        "an index that names a number as file",
        "model/model.safetensors.index.json is damaged: its weight_map does not name a file for each tensor.",
        other_index('{"weight_map": {"lm_head.weight": 3}}'),
    ),
    case(
        "index-list",
        "sft",
        "an index that is a list",
        "model/model.safetensors.index.json is no JSON object.",
        other_index("[]"),
    ),
    case(
        "zero-rows",
        "sft",
        "weights of no rows",
        "model_name_or_path: model/model.safetensors has model.embed_tokens.weight of shape [0, 64], and config.json says [21, 64]: they are not of one model.",
        tensors(no_rows),
    ),
    case(
        "transposed",
        "sft",
        "a weight that is transposed",
        "model_name_or_path: model/model.safetensors has model.layers.0.mlp.down_proj.weight of shape [256, 64], and config.json says [64, 256]: they are not of one model.",
        tensors(transposed),
    ),
    case(
        "other-pickle",
        "sft",
        "other weights in `pytorch_model.bin`",
        "model_name_or_path: the weights in model lack lm_head.weight and 24 more, which would be drawn at random. Save or download the model again.",
        saved({"scale": torch.ones(2)}),
    ),
    case(
        "pickled-list",
        "sft",
        "a list in `pytorch_model.bin`",
        "model_name_or_path: model/pytorch_model.bin holds no weights that torch.save wrote: it is cut short, or something else. Save or download the model again.",
        saved([1, 2]),
    ),
    *(
        case(
            "template-of-nothing",
            trainer,
            "a chat template that is empty",
            "The chat template makes an empty text of the prompt ….",
            text("chat_template.jinja", ""),
            prompt_style="conversational",
        )
        for trainer in ("sft", "dpo", "grpo")
    ),
    case(
        "template-that-divides",
        "sft",
        "a chat template that divides by zero",
        "recipe.yaml: the chat template of the tokenizer fails: division by zero. Correct it, or write chat_template_path: <another>.",
        text("chat_template.jinja", "{{ 1 / 0 }}"),
        prompt_style="conversational",
    ),
    case(
        "template-of-unknowns",
        "dpo",
        "a chat template that uses an unknown name",
        "recipe.yaml: the chat template of the tokenizer fails: 'user' is undefined. Correct it, or write chat_template_path: <another>.",
        text("chat_template.jinja", "{{ user.name }}"),
        prompt_style="conversational",
    ),
    case(
        "template-that-is-no-text",
        "grpo",
        "a chat template of bytes that are no text",
        "model_name_or_path: the tokenizer in model cannot be loaded ('utf-8' codec can't decode byte 0xff in position 0: invalid start byte). Save or download it again.",
        lambda path, world: (path / "chat_template.jinja").write_bytes(b"\xff"),
        prompt_style="conversational",
    ),
    run(
        "model-long-name",
        "sft",
        {"model_name_or_path": "a" * 300},
        "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa…: the name of a file or directory is too long. Write a shorter one.",
        given="a name of 300 letters as `model_name_or_path`",
    ),
]
