"""Pictures of the gallery's states for the documentation: `python tests/make_screenshots.py [name ...]` fills nbs/images.

Starts JupyterLab over a simulated archive and walks a browser through the states in their order; with names it writes only
those. A further state is a function with `@state`: it brings the page there and returns what to photograph.
"""
import argparse
import io
import json
import os
import sys
import tempfile
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

from gallery_page import POINTS, notebook
from lab import CHROMIUM, cards, lab_options, open_notebook, server, status, wait_for

ROOT = Path(__file__).resolve().parent.parent
IMAGES = ROOT / "nbs/images"
STATES, LIMIT = {}, 150_000
SETUP = '''
from pathlib import Path
from rsir_nb.core import METHODS
from rsir_nb.simulate.synthetic import SyntheticArchive
from rsir_nb.engine.encode import encode
from rsir_nb.engine.hash import paired_features
from rsir_nb.engine.retriever import Retriever
from rsir_nb.gallery.app import QueryGallery
from rsir_nb.engine.hash import train_heads

archive = SyntheticArchive(n_places=48, patches_per_place=4, img_size=120, seed=4)

def search_of(name, n_bits):
    home = Path(f'search_{n_bits}').absolute()
    if home.is_dir(): return Retriever.load(home, archive=archive)
    method = METHODS.create(name, sensors=archive.sensors, img_size=120).fit(archive.split('train'))
    features = encode(method, archive.split('train'), f'features_{n_bits}', progress=False)
    method.heads = train_heads(paired_features(features), n_bits=n_bits, min_steps=100, progress=False).heads
    return Retriever.build(method, archive, home, progress=False)
'''
ONE = "retriever = search_of('band_cca', 64)\ngallery = QueryGallery(retriever, k=12)"
TWO = ("gallery = QueryGallery(search_of('band_cca', 64), other=search_of('band_cca', 16), k=6, names=('64 bits', '16 bits'))")
LABEL = "Inland waters"


def state(name, gallery="one"):
    "A state to photograph: its file is gallery_<name>.png; it happens in the notebook called `gallery`."
    def decorate(func):
        STATES[name] = gallery, func
        return func
    return decorate


def button(page, name): return page.get_by_role("button", name=name, exact=True)


def grid(page, name): return page.locator(f"section[aria-label='{name}']")


def hits(page):
    "The query, its hits, and the line above them."
    return grid(page, "Query"), page.locator("section[aria-label^='Hits']").first, page.locator("section[aria-label^='Hits']").last


@state("choosing")
def choosing(page):
    page.get_by_label("Label", exact=True).select_option(LABEL)
    wait_for(page, lambda: "Page 1" in page.locator("[aria-label='Patches to choose from'] [role=status]").inner_text())
    return page.get_by_role("heading", name="Choose a patch"), grid(page, "Patches to choose from"), page.get_by_text("Upload a GeoTIFF")


@state("hits")
def across_sensors(page):
    page.get_by_label("From", exact=True).select_option("s1")
    page.get_by_label("Search in", exact=True).select_option("s2")
    cards(page, "Patches to choose from").nth(1).click()
    wait_for(page, lambda: "S1 → S2" in status(page) and cards(page, "Hits").count() == 12)
    return hits(page)


@state("marks")
def marks(page):
    "Who marks goes by the labels."
    for i, key in enumerate("good" in o for o in cards(page, "Hits").evaluate_all("all => all.map(o => o.className)")):
        cards(page, "Hits").nth(i).focus()
        page.keyboard.press("g" if key else "b")
    pressed = page.locator("[aria-label='Hits'] [aria-pressed=true]")
    wait_for(page, lambda: pressed.count() == 12)
    return button(page, "Refine"), *hits(page)


@state("refined")
def refined(page):
    button(page, "Refine").click()
    wait_for(page, lambda: "refined" in status(page))
    return hits(page)


@state("why")
def why(page):
    button(page, "Back").click()
    wait_for(page, lambda: "refined" not in status(page))
    cards(page, "Hits").first.focus()
    page.keyboard.press("w")
    wait_for(page, lambda: "is told below" in status(page))
    told = page.locator(".jupyter-widgets .rsir", has_text="bits are the same").last
    return told.get_by_role("heading", name="Bits that say most"), told.locator("ul.rsir-row").last


@state("map")
def on_a_map(page):
    button(page, "Map").click()
    ground = page.locator(".leaflet-container")
    wait_for(page, lambda: ground.locator(".leaflet-marker-icon[title*=distance]").count() == 12)
    page.wait_for_timeout(1000)
    return ground,


@state("points")
def points(page):
    plot = page.locator(".rsir-map-plot")
    plot.scroll_into_view_if_needed()
    plot.focus()
    for key in "ArrowRight", "ArrowDown": page.keyboard.press(key)
    wait_for(page, lambda: page.locator(".rsir-map-side img").evaluate("o => o.naturalWidth > 0"))
    return page.locator("section.rsir-map"),


@state("comparison", gallery="two")
def comparison(page):
    cards(page, "Patches to choose from").nth(1).click()
    wait_for(page, lambda: cards(page, "Hits of 16 bits").count() == 6)
    return grid(page, "Hits"), grid(page, "Hits of 16 bits")


@state("error")
def error(page):
    path = Path(page.folder) / "notes.tif"
    path.write_bytes(b"no image")
    with page.expect_file_chooser() as chooser: page.get_by_role("button", name="Upload a GeoTIFF").click()
    chooser.value.set_files(path)
    wait_for(page, lambda: "cannot be read as an image" in status(page))
    return grid(page, "Hits"),


def settled(page):
    "Pictures are there, and the mouse is nowhere."
    page.mouse.move(2, 2)
    wait_for(page, lambda: page.locator(".rsir-card img").evaluate_all("all => all.every(o => o.naturalWidth > 0)"))
    page.wait_for_timeout(300)


def photograph(page, places, path, margin=4):
    "The smallest picture that holds all `places`, in few enough colours to stay small."
    boxes = [o.bounding_box() for o in places]
    left, top = max(0, min(b["x"] for b in boxes) - margin), max(0, min(b["y"] for b in boxes) + 1)
    right, bottom = (max(b[o] + b[s] for b in boxes) + margin for o, s in (("x", "width"), ("y", "height")))
    shot = page.screenshot(clip=dict(x=left, y=top, width=right - left, height=bottom - top))
    image = Image.open(io.BytesIO(shot)).convert("RGB")
    for colours in 256, 128, 64, 32:
        small = image.quantize(colours, dither=Image.Dither.NONE)
        data = io.BytesIO()
        small.save(data, "PNG", optimize=True)
        if data.tell() < LIMIT: break
    else: raise SystemExit(f"{path.name} stays at {data.tell():,} bytes; photograph less")
    path.write_bytes(data.getvalue())
    print(f"{path.name}: {image.width} x {image.height}, {colours} colours, {data.tell()//1000} kB")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="states to write; all by default")
    parser.add_argument("--into", type=Path, default=IMAGES, help="folder for the pictures")
    args = parser.parse_args()
    if unknown := set(args.names) - set(STATES): parser.error(f"no state is called {sorted(unknown)}; there are {list(STATES)}")
    if CHROMIUM is None: parser.error("there is no chromium on this machine")
    args.into.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        for name, cells in dict(one=(ONE, "gallery", POINTS), two=(TWO, "gallery")).items():
            (folder / f"{name}.ipynb").write_text(json.dumps(notebook(SETUP, *cells)))
        prepare(folder)
        with server("jupyterlab", folder, *lab_options(folder)) as address, sync_playwright() as p:
            browser = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
            wanted = args.names or list(STATES)
            for name in dict.fromkeys(STATES[o][0] for o in wanted):
                page = open_notebook(browser, address, f"{name}.ipynb", dict(width=1240, height=4600))
                page.folder = folder
                page.evaluate("void window.jupyterapp.commands.execute('application:toggle-left-area')")
                page.add_style_tag(content=".rsir-grid { max-height: none !important }")    # a picture cannot be scrolled
                walk(page, name, args)
                page.close()
            browser.close()


def prepare(folder):
    "Make archive and codes in this process, so that the notebooks only open them."
    here, names = os.getcwd(), {}
    os.chdir(folder)
    try:
        exec(SETUP, names)
        for n_bits in 64, 16: names["search_of"]("band_cca", n_bits)
    finally: os.chdir(here)


def walk(page, gallery, args):
    "Bring the page through the states of one gallery."
    for name, (where, go) in STATES.items():
        if where != gallery: continue
        places = go(page)
        places[0].scroll_into_view_if_needed()
        settled(page)
        if not args.names or name in args.names: photograph(page, places, args.into / f"gallery_{name}.png")


if __name__ == "__main__":
    sys.exit(main())
