"""A call is refused before anything runs or is written, and `explain` gives the same reason in advance."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

import fastattn
from fastattn import backends, extension
from fastattn.backends import torch as torch_backend
from fastattn.extension.info import BuildInfo
from fastattn.integrations.export import plain_torch

NAMES = ("auto", *backends.NAMES)
Ran = dict[str, str]  # function of backends: the backend whose function ran


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> Ran:
    """What ran, of backends that refuse as the real ones do on a Hopper GPU, each with the functions that it has; the
    torch backend computes for all of them."""
    found: Ran = {}
    info = BuildInfo("2.11.0", "13.0", "abi", ("8.0", "9.0a"), "hash")
    monkeypatch.setattr(extension, "state", lambda: extension.State(info=info))
    monkeypatch.setattr("fastattn.backends.triton._installed", lambda: True)
    monkeypatch.setattr(backends, "BACKENDS", tuple(stand_in(real, found) for real in backends.BACKENDS))
    return found


def stand_in(real: ModuleType, found: Ran) -> Any:
    module: Any = ModuleType(real.NAME)
    module.NAME, module.LAYOUT = real.NAME, real.LAYOUT
    module.why_not = lambda spec: real.why_not(spec.replace(device="cuda", arch=90))
    if hasattr(real, "why_not_auto"):
        module.why_not_auto = lambda spec: real.why_not_auto(spec.replace(device="cuda", arch=90))
    for function in vars(real):
        if function.endswith(("_fwd", "_bwd")):
            setattr(module, function, recording(real.NAME, function, found))
    return module


def recording(name: str, function: str, found: Ran) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        found[function] = name
        return getattr(torch_backend, function)(*args, **kwargs)

    return run


@dataclass(frozen=True)
class Op:
    """An op, its `explain`, the tensors of a call by the names of arguments, and options that backends may refuse."""

    call: Callable[..., Any]
    explain: Callable[..., backends.Explanation]
    tensors: Callable[..., dict[str, Tensor]]
    options: dict[str, dict[str, Any]]
    functions: tuple[str, ...]
    names_backend: bool = True  # the losses are told by FASTATTN_BACKEND alone
    has_gradient: bool = True


def normal(*shape: int, dtype: torch.dtype = torch.float16) -> Tensor:
    return torch.randn(shape, dtype=torch.float32).to(dtype)


def padded(
    head_dim: int = 8, value_dim: int = 8, dtype: torch.dtype = torch.float16, step: int = 1
) -> dict[str, Tensor]:
    query, key = (normal(2, 4, 5, head_dim * step, dtype=dtype)[..., ::step] for _ in range(2))
    return {"query": query, "key": key, "value": normal(2, 4, 5, value_dim, dtype=dtype)}


def packed(**shape: Any) -> dict[str, Tensor]:
    tokens = {name: t[0].transpose(0, 1) for name, t in padded(**shape).items()}
    ends = torch.tensor([0, 2, 5], dtype=torch.int32)
    return tokens | {"cu_seqlens_q": ends, "cu_seqlens_k": ends.clone()}


def cached(**shape: Any) -> dict[str, Tensor]:
    new = padded(**shape)
    caches = {
        f"{kind[0]}_cache": normal(2, 4, 9, new[kind].shape[3], dtype=new[kind].dtype)
        for kind in ("key", "value")
    }
    return new | caches | {"cache_lengths": torch.tensor([1, 3], dtype=torch.int32)}


def rows(dtype: torch.dtype = torch.float16, transposed: bool = False) -> dict[str, Tensor]:
    return {"x": normal(6, 7, dtype=dtype).mT if transposed else normal(7, 6, dtype=dtype)}


def logits(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    return {"logits": normal(7, 6, dtype=dtype), "target": torch.arange(7) % 6}


def linear(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    return {
        "hidden": normal(7, 4, dtype=dtype),
        "weight": normal(6, 4, dtype=dtype),
        "target": torch.arange(7) % 6,
    }


SHAPES: dict[str, dict[str, Any]] = {
    "head dim 12": {"head_dim": 12},
    "another value dim": {"value_dim": 16},
    "float32": {"dtype": torch.float32},
    "float64": {"dtype": torch.float64},
    "columns apart": {"step": 2},
}
SHARED: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"causal": True},
    "window": {"window": (2, 1)},
    "softcap": {"softcap": 5.0},
    "alibi_slopes": {"alibi_slopes": torch.full((4,), 0.5)},
    "sinks": {"sinks": torch.zeros(4)},
    "return_lse": {"return_lse": True},
    **{name: {"shape": shape} for name, shape in SHAPES.items()},
}
DROPOUT: dict[str, dict[str, Any]] = {
    "dropout": {"dropout_p": 0.5},
    "dropout, seeded": {"dropout_p": 0.5, "dropout_seed": 3},
}
LOSSES: dict[str, dict[str, Any]] = {
    "mean": {},
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none"},
    "class_weight": {"class_weight": torch.ones(6), "label_smoothing": 0.1},
    "z_loss": {"z_loss": 1e-3},
    "float64": {"shape": {"dtype": torch.float64}},
}
OPS = {
    "attention": Op(
        fastattn.attention,
        fastattn.explain,
        padded,
        SHARED | DROPOUT | {
            "mask": {"mask": torch.ones(5, 5, dtype=torch.bool)},
            "bias": {"bias": torch.zeros(5, 5)},
            "segment_ids": {"segment_ids": torch.zeros(2, 5, dtype=torch.int32)},
            "key_lengths": {"key_lengths": torch.tensor([2, 5])},
            "return_weights": {"return_weights": True},
            "mean weights": {"return_weights": "mean", "return_lse": True},
            "weights under dropout": {"return_weights": True, "dropout_p": 0.5},
        },
        ("attention_fwd", "attention_bwd", "attention_weights_fwd", "attention_weights_bwd"),
    ),
    "attention_varlen": Op(
        fastattn.attention_varlen, fastattn.explain_varlen, packed, SHARED | DROPOUT, ("varlen_fwd", "varlen_bwd")
    ),
    "attention_kv_cache": Op(
        fastattn.attention_kv_cache,
        fastattn.explain_kv_cache,
        cached,
        SHARED | {"num_splits": {"num_splits": 2}},
        ("kv_cache_fwd",),
        has_gradient=False,
    ),
    "softmax": Op(
        fastattn.softmax,
        fastattn.explain_softmax,
        rows,
        {
            "plain": {},
            "mask": {"mask": torch.ones(7, 6, dtype=torch.bool)},
            "causal": {"causal": True},
            "log": {"log": True},
            "scale": {"scale": 2.0},
            "another dim": {"dim": 0},
            "columns apart": {"shape": {"transposed": True}},
            "float64": {"shape": {"dtype": torch.float64}},
        },
        ("softmax_fwd", "softmax_bwd"),
    ),
    "cross_entropy": Op(
        fastattn.cross_entropy,
        fastattn.explain_cross_entropy,
        logits,
        LOSSES,
        ("cross_entropy_fwd", "cross_entropy_bwd"),
        names_backend=False,
    ),
    "linear_cross_entropy": Op(
        fastattn.linear_cross_entropy,
        fastattn.explain_linear_cross_entropy,
        linear,
        LOSSES | {"softcap": {"softcap": 5.0}},
        ("linear_cross_entropy_fwd", "linear_cross_entropy_bwd"),
        names_backend=False,
    ),
}  # fmt: skip


def switches(op: Op, name: str) -> Iterator[str]:
    """Values of FASTATTN_DISABLE: nothing, each function of each backend, and each of all backends at once."""
    yield ""
    for function in op.functions:
        if name != "auto":
            yield f"{name}.{function}"
        yield ",".join(f"{backend}.{function}" for backend in backends.NAMES)


def refusal(function: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[Any, str | None]:
    """(what a call returned, None), or None and what it refused."""
    try:
        return function(*args, **kwargs), None
    except RuntimeError as error:
        if "run this call: " not in str(error):
            raise
        return None, str(error)


@pytest.mark.parametrize("wrong", [None, [1.0], 3], ids=str)
@pytest.mark.parametrize("state", ["eager", "autocast", "plain torch"])
@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
def test_an_operand_that_is_no_tensor_is_refused_by_name(op: Op, state: str, wrong: Any) -> None:
    modes = {"autocast": torch.autocast("cpu", torch.bfloat16), "plain torch": plain_torch()}
    tensors = op.tensors()
    for name in tensors:
        optional = wrong is None and name in ("key", "value") and "k_cache" in tensors
        for call in (op.call, op.explain):
            with modes.get(state, nullcontext()), pytest.raises((TypeError, ValueError)) as refused:
                call(**tensors | {name: wrong})
            assert str(refused.value).startswith(f"{name}: got {type(wrong).__name__.replace('Type', '')}"), (
                name
            )
            assert isinstance(refused.value, TypeError) != optional


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize(("op", "name"), list(itertools.product(OPS, NAMES)))
def test_nothing_has_run_where_a_call_is_refused(
    op: str, name: str, ran: Ran, monkeypatch: pytest.MonkeyPatch
) -> None:
    case, seen = OPS[op], 0
    if not case.names_backend:
        monkeypatch.setenv("FASTATTN_BACKEND", name)
    for option, grad, switched in itertools.product(
        case.options, (False, True) if case.has_gradient else (False,), switches(case, name)
    ):
        monkeypatch.setenv("FASTATTN_DISABLE", switched)
        options = dict(case.options[option])
        tensors = case.tensors(**options.pop("shape", {}))
        for tensor in tensors.values():
            tensor.requires_grad_(grad and tensor.is_floating_point())
        if case.names_backend:
            options["backend"] = name
        before, generator = copy.deepcopy(tensors), torch.get_rng_state()
        where = f"{option}, grad={grad}, FASTATTN_DISABLE={switched}"
        explanation, expected = refusal(case.explain, **tensors, **options)
        assert ran == {}, f"{where}: explain ran {ran}"
        result, refused = refusal(case.call, **tensors, **options)
        assert refused == expected, where
        if refused is None:
            if grad:  # nothing is left to be refused
                results = result if isinstance(result, tuple) else (result,)
                torch.stack([r.float().sum() for r in results]).sum().backward()
            said = explanation.to_dict()
            passes = {f: b for f, b in zip(case.functions, passes_of(said, case.functions)) if b is not None}
            assert passes == ran, where
        else:
            assert ran == {}, f"{where}: refused after {ran} ran"
            assert torch.equal(torch.get_rng_state(), generator), f"{where}: a seed was drawn"
            assert all(torch.equal(before[n], t) for n, t in tensors.items()), (
                f"{where}: something was written"
            )
            seen += 1
        ran.clear()
    assert seen, "no case was refused: this test shows nothing"


def passes_of(said: dict[str, Any], functions: tuple[str, ...]) -> list[str | None]:
    """The backends of an explanation in the order of an op's functions."""
    names = ("backend", "backward", "weights", "weights_backward")
    return [said[name] for name in names[: len(functions)]]


@pytest.mark.parametrize("kind", [True, "mean"])
def test_weights_that_a_named_backend_cannot_return_are_refused_first(kind: bool | str, ran: Ran) -> None:
    options = {"backend": "cuda", "return_weights": kind}
    with pytest.raises(
        RuntimeError, match=r"backend='cuda' cannot run this call: it has no attention_weights_fwd"
    ):
        fastattn.attention(**padded(), **options)
    with pytest.raises(RuntimeError, match="it has no attention_weights_fwd"):
        fastattn.explain(**padded(), **options)
    assert ran == {}


def test_weights_are_explained(ran: Ran) -> None:
    tensors = padded()
    explanation = fastattn.explain(**tensors, return_weights=True)
    assert (explanation.weights, explanation.weights_backward) == ("triton", None)
    assert ("cuda", "it has no attention_weights_fwd") in explanation.weights_refusals
    said = str(explanation).splitlines()
    assert "weights: triton" in said
    assert "weights not cuda: it has no attention_weights_fwd" in said
    tensors["value"].requires_grad_()
    explanation = fastattn.explain(**tensors, return_weights=True)
    assert explanation.weights_backward == "triton"
    assert "weights backward: triton" in str(explanation)
    assert fastattn.explain(**tensors).weights is None


def test_bad_values_are_refused_before_a_seed_is_drawn() -> None:
    tensors, wrong = padded(), packed() | {"cu_seqlens_q": torch.tensor([0, 2, 6], dtype=torch.int32)}
    generator = torch.get_rng_state()
    for options in (
        {"key_lengths": torch.tensor([2, 6])},
        {"softcap": -1.0},
        {"scale": float("nan")},
        {"window": 3},
    ):
        with pytest.raises(ValueError, match=f"^{next(iter(options))}: "):
            fastattn.attention(**tensors, dropout_p=0.5, **options)
    with pytest.raises(ValueError, match=r"^cu_seqlens_q: "):
        fastattn.attention_varlen(**wrong, dropout_p=0.5)
    assert torch.equal(torch.get_rng_state(), generator)


@pytest.mark.parametrize(
    ("name", "switched", "options"),
    [("cuda", "", {"return_weights": True}), ("triton", "triton.attention_bwd", {})],
    ids=["weights", "backward"],
)
def test_compiled_code_refuses_while_it_is_traced(
    name: str, switched: str, options: dict[str, Any], ran: Ran, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTATTN_DISABLE", switched)
    query = normal(1, 2, 5, 8).requires_grad_()
    torch.compiler.reset()

    @torch.compile(backend="aot_eager", fullgraph=True)
    def compiled(query: Tensor) -> Any:
        return fastattn.attention(query, query, query, backend=name, **options)

    with pytest.raises(RuntimeError, match=f"backend='{name}' cannot run this call"):
        compiled(query)
    assert ran == {}
    torch.compiler.reset()


def test_a_spec_knows_that_columns_apart_are_copied() -> None:
    """The layout that a backend is judged by is the one that its kernels get."""
    for step, head_dim, aligned in ((1, 8, True), (2, 8, True), (2, 12, False), (1, 12, False)):
        assert (
            fastattn.explain(**padded(head_dim=head_dim, value_dim=head_dim, step=step)).spec.aligned
            is aligned
        )
