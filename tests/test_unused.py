"""Every function, method and class of the package is used in it, in its scripts or in its documentation."""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# What is looked up by a name made at run time, or called by another library.
LOOKED_UP = {
    "attention_tiles": "by `explain`, as <op>_tiles",
    "varlen_tiles": "likewise",
    "_between_marks": "by Jinja, as the name that its call_method is given",
    "_init_handles": "by Triton, which calls it on what it compiled",
    "check_health": "by Ray Serve",
    "extra_repr": "by torch.nn.Module",
    "num_targets": "a figure of a training set for its user",
}


FEW = 4  # occurrences of a word; what occurs more often is taken for used, without a look at the syntax


def sources(*folders: str) -> Iterator[str]:
    for folder in folders:
        for path in (ROOT / folder).rglob("*.py"):
            if not path.is_relative_to(ROOT / "fastattn" / "kernels"):  # a link to kernels/
                yield path.read_text(encoding="utf-8")


def defined(source: str) -> set[str]:
    """The functions, methods and classes of a module, without Python's own."""
    return {name for name in re.findall(r"^ *(?:def|class) (\w+)", source, re.M) if not name.startswith("__")}


def used(source: str) -> Iterator[str]:
    """The names that a module reads; an import alone is no use."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
            yield node.id
        elif isinstance(node, ast.Attribute):
            yield node.attr


def test_nothing_is_kept_for_tests_alone() -> None:
    package, callers = list(sources("fastattn", "kernels")), list(sources("benchmarks", "examples"))
    words = [re.findall(r"\w+", source) for source in (*package, *callers)]
    counts = Counter(word for each in words for word in each)
    rare = {name for source in package for name in defined(source) if counts[name] <= FEW}
    for source, each in zip((*package, *callers), words):
        if not rare.isdisjoint(each):
            rare.difference_update(used(source))
    for page in (*(ROOT / "docs").rglob("*.md"), ROOT / "README.md"):
        rare.difference_update(re.findall(r"\w+", page.read_text(encoding="utf-8")))
    assert rare <= LOOKED_UP.keys()
    assert LOOKED_UP.keys() <= set().union(*map(defined, package))


def test_a_function_that_is_only_imported_is_found() -> None:
    source = "from a import f as f\ndef f(): pass\ndef g(): f\nclass C:\n    def h(self): self.g\n"
    assert defined(source) - set(used(source)) == {"C", "h"}
    assert "f" not in set(used("from a import f as f"))
