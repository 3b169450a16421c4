"Pairs and miners against pytorch-metric-learning, plain loops and known distributions."
import numpy as np
import pytest
import torch
from pytorch_metric_learning import losses as pml_losses
from pytorch_metric_learning import miners as pml_miners
from pytorch_metric_learning.utils import loss_and_miner_utils as lmu
from torch import nn

from rsir_nb.core import LOSSES, InputError, UnknownNameError
from rsir_nb.losses.miners import (AllPairs, DistanceWeighted, IntraRandom, MultiLabelSemiHard, SemiHard, ShuffledLabels,
                                   distance_probabilities, draw_per_row, graded_triplets, semi_hard_candidates)
from rsir_nb.losses.pairs import (MINERS, as_vectors, check_batch, shared_counts, make_loss, make_miner, pair_counts,
                                  relations, to_pairs, to_triplets, vector_distances)

NAMES = ["all_pairs", "random", "semi_hard", "distance_weighted", "multi_label_semi_hard", "intra_random", "shuffled_labels"]


def rng(seed=0): return torch.Generator().manual_seed(seed)
def embeddings(n=24, d=8, seed=0): return torch.randn(n, d, generator=rng(seed))
def classes(n=24, c=6): return torch.arange(n) % c
def several(n=24, c=7, p=0.3, seed=1): return (torch.rand(n, c, generator=rng(seed)) < p).long()


# pairs --------------------------------------------------------------------------------------------

@pytest.mark.parametrize("labels", [classes(), torch.tensor([0, 0, 1, 2, 2, 2]), torch.zeros(4, dtype=torch.long)], ids=len)
def test_forms_are_those_of_the_library(labels):
    for form in (None, lmu.get_all_pairs_indices(labels), lmu.get_all_triplets_indices(labels)):
        for ours, theirs in ((to_pairs(form, labels), lmu.convert_to_pairs(form, labels)),
                             (to_triplets(form, labels), lmu.convert_to_triplets(form, labels, t_per_anchor="all"))):
            assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_class_numbers_are_one_hot_labels():
    y, hot = classes(), nn.functional.one_hot(classes())
    assert torch.equal(shared_counts(y), shared_counts(hot))
    assert all(torch.equal(a, b) for a, b in zip(relations(y), relations(hot), strict=True))


def test_relations_by_loops():
    y = several()
    same, different = relations(y)
    for i, a in enumerate(y):
        for j, b in enumerate(y):
            shared, known = int((a & b).sum()), bool(a.any() and b.any())
            assert same[i, j] == (i != j and shared > 0) and different[i, j] == (i != j and known and shared == 0)


def test_images_without_labels_take_part_in_nothing():
    y = several()
    y[[2, 7]] = 0
    unknown = classes()
    unknown[[2, 7]] = -1
    for labels in (y, unknown):
        for name in NAMES:
            used = torch.cat(make_miner(name)(embeddings(), labels, rng()))
            if name != "shuffled_labels": assert not set(used.tolist()) & {2, 7}, name


def test_squares_of_pairs_and_back():
    y = several()
    a1, p, a2, n = to_pairs(None, y)
    same, different = pair_counts((a1.repeat(2), p.repeat(2), a2, n), y)
    assert torch.equal(same, 2.0 * relations(y)[0]) and torch.equal(different, relations(y)[1].float())


def test_distances_and_their_gradient():
    x = as_vectors(embeddings(d=5)).double().requires_grad_()
    other = as_vectors(embeddings(n=7, d=5, seed=1)).double()
    torch.testing.assert_close(vector_distances(x, other), torch.cdist(x, other), rtol=1e-6, atol=1e-6)
    assert torch.autograd.gradcheck(lambda o: vector_distances(o, other), x[:3].detach().requires_grad_())
    vector_distances(torch.cat([x, x])).sum().backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("z,labels,word", [
    (torch.zeros(3, 2), torch.zeros(4, dtype=torch.long), "do not belong together"), (torch.zeros(3), torch.zeros(3, dtype=torch.long), "belong"),
    (torch.zeros(2, 2), torch.zeros(2), "have to be integers"), (torch.zeros(2, 2), torch.full((2, 3), 2), "0 or 1")])
def test_batches_that_are_refused(z, labels, word):
    with pytest.raises(InputError, match=word): check_batch(z, labels)


@pytest.mark.parametrize("pairs", [(), 7, (torch.zeros(1),) * 2, torch.zeros(3, 2)])
def test_what_is_no_pairs(pairs):
    for to in (to_pairs, to_triplets):
        with pytest.raises(InputError, match="no pairs"): to(pairs, classes())


# drawing ------------------------------------------------------------------------------------------

def test_draws_have_their_probabilities():
    weights = torch.tensor([0.0, 2, 0, 1, 5, 0])
    counts = torch.bincount(draw_per_row(weights.repeat(80_000, 1), rng()), minlength=6)
    assert not counts[weights == 0].any()
    expected = weights / weights.sum() * 80_000
    chi2 = ((counts - expected) ** 2 / expected.clamp(min=1))[weights > 0].sum()
    assert chi2 < 13.8   # 99.9 % quantile, two degrees of freedom


@pytest.mark.parametrize("u", [0.0, 1 - 2**-24])
def test_the_ends_of_the_random_numbers_draw_nothing_impossible(u, monkeypatch):
    weights = torch.rand(50, 700, generator=rng()) * (torch.rand(50, 700, generator=rng(1)) < 0.5)
    monkeypatch.setattr(torch, "rand", lambda *size, generator=None: torch.full(size, u))
    weights[:, [0, -1]] = 0
    assert (weights.gather(1, draw_per_row(weights)[:, None]) > 0).all()


# miners -------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("labels", [classes(), several()], ids=["classes", "several"])
def test_miners_give_positives_and_negatives(name, labels):
    z = embeddings().requires_grad_()
    miner = make_miner(name)
    found = miner(z, labels, rng())
    again = miner(z, labels, rng())
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True)), "the same numbers, the same triplets"
    assert all(o.dtype == torch.int64 and not o.requires_grad for o in found)
    assert all(0 <= o.min() and o.max() < len(z) for o in found if len(o))
    overlap = shared_counts(labels)
    a1, p, a2, n = to_pairs(found, labels)
    if name == "intra_random": assert (overlap[a1, p] > 0).all() and (overlap[a2, n] > 0).all()
    elif name == "multi_label_semi_hard": assert (overlap[a2, n] < overlap[a1, p]).all()
    elif name != "shuffled_labels": assert (overlap[a1, p] > 0).all() and (overlap[a2, n] == 0).all() and (a1 != p).all()


def test_random_triplets_are_drawn_evenly():
    labels = torch.tensor([0, 0, 0, 1, 1, 2])
    a, p, n = make_miner(dict(name="random", per_anchor=6000))(embeddings(6), labels, rng())
    assert set(a.tolist()) == {0, 1, 2, 3, 4}
    for anchor, positives, negatives in (0, [1, 2], [3, 4, 5]), (3, [4], [0, 1, 2, 5]):
        for drawn, allowed in (p, positives), (n, negatives):
            share = drawn[a == anchor].bincount(minlength=6)/6000
            wanted = torch.zeros(6).index_fill(0, torch.tensor(allowed), 1/len(allowed))
            assert (share - wanted).abs().max() < 0.03


def test_the_registry_holds_the_tested_miners(): assert set(MINERS.list()) == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("labels", [torch.zeros(6, dtype=torch.long), torch.arange(6), torch.full((6,), -1), torch.zeros(6, 3).long()],
                         ids=["no negatives", "no positives", "nothing known", "no labels"])
def test_batches_without_anchors_cost_nothing(name, labels):
    z = embeddings(6).requires_grad_()
    found = make_miner(name)(z, labels, rng())
    if name not in ("all_pairs", "intra_random"): assert all(len(o) == 0 for o in found)
    loss = pml_losses.TripletMarginLoss()(z, indices_tuple=to_triplets(found, labels))
    assert loss == 0 or name == "intra_random"


@pytest.mark.parametrize("loss", [pml_losses.TripletMarginLoss(), pml_losses.NTXentLoss(), pml_losses.MarginLoss(), pml_losses.SupConLoss()],
                         ids=lambda o: type(o).__name__)
@pytest.mark.parametrize("name", [n for n in NAMES if n not in ("intra_random", "shuffled_labels")])
def test_losses_of_the_library_take_our_pairs(loss, name):
    for labels in (classes(), several()):
        if name == "multi_label_semi_hard" and isinstance(loss, pml_losses.SupConLoss): continue   # a negative may be a positive elsewhere
        z = embeddings().requires_grad_()
        loss(z, indices_tuple=make_miner(name)(z, labels, rng())).backward()
        assert z.grad.isfinite().all() and z.grad.any()


def test_semi_hard_by_loops():
    z, y = embeddings(), several()
    positives, negatives = semi_hard_candidates(z, y)
    d = torch.cdist(as_vectors(z), as_vectors(z)).numpy()
    for i in range(len(z)):
        shared = (y[i] & y).sum(1).numpy()
        same = np.array([j for j in range(len(z)) if j != i and shared[j] and y[i].any()], int)
        other = np.array([j for j in range(len(z)) if not shared[j] and y[i].any() and y[j].any()], int)
        far = same[d[i, same] > d[i, other].min()] if len(same) and len(other) else same
        near = other[d[i, other] < d[i, same].max()] if len(same) and len(other) else other
        assert positives[i].nonzero().ravel().tolist() == list(far if len(far) else same)
        assert negatives[i].nonzero().ravel().tolist() == list(near if len(near) else other)


@pytest.mark.parametrize("upper", [1.4, 1.2])
@pytest.mark.parametrize("dim", [8, 64])
def test_probabilities_of_distance_weighting(upper, dim):
    z, y = embeddings(40, dim), classes(40)
    got = distance_probabilities(z, y, 0.5, upper).double().numpy()
    unit = z.double().numpy() / np.linalg.norm(z.double().numpy(), axis=1, keepdims=True)
    for i in range(40):
        d = np.linalg.norm(unit - unit[i], axis=1)
        other = (y != y[i]).numpy()
        allowed = other & (d <= upper)
        if not allowed.any(): allowed = np.arange(40) == np.where(other, d, 9).argmin()
        d = d.clip(0.5)
        q = np.where(allowed, d ** (dim - 2) * (1 - d**2 / 4).clip(1e-8) ** ((dim - 3) / 2), np.inf)
        np.testing.assert_allclose(got[i], (1 / q) / (1 / q).sum(), rtol=1e-3, atol=1e-7)


def test_distance_weighting_draws_as_the_library_does(monkeypatch):
    z, y, seen = embeddings(60, 16), classes(60), {}
    monkeypatch.setattr(lmu, "get_random_triplet_indices", lambda labels, ref_labels, weights: seen.update(w=weights) or (labels,) * 3)
    pml_miners.DistanceWeightedMiner()(z, y)
    rows = seen["w"].isfinite().all(1)
    assert rows.sum() > 40
    torch.testing.assert_close(distance_probabilities(z, y)[rows], seen["w"][rows], rtol=1e-3, atol=1e-6)


def test_anchors_are_repeated():
    z, y = embeddings(), classes()
    for miner in (SemiHard(per_anchor=3), DistanceWeighted(per_anchor=3)):
        assert torch.equal(miner(z, y)[0], torch.arange(24).repeat_interleave(3))


def graded_by_loops(z, y, draws, per_positive, per_anchor):
    "The rule read literally, image by image."
    d, draws, found = torch.cdist(as_vectors(z).double(), as_vectors(z).double()), iter(draws), []
    for i in range(len(z)):
        others = [j for j in d[i].argsort().tolist() if j != i and y[i].any() and y[j].any()]
        share = [int((y[i] & y[j]).sum()) for j in others]
        made = 0
        for at in reversed([k for k, s in enumerate(share) if s]):
            fine = [others[k] for k in range(at) if 0 < share[k] < share[at]]
            none = [others[k] for k in range(at) if not share[k]]
            coarse = [none[int(next(draws) * len(none))] for _ in range(min(per_positive, len(none)))]
            found += [(i, others[at], k) for k in fine + coarse]
            made += len(fine) + len(coarse)
            if none and made >= per_anchor: break
    return found


@pytest.mark.parametrize("n,c,p", [(16, 6, 0.3), (40, 4, 0.5), (30, 12, 0.15), (25, 3, 0.9)])
@pytest.mark.parametrize("per_positive,per_anchor", [(3, 3), (1, 8), (0, 5)])
def test_graded_triplets_by_loops(n, c, p, per_positive, per_anchor):
    z, y = embeddings(n, 6, seed=n), several(n, c, p, seed=c)
    draws = np.random.default_rng(n).random(20_000)
    given = iter(draws)

    def choose(bounds):
        out = torch.zeros(len(bounds), per_positive, dtype=torch.long)
        for row, bound in zip(out, bounds.tolist(), strict=True):
            for k in range(min(per_positive, bound)): row[k] = int(next(given) * bound)
        return out

    triplets, fine = graded_triplets(z, y, choose, per_positive, per_anchor)
    assert list(zip(*(o.tolist() for o in triplets), strict=True)) == graded_by_loops(z, y, draws, per_positive, per_anchor)
    overlap = shared_counts(y)
    assert torch.equal(fine, overlap[triplets[0], triplets[2]] > 0)


def test_coarse_negatives_are_drawn_from_all_that_are_nearer():
    z, y = embeddings(20, 4), several(20, 5)
    bounds, seen = {}, {}
    graded_triplets(z, y, lambda n: bounds.update(n=n) or torch.zeros(len(n), 3, dtype=torch.long))
    for seed in range(300):
        for a, p, n in zip(*MultiLabelSemiHard()(z, y, rng(seed)), strict=True):
            if shared_counts(y)[a, n] == 0: seen.setdefault((int(a), int(p)), set()).add(int(n))
    assert sorted(len(o) for o in seen.values()) == sorted(o for o in bounds["n"].tolist() if o)


def test_intra_random_draws_classes_evenly():
    y = torch.tensor([0] * 20 + [1] * 4)
    a = torch.cat([IntraRandom()(embeddings(), y, rng(i))[0] for i in range(100)])
    assert 0.42 < (y[a] == 1).float().mean() < 0.58


def test_shuffled_labels_know_nothing_of_the_classes():
    z, y = embeddings(24, 16), classes()
    found = [torch.stack(ShuffledLabels()(z, y, rng(i))[:2]) for i in range(60)]
    a, p = torch.cat(found, 1)
    assert abs((y[a] == y[p]).float().mean() - 3 / 23) < 0.05


def test_all_pairs_are_all_pairs():
    y = several()
    assert all(torch.equal(a, b) for a, b in zip(AllPairs()(embeddings(), y), to_pairs(None, y), strict=True))


# from a config ------------------------------------------------------------------------------------

def test_what_the_caller_knows_reaches_those_that_ask(monkeypatch):
    class Toy(nn.Module):
        def __init__(self, n_classes:int, weight:float=1.0):
            super().__init__()
            self.n_classes, self.weight = n_classes, weight

    monkeypatch.setitem(LOSSES.entries, "toy", Toy)
    made = make_loss(dict(name="toy", weight=2), n_classes=5, embed_dim=8)
    assert (made.n_classes, made.weight) == (5, 2.0)
    with pytest.raises(InputError, match="needs n_classes"): make_loss("toy")
    with pytest.raises(InputError, match="not set by hand"): make_loss(dict(name="toy", n_classes=3), n_classes=5)


@pytest.mark.parametrize("make,spec,error,word", [
    (make_miner, "semihard", UnknownNameError, "semi_hard"), (make_miner, dict(name="semi_hard", per_anchr=2), UnknownNameError, "per_anchor"),
    (make_miner, dict(name="semi_hard", per_anchor="two"), InputError, "wanted int"), (make_miner, {}, InputError, "is not named"),
    (make_loss, "quantisation", InputError, "a function that its own method calls"), (make_loss, 3, InputError, "is not named")],
    ids=lambda o: getattr(o, "__name__", str(o)))
def test_wrong_specs_name_what_is_right(make, spec, error, word):
    with pytest.raises(error, match=word): make(spec)
