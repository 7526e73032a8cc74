"""MkDocs hooks: pages are written to be read in the repository, and these links also work on the site.

A link to CONTRIBUTING.md, CHANGELOG.md or a stored chart leads to a copy on the site. A link to any other file of the
repository becomes its text and its path; a path that does not exist fails a strict build. The page of examples is made
from the scripts in examples/.
"""

from __future__ import annotations

import ast
import logging
import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
PAGES = ("CONTRIBUTING.md", "CHANGELOG.md")
EXAMPLES = "examples.md"
CHARTS = "benchmarks/results/*/*.svg"
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")
FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)

log = logging.getLogger("mkdocs.hooks.links")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages and charts that lie outside docs/."""
    for path in (*PAGES, *(chart.relative_to(ROOT).as_posix() for chart in sorted(ROOT.glob(CHARTS)))):
        files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))
    files.append(File.generated(config, EXAMPLES, content=examples_page()))
    return files


def examples_page() -> str:
    """Every script of examples/ under what its docstring says."""
    parts = [
        "# Examples",
        "Scripts that run on a CPU in seconds, as `python examples/NAME.py`, and check what they show.",
    ]
    for script in sorted((ROOT / "examples").glob("*.py")):
        source = script.read_text(encoding="utf-8")
        said = ast.get_docstring(ast.parse(source)) or ""
        code = source.partition('"""\n')[2].strip()
        parts += [f"## {script.name}", said, f"```python\n{code}\n```"]
    return "\n\n".join(parts) + "\n"


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Rewrite the links of a page; code blocks stay as they are."""
    source = page.file.src_uri
    if source == EXAMPLES:
        return markdown
    inside = "" if source in PAGES else "docs"  # where the page lies in the repository
    folder = posixpath.dirname(posixpath.join(inside, source))

    def rewritten(match: re.Match[str]) -> str:
        image, text, target = match.groups()
        path, _, anchor = target.partition("#")
        if "://" in target or not path:
            return match[0]
        there = posixpath.normpath(posixpath.join(folder, path))
        on_site = EXAMPLES if there == "examples" else there.removeprefix("docs/")
        if files.get_file_from_path(on_site) is not None:
            address = posixpath.relpath(on_site, posixpath.dirname(source) or ".")
            return f"{image}[{text}]({address}{'#' + anchor if anchor else ''})"
        if not (ROOT / there).exists():
            log.warning("%s links to %s, which does not exist", source, there)
        return f"`{there}`" if text.strip("`") == there else f"{text} (`{there}`)"

    parts, last = [], 0
    for block in FENCE.finditer(markdown):
        parts += [LINK.sub(rewritten, markdown[last : block.start()]), block[0]]
        last = block.end()
    return "".join([*parts, LINK.sub(rewritten, markdown[last:])])
