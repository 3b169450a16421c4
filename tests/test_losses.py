"Losses against closed forms in float64, a library and finite differences."
import math

import numpy as np
import pytest
import torch
from pytorch_metric_learning.losses import NTXentLoss

from rsir_nb.core import LOSSES, InputError, UnknownNameError
from rsir_nb.losses.contrastive import modality_discrepancy_loss, ntxent_loss, pairwise_mean, unit_vectors
from rsir_nb.losses.hashing import bit_balance_loss, bit_decorrelation_loss, quantisation_loss, stack_codes
from rsir_nb.losses.reconstruction import reconstruction_loss, standardise_tokens


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def closed_form_ntxent(z1, z2, t):
    "Term by term, in float64, as the formula is printed."
    z = np.concatenate([z1, z2]).astype(np.float64)
    z /= np.maximum(np.linalg.norm(z, axis=1, keepdims=True), 1e-300)
    n, total = len(z1), 0.0
    for i in range(2 * n):
        others = sum(math.exp(z[i] @ z[k] / t) for k in range(2 * n) if k != i)
        total -= math.log(math.exp(z[i] @ z[(i + n) % (2 * n)] / t) / others)
    return total / (2 * n)


# NT-Xent --------------------------------------------------------------------------------------------

@pytest.mark.parametrize("n,d", [(2, 4), (16, 64), (128, 32)])
@pytest.mark.parametrize("t", [0.07, 0.5, 1.0])
def test_ntxent_is_the_library_s(n, d, t):
    z1, z2 = draw(n, d), draw(n, d, seed=1)
    labels = torch.arange(n).repeat(2)
    wanted = NTXentLoss(temperature=t)(torch.cat([z1, z2]), labels)
    torch.testing.assert_close(ntxent_loss(z1, z2, t), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("t", [0.02, 0.1, 0.5])
def test_ntxent_is_the_closed_form(t):
    z1, z2 = draw(12, 16, dtype=torch.float64), draw(12, 16, seed=1, dtype=torch.float64)
    wanted = closed_form_ntxent(z1.numpy(), z2.numpy(), t)
    assert math.isclose(ntxent_loss(z1, z2, t), wanted, rel_tol=1e-10)
    assert math.isclose(ntxent_loss(z1.float(), z2.float(), t), wanted, rel_tol=1e-5)


def test_ntxent_gradient_is_the_slope():
    z1, z2 = (draw(4, 5, seed=i, dtype=torch.float64).requires_grad_() for i in (0, 1))
    assert torch.autograd.gradcheck(lambda a, b: ntxent_loss(a, b, 0.2), (z1, z2))
    assert torch.autograd.gradcheck(modality_discrepancy_loss, (z1, z2))


@pytest.mark.parametrize("t", [0.01, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_zero_vectors_and_low_temperatures_stay_finite(t, dtype):
    z1, z2 = draw(6, 8).to(dtype), draw(6, 8, seed=1).to(dtype)
    z1[0], z2[3] = 0, 0
    z1, z2 = z1.requires_grad_(), z2.requires_grad_()
    loss = ntxent_loss(z1, z2, t)
    loss.backward()
    assert loss.dtype == torch.float32 and loss.isfinite()
    assert z1.grad.isfinite().all() and z2.grad.isfinite().all()
    wanted = closed_form_ntxent(z1.detach().float().numpy(), z2.detach().float().numpy(), t)
    assert math.isclose(loss.item(), wanted, rel_tol=1e-4, abs_tol=1e-5)


def test_ntxent_leaves_half_precision_under_autocast():
    z1, z2 = draw(64, 32), draw(64, 32, seed=1)
    with torch.autocast("cpu", dtype=torch.bfloat16): value = ntxent_loss(z1, z2, 0.1)
    assert torch.equal(value, ntxent_loss(z1, z2, 0.1))


def test_discrepancy_is_the_closed_form():
    z1, z2 = draw(9, 6), draw(9, 6, seed=1)
    cos = torch.nn.functional.cosine_similarity(z1.double(), z2.double())
    assert math.isclose(modality_discrepancy_loss(z1, z2), (1 + cos.exp()).log().mean(), rel_tol=1e-6)


def test_pairs_of_three_sensors():
    z = {m: draw(8, 4, seed=i) for i, m in enumerate("abc")}
    pairs = ("ab", "ac", "bc")
    wanted = sum(ntxent_loss(z[a], z[b], 0.3) for a, b in pairs) / 3
    torch.testing.assert_close(pairwise_mean(ntxent_loss, z, temperature=0.3), wanted)
    torch.testing.assert_close(pairwise_mean(ntxent_loss, list(z.values())[:2]), ntxent_loss(z["a"], z["b"]))


@pytest.mark.parametrize("shapes", [((2, 3), (3, 3)), ((0, 3), (0, 3)), ((3,), (3,))])
def test_embeddings_that_do_not_pair_are_refused(shapes):
    args = [torch.zeros(o) for o in shapes]
    with pytest.raises(InputError, match="do not belong together"): ntxent_loss(*args)
    with pytest.raises(InputError, match="do not belong together"): modality_discrepancy_loss(*args)


@pytest.mark.parametrize("t", [0, -1, float("nan")])
def test_temperature_is_positive(t):
    with pytest.raises(InputError, match="positive"): ntxent_loss(draw(2, 2), draw(2, 2), t)


def test_unit_vectors():
    z = draw(5, 3)
    z[2] = 0
    length = unit_vectors(z).norm(dim=1)
    torch.testing.assert_close(length, torch.tensor([1.0, 1, 0, 1, 1]))


# reconstruction -------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind,power", [("l2", 2), ("l1", 1)])
@pytest.mark.parametrize("norm_pix", [False, True])
def test_reconstruction_is_the_closed_form(kind, power, norm_pix):
    pred, target = draw(3, 7, 20).numpy(), 4 + 3 * draw(3, 7, 20, seed=1).numpy()
    mask = (draw(3, 7, seed=2) > 0).float().numpy()
    total = 0.0
    for b, i in zip(*np.nonzero(mask), strict=True):
        t = target[b, i].astype(np.float64)
        if norm_pix: t = (t - t.mean()) / np.sqrt(t.var(ddof=1) + 1e-6)
        total += (np.abs(pred[b, i] - t) ** power).mean()
    value = reconstruction_loss(*map(torch.from_numpy, (pred, target, mask)), kind, norm_pix)
    assert math.isclose(value, total / mask.sum(), rel_tol=1e-5)


def test_nothing_removed_costs_nothing():
    pred = draw(2, 4, 3).requires_grad_()
    loss = reconstruction_loss(pred, draw(2, 4, 3, seed=1), torch.zeros(2, 4))
    loss.backward()
    assert loss == 0 and not pred.grad.any()


def test_half_precision_predictions_are_scored_in_full():
    pred, target, mask = draw(2, 4, 300).bfloat16(), draw(2, 4, 300, seed=1), torch.ones(2, 4)
    loss = reconstruction_loss(pred, target, mask)
    torch.testing.assert_close(loss, (pred.float() - target).square().mean())


def test_flat_tokens_are_standardised_to_zero():
    assert not standardise_tokens(torch.full((1, 1, 9), 7.0)).any()


# hashing --------------------------------------------------------------------------------------------

def codes(n=12, k=16, sensors=2): return [draw(n, k, seed=i).tanh() for i in range(sensors)]


@pytest.mark.parametrize("sensors", [1, 2, 3])
def test_published_sums(sensors):
    h = [o.double().numpy() for o in codes(sensors=sensors)]
    target = np.sign(sum(h) / sensors)
    quantisation = sum(((target - o) ** 2).sum() for o in h)
    balance = sum((o.sum(1) ** 2).sum() for o in h)
    assert math.isclose(quantisation_loss(codes(sensors=sensors), "sum"), quantisation, rel_tol=1e-5)
    assert math.isclose(bit_balance_loss(codes(sensors=sensors), reduction="sum"), balance, rel_tol=1e-5)


@pytest.mark.parametrize("loss", [quantisation_loss, bit_balance_loss, bit_decorrelation_loss,
                                  lambda h: bit_balance_loss(h, over="bit")])
def test_means_do_not_depend_on_batch_bits_or_sensors(loss):
    h = codes()
    torch.testing.assert_close(loss([torch.cat([o, o]) for o in h]), loss(h))        # twice the batch
    torch.testing.assert_close(loss([h[0], h[0], h[0]]), loss([h[0]]))               # more sensors that agree
    assert 0 <= loss(h) <= 1.5


def test_no_gradient_flows_through_the_target():
    h = [o.requires_grad_() for o in codes()]
    quantisation_loss(h, "sum").backward()
    target = torch.sign((h[0] + h[1]) / 2).detach()
    torch.testing.assert_close(h[0].grad, 2 * (h[0] - target).detach())


def test_decorrelation_is_the_mean_squared_covariance():
    h = codes(n=50, k=6)
    wanted = []
    for o in h:
        c = np.cov(o.double().numpy().T, ddof=0)
        wanted.append((c[~np.eye(6, dtype=bool)] ** 2).mean())
    assert math.isclose(bit_decorrelation_loss(h), np.mean(wanted), rel_tol=1e-5)


def test_forms_of_codes_mean_the_same():
    h = codes()
    forms = [h, tuple(h), dict(s1=h[0], s2=h[1])]
    assert len({float(quantisation_loss(o)) for o in forms}) == 1
    assert torch.equal(stack_codes(h[0]), h[0][None])


def test_wrong_codes_are_refused():
    for bad in ([torch.zeros(2, 3), torch.zeros(2, 4)], [], torch.zeros(0, 4), torch.zeros(2, 2, 2)):
        with pytest.raises(InputError, match="do not belong together"): quantisation_loss(bad)
    with pytest.raises(UnknownNameError): quantisation_loss(codes(), "total")
    with pytest.raises(UnknownNameError): bit_balance_loss(codes(), over="image")


def test_losses_are_registered():
    hashing = {"quantisation", "bit_balance", "bit_decorrelation"}
    assert hashing | {"ntxent", "modality_discrepancy", "reconstruction"} <= set(LOSSES.list())
