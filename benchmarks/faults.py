"""Claim: no fault goes by in silence. Bits flip, processes are killed, disks fill up, readers meet writers.

A small run is made, with every stage, and an index that goes on living. Each try works on a copy, in a
process of its own, and ends as

    same       the result is the right one
    told       an error of the package names what is wrong
    foreign    an error that is not the package's own, or a process that crashed
    silent     a result that differs from the right one, without any message

    python benchmarks/faults.py               # 400 flips, 500 kills, disk full, 60 s of readers and writers
    python benchmarks/faults.py --flips 40 --kills 50 --seconds 10

Prints a table and ends with status 1 after any silent fault or foreign error. Disk full needs the right to
mount a small tmpfs and is left out without it.
"""

import argparse
import hashlib
import logging
import multiprocessing
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np

SMALL = [
    "data=synthetic",
    "data.n_places=12",
    "data.patches_per_place=4",
    "data.img_size=30",
    "method=csmae",
    "method.patch_size=15",
    "method.embed_dim=16",
    "method.num_heads=2",
    "method.specific_depth=1",
    "method.shared_depth=1",
    "method.decoder_embed_dim=16",
    "method.decoder_depth=1",
    "method.decoder_num_heads=2",
    "optim.epochs=3",
    "optim.warmup_epochs=1",
    "trainer.batch_size=8",
    "trainer.pictures=0",
    "hash.n_bits=16",
    "hash.epochs=4",
    "hash.min_steps=12",
    "evaluate.drawings=20",
    "encode.shard_size=8",
    "encode.batch_size=8",
]


def config(run):
    from rsir_nb.config import load_config

    return load_config("base", [*SMALL, f"out={run}"])


def digest(*values):
    "What stands for a result; equal for equal results."
    return hashlib.sha256(
        pickle.dumps([o.to_csv() if hasattr(o, "to_csv") else o for o in values])
    ).hexdigest()[:16]


# -- stages: each makes one part of a run, and is given again after a kill ---


def convert(run):
    from rsir_nb.data.store import write_store
    from rsir_nb.engine.parts import build_archive

    write_store(build_archive(config(run).data), run / "patches.store", size=30, progress=False)


def pretrain(run):
    from rsir_nb.engine import train

    train.pretrain(config(run), progress=False)


def hash_heads(run, **changes):
    from rsir_nb.engine.hash import train_hash

    train_hash(run, progress=False, **changes)


def encode(run):
    from rsir_nb.engine.encode import encode_run

    encode_run(run, progress=False)


def index(run, **changes):
    from rsir_nb.engine.stages import index_run

    index_run(run, progress=False, **changes)


def index_anew(run):
    index(run, overwrite=True)


def evaluate(run):
    from rsir_nb.engine import evaluate as stage

    stage.evaluate(run, progress=False)


def live(run):
    "Steps that depend on nothing but the next free id, so that a killed one is finished by the next call."
    from rsir_nb.core import MissingFileError
    from rsir_nb.live.index import LiveIndex

    try:
        LiveIndex.open(run / "live")
    except MissingFileError:
        LiveIndex.create(run / "live", 64)
    with LiveIndex.write(run / "live") as ix:
        while ix.info()["next"] < 600:
            n = ix.info()["next"]
            codes = np.random.default_rng(n).integers(0, 256, (60, 8), dtype=np.uint8)
            with ix.group():
                ix.add(codes)
                ix.remove(np.arange(n, n + 60, 7))


STAGES = dict(
    convert=convert,
    pretrain=pretrain,
    hash=hash_heads,
    encode=encode,
    index=index,
    evaluate=evaluate,
    live=live,
)


# -- uses: what a reader makes of a part ---


def answers(run, **options):
    from rsir_nb.engine.retriever import open_search

    search = open_search(run)
    return digest(
        *(
            search.query(o, "s1", t, k=9, **options).table()
            for o in search.store.ids[::7]
            for t in ("s1", "s2")
        )
    )


def rescored(run):
    return answers(run, rescore=3)


def by_image(run):
    from rsir_nb.engine.retriever import open_search

    search = open_search(run)
    x = np.random.default_rng(0).normal(1500, 300, (10, 30, 30)).clip(1).astype(np.float32)
    return digest(search.query(x, "s2", "s1", k=9).table())


def codes(run):
    from rsir_nb.retrieval.codes import CodeStore

    store = CodeStore.open(run / "codes")
    return digest(
        store.table,
        *(np.array(store.codes[m]) for m in store.modalities),
        *(np.array(store.embeddings[m]) for m in store.modalities),
    )


def indexed_again(run):
    shutil.rmtree(run / "search")
    index(run)
    return answers(run)


def hashed_again(run):
    (run / "hash" / "finished.json").unlink()
    hash_heads(run)
    return method(run)


def method(run):
    from rsir_nb.engine.parts import load_method

    return load_method(run).weights_hash


def whole_method(run):
    from rsir_nb.engine.parts import load_method

    state = load_method(run).state_dict()
    return digest({k: v.numpy() for k, v in state.items()})


def scores(run):
    from rsir_nb.engine.evaluation import load_evaluation

    found = load_evaluation(next((run / "evaluation").glob("[a-z]*")))
    return digest(found.table.drop(columns=[]), found.margins, found.queries)


def scored_again(run):
    shutil.rmtree(run / "evaluation")
    evaluate(run)
    return scores(run)


def settings(run):
    from rsir_nb.config import load_run_config, to_dict

    return digest(to_dict(load_run_config(run)))


def finished(run):
    from rsir_nb.checksums import read_sealed

    return digest(read_sealed(run / "finished.json"))


def checkpoint(run):
    from rsir_nb.engine.runs import CheckedCheckpoints, last_checkpoint

    found = CheckedCheckpoints().load_checkpoint(last_checkpoint(run / "checkpoints"))
    return digest(
        {k: v.numpy() for k, v in found["state_dict"].items()}, found["epoch"], found["global_step"]
    )


def records(run):
    from rsir_nb.data.store import PatchStore

    store = PatchStore(run / "patches.store")
    return digest(
        store.table.drop(columns="geometry", errors="ignore"), [store.raw(i) for i in range(len(store))]
    )


def live_hits(run):
    from rsir_nb.live.index import LiveIndex

    ix = LiveIndex.open(run / "live")
    return digest(*ix.search(np.arange(64, dtype=np.uint8).reshape(8, 8), 20), np.array(ix.ids))


def live_place(run):
    from rsir_nb.remote.engines import open_index

    ix = open_index(str(run / "live"))
    return digest(*ix.search(np.arange(64, dtype=np.uint8).reshape(8, 8), 20))


FLIPS = [
    ("codes/codes/*.npy", indexed_again),
    ("codes/codes/*.npy", scored_again),
    ("codes/*/*.npy", codes),
    ("codes/table.parquet", codes),
    ("codes/provenance.json", codes),
    ("hash/features/embeddings/*.npy", hashed_again),
    ("hash/features/table.parquet", hashed_again),
    ("search/codes/codes/*.npy", answers),
    ("search/codes/embeddings/*.npy", rescored),
    ("search/codes/table.parquet", answers),
    ("search/codes/provenance.json", answers),
    ("search/retriever.json", answers),
    ("search/index/*", answers),
    ("search/method/*", by_image),
    ("method/*", lambda run: (run / "hash" / "method").rename(run / "hash" / "away") and whole_method(run)),
    ("hash/method/*", whole_method),
    ("checkpoints/*", checkpoint),
    ("config.yaml", settings),
    ("finished.json", finished),
    ("evaluation/*/*", scores),
    ("patches.store/data.mdb", records),
    ("live/segment-*", live_hits),
    ("live/manifest", live_hits),
    ("live/deleted-*", live_hits),
    ("live/segment-*", live_place),
]


# -- tries ---


def tried(call, *args, limit=240):
    "What `call` returns in a process of its own, as (state, value)."
    context = multiprocessing.get_context("fork")
    there, here = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(here, call, args))
    process.start()
    here.close()
    found = there.recv() if there.poll(limit) else None
    if found is None and process.is_alive():
        process.kill()
    process.join()
    return found or ("foreign", f"the process ended with {process.exitcode}")


def _child(pipe, call, args):
    from rsir_nb.core import RsirError

    if not os.environ.get("RSIR_FAULTS_SHOW"):
        logging.disable(logging.CRITICAL)
    try:
        found = "value", call(*args)
    except RsirError as e:
        found = "told", str(e)
    except BaseException as e:
        found = (
            "foreign",
            f"{type(e).__name__}: {e}\n" + "".join(traceback.format_exc().splitlines(True)[-3:-1]),
        )
    try:
        pipe.send(found)
    except EOFError:
        found = None
    except BrokenPipeError:
        found = None
    os._exit(0)


def judged(found, right):
    state, value = found
    return state if state != "value" else "same" if value == right else "silent"


class Table:
    "Counts of states by what was tried, and the first texts of what went wrong."

    def __init__(self):
        self.counts, self.texts = defaultdict(Counter), {}

    def add(self, what, state, text=""):
        self.counts[what][state] += 1
        if state in ("silent", "foreign"):
            self.texts.setdefault((what, state), text)

    def show(self):
        states = "same", "told", "foreign", "silent"
        print("\n| fault | tries | " + " | ".join(states) + " |\n|---|--:|" + "--:|" * len(states))
        for what, counts in self.counts.items():
            print(f"| {what} | {sum(counts.values())} | " + " | ".join(str(counts[o]) for o in states) + " |")
        for (what, state), text in self.texts.items():
            print(f"\n{what}, {state}: {text}")
        return sum(o["silent"] + o["foreign"] for o in self.counts.values())


def copied(base, folder):
    "A copy that shares nothing with the base; hard links within it stay links."
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run(["cp", "-a", str(base), str(folder)], check=True)
    return folder


def flip(path, rng):
    raw = bytearray(path.read_bytes())
    raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
    with open(path, "r+b") as f:
        f.write(raw)


def flips(base, work, n, rng, table, only):
    "One bit of one file, in turn over all kinds."
    right = {}
    for i in range(n):
        pattern, use = FLIPS[i % len(FLIPS)]
        name = f"flip {pattern}: {use.__name__ if use.__name__ != '<lambda>' else 'method'}"
        if only and only not in name:
            continue
        if name not in right:
            right[name] = tried(use, copied(base, work / "run"))
            if right[name][0] != "value":
                print(f"{name}: cannot be used undamaged: {right[name]}")
        run = copied(base, work / "run")
        files = [
            o for o in sorted(run.glob(pattern)) if o.is_file() and o.suffix != ".png" and o.stat().st_size
        ]
        if not files:
            continue
        path = rng.choice(files)
        flip(path, rng)
        found = tried(use, run)
        table.add(name, judged(found, right[name][1]), f"{path.name}: {found[1]}")


def kills(base, before, work, n, rng, table, only):
    "A stage is killed at a random moment, and given again."
    checks = dict(
        convert=records,
        pretrain=method,
        hash=method,
        encode=codes,
        index=answers,
        evaluate=scores,
        live=live_hits,
    )
    stages = [(o, STAGES[o], before[o], checks[o], None) for o in STAGES]
    stages += [
        ("index --overwrite", index_anew, base, answers, answers),
        ("index after hash", index, before["anew"], answers, answers),
    ]
    stages = [o for o in stages if not only or only in f"kill {o[0]}"]
    expected = {}
    for i in range(n if stages else 0):
        name, stage, start, check, meanwhile = stages[i % len(stages)]
        if name not in expected:
            run, begin = copied(start, work / "run"), time.time()
            tried(stage, run)
            expected[name] = (
                time.time() - begin,
                tried(check, run),
                meanwhile and tried(meanwhile, copied(start, work / "run")),
            )
        seconds, right, old = expected[name]
        run = copied(start, work / "run")
        pid = os.fork()
        if not pid:
            logging.disable(logging.CRITICAL)
            os.setpgid(0, 0)
            try:
                stage(run)
            finally:
                os._exit(0)
        time.sleep(rng.uniform(0, seconds))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        if meanwhile:  # the search of before answers at any moment, or the new one
            found = tried(meanwhile, run)
            state = judged(found, old[1] if found[1] != right[1] else right[1])
            table.add(f"search after kill {name}", "offline" if state == "told" else state, found[1])
            if state == "told":
                table.add(f"search after kill {name}", "foreign", f"offline: {found[1]}")
        again = tried(stage, run)
        if again[0] != "value":
            table.add(f"kill {name}", "foreign", f"given again: {again[1]}")
        else:
            found = tried(check, run)
            table.add(f"kill {name}", judged(found, right[1]), found[1])
        left = [o for o in run.rglob(".*") if o.name.endswith((".part", ".old"))]
        if left:
            table.add(f"orphans after kill {name}", "foreign", f"{left[:3]}")


def full(base, before, work, table):
    "Every stage on a disk with little room: an error that names the disk, and then more room."
    home = work / "disk"
    home.mkdir(exist_ok=True)
    checks = dict(
        convert=records,
        pretrain=method,
        hash=method,
        encode=codes,
        index=answers,
        evaluate=scores,
        live=live_hits,
    )
    for name, stage in STAGES.items():
        right = None
        for room in 4, 20, 60, 150, 400:
            used = sum(o.stat().st_size for o in before[name].rglob("*") if o.is_file())
            size = f"size={-(-used // 1024) + 160 + room}k"
            if subprocess.run(
                ["mount", "-t", "tmpfs", "-o", size, "tmpfs", str(home)], capture_output=True
            ).returncode:
                return print("disk full: left out, nothing can be mounted here")
            try:
                run = home / "run"
                if subprocess.run(["cp", "-a", str(before[name]), str(run)], capture_output=True).returncode:
                    continue
                found = tried(stage, run)
                if found[0] == "told" and not any(o in found[1] for o in ("space left", "room on the disk")):
                    found = "foreign", f"does not name the disk: {found[1]}"
                if found[0] == "told" or (found[0] == "foreign" and "No space" not in found[1]):
                    table.add(f"disk full {name}", found[0], found[1])
                elif found[0] == "foreign":
                    table.add(f"disk full {name}", "told", found[1])
                if found[0] != "value":
                    subprocess.run(["mount", "-o", "remount,size=200m", str(home)], check=True)
                    again = tried(stage, run)
                    if again[0] != "value":
                        table.add(f"room again {name}", "foreign", again[1])
                    else:
                        right = (
                            right
                            or (
                                tried(stage, copied(before[name], work / "run")),
                                tried(checks[name], work / "run"),
                            )[1]
                        )
                        table.add(f"room again {name}", judged(tried(checks[name], run), right[1]))
            finally:
                subprocess.run(["umount", "-l", str(home)], check=True)


def together(base, work, seconds, table):
    "Readers that open anew, readers that stay open, and two writers that make the index again."
    run = copied(base, work / "run")
    right, context = tried(answers, run)[1], multiprocessing.get_context("fork")
    results, end = context.Queue(), time.time() + seconds
    jobs = [
        context.Process(target=_meet, args=(results, end, job, run))
        for job in ("opens anew", "stays open", "opens anew", "writes", "writes")
    ]
    for o in jobs:
        o.start()
    while any(o.is_alive() for o in jobs) or not results.empty():
        try:
            job, found = results.get(timeout=1)
        except Exception:
            continue
        state = judged(found, right if job != "writes" else None)
        if job != "writes" and state == "told":
            state, found = "foreign", ("", f"a reader was refused: {found[1]}")
        if job == "writes" and state == "told" and "is being written to" not in found[1]:
            state = "foreign"
        table.add(f"together, {job}", state, found[1])


def _meet(results, end, job, run):
    from rsir_nb.core import RsirError
    from rsir_nb.engine.retriever import open_search

    logging.disable(logging.CRITICAL)
    search = open_search(run)
    ids = search.store.ids if job == "stays open" else None
    while time.time() < end:
        try:
            if job == "writes":
                found = "value", index_anew(run)
            elif job == "opens anew":
                found = "value", answers(run)
            else:
                found = (
                    "value",
                    digest(*(search.query(o, "s1", t, k=9).table() for o in ids[::7] for t in ("s1", "s2"))),
                )
        except RsirError as e:
            found = "told", str(e)
        except BaseException as e:
            found = "foreign", f"{type(e).__name__}: {e}"
        results.put((job, found))
        time.sleep(0.02)
    if job == "stays open":  # what was never used so far is still that of the old folder
        x = np.random.default_rng(0).normal(1500, 300, (10, 30, 30)).clip(1).astype(np.float32)
        try:
            search.query(x, "s2", "s1", k=9, by="embeddings")
        except BaseException as e:
            results.put((job, ("foreign", f"{type(e).__name__}: {e}")))
    results.close()
    results.join_thread()
    os._exit(0)


def made(work):
    "The base: every stage, with a copy of what each stage began from."
    run, before = work / "base" / "run", {}
    run.mkdir(parents=True)
    for name, stage in STAGES.items():
        before[name] = copied(run, work / "base" / f"before_{name}")
        found = tried(stage, run)
        if found[0] != "value":
            sys.exit(f"{name}: {found[1]}")
    anew = copied(run, work / "base" / "before_anew")
    found = tried(lambda: hash_heads(anew, overwrite=True, epochs=5))
    if found[0] != "value":
        sys.exit(f"hash anew: {found[1]}")
    return run, dict(before, anew=anew)


def main():
    keep_lines = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=keep_lines)
    parser.add_argument("--flips", type=int, default=400)
    parser.add_argument("--kills", type=int, default=500)
    parser.add_argument(
        "--seconds", type=float, default=60, help="of readers and writers together; 0 for none"
    )
    parser.add_argument("--no-disk", action="store_true", help="leave disk full out")
    parser.add_argument("--only", default="", help="only faults whose name holds this, e.g. 'codes/table'")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    import rsir_nb.engine.stages  # noqa: F401 -- loaded once, for all processes

    rng, table, start = random.Random(args.seed), Table(), time.time()
    with tempfile.TemporaryDirectory(dir=os.environ.get("RSIR_FAULTS_DIR")) as d:
        work = Path(d)
        base, before = made(work)
        print(f"the run is made, {time.time() - start:.0f} s", flush=True)
        for what, call in dict(
            flips=lambda: flips(base, work, args.flips, rng, table, args.only),
            kills=lambda: kills(base, before, work, args.kills, rng, table, args.only),
            disk=lambda: None if args.no_disk else full(base, before, work, table),
            together=lambda: args.seconds and together(base, work, args.seconds, table),
        ).items():
            call()
            print(f"{what}: {time.time() - start:.0f} s", flush=True)
    bad = table.show()
    print(f"\n{bad} silent or foreign, {time.time() - start:.0f} s")
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
