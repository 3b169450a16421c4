"Scores by groups of queries: against pandas, for classes, and what is refused."
import numpy as np
import pytest
from engine_run import tiny_config

from rsir_nb.cli import main
from rsir_nb.core import InputError, MissingFileError, UnknownNameError
from rsir_nb.engine.domains import run_scores_by, scores_by
from rsir_nb.engine.evaluate import evaluate
from rsir_nb.engine.parts import build_archive
from rsir_nb.engine.protocols import PROTOCOLS
from rsir_nb.engine.train import pretrain


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    run = pretrain(tiny_config(tmp_path_factory.mktemp("domains")/"run", "optim.epochs=1", "evaluate.baselines=[random]", "evaluate.drawings=50"), progress=False)
    evaluate(run, progress=False)
    return run


@pytest.fixture(scope="module")
def found(run): return evaluate(run, progress=False)


def test_means_are_those_of_pandas(run, found):
    ids = found.queries["id"].unique()
    groups = {o: f"group {i % 3}" for i, o in enumerate(sorted(ids))}
    table = scores_by(found, groups, "map@10", 50)
    wanted = found.queries.assign(group=found.queries["id"].map(groups)).groupby(["system", "kind", "direction", "group"], observed=True)["map@10"].mean()
    for o in table[table.group.str.startswith("group")].itertuples():
        assert o.value == pytest.approx(wanted[o.system, o.kind, o.direction, o.group], abs=1e-6) and o.ci_low <= o.value <= o.ci_high
    for key, some in table.groupby(["system", "kind", "direction"]):
        part, rows = some.set_index("group")["value"], found.queries[(found.queries[["system", "kind", "direction"]] == list(key)).all(axis=1)]
        assert part["mean of groups"] == pytest.approx(part[[f"group {i}" for i in range(3)]].mean())
        assert part["all queries"] == pytest.approx(rows["map@10"].mean(), abs=1e-6)
        assert some.set_index("group").n_queries["all queries"] == len(rows)


def test_mmp_at_5_by_class(run, found):
    archive = build_archive(tiny_config(run).data)
    labels = dict(zip(archive.ids, archive.table["labels"], strict=True))
    with pytest.raises(UnknownNameError, match="m5_mmp@10"): scores_by(found, labels)
    table = scores_by(found, labels, "mmp@10", 50)
    one = table[(table.kind == "float") & (table.direction == "s1->s2")].set_index("group")
    rows = found.queries[(found.queries.kind == "float") & (found.queries.direction == "s1->s2")]
    mine = rows[[("lake" in labels[o]) for o in rows["id"]]]
    assert one.value["lake"] == pytest.approx(mine["m5_mmp@10"].mean(), abs=1e-6) and one.n_queries["lake"] == len(mine)
    assert one.n_queries.drop(["all queries", "mean of groups"]).sum() > one.n_queries["all queries"]     # some have two labels


def test_a_run_by_a_column_and_the_command(run, capsys):
    table = run_scores_by(run, "place")
    assert set(table.group) >= {"all queries", "mean of groups"} and np.isfinite(table.value).all()
    assert main(["evaluate", str(run), "--by", "place"]) == 0
    assert "By place:" in (said := capsys.readouterr().out) and "mean of groups" in said
    assert main(["evaluate", str(run), "--by", "plaice"]) == 2
    assert "did you mean place" in capsys.readouterr().err


def test_what_is_refused(run, found):
    with pytest.raises(InputError, match="are in no group"): scores_by(found, {}, "map@10")
    with pytest.raises(MissingFileError, match="no scores by unifex.*rsir evaluate"): run_scores_by(run, "place", protocol="unifex")


def test_the_published_protocol():
    o = PROTOCOLS["unifex"]
    assert (o.query, o.archive, o.ks, o.leave_out) == ("query", "index", (5,), False)
