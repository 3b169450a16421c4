"Losses with a memory against plain loops, softmax classifiers and themselves after a restart."
import numpy as np
import pytest
import torch
from torch.nn import functional as F

from rsir_nb.core import InputError
from rsir_nb.losses.memory import FastMoCoLoss, MemoryNCALoss, ema_update
from rsir_nb.losses.pairs import make_loss

N, D, C = 40, 8, 5


def rng(seed=0): return torch.Generator().manual_seed(seed)
def embeddings(n=N, d=D, seed=0): return torch.randn(n, d, generator=rng(seed))
def classes(n=N): return torch.arange(n) % C
def several(n=N, seed=1): return (torch.rand(n, C, generator=rng(seed)) < 0.35).long()


def remembered(y, seen=None, **kwargs):
    loss = MemoryNCALoss(N, D, C, multi_label=y.ndim == 2, **kwargs)
    rows = torch.arange(N) if seen is None else seen
    loss.update(embeddings()[rows], y[rows], rows)
    return loss


def nca_by_loops(z, y, rows, memory, labels, seen, t=0.05, margin=0.0):
    z, memory = (F.normalize(o.double(), dim=1).numpy() for o in (z, memory))
    total = 0.0
    for i, row in enumerate(rows.tolist()):
        like = unlike = 0.0
        for j in range(len(memory)):
            if j == row or j not in seen: continue
            w = float((y[i] * labels[j]).sum()) / C if y.ndim == 2 else float(y[i] == labels[j])
            e = np.exp(z[i] @ memory[j] / t)
            like, unlike = like + w * e, unlike + (1 - w) * e
        like *= np.exp(-margin / t)
        if like: total -= np.log(like / (like + unlike))
    return total / len(z)


@pytest.mark.parametrize("labels", ["classes", "several"])
@pytest.mark.parametrize("margin", [0.0, 0.1])
@pytest.mark.parametrize("part", [False, True])
def test_memory_nca_by_loops(labels, margin, part):
    y = classes() if labels == "classes" else several()
    seen = torch.arange(0, N, 2) if part else torch.arange(N)
    loss, rows, z = remembered(y, seen, margin=margin), torch.tensor([4, 7, 20, 31]), embeddings(4, seed=2)
    known = {j for j in seen.tolist() if y.ndim == 1 or y[j].any()}
    wanted = nca_by_loops(z, y[rows], rows, embeddings(), y, known, margin=margin)
    assert loss(z, y[rows], rows=rows).item() == pytest.approx(wanted, rel=1e-4)


def test_updates_are_moving_averages_and_begin_with_the_first_embedding():
    y, loss = classes(), MemoryNCALoss(N, D, C, multi_label=False, momentum=0.8)
    rows, first, second = torch.tensor([3, 9]), embeddings(2, seed=4), embeddings(2, seed=5)
    loss.update(first, y[rows], rows)
    torch.testing.assert_close(loss.memory[rows], F.normalize(first))
    loss.update(second, y[rows], rows)
    torch.testing.assert_close(loss.memory[rows], F.normalize(0.8 * F.normalize(first) + 0.2 * F.normalize(second)))
    assert loss.seen.nonzero().ravel().tolist() == [3, 9] and loss.labels[rows].tolist() == y[rows].tolist()
    assert not loss.memory.requires_grad


def test_images_without_labels_are_not_remembered_and_cost_nothing():
    y = several()
    y[:5] = 0
    loss = remembered(y)
    assert loss.seen.tolist() == (y.sum(1) > 0).tolist()
    assert loss(embeddings(3), y[:3], rows=torch.arange(3)) == 0


def test_the_gradient_is_finite_and_survives_an_update():
    y, loss = several(), remembered(several())
    z, rows = embeddings(6, seed=3).requires_grad_(), torch.arange(6)
    value = loss(z, y[:6], rows=rows)
    value.backward()
    loss.update(z, y[:6], rows)
    assert z.grad.isfinite().all() and z.grad.any()


@pytest.mark.parametrize("labels", ["classes", "several"])
def test_a_resumed_memory_is_the_same(labels):
    y = classes() if labels == "classes" else several()
    loss, other = remembered(y), MemoryNCALoss(N, D, C, multi_label=y.ndim == 2)
    other.load_state_dict(loss.state_dict())
    rows, z = torch.arange(9), embeddings(9, seed=3)
    assert torch.equal(loss(z, y[:9], rows=rows), other(z, y[:9], rows=rows))


def test_training_with_a_memory_separates_classes():
    y, z = classes(), torch.nn.Parameter(embeddings())
    loss, optim = make_loss("memory_nca", n_items=N, embed_dim=D, n_classes=C), torch.optim.Adam([z], lr=0.05)
    hot = F.one_hot(y)
    for step in range(150):
        rows = torch.randperm(N, generator=rng(step))[:16]
        optim.zero_grad()
        loss(z[rows], hot[rows], rows=rows).backward()
        optim.step()
        loss.update(z[rows], hot[rows], rows)
    d = torch.cdist(F.normalize(z.detach()), F.normalize(z.detach())).fill_diagonal_(9)
    assert (y[d.argmin(1)] == y).float().mean() > 0.95


# momentum contrast --------------------------------------------------------------------------------

def moco_by_loops(q, k, m, t=0.07, lower=0.5, upper=1.4):
    q, k, m = (F.normalize(o.double(), dim=1).numpy() for o in (q, k, m))
    B, dim = q.shape
    d = np.linalg.norm(q[:, None] - m[None], axis=2).clip(lower)
    log_w = (2 - dim) * np.log(d) - (dim - 3) / 2 * np.log(1 - d**2 / 4)
    w = np.exp(log_w - log_w.max()) * (d <= upper)
    w = np.where(w.sum(0) > 0, w / np.where(w.sum(0) > 0, w.sum(0), 1), 1 / B)
    total = 0.0
    for i in range(B):
        logits = np.array([q[i] @ k[i], *(w[i] * (q[i] @ m.T))]) / t
        total += np.log(np.exp(logits).sum()) - logits[0]
    return total / B


@pytest.mark.parametrize("dim", [6, 16])
def test_fast_moco_by_loops(dim):
    q, k, m = embeddings(7, dim), embeddings(7, dim, seed=1), embeddings(30, dim, seed=2)
    loss = FastMoCoLoss(dim, n_keys=50)
    loss.update(m)                                            # partly filled
    assert loss(q, keys=k).item() == pytest.approx(moco_by_loops(q, k, m), rel=1e-4)


def test_the_oldest_keys_leave_the_queue():
    loss, keys = FastMoCoLoss(D, n_keys=10), F.normalize(embeddings(23))
    for part in (keys[:4], keys[4:8], keys[8:11]): loss.update(part)
    torch.testing.assert_close(loss.queue, keys[1:11])
    loss.update(keys[11:])                                    # more than the queue holds
    torch.testing.assert_close(loss.queue, keys[-10:])
    assert loss.filled == 10


def test_an_empty_queue_costs_nothing_and_weights_are_constants():
    q = embeddings(5).requires_grad_()
    loss = FastMoCoLoss(D)
    assert loss(q, keys=embeddings(5, seed=1)) == 0
    loss.update(embeddings(5, seed=2))
    loss(q, keys=embeddings(5, seed=1)).backward()
    assert q.grad.isfinite().all() and q.grad.any()


def test_ema_copies_statistics_and_averages_weights():
    make = lambda: torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3))
    slow, fast = make(), make()
    before = slow[0].weight.clone()
    fast(embeddings(9, 3))
    ema_update(slow, fast, 0.75)
    torch.testing.assert_close(slow[0].weight, 0.75 * before + 0.25 * fast[0].weight)
    assert torch.equal(slow[1].running_mean, fast[1].running_mean) and slow[1].num_batches_tracked == 1


@pytest.mark.parametrize("make,word", [
    (lambda: MemoryNCALoss(N, D, C, temperature=0), "positive"), (lambda: MemoryNCALoss(N, D, C, momentum=1), "momentum"),
    (lambda: FastMoCoLoss(D, temperature=-1), "positive"), (lambda: FastMoCoLoss(D)(embeddings(3)), "a key for each"),
    (lambda: FastMoCoLoss(D)(embeddings(3), keys=embeddings(4)), "a key for each"),
    (lambda: remembered(several())(embeddings(3), several(3)), "which images"),
    (lambda: remembered(several())(embeddings(3), several(3), rows=torch.tensor([0, 1, N])), f"from 0 to {N - 1}"),
    (lambda: remembered(several())(embeddings(3), several(3), rows=torch.tensor([0, 1])), "belong together"),
    (lambda: remembered(several())(embeddings(3), classes(3), rows=torch.arange(3)), "zeros and ones"),
    (lambda: remembered(classes())(embeddings(3), several(3), rows=torch.arange(3)), "class numbers"),
    (lambda: make_loss("memory_nca", embed_dim=D), "needs n_items"),
    (lambda: ema_update(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2, bias=False)), "another network")])
def test_what_is_refused(make, word):
    with pytest.raises(InputError, match=word): make()
