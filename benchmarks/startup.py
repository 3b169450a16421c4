"""What people wait for before anything happens: whole processes of `rsir`, and a query in an open session.

    python benchmarks/startup.py [RUN]     # an indexed run; runs/demo by default (`rsir demo` makes it)

Each process is started `--repeat` times after one that warms the disk. The median of the wall-clock seconds
is printed, and its ratio to a Python that imports torch and nothing else, measured in the same run.
"""
import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TARGETS = {"rsir --help": 0.6, "rsir list": 0.6, "rsir query --help": 0.6, "import HammingIndex": 1,
           "rsir query RUN ID": 2, "rsir query RUN FILE": 5}
RSIR = [sys.executable, "-c", "import sys; from rsir_nb.cli import main; sys.exit(main())"]
HAMMING = [sys.executable, "-c", "from rsir_nb.retrieval.hamming import HammingIndex"]


def seconds(command, repeat):
    "Median wall-clock seconds of a process."
    taken = []
    for _ in range(repeat + 1):
        start = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True)
        taken.append(time.perf_counter() - start)
    return statistics.median(taken[1:])


def write_patch(run, folder):
    "The first optical patch of a run's archive as a GeoTIFF whose bands have names."
    import numpy as np
    import rasterio
    from rsir_nb.config import load_run_config
    from rsir_nb.engine.parts import build_archive
    archive = build_archive(load_run_config(run).data)
    x, path = archive[0]["s2"].numpy(), Path(folder)/"patch.tif"
    size = dict(count=len(x), height=x.shape[1], width=x.shape[2])
    with rasterio.open(path, "w", driver="GTiff", dtype="uint16", **size) as f:
        f.write(np.clip(x.round(), 0, 65535).astype("uint16"))
        f.descriptions = tuple(archive.sensors["s2"].bands)
    return path


def in_session(run, repeat):
    "Milliseconds: opening a search and answering once, and a query by id (median, 95th percentile)."
    import numpy as np
    from rsir_nb.engine.retriever import open_search
    open_search(run).query(open_search(run).store.ids[0])
    start = time.perf_counter()
    search = open_search(run)
    search.query(search.store.ids[0])
    opened, taken = time.perf_counter() - start, []
    for name in search.store.ids[:repeat]:
        start = time.perf_counter()
        search.query(name)
        taken.append(time.perf_counter() - start)
    return opened*1e3, *(float(o)*1e3 for o in np.percentile(taken, (50, 95)))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", nargs="?", default="runs/demo")
    parser.add_argument("--repeat", type=int, default=5)
    args = parser.parse_args()
    from rsir_nb.engine.retriever import open_search
    name = open_search(args.run).store.ids[0]
    base = seconds([sys.executable, "-c", "import torch"], args.repeat)
    print(f"{'command':<22} {'seconds':>8} {'target':>8} {'of `import torch`':>18}")
    print(f"{'import torch':<22} {base:8.2f} {'':>8} {1:18.2f}")
    with tempfile.TemporaryDirectory() as folder:
        file = str(write_patch(args.run, folder))
        commands = [[*RSIR, "--help"], [*RSIR, "list"], [*RSIR, "query", "--help"], HAMMING,
                    [*RSIR, "query", args.run, name], [*RSIR, "query", args.run, file]]
        for (what, target), command in zip(TARGETS.items(), commands, strict=True):
            s = seconds(command, args.repeat)
            print(f"{what:<22} {s:8.2f} {target:8.1f} {s/base:18.2f}")
    opened, median, late = in_session(args.run, 200)
    print(f"open a search and answer once: {opened:.0f} ms")
    print(f"query by id: median {median:.2f} ms, 95th percentile {late:.2f} ms")


if __name__ == "__main__":
    main()
