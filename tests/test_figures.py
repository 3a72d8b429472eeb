"""Figures of made-up runs: same bytes twice, every shape of run, nothing lost when a file is missing."""

import io
import re
import sys

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from clmae import figures
from clmae.config import UserError
from clmae.files import read_json, write_bytes, write_json, write_tensors


def film(learned, *, t=3, m=2, grid=(4, 4), size=(16, 16), c=3, seed=0):
    rng, n = np.random.default_rng(seed), grid[0] * grid[1]
    hidden = (rng.random((t, m, n)).argsort(2).argsort(2) < 0.75 * n).astype(np.uint8)
    return {
        "images": rng.integers(0, 256, (m, c, *size), dtype=np.uint8),
        "label": np.arange(m),
        "moments": np.arange(t),
        "pos": np.linspace(0, 1, t),
        "score": rng.random((t, m, n)) if learned else np.full((t, m, n), 0.5),
        "hidden": hidden,
        "prediction": rng.integers(0, 256, (t, m, c, *size), dtype=np.uint8),
        "mean_hidden": hidden.mean(1),
        "mean_score": np.full((t, n), 0.5),
    }


def toy_health(learned, pos):
    numbers = {
        "ratio": 0.75,
        "diversity": 1.0,
        "learned": 0.9 + 0.2 * pos,
        "random": 1.0,
        "gap": 0.9 + 0.2 * pos,
    }
    if learned:
        numbers |= {"entropy": 0.5, "bimodality": 0.7}
    said = ("alive" if pos > 0.5 else "undecided: 0.98 bits") if learned else "no masker"
    return {f"health.{name}": value for name, value in (numbers | {"verdict": said}).items()}


def history(learned, *, epochs=4, knn=True, health=True):
    records = []
    for e in range(1, epochs + 1):
        record = {
            "epoch": e,
            "step": 10 * e,
            "pos": e / epochs,
            "flops": 10**13 * e,
            "loss.mae.reconstruction": 1 / e,
        }
        if learned:
            record |= {"factor": 1 - 2 * e / epochs, "loss.masker.reconstruction": 0.5}
            record |= {f"loss.masker.{term}": 0.1 for term in ("gauss", "kl", "diversity")}
        if health:
            record |= toy_health(learned, e / epochs)
        if knn and (e % 2 == 0 or e == epochs):
            record["knn"] = 0.1 * e
        records.append(record)
    return records


def scores(accuracy):
    interval = {"accuracy": accuracy, "low": accuracy - 0.05, "high": accuracy + 0.05}
    return {"knn": interval, "linear": interval}


def make_study(
    root, runs=("mae", "cl_mae"), seeds=(0,), *, labels=True, classes=3, epochs=4, health=True, **shape
):
    grid = ",".join(map(str, shape.get("grid", (4, 4))))
    for run in runs:
        for seed in seeds:
            learned, name, done = run != "mae", f"{run}-{seed}", root / "build" / "runs" / f"{run}-{seed}"
            write_json(done / "history.json", history(learned, knn=labels, epochs=epochs, health=health))
            write_tensors(done / "film.safetensors", film(learned, **shape), {"grid": grid})
            result = scores(0.5 + 0.01 * seed) if labels else {"skipped": "no labels"}
            if health:
                result |= {"consistency": {"value": 0.2 + 0.1 * seed, "low": 0.1, "high": 0.4, "parts": 4}}
            write_json(root / "results" / "evaluate" / f"{name}.json", {"run": run, "seed": seed} | result)
            rng, label = np.random.default_rng(0), np.arange(60) % classes if labels else np.full(60, -1)
            points = {"x": rng.random(60), "y": rng.random(60), "label": label}
            points["class"] = [f"class {i}" if i >= 0 else "" for i in label]
            (root / "build" / "evaluate" / name).mkdir(parents=True)
            pd.DataFrame(points).to_parquet(root / "build" / "evaluate" / name / "embedding.parquet")
    base = {
        name: scores(a) if labels else {"skipped": "no labels"}
        for name, a in [("pca", 0.3), ("random", 0.35)]
    }
    write_json(root / "results" / "evaluate" / "baselines.json", base)
    return runs, seeds


def contents(folder):
    return {
        path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }


CHARTS = ["accuracy", "compute", "consistency", "curriculum", "gap", "health"]
EXPECTED = [f"{name}.{kind}" for name in CHARTS for kind in ("png", "svg")]
EXPECTED += ["embedding_cl_mae.png", "embedding_mae.png", "mask_film.png", "mask_film_cl_mae.png"]
EXPECTED = sorted([*EXPECTED, "mask_film_mae.png", "mask_maps.png"])


def test_everything_is_drawn_and_the_same_bytes_come_twice(tmp_path):
    runs, seeds = make_study(tmp_path, seeds=(0, 1))
    assert figures.draw_all(runs, seeds, folder=tmp_path) == EXPECTED
    first = contents(tmp_path / "results")
    assert figures.draw_all(runs, seeds, folder=tmp_path) == EXPECTED
    assert contents(tmp_path / "results") == first
    for path, data in first.items():
        if path.suffix == ".png":
            image = Image.open(io.BytesIO(data))
            assert not {"Software", "Creation Time"} & set(image.info), path
            assert 500 <= image.width <= 1400, path  # README shows about 900 pixels
        if path.suffix == ".svg":
            assert b"<dc:date>" not in data and data.startswith(b"<?xml"), path


SHAPES = [
    dict(c=1),
    dict(c=2),
    dict(c=5),
    dict(grid=(2, 5), size=(8, 30)),
    dict(grid=(7, 2), size=(210, 20)),
    dict(t=1, m=1),
    dict(m=7),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_films_and_maps_of_every_shape_are_drawn(tmp_path, shape):
    runs, seeds = make_study(tmp_path, **shape)
    study = figures.Study(tmp_path / "results", tmp_path / "build", runs, seeds)
    drawn = figures.film_figures(study) | figures.map_figures(study)
    assert list(drawn) == ["mask_film_mae", "mask_film_cl_mae", "mask_film", "mask_maps"]
    assert all(len(figures.encode(figure, "png")) > 1000 for figure in drawn.values())


STUDIES = [
    dict(epochs=1),
    dict(runs=("mae",)),
    dict(runs=("cl_mae",), classes=40),
    dict(runs=tuple(f"run_{i}" for i in range(7)), m=1),
    dict(runs=("mae", *(f"cl_mae_{i}" for i in range(10))), m=1, epochs=2),
]


@pytest.mark.parametrize(
    "shape", STUDIES, ids=["one epoch", "no masker", "many classes", "many runs", "eleven runs"]
)
def test_every_study_is_drawn(tmp_path, shape):
    runs, seeds = make_study(tmp_path, **shape)
    names = figures.draw_all(runs, seeds, folder=tmp_path, report=pytest.fail)
    assert {f"{figure}_{run}.png" for run in runs for figure in ("mask_film", "embedding")} < set(names)


def test_without_labels_and_health_the_rest_is_drawn_and_said(tmp_path):
    runs, seeds = make_study(tmp_path, labels=False, health=False)
    said = []
    names = figures.draw_all(runs, seeds, folder=tmp_path, report=said.append)
    missing = ["gap", "health", "accuracy", "consistency", "compute"]
    assert said == [f"{name}: nothing to draw" for name in missing]
    assert "mask_film.png" in names and "accuracy.png" not in names
    saved = read_json(tmp_path / "results" / "metrics.json")
    assert saved["runs"]["mae"] == {"seeds": 1, "skipped": "no labels", "verdict": "MAE: not evaluated"}


def test_metrics_are_means_over_seeds(tmp_path):
    runs, seeds = make_study(tmp_path, seeds=(0, 1, 2))
    figures.draw_all(runs, seeds, folder=tmp_path)
    saved = read_json(tmp_path / "results" / "metrics.json")
    knn = saved["runs"]["cl_mae"]["knn"]
    assert knn["mean"] == pytest.approx(0.51) and knn["sd"] == pytest.approx(0.01)
    assert (knn["low"], knn["high"]) == (pytest.approx(0.46), pytest.approx(0.56))
    assert saved["runs"]["cl_mae"]["verdict"] == "CL-MAE: knn beats random, pca; linear beats random, pca"
    assert saved["baselines"]["random"]["knn"]["mean"] == 0.35
    assert saved["runs"]["mae"]["consistency"] == pytest.approx(
        {"mean": 0.3, "sd": 0.1, "low": 0.1, "high": 0.4}
    )
    gap = {"first_quarter": pytest.approx(0.95), "last_quarter": pytest.approx(1.1)}
    assert saved["runs"]["cl_mae"]["health"] == {"gap": gap, "verdict": "alive", "alive": 0.5}
    assert saved["runs"]["mae"]["health"]["verdict"] == "no masker"


@pytest.mark.parametrize(
    "low, high, expected",
    [(0.41, 0.4, "knn beats random"), (0.4, 0.4, "knn beats nothing"), (0.3, 0.4, "knn beats nothing")],
)
def test_to_beat_is_to_lie_above_for_every_seed(low, high, expected):
    results = [{"knn": {"accuracy": 0.6, "low": v, "high": 0.7}} for v in (0.55, low)]
    baselines = {"random": {"knn": {"accuracy": 0.35, "low": 0.3, "high": high}}}
    assert figures.verdict("mae", results, baselines) == f"MAE: {expected}"


def test_strangers_go_and_nothing_else(tmp_path):
    runs, seeds = make_study(tmp_path, runs=("mae", "cl_mae"), seeds=(0, 1))
    results = tmp_path / "results"
    kept = [
        "pretrain/mae-0.json",
        "notebooks/20_pretrain-mae-0.ipynb",
        "notebooks/10_prepare.ipynb",
        "difficulty.json",
    ]
    kept += [
        "notebooks/50_laboratory.ipynb",
        "curves/mae-0/metrics.json",
        "recorded/old-3/notes.md",
        "recorded/old-3.json",
        "LOG.md",
    ]
    gone = ["pretrain/mae-1.json", "pretrain/cl_mae-0.json", "notebooks/30_evaluate-cl_mae-0.ipynb"]
    gone += ["curves/cl_mae-0/metrics.json", "figures/mask_film_cl_mae.png", "figures/old.svg"]
    for name in kept + gone:
        write_bytes(results / name, b"{}")
    figures.draw_all(["mae"], [0], folder=tmp_path)
    assert all((results / name).exists() for name in kept)
    assert not any((results / name).exists() for name in gone)
    assert not (results / "curves" / "cl_mae-0").exists()
    assert [p.name for p in sorted((results / "evaluate").iterdir())] == ["baselines.json", "mae-0.json"]


@pytest.mark.parametrize(
    "path, content",
    [
        ("build/runs/cl_mae-0/history.json", None),
        ("build/runs/cl_mae-0/history.json", b"[{"),
        ("build/runs/cl_mae-0/history.json", b"[]"),
        ("build/runs/cl_mae-0/film.safetensors", None),
        ("build/runs/cl_mae-0/film.safetensors", b"no tensors"),
        ("results/evaluate/cl_mae-0.json", None),
        ("results/evaluate/baselines.json", None),
    ],
)
def test_a_missing_or_damaged_file_is_named_and_changes_nothing(tmp_path, path, content):
    runs, seeds = make_study(tmp_path)
    write_bytes(tmp_path / "results" / "figures" / "accuracy.png", b"earlier")
    write_bytes(tmp_path / "results" / "metrics.json", b"earlier")
    write_bytes(tmp_path / "results" / "pretrain" / "old-0.json", b"earlier")
    (tmp_path / path).unlink() if content is None else (tmp_path / path).write_bytes(content)
    before = contents(tmp_path / "results")
    with pytest.raises(UserError, match=re.escape(path)):
        figures.draw_all(runs, seeds, folder=tmp_path)
    assert contents(tmp_path / "results") == before


def test_the_film_shows_its_pixels_exactly():
    one = film(True, m=4)
    figure = figures.draw_film(one, (4, 4), [1.0, 0.0, -1.0], "CL-MAE", [0, 1, 2, 3])
    shown = np.asarray(Image.open(io.BytesIO(figures.encode(figure, "png"))).convert("RGB"))
    canvas, _, _ = figures.paste(figures.film_cells(one, (4, 4), [0, 1, 2]), 3)
    (h, w, _), left = canvas.shape, figures.MARGIN
    np.testing.assert_array_equal(shown[10 : 10 + h, left : left + w][162:], canvas[162:])  # below headers


sizes = st.tuples(st.integers(1, 5), st.integers(1, 5))


@given(grid=sizes, patch=sizes, seed=st.integers(0, 99))
def test_what_is_hidden_is_blank_and_what_is_visible_untouched(grid, patch, seed):
    rng, size = np.random.default_rng(seed), (grid[0] * patch[0], grid[1] * patch[1])
    images, hidden = (
        rng.integers(0, 200, (2, *size, 3), dtype=np.uint8),
        rng.integers(0, 2, (3, 2, grid[0] * grid[1])),
    )
    shown = figures.conceal(images, hidden, grid)
    for i, patch_hidden in enumerate(hidden[1, 0]):
        r, c = divmod(i, grid[1])
        here = np.s_[r * patch[0] : (r + 1) * patch[0], c * patch[1] : (c + 1) * patch[1]]
        assert (shown[1, 0][here] == (232 if patch_hidden else images[0][here])).all()


@given(h=st.integers(1, 300), w=st.integers(1, 300))
def test_thumbnails_have_about_the_wanted_size_and_keep_the_shape(h, w):
    small = figures.thumbnails(np.full((1, h, w, 3), 7, np.uint8))[0]
    assert (small == 7).all()
    assert 85 <= max(small.shape) <= 171
    scale = 128 / max(h, w) if max(h, w) > 171 else round(128 / max(h, w))
    assert small.shape[:2] == pytest.approx((h * scale, w * scale), abs=1)


@given(score=st.floats(0, 1), grey=st.integers(0, 255))
def test_tint_says_which_way_and_how_surely(score, grey):
    image = np.full((1, 2, 2, 3), grey, np.uint8)
    red, _, blue = figures.shade(image, np.full((1, 4), score), (2, 2))[0, 0, 0].astype(int)
    assert (blue >= red) if score > 0.5 else (red >= blue)
    surer = figures.shade(image, np.full((1, 4), 0.5 + (score - 0.5) / 2), (2, 2))[0, 0, 0].astype(int)
    assert abs(surer[0] - surer[2]) <= abs(red - blue) + 1


def test_the_factor_is_read_off_the_records_and_absent_without_a_masker():
    table = pd.DataFrame({"progress": [12.5, 37.5, 62.5, 87.5], "factor": [0.75, 0.25, -0.25, -0.75]})
    np.testing.assert_allclose(figures.factor_at(table, [0, 0.25, 0.7, 1]), [1, 0.5, -0.4, -1])
    assert figures.factor_at(table[:1], [0, 1]) == [0.75, 0.75]
    assert figures.factor_at(table[["progress"]], [0.5]) is None
    assert figures.moment_labels([0.0, 1.0], [1.0, -0.96]) == ["0 %\nλ = +1.0", "100 %\nλ = −1.0"]


def test_a_new_figure_is_an_entry(tmp_path, monkeypatch):
    runs, seeds = make_study(tmp_path, runs=("mae",))
    blank = figures.Figure(figsize=(2, 2))
    monkeypatch.setitem(figures.figures, "extra", lambda study: {f"extra_{study.runs[0]}": blank})
    assert "extra_mae.png" in figures.draw_all(runs, seeds, folder=tmp_path)


def record(run, seed, verdicts, gaps):
    done = [100 * (i + 1) / len(verdicts) for i in range(len(verdicts))]
    columns = {"run": run, "seed": seed, "done": done, "pos": [d / 100 for d in done]}
    return pd.DataFrame(columns | {"health.verdict": verdicts, "health.gap": gaps})


def test_the_story_of_a_masker_names_its_end_and_its_first_trouble():
    well = record("cl_mae", 0, ["alive"] * 4, [1.0] * 4)
    ill = record("cl_mae", 1, ["alive", "fixed: 0.99 as before", "alive", "collapsed: 93 % equal"], [1.0] * 4)
    assert figures.story(well) == "alive throughout"
    assert figures.story(ill) == (
        "in the end collapsed: 93 % equal; first not alive at 50 %: fixed: 0.99 as before"
    )
    assert (
        figures.ending(pd.concat([well, ill])) == "alive (1 of 2 seeds); collapsed: 93 % equal (1 of 2 seeds)"
    )
    rule, old = record("mae", 0, ["no masker"] * 4, [1.0] * 4), record("old", 0, [None] * 4, [None] * 4)
    lines = figures.told(pd.concat([rule, well, old]), ["mae", "cl_mae", "old"])
    assert lines == [("MAE", "no masker"), ("CL-MAE", "alive throughout")]
    assert figures.told(well[["run", "seed"]], ["cl_mae"]) == []


def test_what_the_health_check_calls_fine_is_no_trouble():
    from clmae import health

    assert {health.verdict({}), health.verdict({"health.spread": 0.3})} == figures.FINE


@given(
    gaps=st.lists(st.floats(0.5, 2), min_size=1, max_size=30), seeds=st.integers(1, 3), first=st.booleans()
)
def test_quarters_are_means_over_their_epochs_and_absent_without_any(gaps, seeds, first):
    table = pd.concat([record("cl_mae", seed, ["alive"] * len(gaps), gaps) for seed in range(seeds)])
    found, n = figures.quarter_gaps(table), len(gaps)
    name = "first_quarter" if first else "last_quarter"
    inside = [g for i, g in enumerate(gaps, 1) if (4 * i <= n if first else 4 * i > 3 * n)]
    assert (name in found) == bool(inside)
    if inside:
        assert found[name] == pytest.approx(np.mean(inside))


def test_only_runs_that_were_measured_are_in_the_legend_with_the_look_they_have_elsewhere():
    runs = [f"run_{i}" for i in range(9)]
    table = pd.concat([record(run, 0, ["alive"] * 4, [1.0] * 4) for run in (runs[0], runs[8])])
    figure = figures.draw_gap(table, figures.colours(runs))
    looks = [(line.get_color(), line.is_dashed()) for line in figure.legends[0].get_lines()]
    drawn = [(line.get_color(), line.is_dashed()) for line in figure.axes[0].lines[:2]]
    assert looks == drawn == [(figures.COLOURS[0], False), (figures.COLOURS[1], True)]


@pytest.mark.parametrize("health", [True, False], ids=["with health", "old records"])
def test_a_study_of_old_and_new_runs_is_drawn(tmp_path, health):
    runs, seeds = make_study(tmp_path)
    old = tmp_path / "build" / "runs" / ("mae-0" if health else "cl_mae-0") / "history.json"
    write_json(old, [{k: v for k, v in r.items() if not k.startswith("health")} for r in read_json(old)])
    names = figures.draw_all(runs, seeds, folder=tmp_path, report=pytest.fail)
    assert names == EXPECTED


@given(ratio=st.floats(0.05, 0.95), shares=st.lists(st.floats(0, 1), min_size=2, max_size=20))
def test_maps_are_between_never_and_always_whatever_the_ratio(ratio, shares):
    lean = figures.lean(np.array(shares))
    assert (np.abs(lean) <= 1 + 1e-9).all()
    assert (np.sign(lean) == np.sign(np.array(shares) - np.mean(shares))).all()
    ends = figures.lean(np.array([0.0, 1.0, ratio]))
    assert ends[:2] == pytest.approx([-1, 1])


# The laboratory


def reels_of(root, **shape):
    runs, seeds = make_study(root, **shape)
    return figures.read_reels(figures.study_of(runs, seeds, root))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_bench_shows_films_of_every_shape(tmp_path, shape):
    reels = reels_of(tmp_path, **shape)
    drawn = [figures.draw_strip(reels, 0), figures.draw_contacts(reels["mae"].film)]
    assert all(len(figures.encode(figure, "png")) > 500 for figure in drawn)


def test_the_bench_shows_its_pixels_exactly(tmp_path):
    reels = reels_of(tmp_path)
    cases = [(0, 0.0), (1, 1.0)]
    figure = figures.draw_bench(reels, cases, 64)
    shown = np.asarray(Image.open(io.BytesIO(figures.encode(figure, "png"))).convert("RGB"))
    cells, _, _ = figures.bench(reels, cases, 64)
    for row, top in enumerate([10, 10 + 64 + 14 + 16]):  # the images, the first run
        np.testing.assert_array_equal(shown[top : top + 64, 130 : 130 + 64], cells[row, 0])


def test_a_view_is_of_the_nearest_moment_and_a_rule_has_no_score(tmp_path):
    reels = reels_of(tmp_path, t=3)
    reel, rule = reels["cl_mae"], reels["mae"]
    hidden = reel.film["hidden"][1, 0]
    shown, error = figures.views(reel, 0, 0.6)
    truth, guess = (figures.as_rgb(a) for a in (reel.film["images"][0], reel.film["prediction"][1, 0]))
    np.testing.assert_array_equal(shown[2], guess)
    where = figures.per_pixel(hidden, (4, 4), (16, 16))[..., 0] > 0
    wrong = (truth[where].astype(float) - guess[where]) ** 2
    assert error == pytest.approx(np.sqrt(wrong.mean()))
    assert (shown[1][where] == 232).all() and (shown[3][~where] == 232).all()
    assert (figures.views(rule, 0, 0.6)[0][0] == 255).all()


def test_the_live_laboratory_answers_to_its_widgets(tmp_path):
    reels = reels_of(tmp_path, m=3)
    live = figures.laboratory(figures.study_of(["mae", "cl_mae"], [0], tmp_path))
    _, pickers, slider, picture = live.children
    runs, images = pickers.children

    def expected(names, cases, side=128):
        return figures.encode(figures.draw_bench({n: reels[n] for n in names}, cases, side), "png")

    assert picture.value == expected(reels, [(0, 1.0)])
    slider.value = 0.0
    assert picture.value == expected(reels, [(0, 0.0)]) != expected(reels, [(0, 1.0)])
    runs.value = ["cl_mae"]
    assert picture.value == expected(["cl_mae"], [(0, 0.0)])
    images.value = [0, 1, 2]
    assert picture.value == expected(["cl_mae"], [(0, 0.0), (1, 0.0), (2, 0.0)], 64)
    images.value = []
    assert picture.value == expected(["cl_mae"], [(0, 0.0), (1, 0.0), (2, 0.0)], 64)


def test_without_ipywidgets_the_laboratory_says_how_to_get_it(tmp_path, monkeypatch):
    make_study(tmp_path)
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    with pytest.raises(UserError, match="pip install ipywidgets"):
        figures.laboratory(figures.study_of(["mae"], [0], tmp_path))


def test_what_has_finished_is_shown_and_nothing_else(tmp_path):
    make_study(tmp_path, runs=("mae", "cl_mae"), seeds=(1,))
    assert figures.finished(["emae", "cl_mae"], [0, 1], tmp_path).pairs() == [("cl_mae", 1)]
    with pytest.raises(UserError, match="none of emae-0 has finished"):
        figures.finished(["emae"], [0], tmp_path)
