"""Run by test_corpus.py: files of a corpus, written on a disk that fills up and by processes that are killed."""

import ctypes
import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from training_cases import rows, save_encoder, write

from fastattn.models.checkpoint.swap import UNFINISHED
from fastattn.train import ConfigError
from fastattn.train import run as work

LIMIT = 10_000  # writes, far more than there are


def contents(cache):
    """Every file of the cache by its folder's kind; locks have none."""
    assert not list(cache.glob(f"{UNFINISHED}*")), "a folder is left unfinished"
    return {
        path.relative_to(cache).as_posix(): path.read_bytes()
        for path in sorted(cache.rglob("*"))
        if path.is_file() and path.suffix != ".lock"
    }


def finished(cache, wanted):
    """Whether each folder that has its name is whole."""
    for folder in cache.iterdir():
        if folder.is_dir() and not folder.name.startswith(UNFINISHED):
            for name, content in wanted.items():
                if name.startswith(f"{folder.name}/") and (cache / name).read_bytes() != content:
                    return False
    return True


def main(folder, library, step, kills):
    data = write(folder / "train.jsonl", rows("masked-lm") * 3)
    encoder = save_encoder(folder / "encoder")
    words = (f"--data.cache={folder / 'cache'}", "--task.max_length=12", "--task.next_sentence=true")
    inputs = work.Inputs(
        "masked-lm",
        (str(data),),
        (),
        str(encoder),
        str(folder / "out"),
        overrides=(*words, "--clean.emails=true"),
    )
    cache = folder / "cache"
    disk = ctypes.CDLL(library)  # the preloaded one
    disk.full_disk_count.restype = ctypes.c_long
    disk.full_disk.argtypes = (ctypes.c_char_p, ctypes.c_long, ctypes.c_long)

    def arm(first, last):
        disk.full_disk(str(cache).encode(), first, last)

    arm(0, 0)
    began = time.monotonic()
    work.prepare(inputs)
    whole = time.monotonic() - began
    writes = disk.full_disk_count()
    wanted = contents(cache)
    problems = []
    for first in range(1, writes + 1, step):
        for last in (first, LIMIT):
            shutil.rmtree(cache, ignore_errors=True)
            arm(first, last)
            which = f"{first}..{last}"
            try:
                work.prepare(inputs)
            except OSError as error:
                if error.errno != 28 or not str(error.filename).startswith(str(cache)):
                    problems.append(f"{which}: {error!r} names {error.filename}")
            except Exception as error:  # the folder itself cannot be made
                if not (
                    isinstance(error, ConfigError) and f"data.cache: {cache} cannot be made" in str(error)
                ):
                    problems.append(f"{which}: {error!r}")
            else:  # there was another way
                problems += [] if contents(cache) == wanted else [f"{which}: no error, but other files"]
            arm(0, 0)
            if cache.is_dir() and not finished(cache, wanted):
                problems.append(f"{which}: a folder is not whole")
            work.prepare(inputs)
            problems += [] if contents(cache) == wanted else [f"{which}: other files afterwards"]
    random.seed(0)
    met = 0
    for number in range(kills):
        shutil.rmtree(cache, ignore_errors=True)
        child = os.fork()
        if not child:
            try:
                work.prepare(inputs)
            finally:
                os._exit(0)
        time.sleep(random.uniform(0.0, 0.8 * whole))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        met += os.WIFSIGNALED(status)
        if cache.is_dir() and not finished(cache, wanted):
            problems.append(f"kill {number}: a folder is not whole")
        work.prepare(inputs)
        problems += [] if contents(cache) == wanted else [f"kill {number}: other files afterwards"]
    print(json.dumps({"writes": writes, "kills": met, "problems": problems}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
