"""What stands around a stage: checks before it, a tidy notebook or one clear line after it."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest
from hypothesis import given
from hypothesis import strategies as st
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from clmae.config import ConfigError, UserError, parse, read_params, read_yaml
from clmae.objectives import objectives
from clmae.pipeline import (
    StageError,
    chosen,
    close,
    compare,
    environment,
    needs,
    readme,
    run_stage,
    surroundings,
    tidy,
    validate,
    verify,
    write_readme,
)

ROOT = Path(__file__).resolve().parent.parent
PARAMS = read_yaml(ROOT / "params.yaml")


# ---- objectives' blocks


def refused(**changes) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        validate(parse({**PARAMS, **changes}))
    assert all("\n" not in problem for problem in caught.value.problems)
    return caught.value


def block(name="cl_mae", **changes) -> dict:
    return {"objectives": {name: {**PARAMS["objectives"][name], **changes}}, "runs": [name]}


BAD_BLOCKS = [
    (block(objective="cl_mea"), "objectives.cl_mae.objective: unknown objective 'cl_mea'", "'cl_mae'?"),
    (
        block(mask_ration=0.5),
        "objectives.cl_mae.mask_ration: unknown key; allowed: mask_ratio,",
        "'mask_ratio'?",
    ),
    (block(mask_ratio="0.75"), "objectives.cl_mae.mask_ratio: '0.75'; expected a number", ""),
    (block(mask_ratio=True), "objectives.cl_mae.mask_ratio: true; expected a number", ""),
    (block(mask_ratio=0), "objectives.cl_mae.mask_ratio: 0; expected a number > 0 and < 1", ""),
    (block(mask_ratio=1.0), "objectives.cl_mae.mask_ratio: 1.0; expected a number > 0 and < 1", ""),
    (block(mask_ratio=0.999), "objectives.cl_mae.mask_ratio: 0.999; of 64 patches it leaves 0 visible", ""),
    (block(mask_ratio=0.001), "objectives.cl_mae.mask_ratio: 0.001; of 64 patches it leaves 64 visible", ""),
    (block(norm_pix=1), "objectives.cl_mae.norm_pix: 1; expected true or false", ""),
    (
        block("mae", mask="randm"),
        "objectives.mae.mask: unknown mask 'randm'; allowed: block, grid, growing_block,",
        "'random'?",
    ),
    (
        block(relaxation="atend"),
        "objectives.cl_mae.relaxation: unknown relaxation 'atend'; allowed:",
        "'attend'?",
    ),
    (
        block(curriculum={"name": "liner"}),
        "objectives.cl_mae.curriculum: unknown curriculum 'liner'",
        "'linear'?",
    ),
    (
        block(curriculum={"start": 1.0}),
        "objectives.cl_mae.curriculum.name: missing; expected one of",
        "linear",
    ),
    (
        block(curriculum={"name": "linear", "stop": 1}),
        "objectives.cl_mae.curriculum.stop: unknown key",
        "start",
    ),
    (
        block(curriculum={"name": "linear", "end": "x"}),
        "objectives.cl_mae.curriculum.end: 'x'; expected a n",
        "",
    ),
    (block(curriculum={"name": "linear", "hold": 0.7}), "objectives.cl_mae: ", "0.7"),
    (
        block(masker={"dept": 5}),
        "objectives.cl_mae.masker.dept: unknown key; allowed: width, depth, heads,",
        "'depth'?",
    ),
    (
        block(masker={"heads": 5}),
        "objectives.cl_mae.masker.heads: 5; does not divide the encoder's width",
        "",
    ),
    (block(masker={"every": 0}), "objectives.cl_mae: ", "every"),
    (block(masker={"head": "tokens"}), "objectives.cl_mae.masker.head: 'tokens'; expected cls or token", ""),
    (block(masker={"width": 30, "heads": 4}), "objectives.cl_mae.masker.heads: 4; does not divide its", "30"),
    (block(estimator="soft", masker={"reach": 2}), "objectives.cl_mae: masker.reach", "estimator rank"),
    (block(estimator="sort"), "objectives.cl_mae.estimator: unknown estimator 'sort'; allowed: ", "'soft'?"),
    (
        block(estimator={"name": "rank", "loss": "pair"}),
        "objectives.cl_mae.estimator.loss: 'pair'; expected regression or pairs",
        "",
    ),
    (block(grouping="deals"), "objectives.cl_mae.grouping: 'deals'; expected assign or deal", ""),
    (block(parts={}, mask_ratio=0.6), "objectives.cl_mae: ", "0.6"),
    (block(parts={"weigth": 1.0}), "objectives.cl_mae.parts.weigth: unknown key; allowed: ", "'weight'?"),
    (block(teacher={"momentum": "cosin"}), "objectives.cl_mae.teacher.momentum: 'cosin'; expected ", ""),
    (block(teacher={"start": 2.0}), "objectives.cl_mae: teacher: ", "start=2.0"),
    (
        block(temperature={"begin": 2}),
        "objectives.cl_mae.temperature.begin: unknown key; allowed: start,",
        "",
    ),
    (block(temperature={"start": 2}), "objectives.cl_mae.temperature.end: missing", ""),
    (block(temperature=-1.0), "objectives.cl_mae: expected 0 <= amount", "-1.0"),
    (block(share=1.5), "objectives.cl_mae: expected 0 <= amount <= 1", "1.5"),
    (block("emae", mask_ratio=0.5), "objectives.emae: parts: two never hide", "0.66"),
    (block("emae", mask={"name": "growing_ratio"}), "objectives.emae: parts: ", "grow"),
    (block(estimator="policy", temperature=0.0, masker={}), "objectives.cl_mae: estimator policy", "chance"),
    (block(excess=True, teacher=None), "objectives.cl_mae: excess", "teacher: {}"),
    (block(estimator="rank", relaxation="scale"), "objectives.cl_mae: relaxation: estimator rank", "soft"),
    (
        block(estimator="frozen", kl="released", masker={}),
        "objectives.cl_mae: kl: estimator frozen",
        "soft and policy",
    ),
    (
        block(estimator="policy", masker={}, weights={"gauss": 1.0}),
        "objectives.cl_mae: weights.gauss: ",
        "soft",
    ),
    (
        block(estimator="soft", masker={}, excess=True, teacher={}),
        "objectives.cl_mae: excess: estimator soft",
        "rank",
    ),
    (
        block(masker={"fraction": 0.5, "every": 1.5}),
        "objectives.cl_mae.masker.every: 1.5; expected a whole",
        "",
    ),
    (block(masker=5), "objectives.cl_mae.masker: 5; expected indented keys", ""),
    (
        block(weights={"gaus": 1.0}),
        "objectives.cl_mae.weights.gaus: unknown key; allowed: gauss, kl,",
        "'gauss'?",
    ),
    ({"model": {**PARAMS["model"], "preset": "mikro"}}, "model.preset: unknown preset 'mikro'", "'micro'?"),
    ({"model": {**PARAMS["model"], "heads": 7}}, "model.heads: 7 does not divide the width 64", ""),
    ({"model": {**PARAMS["model"], "decoder_heads": 7}}, "model.decoder_heads: 7 does not divide", ""),
    (
        {"train": {**PARAMS["train"], "device": "cuda:99"}},
        "train.device: 'cuda:99'; torch sees",
        "cpu or auto",
    ),
]


@pytest.mark.parametrize("changes, start, part", BAD_BLOCKS, ids=[start for _, start, _ in BAD_BLOCKS])
def test_block_with_a_mistake(changes, start, part):
    line = str(refused(**changes))
    assert line.startswith(start) and part in line


def test_every_registered_objective_is_fine_with_its_defaults():
    for name in objectives:
        validate(parse({**PARAMS, "runs": ["x"], "objectives": {"x": {"objective": name}}}))


def test_all_blocks_are_checked_and_all_their_problems_told():
    blocks = {"a": {"objective": "mae", "mask": "x", "norm": 1}, "b": {"objective": "no"}}
    problems = refused(runs=["a"], objectives=blocks).problems
    assert [p.split(":")[0] for p in problems] == [
        "objectives.a.norm",
        "objectives.a.mask",
        "objectives.b.objective",
    ]


@given(st.sampled_from(sorted(PARAMS["objectives"])), st.data())
def test_no_value_in_a_block_escapes_as_a_traceback(name, data):
    key = data.draw(st.sampled_from(sorted(set(PARAMS["objectives"][name]) - {"objective"})))
    junk = st.none() | st.booleans() | st.integers(-5, 99) | st.floats() | st.text(max_size=4)
    value = data.draw(
        junk | st.lists(junk, max_size=2) | st.dictionaries(st.sampled_from(["name", "heads", "x"]), junk)
    )
    try:
        validate(parse({**PARAMS, **block(name, **{key: value})}))
    except ConfigError as error:
        assert str(error).startswith(f"objectives.{name}")


# ---- a stage


def cells(*sources, parameters="train = {}\nrun = None\nseed = None") -> dict:
    first = new_code_cell(parameters, metadata={"tags": ["parameters"]})
    return new_notebook(cells=[first, *map(new_code_cell, sources)])


@pytest.fixture
def repository(tmp_path):
    """A repository with stages of our making and one earlier result."""
    (tmp_path / "nbs/stages").mkdir(parents=True)
    (tmp_path / "results/notebooks").mkdir(parents=True)
    (tmp_path / "dvc.yaml").write_text("stages: {}\n")
    (tmp_path / "params.yaml").write_text((ROOT / "params.yaml").read_text())
    (tmp_path / "build").mkdir()

    def add(name, *sources, **kwargs):
        nbformat.write(cells(*sources, **kwargs), tmp_path / f"nbs/stages/10_{name}.ipynb")
        (tmp_path / f"results/notebooks/10_{name}.ipynb").write_text("earlier")
        return tmp_path

    return add


def result(root, name) -> str:
    return (root / f"results/notebooks/10_{name}.ipynb").read_text()


NOISY = """
import os, random, sys, time
print(train["base_lr"], type(train["flip"]), run, seed, os.environ["OMP_NUM_THREADS"], hash("x"))
print(os.getcwd()); sys.stdout.flush(); time.sleep(0.2); print(object())
print("a warning", file=sys.stderr)
with open(os.environ["CLMAE_PROGRESS"], "a") as side:
    print("half way", file=side)
time.sleep(0.5)
"""


def test_stage_leaves_the_same_tidy_bytes_twice(repository, capfd):
    root = repository("noisy", NOISY, "object()", "1 + 1")
    found = []
    for _ in range(2):
        path = run_stage("noisy", ["train"], run="mae", seed=3, root=root)
        found.append(path.read_bytes())
    assert path == root / "results/notebooks/10_noisy-mae-3.ipynb"
    assert found[0] == found[1]
    notebook = nbformat.reads(found[0].decode(), 4)
    nbformat.validate(notebook)
    printed, *values = [output for cell in notebook.cells for output in cell.outputs]
    train = read_params(ROOT / "params.yaml").train
    start = f"{train.base_lr} <class 'bool'> mae 3 {train.threads} "
    assert printed.text.startswith(start) and "a warning" not in printed.text
    assert values[0].data["text/plain"] == "<object at 0x…>" and values[1].data["text/plain"] == "2"
    assert str(root) not in found[0].decode() and "papermill" not in found[0].decode()
    said = capfd.readouterr().err
    assert "a warning" in said and "half way\n" in said
    assert json.loads((root / "build/timings/noisy-mae-3.json").read_text())["seconds"] > 0
    left = [p for p in (root / "build").rglob("*") if p.is_file() and "ipython" not in p.parts]
    assert {p.name for p in left} == {"validated", "noisy-mae-3.json"}


def test_users_mistake_inside_a_stage_is_one_line_and_keeps_earlier_results(repository):
    define = "from clmae.config import UserError\nclass DataError(UserError): pass"
    root = repository("empty", define, "raise DataError('data: no image; add some')")
    with pytest.raises(UserError) as caught:
        run_stage("empty", ["train"], root=root)
    assert str(caught.value) == "data: no image; add some"
    assert result(root, "empty") == "earlier"
    assert "DataError" in (root / "build/failed/10_empty.ipynb").read_text()


def test_any_other_failure_keeps_its_story_and_the_notebook(repository):
    root = repository("broken", "print('so far')", "def f():\n    return 1 / 0\n\nf()")
    with pytest.raises(StageError) as caught:
        run_stage("broken", ["train"], root=root)
    assert str(caught.value) == (
        "stage broken: ZeroDivisionError in cell 4; the notebook so far is build/failed/10_broken.ipynb"
    )
    assert "return 1 / 0" in caught.value.story and "\x1b" not in caught.value.story
    assert result(root, "broken") == "earlier"
    assert "so far" in (root / "build/failed/10_broken.ipynb").read_text()


def test_dead_kernel_is_said_to_be_dead(repository):
    root = repository("dies", "import os; os._exit(1)")
    with pytest.raises(StageError, match="its kernel died, most often because memory ran out") as caught:
        run_stage("dies", ["train"], root=root)
    for cure in ("train.accumulate", "evaluate.batch_size"):
        assert cure in str(caught.value)
        section, key = cure.split(".")
        assert key in read_yaml(ROOT / "params.yaml")[section]


@pytest.mark.parametrize(
    "call, said",
    [
        ({"name": "pretain"}, "unknown stage 'pretain'; allowed: pretrain; did you mean 'pretrain'?"),
        ({"name": "pretrain", "keys": ["trian"]}, "unknown section 'trian'"),
        ({"name": "pretrain", "keys": ["train.epoch"]}, "train: unknown key 'epoch'"),
        (
            {"name": "pretrain", "keys": ["model"]},
            "its notebook has no parameter 'model'; allowed: run, seed, train",
        ),
        ({"name": "pretrain", "keys": ["objectives.rc"]}, "objectives: unknown key 'rc'"),
    ],
)
def test_call_with_a_mistake_starts_no_kernel(repository, call, said):
    root = repository("pretrain", "open('ran', 'w')")
    with pytest.raises(UserError) as caught:
        run_stage(**call, root=root)
    assert said in str(caught.value) and not (root / "ran").exists()


def test_bad_parameters_stop_a_stage_that_does_not_read_them(repository):
    root = repository("prepare", "open('ran', 'w')")
    run = lambda: run_stage("prepare", ["train"], root=root)  # noqa: E731
    text = (root / "params.yaml").read_text()
    (root / "params.yaml").write_text(text.replace("mask: random", "mask: randm"))
    with pytest.raises(ConfigError, match="params.yaml: objectives.mae.mask: unknown mask 'randm'"):
        run()
    with pytest.raises(ConfigError, match="objectives.mae.mask"):  # and a second time: nothing was remembered
        run()
    assert not (root / "ran").exists() and result(root, "prepare") == "earlier"


def test_stage_outside_a_repository(tmp_path):
    with pytest.raises(UserError, match="no dvc.yaml here or above"):
        run_stage("prepare", root=tmp_path)


def test_missing_extra_names_what_to_install():
    with pytest.raises(UserError, match=r"not_there is not installed.*pip install -e '\.\[repro\]'"):
        needs("not_there")


def test_environment_is_put_back():
    before = dict(os.environ)
    with pytest.raises(KeyError), environment({"PATH": "nowhere", "CLMAE_NEW": "1"}):
        assert os.environ["PATH"] == "nowhere"
        raise KeyError
    assert dict(os.environ) == before


def wait_for(path, seconds=600):
    for _ in range(int(seconds * 10)):
        if path.exists() and path.read_text():
            return path.read_text()
        time.sleep(0.1)
    raise AssertionError(f"{path} never came")


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_stage_stops_its_kernel_and_says_how_to_go_on(repository, sent):
    root = repository(
        "long", "import os, time\nwith open('pid', 'w') as f: f.write(str(os.getpid()))\ntime.sleep(300)"
    )
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "clmae", "stage", "long", "-P", "train"]
    stage = subprocess.Popen(
        command,
        cwd=root,
        env=env,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    kernel = wait_for(root / "pid")
    stage.send_signal(sent)
    said = stage.communicate(timeout=300)[1]
    assert stage.returncode == 130
    assert (
        said.strip().splitlines()[-1] == "clmae: interrupted; `dvc repro` continues from the last checkpoint"
    )
    assert "Traceback" not in said and result(root, "long") == "earlier"
    for _ in range(50):
        if not Path(f"/proc/{kernel}").exists():
            return
        time.sleep(0.1)
    raise AssertionError("the kernel is still there")


SAVES = """import os, signal, time
from clmae.config import Stopped
given = []
for each in (signal.SIGTERM, signal.SIGUSR1):
    signal.signal(each, lambda number, _: given.append(signal.Signals(number).name))
with open('pid', 'w') as f:
    f.write(str(os.getpid()))
while not given:
    time.sleep(0.01)
open('saved', 'w').write('all')
raise Stopped(f"stopped by {given[0]} after step 3 of 9, which is saved; run the same to go on")
"""


def begun(root, *before):
    """The stage `long`, started by the command `before` in a session of its own; its kernel is at work."""
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [*before, sys.executable, "-m", "clmae", "stage", "long", "-P", "train"]
    stage = subprocess.Popen(
        command, cwd=root, env=env, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    wait_for(root / "pid")
    return stage


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGUSR1])
def test_asked_to_stop_a_stage_lets_its_kernel_save(repository, sent):
    root = repository("long", SAVES)
    stage = begun(root)
    stage.send_signal(sent)
    said = stage.communicate(timeout=300)[1]
    line = f"stopped by {sent.name} after step 3 of 9, which is saved; run the same to go on"
    assert said.strip().splitlines()[-1] == f"clmae: {line}" and "Traceback" not in said
    assert stage.returncode == 2  # not 0, which DVC would take for done
    assert (root / "saved").read_text() == "all" and result(root, "long") == "earlier"


WAITING = ["sh", "-c", '"$@"; true', "sh"]  # a shell that stays between us and the command
STAGE = ["env", "DVC_STAGE=long"]


@pytest.mark.parametrize("before", [[*STAGE, *WAITING], [*WAITING, *STAGE], [*WAITING, *STAGE, *WAITING]])
def test_a_stage_whose_dvc_or_shell_has_gone_saves_and_stops(repository, before):
    root = repository("long", SAVES)
    stage = begun(root, *before)
    stage.kill()
    said = stage.stderr.read()  # until the stage has ended, too
    assert "clmae: stopped by SIGTERM after step 3 of 9" in said and (root / "saved").exists()


def test_second_repro_at_the_same_time_is_refused_by_dvc(tmp_path):
    environ = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    dvc = [sys.executable, "-m", "dvc"]
    run = lambda *a: subprocess.run([*dvc, *a], cwd=tmp_path, env=environ, capture_output=True, text=True)  # noqa: E731
    assert run("init", "--no-scm", "-q").returncode == 0
    (tmp_path / ".dvc/config").write_text(
        "[core]\n no_scm = true\n analytics = false\n check_update = false\n"
    )
    (tmp_path / "out").write_text("earlier")
    cmd = "echo yes > started && until test -e go; do sleep 0.1; done && echo done > out"
    (tmp_path / "dvc.yaml").write_text(
        json.dumps({"stages": {"slow": {"cmd": cmd, "outs": [{"out": {"cache": False}}]}}})
    )
    first = subprocess.Popen(
        [*dvc, "repro"], cwd=tmp_path, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    try:
        wait_for(tmp_path / "started")
        second = run("repro")
    finally:
        (tmp_path / "go").touch()
        first.communicate(timeout=60)
    assert second.returncode != 0 and "Traceback" not in second.stderr
    assert "busy" in second.stderr or "lock" in second.stderr
    assert first.returncode == 0 and (tmp_path / "out").read_text() == "done\n"


def test_a_stage_draws_with_matplotlibs_own_settings(tmp_path):
    (tmp_path / "matplotlibrc").write_text("savefig.dpi: 300")
    users = {k: v for k, v in os.environ.items() if k != "MATPLOTLIBRC"} | {"MPLCONFIGDIR": str(tmp_path)}
    ask = [sys.executable, "-c", "import matplotlib; print(matplotlib.rcParams['savefig.dpi'])"]
    found = [
        subprocess.check_output(ask, env=users | more, text=True).strip()
        for more in ({}, {"MATPLOTLIBRC": surroundings(tmp_path, 1, "progress")["MATPLOTLIBRC"]})
    ]
    assert found == ["300.0", "figure"]


def test_a_stage_runs_in_its_own_environment_whatever_kernel_the_user_has_installed(
    repository, tmp_path, monkeypatch
):
    spec = {"argv": ["false"], "display_name": "mine", "language": "python"}
    (tmp_path / "jupyter/kernels/python3").mkdir(parents=True)
    (tmp_path / "jupyter/kernels/python3/kernel.json").write_text(json.dumps(spec))
    monkeypatch.setenv("JUPYTER_DATA_DIR", str(tmp_path / "jupyter"))
    monkeypatch.setenv(
        "JUPYTER_PREFER_ENV_PATH", "0"
    )  # as Jupyter decides in an environment of somebody else's
    root = repository("noisy", "import sys\nprint(sys.executable)")
    path = run_stage("noisy", ["train"], root=root)
    assert "python" in nbformat.read(path, 4).cells[-1].outputs[0].text


# ---- tidying

TEXT = st.text(alphabet="ab\n\r 0x1f", max_size=30)


@given(st.lists(st.tuples(st.sampled_from(["stdout", "stderr"]), TEXT), max_size=5), st.data())
def test_tidy_is_idempotent_and_blind_to_how_a_stream_was_cut(pieces, data):
    def notebook(pieces):
        outputs = [new_output("stream", name=name, text=text) for name, text in pieces]
        return new_notebook(cells=[new_code_cell("x", outputs=outputs, id="one")])

    whole = tidy(notebook(pieces), "/root")
    assert tidy(whole, "/root") == whole
    cut = []
    for name, text in pieces:
        at = data.draw(st.integers(0, len(text)))
        cut += [(name, text[:at]), (name, text[at:])]
    ours, theirs = (
        ["".join(o["text"] for o in nb.cells[0].outputs)] for nb in (whole, tidy(notebook(cut), "/root"))
    )
    assert ours == theirs


def test_tidy_keeps_pictures_and_removes_paths_from_tables():
    data = {
        "image/png": "/here/abc",
        "text/html": "<td>/here/build/x at 0x7fa812345678</td>",
        "text/plain": "x",
    }
    notebook = new_notebook(cells=[new_code_cell("x", outputs=[new_output("display_data", data=data)])])
    [output] = tidy(notebook, "/here").cells[0].outputs
    assert output.data == {
        "image/png": "/here/abc",
        "text/html": "<td>build/x at 0x…</td>",
        "text/plain": "x",
    }


# ---- parameters


def test_chosen_parts_are_handed_over_with_defaults_filled_in():
    config = read_params(ROOT / "params.yaml")
    got = chosen(config, ["train", "evaluate.k", "evaluate.seed", "objectives.mae", "runs"], run=None, seed=0)
    assert got["train"]["base_lr"] == config.train.base_lr and got["train"]["betas"] == list(
        config.train.betas
    )
    assert got["evaluate"] == {"k": config.evaluate.k, "seed": config.evaluate.seed}
    assert got["objective"] == config.objectives["mae"] and got["runs"] == list(config.runs)
    assert got["seed"] == 0 and "run" not in got
    json.dumps(got)


# ---- README


def index(*cells):
    return new_notebook(cells=list(cells))


def test_readme_shows_prose_code_and_what_it_prints():
    code = new_code_cell("#| echo: true\nprint(1)", outputs=[new_output("stream", text="1\n")])
    table = new_code_cell(
        "#| echo: false\nf()", outputs=[new_output("execute_result", data={"text/markdown": "|a|"})]
    )
    hidden = new_code_cell("#| hide\nimport x")
    text = readme(
        index(new_markdown_cell("# T\n[m](04_m.ipynb) ![f](../results/figures/f.png)"), code, table, hidden)
    )
    prose = "# T\n[m](nbs/04_m.ipynb) ![f](results/figures/f.png)"
    assert text.endswith(f"{prose}\n\n```python\nprint(1)\n```\n\n```\n1\n```\n\n|a|\n")


def test_readme_refuses_a_picture_inside_the_notebook():
    cell = new_code_cell("f()", outputs=[new_output("display_data", data={"image/png": "x"})])
    with pytest.raises(UserError, match="save it under results/figures"):
        readme(index(cell))


def test_readme_check_sees_a_difference(tmp_path):
    (tmp_path / "nbs").mkdir()
    nbformat.write(index(new_markdown_cell("# T")), tmp_path / "nbs/index.ipynb")
    with pytest.raises(UserError, match="README.md: differs"):
        write_readme(tmp_path, check=True)
    write_readme(tmp_path)
    write_readme(tmp_path, check=True)
    (tmp_path / "README.md").write_text("# T, edited")
    with pytest.raises(UserError, match="run `python -m clmae readme`"):
        write_readme(tmp_path, check=True)
    assert (tmp_path / "README.md").read_text() == "# T, edited"


# ---- comparing results

NUMBERS = st.integers(-1000, 1000) | st.floats(-1e6, 1e6)


@given(NUMBERS, NUMBERS, st.floats(0, 1))
def test_close_is_symmetric_and_exact_at_zero(a, b, tolerance):
    assert close(a, a, 0) and close(a, b, tolerance) == close(b, a, tolerance)
    assert close(a, b, 0) == (a == b)


def write(folder, **files):
    for name, content in files.items():
        path = folder / name.replace("__", "/").replace("_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return folder


def test_compare_judges_each_kind_of_file(tmp_path):
    a = write(
        tmp_path / "a", m_json='{"knn": 0.5, "name": "mae", "n": [1, 2]}', c__loss_tsv="step\tloss\n0\t1.5\n",
        f_png="one", gone_json="{}", recorded__t_json='{"s": 1}',
    )  # fmt: skip
    b = write(
        tmp_path / "b", m_json='{"knn": 0.51, "name": "cl", "n": [1]}', c__loss_tsv="step\tloss\n0\t9.5\n",
        f_png="two", new_json="{}", recorded__t_json='{"s": 2}',
    )  # fmt: skip
    found = {(d.file, d.key): d.verdict for d in compare(a, b, tolerance=0.02)}
    assert found == {
        ("c/loss.tsv", "1.1"): "different",
        ("f.png", ""): "noted",
        ("gone.json", ""): "different",
        ("m.json", "knn"): "within",
        ("m.json", "n.1"): "different",
        ("m.json", "name"): "different",
        ("new.json", ""): "different",
    }
    assert compare(a, a) == []


@pytest.fixture
def published(tmp_path):
    """A repository with data, one stage and its result; returns a function that commits another result."""
    top = tmp_path / "published"
    (top / "data").mkdir(parents=True)
    environ = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    run = lambda *command: subprocess.run(command, cwd=top, env=environ, check=True, capture_output=True)  # noqa: E731

    def change(text):
        (top / "results/made.json").write_text(text)
        run("git", "add", "-A")
        run("git", "-c", "user.name=x", "-c", "user.email=x@x", "commit", "-q", "-m", "x")
        return top

    (top / "data/one.json").write_text('{"knn": 0.5}')
    stage = {
        "cmd": "cp data/one.json results/made.json",
        "deps": ["data"],
        "outs": [{"results/made.json": {"cache": False}}],
    }
    (top / "dvc.yaml").write_text(json.dumps({"stages": {"make": stage}}))
    (top / "results").mkdir()
    run("git", "init", "-q")
    run(sys.executable, "-m", "dvc", "init", "-q")
    (top / ".dvc/config").write_text((ROOT / ".dvc/config").read_text())
    (top / ".gitignore").write_text("/build/\n")
    for command in (["add", "-q", "data"], ["push", "-q"], ["repro", "-q"]):
        run(sys.executable, "-m", "dvc", *command)
    return change


def test_verify_rebuilds_a_fresh_clone_from_the_embedded_data(published, capfd):
    top = published('{"knn": 0.5}')
    (top / "results/made.json").write_text("not committed")
    assert verify(top)
    assert capfd.readouterr().out.endswith("the rebuild has the same bytes as the committed results\n")
    assert (top / "results/made.json").read_text() == "not committed"
    published('{"knn": 0.7}')
    assert not verify(top)
    assert "made.json knn: 0.7 → 0.5\n1 different, 0 numbers within 0.02" in capfd.readouterr().out


def test_compare_tells_true_from_one(tmp_path):
    a, b = write(tmp_path / "a", x_json='{"v": true}'), write(tmp_path / "b", x_json='{"v": 1}')
    assert [d.verdict for d in compare(a, b, tolerance=1.0)] == ["different"]
