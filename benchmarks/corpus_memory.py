"""Peak memory of `fastattn train causal-lm`, from text files to two steps, for corpora of two sizes.

python benchmarks/corpus_memory.py --megabytes 1000            for that much generated text and a tenth of it
python benchmarks/corpus_memory.py --megabytes 1000 --record   also store the peaks and write docs/training.md
python benchmarks/corpus_memory.py --page                      write docs/training.md from what is stored

Text is read, checked, tokenised and written piece by piece, and rows are memory-mapped: what grows with the corpus is
some dozens of bytes for each document. The tokenizer is given; a thousandth of the text is held out.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

import checkout
from measure.memory import peak_resident_mib
from report import schema

WORDS, WORDS_OF_DOCUMENT = 3000, 700  # about 5 KB a document
SECONDS = 3600.0  # after which a process is stopped
STORED = schema.ROOT / "benchmarks" / "results" / "corpus_memory.json"
PAGE = schema.ROOT / "docs" / "training.md"
MARKER = re.compile(r"(<!-- corpus-memory:start -->\n).*?(<!-- corpus-memory:end -->)", re.DOTALL)


def write_corpus(path: Path, megabytes: float) -> None:
    """Documents of random words, each drawn from a large pool, until the file has that size."""
    drawn = random.Random(7)
    words = ["".join(drawn.choices("etaoinshrdlu", k=drawn.randint(2, 10))) for _ in range(WORDS)]
    lines = [" ".join(drawn.choices(words, k=14)) for _ in range(4000)]
    size = 0
    with path.open("w", encoding="utf-8") as file:
        while size < megabytes * 1e6:
            size += file.write("\n".join(drawn.choices(lines, k=WORDS_OF_DOCUMENT // 14)) + "\n\n\n")


def measure(corpus: Path, folder: Path) -> dict[str, float]:
    """Run the command; the peak of resident memory, and what was made."""
    from typer.testing import CliRunner

    from fastattn import cli
    from fastattn.data import TextFiles, TokenStream, train_bpe

    sample = [text for text, _ in zip(TextFiles(corpus), range(200))]
    train_bpe(sample, vocab_size=2048).save_pretrained(folder / "tokenizer")
    words = ["train", "causal-lm", "--train", corpus, "--out", folder / "run", "--model", "nano", "--json"]
    words += [f"--data.tokenizer={folder / 'tokenizer'}", f"--data.cache={folder / 'cache'}"]
    words += ["--data.dev_fraction=0.001", "--task.max_length=512", "--model.n_positions=512"]
    words += ["--model.n_layer=1", "--train.max_steps=2", "--train.batch_size=4", "--train.eval_every=2"]
    started = time.monotonic()
    done = CliRunner().invoke(cli.app, [str(word) for word in words])
    seconds = time.monotonic() - started
    if done.exit_code:
        raise RuntimeError(done.stderr)
    report = json.loads(done.stdout)
    (tokens,) = (path for path in (folder / "cache").glob("tokens-*") if path.is_dir())
    return {
        "megabytes": corpus.stat().st_size / 1e6,
        "peak_mib": peak_resident_mib(),
        "tokens": len(TokenStream.load(tokens / "train")),
        "rows": report["train"]["items"],
        "documents": report["train"]["examples"],
        "seconds": seconds,
    }


def peaks(sizes: list[float], scratch: Path) -> list[dict[str, float]]:
    """The figures of each size, every one from a process of its own."""
    found = []
    for number, size in enumerate(sizes):
        corpus, folder = scratch / f"corpus-{number}.txt", scratch / f"made-{number}"
        write_corpus(corpus, size)
        command = [sys.executable, str(Path(__file__).resolve()), "--measure", str(corpus), str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=SECONDS)
        if done.returncode:
            raise RuntimeError(done.stderr.strip().splitlines()[-1])
        found.append(json.loads(done.stdout.splitlines()[-1]))
        print(line_of(found[-1]), file=sys.stderr, flush=True)
    return found


def line_of(found: dict[str, float]) -> str:
    """What a size came to, in words."""
    return (
        f"{found['megabytes']:.0f} MB of text: {found['documents']:,.0f} documents, "
        f"{found['tokens'] / 1e6:.1f} million tokens in {found['rows']:,.0f} rows, "
        f"{found['seconds']:.0f} s; peak {found['peak_mib']:.0f} MiB"
    )


def paragraph(record: schema.Result) -> str:
    """The lines of docs/training.md."""
    lines = [f"- {line_of(each)}" for each in record["peaks"]]
    device, versions = record["device"], record["versions"]
    commit = (record["revision"] or "?")[:10] + ("+" if record["dirty"] else "")
    threads = f"{device['threads']} thread{'' if device['threads'] == 1 else 's'}"
    lines += ["", f"{device['name']}, {threads}, torch {versions['torch']}, {record['date'][:10]}, "
              f"commit {commit}."]  # fmt: skip
    return "\n".join(lines) + "\n"


def refreshed(page: str, record: schema.Result) -> str:
    """The page with the record between its markers."""
    return MARKER.sub(lambda found: found[1] + paragraph(record) + found[2], page)


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="Peak memory of packing and training by the size of the corpus."
    )
    parser.add_argument("--megabytes", type=float, default=1000.0, help="of the larger corpus")
    parser.add_argument("--scratch", type=Path, help="folder with room for twice as much")
    parser.add_argument("--record", action="store_true", help="store the figures and write the page")
    parser.add_argument("--page", action="store_true", help="write the page from the stored figures")
    parser.add_argument("--measure", nargs=2, type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    checkout.make_importable()
    if options.measure:
        print(json.dumps(measure(*options.measure)))
        return 0
    if not options.page:
        with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
            found = peaks([options.megabytes / 10, options.megabytes], Path(scratch))
        if not options.record:
            return 0
        about = schema.new_result("corpus-memory", torch.device("cpu"), {"megabytes": options.megabytes})
        kept = ("date", "device", "versions", "revision", "dirty", "settings")
        record = {**{name: about[name] for name in kept}, "peaks": found}
        schema.replace_file(STORED, json.dumps(record, indent=1) + "\n")
    record = json.loads(STORED.read_text(encoding="utf-8"))
    schema.replace_file(PAGE, refreshed(PAGE.read_text(encoding="utf-8"), record))
    return 0


if __name__ == "__main__":
    sys.exit(main())
