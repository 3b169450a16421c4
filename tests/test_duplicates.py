"Duplicates of an archive: the pairs of a brute-force comparison, their groups, and the page that shows them."
import numpy as np
import pytest
from engine_run import tiny_config
from rsir_nb.cli import main
from rsir_nb.core import InputError, UnknownNameError
from rsir_nb.engine.retriever import Retriever
from rsir_nb.engine.parts import build_archive, build_method
from rsir_nb.retrieval.codes import CodeStore

pytest.importorskip("rsir_nb.retrieval.duplicates")


@pytest.fixture(scope="module")
def search(tmp_path_factory):
    "A retriever over codes with planted twins; the first sensor has not seen patches 4 and 5."
    from rsir_nb.methods.hashing import HashHeads
    home = tmp_path_factory.mktemp("twins")
    cfg = tiny_config(home/"run")
    archive = build_archive(cfg.data)
    method = build_method(cfg, archive)
    method.heads = HashHeads({m: method.embed_dim for m in archive.sensors}, n_bits=16)
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 256, (48, 2), dtype=np.uint8)
    codes[[7, 20, 33]] = codes[2]                         # four equal ones
    codes[40] = codes[9] ^ np.array([1, 0], np.uint8)     # one bit
    codes[41] = codes[40] ^ np.array([0, 8], np.uint8)    # and one more: a chain
    codes[5] = codes[6]
    present = dict(s1=np.ones(48, bool), s2=np.ones(48, bool))
    present["s1"][[4, 5]] = False
    store = CodeStore.write(home/"codes", dict(s1=codes, s2=codes[::-1]), archive.table, method.weights_hash, present=present)
    return Retriever.build(method, store, home/"search")


def brute(search, sensor, radius, keep=lambda i: True):
    codes, seen = np.asarray(search.store.codes[sensor]), search.store.present(sensor)
    d = np.bitwise_count(codes[:, None] ^ codes[None]).sum(-1)
    return {(i, j): int(d[i, j]) for i in range(48) for j in range(i + 1, 48)
            if d[i, j] <= radius and seen[i] and seen[j] and keep(i) and keep(j)}


def as_dict(search, pairs):
    rows = search.ask.rows
    return {(rows[a], rows[b]): d for a, b, d in zip(pairs["id_a"], pairs["id_b"], pairs["distance"], strict=True)}


@pytest.mark.parametrize("radius", [0, 1, 2, 3])
@pytest.mark.parametrize("sensor", ["s1", "s2"])
def test_every_pair(search, sensor, radius):
    pairs = search.duplicates(sensor, radius, every=True)
    assert as_dict(search, pairs) == brute(search, sensor, radius) and list(pairs) == ["group", "id_a", "id_b", "distance"]


def test_equal_ones_are_listed_beside_the_first(search):
    pairs = as_dict(search, search.duplicates("s1"))
    assert {(2, 7): 0, (2, 20): 0, (2, 33): 0}.items() <= pairs.items() and (7, 20) not in pairs
    assert (5, 6) not in pairs                            # the sensor has not seen one of them


def test_groups_are_chains(search):
    pairs = search.duplicates("s1", 1)
    group = pairs.set_index("id_a")["group"]
    assert group["tiny_009"] == group["tiny_040"] == "tiny_009"
    assert (9, 41) not in as_dict(search, pairs) and {(9, 40), (40, 41)} <= set(as_dict(search, pairs))


def test_filters_and_mistakes(search):
    kind = search.table["split"] == "train"
    pairs = search.duplicates("s1", 2, every=True, where="split == 'train'")
    assert as_dict(search, pairs) == brute(search, "s1", 2, lambda i: kind[i])
    assert search.duplicates(radius=1).equals(search.duplicates("s1", 1))
    assert len(search.duplicates("s1", where="place == 'nowhere'")) == 0
    with pytest.raises(UnknownNameError, match="s1"): search.duplicates("s3")
    with pytest.raises(InputError, match="bits"): search.duplicates("s1", radius=-1)
    with pytest.raises(UnknownNameError, match="where"): search.duplicates("s1", wheer="x")


def test_the_page(search, tmp_path):
    from rsir_nb.engine.duplicates import duplicate_rows, told_duplicates, write_duplicates
    pairs = search.duplicates("s1", 1)
    picture = lambda name, sensor: np.full((8, 8, 3), .5)
    page = write_duplicates(search, pairs, tmp_path/"d.html", picture, "s1").read_text()
    assert page.count("<section") == pairs["id_a"].nunique() and page.count("<img") == len(pairs) + pairs["id_a"].nunique()
    assert page.index("tiny_002") < page.index("tiny_009") and "not relevant" in page      # largest group first
    short, = duplicate_rows(search, pairs, picture, "s1", n=1, twins=2)
    assert short.count("<img") == 3 and "the first 2 of 3" in short
    assert "The first 1 of" in write_duplicates(search, pairs, tmp_path/"s.html", picture, "s1", n=1).read_text()
    split = search.table.set_index("id")["split"]
    across = sum(split[a] != split[b] for a, b in zip(pairs["id_a"], pairs["id_b"], strict=True))
    assert f"across two splits: {across}" in told_duplicates(search, pairs)
    assert told_duplicates(search, pairs.iloc[:0]) == "0 pairs of 0 patches in 0 groups"


def test_the_verb(tmp_path, capsys):
    import sys

    from engine_run import HERE
    sys.path.insert(0, str(HERE))
    run = tmp_path/"run"
    line = f"index baseline plugins=[tiny_plugin] data=tiny_pairs method=band_cca hash.n_bits=16 hash.min_steps=20 out={run}"
    assert main(line.split()) == 0 and main(["hash", str(run)]) == 0 and main(["index", str(run)]) == 0
    capsys.readouterr()
    call = ["duplicates", str(run), "--sensor", "s2", "--radius", "2", "--csv", str(tmp_path/"d.csv"), "--html", str(tmp_path/"d.html")]
    assert main(call) == 0
    out = capsys.readouterr().out
    from rsir_nb.engine.retriever import open_search
    pairs = open_search(run).duplicates("s2", 2)
    assert len(pairs) and f"{len(pairs):,} pair" in out and (tmp_path/"d.csv").read_text().count("\n") == len(pairs) + 1
    assert (tmp_path/"d.html").read_text().count("<img") > 1
    assert main(["duplicates", str(run), "--radius", "99"]) in (0, 2) and main(["duplicates", str(run), "--sensor", "s7"]) == 2
