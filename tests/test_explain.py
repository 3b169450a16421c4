"Why two patches match: sums that add up, parts whose likeness is known, bits whose meaning is known."
import numpy as np
import pytest
import torch
from engine_run import tiny_config
from torch.nn import functional as F

from rsir_nb.all import import_pages
from rsir_nb.cli import main
from rsir_nb.core import METHODS, InputError
from rsir_nb.simulate.synthetic import SyntheticArchive
from rsir_nb.engine.bits import bit_labels, bit_values, shared_bits
from rsir_nb.engine.explain import match_tokens, mutual_pairs, show_match
from rsir_nb.engine.hash import train_hash
from rsir_nb.engine.retriever import Retriever, open_search
from rsir_nb.engine.stages import index_run
from rsir_nb.engine.parts import build_archive
from rsir_nb.engine.train import pretrain
from rsir_nb.engine.why import explain
from rsir_nb.methods.tokens import token_shares, window_embeddings, window_places
from rsir_nb.retrieval.codes import bit_statistics, hamming_distances, pack_bits, unpack_bits

SMALL = dict(embed_dim=32, num_heads=2, patch_size=15)
CSMAE = dict(SMALL, specific_depth=1, shared_depth=1, decoder=None)
METHODS_OF = dict(mean=("csmae", CSMAE), normed=("csmae", dict(CSMAE, embed_norm="batch")),
                  greatest=("csmae", dict(CSMAE, global_pool="max")), cmmae=("cmmae", CSMAE),
                  twin=("duch_pairs", dict(SMALL, depth=1, global_pool="avg")))


@pytest.fixture(scope="module")
def archive():
    import_pages()
    return SyntheticArchive(n_places=8, patches_per_place=4, seed=4)


def make(archive, name):
    "A method with random weights, its batch norms and layer norms away from the identity."
    torch.manual_seed(0)
    kind, kwargs = METHODS_OF[name]
    method = METHODS.create(kind, sensors=archive.sensors, img_size=120, **kwargs)
    with torch.no_grad():
        for o in method.modules():
            if isinstance(o, torch.nn.LayerNorm):
                o.weight.add_(0.3*torch.randn_like(o.weight))
                o.bias.add_(0.3*torch.randn_like(o.bias))
        for norm in getattr(method, "embed_norms", None) and method.embed_norms.values() or []:
            for buffer in norm.buffers():
                if buffer.is_floating_point(): buffer.copy_(1 + torch.rand_like(buffer))
    return method.eval()


@pytest.mark.parametrize("name", METHODS_OF)
def test_shares_add_up_to_the_similarity(archive, name):
    method = make(archive, name)
    x, y = archive[0]["s1"], archive[9]["s2"]
    z, u = method.embed(x[None], "s1"), method.embed(y[None], "s2")
    shares, exact = token_shares(method, x, "s1")
    assert exact and torch.allclose(shares.mean(0), z[0], atol=1e-4*z.abs().max().item())
    match = match_tokens(method, x, "s1", y, "s2")
    cosine = F.cosine_similarity(z.double(), u.double()).item()
    for o in match.shares: assert o.sum() == pytest.approx(cosine, abs=1e-5)


def test_a_class_token_is_no_mean(archive):
    method = METHODS.create("duch_pairs", sensors=archive.sensors, img_size=120, **SMALL, depth=1)
    assert not match_tokens(method, archive[0]["s1"], "s1", archive[1]["s2"], "s2").exact


@pytest.mark.parametrize("quarter", [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_a_shared_quarter_is_found(archive, quarter):
    "The strongest pairs lie in the quarter that both images have, each at its own place; no others are as strong."
    method, (r, c) = make(archive, "normed"), quarter
    rows, cols = slice(60*r, 60*r + 60), slice(60*c, 60*c + 60)
    for i, j in ((0, 17), (5, 29)):
        x, y = archive[i]["s2"], archive[j]["s2"].clone()
        y[:, rows, cols] = x[:, rows, cols]
        pairs = match_tokens(method, x, "s2", y, "s2").pairs
        strong = [o for o in pairs if o.similarity > 0.9999]
        assert strong and strong == pairs[:len(strong)]
        for o in strong:
            assert o.query == o.hit
            assert 4*r <= o.query[0] <= 4*r + 2 and 4*c <= o.query[1] <= 4*c + 2


def test_a_shifted_copy_is_found_where_it_went(archive):
    "Without positions a window is the same wherever it stands: the pairs point to where the image was moved."
    method = make(archive, "mean")
    method.backbone.pos_embed.data.zero_()
    x, y = archive[0]["s2"], archive[17]["s2"].clone()
    y[:, 30:90, 45:105] = x[:, 60:120, 15:75]
    pairs = match_tokens(method, x, "s2", y, "s2", n_pairs=3).pairs
    assert pairs and all((o.hit[0] - o.query[0], o.hit[1] - o.query[1]) == (-2, 2) for o in pairs)


def test_windows_know_nothing_of_the_rest(archive):
    method = make(archive, "normed")
    x = archive[0]["s2"]
    changed = x.clone()
    changed[:, :45] = archive[20]["s2"][:, :45]
    same = (window_embeddings(method, x, "s2", 3) - window_embeddings(method, changed, "s2", 3)).abs().amax(1) < 1e-5
    assert same.tolist() == [r >= 3 for r, c in window_places(8, 3)]


def test_mutual_pairs_are_mutual_and_apart():
    similar = np.random.default_rng(0).normal(size=(49, 49))
    pairs, places = mutual_pairs(similar, window_places(8, 2), 2, 49), window_places(8, 2)
    for o in pairs:
        i, j = places.index(o.query), places.index(o.hit)
        assert similar[i].argmax() == j and similar[:, j].argmax() == i
    for a in pairs:
        for b in pairs:
            if a is not b: assert max(abs(a.query[0] - b.query[0]), abs(a.query[1] - b.query[1])) >= 2


def test_the_picture_carries_words(archive):
    match = match_tokens(make(archive, "mean"), archive[0]["s2"], "s2", archive[0]["s2"], "s2")
    picture = np.zeros((120, 120, 3))
    assert "similarity of 1.00" in show_match(match, picture, picture).get_label()


def test_shared_bits_against_a_plain_count():
    rng = np.random.default_rng(1)
    bits = rng.random((50, 24)) < np.linspace(.05, .95, 24)
    codes = pack_bits(bits)
    told = shared_bits(codes[3], codes[8], codes)
    assert (~told.shared).sum() == hamming_distances(codes[3:4], codes[8:9])[0, 0]
    for i in range(24):
        part = (bits[:, i] == bits[8, i]).mean()
        assert told.surprise[i] == pytest.approx(-np.log2(part) if bits[3, i] == bits[8, i] else 0, abs=1e-6)
    with pytest.raises(InputError, match="differ in length"): shared_bits(codes[0], codes[0, :2], codes)
    with pytest.raises(InputError, match="no codes"): shared_bits(codes[0], codes[1], codes[:0])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = pretrain(tiny_config(tmp_path_factory.mktemp("explain")/"run"), progress=False)
    train_hash(path, progress=False)
    index_run(path, progress=False)
    return path


@pytest.fixture(scope="module")
def search(run):
    from rsir_nb.config import load_run_config
    return open_search(run, build_archive(load_run_config(run).data))


def test_an_explanation_agrees_with_the_search(search):
    hits = search.query(search.store.ids[3], "s1", "s2", k=5)
    for name, distance in zip(hits.ids, hits.dists, strict=True):
        why = explain(search, search.store.ids[3], name, "s1", "s2")
        assert why.distance == distance and why.tokens.exact
    page = why.to_html()
    assert page.count("<img") >= 3 and 'alt=""' not in page and "http" not in page.split("</head>")[1]


def test_a_bit_is_cut_at_zero(search):
    store = search.store
    for bit in range(0, store.n_bits, 5):
        on = unpack_bits(store.codes["s2"])[:, bit].astype(bool)
        assert np.array_equal(bit_values(store, search.method, "s2", bit) > 0, on)
        told = bit_labels(store, "s2", bit, least=1)
        labels = store.table["labels"]
        for name in told.index:
            has = np.array([name in o for o in labels])
            assert told.on[name] == (has & on).sum() and told.off[name] == (has & ~on).sum()
            assert on.sum() == 0 or told.lift[name] == pytest.approx(on[has].mean()/on.mean())


def test_of_what_cannot_be_told(search, tmp_path):
    bare = Retriever(search.method, search.store, search.indexes, search.path)
    with pytest.raises(InputError, match="no images"): explain(bare, search.store.ids[0], search.store.ids[1])
    with pytest.raises(KeyError, match="no patch"): explain(search, search.store.ids[0], "nobody")
    with pytest.raises(KeyError, match="sensor"): explain(search, search.store.ids[0], search.store.ids[1], "s7")


def test_the_verb(run, search, capsys, tmp_path):
    a, b = search.store.ids[:2]
    assert main(["explain", str(run), a, b, "--source", "s1", "--target", "s2", "--html", str(tmp_path/"why.html")]) == 0
    assert "bits are the same" in capsys.readouterr().out and (tmp_path/"why.html").stat().st_size > 5000
    assert main(["explain", str(run), a, "nobody"]) == 2
    error = capsys.readouterr().err
    assert "no patch is called 'nobody'" in error and "Traceback" not in error


def test_a_bit_that_is_always_on_has_no_entropy():
    assert bit_statistics(pack_bits(np.ones((5, 8), bool)))["entropy"] == pytest.approx(0, abs=1e-9)


def test_of_a_large_archive_some_patches_are_looked_at(search):
    store = search.store
    whole = bit_values(store, search.method, "s2", [0, 3])
    some = bit_values(store, search.method, "s2", [0, 3], sample=len(store)//4)
    seen = np.isfinite(some).all(1)
    assert whole.shape == (len(store), 2) and 0 < seen.sum() <= len(store)//4
    assert np.allclose(whole[seen], some[seen]) and np.allclose(whole[:, 1], bit_values(store, search.method, "s2", 3))
    with pytest.raises(InputError, match="no such bit"): bit_values(store, search.method, "s2", [0, store.n_bits])
