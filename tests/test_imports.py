"""The arrows between the layers, held by parsing every import, and what `import fastattn` may load."""

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# Layer -> the layers it may import besides itself. A layer is the first name after `fastattn.`; "" is fastattn itself.
ARROWS = {
    "torch_compat": set(),
    "integers": set(),
    "strides": set(),
    "constants": set(),
    "spec": {"strides"},
    "philox": {"integers", "torch_compat"},
    "rotary": set(),
    "vector_math": set(),
    "visibility": set(),
    "reference": {"philox", "spec", "visibility"},
    "cache": set(),
    "collector": set(),
    "plot": {"integers", "cache"},
    "versions": set(),
    "recorders": set(),
    "kernels": {"integers", "spec", "strides", "philox", "cache", "versions", "recorders"},
    "extension": {"cache"},
    "backends": {
        "integers",
        "torch_compat",
        "spec",
        "strides",
        "philox",
        "rotary",
        "visibility",
        "kernels",
        "extension",
        "recorders",
    },
    "ops": {"torch_compat", "spec", "strides", "philox", "reference", "backends", "visibility"},
    "nn": {"integers", "philox", "torch_compat", "spec", "ops", "rotary"},
    "integrations": {"torch_compat", "nn", "ops", "backends", "spec", "visibility"},
    "generation": {"constants", "integers", "nn", "ops", "philox"},
    "models": {"torch_compat", "spec", "constants", "nn", "ops", "generation"},
    "data": {"integers", "cache", "constants"},
    "train": {
        "torch_compat",
        "cache",
        "constants",
        "integers",
        "plot",
        "data",
        "models",
        "nn",
        "ops",
        "tasks",
    },
    "console": set(),
    "doctor": {"", "backends", "extension", "versions"},
    "demo_grid": {"", "reference"},
    "demo": {"", "console", "demo_grid", "data", "models", "train", "backends", "reference", "integrations"},
    "bench": {"console"},
    "tune": {"console", "kernels", "backends", "reference", "ops", "spec", "extension", "cache", "integers"},
    "evaluation": {"plot"},
    "tasks": {"console", "constants", "data", "evaluation", "models", "nn", "ops", "plot"},
    "text_generation": {"console", "data", "generation", "models"},
    "serve": {"console", "data", "generation", "integers", "models", "nn", "tasks", "text_generation"},
    "cli": {
        "",
        "__version__",
        "console",
        "constants",
        "doctor",
        "demo",
        "bench",
        "cache",
        "collector",
        "extension",
        "serve",
        "tune",
        "tasks",
        "text_generation",
        "train",
    },
    "__main__": {"cli"},
}
# Packages that are loaded only where they are the point of the file.
CONFINED = {
    "triton": ("kernels", "backends/triton", "tune/ahead.py"),
    "transformers": ("integrations",),
    "tokenizers": ("data", "models/embedding.py"),
    "typer": ("cli",),
    "fastapi": ("serve/app.py",),
    "uvicorn": ("serve/server.py", "serve/protocol.py"),
    "prometheus_client": ("serve/metrics.py",),
    "ray": ("serve/ray_app.py",),
    "matplotlib": ("plot.py",),
    "rich": ("cli/console.py", "train", "backends/__init__.py"),  # there to draw an explanation
}


def sources() -> list[tuple[str, Path]]:
    """(path inside the installed package, file) of every module of fastattn and fastattn.kernels."""
    package = [(p.relative_to(ROOT / "fastattn").as_posix(), p) for p in (ROOT / "fastattn").rglob("*.py")]
    kernels = [(p.relative_to(ROOT).as_posix(), p) for p in (ROOT / "kernels").rglob("*.py")]
    return sorted(package + kernels)


def imports(inside: str, source: str) -> Iterator[str]:
    """Every module that a file imports at any depth, absolute, with `from x import y` read as x.y."""
    parts = ("fastattn", *Path(inside).parts)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(
                [*parts[: len(parts) - node.level], node.module or ""] if node.level else [node.module]
            )
            yield from (f"{base.rstrip('.')}.{alias.name}" for alias in node.names)


def layer_of(inside: str) -> str:
    return Path(inside).parts[0].removesuffix(".py")


def forbidden(inside: str, source: str) -> list[str]:
    """The imports of a file that point against the arrows."""
    layer = layer_of(inside)
    wrong = []
    for name in imports(inside, source):
        first, _, rest = name.partition(".")
        target = rest.split(".")[0]
        if first == "kernels":
            wrong.append(f"{name}: say fastattn.kernels")
        if first == "fastattn" and layer != "__init__" and target not in ARROWS[layer] | {layer}:
            wrong.append(name)
        if first in CONFINED and not any(inside == p or inside.startswith(p + "/") for p in CONFINED[first]):
            wrong.append(name)
    return wrong


@pytest.mark.parametrize(("inside", "path"), [pytest.param(*source, id=source[0]) for source in sources()])
def test_imports_follow_the_arrows(inside: str, path: Path) -> None:
    layer = layer_of(inside)
    assert layer == "__init__" or layer in ARROWS, f"{layer} is a new layer: give it a row in ARROWS"
    assert forbidden(inside, path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("inside", "source"),
    [
        ("ops/attention.py", "from fastattn.nn import MultiHeadAttention"),
        ("ops/attention.py", "from fastattn import nn"),
        ("ops/attention.py", "def f():\n    from ..models import decoder"),
        ("nn/attention.py", "import fastattn.kernels"),
        ("backends/torch/__init__.py", "import triton"),
        ("backends/triton/__init__.py", "import kernels.primitives"),
        ("models/decoder.py", "import transformers.models"),
        ("data/packing.py", "from fastattn.models.decoder import GPT"),
    ],
)
def test_an_import_against_the_arrows_is_seen(inside: str, source: str) -> None:
    assert len(forbidden(inside, source)) == 1


def test_the_arrows_have_no_cycle() -> None:
    left = {layer: set(targets) for layer, targets in ARROWS.items()}
    while left:
        free = {layer for layer, targets in left.items() if not targets & left.keys()}
        assert free, f"a cycle among {sorted(left)}"
        left = {layer: targets for layer, targets in left.items() if layer not in free}


def cycles(edges: dict[str, set[str]]) -> list[str]:
    """The names on circles and between them: without those that reach none, and those that none reaches."""
    left = dict(edges)
    while True:
        reached = set().union(*left.values()) if left else set()
        kept = {name: targets for name, targets in left.items() if targets & left.keys() and name in reached}
        if len(kept) == len(left):
            return sorted(left)
        left = kept


def test_no_file_imports_itself_by_way_of_others() -> None:
    """Imports at any depth, those for type checkers too: of the package's modules, and of the benchmarks'."""
    modules = {}
    for inside, path in sources():
        name = "fastattn." + inside.removesuffix(".py").replace("/", ".")
        modules[name.removesuffix(".__init__")] = (inside, path)
    package = {}
    for name, (inside, path) in modules.items():
        found = set(imports(inside, path.read_text(encoding="utf-8")))
        found |= {
            target.rpartition(".")[0] for target in found if target not in modules
        }  # a name of a module
        package[name] = (found & modules.keys()) - {name}
    assert cycles(package) == []
    assert cycles(benchmark_imports()) == []
    assert cycles({"a": {"b"}, "b": {"c", "d"}, "c": {"a"}, "d": set(), "e": {"d"}}) == ["a", "b", "c"]


# Package of benchmarks/ -> the packages it may import besides itself. Scripts, which only users start, import any.
BENCHMARK_ARROWS = {
    "checkout": set(),
    "report": {"checkout"},
    "measure": {"checkout", "report"},
    "inputs": {"measure", "report"},
    "peers": {"inputs", "measure"},
    "cases": {"peers", "inputs", "measure", "report"},
    "evidence": {"inputs", "measure", "report", "checkout"},
    "trained": {"peers", "report", "checkout"},
}


def benchmark_name(path: Path) -> str:
    """A file of benchmarks/ as its importers name it."""
    name = path.relative_to(ROOT / "benchmarks").as_posix().removesuffix(".py").replace("/", ".")
    return name.removesuffix(".__init__")


def benchmark_imports() -> dict[str, set[str]]:
    """Module of benchmarks/ -> the others of them that it imports at any depth."""
    modules = {benchmark_name(path): path for path in (ROOT / "benchmarks").rglob("*.py")}
    found = {}
    for name, path in modules.items():
        targets = set(imports(name, path.read_text(encoding="utf-8")))
        targets |= {target.rpartition(".")[0] for target in targets if target not in modules}
        found[name] = (targets & modules.keys()) - {name}
    return found


def against_benchmark_arrows(graph: dict[str, set[str]]) -> list[str]:
    """The imports of benchmarks/ that point against its arrows, and those of scripts by others."""
    wrong = []
    for name, targets in graph.items():
        layer = name.partition(".")[0]
        for target in targets:
            allowed = BENCHMARK_ARROWS.get(layer, BENCHMARK_ARROWS.keys()) | {layer}
            if target.partition(".")[0] not in allowed:
                wrong.append(f"{name} imports {target}")
    return sorted(wrong)


def test_imports_of_the_benchmarks_follow_their_arrows() -> None:
    graph = benchmark_imports()
    packages = {path.parent.name for path in (ROOT / "benchmarks").glob("*/__init__.py")}
    assert packages | {"checkout"} == BENCHMARK_ARROWS.keys()
    assert graph["cases.attention"] >= {"peers.attention", "inputs.attention"}
    assert against_benchmark_arrows(graph) == []
    assert cycles(BENCHMARK_ARROWS) == []
    assert against_benchmark_arrows({"report.schema": {"measure.harness"}}) == [
        "report.schema imports measure.harness"
    ]
    assert against_benchmark_arrows({"bench_decode": {"cases.decode"}, "plot": {"counts"}}) == [
        "plot imports counts"
    ]


def test_importing_fastattn_loads_nothing_heavy() -> None:
    script = (
        "import sys, json, torch; before = set(sys.modules); import fastattn;"
        "print(json.dumps(sorted(set(sys.modules) - before)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120
    )
    loaded = json.loads(done.stdout)
    assert "fastattn.spec" in loaded
    heavy = {"triton", "transformers", "tokenizers", "safetensors", "rich", "typer", "yaml", "matplotlib"}
    assert heavy.isdisjoint(name.split(".")[0] for name in loaded)
    lazy = (
        "fastattn.kernels",
        "fastattn.generation",
        "fastattn.models",
        "fastattn.data",
        "fastattn.train",
        "fastattn.cli",
    )
    assert [name for name in loaded if name.startswith(lazy)] == []


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks").rglob("*.py")), ids=benchmark_name)
def test_benchmarks_import_fastattn_where_they_use_it(path: Path) -> None:
    """At their top it may not be importable: checkout.make_importable() comes first."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    top = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
    names = [node.module or "" if isinstance(node, ast.ImportFrom) else node.names[0].name for node in top]
    assert [name for name in names if name.partition(".")[0] == "fastattn"] == []


# Who may move a finished file or folder into place, and what: all others call the first of their own tree.
MOVING = {
    "fastattn/cache.py": "a file's content",
    "fastattn/models/checkpoint/swap.py": "the files of a model's folder",
    "fastattn/train/checkpoint.py": "folders of checkpoints, flushed to disk",
    "fastattn/extension/build.py": "what a linker wrote",
    "fastattn/extension/compiling.py": "what a compiler wrote",
    "benchmarks/report/schema.py": "a file's content, where fastattn may not be importable",
    "benchmarks/evidence/carried.py": "archives, streamed",
}


def moves(source: str) -> list[str]:
    """The calls of a file that put one path in the place of another."""
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    return [
        ast.unparse(call)
        for call in calls
        if isinstance(call.func, ast.Attribute)
        and (
            ast.unparse(call.func) in ("os.replace", "os.rename", "os.renames", "shutil.move")
            or (call.func.attr in ("replace", "rename") and len(call.args) == 1 and not call.keywords)
        )
    ]


def test_files_are_put_into_place_by_few() -> None:
    files = [
        path for folder in ("fastattn", "kernels", "benchmarks") for path in (ROOT / folder).rglob("*.py")
    ]
    moving = {p.relative_to(ROOT).as_posix() for p in files if moves(p.read_text(encoding="utf-8"))}
    assert moving - MOVING.keys() == set()


def test_a_move_is_seen() -> None:
    assert moves("partial.replace(path)\nos.replace(a, b)\nfolder.rename(final)") != []
    assert (
        moves("text.replace('a', 'b')\nspec.replace(bias=True)\ndataclasses.replace(spec, bias=True)") == []
    )
