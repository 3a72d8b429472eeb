"""Files appear whole or not at all, whatever stops the writer; equal content is equal bytes."""

import errno
import os
import signal
import stat
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from clmae import files
from clmae.config import UserError

finite = st.floats(allow_nan=False, allow_infinity=False)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | finite | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)
arrays = hnp.arrays(
    st.sampled_from([np.float32, np.float64, np.float16, np.uint8, np.int64, np.bool_]),
    hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4),
    elements={"allow_nan": False},
)


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def start(code, *arguments):
    """A Python process in the current folder, its output readable line by line."""
    return subprocess.Popen([sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, text=True)


@given(value=values)
def test_json_reads_back_what_was_written(tmp_path_factory, value):
    path = tmp_path_factory.getbasetemp() / "value.json"
    files.write_json(path, value)
    assert files.read_json(path) == value
    assert path.read_bytes().endswith(b"\n")


def test_json_has_one_spelling(here):
    files.write_json("a", {"b": 1, "a": np.float32(0.5), "c": {"y": (1,), "x": np.array([True])}})
    files.write_json("b", {"c": {"x": [True], "y": [np.int8(1)]}, "a": 0.5, "b": 1})
    assert (here / "a").read_bytes() == (here / "b").read_bytes()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), np.float32("nan"), np.array([1.0, -np.inf])])
def test_a_number_that_is_none_is_refused_by_its_place(here, value):
    with pytest.raises(UserError, match=r"a\.json\.runs\[1\]\.loss"):
        files.write_json("a.json", {"runs": [{}, {"loss": value}]})
    assert os.listdir() == []


@given(tensors=st.dictionaries(st.text(min_size=1, max_size=5), arrays, max_size=4), data=st.data())
def test_tensors_read_back_and_a_cut_file_is_an_error(tmp_path_factory, tensors, data):
    tensors.pop("__metadata__", None)
    path = tmp_path_factory.getbasetemp() / "t.safetensors"
    files.write_tensors(path, tensors, {"grid": "2,3", "a": 1})
    back = files.read_tensors(path)
    assert back.keys() == tensors.keys() and files.read_metadata(path) == {"grid": "2,3", "a": "1"}
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(back[name], tensor)
        assert back[name].dtype == tensor.dtype and back[name].shape == tensor.shape
    whole = path.read_bytes()
    path.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
    with pytest.raises(UserError, match="t.safetensors"):
        files.read_tensors(path)
    with pytest.raises(UserError, match="t.safetensors"):
        files.read_metadata(path)


def test_torch_tensors_are_stored_as_they_look(here):
    strided = torch.arange(24.0, requires_grad=True).view(2, 3, 4).permute(2, 0, 1)[::2]
    files.write_tensors("t", {"strided": strided, "byte": torch.arange(3, dtype=torch.uint8)})
    np.testing.assert_array_equal(files.read_tensors("t")["strided"], strided.detach().numpy())
    with pytest.raises(TypeError, match="(?i)bfloat16"):
        files.write_tensors("t", {"x": torch.zeros(2, dtype=torch.bfloat16)})
    assert set(files.read_tensors("t")) == {"strided", "byte"}


def test_other_software_reads_our_safetensors(here):
    from safetensors.torch import load_file

    files.write_tensors("t.safetensors", {"w": np.eye(3, dtype=np.float32)}, {"é": "ü"})
    torch.testing.assert_close(load_file("t.safetensors")["w"], torch.eye(3))


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES])
def test_a_refusing_disk_is_one_line_and_the_old_file_stays(here, monkeypatch, number):
    files.write_bytes("kept", b"old")

    def refuse(path):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(files, "settle", refuse)
    with pytest.raises(UserError, match=r"^kept: cannot be written: .*MB needed, .*MB free") as caught:
        files.write_bytes("kept", b"new" * 10**6)
    assert "\n" not in str(caught.value)
    assert (here / "kept").read_bytes() == b"old" and os.listdir() == ["kept"]


def test_a_disk_that_is_really_full(here):
    files.write_bytes("kept", b"old")
    code = (
        "import resource, sys; from clmae import files; from clmae.config import UserError\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "try: files.write_bytes('kept', b'n' * 100_000)\n"
        "except UserError as error: print(error)"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout.startswith("kept: cannot be written") and said.stderr == ""
    assert (here / "kept").read_bytes() == b"old" and os.listdir() == ["kept"]


def test_writing_below_a_file_is_a_users_error(here):
    files.write_bytes("file", b"")
    with pytest.raises(UserError, match="file/below"):
        files.write_bytes("file/below", b"")


def test_other_errors_keep_their_traceback(here):
    with pytest.raises(ZeroDivisionError), files.whole("a"):
        raise ZeroDivisionError
    with pytest.raises(FileNotFoundError), files.whole("a"):
        open("never written")
    assert os.listdir() == []


def test_a_reader_never_sees_a_part_while_the_writer_is_killed(here):
    code = (
        "import itertools; from clmae import files\n"
        "for i in itertools.count():\n"
        "    files.write_bytes('f', bytes([i % 256]) * 300_000)\n"
        "    print(i, flush=True)"
    )
    seen = set()
    for _ in range(3):
        with start(code) as writer:
            for _ in range(20):
                writer.stdout.readline()
                content = (here / "f").read_bytes()
                seen.add(content[0])
                assert len(content) == 300_000 and len(set(content)) == 1
            writer.send_signal(signal.SIGKILL)
        assert len((here / "f").read_bytes()) == 300_000
    assert len(seen) > 3


def test_files_get_the_usual_permissions(here):
    before = os.umask(0o022)
    try:
        files.write_bytes("a", b"")
    finally:
        os.umask(before)
    assert stat.S_IMODE(os.stat("a").st_mode) == 0o644


def test_a_link_is_replaced_and_its_target_left_alone(here):
    files.write_bytes("cache", b"shared")
    os.symlink("cache", "link")
    files.write_bytes("link", b"mine")
    assert (here / "cache").read_bytes() == b"shared" and (here / "link").read_bytes() == b"mine"


def test_the_lock_names_its_holder_and_dies_with_it(here):
    code = (
        "import time; from clmae.files import Lock\n"
        "with Lock('l', 'pretraining'): print('held', flush=True); time.sleep(60)"
    )
    with start(code) as holder:
        assert holder.stdout.readline() == "held\n"
        with (
            pytest.raises(UserError, match=rf"l: in use by pretraining, process {holder.pid} "),
            files.Lock("l"),
        ):
            pass
        holder.send_signal(signal.SIGKILL)
    with files.Lock("l"):
        pass
    assert os.listdir() == []


def test_the_lock_admits_one_of_many(here):
    code = (
        "import time; from clmae.files import Lock; from clmae.config import UserError\n"
        "end = time.time() + 1\n"
        "while time.time() < end:\n"
        "    try:\n"
        "        with Lock('l'):\n"
        "            fd = open('inside', 'x'); time.sleep(0.001); fd.close()\n"
        "            import os; os.unlink('inside')\n"
        "    except UserError: pass\n"
        "print('ok')"
    )
    processes = [start(code) for _ in range(3)]
    assert [p.communicate()[0] for p in processes] == ["ok\n"] * 3


def folder(path, **content):
    path.mkdir(parents=True)
    for name, text in content.items():
        (path / name).write_text(text)


def test_a_folder_comes_back_when_the_swap_fails(here):
    folder(here / "out", a="old")
    with pytest.raises(FileNotFoundError):
        files.replace_dir(here / "missing", here / "out")
    assert (here / "out/a").read_text() == "old" and os.listdir() == ["out"]


def test_the_second_rename_may_fail(here, monkeypatch):
    folder(here / "out", a="old")
    folder(here / "new", a="new")
    rename = type(here).rename

    def fail_once(self, target):
        if self.name == "new":
            raise OSError(errno.EIO, "broken")
        return rename(self, target)

    monkeypatch.setattr(type(here), "rename", fail_once)
    with pytest.raises(OSError, match="broken"):
        files.replace_dir(here / "new", here / "out")
    assert (here / "out/a").read_text() == "old"


def test_a_killed_folder_writer_leaves_the_old_and_the_next_cleans_up(here):
    folder(here / "out", a="old")
    code = (
        "import time; from clmae.files import fresh_dir\n"
        "with fresh_dir('out') as tmp:\n"
        "    (tmp / 'a').write_text('half'); print('ready', flush=True); time.sleep(60)"
    )
    with start(code) as writer:
        assert writer.stdout.readline() == "ready\n"
        with pytest.raises(UserError, match="in use by a writer of out"), files.fresh_dir("out"):
            pass
        writer.send_signal(signal.SIGKILL)
    assert (here / "out/a").read_text() == "old"
    with files.fresh_dir("out") as tmp:
        assert list(tmp.iterdir()) == []
        (tmp / "b").write_text("new")
    assert os.listdir() == ["out"] and os.listdir("out") == ["b"]


def test_the_module_is_light():
    code = "import sys, clmae.files; print([m for m in ('torch', 'pandas', 'PIL') if m in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "[]\n"
