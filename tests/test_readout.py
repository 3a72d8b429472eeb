"""The read-out: its statistics against other computations, its words for each case, what it writes."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy import stats

from clmae import readout
from clmae.__main__ import main
from clmae.bakeoff import (
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


P = r"\(5 seeds, p (= 0|<) ?[\d.]+ after Holm\), at 1\.0 times its processor time\."
SAID = [
    ("cl_mae", shifted(0.03), rf"CL-MAE beats MAE by 3\.0 ± 0\.2 points {P}"),
    ("cl_mae", shifted(-0.03), rf"CL-MAE loses to MAE by 3\.0 ± 0\.2 points {P}"),
    (
        "cl_mae",
        shifted(0.001, 0.02),
        r"CL-MAE is within noise of MAE: \+0\.1 ± \d\.\d points \(5 .*\), .* time\.",
    ),
    (
        "cl_mae",
        shifted(-0.001, 0.02),
        r"CL-MAE is within noise of MAE: −0\.1 ± \d\.\d points \(5 .*\), .* time\.",
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


def test_sets_are_told_together_only_where_both_have_a_verdict():
    one, other = study(mae=BASE, cl_mae=shifted(0.03)), study(mae=BASE, cl_mae=shifted(0.0, 0.02), emae=BASE)
    [line] = readout.across({"embedded": one, "cifar10": other})
    assert re.fullmatch(
        r"CL-MAE against MAE: wins on embedded \(\+3.0 ± 0.2\) and within noise on cifar10 \(.*\)\.", line
    )


def test_fresh_seeds_are_in_no_table_but_their_own():
    base = study(mae=BASE, cl_mae=BASE)
    tune = {f"tune/cl_mae-100-x{f:g}": record("cl_mae", 100, 0.3) | {"stage": "tune"} for f in FACTORS}
    tried = {
        job.name: record(job.arm, job.seed, 0.33 if job.arm == "cl_mae_mild" else 0.3) | {"stage": "tune"}
        for job in attempts(tune)
    }
    known = base | tune | tried
    assert readout.improved(base) == [] and "3 of 5" not in readout.improved(known)[1]
    fresh = {
        job.name: record(job.arm, job.seed, BASE[job.seed - 20] + 0.02 * (job.arm != "mae"))
        for job in confirmation(known)
    }
    assert readout.improved(known | fresh)[1] == (
        "Confirmed once on test images, CL-MAE, milder beats MAE: +2.0 ± 0.0 points "
        "(5 fresh seeds, p < 0.001, one test)."
    )
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
    page = readout.read_out("toy", tmp_path)
    found = read_json(place(tmp_path, "toy") / "summary.json")
    assert found["missing"] and page[0] == found["sentences"]["noise"] and "nan" not in "\n".join(page)
    assert records_of(tmp_path, "toy") == json.loads(json.dumps(records))  # its own files are no records
    forest = place(tmp_path, "toy") / "forest-flops.png"
    assert forest.exists() == any(one["arm"] != "mae" for one in records.values())
    assert readout.read_out("toy", tmp_path) == page


def test_command_prints_the_page(tmp_path, monkeypatch, capsys):
    (tmp_path / "dvc.yaml").write_text("stages: {}\n")
    monkeypatch.chdir(tmp_path)
    assert main(["bakeoff", "--read", "--set", "toy"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("MAE: fewer than two seeds yet") and "In all: " in out


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
    told = json.loads(json.dumps(readout.summary(records, label, baselines_of(ROOT, label))))
    assert told == read_json(place(ROOT, label) / "summary.json")
