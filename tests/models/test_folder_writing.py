"""Folders written: all files together or none, whatever fails when, and nothing of the user's is lost."""

import contextlib
import ctypes
import errno
import json
import os
import resource
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch

from fastattn.models import GPT, GPTConfig
from fastattn.models.checkpoint import save, swap
from fastattn.models.checkpoint.card import is_generated

SIZES = {"vocab_size": 61, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4}


def make(**options):
    torch.manual_seed(options.pop("seed", 0))
    return GPT(GPTConfig(**{**SIZES, **options})).eval()


def contents(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def tensors(folder):
    return safetensors.torch.load_file(folder / "model.safetensors")


@pytest.fixture
def old(tmp_path):
    """A saved model with files of a user beside it."""
    folder = tmp_path / "model"
    make(eos_token_id=2).save_pretrained(folder)
    (folder / "notes.txt").write_text("mine")
    (folder / "checkpoint-1" / "deep").mkdir(parents=True)
    (folder / "checkpoint-1" / "deep" / "state.pt").write_bytes(b"state")
    (folder / "link").symlink_to("notes.txt")
    (folder / "tokenizer.json").write_text('{"old": 1}')
    return folder


class Tokenizer:
    def save_pretrained(self, folder):
        for name in ("tokenizer.json", "vocab.json"):
            Path(folder, name).write_text('{"new": 1}')


@pytest.fixture(params=["exchange", "moves", "inside"])
def way(request, monkeypatch):
    """How the new files get into place: in one step, one by one, or from within where nothing may be made beside it."""
    if request.param != "exchange":

        def refuse(one, other):
            raise OSError(errno.EINVAL, "not on this file system")

        monkeypatch.setattr(swap, "_exchange", refuse)
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
        (swap, "_exchange"),
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
            assert failed[-1] in ("link", "_exchange", "mkdir", "fsync")
            assert GPT.from_pretrained(old).config == source.config
            shutil.rmtree(old)
            for name, content in before.items():
                (old / name).parent.mkdir(parents=True, exist_ok=True)
                (old / name).write_bytes(content)
        left = list(old.parent.rglob(f"{swap.UNFINISHED}*"))
        assert left == []
    assert set(raised) == {errno.ENOSPC}
    assert {"save_file", "write_text", "fsync"} <= set(failed)
    assert ("_exchange" in failed) == (way != "inside")
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
    real = swap._exchange

    def exchange(one, other):
        (old / "late.txt").write_text("late")
        (old / "checkpoint-1" / "late.pt").write_bytes(b"late")
        real(one, other)

    monkeypatch.setattr(swap, "_exchange", exchange)
    make(seed=1).save_pretrained(old)
    assert (old / "late.txt").read_text() == "late"
    assert (old / "checkpoint-1" / "late.pt").read_bytes() == b"late"


def test_two_processes_save_into_the_same_new_folder(tmp_path, monkeypatch):
    real = swap._umask

    def umask():  # asked for where the folder was found not to exist
        monkeypatch.setattr(swap, "_umask", real)
        make(seed=2).save_pretrained(tmp_path / "model")
        return real()

    monkeypatch.setattr(swap, "_umask", umask)
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


def test_the_exchange_is_to_be_had_here(tmp_path):
    """Without it the tests above would only look at the way that moves files."""
    if not hasattr(ctypes.CDLL(None), "renameat2"):
        pytest.skip("no renameat2")
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    (tmp_path / "a" / "x").touch()
    swap._exchange(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b" / "x").exists()
    with pytest.raises(OSError, match="No such file"):
        swap._exchange(tmp_path / "a", tmp_path / "gone")


@pytest.mark.parametrize("limit", [40_000, "40KB", 4_000])
def test_shards(old, limit):
    model = make(seed=3)
    model.save_pretrained(old, max_shard_size=limit)
    index = json.loads((old / "model.safetensors.index.json").read_text())
    shards = sorted(old.glob("model-*.safetensors"))
    assert not (old / "model.safetensors").exists()
    assert len(shards) > 2
    assert {p.name for p in shards} == set(index["weight_map"].values())
    sizes, total = save.shard_bytes(limit), 0
    for number, path in enumerate(shards, 1):
        assert path.name == f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        members = safetensors.torch.load_file(path)
        size = sum(t.numel() * t.element_size() for t in members.values())
        assert size <= sizes or len(members) == 1
        assert {n for n, file in index["weight_map"].items() if file == path.name} == set(members)
        total += size
    assert index["metadata"]["total_size"] == total
    state = GPT.from_pretrained(old).state_dict()
    assert all(torch.equal(state[n], t) for n, t in model.state_dict().items())
    model.save_pretrained(old)  # one file again
    assert sorted(p.name for p in old.glob("model*")) == ["model.safetensors"]
    assert all(
        torch.equal(GPT.from_pretrained(old).state_dict()[n], t) for n, t in model.state_dict().items()
    )


def test_sharded_folders_load_in_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    model = make(seed=3)
    model.save_pretrained(tmp_path / "model", max_shard_size=40_000)
    theirs, info = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not any(info.values())
    assert torch.equal(theirs.transformer.wpe.weight, model.wpe.weight)


@pytest.mark.parametrize("size", [0, -1, "", "5", "5 PB", "GB", "1.5GB", True, None, 2.0])
def test_sizes_of_shards(size):
    if size == "5":
        assert save.shard_bytes(size) == 5
        return
    with pytest.raises((TypeError, ValueError), match="max_shard_size: got"):
        save.shard_bytes(size)


def test_units_of_sizes():
    units = {"5GB": 5 * 10**9, "500MB": 5 * 10**8, "2GiB": 2**31, " 7 kb ": 7000, 12: 12}
    assert {size: save.shard_bytes(size) for size in units} == units


def test_tokenizer_files(old, tmp_path):
    model = GPT.from_pretrained(old)
    model.save_pretrained(tmp_path / "copy")
    assert (tmp_path / "copy" / "tokenizer.json").read_text() == '{"old": 1}'
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "vocab.txt").write_text("own")
    model.save_pretrained(tmp_path / "own")  # a folder that has a tokenizer keeps it and gets no second one
    assert not (tmp_path / "own" / "tokenizer.json").exists()
    assert (tmp_path / "own" / "vocab.txt").read_text() == "own"
    model.save_pretrained(tmp_path / "own", tokenizer=Tokenizer())
    assert (tmp_path / "own" / "tokenizer.json").read_text() == '{"new": 1}'
    assert not (tmp_path / "own" / "vocab.txt").exists()  # of the tokenizer that was replaced
    with pytest.raises(TypeError, match="tokenizer: got str"):
        model.save_pretrained(tmp_path / "own", tokenizer="gpt2")


def test_generation_config(old, tmp_path):
    entries = json.loads((old / "generation_config.json").read_text())
    assert entries["eos_token_id"] == 2
    (old / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 3], "top_p": 0.9}))
    model = GPT.from_pretrained(old)
    model.save_pretrained(tmp_path / "copy")
    kept = json.loads((tmp_path / "copy" / "generation_config.json").read_text())
    assert kept == {"eos_token_id": [2, 3], "top_p": 0.9}
    transformers = pytest.importorskip("transformers")
    read = transformers.GenerationConfig.from_pretrained(tmp_path / "copy")
    assert (read.eos_token_id, read.top_p) == ([2, 3], 0.9)
    (old / "generation_config.json").write_text("[")
    with pytest.raises(ValueError, match=r"generation_config\.json is not valid JSON"):
        GPT.from_pretrained(old)


def test_the_model_card(tmp_path):
    model = make()
    model.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert is_generated(card)
    count = sum(p.numel() for p in model.parameters())
    for part in (
        "library_name: fastattn",
        "pipeline_tag: text-generation",
        f"{count:,} parameters",
        "float32",
    ):
        assert part in card
    make(n_layer=1).save_pretrained(tmp_path)
    newer = (tmp_path / "README.md").read_text()
    assert newer != card
    edited = newer.replace("# GPT2LMHeadModel", "# My model")
    (tmp_path / "README.md").write_text(edited)
    make().save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == edited
    hub = pytest.importorskip("huggingface_hub")
    assert hub.ModelCard(card).data.library_name == "fastattn"


def test_a_model_without_values_is_refused(tmp_path):
    with torch.device("meta"):
        model = make()
    with pytest.raises(ValueError, match=r"model: wte\.weight, .*meta device"):
        model.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()
