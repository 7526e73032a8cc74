"""The MLP of decoders and encoders: large inputs go through in parts where nothing is kept and nothing looks on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastattn.nn import blocks, rows
from fastattn.nn.blocks import ACTIVATIONS, Mlp
from fastattn.nn.encoder_blocks import EncoderMlp
from fastattn.nn.int8 import Int8Linear
from numerics import assert_within_rule

Make = Callable[..., Mlp]


@pytest.fixture(params=[Mlp, EncoderMlp], ids=["decoder", "encoder"])
def make(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Make:
    """Makes MLPs of 16 numbers, 64 within, of which 8 rows at a time are a part."""
    for module in (rows, blocks):
        monkeypatch.setattr(module, "PART_ELEMENTS", 8 * 64)

    def made(**options: Any) -> Mlp:
        mlp: Mlp = request.param(16, 64, **{"activation": "gelu", **options})
        return mlp.eval()

    return made


def parts_of(mlp: Mlp, x: Tensor) -> list[int]:
    """The rows of every call of the activation."""
    counts = []
    usual = mlp.activation

    def counting(h: Tensor) -> Tensor:
        counts.append(h.shape[:-1].numel())
        return usual(h)

    mlp.activation = counting
    try:
        mlp(x)
    finally:
        mlp.activation = usual
    return counts


@pytest.mark.parametrize("shape", [(37, 16), (3, 9, 16), (8, 16), (0, 16), (16,)], ids=str)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@torch.no_grad()
def test_parts_keep_the_error_rule(make: Make, shape: tuple[int, ...], gated: bool, activation: str) -> None:
    mlp, x = make(activation=activation, gated=gated), torch.randn(shape)
    actual = mlp(x)
    with torch.enable_grad():
        plain = mlp(x).detach()
    golden = make(activation=activation, gated=gated).double()
    golden.load_state_dict(mlp.state_dict())
    with torch.enable_grad():
        exact = golden(x.double()).detach()
    assert actual.shape == x.shape
    assert_within_rule(actual, plain, exact, "in parts")


@torch.no_grad()
def test_large_inputs_go_in_parts(make: Make) -> None:
    assert parts_of(make(), torch.randn(8, 16)) == [8]
    assert parts_of(make(), torch.randn(20, 16)) == [7, 7, 6]
    assert parts_of(make(gated=True), torch.randn(2, 5, 16)) == [4, 4, 2]


@torch.no_grad()
def test_8_bits_go_in_parts_with_the_bits_of_the_whole(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    mlp, x = make(), torch.randn(20, 16)
    for layer in (mlp.c_fc, mlp.c_proj):
        layer.__class__ = Int8Linear
    assert parts_of(mlp, x) == [7, 7, 6]
    actual = mlp(x)
    monkeypatch.setattr(blocks, "PART_ELEMENTS", 1 << 20)
    assert torch.equal(actual, mlp(x))


def test_whole_where_a_gradient_or_a_hook_needs_it(make: Make) -> None:
    x = torch.randn(20, 16)
    mlp = make()
    assert parts_of(mlp, x) == [20]
    with torch.no_grad():
        for layer in (mlp.c_fc, mlp.c_proj, mlp.dropout):
            handle = layer.register_forward_hook(lambda *_: None)
            assert parts_of(mlp, x) == [20]
            handle.remove()
        assert len(parts_of(mlp, x)) > 1
        mlp.c_proj = torch.nn.Linear(64, 16)  # what another module makes of a row may depend on the others
        assert parts_of(mlp, x) == [20]
        dropping = make(dropout=0.5)
        assert len(parts_of(dropping, x)) > 1
        assert parts_of(dropping.train(), x) == [20]
