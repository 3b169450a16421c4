"""Claim: an index that is written to, killed and searched at once loses nothing and answers nothing wrong.

Two processes. The writer adds, deletes and compacts without pause, and is killed (SIGKILL) at random
moments, in the middle of whatever it is doing; the next one goes on from what it finds. The reader follows
it: it refreshes or opens anew, searches with and without filters, and compares every answer, distances and
ids in their order, with a search by brute force over the codes that the generation at hand must hold.

How it knows what those are: nothing is drawn from a state that could be lost. The code of an id is a hash
of the id, and what is done next is a function of the next free id, which the manifest keeps: step s first
adds some rows, then deletes some, perhaps both in one commit. So whoever knows that the next id is s knows
all that was ever done, but for whether the deletions of the last step are in already, and then it must be
exactly the one or the other. The writer tells, in shared memory, how far each commit that returned has
brought it: after a kill the index may be further, never less far.

    python benchmarks/soak.py --minutes 10
"""
import argparse
import multiprocessing
import os
import platform
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
from rsir_nb.core import BusyError
from rsir_nb.retrieval.codes import hamming_distances
from rsir_nb.live.index import LiveIndex

N_BITS = 128


def hashed(ids):
    "The code of every id, (n, 16) uint8; few of its bits vary, so that there are ties."
    x = np.asarray(ids, dtype=np.uint64)[:, None] + np.arange(2, dtype=np.uint64)
    x = x * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    return np.ascontiguousarray((x ^ (x >> np.uint64(27))) & np.uint64(0x0F0F0F0F0F0F0F0F)).view(np.uint8)


class Truth:
    "The ids in their order when the next free id is `following`: `added`, and after deletions `left`."
    def __init__(self, seed, largest):
        self.seed, self.largest, self.following = seed, largest, 0
        self.added = self.left = np.empty(0, dtype=np.int64)

    def step(self):
        "The next step: how many rows, which deletions, whether as one commit, whether then to compact."
        rng = np.random.default_rng([self.seed, self.following])
        n = int(rng.choice([1, 10, 300, 3000], p=[.3, .4, .2, .1]))
        ids = np.concatenate([self.left, np.arange(self.following, self.following + n)])
        part = rng.choice([0, .001, .05, .7], p=[.4, .3, .25, .05]) if len(ids) < self.largest else .5
        gone = ids[rng.random(len(ids)) < part]
        return n, gone, rng.random() < .3, rng.random() < .05

    def advance(self, following):
        while self.following < following:
            n, gone, _, _ = self.step()
            self.added = np.concatenate([self.left, np.arange(self.following, self.following + n)])
            self.left = self.added[~np.isin(self.added, gone)]
            self.following += n
        if self.following != following: raise AssertionError(f"no step ends at {following}")

    def of(self, ix):
        "The ids that `ix` must hold; it may be between addition and deletion of its last step."
        self.advance(ix.info()["next"])
        return self.added if len(ix) == len(self.added) else self.left


def progress(truth, deleted):
    "One number that rises with every commit: the next id, and whether the deletions of the last step are in."
    return 2*truth.following + (deleted or len(truth.added) == len(truth.left))


def write(path, seed, largest, told):
    "Go on until killed; `told` gets the progress after each commit that returned."
    truth = Truth(seed, largest)
    with LiveIndex.write(path) as ix:
        truth.of(ix)
        if len(ix) != len(truth.left): ix.remove(np.setdiff1d(truth.added, truth.left))     # killed before it
        told.value = progress(truth, True)
        while True:
            n, gone, together, compact = truth.step()
            new = hashed(np.arange(truth.following, truth.following + n))
            if together:
                with ix.group():
                    ix.add(new)
                    ix.remove(gone)
            else:
                ix.add(new)
                told.value = 2*(truth.following + n)
                ix.remove(gone)
            truth.advance(truth.following + n)
            told.value = progress(truth, True)
            if compact: ix.compact()


def same(what, found, wanted):
    for name, a, b in zip(("distances", "ids"), found, wanted, strict=True):
        if not np.array_equal(a, b): raise AssertionError(f"{what}: other {name} than by brute force")


class Reader:
    "Searches and compares; `count` keeps the books."
    def __init__(self, path, seed, largest):
        self.path, self.truth, self.count = path, Truth(seed, largest), Counter()
        self.rng, self.generation = np.random.default_rng(seed), -1
        self.take(LiveIndex.open(path, threads=1))

    def take(self, ix):
        "Work with the newest generation, and compare all that it holds."
        if ix.generation < self.generation: raise AssertionError("an older state came back")
        self.count["generations"] += ix.generation > self.generation
        self.ix, self.generation, self.ids = ix, ix.generation, self.truth.of(ix)
        self.codes = hashed(self.ids)
        if not np.array_equal(ix.ids, self.ids): raise AssertionError("other ids than were committed")
        if not np.array_equal(ix.codes, self.codes): raise AssertionError("other codes than were committed")

    def follow(self):
        "Mostly refresh, now and then open anew, sometimes with all checksums."
        anew, verify = self.rng.random(2) < (.3, .2)
        if anew: self.take(LiveIndex.open(self.path, threads=1, verify=verify))
        elif self.ix.refresh(): self.take(self.ix)

    def search(self):
        "One comparison: nearest or within a radius, with or without a filter."
        xq = hashed(self.rng.integers(0, self.truth.following + 1000, 4))
        mask = self.rng.random(len(self.ids)) < self.rng.choice([.001, .1, .9])
        where, rows = [(None, np.arange(len(self.ids))), (mask, np.flatnonzero(mask)),
                       (self.rng.permutation(self.ids[mask]), np.flatnonzero(mask))][self.rng.integers(3)]
        d = hamming_distances(xq, self.codes[rows]) if len(rows) else np.empty((4, 0), np.int32)
        order = np.argsort(d, axis=1, kind="stable")
        if self.rng.random() < .7:
            k = int(self.rng.choice([1, 10, 500, 10**6]))
            order = order[:, :k]
            wanted = np.take_along_axis(d, order, 1), self.ids[rows][order]
            same("search", self.ix.search(xq, k, where), wanted)
            self.count["searches"] += 1
        else:
            radius = int(self.rng.integers(10, 24))
            lims, dists, ids = self.ix.range_search(xq, radius, where)
            for q in range(4):
                near = d[q][order[q]] <= radius
                same("range search", (dists[lims[q]:lims[q + 1]], ids[lims[q]:lims[q + 1]]),
                     (d[q][order[q]][near], self.ids[rows][order[q]][near]))
            self.count["range searches"] += 1

    def refuse(self):
        "While there is a writer there is no second."
        try: LiveIndex.write(self.path).close()
        except BusyError: self.count["second writers refused"] += 1
        else: raise AssertionError("two writers at once")


def soak(reader, args):
    context, writer = multiprocessing.get_context("fork"), None
    told = context.RawValue("q", 0)     # one machine word: no kill leaves half of it
    rng, end = np.random.default_rng(args.seed + 1), time.monotonic() + 60*args.minutes
    try:
        while time.monotonic() < end:
            writer = context.Process(target=write, args=(reader.path, args.seed, args.largest, told))
            writer.start()
            death = time.monotonic() + rng.uniform(0, 2*args.between)
            while time.monotonic() < death:
                reader.follow()
                reader.search()
                if not writer.is_alive(): raise AssertionError("the writer ended by itself")
            if (reader.path/".lock").read_text() == str(writer.pid): reader.refuse()
            os.kill(writer.pid, signal.SIGKILL)
            writer.join()
            reader.count["kills"] += 1
            reader.take(LiveIndex.open(reader.path, threads=1, verify=True))
            reached = progress(reader.truth, len(reader.ix) == len(reader.truth.left))
            if reached < told.value: raise AssertionError(f"committed {told.value}, found {reached}")
            reader.count["states verified after a kill"] += 1
    finally:
        if writer is not None and writer.is_alive():
            os.kill(writer.pid, signal.SIGKILL)
            writer.join()


def main():
    keep_lines = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=keep_lines)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--largest", type=int, default=20_000, help="items from which on half are deleted")
    parser.add_argument("--between", type=float, default=1., help="mean seconds from one kill to the next")
    parser.add_argument("--folder", help="where to make the index; by default where temporary files go")
    args = parser.parse_args()
    start, error = time.monotonic(), ""
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        LiveIndex.create(Path(folder)/"soak.live", n_bits=N_BITS)
        reader = Reader(Path(folder)/"soak.live", args.seed, args.largest)
        try: soak(reader, args)
        except Exception as e: error = f"{type(e).__name__}: {e}"
    ix, count = reader.ix, reader.count
    print(f"{time.monotonic() - start:.0f} s on {os.cpu_count()} cores, Python {platform.python_version()}")
    print(f"{ix.generation:,} generations written, {count['generations']:,} of them read, "
          f"{count['kills']:,} kills")
    print(f"{reader.truth.following:,} items added in all, {len(ix):,} left, "
          f"{len(ix.info()['segments'])} segments, {ix.info()['bytes']:,} bytes")
    print(*(f"{count[key]:,} {key}" for key in ("searches", "range searches", "second writers refused",
                                                "states verified after a kill")), sep=", ")
    print(f"errors: {1 if error else 0}{' (' + error + ')' if error else ''}")
    return bool(error)


if __name__ == "__main__":
    sys.exit(main())
