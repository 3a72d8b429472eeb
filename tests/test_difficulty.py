"""How hard a set is: the same numbers each time, no look at the wrong split, one line for what has none."""

import numpy as np
import pytest
import torch

from clmae import files, scenes
from clmae.config import UserError
from clmae.data import Store, TrainBatches, store_arrays
from clmae.difficulty import (
    RECIPE,
    accuracy,
    chance,
    colour_neighbours,
    measure,
    pixel_neighbours,
    small_network,
    some,
    supervised,
    train_network,
)

SHORT = RECIPE | {"width": 4, "epochs": 1, "batch_size": 16}


def noise(n, seed, classes=3, size=12, channels=3):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (n, channels, size, size), dtype=np.uint8), np.arange(n) % classes


def store(images, labels):
    return Store(
        images, np.asarray(labels), ["a", "b", "c"], [0.5] * images.shape[1], [0.29] * images.shape[1]
    )


@pytest.fixture
def prepared(tmp_path):
    parts = {split: noise(n, n) for split, n in {"train": 90, "val": 30, "test": 45}.items()}
    store_arrays(tmp_path / "prepared", parts, ["a", "b", "c"])
    return tmp_path / "prepared"


def test_noise_is_not_learned_and_the_report_is_json(prepared, tmp_path):
    found = measure(prepared, threads=1, recipe=SHORT)
    files.write_json(tmp_path / "difficulty.json", found)
    assert files.read_json(tmp_path / "difficulty.json")["images"] == {"train": 90, "val": 30, "test": 45}
    for name in ("mean_colour", "pixels_16", "pixels_64", "supervised"):
        for split in ("val", "test"):
            assert found[name][split]["low"] < 0.5, (name, split)
    assert found["chance"] == {"val": pytest.approx(1 / 3), "test": pytest.approx(1 / 3)}


def test_the_same_store_gives_the_same_numbers_whatever_was_drawn_before(prepared):
    first = measure(prepared, threads=1, recipe=SHORT)
    torch.manual_seed(123)
    torch.rand(5)
    assert measure(prepared, threads=1, recipe=SHORT) == first
    assert measure(prepared, threads=1, recipe=SHORT, seed=1)["supervised"] != first["supervised"]


def test_training_sees_train_alone(prepared):
    """Other pictures and labels in val and test leave the network as it was."""
    train = Store.open(prepared, "train")
    test = store(*noise(20, 7))
    both = supervised(train, {"x": test, "y": store(*noise(50, 8))}, recipe=SHORT)
    assert both["x"] == supervised(train, {"x": test}, recipe=SHORT)["x"]


def test_training_images_are_found_again_by_their_pixels():
    train = store(*noise(60, 0))
    assert pixel_neighbours(train, train, 12, k=1)["accuracy"] == 1.0
    assert colour_neighbours(train, train, k=1)["accuracy"] == 1.0


def test_colour_is_found_where_colour_is_the_class():
    images, labels = noise(90, 0)
    tinted = images // 2 + (labels * 40).astype(np.uint8)[:, None, None, None]
    assert colour_neighbours(store(tinted, labels), store(tinted, labels))["accuracy"] == 1.0


@pytest.mark.parametrize("size", [(8, 8), (32, 48), (64, 64), (200, 90)])
@pytest.mark.parametrize("channels", [1, 3])
def test_the_network_takes_any_size(size, channels):
    net = small_network(channels, 5, size, width=4)
    guess = net(torch.rand(3, channels, *size))
    assert guess.shape == (3, 5) and torch.isfinite(guess).all()


def test_judging_changes_nothing_and_looks_at_one_image_at_a_time():
    torch.manual_seed(0)
    test = store(*noise(40, 3))
    net = small_network(3, 3, (12, 12), width=4)
    train_network(net, TrainBatches(test, batch_size=8, seed=0), test.labels, SHORT)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    whole = accuracy(net, test)["accuracy"]
    halves = [
        accuracy(net, store(test.images[part], test.labels[part]))["accuracy"]
        for part in np.split(np.arange(40), 2)
    ]
    assert whole == pytest.approx(np.mean(halves))
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())


@pytest.mark.parametrize("count", [1, 7, 59, 60, 1000])
def test_some_is_spread_without_repeats(count):
    images, labels = noise(60, 0)
    few = some(store(images, np.arange(60)), count)
    assert len(few) == min(count, 60) and len(set(few.labels.tolist())) == len(few)
    assert few.labels[0] == 0 and (count == 1 or few.labels[-1] == 59)


def test_chance_counts_the_most_frequent_class_of_train():
    assert chance([2, 2, 0], [2, 0, 0, 0]) == 0.25


@pytest.mark.parametrize(
    "labels, said",
    [
        ({"train": None, "val": None, "test": None}, "no labels"),
        ({"train": np.zeros(90, int)}, "one class"),
    ],
)
def test_what_has_no_difficulty_says_so(tmp_path, labels, said):
    parts = {split: noise(90, i) for i, split in enumerate(("train", "val", "test"))}
    parts = {split: (images, labels.get(split, y)) for split, (images, y) in parts.items()}
    store_arrays(tmp_path / "prepared", parts, ["a", "b", "c"])
    found = measure(tmp_path / "prepared", threads=1, recipe=SHORT)
    assert list(found) == ["skipped"] and said in found["skipped"]


def test_a_label_missing_here_and_there_is_an_error(tmp_path):
    parts = {split: noise(90, i) for i, split in enumerate(("train", "val", "test"))}
    parts["val"][1][5] = -1
    store_arrays(tmp_path / "prepared", parts, ["a", "b", "c"])
    with pytest.raises(UserError, match="no label"):
        measure(tmp_path / "prepared", threads=1, recipe=SHORT)


def test_fewer_images_than_neighbours_is_an_error(prepared):
    with pytest.raises(UserError, match="neighbours"):
        measure(prepared, k=91, threads=1, recipe=SHORT)


def test_committed_numbers_keep_the_promises_of_the_embedded_set(root):
    found = files.read_json(root / "results/difficulty.json")
    if found.get("classes") != scenes.CLASSES:
        pytest.skip("results are of other images than the embedded set")
    for split in ("val", "test"):
        for name in ("pixels_16", "pixels_64"):
            assert found[name][split]["accuracy"] < 0.30
        assert found["mean_colour"][split]["high"] < 0.17
        assert found["supervised"][split]["low"] > 0.80
