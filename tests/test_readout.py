"""The read-out: its statistics against other computations, its words for each case, what it writes."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from PIL import Image
from scipy import stats

from clmae import readout
from clmae.__main__ import main
from clmae.bakeoff import (
    BUDGETS,
    FACTORS,
    LEVEL,
    METHODS,
    SEEDS,
    arms,
    attempts,
    baselines_of,
    confirmation,
    counted,
    place,
    records_of,
    trials,
)
from clmae.config import UserError
from clmae.figures import encode
from clmae.files import read_json, write_json

ROOT = Path(__file__).resolve().parent.parent
LABELS = [path.name for path in sorted((ROOT / "results/recorded/bakeoff").glob("*")) if path.is_dir()]
numbers = st.floats(-20, 20, allow_subnormal=False).map(lambda x: round(x, 3))


def record(arm, seed, knn, budget="flops", linear=0.4, **more) -> dict:
    """A counted run with this test accuracy."""
    curve = [{"epoch": e, "step": e, "flops": 1e12 * e, "images": e, "knn": knn * e / 4} for e in range(1, 5)]
    return {
        "stage": "run", "budget": budget, "arm": arm, "seed": seed, "failed": None, "base_lr": 0.032,
        "metrics": {"knn": {"accuracy": knn, "low": knn - 0.02, "high": knn + 0.02},
                    "linear": {"accuracy": linear, "low": linear - 0.02, "high": linear + 0.02}},
        "validation_knn": knn, "curve": curve, "gap": {"first_quarter": 0.95, "last_quarter": 1.05},
        "health": {"verdict": "alive", "alive": 1.0}, "cpu_seconds": 100.0, "seconds": 120.0,
        "peak_memory": 1e9, "flops": 4e12, "images": 4,
    } | more  # fmt: skip


def study(**accuracies) -> dict:
    """Records by name from arm=[accuracy per seed]."""
    return {
        job.name: record(arm, job.seed, value)
        for arm, values in accuracies.items()
        for job, value in zip(counted(arm), values)
    }


BASE = [0.330, 0.340, 0.335, 0.325, 0.345]


def shifted(by: float, wobble: float = 0.002) -> list[float]:
    return [b + by + wobble * w for b, w in zip(BASE, (1, -1, 0.5, -0.5, 0))]


# ---- statistics


@given(st.lists(st.tuples(numbers, numbers), min_size=2, max_size=10))
def test_interval_is_scipys_paired_t(pairs):
    a, b = np.array(pairs).T
    assume(np.ptp(a - b) > 1e-6)
    ours, theirs = readout.interval(a - b), stats.ttest_rel(a, b)
    low, high = theirs.confidence_interval(1 - LEVEL)
    assert ours.p == pytest.approx(theirs.pvalue, rel=1e-6, abs=1e-12)
    np.testing.assert_allclose(
        [ours.centre - ours.half, ours.centre + ours.half], [low, high], rtol=1e-6, atol=1e-9
    )


@pytest.mark.parametrize("values, expected", [([1.0, 1.0], (1.0, 0.0, 0.0)), ([0.0, 0.0], (0.0, 0.0, 1.0))])
def test_interval_without_any_spread(values, expected):
    assert readout.interval(values)[1:] == expected


def test_interval_of_one_and_of_none():
    one, none = readout.interval([2.0]), readout.interval([])
    assert (one.seeds, one.centre) == (1, 2.0) and np.isnan(one.half) and np.isnan(one.p)
    assert none.seeds == 0 and np.isnan(none.centre)


def rejected(p, size, level) -> set[int]:
    """Holm's procedure as it is defined: step down until a p-value is too large."""
    found = set()
    for step, i in enumerate(sorted(range(len(p)), key=p.__getitem__)):
        if p[i] > level / (size - step):
            break
        found.add(i)
    return found


@given(st.lists(st.floats(1e-4, 1), min_size=1, max_size=8), st.integers(0, 5), st.floats(0.001, 0.5))
def test_holm_rejects_what_the_procedure_rejects(p, more, level):
    size = len(p) + more
    corrected = readout.holm(p, size)
    assume(np.abs(corrected - level).min() > 1e-9)  # a tie is decided by rounding
    assert {i for i, value in enumerate(corrected) if value <= level} == rejected(p, size, level)
    assert all(corrected >= np.array(p) - 1e-12) and all(corrected <= 1)


def test_arms_that_did_not_run_count_in_the_family():
    p = readout.holm([0.004, np.nan], 6)
    assert p[0] == pytest.approx(0.024) and np.isnan(p[1])


def test_differences_are_paired_by_seed_and_survive_a_run_that_broke_down():
    records = study(mae=BASE, cl_mae=BASE[:3])
    broken = counted("cl_mae")[1].name
    records[broken] |= {"metrics": None, "failed": "the loss is not finite"}
    d = readout.differences(readout.table_of(records), "cl_mae", "mae")
    assert list(d.index) == [SEEDS[0], SEEDS[2]] and np.allclose(d, 0)


def test_mae_stands_in_both_tables_and_trials_in_none():
    records = study(mae=BASE) | {trials("mae")[0].name: record("mae", 100, 0.9) | {"stage": "tune"}}
    table = readout.table_of(records)
    assert table.groupby("budget").size().to_dict() == {"flops": 5, "images": 5} and table["knn"].max() < 50


def test_ablations_are_held_against_cl_mae():
    records = study(mae=BASE, cl_mae=shifted(-0.05), cl_mae_rank=shifted(-0.05), noise=shifted(0.0))
    compared = readout.compare(readout.table_of(records))
    assert compared.loc["cl_mae_rank", "against"] == "cl_mae"
    assert abs(compared.loc["cl_mae_rank", "centre"]) < 0.1 and compared.loc["noise", "against"] == "mae"


# ---- words


P = r"\(5 seeds, p (= 0|<) ?[\d.]+ after Holm\)\."
SAID = [
    ("cl_mae", shifted(0.03), rf"CL-MAE beats MAE by 3\.0 ± 0\.2 points {P}"),
    ("cl_mae", shifted(-0.03), rf"CL-MAE loses to MAE by 3\.0 ± 0\.2 points {P}"),
    (
        "cl_mae",
        shifted(0.001, 0.02),
        r"CL-MAE is within noise of MAE: \+0\.1 ± \d\.\d points \(5 .*\)\.",
    ),
    (
        "cl_mae",
        shifted(-0.001, 0.02),
        r"CL-MAE is within noise of MAE: −0\.1 ± \d\.\d points \(5 .*\)\.",
    ),
    ("emae", [0.20], r"EMAE: one seed, −13\.0 points against MAE, no statement; given up, as the .* says\."),
    ("emae", [0.33], r"EMAE: one seed, \+0\.0 points against MAE, no statement\."),
    ("emae", shifted(0.03)[:4], r"EMAE: 4 seeds, \+3\.0 points against MAE, no statement\."),
    ("emae", [], r"Not run yet: CL-MAE; RC-MAE; EMAE; CL-RC-MAE; CL-EMAE; CL-RC-EMAE\."),
]


@pytest.mark.parametrize("arm, values, said", SAID)
def test_words_for_each_case(arm, values, said):
    lines = readout.conclusions(study(mae=BASE, **{arm: values}))
    assert [line for line in lines if re.fullmatch(said, line)], lines


def test_arms_of_which_there_is_the_same_to_say_share_a_sentence():
    records = study(mae=BASE, cl_mae=BASE, rc_mae=[0.31], emae=[0.2], cl_emae=[0.33], cl_rc_mae=[0.331])
    lines = readout.conclusions(records)
    assert lines[1].startswith("CL-MAE is within noise") and lines[4] == "CL-RC-EMAE: not run yet."
    given_up = "One seed each, no statement; given up, as the protocol says. Points against MAE:"
    assert f"{given_up} RC-MAE: −2.0; EMAE: −13.0." in lines
    assert "One seed each, no statement. Points against MAE: CL-RC-MAE: +0.1; CL-EMAE: +0.0." in lines
    assert "EMAE: " not in "".join(line for line in lines if "Not run yet" in line)


def test_a_difference_that_the_correction_takes_back_is_within_noise():
    records = study(mae=BASE, cl_mae=shifted(0.015, 0.015))
    r = readout.compare(readout.table_of(records)).loc["cl_mae"]
    assert r.p < LEVEL <= r.holm and r.outcome == "within noise" and r.centre - r.half > 0


def test_the_first_line_of_a_family_counts_verdicts():
    start, change = "At equal operations, 6 methods:", "still to run, and until then verdicts may change."
    none, some = study(mae=BASE, cl_mae=BASE), study(mae=BASE, cl_mae=shifted(0.03), emae=shifted(0.04))
    assert readout.conclusions(none)[0] == f"{start} 1 judged, none beats MAE beyond noise; 5 {change}"
    two = f"{start} 2 judged, CL-MAE and EMAE beat MAE beyond noise; 4 {change}"
    assert readout.conclusions(some)[0] == two
    early = readout.conclusions(study(mae=BASE, cl_mae=BASE[:3], emae=[0.1]))
    left = f"1 still short of 5 seeds and 4 {change}"
    assert early[0] == f"{start} none judged yet; 1 stopped early, without a statement; {left}"
    whole = study(mae=BASE, **{name: BASE for name in METHODS})
    assert readout.conclusions(whole)[0] == f"{start} 6 judged, none beats MAE beyond noise."
    assert readout.conclusions(whole)[1 + len(METHODS)].startswith("At equal operations, 6 controls: none")


LOST = {"failed": "the loss is not finite", "metrics": None, "validation_knn": None, "curve": [], "gap": {},
        "health": {}, "flops": None, "images": None, "cpu_seconds": None, "seconds": None,
        "peak_memory": None}  # fmt: skip


def test_a_run_that_broke_down_is_told_and_counts_as_none():
    records = study(mae=BASE, cl_mae=BASE, emae=BASE, noise=BASE[:1])
    records["flops/emae-13"] |= LOST
    records["flops/noise-10"] |= LOST
    lines = "\n".join(readout.conclusions(records))
    assert "EMAE: 4 seeds, 1 broke down, +0.0 points against MAE, no statement; no more runs" in lines
    assert "6 methods: 1 judged, none beats MAE beyond noise; 1 stopped early, without" in lines
    assert "MAE, noise masks: 1 run broke down, no statement; given up, as the protocol says." in lines
    table = readout.results_table(records)
    assert table.loc["EMAE", "seeds"] == 4 and table.loc["MAE, noise masks", "20-NN (%)"] == "–"
    assert "nan" not in table.to_csv()


def test_an_arm_that_broke_down_at_every_rate_is_told():
    records = study(mae=BASE) | {job.name: record("emae", 100, 0.3) | LOST for job in trials("emae")}
    for job in trials("emae"):
        records[job.name] |= {"stage": "tune"}
    assert "EMAE: broke down at every rate that was tried." in readout.conclusions(records)
    assert json.dumps(readout.summary(records))


def test_equal_images_tells_why_there_is_one_seed():
    records = study(mae=BASE, emae=[0.2])
    assert readout.conclusions(records, "images")[1].startswith("Not run yet: CL-MAE; RC-MAE; EMAE;")
    records["images/emae-10"] = record("emae", 10, 0.35, "images")
    [line] = [one for one in readout.conclusions(records, "images") if one.startswith("EMAE: one seed, +2.0")]
    assert "given up at equal operations" in line


def test_what_is_not_exact_is_in_no_sentence():
    """Operations are, processor seconds aren't: they depend on what else the machine did."""
    records = study(mae=BASE, cl_mae=shifted(0.03))
    again = {
        f"images/cl_mae-{seed}": record("cl_mae", seed, value, "images", flops=4.4e12, cpu_seconds=990.0)
        for seed, value in zip(SEEDS, shifted(0.03))
    }
    one, two = ([x for x in readout.conclusions(records | again, b) if "beats" in x][1] for b in BUDGETS)
    assert "times" not in one and two.endswith(", at 1.1 times its operations.")


def test_only_the_first_probe_is_judged():
    records = study(mae=BASE, cl_mae=shifted(0.03), emae=[0.3])
    for seed in SEEDS:
        records[f"flops/cl_mae-{seed}"]["metrics"]["linear"] = {
            "accuracy": 0.5 + seed / 1e4,
            "low": 0.4,
            "high": 0.6,
        }
    compared = readout.compare(readout.table_of(records), probe="linear")
    assert compared.loc["cl_mae", "p"] < 0.001 and np.isnan(compared.loc["cl_mae", "holm"])
    assert list(compared.loc[["cl_mae", "emae"], "outcome"]) == ["not judged", "no statement"]
    told = readout.summary(records)["comparisons"]["flops"]["linear"]
    assert {row["outcome"] for row in told.values()} == {"not judged", "no statement"}


def test_names_that_hold_commas_are_told_apart():
    winners = study(mae=BASE, cl_mae_frozen=shifted(0.03), hard=shifted(0.03))
    [line] = [x for x in readout.conclusions(winners) if "6 controls" in x]
    assert "CL-MAE, masker frozen; and MAE, hard masks beat MAE beyond noise" in line


def test_no_seed_falls_out_of_the_forest():
    odd = [b + 0.1 * (k == 4) for k, b in enumerate(BASE)]
    names, table = ["cl_mae", "emae"], readout.table_of(study(mae=BASE, cl_mae=odd, emae=[0.3, 0.2]))
    rows = readout.compare(table).loc[names]
    pairs = {name: readout.differences(table, name, "mae") for name in names}
    reach = readout.reach_of(rows, pairs)
    assert pairs["cl_mae"].max() > rows.loc["cl_mae", "centre"] + rows.loc["cl_mae", "half"]
    assert pairs["cl_mae"].max() < reach < rows.loc["emae", "half"]  # an interval of two seeds is no measure


def test_sets_are_told_together_only_where_both_have_a_verdict():
    one, other = study(mae=BASE, cl_mae=shifted(0.03)), study(mae=BASE, cl_mae=shifted(0.0, 0.02), emae=BASE)
    [line] = readout.across({"embedded": one, "cifar10": other})
    assert re.fullmatch(
        r"CL-MAE against MAE: wins on embedded \(\+3.0 ± 0.2\) and within noise on cifar10 \(.*\)\.", line
    )


def sequel(**accuracies: float) -> dict:
    """Trials of CL-MAE and every attempt, at 30 % or as given."""
    tune = {f"tune/cl_mae-100-x{f:g}": record("cl_mae", 100, 0.3) | {"stage": "tune"} for f in FACTORS}
    return tune | {
        job.name: record(job.arm, job.seed, accuracies.get(job.arm, 0.3)) | {"stage": "tune"}
        for job in attempts(tune)
    }


def test_where_no_idea_is_above_the_block_the_block_is_tested():
    known = study(mae=BASE, cl_mae=BASE) | sequel(cl_mae=0.35)
    assert {job.arm for job in confirmation(known)} == {"mae", "cl_mae"}
    fresh = {job.name: record(job.arm, job.seed, BASE[job.seed - 20]) for job in confirmation(known)}
    start, end = (
        "No idea was above CL-MAE itself. ",
        "within noise of MAE: +0.0 ± 0.0 points (5 fresh seeds, p = 1.000, one test).",
    )
    assert (
        readout.improved(known | fresh)[-1]
        == f"{start}Tested once on test images with fresh seeds, CL-MAE is {end}"
    )
    assert readout.table_of(known | fresh).equals(readout.table_of(study(mae=BASE, cl_mae=BASE)))


def test_what_each_idea_did_is_told_with_its_spread():
    known = study(mae=BASE, cl_mae=BASE) | sequel(cl_mae_late=0.32)
    known["tune/cl_mae_mild-101-x0.5"] |= {
        "failed": "the loss is not finite",
        "validation_knn": None,
        "curve": [],
    }
    known["tune/cl_mae_late-102-x0.5"]["validation_knn"] = 0.35
    lines = readout.improved(known)
    assert lines[0] == (
        "Ideas for CL-MAE, validation accuracy with other seeds. CL-MAE: 30.0 ± 0.0 % (3 seeds); "
        "CL-MAE, short partner phase: 30.0 ± 0.0 % (3 seeds); CL-MAE, ½ learned at first: 33.0 ± 1.7 % "
        "(3 seeds); CL-MAE, milder: 30.0 ± 0.0 % (2 seeds, 1 broke down)."
    )
    assert lines[2] == (
        "CL-MAE, ½ learned at first, on validation beside CL-MAE: +1.0 points half way and +3.0 at the end, "
        "standard deviation over seeds 1.7 (0.0), gap of the last quarter 1.05 (1.05)."
    )
    assert len(lines) == 1 + 3 + 1 and readout.draw_ideas(known)
    del known["tune/cl_mae_late-103-x0.5"]
    assert readout.improved(known)[0].startswith(
        "Ideas for CL-MAE, validation accuracy with other seeds, so far."
    )
    assert len(readout.improved(known)) == 1


def test_fresh_seeds_are_in_no_table_but_their_own():
    base = study(mae=BASE, cl_mae=BASE)
    known = base | sequel(cl_mae_mild=0.33)
    assert readout.improved(base) == [] and "10 runs of 10 to come" in readout.improved(known)[-1]
    fresh = {
        job.name: record(job.arm, job.seed, BASE[job.seed - 20] + 0.02 * (job.arm != "mae"))
        for job in confirmation(known)
    }
    assert readout.improved(known | fresh)[-1] == (
        "Tested once on test images with fresh seeds, CL-MAE, milder beats MAE: +2.0 ± 0.0 points "
        "(5 fresh seeds, p < 0.001, one test)."
    )
    assert readout.summary(known | fresh)["confirmed"]["cl_mae_mild"]["seeds"] == 5
    assert readout.table_of(known | fresh).equals(readout.table_of(base))
    assert readout.milestones(known | fresh, "mae") == readout.milestones(base, "mae")


def test_an_ablation_that_beats_cl_mae_is_no_win_over_mae():
    records = study(mae=BASE, cl_mae=shifted(-0.1), cl_mae_rank=shifted(-0.05))
    assert readout.compare(readout.table_of(records)).loc["cl_mae_rank", "outcome"] == "wins"
    lines = readout.conclusions(records)
    assert "none beats MAE" in lines[0] and any(
        "CL-MAE without reach beats CL-MAE beyond" in x for x in lines
    )


def test_time_to_maes_accuracy():
    records = study(mae=[0.3] * 5, cl_mae=[0.4, 0.2])
    assert readout.milestones(records, "cl_mae") == [0.75, None]
    assert readout.arrival([0.75, None]) == "1 of 2"
    assert readout.milestones({}, "cl_mae") == [] and readout.milestones(records, "mae") == [1.0] * 5


# ---- what is written


@pytest.mark.parametrize(
    "records", [{}, study(mae=BASE[:1]), study(mae=BASE, cl_mae=BASE[:2]), study(mae=BASE, emae=[0.1])]
)
def test_read_out_works_with_any_part_of_the_records(tmp_path, records):
    (tmp_path / "dvc.yaml").write_text("stages: {}\n")
    for name, one in records.items():
        write_json(place(tmp_path, "toy") / f"{name}.json", one)
    if not records:
        with pytest.raises(UserError, match="--set toy: there are no records"):
            readout.read_out("toy", tmp_path)
        return
    page = readout.read_out("toy", tmp_path)
    found = read_json(place(tmp_path, "toy") / "summary.json")
    assert found["missing"] and page[0] == found["sentences"]["noise"][0] and "nan" not in "\n".join(page)
    assert any(line.startswith("Still to run: ") for line in page)
    assert records_of(tmp_path, "toy") == json.loads(json.dumps(records))  # its own files are no records
    forest = place(tmp_path, "toy") / "forest-flops.png"
    assert forest.exists() == any(one["arm"] != "mae" for one in records.values())
    assert readout.read_out("toy", tmp_path) == page


def test_command_prints_the_page(tmp_path, monkeypatch, capsys):
    (tmp_path / "dvc.yaml").write_text("stages: {}\n")
    monkeypatch.chdir(tmp_path)
    assert main(["bakeoff", "--read", "--set", "embedded"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("MAE: fewer than two seeds yet") and "Still to run: " in out
    assert main(["bakeoff", "--read", "--set", "embeded"]) == 2 and not place(tmp_path, "embeded").exists()
    assert (
        "--set embeded: there are no records in results/recorded/bakeoff/embeded" in capsys.readouterr().err
    )


def test_table_has_a_row_for_each_arm_that_ran():
    table = readout.results_table(study(mae=BASE, noise=BASE[:1]))
    name = "MAE, noise masks"
    assert list(table.index) == ["MAE", name] and table.loc[name, "20-NN (%)"] == "33.0"
    assert table.loc["MAE", "20-NN (%)"] == "33.5 ± 0.8" and table.loc["MAE", "× MAE"] == "1.0"


def ground(**accuracies: float) -> dict:
    """Baselines with these accuracies, ± 2 points over images."""
    scores = {name: {"accuracy": a, "low": a - 0.02, "high": a + 0.02} for name, a in accuracies.items()}
    return {name: {"knn": score, "linear": score} for name, score in scores.items()}


@pytest.mark.parametrize(
    "pixels, who",
    [(0.1, "every arm that has run."), (0.25, "every arm that has run but RC-MAE."), (0.5, "no arm")],
)
def test_who_is_above_what_needs_no_training(pixels, who):
    records = study(mae=BASE, rc_mae=[0.28])  # whose interval reaches down to 0.26
    [told] = readout.grounded(records, ground(random=0.05, pixels=pixels))
    assert f"random encoder 5.0 % and raw pixels {100 * pixels:.1f} %" in told and who in told
    rows = readout.results_table(records, baselines=ground(pca=0.2, random=0.05))
    assert list(rows.index) == ["random encoder", "PCA of pixels", "MAE", "RC-MAE"]
    assert rows.loc["PCA of pixels", "20-NN (%)"] == "20.0" and rows.loc["PCA of pixels", "seeds"] == ""


def test_unlabelled_baselines_say_nothing():
    silent = {"random": {"skipped": "the images of the train split have no labels"}}
    assert readout.grounded(study(mae=BASE), silent) == []
    assert "skipped" not in json.dumps(readout.summary(study(mae=BASE), baselines=silent))


def test_arms_are_titled_apart():
    assert len({readout.called(name) for name in arms}) == len(arms)


@pytest.mark.parametrize("label", LABELS)
def test_committed_summary_is_what_the_records_say(label):
    records = records_of(ROOT, label)
    if not records:
        pytest.skip("nothing has run on it yet")
    told = json.loads(json.dumps(readout.summary(**readout.recorded(ROOT, label))))
    assert told == read_json(place(ROOT, label) / "summary.json")


@pytest.mark.parametrize("label", LABELS)
def test_committed_pictures_are_those_of_the_records(label, tmp_path):
    """The same picture up to what another version of a font or of matplotlib does to edges."""
    records = records_of(ROOT, label)
    if not records:
        pytest.skip("nothing has run on it yet")
    drawn = dict(readout.pictures(records, baselines_of(ROOT, label)))
    assert set(drawn) == {path.name for path in place(ROOT, label).glob("*.png")}
    for name, figure in drawn.items():
        (tmp_path / name).write_bytes(encode(figure, "png"))
        new, old = (Image.open(folder / name).convert("L") for folder in (tmp_path, place(ROOT, label)))
        assert new.size == old.size, name
        assert np.mean(np.abs(np.asarray(new, float) - np.asarray(old, float)) > 64) < 2e-3, name


def test_a_picture_of_other_records_is_another_picture(tmp_path):
    """So the test above can fail: one seed moved by three points."""
    one, two = study(mae=BASE, cl_mae=BASE), study(mae=BASE, cl_mae=[*BASE[:4], BASE[4] + 0.03])
    for name, records in {"one": one, "two": two}.items():
        (tmp_path / name).write_bytes(encode(readout.draw_forest(readout.table_of(records)), "png"))
    a, b = (np.asarray(Image.open(tmp_path / name).convert("L"), float) for name in ("one", "two"))
    assert a.shape != b.shape or np.mean(np.abs(a - b) > 64) > 2e-3
