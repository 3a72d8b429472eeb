"""The doctor's verdicts on sound and on broken machines, parameters and images; incidents taken again."""

import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from toyrepo import make_repository, write_params

from clmae import cost, data, doctor, files, runs, trainer
from clmae.config import Stopped, UserError, parse
from clmae.objectives import Loss

MODEL = {"patch_size": 4, "width": 32, "depth": 1, "heads": 2, "decoder_width": 16, "decoder_depth": 1}
TRAIN = {"epochs": 6, "batch_size": 16, "base_lr": 8e-3, "threads": 1}
BLOCKS = {
    "mae": {"objective": "mae"},
    "cl_mae": {"objective": "cl_mae", "masker": {"depth": 1, "heads": 2, "every": 2}},
    "emae": {"objective": "emae"},
    "rc_mae": {"objective": "rc_mae"},
}


def config(**train):
    """Parameters of tiny runs."""
    sizes = {"data": {"image_size": 16}, "model": MODEL, "evaluate": {"k": 5}}
    return parse({"runs": list(BLOCKS), **sizes, "train": {**TRAIN, **train}, "objectives": BLOCKS})


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with prepared images of noise and their parameters, as the current one."""
    make_repository(tmp_path, config(), side=16)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def course_of(here, config, run="mae"):
    stores = runs.open_stores(here / "build/prepared", config.data, "train", "val")
    return doctor.rehearse(config, run, stores, seed=0)


def states(lines) -> dict[str, str]:
    return {line.subject: line.state for line in lines}


def listing(folder) -> dict:
    return {path: path.stat().st_mtime_ns for path in Path(folder).rglob("*")}


# ---- the machine


def test_missing_tools_are_a_note(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda tool: None)
    [line] = [line for line in doctor.environment(tmp_path) if line.subject == "pipeline"]
    assert line.state == "note" and "pip install -e '.[repro]'" in line.said


def test_a_folder_that_cannot_be_written_is_wrong(monkeypatch, tmp_path):
    assert states(doctor.environment(tmp_path))["disk"] == "ok"
    monkeypatch.setattr(doctor.os, "access", lambda *_: False)
    assert states(doctor.environment(tmp_path))["disk"] == "wrong"


def test_an_unused_gpu_is_a_note(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: "Great GPU")
    [line] = [line for line in doctor.machine(config().train) if line.subject == "device"]
    assert line.state == "note" and "Great GPU" in line.said and "train.device: auto" in line.said


@pytest.mark.parametrize("native", [True, False])
def test_bf16_is_a_note_where_it_is_slow(monkeypatch, native):
    monkeypatch.setattr(doctor, "multiplies_bf16", lambda device: native)
    assert states(doctor.machine(config(precision="bf16").train))["precision"] == ("ok" if native else "note")
    assert states(doctor.machine(config().train))["precision"] == "ok"


# ---- the images


def test_images_prepared_with_other_settings_are_a_note(here):
    manifest = files.read_json(here / doctor.MANIFEST)
    for validation, state in ((0.1667, "ok"), (0.3, "note")):
        settings = {"settings": {"validation": validation, "seed": 0, "min_size": 8}}
        files.write_json(here / doctor.MANIFEST, manifest | settings)
        line = doctor.prepared(config(), here)
        assert line.state == state and ("data.validation 0.3" in line.said) == (state == "note")


def test_damaged_images_are_wrong_and_nothing_is_measured(here):
    store = here / "build/prepared/train.npy"
    store.write_bytes(store.read_bytes()[:1000])
    lines = list(doctor.examine(folder=here))
    assert lines[-1].state == "wrong" and "train.npy: damaged" in lines[-1].said
    assert "speed" not in states(lines)


def test_no_images_at_all_are_wrong(tmp_path):
    write_params(tmp_path, config())
    found = states(doctor.examine(tmp_path / "params.yaml", folder=tmp_path))
    assert found["data"] == "wrong" and found["prepared"] == "note" and "speed" not in found


# ---- the rehearsal


@pytest.mark.parametrize("run", BLOCKS)
def test_a_rehearsal_is_what_pretraining_does(here, monkeypatch, run):
    """Same weights, steps, rates and settings; then no file is left and every number is sound."""
    settings = config(clip=1.0, accumulate=2, min_lr=0.1, nonfinite="skip")
    fitted = {}

    def caught(objective, batches, *, folder, at, say, minutes, keep, recipe, advice, monitors, **given):
        fitted.update(course=trainer.begin(objective, batches, **given))
        raise Stopped("seen")

    monkeypatch.setattr(runs, "fit", caught)
    sections = {name: getattr(settings, name) for name in ("data", "model", "train", "film", "evaluate")}
    with pytest.raises(Stopped):
        runs.pretrain_run(run=run, seed=0, objective=BLOCKS[run], folder=here, **sections)
    ours, theirs = course_of(here, settings, run), fitted["course"]
    for name in ("steps", "rate", "seed", "clip", "accumulate", "skip"):
        assert getattr(ours, name) == getattr(theirs, name), name
    for step in (0, ours.steps // 2, ours.steps - 1):
        assert ours.place(step) == theirs.place(step)
        assert torch.equal(ours.batches.batch(step), theirs.batches.batch(step))
    for net, optimizer in ours.optimizers.items():
        assert optimizer.defaults == theirs.optimizers[net].defaults
    weights = theirs.objective.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in ours.objective.state_dict().items())

    before = listing(here)
    lines = list(doctor.examine(run=run, count=4, folder=here))
    assert listing(here) == before
    assert {name: state for name, state in states(lines).items() if state == "wrong"} == {}
    assert {"rate", "memory", "disk", "speed", "time", "loss"} <= states(lines).keys()


@given(st.integers(1, 200), st.integers(1, 50))
def test_steps_measured_are_the_first_and_the_last(total, count):
    steps = doctor.some_steps(total, count)
    assert steps == sorted(set(steps)) and len(steps) == min(total, count)
    assert 0 <= steps[0] and steps[-1] < total
    late = [step for step in steps if step >= total - count // 2]
    assert len(late) >= min(total, count // 2)


@given(st.floats(0.02, 1.2))
def test_the_cure_for_too_little_memory_fits(share):
    room = share * NEED
    line = doctor.memory(COURSE, config().train, room)
    cure = re.search(r"train.accumulate: (\d+)$", line.said)
    if cure:
        assert line.state == "wrong"
        assert doctor.memory(COURSE, config(accumulate=int(cure[1])).train, room).state == "ok"
    else:
        assert (line.state == "ok") == (NEED <= 0.9 * room)


def test_memory_knows_what_is_computed_again(here):
    sparing = config(checkpoint_activations=True)
    course = course_of(here, sparing, "cl_mae")
    again, plain = (cost.memory(each.objective, 16, fused=False)["kept"] for each in (course, COURSE))
    assert again < 0.8 * plain
    assert f"{cost.in_words(again)} of it for backward" in doctor.memory(course, sparing.train, 1e12).said


@pytest.fixture(autouse=True, scope="module")
def small_course(tmp_path_factory):
    global COURSE, NEED
    folder = tmp_path_factory.mktemp("course")
    noise = {split: (np.full((32, 3, 16, 16), 7), None) for split in ("train", "val", "test")}
    data.store_arrays(folder / "build/prepared", noise)
    COURSE = course_of(folder, config(), "cl_mae")
    NEED = sum(cost.memory(COURSE.objective, 16, fused=False).values())
    assert NEED > 0


def test_a_run_that_does_not_fit_takes_no_step(here, monkeypatch):
    monkeypatch.setattr(doctor.cost, "free_memory", lambda device: 1000)
    monkeypatch.setattr(trainer.Course, "take", lambda *_, **__: pytest.fail("a step was taken"))
    found = states(doctor.trial(config(), "mae", here, 4))
    assert found["memory"] == "wrong" and "speed" not in found


def test_running_out_of_memory_is_one_wrong_line(here, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate a lot")

    monkeypatch.setattr(trainer, "one_step", full)
    *_, last = doctor.told("trial", doctor.trial, config(), "mae", here, 4)
    assert last.state == "wrong" and "out of memory with 16 images" in last.said
    assert "train.accumulate: 2 puts 8 there" in last.said


def test_a_loss_that_is_no_number_is_wrong(here):
    sick = config(base_lr=1e30, warmup=0.0)
    assert states(doctor.trial(sick, "mae", here, 8))["loss"] == "wrong"
    assert states(doctor.trial(config(), "mae", here, 8))["loss"] == "ok"


@given(st.floats(1e-3, 10), st.floats(0, 30), st.integers(1, 40))
def test_the_forecast_adds_up(step, watch, steps):
    class Some:
        class batches:
            steps_per_epoch = 7

    Some.steps = steps
    whole = steps * step + math.ceil(steps / 7) * watch
    assert f"; {whole / 3600:.3g} hours ({trainer.duration(whole)}) for all" in doctor.forecast(
        Some, step, watch
    )


def test_monitors_that_are_never_asked_cost_nothing(here, monkeypatch):
    """The share of kNN: every epoch more than every sixth, and none with monitor_epochs 0."""
    times = {}
    for every in (0, 1, 6):
        settings, ticks = config(monitor_epochs=every), iter([0.0, 1.0, 4.0])
        monkeypatch.setattr(doctor, "clock", lambda device, ticks=ticks: next(ticks))
        stores = runs.open_stores(here / "build/prepared", settings.data, "train", "val")
        times[every] = doctor.watching(course_of(here, settings), settings, stores, seed=0)
    assert times == {0: 1.0, 1: 1.0 + 3.0 * 96 / 32, 6: 1.0 + 3.0 * 96 / 32 / 6}


# ---- incidents


def incident_of(here, monkeypatch, settings, sick=None):
    """The folder that a failing run leaves; `sick` is a step whose gradient is made no number."""
    assemble = runs.assemble

    def assembled(*given):
        objective, spent = assemble(*given)
        sound = objective.loss

        def loss(phase, images, pos, draw):
            found = sound(phase, images, pos, draw)
            zero = found.total * 0
            return Loss(found.total + (zero.sqrt() if draw.seed[1] == sick else 0), found.parts)

        objective.loss = loss
        return objective, spent

    monkeypatch.setattr(runs, "assemble", assembled)
    sections = {name: getattr(settings, name) for name in ("data", "model", "train", "film", "evaluate")}
    with pytest.raises(UserError, match="weights and batch of step"):
        runs.pretrain_run(run="mae", seed=0, objective=BLOCKS["mae"], folder=here, **sections)
    [folder] = doctor.incidents(here)
    return folder


def test_an_incident_is_found_named_and_taken_again(here, monkeypatch):
    folder = incident_of(here, monkeypatch, config(base_lr=1e30, warmup=0.0))
    again, report = doctor.retake(folder)
    assert again and "is the first operation whose result is not finite" in report
    told = dict(row.split(maxsplit=1) for row in report.splitlines() if not row.startswith("to do"))
    assert list(told) == ["incident", "settings", "reported", "replayed"]
    assert told["incident"].startswith("mae, seed 0, step ") and "not finite" in told["reported"]
    lines = [line for line in doctor.examine(count=2, folder=here) if line.subject == "incident"]
    assert [line.state for line in lines] == ["note"] and f"clmae replay {folder}" in lines[0].said


def test_an_incident_that_does_not_come_back(here, monkeypatch):
    folder = incident_of(here, monkeypatch, config(), sick=5)
    again, report = doctor.retake(folder)
    assert not again and "step 5 of 24" in report and "the incident does not come back" in report


def test_a_batch_that_is_no_number_is_told_as_such(here, monkeypatch):
    folder = incident_of(here, monkeypatch, config(), sick=5)
    batch = files.read_tensors(folder / "batch.safetensors")["images"]
    batch[0, 0, 0, 0] = np.nan
    files.write_tensors(folder / "batch.safetensors", {"images": batch})
    again, report = doctor.retake(folder)
    assert again and "the images themselves are not finite" in report and "look at the images" in report


@pytest.mark.parametrize(
    "damage, line",
    [
        (
            lambda f: (f / "incident.json").unlink(),
            "no incident.json there; incidents of this repository: none",
        ),
        (lambda f: (f / "incident.json").write_text("{"), "not valid JSON"),
        (lambda f: (f / "incident.json").write_text("{}"), "holds no recipe that this version can follow"),
        (lambda f: (f / "batch.safetensors").write_bytes(b"x"), "not a valid safetensors file"),
        (lambda f: next(f.glob("step-*.safetensors")).write_bytes(b"x"), "not as it was written"),
        (lambda f: next(f.glob("step-*.json")).unlink(), "no such file"),
    ],
)
def test_a_damaged_incident_is_one_line(here, monkeypatch, damage, line):
    folder = incident_of(here, monkeypatch, config(), sick=5)
    damage(folder)
    with pytest.raises(UserError, match=line) as error:
        doctor.retake(folder)
    assert "\n" not in str(error.value)


def test_an_incident_of_another_version_is_told_as_such(here, monkeypatch):
    folder = incident_of(here, monkeypatch, config(), sick=5)
    told = files.read_json(folder / "incident.json")
    told["recipe"]["model"]["wings"] = 2
    files.write_json(folder / "incident.json", told)
    with pytest.raises(UserError, match="use the version that wrote it"):
        doctor.retake(folder)


@pytest.mark.parametrize("device", ["cuda:x", "tpu", "cuda:99"])
def test_a_device_that_is_none_is_one_line(here, monkeypatch, device):
    folder = incident_of(here, monkeypatch, config(), sick=5)
    with pytest.raises(UserError, match=device):
        doctor.retake(folder, device)
