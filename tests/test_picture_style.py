"""One style for all pictures: legible on light and dark pages, named beside the lines, told to those who cannot see."""

from __future__ import annotations

import ast
import io
import json
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest
from test_docs import drawn

from benchmarks import plot_decode, plot_kernels, plot_results, readme_tables
from benchmarks.common import RESULTS
from quantspec.picture_sheet import INK, ON_PAGES
from quantspec.picture_style import Label, apart, caption, label_lines, new_figure, styled, tokens

ROOT = Path(__file__).parent.parent
PICTURES = sorted([*(ROOT / "docs" / "figures").glob("*.svg"), *RESULTS.rglob("*.svg")])
# GitHub's and the documentation's dark pages.
DARK_PAGES = ("#0d1117", "#1e2129")


def luminance(colour: str) -> float:
    """The relative luminance of WCAG."""
    parts = [int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    """The contrast ratio of WCAG, 1 to 21."""
    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


@styled
def picture(**texts):
    """One line with its label and a caption."""
    figure = new_figure((4, 3), **texts)
    axes = figure.subplots()
    axes.plot([1, 2], [1, 3], color=INK)
    axes.set_title("Speed & size")
    caption(figure, "a model", None, "a device")
    label_lines({axes: [Label("ours, 3x", 2, 3, INK)]})
    return figure


@pytest.mark.parametrize("colour", ON_PAGES)
def test_colours_are_legible_on_every_page(colour):
    """3 is the least for graphics and large letters, 4.5 for small ones, which SVG files reach."""
    light, dark = ON_PAGES[colour]
    assert contrast(light, "#ffffff") >= 4.5
    assert contrast(colour, "#ffffff") >= 3
    for page in DARK_PAGES:
        assert contrast(colour, page) >= 3
        assert contrast(dark, page) >= 4.5


@pytest.mark.parametrize("path", PICTURES, ids=lambda path: path.name)
def test_pictures_are_of_the_style(path):
    """Transparent, in colours that have one for each page, and read aloud."""
    text = path.read_text()
    root = ElementTree.fromstring(text)
    namespace = {"svg": "http://www.w3.org/2000/svg"}
    title, description = (root.find(f"svg:{name}", namespace) for name in ("title", "desc"))
    assert title is not None
    assert description is not None
    assert len(title.text) > 10
    assert len(description.text) > 30
    assert "@media (prefers-color-scheme: dark)" in text
    shown = set(re.findall(r'style="[^"]*?(?:fill|stroke): (#[0-9a-f]{6})', text))
    assert shown <= set(ON_PAGES), path.name


def test_results_are_drawn_as_the_script_draws_them(tmp_path):
    paths = plot_results.draw(tmp_path)
    assert {path.relative_to(tmp_path) for path in paths} == {
        path.relative_to(RESULTS) for path in RESULTS.rglob("*.svg")
    }
    for path in paths:
        texts, shapes, coordinates = drawn(RESULTS / path.relative_to(tmp_path))
        of_script = drawn(path)
        assert of_script[:2] == (texts, shapes), path.name
        assert of_script[2] == pytest.approx(coordinates, abs=2), path.name
        # A caption says on what and when.
        assert any(re.search(r"NVIDIA H100.*, \d{4}-\d\d-\d\d$", text) for text in texts), path.name


def test_the_picture_of_decoding_shows_the_rates_of_the_table():
    """Each line is named with its rate and with the speed-up of the table's last context."""
    texts = drawn(RESULTS / "decode.svg")[0]
    header, _, *rows = readme_tables.TABLES["speedup"]().splitlines()
    rates = re.findall(r"a = [\d.]+", header)[: len(plot_decode.RATES)]
    last = {row.split(" | ")[0].strip("| "): row.split(" | ")[3:7] for row in rows if "x |" in row}
    assert [text for text in texts if text.startswith("a = ")] == [
        f"{rate}, {speedup}" for speedups in last.values() for rate, speedup in zip(rates, speedups, strict=True)
    ]


def test_the_picture_of_kernels_shows_the_ratios_of_the_table():
    rows = json.loads((RESULTS / "kernels.json").read_text())
    ratios = plot_kernels.speedups(rows, "draft_attention", 1)
    assert f"{ratios[32, 8][131072]:.2f}x" in readme_tables.TABLES["attention-kernels"]()
    texts = drawn(RESULTS / "kernels.svg")[0]
    assert sum(text.startswith(("Draft", "Verification")) for text in texts) == 4
    assert f"32/8 heads, {ratios[32, 8][262144]:.1f}x" in texts


def test_no_picture_has_a_legend_or_colours_of_its_own():
    for folder in ("qspec_compile", "evals", "benchmarks", "docs"):
        for path in (ROOT / folder).rglob("*.py"):
            tree = ast.parse(path.read_text())
            calls = [
                node.func.attr for node in ast.walk(tree) if isinstance(node, ast.Call) and hasattr(node.func, "attr")
            ]
            assert "legend" not in calls, path
            if path.name != "picture_sheet.py":
                colours = re.findall(r'"(?:#[0-9a-fA-F]{6}|tab:\w+)"', path.read_text())
                assert not colours, path


def test_arrows_of_the_flow_go_the_way_of_the_data():
    """The prefill writes the cache, target and draft read it."""
    figure = styled(load_figures().flow)()
    axes = figure.axes[0]
    ends = [(text.xyann, text.xy) for text in axes.texts if getattr(text, "arrow_patch", None) is not None]
    upright = {
        (start[0], end[1] > start[1]) for start, end in ends if start[0] == end[0] and max(start[1], end[1]) < 30
    }
    assert upright == {(17, False), (45, True), (51, False), (78, True), (84, False)}


def load_figures():
    """``docs/figures.py``, which is no module of a package."""
    import importlib.util

    spec = importlib.util.spec_from_file_location("figures", ROOT / "docs" / "figures.py")
    figures = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(figures)
    return figures


def test_an_svg_file_is_read_aloud(tmp_path):
    """What was given, or what stands in the picture; also in an open file."""
    picture().savefig(tmp_path / "a.svg")
    text = (tmp_path / "a.svg").read_text()
    assert "<title>Speed &amp; size</title>" in text
    assert "<desc>Speed &amp; size: ours, 3x.</desc>" in text
    assert "a model, a device" in text
    written = io.BytesIO()
    picture(title="A title", description="1 < 2").savefig(written, format="svg")
    assert b"<title>A title</title>\n <desc>1 &lt; 2</desc>" in written.getvalue()


def test_a_notebook_shows_a_picture_by_itself():
    from PIL import Image

    png, size = picture()._repr_png_()
    image = Image.open(io.BytesIO(png))
    assert image.size == (2 * size["width"], 2 * size["height"]) == (600, 450)
    assert image.getpixel((0, 0))[3] == 0


@pytest.mark.parametrize(
    ("places", "moved"),
    [
        ([], []),
        ([0, 10], [0, 10]),
        ([5, 5], [3, 7]),
        ([0, 1, 20, 20, 20], [-1.5, 2.5, 16, 20, 24]),
        ([0, 3, 5], [-1.3333333, 2.6666667, 6.6666667]),
    ],
)
def test_labels_that_would_touch_move_apart(places, moved):
    assert apart(places, 4) == pytest.approx(moved)


def test_tokens_as_people_write_them():
    assert [tokens(count) for count in (0, 1000, 1024, 131072)] == ["0", "1,000", "1k", "128k"]
