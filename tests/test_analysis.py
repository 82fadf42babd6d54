"""Tables, figures, the report: numbers in, the same numbers on the page."""

import base64
import json
import re

import pytest
import torch
from torch import nn

from quanttune import files
from quanttune.demo.experiment import Results, Row
from quanttune.demo.residual_ranges import residual_ranges
from quanttune.environment import environment
from quanttune.report import report
from quanttune.report.demo_sections import mean_ranges
from quanttune.report.figure import svg
from quanttune.report.plots import draw_ranges
from quanttune.report.results_table import Way, tabulate

RANGES = {
    seed: {arm: {"a.norm1": 3.0, "b.norm2": 200.0} for arm in ("base", "paper")} for seed in (0, 1)
}


def drawings(page: str) -> list[str]:
    """The figures of a page; matplotlib names each text in a comment."""
    urls = re.findall(r'src="data:image/svg\+xml;base64,([^"]+)"', page)
    return [base64.b64decode(url).decode() for url in urls]


@pytest.fixture
def results():
    rows = [
        Row(
            seed,
            arm,
            bits,
            "none" if bits == 32 else "minmax",
            "channel",
            "cosine",
            value + seed / 10,
        )
        for seed in (0, 1)
        for arm, bits, value in (
            ("base", 32, 0.8),
            ("base", 8, 0.512),
            ("paper", 32, 0.7),
            ("paper", 8, 0.612),
        )
    ]
    recipe = {
        "steps": 80,
        "arms": [{"name": "base", "summary": "<b>", "learning_rate": 0.0, "alpha": 0}],
    }
    return Results("minilm", "cosine", ["a caveat"], recipe, environment(), 1.5, rows, RANGES)


def test_table_has_means_deviations_and_the_best_of_each_row(results):
    table = tabulate(results.rows)
    assert table.arms == ["base", "paper"]
    base, paper = table.cells[Way(8, "minmax", "channel")]
    assert (base.text(3), paper.text(3)) == ("0.562 ±0.071", "0.662 ±0.071")
    assert (base.best, paper.best) == (False, True)
    assert [way.label for way in table.cells] == ["fp32", "W8A8"]
    single = tabulate([row for row in results.rows if row.seed == 0])
    assert single.cells[Way(8, "minmax", "channel")][0].text(2) == "0.51"
    some = tabulate([row for row in results.rows if row.arm == "base" or row.bits == 32])
    cells = some.cells[Way(8, "minmax", "channel")]
    assert [(cell.text(2, spread=False), cell.best) for cell in cells] == [
        ("0.56", True),
        ("-", False),
    ]


def test_report_shows_every_number_and_holds_its_figure(results, tmp_path):
    written = report.write(results, tmp_path / "new" / "folder")
    assert [path.name for path in written] == ["results.json", "report.html", "ranges.png"]
    assert written[2].read_bytes().startswith(b"\x89PNG")
    page = written[1].read_text()
    for text in ("0.562 ±0.071", "<b>0.662 ±0.071</b>", "a caveat", "&lt;b&gt;", "torch"):
        assert text in page
    (figure,) = drawings(page)
    for text in ("base", "paper", "max |x|"):
        assert text in figure
    assert not list(tmp_path.rglob(".*"))  # the partial files are gone


def test_results_file_keeps_its_promised_shape(results, tmp_path):
    data = json.loads(report.write(results, tmp_path)[0].read_text())
    assert {"task", "seconds", "environment", "rows"} <= data.keys()
    assert data["rows"][1] == {
        "seed": 0,
        "arm": "base",
        "bits": 8,
        "calibrator": "minmax",
        "weights": "channel",
        "metric": "cosine",
        "value": 0.512,
        "coverage": "full_no_softmax",
    }


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "results.json"
    files.write_json(path, {"old": 1})
    with pytest.raises(TypeError):
        files.write_json(path, {"new": object()})
    monkeypatch.setattr(files.os, "fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        files.write_json(path, {"new": 2})
    assert json.loads(path.read_text()) == {"old": 1}


def test_a_report_is_made_again_from_its_file(results, tmp_path):
    data, page, _ = report.write(results, tmp_path)
    assert report.build(report.read([data])) == page.read_text()
    both = report.build(report.read([data, data]))
    assert both.count("a caveat") == 2


@pytest.mark.parametrize("text", ["{}", "[1]", "no json", '{"task": 1}'])
def test_other_files_are_refused(tmp_path, text):
    path = tmp_path / "other.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"other.json is no results file of quanttune: "):
        report.read([path])


def test_ranges_are_means_over_the_seeds():
    seeds = {"0": {"base": {"a": 1.0}}, "1": {"base": {"a": 4.0}}}
    assert mean_ranges({"ranges": seeds}) == {"base": {"a": 2.5}}


def test_a_figure_is_the_same_for_the_same_numbers():
    files = [svg(draw_ranges({"base": {"0": 1.0, "1": 30.0}}, "norms")) for _ in range(2)]
    assert files[0] == files[1]


def test_ranges_are_those_of_the_norms_inputs():
    model = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4), nn.LayerNorm(4)).train()
    batches = [torch.randn(3, 4), 5 * torch.randn(3, 4)]
    ranges = residual_ranges(model, batches)
    both = torch.cat(batches)
    assert ranges["0"] == both.abs().max().item()
    assert ranges["2"] == pytest.approx(model[1](model[0](both)).abs().max().item(), rel=1e-6)
    assert list(ranges) == ["0", "2"]
    assert model.training
    assert not model[0]._forward_pre_hooks


def test_environment_names_what_the_numbers_depend_on():
    facts = environment()
    assert facts["versions"]["torch"] == torch.__version__.split("+")[0]
    assert facts["backends"].keys() == {"cpu", "cuda", "other"}
    assert facts["processor"]
