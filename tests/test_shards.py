"""Shards: what is written, in which order it is read, what happens when some of it is missing."""

import io
import shutil
import sys
import tarfile
import threading
import time
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from clmae import data, files, runs, shards
from clmae.__main__ import main
from clmae.config import Data, Evaluate, Film, Model, Shards, Train, UserError, read_params
from clmae.data import DataError
from clmae.files import read_json

SIZE = (16, 16)
HOW = {"image_size": SIZE, "validation": 0.1, "min_size": 4}
READ = {
    "image_size": SIZE,
    "batch_size": 8,
    "seed": 3,
    "buffer": 10,
    "pause": 0.0,
    "retries": 1,
    "workers": 2,
}
ROOT = Path(__file__).resolve().parent.parent


def blob(seed, h=20, w=24):
    """A smooth picture (h, w, 3) uint8."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((w, h), Image.Resampling.BICUBIC)


def photos(folder, count=60):
    """JPEG, PNG, WebP and BMP files in two classes."""
    for i in range(count):
        path = folder / ["ash", "oak"][i % 2] / f"{i:03d}.{['jpg', 'png', 'webp', 'bmp'][i % 4]}"
        path.parent.mkdir(parents=True, exist_ok=True)
        blob(i, 20 + i % 5).save(path)
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder of images, shards of it, and their manifest."""
    top = tmp_path_factory.mktemp("made")
    manifest = shards.shard(photos(top / "photos"), top / "shards", per_shard=8, **HOW)
    return top, manifest


@pytest.fixture
def found(made):
    """URLs of the training shards and the manifest."""
    return shards.expand("shards/train-*.tar", made[0]), made[1]


def samples(path) -> dict[str, dict[str, bytes]]:
    """Key -> suffix -> bytes, as Python's own tarfile reads a shard."""
    read = {}
    with tarfile.open(path) as archive:
        for info in archive:
            key, _, suffix = info.name.partition(".")
            read.setdefault(key, {})[suffix] = archive.extractfile(info).read()
    return read


def said(*lines):
    """A report that collects its lines."""
    collected = list(lines)
    return collected, collected.append


# ---- writing


def test_every_image_is_in_one_shard_with_its_bytes_and_label(made):
    top, manifest = made
    source = data.find_source(top / "photos")
    blobs = {path.read_bytes(): path.parent.name for path in (top / "photos").rglob("*.*")}
    seen = []
    for name, facts in manifest["shards"].items():
        read = samples(top / "shards" / name)
        assert len(read) == facts["images"] and list(read) == sorted(read)
        assert files.sha256(top / "shards" / name) == facts["sha256"]
        for key, sample in read.items():
            [suffix] = sample.keys() - {"cls"}
            label = source.classes[int(sample["cls"])]
            original = Path(top / "photos" / source.parts["train"].names[int(key)])
            assert original.parent.name == label
            if original.suffix == ".bmp":
                assert suffix == "png"
                same = [np.asarray(Image.open(x)) for x in (original, io.BytesIO(sample[suffix]))]
                assert np.array_equal(*same)
            else:
                assert sample[suffix] == original.read_bytes() and suffix == original.suffix[1:]
                assert blobs[sample[suffix]] == label
            seen.append(key)
    assert len(seen) == len(set(seen)) == 60
    assert sum(split["images"] for split in manifest["splits"].values()) == 60


def test_shards_and_the_prepared_store_split_alike(made, tmp_path):
    top, manifest = made
    prepared = data.prepare(top / "photos", tmp_path / "prepared", **HOW)
    for key in ("mean", "std", "classes", "source"):
        assert prepared[key] == manifest[key]
    for split in ("train", "val", "test"):
        store = data.Store.open(tmp_path / "prepared", split)
        inside = [
            data.decode(image, SIZE)[0].tobytes()
            for name in manifest["shards"]
            if name.startswith(split)
            for _, image in shards.images_of(str(top / "shards" / name))
        ]
        assert sorted(inside) == sorted(image.tobytes() for image in store.images)


def test_same_images_same_bytes(made, tmp_path):
    top, manifest = made
    again = shards.shard(top / "photos", tmp_path / "again", per_shard=8, threads=3, **HOW)
    assert again == manifest
    for name in ("manifest.json", *manifest["shards"]):
        assert (tmp_path / "again" / name).read_bytes() == (top / "shards" / name).read_bytes()


def test_parquet_gives_the_same_samples_as_its_folder(made, tmp_path):
    top, _ = made
    source = data.find_source(top / "photos")
    part = source.parts["train"]
    table = {"image": [fetch() for fetch in part.blobs()], "label": [source.classes[i] for i in part.labels]}
    (tmp_path / "tables").mkdir()
    pq.write_table(pa.table(table), tmp_path / "tables/train.parquet")
    manifest = shards.shard(tmp_path / "tables", tmp_path / "out", per_shard=8, **HOW)
    assert manifest["shards"] == made[1]["shards"] and manifest["splits"] == made[1]["splits"]


@given(st.integers(1, 200), st.integers(1, 50))
def test_shards_are_balanced_and_no_larger_than_asked(n, per_shard):
    names, counts = np.unique(shards.deal(np.full(n, "train"), per_shard, 0).astype(str), return_counts=True)
    assert counts.sum() == n and counts.max() <= per_shard and np.ptp(counts) <= 1
    assert names.tolist() == [f"train-{i:06d}.tar" for i in range(len(names))]


def test_a_shard_is_no_single_class(made):
    labels = [{int(s["cls"]) for s in samples(p).values()} for p in (made[0] / "shards").glob("train-*")]
    assert all(len(classes) == 2 for classes in labels)


def test_bad_files_are_listed_and_too_many_leave_nothing(tmp_path):
    folder = photos(tmp_path / "photos", 40)
    (folder / "ash/broken.jpg").write_bytes(b"no image")
    manifest = shards.shard(folder, tmp_path / "out", max_bad=0.1, **HOW)
    assert [entry["file"] for entry in manifest["skipped"]] == ["ash/broken.jpg"]
    before = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    with pytest.raises(DataError, match="1 of 41 images can't be used"):
        shards.shard(folder, tmp_path / "out", max_bad=0.0, **HOW)
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "photos"]


def test_a_folder_of_other_things_is_not_replaced(made):
    top, _ = made
    with pytest.raises(DataError, match="holds ash, and would be replaced"):
        shards.shard(top / "photos", top / "photos", **HOW)
    assert len(list((top / "photos").rglob("*.*"))) == 60


# ---- order


@given(st.integers(1, 80), st.integers(1, 30), st.integers(0, 5))
def test_what_leaves_the_buffer_has_arrived_and_leaves_once(n, buffer, seed):
    order = shards.leaving(n, buffer, np.random.default_rng(seed))
    assert sorted(order.tolist()) == list(range(n))
    assert (order <= np.arange(n) + buffer).all()


def plan_of(counts, lanes, batch, buffer=7):
    return shards.ShardPlan(counts, lanes, buffer, batch, SIZE, 0, (0.2, 1), (1, 1), True)


@given(st.lists(st.integers(4, 12), min_size=3, max_size=8), st.integers(1, 3), st.integers(0, 3))
def test_lanes_share_the_shards_of_an_epoch(counts, lanes, epoch):
    plan = plan_of(counts, lanes, 2 * lanes)
    dealt = [plan.shards(epoch, lane).tolist() for lane in range(lanes)]
    assert sorted(sum(dealt, [])) == list(range(len(counts)))
    rows = plan.permutation(epoch).reshape(-1, lanes, 2)
    owner = np.repeat(np.arange(len(counts)), counts)
    for lane in range(lanes):
        assert set(owner[rows[:, lane].ravel()].tolist()) <= set(dealt[lane])
    if len(set(counts)) == 1 and len(counts) % lanes == 0:
        assert len(set(plan.permutation(epoch).tolist())) == len(plan.permutation(epoch))


def test_a_lane_holds_no_more_than_its_buffer_and_a_batch():
    plan, held = plan_of([50] * 8, 1, 4, buffer=20), []

    class Watched(bytes):
        alive = 0

        def __new__(cls):
            Watched.alive += 1
            return super().__new__(cls)

        def __del__(self):
            Watched.alive -= 1

    stream = shards.lane_steps(plan, 0, 0, lambda shard, places: ((p, Watched()) for p in sorted(places)))
    for _ in range(80):
        next(stream)
        held.append(Watched.alive)
    assert 0 < max(held) <= 20 + 2 * 4 + 1, max(held)


def test_used_shards_are_not_opened_again():
    plan, opened = plan_of([10] * 10, 1, 5, buffer=10), []

    def fetch(shard, places):
        opened.append((shard, len(places)))
        return ((p, b"") for p in sorted(places))

    stream = shards.lane_steps(plan, 0, 16, fetch)  # 80 of 100 images are used
    for _ in range(4):
        next(stream)
    assert len(opened) <= 5 and sum(count for _, count in opened) == 20


@pytest.mark.parametrize(("lanes", "batch"), [(3, 8), (9, 9)])
def test_lanes_must_divide_the_batch_and_have_a_shard_each(lanes, batch):
    with pytest.raises(DataError, match=rf"shards.lanes: {lanes}; must divide the batch of {batch}"):
        plan_of([6] * 8, lanes, batch)


# ---- reading


def test_batches_are_those_of_a_store_of_the_same_images(found):
    """Decoded, cropped, mirrored and normalised as `TrainBatches` does it, in the plan's order."""
    urls, manifest = found
    ours = shards.ShardBatches(urls, manifest, **READ)
    pixels = [data.decode(image, SIZE)[0] for url in urls for _, image in shards.images_of(url)]
    store = data.Store(np.stack(pixels), np.zeros(len(pixels)), [], manifest["mean"], manifest["std"])
    theirs = data.TrainBatches(store, batch_size=8, seed=3)
    theirs.permutation = ours.permutation
    assert ours.steps_per_epoch == theirs.steps_per_epoch == len(pixels) // 8
    for step in range(2 * ours.steps_per_epoch + 1):
        assert torch.equal(ours.batch(step), theirs.batch(step))


@pytest.mark.parametrize("lanes", [1, 2, 4])
def test_resumed_in_mid_epoch_and_in_any_slices_the_batches_are_the_same(found, lanes):
    whole = shards.ShardBatches(*found, lanes=lanes, **READ)
    batches = [whole.batch(step) for step in range(10)]
    for start in (1, 4, 7):
        resumed = shards.ShardBatches(*found, lanes=lanes, **READ)
        for step in range(start, 10):
            pieces = [resumed.rows(step, place, place + 2) for place in (0, 2, 4, 6)]
            assert torch.equal(torch.cat(pieces), batches[step])
    assert torch.equal(whole.batch(2), batches[2])  # back again
    assert not torch.equal(batches[0], batches[whole.steps_per_epoch])
    other = shards.ShardBatches(*found, lanes=lanes, **{**READ, "seed": 4})
    assert not torch.equal(other.batch(0), batches[0])


def test_a_process_reads_only_its_lanes(found):
    ours = shards.ShardBatches(*found, lanes=2, **READ)
    for step in range(4):
        ours.rows(step, 4, 8)
    first, second = ours.reader.lanes
    assert first.coming is None and second.coming in (4, 5)  # 5 if the next step has been read ahead


def test_reading_ends_with_its_reader(found):
    before = threading.active_count()
    batches = shards.ShardBatches(*found, lanes=2, **READ)
    batches.batch(0)
    del batches
    until = time.monotonic() + 5
    while threading.active_count() > before and time.monotonic() < until:
        time.sleep(0.05)
    assert threading.active_count() <= before


@pytest.fixture(scope="module")
def server(made):
    """The folder of shards over http: some names are cut off, some fail once."""
    if shutil.which("curl") is None:
        pytest.skip("needs curl, with which webdataset reads http")
    asked = []

    class Handler(SimpleHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            folder, _, name = self.path.lstrip("/").partition("/")
            body = (made[0] / "shards" / name).read_bytes()
            once = folder == "flaky" and asked.count(self.path) == 1
            missing = folder == "holes" and name == "train-000001.tar"
            if missing:
                return self.send_error(404)
            cut = once or (folder == "holes" and name == "train-000002.tar")
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body[: len(body) // 2 if cut else None])
            self.close_connection = True

        def log_message(self, *_):
            pass

    serving = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    serving.handle_error = lambda *_: None  # a reader that has enough hangs up
    threading.Thread(target=serving.serve_forever, daemon=True).start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("no_proxy", "127.0.0.1")
        yield f"http://127.0.0.1:{serving.server_port}", asked
    serving.shutdown()


def names(manifest):
    return [name for name in manifest["shards"] if name.startswith("train")]


def test_paths_patterns_commands_and_addresses_read_the_same(made, server, found):
    top, manifest = made
    last = len(names(manifest)) - 1
    numbers = f"{{000000..{last:06d}}}"
    expected = shards.ShardBatches(*found, **READ).batch(2)
    beside = str(top / "shards/manifest.json")
    for urls, where in {
        f"shards/train-{numbers}.tar": None,
        "shards/train-*.tar": None,
        f"{top}/shards/train-{numbers}.tar": None,
        f"pipe:cat {top}/shards/train-{numbers}.tar": beside,
        f"{server[0]}/fine/train-{numbers}.tar": None,
    }.items():
        opened = shards.open_shards(urls, manifest=where, root=top, report=pytest.fail, **READ)
        assert torch.equal(opened.batch(2), expected), urls


def test_a_network_that_fails_once_changes_nothing(made, server, found):
    urls = [f"{server[0]}/flaky/{name}" for name in names(made[1])]
    lines, report = said()
    flaky = shards.ShardBatches(urls, made[1], report=report, **READ)
    whole = shards.ShardBatches(*found, **READ)
    assert all(torch.equal(flaky.batch(step), whole.batch(step)) for step in range(whole.steps_per_epoch))
    assert lines == []
    assert server[1].count("/flaky/train-000000.tar") in (2, 3)  # 3 if the next epoch was read ahead


def test_missing_and_truncated_shards_are_reported_and_replaced(made, server, found):
    urls = [f"{server[0]}/holes/{name}" for name in names(made[1])]
    lines, report = said()
    holes = shards.ShardBatches(urls, made[1], report=report, max_lost=0.4, **READ)
    whole = shards.ShardBatches(*found, **READ)
    steps = range(whole.steps_per_epoch)
    same = [a.equal(b) for step in steps for a, b in zip(holes.batch(step), whole.batch(step))]
    lost = sum(counts for url, counts in zip(urls, holes.plan.counts) if url.endswith("1.tar"))
    assert 0.6 * len(same) < sum(same) <= len(same) - lost + 1
    assert len(lines) == 2 and all("shard given up" in line for line in lines)
    assert {line.split(":")[2].rsplit("/", 1)[-1] for line in lines} == {
        "train-000001.tar",
        "train-000002.tar",
    }
    assert "\n" not in "".join(lines)
    again = shards.ShardBatches(urls, made[1], report=report, max_lost=0.4, **READ)
    assert torch.equal(again.rows(3, 2, 8), holes.batch(3)[2:])  # in any process, from any step


def test_more_lost_shards_than_allowed_end_with_one_line(made, server):
    urls = [f"{server[0]}/holes/{name}" for name in names(made[1])]
    lines, report = said()
    holes = shards.ShardBatches(urls, made[1], report=report, **READ)
    with pytest.raises(DataError) as error:
        for step in range(holes.steps_per_epoch):
            holes.batch(step)
    text = str(error.value)
    assert "/holes/train-00000" in text and "shards.max_lost allows 1" in text and "\n" not in text
    assert f"2 of {len(urls)} shards can't be read" in text and len(lines) == 1
    strict = shards.ShardBatches(urls, made[1], report=report, max_lost=0.0, **READ)
    with pytest.raises(DataError, match="shards.max_lost allows 0"):
        for step in range(strict.steps_per_epoch):
            strict.batch(step)


@pytest.mark.parametrize("length", [0, 100, 512, 3000, -1024])
def test_a_truncated_file_gives_what_lies_before_the_cut(found, tmp_path, length):
    urls, manifest = found
    whole = Path(urls[0]).read_bytes()
    cut = tmp_path / "cut.tar"
    end = whole.rstrip(b"\0")
    cut.write_bytes(end[: len(end) - 2000] if length < 0 else whole[:length])
    read, count = dict(shards.images_of(urls[0])), manifest["shards"]["train-000000.tar"]["images"]
    lines, report = said()
    got = dict(shards.persistent(str(cut), set(range(count)), count, 0, 0.0, report))
    assert len(got) < count and all(read[place] == image for place, image in got.items())
    assert len(lines) == 1 and "\n" not in lines[0] and str(tmp_path) not in lines[0]


def test_an_image_that_cannot_be_decoded_is_reported_and_replaced(made, found, tmp_path):
    urls, manifest = found
    spoilt = shards.Shard(tmp_path / "train-000000.tar")
    for place, (key, sample) in enumerate(samples(urls[0]).items()):
        [suffix] = sample.keys() - {"cls"}
        spoilt.add(key, suffix, b"no image" if place == 0 else sample[suffix], 0)
    spoilt.close()
    lines, report = said()
    ours = shards.ShardBatches([str(spoilt.path), *urls[1:]], manifest, report=report, **READ)
    batches = [ours.batch(step) for step in range(ours.steps_per_epoch)]
    whole = shards.ShardBatches(*found, **READ)
    different = sum(not a.equal(b) for s, x in enumerate(batches) for a, b in zip(x, whole.batch(s)))
    shown = 0 in np.concatenate([whole.indices(s) for s in range(whole.steps_per_epoch)])
    assert different == len(lines) == int(shown)
    assert not lines or ("not an image that Pillow can read" in lines[0] and str(spoilt.path) in lines[0])


def test_nothing_at_all_is_one_line(found):
    _, manifest = found
    ours = shards.ShardBatches(
        ["nowhere/train-000000.tar"], manifest, report=print, **{**READ, "batch_size": 4}
    )
    with pytest.raises(DataError, match="step 0: none of the 4 images of lane 0 can be had"):
        ours.batch(0)


@pytest.mark.parametrize(
    ("urls", "manifest", "message"),
    [
        ("nowhere/*.tar", None, "matches no file"),
        ("photos/ash/000.jpg", None, "no manifest of shards there"),
        ("shards/train-{000000..000099}.tar", None, "train-0000.*not in the manifest"),
        ("pipe:cat shards/train-000000.tar", None, "shards.manifest: missing; with pipe:"),
        ("shards/train-*.tar", "photos/ash/000.jpg", "no manifest of shards there"),
    ],
)
def test_wrong_addresses_are_one_line(made, urls, manifest, message):
    with pytest.raises(DataError, match=message) as error:
        shards.open_shards(urls, manifest=manifest, root=made[0], **READ)
    assert "\n" not in str(error.value)


def test_shards_made_elsewhere_can_be_counted(made, found, tmp_path):
    urls, manifest = found
    counted = shards.survey(urls, tmp_path, image_size=SIZE)
    assert shards.counts_of(urls, counted) == shards.counts_of(urls, manifest)
    np.testing.assert_allclose(counted["mean"] + counted["std"], manifest["mean"] + manifest["std"])
    opened = shards.open_shards(
        "shards/train-*.tar", manifest=str(tmp_path / "manifest.json"), root=made[0], **READ
    )
    assert np.array_equal(opened.indices(3), shards.ShardBatches(*found, **READ).indices(3))


def test_without_the_package_there_is_a_cure(monkeypatch):
    monkeypatch.setitem(sys.modules, "webdataset", None)
    with pytest.raises(UserError, match="pip install 'webdataset"):
        shards.expand("train-{0..3}.tar")


# ---- the whole


def test_command_writes_and_counts(made, tmp_path, monkeypatch, capsys):
    (tmp_path / "params.yaml").write_text((ROOT / "params.yaml").read_text())
    monkeypatch.chdir(tmp_path)
    assert main(["shard", str(made[0] / "photos"), "out", "--per-shard", "20"]) == 0
    manifest = read_json("out/manifest.json")
    said = capsys.readouterr().out.strip()
    assert said.startswith(f"out: {len(manifest['shards'])} shards, ") and said.endswith("0 skipped")
    assert all(facts["images"] <= 20 for facts in manifest["shards"].values())
    assert main(["shard", "out/train-*.tar", "counted"]) == 0
    counted = read_json("counted/manifest.json")["splits"]["train"]["images"]
    assert counted == manifest["splits"]["train"]["images"] > 30
    capsys.readouterr()
    assert main(["shard", "nowhere", "out"]) == 2
    assert capsys.readouterr().err.startswith("clmae: error: nowhere: no such folder")


def test_parameters_name_shards(root):
    assert read_params(root / "params.yaml").shards == Shards()


def test_a_run_from_shards_can_be_stopped_and_ends_the_same(made, tmp_path, monkeypatch):
    top, manifest = made
    torch.set_num_threads(1)
    section = {"urls": f"{top}/shards/train-*.tar", "lanes": 2, "buffer": 10, "workers": 1}
    common = {
        "data": Data(image_size=SIZE),
        "model": Model(
            preset="micro", patch_size=(4, 4), width=16, depth=1, heads=2, decoder_width=16, decoder_heads=2
        ),
        "train": Train(epochs=2, batch_size=8, base_lr=1e-2, monitor_epochs=0, threads=1),
        "film": Film(images=2, moments=2, average_over=4),
        "evaluate": Evaluate(k=3),
        "shards": Shards(**section),
    }

    def pretrain(folder, **changes):
        silent = {"report": lambda line: None, "folder": folder}
        return runs.pretrain_run(
            run="mae", seed=0, objective={"objective": "mae"}, **{**common, **changes}, **silent
        )

    for name in ("whole", "stopped", "store"):
        data.prepare(top / "photos", tmp_path / name / "build/prepared", **HOW)
        assert read_json(tmp_path / name / "build/prepared/manifest.json")["mean"] == manifest["mean"]
    record = pretrain(tmp_path / "whole")
    assert record["step"] == 2 * (manifest["splits"]["train"]["images"] // 8)
    real, calls = runs.one_line, []

    def stop_once(line):
        calls.append(line)
        if len(calls) == 1:
            raise KeyboardInterrupt
        return real(line)

    monkeypatch.setattr(runs, "one_line", stop_once)
    with pytest.raises(KeyboardInterrupt):
        pretrain(tmp_path / "stopped")
    moved = {**section, "urls": f"pipe:cat {top}/shards/train-00000{{0..{len(names(manifest)) - 1}}}.tar"}
    assert (
        pretrain(tmp_path / "stopped", shards=Shards(**moved, manifest=f"{top}/shards/manifest.json"))
        == record
    )
    weights = [tmp_path / name / "build/runs/mae-0/encoder.safetensors" for name in ("whole", "stopped")]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    assert pretrain(tmp_path / "store", shards=Shards())["loss.mae.total"] != record["loss.mae.total"]
