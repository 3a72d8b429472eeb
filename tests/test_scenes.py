"""The embedded set: what is committed can be drawn again, and keeps what its notebook promises."""

import json
import platform
from pathlib import Path

import numpy as np
import PIL
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import features

from clmae import files, scenes
from clmae.config import UserError
from clmae.data import find_source

HERE = Path(__file__).parent
LOCK = files.read_json(HERE / "scenes_reference.json")
VERSIONS = {
    "numpy": np.__version__,
    "pillow": PIL.__version__,
    "libwebp": features.version("webp"),
    "pyarrow": pa.__version__,
    "machine": platform.machine(),
}
PARTS = ("image", "label", "boxes", "classes", "mask")
splits = pytest.mark.parametrize("split", scenes.SPLITS)
pictures = given(st.integers(0, 2**40), st.sampled_from(scenes.SPLITS), st.integers(0, 2**31))


def stored(split: str, root: Path) -> bytes:
    """The committed file: from data/ if that holds the embedded set, else from the store kept in git."""
    known = LOCK["files"][f"{split}.parquet"]
    kept = root / "dvcstore/files/md5" / known["md5"][:2] / known["md5"][2:]
    places = [root / f"data/{split}.parquet", kept]
    for place in places:
        if place.exists() and files.sha256(place) == known["sha256"]:
            return place.read_bytes()
    raise AssertionError(f"{split}.parquet of the recorded set is in neither data/ nor dvcstore/")


@pytest.fixture(scope="module")
def tables(root):
    return {split: pq.read_table(pa.BufferReader(stored(split, root))) for split in scenes.SPLITS}


def test_pixels_before_encoding_are_those_recorded():
    known = np.load(HERE / "scenes_reference.npz")
    ends = np.cumsum(known["things"])
    for i, (split, index) in enumerate(zip(known["split"].tolist(), known["index"].tolist())):
        scene = scenes.render(0, split, index)
        difference = np.abs(scene.image.astype(int) - known["image"][i])
        assert difference.max() <= 2, (split, index)
        assert scene.label == known["label"][i]
        np.testing.assert_array_equal(scene.mask, known["mask"][i])
        things = slice(ends[i] - known["things"][i], ends[i])
        np.testing.assert_array_equal(scene.boxes, known["boxes"][things])
        np.testing.assert_array_equal(scene.classes, known["classes"][things])


def check_row(split, index, row):
    """A row against its scene, drawn again."""
    scene = scenes.render(0, split, index)
    if VERSIONS == LOCK["versions"]:
        assert scenes.encode(scene) == row, (split, index)
        return
    back = scenes.decode(row)
    for part in ("label", "boxes", "classes", "mask"):
        np.testing.assert_array_equal(getattr(back, part), getattr(scene, part), err_msg=part)
    # what lossy coding moves is far less than what another picture would differ by (about 60)
    assert np.abs(back.image.astype(int) - scene.image).mean() < 20, (split, index)


@splits
def test_committed_rows_are_drawn_again(split, tables):
    for index in range(3, len(tables[split]), 25):
        check_row(split, index, *tables[split].slice(index, 1).to_pylist())


@pytest.mark.long
@splits
def test_every_committed_row_is_drawn_again(split, tables):
    for index, row in enumerate(tables[split].to_pylist()):
        check_row(split, index, row)


@pytest.mark.skipif(VERSIONS != LOCK["versions"], reason="bytes are promised under the recorded versions")
@splits
def test_committed_rows_make_the_committed_file(split, tables, tmp_path):
    scenes.save(tables[split].to_pylist(), tmp_path / "again.parquet")
    assert files.sha256(tmp_path / "again.parquet") == LOCK["files"][f"{split}.parquet"]["sha256"]


@splits
def test_committed_files_are_whole_balanced_and_small(split, tables, root):
    table = tables[split]
    assert len(table) == {"train": 6000, "test": 1500}[split]
    assert table.column_names == scenes.SCHEMA.names
    assert json.loads(table.schema.metadata[b"classes"]) == scenes.CLASSES
    counts = np.bincount(table["label"].to_numpy())
    assert len(counts) == len(scenes.CLASSES) and counts.max() - counts.min() <= 1
    assert sum(len(stored(s, root)) for s in scenes.SPLITS) <= 12e6


def test_no_picture_is_twice_in_the_set(tables):
    images = [image for table in tables.values() for image in table["image"].to_pylist()]
    assert len(set(images)) == len(images)


def test_mean_colour_tells_no_class(tables):
    def colours(table):
        rows = table.select(["image", "label"]).slice(0, 1500).to_pylist()
        empty = {"boxes": [], "classes": [], "mask": rows[0]["image"]}
        means = [scenes.decode(row | empty).image.mean((0, 1)) for row in rows]
        return np.array(means), np.array([row["label"] for row in rows])

    (x, y), (test_x, test_y) = colours(tables["train"]), colours(tables["test"])
    centres = np.stack([x[y == k].mean(0) for k in range(8)])
    to_centres = np.linalg.norm(test_x[:, None] - centres, axis=-1).argmin(1) == test_y
    nearest = np.linalg.norm(test_x[:, None] - x, axis=-1).argsort(1)[:, :20]
    votes = np.stack([(y[nearest] == k).sum(1) for k in range(8)], 1).argmax(1) == test_y
    chance, spread = 1 / 8, np.sqrt(1 / 8 * 7 / 8 / len(test_y))
    assert to_centres.mean() < chance + 4 * spread
    assert votes.mean() < chance + 4 * spread


def test_writing_twice_gives_the_same_bytes_and_a_prefix_of_the_rows(tmp_path, tables):
    for folder in ("a", "b"):
        scenes.write(tmp_path / folder, train=20, test=9)
    for split, number in {"train": 20, "test": 9}.items():
        a, b = ((tmp_path / folder / f"{split}.parquet").read_bytes() for folder in "ab")
        assert a == b
        labels = pq.read_table(pa.BufferReader(a))["label"].to_pylist()
        assert labels == tables[split]["label"].to_pylist()[:number]


def test_the_set_is_what_the_data_module_reads(tmp_path):
    scenes.write(tmp_path, train=8, test=8)
    source = find_source(tmp_path)
    assert source.kind == "parquet" and source.classes == scenes.CLASSES
    assert source.parts["test"].labels.tolist() == list(range(8))


@pictures
def test_ground_truth_of_any_scene(seed, split, index):
    scene = scenes.render(seed, split, index)
    count = len(scene.classes)
    areas = np.bincount(scene.mask.ravel(), minlength=count + 1)[1:]
    assert scene.image.shape == (64, 64, 3) and scene.image.dtype == scene.mask.dtype == np.uint8
    assert 1 <= count <= 4 and scene.mask.max() == count and (areas > 0).all()
    assert scene.label == scene.classes[areas.argmax()] == index % len(scenes.CLASSES)
    assert count == 1 or np.sort(areas)[-1] > 1.5 * np.sort(areas)[-2]
    for i, (x0, y0, x1, y1) in enumerate(scene.boxes, start=1):
        assert 0 <= x0 < x1 <= 64 and 0 <= y0 < y1 <= 64
        inside = scene.mask[y0:y1, x0:x1] == i
        assert inside.sum() == areas[i - 1]  # nothing of it lies outside, and no side is loose:
        assert inside[0].any() and inside[-1].any() and inside[:, 0].any() and inside[:, -1].any()


@pictures
def test_a_scene_depends_on_its_three_numbers_and_nothing_else(seed, split, index):
    first = scenes.render(seed, split, index)
    np.random.seed(seed % 1000)
    scenes.render(seed, split, index + 1)
    again = scenes.render(seed, split, index)
    assert all(np.array_equal(getattr(first, part), getattr(again, part)) for part in PARTS)
    others = [(seed + 1, split, index), (seed, split, index + 1)]
    others += [(seed, "test" if split == "train" else "train", index)]
    assert not any(np.array_equal(first.image, scenes.render(*other).image) for other in others)


@pictures
def test_a_row_is_its_scene(seed, split, index):
    scene = scenes.render(seed, split, index)
    back = scenes.decode(scenes.encode(scene))
    assert all(np.array_equal(getattr(scene, part), getattr(back, part)) for part in PARTS[1:])
    assert back.image.shape == scene.image.shape


@pytest.mark.parametrize("shape", scenes.shapes)
@pytest.mark.parametrize("texture", scenes.textures)
def test_objects_of_every_class_cover_alike_and_are_no_darker(shape, texture):
    kind = scenes.CLASSES.index(f"{texture} {shape}")
    covered, luma = [], []
    for i in range(40):
        rng = np.random.default_rng([kind, i])
        things = scenes.arrange(rng, kind)
        main = max(things, key=lambda thing: thing.area)
        canvas, ids = np.zeros((256, 256, 3), np.float32), np.zeros((256, 256), np.uint8)
        scenes.paint(rng, canvas, ids, main, 1)
        covered.append(main.area)
        luma.append((canvas[ids == 1] @ np.float32([0.299, 0.587, 0.114])).mean())
    low, high = (np.pi / 4 * d**2 for d in scenes.MAIN)
    assert low - 1 <= min(covered) and max(covered) <= high + 1
    assert abs(np.mean(luma) - 0.5) < 0.04


@pytest.mark.parametrize(
    "split, index, said",
    [("val", 0, "unknown split 'val'"), ("Train", 0, "'train'"), ("test", -1, "index -1")],
)
def test_wrong_requests_say_what_is_allowed(split, index, said):
    with pytest.raises(UserError, match=said):
        scenes.render(0, split, index)


@pytest.mark.parametrize("numbers", [{"train": 0}, {"test": -3}])
def test_no_empty_set_is_written(tmp_path, numbers):
    with pytest.raises(UserError, match="at least 1"):
        scenes.write(tmp_path / "set", **numbers)
    assert not (tmp_path / "set").exists()


def test_an_interrupted_write_leaves_the_earlier_file(tmp_path):
    (tmp_path / "train.parquet").write_bytes(b"earlier")

    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        scenes.write(tmp_path, train=2, test=1, progress=stop)
    assert [path.name for path in tmp_path.iterdir()] == ["train.parquet"]
    assert (tmp_path / "train.parquet").read_bytes() == b"earlier"
