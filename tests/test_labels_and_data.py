"""Names of labels, data and models, as the verbs take them or refuse them."""

import json

import pytest
from cases import opt_case, run, tune, vit_case, write_csv
from oracle import quiet
from safetensors.torch import load_file, save_file

pytestmark = quiet
# ------------------------------------------------------------------ names of labels


def names_in(folder):
    return json.loads((folder / "model" / "config.json").read_text())["id2label"]


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (["w", "o", "r", "d", "s"], {"0": "d", "1": "o", "2": "r", "3": "s", "4": "w"}),
        ([1, 2, 3, 4, 5], {"0": "1", "1": "2", "2": "3", "3": "4", "4": "5"}),  # as many as before
        ([1.0, 0.0], {f"{i}": f"LABEL_{i}" for i in range(5)}),  # numbers of its classes
        (["bad", "good"], {"0": "bad", "1": "good"}),
        ([7, 10], {"0": "7", "1": "10"}),
        ([0, 1, 2, 3, 4], {f"{i}": f"LABEL_{i}" for i in range(5)}),  # numbers are no names
    ],
)
def test_the_model_keeps_the_names_of_the_labels(labels, expected, command, tmp_path):
    rows = [(f"w{i} w1", labels[i % len(labels)]) for i in range(10)]
    write_csv(tmp_path / "data.csv", ("text", "label"), rows)
    assert tune(*command).exit_code == 0
    assert names_in(tmp_path / "run") == expected
    outcome = tmp_path / "a.json"
    measure = ["evaluate", tmp_path / "run" / "model", "--json", outcome]
    assert run(*measure, "--data", tmp_path / "data.csv").exit_code == 0
    whole = json.loads(outcome.read_text())["float"]["accuracy"]
    # one label at a time: what is right of all rows is the sum of what is right of each label's
    right = 0.0
    for label in labels:
        some = [row for row in rows if row[1] == label]
        write_csv(tmp_path / "one.csv", ("text", "label"), some)
        run(*measure, "--data", tmp_path / "one.csv")
        right += json.loads(outcome.read_text())["float"]["accuracy"] * len(some)
    assert whole == pytest.approx(right / len(rows))


def test_other_names_are_refused_where_a_model_is_measured(command, tmp_path):
    write_csv(tmp_path / "data.csv", ("text", "label"), [("w1", "no"), ("w2", "yes")] * 4)
    assert tune(*command).exit_code == 0
    write_csv(tmp_path / "data.csv", ("text", "label"), [("w1", "zno"), ("w2", "yes")] * 4)
    with pytest.raises(ValueError, match=r"\(yes, zno\) are not those of the model \(no, yes\)"):
        run("evaluate", tmp_path / "run" / "model", "--data", tmp_path / "data.csv")


def test_numbers_of_named_classes_are_said(command, tmp_path):
    write_csv(tmp_path / "data.csv", ("text", "label"), [("w1", "no"), ("w2", "yes")] * 4)
    assert tune(*command).exit_code == 0
    write_csv(tmp_path / "data.csv", ("text", "label"), [("w1", 0), ("w2", 1)] * 4)
    output = run("evaluate", tmp_path / "run" / "model", "--data", tmp_path / "data.csv").output
    assert "labels are taken by their numbers: 0 as no, 1 as yes" in output


# ------------------------------------------------------------------ data and models


@pytest.mark.parametrize("data", ["nosuch.csv", "./nosuch", "deep/nosuch.txt"])
def test_a_missing_file_is_called_missing(data, command):
    with pytest.raises(FileNotFoundError, match=f"there is no file or folder {data}$"):
        tune(*command, "--data", data)


def test_a_dataset_that_cannot_be_had_is_one_line(command):
    with pytest.raises(FileNotFoundError, match="file or folder nosuch, and no dataset"):
        tune(*command, "--data", "nosuch")


@pytest.mark.parametrize("model", ["nosuch", "./nosuch", "some/nosuch"])
def test_a_missing_model_is_one_line(model, command):
    with pytest.raises(ValueError, match=f"^there is no model {model}: [^\n]*$"):
        tune(model, *command[1:])


def test_the_folder_of_a_run_is_no_model(command, tmp_path):
    assert tune(*command).exit_code == 0
    with pytest.raises(ValueError, match=r"folder of a run: its model is .*run/model"):
        tune(tmp_path / "run", *command[1:], "--out", tmp_path / "again")


def test_a_folder_of_images_needs_no_split(tmp_path, cache):
    vit_case(tmp_path)
    images, model = tmp_path / "images", tmp_path / "model"
    tune(model, "--data", images, "--out", tmp_path / "run", "--steps", 1, "--batch-size", 2)
    run("calibrate", model, "--data", images, "--out", tmp_path / "quantized")
    assert "4 rows" in run("evaluate", tmp_path / "quantized", "--data", images).output
    for label in ("ant", "cat"):  # a split more
        (images / "test" / label).mkdir(parents=True)
    with pytest.raises(ValueError, match="no split dev, but train"):
        run("evaluate", tmp_path / "quantized", "--data", images, "--split", "dev")


def test_a_line_of_a_text_file_is_a_row(tmp_path, cache):
    opt_case(tmp_path)
    (tmp_path / "book.TXT").write_text("w1 w2 w3\n\n   \nw4 w5\n")
    rows = [{"text": "w1 w2 w3"}, {"text": "w4 w5"}]
    (tmp_path / "book.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = []
    for name in ("book.TXT", "book.jsonl"):
        options = ["--data", tmp_path / name, "--tokens", 4, "--json", tmp_path / "a.json"]
        run("evaluate", tmp_path / "model", *options)
        found.append(json.loads((tmp_path / "a.json").read_text()))
    assert found[0]["float"] == found[1]["float"]
    assert found[0]["rows"] == 2  # of 4 tokens: both texts with their ends are 11


def test_weights_that_a_file_lacks_are_not_random(command, bert):
    state = load_file(bert / "model.safetensors")
    del state["bert.encoder.layer.0.output.dense.weight"]
    save_file(state, bert / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks weights of BertFor.*layer\.0\.output\.dense\.w"):
        run("evaluate", bert, *command[1:3])
    assert "drawn at random: bert.encoder.layer.0.output" in tune(*command, "--dry-run").output


def test_the_options_of_attach_reach_it(command, tmp_path):
    options = ["--loss", "hinge_ratio", "--observe-every", 2]
    assert tune(*command, *options).exit_code == 0
    tuning = json.loads((tmp_path / "run" / "config.json").read_text())["settings"]["tuning"]
    assert tuning["loss"] == "hinge_ratio"
    assert tuning["observe_every"] == 2
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    first, second = map(json.loads, lines)
    assert first["loss_out"] == second["loss_out"]  # observed at the first step only
