"""How close each test comes to its bound: a pytest plugin, `pytest -p margins --margins FILE`.

A test that passes with little room on one processor fails on another, whose instructions round differently. FILE gets
a line per test that comparison of numbers made: the largest error / allowed, the test's id and what was compared,
closest first. ATEN_CPU_CAPABILITY=default, avx2 or avx512 shows what torch computes on other processors.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import numerics

_closest: dict[str, tuple[float, str]] = {}
_running = ""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--margins", metavar="FILE", help="write how close each test comes to its bound")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("margins"):
        numerics.observe = _record
        compare = torch.testing.assert_close

        def observed(actual: Any, expected: Any, *args: Any, **kwargs: Any) -> None:
            _record_close(actual, expected, kwargs)
            compare(actual, expected, *args, **kwargs)

        torch.testing.assert_close = observed


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    global _running
    _running = item.nodeid
    return (yield)


def pytest_sessionfinish(session: pytest.Session) -> None:
    target = session.config.getoption("margins")
    if target and _closest:
        worker = getattr(session.config, "workerinput", {}).get("workerid", "")
        rows = sorted(((share, test, what) for test, (share, what) in _closest.items()), reverse=True)
        text = "".join(f"{share:.3f}\t{test}\t{what}\n" for share, test, what in rows)
        Path(f"{target}{worker and '.' + worker}").write_text(text, encoding="utf-8")


def _record(name: str, error: float, allowed: float) -> None:
    share = error / allowed if allowed else float(error > 0)
    if share >= _closest.get(_running, (-1.0, ""))[0]:
        _closest[_running] = (share, name)


def _record_close(actual: Any, expected: Any, options: dict[str, Any]) -> None:
    if isinstance(actual, (tuple, list)) and isinstance(expected, (tuple, list)):
        for a, e in zip(actual, expected):
            _record_close(a, e, options)
        return
    if not (isinstance(actual, Tensor) and isinstance(expected, Tensor) and actual.shape == expected.shape):
        return
    if not actual.is_floating_point() or not actual.numel() or actual.is_nested:
        return
    rtol, atol = options.get("rtol"), options.get("atol")
    if rtol is None or atol is None:
        rtol, atol = torch.testing._comparison.get_tolerances(actual, expected, rtol=rtol, atol=atol)
    a, e = actual.detach().double(), expected.detach().double()
    finite = a.isfinite() & e.isfinite()
    if finite.any() and (rtol or atol):
        share = ((a - e).abs() / (atol + rtol * e.abs()).clamp_min(1e-300))[finite].max().item()
        _record("assert_close", share, 1.0)
