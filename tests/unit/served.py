"""A process that serves what the agent serves, from a snapshot that stands still: for clients that mean harm to it.

``python -m tests.unit.served FOLDER [CERTIFICATE KEY]`` prints the URL of its metrics, and ends with its standard input.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from balloon_agent.agent.questions import MOST_CELLS
from balloon_agent.api.control import ControlServer
from balloon_agent.api.endpoint import Endpoint
from balloon_agent.api.messages import MapWriter
from balloon_agent.api.snapshot import Board, Snapshot, State
from balloon_agent.api.tls import Security
from balloon_agent.guest.statistics import GuestStatistics
from balloon_agent.linux import libc


class Owner:
    """Changes nothing, whatever it is asked."""

    def __init__(self, board: Board) -> None:
        self._board = board
        writer = MapWriter()
        for number in range(MOST_CELLS):
            writer.add("pages", number, 4096)
        self._map = writer.line()

    def command(self, mode: str, size: int | None) -> int:
        return self._board.latest.commands_done

    def locate(self, cell_bytes: int) -> bytes:
        return self._map


def main(folder: Path, *papers: Path) -> None:
    libc.bound_heap()
    board = Board(Snapshot("1.2.3", os.getpid(), "0000:00:05.0", "vfio-pci", "cont", 0, 0, state=State.RESTING))
    control = ControlServer(folder, board, Owner(board))
    endpoint = Endpoint(board, "localhost:0", Security(*papers) if papers else None, GuestStatistics())
    if os.geteuid() == 0:
        # As the agent's: from locked memory the kernel takes back only what is unmapped.
        libc.lock_all_memory()
    control.start()
    print(endpoint.url, flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
