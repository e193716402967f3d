"""What the agent shows of itself: an immutable picture, made by the owner thread, read by everybody else."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum

from balloon_agent.balloon.tally import Durations, Sizes
from balloon_agent.sizing.governor import Mode


class State(StrEnum):
    """The balloon's state, as the agent's thread sees it after each step."""

    STARTING = "starting"
    RESTING = "resting"
    INFLATING = "inflating"
    DEFLATING = "deflating"
    SHORT = "short"
    RECOVERING = "recovering"
    FAILED = "failed"
    ABSENT = "absent"

    @property
    def at_rest(self) -> bool:
        """The balloon does not move: the target is reached, or cannot be for now."""
        return self in (State.RESTING, State.SHORT, State.FAILED, State.ABSENT)

    @property
    def falls_short(self) -> bool:
        """The target cannot be reached for now."""
        return self in (State.SHORT, State.FAILED)

    @property
    def device_up(self) -> bool:
        """The device can be used."""
        return self not in (State.FAILED, State.RECOVERING, State.ABSENT)


@dataclass(frozen=True)
class Snapshot:
    """All sizes are in bytes, all times in seconds; counters are since the start of the agent.

    ``wanted_bytes`` is the target without the guest's need of memory. ``number`` grows with each that is published.
    """

    version: str
    pid: int
    device: str
    driver: str
    channel: str
    offered_features: int
    negotiated_features: int
    mode: Mode = Mode.FOLLOW
    state: State = State.STARTING
    reason: str = ""
    shortfall: str | None = None
    host_target_bytes: int = 0
    target_bytes: int = 0
    wanted_bytes: int = 0
    actual_bytes: int = 0
    reserve_bytes: int = 0
    ram_bytes: int = 0
    machine_bytes: int = 0
    unpinned: bool = False
    obstacle: str | None = None
    held_bytes: Mapping[str, int] = field(default_factory=dict)
    source_notes: Mapping[str, str] = field(default_factory=dict)
    inflated_bytes_total: int = 0
    deflated_bytes_total: int = 0
    moved_extents_total: int = 0
    holders_lost_total: int = 0
    blocks_lost_total: int = 0
    hidden_freed_bytes_total: Mapping[str, int] = field(default_factory=dict)
    device_faults_total: Mapping[str, int] = field(default_factory=dict)
    targets_rejected_total: int = 0
    target_rejected: bool = False
    reliefs_total: int = 0
    relief_active: bool = False
    queues: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    queue_seconds: Mapping[str, Durations] = field(default_factory=dict)
    run_sizes: Mapping[str, Sizes] = field(default_factory=dict)
    phase_seconds_total: Mapping[str, float] = field(default_factory=dict)
    holder_pids: tuple[int, ...] = ()
    commands_done: int = 0
    number: int = 0

    @property
    def shortfall_bytes(self) -> int:
        """What is missing from the target, where that cannot be reached for now."""
        return abs(self.target_bytes - self.actual_bytes) if self.state.falls_short else 0


class Board:
    """Where the latest snapshot hangs. The owner thread puts it up, any thread reads it or waits for one it likes."""

    def __init__(self, first: Snapshot) -> None:
        self._latest = first
        self._changed = threading.Condition()

    @property
    def latest(self) -> Snapshot:
        return self._latest

    def publish(self, snapshot: Snapshot) -> None:
        with self._changed:
            self._latest = replace(snapshot, number=self._latest.number + 1)
            self._changed.notify_all()

    def wait_for(self, wanted: Callable[[Snapshot], bool], timeout: float) -> Snapshot:
        """The first snapshot that is wanted, or the latest one after ``timeout`` seconds."""
        with self._changed:
            self._changed.wait_for(lambda: wanted(self._latest), timeout)
            return self._latest
