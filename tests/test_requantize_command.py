"""`quanttune requantize`: the folder holds what the library makes."""

import json

import pytest
import torch
import transformers
from cases import LOADERS, bert_case, run, vit_case
from oracle import quiet

import quanttune as qt

pytestmark = quiet


@pytest.mark.parametrize("case", [bert_case, vit_case])
def test_the_folder_holds_what_the_library_makes(case, tmp_path, cache):
    data, _, batch = case(tmp_path)
    model, folder, out = (tmp_path / name for name in ("model", "affine", "out"))
    run("calibrate", model, "--data", tmp_path / data, "--no-symmetric", "--out", folder)
    options = ["--symmetric", "--power-of-two", "--bits", 7, "--correct-weights"]
    said = run("requantize", folder, *options, "--out", out, "--json", tmp_path / "a.json").output
    assert "no data" in said
    numbers = json.loads((tmp_path / "a.json").read_text())
    assert numbers["summary"]["power_of_two"]
    assert numbers["quantization"]["bits"] == 7
    loader = getattr(transformers, LOADERS[case])
    inputs = {name: x for name, x in batch.items() if name != "labels"}
    expected = loader.from_pretrained(folder).eval()
    changes = {"symmetric": True, "power_of_two": True, "correct_weights": True}
    qt.requantize(expected, 7, example=inputs, **changes)
    found = loader.from_pretrained(out).eval()
    torch.testing.assert_close(found(**inputs).logits, expected(**inputs).logits)


def test_what_is_refused(tmp_path, cache):
    data, *_ = bert_case(tmp_path)
    model, out = tmp_path / "model", tmp_path / "out"
    with pytest.raises(ValueError, match="nothing is to change: give --bits"):
        run("requantize", model, "--out", out)
    with pytest.raises(ValueError, match="is not quantized: make it so by quanttune calibrate"):
        run("requantize", model, "--bits", 6, "--out", out)
    run("calibrate", model, "--data", tmp_path / data, "--out", tmp_path / "w8a8")
    with pytest.raises(ValueError, match="--weights must be one of channel, tensor, 128"):
        run("requantize", tmp_path / "w8a8", "--weights", "row", "--out", out)
    assert not out.exists()
