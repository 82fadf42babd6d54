"""The support matrix: what it says of models whose outcome is known, its runs and its page."""

import importlib
import json
import multiprocessing
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import quanttune as qt

ROOT = Path(__file__).resolve().parent.parent
BATCH = 3


@pytest.fixture
def script(monkeypatch):
    """Import a module of the support matrix."""
    monkeypatch.syspath_prepend(ROOT)
    return lambda name: importlib.import_module(f"benchmarks.support.{name}")


@pytest.fixture
def examine(script, monkeypatch):
    """Examine a model of one's own."""
    check = script("check")

    def examine(make):
        candidate = script("models").Candidate(
            "toy", lambda: (make(), {"x": torch.randn(BATCH, 8)})
        )
        monkeypatch.setattr(check, "candidates", lambda library, name: [candidate])
        return check.examine("toy", "toy")

    return examine


class Toy(nn.Module):
    """Two Linear and a LayerNorm, of which a subclass may change what happens in between."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.middle(self.body(x))) + x)

    def middle(self, x: Tensor) -> Tensor:
        return x.tanh()


class Functional(Toy):
    def middle(self, x: Tensor) -> Tensor:
        return F.linear(x, self.body.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.middle(x)) + x)


class Unused(Toy):
    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Linear(8, 8)


class Detour(Unused):
    def middle(self, x: Tensor) -> Tensor:
        x = x.tanh()
        self.unused(x)
        return x


class Activation(Toy):
    def __init__(self) -> None:
        super().__init__()
        self.activation = nn.ReLU(inplace=True)

    def middle(self, x: Tensor) -> Tensor:
        return self.activation(x)


class InPlace(Toy):
    def middle(self, x: Tensor) -> Tensor:
        x *= 2
        return x


class Random(Toy):
    calls = 0

    def middle(self, x: Tensor) -> Tensor:
        Random.calls += 1
        return x.tanh() * Random.calls


class Convolutions(Toy):
    def __init__(self) -> None:
        super().__init__()
        self.body = self.norm = self.head = nn.Conv1d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x[..., None]).flatten(1)


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (Toy, {"outcome": "exact", "sites": 3, "terms": 5, "lost": 0, "unobserved": {}}),
        (
            Functional,
            {
                "outcome": "partly",
                "unobserved": {"Functional takes its weight itself": {"body": 1}},
            },
        ),
        (
            Unused,
            {"outcome": "partly", "unobserved": {"not called in this forward": {"unused": 1}}},
        ),
        (Detour, {"outcome": "exact", "lost": 2, "terms": 7}),
        (Activation, {"outcome": "exact", "remedy": "inplace=False", "terms": 5}),
        (InPlace, {"outcome": "exact", "remedy": "exclude=['body']", "terms": 3}),
        (Convolutions, {"outcome": "refused", "share": 0.0, "others": {"Conv1d": 1}}),
        (Random, {"outcome": "not run"}),
    ],
)
def test_the_outcome_of_models_that_are_known(examine, model, expected):
    row = examine(model)
    assert {key: row[key] for key in expected} == expected
    assert row.get("error", 0) < 1e-6


def test_a_refusal_and_a_model_that_does_not_repeat_say_why(examine):
    assert examine(Convolutions)["message"].startswith("ValueError: no Linear, Conv1D or LayerNorm")
    assert examine(Random)["message"].startswith("two forwards give losses of ")


def test_a_wrong_gradient_is_found(script, examine, monkeypatch):
    attach = partial(qt.attach, detach_deviation=True)  # another gradient of the same loss
    monkeypatch.setattr(script("check").qt, "attach", attach)
    row = examine(Toy)
    assert row["outcome"] == "wrong"
    assert row["error"] > 1e-3
    assert row["parameter"].partition(".")[0] in ("body", "norm")


def test_a_crash_of_quanttune_is_told(examine, monkeypatch):
    def combine(tuner, loss):
        raise KeyError("statistics")

    monkeypatch.setattr(qt.Tuner, "combine", combine)
    row = examine(Toy)
    assert (row["outcome"], row["message"]) == ("error", "KeyError: 'statistics'")


@pytest.mark.parametrize(
    ("library", "name", "outcome"),
    [("timm", "test_vit", "exact"), ("transformers", "mamba", "partly")],
)
def test_a_model_of_each_library(script, library, name, outcome):
    row = script("check").examine(library, name)
    assert (row["outcome"], row["dtype"]) == (outcome, "float64")


def test_every_name_is_there_once_and_timm_has_all_of_its_module_files(script):
    timm = pytest.importorskip("timm")
    names = script("names").names()
    assert len({name[::2] for name in names}) == len(names)
    families = {family for library, family, _ in names if library == "timm"}
    assert families == set(timm.list_modules())
    for library, family, name in names:
        assert library != "timm" or name in timm.list_models(module=family)


# --------------------------------------------------------------------------------------- the runs


class FakeWorker:
    def __init__(self) -> None:
        self.asked = []

    def examine(self, library, name):
        self.asked.append(f"{library}/{name}")
        return {"outcome": "refused", "message": "no"}

    def stop(self):
        pass


def test_a_run_goes_on_where_it_was_stopped(script, monkeypatch, tmp_path):
    matrix, worker, file = script("matrix"), FakeWorker(), tmp_path / "new" / "a.json"
    monkeypatch.setattr(matrix, "Worker", lambda module: worker)
    result = {"rows": {"timm/swin_s3_tiny_224": {"family": "swin_transformer", "outcome": "exact"}}}
    matrix.run(result, "timm/swin_t*/*", False, file)
    others = ["timm/swin_tiny_patch4_window7_224"]
    others += ["timm/swinv2_tiny_window8_256", "timm/swinv2_base_window12to16_192to256"]
    others += ["timm/swinv2_cr_tiny_224", "timm/swinv2_cr_tiny_ns_224"]
    assert worker.asked == others
    saved = json.loads(file.read_text())
    assert set(saved["rows"]) == {"timm/swin_s3_tiny_224", *others}
    assert saved["rows"][others[0]]["family"] == "swin_transformer"
    named = len(script("names").names())
    assert saved["missing"] == named - len(saved["rows"])
    assert {"torch", "timm"} <= set(saved["environment"]["versions"])
    assert len(file.read_text().splitlines()) == len(saved["rows"]) + 2

    matrix.run(saved, "timm/swin_t*/*", False, file)
    assert worker.asked == others
    matrix.run(saved, "timm/swin_transformer/*", True, file)
    assert len(worker.asked) == len(others) + 2


def test_a_worker_that_hangs_is_left_out_and_made_anew(script, monkeypatch):
    matrix = script("matrix")
    monkeypatch.setattr(matrix, "PATIENCE", 0)
    worker = matrix.Worker()
    for _ in range(2):
        row = worker.examine("timm", "test_vit")
        assert row == {"outcome": "left out", "message": "hangs for 0 s"}
        assert not multiprocessing.active_children()


def test_a_run_makes_the_page(script, monkeypatch, tmp_path):
    file, page = tmp_path / "a.json", tmp_path / "a.md"
    arguments = ["--only", "timm/*/test_vit", "--json", str(file), "--markdown", str(page)]
    monkeypatch.setattr(sys, "argv", ["matrix", *arguments])
    script("matrix").main()
    row = json.loads(file.read_text())["rows"]["timm/test_vit"]
    assert row["outcome"] == "exact"
    cells = ["vision_transformer", "14", f"{row['share']:.0%}", "exact", "test_vit"]
    assert f"| {' | '.join(cells)} |" in page.read_text().splitlines()


# --------------------------------------------------------------------------------------- the page


def row(family, outcome, **others):
    common = {"dtype": "float64", "sites": 4, "share": 0.5, "error": 1e-9, "lost": 0}
    return {"family": family, "outcome": outcome, **common, "unobserved": {}, **others}


ROWS = {
    "timm/vit_a": row("vit", "exact", sites=8, others={"Conv2d": 1}),
    "timm/beit_a": row("beit", "partly", unobserved={"A takes it": {"b.*.qkv": 2, "c": 1}}),
    "timm/vit_b": row("vit", "exact", share=0.9, error=3e-8, others={"Conv2d": 7}, lost=2),
    "timm/vit_c": row("vit", "exact", sites=1, remedy="inplace=False"),
    "timm/net": {"family": "net", "outcome": "refused", "message": "ValueError: none", "sites": 0},
    "transformers/esm": row(
        "encoders", "partly", dtype="float32", unobserved={"not called in this forward": {"d": 1}}
    ),
    "transformers/odd": row("encoders", "wrong", error=0.25, parameter="a.weight"),
    "transformers/slow": {"family": "time", "outcome": "left out", "message": "takes long"},
}


def test_the_page_tells_what_became_of_each_model(script):
    versions = {"timm": "1", "transformers": "2", "torch": "3"}
    result = {"rows": ROWS, "missing": 9, "environment": {"versions": versions}}
    page = script("page")
    text = page.page(result)
    lines = text.splitlines()
    for line in [
        f"| exact | 3 | 1 | {page.MEANINGS['exact']} |",
        f"| left out | 0 | 1 | {page.MEANINGS['left out']} |",
        "Of the exact ones, 1 have a single site, the last Linear, of which only the input is "
        "observed.",
        "Largest error of what is exact or partly so: 3e-08 in float64, "
        "1e-09 in float32 (1 models: esm).",
        "9 models of `benchmarks/support/names.py` are not run yet.",
        "| beit | 4 | 50% | partly | beit_a |",
        "| vit | 4 to 8 | 50% to 90% | exact | vit_a, vit_b |",
        "| vit | 1 | 50% | exact with a remedy | vit_c |",
        "| encoders | 4 | 50% | exact | esm |",
        "| time |  |  | left out | slow |",
        "| A takes it | `b.*.qkv` (2), `c` | beit_a |",
        "- `inplace=False`: vit_c",
        "- net: refused: ValueError: none",
        "- odd: wrong: 0.25 in a.weight",
    ]:
        assert line in lines, line
    assert "How many instances: vit_b (2)." in text
    assert "Conv2d 2;" in text
    assert lines.index("## timm") < lines.index("## transformers")
    assert "8 models are" in text.replace("\n", " ")


def test_the_committed_page_is_that_of_the_committed_results(script):
    matrix = script("matrix")
    result = json.loads(matrix.JSON.read_text())
    situations = json.loads(matrix.JSON.with_name("situations.json").read_text())
    assert matrix.MARKDOWN.read_text() == script("page").page(result, situations)
