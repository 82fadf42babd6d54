"""The benchmarks still run and their answers are right; what is timed here does not matter."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from scripts import need_triton_interpreter

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "benchmarks"


@pytest.fixture
def from_benchmarks(monkeypatch):
    """Import a module of the folder of benchmarks."""
    monkeypatch.syspath_prepend(ROOT)
    return lambda name: importlib.import_module(f"benchmarks.{name}")


def gpu_suite(*arguments):
    command = [str(FOLDER / "gpu" / "suite.sh"), *map(str, arguments)]
    environment = {**os.environ, "PYTHON": sys.executable}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


def test_benchmarks_run_on_their_smallest_shapes():
    command = [sys.executable, "-m", "pytest", str(FOLDER), "-o", "python_files=bench_*.py"]
    command += ["-k", "small", "--benchmark-disable", "-q", "-p", "no:cacheprovider"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert " passed" in result.stdout


def test_the_gpu_suite_runs_dry(tmp_path, from_benchmarks):
    need_triton_interpreter()
    done = gpu_suite(tmp_path, "--dry-run")
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "gpu.json").read_text())
    sections = ["correctness", "sanitizer", "graph", "ceilings", "kernels", "steps", "methods"]
    assert all("seconds" in result[section] for section in sections)
    assert result["correctness"]["checked"] == 15  # dtypes x (shapes x kinds + tokens)
    bars = from_benchmarks("bars").GPU_BARS
    assert set(result["ratios"]) == {key for key in bars if "6.7B" not in key}
    assert "mean nothing" in done.stdout
    with pytest.raises(ValueError, match="dry run"):
        from_benchmarks("summarize").gpu_table(result)
    measured = from_benchmarks("summarize").gpu_table({**result, "dry_run": False})
    assert [bar.what in measured for bar in bars.values()].count(False) == 1


@pytest.fixture
def gpu_suite_here(monkeypatch, from_benchmarks):
    """Run the GPU suite in this process, with the arguments of its command."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["suite", *map(str, arguments)])
        from_benchmarks("gpu.suite").main()

    return run


def test_one_section_of_the_gpu_suite_leaves_the_others_as_they_were(tmp_path, gpu_suite_here):
    pytest.importorskip("triton")
    (tmp_path / "gpu.json").write_text(json.dumps({"kernels": {"rows": []}}))
    gpu_suite_here(tmp_path, "--dry-run", "--sections", "ceilings")
    result = json.loads((tmp_path / "gpu.json").read_text())
    assert result["kernels"] == {"rows": []}
    assert result["ceilings"]["read_gb_per_s"] > 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="here it would run")
def test_the_gpu_suite_wants_a_gpu(tmp_path):
    done = gpu_suite(tmp_path)
    assert done.returncode == 1
    assert "no GPU is visible to torch" in done.stderr


def test_the_gpu_suite_wants_the_names_of_sections(tmp_path, gpu_suite_here, capsys):
    pytest.importorskip("triton")
    with pytest.raises(SystemExit, match="2"):
        gpu_suite_here(tmp_path, "--sections", "cielings")
    assert "no section 'cielings'" in capsys.readouterr().err


def test_the_ratios_of_sizes_where_plain_pytorch_is_left_out(tmp_path, from_benchmarks):
    pytest.importorskip("triton")
    site = {"dtype": "bfloat16", "forward_gb_per_s": 3000, "backward_gb_per_s": 3200}
    rows = [
        {**site, "megabytes": 19, "step_vs_eager": 10, "fake_quant_vs_torch": 1},
        {**site, "megabytes": 134, "step_vs_eager": 60, "fake_quant_vs_torch": 3},
        {**site, "megabytes": 537, "fake_quant_vs_torch": 2},
    ]
    ceilings = {"read_gb_per_s": 4000, "copy_gb_per_s": 4000}
    measured = {"kernels": {"rows": rows}, "ceilings": ceilings}
    assert from_benchmarks("gpu.suite").ratios(measured) == {
        "forward_vs_read": 0.75,
        "backward_vs_copy": 0.8,
        "step_vs_eager": 60,
        "fake_quant_vs_torch": 2,
    }


def test_files_are_exported_checked_and_timed(from_benchmarks, monkeypatch):
    script = from_benchmarks("deploy.onnx_latency")
    monkeypatch.setattr(script, "COVERAGES", ("full",))
    monkeypatch.setattr("quanttune.deploy.latency.SHORTEST", 0)
    found = script.vit(small=True)
    assert found["inputs"] == {"x": [8, 3, 32, 32]}
    # patches, qkv, two of attention, its output, two of the feed-forward, head
    assert found["products"] == {
        "float": {"integer": 0, "float": 8},
        "full": {"integer": 8, "float": 0},
    }
    for threads in ("1", "2"):
        assert found["latency"][threads]["float"]["speed"] == 1
    assert found["bytes"]["full"] < 0.4 * found["bytes"]["float"]


def test_bars_of_onnx_files_and_their_table(from_benchmarks):
    script = from_benchmarks("deploy.onnx_latency")
    speeds = {"float": {"speed": 1}, "full_no_softmax": {"speed": 1.2}, "full": {"speed": 1.4}}
    cosines = {"simulation": 0.94, "noise": 0.938, "onnxruntime": 0.931}
    vit = {"latency": {"1": speeds}, "bytes": {"float": 8, "full_no_softmax": 4, "full": 2}}
    minilm = {
        **vit, "cosine": {"full_no_softmax": cosines, "full": {**cosines, "onnxruntime": 0.926}}
    }  # fmt: skip
    result = {"vit": vit, "minilm": minilm}
    assert list(script.missed(result)) == [
        "vit_speed_1 full_no_softmax: 1.20x, bar ≥ 1.3x",
        "minilm_bytes full_no_softmax: 0.50x, bar ≤ 0.4x",
        "minilm cosine, full: 0.014 from the simulation's, bar 0.01",
    ]
    lines = from_benchmarks("summarize").onnx_table(result).splitlines()
    assert lines[0] == "| W8A8 | full_no_softmax | full | linear | bar |"
    assert lines[2].endswith("| 1.20x | 1.40x |  | ≥ 1.3x |")
    assert lines[5].endswith("| 0.50x | 0.25x |  | ≤ 0.4x |")
    assert lines[-1] == "| its cosine, in ONNX Runtime | 0.9310 | 0.9260 |  |  |"
    assert not list(script.missed({"vit": {**vit, "latency": {}}, "minilm": None}))


def test_the_tables_of_methods_have_a_row_for_each_way_and_a_column_for_each_arm(from_benchmarks):
    def row(seed, arm, coverage, weight_bits, methods, value):
        bits, calibrator = (32, "none") if coverage == "none" else (8, "minmax")
        row = {"seed": seed, "arm": arm, "coverage": coverage, "weight_bits": weight_bits}
        return row | {"bits": bits, "calibrator": calibrator, "methods": methods, "value": value}

    rows = [
        row(0, "base", "none", 32, [], 1.0),
        row(0, "base", "linear", 4, ["repq", "erq"], 0.5),
        row(0, "base", "linear", 4, [], 0.25),
        *(row(seed, "detached", "linear", 4, ["gptq"], 0.7 + 0.1 * seed) for seed in (0, 2)),
        row(0, "base", "full_no_softmax", 8, [], 0.125),
    ]
    text = from_benchmarks("accuracy.tables").methods_section(
        "x", {"metric": "cosine", "rows": rows}
    )
    assert "## Methods on x: cosine" in text
    assert "Float: base 1.000." in text
    linear, full = text.index("Coverage linear"), text.index("Coverage full_no_softmax")
    lines = [line.split(" | ") for line in text[linear:full].splitlines() if line.startswith("| ")]
    table = {line[0].strip("| "): [cell.strip("| ") for cell in line[1:]] for line in lines}
    assert table[""] == ["W4A8 base", "W4A8 detached"]
    assert table["repq + erq"] == ["**0.500**", "-"]
    assert table["minmax"] == ["0.250", "-"]
    assert table["gptq"] == ["-", "**0.800 ±0.141**"]
    assert "percentile" not in table  # no row is of it
    assert "**0.125**" in text[full:]


def test_the_table_of_smollm2_has_the_float_model_of_the_same_rows_beside(from_benchmarks):
    rows = [
        {"seed": seed, "arm": arm, "split": split, "way": way, "perplexity": value,
         "last_token_accuracy": 50.04}
        for seed, arm, split, way, value in (
            (0, "base", "validation", "float", 20.0), (0, "base", "validation", "rotate", 30.0),
            (0, "base", "test", "float", 10.0), (0, "base", "test", "rotate", 11.0),
            (1, "base", "test", "rotate", 13.0), (0, "paper", "test", "float", 10.5),
        )
    ]  # fmt: skip
    tables = from_benchmarks("accuracy.tables")
    text = tables.ways_section("SmolLM2", {"caveats": ["A word."], "rows": rows})
    text += tables.language_rivals_section(
        "SmolLM2", {"libraries": {"torchao": "1.2"}, "rows": [
            {"library": "torchao", "setting": "fast", "activations": "dynamic, per token",
             "zero_points": True, "perplexity": 12.004, "last_token_accuracy": 49.96},
            {"library": "other", "setting": "slow", "activations": "static", "zero_points": False,
             "reason": "TypeError"},
        ]},
    )  # fmt: skip
    assert "- A word." in text
    assert "| validation, base: rotate | 30.00 | 1.50x | 50.0 |" in text
    assert "| test, base: rotate | 12.00 ±1.41 | 1.20x | 50.0 ±0.0 |" in text
    assert "| test, paper: float | 10.50 | 1.05x | 50.0 |" in text
    assert "| torchao 1.2, fast (dynamic, per token, zero points) | 12.00 | 50.0 |" in text
    assert "| other , slow (static) | TypeError | - |" in text
    ways = from_benchmarks("accuracy.ways").ways()
    # floats, widths, coverages, without a prefix and behind one, remedies
    assert len(ways) == 2 + 8 * 5 * 2 * 37 + 5  # and what is done behind them
    assert ways["W4A8 all but sums: rotate"] == {
        "weight_bits": 4, "coverage": "full_no_softmax", "residual": False, "methods": ["rotate"],
    }  # fmt: skip
    assert ways["kept prefix; float"] is None


def test_the_table_of_whispers_weights_has_a_row_per_window(from_benchmarks):
    window = {
        "seconds": 30, "rows": 16, "equal_transcripts": 15, "tokens": 700,
        "largest_state": 20.0, "largest_difference": 0.002,
    }  # fmt: skip
    text = from_benchmarks("accuracy.tables").whisper_weights_section(
        {"ctranslate2": "4.8.5", "windows": [window]}
    )
    assert "CTranslate2\n4.8.5" in text
    assert "| 30 s | 15 of 16 | 700 | 1.0e-04 |" in text


def test_the_table_of_models_has_test_rows_of_the_base_and_of_one_arm(from_benchmarks):
    tables = from_benchmarks("accuracy.tables")
    measured = {"smollm2": {"rows": []}, "whisper": {"rows": []}}
    others = [("base", "test", 0), ("detached", "test", 100)]
    others += [("base", "validation", 200), ("paper", "test", 300)]
    for number, shown in enumerate(tables.SHOWN_MODELS):
        rows, ways = measured[shown.task]["rows"], ("nothing", "mse", shown.remedy)
        for way in ("float", *(f"W8A8 {shown.coverage}: {x}" for x in ways)):
            for arm, split, more in others:
                row = {"arm": arm, "split": split, "way": way}
                if not any(row.items() <= known.items() for known in rows):
                    rows.append(row | {shown.metric: number + more + len(way) / 100})
    found = [{"perplexity": 7.0}, {"perplexity": 6.0}, {"reason": "no"}]
    rivals = {"smollm2": {"rows": found}, "whisper": {"rows": [{"word error rate": 3.5}]}}
    first, second, third, last = tables.models_table(measured, rivals).splitlines()[2:]
    assert first == "| SmolLM2-135M, perplexity, linear | 0.05 | 0.20 | 0.16 | 6.00 | 0.60 |"
    assert second.split(" | ")[1:5] == ["0.05", "1.24", "1.20", ""]
    name = "| Whisper tiny.en, words wrong, %, linear inputs |"
    assert third == f"{name} 2.05 | 2.27 | 2.23 | 3.50 | 102.27 |"
    assert last.split(" | ")[1:] == ["2.05", "3.24", "3.20", "", "103.24 |"]


def test_the_table_of_refits_has_means_and_says_of_how_many_seeds(from_benchmarks):
    arm = {"steps": 240, "refit": 0.25, "learning_rate": 4e-4}
    rows = [
        {"seed": seed, "arm": "both", **arm, "finish_steps": 120, "finish_bits": [8, 6], **found}
        for seed, values in enumerate([(0.9, 0.7, 0.5), (0.8, 0.6, 0.4)])
        for found in (
            {"bits": 32, "way": "none", "value": values[0]},
            {"bits": 8, "way": "minmax", "value": values[1]},
            *([{"bits": 6, "way": "minmax", "value": values[2]}] if seed else []),
        )
    ]
    rows.append({**rows[0], "arm": "base", "refit": None, "learning_rate": 0.0})
    rows.append({**rows[-1], "bits": 8, "way": "percentile", "value": 0.25})
    measured = {"task": "minilm", "rows": rows}
    table = from_benchmarks("accuracy.tables").refit_table(measured).splitlines()
    both = "| both | 240 | 0.0004 | 0.25 | 120 (8, 6) | minmax | 2 |"
    assert table[2] == f"{both} 0.850 ±0.071 | 0.650 ±0.071 | 0.400 |"
    assert len(table) == 4
    assert table[3].startswith("| base |  |  |  |")
    assert table[3].endswith("| percentile | 1 | 0.900 | 0.250 |  |")
    only = from_benchmarks("accuracy.tables").refit_table(measured, ["percentile"])
    assert only.splitlines()[2:] == table[3:]


def test_refits_go_on_where_they_were_stopped(from_benchmarks, monkeypatch):
    refitting = from_benchmarks("accuracy.refitting")

    class Job:
        def __init__(self, seed):
            self.prepared = 0

        def prepare(self, arm, on_step):
            self.prepared += 1
            return torch.nn.Sequential(torch.nn.Linear(3, 3))

        def calibration(self):
            return [torch.ones(2, 3)]

        def evaluate(self, model, split):
            return float(split == "test")

    monkeypatch.setattr(refitting, "recipe", lambda task: Job)
    monkeypatch.setattr(refitting, "WAYS", {"minilm": {"minmax": {}}})
    monkeypatch.setattr(refitting, "BITS", {"minilm": (8, 6)})
    arm = refitting.FINISHED
    rows = list(refitting._rows("minilm", 0, 5, arm, "test", []))
    assert [(row["bits"], row["way"]) for row in rows] == [
        (32, "none"), (8, "minmax"), (6, "minmax"),
    ]  # fmt: skip
    assert {row["value"] for row in rows} == {1.0}
    again = list(refitting._rows("minilm", 0, 5, arm, "test", rows[:2]))
    assert again == rows[2:]
    assert refitting._job("minilm", 5, 0).prepared == 2
    assert not list(refitting._rows("minilm", 0, 5, arm, "test", rows))
    assert not list(refitting._rows("minilm", 1, 5, refitting.REFIT, "test", []))
    assert refitting._job("minilm", 5, 0).prepared == 2
    refitting._job.cache_clear()


def test_the_table_of_runtimes_joins_the_widths(from_benchmarks):
    cell = {"model": "ViT", "shapes": "static", "products": 9, "noise": 0.5, "coverage": "full"}
    rows = [
        {**cell, "bits": bits, "act_dtype": "int8", "runtimes": {
            "onnxruntime": {"integer": integer, "cosine": 1},
            "openvino": {"integer": 9, "cosine": 0.9},
            "onnxruntime-web": {"cosine": bits / 10},
        }}
        for bits, integer in ((6, 8), (7, 9), (8, 9))
    ]  # fmt: skip
    key = {"model": "ViT", "coverage": "full", "shapes": "static", "threads": 2}
    key["runtime"] = "openvino"
    timings = {f"full-{bits}-int8": {"speed": bits / 4} for bits in (8, 7, 6)}
    measured = {"rows": rows, "times": [{**key, "timings": timings}]}
    lines = from_benchmarks("deploy.runtime_tables").runtimes_table(measured).splitlines()[2:]
    found = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert found == [
        ["ViT", "ONNX Runtime", "int8", "static", "9, 9, 8 of 9", "1.0000", "0.5000",
         "0.8000, 0.7000, 0.6000", "", ""],
        ["ViT", "OpenVINO", "int8", "static", "9 of 9", "0.9000", "0.5000", "", "",
         "2.00x, 1.75x, 1.50x"],
    ]  # fmt: skip


def test_the_table_of_linear_files_has_those_of_nncf_beside_ours(from_benchmarks):
    key = {"model": "ViT", "coverage": "linear", "shapes": "static", "threads": 2}
    ours, nncf = {"linear-8-int8": {"speed": 2}}, {"nncf": {"speed": 1.5}}
    in_onnx_runtime = {"linear-8-int8": {"speed": 1.75}, "linear-8-cpu": {"speed": 1.9}}
    cosines = {"cosine_to_float": {"linear-8-int8": 0.9, "nncf": 0.8}}
    times = [
        {**key, "runtime": "onnxruntime", "timings": in_onnx_runtime},
        {**key, "runtime": "openvino", "timings": ours | nncf, **cosines},
    ]
    alone = {"runtime": "openvino", "timings": ours, "cosine_to_float": {"linear-8-int8": 0.9}}
    times += [{**key, **other, "threads": 3} for other in (times[0], alone)]
    lines = from_benchmarks("deploy.runtime_tables").linear_table({"times": times}).splitlines()[2:]
    found = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert found == [
        ["ViT", "static", "2", "1.75x", "1.90x", "2.00x", "1.50x", "0.9000", "0.8000"],
        ["ViT", "static", "3", "1.75x", "1.90x", "2.00x", "", "0.9000", ""],
    ]


def test_the_folder_of_results_is_there_before_anything_is_measured(from_benchmarks, tmp_path):
    parser = from_benchmarks("arguments").of_folder("What it does.")
    options = parser.parse_args(["--out", str(tmp_path / "new" / "folder")])
    assert options.out == tmp_path / "new" / "folder"
    assert options.out.is_dir()
