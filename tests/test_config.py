"""params.yaml against its mistakes: each is one line that names the key, the value and what is allowed."""

import copy
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from clmae.config import (
    SECTIONS,
    Config,
    ConfigError,
    UserError,
    nearest,
    parse,
    read_params,
    read_yaml,
    rows,
    table,
    unknown,
)

ROOT = Path(__file__).resolve().parent.parent
GOOD = {"runs": ["mae"], "objectives": {"mae": {"objective": "mae", "mask_ratio": 0.75}}}
KEYS = [(section, key) for section, model in SECTIONS.items() for key in model.model_fields]


def refused(values) -> str:
    with pytest.raises(ConfigError) as caught:
        parse(values)
    line = str(caught.value)
    assert "\n" not in line and line.strip() == line
    return line


def with_key(section, key, value):
    return {**copy.deepcopy(GOOD), section: {key: value}}


# ---- the committed file


def test_params_yaml_is_valid_and_every_default_is_written_once_in_effect():
    config = read_params(ROOT / "params.yaml")
    assert set(config.runs) <= set(config.objectives)
    for name in SECTIONS:
        written = read_yaml(ROOT / "params.yaml")[name]
        assert set(written) == set(SECTIONS[name].model_fields), name


def test_values_are_typed_and_cannot_be_changed():
    config = read_params(ROOT / "params.yaml")
    assert isinstance(config.train.base_lr, float) and isinstance(config.data.image_size, tuple)
    for target, key in [(config, "seeds"), (config.train, "epochs")]:
        with pytest.raises(ValidationError, match="frozen"):
            setattr(target, key, 5)


def test_a_section_survives_being_written_and_read_again():
    config = read_params(ROOT / "params.yaml")
    dumped = config.model_dump(mode="json")
    assert parse(dumped) == config
    for name, model in SECTIONS.items():
        assert model(**dumped[name]) == getattr(config, name)


# ---- one mistake, one line

MISTAKES = [
    ({"trian": {}}, "trian: unknown key; allowed: runs, seeds, data,", "did you mean 'train'?"),
    ({"train": {"epoch": 5}}, "train.epoch: unknown key; allowed: epochs, equal,", "did you mean 'epochs'?"),
    ({"train": {"patch_size": 8}}, "train.patch_size: unknown key;", "'patch_size' belongs under model"),
    ({"train": None}, "train: null; expected indented keys", ""),
    ({"train": {"epochs": 0}}, "train.epochs: 0; expected a whole number ≥ 1", ""),
    ({"train": {"epochs": 1.5}}, "train.epochs: 1.5; expected a whole number ≥ 1", ""),
    ({"train": {"epochs": True}}, "train.epochs: true; expected a whole number ≥ 1", ""),
    ({"train": {"base_lr": "1e-3"}}, "train.base_lr: '1e-3'; expected a number > 0", ""),
    ({"train": {"base_lr": True}}, "train.base_lr: true; expected a number > 0", ""),
    ({"train": {"base_lr": float("inf")}}, "train.base_lr: inf; expected a number > 0", ""),
    ({"train": {"clip": float("nan")}}, "train.clip: nan; expected a number > 0 or null", ""),
    ({"train": {"flip": 1}}, "train.flip: 1; expected true or false", ""),
    ({"train": {"equal": "flop"}}, "train.equal: 'flop'; expected flops or images", "did you mean 'flops'?"),
    ({"train": {"device": "gpu"}}, "train.device: 'gpu'; expected cpu, auto, cuda or cuda:N", ""),
    ({"train": {"precision": 16}}, "train.precision: 16; expected 32 or bf16", ""),
    ({"train": {"betas": [0.9]}}, "train.betas: [0.9]; expected [β1, β2], each ≥ 0 and < 1", ""),
    ({"train": {"crop_scale": [1.0, 0.2]}}, "train.crop_scale: [1.0, 0.2]; expected [lowest, highest]", ""),
    ({"train": {"warmup": 1.0}}, "train.warmup: 1.0; expected a number ≥ 0 and < 1", ""),
    (
        {"train": {"batch_size": 10, "accumulate": 3}},
        "train.accumulate: 3 does not divide train.batch_size 10",
        "",
    ),
    (
        {"data": {"image_size": [64, 64, 3]}},
        "data.image_size: [64, 64, 3]; expected a whole number ≥ 1 or [h",
        "",
    ),
    ({"data": {"root": 5}}, "data.root: 5; expected a path", ""),
    ({"model": {"patch_size": 7}}, "model.patch_size: 7 does not divide the height 64", "2, 4, 8"),
    ({"model": {"patch_size": [8, 5]}}, "model.patch_size: 5 does not divide the width 64", ""),
    ({"model": {"width": 96, "heads": 5}}, "model.heads: 5 does not divide model.width 96", ""),
    ({"model": {"decoder_width": 64, "decoder_heads": 3}}, "model.decoder_heads: 3 does not divide", ""),
    ({"evaluate": {"probe_c": []}}, "evaluate.probe_c: []; expected a list of numbers > 0", ""),
    ({"runs": ["mea"]}, "runs: unknown objective block 'mea'; allowed: mae", "did you mean 'mae'?"),
    ({"runs": []}, "runs: []; expected a list of names", ""),
    ({"runs": "mae"}, "runs: 'mae'; expected a list of names", ""),
    ({"runs": ["mae", "mae"]}, "runs: 'mae' is listed twice", ""),
    ({"runs": ["../x"]}, "runs: ['../x']; expected a list of names", ""),
    ({"seeds": [0, -1]}, "seeds: [0, -1]; expected a list of whole numbers ≥ 0", ""),
    ({"objectives": {}}, "objectives: {}; expected blocks of keys", ""),
    ({"objectives": {"mae": "mae"}}, "objectives.mae: 'mae'; expected blocks of keys", ""),
    ({"objectives": {"mae": {"mask_ratio": 0.5}}}, "objectives.mae.objective: missing;", ""),
]


@pytest.mark.parametrize(
    "wrong, start, part", MISTAKES, ids=[start.split(";")[0] for _, start, _ in MISTAKES]
)
def test_mistake(wrong, start, part):
    line = refused({**GOOD, **wrong})
    assert line.startswith(start) and part in line


@pytest.mark.parametrize("name", ["runs", "objectives"])
def test_missing_key(name):
    values = {k: v for k, v in GOOD.items() if k != name}
    assert refused(values).startswith(f"{name}: missing; expected")


def test_every_problem_is_found_at_once():
    wrong = {**GOOD, "train": {"epochs": "60", "betas": ["x", 2]}, "data": {"seed": -1}}
    with pytest.raises(ConfigError) as caught:
        parse(wrong)
    assert [p.split(":")[0] for p in caught.value.problems] == ["data.seed", "train.epochs", "train.betas"]
    assert str(caught.value).endswith("(also wrong: train.epochs, train.betas)")


@pytest.mark.parametrize("section, key", KEYS, ids=".".join)
def test_every_key_refuses_a_value_of_no_type_it_knows(section, key):
    line = refused(with_key(section, key, {"no": "such"}))
    assert line.startswith(f"{section}.{key}: {{no: 'such'}}; expected ")


@given(st.sampled_from(KEYS), st.data())
def test_a_slip_of_the_finger_is_offered_the_right_name(where, data):
    section, name = where
    slips = [name[:i] + name[i + 1 :] for i in range(len(name))] + [name + "s"]
    fields = SECTIONS[section].model_fields
    slip = data.draw(st.sampled_from([s for s in slips if s and len(s) > 1] or ["zz"]))
    if any(slip in model.model_fields for model in SECTIONS.values()):
        return
    line = refused(with_key(section, slip, 1))
    assert line.startswith(f"{section}.{slip}: unknown key; allowed: {', '.join(fields)}")
    if len(name) > 3:
        assert "did you mean" in line


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@given(st.sampled_from([*KEYS, ("runs", ""), ("seeds", ""), ("objectives", ""), ("train", "")]), JUNK)
def test_whatever_is_written_is_a_config_or_one_line(where, junk):
    section, key = where
    values = with_key(section, key, junk) if key else {**GOOD, section: junk}
    try:
        assert isinstance(parse(values), Config)
    except ConfigError as error:
        assert len(str(error).splitlines()) == 1


# ---- the file


@pytest.mark.parametrize(
    "text, said",
    [
        ("seeds: [0]\nseeds: [1]", 'line 2, column 1: found duplicate key "seeds"'),
        ("train:\n  epochs: 1\n  epochs: 2", 'line 3, column 3: found duplicate key "epochs"'),
        ("train: {a: 1\nseeds: [0]", "line 2, column 6: "),
        ("train:\n\tepochs: 3", "line 2, column 1: "),
        ("a: *nowhere", "line 1, column 4: "),
        ("", "holds null; expected sections"),
        ("- 1", "holds [1]; expected sections"),
        ("runs: [mae]\nobjectives: {mae: {objective: mae}}\ntrain: {epoch: 1}", "train.epoch: unknown key"),
    ],
)
def test_file_with_a_mistake(tmp_path, text, said):
    path = tmp_path / "params.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_params(path)
    line = str(caught.value)
    assert line.startswith(f"{path}: {said}") and "\n" not in line


def test_file_that_cannot_be_read(tmp_path):
    with pytest.raises(ConfigError, match="no such file; run where it lies"):
        read_params(tmp_path / "params.yaml")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_params(tmp_path)
    (tmp_path / "latin").write_bytes("größe: 1".encode("latin-1"))
    with pytest.raises(ConfigError, match="cannot be read as UTF-8"):
        read_params(tmp_path / "latin")


def test_yaml_is_read_as_dvc_reads_it(tmp_path):
    path = tmp_path / "params.yaml"
    path.write_text("a: 1e-3\nb: on\nc: 010\nd: 1_000\ne: 12:30:00\nf: .5\ng: '1'\nh: ~\ni: 0o17\n")
    from dvc.utils.serialize import load_yaml

    assert read_yaml(path) == load_yaml(str(path))
    assert read_yaml(path)["a"] == 0.001 and read_yaml(path)["b"] == "on"


# ---- words


def test_nearest_and_unknown():
    assert nearest("randm", ["random", "grid"]) == "; did you mean 'random'?"
    assert nearest("xyz", ["random"]) == nearest("x", []) == ""
    error = unknown("rule", "randm", {"random": 1, "block": 2}, key="mask")
    assert str(error) == "mask: unknown rule 'randm'; allowed: block, random; did you mean 'random'?"
    assert isinstance(error, UserError)


def test_table_has_every_key_with_what_it_means():
    found = {key: (meaning, allowed, default) for key, meaning, allowed, _, default in rows()}
    expected = {f"{s}.{k}" for s, k in KEYS} | {"runs", "seeds", "objectives"}
    assert set(found) == expected
    assert all(meaning and allowed and default for meaning, allowed, default in found.values())
    assert found["train.device"][2] == "'cpu'" and found["train.clip"][2] == "null"
    assert table().count("\n") == len(expected) + 1


def test_config_needs_no_torch():
    code = "import sys, clmae.config; print('torch' in sys.modules or 'numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr
