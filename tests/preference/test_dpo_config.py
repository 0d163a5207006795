"""Bad input: one message that names the key, the row and what to write, before anything is computed."""

import pytest
import torch
import trl
from datasets import Dataset, IterableDataset
from PIL import Image
from transformers import AutoModelForCausalLM

from hf_delta import DeltaDPOTrainer
from hf_delta.errors import InputError
from hf_delta.playground.model import build_model
from hf_delta.playground.tokenizer import build_tokenizer
from tests.preference.dpo import build, config, first_batch, list_rows, pair_rows
from tests.rl.frozen import build_world
from tests.running import keys
from tests.test_bad_input import refusal


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return build_world(tmp_path_factory.mktemp("world"))


FEASIBLE = {"feasible": True, "feasible_kwargs": {"epsilon": 0.3}}
CONTRAST = {"positive": "a", "negative": "b"}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        # names
        ({"loss_type": ["sparse_op"]}, "loss_type: there is no 'sparse_op'; did you mean sparse_po?"),
        ({"loss_type": "sigmiod"}, "loss_type: there is no 'sigmiod'; did you mean sigmoid?"),
        ({"loss_type": ["qqq"]}, "write one of sigmoid, hinge, ipo"),
        ({"loss_type": ["columns"]}, "loss_type: there is no 'columns'"),
        ({"loss_type": ["lipo"]}, "loss_type: there is no 'lipo'; did you mean lipo_lambda?"),
        ({"loss_type": []}, "loss_type is an empty list. Write one of sigmoid, hinge"),
        ({"token_weights": "colums"}, "token_weights: there is no 'colums'. Write one of columns"),
        ({"token_weights": "no.such.rule"}, "token_weights"),
        ({"kl": "exakt"}, "kl must be exact or sampled, got 'exakt'"),
        ({"logps_kernel": "triton"}, "logps_kernel must be trl or chunked, got 'triton'"),
        # combinations of losses
        ({"loss_type": ["tdpo1", "tdpo2"]}, "tdpo1 and tdpo2 cannot be trained on together"),
        ({"loss_type": ["tdpo1", "list_hinge"]}, "tdpo1 and list_hinge cannot be trained on together"),
        ({"loss_type": ["list_hinge", "sigmoid"]}, "list_hinge takes lists and sigmoid takes pairs"),
        ({"loss_type": ["list_hinge", "sft"]}, "list_hinge takes lists and sft takes pairs"),
        ({"loss_type": ["sparse_po", "sigmoid"]}, "only sft goes with it, not sigmoid"),
        ({"loss_type": ["aot"], **FEASIBLE}, "aot does not go with feasible; write one of sigmoid, hinge"),
        ({"loss_type": ["bco_pair"], "token_weights": "columns"}, "bco_pair does not go with token_weights"),
        ({"loss_type": ["sft"], "token_weights": "columns"}, "sft alone has no preference in it"),
        ({"loss_type": ["sigmoid", "sft"], **FEASIBLE}, "sft is a mean over tokens. Remove one"),
        ({"loss_type": ["robust"], "label_smoothing": 0.5, **FEASIBLE}, "label_smoothing must lie in [0, 0.5)"),
        # rules
        ({"loss_type": ["tdpo1"], "token_weights": "columns"}, "Remove token_weights, or write loss_type: sigmoid"),
        ({"loss_type": ["list_hinge"], "token_weights": "columns"}, "a list loss has none. Remove one of them"),
        ({"token_weights_kwargs": {"gamma": 0.9}}, "token_weights_kwargs does nothing without a rule"),
        ({"loss_type": ["d2po"], "token_weights_kwargs": {"gama": 0.9}}, "Did you mean gamma?"),
        (
            {"loss_type": ["d2po"], "token_weights_kwargs": {"gamma": 1.5}},
            "token_weights_kwargs: d2po: gamma is a decay",
        ),
        ({"loss_type": ["d2po"], "token_weights_kwargs": {"gamma": "x"}}, "kwargs: gamma must be a number, got 'x'."),
        ({"loss_type": ["tis_dpo"], "token_weights_kwargs": CONTRAST | {"scale": 1}}, "scale takes two weights"),
        (
            {"loss_type": ["tis_dpo"], "token_weights_kwargs": CONTRAST | {"low": "x"}},
            "low must be below high",
        ),
        ({"loss_type": ["d2po"], "token_weights_kwargs": "{gamma"}, "token_weights_kwargs is not JSON"),
        ({"loss_type": ["sparse_po"], "token_weights_kwargs": {"net": "big"}}, "net takes simple or two_layer"),
        ({"kl": "sampled"}, "kl: sampled does nothing"),
        ({"kl": "sampled", "loss_type": ["d2po"]}, "kl: sampled does nothing"),
        # feasible
        ({"feasible": True}, "write feasible_kwargs: {epsilon: 0.3}"),
        ({"feasible": True, "feasible_kwargs": {"epsilon": 0.3, "etta": 1.0}}, "Did you mean eta?"),
        ({"feasible": True, "feasible_kwargs": {"epsilon": "low"}}, "feasible: epsilon must be a finite number"),
        ({"feasible": True, "feasible_kwargs": {"epsilon": 0.3, "alpha": 0.2}}, "less than twice alpha"),
        ({"feasible_kwargs": {"epsilon": 0.3}}, "feasible_kwargs does nothing without feasible: true"),
        ({"sample_id_column": "id"}, "sample_id_column does nothing without feasible: true"),
        ({"list_rescale": False}, "list_rescale does nothing without a list loss"),
        # keys of TRL that act inside of its own loss
        ({"precompute_ref_log_probs": True, **FEASIBLE}, "precompute_ref_log_probs: True does not go with feasible"),
        ({"padding_free": True, "loss_type": ["tdpo1"]}, "padding_free: True does not go with tdpo1"),
        ({"use_weighting": True, "loss_type": ["mapo"]}, "use_weighting: True does not go with mapo"),
        ({"ld_alpha": 0.5, "loss_type": ["list_hinge"]}, "ld_alpha: 0.5 does not go with list_hinge"),
        ({"f_divergence_type": "forward_kl", "token_weights": "columns"}, "f_divergence_type: forward_kl does not go"),
    ],
)
def test_keys(tmp_path, changes, said):
    with pytest.raises(InputError) as refused:
        config(tmp_path, **changes)
    assert said in str(refused.value)


def test_keys_that_go_together(tmp_path):
    for changes in (
        {"loss_type": ["sparse_po", "sft"], "loss_weights": [1.0, 0.1], "token_weights_kwargs": '{"dropout": 0.0}'},
        {"loss_type": ["list_softmax"], "list_rescale": False, **FEASIBLE},
        {"loss_type": ["hinge", "ipo"], "token_weights": "columns", "token_weights_kwargs": {"kl": True}, "kl": "sampled"},
        {"loss_type": ["tdpo2"], "logps_kernel": "chunked", "sample_id_column": "id", **FEASIBLE},
    ):  # fmt: skip
        assert config(tmp_path, **changes).replaces_loss
    assert not config(tmp_path, logps_kernel="chunked", loss_type=["aot"], ld_alpha=0.5).replaces_loss


# -- rows -----------------------------------------------------------------------------------------------------------
COLUMNS = {"token_weights": "columns"}
LISTS = {"loss_type": ["list_logistic"]}


def weighted(**changes):
    rows = [{**row, "chosen_weights": 1.0, "rejected_weights": 0.5} for row in pair_rows()]
    rows[2] |= changes
    return rows


def changed(rows, **changes):
    rows[2] |= changes
    return rows


@pytest.mark.parametrize(
    ("settings", "rows", "said"),
    [
        (FEASIBLE, changed(pair_rows(), chosen=pair_rows()[2]["rejected"]), "row 3: 'chosen' and 'rejected' are equal"),
        (FEASIBLE, changed(pair_rows(), rejected=""), "row 3: 'rejected' is empty; remove it"),
        (FEASIBLE, changed(pair_rows(), prompt=""), "row 3: 'prompt' is ''"),
        (FEASIBLE, [{"prompt": "1", "completion": "2"}], "train_dataset has no column 'chosen'"),
        (FEASIBLE, list_rows(), "loss_type: sigmoid takes rows with chosen and rejected; list losses take lists"),
        (COLUMNS, weighted(chosen_weights=-1.0), "row 3: 'chosen_weights' is -1.0; a weight must be"),
        (COLUMNS, weighted(rejected_weights=float("inf")), "row 3: 'rejected_weights' is inf"),
        (COLUMNS, pair_rows(), "row 1 has no 'chosen_weights'"),
        ({"loss_type": ["tis_dpo"]}, pair_rows(), "row 1 has no 'chosen_weights'"),
        (LISTS, pair_rows(), "list_logistic takes rows with completions; lists_from_pairs makes lists of pairs"),
        (LISTS, changed(list_rows(), completions=["1"], scores=[1.0]), "row 3: 'completions' must be a list of 2"),
        (LISTS, changed(list_rows(), scores=[1.0, float("nan"), 2.0]), "row 3: 'scores[1]' is nan"),
        (LISTS, changed(list_rows(), scores=[1.0, 2.0]), "row 3: 'scores' must be one number for each of 3"),
        (LISTS, changed(list_rows(), completions=["1", "", "3"]), "row 3: 'completions[1]' is empty"),
        ({**LISTS, "list_rescale": False}, list_rows(), "without rescaling, scores must be in [0, 1]"),
    ],
)  # fmt: skip
def test_rows(world, tmp_path, settings, rows, said):
    with pytest.raises(InputError) as refused:
        build(world, tmp_path, rows=rows, model="never loaded", **settings)
    assert said in str(refused.value)


def test_a_column_of_ids_that_is_not_there_or_names_two_rows(world, tmp_path):
    with pytest.raises(InputError, match="sample_id_column: train_dataset has no column 'id'"):
        build(world, tmp_path, sample_id_column="id", **FEASIBLE)
    rows = [{**row, "id": f"row{i % 7}"} for i, row in enumerate(pair_rows())]
    with pytest.raises(InputError, match="id 'row0' names two different rows, 1 and 8"):
        build(world, tmp_path, rows=rows, sample_id_column="id", **FEASIBLE)


@pytest.mark.parametrize("side", ["chosen", "rejected"])
def test_weights_of_the_wrong_length_name_row_and_key(world, tmp_path, side):
    rows = [{**r, **{f"{s}_weights": [1.0] * (len(r[s]) + 1) for s in ("chosen", "rejected")}} for r in pair_rows()]
    build(world, tmp_path, rows=rows, **COLUMNS)
    rows[4][f"{side}_weights"].append(1.0)
    with pytest.raises(InputError, match=f"row 5 .*'{side}_weights' has {len(rows[4][f'{side}_weights'])} numbers"):
        build(world, tmp_path, rows=rows, **COLUMNS)


def test_a_column_of_ids_that_is_not_there_is_missed_before_the_policy_is_loaded(tmp_path):
    with pytest.raises(InputError, match="sample_id_column: train_dataset has no column 'uid'; it has chosen"):
        DeltaDPOTrainer(
            "no/such-policy",
            args=config(tmp_path, **FEASIBLE, sample_id_column="uid"),
            train_dataset=Dataset.from_list(pair_rows()),
        )


def test_contrast_models_that_are_not_there_are_missed_before_the_policy_is_loaded(tmp_path):
    there = tmp_path / "there"
    there.mkdir()
    gone = {
        "loss_type": "tis_dpo",
        "token_weights_kwargs": {"positive": str(there), "negative": str(tmp_path / "gone")},
    }
    with pytest.raises(InputError, match=r"negative: .*gone is no directory"):
        DeltaDPOTrainer("no/such-policy", args=config(tmp_path, **gone), train_dataset=Dataset.from_list(pair_rows()))


def test_rows_of_an_evaluation_are_checked_under_their_name(world, tmp_path):
    bad = Dataset.from_list(changed(pair_rows(), rejected=""))
    for given, name in ((bad, "eval_dataset"), ({"held_out": bad}, "held_out_dataset")):
        with pytest.raises(InputError, match=f"{name}, row 3: 'rejected' is empty"):
            build(world, tmp_path, eval_dataset=given, model="never loaded", **FEASIBLE)
    trainer = build(world, tmp_path, **FEASIBLE)
    with pytest.raises(InputError, match="eval_dataset, row 3: 'rejected' is empty"):
        trainer.evaluate(bad)


def test_a_stream_is_checked_as_it_comes_by(world, tmp_path):
    rows = changed(pair_rows(), rejected="")
    stream = IterableDataset.from_generator(lambda: iter(rows))
    with pytest.raises(InputError, match="row 3: 'rejected' is empty"):
        build(world, tmp_path, rows=stream, max_steps=4, **FEASIBLE).train()


def test_images(world, tmp_path):
    rows = Dataset.from_list([{**row, "image": Image.new("RGB", (2, 2))} for row in pair_rows(2)])
    with pytest.raises(InputError, match="has 'image': losses of hf_delta are for texts"):
        build(world, tmp_path, rows=rows, model="never loaded", **FEASIBLE)


# -- models and rules -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("loss_type", ["tdpo1", "lipo_lambda"])
def test_a_plain_config_with_a_loss_of_ours(world, tmp_path, loss_type):
    with pytest.raises(
        InputError, match=f"loss_type: {loss_type} needs a DeltaDPOConfig, and args is a plain DPOConf"
    ):
        build(world, tmp_path, config_cls=trl.DPOConfig, loss_type=[loss_type], model="never loaded")


@pytest.mark.parametrize("changes", [{"loss_type": ["tdpo1"]}, {"logps_kernel": "chunked"}])
def test_a_reference_with_another_vocabulary(world, tmp_path, changes):
    reference = build_model(build_tokenizer("0123456789+-*=:;#ABC"), seed=2)
    with pytest.raises(InputError, match="a vocabulary of .* tokens and the reference one of"):
        build(world, tmp_path, ref_model=reference, **changes)


@pytest.mark.parametrize("changes", [{"loss_type": ["tdpo1"]}, {"logps_kernel": "chunked"}])
def test_the_router_loss_of_a_mixture_of_experts(world, tmp_path, changes):
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    small = AutoModelForCausalLM.from_pretrained(world).config
    shape = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 8, "intermediate_size": 8}
    shape |= {"vocab_size": small.vocab_size, "hidden_size": 16, "num_hidden_layers": 1, "head_dim": 8}
    shape |= {"num_attention_heads": 2, "num_key_value_heads": 2, "output_router_logits": True}
    models = [Qwen3MoeForCausalLM(Qwen3MoeConfig(**shape)) for _ in range(2)]
    with pytest.raises(InputError, match="Write router_aux_loss_coef: 0.0, or take a loss_type of TRL's"):
        build(world, tmp_path, model=models[0], ref_model=models[1], router_aux_loss_coef=0.01, **changes)


def one_for_a_row(batch):
    return torch.ones(len(batch.logps))


def below_zero(batch):
    return -torch.ones_like(batch.logps)


def kl_unasked(batch):
    return torch.ones_like(batch.logps), torch.ones_like(batch.logps)


@pytest.mark.parametrize(
    ("function", "said"),
    [
        ("one_for_a_row", r"one_for_a_row: the reward weights are \(8,\) and must be \(N, T\)"),
        ("below_zero", "below_zero: the reward weights are negative in the chosen completion of pair 0"),
        ("kl_unasked", "kl_unasked: it gave KL weights without 'kl' in what it needs"),
    ],
)
def test_what_a_users_function_gives(world, tmp_path, function, said):
    trainer = build(world, tmp_path, token_weights=f"tests.preference.test_dpo_config.{function}")
    with pytest.raises(InputError, match=said):
        trainer.compute_loss(trainer.model, first_batch(trainer))


# -- recipes --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"loss_type": ["sparse_op"]}, "did you mean sparse_po?"),
        ({"loss_type": ["tdpo2"], "token_weights_kwargs": {"alhpa": 0.5}}, "Did you mean alpha?"),
        ({"feasble": True}, "did you mean 'feasible'?"),
    ],
)
def test_a_typo_in_a_recipe(tmp_path, playground, capsys, changes, said):
    assert said in refusal(tmp_path, keys("dpo", playground, tmp_path / "out", **changes), capsys)
