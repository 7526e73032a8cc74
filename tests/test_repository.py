"""Files that a code host reads: issue templates are valid forms, and a release passes .ci/run before it is built."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.skipif(
    not (ROOT / ".github").exists(), reason="a source distribution has no .github"
)
TEMPLATES = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))


@pytest.mark.parametrize("path", [p for p in TEMPLATES if p.name != "config.yml"], ids=lambda path: path.stem)
def test_an_issue_template_is_a_form(path: Path) -> None:
    form = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert form.keys() >= {"name", "description", "body"}
    fields = [item["id"] for item in form["body"]]
    assert len(set(fields)) == len(fields) > 0
    assert all(item["type"] == "textarea" and item["attributes"]["label"] for item in form["body"])


def test_a_release_passes_everything_before_its_packages_are_built() -> None:
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "release.yml").read_text(encoding="utf-8"))

    def commands(job: dict[str, Any]) -> list[str]:
        return [step["run"] for step in job["steps"] if "run" in step]

    jobs = workflow["jobs"]
    assert ".ci/run" in commands(jobs["test"])
    assert jobs["build"]["needs"] == "test"
    assert "python -m build" in commands(jobs["build"])  # the source distribution, and the wheel from it


def test_ci_builds_the_documentation_strictly_and_runs_every_example() -> None:
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert "mkdocs build --strict" in script
    assert "for script in examples/*.py; do python " in script
