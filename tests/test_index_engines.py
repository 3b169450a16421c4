"A run's codes searched in a file, by tables, in a database and on a cluster: the same answers, from the same config."
import shutil

import numpy as np
import pytest

from engine_run import tiny_config
from engines import nodes, postgres  # noqa: F401
from rsir_nb.cli import main
from rsir_nb.core import CorruptError, InputError, UnknownNameError, read_json
from rsir_nb.engine.hash import train_hash
from rsir_nb.engine.retriever import IndexConfig, Retriever, open_search
from rsir_nb.engine.stages import index_run
from rsir_nb.engine.train import pretrain


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    "A trained and indexed run."
    cfg = tiny_config(tmp_path_factory.mktemp("engines")/"run", "optim.epochs=1")
    pretrain(cfg, progress=False)
    train_hash(cfg.out, progress=False)
    index_run(cfg.out, progress=False)
    return cfg.out


def answers(found, ids):
    "What a retriever says in every direction, also with a filter."
    rows = np.arange(0, len(found), 3)
    asked = [(s, t, w) for s in ("s1", "s2") for t in ("s1", "s2") for w in (None, rows)]
    return [(o.ids, o.dists.tolist()) for i in ids for s, t, w in asked
            for o in [found.query(i, s, t, k=7, where=w)]]


def test_tables(run):
    plain = open_search(run)
    assert main(["index", str(run), "index.engine=multi"]) == 0
    found = open_search(run)
    assert type(found.indexes["s1"]).__name__ == "MultiIndex"
    ids = plain.store.ids[:4]
    assert answers(found, ids) == answers(plain, ids)


def test_a_database(run, postgres, tmp_path):  # noqa: F811
    plain = open_search(run)
    found = Retriever.build(plain.method, plain.store, tmp_path/"r", engine=postgres.dsn)
    ids = plain.store.ids[:3]
    assert answers(found, ids) == answers(plain, ids)
    again = Retriever.load(tmp_path/"r")
    assert answers(again, ids[:1]) == answers(plain, ids[:1])
    assert again.within(ids[0], 3, source="s1").ids == plain.within(ids[0], 3, source="s1").ids
    again.indexes["s2"].remove([0])
    with pytest.raises(CorruptError, match="codes of s2"): Retriever.load(tmp_path/"r")


def test_a_cluster(run, nodes, tmp_path):  # noqa: F811
    plain = open_search(run)
    found = Retriever.build(plain.method, plain.store, tmp_path/"r", engine=f"ray:{tmp_path}/shards")
    ids = plain.store.ids[:2]
    assert answers(found, ids) == answers(plain, ids)
    assert answers(Retriever.load(tmp_path/"r"), ids[:1]) == answers(plain, ids[:1])


def test_an_engine_of_an_outsider(run, tmp_path):
    "Named in a config by its address, kept by it, and opened again."
    from toy_server import ToyIndex, served
    plain = open_search(run)
    assert main(["index", str(run), "index.engine=toy://archive"]) == 0
    again = open_search(run)
    assert {type(o) for o in again.indexes.values()} == {ToyIndex} and len(served) == 2
    assert all(o.startswith("toy://archive/rsir_") for o in served)
    assert answers(again, plain.store.ids[:3]) == answers(plain, plain.store.ids[:3])
    assert main(["index", str(run), "index.engine=hamming"]) == 0


def test_other_weights_have_a_place_of_their_own(run, tmp_path):
    "At one address: codes made anew do not meet those from before, whose ids are the same."
    from toy_server import served
    copy = shutil.copytree(run, tmp_path/"run")
    assert main(["index", str(copy), "index.engine=toy://shared"]) == 0
    before = {o for o in served if o.startswith("toy://shared/")}
    train_hash(copy, overwrite=True, progress=False, epochs=2, lr=0.05)
    assert main(["index", str(copy), "index.engine=toy://shared"]) == 0
    found = open_search(copy)
    plain = Retriever.build(found.method, found.store, tmp_path/"plain")
    assert answers(found, plain.store.ids[:3]) == answers(plain, plain.store.ids[:3])
    assert len({o for o in served if o.startswith("toy://shared/")} - before) == 2


@pytest.mark.parametrize("address, kept", [
    ("postgresql://me:secret@host/db", "postgresql://me@host/db"),
    ("postgresql://host/db?user=me&password=secret", "postgresql://host/db?user=me"),
    ("postgresql://host/db?password=secret&user=me", "postgresql://host/db?user=me"),
    ("postgresql://host/db?password=secret", "postgresql://host/db")])
def test_a_password_is_used_and_not_kept(run, tmp_path, monkeypatch, address, kept):
    "The whole address opens the index, also right after it is made; the folder keeps the rest of it."
    from rsir_nb.engine import retriever
    plain, asked = open_search(run), []
    def opened(where, *more, **kw):
        asked.append(where)
        return type("Full", (), dict(__len__=lambda self: len(plain), n_bits=plain.store.n_bits))()
    monkeypatch.setattr(retriever, "open_index", opened)
    monkeypatch.setattr(retriever, "fill_index", lambda index, *args: index)
    Retriever.build(plain.method, plain.store, tmp_path/"r", engine=address)
    assert len(asked) == 4 and all("secret" in o for o in asked)
    assert read_json(tmp_path/"r"/"retriever.json")["engine"].rstrip("?") == kept
    Retriever.load(tmp_path/"r")
    assert "secret" not in asked[-1]
    Retriever.load(tmp_path/"r", engine=address)
    assert "secret" in asked[-1]
    with pytest.raises(InputError, match="searched elsewhere") as e:
        Retriever.load(tmp_path/"r", engine="postgresql://me:secret@other/db")
    assert "secret" not in str(e.value)


def test_a_server_that_does_not_answer_changes_nothing(run, capsys):
    before = answers(open_search(run), open_search(run).store.ids[:2])
    assert main(["index", str(run), "index.engine=postgresql://me:secret@127.0.0.1:1/x"]) == 2
    told = capsys.readouterr().err
    assert "does not answer" in told and "secret" not in told
    assert answers(open_search(run), open_search(run).store.ids[:2]) == before


def test_engines_that_do_not_exist(run, capsys):
    with pytest.raises(UnknownNameError, match="engine of an index"): IndexConfig("faiss")
    assert main(["index", str(run), "index.engine=hamming2"]) == 2
    assert "hamming" in capsys.readouterr().err
