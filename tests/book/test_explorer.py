"""The interactive figures in a real browser; without scripts the still picture is all there is."""

import html
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest

from basis import figures
from basis.environment import repository_root

ROOT = repository_root()
SCRIPT = ROOT / "book" / "_static" / "explorer.js"
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
TIME = {"shape": "128@16", "device": "CPU", "speedup_q1": 1.9, "speedup_q3": 2.1}
ROW = {
    "macs": 0.8,
    "predicted": 0.02,
    "growth": 0.03,
    "growth_low": 0.01,
    "growth_high": 0.05,
    "n": 1000,
    "accuracy": 0.9,
}
FACTS = {
    "layer": {
        "kind": "layer", "batch": 128, "width": 16, "singular_values": {"layer2.1.conv1": [3.0] * 16 + [1.0] * 16},
        "times": [{**TIME, "ratio": 0.25, "speedup": 2.0}, {**TIME, "ratio": 0.75, "speedup": 1.25}],
    },
    "budget": {
        "kind": "budget", "model": "ResNet-18", "accuracy": 0.912,
        "rules": {"optimal": "chosen", "largest_first": "largest"},
        "widths": {"conv1": 16, "layer1.0.conv1": 16},
        "rows": [
            {**ROW, "rule": rule, "budget": budget, "plan": {"layer1.0.conv1": round(16 * budget)}}
            for rule in ("optimal", "largest_first") for budget in (0.25, 0.5, 0.75)
        ],
    },
}  # fmt: skip
# Move the slider as a hand would; keep what was said before.
MOVE = """<script>addEventListener("load", () => {
  const root = document.querySelector(".basis-explorer"), range = root.querySelector("input");
  const kept = root.cloneNode(true);
  kept.id = "before";
  range.value = range.max;
  range.dispatchEvent(new Event("input", {bubbles: true}));
  document.body.append(kept);
  root.id = "after";
})</script>"""


def page(kind, after=""):
    picture = f'<figure id="fig-{kind}"><img src="{kind}.svg" alt="Lines."><figcaption>Caption.</figcaption></figure>'
    widget = figures.interactive(FACTS[kind], name=kind, root=ROOT)
    return f'<!doctype html><html><head><meta charset="utf-8"></head><body>{widget}{picture}{after}</body></html>'


@pytest.fixture(scope="module")
def moved(tmp_path_factory):
    if not BROWSER:
        pytest.skip("there is no browser")

    def text(kind):
        folder = tmp_path_factory.mktemp(kind)
        (folder / "page.html").write_text(page(kind, MOVE), encoding="utf-8")
        switches = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--dump-dom"]
        command = [BROWSER, *switches, f"--user-data-dir={folder}", (folder / "page.html").as_uri()]
        dom = subprocess.run(command, capture_output=True, text=True, timeout=60).stdout
        _, after, before = re.split('id="(?:after|before)"', dom)
        return dom, {"before": before, "after": after}

    return {kind: text(kind) for kind in FACTS}


def words(part):
    said = re.search(r'class="words"[^>]*>(.*?)</p>', part, re.DOTALL)[1]
    return " ".join(html.unescape(re.sub(r"<[^>]+>", "", said)).split())


def marker(part):
    return re.findall(r'class="marker" x1="([\d.]+)"', part)


def test_the_slider_of_a_layer_moves_words_and_marker(moved):
    _, parts = moved["layer"]
    assert words(parts["before"]).startswith("k = 32 of 128 filters: 27 % of the parameters (39,936 of 147,456).")
    # of sixteen values of 3 and sixteen of 1, those beyond the eighth
    assert "rank 8 of the 32 filters of layer2.1.conv1" in words(parts["before"])
    assert "a relative error of 74 %" in words(parts["before"])
    assert "2.00 times as fast as dense on the CPU (r = 0.25)" in words(parts["before"])
    assert words(parts["after"]).startswith("k = 128 of 128 filters: 100 % of the parameters")
    assert "a relative error of 0 %" in words(parts["after"])
    assert "1.25 times as fast as dense on the CPU (r = 0.75)" in words(parts["after"])
    assert len(marker(parts["after"])) == 4
    assert all(float(b) < float(a) for b, a in zip(marker(parts["before"]), marker(parts["after"]), strict=True))


def test_the_slider_of_a_budget_moves_words_plan_and_marker(moved):
    _, parts = moved["budget"]
    assert words(parts["before"]).startswith("50 % of the parameters, chosen: 1 of 2 convolutions stay dense")
    assert words(parts["after"]).startswith("75 % of the parameters, chosen:")
    assert "grows by 0.030 nats, 95 % interval [0.010, 0.050], on 1,000 held-out images" in words(parts["after"])
    assert words(parts["after"]).endswith(
        "of which 90.0 % are classified correctly (dense 91.2 %; ResNet-18, not trained again)."
    )
    assert ">8/16<" in parts["before"]
    assert ">12/16<" in parts["after"]
    assert float(marker(parts["before"])[0]) < float(marker(parts["after"])[0])


@pytest.mark.parametrize("kind", FACTS)
def test_the_widget_takes_the_place_of_the_picture_and_can_be_heard(moved, kind):
    dom, parts = moved[kind]
    figure = re.search(rf'<figure id="fig-{kind}"[^>]*class="basis-live".*?</figure>', dom, re.DOTALL)[0]
    assert figure.index("basis-explorer") < figure.index("<img") < figure.index("<figcaption")
    assert 'aria-live="polite"' in figure
    assert len(re.findall("<label>", parts["after"])) == 2
    assert re.search(r'<input[^>]* aria-valuetext="[^"]+"', parts["after"])
    pictures = re.findall(r'<svg role="img"[^>]*><title>[^<]+</title>', parts["after"])
    assert len(pictures) == parts["after"].count("<svg") > 1


class Seen(HTMLParser):
    """The text and the images that are seen where no script runs."""

    def __init__(self, text):
        super().__init__()
        self.inside, self.text, self.images = "", "", []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.inside = tag
        self.images += [dict(attrs)["alt"]] if tag == "img" else []

    def handle_endtag(self, tag):
        self.inside = ""

    def handle_data(self, data):
        self.text += "" if self.inside == "script" else data.strip()


@pytest.mark.parametrize("kind", FACTS)
def test_without_scripts_there_is_the_picture(kind):
    seen = Seen(page(kind))
    assert (seen.text, seen.images) == ("Caption.", ["Lines."])


def test_the_script_stays_small_and_whole_and_loads_nothing():
    text = SCRIPT.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 250
    assert "</script" not in text
    assert not re.search(r"https?:|fetch\(|import\(|XMLHttpRequest", text)
