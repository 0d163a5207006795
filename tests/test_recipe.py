"""What a recipe may say, and what is said of a recipe that is wrong."""

import dataclasses
import enum

import peft
import pytest
import trl

from hf_delta.errors import InputError
from hf_delta.recipe import TRAINERS, list_recipes, load_recipe
from hf_delta.recipe.arguments import DataArguments, RunArguments
from hf_delta.recipe.fields import check, describe, type_hints
from hf_delta.recipe.keys import key_groups
from hf_delta.recipe.source import Node, apply_overrides, read_recipe
from hf_delta.rl.config import DeltaGRPOConfig
from tests.running import write


SFT = "trainer: sft\nmodel_name_or_path: model\ntrain_file: rows.jsonl\noutput_dir: out\nuse_cpu: true\n"
# What has a name in PEFT's enum; hf_delta also reads files of a method that PEFT has dropped.
METHODS = {k: config for k, config in peft.PEFT_TYPE_TO_CONFIG_MAPPING.items() if isinstance(k, peft.PeftType)}
CONFIGS = [trl.SFTConfig, trl.DPOConfig, DeltaGRPOConfig, trl.ModelConfig, DataArguments, RunArguments]


def load(folder, text, *flags):
    return load_recipe(str(write(folder, text)), flags)


def refusal(folder, text, *flags):
    with pytest.raises(InputError) as caught:
        load(folder, text, *flags)
    return str(caught.value).replace(f"{folder}/", "")


# -- YAML -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2e-4", 0.0002),
        ("1E5", 100000.0),
        (".5", 0.5),
        ("-3", -3),
        ("1.", 1.0),
        ("true", True),
        ("null", None),
        ("[1, 2e-1]", [1, 0.2]),
        # Text, where YAML 1.1 sees false, a date, 83, 8 and 1000.
        ("no", "no"),
        ("2026-01-31", "2026-01-31"),
        ("1:23", "1:23"),
        ("010", "010"),
        ("1_000", "1_000"),
        ("'2e-4'", "2e-4"),
    ],
)
def test_scalars_are_those_of_yaml_1_2(tmp_path, text, value):
    read = read_recipe(write(tmp_path, f"key: {text}\n"))["key"].plain()
    assert read == value and type(read) is type(value)


def test_places_are_file_and_line(tmp_path):
    path = write(tmp_path, "a: 1\nb:\n  c: 2\n  d:\n    - 3\n    - 4\n")
    nodes = read_recipe(path)
    assert nodes["a"].where == f"{path}:1"
    assert nodes["b"].value["c"].where == f"{path}:3"
    assert nodes["b"].value["d"].value[1].where == f"{path}:6"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "recipe.yaml: the recipe is empty"),
        ("- a\n- b\n", "recipe.yaml:1: a recipe is a mapping"),
        ("a: 1\nb: [1\n", "recipe.yaml:3: not valid YAML"),
        ("a: 1\nb: 2\na: 3\n", "recipe.yaml:3: a is given twice, first at recipe.yaml:1"),
        ("a:\n  b: 1\n  b: 2\n", "recipe.yaml:3: b is given twice, first at recipe.yaml:2"),
        ("a: !!python/object:os.system x\n", "recipe.yaml:1: not valid YAML"),
        ("1.5: a\n", "recipe.yaml:1: the key 1.5 is not text"),
        ("a: &x {b: 1}\nc:\n  <<: *x\n", "recipe.yaml:3: merge keys (<<) are not supported"),
    ],
)
def test_files_that_are_no_recipe(tmp_path, text, said):
    assert said in refusal(tmp_path, text)


def test_a_file_that_is_not_text(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(b"a: \xff\xfe")
    with pytest.raises(InputError, match="UTF-8"):
        load_recipe(str(path))


# -- flags ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("flags", "values"),
    [
        (["--learning_rate", "1e-3"], {"learning_rate": 1e-3}),
        (["--learning-rate=1e-3"], {"learning_rate": 1e-3}),
        (["--bf16"], {"bf16": True}),
        (["--weight_decay", "-0.5", "--bf16", "false"], {"weight_decay": -0.5, "bf16": False}),
        (["--peft-config.r", "8", "--peft_config.method=miss"], {"peft_config": {"r": 8, "method": "miss"}}),
        (["--report_to", "wandb", "trackio"], {"report_to": ["wandb", "trackio"]}),
        (["--report_to", "[wandb, trackio]"], {"report_to": ["wandb", "trackio"]}),
        (["--hub_model_id=a=b"], {"hub_model_id": "a=b"}),
        (["--max_steps", "1", "--max_steps", "2"], {"max_steps": 2}),
    ],
)
def test_flags(flags, values):
    assert {key: node.plain() for key, node in apply_overrides({}, flags).items()} == values


def test_flags_reach_into_a_block_and_leave_the_rest(tmp_path):
    recipe = load(tmp_path, SFT + "peft_config: {method: lora, r: 2, lora_alpha: 7}\n", "--peft_config.r", "8")
    assert (recipe.peft.r, recipe.peft.lora_alpha) == (8, 7)
    assert recipe.values["peft_config"] == {"method": "lora", "r": 8, "lora_alpha": 7}
    assert load(tmp_path, SFT + "peft_config: {method: lora}\n", "--peft_config", "null").peft is None


@pytest.mark.parametrize("words", ["123", "Think: then answer [", "true", "2026-01-31"])
def test_a_flag_for_a_text_key_is_text(tmp_path, words):
    assert load(tmp_path, SFT, "--run_name", words).training.run_name == words


def test_errors_in_flags_name_the_flag(tmp_path):
    assert refusal(tmp_path, SFT, "--learning-rate", "fast").startswith(
        "--learning_rate: learning_rate must be a number"
    )
    assert refusal(tmp_path, SFT, "--lerning_rate", "1").endswith("did you mean 'learning_rate'?")
    assert "expected a flag" in refusal(tmp_path, SFT, "1e-3")
    assert (
        refusal(tmp_path, SFT, "--max_steps.x", "1")
        == "--max_steps.x: max_steps must be a whole number, got the block {'x': 1}."
    )
    assert "--seed.x: seed is not a block" in refusal(tmp_path, SFT + "seed: 1\n", "--seed.x", "1")


# -- types ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("learning_rate: fast", "learning_rate must be a number, got the text 'fast'"),
        ("learning_rate: '2e-4'", "learning_rate must be a number, got the text '2e-4'"),
        ("learning_rate: true", "learning_rate must be a number, got true"),
        ("max_steps: true", "max_steps must be a whole number, got true"),
        ("max_steps: 2.5", "max_steps must be a whole number, got the number 2.5"),
        ("max_steps: null", "max_steps must be a whole number, got null"),
        ("use_cache: 1", "use_cache must be true or false, got the number 1"),
        ("use_cache: no", "use_cache must be true or false, got the text 'no'"),
        ("run_name: 12", "run_name must be text or null, got the number 12"),
        ("dataset_columns: [a]", "dataset_columns must be a block of keys or null, got the list ['a']"),
        ("dataset_columns: {a: 1}", "dataset_columns must be a block of keys or null, got the block {'a': 1}"),
        ("prompt_style: chat", "prompt_style must be one of as_is, conversational, got the text 'chat'"),
        ("lr_scheduler_type: cosinee", "lr_scheduler_type is the text 'cosinee', which it does not take; did you mean 'cosine'?"),
        ("optim: adamw_torchh", "did you mean 'adamw_torch'"),
        ("dtype: bf16", "dtype is the text 'bf16', which it does not take; did you mean 'bfloat16'"),
        ("truncation_mode: keep_all", "truncation_mode is the text 'keep_all', which it does not take"),
    ],
)  # fmt: skip
def test_a_wrong_type_is_refused_with_its_place(tmp_path, line, said):
    message = refusal(tmp_path, SFT.replace("use_cpu: true\n", f"use_cpu: true\n{line}\n"))
    assert message.startswith("recipe.yaml:6: ") and said in message


def test_right_types_are_taken(tmp_path):
    lines = "learning_rate: 1\neval_strategy: no\nlr_scheduler_type: cosine\nmodel_init_kwargs: {a: [1]}\nreport_to: [none]\n"
    training = load(tmp_path, SFT + lines + "label_names: one\n").training
    assert (training.learning_rate, type(training.learning_rate)) == (1.0, float)
    assert training.eval_strategy == "no" and training.lr_scheduler_type == "cosine"
    assert training.model_init_kwargs == {"a": [1]} and training.label_names == ["one"]


@pytest.mark.parametrize("config", [*CONFIGS, *(METHODS.values())], ids=lambda c: c.__name__)
def test_every_default_upstream_passes_its_own_type(config):
    """The types of upstream's fields are understood: a default must be a value that the field takes."""
    hints = type_hints(config)
    for field in dataclasses.fields(config):
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        if not field.init or default is dataclasses.MISSING or dataclasses.is_dataclass(default):
            continue
        default = default.value if isinstance(default, enum.Enum) else default
        value = [Node(item, "") for item in default] if isinstance(default, list) else default
        if default is None and "null" not in describe(hints[field.name]):
            continue  # Declared without None and yet None, as in several PEFT configurations.
        taken = check(field.name, Node(value, "here"), hints[field.name], field.metadata.get("choices"))
        assert taken == default or getattr(taken, "value", taken) == default


# -- keys -----------------------------------------------------------------------------------------------------------
def test_unknown_keys_name_the_nearest_and_the_line(tmp_path):
    message = refusal(tmp_path, SFT + "\n# a comment\nlerning_rate: 1\n")
    assert message == "recipe.yaml:8: unknown key 'lerning_rate'; did you mean 'learning_rate'?"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("lora_r: 8", "lora_r is not a key here. Adapters are set in the block `peft_config:`"),
        ("use_peft: true", "peft_config"),
        ("use_dora: true", "peft_config"),
        ("beta: 0.1", "beta is a key of trainer dpo and grpo, not of trainer sft"),
        ("dataset_train_split: train", "Write dataset_split"),
        ("num_processes: 2", "accelerate launch"),
    ],
)
def test_keys_from_elsewhere_are_explained(tmp_path, line, said):
    assert said in refusal(tmp_path, f"{SFT}{line}\n")


def test_every_key_of_trl_is_a_key_here():
    for trainer, config in {"sft": trl.SFTConfig, "dpo": trl.DPOConfig, "grpo": trl.GRPOConfig}.items():
        listed = {row[0] for rows in key_groups(trainer).values() for row in rows}
        assert {field.name for field in dataclasses.fields(config)} <= listed
        theirs = {f.name for f in dataclasses.fields(trl.ModelConfig) if not f.name.startswith(("lora_", "use_"))}
        assert theirs <= listed


@pytest.mark.parametrize("config", [DataArguments, RunArguments])
def test_our_keys_are_documented(config):
    for field in dataclasses.fields(config):
        assert f"{field.name} (`" in config.__doc__ and field.metadata["help"]


def test_help_of_keys_by_recipe_and_by_trainer():
    assert key_groups("rl/delta_l_tiny") == key_groups("grpo")
    assert ("delta_l_alpha", "a number", "1.0") in {
        row[:3] for row in key_groups("grpo")["hf_delta.rl.config.DeltaGRPOConfig"]
    }


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("trainer: sft\n", ""), "recipe.yaml: trainer is missing"),
        (("trainer: sft", "trainer: [grpo]"), "recipe.yaml:1: there is no trainer ['grpo']"),
        (("trainer: sft", "trainer: {grpo: 1}"), "recipe.yaml:1: there is no trainer {'grpo': 1}"),
        (("trainer: sft", "trainer: stf"), "recipe.yaml:1: there is no trainer 'stf'; did you mean 'sft'?"),
        (("output_dir: out\n", ""), "output_dir is missing"),
        (("model_name_or_path: model\n", ""), "model_name_or_path is missing"),
        (("train_file: rows.jsonl\n", ""), "nothing to train on"),
        (("trainer: sft", "trainer: grpo"), "trainer grpo needs reward_funcs"),
        (("out\n", "out\nreward_funcs: [playground_reward]\n"), "trainer sft has no use for reward_funcs"),
        (("out\n", "out\nload_in_4bit: true\n"), "a quantised model cannot be trained fully"),
        (("out\n", "out\nload_in_4bit: true\nload_in_8bit: true\n"), "recipe.yaml: You can't use 8 bit and 4 bit"),
        (("out\n", "out\neval_strategy: epoch\n"), "eval_strategy needs eval_file or eval_split"),
        (("out\n", "out\nevaluate_pass_at: [1]\n"), "evaluate_pass_at needs eval_file"),
        (("out\n", "out\nevaluate_samples: 3\n"), "evaluate_samples needs evaluate_pass_at"),
        (("out\n", "out\nevaluate_pass_at: [0]\n"), "evaluate_pass_at must list numbers from 1 on"),
        (("out\n", "out\nevaluate_pass_at: [8]\nevaluate_samples: 4\n"), "at least the largest k, 8, got 4"),
        (("out\n", "out\ndataset_name: x\n"), "dataset_name or train_file, not both"),
        (("out\n", "out\nsystem_prompt: x\n"), "needs prompt_style: conversational"),
        (("out\n", "out\nmax_train_rows: 0\n"), "max_train_rows must be at least 1"),
        # Upstream's own checks, with the file in front.
        (("out\n", "out\nfp16: true\nbf16: true\n"), "recipe.yaml: At most one of fp16 and bf16"),
    ],
)
def test_keys_that_do_not_go_together(tmp_path, change, said):
    assert said in refusal(tmp_path, SFT.replace(*change))


def test_a_check_of_our_own_config_has_the_file_too(tmp_path):
    grpo = SFT.replace("sft", "grpo") + "reward_funcs: [playground_reward]\nnum_generations: 2\n"
    assert refusal(tmp_path, grpo + "loss_type: delta\n").startswith("recipe.yaml: loss_type: 'delta' is not one of")
    assert "divisible by num_generations (3)" in refusal(tmp_path, grpo, "--num_generations", "3")


# -- ranges ---------------------------------------------------------------------------------------------------------
GRPO = SFT.replace("sft", "grpo") + "reward_funcs: [playground_reward]\nnum_generations: 2\n"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("per_device_train_batch_size: 0", "must be at least 1, got 0."),
        ("per_device_eval_batch_size: 0", "must be at least 1, got 0."),
        ("gradient_accumulation_steps: 0", "must be at least 1, got 0."),
        ("num_iterations: 0", "must be at least 1, got 0."),
        ("max_completion_length: 0", "must be at least 1, got 0."),
        ("steps_per_generation: -1", "must be at least 1, got -1."),
        ("temperature: 0", "must be above 0, got 0."),
        ("temperature: .nan", "must be finite, got nan."),
        ("learning_rate: -1e-5", "must be at least 0, got -1e-05."),
        ("learning_rate: .inf", "must be finite, got inf."),
        ("seed: -1", "must be at least 0 and at most 4294967295, got -1."),
        ("epsilon: -0.2", "must be at least 0, got -0.2."),
        ("beta: -0.1", "must be at least 0, got -0.1."),
        ("top_p: 0.0", "must be above 0 and at most 1, got 0.0."),
        ("top_p: 1.5", "must be above 0 and at most 1, got 1.5."),
        ("scale_rewards: groups", "is 'groups', which it does not take; did you mean 'group'?"),
        ("importance_sampling_level: word", "is 'word', which it does not take; there are sequence, token."),
    ],
)
def test_values_out_of_range_are_refused_with_their_place(tmp_path, line, said):
    key = line.partition(":")[0]
    assert refusal(tmp_path, f"{GRPO}{line}\n") == f"recipe.yaml:8: {key} {said}"
    assert refusal(tmp_path, GRPO, *f"--{line}".replace(":", "").split()) == f"--{key}: {key} {said}"


def test_one_generation_is_too_few(tmp_path):
    message = refusal(tmp_path, GRPO.replace("num_generations: 2", "num_generations: 1"))
    assert message == "recipe.yaml:7: num_generations must be at least 2, got 1."


def test_the_ends_of_the_ranges_are_taken(tmp_path):
    lines = "learning_rate: 0\nseed: 0\nepsilon: 0.0\ntop_p: 1\nper_device_train_batch_size: 2\nnum_iterations: 1\n"
    training = load(tmp_path, GRPO + lines).training
    assert (training.learning_rate, training.seed, training.epsilon, training.top_p) == (0, 0, 0, 1)


@pytest.mark.parametrize(("value", "taken"), [("true", "group"), ("false", "none"), ("batch", "batch")])
def test_rewards_are_scaled_by_a_word_or_a_boolean(tmp_path, value, taken):
    assert load(tmp_path, f"{GRPO}scale_rewards: {value}\n").training.scale_rewards == taken
    assert load(tmp_path, GRPO, "--scale_rewards", value).training.scale_rewards == taken


def test_integrations_must_exist_and_be_installed(tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.integrations.get_available_reporting_integrations", lambda: ["trackio"])
    assert load(tmp_path, SFT + "report_to: [trackio]\n").training.report_to == ["trackio"]
    assert load(tmp_path, SFT, "--report_to", "none").training.report_to == []
    assert load(tmp_path, SFT + "report_to: all\n").source
    message = refusal(tmp_path, SFT + "report_to: [trackio, wandb]\n")
    assert message.startswith("recipe.yaml:6: report_to: wandb is not installed: pip install wandb")
    assert message.endswith("Installed: trackio.")
    assert refusal(tmp_path, SFT, "--report_to", "wanbd").endswith("no integration 'wanbd'; did you mean 'wandb'?")


def test_every_reward_function_has_its_weight(tmp_path):
    message = refusal(tmp_path, GRPO + "reward_weights: [1.0, 0.5]\n")
    assert message == "recipe.yaml: reward_weights has 2 numbers for 1 reward_funcs."
    assert load(tmp_path, GRPO + "reward_weights: [0.5]\n").training.reward_weights == [0.5]


# -- trainers and adapters ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("trainer", TRAINERS)
def test_trainers_resolve(tmp_path, trainer):
    text = SFT.replace("sft", trainer)
    if trainer == "grpo":
        text += "reward_funcs: [playground_reward]\n"
    recipe = load(tmp_path, text)
    parents = {"sft": trl.SFTTrainer, "dpo": trl.DPOTrainer, "grpo": trl.GRPOTrainer}
    assert issubclass(recipe.trainer_class, parents[trainer])
    assert type(recipe.training).__name__ == TRAINERS[trainer][0].rpartition(".")[2]


@pytest.mark.parametrize("kind", METHODS, ids=lambda kind: kind.value)
def test_every_peft_method_goes_by_its_name(tmp_path, kind):
    try:
        expected = peft.PEFT_TYPE_TO_CONFIG_MAPPING[kind](task_type="CAUSAL_LM")
    except (TypeError, ValueError, ImportError) as error:
        # A method that needs more than its name says what, in PEFT's own words.
        assert str(error) in refusal(tmp_path, f"{SFT}peft_config: {{method: {kind.value.lower()}}}\n")
        return
    made = load(tmp_path, f"{SFT}peft_config: {{method: {kind.value.lower()}}}\n").peft
    assert type(made) is type(expected) and made.to_dict() == expected.to_dict()


def test_dora_is_lora_with_use_dora(tmp_path):
    made = load(tmp_path, SFT + "peft_config: {method: DoRA, r: 3}\n").peft
    assert made == peft.LoraConfig(use_dora=True, r=3, task_type="CAUSAL_LM")


def test_blocks_inside_peft_config_become_their_classes(tmp_path):
    block = "peft_config:\n  method: lora\n  init_lora_weights: eva\n  eva_config:\n    rho: 3.0\n"
    assert load(tmp_path, SFT + block).peft.eva_config == peft.EvaConfig(rho=3.0)
    assert "recipe.yaml:10: eva_config has no key 'roh'; did you mean 'rho'?" in refusal(
        tmp_path, SFT + block.replace("rho", "roh")
    )


@pytest.mark.parametrize("value", ["pissa_niter_16", "lora_ga", "gaussian", "true"])
def test_initialisations_that_peft_takes_but_does_not_list(tmp_path, value):
    made = load(tmp_path, SFT + f"peft_config: {{method: lora, init_lora_weights: {value}}}\n").peft
    assert made.init_lora_weights == (True if value == "true" else value)


@pytest.mark.parametrize(
    ("block", "said"),
    [
        ("{r: 8}", "recipe.yaml:6: peft_config is a block with `method:`"),
        ("lora", "peft_config must be a block of keys or null, got the text 'lora'"),
        ("\n  method: lorra", "recipe.yaml:7: peft_config has no method 'lorra'; did you mean 'lora'"),
        ("\n  method: lroa", "'lora'"),
        ("\n  method: lora\n  rank: 8", "recipe.yaml:8: peft_config has no key 'rank' for method lora; write r."),
        ("\n  method: lora\n  alpha: 8", "no key 'alpha' for method lora; write lora_alpha."),
        ("\n  method: lora\n  dropout: 0.1", "no key 'dropout' for method lora; write lora_dropout."),
        ("\n  method: loha\n  dropout: 0.1", "did you mean 'rank_dropout'?"),
        ("\n  method: lora\n  r: eight", "recipe.yaml:8: r must be a whole number, got the text 'eight'"),
        ("\n  method: lora\n  peft_type: MISS", "recipe.yaml:8: peft_config has no key 'peft_type'"),
        ("\n  method: lora\n  bias: some", "recipe.yaml:8: bias must be one of none, all, lora_only"),
        ("\n  method: dora\n  use_dora: false", "recipe.yaml:8: method: dora means use_dora: True; leave it out"),
        ("{method: lora, layers_pattern: h}", "recipe.yaml: peft_config: When `layers_pattern` is specified"),
    ],
)
def test_peft_config_refusals(tmp_path, block, said):
    assert said in refusal(tmp_path, f"{SFT}peft_config: {block}\n")


# -- names and defaults ---------------------------------------------------------------------------------------------
def test_recipes_go_by_path_by_name_and_by_their_path_in_the_repository(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = {load_recipe(name, ["--use_cpu"]).source for name in ("sft/sft_tiny", "recipes/sft/sft_tiny.yaml")}
    assert len(found) == 1
    mine = write(tmp_path, SFT)
    assert load_recipe("recipe.yaml").source == "recipe.yaml" and mine.exists()


@pytest.mark.parametrize(
    ("name", "near"), [("quikstart", "quickstart"), ("rl/delta", "rl/delta_l"), ("???", "There are: ")]
)
def test_a_recipe_that_is_not_there(name, near):
    with pytest.raises(InputError, match="no such file") as caught:
        load_recipe(name)
    assert near in str(caught.value)


def test_every_shipped_recipe_has_a_line_about_it():
    assert {"quickstart", "rl/delta_l", "sft/sft", "preference/dpo"} <= list_recipes().keys()
    assert all(len(line) > 20 for line in list_recipes().values())


@pytest.mark.parametrize(
    ("trainer", "file"),
    [
        ("sft", "sft.jsonl"),
        ("dpo", "preference.jsonl"),
        ("dpo\nloss_type: tdpo1", "preference.jsonl"),
        ("dpo\nloss_type: lipo_lambda", "lists.jsonl"),
        ("dpo\nloss_type: [plackett_luce]", "lists.jsonl"),
        ("dpo\nloss_type: plackett_luce\nlist_rescale: false", "lists.jsonl"),
        ("dpo\ntoken_weights: columns", "weighted.jsonl"),
        ("dpo\nloss_type: tis_dpo", "weighted.jsonl"),
        ("dpo\nloss_type: tis_dpo\ntoken_weights_kwargs: {positive: a, negative: b}", "preference.jsonl"),
        ("grpo", "train.jsonl"),
    ],
)
def test_a_playground_gives_model_and_files(tmp_path, trainer, file):
    text = f"trainer: {trainer}\nplayground: here\noutput_dir: out\nuse_cpu: true\n"
    text += "reward_funcs: playground_reward\n" if trainer == "grpo" else ""
    recipe = load(tmp_path, text, "--playground", "there")
    assert recipe.model.model_name_or_path == "there/model"
    assert (recipe.data.train_file, recipe.data.eval_file) == (f"there/{file}", "there/eval.jsonl")
    mine = load(tmp_path, text, "--train_file", "mine.jsonl", "--model_name_or_path", "gpt2")
    assert (mine.model.model_name_or_path, mine.data.train_file) == ("gpt2", "mine.jsonl")


def test_a_tilde_is_the_home_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    text = "trainer: sft\nplayground: ~/pg\noutput_dir: out\nuse_cpu: true\n"
    recipe = load(tmp_path, text)
    assert recipe.run.playground == str(tmp_path / "pg")
    assert recipe.model.model_name_or_path == str(tmp_path / "pg" / "model")
    assert recipe.data.train_file == str(tmp_path / "pg" / "sft.jsonl")
    flags = ["--model_name_or_path", "~/mine", "--resume_from_checkpoint", "~/out/checkpoint-2"]
    mine = load(tmp_path, text, *flags)
    assert mine.model.model_name_or_path == str(tmp_path / "mine")
    assert mine.run.resume_from_checkpoint == str(tmp_path / "out" / "checkpoint-2")
