"""A program begins to need memory in a guest with a large balloon: it gets it in time, and nobody is killed but holders."""

from __future__ import annotations

import pytest

from contrib.benchmarks import pressure
from tests.vm.conftest import Stage, nothing_left


@pytest.mark.parametrize(("kind", "runs", "most_killed"), [("thp", 3, 0), ("blocks", 3, 0), ("fuse", 2, 2)])
def test_who_needs_memory_gets_it(stage: Stage, kind: str, runs: int, most_killed: int) -> None:
    machine = stage.machine("pressed", pressure.boot)
    lines: list[str] = []
    for need in pressure.needs(machine, kind, runs, lines.append):
        assert need.seconds is not None, lines
        assert need.oom_kills <= most_killed, lines
    killed = machine.shell("dmesg | grep -c 'Killed process' || true")
    by_name = machine.shell("dmesg | grep 'Killed process' | grep -vc 'balloon_agent\\|python' || true")
    assert by_name.strip() == "0", (killed, lines)
    nothing_left(machine)
