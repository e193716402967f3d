"""The worker: a holder that holds nothing, and does for the agent what may block for long. It can be killed without a loss."""

from __future__ import annotations

from typing import Any

from balloon_agent.errors import HolderLost

from .holder_client import HolderClient
from .holders import Holders


class Worker:
    """Started when it is needed first, and again after it had to be killed."""

    def __init__(self, holders: Holders) -> None:
        self._holders = holders
        self._client: HolderClient | None = None
        # Whether it was asked to give up what it was asked last.
        self.gave_way = False

    @property
    def has_ended(self) -> bool:
        """Whether each worker that had to be killed is gone. One that is not may do yet what it was asked for."""
        return not self._holders.unended_workers

    @property
    def is_up(self) -> bool:
        """Whether it runs: if not, the next request starts it first, which takes seconds at worst."""
        return self._client is not None and self._client.name in self._holders

    def warm_up(self) -> None:
        """Start it now, and not in a guest that is short of memory.

        What a process needs of the kernel cannot be moved, and spoils a memory block wherever it comes to lie.
        """
        if self._client is None:
            self._client = self._holders.start(holds_memory=False)

    def ask(
        self, message: dict[str, Any], deadline: float, *, short: bool = False, takes: bool = False, kills: bool = True
    ) -> dict[str, Any] | str:
        """Have something done within ``deadline`` seconds: the answer, or in words what went wrong instead.

        What is bound to be ``short`` is done ahead of other processes. What ``takes`` memory from the guest gives way to who
        needs it; and should that come too late, the worker is one of those whom the OOM killer takes first, which ends it.
        Without ``kills`` a worker that is late may go on, and the next request waits for it.
        """
        self.gave_way = False
        try:
            if self._client is None or not self.is_up:
                self._client = self._holders.start(holds_memory=False)
            self._client.set_fuse(takes)
            try:
                answer = self._client.request(message, deadline, short=short, takes=takes, kills=kills)
            finally:
                self.gave_way = self._client.gave_way
            self._client.set_fuse(False)
        except (HolderLost, OSError) as error:
            if self._client is not None and self._client.name in self._holders:
                self._holders.kill(self._client.name)
            self._client = None
            return f"given up: {error}"
        return answer if answer["ok"] else str(answer["error"])
