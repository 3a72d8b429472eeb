"""The bake-off: its arms, the order of its runs, how a run ends and goes on, what a record holds."""

import ast
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from toyrepo import make_repository, write_params

from clmae import bakeoff
from clmae.__main__ import main
from clmae.bakeoff import (
    CONFIRMING,
    FACTORS,
    SEEDS,
    TRYING,
    Job,
    arms,
    counted,
    ideas,
    program,
    trials,
)  # fmt: skip
from clmae.config import Stopped, UserError, as_yaml, parse, read_params
from clmae.files import Lock, read_json, write_json
from clmae.mae import build_mae
from clmae.masking import Draw
from clmae.objectives import make_objective
from clmae.pipeline import validate

ROOT = Path(__file__).resolve().parent.parent
CONFIG = read_params(ROOT / "params.yaml")
MODEL = {"patch_size": 4, "width": 16, "depth": 1, "heads": 2, "decoder_width": 16, "decoder_depth": 1}
TRAIN = {"epochs": 3, "batch_size": 16, "base_lr": 8e-3, "threads": 1}
KEYS = {
    "set", "images_sha256", "budget", "arm", "seed", "stage", "family", "factor", "against", "block",
    "base_lr", "settings", "commit", "versions", "machine", "command", "failed", "metrics", "curve", "gap",
    "health", "validation_knn",
}  # fmt: skip
ENDED = {
    "flops", "images", "step", "epoch", "parameters", "encoder_parameters", "peak_memory", "seconds",
    "cpu_seconds",
}  # fmt: skip


# ---- arms


@pytest.mark.parametrize("name", arms | ideas)
def test_every_arm_builds_and_learns(name):
    block = bakeoff.block_of(name, CONFIG)
    validate(CONFIG.model_copy(update={"objectives": {name: block}}))
    torch.manual_seed(0)
    mae = build_mae((32, 32), patch_size=(4, 4), channels=3, preset="micro", width=16, depth=1, heads=2,
                    decoder_width=16, decoder_depth=1, decoder_heads=2)  # fmt: skip
    objective, images = make_objective(mae, **block, epochs=2), torch.randn(4, 3, 32, 32)
    for phase in objective.phases(0):
        loss = objective.loss(phase, images, 0.5, Draw(seed=(0,)))
        grads = torch.autograd.grad(loss.total, list(objective.nets[phase].parameters()), allow_unused=True)
        assert loss.total.isfinite() and any(g is not None and g.abs().sum() > 0 for g in grads)


@pytest.mark.parametrize("name", arms | ideas)
def test_an_arm_is_its_base_but_for_what_it_names(name):
    arm = bakeoff.arm_named(name)
    block, base = bakeoff.block_of(name, CONFIG), CONFIG.objectives[arm.base]
    named = {path.split(".")[0] for path in arm.changes}
    assert {k: v for k, v in block.items() if k not in named} == {
        k: v for k, v in base.items() if k not in named
    }
    assert all(block[key] != base.get(key) for key in named)
    assert arm.base in ("mae", "cl_mae") or not arm.changes


def test_arms_hold_what_was_asked_for():
    assert {"mae", *bakeoff.METHODS, *bakeoff.CONTROLS, *bakeoff.MASKS} <= set(arms)
    starts = [
        arms[f"cl_mae_{name}"].changes["curriculum"]["start"] for name in ("partner", "neutral", "adversary")
    ]
    assert starts == [1.0, 0.0, -1.0]
    blocks = {name: as_yaml(bakeoff.block_of(name, CONFIG)) for name in arms | ideas}
    assert len(set(blocks.values())) == len(arms) + len(ideas)  # no two are the same


def test_unknown_arm_names_the_nearest():
    with pytest.raises(UserError, match="unknown arm 'cl_mea'.*cl_mae"):
        bakeoff.block_of("cl_mea", CONFIG)
    with pytest.raises(UserError, match="trials of mae have seed 100, .* 0.5, 1, 2$"):
        bakeoff.job_of("flops", "mae", 10, 2.0)
    with pytest.raises(UserError, match="have seed 100, 101, 102, 103,"):
        bakeoff.job_of("flops", "cl_mae_mild", 10, 2.0)


# ---- statistics of the protocol


@given(st.floats(0.2, 3), st.floats(0.2, 3), st.integers(3, 12), st.sampled_from([0.05, 0.01]))
def test_power_is_that_of_the_noncentral_t(difference, sd, seeds, level):
    edge, away = stats.t.isf(level / 2, seeds - 1), difference / sd * seeds**0.5
    right = stats.nct.sf(edge, seeds - 1, away)  # the other tail adds less than half the level
    assert right - 1e-9 <= bakeoff.power(difference, sd, seeds, level) <= right + level / 2 + 1e-9


def test_detectable_difference_falls_with_seeds_and_scales_with_noise():
    values = [bakeoff.detectable(1.0, seeds) for seeds in (3, 5, 10, 30)]
    assert values == sorted(values, reverse=True)
    assert bakeoff.detectable(2.0) == pytest.approx(2 * bakeoff.detectable(1.0), rel=1e-4)


# ---- order


def outcome(job: Job, value: float = 0.3) -> dict:
    metrics = {"knn": {"accuracy": value}} if job.factor is None else None
    return {"failed": None, "validation_knn": value, "metrics": metrics, "base_lr": 0.1, "cpu_seconds": 9.0}


def finished(value=lambda job: 0.3) -> dict:
    """Records of the whole program, given each job's validation accuracy."""
    records: dict = {}
    while left := bakeoff.missing(records):
        records |= {job.name: outcome(job, value(job)) for job in left}
    return records


def test_an_arm_is_tuned_before_it_counts_and_mae_and_cl_mae_come_first():
    jobs = program({})
    assert len(set(jobs)) == len({job.name for job in jobs}) == len(jobs)
    first = {job.arm for job in jobs[: 2 * (len(FACTORS) + len(SEEDS))]}
    assert first == {"mae", "cl_mae"}
    for arm in arms:
        places = [jobs.index(job) for job in trials(arm)]
        assert max(places) < jobs.index(Job("flops", arm, SEEDS[0]))
    assert {job.arm for job in jobs} == set(arms)


def test_equal_images_come_last_and_mae_is_not_run_twice():
    jobs = [job for job in program(finished()) if job.seed not in (*TRYING, *CONFIRMING)]
    budgets = [job.budget for job in jobs]
    assert budgets == sorted(budgets) and {job.arm for job in jobs if job.budget == "images"} == {
        *bakeoff.METHODS
    }


def test_who_is_far_behind_gets_one_seed():
    worse = finished(lambda job: (0.2 if job.arm in ("emae", "noise") else 0.3) + job.seed / 1e4)
    seeds = {arm: sum(job.name in worse for job in counted(arm)) for arm in arms}
    assert seeds == {arm: 1 if arm in ("emae", "noise") else 5 for arm in arms}
    assert sum(job.name in worse for job in counted("emae", budget="images")) == 1


def test_a_seed_of_the_reference_that_broke_down_opens_the_door_to_nobody():
    records = finished(lambda job: (0.2 if job.arm == "emae" else 0.3) + job.seed / 1e4)
    records[counted("mae")[3].name] = {"failed": "the loss is not finite", "validation_knn": None}
    assert not bakeoff.goes_on("emae", records) and bakeoff.goes_on("noise", records)


@pytest.mark.parametrize("known", [0, 3, 20, 60])
def test_what_is_left_lies_between_its_bounds(known):
    """However the runs to come turn out, the program is as long as was said, or between."""
    jobs = program({})[:known]
    records = {job.name: outcome(job) for job in jobs}
    least, most = (len(bakeoff.missing(records, "cifar10", hopeful)) for hopeful in (False, True))
    for value in (0.0, 0.3):
        whole = dict(records)
        while left := bakeoff.missing(whole, "cifar10"):
            whole |= {job.name: outcome(job, 0.3 if job.arm == "mae" else value) for job in left}
        ran = len(whole) - len(records)
        assert ran == (most if value else least) or known > 20 and least <= ran <= most


def test_ideas_come_at_the_end_and_only_the_best_is_confirmed():
    def value(job):
        return 0.3 + (job.arm == "cl_mae_late" and job.seed == TRYING[1]) / 50

    records = finished(value)
    last = program(records)[-len(TRYING) * (1 + len(ideas)) - 2 * len(CONFIRMING) :]
    trying, confirming = last[: -2 * len(CONFIRMING)], last[-2 * len(CONFIRMING) :]
    assert {(job.arm, job.seed) for job in trying} == {(a, s) for a in ("cl_mae", *ideas) for s in TRYING}
    assert {job.factor for job in trying} == {bakeoff.chosen_factor("cl_mae", records)}
    assert {(job.arm, job.seed) for job in confirming} == {
        (a, s) for a in ("mae", "cl_mae_late") for s in CONFIRMING
    }
    assert bakeoff.chosen_factor("cl_mae_late", records) == bakeoff.chosen_factor("cl_mae", records)
    assert bakeoff.best_idea(finished()) == "cl_mae"  # of equals the block itself
    assert not {job.arm for job in program(records, "cifar10")} & set(ideas)


def test_nothing_is_confirmed_while_an_attempt_is_missing():
    records = finished()
    del records[bakeoff.attempts(records)[-1].name]
    assert bakeoff.best_idea(records) is None and bakeoff.confirmation(records) == []
    assert bakeoff.missing(records) == bakeoff.attempts(records)[-1:]


def test_a_reference_that_is_not_finished_lets_nobody_go_on():
    records = finished()
    del records[counted("mae")[4].name]
    assert not bakeoff.goes_on("emae", records) and bakeoff.goes_on("cl_mae_rank", records)


@given(st.lists(st.sampled_from([0.1, 0.2, 0.3]), min_size=3, max_size=3))
def test_the_best_trial_wins_and_of_equals_the_smallest_rate(scores):
    records = {job.name: outcome(job, v) for job, v in zip(trials("mae"), scores)}
    assert bakeoff.chosen_factor("mae", records) == FACTORS[scores.index(max(scores))]


def test_a_trial_that_broke_down_has_lost():
    records = {job.name: outcome(job) for job in trials("mae")}
    records[trials("mae")[0].name] = {"failed": "the loss is not finite", "validation_knn": None}
    assert bakeoff.chosen_factor("mae", records) == 1.0


def test_an_arm_that_breaks_down_at_every_rate_stops_nobody_else(pretend, monkeypatch):
    names = ("mae", "cl_mae", "emae", "noise")
    monkeypatch.setattr(bakeoff, "arms", {name: arms[name] for name in names})
    monkeypatch.setattr(bakeoff, "METHODS", ["cl_mae", "emae"])
    for job in trials("emae"):
        lost = {"failed": "the loss is not finite", "validation_knn": None}
        write_json(bakeoff.place(pretend.folder, "toy") / f"{job.name}.json", lost)
    assert pretend()
    ran = [pretend.job_in(command) for command in pretend.asked]
    assert "emae" not in {job.arm for job in ran} and counted("noise")[-1] in ran
    records = bakeoff.records_of(pretend.folder, "toy")
    assert bakeoff.chosen_factor("emae", records) is None and bakeoff.given_up("emae", records)
    with pytest.raises(UserError, match="emae: no trial came to its end"):
        bakeoff.perform(counted("emae")[0], CONFIG, "toy", pretend.folder, "params.yaml", "x")


# ---- one after another


@pytest.fixture
def pretend(tmp_path):
    """`run_missing` in an empty folder with a stand-in for the runs; the commands that it got are kept."""

    def job_in(command: str) -> Job:
        words = shlex.split(command)
        told = dict(zip(words[4::2], words[5::2]))
        factor = float(told["--factor"]) if "--factor" in told else None
        return bakeoff.job_of(told["--budget"], told["--arm"], int(told["--seed"]), factor)

    def start(command, seconds, root):
        asked.append(command)
        if len(asked) in stops:
            return False
        job = job_in(command)
        write_json(
            bakeoff.place(root, "toy") / f"{job.name}.json", outcome(job, 0.2 if job.arm == "emae" else 0.3)
        )
        return True

    def go(**more):
        how = {"label": "toy", "params": ROOT / "params.yaml", "prepared": "x", "folder": tmp_path}
        return bakeoff.run_missing(**{**how, "minutes": 5, "report": lines.append, "start": start, **more})

    write_json(bakeoff.place(tmp_path, "toy") / "baselines.json", {"metrics": {"pixels": {}}})
    asked, lines, stops = [], [], set()
    go.asked, go.lines, go.stops, go.folder, go.job_in = asked, lines, stops, tmp_path, job_in
    return go


def test_all_is_run_once_and_a_restart_skips_it(pretend, monkeypatch):
    short = {name: arms[name] for name in ("mae", "cl_mae", "emae", "noise")}
    monkeypatch.setattr(bakeoff, "arms", short)
    monkeypatch.setattr(bakeoff, "METHODS", ["cl_mae", "emae"])
    assert pretend()
    first = [pretend.job_in(command) for command in pretend.asked]
    assert len(set(first)) == len(first) == len(pretend.lines)
    assert first == program(bakeoff.records_of(pretend.folder, "toy"), "toy")
    assert pretend() and len(pretend.asked) == len(first)


def test_a_slice_that_is_over_is_gone_on_with(pretend, monkeypatch):
    monkeypatch.setattr(bakeoff, "arms", {"mae": arms["mae"], "cl_mae": arms["cl_mae"]})
    monkeypatch.setattr(bakeoff, "METHODS", ["cl_mae"])
    pretend.stops.add(3)
    assert not pretend() and len(pretend.asked) == 3
    assert pretend() and pretend.asked[3] == pretend.asked[2]
    assert not pretend(minutes=0, label="other") and len(bakeoff.records_of(pretend.folder, "other")) == 0


def test_of_two_processes_each_passes_over_what_the_other_holds(pretend):
    jobs = trials("mae") + trials("cl_mae")
    with Lock(bakeoff.lock_of(pretend.folder, "toy", jobs[0].name)):
        assert bakeoff.next_job(pretend.folder, "toy") == jobs[1]
        for job in trials("mae")[1:]:
            write_json(bakeoff.place(pretend.folder, "toy") / f"{job.name}.json", outcome(job))
        assert bakeoff.next_job(pretend.folder, "toy") == jobs[3]  # MAE's runs wait for their last trial
    assert bakeoff.next_job(pretend.folder, "toy") == jobs[0]


def test_who_was_slower_to_start_goes_on_with_the_next(pretend):
    """Both chose one job; the other one has its lock."""
    jobs, turns = trials("mae"), []

    def start(command, seconds, root):
        turns.append(pretend.job_in(command))
        if len(turns) > 1:
            return False
        lock.__enter__()
        raise UserError("in use")

    lock = Lock(bakeoff.lock_of(pretend.folder, "toy", jobs[0].name))
    try:
        assert not pretend(start=start) and turns == jobs[:2]
        assert pretend.lines == [f"{jobs[0].name}: another process was quicker; on to the next"]
    finally:
        lock.__exit__(None, None, None)
    with pytest.raises(UserError, match="broken"):
        pretend(start=lambda *given: (_ for _ in ()).throw(UserError("broken")))


def test_who_was_slower_goes_on_even_if_the_other_is_done_by_now(pretend):
    turns = []

    def start(command, seconds, root):
        turns.append(job := pretend.job_in(command))
        if len(turns) > 1:
            return False
        write_json(bakeoff.place(root, "toy") / f"{job.name}.json", outcome(job))
        raise UserError("in use")

    assert not pretend(start=start) and turns == trials("mae")[:2]


def test_to_look_whether_a_run_is_held_shuts_nobody_out(tmp_path, monkeypatch):
    monkeypatch.setattr(bakeoff, "Lock", None)  # not even for a moment
    assert not bakeoff.held(tmp_path, "toy", "tune/mae-100-x1")


def test_what_needs_no_training_comes_first_and_once(pretend):
    def start(command, seconds, root):
        turns.append(command)
        if "--baselines" in command:
            write_json(path, {"metrics": {"pixels": {}}})
            return True
        return False

    path, turns = bakeoff.place(pretend.folder, "toy") / "baselines.json", []
    path.unlink()
    assert not pretend(start=start) and not pretend(start=start)
    assert ["--baselines" in command for command in turns] == [True, False, False]
    path.unlink()
    with Lock(bakeoff.lock_of(pretend.folder, "toy", "baselines")):  # another process is at it
        busy = lambda *given: "--baselines" in given[0] and (_ for _ in ()).throw(UserError("in use"))  # noqa: E731
        assert not pretend(start=busy)
    with pytest.raises(UserError, match="in use"):
        pretend(start=busy)


def test_who_finds_nothing_waits_for_the_run_that_decides_what_comes_next(pretend, monkeypatch):
    """MAE's last seed is another process's; who goes on depends on it."""
    monkeypatch.setattr(bakeoff, "arms", {name: arms[name] for name in ("mae", "cl_mae", "emae")})
    monkeypatch.setattr(bakeoff, "METHODS", ["cl_mae", "emae"])
    monkeypatch.setattr(bakeoff, "LOOK", 0.01)
    last = counted("mae")[-1]
    at, looks = bakeoff.place(pretend.folder, "toy") / f"{last.name}.json", []
    real, lock = bakeoff.held, Lock(bakeoff.lock_of(pretend.folder, "toy", last.name))

    def watched(root, label, name):
        looks.append(name)
        if name == last.name and looks.count(name) == 90:  # by now the other one is done
            write_json(at, outcome(last))
            lock.__exit__(None, None, None)
        return real(root, label, name)

    monkeypatch.setattr(bakeoff, "held", watched)
    lock.__enter__()
    assert pretend() and looks.count(last.name) >= 90
    ran = [pretend.job_in(command) for command in pretend.asked]
    assert last not in ran and set(ran) | {last} == set(
        program(bakeoff.records_of(pretend.folder, "toy"), "toy")
    )


def test_waiting_ends_with_the_slice(pretend, monkeypatch):
    monkeypatch.setattr(bakeoff, "arms", {name: arms[name] for name in ("mae", "cl_mae")})
    monkeypatch.setattr(bakeoff, "METHODS", ["cl_mae"])
    monkeypatch.setattr(bakeoff, "LOOK", 0.01)
    monkeypatch.setattr(bakeoff, "held", lambda *given: True)  # all is somebody's
    assert not pretend(minutes=0.002) and pretend.asked == []


def test_a_child_that_was_asked_to_stop_ends_the_slice(pretend):
    """It saved and ended without an error, and without a record."""
    asked = []
    assert not pretend(start=lambda command, *more: asked.append(command) is None) and len(asked) == 1
    assert pretend.lines == []


def test_a_child_is_stopped_in_time_and_its_failure_is_told(tmp_path):
    assert not bakeoff.launch("python -c 'import time; time.sleep(60)'", 0.3, tmp_path)
    assert bakeoff.launch("python -c 'pass'", 60, tmp_path)
    with pytest.raises(UserError, match="ended with 3"):
        bakeoff.launch("python -c 'raise SystemExit(3)'", 60, tmp_path)


def test_the_list_says_what_is_done_and_what_the_rest_costs():
    records = {job.name: outcome(job) for job in trials("mae")}
    lines = list(bakeoff.listing(records))
    assert lines[0].startswith("tune/mae-100-x0.5") and "validation kNN 30.0 %" in lines[0]
    assert "missing, about 0 min" in lines[3]
    assert lines[-1].startswith(f"3 of {len(bakeoff.to_come({}))} runs done")


# ---- one run for real


def config(**train):
    sections = {
        "data": {"image_size": 32},
        "model": MODEL,
        "evaluate": {"k": 5, "bootstrap": 10, "probe_c": [0.1]},
    }
    film = {"images": 1, "moments": 2, "average_over": 4}
    blocks = json.loads(json.dumps(CONFIG.objectives))
    return parse({"runs": ["mae"], **sections, "film": film, "train": TRAIN | train, "objectives": blocks})


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A repository with a few prepared images of noise, as the current folder."""
    make_repository(tmp_path, config(), side=32)
    (tmp_path / "dvc.yaml").write_text("stages: {}\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def command(record: dict) -> list[str]:
    return shlex.split(record["command"])[3:]


def test_tuned_run_and_run_again(here, capsys):
    """The whole way by the commands: not before tuning; then three trials, a run, and the same run again."""
    assert main(["bakeoff", "--arm", "cl_mae"]) == 2 and "not tuned yet" in capsys.readouterr().err
    for factor in FACTORS:
        assert main(["bakeoff", "--arm", "cl_mae", "--seed", "100", "--factor", str(factor)]) == 0
    assert main(["bakeoff", "--arm", "cl_mae", "--seed", "10"]) == 0
    records = bakeoff.records_of(here, "embedded")
    record, trial = records["flops/cl_mae-10"], records["tune/cl_mae-100-x2"]
    assert set(record) == set(trial) == KEYS | ENDED
    assert (
        trial["metrics"] is None and 0 <= record["metrics"]["knn"]["low"] <= record["metrics"]["knn"]["high"]
    )
    assert record["base_lr"] == 8e-3 * bakeoff.chosen_factor("cl_mae", records) and trial["base_lr"] == 16e-3
    assert record["curve"][-1]["knn"] == record["validation_knn"] and record["stage"] == "run"
    assert record["block"] == bakeoff.block_of("cl_mae", config()) and record["commit"] == "unknown"
    assert record["peak_memory"] > 1e8 and record["cpu_seconds"] > 0
    before = Path("results/recorded/bakeoff/embedded/flops/cl_mae-10.json").read_bytes()
    capsys.readouterr()
    assert main(command(record)) == 0 and "as recorded" in capsys.readouterr().out
    assert Path("results/recorded/bakeoff/embedded/flops/cl_mae-10.json").read_bytes() == before
    assert not list(Path("build/bakeoff").rglob("*.safetensors"))


def test_a_rerun_that_differs_is_told_and_kept_out(here, capsys):
    for job in trials("mae"):
        write_json(bakeoff.place(here, "embedded") / f"{job.name}.json", outcome(job))
    assert main(["bakeoff", "--arm", "mae"]) == 0
    path = bakeoff.place(here, "embedded") / "flops/mae-10.json"
    record = read_json(path)
    write_json(path, record | {"validation_knn": 0.123})
    assert main(command(record)) == 1 and "other validation_knn" in capsys.readouterr().out
    assert read_json(path)["validation_knn"] == 0.123


def test_without_prepared_images_one_line_says_what_to_do(here, capsys):
    for own in (["--baselines"], ["--arm", "mae", "--seed", "100", "--factor", "1"]):
        assert main(["bakeoff", *own, "--prepared", "nowhere"]) == 2
        said = capsys.readouterr().err
        assert (
            said.count("\n") == 1
            and "nowhere holds no prepared images; run `python -m clmae prepare`" in said
        )


def test_baselines_are_scored_once_and_compared_afterwards(here, capsys):
    assert main(["bakeoff", "--baselines"]) == 0
    said = capsys.readouterr().out
    assert all(f"{name}: knn " in said for name in ("random", "pixels", "pca", "whole")) and "linear" in said
    path = bakeoff.place(here, "embedded") / "baselines.json"
    record, before = read_json(path), path.read_bytes()
    assert main(command(record)) == 0 and capsys.readouterr().out == "baselines: as recorded\n"
    assert bakeoff.baselines_of(here, "embedded") == record["metrics"] and path.read_bytes() == before
    write_json(path, record | {"metrics": {}})
    assert main(command(record)) == 1 and capsys.readouterr().out == "baselines: other metrics\n"
    assert bakeoff.records_of(here, "embedded") == {} and not list(Path("build/bakeoff").rglob("*.json"))


def test_runs_of_other_images_or_settings_are_kept_out(here, capsys):
    assert main(["bakeoff", "--baselines"]) == 0
    before = bakeoff.baselines_of(here, "embedded")
    write_params(here, config(epochs=4))
    trial = ["bakeoff", "--arm", "mae", "--seed", "100", "--factor", "1"]
    capsys.readouterr()
    for own in (trial, ["bakeoff", "--baselines"]):
        assert main(own) == 2
        assert (
            "params.yaml: train.epochs differs from the records of `embedded`; give"
            in capsys.readouterr().err
        )
    write_params(here, config())
    manifest = here / "build/prepared/manifest.json"
    write_json(manifest, read_json(manifest) | {"note": "other images"})
    assert main(trial) == 2
    said = capsys.readouterr().err
    assert (
        "build/prepared: not the images that the records of `embedded` are about" in said and "--set" in said
    )
    assert bakeoff.records_of(here, "embedded") == {} and bakeoff.baselines_of(here, "embedded") == before
    assert main([*trial, "--set", "mine"]) == 0 and len(bakeoff.records_of(here, "mine")) == 1


def test_a_run_that_the_protocol_does_not_have_is_refused(here, capsys):
    """No test images for an idea that wasn't chosen, nor for more seeds of who was given up."""
    for arm, value in {"mae": 0.3, "cl_mae": 0.3, "emae": 0.1}.items():
        for job in [*trials(arm), *counted(arm)[: 1 if arm == "emae" else None]]:
            write_json(bakeoff.place(here, "embedded") / f"{job.name}.json", outcome(job, value))
    for own in (["emae", "11"], ["cl_mae_mild", "10"], ["cl_mae_mild", "20"], ["mae", "20"], ["mae", "7"]):
        assert main(["bakeoff", "--arm", own[0], "--seed", own[1]]) == 2
        said = capsys.readouterr().err
        assert f"flops/{'-'.join(own)}: the protocol has no such run, or not yet; `python -m clmae" in said
    assert (
        main(["bakeoff", "--arm", "cl_mae_mild", "--seed", "101", "--factor", "2"]) == 2
    )  # not the block's rate


def test_the_way_to_tune_names_images_and_parameters(here, capsys):
    own = ["--set", "mine", "--params", "params.yaml", "--prepared", "elsewhere"]
    assert main(["bakeoff", "--arm", "cl_mae", *own]) == 2
    assert "`python -m clmae bakeoff --set mine --prepared elsewhere`" in capsys.readouterr().err


def test_an_interrupted_run_leaves_no_record_and_goes_on(here, monkeypatch):
    """Asked to stop in its second epoch, it goes on there and ends with the numbers of a run in one go."""

    def listen(**given):
        return real(**given | {"report": hear})

    def hear(line):
        lines.append(line)
        if len(lines) == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    def epochs():
        told = [int(line.split()[1]) for line in lines if line]
        lines[:] = [""]  # of later runs no line is the first
        return told

    write_params(here, config(epochs=9))
    real, job, lines = bakeoff.pretrain_run, trials("cl_mae")[1], []
    monkeypatch.setattr(bakeoff, "pretrain_run", listen)
    how = {"label": "embedded", "params": "params.yaml", "prepared": "build/prepared", "folder": here}
    with pytest.raises(Stopped, match="stopped by SIGTERM after step 5 of 1[0-9],"):
        bakeoff.run_one(job, **how)
    assert epochs() == [1] and bakeoff.records_of(here, "embedded") == {}
    [work] = (here / f"build/bakeoff/embedded/{job.name}/build/work").iterdir()
    assert read_json(work / "step-5.json")["step"] == 5
    record, differing = bakeoff.run_one(job, **how)
    assert epochs() == [2, 3, 4]  # nothing is trained twice
    assert differing is None and record["seconds"] is None and record["cpu_seconds"] is None
    assert not bakeoff.held(here, "embedded", job.name)
    whole, differing = bakeoff.run_one(job, **how)
    assert epochs() == [1, 2, 3, 4] and whole["cpu_seconds"] > 0 and differing == []
    assert bakeoff.records_of(here, "embedded") == {job.name: json.loads(json.dumps(record))}


def test_scoring_that_was_interrupted_does_not_train_again(here, monkeypatch):
    for job in trials("mae"):
        write_json(bakeoff.place(here, "embedded") / f"{job.name}.json", outcome(job))
    how = {"label": "embedded", "params": "params.yaml", "prepared": "build/prepared", "folder": here}
    with monkeypatch.context() as patch:
        patch.setattr(bakeoff, "scores", lambda *given: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            bakeoff.run_one(counted("mae")[0], **how)
    monkeypatch.setattr(bakeoff, "pretrain_run", None)
    record, _ = bakeoff.run_one(counted("mae")[0], **how)
    assert record["metrics"]["knn"]["accuracy"] >= 0 and record["seconds"] > 0


def test_a_loss_that_is_no_number_is_a_result(here, monkeypatch):
    write_params(here, config(base_lr=1e30, warmup=0.0))
    how = {"label": "embedded", "params": "params.yaml", "prepared": "build/prepared", "folder": here}
    record, _ = bakeoff.run_one(trials("mae")[2], **how)
    assert "not finite" in record["failed"] and record["metrics"] is None and record["validation_knn"] is None
    assert bakeoff.records_of(here, "embedded")["tune/mae-100-x2"]["failed"] == record["failed"]
    real, times = bakeoff.trained, []
    monkeypatch.setattr(bakeoff, "trained", lambda *given: times.append(given) or real(*given))
    assert bakeoff.run_one(trials("mae")[2], **how)[1] == [] and len(times) == 1  # it had to fail again


def test_what_is_sure_to_come_is_on_the_bill():
    """The sequel's jobs count before their rate is known, and its confirmation before the best is."""
    assert len(bakeoff.to_come({})) == len(program({})) + 12 + 10
    rated = {job.name: outcome(job) for job in trials("cl_mae")}
    assert len(bakeoff.to_come(rated)) == len(program(rated)) - 3 + 10
    rated |= {job.name: outcome(job) for job in bakeoff.attempts(rated)}
    assert bakeoff.to_come(rated) == bakeoff.missing(rated) and len(bakeoff.confirmation(rated)) == 10
    assert bakeoff.to_come({}, "cifar10") == program({}, "cifar10")


def test_images_without_labels_are_refused_before_anything_is_trained(here, capsys):
    for split in ("val", "test"):
        path = here / f"build/prepared/{split}_labels.npy"
        labels = np.load(path)
        np.save(path, np.full_like(labels, -1))
        for own in (["--baselines"], ["--arm", "mae", "--seed", "100", "--factor", "1"]):
            assert main(["bakeoff", *own]) == 2
            said = capsys.readouterr().err
            assert "no labels; the bake-off compares accuracies, so it needs labels" in said
        np.save(path, labels)
    assert bakeoff.records_of(here, "embedded") == {}


# ---- what is committed

SETS = [path for path in sorted((ROOT / "results/recorded/bakeoff").glob("*")) if path.is_dir()]
RECORDS = [path for folder in SETS for path in sorted(folder.glob("*/*.json"))]


@pytest.mark.parametrize("folder", SETS, ids=lambda path: path.name)
def test_committed_baselines_are_of_the_images_of_the_runs(folder):
    record, own = read_json(folder / "baselines.json"), folder / "params.yaml"
    config = read_params(own) if own.exists() else CONFIG
    runs = [read_json(path) for path in sorted(folder.glob("*/*.json"))]
    assert {run["images_sha256"] for run in runs} == {record["images_sha256"]}
    for name, section in record["settings"].items():
        assert getattr(config, name).model_dump(mode="json") == section, f"{name} has moved since"
    tested = {found["test_images"] for found in record["metrics"].values()}
    assert len(tested) == 1 and {run["metrics"]["test_images"] for run in runs if run["metrics"]} <= tested
    assert set(record["metrics"]) == {"random", "pixels", "pca", "whole"} and "+" not in record["commit"]


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_committed_record_is_whole_and_of_its_arm(path):
    record = read_json(path)
    job = Job(
        record["budget"],
        record["arm"],
        record["seed"],
        record["factor"] if record["stage"] == "tune" else None,
    )
    assert f"{path.parent.name}/{path.stem}" == job.name and record["set"] == path.parent.parent.name
    assert set(record) == KEYS | ENDED or (set(record) == KEYS and record["failed"])
    own = path.parent.parent / "params.yaml"
    config = read_params(own) if own.exists() else CONFIG
    assert record["block"] == bakeoff.block_of(record["arm"], config), "params.yaml has moved since"
    for name, section in record["settings"].items():
        made = bakeoff.settings(Job(record["budget"], "mae", 0), config, record["factor"])[name]
        made = made.model_dump(mode="json")  # keys that came later are at their defaults
        assert {key: made[key] for key in section} == section, f"{name} of params.yaml has moved since"
    arm = bakeoff.arm_named(record["arm"])
    assert (record["family"], record["against"]) == (arm.family, arm.against), "moved to another family since"
    assert re.fullmatch(r"[0-9a-f]{40}", record["commit"]), "made with uncommitted code"
    if record["stage"] == "run":
        records = bakeoff.records_of(ROOT, record["set"])
        assert record["factor"] == bakeoff.chosen_factor(record["arm"], records)


@pytest.mark.parametrize("folder", SETS, ids=lambda path: path.name)
def test_nothing_ran_that_the_protocol_does_not_have(folder):
    """No more seeds of who was given up, no idea on test images but the one that was chosen."""
    records = bakeoff.records_of(ROOT, folder.name)
    assert set(records) <= {job.name for job in program(records, folder.name)}


def git(*words) -> subprocess.CompletedProcess:
    return subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True)


# what entered the module with the protocol of each set
WRITTEN = {"embedded": "TUNING_SEED", "cifar10": "arms_of"}


@pytest.mark.skipif(not RECORDS or shutil.which("git") is None, reason="no records, or no git")
def test_the_protocol_was_committed_before_its_results():
    if git("rev-parse", "--is-shallow-repository").stdout.strip() != "false":
        pytest.skip("no whole history here")
    for folder in SETS:
        if folder.name not in WRITTEN:
            pytest.skip("a set of one's own")
        word = WRITTEN[folder.name]
        commits = {read_json(path)["commit"] for path in folder.glob("*/*.json")}
        first = git("log", "--reverse", "--format=%H", f"-S{word}", "--", "clmae/bakeoff.py").stdout.split()
        if not first or any(git("cat-file", "-e", f"{commit}^{{commit}}").returncode for commit in commits):
            pytest.skip("no whole history here")
        for commit in commits:
            assert git("merge-base", "--is-ancestor", first[0], commit).returncode == 0, commit
            assert git("merge-base", "--is-ancestor", commit, "HEAD").returncode == 0, commit


FIXED = "SEEDS TUNING_SEED FACTORS BUDGETS LEVEL MONITOR_EPOCHS METHODS CONTROLS MASKS".split()
FIXED += "ALONE CURRICULA SOFT ESTIMATORS SHARES in_the_running".split()
SEQUEL = "IDEAS TRYING CONFIRMING".split()  # came later, before their own runs


def fixed(source: str) -> dict[str, str]:
    """What a version of the module says of seeds, rates, arms, and who goes on."""
    lines = ast.parse(source).body
    said = {line.targets[0].id: ast.dump(line.value) for line in lines if isinstance(line, ast.Assign)}
    said |= {line.name: ast.dump(line) for line in lines if isinstance(line, ast.FunctionDef)}
    return {name: said[name] for name in FIXED + SEQUEL if name in said}


@pytest.mark.skipif(not RECORDS or shutil.which("git") is None, reason="no records, or no git")
def test_the_protocol_has_not_moved_since_its_results():
    now = fixed((ROOT / "clmae/bakeoff.py").read_text())
    assert set(now) == {*FIXED, *SEQUEL}
    sequel = {}  # by commit, whether it made a run of the sequel
    for record in map(read_json, RECORDS):
        own = record["seed"] in (*TRYING, *CONFIRMING)
        sequel[record["commit"]] = sequel.get(record["commit"], False) or own
    for commit, own in sequel.items():
        then = git("show", f"{commit}:clmae/bakeoff.py")
        if then.returncode:
            pytest.skip("no whole history here")
        needed = FIXED + SEQUEL * own
        found = fixed(then.stdout)
        assert {name: found.get(name, now[name] if name not in needed else None) for name in now} == now


def protocol(notebook: str, sections: set[str]) -> list[str]:
    """The paragraphs of the protocol in a version of its notebook, and some later sections whole."""
    texts = [
        "".join(cell["source"]) for cell in json.loads(notebook)["cells"] if cell["cell_type"] == "markdown"
    ]
    lines = [line for text in texts for line in text.split("\n")]
    early = [line for line in lines if line.startswith(("**", "- *", "A job is")) and line[:4] != "- **"]
    later = [text for text in texts if text.startswith(tuple(f"## {name}" for name in sections))]
    return early + [line for text in later for line in text.split("\n")]


def sections_behind(record: dict) -> set[str]:
    """The sections of the protocol that came later, and that a record rests on."""
    sequel = {"Then improve"} if record["seed"] in (*TRYING, *CONFIRMING) else set()
    return {"Amendments"} | sequel | ({"A second set"} if record["set"] == "cifar10" else set())


@pytest.mark.skipif(not RECORDS or shutil.which("git") is None, reason="no records, or no git")
def test_the_words_of_the_protocol_still_stand():
    """What came later is an amendment with its date; nothing is taken back or reworded."""
    now = (ROOT / "nbs/20_bakeoff.ipynb").read_text()
    lines = "".join(
        "".join(cell["source"]) + "\n" for cell in json.loads(now)["cells"] if cell["cell_type"] == "markdown"
    ).split("\n")
    behind: dict[str, set[str]] = {}
    for record in map(read_json, RECORDS):
        behind[record["commit"]] = behind.get(record["commit"], set()) | sections_behind(record)
    for commit, sections in behind.items():
        then = git("show", f"{commit}:nbs/20_bakeoff.ipynb")
        if then.returncode:
            pytest.skip("no whole history here")
        words = protocol(then.stdout, sections)
        assert len(words) >= 10 and [line for line in words if line not in lines] == []
