"""The benchmark computes what it says and keeps what it measured; no time is asserted anywhere."""

import json
import math
import subprocess
from dataclasses import replace
from statistics import median

import numpy as np
import pytest
import torch

from bench import contestants, ladder, peak, record, run
from bench import input as reading
from bench.contestants import Contestant, same_loss, same_size
from clmae.config import read_params
from clmae.data import cores
from clmae.files import find_root, read_json
from clmae.losses import GAUSS_WEIGHT
from clmae.machine import machine
from clmae.masking import Draw
from clmae.objectives import make_objective

QUICK = replace(run.CASES["quick"], batch=3, rounds=1)
PARAMS = read_params(find_root() / "params.yaml")
CLAIMS = read_json(find_root() / "bench/claims.json")
RELEASED = PARAMS.objectives["cl_mae_released"]
# the released KL is a sum over images in float32: the same in float64 is our mean, weighted by their number
EXACT = RELEASED | {
    "kl": "mean",
    "weights": {"gauss": GAUSS_WEIGHT, "kl": 0.1 * QUICK.batch, "diversity": 2.0},
}


def absent(name: str) -> bool:
    try:
        __import__(name)
    except ModuleNotFoundError:
        return True
    return False


@pytest.fixture
def phases():
    """Our released CL-MAE and the textbook's, of the same weights, in float64; images; a draw."""
    objective = make_objective(QUICK.mae(), epochs=contestants.EPOCHS, **EXACT).double()
    theirs = contestants.textbook_cl_mae(QUICK.mae()).double()
    theirs.load_state_dict(objective.state_dict())
    return objective, theirs, QUICK.images().double(), Draw(seed=(0,), total=QUICK.batch)


def gradients(net) -> dict:
    return {name: p.grad for name, p in net.named_parameters() if p.grad is not None and p.grad.any()}


@pytest.mark.parametrize("phase", ["mae", "masker"])
def test_the_textbook_moves_what_ours_moves(phases, phase):
    objective, theirs, images, draw = phases
    net = objective.nets[phase]
    objective.loss(phase, images, 0.25, draw).total.backward(inputs=list(net.parameters()))
    if phase == "mae":
        theirs.mae_phase(images).backward()
    else:
        theirs.masker_phase(images, objective.factor(0.25)).backward()
    want, have = gradients(objective), gradients(theirs)
    assert want and set(have) == set(want) and all(name.startswith(phase) for name in have)
    for name, gradient in want.items():
        assert (have[name] - gradient).norm() <= 1e-9 * gradient.norm(), name


def test_losses_agree_where_the_same_is_computed():
    found = contestants.check(QUICK, PARAMS)
    assert {"MAE, textbook", "CL-MAE, textbook A", "CL-MAE, textbook B, diversity_loop"} <= set(found)
    assert max(found.values()) <= contestants.TOLERANCE


@pytest.mark.skipif(
    absent("transformers") or absent("lightly"),
    reason="needs transformers and lightly: pip install -c requirements.lock -r bench/requirements.txt",
)
def test_other_libraries_compute_the_same_with_as_many_parameters():
    found = contestants.check(QUICK, PARAMS)
    assert found["MAE, Hugging Face"] <= 1e-5 and found["MAE, lightly"] <= 1e-5
    mae = QUICK.mae()
    for build in contestants.libraries().values():
        assert contestants.trainable(build(mae)) == contestants.trainable(mae)


def test_another_loss_is_refused(monkeypatch):
    def wrong(mae):
        net = contestants.textbook_mae(mae)
        with torch.no_grad():
            net.decoder.head.bias += 0.01
        return net

    monkeypatch.setattr(contestants, "libraries", lambda: {"MAE, other": wrong})
    with pytest.raises(ValueError, match="MAE, other: loss"):
        contestants.check(QUICK, PARAMS)
    with pytest.raises(ValueError, match="nan"):
        same_loss("x", torch.tensor(math.nan), torch.tensor(1.0))


def test_another_size_is_refused():
    sizes = {"MAE, ours": 10, "MAE, other": 11, "CL-MAE, ours faithful": 20, "CL-MAE, ours": 5}
    found = [Contestant(name, "32", size, {}) for name, size in sizes.items()]
    with pytest.raises(ValueError, match="MAE, other has 11 parameters, MAE, ours has 10"):
        same_size(found)
    same_size([c for c in found if c.name != "MAE, other"])


def test_rounds_are_interleaved_and_cycles_are_whole():
    seen = []
    found = [
        Contestant(
            name, "32", 1, {p: lambda step, n=name, p=p: seen.append((n, p, step)) for p in own}, cycle
        )
        for name, own, cycle in (("a", "x", 1), ("b", "xy", 1), ("c", "x", 3))
    ]
    samples = run.measure(found, 2, "cpu")
    assert [[set(s) for s in each] for each in samples] == [[{"x"}] * 2, [{"x", "y"}] * 2, [{"x"}] * 2]
    a, b, c = [("a", "x", 0)], [("b", "x", 0), ("b", "y", 0)], [("c", "x", step) for step in range(3)]
    assert seen == c + a + b + a + b + c + b + c + a  # warm-up and two rounds, each with another first


def test_ratios_are_medians_of_each_rounds_own():
    known = {
        (run.HF, "32"): [2.0, 30.0, 8.0],
        (run.MAE, "32"): [1.0, 10.0, 2.0],
        (run.MAE, "bf16"): [1.0, 1.0, 1.0],
    }
    first, across = run.ratios(known, ("32", "bf16"))
    assert (first["median"], first["low"], first["high"]) == (3.0, 2.0, 4.0)
    assert (across["of_precision"], across["to_precision"], across["median"]) == ("32", "bf16", 8.0)


def test_a_quick_run_prints_a_table_and_leaves_records_and_figure(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(
        contestants, "libraries", dict
    )  # theirs take seconds to import and have their own test
    assert run.main(["--quick", "--rounds", "2", "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "quick.json").read_text())
    rows = {(row["contestant"], row["precision"]): row for row in found["rows"]}
    names = [run.MAE, run.PLAIN, run.TEXT, run.SHORT, run.FAITHFUL, run.DEFAULT]
    assert set(rows) == {(name, precision) for name in names for precision in run.PRECISIONS}
    for row in rows.values():
        ms = row["milliseconds"]
        assert len(row["samples"]) == 2 and min(row["samples"]) > 0
        assert ms["median"] == pytest.approx(median(row["samples"]), abs=0.02)
        assert (ms["low"], ms["high"]) == (min(row["samples"]), max(row["samples"]))
        rate = row["images_per_second"]
        assert rate["low"] <= rate["median"] <= rate["high"] == pytest.approx(4000 / ms["low"], rel=0.02)
        if row["contestant"] not in (run.TEXT, run.SHORT):
            share = row["share_of_peak"]
            assert 0 <= share["low"] <= share["median"] <= share["high"] and row["teraflops"]["low"] > 0
    assert set(rows[run.TEXT, "32"]["phases"]) == {"A", "B"}
    assert found["machine"]["threads"] == torch.get_num_threads() and found["versions"]["torch"]
    assert found["command"] == f"python -m bench.run --quick --rounds 2 --out {tmp_path}"
    assert found["commit"].rstrip("+") == record.commit(find_root()).rstrip("+")
    printed = capsys.readouterr().out
    assert all(name in printed for name in names)
    assert {path.name for path in tmp_path.iterdir()} == {"quick.json", "speed.png", "speed.svg"}


def test_the_largest_case_is_an_mae_beside_the_peak(monkeypatch):
    monkeypatch.setattr(contestants, "libraries", dict)
    large = run.CASES["large-256"]
    assert large.preset == "large" and large.name in run.ON["cuda"]
    small = {"preset": "micro", "image": 32, "patch": 8, "batch": 2, "rounds": 1, "changes": {"depth": 1}}
    found = run.bench(replace(large, **small), "cpu", PARAMS, ("bf16",), sizes=(64,))
    assert set(found["agreement"]) == {run.PLAIN}
    assert [row["contestant"] for row in found["rows"]] == [run.MAE, run.PLAIN]
    assert all(row["share_of_peak"]["median"] > 0 for row in found["rows"])
    assert found["peak"]["bf16"]["what"] == "matrix product of 64 × 64"


def test_compiled_ones_compete_when_asked(monkeypatch):
    seen = []
    monkeypatch.setattr(contestants, "libraries", lambda: {run.HF: contestants.textbook_mae})
    monkeypatch.setattr(contestants, "compile_blocks", seen.append)
    monkeypatch.setattr(torch, "compile", lambda net: seen.append(net) or net)
    case = replace(QUICK, mae_only=True)
    names = [c.name for c in contestants.contestants(case, "32", "cpu", PARAMS, compiled=True)]
    assert names == [run.MAE, run.HF, run.PLAIN, run.COMPILED, run.HF_COMPILED] and len(seen) == 2
    known = {(name, "bf16"): [float(i)] for i, name in enumerate(names, 1)}
    asked = {(row["of"], row["to"]): row["median"] for row in run.ratios(known, ("bf16",))}
    assert asked[run.HF_COMPILED, run.COMPILED] == 1.25


def test_the_peak_is_that_of_the_fastest_size(monkeypatch):
    monkeypatch.setattr(peak, "rate", lambda step, device: 1.0)  # each size as fast: the largest does most
    found = peak.probe("32", "cpu", (16, 64, 32), count=3)
    assert found.name == "matrix product of 64 × 64" and found.operations == 3 * 2 * 64**3
    found.phases["step"](0)
    each = run.peaks([found], [[{"step": 2.0}, {"step": 1.0}]])["32"]["rounds"]
    assert each == pytest.approx([3 * 64**3 / 1e12, 6 * 64**3 / 1e12])
    mine = Contestant("x", "32", 1, {}, operations=found.operations)
    told = run.share_of_peak(mine, [4.0, 4.0], {"rounds": each})
    assert (told["share_of_peak"]["low"], told["share_of_peak"]["high"]) == (0.25, 0.5)
    assert run.share_of_peak(Contestant("y", "32", 1, {}), [1.0], {"rounds": each}) == {}


def test_a_product_is_a_product(monkeypatch):
    a, b, room = peak.operands(8, "bf16", "cpu")
    assert a.dtype == room.dtype == torch.bfloat16 and peak.rate(peak.product(8, "32", "cpu", 1), "cpu") > 0
    monkeypatch.setattr(peak, "rate", lambda step, device: 1.0)  # each size as fast: the largest does most
    assert peak.fastest("32", "cpu", (8, 128)) == 128


def test_a_record_says_what_made_it(tmp_path):
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench/run.py").write_text("1")
    for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "x"]):
        subprocess.run([*git, *words], check=True)
    clean = record.about(tmp_path, "bench.run", ["--case", "a b"], "cpu", ["torch"])
    assert clean["command"] == "python -m bench.run --case 'a b'" and len(clean["commit"]) == 40
    (tmp_path / "bench/run.py").write_text("2")
    assert record.commit_of(tmp_path) == clean["commit"] + "+"


def test_photographs_have_the_spectrum_of_photographs():
    image = reading.photograph(np.random.default_rng(0), (96, 128))
    assert image.shape == (96, 128, 3) and image.dtype == np.uint8 and image.std() > 30
    power = np.abs(np.fft.rfft2(image.mean(2) - image.mean())) ** 2
    f = np.hypot(np.fft.fftfreq(96)[:, None], np.fft.rfftfreq(128)[None])
    inside = (f > 0.02) & (f < 0.2)
    slope = np.polyfit(np.log(f[inside]), np.log(power[inside]), 1)[0]
    assert -2.5 < slope < -1.5  # power falls as 1/f²


def test_every_way_to_read_is_measured_beside_the_training():
    found = reading.measure(reading.QUICK, "cpu", "32")
    paths = [(row["path"], row["workers"]) for row in found["paths"]]
    assert paths[:3] == [("device-resident", None), ("memory map", None), ("shards", 1)]
    assert paths[-1] == ("shards", cores())
    for row in found["paths"]:
        ratio = row["images_per_second"]["median"] / found["training"]["images_per_second"]["median"]
        assert row["times_training"] == pytest.approx(ratio, rel=0.1)
        assert row["bottleneck"] == (row["times_training"] < 1)
        low, high = (row["times_training_spread"][end] for end in ("low", "high"))
        assert low - 1e-3 <= row["times_training"] <= high + 1e-3
    whole = {"device": "cpu", "machine": machine("cpu"), "sizes": [found]}
    assert reading.table(whole).count("shards") == len(paths) - 2


# ---- the ladder


def test_operations_belong_to_a_kind():
    assert ladder.group_of("aten::addmm") == "matrix products"
    assert ladder.group_of("aten::_scaled_dot_product_flash_attention_for_cpu") == "attention"
    assert ladder.group_of("aten::native_layer_norm_backward") == "activation and norm"
    assert ladder.group_of("aten::_fused_adamw_") == "optimizer"
    assert ladder.group_of("aten::scatter") == "copies and gathers"
    assert ladder.group_of("aten::erfinv") == "all else"


def test_a_profile_says_where_the_time_goes():
    a = torch.randn(400, 400)
    product = Contestant("product", "32", 0, {"step": lambda number: [a @ a for _ in range(20)]})
    found = ladder.shares(product)
    assert found["matrix products"] > 0.5 and sum(found.values()) == pytest.approx(1, abs=1e-3)


def test_fused_attention_is_forced_within_its_context_only():
    from clmae.vit import Trunk

    trunk, x, seen = Trunk(16, 1, 2), torch.zeros(1, 4, 16, dtype=torch.bfloat16), []
    trunk.to(torch.bfloat16)

    def step(number):
        trunk(x)
        seen.append(trunk.blocks[0].attn.fused_attn)

    plain = Contestant("plain", "bf16", 0, {"step": step})
    ladder.within(ladder.always_fused, plain, "fused").phases["step"](0)
    plain.phases["step"](0)
    assert seen == [True, False]


def test_predictions_are_counted_operations():
    mine = contestants.ours("MAE, ours", QUICK, "32", "cpu", PARAMS.objectives["mae"])
    counted = [ladder.operations(c) for c in (ladder.plain_adamw(QUICK, "32"), mine)]
    assert counted[0] == pytest.approx(counted[1], rel=0.05)  # the same network


def test_rungs_that_take_a_saving_back_compute_the_same():
    changes = {
        "mae": ladder.with_flat_gathers,
        "cl_mae": ladder.with_two_embeddings,
        "rc_mae": ladder.with_teacher_graph,
        "emae": ladder.with_single_parts,
    }
    images, draw = QUICK.images().double(), Draw(seed=(0,), total=QUICK.batch)
    for block, context in changes.items():
        objective = make_objective(QUICK.mae(), epochs=9, **PARAMS.objectives[block]).double()
        want = objective.loss("mae", images, 0.25, draw).total
        grads = torch.autograd.grad(want, list(objective.mae.parameters()))
        with context():
            have = objective.loss("mae", images, 0.25, draw).total
            again = torch.autograd.grad(have, list(objective.mae.parameters()))
        torch.testing.assert_close(have, want, rtol=1e-12, atol=0)
        torch.testing.assert_close(again, grads, rtol=1e-9, atol=1e-12)


def test_every_rung_has_an_expectation_and_its_operations():
    found = ladder.taken_back(QUICK, PARAMS)
    for contestant in found:
        assert f"{contestant.name}, {contestant.precision}" in CLAIMS["expected"]
    counted = {c.name: ladder.operations(c) for c in found}
    assert counted["EMAE, ours"] == counted["EMAE, ours, part after part"]
    assert counted["RC-MAE, ours"] == counted["RC-MAE, ours, teacher with autograd"]


def test_a_profile_of_several_steps_has_a_spread():
    a = torch.randn(50, 50)
    found = ladder.profiles(Contestant("product", "32", 0, {"step": lambda number: a @ a}), 3)
    for name, share in found["shares"].items():
        assert found["spread"][name]["low"] <= share + 1e-4 and share <= found["spread"][name]["high"] + 1e-4


def test_claims_are_about_what_is_measured():
    for target in CLAIMS["targets"]:
        pair = target["of"], target["to"]
        assert pair in (run.ACROSS if target["of_precision"] != target["to_precision"] else run.RATIOS)
        assert set(target["cases"]) <= set(run.ON["cpu"])
        assert len({"at_least", "at_most", "about"} & set(target)) == 1
    for claim in CLAIMS["open"]:
        words = claim["command"].split()
        if words[2] == "bench.run":
            asked = run.arguments(words[3:])
            assert asked.case[0] in run.ON["cuda"] and asked.device == "cuda"
