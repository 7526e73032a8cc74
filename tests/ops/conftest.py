"""Fixtures that the tests of operations share."""

from __future__ import annotations

from typing import Any

import pytest

from fastattn.ops import plan


@pytest.fixture
def hits(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each look-up of a plan found one."""
    seen: list[bool] = []
    look_up = plan.look_up

    def noting(*args: Any) -> Any:
        key, found = look_up(*args)
        seen.append(found is not None)
        return key, found

    monkeypatch.setattr(plan, "look_up", noting)
    return seen
