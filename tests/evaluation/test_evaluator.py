import json

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_delta.errors import InputError
from hf_delta.evaluation import evaluate, evaluate_files
from hf_delta.evaluation.rows import load_rows
from hf_delta.evaluation.sampling import complete, sampling_config
from tests.evaluation.chain import chain_model, chain_tokenizer


TRANSITIONS = {
    "a": {"y": 1.0},  # right, at once
    "b": {"n": 1.0},  # wrong
    "c": {"y": 0.3, "n": 0.7},
    "d": {"z": 1.0},
    "z": {"z": 1.0},  # never ends
    "y": {"<eos>": 1.0},
    "n": {"<eos>": 1.0},
}


def is_yes(completions, answer, **kwargs):
    return [float(text == right) for text, right in zip(completions, answer)]


@pytest.fixture(scope="module")
def tokenizer():
    return chain_tokenizer()


@pytest.fixture
def chain(tokenizer):
    return chain_model(tokenizer, TRANSITIONS)


@pytest.fixture
def run(chain, tokenizer):
    def call(rows, **options):
        options = {"score": is_yes, "ks": (1,), "samples": 4, "max_new_tokens": 6, "progress": False, **options}
        return evaluate(options.pop("model", chain), tokenizer, rows, **options)

    return call


def rows_of(ends, count=1, **columns):
    return [{"prompt": "x" * i + end, "answer": "y", **columns} for end in ends for i in range(count)]


def test_counts_lengths_and_cuts_of_a_model_whose_answers_are_known(run):
    rows = [
        {"prompt": "xxd", "answer": "zzzzzz", "level": "l10", "prompt_id": "endless"},
        {"prompt": "a", "answer": "y", "level": "l2", "prompt_id": "right"},
        {"prompt": "xb", "answer": "y", "level": "l2", "prompt_id": "wrong"},
    ]
    report = run(rows, ks=(1, 4), batch_size=5)
    assert [p.prompt_id for p in report.problems] == ["right", "wrong", "endless"]
    assert [(p.samples, p.correct, p.truncated) for p in report.problems] == [(4, 4, 0), (4, 0, 0), (4, 4, 4)]
    # The end-of-sequence token counts, as in TRL's completions/mean_length.
    assert [p.mean_length for p in report.problems] == [2.0, 2.0, 6.0]
    assert [level.name for level in report.levels] == ["l2", "l10"]
    assert [level.pass_at_k[1].mean for level in report.levels] == [0.5, 1.0]
    assert report.over_levels.pass_at_k[4].mean == 0.75
    assert report.over_problems.pass_at_k[4].mean == pytest.approx(2 / 3)
    assert [(e.completion, e.correct) for e in report.examples] == [("y", True), ("n", False), ("zzzzzz", True)]


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_samples_follow_the_distribution_of_the_model_at_the_temperature(run, chain, temperature):
    # These would make it greedy, if they were heeded.
    chain.generation_config.top_k = 1
    chain.generation_config.top_p = 0.01
    report = run(rows_of("c", 40), samples=50, temperature=temperature, batch_size=1000)
    odds = (0.3 / 0.7) ** (1 / temperature)
    rate = odds / (1 + odds)
    measured = sum(p.correct for p in report.problems) / 2000
    assert abs(measured - rate) < 4 * (rate * (1 - rate) / 2000) ** 0.5
    # As many draws of one binomial as there are problems: neither copies of each other nor of one another's samples.
    assert 0.5 < np.var([p.correct / 50 for p in report.problems], ddof=1) / (rate * (1 - rate) / 50) < 2


def test_the_result_depends_on_the_seed_and_on_nothing_drawn_before(run):
    torch.manual_seed(1)
    first = run(rows_of("c", 8))
    torch.manual_seed(2)
    state = torch.random.get_rng_state()
    again = run(rows_of("c", 8))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert again == first
    assert run(rows_of("c", 8), seed=1).problems != first.problems


def test_greedy_decoding_takes_the_likeliest_token(run):
    report = run(rows_of("ca", 3), samples=1, temperature=0)
    assert [p.correct for p in report.problems] == [0, 0, 0, 1, 1, 1]


def test_ends_of_the_generation_config_count(run, chain, tokenizer):
    chain.generation_config.eos_token_id = [tokenizer.convert_tokens_to_ids("z")]
    report = run(rows_of("d"))
    assert (report.problems[0].truncated, report.problems[0].mean_length) == (0, 1.0)


def test_mode_and_dropout_of_every_module(run, chain):
    layers = LoraConfig(r=2, target_modules=["o_proj"], lora_dropout=0.9, init_lora_weights=False)
    model = get_peft_model(chain, layers).eval()
    quiet = run(rows_of("c", 8), model=model)
    model.train()
    model.base_model.model.lm_head.eval()
    modes = [module.training for module in model.modules()]
    assert run(rows_of("c", 8), model=model) == quiet
    assert [module.training for module in model.modules()] == modes

    def fails(**kwargs):
        raise RuntimeError("no")

    with pytest.raises(InputError, match="'fails' raised RuntimeError: no"):
        run(rows_of("c"), model=model, score=fails)
    assert [module.training for module in model.modules()] == modes


def test_other_columns_reach_the_reward_function(run):
    seen = {}

    async def reward(prompts, completions, completion_ids, answer, level, hint, log_metric, log_extra, **kwargs):
        log_metric("name", 1.0)
        log_extra("column", [])
        seen.update(prompts=prompts, ids=completion_ids, hint=hint, level=level, completions=completions)
        return [0.5, 0.51]

    report = run([*rows_of("a", hint=3), *rows_of("b", hint=None)], samples=1, score=reward)
    assert seen["prompts"] == ["a", "b"] and seen["hint"] == [3, None] and seen["level"] == ["all", "all"]
    assert seen["completions"] == ["y", "n"] and [len(ids) for ids in seen["ids"]] == [2, 2]
    assert [p.correct for p in report.problems] == [0, 1]


def test_conversations_go_through_the_chat_template(run, tokenizer, monkeypatch):
    template = "{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}a{% endif %}"

    def said(completions, answer, **kwargs):
        assert all(c[0]["role"] == "assistant" for c in completions)
        return is_yes([c[0]["content"] for c in completions], answer)

    rows = [{"prompt": [{"role": "user", "content": "b"}], "answer": "y"}]
    monkeypatch.setattr(tokenizer, "chat_template", None)
    with pytest.raises(InputError, match="chat template cannot render"):
        run(rows, score=said)
    monkeypatch.setattr(tokenizer, "chat_template", template)
    assert run(rows, score=said).problems[0].correct == 4


@pytest.mark.parametrize(
    "score, message",
    [
        (lambda completions, **kwargs: [None] * len(completions), "returned None for prompt_id '1'"),
        (lambda completions, **kwargs: [1.0], "returned 1 rewards for 4 completions"),
        (lambda completions, **kwargs: [float("nan")] * 4, "returned nan"),
        (lambda completions: [1.0] * 4, "raised TypeError"),
        ("no_such_reward", "is not a dotted path"),
        ("hf_delta.playground.rewards.nothing", "has no name 'nothing'"),
        (torch.nn.Linear(1, 1), "is not a function"),
        (3, "is not a function"),
    ],
)
def test_rewards_that_cannot_judge(run, score, message):
    with pytest.raises(InputError, match=message):
        run(rows_of("a"), score=score)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"ks": (1, 8)}, "pass@8 cannot be estimated from 4 samples"),
        ({"ks": (0,)}, "k must be at least 1, got 0"),
        ({"seed": -1}, "seed must lie in"),
        ({"temperature": float("nan")}, "temperature must be a finite number"),
        ({"ks": ()}, "at least one k"),
        ({"ks": (1, 1)}, "none twice"),
        ({"samples": 0}, "samples must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
        ({"temperature": 0}, "temperature 0 with 4 samples"),
        ({"temperature": -1.0}, "temperature must be a finite number from 0 up, got -1.0"),
    ],
)
def test_settings_that_cannot_be_used(run, options, message):
    with pytest.raises(InputError, match=message):
        run(rows_of("a"), **options)


def test_a_prompt_without_tokens(run, tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", "{{ messages[0].content }}")
    with pytest.raises(InputError, match="prompt_id '1' has no tokens"):
        run([{"prompt": [{"role": "user", "content": ""}], "answer": "y"}])


def test_padding_changes_nothing(playground):
    model = AutoModelForCausalLM.from_pretrained(playground / "model")
    tokenizer = AutoTokenizer.from_pretrained(playground / "model")
    prompts = [tokenizer(row["prompt"])["input_ids"] for row in load_rows(playground / "eval.jsonl")[::17]]
    assert len({len(prompt) for prompt in prompts}) > 3
    config = sampling_config(model, tokenizer, 0, 12)
    together = complete(model.eval(), tokenizer, prompts, config)
    alone = [complete(model, tokenizer, [prompt], config) for prompt in prompts]
    assert together.ids == [one.ids[0] for one in alone]
    assert together.truncated == [one.truncated[0] for one in alone]
    assert len(set(together.texts)) > 1


@pytest.fixture(scope="module")
def adapters(playground, tmp_path_factory):
    """A random LoRA on the playground's model, and the same merged into it, with a small data file."""
    out = tmp_path_factory.mktemp("adapters")
    model = AutoModelForCausalLM.from_pretrained(playground / "model")
    torch.manual_seed(0)
    model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    model.save_pretrained(out / "lora")
    model.merge_and_unload().save_pretrained(out / "merged")
    AutoTokenizer.from_pretrained(playground / "model").save_pretrained(out / "merged")
    lines = (playground / "eval.jsonl").read_text().splitlines()[::16]
    (out / "data.jsonl").write_text("\n".join(lines) + "\n\n")
    return out


def always_even(completion_ids, **kwargs):
    """Something a model without skill gets right about half the time."""
    return [float(len(ids) % 2 == 0) for ids in completion_ids]


def test_an_adapter_gives_what_the_merged_model_gives(playground, adapters):
    options = {"reward": always_even, "ks": (1,), "samples": 4, "max_new_tokens": 16, "progress": False}
    data = adapters / "data.jsonl"
    merged = evaluate_files(adapters / "merged", data, **options)
    given = evaluate_files(playground / "model", data, adapter=adapters / "lora", **options)
    named = evaluate_files(adapters / "lora", data, **options)
    base = evaluate_files(playground / "model", data, **options)
    assert given.problems == named.problems == merged.problems
    assert base.problems != merged.problems
    assert given.source["adapter"] == str(adapters / "lora") and named.source["data"] == str(data)
    assert given.fingerprint == base.fingerprint


def test_models_that_cannot_be_loaded(playground, adapters, tmp_path):
    data = adapters / "data.jsonl"
    with pytest.raises(InputError, match="No tokenizer could be loaded from runs/none .no such directory here"):
        evaluate_files("runs/none", data)
    with pytest.raises(InputError, match="is no PEFT adapter"):
        evaluate_files(playground / "model", data, adapter=playground)
    with pytest.raises(InputError, match="are both adapters"):
        evaluate_files(adapters / "lora", data, adapter=adapters / "lora")
    with pytest.raises(InputError, match="does not go to device 'cuda:99'"):
        evaluate_files(playground / "model", data, device="cuda:99")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": None}))
    with pytest.raises(InputError, match="names no base model"):
        evaluate_files(tmp_path, data)


def test_data_is_checked_before_the_model(tmp_path):
    with pytest.raises(InputError, match="none.jsonl cannot be read"):
        evaluate_files("runs/none", tmp_path / "none.jsonl")
    data = tmp_path / "data.jsonl"
    data.write_text('{"prompt": "1", "answer": "1"}\n{"prompt": "1"}\n')
    with pytest.raises(InputError, match="data.jsonl, row 2: `answer` is missing"):
        evaluate_files("runs/none", data)
