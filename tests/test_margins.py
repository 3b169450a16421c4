"Margin losses against pytorch-metric-learning and the formulas of the papers, written anew in float64."
import math

import numpy as np
import pytest
import torch
from pytorch_metric_learning import losses as pml

from rsir_nb.core import LOSSES, InputError
from rsir_nb.losses.margins import (AdaCosLoss, AdaFaceLoss, ArcFaceLoss, CosineSoftmaxLoss, CurricularFaceLoss, DynMArcFaceLoss,
                                    LiArcFaceLoss)
from rsir_nb.losses.pairs import make_loss

D, C = 12, 5
GIVEN = dict(embed_dim=D, n_classes=C, class_counts=[5, 10, 40, 80, 200])
NAMES = ["cosine_softmax", "arcface", "dynm_arcface", "li_arcface", "adacos", "curricularface", "adaface"]


def rng(seed=0): return torch.Generator().manual_seed(seed)
def embeddings(n=20, d=D, seed=0): return torch.randn(n, d, generator=rng(seed))
def classes(n=20, c=C): return torch.arange(n) % c


def with_centres(loss, seed=7):
    loss.weight.data = torch.randn(loss.weight.shape, generator=rng(seed))
    return loss


def angles(loss, z):
    "Angles to the nearest centre of each class, by loops."
    w = loss.weight.detach().double().numpy().reshape(loss.n_classes, loss.centres, -1)
    z = z.double().numpy()
    cos = np.einsum("bd,ckd->bck", z / np.linalg.norm(z, axis=1, keepdims=True), w / np.linalg.norm(w, axis=2, keepdims=True))
    return np.arccos(cos.max(2).clip(-1, 1))


def arc(theta, m): return np.where(theta < np.pi - m, np.cos(theta + m), np.cos(theta) - m * np.sin(m))


def cross_entropy(logits, y):
    return np.mean([np.log(np.exp(row - row.max()).sum()) + row.max() - row[k] for row, k in zip(logits, y, strict=True)])


def expected(name, loss, z, y):
    theta, rows, y = angles(loss, z), np.arange(len(y)), y.numpy()
    cos, right = np.cos(theta), theta[rows, y]
    if name == "arcface": cos[rows, y] = arc(right, loss.margin)
    if name == "dynm_arcface":
        n = np.array(GIVEN["class_counts"], float)
        m = 0.2 + 0.15 * (1 + np.cos(np.pi * (n - n.min()) / (n.max() - n.min())))
        cos[rows, y] = [arc(t, m[k]) for t, k in zip(right, y, strict=True)]
    if name == "li_arcface":
        theta[rows, y] += loss.margin
        cos = (np.pi - 2 * theta) / np.pi
    if name == "curricularface":
        t, target = 0.01 * np.cos(right).mean(), arc(right, loss.margin)
        cos = np.where(cos > target[:, None], cos * (t + cos), cos)
        cos[rows, y] = target
    if name == "adaface":
        length = z.norm(dim=1).double().numpy()
        q = (0.333 * (length - length.mean()) / (length.std(ddof=1) + 1e-3)).clip(-1, 1)
        cos[rows, y] = np.cos((right - loss.margin * q).clip(1e-3, np.pi - 1e-3)) - loss.margin * (1 + q)
    scale = loss.scale.item()
    if name == "adacos":
        s0, wrong = math.sqrt(2) * math.log(C - 1), np.arange(C) != y[:, None]
        scale = np.log((np.exp(s0 * cos) * wrong).sum(1).mean()) / np.cos(min(np.pi / 4, np.sort(right)[(len(y) - 1) // 2]))
    return scale * cos


@pytest.mark.parametrize("centres", [1, 2, 4])
@pytest.mark.parametrize("name", NAMES)
def test_logits_and_loss_are_those_of_the_formula(name, centres):
    z, y = embeddings() * torch.linspace(0.5, 3, 20)[:, None], classes()
    loss = with_centres(make_loss(dict(name=name, centres=centres), **GIVEN))
    state = {k: v.clone() for k, v in loss.state_dict().items()}
    wanted = expected(name, loss, z, y)
    np.testing.assert_allclose(loss.logits(z, y).detach(), wanted, rtol=1e-4, atol=1e-4)
    loss.load_state_dict(state)
    assert loss(z, y).item() == pytest.approx(cross_entropy(wanted, y.numpy()), rel=1e-4)


def test_arcface_is_the_library_s():
    theirs = pml.ArcFaceLoss(C, D, margin=math.degrees(0.5), scale=30)
    ours = ArcFaceLoss(D, C, 30, 0.5)
    ours.weight.data = theirs.W.data.T.clone()
    torch.testing.assert_close(ours(embeddings(), classes()), theirs(embeddings(), classes()), rtol=1e-4, atol=1e-4)


def test_sub_centres_are_the_library_s():
    theirs = pml.SubCenterArcFaceLoss(num_classes=C, embedding_size=D, margin=math.degrees(0.5), scale=30, sub_centers=4)
    ours = ArcFaceLoss(D, C, 30, 0.5, centres=4)
    ours.weight.data = theirs.W.data.T.clone()
    torch.testing.assert_close(ours(embeddings(), classes()), theirs(embeddings(), classes()), rtol=1e-4, atol=1e-4)


def test_without_a_margin_it_is_the_normalised_softmax_of_the_library():
    theirs = pml.NormalizedSoftmaxLoss(C, D, temperature=1 / 30)
    ours = CosineSoftmaxLoss(D, C, 30)
    ours.weight.data = theirs.W.data.T.clone()
    torch.testing.assert_close(ours(embeddings(), classes()), theirs(embeddings(), classes()), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_state_moves_in_training_only_and_survives_a_restart(name):
    z, y, loss = embeddings(), classes(), with_centres(make_loss(name, **GIVEN))
    loss(z, y)
    state = {k: v.clone() for k, v in loss.state_dict().items()}
    value = loss.eval()(z, y)
    assert all(torch.equal(v, state[k]) for k, v in loss.state_dict().items())
    other = make_loss(name, **GIVEN)
    other.load_state_dict(state)
    assert torch.equal(other.eval()(z, y), value)
    assert torch.equal(other.train()(z, y), loss.train()(z, y))


@pytest.mark.parametrize("name,state", [("adacos", "scale"), ("curricularface", "t"), ("adaface", "mean")])
def test_what_is_kept_track_of_is_a_buffer(name, state):
    loss = with_centres(make_loss(name, **GIVEN))
    before = getattr(loss, state).clone()
    loss(3 * embeddings(), classes())
    assert state in dict(loss.named_buffers()) and not torch.equal(getattr(loss, state), before)


@pytest.mark.parametrize("name", NAMES)
def test_images_of_unknown_class_are_left_out(name):
    z, y = embeddings(), classes()
    part, whole = with_centres(make_loss(name, **GIVEN)), with_centres(make_loss(name, **GIVEN))
    more, unknown = torch.cat([z, embeddings(3, seed=9)]), torch.cat([y, torch.full((3,), -1)])
    torch.testing.assert_close(whole(more, unknown), part(z, y))
    nothing = z.clone().requires_grad_()
    loss = whole(nothing, torch.full_like(y, -1))
    loss.backward()
    assert loss == 0 and not nothing.grad.any()


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_finite_at_the_centres_opposite_them_and_at_zero(name):
    loss = with_centres(make_loss(name, **GIVEN))
    z = torch.cat([loss.weight.data[:2], -loss.weight.data[:2], torch.zeros(1, D)]).clone().requires_grad_()
    value = loss(z, torch.tensor([0, 1, 0, 1, 2]))
    value.backward()
    assert value.isfinite() and z.grad.isfinite().all() and loss.weight.grad.isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_autocast_changes_nothing(name):
    a, b = with_centres(make_loss(name, **GIVEN)), with_centres(make_loss(name, **GIVEN))
    with torch.autocast("cpu", dtype=torch.bfloat16): value = a(embeddings(), classes())
    assert torch.equal(value, b(embeddings(), classes()))


@pytest.mark.parametrize("name", NAMES)
def test_training_separates_classes(name):
    z, y, loss = torch.nn.Parameter(embeddings()), classes(), make_loss(name, **GIVEN)
    optim = torch.optim.Adam([z, *loss.parameters()], lr=0.05)
    for _ in range(120):
        optim.zero_grad()
        loss(z, y).backward()
        optim.step()
    assert torch.equal(loss.cosines(z).argmax(1), y)
    if name == "cosine_softmax": return                       # without a margin, classes may stay close to one another
    d = torch.cdist(*[torch.nn.functional.normalize(z.detach())] * 2).fill_diagonal_(9)
    assert (y[d.argmin(1)] == y).float().mean() > 0.75


def test_one_image_gives_no_statistics():
    loss = AdaFaceLoss(D, C)
    assert loss(embeddings(1), classes(1)).isfinite() and loss.mean == 20


def test_adacos_scale_stays_positive():
    loss = AdaCosLoss(D, 3)
    loss.weight.data = torch.ones(3, D)
    for _ in range(50): loss(-torch.ones(4, D), classes(4, 3))
    assert loss.scale > 0


@pytest.mark.parametrize("make,word", [
    (lambda: ArcFaceLoss(D, C)(embeddings(), torch.nn.functional.one_hot(classes())), "one class per image"),
    (lambda: ArcFaceLoss(D, 3)(embeddings(), classes()), "0 to 2"), (lambda: AdaCosLoss(D, 2), "three classes"),
    (lambda: ArcFaceLoss(D, C, scale=0), "all above 0"), (lambda: ArcFaceLoss(D, C, centres=0), "all above 0"),
    (lambda: DynMArcFaceLoss(D, C, [1, 2]), "one count"), (lambda: make_loss("dynm_arcface", embed_dim=D, n_classes=C), "needs class_counts"),
    (lambda: CurricularFaceLoss(D, C)(embeddings(), classes(5)), "belong together"),
    (lambda: LiArcFaceLoss(D, 0), "all above 0")])
def test_what_is_refused(make, word):
    with pytest.raises(InputError, match=word): make()


def test_they_are_registered(): assert set(NAMES) <= set(LOSSES.list())
