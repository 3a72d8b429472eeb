"""What a run keeps beside its last network, what it says when memory is full, and what its steps cost."""

import numpy as np
import pytest
import torch

import clmae
from clmae import cost, runs, trainer
from clmae.config import Data, Evaluate, Film, Model, Train, UserError, read_params
from clmae.data import store_arrays
from clmae.files import read_json
from clmae.objectives import make_objective

SMALL = Model(patch_size=4, width=16, depth=1, heads=2, decoder_width=16, decoder_depth=1, decoder_heads=2)
SECTIONS = {"data": Data(image_size=16), "model": SMALL, "film": Film(images=1, moments=2, average_over=2)}
BLOCKS = {"mae": {"objective": "mae"}, "rc_mae": {"objective": "rc_mae"}}


@pytest.fixture
def call(tmp_path):
    """`pretrain_run` of five epochs on 64 noisy stripes in a folder of its own."""
    rng = np.random.default_rng(0)

    def split(n):
        labels = np.arange(n) % 2
        stripes = 127 + 80 * np.sin(np.where(labels, 0.7, 1.9)[:, None, None, None] * np.arange(16))
        return np.clip(stripes + rng.normal(0, 40, (n, 3, 16, 16)), 0, 255).astype(np.uint8), labels

    store_arrays(tmp_path / "build/prepared", {"train": split(64), "val": split(24)}, classes=["a", "b"])

    def pretrain(run="mae", report=lambda line: None, **settings):
        train = Train(
            **{"epochs": 5, "batch_size": 16, "base_lr": 8e-3, "monitor_epochs": 1, "threads": 1} | settings
        )
        options = {"objective": BLOCKS[run], "train": train, "evaluate": Evaluate(k=5), "folder": tmp_path}
        runs.pretrain_run(run=run, seed=0, report=report, **SECTIONS, **options)
        return tmp_path / f"build/runs/{run}-0"

    return pretrain


def tree(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("run", BLOCKS)
def test_milestones_and_the_best_are_kept(run, call):
    left = call(run, keep_every=2)
    assert {p.name for p in (left / "checkpoints").iterdir()} == {"best", "epoch-2", "epoch-4"}
    history = read_json(left / "history.json")
    found = [line["knn"] for line in history]
    best = read_json(left / "checkpoints/best/record.json")
    assert best["knn"] == max(found) and best["epoch"] == 1 + found.index(max(found))  # the first of equals
    images = torch.rand(2, 3, 16, 16)
    features = [clmae.load(left / f"checkpoints/epoch-{n}")(images) for n in (2, 4)]
    assert features[0].shape == (2, 16) and not torch.equal(*features)
    assert read_json(left / "checkpoints/epoch-4/record.json").items() <= history[3].items()


def test_a_milestone_is_the_network_of_its_epoch(call):
    left = tree(call(epochs=4, keep_every=2, equal="images"))
    for name in ("encoder.safetensors", "decoder.safetensors"):
        assert left[f"checkpoints/epoch-4/{name}"] == left[name] != left[f"checkpoints/epoch-2/{name}"]


@pytest.mark.parametrize("settings", [{"keep_best": False}, {"monitor_epochs": 0}])
def test_nothing_is_kept_that_was_not_asked_for(settings, call):
    assert not (call(**settings) / "checkpoints").exists()


@pytest.mark.parametrize("epoch", [2, 3, 4])
def test_interrupted_in_the_middle_of_keeping_it_leaves_the_same(epoch, call, monkeypatch):
    peaceful = tree(call(keep_every=2))
    said, save = [], runs.save_mae

    def pull_the_plug(mae, folder):
        save(mae, folder)
        if len(said) == epoch - 1:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(runs, "save_mae", pull_the_plug)
        call(report=said.append, keep_every=1)  # changes of what is kept do not begin another run
    left = call(keep_every=2)
    extra = {f"checkpoints/epoch-{n}" for n in range(1, epoch) if n % 2}
    assert {n: b for n, b in tree(left).items() if n.rpartition("/")[0] not in extra} == peaceful


def test_out_of_memory_names_what_fits(call, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    model = runs.build_model(
        SECTIONS["data"], SMALL, 0, runs.Store(np.zeros((0, 3, 16, 16)), [], [], [0.5] * 3, [1] * 3)
    )
    mae = make_objective(model, "mae")
    need = sum(cost.memory(mae, 16, accumulate=4, fused=False).values())
    monkeypatch.setattr(runs, "free_memory", lambda device: need / 0.89)
    monkeypatch.setattr(trainer, "one_step", full)
    with pytest.raises(UserError) as caught:
        call()
    said = str(caught.value)
    assert said.startswith(
        "out of memory with 16 images in it (train.batch_size 16, train.accumulate 1); by the cost"
    )
    assert "model 4 images fit into the" in said and said.endswith(
        "that were free; train.accumulate: 4 puts 4 there and is the same batch of 16"
    )
    with pytest.raises(UserError, match="they fit into .* free; train.accumulate: 8 puts 2 there"):
        call(accumulate=4)
    monkeypatch.setattr(runs, "free_memory", lambda device: 1000)
    with pytest.raises(
        UserError, match="not even one image would fit into the 0.001 MB .*; take a smaller model"
    ):
        call()


def test_committed_runs_cost_what_is_counted_on_the_whole_batch(root):
    config = read_params(root / "params.yaml")
    store = runs.Store(np.zeros((0, 3, 64, 64)), [], [], [0.5] * 3, [0.25] * 3)
    for name in config.runs:
        objective = make_objective(
            runs.build_model(config.data, config.model, 0, store), **config.objectives[name]
        )
        few, whole = (runs.phase_flops(objective, 16, (64, 64), 3, count) for count in (8, 16))
        assert few == whole


@pytest.mark.parametrize("fraction, batch", [(0.1, 32), (0.3, 50), (0.9, 16)])
def test_flops_of_any_fraction_are_exact(fraction, batch):
    store = runs.Store(np.zeros((0, 3, 16, 16)), [], [], [0.5] * 3, [0.25] * 3)
    block = {"objective": "cl_mae", "masker": {"depth": 1, "heads": 2, "fraction": fraction}}
    objective = make_objective(runs.build_model(SECTIONS["data"], SMALL, 0, store), **block)
    few, whole = (runs.phase_flops(objective, batch, (16, 16), 3, count) for count in (8, batch))
    assert few == whole
