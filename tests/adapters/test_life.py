"""The whole PEFT life, for every kind of adapter: what is promised once in the base classes is tested for each."""

import copy
import json
import pickle
import subprocess
import sys

import peft
import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model
from peft.helpers import disable_input_dtype_casting
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

from hf_delta import InputError
from tests.adapters.life import DORA, IDS, KINDS, adapted, base_model, config_of, gpt2_model, layers, logits, perturb


every_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(scope="session")
def base_dir(tmp_path_factory):
    path = tmp_path_factory.mktemp("base")
    base_model().save_pretrained(path)
    return str(path)


def loaded(base_dir, **kwargs):
    return AutoModelForCausalLM.from_pretrained(base_dir, **kwargs)


@every_kind
def test_the_start_is_the_base_model_bit_for_bit(kind):
    assert torch.equal(logits(adapted(kind, std=0)), logits(base_model()))


@every_kind
def test_only_the_adapter_is_trained(kind):
    model = adapted(kind)
    before = {n: p.clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward()
    optimizer.step()
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed == {n for n in before if ".default.weight" in n and "hfd_" in n}
    assert model(input_ids=IDS, labels=IDS).loss < loss


@every_kind
def test_gradients_are_those_of_the_changed_weight(kind):
    """Finite differences of `(W + delta_weight) x`, along a random direction of the adapter and the input."""
    if kind == "edora":
        pytest.skip("takes the norm as a constant, so its gradient is no derivative: see test_edora.py")
    generator = torch.Generator().manual_seed(3)

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    for layer in layers(adapted(kind).double())[:7]:
        x, onto = random(2, 3, layer.in_features).requires_grad_(), random(2, 3, layer.out_features)
        trained = [x, *(p for p in layer.parameters() if p.requires_grad)]
        (layer(x) * onto).sum().backward()
        direction = [random(*p.shape) for p in trained]
        slope = sum((p.grad * d).sum() for p, d in zip(trained, direction)).item()
        found, step = [], 1e-4
        with torch.no_grad():
            for sign in (step, -2 * step):
                for p, d in zip(trained, direction):
                    p.add_(d, alpha=sign)
                weight = layer.original_weight()
                weight = weight + layer.delta_weight("default", weight)
                found.append((nn.functional.linear(x, weight, layer.base_bias) * onto).sum().item())
        assert abs(slope) > 1e-2 and (found[0] - found[1]) / (2 * step) == pytest.approx(slope, rel=1e-6)


@every_kind
def test_the_short_way_equals_the_long_way(kind):
    """A hook on the base layers, which a fused computation would pass by, sends the layers the long way."""
    short, long = adapted(kind), adapted(kind)
    calls = []
    for layer in layers(long):
        layer.base_layer.register_forward_hook(lambda *args: calls.append(1))
    for model in (short, long):
        model(input_ids=IDS, labels=IDS).loss.backward()
    assert calls
    assert torch.allclose(logits(short), logits(long), atol=1e-5)
    for (name, one), other in zip(short.named_parameters(), long.parameters()):
        assert (one.grad is None) == (other.grad is None)
        assert one.grad is None or torch.allclose(one.grad, other.grad, atol=1e-5), name


@every_kind
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(kind, reentrant):
    plain, checkpointed = adapted(kind), adapted(kind)
    checkpointed.gradient_checkpointing_enable({"use_reentrant": reentrant})
    checkpointed.enable_input_require_grads()
    for model in (plain, checkpointed):
        model.train()
        model(input_ids=IDS, labels=IDS).loss.backward()
    for (name, one), other in zip(plain.named_parameters(), checkpointed.parameters()):
        assert (one.grad is None) == (other.grad is None)
        assert one.grad is None or torch.allclose(one.grad, other.grad, atol=1e-6), name


@every_kind
def test_several_adapters(kind):
    model = adapted(kind)
    first = logits(model)
    changes = {"r": config_of(kind).r // 2}
    model.add_adapter("second", config_of(kind, **changes, target_modules=["q_proj", "down_proj"]))
    assert torch.equal(logits(model), first)
    model.set_adapter("second")
    perturb(model, 2, adapter="second")
    second = logits(model)
    assert not torch.allclose(first, second, atol=1e-3)
    model.set_adapter("default")
    assert torch.equal(logits(model), first)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(base_model()))
    model.delete_adapter("default")
    model.set_adapter("second")
    assert torch.equal(logits(model), second)
    assert not any("default" in layer.adapters for layer in layers(model))


@every_kind
def test_an_adapter_of_a_name_that_was_used_has_nothing_of_the_former(kind):
    model, fresh = adapted(kind), adapted(kind, std=0.0, r=config_of(kind).r // 2)
    logits(model)
    model.delete_adapter("default")
    model.add_adapter("default", config_of(kind, r=config_of(kind).r // 2))
    model.set_adapter("default")
    for each in (model, fresh):
        perturb(each, 4)
    assert torch.equal(logits(model), logits(fresh))


@every_kind
def test_only_active_adapters_are_trained_also_on_layers_that_had_none(kind):
    model = adapted(kind, target_modules=["q_proj"])
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    model.add_adapter("second", config_of(kind, target_modules=["up_proj"]))
    assert {n for n, p in model.named_parameters() if p.requires_grad} == trained
    model.set_adapter("second")
    now = {n for n, p in model.named_parameters() if p.requires_grad}
    assert now and all(".second." in name and "up_proj" in name for name in now)


@every_kind
def test_a_trained_base_gets_its_gradients(kind):
    """The fused computations take the base as frozen."""
    model = adapted(kind)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("base_layer.bias" in name or "o_proj.base_layer.weight" in name)
    model(input_ids=IDS, labels=IDS).loss.backward()
    gradients = [p.grad for p in model.parameters() if p.requires_grad]
    assert len(gradients) == 8 and all(g is not None and g.any() for g in gradients)


@every_kind
def test_active_together_adapters_add_up_and_merge_to_the_same(kind):
    model = adapted(kind)
    model.add_adapter("second", config_of(kind))
    perturb(model.base_model.set_adapter("second") or model, 2, adapter="second")
    model.base_model.set_adapter(["default", "second"])
    layer = layers(model)[0]
    x = torch.randn(5, layer.in_features, generator=torch.Generator().manual_seed(0))
    weight = layer.original_weight()
    changed = weight + layer.delta_weight("default", weight) + layer.delta_weight("second", weight)
    assert torch.allclose(layer(x), nn.functional.linear(x, changed, layer.base_bias), atol=1e-5)
    together = logits(model)
    model.merge_adapter()
    assert torch.allclose(logits(model), together, atol=1e-4)


@every_kind
def test_merged_one_after_the_other_they_add_up_too(kind):
    model = adapted(kind)
    model.add_adapter("second", config_of(kind))
    perturb(model.base_model.set_adapter("second") or model, 2, adapter="second")
    model.base_model.set_adapter(["default", "second"])
    together = logits(model)
    before = dict(model.named_parameters())
    model.merge_adapter(["default"])
    assert not torch.allclose(logits(model), together, atol=1e-3)
    model.merge_adapter(["second"])
    assert torch.allclose(logits(model), together, atol=1e-4)
    model.unmerge_adapter()
    assert all(parameter is before[name] for name, parameter in model.named_parameters())
    assert torch.equal(logits(model), together)


@every_kind
def test_merged_while_disabled_it_is_the_base_model(kind):
    model = adapted(kind)
    with model.disable_adapter():
        model.merge_adapter()
        assert torch.equal(logits(model), logits(base_model()))


@every_kind
def test_disabling_takes_merged_adapters_out_before_any_forward(kind):
    model = adapted(kind)
    weights = [layer.base_layer.weight for layer in layers(model)]
    model.merge_adapter()
    with model.disable_adapter():
        assert all(layer.base_layer.weight is weight for layer, weight in zip(layers(model), weights))


@every_kind
def test_merging_can_be_undone_bit_for_bit(kind):
    model = adapted(kind, base_model(torch.bfloat16))
    before = {n: (id(p), p.clone()) for n, p in model.named_parameters()}
    unmerged = logits(model)
    for _ in range(3):
        model.merge_adapter()
        assert not any(torch.equal(w.get_base_layer().weight, w.original_weight()) for w in layers(model))
        model.unmerge_adapter()
    after = dict(model.named_parameters())
    assert after.keys() == before.keys()
    for name, (identity, value) in before.items():
        assert id(after[name]) == identity and torch.equal(after[name], value), name
    assert torch.equal(logits(model), unmerged)


@every_kind
@pytest.mark.parametrize("safe", [False, True])
def test_the_merged_model_computes_the_same(kind, safe):
    model = adapted(kind)
    expected = logits(model)
    model.merge_adapter(safe_merge=safe)
    assert torch.allclose(logits(model), expected, atol=1e-5)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(base_model()))
    plain = adapted(kind).merge_and_unload(safe_merge=safe)
    assert torch.allclose(logits(plain), expected, atol=1e-5)
    assert not layers(plain) and type(plain) is type(base_model())


@every_kind
def test_a_merge_that_would_not_be_finite_changes_nothing(kind):
    model = adapted(kind)
    logits(model)
    layer = layers(model)[0]
    weight = layer.base_layer.weight
    with torch.no_grad():
        next(p for n, p in layer.named_parameters() if "hfd_" in n).fill_(float("nan"))
    with pytest.raises(ValueError, match="nothing was merged"):
        layer.merge(safe_merge=True)
    assert layer.base_layer.weight is weight and not layer.merged


@every_kind
def test_a_tied_weight_stays_tied(kind):
    model = adapted(kind, target_modules=["lm_head", "q_proj"])
    embedding, head = model.get_input_embeddings(), model.base_model.model.lm_head
    assert head.base_layer.weight is embedding.weight
    original, expected = embedding.weight.clone(), logits(model)
    with pytest.warns(UserWarning, match="tie_word_embeddings"):
        model.merge_adapter()
    assert torch.equal(embedding.weight, original)
    assert torch.allclose(logits(model), expected, atol=1e-5)
    model.unmerge_adapter()
    assert head.base_layer.weight is embedding.weight


@every_kind
def test_saved_and_loaded_it_is_the_same(kind, tmp_path, base_dir):
    model = adapted(kind, loaded(base_dir), modules_to_save=["model.norm"])
    with torch.no_grad():
        model.base_model.model.model.norm.modules_to_save["default"].weight.mul_(1.5)
    expected = logits(model)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert tensors and not any("base_layer" in name for name in tensors)
    ways = {
        "PeftModel": lambda: PeftModel.from_pretrained(loaded(base_dir), tmp_path),
        "trainable": lambda: PeftModel.from_pretrained(loaded(base_dir), tmp_path, is_trainable=True),
        "low memory": lambda: PeftModel.from_pretrained(loaded(base_dir), tmp_path, low_cpu_mem_usage=True),
        "auto": lambda: AutoPeftModelForCausalLM.from_pretrained(tmp_path),
    }
    for way, load in ways.items():
        again = load()
        assert torch.equal(logits(again), expected), way
        assert {p.device.type for p in again.parameters()} == {"cpu"}, way
        assert any(p.requires_grad for p in again.parameters()) == (way == "trainable")
    again.save_pretrained(tmp_path / "again")
    twice = load_file(tmp_path / "again" / "adapter_model.safetensors")
    assert twice.keys() == tensors.keys() and all(torch.equal(twice[n], tensors[n]) for n in tensors)


@every_kind
@pytest.mark.parametrize("low_memory", [False, True])
def test_weights_in_32_bits_stay_whole_over_a_base_in_16(kind, low_memory, tmp_path, base_dir):
    model = adapted(kind, loaded(base_dir, dtype=torch.bfloat16))
    expected = logits(model)
    model.save_pretrained(tmp_path)
    base = loaded(base_dir, dtype=torch.bfloat16)
    again = PeftModel.from_pretrained(base, tmp_path, low_cpu_mem_usage=low_memory)
    saved = {n: p for n, p in model.named_parameters() if ".default.weight" in n}
    assert saved and all(p.dtype == torch.float32 for p in saved.values())
    for name, parameter in again.named_parameters():
        assert name not in saved or torch.equal(parameter, saved[name]), name
    assert torch.equal(logits(again), expected)


@every_kind
def test_transformers_loads_it_without_peft_model(kind, tmp_path, base_dir):
    model = adapted(kind, loaded(base_dir))
    expected = logits(model)
    model.save_pretrained(tmp_path)
    plain = loaded(base_dir)
    plain.load_adapter(str(tmp_path))
    assert torch.equal(logits(plain), expected)
    assert torch.equal(logits(loaded(str(tmp_path))), expected)
    plain.disable_adapters()
    assert torch.equal(logits(plain), logits(loaded(base_dir)))
    plain.enable_adapters()
    plain.delete_adapter("default")
    fresh = loaded(base_dir)
    fresh.add_adapter(config_of(kind))
    assert torch.equal(logits(fresh), logits(loaded(base_dir)))


def test_a_fresh_process_needs_the_import_and_says_so(tmp_path, base_dir):
    folders = {}
    for kind in KINDS:
        model = adapted(kind, loaded(base_dir))
        folders[kind] = str(tmp_path / kind)
        model.save_pretrained(folders[kind])
        torch.save(logits(model), tmp_path / f"{kind}.pt")
    code = (
        "import sys, json, torch\n{first}\nfrom peft import AutoPeftModelForCausalLM\n"
        "ids = torch.tensor(json.loads(sys.argv[1]))\n"
        "for folder in sys.argv[2:]:\n"
        "    try:\n"
        "        found = AutoPeftModelForCausalLM.from_pretrained(folder)(input_ids=ids).logits\n"
        "        print('same' if torch.allclose(found, torch.load(folder + '.pt'), atol=1e-6) else 'different')\n"
        "    except KeyError as error:\n"
        "        print('KeyError', error)\n"
    )

    def run(first):
        command = [sys.executable, "-c", code.format(first=first), json.dumps(IDS.tolist()), *folders.values()]
        found = subprocess.run(command, capture_output=True, text=True)
        assert found.returncode == 0, found.stderr[-2000:]
        return found.stdout.split("\n")[:-1]

    assert run("import hf_delta") == ["same"] * len(KINDS)
    without = run("")
    assert len(without) == len(KINDS) and all(line.startswith("KeyError 'HFD_") for line in without)


@every_kind
def test_configurations_survive_json_pickle_and_copies(kind, tmp_path):
    config = config_of(kind)
    config.save_pretrained(tmp_path)
    assert peft.PeftConfig.from_pretrained(tmp_path) == config
    assert pickle.loads(pickle.dumps(config)) == config == copy.deepcopy(config)
    assert config.peft_type in list(peft.PeftType) and config.peft_type.value.startswith("HFD_")


@every_kind
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast_adapter", [True, False])
def test_half_precision_bases(kind, dtype, autocast_adapter):
    model = get_peft_model(base_model(dtype), config_of(kind), autocast_adapter_dtype=autocast_adapter)
    perturb(model)
    trained = {p.dtype for p in model.parameters() if p.requires_grad}
    assert trained == ({torch.float32} if autocast_adapter else {dtype})
    loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward()
    assert all(p.grad.dtype == p.dtype and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    reference = adapted(kind, base_model(dtype).float())
    assert loss.item() == pytest.approx(reference(input_ids=IDS, labels=IDS).loss.item(), rel=0.03)


@every_kind
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(kind, dtype):
    model = adapted(kind)
    exact = model(input_ids=IDS, labels=IDS).loss.item()
    with torch.autocast("cpu", dtype):
        loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward()
    assert loss.item() == pytest.approx(exact, rel=0.03) and loss.item() != exact
    assert model(input_ids=IDS, labels=IDS).loss.item() == exact
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


@every_kind
def test_mixed_batches(kind):
    model = adapted(kind).eval()
    model.add_adapter("second", config_of(kind))
    perturb(model.base_model.set_adapter("second") or model, 2, adapter="second")
    second = logits(model)
    model.set_adapter("default")
    default = logits(model)
    names = ["second", "__base__", "default"]
    with torch.no_grad():
        found = model(input_ids=IDS, adapter_names=names).logits
    for row, expected in enumerate([second, logits(base_model()), default]):
        assert torch.allclose(found[row], expected[row], atol=1e-5)
    assert torch.equal(logits(model), default)
    settings = {"max_new_tokens": 3, "do_sample": False, "num_beams": 2}
    beams = model.generate(input_ids=IDS, adapter_names=names, **settings)
    twice = model.generate(input_ids=IDS, adapter_names=names, **{**settings, "num_return_sequences": 2})
    sampled = {"max_new_tokens": 3, "do_sample": True, "top_k": 1, "num_return_sequences": 2}
    rows = model.generate(input_ids=IDS, adapter_names=names, **sampled)
    model.set_adapter("second")
    assert torch.equal(beams[0], model.generate(input_ids=IDS[:1], **settings)[0])
    alone = model.generate(input_ids=IDS[:1], **{**settings, "num_return_sequences": 2})
    assert len(twice) == 6 and torch.equal(twice[:2], alone)
    assert torch.equal(rows[:2], model.generate(input_ids=IDS[:1], **sampled))
    with pytest.raises(ValueError, match=r"non-existing adapter\(s\): third. There are: default, second"):
        model(input_ids=IDS, adapter_names=["third", "second", "default"])
    with pytest.raises(ValueError, match="Length of `adapter_names` should be the same"):
        model(input_ids=IDS, adapter_names=["second", "default"])
    model.train()
    with pytest.raises(ValueError, match="training mode"):
        model(input_ids=IDS, adapter_names=names)


def test_mixed_batches_use_each_adapters_own_copy_of_a_module_trained_whole():
    model = adapted("bone", modules_to_save=["lm_head"]).eval()
    model.add_adapter("second", config_of("bone", modules_to_save=["lm_head"]))
    copies = model.base_model.model.lm_head.modules_to_save
    expected = []
    for factor, name in [(1.5, "default"), (0.5, "second")]:
        with torch.no_grad():
            copies[name].weight.mul_(factor)
        model.set_adapter(name)
        expected.append(logits(model))
    with torch.no_grad():
        found = model(input_ids=IDS[:2], adapter_names=["default", "second"]).logits
    assert torch.allclose(found[0], expected[0][0], atol=1e-5) and torch.allclose(found[1], expected[1][1], atol=1e-5)


@every_kind
def test_conv1d(kind):
    model = adapted(kind, gpt2_model().eval()).eval()
    assert len(layers(model)) == 8
    expected = logits(model)
    assert not torch.allclose(expected, logits(gpt2_model().eval()), atol=1e-4)
    weights = {n: p.clone() for n, p in model.named_parameters()}
    model.merge_adapter()
    assert torch.allclose(logits(model), expected, atol=1e-5)
    model.unmerge_adapter()
    assert all(torch.equal(p, weights[n]) for n, p in model.named_parameters())


@every_kind
def test_a_model_can_be_copied_moved_and_cast(kind):
    model = adapted(kind)
    expected = logits(model)
    assert torch.equal(logits(copy.deepcopy(model)), expected)
    wide = copy.deepcopy(model).double()
    assert torch.allclose(logits(wide).float(), expected, atol=1e-5)
    wide.merge_adapter()
    wide.float()
    wide.unmerge_adapter()
    assert torch.allclose(logits(wide), expected, atol=1e-5)


@every_kind
def test_new_base_weights_are_noticed(kind):
    """What a layer derives from its weight and keeps must not outlive the weight."""
    if kind.startswith(("pmss", "edora", "lora_xs")):
        pytest.skip("refuses another base model")
    model = adapted(kind)
    logits(model)
    other = base_model(seed=5)
    model.base_model.model.load_state_dict(
        {
            n.replace(".weight", ".base_layer.weight").replace(".bias", ".base_layer.bias") if "proj" in n else n: p
            for n, p in other.state_dict().items()
        },
        strict=False,
    )
    assert torch.allclose(logits(model), logits(adapted(kind, other)), atol=1e-5)


# -- bad input ------------------------------------------------------------------------------------------------------
@every_kind
def test_broken_files_are_refused_before_anything_is_computed(kind, tmp_path, base_dir):
    adapted(kind, loaded(base_dir)).save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    kinds = {n.rpartition("hfd_")[2]: n for n, t in tensors.items() if "hfd_" in n and t.is_floating_point()}
    for broken in kinds.values():
        changed = tensors[broken].clone()
        changed.view(-1)[0] = float("nan")
        save_file({**tensors, broken: changed}, path, {"format": "pt"})
        with pytest.raises(InputError, match="holds NaN or infinite values"):
            logits(PeftModel.from_pretrained(loaded(base_dir), tmp_path))


@every_kind
def test_broken_values_are_refused_when_they_come_late_and_of_the_adapter_in_use_only(kind):
    """After a forward, and when another adapter's name begins alike."""
    model = adapted(kind)
    expected = logits(model)
    model.add_adapter("default2", config_of(kind))
    state = peft.get_peft_model_state_dict(model, adapter_name="default2")
    model.set_adapter("default2")
    logits(model)
    model.set_adapter("default")
    broken = {n: torch.full_like(t, float("nan")) if t.is_floating_point() else t for n, t in state.items()}
    peft.set_peft_model_state_dict(model, broken, "default2")
    peft.set_peft_model_state_dict(model, peft.get_peft_model_state_dict(model), "default")
    assert torch.equal(logits(model), expected)
    model.set_adapter("default2")
    with pytest.raises(InputError, match="q_proj, adapter 'default2': .* holds NaN"):
        logits(model)


@every_kind
def test_sizes_that_do_not_fit_are_refused(kind):
    with pytest.raises(InputError, match=r"q_proj.*(33|37)"):
        adapted(kind, r=37)


@every_kind
def test_layers_of_another_type_are_refused(kind):
    for target, said in [("embed_tokens", "Embedding cannot be adapted"), ("out_proj", "cannot be adapted")]:
        model = nn.ModuleDict({"embed_tokens": nn.Embedding(4, 8), "attention": nn.MultiheadAttention(8, 2)})
        with pytest.raises(InputError, match=f"{target}.*{said}|{said}"):
            get_peft_model(model, config_of(kind, target_modules=[target], task_type=None))


@every_kind
def test_peft_may_ask_for_inputs_not_to_be_cast(kind):
    model = adapted(kind)
    before = logits(model)
    with disable_input_dtype_casting(model):
        assert torch.equal(logits(model), before)


@every_kind
def test_a_target_that_matches_nothing_is_refused(kind):
    with pytest.raises(ValueError, match="no_such_layer"):
        adapted(kind, target_modules=["no_such_layer"])


@every_kind
@pytest.mark.parametrize(
    "changes,said",
    [
        ({"r": 0}, "r is 0: write a whole number"),
        ({"r": 2.5}, "r is 2.5"),
        ({"bias": "lora_only"}, "bias is 'lora_only': write one of none, all, hfd_"),
        ({"target_modules": ".*q_proj", "layers_to_transform": [0]}, "layers_to_transform goes with a list"),
        ({"target_modules": ["q_proj"], "layers_pattern": "h"}, "write layers_to_transform too"),
    ],
)
def test_wrong_fields_are_refused(kind, changes, said):
    with pytest.raises(InputError, match=said):
        config_of(kind, **changes)


def test_dora_is_in_the_list_of_kinds():
    assert set(DORA) == {"dora"}


def test_experts_that_get_no_adapter_are_named(caplog):
    config = MixtralConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=2,
        vocab_size=24,
    )
    adapted("bone", MixtralForCausalLM(config))
    (message,) = [record.getMessage() for record in caplog.records if "Experts of a mixture" in record.getMessage()]
    assert "mlp.experts" in message
    caplog.clear()
    adapted("bone")
    assert not caplog.records
