"""Names that mean something to a page, to a figure or to a browser are shown as they are."""

import base64
import shutil
import subprocess
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
import torch
from torch import nn

from quanttune.analysis.analysis import analyze
from quanttune.analysis.subject import Request, Subject
from quanttune.report.report import write_report

PLAIN = ["first", "second", "third", "fourth"]
STRANGE = [
    '<img src="http://localhost/a">',
    '</td><script>document["title"]="ran"</script>',
    r"$\frac{1}$ $x_{$",
    "a&lt;b\"'",
]


class Layer(nn.Module):
    def __init__(self, names):
        super().__init__()
        for name in names:
            self.add_module(name, nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8)))

    def forward(self, x):
        for part in self.children():
            x = x + part(x)
        return x


class Page(HTMLParser):
    """The elements of a page, what they load, and its text."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.sources, self.text = [], [], ""
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.sources += [value for name, value in attributes if name in ("src", "href")]

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """The reports of two models that differ in their names alone, and of their facts."""
    pages = {}
    for key, names in (("plain", PLAIN), ("strange", STRANGE)):
        torch.manual_seed(0)
        x = torch.randn(16, 4, 8)
        model = nn.Sequential(Layer(names), Layer(names)).eval()
        with torch.no_grad():
            wanted = model(x)

        def quality(model, x=x, wanted=wanted):
            with torch.no_grad():
                return -(model(x) - wanted).square().mean().item()

        facts = {"data": names[1], names[0]: names[2]}
        subject = Subject(names[0], model, [x[:8], x[8:]], names[2], quality, None, facts)
        request = Request(thresholds=(99.0, 100.0), calibrators=("minmax", "mse"))
        found = analyze(subject, request, {names[3]: model})
        pages[key] = write_report(found, tmp_path_factory.mktemp(key), "analysis.json")[1]
    return pages


def test_names_are_text_and_no_elements(pages):
    plain, strange = (Page(path.read_text()) for path in pages.values())
    assert strange.tags == plain.tags
    assert "script" not in strange.tags
    assert all(source.startswith("data:") for source in strange.sources)
    for name in STRANGE:
        assert name in strange.text
    pictures = [s for s in strange.sources if s.startswith("data:image/svg")]
    drawn = [base64.b64decode(source.partition(",")[2]).decode() for source in pictures]
    assert not [x for svg in drawn for x in ElementTree.fromstring(svg).iter() if "script" in x.tag]
    assert any(STRANGE[2] in svg for svg in drawn)  # matplotlib names each text in a comment


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs Debian's chromium")
def test_a_browser_runs_and_asks_for_nothing(pages, tmp_path):
    log = tmp_path / "net.json"
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", f"--log-net-log={log}"]
    command += [f"--user-data-dir={tmp_path}", "--virtual-time-budget=3000", "--dump-dom"]
    done = subprocess.run([*command, pages["strange"].as_uri()], capture_output=True, check=True)
    assert "<title>ran" not in done.stdout.decode()
    assert "localhost" not in log.read_text()
