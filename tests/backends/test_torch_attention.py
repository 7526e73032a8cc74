"""The torch backend, clause by clause of the contract, against float64."""

from __future__ import annotations

import pytest
import torch
from contract import CASES, Case, Inputs, check

import fastattn
from fastattn.backends import torch_attention as backend

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_contract(case: Case, dtype: torch.dtype) -> None:
    check(case, dtype, backend="torch", samples=8 if dtype == torch.float32 else 2)


@pytest.mark.parametrize("outputs", [("out",), ("lse",)], ids=lambda names: names[0])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradient_from_one_result_alone(case: Case, outputs: tuple[str, ...]) -> None:
    """Without a gradient of lse the fused kernel serves the backward; without one of out, values get none."""
    check(case, torch.float32, outputs, backend="torch", samples=8)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_float64_agrees_to_rounding(case: Case) -> None:
    inputs = Inputs.of(case, torch.float64)
    golden = inputs.run(fastattn.reference.attention, torch.float64)
    actual = inputs.run(fastattn.attention, torch.float64, backend="torch")
    for name, value in actual.items():
        torch.testing.assert_close(
            value, golden[name], rtol=1e-10, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("rows", [16, 32, 1000])
@pytest.mark.parametrize(
    "name",
    ["plain", "causal", "window both sides", "mask", "bias with -inf", "segments", "lengths", "everything"],
)
def test_tile_sizes_change_nothing(name: str, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for constant in ("FUSED_ROW_BLOCK", "ROW_BLOCK", "COL_BLOCK"):
        monkeypatch.setattr(backend, constant, rows)
    case = next(case for case in CASES if case.name == name)
    check(case, torch.float32, backend="torch", samples=8)
    check(case, torch.float32, ("out",), backend="torch", samples=8)


@pytest.mark.parametrize(
    "options",
    [{"window": (63, 0)}, {"causal": True, "softcap": 4.0}, {"dropout_p": 0.1, "dropout_seed": 1}],
    ids=["window", "softcap", "dropout"],
)
def test_memory_grows_with_length_not_its_square(options: dict[str, object]) -> None:
    """No allocation of a forward and backward at S = 4096 comes near S * S elements."""
    biggest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal biggest
            result = func(*args, **(kwargs or {}))
            for tensor in torch.utils._pytree.tree_leaves(result):
                if isinstance(tensor, torch.Tensor):
                    biggest = max(biggest, tensor.untyped_storage().nbytes())
            return result

    q = torch.randn(1, 1, 4096, 32)
    with Watch():
        call = fastattn.ops.arguments.call_arguments(q, q, q, **options)
        out, lse = torch.ops.fastattn.attention_fwd(*call, "torch")
        torch.ops.fastattn.attention_bwd(out, None, out, lse, *call, [True] * 3 + [False] * 3, "torch")
    assert biggest < 4096 * 4096
