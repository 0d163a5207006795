"""`hf-delta pairs`: answers, pairs and their delta, on untrained models."""

import json
import math
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from statistics import mean, stdev

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from scipy.stats import t as student_t
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

from hf_delta.cli import main
from hf_delta.errors import InputError
from hf_delta.playground.model import build_model
from hf_delta.playground.tokenizer import build_tokenizer
from hf_delta.preference.pairs import Pairs, build_pairs, make_pairs, measure_delta
from hf_delta.preference.pairs.delta import spread
from hf_delta.preference.pairs.generate import plan_batches
from hf_delta.preference.pairs.logps import mean_logp, pair_tokens
from hf_delta.preference.pairs.partial import Response


NEW = 12
ROWS = [{"prompt": f"{7 * i}+{i}:" * (1 + i % 3), "answer": str(8 * i), "level": f"add{i % 2}"} for i in range(9)]
ROWS += [{"prompt": "5+6:", "answer": "11", "level": "add1", "prompt_id": "own"}]
CHAT = [{**row, "prompt": [{"role": "user", "content": row["prompt"]}]} for row in ROWS[:3]]

# Three models and a run of generation for most of them.
pytestmark = pytest.mark.slow


def save_model(path, seed, tokenizer):
    """A random model that does not repeat itself at once, as one with the usual small weights would."""
    model = build_model(tokenizer, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.copy_(0.25 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Three models, an adapter for one of them, prompts, and the pairs that a run without a break makes of them."""
    folder = tmp_path_factory.mktemp("pairs")
    tokenizer = build_tokenizer("0123456789+-*=:;#")
    for seed, name in enumerate(("strong", "weak", "student"), start=1):
        save_model(folder / name, seed, tokenizer)
    model = AutoModelForCausalLM.from_pretrained(folder / "weak")
    torch.manual_seed(0)
    adapter = get_peft_model(
        model, LoraConfig(target_modules=["q_proj"], init_lora_weights=False, lora_alpha=64, task_type="CAUSAL_LM")
    )
    adapter.save_pretrained(folder / "adapter")
    write(folder / "prompts.jsonl", ROWS)
    write(folder / "chat_prompts.jsonl", CHAT)
    assert command(folder, "straight.jsonl") == 0
    assert command(folder, "chat.jsonl", prompts=folder / "chat_prompts.jsonl") == 0
    return folder


def write(path, rows):
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def flags(folder, out, /, **changes):
    """The command line of a run; a change to `None` leaves the flag out."""
    options = {
        "strong": folder / "strong",
        "weak": folder / "weak",
        "prompts": folder / "prompts.jsonl",
        "out": folder / out,
        "max_new_tokens": NEW,
        "batch_size": 3,
        "reward": "playground_reward",
        "student": folder / "student",
        **changes,
    }
    given = [("--" + key.replace("_", "-"), str(value)) for key, value in options.items() if value is not None]
    return ["pairs", *(part for flag in given for part in flag)]


def command(folder, out, /, **changes):
    return main(flags(folder, out, **changes))


def greedy(path, prompt):
    """What `generate` of a saved model answers to one prompt."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path.parent / "weak")
    text = prompt if isinstance(prompt, str) else "".join(message["content"] for message in prompt)
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    output = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NEW)
    return tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)


def text(reply):
    return reply if isinstance(reply, str) else reply[0]["content"]


# -- answers --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("file", "rows"), [("straight.jsonl", ROWS), ("chat.jsonl", CHAT)])
def test_answers_are_those_of_generate_one_by_one(world, file, rows):
    pairs = {row["prompt_id"]: row for row in read(world / file)}
    kept = []
    for number, row in enumerate(rows, start=1):
        name = row.get("prompt_id", str(number))
        expected = [greedy(world / model, row["prompt"]) for model in ("strong", "weak")]
        if all(answer.strip() for answer in expected) and expected[0] != expected[1]:
            kept.append(name)
            pair = pairs[name]
            assert [text(pair["chosen"]), text(pair["rejected"])] == expected
            assert isinstance(pair["chosen"], type(row["prompt"])) and isinstance(
                pair["rejected"], type(row["prompt"])
            )
            assert {key: pair[key] for key in row} == row
            assert list(pair)[:3] == ["prompt", "chosen", "rejected"]
    assert list(pairs) == kept and len(kept) >= len(rows) - 2


def test_an_adapter_answers_with_its_base(world):
    assert command(world, "adapter.jsonl", weak=world / "adapter", reward=None, student=None) == 0
    provenance = json.loads((world / "adapter.provenance.json").read_text())
    straight = json.loads((world / "straight.provenance.json").read_text())
    assert provenance["weak"]["base"] == straight["weak"]
    answers = {row["prompt_id"]: text(row["rejected"]) for row in read(world / "adapter.jsonl")}
    assert answers["1"] == greedy(world / "adapter", ROWS[0]["prompt"])
    assert answers["1"] != text(read(world / "straight.jsonl")[0]["rejected"])


def test_batches_take_each_prompt_once_and_the_longest_first():
    lengths = [3, 9, 1, 9, 4]
    assert plan_batches(lengths, 2) == [[1, 3], [4, 0], [2]]


# -- pairs ----------------------------------------------------------------------------------------------------------
def response(answer, cut=False):
    return Response(answer, len(answer), cut)


def test_identical_and_empty_answers_are_dropped_and_counted():
    answers = [("a", "a"), ("a", " a\n"), ("", "a"), ("a", "  "), ("", ""), ("a", "b"), ("a b", "ab")]
    rows = [{"prompt": str(i), "prompt_id": str(i)} for i in range(len(answers))]
    pairs = make_pairs(rows, *([response(answer) for answer in side] for side in zip(*answers)))
    assert pairs.dropped == {"identical": 2, "empty": 3}
    assert pairs.rows == [
        {"prompt": "5", "chosen": "a", "rejected": "b", "prompt_id": "5"},
        {"prompt": "6", "chosen": "a b", "rejected": "ab", "prompt_id": "6"},
    ]


def test_what_was_dropped_is_said_and_kept(world, tmp_path, capsys, monkeypatch):
    write(
        tmp_path / "prompts.jsonl",
        [*({**row, "prompt_id": str(i)} for i, row in enumerate(ROWS[:4])), ROWS[3] | {"prompt_id": "3"}],
    )
    monkeypatch.setattr(
        "hf_delta.preference.pairs.build.generate", canned([("a", "a"), ("", "1"), ("2#8", "1"), ("3", "1")])
    )
    assert command(world, "x.jsonl", prompts=tmp_path / "prompts.jsonl", out=tmp_path / "x.jsonl", student=None) == 0
    assert "2 pairs of 4 prompts; dropped: 1 identical, 1 empty, 1 repeated." in capsys.readouterr().out
    provenance = json.loads((tmp_path / "x.provenance.json").read_text())
    assert provenance["dropped"] == {"identical": 1, "empty": 1, "repeated": 1} and provenance["pairs"] == 2


def canned(answers):
    """Stands in for generation: the answers of both models to each prompt."""

    def generate(model, tokenizer, prompts, batches, max_new_tokens, option):
        for positions in batches:
            yield positions, [response(answers[i][option == "--weak"]) for i in positions]

    return generate


# -- interruptions --------------------------------------------------------------------------------------------------
KILL = """
import os, signal, sys
from hf_delta.preference.pairs import partial
from hf_delta.cli import main

write, left = partial.Partial._write, [int(sys.argv[1])]

def write_and_die(self, content):
    left[0] -= 1
    if left[0]:
        return write(self, content)
    self._file.write(b'{"side": "weak", "rows": [[0, "half a li')
    self._file.flush()
    os.kill(os.getpid(), signal.SIGKILL)

partial.Partial._write = write_and_die
main(sys.argv[2:])
"""


def test_a_run_that_was_killed_goes_on_to_the_same_bytes(world, tmp_path, monkeypatch):
    out, rest = tmp_path / "pairs.jsonl", tmp_path / "pairs.jsonl.partial"
    # One line of header, four batches of the strong model, one of the weak one, and half a line.
    killed = subprocess.run([sys.executable, "-c", KILL, "7", *flags(world, "", out=out)], capture_output=True)
    assert killed.returncode == -signal.SIGKILL
    assert not out.exists() and rest.read_bytes().count(b"\n") == 6 and rest.read_bytes().endswith(b"half a li")
    loaded = spy_on_loading(monkeypatch)
    # Ended again, before the pairs are written: what follows the half line must be readable too.
    begun(world, tmp_path, monkeypatch)
    assert main(flags(world, "", out=out)) == 0
    assert [path.name for path in loaded] == ["weak", "student", "student"]
    assert out.read_bytes() == (world / "straight.jsonl").read_bytes()
    provenance = (tmp_path / "pairs.provenance.json").read_bytes()
    assert provenance == (world / "straight.provenance.json").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pairs.jsonl", "pairs.provenance.json"]


def spy_on_loading(monkeypatch):
    from hf_delta.preference.pairs import build

    loaded, load = [], build.load_model_and_tokenizer
    monkeypatch.setattr(
        build, "load_model_and_tokenizer", lambda base, *rest: loaded.append(Path(base)) or load(base, *rest)
    )
    return loaded


def begun(world, tmp_path, monkeypatch, **changes):
    """A run that ended before its last batch; returns its output."""
    out = tmp_path / "pairs.jsonl"
    with monkeypatch.context() as patch:
        patch.setattr("hf_delta.preference.pairs.build.measure_delta", out_of_luck)
        assert main(flags(world, "", out=out, **changes)) == 130
    assert not out.exists() and out.with_name("pairs.jsonl.partial").exists()
    return out


def out_of_luck(*args, **kwargs):
    raise KeyboardInterrupt


def test_another_batch_size_goes_on(world, tmp_path, monkeypatch):
    out = begun(world, tmp_path, monkeypatch)
    rest = out.with_name("pairs.jsonl.partial")
    lines = rest.read_bytes().splitlines(keepends=True)
    rest.write_bytes(b"".join(lines[:-2]))
    assert main(flags(world, "", out=out, batch_size=2)) == 0
    assert read(out) == read(world / "straight.jsonl")
    assert json.loads((tmp_path / "pairs.provenance.json").read_text())["batch_sizes"] == [2, 3]


def test_an_unfinished_run_of_something_else_is_refused(world, tmp_path, monkeypatch, capsys):
    out = begun(world, tmp_path, monkeypatch)
    write(tmp_path / "other.jsonl", ROWS[:2])
    for change, said in (
        ({"max_new_tokens": 5}, "another settings: max_new_tokens 12 there and 5 here"),
        ({"weak": world / "student"}, "another weak: sha256"),
        ({"prompts": tmp_path / "other.jsonl"}, "another prompts: sha256"),
    ):
        kept = out.with_name("pairs.jsonl.partial").read_bytes()
        assert main(flags(world, "", out=out, **change)) == 2
        assert said in capsys.readouterr().err
        assert out.with_name("pairs.jsonl.partial").read_bytes() == kept
    # The same model elsewhere is the same model.
    shutil.copytree(world / "weak", tmp_path / "moved")
    assert main(flags(world, "", out=out, weak=tmp_path / "moved")) == 0
    assert out.read_bytes() == (world / "straight.jsonl").read_bytes()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("my notes\n", "line 1 is damaged"),
        ('{"mine": 1}\n', "is no unfinished file of `hf-delta pairs`"),
        (None, "line 2 is damaged"),
    ],
)
def test_a_partial_file_that_is_none(world, tmp_path, monkeypatch, capsys, content, said):
    out = tmp_path / "pairs.jsonl"
    rest = out.with_name("pairs.jsonl.partial")
    if content is None:
        begun(world, tmp_path, monkeypatch)
        content = rest.read_text().split("\n")[0] + '\n{"side": "strong"}\n'
    rest.write_text(content)
    assert main(flags(world, "", out=out)) == 2
    assert said in capsys.readouterr().err and rest.read_text() == content


def test_two_runs_do_not_write_one_file(world, tmp_path, capsys):
    from hf_delta.preference.pairs.partial import locked

    with locked(tmp_path / "pairs.jsonl"):
        assert main(flags(world, "", out=tmp_path / "pairs.jsonl")) == 2
    assert "is being written by another process" in capsys.readouterr().err


# -- delta ----------------------------------------------------------------------------------------------------------
def pairs_of(*answers, answer="8"):
    """Pairs with the texts of chosen and rejected."""
    rows = [
        {"prompt": "4+4:", "chosen": a, "rejected": b, "answer": answer, "prompt_id": str(i)}
        for i, (a, b) in enumerate(answers)
    ]
    return Pairs(rows, [response(a) for a, _ in answers], [response(b, cut=True) for _, b in answers], {})


def student_interval(values):
    half = student_t.ppf(0.975, len(values) - 1) * stdev(values) / math.sqrt(len(values))
    return mean(values) - half, mean(values) + half


def test_lengths_and_accuracy_by_hand(world):
    from hf_delta.playground.rewards import playground_reward

    tokenizer = AutoTokenizer.from_pretrained(world / "strong")
    pairs = pairs_of(("4#8", "#8"), ("44#8", "#9"), ("4444#8", "5"), ("#7", "#8"), ("11", "1#1"))
    delta = measure_delta(pairs, tokenizer, reward=playground_reward, progress=False)
    assert delta.tokens.chosen.mean == pytest.approx((3 + 4 + 6 + 2 + 2) / 5)
    assert delta.tokens.rejected.mean == pytest.approx((2 + 2 + 1 + 2 + 3) / 5)
    assert delta.length_ratio == pytest.approx(17 / 10)
    low, high = student_interval([1, 2, 5, 0, -1])
    assert delta.tokens.difference.low == pytest.approx(low, rel=2e-3)
    assert delta.tokens.difference.high == pytest.approx(high, rel=2e-3)
    assert (delta.cut.chosen.mean, delta.cut.rejected.mean) == (0, 1)
    assert (delta.accuracy.chosen.mean, delta.accuracy.rejected.mean) == pytest.approx((0.6, 0.4))
    assert delta.outcomes == {"only chosen": 2, "only rejected": 1, "both": 1, "neither": 1}
    assert delta.logps is None
    assert delta.warnings() == [w for w in delta.warnings() if "not shown to be correct" in w] != []


@pytest.mark.parametrize(
    ("answers", "said"),
    [
        ([("1#8", "9")] * 12, []),
        (
            [("9", "#8")] * 12,
            ["wrong way: rejected answers are correct more often", "in length: chosen answers have 0.50"],
        ),
        ([("#8", "1#9")] * 12, ["in length: chosen answers have 0.67 times"]),
        ([("1#9", "1#7")] * 12, ["not shown to be correct more often"]),
    ],
)
def test_a_delta_that_goes_the_wrong_way_is_said(world, answers, said):
    from hf_delta.playground.rewards import playground_reward

    tokenizer = AutoTokenizer.from_pretrained(world / "strong")
    found = measure_delta(pairs_of(*answers), tokenizer, reward=playground_reward, progress=False).warnings()
    assert len(found) == len(said) and all(part in line for part, line in zip(said, found))


def test_log_probabilities_by_hand(world):
    model = AutoModelForCausalLM.from_pretrained(world / "student").double()
    tokenizer = AutoTokenizer.from_pretrained(world / "student")
    pairs = pairs_of(("4#8", "#9"), ("12", "99#"), ("7", "123456"))
    expected = []
    for row in pairs.rows:
        values = []
        for answer in (row["chosen"], row["rejected"]):
            ids = tokenizer(row["prompt"] + answer)["input_ids"] + [tokenizer.eos_token_id]
            logps = model(torch.tensor([ids])).logits[0].log_softmax(-1)
            values.append(mean(logps[t - 1, ids[t]].item() for t in range(len(row["prompt"]), len(ids))))
        expected.append(values)
    delta = measure_delta(pairs, tokenizer, student=model.float(), progress=False)
    assert delta.logps.chosen.mean == pytest.approx(mean(a for a, _ in expected), rel=1e-5)
    assert delta.logps.difference.mean == pytest.approx(mean(a - b for a, b in expected), rel=1e-4)
    low, high = student_interval([a - b for a, b in expected])
    assert delta.logps.difference.high - delta.logps.difference.low == pytest.approx(high - low, rel=2e-2)


def test_without_a_prompt_the_first_token_is_left_out(world):
    model = AutoModelForCausalLM.from_pretrained(world / "student").eval()
    assert mean_logp(model, [], [5, 6, 7]) == pytest.approx(mean_logp(model, [5], [6, 7]), rel=1e-6)


def test_tokens_are_those_of_trl(world, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(world / "student")
    for file in ("straight.jsonl", "chat.jsonl"):
        of_kind = read(world / file)[:3]
        trainer = DPOTrainer(
            str(world / "student"),
            args=DPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none", max_length=None),
            train_dataset=Dataset.from_list(
                [{k: row[k] for k in ("prompt", "chosen", "rejected")} for row in of_kind]
            ),
            processing_class=tokenizer,
        )
        expected = [(r["prompt_ids"], r["chosen_ids"], r["rejected_ids"]) for r in trainer.train_dataset]
        assert [pair_tokens(tokenizer, row) for row in of_kind] == expected and len(expected) >= 1


def test_one_pair_has_no_interval_and_json_no_infinity(world):
    tokenizer = AutoTokenizer.from_pretrained(world / "strong")
    delta = measure_delta(pairs_of(("4#8", "#9")), tokenizer, progress=False)
    assert delta.tokens.difference.low == -math.inf
    assert delta.to_dict()["tokens"]["difference"] == {"mean": 1.0, "low": None, "high": None}
    json.dumps(delta.to_dict(), allow_nan=False)


def test_the_student_scores_pairs_that_are_evenly_spread():
    assert spread(5, 512) == [0, 1, 2, 3, 4]
    assert spread(1000, 2) == [250, 750]


def test_the_table_comes_before_training(world, tmp_path, capsys):
    assert command(world, "", out=tmp_path / "x.jsonl") == 0
    printed = capsys.readouterr().out
    for part in ("length (tokens)", "length ratio", "cut off", "accuracy", "log-prob. per token", "x.provenance.json"):
        assert part in printed


# -- bad input ------------------------------------------------------------------------------------------------------
GOOD = {"prompt": "1+1:", "answer": "2"}


def refused(world, folder, capsys, said, **changes):
    """Status 2, one line, and nothing but what was there."""
    before = sorted(folder.rglob("*"))
    capsys.readouterr()
    assert command(world, "", **{"out": folder / "out.jsonl", **changes}) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and said in lines[0], lines
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([], "holds no rows"),
        ([GOOD, {"answer": "2"}], "row 2: `prompt` is missing"),
        ([GOOD, {**GOOD, "prompt": " "}], "row 2: `prompt` is empty"),
        ([GOOD, {**GOOD, "prompt": [{"role": "user"}]}], "row 2: `prompt` must be a string or a list of messages"),
        ([GOOD, {**GOOD, "prompt": 3}], "row 2: `prompt` must be"),
        ([GOOD, "[1]\n"], "row 2: a list where a JSON object should be"),
        ([GOOD, '{"prompt": "1"\n'], "row 2: not JSON"),
        ([{**GOOD, "score": float("nan")}], "row 1: not JSON (NaN is no number in JSON)"),
        ([{**GOOD, "prompt": "1\ud800"}], "row 1: half of a surrogate pair"),
        ([{**GOOD, "prompt_id": 1.5}], "row 1: `prompt_id` is 1.5"),
        (
            [{**GOOD, "prompt_id": 1}, {"prompt": "2", "answer": "2", "prompt_id": "1"}],
            "row 2: prompt_id '1' is that of row 1 too",
        ),
        ([GOOD, CHAT[0]], "row 2: `prompt` is a list of messages, and in row 1 it is text"),
        ([GOOD, {"prompt": "2+2:"}], "prompt_id '2': no `answer`, which --reward playground_reward needs"),
        ([{"prompt": "2+2:"}], "needs the column 'answer'"),
        ([{**GOOD, "prompt": "1" * 300}], "the model 256 positions: leave out such prompts"),
    ],
)
def test_prompts(world, tmp_path, capsys, rows, said):
    path = tmp_path / "rows.jsonl"
    write(path, rows)
    if "positions" in said:
        # That is known when the model is there; the empty partial file stays, and the next command goes on with it.
        assert command(world, "", out=tmp_path / "out.jsonl", prompts=path) == 2
        assert said in capsys.readouterr().err
        return
    refused(world, tmp_path, capsys, said, prompts=path)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"prompts": "nowhere.jsonl"}, "The file of prompts nowhere.jsonl cannot be read"),
        ({"strong": "./nowhere"}, "--strong: there is no directory ./nowhere"),
        ({"weak": "no/such-model"}, "--weak: there is no directory no/such-model, and the Hub does not give it"),
        ({"student": "./nowhere"}, "--student: there is no directory ./nowhere"),
        ({"max_new_tokens": 0}, "--max-new-tokens must be at least 1, got 0"),
        ({"batch_size": -1}, "--batch-size must be at least 1, got -1"),
        ({"reward": "playground_rewards"}, "did you mean 'playground_reward'?"),
        ({"out": "pairs.json"}, "pairs.json must end in .jsonl"),
    ],
)
def test_flags(world, tmp_path, capsys, changes, said):
    refused(world, tmp_path, capsys, said, **changes)


def test_directories_that_are_no_models(world, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    refused(world, tmp_path, capsys, "--strong: ", strong=tmp_path / "empty")
    refused(world, tmp_path, capsys, "are one model: all answers would be identical", weak=world / "strong")
    shutil.copytree(world / "strong", tmp_path / "copy")
    refused(world, tmp_path, capsys, "are one model", weak=tmp_path / "copy")
    (tmp_path / "copy" / "config.json").write_text("{")
    (tmp_path / "copy" / "tokenizer.json").unlink()
    refused(world, tmp_path, capsys, "--weak: No tokenizer could be loaded", weak=tmp_path / "copy")


def test_nothing_is_overwritten(world, tmp_path, capsys):
    (tmp_path / "out.jsonl").write_text("mine")
    refused(world, tmp_path, capsys, "out.jsonl exists")
    (tmp_path / "out.jsonl").rename(tmp_path / "out.provenance.json")
    refused(world, tmp_path, capsys, "out.provenance.json exists")
    (tmp_path / "file").write_text("mine")
    refused(world, tmp_path, capsys, "is no directory that you may write to", out=tmp_path / "file" / "out.jsonl")
    assert (tmp_path / "file").read_text() == (tmp_path / "out.provenance.json").read_text() == "mine"


def damaged(world, folder, name, value):
    """A copy of a model in which one weight is `value`."""
    shutil.copytree(world / name, folder / "damaged")
    model = AutoModelForCausalLM.from_pretrained(folder / "damaged")
    with torch.no_grad():
        model.model.norm.weight[0] = value
    model.save_pretrained(folder / "damaged")
    return folder / "damaged"


@pytest.mark.parametrize("role", ["strong", "student"])
def test_models_that_compute_nan(world, tmp_path, role):
    options = {"prompts": world / "prompts.jsonl", "out": tmp_path / "x.jsonl", "max_new_tokens": 4, "progress": False}
    models = {"strong": world / "strong", "weak": world / "weak", role: damaged(world, tmp_path, role, float("nan"))}
    with pytest.raises(InputError, match=f"--{role}: .*(NaN|is nan)"):
        build_pairs(**models, **options)
    assert not (tmp_path / "x.jsonl").exists()


def test_a_student_whose_tokenizer_is_another_ones(world, tmp_path):
    bigger = build_tokenizer("0123456789+-*=:;#abcdefgh")
    shutil.copytree(world / "student", tmp_path / "student")
    bigger.save_pretrained(tmp_path / "student")
    write(tmp_path / "prompts.jsonl", [{"prompt": "1+1:a"}, {"prompt": "2+2:h"}])
    with pytest.raises(InputError, match="--student: the tokenizer gives token 2., and the model has 21 embeddings"):
        build_pairs(
            world / "strong",
            world / "weak",
            tmp_path / "prompts.jsonl",
            tmp_path / "x.jsonl",
            max_new_tokens=8,
            student=tmp_path / "student",
            progress=False,
        )


def test_no_pair_at_all(world, tmp_path, capsys, monkeypatch):
    write(tmp_path / "prompts.jsonl", ROWS[:2])
    monkeypatch.setattr("hf_delta.preference.pairs.build.generate", canned([("a", "a"), ("", "1")]))
    assert command(world, "", prompts=tmp_path / "prompts.jsonl", out=tmp_path / "x.jsonl") == 2
    assert "None of 2 prompts gives a pair: 1 identical, 1 empty." in capsys.readouterr().err
