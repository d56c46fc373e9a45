"""A plugin of pytest, ``-p outcomes``: what came of each test, as a result file.

It is written after every test, so that it stands however pytest is stopped.
"""

from typing import Any

import pytest
import record


class Outcomes:
    """Of a session's tests, and of files that cannot be collected."""

    def __init__(self) -> None:
        self.found: dict[str, dict[str, Any]] = {}

    def add(self, report: pytest.CollectReport | pytest.TestReport, seconds: float) -> None:
        """A part of a test: what was before and after it counts too."""
        own = self.found.setdefault(report.nodeid, {"outcome": "passed", "seconds": 0.0, "message": ""})
        own["seconds"] += seconds
        if not report.passed:
            own |= {"outcome": report.outcome, "message": message(report)}

    def write(self, shown: bool = False) -> None:
        """The table."""
        rows = [
            {"test": test, "outcome": own["outcome"], "seconds": f"{own['seconds']:.1f}",
             "message": own["message"].partition("\n")[0].replace("|", "\\|")}
            for test, own in self.found.items()
        ]  # fmt: skip
        ended = [own["outcome"] for own in self.found.values()]
        configuration = {outcome: ended.count(outcome) for outcome in ("passed", "failed", "skipped")}
        record.write("gpu-tests", "The tests that need a GPU", configuration, rows, self.found, shown=shown)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """A file that cannot be imported has no tests."""
        if report.failed:
            self.add(report, 0.0)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """What was before a test, the test, what was after it."""
        self.add(report, report.duration)
        if report.when == "teardown":
            self.write()

    def pytest_unconfigure(self) -> None:
        """The end, when nothing captures the output any more."""
        if self.found:
            self.write(shown=True)


def message(report: pytest.CollectReport | pytest.TestReport) -> str:
    """Why a test was skipped or has failed."""
    found: Any = report.longrepr
    if isinstance(found, tuple):  # of a skipped one: file, line, reason
        return found[2].removeprefix("Skipped: ")
    return found.reprcrash.message if getattr(found, "reprcrash", None) else str(found)


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Outcomes())
