"""Hash losses with labels, heads trained with them, and protocols that leave out the query's own group."""
import numpy as np
import pytest
import torch
from torch.nn import functional as F

from rsir_nb.config import load_config
from rsir_nb.core import LOSSES, InputError, UnknownNameError
from rsir_nb.data.base import TensorArchive
from rsir_nb.engine.encode import encode
from rsir_nb.engine.evaluate import evaluate
from rsir_nb.data.splits import group_split, write_split_lists
from rsir_nb.data.vessels import VesselArchive, read_split_lists, write_vessels
from rsir_nb.engine.hash import paired_labels, train_hash
from rsir_nb.engine.protocols import Protocol, System, directions, get_protocol, store_labels
from rsir_nb.engine.scoring import score_direction
from rsir_nb.metrics.labels import pair_overlap
from rsir_nb.engine.train import pretrain
from rsir_nb.losses.hashing import label_relevance, supervised_hash_loss, zero_one_loss
from rsir_nb.methods.baselines import BandQuantiles
from rsir_nb.methods.hashing import hashing_losses
from rsir_nb.engine.hash import train_heads
from rsir_nb.retrieval.codes import CodeStore, binarise

g = torch.Generator().manual_seed(0)


def codes(n=12, k=16, m=2): return [torch.randn(n, k, generator=g).tanh() for _ in range(m)]


# zero-one

def test_zero_one_by_its_definition():
    h, yes = codes(m=2), torch.randint(0, 2, (12,), generator=g)
    by_hand = np.mean([sum(abs((1. if y else -1.) - v) for v in row) for o in h for row, y in zip(o.tolist(), yes.tolist(), strict=True)])
    assert zero_one_loss(h, yes).item() == pytest.approx(by_hand, rel=1e-5)
    assert zero_one_loss(h, F.one_hot(yes, 2)).item() == pytest.approx(by_hand, rel=1e-5)
    assert zero_one_loss(h, yes[:, None], "mean").item() == pytest.approx(by_hand/16, rel=1e-5)
    assert LOSSES.get("zero_one") is zero_one_loss and LOSSES.get("supervised_contrastive") is supervised_hash_loss


def test_zero_one_leaves_out_the_unlabelled():
    h, y = codes(m=1)[0], F.one_hot(torch.tensor([0, 1]*6), 2)
    y[:4] = 0
    assert zero_one_loss(h, y).item() == pytest.approx(zero_one_loss(h[4:], y[4:]).item())
    assert zero_one_loss(h.requires_grad_(), torch.zeros(12, 2)).item() == 0


@pytest.mark.parametrize("labels", [torch.zeros(12, 3), torch.zeros(11), torch.zeros(12, 2, 1), torch.full((12,), 2.)])
def test_zero_one_refuses(labels):
    with pytest.raises(InputError): zero_one_loss(codes(), labels)
    with pytest.raises(UnknownNameError): zero_one_loss(codes(), torch.ones(12), "summ")


# supervised

def test_relevance():
    y = torch.tensor([[1, 1, 0], [0, 1, 1], [0, 0, 0], [0, 0, 1]])
    want = [[1, 1/3, 0, 0], [1/3, 1, 0, 1/2], [0, 0, 1, 0], [0, 1/2, 0, 1]]
    assert np.allclose(label_relevance(y), want)
    with pytest.raises(InputError): label_relevance(torch.ones(3))
    with pytest.raises(InputError, match="0 or 1"): label_relevance(torch.full((2, 2), 0.5))


def by_pairs(h, y, features, t, tau):
    "The loss as its formula has it, pair by pair in float64."
    h = np.concatenate([np.asarray(o, float) for o in h])
    n, B = len(h), len(y)
    unit = lambda x: x/np.linalg.norm(x, axis=1, keepdims=True)
    z, f = unit(h), [unit(np.asarray(o, float)) for o in features or []]
    total, asked = 0., 0
    for i in range(n):
        p, q = {}, {}
        for j in range(n):
            a, b = i % B, j % B
            if j == i or (a != b and (not y[a].any() or not y[b].any())): continue
            both, either = (y[a] & y[b]).sum(), (y[a] | y[b]).sum()
            r = 1. if a == b else both/either if either else 0.
            p[j] = r*np.exp((np.mean([o[a] @ o[b] for o in f]) - 1)/tau if f else 0.)
            q[j] = np.exp(z[i] @ z[j]/t)
        if sum(p.values()) == 0: continue
        total -= sum(p[j]/sum(p.values())*np.log(q[j]/sum(q.values())) for j in p)
        asked += 1
    return total/asked


@pytest.mark.parametrize("views", [1, 2])
@pytest.mark.parametrize("graded", [False, True])
def test_supervised_by_its_definition(views, graded):
    h, features = codes(10, 8, views), codes(10, 5, 2) if graded else None
    y = (torch.rand(10, 3, generator=g) > 0.5).long()
    y[3] = 0
    found = supervised_hash_loss(h, y, features, temperature=0.3, likeness=0.4)
    assert found.item() == pytest.approx(by_pairs(h, y.numpy(), features, 0.3, 0.4), rel=1e-4)


def test_no_gradient_for_unlabelled_images_of_one_view():
    h, y = codes(6, 8, 1)[0].requires_grad_(), F.one_hot(torch.tensor([0, 0, 1, 1, 0, 1]), 2)
    y[5] = 0
    supervised_hash_loss(h, y, h.detach()).backward()
    assert h.grad[5].abs().max() == 0 and h.grad[0].abs().max() > 0 and torch.isfinite(h.grad).all()
    alone = codes(4, 8, 1)[0].requires_grad_()
    supervised_hash_loss(alone, torch.zeros(4, 2)).backward()
    assert alone.grad.abs().max() == 0


def test_features_get_no_gradient_and_order_is_kept():
    f = codes(8, 6, 1)[0].requires_grad_()
    h = codes(8, 6, 1)[0].requires_grad_()
    supervised_hash_loss(h, torch.ones(8, 1), f).backward()
    assert f.grad is None and h.grad is not None
    near = torch.tensor([[1., 0.05], [1., 0], [1., 1]])
    raw = torch.nn.Parameter(torch.randn(3, 16, generator=g))
    optim = torch.optim.Adam([raw], 0.05)
    for _ in range(200):
        optim.zero_grad()
        supervised_hash_loss(raw.tanh(), torch.ones(3, 1), near).backward()
        optim.step()
    z = F.normalize(raw.detach().tanh(), dim=1)
    assert z[0] @ z[1] > z[1] @ z[2] + 0.05


@pytest.mark.parametrize("kw,message", [(dict(temperature=0), "positive"), (dict(likeness=-1), "positive"),
                                        (dict(labels=torch.ones(5, 2)), "12 and 5"),
                                        (dict(features=torch.ones(5, 2)), "do not belong together"),
                                        (dict(features={}), "do not belong together")])
def test_supervised_refuses(kw, message):
    kw = dict(labels=torch.ones(12, 2)) | kw
    with pytest.raises(InputError, match=message): supervised_hash_loss(codes(), **kw)


# heads

def make_kinds(n=400, seed=0):
    rng = np.random.default_rng(seed)
    kind = rng.integers(6, size=n)
    x = rng.normal(size=(6, 12))[kind] + 0.6*rng.normal(size=(n, 12))
    return torch.tensor(x, dtype=torch.float32), kind


def p10(bits, kind):
    d = (bits[:, None] != bits[None]).sum(-1) + 99*np.eye(len(bits))
    return (kind[np.argsort(d, 1, kind="stable")[:, :10]] == kind[:, None]).mean()


def test_supervised_heads_keep_what_zero_one_forgets():
    x, kind = make_kinds()
    y = np.eye(2)[(kind < 3).astype(int)]
    plain = dict(n_bits=32, min_steps=150, progress=False, contrastive=0, similarity=0)
    only = dict(quantisation=0, balance=0, decorrelation=0)
    found = {k: binarise(train_heads({"s2": x[:300]}, y[:300], **plain, **kw).heads({"s2": x[300:]})["s2"])
             for k, kw in dict(zero_one=dict(zero_one=1, **only), supervised=dict(supervised=1)).items()}
    assert min(p10(o, kind[300:] < 3) for o in found.values()) > 0.8
    assert p10(found["supervised"], kind[300:]) > p10(found["zero_one"], kind[300:]) + 0.1


def test_labels_of_heads_are_checked():
    x, _ = make_kinds(40)
    for name in "zero_one", "supervised":
        with pytest.raises(InputError, match=f"{name} needs labels"): train_heads({"s2": x}, **{name: 1}, progress=False)
        with pytest.raises(InputError, match="do not belong together"):
            train_heads({"s2": x}, np.ones((39, 2)), **{name: 1}, progress=False)
        for alike in np.ones((40, 1)), np.eye(2)[[1]*40], np.zeros((40, 2)):
            with pytest.raises(InputError, match="all alike"): train_heads({"s2": x}, alike, **{name: 1}, progress=False)
    with pytest.raises(InputError, match="more classes"):
        train_heads({"s2": x}, np.eye(3)[[0, 1]*20], zero_one=1, progress=False)
    quick = dict(n_bits=8, epochs=1, min_steps=1, progress=False)
    assert train_heads({"s2": x}, np.full((40, 9), 7.), **quick).history.columns.isin(["supervised"]).sum() == 0


def test_published_sum_of_zero_one():
    h = dict(a=codes(m=1)[0])
    y = F.one_hot(torch.tensor([0, 1]*6), 2)
    loss = hashing_losses(h, h, dict(zero_one=2.), published=True, labels=y)
    assert loss["loss"].item() == pytest.approx(2*zero_one_loss(h, y).item())
    assert hashing_losses(h, h, dict(zero_one=1.), labels=y)["loss"].item() == pytest.approx(zero_one_loss(h, y).item()/16)


# a run, and its evaluation

def make_archive(n=24):
    x = torch.rand(n, 4, 16, 16, generator=torch.Generator().manual_seed(1))*1000 + 100
    kind = np.arange(n) % 2
    x[torch.tensor(kind == 1), :, :4, :4] += 3000
    return TensorArchive(dict(s2=x), dict(s2="s2_rgbn"), labels=[["vessel"] if o else ["no vessel"] for o in kind],
                         place=[f"port {i//2 % 4}" for i in range(n)])


SMALL = ["method.embed_dim=16", "method.shared_depth=1", "method.decoder_embed_dim=16", "optim.epochs=1",
         "optim.warmup_epochs=0", "trainer.pictures=0", "hash.n_bits=16", "hash.min_steps=5", "hash.epochs=1"]


def test_train_hash_hands_labels_over(tmp_path):
    root = write_vessels(tmp_path/"vdd", n_scenes=2, grid=(2, 3), img_size=32, seed=3)
    cfg = load_config("vessels", ["hash=supervised", *SMALL, f"data.root={root}", f"out={tmp_path}/run"])
    run = pretrain(cfg, progress=False)
    method = train_hash(run, progress=False)
    assert "supervised" in (run/"hash"/"metrics.csv").read_text().split("\n")[0]
    archive, kinds = VesselArchive(root), VesselArchive(root, labels="scene_class")
    store = encode(method, archive, tmp_path/"codes", progress=False)
    assert np.array_equal(paired_labels(store, archive), archive.labels)
    assert np.array_equal(paired_labels(store, kinds), kinds.labels)
    bare = VesselArchive(root)
    bare.vocab = None
    with pytest.raises(InputError, match="needs labels"):
        train_hash(run, bare, progress=False, overwrite=True, zero_one=1.)
    alike = VesselArchive(root)
    alike.table["labels"] = [["vessel"]]*len(alike)
    with pytest.raises(InputError, match="all alike"): train_hash(run, alike, progress=False, overwrite=True)
    with pytest.raises(InputError, match="more classes"):
        train_hash(run, kinds, progress=False, overwrite=True, zero_one=1.)
    train_hash(run, archive, progress=False, overwrite=True, zero_one=1.)
    found = evaluate(run, progress=False, drawings=20, metrics=["precision"])
    assert {"band_statistics", "band_quantiles", "untrained", "chance"} <= set(found.table.system)
    assert found.about["protocol"] == "leave_group_out" and found.table.n_items.max() < len(archive)


def test_published_lists_split_training_and_questions(tmp_path):
    root = write_vessels(tmp_path/"vdd", n_scenes=3, grid=(2, 3), img_size=32, seed=3)
    table = VesselArchive(root).table
    paths = write_split_lists(table.id, group_split(table, "scene"), root)
    lists = "{query: query.json, archive: archive.json}"
    cfg = load_config("vessels_supervised", [*SMALL, f"data.root={root}", f"data.splits={lists}", f"out={tmp_path}/run"])
    run = pretrain(cfg, progress=False)
    train_hash(run, progress=False)
    learned = CodeStore.open(run/"hash"/"features").table.id
    assert sorted(learned) == sorted(read_split_lists(paths)["archive"])
    found = evaluate(run, progress=False, drawings=20, baselines=["random"], metrics=["precision"])
    assert found.table.n_queries.max() == len(read_split_lists(paths)["query"])
    assert found.table.n_items.max() == len(learned)


@pytest.mark.parametrize("name", ["zero_one", "supervised"])
def test_packaged_settings_train(name):
    from rsir_nb.config import to_dict
    settings = to_dict(load_config("base", [f"hash={name}"]).hash)
    x, kind = make_kinds(60)
    history = train_heads({"s2": x}, np.eye(2)[kind % 2], **settings | dict(epochs=40, min_steps=40), progress=False).history
    assert history.loss.iloc[-1] < history.loss.iloc[0] and name in history


# own group left out

@pytest.fixture(scope="module")
def store(tmp_path_factory):
    archive = make_archive(n=40)
    method = BandQuantiles(archive.sensors, img_size=16, quantiles=(0, 0.5, 1))
    return encode(method, archive, tmp_path_factory.mktemp("g")/"store", progress=False)


def test_hits_of_the_own_group_are_left_out(store):
    d = directions(store, "leave_group_out")[0]
    system = System("quantiles", store, "float", "l2")
    result = score_direction(system, d, (10,), metrics=["precision", "map", "recall"])
    x, labels, place = store.embeddings["s2"].astype(float), store_labels(store), store.table.place.to_numpy()
    dist = ((x[:, None] - x[None])**2).sum(-1)
    for i, name in enumerate(result.ids):
        row = store.table.id.tolist().index(name)
        others = np.flatnonzero(place != place[row])
        best = others[np.argsort(dist[row, others], kind="stable")]
        relevant = pair_overlap(labels, best, row) > 0
        at = result.ks.index(10)
        assert result.scores["precision"][i, at] == pytest.approx(relevant[:10].mean())
        assert result.scores["recall"][i, at] == pytest.approx(relevant[:10].sum()/relevant.sum())
    assert result.n_items == min((place != o).sum() for o in place) and result.ks[-1] == result.n_items


def test_groups_do_not_change_other_protocols(store):
    d = directions(store, "leave_one_out")[0]
    assert d.groups is None and d.own is not None
    result = score_direction(System("q", store, "float", "l2"), d, (3,), metrics=["precision"])
    assert result.n_items == len(store) - 1


def test_bad_groups(store):
    mine = lambda column: Protocol("test", "test", (10,), "me", exclude_group=column)
    with pytest.raises(UnknownNameError, match="did you mean place"): directions(store, mine("plase"))
    store.table["one"], store.table["gap"] = "x", [None, *["y"]*(len(store) - 1)]
    with pytest.raises(InputError, match="one group, so nothing answers"): directions(store, mine("one"))
    with pytest.raises(InputError, match="not known for every patch"): directions(store, mine("gap"))
    assert get_protocol("vdd").query == "query"


def test_quantiles_by_numpy():
    archive = make_archive()
    x = torch.stack([archive[i]["s2"] for i in range(5)])
    found = BandQuantiles(archive.sensors, img_size=16).embed(x, "s2").view(5, 4, 9)
    want = np.quantile(x.numpy(), np.arange(1, 10)/10, axis=(2, 3)).transpose(1, 2, 0)
    assert np.allclose(found, want, rtol=1e-4)
    for bad in [(), (1.5,)]:
        with pytest.raises(InputError, match="from 0 to 1"): BandQuantiles(archive.sensors, quantiles=bad)


def test_what_each_loss_does_to_the_ranking_of_real_patches(shared):
    "Heads on band statistics of real ports: zero-one leaves ties, the supervised loss an order."
    from rsir_nb.core import METHODS
    archive = VesselArchive(shared/"data"/"vessels", img_size=64)
    method = METHODS.create("band_statistics", sensors=archive.sensors, img_size=64).fit(archive)
    x = torch.cat([method.embed(o["s2"][None], "s2") for o in archive])
    quick = dict(n_bits=64, min_steps=150, epochs=1, progress=False, contrastive=0, similarity=0)
    only = dict(quantisation=0, balance=0, decorrelation=0)
    tied, codes_used = {}, {}
    for name, kw in dict(zero_one=dict(zero_one=1, **only), supervised=dict(supervised=1)).items():
        bits = np.asarray(binarise(train_heads({"s2": x}, archive.labels, **quick, **kw).heads({"s2": x})["s2"]))
        d = (bits[:, None] != bits[None]).sum(-1)[~np.eye(len(bits), dtype=bool)].reshape(len(bits), -1)
        tied[name] = np.median((d == d.min(1, keepdims=True)).sum(1))
        codes_used[name] = len(np.unique(bits, axis=0))
    assert tied["zero_one"] > len(archive)/8 and tied["supervised"] < 5
    assert codes_used["supervised"] > 3*codes_used["zero_one"]
