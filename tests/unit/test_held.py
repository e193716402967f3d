"""Whether anything is held: what decides if a device may go back to the kernel's driver."""

from __future__ import annotations

from pathlib import Path

import pytest

from balloon_agent.takeover.held import what_is_held
from balloon_agent.takeover.state import StateFile
from tests.unit.test_left_behind import Start, hello
from tests.unit.test_left_behind import start as start

MEMORY = "memory"


@pytest.fixture
def state(tmp_path: Path) -> StateFile:
    return StateFile(tmp_path / "state.json")


@pytest.mark.parametrize(
    ("now", "held"), [("offline", True), ("going-offline", True), ("online", False), (None, False), ("unheard-of", True)]
)
def test_a_block_on_record_is_held_until_it_is_known_to_be_back(
    tmp_path: Path, state: StateFile, now: str | None, held: bool
) -> None:
    state.record_blocks({7: "Normal"})
    if now is not None:
        (tmp_path / MEMORY / "memory7").mkdir(parents=True)
        (tmp_path / MEMORY / "memory7/state").write_text(f"{now}\n")
    assert what_is_held(state, tmp_path, str(tmp_path / MEMORY)) == ("memory blocks: 1" if held else None)


def test_a_holder_counts_while_it_lives_whatever_it_says(tmp_path: Path, state: StateFile, start: Start) -> None:
    assert what_is_held(state, tmp_path) is None
    folder = tmp_path / "holders"
    folder.mkdir()
    assert what_is_held(state, tmp_path) is None
    answering, silent = start(folder / "00000001", hello()), start(folder / "00000002")
    (folder / "00000001").rename(folder / f"00000001-{answering.pid}")
    assert what_is_held(state, tmp_path) == "holder processes: 2"
    answering.kill()
    answering.wait()
    assert what_is_held(state, tmp_path) == "holder processes: 1"
    silent.kill()
    silent.wait()
    assert what_is_held(state, tmp_path) is None
