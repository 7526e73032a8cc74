"""Peak memory of making a corpus into packed rows on disk and training on it, for corpora of two sizes.

python benchmarks/corpus_memory.py --megabytes 1000        generate that much text and a tenth of it, print both peaks

Text is read, tokenised and written piece by piece, and rows are memory-mapped: what grows with the corpus is some
dozens of bytes for each document.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import checkout
from measure.memory import peak_resident_mib

WORDS, WORDS_OF_DOCUMENT = 3000, 700  # about 5 KB a document
SECONDS = 3600.0  # after which a process is stopped


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
    """Pack the corpus, train for two steps on its rows; the peak of resident memory, and what was made."""
    import torch

    from fastattn.data import TextFiles, TokenStream, train_bpe
    from fastattn.data.best_fit import BestFitDataset
    from fastattn.models import GPT, GPTConfig
    from fastattn.train import TrainConfig, Trainer
    from fastattn.train.progress import NoDisplay

    documents = TextFiles(corpus)
    sample = [text for text, _ in zip(documents, range(200))]
    tokenizer = train_bpe(sample, vocab_size=2048)
    started = time.monotonic()
    data = BestFitDataset.of_stream(TokenStream.build(documents, tokenizer, folder / "stream"), 512)
    seconds = time.monotonic() - started
    torch.manual_seed(0)
    model = GPT(GPTConfig.preset("nano", vocab_size=2048, n_positions=512, n_layer=1))
    config = TrainConfig(output_dir=str(folder / "run"), max_steps=2, batch_size=4)
    Trainer(model, config, data, display=NoDisplay()).fit()
    found = {"tokens": len(data.tokens), "rows": len(data), "padding": data.padding, "seconds": seconds}
    return {"megabytes": corpus.stat().st_size / 1e6, "peak_mib": peak_resident_mib(), **found}


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
    return found


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="Peak memory of packing and training by the size of the corpus."
    )
    parser.add_argument("--megabytes", type=float, default=1000.0, help="of the larger corpus")
    parser.add_argument("--scratch", type=Path, help="folder with room for twice as much")
    parser.add_argument("--measure", nargs=2, type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    checkout.make_importable()
    if options.measure:
        print(json.dumps(measure(*options.measure)))
        return 0
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        for found in peaks([options.megabytes / 10, options.megabytes], Path(scratch)):
            print(
                f"{found['megabytes']:.0f} MB of text: {found['tokens']:.0f} tokens in {found['rows']:.0f} rows, "
                f"{100 * found['padding']:.2f} % padding, {found['seconds']:.0f} s; peak {found['peak_mib']:.0f} MiB",
                flush=True,
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
