"""The scripts of docs/recipes.md in small: they learn and print what the page shows; needs opacus and flwr."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")


def script(name: str) -> ModuleType:
    """A script of examples/recipes as a module."""
    path = ROOT / "examples" / "recipes" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def shape_of(line: str) -> str:
    """A line with its numbers replaced."""
    return re.sub(r"\d+(\.\d+)?", "N", line)


def shown(first: str) -> set[str]:
    """The shapes of the lines of the page's block that begins with `first`."""
    blocks = re.findall(r"```text\n(.*?)```", PAGE, re.DOTALL)
    (block,) = (block for block in blocks if block.startswith(first))
    return {shape_of(line) for line in block.splitlines()}


def by_guessing(labels: torch.Tensor) -> float:
    """What the most frequent label gets, and four standard deviations of a share of so many rows."""
    share = float(labels.double().mean())
    return max(share, 1.0 - share) + 4 * 0.5 / len(labels) ** 0.5


@pytest.mark.downloads
def test_training_with_differential_privacy(capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    pytest.importorskip("opacus")
    recipe = script("dp_sgd")
    monkeypatch.setattr(recipe, "EPOCHS", 10)
    recipe.main()
    lines = capsys.readouterr().out.splitlines()
    assert {shape_of(line) for line in lines} == shown("noise")
    found = [re.fullmatch(r"epoch (\d+): accuracy ([\d.]+), epsilon ([\d.]+)", line) for line in lines[1:]]
    epochs, accuracies, spent = zip(*(tuple(map(float, each.groups())) for each in found if each))
    assert epochs == (5, 10)
    assert accuracies[-1] > by_guessing(recipe.data(1024, 2).tensors[1])
    assert 0 < spent[0] < spent[1] <= recipe.EPSILON


@pytest.mark.downloads
def test_federated_averaging(capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    pytest.importorskip("flwr")
    recipe = script("federated")
    monkeypatch.setattr(recipe, "ROUNDS", 6)
    recipe.main()
    lines = capsys.readouterr().out.splitlines()
    assert {shape_of(line) for line in lines} == shown("round 0")
    found = [re.fullmatch(r"round (\d+): accuracy ([\d.]+), loss ([\d.]+)", line) for line in lines]
    rounds, accuracies, losses = zip(*(tuple(map(float, each.groups())) for each in found if each))
    assert rounds == tuple(range(7))
    assert accuracies[-1] > by_guessing(recipe.data(1024, 99)[1])
    assert losses[-1] < losses[0]
