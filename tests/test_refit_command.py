"""`quanttune refit`: the folder holds what the library makes of the same rows."""

import json

import pytest
import torch
import transformers
from cases import LOADERS, bert_case, opt_case, run, vit_case
from oracle import quiet

import quanttune as qt

pytestmark = quiet


@pytest.mark.parametrize("case", [bert_case, opt_case, vit_case])
def test_the_folder_holds_what_the_library_makes(case, tmp_path, cache):
    data, rows, batch = case(tmp_path)
    loader = getattr(transformers, LOADERS[case])
    tokens = 5 if case is opt_case else 16
    arguments = ["--data", tmp_path / data, "--tokens", tokens, "--clamp", 2, "--batch-size", rows]
    out, file = tmp_path / "out", tmp_path / "a.json"
    said = run("refit", tmp_path / "model", *arguments, "--out", out, "--json", file).output
    assert f"refitted on {rows} rows" in said
    assert json.loads(file.read_text())["clamp"] == 2
    expected = loader.from_pretrained(tmp_path / "model").eval()
    start = {name: value.clone() for name, value in expected.state_dict().items()}
    qt.refit(expected, [batch], clamp=2.0)
    found = loader.from_pretrained(out).state_dict()
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6)
    assert any(not torch.equal(value, start[name]) for name, value in found.items())


def test_a_dry_run_and_what_is_refused(tmp_path, cache):
    data, *_ = bert_case(tmp_path)
    model, arguments = tmp_path / "model", ["--data", tmp_path / data, "--out", tmp_path / "out"]
    assert "to be refitted" in run("refit", model, *arguments, "--dry-run").output
    assert not (tmp_path / "out").exists()
    run("calibrate", model, "--data", tmp_path / data, "--out", tmp_path / "w8a8")
    with pytest.raises(ValueError, match="is quantized already: give the float model"):
        run("refit", tmp_path / "w8a8", *arguments)
    with pytest.raises(FileNotFoundError, match=r"nowhere\.csv"):
        run("refit", model, "--data", tmp_path / "nowhere.csv", "--out", tmp_path / "out")
