"""A start that goes on with what another agent left, stopped or killed at any instant, with the holders of a real machine."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from balloon_agent.memory.holders import Holders
from tests import instants
from tests.machine.starting import TARGET
from tests.unit.test_linux import sysfs as sysfs

INSTANTS = 12


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path
    Holders(tmp_path / "run/holders").end_all()


def test_a_start_may_end_at_any_instant(folder: Path, sysfs: Path) -> None:
    command = [sys.executable, "-m", "tests.machine.starting", str(INSTANTS), str(folder), str(sysfs)]
    # Not by a pipe: holders outlive the program, and would keep it open.
    output = folder / "output"
    with output.open("wb") as file:
        subprocess.run(command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, check=True, timeout=1200)
    results = "".join(line for line in output.read_text().splitlines(keepends=True) if line[0] in "{0123456789")
    instants.check(results, INSTANTS, TARGET, 0)
    assert list(folder.glob("run/holders/*"))
