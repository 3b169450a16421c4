"The report: what it says is what was measured; one file, no scripts, a text for every picture."
import re

import pytest

from engine_run import TINY, tiny_config
from rsir_nb.engine.evaluate import evaluate
from rsir_nb.engine.hash import train_hash
from rsir_nb.engine.report import write_report
from rsir_nb.engine.verdict import margins_table, verdict
from rsir_nb.engine.train import pretrain


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    "A trained run with hash heads and pictures."
    cfg = tiny_config(tmp_path_factory.mktemp("report")/"run", "optim.epochs=2", "trainer.pictures=1")
    pretrain(cfg, progress=False)
    train_hash(cfg.out, progress=False, n_bits=24)
    return cfg


@pytest.fixture(scope="module")
def page(run): return write_report(run.out, progress=False).read_text()


def test_everything_is_there(page):
    for words in ("Does it beat the baselines?", "Queries and answers", "Precision at k", "Precision over recall",
                  "All scores", "Training", "a patch that it sees a part of", "How it was made", "24 bits, 3 bytes", "n_bits: 24",
                  "the untrained network", "canonical correlation of band statistics", "chance"):
        assert words in page, words
    for way in "S1 → S1", "S1 → S2", "S2 → S1", "S2 → S2": assert page.count(f"<h3>{way}: tiny_") == 2
    assert page.count("After epoch 1<") == page.count("After epoch 2<") == 1


def test_one_file_that_runs_nothing(page):
    for word in "<script", "http://", "https://", "onload", "url(", "@import": assert word not in page, word
    assert page.startswith("<!DOCTYPE html>") and 'lang="en"' in page and page.count("<main") == page.count("<h1") == 1
    images = re.findall(r"<img[^>]*>", page)
    assert len(images) > 50
    for image in images: assert re.search(r'alt="[^"]{5,}"', image) and 'src="data:image/png;base64,' in image
    levels = [int(o) for o in re.findall(r"<h([1-6])", page)]
    assert all(b - a <= 1 for a, b in zip(levels, levels[1:], strict=False))   # no level of headings is jumped over
    assert len(page) < 5_000_000 and "/tmp/" not in page.replace(str(page), "", 0)[:2000]


def test_it_says_what_was_measured(run, page):
    found = evaluate(run.out, progress=False)
    for value in found.pivot().to_numpy().ravel():
        if value == value: assert f"{value:.3f}" in page
    for line in verdict(found): assert line in page
    table = margins_table(found)
    assert len(table) == len(found.margins) and list(table) == ["direction", "ours", "theirs", "difference", "from", "to"]


def test_the_verdict_is_honest(run):
    found = evaluate(run.out, progress=False)
    found.margins[["difference", "ci_low", "ci_high"]] = [0.2, 0.1, 0.3]
    assert verdict(found)[0] == "Every baseline is beaten in every direction."
    found.margins.loc[found.margins.system == "untrained", "ci_low"] = -0.01
    lines = verdict(found)
    assert lines[0] == "2 of 3 baselines are beaten in every direction."
    assert any(o.startswith("Against the untrained network: not told apart in 4 of 4") for o in lines)
    found.margins[["difference", "ci_low", "ci_high"]] = [-0.2, -0.3, -0.1]
    assert "below in 4 of 4 directions; mean difference in mAP -0.200" in verdict(found)[1]


def test_no_place_of_this_machine(run, page):
    assert str(run.out) not in page


@pytest.mark.parametrize("method", ["csmae", "band_statistics"])
def test_one_sensor_without_splits_and_places(tmp_path, method):
    keys = dict(csmae=[o for o in TINY if o.startswith("method.")] + ["method.norm=null"], band_statistics=[])[method]
    cfg = tiny_config(tmp_path/"run", "data=tiny_rgb", f"method={method}", *keys, "optim.epochs=1",
                      "evaluate.protocol=leave_one_out")
    pretrain(cfg, progress=False)
    if method == "csmae": train_hash(cfg.out, progress=False)
    found = evaluate(cfg.out, progress=False)
    assert set(found.table.direction) == {"rgb->rgb"} and found.table.n_queries.eq(24).all()
    assert found.table.n_places.eq(24).all()   # places are not known: every query stands for itself
    page = write_report(cfg.out, progress=False).read_text()
    assert "RGB → RGB: rgb_" in page and ("16 bits" in page) == (method == "csmae")


@pytest.mark.slow
def test_rendered(run, page, tmp_path):
    playwright = pytest.importorskip("playwright.sync_api")
    import shutil
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if not browser: pytest.skip("no chromium on this machine")
    path = tmp_path/"report.html"
    path.write_text(page.replace(">tiny_0", ">S2B_MSIL2A_20170703T093427_N9999_R055_T29TPE_0"))
    with playwright.sync_playwright() as p:
        b = p.chromium.launch(executable_path=browser, args=["--no-sandbox"])
        for width in (360, 1280):
            tab = b.new_page(viewport=dict(width=width, height=800))
            problems = []
            tab.on("console", lambda o: problems.append(o.text))
            tab.goto(path.as_uri())
            assert tab.evaluate("document.documentElement.scrollWidth") <= width, "the page scrolls sideways"
            assert tab.evaluate("[...document.images].every(o => o.complete && o.naturalWidth > 0)") and not problems
        b.close()
