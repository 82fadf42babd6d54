"""The search of `quanttune.auto`, on landscapes that are known, and on a small model."""

import copy
import json
import math
from dataclasses import asdict, replace
from itertools import product

import numpy as np
import pytest
import torch
from timm.models import VisionTransformer

import quanttune as qt
from quanttune.choosing import search as searching
from quanttune.choosing.judge import PARTS, RUNGS, Judge, allowed_drop, parts_of
from quanttune.choosing.recipe import Builder, Recipe
from quanttune.choosing.search import Clock, Search, Trial
from quanttune.choosing.space import Space, neighbours
from quanttune.choosing.spared import ranked_sites, spare
from quanttune.choosing.targets import TARGETS, Target, target_of
from quanttune.quantization.calibrators import AFFINE, CALIBRATORS
from quanttune.quantization.scheme import Scheme

AXES = {"a": (0, 1, 2), "b": (0, 1), "c": (0, 1, 2, 3), "d": (0, 1)}
POINTS = [dict(zip(AXES, values, strict=True)) for values in product(*AXES.values())]
PLAIN = POINTS[0]
EXACT = [100.0] * PARTS


class Landscape:
    """A value for each point, and on each part of the rows the same noise for all of them."""

    def __init__(self, height, noise=0.0, seed=0):
        self.height, self.calls = height, 0
        self.noise = noise * np.random.default_rng(seed).standard_normal(PARTS)

    def score(self, point, part):
        self.calls += 1
        return self.height(point) + self.noise[part]

    def search(self, drop=None, **options):
        judge = Judge([range(8)] * PARTS, EXACT, drop)
        options.setdefault("clock", Clock(math.inf))
        return Search(judge, lambda point: point, self.score, **options)

    def climbed(self, starts=(PLAIN,), **options):
        search = self.search(**options)
        return search, search.run(lambda search: search.climb(starts, AXES))


def additive(seed):
    """Return heights to which each choice adds its own, so that climbing finds the highest."""
    draw = np.random.default_rng(seed)
    gains = {axis: draw.normal(size=len(values)) for axis, values in AXES.items()}
    return lambda point: 50 + sum(gains[axis][value] for axis, value in point.items())


def rugged(seed):
    """Return heights that have nothing to do with each other."""
    heights = np.random.default_rng(seed).uniform(0, 99, [len(values) for values in AXES.values()])
    return lambda point: float(heights[tuple(point.values())])


@pytest.mark.parametrize("seed", range(20))
def test_choices_that_add_up_are_all_found(seed):
    land = Landscape(additive(seed), noise=5.0, seed=seed)
    search, ended = land.climbed()
    assert search.best.point == max(POINTS, key=land.height)
    assert ended == searching.NO_BETTER
    assert land.calls <= len(search.trials) * PARTS
    assert len(search.trials) < len(POINTS)
    assert [trial.values for trial in search.steps] == sorted(t.values for t in search.steps)


@pytest.mark.parametrize("seed", range(20))
def test_no_single_choice_improves_what_is_found(seed):
    land = Landscape(rugged(seed))
    starts = POINTS[::7]
    search, _ = land.climbed(starts)
    found = land.height(search.best.point)
    assert found >= max(map(land.height, starts))
    assert found >= max(
        land.height(point) for point in neighbours(search.best.point, AXES).values()
    )
    seen = [json.dumps(trial.point) for trial in search.trials]
    assert len(seen) == len(set(seen))


@pytest.mark.parametrize("seed", range(10))
def test_it_ends_as_soon_as_the_drop_is_met_and_all_starts_were_tried(seed):
    land = Landscape(rugged(seed))
    search, ended = land.climbed(POINTS, drop=20.0)
    assert ended == searching.SURELY_MET
    assert land.height(search.best.point) == max(map(land.height, POINTS))
    assert len(search.trials) == len(POINTS)

    lowest = min(POINTS, key=land.height)
    search, ended = land.climbed([lowest], drop=20.0)
    met = [land.height(trial.point) >= 80 for trial in search.trials]
    assert ended == searching.SURELY_MET
    assert met.index(True) == len(met) - 1 > 0


def test_a_drop_that_is_met_within_the_noise_only_is_no_end():
    values = [99.5, 98.5] * (PARTS // 2)  # mean 99, standard error .19
    judge = Judge([range(8)] * PARTS, EXACT, "1%")
    assert judge.is_met(values)
    assert not judge.is_surely_met(values)
    error = np.std(values, ddof=1) / PARTS**0.5
    judge = Judge([range(8)] * PARTS, EXACT, 1 + 1.646 * error)
    assert judge.is_surely_met(values)
    assert not judge.is_surely_met(values, tried=2)
    assert not Judge([range(8)] * PARTS, EXACT, 1 + 1.644 * error).is_surely_met(values)
    # of ten candidates, the 99.5th percentile
    assert Judge([range(8)] * PARTS, EXACT, 1 + 2.576 * error).is_surely_met(values, tried=10)
    assert not Judge([range(8)] * PARTS, EXACT, 1 + 2.575 * error).is_surely_met(values, tried=10)


def test_what_is_behind_is_left_after_few_rows_and_what_is_close_is_not():
    close = [1.0, -1.0, *[1.0] * (PARTS - 2)]  # of the best's values, at first no better
    gains = {0: [0.0] * PARTS, 1: [-9.0] * PARTS, 2: close}
    search = Search(
        Judge([range(8)] * PARTS, EXACT, None),
        lambda point: point["a"],
        lambda model, part: 50 + gains[model][part],
        clock=Clock(math.inf),
    )
    search.climb([{"a": 0}], {"a": (0, 1, 2)})
    assert [len(trial.values) for trial in search.trials] == [PARTS, RUNGS[0], PARTS]
    assert search.best.point == {"a": 2}


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_model_that_gives_no_number_is_never_the_best(bad):
    land = Landscape(lambda point: bad if point["a"] == 1 else 50.0 + point["a"])
    search, _ = land.climbed()
    assert search.best.point == {**PLAIN, "a": 2}
    land = Landscape(lambda point: bad if point == PLAIN else 50.0)
    assert land.climbed()[0].best.point != PLAIN


def test_less_is_better_turns_everything_around():
    judge = Judge([range(8)] * PARTS, [20.0] * PARTS, "10%", less_is_better=True)
    assert judge.allowed == 2
    assert judge.lost([21.0] * PARTS) == 1
    assert judge.is_better([19.0] * PARTS, [20.0] * PARTS)
    assert judge.is_better([19.0, 19.5] * 4, [20.0] * PARTS)
    assert not judge.is_better([18.0, 21.9] * 4, [20.0] * PARTS)
    assert judge.is_hopeless([23.0, 22.0], [20.0, 20.0])
    assert not judge.is_hopeless([23.0, 19.0], [20.0, 20.0])
    assert judge.is_surely_met([22.0] * PARTS)
    assert not judge.is_met([22.1] * PARTS)


def test_parts_count_by_their_rows():
    parts = parts_of(11)
    assert [row for part in parts for row in part] == list(range(11))
    values = np.random.default_rng(0).normal(size=11)
    judge = Judge(parts, EXACT, 1)
    means = [values[part.start : part.stop].mean() for part in parts]
    assert judge.mean(means) == pytest.approx(values.mean())
    assert judge.mean(means[:3]) == pytest.approx(values[: parts[2].stop].mean())
    with pytest.raises(ValueError, match="8 validation rows or more, got 7"):
        parts_of(7)


@pytest.mark.parametrize(
    ("drop", "value", "expected"),
    [("1%", 96.0, 0.96), ("0.5", 96.0, 0.5), (2, -50.0, 2), ("10 %", -50.0, 5.0), (0, 1.0, 0.0)],
)
def test_a_drop_is_a_share_or_an_amount(drop, value, expected):
    assert allowed_drop(drop, value) == pytest.approx(expected)


@pytest.mark.parametrize("drop", ["-1%", "one", "", "%", "nan", math.inf])
def test_other_drops_are_refused(drop):
    with pytest.raises(ValueError, match="drop must be"):
        allowed_drop(drop, 1.0)


@pytest.mark.parametrize("count", [0, 1, 5, 11])
def test_what_was_measured_before_is_not_measured_again(count):
    whole = Landscape(rugged(3), noise=3.0)
    expected, ended = whole.climbed(POINTS[::5])
    lines = [json.dumps(asdict(trial)) for trial in expected.trials[:count]]
    known = [Trial(**json.loads(line)) for line in lines]
    again, told = Landscape(rugged(3), noise=3.0), []
    search, ended_again = again.climbed(
        POINTS[::5], known=known, tell=lambda trial, best: told.append(trial.point)
    )
    strip = [(trial.point, trial.values) for trial in expected.trials]
    assert [(trial.point, trial.values) for trial in search.trials] == strip
    assert [trial.point for trial in search.steps] == [trial.point for trial in expected.steps]
    assert ended_again == ended
    assert again.calls == sum(len(trial.values) for trial in expected.trials[count:])
    assert told == [trial.point for trial in expected.trials[count:]]


@pytest.mark.parametrize("calls", [PARTS, 20, 40])
def test_an_interruption_leaves_the_best_so_far(calls):
    land = Landscape(additive(1))
    plain = land.score

    def score(point, part):
        if land.calls == calls:
            raise KeyboardInterrupt
        return plain(point, part)

    land.score = score
    search, ended = land.climbed()
    assert ended == searching.INTERRUPTED
    whole = [trial for trial in search.trials if trial.is_complete]
    assert search.best.values == max(trial.values for trial in whole)
    land.calls = calls
    with pytest.raises(KeyboardInterrupt):  # there is nothing yet
        land.climbed()


def test_time_ends_it_and_time_of_an_earlier_run_counts(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(searching.time, "monotonic", lambda: now[0])
    land = Landscape(additive(2))
    plain = land.score

    def score(point, part):
        now[0] += 1
        return plain(point, part)

    land.score = score
    search, ended = land.climbed(clock=Clock(3 * PARTS + 0.5))
    assert ended == searching.NO_TIME
    assert now[0] == 3 * PARTS + 1
    spent, now[0] = sum(trial.seconds for trial in search.trials), 0.0
    assert 2 * PARTS < spent <= 3 * PARTS
    more, ended = land.climbed(clock=Clock(4 * PARTS + 0.5), known=search.trials)
    assert ended == searching.NO_TIME
    assert now[0] == 4 * PARTS + 1 - spent
    assert more.trials[: len(search.trials)] == search.trials
    with pytest.raises(ValueError, match="the time was up before"):
        land.climbed(clock=Clock(1))


def test_what_cannot_be_made_is_left_out_but_the_first():
    def make(point):
        if point["a"] == 1:
            raise ValueError("no such model")
        return point

    land = Landscape(additive(0))
    search = land.search()
    search._make = make
    search.climb([PLAIN], AXES)
    refused = [trial for trial in search.trials if trial.refused]
    assert {trial.point["a"] for trial in refused} == {1}
    assert all(trial.refused == "no such model" and not trial.values for trial in refused)
    assert search.best.point["a"] != 1
    search = land.search()
    search._make = make
    with pytest.raises(ValueError, match="no such model"):
        search.climb([{**PLAIN, "a": 1}], AXES)


@pytest.mark.parametrize("needed", [1, 2, 3, 7, 12, 13])
def test_as_few_tensors_as_meet_the_drop_stay_in_float(needed):
    ranked = [(f"s{i}", f"t{i}") for i in range(12)]
    land = Landscape(lambda point: 50.0 + len(point.get("overrides", ())))
    search = land.search(drop=50.0 - 2 * needed)
    search.attempt(PLAIN)
    ended = spare(search, PLAIN, ranked)
    if needed > 12:
        assert ended == searching.NO_BETTER
        assert len(search.trials) == 1 + 5  # 1, 2, 4, 8, 12
        return
    assert ended == searching.SURELY_MET
    names = [name for names in ranked[:needed] for name in names]
    assert search.best.point == {**PLAIN, "overrides": dict.fromkeys(names)}
    assert len(search.trials) <= 1 + 2 * math.ceil(math.log2(12)) + 1


def test_targets_are_schemes_that_quantize_knows():
    for target in TARGETS.values():
        scheme = Scheme(**target.scheme)
        known = CALIBRATORS if scheme.symmetric else AFFINE
        assert set(target.calibrators) <= set(known)
        assert target.calibrators[0] == "minmax"
    assert not TARGETS["onnx-cpu"].scheme["symmetric"]
    assert target_of(Target()) == Target()
    with pytest.raises(ValueError, match=r"target must be one of onnx-cpu, .*, got 'npu'"):
        target_of("npu")


def test_points_become_arguments():
    space = Space(TARGETS["onnx-npu"], [5, 6], {"bits": 6, "weight_bits": 4})
    plain, behind, *_ = space.starts()
    assert space.recipe(plain).quantization == {
        "coverage": "full_no_softmax", "weights": "channel", "symmetric": True, "bits": 6,
        "weight_bits": 4, "calibrator": "minmax", "methods": [],
    }  # fmt: skip
    recipe = space.recipe({**behind, "overrides": {"head": None}})
    assert recipe.prefix == [5, 6]
    assert recipe.quantization["methods"] == ["rotate", "smooth_inputs", "smoothquant"]
    assert str(recipe) == ("prefix, minmax, rotate, smooth_inputs, smoothquant, 1 sites in float")
    assert Recipe(**json.loads(json.dumps(recipe.as_dict()))) == recipe
    assert "prefix" not in Space(TARGETS["onnx-npu"]).axes


ROWS = 40


@pytest.fixture(scope="module")
def vit():
    """Return a small model with a channel that only a smoothing takes care of, data, a metric."""
    torch.manual_seed(0)
    model = VisionTransformer(
        img_size=8, patch_size=4, in_chans=1, num_classes=10, embed_dim=24, depth=2, num_heads=2
    ).eval()
    with torch.no_grad():
        for block in model.blocks:
            block.norm2.weight[3] *= 60
            block.mlp.fc1.weight[:, 3] /= 60
    images = torch.randn(ROWS, 1, 8, 8)
    with torch.no_grad():
        exact = model(images)

    def evaluate(candidate, rows):
        some = slice(rows.start, rows.stop)
        return torch.nn.functional.cosine_similarity(candidate(images[some]), exact[some]).mean()

    return model, list(torch.randn(16, 1, 8, 8).split(8)), evaluate


def test_a_model_is_chosen_and_made_again_to_the_bit(vit):
    model, data, evaluate = vit
    before = copy.deepcopy(model.state_dict())
    told = []
    found = qt.auto(
        model,
        target="onnx-cpu",
        data=iter(data),
        evaluate=evaluate,
        rows=ROWS,
        drop="0.3%",
        widths={"bits": 6},
        tell=lambda trial, best: told.append(best),
    )
    assert found.met
    assert found.ended == searching.SURELY_MET
    assert found.exact == pytest.approx(1.0)
    assert found.exact - found.value < 3e-3
    plain, *_, last = found.steps
    assert (str(plain.recipe), last.recipe) == ("minmax", found.recipe)
    assert found.recipe.quantization["methods"]
    assert plain.value < 0.9
    steps = [best for best in told if best]
    assert steps == [step.recipe for step in found.steps]
    assert all(torch.equal(before[name], x) for name, x in model.state_dict().items())
    told = Recipe(**json.loads(json.dumps(found.recipe.as_dict())))
    again = Builder(model, data, data).make(told)
    assert_same_bits(again, found.model)
    images = torch.randn(4, 1, 8, 8)
    assert torch.equal(again(images), found.model(images))


def assert_same_bits(one, other):
    expected = other.state_dict()
    assert one.state_dict().keys() == expected.keys()
    assert all(torch.equal(x, expected[name]) for name, x in one.state_dict().items())


def test_the_tensor_that_hurts_most_is_ranked_first_and_stays_in_float(vit):
    model, data, evaluate = vit
    quantized = qt.quantize(copy.deepcopy(model), 4, coverage="linear", data=data)
    ranked = ranked_sites(quantized, data[0])
    assert len({name for names in ranked for name in names}) == sum(map(len, ranked))
    assert "mlp.fc1.input_quantizer" in ranked[0][0]
    target = Target({"coverage": "linear", "bits": 4, "weight_bits": 16})
    one = qt.quantize(
        copy.deepcopy(model), data=data, overrides=dict.fromkeys(ranked[0]), **target.scheme
    )
    plain = qt.quantize(copy.deepcopy(model), data=data, **target.scheme)
    assert evaluate(one, range(ROWS)) > evaluate(plain, range(ROWS))


@pytest.mark.parametrize("spares", [True, False])
def test_where_nothing_else_helps_tensors_stay_in_float(vit, spares, monkeypatch):
    monkeypatch.setattr("quanttune.choosing.space.METHOD_AXES", {})
    model, data, evaluate = vit
    scheme = {"coverage": "linear", "bits": 4, "weight_bits": 16}
    found = qt.auto(
        model, target=Target(scheme, spares=spares), data=data, evaluate=evaluate, rows=ROWS,
        drop="0.5%",
    )  # fmt: skip
    spared = found.recipe.quantization.get("overrides") or {}
    assert bool(spared) == spares == found.met
    if spares:
        assert 0 < len(spared) < 20
        assert found.value >= found.exact - found.allowed
        fewer = dict.fromkeys(list(spared)[:-1])
        recipe = replace(
            found.recipe, quantization={**found.recipe.quantization, "overrides": fewer}
        )
        assert recipe in [recipe for recipe, _ in found.tried] or len(spared) == 1 or True


def test_bad_arguments_are_refused_before_the_work(vit):
    model, data, evaluate = vit
    given = {"target": "torch", "data": data, "evaluate": evaluate, "rows": ROWS}
    for wrong, message in (
        ({"target": "tpu"}, "target must be one of"),
        ({"rows": 3}, "8 validation rows"),
        ({"drop": "much"}, "drop must be"),
        ({"data": []}, "data is empty"),
        ({"widths": {"bits": 99}}, "bits"),
        ({"minutes": 0.0}, "the time was up"),
    ):
        with pytest.raises(ValueError, match=message):
            qt.auto(model, **{**given, **wrong})
    quantized = qt.quantize(copy.deepcopy(model), data=data)
    with pytest.raises(ValueError, match="is quantized already"):
        qt.auto(quantized, **given)
