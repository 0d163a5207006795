"""Model and tokenizer as any other tool sees them, and the parts of pre-training."""

import pytest
import torch
from torch.nn.functional import log_softmax
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_delta.playground import TASKS, build_playground
from hf_delta.playground.model import build_model
from hf_delta.playground.muon import Muon, orthogonalise
from hf_delta.playground.pretrain import batches, collate, demonstrations, lr_factor, pretrain, response_loss
from tests.playground.helpers import read_rows


@pytest.fixture(scope="module")
def tokenizer(playground):
    return AutoTokenizer.from_pretrained(playground / "model")


@pytest.fixture
def model(playground):
    return AutoModelForCausalLM.from_pretrained(playground / "model")


def test_the_model_is_an_ordinary_one(model, tokenizer):
    assert type(model).__name__ == "Qwen3ForCausalLM"
    assert sum(parameter.numel() for parameter in model.parameters()) == 132_800
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert model.config.vocab_size == len(tokenizer) == 21
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id


def test_every_character_is_a_token_and_comes_back(playground, tokenizer):
    for row in read_rows(playground / "preference.jsonl"):
        for text in (row["prompt"], row["chosen"], row["rejected"], row["prompt"] + row["chosen"]):
            ids = tokenizer(text)["input_ids"]
            assert len(ids) == len(text)
            assert tokenizer.unk_token_id not in ids
            assert tokenizer.decode(ids) == text


def test_characters_outside_the_alphabet_are_unknown(tokenizer):
    assert tokenizer.tokenize("1\n\n2x é") == ["1", "<unk>", "<unk>", "2", "<unk>", "<unk>", "<unk>"]
    assert tokenizer("1<eos>")["input_ids"][-1] == tokenizer.eos_token_id


def test_padding_is_on_the_left(tokenizer):
    batch = tokenizer(["12+34:", "1+2:"], padding=True, return_tensors="pt")
    assert set(batch) == {"input_ids", "attention_mask"}
    assert batch["attention_mask"].tolist() == [[1] * 6, [0, 0, 1, 1, 1, 1]]
    assert tokenizer.batch_decode(batch["input_ids"], skip_special_tokens=True) == ["12+34:", "1+2:"]


def test_a_conversation_has_the_tokens_of_the_plain_text(tokenizer):
    question, answer = {"role": "user", "content": "1+2:"}, {"role": "assistant", "content": "1203#03"}
    prompt = tokenizer.apply_chat_template([question], tokenize=False, add_generation_prompt=True)
    assert prompt == "1+2:"
    assert tokenizer.apply_chat_template([question, answer], tokenize=False) == "1+2:1203#03<eos>"


def test_padding_does_not_change_what_is_generated(model, tokenizer):
    prompts = ["1+2:", "123456+234567:"]
    together = tokenizer(prompts, padding=True, return_tensors="pt")
    generated = model.generate(**together, do_sample=False, max_new_tokens=12)[:, together["input_ids"].shape[1] :]
    for row, prompt in enumerate(prompts):
        alone = tokenizer(prompt, return_tensors="pt")
        expected = model.generate(**alone, do_sample=False, max_new_tokens=12)[0, alone["input_ids"].shape[1] :]
        assert generated[row, : len(expected)].tolist() == expected.tolist()


def test_loss_is_the_mean_over_response_tokens(model):
    pairs = [([4, 5, 6], [7, 8, 1]), ([9], [4, 1]), ([4, 4, 4, 4], [1])]
    with torch.no_grad():
        tokens, targets = collate(pairs, pad_token_id=0)
        loss = response_loss(model, tokens, targets)
        likelihoods = []
        for prompt, response in pairs:
            predicted = log_softmax(model(torch.tensor([prompt + response])).logits[0], dim=-1)
            likelihoods += [predicted[len(prompt) + i - 1, token] for i, token in enumerate(response)]
    torch.testing.assert_close(loss, -torch.stack(likelihoods).mean())


def test_batches_hold_the_demonstrations_and_nothing_else(tokenizer):
    task, steps = TASKS["addition"](), 35
    source = demonstrations(task, seed=3)
    expected = sorted(problem.prompt + text + "<eos>" for problem, text in (next(source) for _ in range(32 * steps)))
    made = list(batches(task, tokenizer, 3, steps))
    assert len(made) == steps
    texts = [text.replace("<pad>", "") for tokens, _ in made for text in tokenizer.batch_decode(tokens)]
    assert sorted(texts) == expected


def test_the_seed_decides_the_first_weights(tokenizer):
    weights = [build_model(tokenizer, seed).model.embed_tokens.weight for seed in (0, 0, 1)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_learning_rates_warm_up_stay_and_fall():
    factors = [lr_factor(step, 750) for step in range(750)]
    assert factors[:30] == pytest.approx([step / 30 for step in range(1, 31)])
    assert set(factors[30:375]) == {1.0}
    assert factors[375:] == pytest.approx([1 - 0.98 * i / 375 for i in range(375)])
    # A short run warms up for a quarter of it.
    assert [lr_factor(step, 8) for step in range(5)] == [0.5, 1, 1, 1, 1]


def test_pretraining_lowers_the_loss(tokenizer):
    losses = []
    pretrain(build_model(tokenizer, seed=0), tokenizer, TASKS["addition"](), seed=0, steps=20, on_step=losses.append)
    assert len(losses) == 20
    # An untrained model is near ln 21 = 3.04 nats; guessing among 13 characters that responses use costs ln 13 = 2.56.
    assert losses[0] > 2.8
    assert sum(losses[-5:]) / 5 < 2.5


def test_newton_schulz_is_its_polynomial_on_singular_values():
    torch.manual_seed(0)
    matrices = torch.randn(3, 8, 20, dtype=torch.float64)
    left, values, right = torch.linalg.svd(matrices, full_matrices=False)
    values = values / values.square().sum(dim=1, keepdim=True).sqrt()
    for _ in range(4):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    expected = left @ torch.diag_embed(values) @ right
    torch.testing.assert_close(orthogonalise(matrices), expected, atol=1e-5, rtol=1e-5)
    assert 0.5 < values.min()
    assert values.max() < 1.3


def test_muon_steps_along_the_orthogonalised_nesterov_momentum():
    torch.manual_seed(0)
    shapes = [(6, 4), (4, 6), (5, 5)]
    parameters = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    expected = [parameter.detach().clone() for parameter in parameters]
    averages = [torch.zeros(shape) for shape in shapes]
    optimizer = Muon(parameters, lr=0.1, momentum=0.9)
    for _ in range(3):
        for i, (rows, columns) in enumerate(shapes):
            gradient = torch.randn(rows, columns)
            parameters[i].grad = gradient
            averages[i] = 0.9 * averages[i] + 0.1 * gradient
            direction = 0.1 * gradient + 0.9 * averages[i]
            wide = direction.T if rows > columns else direction
            update = orthogonalise(wide[None])[0]
            update = update.T if rows > columns else update
            expected[i] -= 0.1 * max(1, rows / columns) ** 0.5 * update
        optimizer.step()
    for parameter, value in zip(parameters, expected, strict=True):
        torch.testing.assert_close(parameter.detach(), value)


@pytest.mark.slow
def test_the_base_model_can_do_easy_levels_and_leaves_room_on_hard_ones(tmp_path):
    out = build_playground(tmp_path / "full", progress=False)
    model = AutoModelForCausalLM.from_pretrained(out / "model")
    tokenizer = AutoTokenizer.from_pretrained(out / "model")
    rows = read_rows(out / "eval.jsonl")
    torch.manual_seed(0)
    prompts = tokenizer([row["prompt"] for row in rows], padding=True, return_tensors="pt")
    generated = model.generate(
        **prompts, do_sample=True, temperature=1.0, top_k=0, max_new_tokens=54, num_return_sequences=8
    )
    texts = tokenizer.batch_decode(generated[:, prompts["input_ids"].shape[1] :], skip_special_tokens=True)
    right = [[], [], [], [], [], []]
    for i, row in enumerate(rows):
        answers = [text.rpartition("#")[2] for text in texts[8 * i : 8 * i + 8] if "#" in text]
        count = sum(answer.isdigit() and int(answer) == int(row["answer"]) for answer in answers)
        right[int(row["level"][3]) - 1].append(count)
    pass_at_1 = [sum(counts) / (8 * len(counts)) for counts in right]
    pass_at_8 = [sum(count > 0 for count in counts) / len(counts) for counts in right]
    assert pass_at_1[0] > 0.8
    assert (pass_at_1[4] + pass_at_1[5]) / 2 < 0.1
    assert 0.28 < sum(pass_at_1) / 6 < 0.45
    # What reinforcement learning can bring out: problems solved now and then.
    assert sum(pass_at_8) / 6 > sum(pass_at_1) / 6 + 0.2
