"""Runs of the trainer on a random model, and every loss once more: one completion at a time, in float64, full logits."""

import copy
import math

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_delta import DeltaDPOConfig, DeltaDPOTrainer
from tests.running import CPU


BETA = 0.5


def completion(i, side):
    """Texts of 1 to 8 characters that differ between sides and rows."""
    return "#" + str(7919 * (i + 1) ** (2 + side))[: 1 + (i * (3 + side) + 2 * side) % 7]


def pair_rows(count=8):
    return [
        {"prompt": f"{13 * i}+{i}:", "chosen": completion(i, 0), "rejected": completion(i, 1) + ";"}
        for i in range(count)
    ]


def list_rows(sizes=(2, 4, 3, 2, 3, 4, 2, 3)):
    """Lists of varying length, with ties."""
    return [
        {
            "prompt": f"{13 * i}+{i}:",
            "completions": [completion(i + k, k % 2) + ";" * k for k in range(size)],
            "scores": [float((3 * k + i) % 3) for k in range(size - 1)] + [2.5],
        }
        for i, size in enumerate(sizes)
    ]


def config(out, cls=DeltaDPOConfig, **changes):
    settings = {
        "output_dir": str(out),
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "max_steps": 2,
        "learning_rate": 1e-2,
        "beta": BETA,
        "logging_steps": 1,
        "save_strategy": "no",
        **CPU,
    }
    return cls(**{**settings, **changes})


def lora(dropout=0.0, **changes):
    return LoraConfig(r=4, target_modules="all-linear", lora_dropout=dropout, task_type="CAUSAL_LM", **changes)


def build(world, out, cls=DeltaDPOTrainer, config_cls=DeltaDPOConfig, rows=None, model=None, **changes):
    """A trainer of a fresh model, or of `model`, which may be a function that gives it; rows are pairs, or lists for a list loss."""
    given = ("callbacks", "peft_config", "eval_dataset", "ref_model", "data_collator", "compute_metrics")
    kwargs = {key: changes.pop(key) for key in given if key in changes}
    args = config(out, config_cls, **changes)
    if rows is None:
        rows = list_rows() if getattr(args, "uses_lists", False) else pair_rows()
    rows = Dataset.from_list(rows) if isinstance(rows, list) else rows
    # Only now: a configuration with ZeRO-3 or FSDP changes how models are loaded.
    if model is None:
        model = AutoModelForCausalLM.from_pretrained(world)
    elif not isinstance(model, str | torch.nn.Module):
        model = model()
    tokenizer = AutoTokenizer.from_pretrained(world)
    return cls(model, args=args, train_dataset=rows, processing_class=tokenizer, **kwargs)


def trained(*args, resume=None, **kwargs):
    trainer = build(*args, **kwargs)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def parameters(trainer):
    """Of the policy, without the mask network."""
    named = trainer.model.named_parameters()
    return {name: p.detach().clone() for name, p in named if "hfd_token_mask" not in name}


def mask_parameters(trainer):
    return {name: p.detach().clone() for name, p in trainer.mask_network.named_parameters()}


def metrics(trainer):
    """Everything logged that is no measure of time, without the line at the end."""
    rows = [row for row in trainer.state.log_history if "train_runtime" not in row]
    return [{k: v for k, v in row.items() if "runtime" not in k and "per_second" not in k} for row in rows]


def assert_metrics(found, expected, tolerance=0.0):
    """The expected entries are there and equal; there may be more."""
    assert len(found) == len(expected) > 0
    for one, other in zip(found, expected):
        assert one.keys() >= other.keys()
        assert {k: (one[k], v) for k, v in other.items() if abs(one[k] - v) > tolerance * max(1.0, abs(v))} == {}


# -- a policy away from its reference -------------------------------------------------------------------------------
@torch.no_grad()
def perturb(trainer, seed=0):
    """Move all that is trained, so that no term of a loss is 0 by chance; masks spread until some are 0."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in trainer.model.named_parameters():
        if not parameter.requires_grad:
            continue
        noise = torch.randn(parameter.shape, generator=generator)
        if "hfd_token_mask" not in name:
            parameter += (0.1 if "lora_" in name else 0.03) * noise
        elif name.endswith(".weight"):
            parameter *= 24
        elif name.endswith(".bias"):
            parameter -= 0.8
        else:
            parameter += 0.1 * noise


def first_batch(trainer):
    return next(iter(trainer.get_train_dataloader()))


def loss_and_gradients(trainer, batch):
    trainer.model.train()
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    named = trainer.model.named_parameters()
    return loss.item(), {name: p.grad.clone() for name, p in named if p.grad is not None}


# -- brute force ----------------------------------------------------------------------------------------------------
class World64:
    """Copies of policy and reference in float64; `completions(batch)` says all there is to know of each completion."""

    def __init__(self, trainer):
        self.policy = copy.deepcopy(trainer.model).double()
        self.reference = None if trainer.ref_model is None else copy.deepcopy(trainer.ref_model).double()
        self.adapter = "ref" if "ref" in getattr(self.policy, "peft_config", {}) else None
        self.policy.zero_grad()

    @staticmethod
    def plain(model):
        return model.get_base_model() if hasattr(model, "peft_config") else model

    def forward(self, model, ids):
        """By the class, past everything that trainers put around a forward; one sequence without padding."""
        plain = self.plain(model)
        found = type(plain).forward(plain, input_ids=ids[None], output_hidden_states=True, use_cache=False)
        return found.logits[0].log_softmax(-1), torch.stack(found.hidden_states[1:], dim=2)[0]

    def of_policy(self, ids):
        return self.forward(self.policy, ids)[0]

    @torch.no_grad()
    def of_reference(self, ids):
        if self.reference is not None:
            return self.forward(self.reference, ids)
        if self.adapter is None:
            with self.policy.disable_adapter():
                return self.forward(self.policy, ids)
        self.policy.set_adapter("ref")
        found = self.forward(self.policy, ids)
        self.policy.set_adapter("default")
        return found

    def activations(self, ids, kinds):
        """Means over the features, `kind -> [(T,) of each layer]`, of the reference."""
        model = self.plain(self.policy) if self.reference is None else self.reference
        found, hooks = {kind: [] for kind in kinds}, []

        def before(kind):
            return lambda module, args: found[kind].append(args[0][0].mean(-1))

        def after(kind):
            return lambda module, args, out: found[kind].append(
                (out[0] if isinstance(out, tuple) else out).reshape(len(ids), -1).mean(-1)
            )

        for layer in model.model.layers:
            places = {"q": layer.self_attn.q_proj, "k": layer.self_attn.k_proj, "v": layer.self_attn.v_proj}
            hooks += [places[kind].register_forward_hook(after(kind)) for kind in kinds if kind in places]
            hooks.append(layer.mlp.down_proj.register_forward_pre_hook(before("mlp")))
            hooks.append(layer.self_attn.o_proj.register_forward_pre_hook(before("v_out")))
            hooks.append(layer.register_forward_hook(after("residual")))
        self.of_reference(ids)
        for hook in hooks:
            hook.remove()
        return found

    def completions(self, batch, activations=False):
        found = []
        for row in range(len(batch["input_ids"])):
            real = batch["attention_mask"][row].bool()
            ids, inside = batch["input_ids"][row][real], batch["completion_mask"][row][real].bool()
            places = inside.nonzero()[:, 0]
            before, tokens = places - 1, ids[places]
            policy, (reference, hidden) = self.of_policy(ids)[before], self.of_reference(ids)
            reference = reference[before]
            one = {
                "logp": policy[range(len(tokens)), tokens],
                "ref_logp": reference[range(len(tokens)), tokens],
                "kl": (reference.exp() * (reference - policy)).sum(-1),
                "hidden": hidden[before],
            }
            if "token_weights" in batch:
                one["columns"] = batch["token_weights"][row][real][places].double()
            if activations:
                kinds = ("mlp", "q", "k", "v", "v_out", "residual")
                one["activations"] = {
                    kind: [a[before] for a in layers] for kind, layers in self.activations(ids, kinds).items()
                }
            found.append(one)
        return found

    def gradients(self, loss):
        self.policy.zero_grad()
        loss.backward()
        return {name: p.grad for name, p in self.policy.named_parameters() if p.grad is not None}


def score(one, reward, kl=None, constant=False):
    total = sum(w * (p - r) for w, p, r in zip(reward, one["logp"], one["ref_logp"]))
    if kl is not None:
        total = total + sum(v * (k.detach() if constant else k) for v, k in zip(kl, one["kl"]))
    return total


def ones(one):
    return [1.0] * len(one["logp"])


def tdpo1(one, side, network):
    return score(one, ones(one), ones(one))


def tdpo2(one, side, network):
    return score(one, ones(one), [0.5] * len(one["kl"]), constant=side == "chosen")


def d2po(one, side, network):
    return score(one, [0.9**t for t in range(len(one["logp"]))])


def columns(one, side, network):
    return score(one, one["columns"])


def columns_kl(one, side, network):
    return score(one, one["columns"], one["columns"])


def mapo(one, side, network):
    total = [0.0] * len(one["logp"])
    for layers in one["activations"].values():
        for values in layers:
            low, high = min(values), max(values)
            for t, value in enumerate(values):
                share = (value - low) / (high - low) if high > low else 1.0
                total[t] += share / len(layers) / len(one["activations"])
    return score(one, total, total)


def mask_of(net, state, two_layer=False):
    """One token's mask from its states `(L, d)`."""
    parts = []
    for layer, h in enumerate(state[-1:] if net.mixer is None else state):
        h = (h - h.mean()) / torch.sqrt(((h - h.mean()) ** 2).mean() + 1e-5)
        h = h * net.norm_weight + net.norm_bias
        if two_layer:
            h = torch.clamp(net.hidden_weight[layer] @ h + net.hidden_bias[layer], min=0)
        parts.append(torch.clamp((net.weight[layer] * h).sum() + net.bias[layer], min=0))
    if net.mixer is None:
        return parts[0]
    return torch.clamp(sum(a * part for a, part in zip(net.mixer, parts)), min=0)


def sparse_po(one, side, network, two_layer=False):
    reward = [mask_of(network.reward, state, two_layer) for state in one["hidden"]]
    kl = reward if network.kl is None else [mask_of(network.kl, state, two_layer) for state in one["hidden"]]
    one["masks"] = reward, kl
    return score(one, reward, kl)


def pair_loss(world, batch, rule, penalty=None):
    """Mean over the pairs of `-log sigmoid(beta (s_c - s_r))`, and of `penalty(chosen, rejected)`."""
    found = world.completions(batch, activations=rule is mapo)
    network = getattr(world.plain(world.policy), "hfd_token_mask", None)
    count = len(found) // 2
    total = 0.0
    for chosen, rejected in zip(found[:count], found[count:]):
        margin = BETA * (rule(chosen, "chosen", network) - rule(rejected, "rejected", network))
        total = total + torch.log1p(torch.exp(-margin)) / count
        if penalty is not None:
            total = total + penalty(chosen, rejected) / count
    return total


# -- lists, in plain Python -----------------------------------------------------------------------------------------
def list_logistic(scores, labels):
    pairs = [(i, j) for i in range(len(scores)) for j in range(len(scores)) if labels[i] > labels[j]]
    return sum(torch.log1p(torch.exp(-(scores[i] - scores[j]))) for i, j in pairs)


def lipo_lambda(scores, labels):
    order = sorted(range(len(scores)), key=lambda i: -scores[i].item())
    rank = {i: place + 1 for place, i in enumerate(order)}
    total = 0.0
    for i in range(len(scores)):
        for j in range(len(scores)):
            if labels[i] > labels[j]:
                weight = abs(2 ** labels[i] - 2 ** labels[j])
                weight *= abs(1 / math.log(1 + rank[i]) - 1 / math.log(1 + rank[j]))
                total = total + weight * torch.log1p(torch.exp(-(scores[i] - scores[j])))
    return total


def plackett_luce(scores, labels):
    total = 0.0
    for i, best in enumerate(scores):
        worse = [s for s, label in zip(scores, labels) if label < labels[i]]
        total = total + torch.log(1 + sum(torch.exp(s - best) for s in worse)) if worse else total
    return total


def list_loss(world, batch, loss):
    found = iter(world.completions(batch))
    total = 0.0
    for there, labels in zip(batch["list_mask"], batch["list_labels"]):
        size = int(there.sum())
        scores = [BETA * score(one, ones(one)) for _, one in zip(range(size), found)]
        total = total + loss(scores, [float(label) for label in labels[:size]]) / len(batch["list_mask"])
    return total
