"""Dropout of activations on a CPU: its shares, scale, gradients and stream, and where torch's own is taken."""

from __future__ import annotations

import importlib
import inspect
import math
import pkgutil
from typing import Any

import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

import fastattn.models
import fastattn.nn
from fastattn.nn import dropout
from fastattn.nn.dropout import Dropout
from fastattn.philox import keep_scale, keep_threshold

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes for which 16 bits an element were drawn."""
    found: list[tuple[int, ...]] = []
    run = dropout.kept

    def seen(x: torch.Tensor, p: float) -> torch.Tensor:
        found.append(tuple(x.shape))
        return run(x, p)

    monkeypatch.setattr(dropout, "kept", seen)
    return found


@pytest.mark.parametrize("p", [2.0**-16, 0.1, 0.5, 0.9])
def test_the_share_that_is_dropped(p: float) -> None:
    """By 5 standard deviations, of each of the four elements that a draw decides."""
    torch.manual_seed(0)
    count = 2**22
    kept = Dropout(p)(torch.ones(count)) != 0
    share = keep_threshold(p) / 2**16
    for place in range(dropout.ELEMENTS_PER_DRAW):
        dropped = (~kept[place :: dropout.ELEMENTS_PER_DRAW]).double().mean().item()
        deviation = math.sqrt(share * (1 - share) * dropout.ELEMENTS_PER_DRAW / count)
        assert abs(dropped - share) < 5 * deviation


def test_neighbours_are_independent() -> None:
    torch.manual_seed(1)
    count = 2**22
    kept = (Dropout(0.5)(torch.ones(count)) != 0).double() - 0.5
    for lag in range(1, 9):
        assert abs((kept[lag:] * kept[:-lag]).mean().item()) < 5 * 0.25 / math.sqrt(count)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (1,), (3,), (4,), (7, 5), (2, 0, 3), (2, 3, 9)], ids=str)
def test_values_and_gradient(
    shape: tuple[int, ...], dtype: torch.dtype, drawn: list[tuple[int, ...]]
) -> None:
    x = (1 + torch.rand(shape)).to(dtype).requires_grad_()
    torch.manual_seed(2)
    out = Dropout(0.3)(x)
    assert drawn == [shape]
    assert out.dtype == dtype
    scale = torch.tensor(keep_scale(0.3), dtype=dtype)
    expected = torch.where(out == 0, 0, x * scale)
    assert torch.equal(out, expected)
    (grad,) = torch.autograd.grad(out, x, torch.ones_like(out))
    assert torch.equal(grad, torch.where(out == 0, 0, scale.expand(shape)))


def test_second_derivatives() -> None:
    x = torch.rand(6, 5, dtype=torch.float64, requires_grad=True)

    def run(x: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(3)
        return Dropout(0.4)(x * x)

    assert torch.autograd.gradcheck(run, x)
    assert torch.autograd.gradgradcheck(run, x)


def test_the_generator_goes_on(drawn: list[tuple[int, ...]]) -> None:
    """A state that is restored gives the same again; two draws differ."""
    layer, x = Dropout(0.5), torch.ones(1000)
    state = torch.get_rng_state()
    first, second = layer(x), layer(x)
    assert not torch.equal(first, second)
    torch.set_rng_state(state)
    assert torch.equal(layer(x), first)
    assert torch.equal(layer(x), second)
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            torch.set_rng_state(state)
            assert torch.equal(layer(x), first)
    finally:
        torch.set_num_threads(before)


def test_under_autocast(drawn: list[tuple[int, ...]]) -> None:
    x = torch.ones(8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert Dropout(0.5)(x).dtype == x.dtype
        assert Dropout(0.5)(x.bfloat16()).dtype == torch.bfloat16
    assert len(drawn) == 2


def test_where_nothing_is_drawn(drawn: list[tuple[int, ...]]) -> None:
    x = torch.ones(4, 6)
    assert Dropout(0.5).eval()(x) is x
    assert torch.equal(Dropout(0.0)(x), x)
    assert not Dropout(1.0)(x).any()
    assert not drawn


def _compiled(x: torch.Tensor) -> Any:
    return torch.compile(Dropout(0.5), backend="aot_eager", fullgraph=True)(x)


OTHERS = {
    "not contiguous": lambda x: Dropout(0.5)(x.T),
    "in place": lambda x: Dropout(0.5, inplace=True)(x.clone()),
    "compiled": _compiled,
    "traced": lambda x: make_fx(Dropout(0.5))(x)(x),
    "vmap": lambda x: torch.func.vmap(Dropout(0.5), randomness="different")(x),
    "on another device": lambda x: Dropout(0.5)(x.to("meta")),
}


@pytest.mark.parametrize("name", OTHERS)
def test_elsewhere_it_is_torchs(name: str, drawn: list[tuple[int, ...]]) -> None:
    x = torch.ones(4, 6)
    torch.manual_seed(4)
    found = OTHERS[name](x)
    assert not drawn
    assert found.shape in ((4, 6), (6, 4))


def test_repr_and_kind() -> None:
    assert isinstance(Dropout(0.1), nn.Dropout)
    assert repr(Dropout(0.1)) == repr(nn.Dropout(0.1))
    with pytest.raises(ValueError, match="between 0 and 1"):
        Dropout(1.5)


def test_every_layer_is_this_one() -> None:
    """No module of fastattn makes torch.nn.Dropout itself."""
    found = []
    for package in (fastattn.nn, fastattn.models):
        for info in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            source = inspect.getsource(importlib.import_module(info.name))
            if "nn.Dropout(" in source.replace("class Dropout(nn.Dropout)", ""):
                found.append(info.name)
    assert not found
