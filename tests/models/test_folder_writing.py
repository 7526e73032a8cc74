"""Folders written: all files together or none, whatever fails when, and nothing of the user's is lost."""

import contextlib
import ctypes
import errno
import os
import resource
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from model_folders import Tokenizer, contents, make, saved_beside_files, tensors

from fastattn.models import GPT
from fastattn.models.checkpoint import swap


@pytest.fixture
def old(tmp_path):
    return saved_beside_files(tmp_path)


@pytest.fixture(params=["exchange", "moves", "inside"])
def way(request, monkeypatch):
    """How the new files get into place: in one step, one by one, or from within where nothing may be made beside it."""
    if request.param != "exchange":

        def refuse(one, other):
            raise OSError(errno.EINVAL, "not on this file system")

        monkeypatch.setattr(swap, "exchange", refuse)
    if request.param == "inside":
        real = swap.tempfile.mkdtemp

        def mkdtemp(prefix, dir):
            if not any(Path(dir).glob("config.json")) and not Path(dir).name.startswith(swap.UNFINISHED):
                raise PermissionError(dir)
            return real(prefix=prefix, dir=dir)

        monkeypatch.setattr(swap.tempfile, "mkdtemp", mkdtemp)
    return request.param


def test_files_of_the_user_stay_and_ours_are_replaced(old, way):
    inode = old.stat().st_ino
    (old / "model-00001-of-00009.safetensors").write_text("stale")
    (old / "model.safetensors.index.json").write_text("stale")
    (old / "pytorch_model.bin").write_text("theirs")
    new = make(n_layer=1)
    new.save_pretrained(old)
    files = contents(old)
    assert GPT.from_pretrained(old).config == new.config
    assert files["notes.txt"] == b"mine"
    assert files["checkpoint-1/deep/state.pt"] == b"state"
    assert os.readlink(old / "link") == "notes.txt"
    assert files["tokenizer.json"] == b'{"old": 1}'
    assert files["pytorch_model.bin"] == b"theirs"
    assert not any(name.startswith("model") and name != "model.safetensors" for name in files)
    assert [p.name for p in old.parent.iterdir()] == ["model"]
    assert not list(old.glob(f"{swap.UNFINISHED}*"))
    assert (old.stat().st_ino == inode) == (way != "exchange")


@pytest.mark.parametrize("where", [".", "checkpoint-1/deep"])
def test_a_folder_that_this_process_works_in_stays_its_working_directory(old, monkeypatch, where):
    monkeypatch.chdir(old / where)
    new = make(n_layer=1)
    new.save_pretrained(old)
    assert Path.cwd() == (old / where).resolve()
    assert GPT.from_pretrained(old).config == new.config
    assert [p.name for p in old.parent.iterdir()] == ["model"]


def steps(monkeypatch, fail: Callable[[int, str], None]) -> list[str]:
    """Call `fail` with a number and a name before each step of a save that writes; the names so far."""
    done: list[str] = []
    places = [
        (safetensors.torch, "save_file"),
        (Path, "write_text"),
        (Path, "write_bytes"),
        (shutil, "copyfile"),
        (os, "fsync"),
        (os, "link"),
        (os, "replace"),
        (Path, "rename"),
        (Path, "mkdir"),
        (swap, "exchange"),
    ]
    for owner, name in places:
        real = getattr(owner, name)

        def step(*args, _real=real, _name=name, **kwargs):
            done.append(_name)
            fail(len(done), _name)
            return _real(*args, **kwargs)

        monkeypatch.setattr(owner, name, step)
    return done


def test_a_full_disk_at_any_write_leaves_the_old_folder(old, way, monkeypatch):
    before, failed, raised, number = contents(old), [], [], 0
    source = make(n_layer=1, seed=1)
    source.loaded_from = old
    while True:
        number += 1

        def fail(count, name, number=number):
            if count == number:
                failed.append(name)
                raise OSError(errno.ENOSPC, "No space left on device")

        with monkeypatch.context() as patch:
            steps(patch, fail)
            try:
                source.save_pretrained(old, max_shard_size=20_000, tokenizer=Tokenizer())
            except OSError as error:
                raised.append(error.errno)
            else:
                if len(failed) < number:
                    break  # there are no more steps
        if (
            contents(old) != before
        ):  # where linking or exchanging fails, files are moved instead, and that worked
            assert failed[-1] in ("link", "exchange", "mkdir", "fsync")
            assert GPT.from_pretrained(old).config == source.config
            shutil.rmtree(old)
            for name, content in before.items():
                (old / name).parent.mkdir(parents=True, exist_ok=True)
                (old / name).write_bytes(content)
        left = list(old.parent.rglob(f"{swap.UNFINISHED}*"))
        assert left == []
    assert set(raised) == {errno.ENOSPC}
    assert {"save_file", "write_text", "fsync"} <= set(failed)
    assert ("exchange" in failed) == (way != "inside")
    assert ("replace" in failed) == (way != "exchange")
    assert len([name for name in failed if name == "save_file"]) > 2  # of shards


class Killed(BaseException):
    """Stands for the end of the process: nothing is cleaned up."""


@pytest.mark.parametrize("exchange", [True, False])
def test_a_crash_at_any_step_leaves_old_or_new(old, exchange, monkeypatch):
    """With the exchange a reader always finds a whole model; without it, a whole one or a folder it refuses."""
    expected = [tensors(old)]
    new = make(seed=1)
    new.save_pretrained(old.parent / "new")
    expected.append(tensors(old.parent / "new"))
    kept = shutil.copytree(old, old.parent / "kept", symlinks=True)
    seen, number = set(), 0
    while True:
        number += 1
        reached = False

        def fail(count, name, number=number):
            nonlocal reached
            if count >= number:  # nothing happens after the end
                reached = True
                raise Killed

        with monkeypatch.context() as patch:
            if not exchange:
                patch.setattr(swap, "_changed_places", lambda *args: False)
            patch.setattr(swap.shutil, "rmtree", lambda *args, **kwargs: None)
            steps(patch, fail)
            with contextlib.suppress(Killed):
                new.save_pretrained(old)
        if not (old / "config.json").exists():
            assert not exchange
            seen.add("none")
        else:
            found = GPT.from_pretrained(old)
            found.save_pretrained(old.parent / "found")
            got = tensors(old.parent / "found")
            same = [all(torch.equal(got[n], each[n]) for n in each) for each in expected]
            assert any(same)
            seen.add("old" if same[0] else "new")
        assert (old / "notes.txt").read_text() == "mine"
        assert (old / "checkpoint-1" / "deep" / "state.pt").read_bytes() == b"state"
        for path in old.parent.iterdir():
            if path.name not in ("new", "kept"):
                shutil.rmtree(path)
        shutil.copytree(kept, old, symlinks=True)
        if not reached:
            break
    assert seen == ({"old", "new"} if exchange else {"old", "new", "none"})


def test_a_real_limit_on_file_sizes_leaves_the_old_folder(old):
    """The system refuses to write past a limit, in the middle of the weights or of a small file."""
    before = contents(old)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        for limit in (0, 100, 20_000, 100_000):
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
            with pytest.raises((OSError, safetensors.SafetensorError), match=r"(?i)file too large|large"):
                make(seed=1).save_pretrained(old)
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            assert contents(old) == before
            assert [p.name for p in old.parent.iterdir()] == ["model"]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)


def test_what_others_add_during_a_save_stays(old, monkeypatch):
    real = swap.exchange

    def exchange(one, other):
        (old / "late.txt").write_text("late")
        (old / "checkpoint-1" / "late.pt").write_bytes(b"late")
        real(one, other)

    monkeypatch.setattr(swap, "exchange", exchange)
    make(seed=1).save_pretrained(old)
    assert (old / "late.txt").read_text() == "late"
    assert (old / "checkpoint-1" / "late.pt").read_bytes() == b"late"


def test_two_processes_save_into_the_same_new_folder(tmp_path, monkeypatch):
    real = swap.umask

    def umask():  # asked for where the folder was found not to exist
        monkeypatch.setattr(swap, "umask", real)
        make(seed=2).save_pretrained(tmp_path / "model")
        return real()

    monkeypatch.setattr(swap, "umask", umask)
    make(seed=1).save_pretrained(tmp_path / "model")
    make(seed=1).save_pretrained(tmp_path / "alone")
    assert contents(tmp_path / "model") == contents(tmp_path / "alone")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["alone", "model"]


def test_links_permissions_and_open_files_survive(old):
    old.chmod(0o750)
    (old.parent / "alias").symlink_to(old)
    with (old / "log.jsonl").open("a") as log:
        make(seed=1).save_pretrained(old.parent / "alias")
        log.write("line")
    assert (old.parent / "alias").is_symlink()
    assert (old / "log.jsonl").read_text() == "line"
    assert old.stat().st_mode & 0o777 == 0o750


def test_a_model_saves_over_the_folder_it_is_mapped_from(old):
    expected = tensors(old)
    model = GPT.from_pretrained(old)
    for _ in range(2):
        model.save_pretrained(old)
        assert all(torch.equal(tensors(old)[name], expected[name]) for name in expected)


def test_the_exchange_is_available_here(tmp_path):
    """Without it the tests above would only look at the way that moves files."""
    if not hasattr(ctypes.CDLL(None), "renameat2"):
        pytest.skip("no renameat2")
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    (tmp_path / "a" / "x").touch()
    swap.exchange(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b" / "x").exists()
    with pytest.raises(OSError, match="No such file"):
        swap.exchange(tmp_path / "a", tmp_path / "gone")
