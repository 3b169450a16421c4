"The gallery in a browser: JupyterLab and voila, mouse and keyboard, and what a screen reader would meet."
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from gallery_page import POINTS, build, write_notebook
from lab import CARDS, CHROMIUM, cards, lab_options, names, open_notebook, server, status, wait_for

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
pytest.importorskip("jupyterlab", reason="jupyterlab is not installed")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium on this machine")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "A folder with the notebook and a retriever that is already made."
    folder = tmp_path_factory.mktemp("lab")
    write_notebook(folder/"gallery.ipynb", more=[POINTS])
    return folder


@pytest.fixture(scope="module")
def retriever(folder): return build(folder)[1]


@pytest.fixture(scope="module")
def shots(root):
    "Where pictures of the states are kept: tests/screenshots, which git ignores."
    path = Path(os.environ.get("RSIR_SCREENSHOTS", root/"tests"/"screenshots"))
    path.mkdir(exist_ok=True, parents=True)
    return path


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def lab(folder, retriever, browser):
    "The notebook, run in JupyterLab, with the gallery on the screen."
    with server("jupyterlab", folder, *lab_options(folder)) as address:
        page = open_notebook(browser, address, "gallery.ipynb", dict(width=1280, height=1600))
        yield page
        page.close()


def test_thumbnails_come(lab, shots):
    chooser = cards(lab, "Patches to choose from")
    assert chooser.count() == 12
    wait_for(lab, lambda: chooser.locator("img").evaluate_all("all => all.every(o => o.naturalWidth > 0)"))
    alts = chooser.locator("img").evaluate_all("all => all.map(o => o.alt)")
    assert all(alts) and len(set(alts)) == 12
    lab.screenshot(path=shots/"gallery_choose.png")


def test_a_click_asks_and_ranks_as_the_api_does(lab, retriever, shots):
    name = names(lab, "Patches to choose from")[3]
    cards(lab, "Patches to choose from").nth(3).click()
    wait_for(lab, lambda: f"for {name}" in status(lab))
    assert names(lab, "Hits") == retriever.query(name, "s1", k=12).ids
    images = cards(lab, "Hits").locator("img")
    wait_for(lab, lambda: images.evaluate_all("all => all.slice(0, 3).every(o => o.naturalWidth > 0)"))
    lab.screenshot(path=shots/"gallery_hits.png")
    hit = names(lab, "Hits")[2]
    cards(lab, "Hits").nth(2).click()
    wait_for(lab, lambda: f"for {hit}" in status(lab))
    assert names(lab, "Hits") == retriever.query(hit, "s1", k=12).ids


def test_the_keyboard_alone_does_the_same(lab, retriever):
    wait_for(lab, lambda: cards(lab, "Patches to choose from").count() == 12)
    cards(lab, "Patches to choose from").first.focus()
    for key in "End", "Home", "ArrowRight", "ArrowRight": lab.keyboard.press(key)
    focused = "document.activeElement.dataset.key.split('/')[1]"
    name = lab.evaluate(focused)
    assert name == names(lab, "Patches to choose from")[2]
    lab.keyboard.press("Enter")
    wait_for(lab, lambda: f"for {name}" in status(lab))
    assert names(lab, "Hits") == retriever.query(name, "s1", k=12).ids
    assert lab.evaluate(focused) == name, "the focus stays where it was"


def test_marks_and_refining_change_the_ranking(lab, retriever, shots):
    before = names(lab, "Hits")
    cards(lab, "Hits").nth(0).focus()
    lab.keyboard.press("g")
    pressed = lab.locator("[aria-label='Hits'] [aria-pressed=true]")
    wait_for(lab, lambda: pressed.count() == 1)
    lab.keyboard.press("ArrowRight")
    lab.keyboard.press("b")
    wait_for(lab, lambda: pressed.count() == 2)
    lab.screenshot(path=shots/"gallery_marks.png")
    lab.get_by_role("button", name="Refine").click()
    wait_for(lab, lambda: "refined" in status(lab))
    query = status(lab).split(" for ")[1].split(",")[0]
    wanted = retriever.feedback(query, [before[0]], [before[1]], k=12, source="s1")
    assert names(lab, "Hits") == wanted.ids != before and before[1] not in wanted.ids
    assert "before" in status(lab) and "after" in status(lab)
    lab.get_by_role("button", name="Back").click()
    wait_for(lab, lambda: names(lab, "Hits") == before)


def test_across_sensors(lab, retriever):
    lab.get_by_label("Search in").select_option("s2")
    wait_for(lab, lambda: "S1 → S2" in status(lab))
    query = status(lab).split(" for ")[1].split(",")[0]
    assert names(lab, "Hits") == retriever.query(query, "s1", "s2", k=12).ids
    lab.get_by_label("Search in").select_option("the same sensor")
    wait_for(lab, lambda: "S1 → S1" in status(lab))


def test_why_a_hit_matches_is_told(lab, shots):
    hit = names(lab, "Hits")[1]
    cards(lab, "Hits").nth(1).focus()
    lab.keyboard.press("w")
    wait_for(lab, lambda: f"Why {hit} matches" in status(lab))
    told = lab.locator(".jupyter-widgets .rsir", has_text="bits are the same").last
    told.scroll_into_view_if_needed()
    assert told.locator("img").evaluate_all("all => all.length > 1 && all.every(o => o.naturalWidth > 0 && o.alt)")
    lab.screenshot(path=shots/"gallery_why.png")


def test_a_box_drawn_on_the_map_filters(lab, retriever, shots):
    query = status(lab).split("Why ")[-1].split(" ")[0] if "Why" in status(lab) else None
    lab.get_by_role("button", name="Map", exact=True).click()
    ground = lab.locator(".leaflet-container")
    ground.wait_for()
    ground.scroll_into_view_if_needed()
    pins = ground.locator(".leaflet-marker-icon[title*=distance]")
    wait_for(lab, lambda: pins.count() == 12)
    assert not lab.locator("img.leaflet-tile").count(), "the map asks nobody for tiles"
    lab.wait_for_timeout(500)
    lab.screenshot(path=shots/"gallery_map.png")
    before = names(lab, "Hits")
    ground.locator(".leaflet-draw-draw-rectangle").click()
    frame, pin = ground.bounding_box(), pins.nth(3).bounding_box()
    x, y = pin["x"] + pin["width"]/2, pin["y"] + pin["height"]/2
    side = min(60, x - frame["x"] - 5, frame["x"] + frame["width"] - x - 5)
    lab.mouse.move(x - side, y - side)
    lab.mouse.down()
    lab.mouse.move(x + side, y + side, steps=5)
    lab.mouse.up()
    field = lab.get_by_label("Box")
    wait_for(lab, lambda: field.input_value().count(",") == 3)
    box = [float(o) for o in field.input_value().split(",")]
    assert box[0] < box[2] and box[1] < box[3]
    wait_for(lab, lambda: names(lab, "Hits") != before)
    asked = names(lab, "Query")[0]
    assert names(lab, "Hits") == retriever.query(asked, "s1", k=12, box=box).ids and query != asked
    field.fill("")
    field.press("Enter")
    wait_for(lab, lambda: names(lab, "Hits") == before)
    lab.get_by_role("button", name="Map", exact=True).click()


def test_a_point_of_the_embedding_map_asks(lab, retriever, shots):
    plot = lab.locator(".rsir-map-plot")
    plot.scroll_into_view_if_needed()
    plot.focus()
    said = lab.locator(".rsir-map-said")
    for key in "ArrowRight", "ArrowDown", "ArrowRight": lab.keyboard.press(key)
    wait_for(lab, lambda: any(o in said.inner_text() for o in retriever.store.ids))
    name = next(o for o in retriever.store.ids if o in said.inner_text())
    picture = lab.locator(".rsir-map-side img")
    wait_for(lab, lambda: picture.evaluate("o => o.naturalWidth > 0 && o.alt.length > 0"))
    lab.screenshot(path=shots/"gallery_points.png")
    lab.keyboard.press("Enter")
    wait_for(lab, lambda: f"for {name}" in status(lab))
    assert names(lab, "Query") == [name]
    lab.get_by_role("button", name="Back").click()
    wait_for(lab, lambda: f"for {name}" not in status(lab))


def test_what_is_wrong_is_said_where_the_user_looks(lab, folder, shots):
    before = names(lab, "Hits")
    upload = folder/"notes.tif"
    upload.write_bytes(b"no image")
    with lab.expect_file_chooser() as chooser: lab.get_by_role("button", name="Upload a GeoTIFF").click()
    chooser.value.set_files(upload)
    wait_for(lab, lambda: "cannot be read as an image" in status(lab))
    assert lab.locator("[aria-label='Hits'] .rsir-error").count() == 1
    lab.screenshot(path=shots/"gallery_error.png")
    field = lab.get_by_label("Where")
    field.fill("nonsense ==")
    field.press("Enter")
    wait_for(lab, lambda: "nonsense" in status(lab))
    field.fill("")
    field.press("Enter")
    wait_for(lab, lambda: not lab.locator("[aria-label='Hits'] .rsir-error").count())
    assert names(lab, "Hits") == before


def test_the_query_stands_beside_its_hits(lab):
    query = status(lab).split(" for ")[1].split(",")[0]
    assert names(lab, "Query") == [query]
    picture = cards(lab, "Query").locator("img")
    assert picture.get_attribute("alt").startswith(f"the query: {query}")
    wait_for(lab, lambda: picture.evaluate("o => o.naturalWidth > 0"))


def test_hits_are_written_and_read_back(lab, folder):
    field = lab.get_by_label("Write to")
    field.fill("hits.csv")
    field.press("Enter")
    lab.get_by_role("button", name="Write", exact=True).click()
    wait_for(lab, lambda: "hits written" in status(lab))
    assert pd.read_csv(folder/"hits.csv").id.tolist() == names(lab, "Hits")


def serious(page):
    "What axe-core calls serious or critical, within the gallery."
    from axe_playwright_python.sync_playwright import Axe
    found = Axe().run(page, context=".rsir-gallery, .widget-box")
    assert len(found.response["passes"]) > 5, "axe-core looked at nothing"
    return [(o["id"], o["nodes"][0]["html"][:200]) for o in found.response["violations"]
            if o["impact"] in ("serious", "critical")]


def test_nothing_serious_stands_in_the_way(lab):
    pytest.importorskip("axe_playwright_python", reason="axe-core is not installed")
    assert serious(lab) == []


def test_a_restarted_kernel_is_told_and_the_cells_bring_it_back(lab, shots):
    kernel = "window.jupyterapp.shell.currentWidget.sessionContext.session.kernel"
    lab.evaluate(f"async () => {{ await {kernel}.restart() }}")
    wait_for(lab, lambda: "has stopped" in status(lab))
    assert lab.locator("[aria-label='Hits'] .rsir-error").count() == 1
    lab.screenshot(path=shots/"gallery_restarted.png")
    lab.evaluate("void window.jupyterapp.commands.execute('notebook:run-all-cells')")
    wait_for(lab, lambda: "Choose a patch" in status(lab))
    cards(lab, "Patches to choose from").nth(1).click()
    wait_for(lab, lambda: cards(lab, "Hits").count() == 12)


def test_a_thousand_hits_scroll(folder, retriever, browser, shots):
    "Through voila, which shows the widget without the notebook; pictures come only where somebody looks."
    pytest.importorskip("voila", reason="voila is not installed")
    home = folder/"many"
    home.mkdir()
    write_notebook(home/"many.ipynb", places=252, k=1000)
    build(home, places=252)
    with server("voila", home, "many.ipynb", "--show_tracebacks=True") as address:
        page = browser.new_page(viewport=dict(width=1280, height=1000))
        page.set_default_timeout(90_000)
        page.goto(address)
        page.wait_for_selector(CARDS.format("Patches to choose from"))
        cards(page, "Patches to choose from").first.click()
        wait_for(page, lambda: cards(page, "Hits").count() == 1000)
        cards(page, "Hits").first.scroll_into_view_if_needed()
        loaded = "all => all.filter(o => o.naturalWidth > 0).length"
        images = cards(page, "Hits").locator("img")
        wait_for(page, lambda: images.evaluate_all(loaded) > 4)
        few = images.evaluate_all(loaded)
        assert few < 300
        cards(page, "Hits").last.scroll_into_view_if_needed()
        wait_for(page, lambda: images.last.evaluate("o => o.naturalWidth > 0"))
        assert few < images.evaluate_all(loaded) < 600
        page.screenshot(path=shots/"gallery_thousand.png")
        page.close()


def test_exported_as_html_it_is_a_static_page(tmp_path, folder, retriever, browser, shots):
    "What nbconvert writes shows the hits without kernel and network."
    path = tmp_path/"static.ipynb"
    write_notebook(path, show=f"gallery.ask({retriever.store.ids[5]!r})\ngallery")
    shutil.copytree(folder/"search", tmp_path/"search")
    args = ["--to", "html", "--execute", "--config", str(Path(__file__).parent.parent/"nbs"/"static_html.py"), str(path)]
    subprocess.run([sys.executable, "-m", "nbconvert", *args], check=True, capture_output=True, timeout=300)
    context = browser.new_context(offline=True)
    page = context.new_page()
    page.goto(f"file://{tmp_path/'static.html'}")
    images = page.locator(".rsir-ranking img")
    assert images.count() >= 12
    assert images.evaluate_all("all => all.every(o => o.naturalWidth > 0 && o.alt)")
    page.screenshot(path=shots/"gallery_static.png", full_page=True)
    context.close()
