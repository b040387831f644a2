"""The table that `make chaos` prints: a row for each fault, from all its trials."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import pytest

HEADER = ("fault", "times", "detection p50", "max", "recovery p50", "max", "leaks", "measured")


@dataclass(frozen=True, kw_only=True)
class Row:
    """Seconds, one of each kind for every trial, none where nothing is to be noticed; the rest in words."""

    fault: str
    detection_s: Sequence[float]
    recovery_s: Sequence[float]
    leaks: Sequence[str]
    measured: str = ""

    @property
    def cells(self) -> tuple[str, ...]:
        times = (
            f"{figure(seconds):.3f} s" if seconds else "-"
            for seconds in (self.detection_s, self.recovery_s)
            for figure in (median, max)
        )
        count = str(max(len(self.detection_s), len(self.recovery_s)))
        return (self.fault, count, *times, ", ".join(self.leaks) or "none", self.measured)


_ROWS = pytest.StashKey[list[Row]]()


@pytest.fixture
def report(request: pytest.FixtureRequest) -> list[Row]:
    """To be appended to."""
    return request.config.stash.setdefault(_ROWS, [])


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    rows = [HEADER, *(row.cells for row in config.stash.get(_ROWS, []))]
    if len(rows) == 1:
        return
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows.insert(1, tuple("-" * width for width in widths))
    terminalreporter.write_line("")
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        terminalreporter.write_line(f"| {' | '.join(cells)} |")
