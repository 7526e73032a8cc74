"""Private symbols have one home each: torch's fastattn/torch_compat, transformers' transformers_compat.py."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
HOMES = {
    "torch": "fastattn/torch_compat/",
    "transformers": "fastattn/integrations/transformers_compat.py",
}
SOURCES = sorted(
    path.relative_to(ROOT).as_posix()
    for folder in ("fastattn", "kernels", "benchmarks", "examples")
    for path in (ROOT / folder).rglob("*.py")
)


def is_private(name: str) -> bool:
    return name.startswith("_") and not (name.startswith("__") and name.endswith("__"))


def members(*objects: object) -> set[str]:
    return {name for thing in objects for name in dir(thing) if is_private(name)}


# What a private name on an object of unknown type is taken for, if torch's or transformers' objects have one so named.
OF_OBJECTS = {
    "torch": members(
        torch.Tensor, nn.Linear(1, 1), nn.MultiheadAttention(2, 1), torch.optim.Optimizer, torch.library.Library,
        torch.Generator, torch.autograd.Function, torch.fx.Node, torch.dtype, torch.device,
        torch.export.ExportedProgram,
    ),
    "transformers": {
        "_attn_implementation", "_attn_implementation_internal", "_from_config", "_can_set_attn_implementation",
        "_supports_sdpa", "_supports_flash_attn", "_supports_attention_backend", "_supports_flex_attn",
        "_active_collector", "_output_capturing",
    },
}  # fmt: skip
# As a string, which getattr, hasattr or Library.impl may be given.
OF_STRINGS = {
    # not _C, which is what our extension is called, too
    "torch": OF_OBJECTS["torch"]
    | (members(torch, torch._C, torch._C._nn, torch.compiler, torch.cuda) - {"_C"}),
    "transformers": OF_OBJECTS["transformers"],
}


def private_symbols(source: str, package: str) -> Iterator[str]:
    """What a file names of a package's private parts: imports, dotted names, attributes of objects, strings."""
    tree = ast.parse(source)
    names: dict[str, str] = {}  # what a name of this file stands for
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                top = alias.name.partition(".")[0]
                names[alias.asname or top] = alias.name if alias.asname else top
                yield from _private_path(alias.name, package)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            for alias in node.names:
                names[alias.asname or alias.name] = f"{node.module}.{alias.name}"
                yield from _private_path(f"{node.module}.{alias.name}", package)
    own = _own_members(tree)
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            root, _, rest = ast.unparse(node).partition(".")
            yield from _private_path(f"{names.get(root, root)}.{rest}", package)
            on_self = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
            if node.attr in OF_OBJECTS[package] and not (on_self and node.attr in own):
                yield node.attr
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            text = node.value
            yield from _private_path(text, package)
            if text in OF_STRINGS[package] or (
                package == "torch" and is_private(text) and text.isidentifier() and _is_op(text)
            ):
                yield text


def _private_path(dotted: str, package: str) -> Iterator[str]:
    first, *rest = dotted.split(".")
    if first == package and all(part.isidentifier() for part in rest) and any(map(is_private, rest)):
        yield dotted


def _own_members(tree: ast.Module) -> set[str]:
    """Methods and attributes that the file's classes define themselves."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            found |= {part.name for part in node.body if isinstance(part, ast.FunctionDef)}
        elif (
            isinstance(node, ast.Attribute)
            and isinstance(node.ctx, ast.Store)
            and ast.unparse(node.value) == "self"
        ):
            found.add(node.attr)
    return found


def _is_op(name: str) -> bool:
    """Whether one of torch's own namespaces of ops has an op of this name."""
    return any(hasattr(getattr(torch.ops, space), name) for space in ("aten", "prim", "mkldnn", "prims"))


@pytest.mark.parametrize("package", HOMES)
@pytest.mark.parametrize("path", SOURCES)
def test_private_symbols_are_named_in_their_home_only(path: str, package: str) -> None:
    if not path.startswith(HOMES[package]):
        assert set(private_symbols((ROOT / path).read_text(encoding="utf-8"), package)) == set()


@pytest.mark.parametrize(
    ("package", "source"),
    [
        ("torch", "import torch._dynamo"),
        ("torch", "from torch._C import DispatchKey"),
        ("torch", "from torch.utils import _pytree as pytree"),
        ("torch", "import torch\ntorch._C._nn.gelu"),
        ("torch", "from torch.autograd import forward_ad\nlevel = forward_ad._current_level"),
        ("torch", "import torch.nn.functional as F\nF._in_projection()"),
        ("torch", "import torch\nop = torch.ops.aten._softmax"),
        ("torch", "def changed(x):\n    return x._version"),
        ("torch", "class M:\n    def f(self):\n        return self._modules"),
        ("torch", "name = '_scaled_dot_product_flash_attention'"),
        ("torch", "name = 'torch._C._nn'"),
        ("torch", "def f(m):\n    return getattr(m, '_forward_pre_hooks')"),
        ("transformers", "from transformers import _masks"),
        ("transformers", "def f(model):\n    return model.config._attn_implementation"),
        ("transformers", "def f(model):\n    return hasattr(model, '_supports_sdpa')"),
    ],
)
def test_a_private_symbol_is_seen(package: str, source: str) -> None:
    assert list(private_symbols(source, package))


@pytest.mark.parametrize(
    "source",
    [
        "import torch\ntorch.nn.functional.softmax",
        "import torch\ntorch.__version__",
        "class M:\n    def _apply(self):\n        return 1\n    def g(self):\n        return self._apply()",
        "class M:\n    def __init__(self):\n        self._version = 1\n    def g(self):\n        return self._version",
        "def f(x):\n    return x._replace(a=1)",
    ],
)
def test_public_and_own_symbols_pass(source: str) -> None:
    assert list(private_symbols(source, "torch")) == []
