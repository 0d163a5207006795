"""Log-probabilities and exact token KL in tiles, against full logits in float64."""

import sys
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from hf_delta.errors import InputError
from hf_delta.ops.token_kl import masked_token_scores, sampled_kl, token_logps_and_kl


N, V, WIDTH, REF_WIDTH = 7, 53, 5, 3
# Neither divides its count, so that every edge is cut.
TILE = {"rows": 3, "columns": 10}
CASES = {
    "plain": {},
    "bias": {"bias": True},
    "softcap": {"softcap": 2.0},
    "everything": {"bias": True, "softcap": 1.5, "logit_scale": 0.7, "temperature": 0.8},
    "scale and temperature": {"logit_scale": 1.7, "temperature": 1.3},
    "another reference": {"ref": True, "bias": True},
    "another reference, everything": {
        "ref": True,
        "bias": True,
        "softcap": 1.5,
        "logit_scale": 0.7,
        "temperature": 0.8,
        "ref_softcap": 2.5,
        "ref_logit_scale": 1.4,
    },
}


def inputs(case, trained, dtype=torch.float64, count=N, vocabulary=V):
    """Leaves and settings of a case; `ref` is a reference of another width with a head of its own."""
    settings = dict(CASES[case])
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)  # noqa: E731
    own_reference, with_bias = settings.pop("ref", False), settings.pop("bias", False)
    leaves = {
        "hidden": draw(count, WIDTH).requires_grad_(),
        "head_weight": draw(vocabulary, WIDTH).requires_grad_(trained),
    }
    settings["ref_hidden"] = draw(count, REF_WIDTH if own_reference else WIDTH)
    if own_reference:
        settings |= {"ref_head_weight": draw(vocabulary, REF_WIDTH), "ref_bias": draw(vocabulary)}
    if with_bias:
        leaves["bias"] = draw(vocabulary).requires_grad_(trained)
    return leaves, torch.randint(vocabulary, (count,), generator=generator), settings


def log_softmax(hidden, weight, bias, scale, softcap, temperature):
    z = hidden.double() @ weight.double().T
    z = scale * (z if bias is None else z + bias.double())
    return ((z if softcap is None else softcap * torch.tanh(z / softcap)) / temperature).log_softmax(-1)


def full(targets, hidden, head_weight, bias=None, **s):
    """The definition, with all logits in float64; autograd does the rest."""
    scale, cap, temperature = s.get("logit_scale", 1.0), s.get("softcap"), s.get("temperature", 1.0)
    policy = log_softmax(hidden, head_weight, bias, scale, cap, temperature)
    head = (head_weight, bias, scale, cap)
    if "ref_head_weight" in s:
        head = (s["ref_head_weight"], s["ref_bias"], s.get("ref_logit_scale", 1.0), s.get("ref_softcap"))
    reference = log_softmax(s["ref_hidden"], *head, temperature).detach()
    pick = lambda table: table.gather(1, targets[:, None]).squeeze(1)  # noqa: E731
    return pick(policy), pick(reference), (reference.exp() * (reference - policy)).sum(1)


def tiled(targets, hidden, head_weight, bias=None, **settings):
    return token_logps_and_kl(hidden, head_weight, targets, bias=bias, **TILE, **settings)


def both(case, trained):
    """Ours and the definition's scores, and gradients of one weighted sum of them."""
    found = []
    for compute in (tiled, full):
        leaves, targets, settings = inputs(case, trained)
        logps, ref_logps, kl = compute(targets, **leaves, **settings)[:3]
        weights = torch.linspace(-1, 2, N, dtype=torch.float64)
        (logps * weights + kl * weights.flip(0).square()).sum().backward()
        found.append(([logps, ref_logps, kl], [leaf.grad for leaf in leaves.values() if leaf.requires_grad]))
    return found


@pytest.mark.parametrize("trained", [False, True], ids=["frozen head", "trained head"])
@pytest.mark.parametrize("case", CASES)
def test_scores_and_gradients_are_those_of_full_logits(case, trained):
    (scores, grads), (true_scores, true_grads) = both(case, trained)
    torch.testing.assert_close(scores, true_scores, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(grads, true_grads, rtol=1e-11, atol=1e-12)
    assert scores[0].requires_grad and scores[2].requires_grad and not scores[1].requires_grad


@pytest.mark.parametrize("trained", [False, True], ids=["frozen head", "trained head"])
@pytest.mark.parametrize("case", ["bias", "another reference, everything"])
def test_gradcheck(case, trained):
    leaves, targets, settings = inputs(case, trained, count=2, vocabulary=11)
    if "ref_head_weight" not in settings:
        # A reference that shares a trained head moves with it, but takes no gradient: not what differences see.
        settings |= {"ref_head_weight": leaves["head_weight"].detach().clone()}

    def scores(*values):
        found = token_logps_and_kl(targets=targets, rows=1, columns=4, **dict(zip(leaves, values)), **settings)
        return found.logps, found.kl

    assert torch.autograd.gradcheck(scores, tuple(leaves.values()))


@pytest.mark.parametrize("trained", [False, True], ids=["frozen head", "trained head"])
@pytest.mark.parametrize("asked", ["logps", "kl"])
def test_gradients_of_one_score_alone(asked, trained):
    leaves, targets, settings = inputs("everything", trained)
    found = tiled(targets, **leaves, **settings)
    truth = dict(zip(found._fields, full(targets, **leaves, **settings)))
    wanted = [leaf for leaf in leaves.values() if leaf.requires_grad]
    ours = torch.autograd.grad(getattr(found, asked).sum(), wanted)
    torch.testing.assert_close(ours, torch.autograd.grad(truth[asked].sum(), wanted), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("tile", [(1, 1), (2, 53), (7, 1), (64, 4096)])
def test_the_tile_does_not_matter(tile):
    leaves, targets, settings = inputs("another reference, everything", True)
    found = token_logps_and_kl(targets=targets, rows=tile[0], columns=tile[1], **leaves, **settings)
    for ours, truth in zip(found, full(targets, **leaves, **settings)):
        torch.testing.assert_close(ours, truth, rtol=1e-12, atol=1e-12)


def test_without_a_reference():
    leaves, targets, _ = inputs("bias", False)
    found = token_logps_and_kl(targets=targets, **leaves, **TILE)
    truth = log_softmax(*leaves.values(), 1.0, None, 1.0).gather(1, targets[:, None]).squeeze(1)
    torch.testing.assert_close(found.logps, truth, rtol=1e-12, atol=1e-12)
    assert found.ref_logps is None and found.kl is None


def test_kl_of_equal_models_is_exactly_zero():
    torch.manual_seed(0)
    hidden, weight = 3 * torch.randn(40, 16, requires_grad=True), torch.randn(1000, 16)
    hidden.retain_grad()
    found = token_logps_and_kl(hidden, weight, torch.arange(40), ref_hidden=hidden.detach(), columns=96)
    found.kl.sum().backward()
    assert found.kl.eq(0).all() and hidden.grad.eq(0).all() and torch.equal(found.logps, found.ref_logps)


def test_a_small_kl_is_not_lost_in_rounding():
    """In float32, 1e-6 nats beside logits of 30: the difference of two log-softmaxes would be wrong by as much."""
    torch.manual_seed(0)
    hidden, weight = 4 * torch.randn(40, 64), torch.randn(1000, 64)
    other = hidden + 3e-4 * torch.randn(40, 64)
    found = token_logps_and_kl(hidden, weight, torch.arange(40), ref_hidden=other, columns=96).kl
    truth = full(torch.arange(40), hidden, weight, ref_hidden=other)[2]
    assert truth.median() < 1e-4
    assert (found - truth).abs().max() < 5e-7


def test_large_logits_neither_overflow_nor_underflow():
    hidden = torch.tensor([[400.0], [-400.0]], requires_grad=True)
    weight = torch.tensor([[1.0], [-1.0], [0.5]])
    found = token_logps_and_kl(hidden, weight, torch.tensor([0, 0]), ref_hidden=hidden.detach().flip(0), columns=1)
    torch.testing.assert_close(found.logps, torch.tensor([0.0, -800.0]))
    torch.testing.assert_close(found.kl, torch.tensor([800.0, 800.0]))
    found.kl.sum().backward()
    torch.testing.assert_close(hidden.grad, torch.tensor([[2.0], [-2.0]]))


@pytest.mark.parametrize("trained", [False, True], ids=["frozen head", "trained head"])
def test_bfloat16_is_summed_in_float32(trained):
    """The float64 truth of the bfloat16 inputs: scores to float32 rounding, gradients to the rounding of their dtype."""
    torch.manual_seed(0)
    hidden = torch.randn(30, 64).bfloat16().requires_grad_()
    weight = torch.randn(2000, 64).bfloat16().requires_grad_(trained)
    reference, targets = (hidden + 0.1 * torch.randn(30, 64)).detach().bfloat16(), torch.arange(30)
    found = token_logps_and_kl(hidden, weight, targets, ref_hidden=reference, rows=8, columns=300)
    truth = full(targets, hidden, weight, ref_hidden=reference)
    for ours, exact in zip(found, truth):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours.double(), exact, rtol=3e-6, atol=3e-6)
    leaves = [hidden, weight][: 1 + trained]
    ours = torch.autograd.grad((found.logps + found.kl).sum(), leaves)
    for grad, exact in zip(ours, torch.autograd.grad((truth[0] + truth[2]).sum(), leaves)):
        assert grad.dtype == torch.bfloat16
        # `exact` is rounded once, from float64, by autograd's cast to the leaf.
        assert (grad.double() - exact.double()).norm() < 1e-3 * exact.double().norm()


def test_autocast_changes_nothing():
    leaves, targets, settings = inputs("everything", True, torch.float32)
    plain = tiled(targets, **leaves, **settings)
    with torch.autocast("cpu", torch.bfloat16):
        under = tiled(targets, **leaves, **settings)
    assert all(torch.equal(a, b) for a, b in zip(plain[:3], under))


def test_tied_head_takes_the_gradients_of_both_its_uses():
    torch.manual_seed(0)
    embedding = nn.Embedding(V, WIDTH, dtype=torch.float64)
    tokens, targets = torch.randint(V, (N,)), torch.randint(V, (N,))
    reference = torch.randn(N, WIDTH, dtype=torch.float64)
    found = []
    for compute in (tiled, full):
        embedding.weight.grad = None
        logps, _, kl = compute(targets, embedding(tokens).tanh(), embedding.weight, ref_hidden=reference)[:3]
        (kl - logps).sum().backward()
        found.append(embedding.weight.grad)
    torch.testing.assert_close(*found, rtol=1e-11, atol=1e-12)


def test_the_reference_gets_no_gradient():
    leaves, targets, settings = inputs("another reference", True)
    for name in ("ref_hidden", "ref_head_weight", "ref_bias"):
        settings[name].requires_grad_()
    tiled(targets, **leaves, **settings).kl.sum().backward()
    assert all(settings[name].grad is None for name in ("ref_hidden", "ref_head_weight", "ref_bias"))


@pytest.mark.parametrize("trained", [False, True], ids=["frozen head", "trained head"])
def test_no_rows(trained):
    hidden = torch.zeros(0, WIDTH, requires_grad=True)
    weight = torch.randn(V, WIDTH, requires_grad=trained)
    found = token_logps_and_kl(hidden, weight, torch.zeros(0, dtype=torch.long), ref_hidden=hidden.detach())
    (found.logps.sum() + found.kl.sum()).backward()
    assert found.kl.shape == (0,) and hidden.grad.shape == (0, WIDTH)
    assert not trained or weight.grad.eq(0).all()


def test_masked_positions_are_zero_and_have_no_part():
    torch.manual_seed(0)
    hidden, reference = torch.randn(2, 6, WIDTH, requires_grad=True), torch.randn(2, 6, WIDTH)
    weight, mask = torch.randn(V, WIDTH), torch.tensor([[0, 0, 1, 1, 1, 0], [0, 1, 1, 0, 0, 0]])
    with torch.no_grad():
        # Would poison every sum that they have a part in.
        hidden[mask == 0] = torch.nan
    targets = torch.randint(V, (2, 6)).masked_fill(mask == 0, -100)
    found = masked_token_scores(hidden, weight, targets, mask, ref_hidden=reference, **TILE)
    rows = mask == 1
    truth = full(targets[rows], hidden[rows], weight, ref_hidden=reference[rows])
    for ours, exact in zip(found, truth):
        assert ours.shape == (2, 6) and ours[~rows].eq(0).all()
        torch.testing.assert_close(ours[rows], exact.float(), rtol=1e-5, atol=1e-5)
    found.kl.sum().backward()
    assert hidden.grad[~rows].eq(0).all() and hidden.grad[rows].ne(0).all()


def test_nothing_but_masked_positions_still_hangs_on_the_model():
    hidden, weight = torch.randn(2, 3, WIDTH, requires_grad=True), torch.randn(V, WIDTH)
    masked_token_scores(hidden, weight, torch.full((2, 3), -100), torch.zeros(2, 3)).logps.sum().backward()
    assert hidden.grad.eq(0).all()


@pytest.mark.parametrize("trained", [False, True], ids=["frozen head", "trained head"])
def test_second_derivatives_are_refused(trained):
    leaves, targets, settings = inputs("plain", trained)
    kl = tiled(targets, **leaves, **settings).kl.sum()
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        torch.autograd.grad(kl, leaves["hidden"], create_graph=True)


class Largest(TorchDispatchMode):
    """The most elements of any storage that an operation gives back."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        for tensor in found if isinstance(found, (tuple, list)) else [found]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.untyped_storage().nbytes() // tensor.element_size())
        return found


@pytest.mark.parametrize("trained", [False, True], ids=["frozen head", "trained head"])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_nothing_as_large_as_the_logits_is_allocated(trained, softcap):
    hidden, weight = torch.randn(256, 8, requires_grad=True), torch.randn(4096, 8, requires_grad=trained)
    settings = {"ref_hidden": torch.randn(256, 8), "softcap": softcap, "rows": 32, "columns": 512}
    # Views of the head are operations, too, and the gradient of a trained one is as large as it is.
    allowed = weight.numel()
    with Largest() as largest:
        found = token_logps_and_kl(hidden, weight, torch.arange(256), **settings)
        (found.logps.sum() + found.kl.sum()).backward()
    assert 32 * 512 <= largest.elements <= allowed == 256 * 4096 // 32


def test_partitioned_parameters_are_gathered_in_both_passes(monkeypatch):
    """ZeRO-3 leaves an empty tensor in a parameter outside of its context."""
    leaves, targets, settings = inputs("bias", True)
    truth = tiled(targets, **leaves, **settings)
    wanted = torch.autograd.grad(truth.kl.sum(), list(leaves.values()))
    wholes, gathers = {}, []

    @contextmanager
    def gathered_parameters(parameters):
        gathers.append(len(parameters))
        for parameter in parameters:
            parameter.data = wholes[id(parameter)]
        yield
        for parameter in parameters:
            parameter.data = torch.empty(0, dtype=torch.float64)

    zero = SimpleNamespace(GatheredParameters=gathered_parameters)
    monkeypatch.setitem(sys.modules, "deepspeed", SimpleNamespace(zero=zero))
    for i, parameter in enumerate((leaves["head_weight"], leaves["bias"])):
        wholes[id(parameter)], parameter.ds_id, parameter.ds_numel = parameter.data, i, parameter.numel()
        parameter.data = torch.empty(0, dtype=torch.float64)
    found = tiled(targets, **leaves, **settings)
    assert torch.equal(found.kl, truth.kl) and leaves["bias"].numel() == 0
    with torch.no_grad():
        # By hand, since autograd would compare the gradients with the empty tensors.
        grads = found.kl.grad_fn.apply(None, None, torch.ones_like(found.kl))[:3]
    assert all(torch.equal(a, b) for a, b in zip(grads, wanted))
    # Weight and bias, once each: the reference shares them.
    assert gathers == [2, 2]


def test_sampled_kl_is_unbiased_and_never_negative():
    torch.manual_seed(0)
    ours, theirs = torch.randn(2, 6, dtype=torch.float64).log_softmax(-1)
    estimates = sampled_kl(ours, theirs)
    assert (estimates >= 0).all()
    # The expectation over all tokens, as the model draws them.
    torch.testing.assert_close((ours.exp() * estimates).sum(), (ours.exp() * (ours - theirs)).sum())


BAD = {
    "row for each": lambda h, w, y: token_logps_and_kl(h[:2], w, y),
    "widths differ": lambda h, w, y: token_logps_and_kl(h, w[:, :2], y),
    "one vocabulary": lambda h, w, y: token_logps_and_kl(h, w, y, ref_hidden=h, ref_head_weight=w[:-1]),
    "belong to ref_head_weight": lambda h, w, y: token_logps_and_kl(h, w, y, ref_hidden=h, ref_softcap=2.0),
    "-100 to 5 do not fit a vocabulary of 53": lambda h, w, y: token_logps_and_kl(h, w, torch.tensor([-100, 5, 5, 5])),
    "bias is 52": lambda h, w, y: token_logps_and_kl(h, w, y, bias=torch.zeros(52)),
    "temperature must be positive": lambda h, w, y: token_logps_and_kl(h, w, y, temperature=0.0),
    "softcap must be positive": lambda h, w, y: token_logps_and_kl(h, w, y, softcap=0.0),
    "mask is 2x2": lambda h, w, y: masked_token_scores(h.view(1, 4, -1), w, y.view(1, 4), torch.ones(2, 2)),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input(message):
    with pytest.raises(InputError, match=message):
        BAD[message](torch.randn(4, WIDTH), torch.randn(V, WIDTH), torch.tensor([1, 2, 3, 4]))


def test_the_kl_of_models_that_are_all_but_equal_is_not_negative():
    """Where the difference is lost in rounding, which goes either way."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(size, 16, generator=generator) for size in (200, 300))
    ref_hidden = hidden * (1 + 1e-6 * torch.randn(200, 16, generator=generator))
    found = token_logps_and_kl(hidden, weight, torch.zeros(200, dtype=torch.long), ref_hidden=ref_hidden).kl
    assert (found >= 0).all() and found.max() < 1e-5
