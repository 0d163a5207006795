"""Token weights of two contrast models, against full logits of one row at a time in float64."""

import json
import os
import socket
import subprocess
import sys

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM, Gemma2Config, Gemma2ForCausalLM

from hf_delta.errors import InputError
from hf_delta.playground.model import build_model
from hf_delta.playground.tokenizer import build_tokenizer
from hf_delta.preference import contrast
from hf_delta.preference.contrast import add_contrast_weights


TOKENIZER = build_tokenizer("0123456789+=")
VOCABULARY = len(TOKENIZER)
SIDES = ("chosen", "rejected")


def network(seed, vocabulary=None):
    """A random model that is far from uniform; with a soft-cap it has another vocabulary, too."""
    torch.manual_seed(seed)
    if vocabulary:
        config = Gemma2Config(
            vocab_size=vocabulary, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=1, head_dim=8, final_logit_softcapping=2.0, initializer_range=0.5,
        )  # fmt: skip
        return Gemma2ForCausalLM(config)
    model = build_model(TOKENIZER, seed=seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=0.25)
    return model


@pytest.fixture(scope="module")
def models():
    return network(1), network(2)


@pytest.fixture(scope="module")
def rows():
    random = np.random.default_rng(0)
    ids = lambda low, high: random.integers(4, VOCABULARY, random.integers(low, high)).tolist()  # noqa: E731
    made = [{"prompt_ids": ids(1, 9), "chosen_ids": ids(1, 12), "rejected_ids": ids(1, 6)} for _ in range(11)]
    # Without a prompt nothing says how likely the first token is.
    return [*made, {"prompt_ids": [], "chosen_ids": ids(3, 4), "rejected_ids": ids(1, 2)}]


def brute_force(model, prompt, completion, padding=0):
    """Log-probabilities of the completion from full logits, with padding to the left of the prompt."""
    ids = torch.tensor([[0] * padding + prompt + completion])
    mask = torch.tensor([[0] * padding + [1] * (len(prompt) + len(completion))])
    model = model.double().eval()
    with torch.no_grad():
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        logits = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits[0, :-1]
    logps = logits.log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
    model.float()
    logps = torch.cat([torch.zeros(1), logps])[-len(completion) :]
    return logps if prompt else logps * (torch.arange(len(completion)) > 0)


def expected(models, rows, padding=0):
    """Weights with the defaults of the published code: differences in [-1.5, 1.5] to weights in [0.7, 1.3]."""
    weights = {}
    for side, sign in zip(SIDES, (1, -1)):
        logps = [[brute_force(m, r["prompt_ids"], r[f"{side}_ids"], padding) for r in rows] for m in models]
        weights[side] = [1 + 0.2 * (sign * (good - bad)).clamp(-1.5, 1.5) for good, bad in zip(*logps)]
    return weights


def assert_weights(dataset, wanted):
    for side in SIDES:
        found = dataset[f"{side}_weights"]
        assert [len(row) for row in found] == [len(row) for row in wanted[side]]
        for row, other in zip(found, wanted[side]):
            np.testing.assert_allclose(row, other, atol=1e-5)


@pytest.mark.parametrize("batch_size", [1, 7])
def test_full_logits(models, rows, batch_size):
    dataset = add_contrast_weights(Dataset.from_list(rows), *models, batch_size=batch_size, progress=False)
    wanted = expected(models, rows)
    assert_weights(dataset, wanted)
    # Neither is clipped everywhere, and where nothing comes before a token it counts as any.
    flat = torch.cat([row for side in SIDES for row in wanted[side]])
    assert ((flat > 0.71) & (flat < 1.29)).float().mean() > 0.3 and flat.std() > 0.1
    assert dataset[-1]["chosen_weights"][0] == dataset[-1]["rejected_weights"][0] == pytest.approx(1)
    assert dataset.select_columns(["prompt_ids", "chosen_ids", "rejected_ids"]).to_list() == rows


def test_the_side_of_padding_is_irrelevant(models, rows):
    dataset = add_contrast_weights(Dataset.from_list(rows[:-1]), *models, batch_size=4, progress=False)
    assert_weights(dataset, expected(models, rows[:-1], padding=5))


def test_a_soft_cap(rows):
    models = network(1, VOCABULARY), network(2, VOCABULARY)
    for model in models:
        model.set_attn_implementation("eager")
    assert_weights(
        add_contrast_weights(Dataset.from_list(rows), *models, batch_size=5, progress=False), expected(models, rows)
    )


@pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
def test_what_the_collator_cuts_counts_as_any_token(models, rows, mode):
    limit = 9
    dataset = add_contrast_weights(
        Dataset.from_list(rows), *models, batch_size=5, max_length=limit, truncation_mode=mode, progress=False
    )
    cut_off = 0
    for row, found in zip(rows, dataset):
        for side, sign in zip(SIDES, (1, -1)):
            prompt, completion = row["prompt_ids"], row[f"{side}_ids"]
            places = list(range(len(prompt) + len(completion)))
            places = places[:limit] if mode == "keep_start" else places[-limit:]
            whole = prompt + completion
            kept = [place for place in places[1:] if place >= len(prompt)]
            wanted = torch.ones(len(completion), dtype=torch.float64)
            if kept:
                # All but the first of what is left: something stands before it.
                good, bad = (brute_force(m, whole[places[0] : kept[0]], whole[kept[0] : kept[-1] + 1]) for m in models)
                start = kept[0] - len(prompt)
                wanted[start : start + len(kept)] += 0.2 * (sign * (good - bad)).clamp(-1.5, 1.5)
            cut_off += len(completion) - len(kept)
            np.testing.assert_allclose(found[f"{side}_weights"], wanted, atol=1e-5)
    assert cut_off > 4


def test_arguments_of_the_transform(models, rows):
    dataset = add_contrast_weights(
        Dataset.from_list(rows[:3]), *models, batch_size=2, progress=False, low=-0.5, high=1.0, scale=None
    )
    prompt, completion = rows[0]["prompt_ids"], rows[0]["rejected_ids"]
    good, bad = (brute_force(model, prompt, completion) for model in models)
    np.testing.assert_allclose(dataset[0]["rejected_weights"], (bad - good).clamp(-0.5, 1.0).exp(), atol=1e-5)


@pytest.mark.parametrize("count", [12, 2, 1])
def test_processes_share_the_rows(models, rows, count, monkeypatch):
    """Three processes, one after the other: what each gives is gathered for all of them."""
    dataset, processes = Dataset.from_list(rows[:count]), 3
    whole = add_contrast_weights(dataset, *models, batch_size=2, progress=False)
    read, given = [], []
    batch_logps = contrast._batch_logps
    monkeypatch.setattr(
        contrast, "_batch_logps", lambda model, texts: read.append(len(texts)) or batch_logps(model, texts)
    )

    class Stop(Exception):
        pass

    def give(share):
        given.extend(share)
        raise Stop

    for process in range(processes):
        with pytest.raises(Stop):
            add_contrast_weights(
                dataset, *models, batch_size=2, process_index=process, num_processes=processes, gather=give, progress=False
            )  # fmt: skip
    # Every completion once under each model.
    assert sum(read) == 2 * 2 * count
    assert {array.dtype for weights, _ in given for side in weights for array in side} == {np.dtype(np.float32)}
    for process in range(processes):
        found = add_contrast_weights(
            dataset, *models, batch_size=2, process_index=process, num_processes=processes, gather=lambda _: given,
            progress=False,
        )  # fmt: skip
        for name in ("chosen_weights", "rejected_weights"):
            assert [len(row) for row in found[name]] == [len(row) for row in whole[name]]
            np.testing.assert_allclose(np.concatenate(found[name]), np.concatenate(whole[name]), atol=1e-5)


WORKER = """
import json, sys
from accelerate import PartialState
from datasets import Dataset
from hf_delta.preference.contrast import add_contrast_weights

state = PartialState(cpu=True)
rows, out, *models = sys.argv[1:]
dataset = Dataset.from_list(json.loads(rows))
found = add_contrast_weights(
    dataset, *models, batch_size=2, process_index=state.process_index, num_processes=state.num_processes
)
with open(f"{out}/{state.process_index}.json", "w") as file:
    json.dump(found.to_list(), file)
state.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes(models, rows, tmp_path):
    paths = [tmp_path / name for name in ("positive", "negative")]
    for model, path in zip(models, paths):
        model.save_pretrained(path)
        TOKENIZER.save_pretrained(path)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", WORKER, json.dumps(rows), str(tmp_path), *map(str, paths)]
    workers = [
        subprocess.Popen(command, env={**os.environ, **common, "RANK": rank, "LOCAL_RANK": rank}) for rank in "01"
    ]
    assert [worker.wait(timeout=300) for worker in workers] == [0, 0]
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in "01"]
    assert found[0] == found[1]
    assert_weights(Dataset.from_list(found[0]), expected(models, rows))


def test_a_fault_of_one_process_is_raised_by_all(models, rows):
    def gather(share):
        return [*share, (None, "row 5 is broken")]

    with pytest.raises(InputError, match="row 5 is broken"):
        add_contrast_weights(
            Dataset.from_list(rows), *models, batch_size=4, num_processes=2, gather=gather, progress=False
        )


def test_models_stay_as_they_are(models, rows):
    model = models[0].train()
    model.model.layers[0].eval()
    modes, before = [module.training for module in model.modules()], torch.get_rng_state()
    add_contrast_weights(Dataset.from_list(rows[:2]), *models, batch_size=4, progress=False)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), before)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_directories_and_adapters(models, rows, tmp_path):
    models[1].save_pretrained(tmp_path / "base")
    TOKENIZER.save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    torch.manual_seed(0)
    adapted = get_peft_model(
        base, LoraConfig(target_modules=["q_proj"], init_lora_weights=False, lora_alpha=64, task_type="CAUSAL_LM")
    )
    adapted.save_pretrained(tmp_path / "adapter")
    dataset = Dataset.from_list(rows[:4])
    found = add_contrast_weights(
        dataset, str(tmp_path / "adapter"), tmp_path / "base", batch_size=2, progress=False, vocab_size=VOCABULARY
    )
    assert_weights(found, expected((adapted, models[1]), rows[:4]))
    assert np.ptp(np.concatenate(found["chosen_weights"])) > 0.1
    in_memory = add_contrast_weights(dataset, adapted, models[1], batch_size=2, progress=False)
    assert in_memory.to_list() == found.to_list()


def test_a_data_set_of_chosen_rows(models, rows):
    dataset = Dataset.from_list(rows)
    chosen = dataset.select([7, 2, 5])
    found = add_contrast_weights(chosen, *models, batch_size=2, progress=False)
    assert_weights(found, expected(models, [rows[place] for place in (7, 2, 5)]))
    assert found["prompt_ids"][:] == [rows[place]["prompt_ids"] for place in (7, 2, 5)]
    assert len(add_contrast_weights(dataset.select([]), *models, batch_size=2, progress=False)) == 0


def test_bad_input(models, rows, tmp_path):
    dataset = Dataset.from_list(rows)

    def refused(message, data=dataset, pair=models, batch_size=2, **arguments):
        with pytest.raises(InputError, match=message):
            add_contrast_weights(data, *pair, batch_size=batch_size, progress=False, **arguments)

    refused("no column rejected_ids", data=dataset.remove_columns("rejected_ids"))
    refused("has chosen_weights already", data=dataset.add_column("chosen_weights", [1.0] * len(dataset)))
    refused("not a stream", data=dataset.to_iterable_dataset())
    refused("one and the same", pair=(models[0], models[0]))
    refused("one and the same", pair=("a/b", "./a/b/"))
    refused("batch_size must be at least 1", batch_size=0)
    refused("keep_middle", truncation_mode="keep_middle")
    refused("hgih is none of low, high, scale", hgih=2.0)
    refused("low must be below high", low=2.0)
    refused("positive contrast model has 16 token embeddings and the policy 17", vocab_size=17)
    missing = str(tmp_path / "missing")
    refused(f"negative contrast model: .*{missing}", pair=(models[0], missing))
    network(1, 40).save_pretrained(tmp_path / "other")
    TOKENIZER.save_pretrained(tmp_path / "other")
    refused(
        f"positive contrast model in {tmp_path / 'other'} has 40", pair=(tmp_path / "other", models[0]), vocab_size=16
    )
    tuned = get_peft_model(network(3), PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"))
    refused("is a tuned prompt", pair=(models[0], tuned))
    foreign = Dataset.from_list([{"prompt_ids": [5], "chosen_ids": [VOCABULARY], "rejected_ids": [6]}])
    refused("token 16, and the model has 16 embeddings", data=foreign)
    broken = network(3)
    with torch.no_grad():
        broken.get_input_embeddings().weight[7] = float("nan")
    refused("negative model gives a log-probability that is no finite number", pair=(models[0], broken))
