"""Products of a few rows with a weight, as decoding makes them: how long each kind takes, and which bits it gives."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor

SIZES = ((2304, 768), (768, 768), (3072, 768), (768, 3072), (50257, 768))  # (O, I) of GPT-2 small
COUNTS = (1, 2, 4, 8, 16)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ROUNDS = 15
# Size of the weights that are used one after another, as in a model: larger than the caches.
COLD_BYTES = 2**27
NOTICEABLE_RATIO = 0.95  # of the time of the product for all rows: a smaller gain counts as noise

Product = Callable[[Tensor], Tensor]
Choice = tuple[tuple[int | None, str], ...]


def products(weight: Tensor) -> dict[str, Product]:
    """The ways in which a weight (O, I) can be multiplied with rows of its dtype."""
    from fastattn import torch_compat
    from fastattn.nn.rows import rows_of

    made: dict[str, Product] = {"torch": lambda x: F.linear(x, weight), "chosen": rows_of(weight, None)}
    if weight.dtype == torch.float32:
        if torch_compat.has_onednn_linear():
            made["oneDNN"] = lambda x: torch_compat.onednn_linear(x, weight, None)
        made["int8"] = rows_of(weight, None, "int8")
    return made


def times(products: Sequence[Product], width: int, dtype: torch.dtype) -> list[float]:
    """Median microseconds for each number of rows; a round uses the next of the products, each with its own weight."""
    found = []
    for count in COUNTS:
        x, seconds = torch.randn(count, width).to(dtype), []
        for round_ in range(max(ROUNDS, len(products))):
            product = products[round_ % len(products)]
            start = time.perf_counter()
            product(x)
            seconds.append(time.perf_counter() - start)
        found.append(1e6 * median(seconds))
    return found


def cold_weights(out: int, width: int, dtype: torch.dtype) -> list[Tensor]:
    """Enough weights (out, width) that each has left the caches before it is used again."""
    from fastattn.integers import cdiv

    count = max(2, cdiv(COLD_BYTES, out * width * dtype.itemsize))
    return [(torch.randn(out, width) * width**-0.5).to(dtype) for _ in range(count)]


def same_at_every_place(product: Product, count: int, width: int, dtype: torch.dtype) -> bool:
    """Whether a row has the same bits at every place of a block of `count` rows, whatever the other rows hold."""
    x = torch.randn(count, width).to(dtype)
    whole = product(x)
    for shift in range(count):
        if not torch.equal(product(x.roll(shift, 0)), whole.roll(shift, 0)):
            return False
    alone = torch.zeros_like(x)
    alone[-1] = x[0]
    return torch.equal(product(alone)[-1], whole[0])


@torch.no_grad()
def table() -> Iterator[str]:
    """A Markdown table: a line for each size, dtype and product."""
    yield f"| product | O x I | {' | '.join(f'{count} rows, us' for count in COUNTS)} | bits free of the place |"
    yield f"|---|---|{'---|' * len(COUNTS)}---|"
    for dtype in DTYPES:
        for out, width in SIZES:
            made = [products(weight) for weight in cold_weights(out, width, dtype)]
            for name, product in made[0].items():
                cells = [f"{t:.0f}" for t in times([of[name] for of in made], width, dtype)]
                free = [str(n) for n in COUNTS if same_at_every_place(product, n, width, dtype)]
                kind = f"{name}, {str(dtype).removeprefix('torch.')}"
                yield f"| {kind} | {out} x {width} | {' | '.join(cells)} | {', '.join(free)} |"


@torch.no_grad()
def fastest(dtype: torch.dtype) -> Choice:
    """The fastest of `fastattn.nn.rows.PRODUCTS` over all sizes, for each range of numbers of rows."""
    from fastattn import torch_compat
    from fastattn.nn.rows import PRODUCTS

    totals = {name: [0.0] * len(COUNTS) for name in PRODUCTS}
    for out, width in SIZES:
        weights = cold_weights(out, width, dtype)
        for name, make in PRODUCTS.items():
            if name == "packed" and not torch_compat.has_packed_linear(dtype):
                continue
            found = times([make(weight, None) for weight in weights], width, dtype)
            totals[name] = [total + one for total, one in zip(totals[name], found)]
    return chosen({name: found for name, found in totals.items() if any(found)})


def chosen(totals: dict[str, list[float]]) -> Choice:
    """The choice for times of each product at COUNTS: that of the most rows, and others where they are faster."""
    last = min(totals, key=lambda name: totals[name][-1])
    line: list[tuple[int | None, str]] = [(None, last)]
    for place in reversed(range(len(COUNTS) - 1)):
        best = min(totals, key=lambda name: totals[name][place])
        current = line[0][1]
        if totals[best][place] < NOTICEABLE_RATIO * totals[current][place]:
            line.insert(0, (COUNTS[place], best))
    return tuple(line)


def write(path: Path, instructions: str, choices: dict[str, Choice]) -> None:
    """Replace one CPU's choices in the table."""
    from fastattn.nn.rows_table import FASTEST

    table = dict(sorted({**FASTEST, instructions: choices}.items()))
    lines = ["FASTEST: dict[str, dict[str, tuple[tuple[int | None, str], ...]]] = {"]
    for key, of_dtypes in table.items():
        lines.append(f'    "{key}": {{')
        for dtype, choice in of_dtypes.items():
            parts = ", ".join(f'({most}, "{name}")' for most, name in choice)
            lines.append(f'        "{dtype}": ({parts}{"," if len(choice) == 1 else ""}),')
        lines.append("    },")
    source = path.read_text(encoding="utf-8")
    kept = re.split(r"^FASTEST: ", source, flags=re.MULTILINE)[0]
    path.write_text(kept + "\n".join([*lines, "}"]) + "\n", encoding="utf-8")
