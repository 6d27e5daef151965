import json
import math
import re

import matplotlib
import nbformat
import pandas as pd
import pytest
import seaborn as sns

from basis import figures
from basis.environment import repository_root
from basis.statistics import mean_estimate


def draw(theme):
    figure = figures.canvas()
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color=theme.colour("r=1/2"), label="r = 1/2")
    runs = pd.DataFrame({"x": [0.5, 0.5, 0.5, 0.7], "y": [0.4, 0.5, 0.6, 0.4]})
    sns.lineplot(runs, x="x", y="y", errorbar=figures.student, err_style="bars", color=theme.colour("dense"), ax=axes)
    figures.mark_incomplete(axes, "3 of 4 runs", theme)
    axes.legend()
    return figure


@pytest.fixture
def shown(monkeypatch):
    displayed = []
    monkeypatch.setattr("IPython.display.display", lambda thing, **options: displayed.append((thing, options)))
    return displayed


def test_a_figure_is_written_light_dark_and_for_print(tmp_path, shown):
    figures.show(draw, name="a-b", caption="What **is** seen.", alt="A rising line.", folder=tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a-b-dark.svg", "a-b.pdf", "a-b.png", "a-b.svg"]
    light, dark = (tmp_path / "a-b.svg").read_text(), (tmp_path / "a-b-dark.svg").read_text()
    assert figures.LIGHT.text in light
    assert figures.DARK.text in dark
    assert figures.LIGHT.text not in dark
    assert "fill: none" in light  # no background


def test_a_figure_goes_where_it_is_wanted_with_the_table_behind_it(tmp_path, shown, monkeypatch):
    monkeypatch.setenv("BASIS_FIGURES", str(tmp_path / "wanted"))
    figures.show(draw, name="a", caption="C.", alt="A.", data=pd.DataFrame({"x": [0.5, 1.0], "of": ["a", "b"]}))
    assert (tmp_path / "wanted" / "a.csv").read_text() == "x,of\n0.5,a\n1,b\n"
    assert (tmp_path / "wanted" / "a.png").stat().st_size > 1000


def test_the_same_drawing_gives_the_same_bytes(tmp_path):
    for folder in ("one", "two"):
        figures.save(draw, name="same", folder=tmp_path / folder)
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes(), path.name
    assert "<dc:date>" not in (tmp_path / "one" / "same.svg").read_text()


def test_the_notebook_shows_image_and_caption_and_says_what_they_are(tmp_path, shown):
    figures.show(draw, name="a", caption="Caption.", alt="Alt.", folder=tmp_path)
    (image, about), (caption, mark) = shown
    assert image["text/plain"] == "Alt."
    assert about["metadata"]["basis_figure"] == {"name": "a", "caption": "Caption.", "alt": "Alt."}
    assert about["metadata"]["image/png"]["width"] == 96 * figures.TEXT_WIDTH
    assert caption.data == "**Figure a.** Caption."
    assert mark["metadata"] == {"basis_caption": "a"}
    nbformat.from_dict(about["metadata"])


def test_an_interactive_twin_follows_the_figure_with_its_facts_and_script(tmp_path, shown):
    facts = {"kind": "layer", "times": [], "note": "a </script> in it"}
    figures.show(draw, name="a", caption="Caption.", alt="Alt.", folder=tmp_path, explorer=facts)
    twin, about = shown[2]
    held, script = re.findall(r"<script[^>]*>(.*?)</script>", twin["text/html"], re.DOTALL)
    assert json.loads(held) == facts
    assert (
        script.strip() == (repository_root() / "book" / "_static" / "explorer.js").read_text(encoding="utf-8").strip()
    )
    assert 'data-figure="a"' in twin["text/html"]
    assert about["metadata"] == {"basis_explorer": "a"}
    with pytest.raises(ValueError, match="JSON"):  # of a number that is none, which no browser would read
        figures.show(draw, name="a", caption="C.", alt="A.", folder=tmp_path, explorer={"kind": "layer", "x": math.nan})


def test_a_name_is_that_of_a_file(tmp_path, shown):
    with pytest.raises(ValueError, match="A b"):
        figures.show(draw, name="A b", caption="Caption.", alt="Alt.", folder=tmp_path)


def test_drawing_leaves_matplotlib_as_it_was(tmp_path):
    before = dict(matplotlib.rcParams)
    figures.save(draw, name="a", folder=tmp_path)
    assert dict(matplotlib.rcParams) == before


def luminance(colour):
    red, green, blue = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in (red, green, blue)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("theme", [figures.LIGHT, figures.DARK], ids=lambda theme: theme.name)
def test_every_colour_stands_out_from_its_background(theme):
    back = luminance(theme.background)
    for colour in {*theme.colours.values(), *theme.cycle, theme.text, theme.muted, theme.warning}:
        bright, dark = max(luminance(colour), back), min(luminance(colour), back)
        assert (bright + 0.05) / (dark + 0.05) >= 3, colour


def test_a_label_keeps_its_colour():
    assert figures.LIGHT.colour("r = 1/2") == figures.LIGHT.colour("r=1/2") != figures.LIGHT.colour("dense")
    assert figures.DARK.colour("something else") == figures.DARK.colour("something else")


def test_the_interval_for_seaborn_is_students_from_three_runs_on():
    mean = mean_estimate([0.4, 0.5, 0.6])
    assert figures.student([0.4, 0.5, 0.6]) == (mean.low, mean.high)
    assert figures.student([0.25, 0.75]) == (0.5, 0.5)
    assert all(map(math.isnan, figures.student([0.4])))
