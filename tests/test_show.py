"Pictures and their HTML twins: stated stretches, legible colours, alternative texts, small and equal bytes."
import io
import re
from html.parser import HTMLParser

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from rsir_nb.charts import html_figure, show_bars, show_curve
from rsir_nb.core import InputError, UnknownNameError
from rsir_nb.html import (MARKS, Card, html_gallery, html_img, html_page, html_table, mark_of, summary,
                          to_png)
from rsir_nb.style import THEMES, contrast_ratio
from rsir_nb.sensors import SENSORS
from rsir_nb.show import STRETCHES, show_grid, show_patch, show_ranking, stretch_of, to_rgb


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


@pytest.fixture
def picture(): return np.random.default_rng(0).random((24, 24, 3)).astype(np.float32)


@pytest.fixture
def cards(picture):
    return [Card(picture, f"patch {i}", "Pastures", r, 3 * i) for i, r in enumerate([True, False, None, 2])]


class Tags(HTMLParser):
    "Open tags in order, and those that were never closed."
    EMPTY = {"meta", "img", "br", "wbr", "link"}

    def __init__(self, html):
        super().__init__()
        self.tags, self.open = [], []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.EMPTY: self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> after <{self.open[-1:]}>"
        self.open.pop()


# ---- stretches

@pytest.mark.parametrize("name", STRETCHES)
def test_a_stretch_says_its_bands_and_values(name):
    s = STRETCHES[name]
    assert len(s.channels) == len(s.low) == len(s.high)
    for word in (*s.channels, *(f"{o:g}" for o in (*s.low, *s.high)), s.unit): assert word in s.text


@pytest.mark.parametrize("name", STRETCHES)
def test_low_is_black_and_high_is_full(name):
    s = STRETCHES[name]
    if name == "sar":   # the third channel is the difference of the first two
        x = np.array([[-23, -1], [-29, -7]])[..., None, None]
        np.testing.assert_allclose(to_rgb(x[:, 0], ["VV", "VH"])[0, 0, :2], 0, atol=1e-6)
        np.testing.assert_allclose(to_rgb(x[:, 1], ["VV", "VH"])[0, 0, :2], 1, atol=1e-6)
        return
    for values, shown in ((s.low, 0), (s.high, 1)):
        x = np.array(values, dtype=np.float32)[:, None, None]
        np.testing.assert_allclose(to_rgb(x, s.channels, name), shown, atol=1e-6)


def test_the_stretch_does_not_depend_on_the_patch():
    x = torch.rand(10, 8, 8) * 2000
    alone, beside_snow = to_rgb(x, "s2"), to_rgb(torch.cat([x, torch.full((10, 8, 8), 9000.0)], 2), "s2")
    np.testing.assert_array_equal(alone, beside_snow[:, :8])


def test_every_sensor_has_a_composite():
    for sensor in SENSORS.values():
        rgb = to_rgb(torch.zeros(sensor.in_chans, 4, 4), sensor)
        assert rgb.shape == (4, 4, 3) and rgb.min() >= 0 and rgb.max() <= 1
        assert "of this picture" not in stretch_of(sensor).text


def test_unknown_bands_say_that_the_range_is_their_own():
    assert "of this picture" in stretch_of(["TIR1"]).text
    assert np.isfinite(to_rgb(np.full((1, 3, 3), 300.0), ["TIR1"])).all()
    assert to_rgb(np.full((1, 3, 3), np.nan), ["TIR1"]).shape == (3, 3, 3)


def test_composites_that_cannot_be_made():
    with pytest.raises(InputError, match="B04, B03, B02"): to_rgb(np.zeros((2, 3, 3)), "s1", "true")
    with pytest.raises(UnknownNameError, match="mean false"): to_rgb(np.zeros((10, 3, 3)), "s2", "flase")
    with pytest.raises(InputError, match="does not fit"): to_rgb(np.zeros((3, 3)), "s1")


# ---- figures

def test_figures_carry_their_text_and_are_small(picture, cards):
    plt.switch_backend("agg")
    x = np.random.default_rng(1).normal(2000, 600, (10, 120, 120))
    hits = [Card(to_rgb(x, "s2"), "noise", relevance=True, distance=1) for _ in range(10)]
    figures = [show_patch(x, "s2").figure, show_grid([picture, picture[..., 0]], ["left", "right"])[0].figure,
               show_ranking(hits[0], hits)[0].figure, show_curve([1, 2], {"a": [1, 2]}).figure,
               show_bars({"x": {"a": 1.0, "b": np.nan}}).figure]
    for fig in figures:
        assert len(fig.get_label()) > 5
        fig.savefig(file := io.BytesIO(), format="png", dpi=100)
        assert len(file.getvalue()) < 150_000 and fig.get_size_inches()[0] <= 7
    assert "10 relevant" in figures[2].get_label()


def test_drawing_leaves_global_settings_alone(picture, cards):
    before = dict(plt.rcParams)
    show_grid([picture])
    show_ranking(picture, cards)
    assert dict(plt.rcParams) == before


def test_frames_differ_in_colour_and_line(picture, cards):
    looks = {(o.spines["top"].get_edgecolor(), str(o.spines["top"].get_linestyle()))
             for o in show_ranking(picture, cards)[1:4]}
    assert len({c for c, _ in looks}) == len({s for _, s in looks}) == 3


def test_given_axes_are_drawn_into():
    fig, axes = plt.subplots(1, 3)
    assert show_patch(np.zeros((2, 5, 5)), "s1", ax=axes[0]) is axes[0]
    assert show_curve([1, 2], {"a": [1, 2]}, {"a": ([0, 1], [2, 3])}, ax=axes[1], log="x") is axes[1]
    assert show_bars({"x": 1.0}, {"x": 0.1}, ax=axes[2]) is axes[2]
    assert all(word in fig.get_label() for word in ("radar", "a from 1", "x: 1.00"))


# ---- HTML

@pytest.mark.parametrize("theme", THEMES)
def test_contrast(theme):
    colours = THEMES[theme]
    for ink in ("ink", "quiet", "link", "good", "bad", "none"):
        for ground in ("page", "card"): assert contrast_ratio(colours[ink], colours[ground]) >= 4.5, ink


def test_contrast_ratio_is_that_of_wcag():
    assert contrast_ratio("#ffffff", "#000000") == pytest.approx(21)
    assert contrast_ratio("#777777", "#ffffff") == pytest.approx(4.48, abs=0.005)   # the textbook near miss


def test_png_is_small_and_the_same(picture):
    assert to_png(picture) == to_png(picture.copy())
    exact = np.asarray(Image.open(io.BytesIO(to_png(picture, colours=None))))
    np.testing.assert_array_equal(exact, np.round(picture * 255).astype(np.uint8))
    big = np.random.default_rng(0).random((120, 120, 3))
    assert len(to_png(big)) < 20_000 and Image.open(io.BytesIO(to_png(big, size=60))).size == (60, 60)
    with pytest.raises(InputError, match="to_rgb"): to_png(np.zeros((10, 8, 8)))


def test_a_page_is_well_formed_and_accessible(cards, picture):
    table = pd.DataFrame({"F1": [0.5, np.nan], "name": ["<a>", "b"]}, index=pd.Index(["x", "y"], name="way"))
    body = [html_gallery(cards, "Hits", cards[0]), html_gallery([], "None"), html_table(table, "T", 2, "max"),
            html_figure(show_bars({"a": 1.0}))]
    page = Tags(html_page("A & B", "".join(body), lead="lead", footer="foot"))
    tags = [tag for tag, _ in page.tags]
    assert not page.open and page.tags[0] == ("html", {"lang": "en"})
    assert [tags.count(o) for o in ("main", "h1", "title", "style")] == [1, 1, 1, 1]
    images = [attrs for tag, attrs in page.tags if tag == "img"]
    assert len(images) == 6 and all(o["src"].startswith("data:image/png") for o in images)
    assert all(o["alt"].strip() for o in images)
    assert all("scope" in attrs for tag, attrs in page.tags if tag == "th")


def test_a_page_loads_nothing(cards):
    page = html_page("T", html_gallery(cards, "Hits"))
    assert "default-src 'none'" in page and "prefers-color-scheme:dark" in page and "@media print" in page
    assert not re.search(r"https?://|<script|@import|url\(", page)


def test_relevance_is_told_in_words_and_lines(cards):
    html = html_gallery(cards, "Hits")
    for mark in MARKS.values(): assert f"rsir-{mark.key}" in html and f"> {mark.words}" in html
    assert len({o.line for o in MARKS.values()}) == len({o.sign for o in MARKS.values()}) == 3
    assert summary(cards) == "4 hits: 2 relevant, 1 not relevant, 1 not labelled"
    assert [mark_of(o).key for o in (np.float32("nan"), np.bool_(True), 0.0)] == ["none", "good", "bad"]


def test_names_are_text_never_markup(picture):
    sly = dict(rgb=picture, alt='" onerror="x', caption="<b>bold</b>")
    tags = Tags(html_gallery([sly], "<i>T</i>")).tags
    assert not {"b", "i"} & {tag for tag, _ in tags}
    assert not any("onerror" in attrs for _, attrs in tags)
    with pytest.raises(InputError, match="alternative text"): html_img(picture, "")
