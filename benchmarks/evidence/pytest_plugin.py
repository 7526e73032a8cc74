"""A pytest plugin that reports each failure at once, as a finding: one JSON object per line.

A run that is stopped at its limit has then reported its failures and its progress so far.
"""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

from evidence.findings import finding

PROGRESS_TESTS = 20  # tests between two lines of progress


class Reporter:
    """Counts and reports outcomes."""

    def __init__(self, config: Any) -> None:
        self.config = config
        self.counts: Counter[str] = Counter()

    def say(self, line: str) -> None:
        """Print a whole line, outside pytest's capture."""
        terminal = self.config.pluginmanager.get_plugin("terminalreporter")
        terminal.write(f"\n{line}\n", flush=True)  # the current line may have dots

    def pytest_runtest_logreport(self, report: Any) -> None:
        """One phase of a test: a failure in any of them is a finding."""
        if report.failed:
            self.counts["failed"] += 1
            crash = getattr(report.longrepr, "reprcrash", None)
            text = str(getattr(crash, "message", report.longrepr)).strip() or "no reason"
            self.say(json.dumps(finding("test", "failed", f"{report.nodeid}: {text.splitlines()[0]}")))
        elif report.when == "call" or report.skipped:
            self.counts["skipped" if report.skipped else "passed"] += 1
            if self.counts.total() % PROGRESS_TESTS == 0:
                self.say(self.summary())

    def pytest_collectreport(self, report: Any) -> None:
        """A file that cannot be imported is a finding; the others run."""
        if report.failed:
            self.counts["failed"] += 1
            lines = str(report.longrepr).strip().splitlines() or ["no reason"]
            self.say(json.dumps(finding("test", "failed", f"{report.nodeid}: {lines[-1]}")))

    def pytest_sessionfinish(self) -> None:
        """Report the summary, unless no test ran in this process."""
        if self.counts and not hasattr(self.config, "workerinput"):
            status = "failed" if self.counts["failed"] else "passed" if self.counts["passed"] else "skipped"
            self.say(json.dumps(finding("test", status, self.summary(), summary=True)))

    def summary(self) -> str:
        """The counts in words."""
        return ", ".join(f"{self.counts[kind]} {kind}" for kind in ("passed", "failed", "skipped"))


def pytest_configure(config: Any) -> None:
    """Report from the controlling process; xdist's workers run the tests."""
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(Reporter(config), "evidence-reporter")
