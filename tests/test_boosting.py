"Boosted binomial deviance and adversarial decorrelation against plain loops and autograd's own rules."
import numpy as np
import pytest
import torch

from rsir_nb.core import InputError, UnknownNameError
from rsir_nb.losses.boosting import BinomialDevianceLoss, DecorrelationLoss, norm_penalty, reverse_gradient, split_parts
from rsir_nb.losses.pairs import make_loss, make_miner

SIZES = [3, 4, 5]


def rng(seed=0): return torch.Generator().manual_seed(seed)
def embeddings(n=16, d=12, seed=0): return torch.randn(n, d, generator=rng(seed))
def classes(n=16, c=5): return torch.arange(n) % c


def deviance_by_loops(parts, pairs, n_positives, alpha, b, C, boosting):
    "The loss read literally: pairs (i, j, positive), one weight for each."
    boost, mixed, total = {o: 1.0 for o in pairs}, {}, 0.0
    count = {True: n_positives, False: sum(not o[2] for o in pairs)}
    for g, part in enumerate(parts):
        for o in pairs:
            i, j, positive = o
            act = alpha * (part[i] @ part[j] - b) * (1 if positive else -C)
            total += np.log1p(np.exp(-act)) * boost[o] / count[positive] / len(parts)
            eta = 2 / (2 + g)
            mixed[o] = (1 - eta) * mixed.get(o, 0) + eta * act if boosting == "eta" else mixed.get(o, 0.5) + 0.06 * act
            boost[o] = 1 / (1 + np.exp(mixed[o])) * (1 if boosting == "eta" or positive else 2)
    return total


@pytest.mark.parametrize("boosting", ["eta", "simple"])
@pytest.mark.parametrize("alpha,b,C", [(2, 0.5, 25), (1, 0.2, 5)])
@pytest.mark.parametrize("several", [False, True])
def test_deviance_by_loops(boosting, alpha, b, C, several):
    z = embeddings().double()
    y = (torch.rand(16, 4, generator=rng(1)) < 0.4).long() if several else classes()
    shared = (y @ y.T if several else (y[:, None] == y)).numpy()
    known = y.sum(1).numpy() > 0 if several else np.ones(16, bool)
    pairs = [(i, j, bool(shared[i, j])) for i in range(16) for j in range(16) if i != j and known[i] and known[j]]
    parts = [o.numpy() for o in split_parts(z, SIZES)]
    n = sum(o[2] for o in pairs) + known.sum()
    loss = BinomialDevianceLoss(SIZES, alpha, b, C, learn=False, boosting=boosting)
    assert loss(z, y).item() == pytest.approx(deviance_by_loops(parts, pairs, n, alpha, b, C, boosting), rel=1e-5)


def test_deviance_of_mined_pairs_by_loops():
    z, y = embeddings().double(), classes()
    a, p, n = make_miner("semi_hard")(z, y, rng())
    pairs = [(i, j, True) for i, j in zip(a.tolist(), p.tolist(), strict=True)] + [(i, j, False) for i, j in zip(a.tolist(), n.tolist(), strict=True)]
    parts = [o.numpy() for o in split_parts(z, SIZES)]
    loss = BinomialDevianceLoss(SIZES, learn=False)
    assert loss(z, y, (a, p, n)).item() == pytest.approx(deviance_by_loops(parts, pairs, len(a), 2, 0.5, 25, "eta"), rel=1e-5)


def test_weights_of_pairs_are_constants():
    z, y = embeddings().double().requires_grad_(), classes()
    loss = BinomialDevianceLoss(SIZES, learn=False)
    parts = split_parts(z, SIZES)
    learners = loss.learners(parts, y)
    assert not any(w.requires_grad for _, w in learners)
    grad, = torch.autograd.grad(learners[1][0], parts[0], allow_unused=True, retain_graph=True)
    assert grad is None, "the second part's cost does not reach the first part"


@pytest.mark.parametrize("labels", [torch.zeros(6).long(), torch.arange(6), torch.full((6,), -1), torch.zeros(6, 3).long()], ids=str)
def test_every_batch_has_a_finite_loss_and_gradient(labels):
    z = embeddings(6).requires_grad_()
    loss = make_loss(dict(name="binomial_deviance", sizes=SIZES))(z, labels)
    loss.backward()
    assert loss.isfinite() and loss.ndim == 0 and z.grad.isfinite().all()


def test_the_deviance_separates_classes():
    z, y = torch.nn.Parameter(embeddings(24)), classes(24, 4)
    loss = BinomialDevianceLoss(SIZES)
    optim = torch.optim.Adam([z, *loss.parameters()], lr=0.05)
    for _ in range(150):
        optim.zero_grad()
        loss(z, y).backward()
        optim.step()
    d = torch.cdist(*[torch.cat(split_parts(z.detach(), SIZES), 1)] * 2).fill_diagonal_(9)
    assert (y[d.argmin(1)] == y).all()


# decorrelation ------------------------------------------------------------------------------------

def test_reversed_gradients_are_those_of_the_negative():
    x = embeddings(3, 4).double().requires_grad_()
    f = lambda o: (o.sin() * o).sum()
    got, = torch.autograd.grad(f(reverse_gradient(x)), x)
    wanted, = torch.autograd.grad(-f(x), x)
    torch.testing.assert_close(got, wanted)


def test_decorrelation_by_loops():
    z, loss = embeddings(), DecorrelationLoss(SIZES, weight=[1.0, 2.0, 3.0], hidden_dim=7)
    parts, wanted = [torch.nn.functional.normalize(o) for o in z.split(SIZES, 1)], 0
    for (s, t), w, f in zip([(0, 1), (0, 2), (1, 2)], [1, 2, 3], loss.regressors, strict=True):
        guess = torch.nn.functional.normalize(f(parts[s]))
        wanted -= w * torch.stack([(parts[t][i] * guess[i]).square().mean() for i in range(len(z))]).mean()
    torch.testing.assert_close(loss(z), wanted)


def test_both_sides_pull_in_opposite_directions():
    z, loss = embeddings().requires_grad_(), DecorrelationLoss(SIZES, hidden_dim=7)
    loss(z).backward()
    found = lambda o: -loss(o).item()
    with torch.no_grad():
        before = found(z)
        assert found(z - 1e-2 * z.grad / z.grad.norm()) < before, "a step of the embedding lowers the correlation"
        for p in loss.parameters(): p -= 0.1 * p.grad
        assert found(z) > before, "a step of the regressors raises it"


def test_norm_penalty():
    layer = torch.nn.Linear(5, 3)
    w, b = layer.weight.detach().numpy(), layer.bias.detach().numpy()
    wanted = ((w**2).sum(1) - 1) ** 2
    assert norm_penalty(layer).item() == pytest.approx(wanted.mean(), rel=1e-5)
    layer.bias.data *= 2 / layer.bias.norm()
    assert norm_penalty(layer, bias=True).item() == pytest.approx(wanted.mean() + 3, rel=1e-5)
    norm_penalty(layer, bias=True).backward()
    assert layer.bias.grad.any() and b.any()


@pytest.mark.parametrize("make,error,word", [
    (lambda: split_parts(embeddings(), [5, 6]), InputError, "sum to 12"), (lambda: split_parts(embeddings(), [12, 0]), InputError, "sum to 12"),
    (lambda: BinomialDevianceLoss(boosting="ada"), UnknownNameError, "boosting"), (lambda: DecorrelationLoss([3]), InputError, "two parts"),
    (lambda: DecorrelationLoss(SIZES, [(0, 0)]), InputError, "two different"), (lambda: DecorrelationLoss(SIZES, weight=[1.0]), InputError, "3 weights"),
    (lambda: make_loss("decorrelation"), InputError, "needs sizes")])
def test_what_is_refused(make, error, word):
    with pytest.raises(error, match=word): make()
