"""The report that the owner makes after each step: the snapshot, a line in the log, systemd's status."""

from __future__ import annotations

import logging
from dataclasses import replace

from balloon_agent.api.snapshot import Board, State
from balloon_agent.balloon.device import BalloonDevice
from balloon_agent.memory.holders import Holders
from balloon_agent.size import format_size
from balloon_agent.sizing.balloon import Balloon
from balloon_agent.sizing.governor import Decision, Mode
from balloon_agent.sizing.pressure import Need

from .events import Line
from .host_target import HostTarget
from .recovery import Recovery
from .systemd import Notifier

_log = logging.getLogger(__name__)


class Reporter:
    """Reads all counters, each where it counts, and changes nothing."""

    def __init__(
        self,
        board: Board,
        device: BalloonDevice,
        line: Line,
        balloon: Balloon,
        holders: Holders,
        recovery: Recovery,
        need: Need,
        target: HostTarget,
        notifier: Notifier,
    ) -> None:
        self._board = board
        self._device = device
        self._line = line
        self._balloon = balloon
        self._holders = holders
        self._recovery = recovery
        self._need = need
        self._target = target
        self._notifier = notifier
        self._said = ""

    def publish(self, state: State, decision: Decision, shortfall: str | None, mode: Mode, commands_done: int) -> None:
        """Make the picture of this moment, and log a change."""
        balloon, counters = self._balloon, self._balloon.counters
        self._board.publish(
            replace(
                self._board.latest,
                mode=mode,
                state=state,
                device=self._line.address,
                driver=self._line.driver,
                channel=self._device.channel_name,
                offered_features=int(self._device.offered),
                negotiated_features=self._device.virtio.negotiated,
                reason=decision.reason,
                shortfall=shortfall,
                host_target_bytes=self._target.size,
                machine_bytes=self._target.machine,
                target_bytes=decision.size,
                wanted_bytes=decision.wanted,
                actual_bytes=balloon.actual,
                reserve_bytes=balloon.reserve,
                held_bytes=balloon.ledger.by_source(),
                source_notes=dict(balloon.notes),
                inflated_bytes_total=counters.inflated,
                deflated_bytes_total=counters.deflated,
                moved_extents_total=counters.moved_extents,
                holders_lost_total=counters.holders_lost,
                blocks_lost_total=counters.blocks_lost,
                hidden_freed_bytes_total=balloon.hidden_freed,
                device_faults_total=dict(self._recovery.faults),
                targets_rejected_total=self._target.rejected_total,
                target_rejected=self._target.is_rejected,
                reliefs_total=self._need.relief.count,
                relief_active=self._need.relief.active,
                queues=self._device.tally.queues(),
                queue_seconds=self._device.tally.queue_seconds(),
                run_sizes=self._device.tally.run_sizes(),
                phase_seconds_total=balloon.seconds(),
                holder_pids=tuple(holder.pid for holder in self._holders),
                commands_done=commands_done,
            )
        )
        self._log_change(state, decision.size, decision.reason, shortfall)

    def _log_change(self, state: State, target: int, reason: str, shortfall: str | None) -> None:
        """A line for each change of what is to be, and for its end; none for the steps between."""
        if self._need.relief.active and state in (State.INFLATING, State.DEFLATING, State.RESTING):
            line = f"the balloon gives way ({reason})"
        elif state == State.RESTING:
            line = f"the balloon has {format_size(self._balloon.actual)}"
        elif state == State.SHORT:
            line = f"the balloon is short of {format_size(target)}: {shortfall}"
        elif state == State.RECOVERING:
            return
        elif state == State.ABSENT:
            line = "there is no balloon device"
        elif state == State.FAILED:
            line = f"the device is left alone for now; {format_size(self._balloon.actual)} stay held"
        else:
            line = f"the balloon is to have {format_size(target)} ({reason})"
        if line != self._said:
            _log.info("%s", line)
            self._notifier.status(line)
            self._said = line
