"""The documentation as a site: a strict build passes, every public name is on a page, nothing comes from elsewhere."""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
import zlib
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import import_graph
import pytest
from pages import DOCS, PAGES, ROOT

import fastattn

# Modules whose public names are documented, all of them.
MODULES = (
    "fastattn",
    "fastattn.data",
    "fastattn.generation",
    "fastattn.integrations.export",
    "fastattn.integrations.flash_attn",
    "fastattn.models",
    "fastattn.nn.attention",
    "fastattn.nn.blocks",
    "fastattn.nn.kv_cache",
    "fastattn.nn.linear",
    "fastattn.nn.norms",
    "fastattn.nn.positions",
    "fastattn.nn.rotary_scaling",
    "fastattn.serve.engine",
    "fastattn.train",
)
# What else DESIGN promises by name.
ALSO = (
    "fastattn.backends.Explanation",
    "fastattn.integrations.diffusers.register",
    "fastattn.integrations.torch.register",
    "fastattn.integrations.transformers.register",
    "fastattn.reference.attention",
    "fastattn.reference.attention_varlen",
)
# Public in their module for the modules beside it, of no use to a caller.
INTERNAL = (
    "fastattn.nn.attention.keep_forward",
    "fastattn.nn.blocks.gated_by",
    "fastattn.nn.dropout.kept",
    "fastattn.nn.kv_cache.lengths_kept_on_error",
    "fastattn.nn.linear.linear",
    "fastattn.nn.linear.plainly_on_cpu",
    "fastattn.nn.linear.remade",
    "fastattn.nn.linear.recorded_by_autograd_alone",
    "fastattn.nn.linear.runs_eagerly",
    "fastattn.nn.linear.without_transforms",
    "fastattn.nn.norms.normalised",
    "fastattn.nn.norms.rms_norm",
    "fastattn.nn.rotary_scaling.frequencies",
)
DOCUMENTED = [
    name for page in PAGES for name in re.findall(r"^::: (\S+)", page.read_text(encoding="utf-8"), re.M)
]


def public_names(module: ModuleType) -> set[str]:
    """What a module offers: its __all__, else the functions and classes without an underscore that are its own.

    A package that imports "name as name" offers that; a module that has an __all__ offers no module by it.
    """
    listed = getattr(module, "__all__", None)
    if listed is None and not hasattr(module, "__path__"):
        listed = [name for name, value in vars(module).items() if _made_in(value, module.__name__)]
    elif listed is None:
        assert module.__file__ is not None
        listed = re.findall(r"import (\w+) as \1$", Path(module.__file__).read_text(encoding="utf-8"), re.M)
    return {
        f"{module.__name__}.{name}"
        for name in listed
        if not name.startswith("_") and not isinstance(getattr(module, name), ModuleType)
    }


def _made_in(value: object, name: str) -> bool:
    return (inspect.isclass(value) or inspect.isfunction(value)) and value.__module__ == name


def resolve(name: str) -> object:
    """The object of a dotted name."""
    found: object = fastattn
    for part in name.split(".")[1:]:
        prefix = getattr(found, "__name__", "") if isinstance(found, ModuleType) else ""
        found = getattr(found, part, None) or import_module(f"{prefix}.{part}")
    return found


def test_every_public_name_is_documented_once() -> None:
    documented = {resolve(name) for name in DOCUMENTED}
    offered = {name for module in MODULES for name in public_names(import_module(module))} | set(ALSO)
    assert len(offered) > 50
    missing = sorted(n for n in offered.difference(INTERNAL) if resolve(n) not in documented)
    assert missing == [], "give it a ::: line in docs/api/"
    assert sorted(n for n in DOCUMENTED if DOCUMENTED.count(n) > 1) == []
    assert len(documented) == len(DOCUMENTED)
    assert [n for n in INTERNAL if resolve(n) in documented] == []


def test_a_name_without_a_page_is_seen() -> None:
    module = ModuleType("made_up")
    module.__all__ = ["offered", "_hidden"]  # type: ignore[attr-defined]
    module.offered, module._hidden = print, len  # type: ignore[attr-defined]
    assert public_names(module) == {"made_up.offered"}
    assert "fastattn.attention" in public_names(fastattn)


def test_every_command_and_variable_is_documented() -> None:
    from typer.main import get_command

    from fastattn.cli import app

    page = (DOCS / "api" / "cli.md").read_text(encoding="utf-8")
    for name, command in get_command(app).commands.items():  # type: ignore[attr-defined]
        assert f"`fastattn {name}`" in page
        assert [each for each in getattr(command, "commands", {}) if not re.search(rf"\b{each}`", page)] == []
    sources = [ROOT / "setup.py", *(ROOT / "fastattn").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]
    names = {n for s in sources for n in re.findall(r"\bFASTATTN_[A-Z_]+", s.read_text(encoding="utf-8"))}
    macros = {"FASTATTN_SM", "FASTATTN_BUILD_INFO"}  # of the C++ compiler
    assert names - macros == set(re.findall(r"^\| `(FASTATTN_\w+)`", page, re.M))


def test_the_import_graph_is_that_of_the_arrows() -> None:
    for path, text in import_graph.rendered().items():
        assert path.read_text(encoding="utf-8") == text, "run python tests/import_graph.py --write"


def build(out: Path, config: Path = ROOT / "mkdocs.yml") -> subprocess.CompletedProcess[str]:
    """A strict build. Not a quiet one: that silences the warnings that strictness counts."""
    if find_spec("mkdocs") is None or find_spec("mkdocstrings") is None or find_spec("material") is None:
        pytest.skip("needs the extra [docs]")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", str(config), "-d", str(out)]
    return subprocess.run(
        command,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1", "PYTHONDONTWRITEBYTECODE": "1"},
    )


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site as a strict build makes it."""
    out = tmp_path_factory.mktemp("site")
    done = build(out)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


@pytest.mark.parametrize(
    "broken", ["[x](nothing.md)", "[x](index.md#nowhere)", "[x](../nothing.py)", "::: fastattn.nothing"]
)
def test_a_strict_build_fails_for_what_leads_nowhere(broken: str, tmp_path: Path) -> None:
    docs = tmp_path / "docs"
    docs.mkdir()
    (docs / "index.md").write_text(f"# Page\n\n{broken}\n", encoding="utf-8")
    config = tmp_path / "mkdocs.yml"
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:")[0]
    config.write_text(text.replace("docs/site_hooks.py", str(DOCS / "site_hooks.py")), encoding="utf-8")
    done = build(tmp_path / "site", config)
    assert done.returncode != 0
    assert "nothing" in done.stdout + done.stderr or "nowhere" in done.stdout + done.stderr


def test_a_strict_build_has_every_page_and_every_name(site: Path) -> None:
    for page in PAGES:
        assert (site / page.relative_to(DOCS)).with_suffix(".html").is_file()
    for name in ("examples", "CONTRIBUTING", "CHANGELOG"):
        assert (site / f"{name}.html").is_file()
    inventory = (site / "objects.inv").read_bytes().split(b"\n", 4)[4]
    anchors = {line.split(" ")[0] for line in zlib.decompress(inventory).decode().splitlines()}
    assert set(DOCUMENTED) <= anchors


def test_a_page_loads_nothing_from_elsewhere(site: Path) -> None:
    loaded = re.compile(
        r"<(?:script|link|img|iframe|source)\b[^>]*\b(?:src|href)=\"?((?:https?:)?//[^\"\s>]+)"
    )
    for page in site.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        assert loaded.findall(text) == [], page.name
        assert 'class="mermaid"' not in text, "mermaid is fetched from another host"
    for sheet in site.rglob("*.css"):
        assert re.findall(r"url\(\"?(?:https?:)?//", sheet.read_text(encoding="utf-8")) == [], sheet.name


def test_images_and_links_lead_to_files_of_the_site(site: Path) -> None:
    for page in site.rglob("*.html"):
        if page.name == "404.html":  # served for any address, so it links from the root
            continue
        targets = re.findall(
            r"<(?:img|a)\b[^>]*\b(?:src|href)=\"([^\"#?]+)", page.read_text(encoding="utf-8")
        )
        inside = [target for target in targets if "://" not in target]
        assert [target for target in inside if not (page.parent / target).exists()] == [], page.name


def test_docstrings_are_not_taken_for_markup(site: Path) -> None:
    """2**n, i*j and the like stay what they are."""
    for page in (site / "api").glob("*.html"):
        text = re.sub(r"<pre.*?</pre>", "", page.read_text(encoding="utf-8"), flags=re.S)
        found = re.findall(r".{0,60}<(?:em|strong|del|sub|sup)>.{0,60}", text.partition("md-content")[2])
        assert found == [], page.name
