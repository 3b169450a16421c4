"""Claim: all metrics of four directions to depth 1000 are had 50 times as fast as by a loop over queries.

A store of two sensors is made up: label sets as skewed as those of real archives, and codes that know
something of them, so that no score is trivial. The evaluation runs through the public call, `evaluate_store`,
and its time is split into compiling, search, judging and intervals. The loop judges the same
rankings of a sample of the queries, one query after the other, each metric by its definition with NumPy over
the ranks; its time is scaled up to all queries, and every score of the sample is compared.

    python benchmarks/evaluate.py      # 120,000 queries over 120,000 patches, 128 bits, depth 1000
    python benchmarks/evaluate.py --queries 20000 --items 20000 --threads 1
"""
import argparse
import os
import platform
import resource
import tempfile
import time
from collections import defaultdict


def parse():
    keep_lines = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=keep_lines)
    parser.add_argument("--queries", type=int, default=120_000)
    parser.add_argument("--items", type=int, default=120_000)
    parser.add_argument("--labels", type=int, default=19, help="classes")
    parser.add_argument("--bits", type=int, default=128, help="bits of a code")
    parser.add_argument("--depth", type=int, default=1000)
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count()))
    parser.add_argument("--places", type=int, default=0, help="drawn together; by default none")
    parser.add_argument("--drawings", type=int, default=1000, help="of the bootstrap")
    parser.add_argument("--memory", type=int, default=256, help="MiB for rankings")
    parser.add_argument("--sample", type=int, default=500, help="queries that the loop judges")
    return parser.parse_args()


def make_store(folder, args):
    "Label sets drawn with a long tail, and codes of two sensors that see them through noise."
    import numpy as np
    import pandas as pd
    from rsir_nb.retrieval.codes import CodeStore
    rng, n = np.random.default_rng(0), args.queries + args.items
    often = np.linspace(0.6, 2, args.labels)**2
    sets = np.zeros((4000, args.labels), dtype=np.uint8)
    for row in sets:
        size = 1 + rng.poisson(1.9) % args.labels
        row[rng.choice(args.labels, size, replace=False, p=often/often.sum())] = 1
    weights = 1/np.arange(1, 4001)**0.9
    labels = sets[rng.choice(4000, n, p=weights/weights.sum())]
    mixing, codes = rng.normal(size=(args.labels, args.bits)).astype(np.float32), {}
    for sensor, noise in dict(s1=5., s2=4.).items():
        rows = [labels[i:i+20_000] @ mixing + noise*rng.normal(size=(len(labels[i:i+20_000]), args.bits))
                for i in range(0, n, 20_000)]
        codes[sensor] = np.concatenate([np.packbits(x > 0, axis=1, bitorder="little") for x in rows])
    names = np.array([f"class {i}" for i in range(args.labels)])
    table = pd.DataFrame(dict(id=[f"patch {i}" for i in range(n)]))
    table["labels"] = [names[x > 0].tolist() for x in labels]
    table["split"] = np.repeat(["val", "test"], [args.queries, args.items])
    if args.places: table["place"] = [f"place {i}" for i in rng.integers(0, args.places, n)]
    return CodeStore.write(folder, codes, table, "made up", provenance=dict(classes=names.tolist()))


def clocked(owner, name, spent, what):
    "Add the seconds of every call of `owner.name` to `spent[what]`."
    call = getattr(owner, name)
    def wrapper(*args, **kwargs):
        start = time.perf_counter()
        try: return call(*args, **kwargs)
        finally: spent[what] += time.perf_counter() - start
    setattr(owner, name, wrapper)


def loop(ids, query_labels, item_labels, ks):
    "All metrics of some queries at the depths `ks`, query by query: metric -> (Q,len(ks))."
    import numpy as np
    ratio = lambda a, b: a/b if b else 0.
    found, numbers, ranks = defaultdict(list), item_labels.astype(np.float32), np.arange(1, ids.shape[1] + 1)
    discounts = 1/np.log2(1 + ranks)
    for ranked, wanted in zip(ids, query_labels, strict=True):
        items = item_labels[ranked]
        shared, sizes = (items & wanted).sum(1, dtype=np.int64), items.sum(1, dtype=np.int64)
        everywhere = (numbers @ wanted.astype(np.float32)).astype(np.int64)
        size, in_best_order, often = int(wanted.sum()), -np.sort(-shared), np.bincount(everywhere)
        best = np.repeat(np.arange(len(often))[::-1], often[::-1])[:len(ranked)]
        rel, n_relevant, subset = shared > 0, int((everywhere > 0).sum()), (shared > 0) & (shared == sizes)
        scores = defaultdict(list)
        for k in ks:
            r, s, z, inside = rel[:k], shared[:k], sizes[:k], subset[:k]
            p_at, dcg = np.cumsum(r)/ranks[:k], lambda x, k=k: ((2.**x[:k] - 1)*discounts[:k]).sum()
            p, recall, ap, possible = r.mean(), ratio(r.sum(), n_relevant), (p_at*r).sum(), min(k, n_relevant)
            part = np.divide(s, z, out=np.zeros(k), where=z > 0)
            pair = dict(precision=part, recall=s/size, f1=2*s/(size + z))
            at = dict(precision=p, recall=recall, pr_f1=ratio(2*p*recall, p + recall),
                      map=ratio(ap, possible), hit=r.any(),
                      m2_wap=ratio((np.cumsum(s)/ranks[:k]**2*r).sum(), r.sum()),
                      map_found=ratio(ap, r.sum()), ndcg=ratio(dcg(shared), dcg(best)),
                      ndcg_retrieved=ratio(dcg(shared), dcg(in_best_order)), acg=s.mean(),
                      wap=ratio((np.cumsum(s)/ranks[:k]*r).sum(), r.sum()),
                      m1_precision=pair["precision"].mean(), m1_recall=pair["recall"].mean(),
                      m1_pairwise_f1=pair["f1"].mean(), m2_precision_at_rank=pair["precision"][-1],
                      m2_recall_at_rank=pair["recall"][-1], m2_f1_at_rank=pair["f1"][-1],
                      m3_label_coverage=(items[:k].any(0) & (wanted > 0)).sum()/size,
                      m3_r_precision=inside.mean(), m3_map=(np.cumsum(inside)/ranks[:k]*inside).sum()/k,
                      m5_mmp=ratio(r[:possible].sum(), possible))
            for name, x in at.items(): scores[name].append(x)
        for name, x in scores.items(): found[name].append(x)
    return {name: np.array(x) for name, x in found.items()}


def judge_sample(store, args, ours):
    "Seconds a query of the loop, and by metric the largest difference to `ours`: direction -> Result."
    import numpy as np
    from rsir_nb.engine.protocols import Ranker, System, directions, store_labels
    labels, system, seconds, apart = store_labels(store), System("", store, "binary"), [], defaultdict(float)
    for d in directions(store, "csmae", labels):
        rows = np.unique(np.linspace(0, len(d.queries) - 1, max(1, args.sample//4)).astype(int))
        _, ids = Ranker(system, d, args.depth)(rows)
        start = time.perf_counter()
        theirs = loop(ids, labels[d.queries[rows]], labels[d.items], ours[d.name].ks)
        seconds.append((time.perf_counter() - start)/len(rows))
        mine = ours[d.name].scores
        for name, x in theirs.items(): apart[name] = max(apart[name], np.abs(x - mine[name][rows]).max())
        missing = set(mine) - set(theirs)
        if missing: raise SystemExit(f"the loop lacks {missing}")
    return float(np.mean(seconds)), dict(apart)


def compile_first(n_bits):
    "Seconds until everything is compiled: one small call of each."
    import numpy as np
    from rsir_nb.retrieval.hamming import HammingIndex
    from rsir_nb.metrics.intervals import bootstrap_ci
    from rsir_nb.metrics.judging import Judge, LabelSets
    start, codes, sets = time.perf_counter(), np.zeros((3, n_bits//8), np.uint8), LabelSets(np.eye(3))
    index = HammingIndex(n_bits, scan="compiled")
    index.add(codes)
    Judge(sets, sets, [1], 3)(index.search(codes, 3)[1])
    bootstrap_ci(np.arange(3.), n=2)
    return time.perf_counter() - start


def main():
    args = parse()
    for name in "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS": os.environ[name] = str(args.threads)
    import numpy as np
    from rsir_nb.engine import evaluate as page
    from rsir_nb.engine import protocols, scoring
    peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/1024
    print(f"{platform.machine()}, {os.cpu_count()} cores, {args.threads} threads, "
          f"Python {platform.python_version()}, numpy {np.__version__}")
    with tempfile.TemporaryDirectory() as folder:
        store = make_store(f"{folder}/codes", args)
        sets = len(np.unique(np.packbits(protocols.store_labels(store), axis=1), axis=0))
        print(f"{args.queries:,} queries, {args.items:,} patches, {args.labels} classes in {sets:,} label "
              f"sets, {args.bits} bits, depth {args.depth:,}")
        spent, kept, before = defaultdict(float), {}, peak()
        clocked(protocols.Ranker, "__init__", spent, "search")
        clocked(protocols.Ranker, "__call__", spent, "search")
        clocked(page, "make_index", spent, "search")
        clocked(scoring.Scorer, "__init__", spent, "judging")
        clocked(scoring.Scorer, "__call__", spent, "judging")
        clocked(page, "tabulate", spent, "intervals")
        clocked(page, "compare", spent, "intervals")
        start, spent["compiling"] = time.perf_counter(), compile_first(args.bits)
        found = page.evaluate_store(store, "csmae", drawings=args.drawings, depth=args.depth,
                                    memory_mb=args.memory, progress=True)
        total, memory = time.perf_counter() - start, peak()
        spent["labels, directions, tables"] = total - sum(spent.values())
        print(f"\nevaluate_store: {total:.1f} s; peak memory {memory:,.0f} MiB, before it {before:,.0f}")
        for what, seconds in spent.items(): print(f"  {what}: {seconds:.1f} s")
        start = time.perf_counter()
        found.save(f"{folder}/evaluation")
        size = os.path.getsize(f"{folder}/evaluation/queries.parquet")/2**20
        print(f"  saving, not counted: {time.perf_counter() - start:.1f} s, of single queries {size:.0f} MiB")
        judging, compiling = spent["judging"], spent["compiling"]
        system = protocols.System("", store, "binary")
        labels = scoring.LabelSets(protocols.store_labels(store))
        for d in protocols.directions(store, "csmae"):
            kept[d.name] = scoring.score_direction(system, d, (10,), args.depth, labels=labels)
            mean = found.table.query("direction == @d.name and metric == 'map'")["value"].iloc[-1]
            if not np.isclose(mean, np.nanmean(kept[d.name].scores["map"][:, -1])):
                raise SystemExit(f"the table has another mean for {d.name}")
        a_query, apart = judge_sample(store, args, kept)
        whole = a_query*4*args.queries
        print(f"\nloop over queries: {a_query*1e3:.2f} ms a query, {whole:,.0f} s for all: "
              f"{whole/judging:.0f} times as long; {whole/(judging + compiling):.0f} times, with compiling\n")
        print("| metric | largest difference |\n|---|---|")
        for name, x in apart.items(): print(f"| {name} | {x:.1e} |")
        print(found.pivot("map").round(4).to_string())
        if max(apart.values()) > 1e-9: raise SystemExit("the scores differ")


if __name__ == "__main__":
    main()
