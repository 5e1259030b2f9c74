"""The runs that all tests of this folder share, and the measured differences as rows `name value` at the end."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from launches import Runs


@pytest.fixture(scope="session")
def runs(family_fasta: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    folder = tmp_path_factory.mktemp("equivalence")
    yield Runs(folder, family_fasta)
    # A gigabyte in all; logs and metrics stay to be looked at.
    for checkpoints in folder.glob("*/checkpoints"):
        shutil.rmtree(checkpoints)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    reports = [report for kind in ("passed", "failed") for report in terminalreporter.stats.get(kind, [])]
    rows = [row for report in reports if report.when == "call" for row in report.user_properties]
    for name, value in rows:
        terminalreporter.write_line(f"{name} {value}")
