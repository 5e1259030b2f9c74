"""The drills' jobs, and what was measured as rows `name value` at the end."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from drill import Drill

Rows = dict[str, float | int | str]
ROWS = pytest.StashKey[Rows]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[ROWS] = {}


@pytest.fixture(scope="session")
def rows(pytestconfig: pytest.Config) -> Rows:
    """What a drill measured, by name."""
    return pytestconfig.stash[ROWS]


@pytest.fixture(scope="session")
def drill(family_fasta: Path, tmp_path_factory: pytest.TempPathFactory) -> Drill:
    if sys.platform == "win32":
        pytest.skip("Windows has no signals to drill with")
    return Drill(tmp_path_factory.mktemp("drills"), family_fasta)


@pytest.fixture(autouse=True)
def no_orphans(drill: Drill) -> Iterator[None]:
    yield
    drill.clear()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for name, value in terminalreporter.config.stash[ROWS].items():
        terminalreporter.write_line(f"{name} {value}")
