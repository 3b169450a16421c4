"Losses of embeddings, labels and pairs against pytorch-metric-learning and closed forms."
import math

import numpy as np
import pytest
import torch
from pytorch_metric_learning import losses as pml
from pytorch_metric_learning import miners as pml_miners
from pytorch_metric_learning.distances import LpDistance

from rsir_nb.core import LOSSES, InputError, UnknownNameError
from rsir_nb.losses.contrastive import ntxent_loss
from rsir_nb.losses.metric import LabelLoss, MarginLoss, PairNTXentLoss, SupConLoss, TripletMarginLoss
from rsir_nb.losses.miners import DistanceWeighted, MultiLabelSemiHard, SemiHard
from rsir_nb.losses.pairs import make_loss, make_miner

NAMES = ["pair_ntxent", "supcon", "triplet_margin", "margin"]


def rng(seed=0): return torch.Generator().manual_seed(seed)
def embeddings(n=24, d=8, seed=0): return torch.randn(n, d, generator=rng(seed))
def classes(n=24, c=6): return torch.arange(n) % c
def several(n=24, c=7, p=0.3, seed=1): return (torch.rand(n, c, generator=rng(seed)) < p).long()


def same_value_and_gradient(ours, theirs, z, rtol=1e-4):
    grads = []
    for loss in (ours, theirs):
        x = z.clone().requires_grad_()
        value = loss(x)
        value.backward()
        grads.append((value.detach(), x.grad))
    torch.testing.assert_close(grads[0][0], grads[1][0], rtol=rtol, atol=1e-5)
    torch.testing.assert_close(grads[0][1], grads[1][1], rtol=1e-3, atol=1e-5)


PAIRS = [(PairNTXentLoss(0.1), pml.NTXentLoss(0.1)), (PairNTXentLoss(0.5), pml.NTXentLoss(0.5)), (SupConLoss(0.1), pml.SupConLoss(0.1)),
         (SupConLoss(0.4), pml.SupConLoss(0.4)), (TripletMarginLoss(0.05), pml.TripletMarginLoss(0.05)),
         (TripletMarginLoss(0.3), pml.TripletMarginLoss(0.3)), (MarginLoss(learn=False, per="pair"), pml.MarginLoss()),
         (MarginLoss(0.1, 1.0, learn=False, per="pair"), pml.MarginLoss(0.1, beta=1.0))]
MINERS = [None, pml_miners.TripletMarginMiner(0.2), pml_miners.MultiSimilarityMiner(), pml_miners.BatchHardMiner(),
          lambda z, y: SemiHard()(z, y, rng()), lambda z, y: DistanceWeighted(per_anchor=2)(z, y, rng())]


@pytest.mark.parametrize("ours,theirs", PAIRS, ids=lambda o: type(o).__name__)
@pytest.mark.parametrize("miner", MINERS, ids=["all", "triplets", "pairs", "hard", "ours", "ours twice"])
def test_values_and_gradients_are_the_library_s(ours, theirs, miner):
    z, y = embeddings(), classes()
    pairs = miner and miner(z, y)
    same_value_and_gradient(lambda x: ours(x, y, pairs), lambda x: theirs(x, y, pairs), z)


def test_the_learned_boundary_moves_as_the_library_s():
    ours, theirs = MarginLoss(penalty=0, per="pair"), pml.MarginLoss(learn_beta=True)
    for loss in (ours, theirs): loss(embeddings(), classes()).backward()
    torch.testing.assert_close(ours.boundary.grad, theirs.beta.grad)
    ours, theirs = MarginLoss(penalty=0, per="pair", per_class=True, n_classes=6), pml.MarginLoss(learn_beta=True, num_classes=6)
    for loss in (ours, theirs): loss(embeddings(), classes()).backward()
    torch.testing.assert_close(ours.boundary.grad, theirs.beta.grad)


def test_two_views_are_the_contrastive_loss_of_two_sensors():
    z1, z2, y = embeddings(seed=1), embeddings(seed=2), torch.arange(24).repeat(2)
    for t in (0.07, 0.5):
        torch.testing.assert_close(PairNTXentLoss(t)(torch.cat([z1, z2]), y), ntxent_loss(z1, z2, t))


def test_several_labels_by_loops():
    z, y = embeddings().double(), several()
    unit = (z / z.norm(dim=1, keepdim=True)).numpy()
    s, shared, size = unit @ unit.T / 0.1, (y @ y.T).numpy(), y.sum(1).numpy()
    plain, graded, pairs = [], [], []
    for i in range(24):
        others = [j for j in range(24) if j != i and size[i] and size[j]]
        positives = [j for j in others if shared[i, j]]
        if not positives: continue
        cost = np.array([np.log(np.exp(s[i, others]).sum()) - s[i, j] for j in positives])
        weight = np.array([shared[i, j] / (size[i] + size[j] - shared[i, j]) for j in positives])
        plain.append(cost.mean())
        graded.append((cost * weight).sum() / weight.sum())
        negatives = np.exp(s[i, [j for j in others if not shared[i, j]]]).sum()
        pairs += [np.log(np.exp(s[i, j]) + negatives) - s[i, j] for j in positives]
    assert math.isclose(SupConLoss()(z, y), np.mean(plain), rel_tol=1e-6)
    assert math.isclose(SupConLoss(graded=True)(z, y), np.mean(graded), rel_tol=1e-6)
    assert math.isclose(PairNTXentLoss()(z, y), np.mean(pairs), rel_tol=1e-6)


def test_one_hot_labels_are_class_numbers():
    z, y = embeddings(), classes()
    hot = torch.nn.functional.one_hot(y)
    for name in NAMES: torch.testing.assert_close(make_loss(name)(z, hot), make_loss(name)(z, y))
    own = MarginLoss(per_class=True, n_classes=6)
    torch.nn.init.uniform_(own.boundary, 0.8, 1.4)
    torch.testing.assert_close(own(z, hot), own(z, y))


def test_the_boundary_of_several_labels_is_the_mean_of_theirs():
    z, y = embeddings().double(), several()
    own = MarginLoss(per_class=True, n_classes=7, penalty=0).double()
    torch.nn.init.uniform_(own.boundary, 0.8, 1.4)
    a, p, n = MultiLabelSemiHard()(z, y, rng())
    d = torch.cdist(*[z / z.norm(dim=1, keepdim=True)] * 2)
    boundary = torch.stack([own.boundary[y[i] > 0].mean() for i in a])
    near, far = (d[a, p] - boundary + 0.2).clamp(min=0), (boundary - d[a, n] + 0.2).clamp(min=0)
    wanted = (near + far).sum() / ((near > 0) | (far > 0)).sum()
    torch.testing.assert_close(own(z, y, (a, p, n)), wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("labels", [torch.zeros(6).long(), torch.arange(6), torch.full((6,), -1), torch.zeros(6, 3).long(),
                                    torch.tensor([0, 0, 1, 1, -1, -1]), torch.tensor([0, 0, 0, 0, 0, 1])], ids=str)
@pytest.mark.parametrize("same", [False, True])
def test_every_batch_has_a_finite_loss_and_gradient(name, labels, same):
    z = (torch.ones(6, 4) if same else embeddings(6, 4)).requires_grad_()
    loss = make_loss(name)(z, labels)
    loss.backward()
    assert loss.isfinite() and loss.ndim == 0 and z.grad.isfinite().all()
    without = not any((labels == c).sum() > 1 for c in labels.unique() if c >= 0) if labels.ndim == 1 else True
    if without: assert loss == 0


@pytest.mark.parametrize("name", NAMES)
def test_autocast_and_zero_vectors_do_no_harm(name):
    z, y, loss = embeddings(), classes(), make_loss(name)
    z[3] = 0
    with torch.autocast("cpu", dtype=torch.bfloat16): value = loss(z, y)
    assert torch.equal(value, loss(z, y)) and value.dtype == torch.float32
    half = z.bfloat16().requires_grad_()
    loss(half, y).backward()
    assert half.grad.isfinite().all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("miner", ["all_pairs", "semi_hard", "distance_weighted", "multi_label_semi_hard"])
def test_any_loss_with_any_miner_separates_classes(name, miner):
    z, y = torch.nn.Parameter(embeddings(24, 4)), classes(24, 3)
    loss, mine, gen = make_loss(name), make_miner(miner), rng()
    optim = torch.optim.Adam([z, *loss.parameters()], lr=0.05)
    for _ in range(120):
        optim.zero_grad()
        loss(z, y, mine(z, y, gen)).backward()
        optim.step()
    d = LpDistance()(z.detach()).fill_diagonal_(9)
    assert (y[d.argmin(1)] == y).float().mean() > 0.95


@pytest.mark.parametrize("labels", ["classes", "several"])
def test_label_loss_is_that_of_torch(labels):
    z, y = embeddings(), classes(24, 7) if labels == "classes" else several()
    loss = LabelLoss(8, 7)
    logits = loss.classifier(z)
    known = y >= 0 if y.ndim == 1 else y.sum(1) > 0
    wanted = (torch.nn.CrossEntropyLoss()(logits, y) if y.ndim == 1 else torch.nn.BCEWithLogitsLoss()(logits[known], y[known].float()))
    torch.testing.assert_close(loss(z, y), wanted)
    assert loss(z, torch.full((24,), -1)) == 0


def test_extra_losses_are_registered():
    assert {*NAMES, "label_bce"} <= set(LOSSES.list())
    assert isinstance(make_loss("label_bce", embed_dim=8, n_classes=3), LabelLoss)


@pytest.mark.parametrize("make,error,word", [
    (lambda: PairNTXentLoss(0), InputError, "positive"), (lambda: SupConLoss(-1), InputError, "positive"),
    (lambda: MarginLoss(per="image"), UnknownNameError, "divisor"), (lambda: MarginLoss(per_class=True), InputError, "needs n_classes"),
    (lambda: make_loss("label_bce"), InputError, "needs embed_dim"), (lambda: TripletMarginLoss()(embeddings(), classes(5)), InputError, "belong")])
def test_what_is_refused(make, error, word):
    with pytest.raises(error, match=word): make()


# on a GPU -----------------------------------------------------------------------------------------

CLASSY = ["cosine_softmax", "arcface", "dynm_arcface", "li_arcface", "adacos", "curricularface", "adaface", "label_bce"]
GIVEN = dict(embed_dim=8, n_classes=6, n_items=24, class_counts=[4, 9, 9, 20, 30, 40])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU on this machine")
@pytest.mark.parametrize("name", [*NAMES, *CLASSY, "binomial_deviance", "memory_nca", "fast_moco"])
@pytest.mark.parametrize("miner", ["semi_hard", "distance_weighted", "multi_label_semi_hard", "intra_random", "shuffled_labels"])
def test_a_gpu_finds_the_same_pairs_and_losses(name, miner):
    found = {}
    for device in "cpu", "cuda":
        torch.manual_seed(0)
        z, y = embeddings().to(device), classes().to(device)
        spec = dict(name=name, multi_label=False) if name == "memory_nca" else name
        loss = make_loss(spec, **GIVEN).to(device)
        if name == "memory_nca": loss.update(z, y, torch.arange(24))
        if name == "fast_moco": loss.update(z)
        extra = dict(memory_nca=dict(rows=torch.arange(24)), fast_moco=dict(keys=z.flip(0))).get(name, {})
        pairs = make_miner(miner)(z, y, rng())
        x = z.clone().requires_grad_()
        value = loss(x, y, pairs, **extra)
        value.backward()
        found[device] = [o.cpu() for o in pairs], value.item(), x.grad.cpu()
    assert all(torch.equal(a, b) for a, b in zip(found["cpu"][0], found["cuda"][0], strict=True))
    assert found["cuda"][1] == pytest.approx(found["cpu"][1], rel=1e-4)
    torch.testing.assert_close(found["cuda"][2], found["cpu"][2], rtol=1e-3, atol=1e-4)
