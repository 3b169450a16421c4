"""Hash heads: what training achieves, what it does not depend on, and what is refused."""
import numpy as np
import pytest
import torch

from rsir_nb.core import InputError
from rsir_nb.methods.base import Method
from rsir_nb.methods.csmae import CSMAE
from rsir_nb.methods.hashing import HashHeads, code_similarity_loss, hashing_losses
from rsir_nb.engine.hash import train_heads
from rsir_nb.retrieval.codes import binarise, hamming_distances, pack_bits

KINDS = 6


def make_features(n=600, seed=0, widths=(20, 30)):
    "Kinds of places, seen by sensors through matrices and noise of their own."
    rng = np.random.default_rng(seed)
    kind = rng.integers(KINDS, size=n)
    place = rng.normal(size=(KINDS, 8))[kind] + 0.4*rng.normal(size=(n, 8))
    x = {f"s{i + 1}": torch.tensor(place @ rng.normal(size=(8, d)) + 0.7*rng.normal(size=(n, d)), dtype=torch.float32)
         for i, d in enumerate(widths)}
    return x, kind


def mean_ap(dists, yq, y):
    "Mean average precision by its definition; ties in the order of the archive."
    order = np.argsort(dists, axis=1, kind="stable")
    rel = y[order] == yq[:, None]
    precision = rel.cumsum(1)/np.arange(1, rel.shape[1] + 1)
    return ((precision*rel).sum(1)/rel.sum(1)).mean()


def packed(heads, features): return {m: pack_bits(binarise(h)) for m, h in heads(features).items()}


@pytest.fixture(scope="module")
def trained():
    x, kind = make_features()
    training = train_heads({m: o[:400] for m, o in x.items()}, n_bits=64, min_steps=150, progress=False)
    return training, x, kind


def test_codes_search_as_well_as_floats_and_across_sensors(trained):
    training, x, kind = trained
    codes = {m: o[400:] for m, o in packed(training.heads, x).items()}
    y = kind[400:]
    unit = {m: torch.nn.functional.normalize(o[400:]).numpy() for m, o in x.items()}
    scores = {(a, b): mean_ap(hamming_distances(codes[a][:50], codes[b][50:]), y[:50], y[50:])
              for a in codes for b in codes}
    for m in codes:
        floats = mean_ap(-unit[m][:50] @ unit[m][50:].T, y[:50], y[50:])
        assert scores[m, m] > floats - 0.03
    assert min(scores["s1", "s2"], scores["s2", "s1"]) > min(scores["s1", "s1"], scores["s2", "s2"]) - 0.05


def test_history_has_every_term_and_falls(trained):
    history = trained[0].history
    assert list(history) == ["loss", "contrastive", "similarity", "quantisation", "balance", "decorrelation"]
    assert len(history) == 50 and history.loss.iloc[-1] < history.loss.iloc[0]   # 150 steps, three an epoch
    assert history.similarity.iloc[-1] < 0.5*history.similarity.iloc[0]


def test_bits_are_balanced(trained):
    training, x, _ = trained
    ones = np.stack([binarise(h).mean(0) for h in training.heads({m: o[:400] for m, o in x.items()}).values()])
    assert np.abs(ones.mean(1) - 0.5).max() < 0.05 and np.median(np.abs(ones - 0.5)) < 0.1


def test_training_is_repeatable_and_leaves_global_randomness_alone():
    x, _ = make_features(100)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = train_heads(x, n_bits=16, epochs=3, min_steps=3, progress=False)
    assert torch.equal(torch.rand(3), expected)
    again = train_heads(x, n_bits=16, epochs=3, min_steps=3, progress=False)
    assert all(torch.equal(a, b) for a, b in zip(first.heads.parameters(), again.heads.parameters(), strict=True))
    other = train_heads(x, n_bits=16, epochs=3, min_steps=3, seed=1, progress=False)
    assert not torch.equal(other.heads["s1"][0].weight, first.heads["s1"][0].weight)


@pytest.mark.parametrize("names", (("s2",), ("s1", "s2"), ("s1", "s2", "s3")))
@pytest.mark.parametrize("published", (False, True))
def test_any_number_of_sensors(names, published):
    x, _ = make_features(50, widths=(6, 7, 8))
    kw = dict(similarity=0, decorrelation=0, quantisation=.001, balance=.01, published_sums=True) if published else {}
    training = train_heads({m: x[m] for m in names}, n_bits=24, min_steps=5, epochs=5, progress=False, **kw)
    assert sorted(training.heads) == sorted(names) and np.isfinite(training.history.to_numpy()).all()
    assert all(h.shape == (50, 24) and h.abs().max() <= 1 for h in training.heads({m: x[m] for m in names}).values())


def test_published_objective_is_the_published_formula():
    "Sums in float64, written out: NT-Xent at 0.5, 0.001 quantisation, 0.01 balance within codes."
    g = torch.Generator().manual_seed(0)
    h1, h2 = (torch.tanh(torch.randn(9, 16, generator=g)).double() for _ in range(2))
    terms = hashing_losses(dict(s1=h1, s2=h2), {}, dict(contrastive=1, quantisation=.001, balance=.01), published=True)
    target = torch.sign((h1 + h2)/2)
    quantisation = ((target - h1)**2).sum() + ((target - h2)**2).sum()
    balance = (h1.sum(1)**2).sum() + (h2.sum(1)**2).sum()
    z = torch.nn.functional.normalize(torch.cat([h1, h2]))
    e = (z @ z.T/0.5).exp().fill_diagonal_(0)
    contrastive = -(e[range(18), [*range(9, 18), *range(9)]]/e.sum(1)).log().mean()
    torch.testing.assert_close(terms["loss"], contrastive + .001*quantisation + .01*balance)


def test_weights_do_not_depend_on_batch_size_or_code_length():
    g = torch.Generator().manual_seed(0)
    h = {m: torch.tanh(torch.randn(20, 8, generator=g)) for m in ("s1", "s2")}
    f = {m: torch.randn(20, 5, generator=g) for m in h}
    every = dict(similarity=1, quantisation=1, balance=1)
    once = hashing_losses(h, f, every)
    twice = hashing_losses({m: o.repeat(2, 3) for m, o in h.items()}, {m: o.repeat(2, 1) for m, o in f.items()}, every)
    for k in once: torch.testing.assert_close(once[k], twice[k])


def test_similarity_loss_against_loops():
    g = torch.Generator().manual_seed(1)
    h = {m: torch.randn(4, 6, generator=g) for m in ("s1", "s2")}
    f = dict(s1=torch.randn(4, 3, generator=g), s2=torch.randn(4, 5, generator=g))
    cos = lambda a, b: float(torch.nn.functional.cosine_similarity(a, b, dim=0))
    total = []
    for a, b in (("s1", "s1"), ("s1", "s2"), ("s2", "s2")):
        for i in range(4):
            for j in range(4):
                wanted = (cos(f["s1"][i], f["s1"][j]) + cos(f["s2"][i], f["s2"][j]))/2
                total.append((cos(h[a][i], h[b][j]) - wanted)**2)
    assert code_similarity_loss(h, f).item() == pytest.approx(np.mean(total), abs=1e-6)


def test_heads_travel_with_the_method(trained, tmp_path):
    method = CSMAE(["s1", "s2"], img_size=8, patch_size=4, embed_dim=16, num_heads=1, specific_depth=0, shared_depth=1,
                   decoder=None)
    x = {"s1": torch.randn(12, 2, 8, 8)*4 - 15, "s2": torch.randn(12, 10, 8, 8)*500 + 1800}
    method.heads = train_heads(method.embed(x), n_bits=16, min_steps=5, epochs=1, progress=False).heads
    again = Method.load(method.save(tmp_path/"m"))
    assert again.heads.n_bits == 16
    h, h2 = (o.hash(o.embed(x)) for o in (method, again))
    assert all(torch.equal(h[m], h2[m]) for m in h)
    before = method.weights_hash
    method.heads = HashHeads(dict(s1=16, s2=16), n_bits=16)
    assert method.weights_hash != before


def test_features_as_arrays_of_half_precision():
    x, _ = make_features(40)
    half = {m: o.half().numpy() for m, o in x.items()}
    assert len(train_heads(half, n_bits=8, min_steps=2, epochs=2, progress=False).history) == 2


def test_what_cannot_be_learned_from_is_refused():
    x, _ = make_features(40)
    with pytest.raises(InputError, match="N at least 2"): train_heads(dict(s1=x["s1"], s2=x["s2"][:7]))
    with pytest.raises(InputError, match="N at least 2"): train_heads({})
    with pytest.raises(InputError, match="row 3"):
        train_heads(dict(s1=torch.where(torch.arange(40)[:, None] == 3, torch.nan, x["s1"])))
    with pytest.raises(InputError, match="bits"): train_heads(x, n_bits=0)
    zero = dict.fromkeys(("contrastive", "similarity", "quantisation", "balance", "decorrelation"), 0)
    with pytest.raises(InputError, match="nothing to learn"): train_heads(x, progress=False, **zero)
