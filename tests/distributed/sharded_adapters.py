"""Adapters under `fully_shard`, without a trainer, against one process: gradients, one SGD step, merging and back."""

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor import distribute_tensor as distribute

from hf_delta import InputError
from hf_delta.adapters.dora import fast_dora
from tests.adapters import life


def full(tensor):
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def stepped(model, ids):
    """Gradients of the trained parameters, and the loss, before one step of SGD."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    gradients = {n: full(p.grad) for n, p in model.named_parameters() if p.grad is not None}
    optimizer.step()
    return gradients


def values(model):
    return {n: full(p) for n, p in model.named_parameters()}


def sharded_adapter(world, folder, kind):
    with fast_dora():
        return compare(kind)


def compare(kind):
    torch.manual_seed(0)
    ids = torch.randint(1, 24, (4, 8))
    one, two = life.adapted(kind).train(), life.adapted(kind).train()
    gradients = stepped(one, ids)

    mesh = init_device_mesh("cpu", (2,))
    for block in two.base_model.model.model.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(two, mesh=mesh)
    found = {
        "sharded": all(isinstance(p, DTensor) for p in two.parameters()),
        "expected": {"gradients": gradients, "stepped": values(one)},
    }
    rank = mesh.get_local_rank()
    found["found"] = {"gradients": stepped(two, ids[2 * rank : 2 * rank + 2]), "stepped": values(two)}
    # From equal adapters, so that only merging is compared.
    with torch.no_grad():
        for (_, p), q in zip(two.named_parameters(), one.parameters()):
            p.copy_(distribute(q.detach(), p.device_mesh, p.placements))
    one.merge_adapter(), two.merge_adapter()
    found["expected"]["merged"], found["found"]["merged"] = values(one), values(two)
    found["forward_merged"] = (two(input_ids=ids).logits - one(input_ids=ids).logits).abs().max().item()
    one.unmerge_adapter(), two.unmerge_adapter()
    found["expected"]["unmerged"], found["found"]["unmerged"] = values(one), values(two)
    found["forward"] = (two(input_ids=ids).logits - one(input_ids=ids).logits).abs().max().item()
    return found


def untied(kind, reshard=None):
    """Adapters on a layer of a block and on one of the root, which FSDP2 leaves whole after a forward; sharded or not."""
    base = life.base_model()
    base.lm_head.weight = nn.Parameter(base.lm_head.weight.detach() * 1.3)
    base.config.tie_word_embeddings = False
    model = life.adapted(kind, base, target_modules=["q_proj", "lm_head"])
    if reshard is not None:
        shard(model, reshard_after_forward=reshard)
    return model


def shard(model, **settings):
    mesh = init_device_mesh("cpu", (2,))
    for part in (*model.base_model.model.model.layers, model):
        fully_shard(part, mesh=mesh, **settings)


def left_whole(world, folder, kind):
    """Errors of the logits, by `reshard_after_forward` and what was done before."""
    with fast_dora():
        return errors_of(kind)


def errors_of(kind):
    errors = {}
    for reshard in (True, False):
        model, one = untied(kind, reshard), untied(kind)
        adapted = life.logits(one)
        with one.disable_adapter():
            base = life.logits(one)

        def see(what, expected, model=model, reshard=reshard):
            errors[f"{what}, {reshard}"] = (life.logits(model) - expected).abs().max().item()

        see("plain", adapted)
        model.merge_adapter()
        see("merged", adapted)
        model.state_dict()
        see("merged and into shards", adapted)
        model.unmerge_adapter()
        with model.disable_adapter():
            see("disabled", base)
        model.merge_adapter()
        see("merged again", adapted)
        with model.disable_adapter():
            see("disabled while merged", base)
        see("enabled", adapted)
        model(input_ids=life.IDS, labels=life.IDS).loss.backward()
        errors[f"no gradient, {reshard}"] = sum(p.grad is None for p in model.parameters() if p.requires_grad)
        trained = sum(p.requires_grad for p in model.parameters())
        errors[f"not trained, {reshard}"] = sum(p.requires_grad for p in one.parameters()) - trained
    if kind == "dora":
        return {"errors": errors}
    tied = life.adapted(kind, target_modules=["q_proj", "lm_head"])
    shard(tied)
    try:
        tied.merge_adapter()
    except InputError as error:
        return {"errors": errors, "refused": str(error)}
    return {"errors": errors, "refused": ""}
