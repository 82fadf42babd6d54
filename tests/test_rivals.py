"""The bench of other libraries: its rows, its metric and its tables, without any of them."""

import importlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "epyc-2-cores"


@pytest.fixture
def bench(monkeypatch):
    """Import the modules of the bench."""
    monkeypatch.syspath_prepend(ROOT)
    names = ("rows", "tables", "ways", "of_torch", "of_onnx", "__main__")
    return {name: importlib.import_module(f"benchmarks.rivals.{name}") for name in names}


@pytest.fixture
def rows(bench, tmp_path):
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.randint(9, (count, 4), generator=generator)
        for name, count in (("calibration", 40), ("validation", 3), ("test", 300))
    }
    for split in ("validation", "test"):
        tensors[f"{split}_embeddings"] = embed(tensors[split])
    save_file(tensors, tmp_path / "rows.safetensors")
    return bench["rows"].Rows(tmp_path / "rows.safetensors")


def embed(ids):
    return torch.stack([ids[:, 0] + 1.0, ids[:, 1] - 2.0], 1)


def test_the_float_model_has_cosine_one_and_another_its_angle(rows):
    assert rows.cosine(embed, "test") == pytest.approx(1, abs=1e-6)
    assert rows.cosine(lambda ids: -2 * embed(ids), "test") == pytest.approx(-1, abs=1e-6)
    turned = torch.tensor([[0.6, 0.8], [-0.8, 0.6]])  # by the angle whose cosine is .6
    assert rows.cosine(lambda ids: embed(ids) @ turned, "validation") == pytest.approx(0.6)


def test_calibration_has_every_row_once_whatever_the_batch(rows):
    for batch in (1, 32, 64):
        parts = rows.calibration(batch)
        assert torch.cat(parts).shape == (40, 4)
        assert {len(part) for part in parts[:-1]} <= {batch}
    assert torch.equal(torch.cat(rows.calibration(1)), torch.cat(rows.calibration(64)))


def test_a_way_that_fails_is_a_row_with_its_reason(bench, rows, monkeypatch, capsys):
    monkeypatch.setattr(bench["__main__"], "packaged_model", str)
    monkeypatch.setattr(bench["__main__"], "load_encoder", lambda path: None)
    ways = bench["ways"]
    good = ways.Way("a", "b", lambda model, rows: ways.Built(embed, 1.0, {"MatMul": 2}),
                    "linear", "static, per tensor", False)  # fmt: skip

    def fails(model, rows):
        raise RuntimeError("no such operator\nat line 3")

    row = bench["__main__"].measured(good, rows)
    assert row["test"] == pytest.approx(1)
    assert row["rounded"] == {"MatMul": 2}
    failed = bench["__main__"].measured(replace(good, build=fails), rows)
    assert failed["reason"] == "RuntimeError: no such operator"
    assert "test" not in failed
    assert bench["__main__"]._is_known(good, [row])
    assert not bench["__main__"]._is_known(replace(good, bits=(8, 6)), [row])
    assert "at line 3" in capsys.readouterr().err


def row(library, scope, bits, validation, test, activations="static, per tensor", zero=False):
    facts = {"library": library, "setting": "s", "scope": scope, "activations": activations}
    width = {"weight_bits": bits, "bits": bits, "zero_points": zero, "weights": "per channel"}
    return {**facts, **width, "validation": validation, "test": test, "megabytes": None}


def test_a_table_chooses_rivals_on_validation_rows_and_counts_who_rounds_more(bench):
    rivals = {
        "rows": [
            row("lucky", "linear", 8, 0.5, 0.99),
            row("chosen", "linear", 8, 0.8, 0.75, "dynamic, per token"),
            row("all", "everything", 8, 0.6, 0.625),
            {**row("broken", "everything", 8, 1, 1), "reason": "x", "test": None},
        ]
    }
    del rivals["rows"][-1]["test"]
    refit = {"steps": 90, "way": "minmax", "bits": 8}
    refits = {
        "rows": [
            {**refit, "arm": "refit", "learning_rate": 0.0, "value": 0.5},
            {**refit, "arm": "detached", "learning_rate": 1e-3, "value": 0.9},
            {**refit, "arm": "detached", "learning_rate": 1e-3, "value": 0.8},
            {**refit, "arm": "refit, alpha = 0", "learning_rate": 1e-3, "value": 1.0},
        ]
    }
    method = {"arm": "base", "weight_bits": 8, "bits": 8, "calibrator": "minmax"}
    methods = {"rows": [{**method, "coverage": "linear", "methods": ["repq"], "value": 0.7}]}
    text = bench["tables"].decision_section(rivals, refits, methods)
    lines = [line.split(" | ") for line in text.splitlines() if "W8A8" in line]
    cells = [[cell.strip("| ") for cell in line] for line in lines]
    tuned = "0.850 (detached, 90 steps; minmax)"
    assert cells[0][2:] == ["0.750 (chosen: s)", "0.700 (base; repq)", tuned]
    assert cells[1][2:] == ["0.625 (all: s)", "0.700 (base; repq)", tuned]
    assert cells[2][2:] == ["0.625 (all: s)", "0.500 (refit; minmax)", tuned]
    assert cells[3][2] == "0.625 (all: s)"  # of plain ones: chosen by validation rows still
    assert "not measured yet" not in text
    text = bench["tables"].decision_section({**rivals, "missing": {"x": 2}}, refits, methods)
    assert (
        "not measured yet, so the rivals' best may be better than what stands here:** x (2)."
        in text
    )


def test_the_page_has_the_tables_that_the_committed_results_give(bench):
    page = (ROOT / "docs" / "results.md").read_text()
    sections = bench["tables"].rival_sections(RESULTS, RESULTS.with_name("xeon-2-cores"))
    assert len(sections) == 2
    for section in sections:
        assert section in page
    for found in json.loads((RESULTS / "rivals-minilm.json").read_text())["rows"]:
        if found["bits"] == 32:
            assert found["test"] == pytest.approx(1, abs=1e-5)


def test_no_library_is_imported_before_it_is_used(bench):
    ways = [*bench["of_torch"].ways(), *bench["of_onnx"].ways()]
    names = [(way.library, way.setting, way.bits) for way in ways]
    assert len(set(names)) == len(names)
    assert {way.scope for way in ways} <= {"", *bench["ways"].SCOPES}
