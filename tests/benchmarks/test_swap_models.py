"""Libraries whose models bench_swap swaps: one that cannot be imported leaves its cases out, with the reason."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from cases.swap import cases_for
from measure.protocols import CannotRun


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (
            "raise RuntimeError('operator torchvision::nms does not exist')",
            r"^timm cannot be imported: RuntimeError: operator torchvision::nms does not exist$",
        ),
        ("import a_library_of_timm", r"^not installed: No module named 'a_library_of_timm'$"),
    ],
)
def test_a_library_that_cannot_be_imported_is_the_reason_of_its_cases(
    line: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """timm imports torchvision, which one made for another torch refuses by a RuntimeError."""
    (tmp_path / "timm.py").write_text(line)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "timm", raising=False)
    device = torch.device("cpu")
    case = next(case for case in cases_for(device) if case.name == "timm-vit")
    workload = case.small().open(device)
    for provider in case.providers(device):
        with pytest.raises(CannotRun, match=reason):
            workload.step(provider)
