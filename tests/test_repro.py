"""`dvc repro` from end to end, on a tiny copy of the repository: interrupted, twice at once, on bad data.

The copies are made as `make smoke` makes its own, from 100 drawn images and a model of width 16.
"""

import os
import random
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image

from clmae import runs
from clmae.config import UserError, read_params
from clmae.files import read_json

ROOT = Path(__file__).resolve().parent.parent
SMOKE = runpy.run_path(str(ROOT / ".ci" / "smoke.py"))
MEND = runpy.run_path(str(ROOT / ".ci" / "mend.py"))
NAME = "cl_mae-0"  # the run with two nets, two optimizers and a schedule: the most to put back
TINY = {
    "runs": ["cl_mae"],
    "model": {
        "width": 16,
        "depth": 1,
        "heads": 2,
        "decoder_width": 16,
        "decoder_depth": 1,
        "decoder_heads": 2,
    },
    "train": {"epochs": 20, "batch_size": 4, "monitor_epochs": 3},  # some seconds; ten checkpoints
    "film": {"images": 2, "moments": 3, "average_over": 8},
    "evaluate": {"bootstrap": 10, "embedding_images": 20, "probe_c": [0.1]},
}


def draw_images(folder: Path):
    """Two classes of 50 images: smooth blobs and sharp squares."""
    rng = np.random.default_rng(0)
    for split, count in {"train": 40, "test": 10}.items():
        for name, filtering in {"blobs": Image.BICUBIC, "squares": Image.NEAREST}.items():
            place = folder / split / name
            place.mkdir(parents=True)
            for i in range(count):
                coarse = Image.fromarray(rng.integers(0, 255, (8, 8, 3), dtype=np.uint8))
                coarse.resize((64, 64), filtering).save(place / f"{i:02}.png")


def start(top: Path, *targets: str, **changes: str) -> subprocess.Popen:
    """`dvc repro` in a process group of its own, which Ctrl-C can reach whatever this process ignores.

    `changes` are made to the environment.
    """
    environ = {name: value for name, value in os.environ.items() if name != "IN_TEST"}
    environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return subprocess.Popen(
        [sys.executable, "-m", "dvc", "repro", *targets],
        cwd=top,
        env=environ | {"PYTHONPATH": str(top)} | changes,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def end(process: subprocess.Popen) -> tuple[int, str]:
    """The exit code of a `dvc repro` and all it said."""
    try:
        said = process.communicate(timeout=1800)[0]
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return process.returncode, said


def repro(top: Path, *targets: str) -> tuple[int, str]:
    return end(start(top, *targets))


def working(top: Path, pattern: str) -> list[Path]:
    """What lies in build/work under such names; nothing if it goes meanwhile: the run is done."""
    try:
        return list((top / "build/work").glob(pattern))
    except FileNotFoundError:  # of Python 3.11 and 3.12
        return []


def steps_saved(top: Path, name: str = NAME) -> int:
    """The step of the checkpoint in build/work; 0 if there is none."""
    found = working(top, f"{name}-*/step-*.json")
    return max((int(path.stem.removeprefix("step-")) for path in found), default=0)


def wait_until(condition, *involved: psutil.Process, seconds: float = 60):
    """Wait until the condition holds; fail with the state of those involved after `seconds`."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"it never came: {involved}"
        time.sleep(0.02)


def wait_for(process: subprocess.Popen, condition):
    """Wait until the condition holds; fail with what the process said if it ends before."""
    while not condition():
        if process.poll() is not None:
            pytest.fail(f"it ended too early: {process.communicate()[0]}")
        time.sleep(0.02)


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def complaint(said: str) -> str:
    """The one line in which the package says what was wrong, no traceback around it."""
    assert "Traceback" not in said, said
    [line] = [line for line in said.splitlines() if line.startswith("clmae: ")]
    return line


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A build in one go: its folder, how it fared, and how a second `dvc repro` fared in the middle of it."""
    folder = tmp_path_factory.mktemp("repro")
    top = folder / "finished"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DVC_SITE_CACHE_DIR", str(folder / "site"))
        SMOKE["make_copy"](top, TINY, draw_images)
        first = start(top)
        wait_for(first, lambda: working(top, f"{NAME}-*"))
        with held_still(kernel_of(first)):  # else it may be done before the second one has looked
            second = repro(top)
        yield top, end(first), second


@pytest.fixture(scope="module")
def finished(built) -> Path:
    """The folder of the build, to look at; a test that changes it takes a copy."""
    top, (code, said), _ = built
    assert code == 0, said
    return top


@pytest.fixture(scope="module")
def interrupted(finished):
    """The same training begun on top of another one's results, stopped by Ctrl-C after its second checkpoint.

    The folder, the step of the checkpoint, exit code, what it said, and the results before and after.
    """
    top = shutil.copytree(finished, finished.parent / "interrupted", symlinks=True)
    SMOKE["override"](top, {"train": {"epochs": 1}})
    code, said = repro(top, f"pretrain@{NAME}")
    assert code == 0, said
    before = files(top / "results")
    SMOKE["override"](top, {"train": TINY["train"]})
    process = start(top)
    wait_for(process, lambda: steps_saved(top) > 16)
    os.killpg(process.pid, signal.SIGINT)
    code, said = end(process)
    [work] = (top / "build/work").iterdir()
    shutil.copytree(work, finished.parent / "checkpoint")
    return top, steps_saved(top), code, said, before, files(top / "results")


def test_second_repro_at_the_same_time_is_refused_and_harms_nothing(built):
    top, (code, said), (second_code, second_said) = built
    assert second_code != 0 and "Traceback" not in second_said and "> python" not in second_said
    [line] = [line for line in second_said.splitlines() if line.startswith("ERROR: ")]
    assert "is busy" in line or "Unable to acquire lock" in line
    assert code == 0 and "ERROR" not in said, said
    assert list((top / "results/figures").glob("*.png"))


def test_interrupted_repro_says_how_to_go_on_and_keeps_earlier_results(finished, interrupted):
    _, step, code, said, before, after = interrupted
    assert code != 0 and 0 < step < read_json(finished / f"results/pretrain/{NAME}.json")["step"]
    assert complaint(said) == "clmae: interrupted; `dvc repro` continues from the last checkpoint"
    assert after == before and f"pretrain/{NAME}.json" in before


def test_interrupted_repro_continues_and_ends_with_the_same_bytes(finished, interrupted):
    top, step, *_, before, _ = interrupted
    assert before != files(finished / "results")
    process, seen = start(top), set()
    while process.poll() is None:
        seen.add(steps_saved(top))
        time.sleep(0.02)
    code, said = end(process)
    assert code == 0, said
    assert min(seen - {0}) == step and len(seen) > 2  # it never went back behind its checkpoint
    left = files(top / "build/runs" / NAME)
    assert {"encoder.safetensors", "history.json", "film.safetensors"} < set(left)
    assert left == files(finished / "build/runs" / NAME)
    assert files(top / "results") == files(finished / "results")
    assert not list((top / "build/work").iterdir())


def test_repro_of_a_finished_build_runs_nothing(finished):
    before = files(finished / "results"), (finished / "dvc.lock").read_bytes()
    code, said = repro(finished)
    assert code == 0 and "up to date" in said and "Running stage" not in said, said
    assert (files(finished / "results"), (finished / "dvc.lock").read_bytes()) == before


def no_folder(data: Path):
    shutil.rmtree(data)


def nothing(data: Path):
    shutil.rmtree(data)
    data.mkdir()


def no_image(data: Path):
    nothing(data)
    (data / "notes.txt").write_text("images to come")


def three_corrupt(data: Path):
    for path in sorted(data.rglob("*.png"))[:60:20]:
        path.write_bytes(b"not a picture")


@pytest.mark.parametrize(
    "spoil, words",
    [
        (no_folder, "missing data 'source': data"),
        (nothing, "clmae: error: data: an empty folder; expected parquet files or images"),
        (no_image, "clmae: error: data: no image among its files"),
        (three_corrupt, "clmae: error: data: 3 of 100"),
    ],
)
def test_bad_data_is_one_line_and_earlier_results_stay(finished, tmp_path, spoil, words):
    top = shutil.copytree(finished, tmp_path / "copy", symlinks=True)
    spoil(top / "data")
    code, said = repro(top)
    assert code != 0 and "Traceback" not in said, said
    assert len([line for line in said.splitlines() if words in line]) == 1, said
    assert files(top / "results") == files(finished / "results")


def left_by(top: Path, name: str) -> dict[str, bytes]:
    """What a pretraining run leaves, but for its notebook."""
    places = [top / "build/runs" / name, top / "results/curves" / name]
    found = {f"{place.parent.name}/{file}": data for place in places for file, data in files(place).items()}
    return found | {"record": (top / f"results/pretrain/{name}.json").read_bytes()}


def kill(process: subprocess.Popen, all_at_once: bool):
    """SIGKILL for DVC and its stage; the kernel, in a session of its own, goes with them or notices later."""
    family = psutil.Process(process.pid).children(recursive=True) if all_at_once else []
    for member in reversed(family):  # the kernel first: it may be writing
        member.kill()
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()


def killed(top: Path, name: str, chance: random.Random, stride: int) -> tuple[int, bool]:
    """A `dvc repro` killed at a random moment: the step saved, and whether a checkpoint was being written."""
    MEND["mend"](top)  # as make repro does
    process, before = start(top, f"pretrain@{name}"), steps_saved(top, name)
    kind = chance.choice(["early", "between", "writing", "writing"])
    if kind == "early":
        time.sleep(chance.uniform(0, 6))
    else:
        goal = before + chance.randint(1, stride)
        wait_for(process, lambda: steps_saved(top, name) >= goal)
        time.sleep(chance.uniform(0, 0.02))
    pieces = lambda: working(top, f"{name}-*/.step-*")  # noqa: E731
    while kind == "writing" and process.poll() is None and not pieces():
        pass
    kill(process, all_at_once=kind == "writing" or chance.random() < 0.5)
    return steps_saved(top, name), bool(pieces())


def train_under_fire(top: Path, name: str, kills: int):
    """Train again with a checkpoint after every step, killed `kills` times; what `killed` said each time."""
    SMOKE["override"](top, {"train": {"checkpoint_minutes": 1e-6}})  # another setting, the same result
    chance, steps = random.Random(f"{name} {kills}"), read_json(top / f"results/pretrain/{name}.json")["step"]
    told = [killed(top, name, chance, steps // (kills + 2)) for _ in range(kills)]
    MEND["mend"](top)
    code, said = repro(top, f"pretrain@{name}")
    assert code == 0, said
    assert not list((top / "build/work").iterdir())
    return told


def kernel_of(process: subprocess.Popen) -> psutil.Process:
    """The process that runs the notebook of a `dvc repro`."""
    family = psutil.Process(process.pid).children(recursive=True)
    [kernel] = [member for member in family if "ipykernel_launcher" in member.cmdline()]
    return kernel


@contextmanager
def held_still(process: psutil.Process):
    """The process, stopped where it is while the block runs."""
    process.suspend()
    try:
        yield process
    finally:
        process.resume()


def awaits(process: psutil.Process, number: signal.Signals) -> bool:
    """Whether a stopped process was sent a signal; where the system doesn't tell, True after a while."""
    status = Path(f"/proc/{process.pid}/status")
    if not status.exists():
        time.sleep(5)
        return True
    masks = re.findall(r"^(?:Shd|Sig)Pnd:\s*(\w+)", status.read_text(), re.MULTILINE)
    return any(int(mask, 16) >> (number - 1) & 1 for mask in masks)


@pytest.mark.parametrize("shell", ["/bin/sh", "/bin/bash"])  # one of them may wait for a stage, one not
def test_dvc_that_is_ended_lets_training_save(finished, tmp_path, shell):
    if not Path(shell).exists():
        pytest.skip(f"no {shell}")
    top = shutil.copytree(finished, tmp_path / "copy", symlinks=True)
    SMOKE["override"](top, {"train": {"checkpoint_minutes": 5.0}})
    process = start(top, f"pretrain@{NAME}", SHELL=shell)
    wait_for(process, lambda: steps_saved(top) > 0)
    with held_still(kernel_of(process)) as kernel:  # else it may be done before it is told to stop
        stage = kernel.parent()
        process.terminate()  # DVC alone, which ends without a word to its stage
        process.wait()
        wait_until(lambda: awaits(kernel, signal.SIGTERM), kernel, stage)
    said = process.communicate(timeout=120)[0]
    found = re.search(
        r"clmae: stopped by SIGTERM after step (\d+) of \d+, which is saved; run the same", said
    )
    assert found and "Traceback" not in said, said
    assert steps_saved(top) == int(found[1])
    code, said = repro(top, f"pretrain@{NAME}")
    assert code == 0, said
    assert left_by(top, NAME) == left_by(finished, NAME)


def test_killed_a_few_times_under_dvc_it_leaves_the_same_bytes(finished, tmp_path):
    top = shutil.copytree(finished, tmp_path / "copy", symlinks=True)
    told = train_under_fire(top, NAME, 3)
    assert told[-1][0] > 0
    assert left_by(top, NAME) == left_by(finished, NAME)


@pytest.mark.long
@pytest.mark.parametrize("run", ["cl_mae", "rc_mae"])
def test_killed_at_many_moments_under_dvc_it_leaves_the_same_bytes(run, finished, tmp_path):
    top, name = shutil.copytree(finished, tmp_path / "copy", symlinks=True), f"{run}-0"
    SMOKE["override"](top, {"runs": ["cl_mae", "rc_mae"]})
    code, said = repro(top, f"pretrain@{name}")
    assert code == 0, said
    peaceful = left_by(top, name)
    told = train_under_fire(top, name, 16)
    assert left_by(top, name) == peaceful
    assert len({step for step, _ in told}) > 5 and any(writing for _, writing in told)


@pytest.fixture
def pretrain(finished, tmp_path):
    """`pretrain_run` in a folder of its own with the prepared images of the build, some sections changed."""
    shutil.copytree(finished / "build/prepared", tmp_path / "build/prepared")
    config = read_params(finished / "params.yaml")

    def call(**changes):
        parts = {name: getattr(config, name) for name in ("data", "model", "train", "film", "evaluate")}
        for name, values in changes.items():
            parts[name] = parts[name].model_copy(update=values)
        objective = config.objectives["cl_mae"]
        return runs.pretrain_run(run="cl_mae", seed=0, objective=objective, folder=tmp_path, **parts)

    return call


def test_checkpoint_of_another_shape_of_model_names_the_tensor(interrupted, pretrain, tmp_path, monkeypatch):
    work = shutil.copytree(interrupted[0].parent / "checkpoint", tmp_path / "work")
    (work / "lock").unlink(missing_ok=True)  # its holder was stopped
    before = files(work)
    monkeypatch.setattr(runs, "workshop", lambda *_, **__: work)
    with pytest.raises(UserError) as caught:
        pretrain(model={"width": 32})
    said = str(caught.value)
    assert re.search(
        r"another shape of model: mae\.[\w.]+ is \(.*16.*\) there and \(.*32.*\) here; ", said
    ), said
    assert "\n" not in said
    assert files(work) == before and not (tmp_path / "results").exists()


def test_work_under_other_settings_is_not_continued(pretrain, tmp_path, monkeypatch):
    def stop(objective, batches, spent, work, **_):
        folders.append(work)
        raise KeyboardInterrupt

    folders = []
    monkeypatch.setattr(runs, "train_it", stop)
    for changes in (
        {},
        {},
        {"train": {"base_lr": 1.0}},
        {"evaluate": {"k": 3}},
        {"evaluate": {"bootstrap": 50}},
    ):
        with pytest.raises(KeyboardInterrupt):
            pretrain(**changes)
    same, again, rate, monitor, later = folders
    assert same == again == later  # evaluate.bootstrap is for a later stage
    assert len({same, rate, monitor}) == 3
