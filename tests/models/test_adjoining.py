"""Weights that lie side by side in a file are joined without a copy."""

from __future__ import annotations

import gc
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from small_models import KINDS, make_gpt
from torch import Tensor

from fastattn.models import GPT
from fastattn.models.checkpoint.adjoining import adjoined
from fastattn.models.checkpoint.folder import open_tensors


def stored(path: Path, **tensors: Tensor) -> list[Tensor]:
    """The tensors as a file's, in the order of their names."""
    save_file(tensors, path)
    file = open_tensors(path)
    return [file.get(name) for name in sorted(tensors)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int8], ids=str)
@pytest.mark.parametrize("shapes", [[(4, 8), (6, 8)], [(3,), (5,), (1,)], [(2, 3, 4), (1, 3, 4)]], ids=str)
def test_the_pieces_of_a_file_are_one_view(
    shapes: list[tuple[int, ...]], dtype: torch.dtype, tmp_path: Path
) -> None:
    path = tmp_path / "model.safetensors"
    values = [torch.randint(-9, 9, shape).to(dtype) for shape in shapes]
    pieces = stored(path, **{f"part{i}": value for i, value in enumerate(values)})
    before, address = path.read_bytes(), pieces[0].data_ptr()
    whole = adjoined(pieces)
    assert whole is not None
    assert whole.data_ptr() == address
    del pieces
    gc.collect()  # the view alone keeps the file's memory
    assert torch.equal(whole, torch.cat(values))
    whole += 1
    assert torch.equal(whole, torch.cat(values) + 1)
    del whole
    gc.collect()
    assert path.read_bytes() == before


def test_other_pieces_are_not(tmp_path: Path) -> None:
    a, b, c, d = stored(
        tmp_path / "x.safetensors",
        a=torch.ones(2, 4),
        b=torch.ones(2, 4),
        c=torch.ones(2, 3),
        d=torch.ones(2, 4),
    )
    assert adjoined([a, b]) is not None
    for pieces in ([b, a], [a, d], [b, c], [a, b.double()], [a, b.t()], [a, torch.ones(2, 4)], [a[:, :2], b]):
        assert adjoined(pieces) is None
    empty = a[:0]
    assert adjoined([empty, a]) is None
    assert adjoined([torch.tensor(1.0), torch.tensor(1.0)]) is None


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/maps")
def test_a_gated_layer_is_the_files_memory(tmp_path: Path) -> None:
    make_gpt(torch.float32, **KINDS["llama"]).save_pretrained(tmp_path)
    model = GPT.from_pretrained(tmp_path)
    mapped = [
        [int(edge, 16) for edge in line.split()[0].split("-")]
        for line in Path("/proc/self/maps").read_text().splitlines()
        if line.endswith("model.safetensors")
    ]
    for block in model.h:
        at = block.mlp.c_fc.weight.data_ptr()
        assert any(start <= at < stop for start, stop in mapped)
    copied = GPT.from_pretrained(tmp_path, dtype=torch.float64)
    assert torch.equal(copied.h[0].mlp.c_fc.weight, model.h[0].mlp.c_fc.weight.double())
    model.train()(
        torch.ones(1, 4, dtype=torch.int64), labels=torch.ones(1, 4, dtype=torch.int64)
    ).loss.backward()
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    again = GPT.from_pretrained(tmp_path)
    assert torch.equal(again.h[0].mlp.c_fc.weight.double(), copied.h[0].mlp.c_fc.weight)
