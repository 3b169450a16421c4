"The pages that rsir writes, by day and by night, on a desk and on a telephone: what axe-core finds wrong, and what sticks out."
import shutil

import pandas as pd
import pytest

from engine_run import tiny_config

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
axe_core = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe-core is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium on this machine")
PAGES = "report", "hits", "hits_without_pictures", "bench", "gallery", "duplicates", "why", "atlas"
LONG = "S2B_MSIL2A_20171003T112235_N9999_R118_T34TCR_0"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    "A trained run with hash heads."
    from rsir_nb.engine.hash import train_hash
    from rsir_nb.engine.train import pretrain
    cfg = tiny_config(tmp_path_factory.mktemp("pages")/"run", "optim.epochs=2", "trainer.pictures=1")
    pretrain(cfg, progress=False)
    train_hash(cfg.out, progress=False, n_bits=24)
    return cfg


@pytest.fixture(scope="module")
def pages(run, tmp_path_factory):
    "A folder with every kind of page; ids are as long as those of real patches."
    from rsir_nb.engine.bench import bench_page
    from rsir_nb.engine.duplicates import write_duplicates
    from rsir_nb.engine.report import write_gallery, write_report
    from rsir_nb.engine.retriever import open_search
    from rsir_nb.engine.stages import archive_picture, index_run
    from rsir_nb.engine.parts import build_archive
    from rsir_nb.engine.why import explain
    from rsir_nb.gallery.atlas import atlas
    folder, archive = tmp_path_factory.mktemp("html"), build_archive(run.data)
    shutil.copy(write_report(run.out, progress=False), folder/"report.html")
    search = index_run(run.out, progress=False)
    hits = search.query(archive.ids[5], source="s1", target="s2", k=6)
    hits.to_html(folder/"hits.html", picture=archive_picture(archive))
    hits.to_html(folder/"hits_without_pictures.html")
    rows = [dict(method=m, vectors=v, bytes=b, direction=d, mAP=0.5, **{"F1 (M1)": 0.3 + 0.01*i, "P@10": 0.4})
            for i, m in enumerate(("csmae", "cmmae")) for v, b in (("16 floats", 64), ("32 bits", 4))
            for d in ("s1->s1", "s1->s2")]
    (folder/"bench.html").write_text(bench_page(pd.DataFrame(rows), run))
    write_gallery(run.out, n=3, path=folder/"gallery.html")
    pairs = search.duplicates("s2", radius=3)
    assert len(pairs), "no near-duplicates to draw"
    write_duplicates(search, pairs, folder/"duplicates.html", archive_picture(archive), "s2", n=5)
    explain(open_search(run.out, archive), archive.ids[5], hits.ids[0], "s1", "s2").to_html(folder/"why.html")
    atlas(run.out, folder/"atlas.html", archive)
    for path in folder.glob("*.html"): path.write_text(path.read_text().replace("tiny_0", LONG))
    return folder


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def tab(browser):
    page = browser.new_page(viewport=dict(width=1280, height=900))
    yield page
    page.close()


def look(tab, least=20):
    "What axe-core finds wrong: rule -> the first piece of HTML; the rules that were kept; where it cannot judge contrast."
    found = axe_core.Axe().run(tab).response
    kept = {o["id"] for o in found["passes"]}
    assert len(kept) > least, "axe-core looked at nothing"
    doubts = [n["html"] for o in found["incomplete"] if o["id"] == "color-contrast" for n in o["nodes"]]
    return {o["id"]: f"{o['impact']}: {o['nodes'][0]['html'][:200]}" for o in found["violations"]}, kept, doubts


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", PAGES)
def test_nothing_stands_in_the_way(pages, tab, name, scheme):
    tab.emulate_media(color_scheme=scheme)
    tab.goto((pages/f"{name}.html").as_uri())
    ground = tab.evaluate("getComputedStyle(document.body).backgroundColor")
    assert ground == dict(light="rgb(255, 255, 255)", dark="rgb(18, 22, 27)")[scheme]
    faults, kept, doubts = look(tab)
    assert faults == {}
    assert all('aria-hidden="true"' in o for o in doubts), doubts   # the signs, whose words stand beside them
    assert {"color-contrast", "document-title", "html-has-lang", "page-has-heading-one", "region"} <= kept
    assert ("image-alt" in kept) == (name not in ("bench", "hits_without_pictures"))


@pytest.mark.parametrize("name", PAGES)
def test_nothing_is_wider_than_a_telephone(pages, tab, name):
    "Only tables may be, and those scroll by themselves and by the keyboard; their captions stay in sight."
    tab.set_viewport_size(dict(width=390, height=800))
    tab.goto((pages/f"{name}.html").as_uri())
    assert tab.evaluate("document.documentElement.scrollWidth") <= 390
    outside = """[...document.querySelectorAll('main *, header *, footer *')].filter(o => !o.closest('.rsir-wide table')
        && o.getBoundingClientRect().right > 390).map(o => o.outerHTML.slice(0, 100))"""
    assert tab.evaluate(outside) == []
    captions = "[...document.querySelectorAll('caption span')].map(o => o.getBoundingClientRect().right)"
    assert all(o <= 390 for o in tab.evaluate(captions))
    for box in tab.locator(".rsir-wide").all(): assert box.get_attribute("tabindex") == "0"
    assert look(tab)[0] == {}


def test_a_wide_table_scrolls_by_the_keyboard(pages, tab):
    tab.set_viewport_size(dict(width=390, height=800))
    tab.goto((pages/"hits.html").as_uri())
    box = tab.locator(".rsir-wide")
    assert box.evaluate("o => o.scrollWidth > o.clientWidth"), "the table of long names is wider than a telephone"
    box.focus()
    for _ in range(200):
        tab.keyboard.press("ArrowRight")
        if box.evaluate("o => o.scrollLeft > 20"): return
        tab.wait_for_timeout(50)
    pytest.fail("the arrow key does not move the table")


def test_headers_do_not_run_together(pages, tab):
    "Between the words of two neighbouring headers there is room for two letters."
    tab.goto((pages/"hits.html").as_uri())
    gaps = tab.evaluate("""() => {
        const words = [...document.querySelectorAll('thead th')].map(o => {
            const range = document.createRange(); range.selectNodeContents(o); return range.getBoundingClientRect() })
        return words.slice(1).map((o, i) => o.left - words[i].right) }""")
    assert len(gaps) >= 3 and min(gaps) >= 16, gaps


@pytest.mark.parametrize("rule, plant", [
    ("image-alt", "document.querySelector('main img').removeAttribute('alt')"),
    ("color-contrast", "document.querySelector('main td').style.color = 'var(--line)'"),
    ("html-has-lang", "document.documentElement.removeAttribute('lang')"),
    ("heading-order", "document.querySelector('main').insertAdjacentHTML('afterbegin', '<h5>too deep</h5>')"),
    ("landmark-unique", "document.querySelectorAll('.rsir-wide').forEach(o => o.setAttribute('aria-label', 'x'))"),
    ("scrollable-region-focusable", """document.querySelectorAll('.rsir-wide').forEach(o => {
        o.removeAttribute('tabindex'); o.style.width = '90px' })"""),
])
def test_a_planted_fault_is_found(pages, tab, rule, plant):
    tab.goto((pages/"report.html").as_uri())
    tab.evaluate(f"() => {{ {plant} }}")
    assert rule in look(tab)[0]


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_words_are_legible_on_the_shade_of_a_table(theme):
    "The shade at the edge of a table that scrolls, whose contrast axe-core cannot judge."
    from rsir_nb.style import THEMES, contrast_ratio
    colours = THEMES[theme]
    for ink in "ink", "quiet": assert contrast_ratio(colours[ink], colours["line"]) >= 4.5
