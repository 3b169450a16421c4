"Nothing wrong goes by in silence, and nobody is disturbed: checksums, folders that are switched in one step, locks."
import json
import logging
import os
import shutil
import struct
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from engine_run import tiny_config

from rsir_nb.checksums import CheckedFile, check_sealed_text, file_checksum, is_sealed, read_sealed, seal_text, write_sealed
from rsir_nb.cli import main
from rsir_nb.config import load_run_config
from rsir_nb.core import (BusyError, CorruptError, FullDiskError, InputError, RsirError, atomic_path,
                          write_json)
from rsir_nb.locks import folder_lock, sweep_parts
from rsir_nb.engine.encode import encode_run
from rsir_nb.engine.hash import train_hash
from rsir_nb.engine.retriever import open_search
from rsir_nb.engine.stages import index_run
from rsir_nb.engine.train import pretrain
from rsir_nb.engine.verify import check_files, seal_files
from rsir_nb.methods.base import Method
from rsir_nb.retrieval.codes import CodeStore


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    "A run with every stage but its evaluation."
    cfg = tiny_config(tmp_path_factory.mktemp("trust")/"run")
    pretrain(cfg, progress=False)
    train_hash(cfg.out, progress=False)
    index_run(cfg.out, progress=False)
    return Path(cfg.out)


@pytest.fixture
def run(base, tmp_path):
    "A copy that may be damaged."
    return Path(shutil.copytree(base, tmp_path/"run"))


def flip(path, at=-1):
    raw = bytearray(path.read_bytes())
    raw[at] ^= 1
    path.write_bytes(raw)


def answers(search):
    some = search.store.ids[::9]
    return [search.query(o, "s1", t, k=9).table()[["id", "rank"]].values.tolist() for o in some for t in ("s1", "s2")]


USES = {
    "codes/codes/s1.npy": lambda run: (shutil.rmtree(run/"search"), index_run(run, progress=False)),
    "codes/embeddings/s2.npy": lambda run: index_run(run, progress=False, overwrite=False).query("tiny_003", "s1", rescore=2),
    "hash/features/embeddings/s1.npy": lambda run: ((run/"hash"/"finished.json").unlink(), train_hash(run, progress=False)),
    "search/codes/codes/s1.npy": lambda run: open_search(run).query("tiny_003", "s1"),
    "search/codes/embeddings/s1.npy": lambda run: open_search(run).query("tiny_003", "s1", rescore=2),
    "search/codes/table.parquet": lambda run: open_search(run).query("tiny_003", "s1"),
    "search/index/s1.index": lambda run: open_search(run),
    "search/retriever.json": lambda run: open_search(run),
    "search/method/model.safetensors": lambda run: open_search(run).method,
    "hash/method/method.json": lambda run: Method.load(run/"hash"/"method"),
    "config.yaml": lambda run: load_run_config(run),
    "finished.json": lambda run: read_sealed(run/"finished.json"),
}


@pytest.mark.parametrize("name", USES)
@pytest.mark.parametrize("at", [40, -70])
def test_a_flipped_bit_is_told(run, name, at):
    # what `codes` and `search/codes` share is one file: a flip must not reach the store that heals the other
    path = run/name
    path.write_bytes(path.read_bytes())
    flip(path, at)
    with pytest.raises(RsirError) as e:
        USES[name](run)
        if name == "codes/embeddings/s2.npy": CodeStore.open(run/"codes").embeddings["s2"]
    assert name.split("/")[-1] in str(e.value) or "damaged" in str(e.value)
    found = check_files(run)
    assert found.loc[found.file == name, "state"].item() not in ("as written", "no checksum")
    assert main(["verify", str(run)]) == 2


def test_a_good_run_is_verified(base, capsys):
    assert main(["verify", str(base)]) == 0
    assert "0 damaged or missing" in capsys.readouterr().out
    states = check_files(base).set_index("file").state
    computed_from = [o for o in states.index if not o.endswith((".csv", ".png", ".html", "views.json"))]
    assert set(states[computed_from]) == {"as written"}, states[states != "as written"]


def test_a_damaged_search_is_made_again_from_good_codes(run, caplog):
    before = answers(open_search(run))
    (run/"search"/"codes"/"table.parquet").unlink()
    with pytest.raises(CorruptError, match="rsir index"): open_search(run)
    with caplog.at_level(logging.WARNING): index_run(run, progress=False)
    assert "made again" in caplog.text and answers(open_search(run)) == before


def test_the_check_is_remembered_for_large_files_until_they_change(tmp_path, monkeypatch):
    import rsir_nb.checksums as checksums
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path/"cache"))
    monkeypatch.setattr(checksums, "REMEMBERED", 10)
    path = tmp_path/"codes.npy"
    path.write_bytes(bytes(100))
    wanted = file_checksum(path)
    CheckedFile(path, wanted).bytes()
    with monkeypatch.context() as m:
        m.setattr(checksums.xxhash, "xxh3_128_hexdigest", lambda x: pytest.fail("it was read again"))
        CheckedFile(path, wanted).bytes()
    flip(path)
    os.utime(path, ns=(1, 1))
    with pytest.raises(CorruptError, match="damaged"): CheckedFile(path, wanted).bytes()


def test_a_run_of_an_earlier_version_opens_with_one_message(run, caplog, monkeypatch):
    import rsir_nb.checksums as checksums
    monkeypatch.setattr(checksums, "_told", [])
    right = answers(open_search(run))
    for path in run.rglob("*.json"):
        found = json.loads(path.read_text())
        if not isinstance(found, dict) or path.name == "provenance.json": continue
        for key in "sealed", "files": found.pop(key, None)
        write_json(path, found)
    text = (run/"config.yaml").read_text()
    (run/"config.yaml").write_text(text.partition("\n")[2])
    with caplog.at_level(logging.WARNING): assert answers(open_search(run)) == right
    told = [o for o in caplog.messages if "checksum" in o]
    assert len(told) == 1 and "--seal" in told[0]
    assert "no checksum" in set(check_files(run).state)
    assert {"config.yaml", "search/retriever.json", "hash/method/method.json"} <= set(seal_files(run)) and not seal_files(run)
    flip(run/"search"/"method"/"model.safetensors")
    with pytest.raises(CorruptError): assert open_search(run).method is None


def test_a_changed_config_is_accepted_by_sealing(run):
    path = run/"config.yaml"
    path.write_text(path.read_text().replace("seed: 0", "seed: 5"))
    with pytest.raises(CorruptError, match="--seal"): load_run_config(run)
    assert main(["verify", str(run), "--seal"]) == 0 and load_run_config(run).seed == 5


# -- readers and writers

def test_an_open_search_stays_as_it_was_while_all_of_it_is_made_again(run):
    image = np.random.default_rng(0).normal(1500, 300, (10, 30, 30)).clip(1).astype(np.float32)
    right, hits = answers(open_search(run)), open_search(run).query(image, "s2", k=9).ids
    old, weights = open_search(run), open_search(run).store.weights_hash
    train_hash(run, progress=False, overwrite=True, lr=0.05)
    assert answers(open_search(run)) == right       # new heads, the old search answers
    fresh = index_run(run, progress=False)
    assert fresh.store.weights_hash != weights == old.store.weights_hash
    assert answers(old) == right and old.query(image, "s2", k=9).ids == hits and old.method.weights_hash == weights
    assert answers(open_search(run)) == answers(fresh) != right


def test_the_second_writer_touches_nothing(run):
    def state(): return {str(o): o.stat().st_mtime_ns for o in run.rglob("*") if o.is_file() and ".lock" not in o.name}
    before = state()
    with folder_lock(run, ".index.lock"), pytest.raises(BusyError): index_run(run, progress=False, overwrite=True)
    with folder_lock(run, ".codes.lock"), pytest.raises(BusyError): encode_run(run, progress=False, overwrite=True)
    with folder_lock(run, ".search.lock"), pytest.raises(BusyError): index_run(run, progress=False, overwrite=True)
    with folder_lock(run/"hash"), pytest.raises(BusyError): train_hash(run, progress=False, overwrite=True, epochs=9)
    changed = {o for o, when in state().items() if before.get(o) != when}
    assert not changed - {o for o in changed if "/codes/" in o}, changed     # the third had the lock of the codes


def test_orphans_are_swept_by_the_next_writer(run):
    orphans = [run/".codes.4711.part"/"codes"/"s1.npy", run/"hash"/".features.4711.part", run/".search.4711.part"/"a",
               run/"search"/".method.4711.part"]
    for o in orphans:
        o.parent.mkdir(exist_ok=True, parents=True)
        o.write_text("half")
    index_run(run, progress=False, overwrite=True)
    train_hash(run, progress=False)
    assert not [o for o in run.rglob("*.part")]


def test_a_folder_that_was_moved_away_comes_back(tmp_path):
    (tmp_path/".search.4711.old").mkdir()
    (tmp_path/".search.4711.old"/"a").write_text("whole")
    sweep_parts(tmp_path/"search")
    assert (tmp_path/"search"/"a").read_text() == "whole"


def test_folders_are_exchanged_without_a_moment_between(tmp_path, monkeypatch):
    from rsir_nb import core
    for exchange in core._exchange, lambda a, b: False:      # with one rename, and where the system has none
        monkeypatch.setattr(core, "_exchange", exchange)
        for text in "old", "new":
            with atomic_path(tmp_path/"folder") as part:
                part.mkdir()
                (part/"a").write_text(text)
        assert (tmp_path/"folder"/"a").read_text() == "new" and [o.name for o in tmp_path.iterdir()] == ["folder"]


def test_a_full_disk_is_named_whatever_noticed_it(tmp_path):
    with pytest.raises(FullDiskError, match="no space left"), atomic_path(tmp_path/"a") as part:
        raise RuntimeError("unexpected pos 64 vs 0: No space left on device")
    with pytest.raises(RuntimeError, match="another"), atomic_path(tmp_path/"a") as part:
        part.write_text("half")
        raise RuntimeError("another")
    assert not list(tmp_path.iterdir())


# -- hostile and plausible

def test_names_that_leave_the_folder_or_cannot_be_written(tmp_path):
    codes, table = np.zeros((2, 2), np.uint8), pd.DataFrame(dict(id=["a", "b"]))
    for name in "../../x", "/x", ".x", "a\0b":
        with pytest.raises(InputError, match="name of a modality"): CodeStore.write(tmp_path/"c", {name: codes}, table, "a")
    for ids in ["a", ""], ["a", "\0"], ["a", "\ud800"], ["a", None], ["a", float("nan")], ["a", 1]:
        table = pd.DataFrame(dict(id=pd.Series(ids, dtype=object)))
        with pytest.raises(InputError, match="id of a patch"): CodeStore.write(tmp_path/"c", dict(s1=codes), table, "a")
    assert not list(tmp_path.iterdir())


def test_a_description_of_a_huge_network_is_refused(run):
    path = run/"hash"/"method"/"method.json"
    for key in "embed_dim", "shared_depth", "decoder_embed_dim":
        about = read_sealed(path)
        about["arguments"][key] = 2**20
        copy = shutil.copytree(path.parent, run/key)
        write_sealed(copy/"method.json", about)
        with pytest.raises(CorruptError): Method.load(copy)
    for text in "[]", "3", "null", "{}", '{"format": "rsir_nb.method/2"}', '{"format": "rsir_nb.method/2", "method": 3, "arguments": []}':
        path.write_text(text)
        with pytest.raises(RsirError): Method.load(path.parent)


def test_notes_that_are_no_objects(run):
    for text in "[]", "3", '"a"', "[" * 100_000, "\udcff".encode("utf-8", "surrogateescape").decode("latin1"), "{}":
        (run/"search"/"retriever.json").write_text(text)
        with pytest.raises(CorruptError): open_search(run)


def test_a_header_of_40_gib_is_refused_before_memory_is_reserved(tmp_path):
    from rsir_nb.arrays import read_array_file
    head = b"{'descr': '<f8', 'fortran_order': False, 'shape': (5368709120,), }"
    head += b" "*(118 - len(head) - 1) + b"\n"
    raw = b"\x93NUMPY\1\0" + struct.pack("<H", len(head)) + head + bytes(64)
    (tmp_path/"a.npy").write_bytes(raw)
    with zipfile.ZipFile(tmp_path/"a.npz", "w") as f: f.writestr("a.npy", raw)
    for name in "a.npy", "a.npz":
        with pytest.raises(CorruptError, match="5368709120"): read_array_file(tmp_path/name)


def test_a_checkpoint_that_asks_for_code(run):
    import pickle

    from rsir_nb.engine.runs import CheckedCheckpoints, last_checkpoint
    path = last_checkpoint(run/"checkpoints")
    path.write_bytes(pickle.dumps(os.system))
    write_sealed(path.with_suffix(".json"), dict(epoch=2, xxh3=file_checksum(path)))
    with pytest.raises(RsirError, match="no checkpoint"): CheckedCheckpoints().load_checkpoint(path)


@pytest.mark.parametrize("options", [dict(k="3"), dict(k=None), dict(k=2.5), dict(dates=("", None)), dict(dates=5), dict(where=3.5),
                                     dict(where=[[1.5]])])
def test_arguments_of_a_wrong_kind(base, options):
    with pytest.raises(InputError): open_search(base).query("tiny_003", "s1", **options)


def test_cells_are_no_formulas(tmp_path):
    from rsir_nb.geo import write_csv
    write_csv(pd.DataFrame({"=a": ["=1+1", "+1", "-1", "@x", "a=b", None], "n": [-1, 2, 3, 4, 5, 6]}), tmp_path/"a.csv")
    assert pd.read_csv(tmp_path/"a.csv")["'=a"].tolist()[:5] == ["'=1+1", "'+1", "'-1", "'@x", "a=b"]
    assert pd.read_csv(tmp_path/"a.csv")["n"].tolist()[0] == -1


def test_others_may_read_the_weights(run):
    umask = os.umask(0o022)
    try: Method.load(run/"method").save(run/"copy")
    finally: os.umask(umask)
    assert {oct(o.stat().st_mode & 0o777) for o in (run/"copy").iterdir()} == {"0o644"}


def test_every_flipped_bit_of_a_sealed_text_is_told(tmp_path):
    path, raw = tmp_path/"config.yaml", seal_text("seed: 1\nout: runs/a\n").encode()
    for i in range(8*len(raw)):
        path.write_bytes(raw[:i//8] + bytes([raw[i//8] ^ 1 << i%8]) + raw[i//8 + 1:])
        assert is_sealed(path)
        with pytest.raises(CorruptError): check_sealed_text(path, "restore a copy")
