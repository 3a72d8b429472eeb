"""From any folder to batches: every file is used or listed, every batch is a function of (seed, step)."""

import errno
import io
import json
import os
import shutil
import tracemalloc

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms.v2 import functional as TF

from clmae import data, files
from clmae.config import UserError

SCALE, RATIO = (0.2, 1.0), (3 / 4, 4 / 3)
RAW = (torch.zeros(3), torch.full((3,), 1 / 255))  # augment then returns values 0…255


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def pixels(seed, h=24, w=20):
    """A smooth random RGB image (h, w, 3) uint8, all different."""
    small = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(small).resize((w, h), Image.Resampling.BILINEAR))


def encoded(image, kind="PNG", **options) -> bytes:
    buffer = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(buffer, kind, **options)
    return buffer.getvalue()


def put(path, content=None, **options):
    files.write_bytes(path, encoded(pixels(str(path).__len__()), **options) if content is None else content)


def album(root, n=30, classes="ab", **options):
    """n distinct images in class folders (in one flat folder if `classes` is empty)."""
    for k in range(n):
        folder = f"{classes[k % len(classes)]}/" if classes else ""
        files.write_bytes(f"{root}/{folder}{k:04}.png", encoded(pixels(k, **options)))


def table(path, labels=None, n=None, images=None, **metadata):
    images = images or [encoded(pixels(k)) for k in range(n or len(labels))]
    columns = {"image": images} | ({} if labels is None else {"label": labels})
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    pq.write_table(pa.table(columns).replace_schema_metadata(metadata), path)


def prepare(root, out="prepared", **options):
    return data.prepare(root, out, **{"image_size": (16, 16), "threads": 2} | options)


def content(folder):
    return {name: files.sha256(os.path.join(folder, name)) for name in sorted(os.listdir(folder))}


# sources


def found(root):
    source = data.find_source(root)
    return {split: len(part.names) for split, part in source.parts.items()}, source.classes


def test_folders_of_every_layout(here):
    for name in ("a/1.PNG", "b/deep/er/2.JpEg", "b/.hidden.png", ".git/3.png", "b/readme.TXT", "LICENSE"):
        put(f"plain/{name}")
    assert found("plain") == ({"train": 2}, ["a", "b"])
    assert data.find_source("plain").ignored == {".txt": 1, "LICENSE": 1}
    for name in ("Training/a/1.png", "validation/a/2.png", "TEST/a/3.png"):
        put(f"three/in/here/{name}")
    assert found("three") == ({"train": 1, "val": 1, "test": 1}, ["a"])
    for name in ("train/1.png", "val/2.png"):
        put(f"imagenet/{name}")
    assert found("imagenet") == ({"train": 1, "test": 1}, [])  # val is what is reported, not what is tuned on
    put("only/train/a/1.png")
    put("only/train/b/2.png")
    assert found("only") == ({"train": 2}, ["a", "b"])


def test_images_behind_links_are_found_once(here):
    put("elsewhere/1.png")
    put("root/b/2.png")
    os.symlink(here / "elsewhere", "root/a")
    os.symlink(here / "root", "root/b/circle")
    assert found("root") == ({"train": 2}, ["a", "b"])


def test_parquet_of_every_shape(here):
    hub = json.dumps({"info": {"features": {"label": {"names": ["cat", "dog"]}}}})
    images = [{"bytes": encoded(pixels(k)), "path": f"{k}.png"} for k in range(3)]
    table("hub/data/train-00000-of-00002.parquet", [1, 0, 1], images=images, huggingface=hub)
    table("hub/data/train-00001-of-00002.parquet", [0, None], images=images[:2], huggingface=hub)
    table("hub/data/validation-00000-of-00001.parquet", [1], images=images[:1], huggingface=hub)
    source = data.find_source("hub")
    assert source.classes == ["cat", "dog"] and list(source.parts) == ["train", "test"]
    assert source.parts["train"].labels.tolist() == [1, 0, 1, 0, -1]
    assert source.parts["train"].names[3] == "data/train-00001-of-00002.parquet[0]"
    assert [fetch() for fetch in source.parts["test"].blobs()] == [images[0]["bytes"]]
    table("text/images.parquet", ["owl", "ant", "owl"])
    assert data.find_source("text").parts["train"].labels.tolist() == [1, 0, 1]
    table("bare/train.parquet", n=3)
    assert found("bare") == ({"train": 3}, [])
    table("numbers/train.parquet", [10, 2, -1])
    source = data.find_source("numbers")
    assert source.classes == ["2", "10"] and source.parts["train"].labels.tolist() == [1, 0, -1]


def test_all_rows_arrive_in_order_over_batches_and_row_groups(here):
    images = [bytes([k % 256, k // 256]) for k in range(1000)]
    pq.write_table(pa.table({"image": images}), "train.parquet", row_group_size=170)
    assert [fetch() for fetch in data.rows("train.parquet")] == images


IMAGES = {
    "test only": ["test/a/1.png"],
    "test without labels": ["train/a/1.png", "test/1.png"],
    "test with a new class": ["train/a/1.png", "test/b/1.png"],
    "image beside classes": ["a/1.png", "1.png"],
    "folder beside splits": ["train/a/1.png", "extra/1.png"],
    "two kinds": ["a/1.png"],
    "one image": ["1.png"],
}
TABLES = {
    "two kinds": {"labels": [0]},
    "paths, not bytes": {"labels": [0], "images": ["a.png"]},
    "label without a name": {"labels": [0, 1], "classes": '["a"]'},
    "label of another kind": {"labels": [0.5, 1.5]},
    "broken class names": {"labels": [0, 1], "classes": "[a"},
    "cut parquet": {"labels": [0] * 9},
    "nameless parquet beside train": {"labels": [0]},
}


def layout(root, wrong):
    """Make a folder with one mistake."""
    train = f"{root}/train.parquet"
    for name in IMAGES.get(wrong, []):
        put(f"{root}/{name}")
    if wrong in TABLES:
        table(train, **TABLES[wrong])
    if wrong == "empty":
        os.makedirs(root)
    elif wrong == "no image":
        put(f"{root}/notes.txt", b"x")
    elif wrong == "no column":
        put(train, b"")
        pq.write_table(pa.table({"img": [b"x"], "y": [1]}), train)
    elif wrong == "cut parquet":
        put(train, files.must_exist(train).read_bytes()[:-20])
    elif wrong == "nameless parquet beside train":
        table(f"{root}/more.parquet", [0])


MISTAKES = {
    "missing": "root: no such folder.*data.root",
    "empty": "root: an empty folder.*expected parquet files or images.*.jpeg",
    "no image": "root: no image among its files.*expected.*.png",
    "test only": "root: holds test but no train",
    "test without labels": "root: one of train and test has labels",
    "test with a new class": "root: test has classes that train lacks: b",
    "image beside classes": r"root: images of train lie beside its class folders \(a",
    "folder beside splits": "root: train/ is a split, but images also lie in extra",
    "two kinds": "root: holds images .* and parquet",
    "one image": "root: only 1 training image; at least 3",
    "no column": "root/train.parquet: needs a column 'image' of bytes; its columns: img, y",
    "paths, not bytes": "root/train.parquet: needs a column 'image' of bytes",
    "label without a name": "root/train.parquet: label 1 is none of the 1 classes",
    "label of another kind": "root/train.parquet: label 0.5 is none",
    "broken class names": "root/train.parquet: damaged",
    "cut parquet": "root/train.parquet: damaged",
    "nameless parquet beside train": "root: more.parquet names no split",
}


@pytest.mark.parametrize("wrong", MISTAKES)
def test_a_wrong_source_is_one_line_and_leaves_the_earlier_store(here, wrong):
    album("good", 6)
    prepare("good")
    before = content("prepared")
    layout("root", wrong)
    with pytest.raises(data.DataError, match=MISTAKES[wrong]) as caught:
        prepare("root")
    assert "\n" not in str(caught.value) and isinstance(caught.value, UserError)
    assert content("prepared") == before


def test_damage_in_the_middle_of_a_parquet_file_is_an_error(here):
    noise = np.random.default_rng(0)
    images = [noise.bytes(3000) for _ in range(500)]
    pq.write_table(pa.table({"image": images}), "train.parquet", row_group_size=100, compression="gzip")
    whole = bytearray(open("train.parquet", "rb").read())
    whole[len(whole) // 2 : len(whole) // 2 + 5000] = bytes(5000)
    files.write_bytes("root/train.parquet", bytes(whole))
    with pytest.raises(data.DataError, match="root/train.parquet: damaged"):
        prepare("root", max_bad=1.0)


def test_a_folder_that_cannot_be_listed_is_not_an_empty_one(here, monkeypatch):
    album("root", 6)
    scan = os.scandir

    def refuse(path):
        if str(path).endswith("a"):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(data.DataError, match="root/a: permission denied"):
        data.find_source("root")


# decoding

KINDS = {
    "PNG": {},
    "JPEG": {"quality": 90},
    "WEBP": {"quality": 90},
    "GIF": {},
    "BMP": {},
    "TIFF": {"compression": "tiff_lzw"},
    "PPM": {},
}
FILES = {kind: encoded(pixels(0, 60, 50), kind, **options) for kind, options in KINDS.items()}


@pytest.mark.filterwarnings("ignore")  # decoders warn of what is being damaged on purpose
@pytest.mark.parametrize("kind", KINDS)
@given(draw=st.data())
def test_damage_is_a_picture_or_a_reason_and_never_a_crash(kind, draw):
    damaged = bytearray(FILES[kind])
    for _ in range(draw.draw(st.integers(0, 4))):
        damaged[draw.draw(st.integers(0, len(damaged) - 1))] = draw.draw(st.integers(0, 255))
    damaged = bytes(damaged[: draw.draw(st.integers(0, len(damaged)))])
    outcome = []
    for _ in range(2):
        try:
            image, note = data.decode(damaged, (16, 12), 3, min_size=4)
            assert image.shape == (3, 16, 12) and image.dtype == np.uint8 and image.flags.c_contiguous
            outcome.append(image.tobytes())
        except data.Bad as error:
            assert str(error) and "\n" not in str(error) and " at 0x" not in str(error)
            outcome.append(str(error))
    assert outcome[0] == outcome[1]


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "PPM", "BMP"])
def test_a_file_cut_in_half_is_bad(kind):
    with pytest.raises(data.Bad):
        data.decode(FILES[kind][: len(FILES[kind]) // 2], (16, 16))


@given(hnp.arrays(np.uint16, (9, 11), elements=st.integers(0, 65535)))
def test_sixteen_bits_are_scaled_whatever_the_format(values):
    expected = values / 257
    for kind, stored in (("PNG", values), ("TIFF", values), ("TIFF", values.astype(">u2")), ("PPM", values)):
        image, note = data.decode(encoded(stored, kind), (9, 11), 1)
        np.testing.assert_allclose(image[0], expected, atol=0.51)
        assert note == "16-bit gray scaled to 8 bits"


def test_sixteen_bit_colour_is_used_and_noted():
    cv = pytest.importorskip("zlib")
    import struct

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", cv.crc32(kind + body))

    values = np.linspace(0, 65535, 10 * 10 * 3).astype(">u2").reshape(10, 10, 3)
    lines = b"".join(b"\0" + row.tobytes() for row in values)
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 10, 10, 16, 2, 0, 0, 0))
    png += chunk(b"IDAT", cv.compress(lines)) + chunk(b"IEND", b"")
    image, note = data.decode(png, (10, 10))
    np.testing.assert_allclose(image.transpose(1, 2, 0), values.astype(float) / 257, atol=1.01)
    assert note.startswith("16-bit colour")


@pytest.mark.parametrize("stored", [np.float32, np.int32])
def test_pixels_without_a_range_are_bad(stored):
    with pytest.raises(data.Bad, match="32-bit pixels"):
        data.decode(encoded(np.ones((20, 20), stored), "TIFF"), (16, 16))


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_films_and_stacks_are_bad_and_phone_photos_are_not(kind):
    frames = [Image.fromarray(pixels(k)) for k in range(3)]
    film = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
    with pytest.raises(data.Bad, match=r"animated or multi-page \(3 frames\)"):
        data.decode(film, (16, 16))
    photo = encoded(frames[0], "MPO", save_all=True, append_images=frames[1:])
    alone = encoded(frames[0], "JPEG")
    np.testing.assert_array_equal(data.decode(photo, (16, 16))[0], data.decode(alone, (16, 16))[0])


def test_what_is_transparent_is_white_or_kept():
    image = np.zeros((8, 8, 4), np.uint8)
    image[:4, :, 0], image[:4, :, 3] = 255, 255
    for kind in (Image.fromarray(image), Image.fromarray(image).quantize()):
        rgb, _ = data.decode(encoded(kind), (8, 8))
        assert rgb[:, 0, 0].tolist() == [255, 0, 0] and rgb[:, 7, 7].tolist() == [255, 255, 255]
    rgba, _ = data.decode(encoded(image), (8, 8), channels=4)
    np.testing.assert_array_equal(rgba, image.transpose(2, 0, 1))


@given(h=st.integers(8, 70), w=st.integers(8, 70), size=st.tuples(st.integers(1, 40), st.integers(1, 40)))
def test_every_shape_fits_every_size(h, w, size):
    flat = np.full((h, w, 3), (200, 100, 7), np.uint8)
    image, _ = data.decode(encoded(flat), size)
    np.testing.assert_array_equal(image, np.broadcast_to(flat[0, 0][:, None, None], (3, *size)))
    turned, _ = data.decode(encoded(np.ascontiguousarray(pixels(1, h, w)[:, ::-1])), size)
    straight, _ = data.decode(encoded(pixels(1, h, w)), size)
    assert np.abs(turned[:, :, ::-1].astype(int) - straight).max() <= 2  # the centre is cropped, not a corner


def test_large_photos_are_read_small_and_look_the_same():
    photo = pixels(3, 1200, 1600)
    fast, _ = data.decode(encoded(photo, "JPEG", quality=95), (32, 32))
    exact, _ = data.decode(encoded(photo), (32, 32))
    assert np.abs(fast.astype(int) - exact).mean() < 2


# the store


@given(st.lists(st.integers(0, 4), min_size=2, max_size=200), st.floats(0.01, 0.99), st.integers(0, 5))
def test_splits_are_exact_proportional_and_repeatable(labels, share, seed):
    labels = np.array(labels)
    chosen = data.split_off(labels, share, seed, tag=0)
    n, count = len(labels), chosen.sum()
    assert count == min(max(1, round(share * n)), n - 1)
    for label in set(labels.tolist()):
        of_class = labels == label
        assert abs(chosen[of_class].sum() - of_class.sum() * count / n) < 1
    np.testing.assert_array_equal(chosen, data.split_off(labels, share, seed, tag=0))


def test_the_seed_and_only_the_seed_moves_the_split(here):
    album("root", 40)
    stores = {}
    for name, seed in (("one", 0), ("same", 0), ("other", 1)):
        prepare("root", name, seed=seed)
        stores[name] = content(name)
    assert stores["one"] == stores["same"]
    assert stores["one"]["val.npy"] != stores["other"]["val.npy"]


@given(st.integers(0, 1200), st.sampled_from(["uint8", "int64", "float32"]))
def test_growing_files_are_numpys_own(tmp_path_factory, n, dtype):
    grown, saved = (tmp_path_factory.getbasetemp() / name for name in ("grown.npy", "saved.npy"))
    rows = np.arange(n * 6).astype(dtype).reshape(n, 2, 3)
    with data.NpyWriter(grown, (2, 3), dtype) as writer:
        for row in rows:
            writer.append(row)
    np.save(saved, rows)
    assert grown.read_bytes() == saved.read_bytes()


def test_the_same_bytes_from_any_order_place_and_number_of_threads(here, monkeypatch):
    album("root", 40)
    files.write_bytes("root/a/torn.png", b"torn")
    prepare("root", "one", threads=1, max_bad=0.1)
    shutil.copytree("root", "moved/root")
    scan = os.scandir

    class Backwards(list):
        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def __next__(self):
            if not self:
                raise StopIteration
            return self.pop()

        def close(self):
            pass

    monkeypatch.setattr(os, "scandir", lambda path: Backwards(sorted(scan(path), key=lambda e: e.name)))
    prepare("moved/root", "two", threads=5, max_bad=0.1)
    assert content("one") == content("two")


def test_a_store_is_what_went_in(here):
    album("root", 30, h=16, w=16)
    manifest = prepare("root")
    wanted = {f"{k:04}": pixels(k, 16, 16).transpose(2, 0, 1) for k in range(30)}
    seen = []
    for split, numbers in manifest["splits"].items():
        store = data.Store.open("prepared", split)
        assert len(store) == numbers["images"] == sum(numbers["per_class"].values())
        for name, digest in numbers["sha256"].items():
            assert files.sha256(f"prepared/{name}") == digest
        for image, label in zip(store.images, store.labels):
            name = next(k for k, w in wanted.items() if np.array_equal(w, image))
            assert store.classes[label] == "ab"[int(name) % 2]
            seen.append(name)
    assert sorted(seen) == sorted(wanted)
    train = data.Store.open("prepared", "train")
    scaled = np.asarray(train.images, dtype=np.float64) / 255
    np.testing.assert_allclose(train.mean, scaled.mean((0, 2, 3)), rtol=1e-9)
    np.testing.assert_allclose(train.std, scaled.std((0, 2, 3)), rtol=1e-9)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_every_number_of_channels(here, channels):
    album("root", 6, classes="")
    manifest = prepare("root", channels=channels, image_size=(8, 12))
    store = data.Store.open("prepared", "train")
    assert store.images.shape[1:] == (channels, 8, 12) and len(manifest["mean"]) == channels
    assert store.classes == [] and (store.labels == -1).all()
    if channels == 4:  # a channel without contrast: opaque everywhere
        batch = data.TrainBatches(store, batch_size=2, seed=0).batch(0)
        assert manifest["std"][3] == 1.0 and torch.isfinite(batch).all() and batch[:, 3].abs().max() < 1e-5


def test_splits_that_exist_are_kept(here):
    for split, n in (("train", 12), ("test", 6)):
        album(f"root/{split}", n)
    manifest = prepare("root", validation=0.25)
    assert {s: v["images"] for s, v in manifest["splits"].items()} == {"train": 9, "val": 3, "test": 6}
    assert manifest["split_off_from_train"] == ["val"]
    assert manifest["repeated_from_train"]["test"] > 0  # the folders hold the same six files


def test_three_percent_corrupt_images_stop_the_stage(here):
    album("root", 100)
    prepare("root", max_bad=0.0)
    before = content("prepared")
    for k in (5, 50, 95):
        files.write_bytes(f"root/{'ab'[k % 2]}/{k:04}.png", encoded(pixels(k))[:60])
    with pytest.raises(
        data.DataError, match=r"3 of 100 images can't be used \(3\.0%; data\.max_bad allows 1\.0%\)"
    ) as caught:
        prepare("root")
    line = str(caught.value)
    assert all(f"{k:04}.png (" in line for k in (5, 50, 95)) and "\n" not in line
    assert content("prepared") == before and sorted(os.listdir()) == ["prepared", "root"]
    manifest = prepare("root", max_bad=0.03)  # the limit itself is allowed
    assert [s["file"] for s in manifest["skipped"]] == ["a/0050.png", "b/0005.png", "b/0095.png"]
    assert sum(s["images"] for s in manifest["splits"].values()) == 97


def test_bad_files_cost_their_own_place_and_move_no_other(here):
    album("root", 60)
    prepare("root", "all")
    files.write_bytes("root/a/0030.png", b"")
    prepare("root", "less", max_bad=0.1)
    for split in ("train", "val", "test"):
        every, left = ({i.tobytes() for i in data.Store.open(out, split).images} for out in ("all", "less"))
        assert left <= every and len(every - left) <= 1


def test_bad_rows_of_a_parquet_file_are_listed_by_number(here):
    images = [encoded(pixels(k)) for k in range(20)]
    images[4], images[7], images[11] = b"", None, images[11][:50]
    table("root/train.parquet", [k % 2 for k in range(20)], images=images)
    manifest = prepare("root", max_bad=0.2)
    assert [s["file"] for s in manifest["skipped"]] == [f"train.parquet[{k}]" for k in (4, 7, 11)]
    assert [s["reason"] for s in manifest["skipped"]][:2] == ["empty file"] * 2


def test_names_in_any_encoding(here):
    album("root", 8)
    for name in (b"root/a/\xff\xfe.png", "root/a/日本.png".encode(), b"root/b/new\nline.png"):
        with open(name, "wb") as file:
            file.write(b"torn")
    manifest = prepare("root", max_bad=0.5)
    assert len(manifest["skipped"]) == 3
    with pytest.raises(data.DataError) as caught:
        prepare("root")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("stop", [KeyboardInterrupt, OSError(errno.ENOSPC, "No space left on device")])
def test_a_stopped_preparation_leaves_the_earlier_store(here, stop):
    album("root", 30)
    prepare("root")
    before = content("prepared")

    def progress(done, total):
        assert total == 30
        if done == 17:
            raise stop

    with pytest.raises((KeyboardInterrupt, UserError)):
        prepare("root", progress=progress, image_size=(8, 8))
    assert content("prepared") == before and sorted(os.listdir()) == ["prepared", "root"]


def test_a_disk_too_small_is_said_before_the_work(here, monkeypatch):
    album("root", 6)
    monkeypatch.setattr(files, "free_space", lambda path: 1000)
    with pytest.raises(UserError, match="the store needs .* MB; the disk has 0 MB free"):
        prepare("root")


def test_memory_does_not_grow_with_the_number_of_images(here):
    def peak(n):
        album(f"root{n}", n, h=8, w=8, classes="")
        tracemalloc.start()
        prepare(f"root{n}", image_size=(96, 96))
        used = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return used

    images = 300 * 3 * 96 * 96
    assert peak(350) - peak(50) < images / 8


def test_a_damaged_store_is_an_error(here):
    album("root", 12)
    prepare("root")
    with pytest.raises(UserError, match="nowhere/manifest.json: no such file"):
        data.Store.open("nowhere", "train")
    whole = files.must_exist("prepared/train.npy").read_bytes()
    files.write_bytes("prepared/train.npy", whole[:-10])
    with pytest.raises(data.DataError, match="prepared/train.npy: damaged"):
        data.Store.open("prepared", "train")
    shutil.copy("prepared/val.npy", "prepared/train.npy")
    with pytest.raises(data.DataError, match="prepared/train.npy: images, labels and manifest differ"):
        data.Store.open("prepared", "train")


# batches


def boxes_of(draw, b, h, w):
    """Boxes of whole pixels, none larger than the image."""
    out = []
    for _ in range(b):
        ch, cw = draw(st.integers(2, h)), draw(st.integers(2, w))
        out.append([draw(st.integers(0, h - ch)), draw(st.integers(0, w - cw)), ch, cw])
    return out


@given(st.data(), st.integers(8, 30), st.integers(8, 30))
def test_augment_agrees_with_torchvision_image_by_image(draw, h, w):
    images = torch.from_numpy(np.random.default_rng(h * w).integers(0, 256, (3, 3, h, w), dtype=np.uint8))
    boxes = boxes_of(draw.draw, 3, h, w)
    flips = torch.tensor([draw.draw(st.booleans()) for _ in boxes])
    ours = data.augment(images, torch.tensor(boxes, dtype=torch.float32), flips, (h, w), *RAW)
    for image, box, flip, mine in zip(images.float(), boxes, flips, ours):
        theirs = TF.resized_crop(image, *box, (h, w), antialias=True)
        theirs = theirs.flip(-1) if flip else theirs
        top, side = (
            -(-size // (2 * length)) + 1 for size, length in zip((h, w), box[2:])
        )  # half a source pixel
        inside = (slice(None), slice(top, h - top), slice(side, w - side))
        torch.testing.assert_close(mine[inside], theirs[inside], atol=0.02, rtol=0)
    assert ours.min() >= -1e-3 and ours.max() <= 255 + 1e-3


def test_augment_keeps_its_precision_under_autocast():
    images = torch.randint(0, 256, (4, 3, 224, 224), dtype=torch.uint8)
    crops = torch.from_numpy(data.draw_crops(np.random.default_rng(0), 4, (224, 224), SCALE, RATIO))
    arguments = (images, crops, torch.tensor([True, False] * 2), (224, 224), *RAW)
    plain = data.augment(*arguments)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(data.augment(*arguments), plain, atol=0, rtol=0)


@pytest.mark.parametrize("size", [(64, 64), (48, 96)])
def test_boxes_are_distributed_as_torchvisions(size):
    torch.manual_seed(0)
    image = torch.zeros(3, *size)
    theirs = np.array([RandomResizedCrop.get_params(image, SCALE, RATIO) for _ in range(3000)])
    ours = data.draw_crops(np.random.default_rng(0), 3000, size, SCALE, RATIO)
    from scipy.stats import ks_2samp

    for measure in (
        lambda b: b[:, 2] * b[:, 3],
        lambda b: b[:, 2] + b[:, 3],
        lambda b: b[:, 0] + b[:, 2] / 2,
        lambda b: b[:, 1] + b[:, 3] / 2,
    ):
        jitter = np.random.default_rng(1).uniform(-0.5, 0.5, 3000)  # whole pixels against real numbers
        assert ks_2samp(measure(ours) + jitter, measure(theirs) + jitter).statistic < 0.05


@given(
    size=st.tuples(st.integers(1, 80), st.integers(1, 80)),
    low=st.floats(0.01, 1),
    ratio=st.tuples(st.floats(0.1, 1), st.floats(1, 10)) | st.just((4.0, 5.0)),
)
def test_boxes_lie_inside_the_image(size, low, ratio):
    crops = data.draw_crops(np.random.default_rng(0), 64, size, (low, 1.0), ratio).astype(float)
    assert (crops[:, :2] >= 0).all() and (crops[:, 2:] > 0).all()
    assert (crops[:, :2] + crops[:, 2:] <= np.array(size) * (1 + 1e-6)).all()
    shape = crops[:, 3] / crops[:, 2]
    assert (shape >= ratio[0] * (1 - 1e-5)).all() and (shape <= ratio[1] * (1 + 1e-5)).all()


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    """Stores of 1, 3 and 5 channels, not square."""
    out, rng = {}, np.random.default_rng(0)
    for c in (1, 3, 5):
        folder = tmp_path_factory.mktemp("stores") / str(c)
        images = rng.integers(0, 256, (37, c, 12, 8), dtype=np.uint8)
        data.store_arrays(
            folder, {"train": (images, np.arange(37) % 3), "val": (images[:5], None)}, ["x", "y", "z"]
        )
        out[c] = data.Store.open(folder, "train")
    return out


@given(c=st.sampled_from([1, 3, 5]), b=st.integers(1, 37), seed=st.integers(0, 3), draw=st.data())
def test_a_batch_is_a_function_of_seed_and_step(stores, c, b, seed, draw):
    kept = data.TrainBatches(stores[c], batch_size=b, seed=seed, resident="always")
    read = data.TrainBatches(stores[c], batch_size=b, seed=seed, resident="never")
    assert kept.resident and not read.resident
    for step in draw.draw(st.lists(st.integers(0, 100), min_size=1, max_size=4)):
        whole = kept.batch(step)
        assert whole.shape == (b, c, 12, 8) and whole.dtype == torch.float32
        assert torch.equal(read.batch(step), whole)
        start = draw.draw(st.integers(0, b - 1))
        stop = draw.draw(st.integers(start + 1, b))
        assert torch.equal(kept.rows(step, start, stop), whole[start:stop])
        assert torch.equal(read.rows(step, start, stop), whole[start:stop])


@given(b=st.integers(1, 37), seed=st.integers(0, 100))
def test_an_epoch_shows_every_image_once(stores, b, seed):
    batches = data.TrainBatches(stores[1], batch_size=b, seed=seed)
    steps = batches.steps_per_epoch
    epochs = [np.concatenate([batches.indices(e * steps + s) for s in range(steps)]) for e in range(2)]
    for epoch in epochs:
        assert len(set(epoch.tolist())) == len(epoch) == 37 // b * b
    assert b == 37 or steps * b < 8 or epochs[0].tolist() != epochs[1].tolist()


def test_seeds_and_steps_differ_in_order_crops_and_flips(stores):
    a, b = (data.TrainBatches(stores[3], batch_size=8, seed=s) for s in (0, 1))
    assert a.indices(0).tolist() != b.indices(0).tolist()
    for one, other in ((a.draws(0), b.draws(0)), (a.draws(0), a.draws(1))):
        assert (one[0] != other[0]).any() and (one[1] != other[1]).any()
    flips = np.concatenate([a.draws(s)[1] for s in range(200)])
    assert 0.45 < flips.mean() < 0.55
    still = data.TrainBatches(stores[3], batch_size=8, seed=0, flip=False)
    assert not any(still.draws(s)[1].any() for s in range(20))


def test_without_augmentation_a_batch_is_the_store(stores):
    store = stores[3]
    batches = data.TrainBatches(
        store, batch_size=37, seed=0, crop_scale=(1.0, 1.0), crop_ratio=(2 / 3, 2 / 3), flip=False
    )
    mean, std = (torch.tensor(m).view(-1, 1, 1) for m in (store.mean, store.std))
    expected = torch.from_numpy(store.images[batches.indices(0)]) / 255
    torch.testing.assert_close(batches.batch(0) * std + mean, expected, atol=1e-5, rtol=0)


def test_rows_are_read_ahead_once_and_little_is_kept(stores, monkeypatch):
    batches = data.TrainBatches(stores[3], batch_size=8, seed=0, resident="never")
    reads, read = [], batches.reader.read
    monkeypatch.setattr(batches.reader, "read", lambda index: reads.append(tuple(index)) or read(index))
    for step in range(6):
        for start in (0, 4):  # two micro-batches
            batches.rows(step, start, start + 4)
            assert len(batches.reader.ahead) <= 4
    for reading in batches.reader.ahead.values():  # what is still being read
        reading.result()
    expected = [tuple(batches.indices(s)[i : i + 4]) for s in range(7) for i in (0, 4)]
    assert sorted(reads) == sorted(expected)  # nothing twice, one step ahead
    batches.batch(40)  # a jump
    assert len(batches.reader.ahead) == 1


def test_evaluation_sees_every_image_in_order(stores):
    store = stores[5]
    for b in (1, 10, 37, 100):
        parts = list(data.eval_batches(store, b))
        assert [len(p) for p in parts] == [min(b, 37 - i) for i in range(0, 37, b)]
        torch.testing.assert_close(
            torch.cat(parts), torch.cat(list(data.eval_batches(store, 7))), atol=0, rtol=0
        )


def test_a_small_set_is_one_batch_and_says_so(stores):
    batches = data.TrainBatches(stores[1], batch_size=64, seed=0)
    assert batches.batch_size == 37 and batches.steps_per_epoch == 1 and "64" in batches.note
    assert data.TrainBatches(stores[1], batch_size=37, seed=0).note is None


def test_a_store_of_arrays_has_unlabelled_splits_too(stores, tmp_path):
    images = np.zeros((4, 2, 3, 3), np.uint8)
    manifest = data.store_arrays(tmp_path / "s", {"train": (images, None)})
    store = data.Store.open(tmp_path / "s", "train")
    assert store.labels.tolist() == [-1] * 4 and store.classes == [] and manifest["std"] == [1.0, 1.0]
    with pytest.raises(UserError, match="unknown split 'test'; allowed: train"):
        data.Store.open(tmp_path / "s", "test")
