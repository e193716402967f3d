"""The daemon: one thread that owns the device and the ledger, and sleeps until something happens.

What happens: the host changes its target (the device's interrupt), somebody sends a command, a holder dies, a signal
comes, the host wants statistics, or it is time to try again after falling short or after a fault of the device.
"""

from __future__ import annotations

import logging
import signal
import time
from collections.abc import Callable
from functools import partial

from balloon_agent.api.snapshot import Board, Snapshot, State
from balloon_agent.balloon.device import BalloonDevice
from balloon_agent.errors import DeviceFailed
from balloon_agent.guest.statistics import GuestStatistics
from balloon_agent.memory.holders import Holders
from balloon_agent.size import format_size
from balloon_agent.sizing.balloon import Balloon
from balloon_agent.sizing.coarsening import Coarsening
from balloon_agent.sizing.governor import Decision, Mode, Wishes, decide
from balloon_agent.sizing.pressure import Need, sooner

from .events import Blocks, Events, Line, Plugging
from .host_target import HostTarget
from .inbox import Inbox
from .policy import NO_POLICY, Policy
from .questions import Question, Questions
from .recovery import Recovery
from .reporter import Reporter
from .systemd import Notifier

# After falling short: the first pause before the next try, and the longest. Each is twice the one before.
FIRST_RETRY, LONGEST_RETRY = 1.0, 30.0
# A host that wants statistics more often than so many seconds apart waits: it could keep the guest busy with nothing else.
STATISTICS_INTERVAL = 0.1
_UNHEARD = "%s are not noticed before the next start: the kernel's uevents: %s"
_log = logging.getLogger(__name__)


class Daemon:
    """The owner of everything that moves. ``run`` returns after a signal that says so.

    ``ram`` bytes can be set by hand. ``wish`` is the mode and the size to begin with, and ``remember`` keeps it for
    an agent after this one. ``reload`` reads the policy anew, BadInput if that makes no sense: what SIGHUP is for, where it is
    given. ``plugging`` tells when it is worth while to look for another device in the place of one that is gone, ``blocks`` of
    memory blocks that leave the balloon without us. ``is_stopped`` tells whether a signal came before ``run`` could hear it.
    """

    def __init__(
        self,
        device: BalloonDevice,
        line: Line,
        balloon: Balloon,
        holders: Holders,
        recovery: Recovery,
        statistics: GuestStatistics,
        ram: int,
        target: HostTarget,
        first: Snapshot,
        clock: Callable[[], float] = time.monotonic,
        *,
        need: Need,
        policy: Policy = NO_POLICY,
        reload: Callable[[], Policy] | None = None,
        wish: tuple[Mode, int] = (Mode.FOLLOW, 0),
        remember: Callable[[Mode, int], None] = lambda mode, size: None,
        notifier: Notifier | None = None,
        plugging: Plugging | None = None,
        blocks: Blocks | None = None,
        is_stopped: Callable[[], bool] = lambda: False,
    ) -> None:
        self._device = device
        self._line = line
        self._plugging = plugging
        self._blocks = blocks
        self._balloon = balloon
        self._coarsening = Coarsening(balloon, clock)
        self._holders = holders
        self._recovery = recovery
        self._statistics = statistics
        self._ram = ram
        self.board = Board(first)
        self.inbox = Inbox(ram, lambda: self.board.latest.state)
        self._done = 0
        self._mode, self._set_size = wish
        self._remember = remember
        self._need = need
        self._policy = policy
        self._questions = Questions(clock)
        self._reload = reload
        self._notifier = Notifier({}) if notifier is None else notifier
        self._target = target
        self._reporter = Reporter(self.board, device, line, balloon, holders, recovery, need, target, self._notifier)
        self._clock = clock
        self._statistics_due = 0.0
        self._is_stopped = is_stopped
        self._stopping = self._reloading = False
        self._retry, self._retry_at = FIRST_RETRY, 0.0
        self._dead: list[str] = []
        # Blocks that have left the balloon while the host could not be told.
        self._gone: list[str] = []

    def run(self) -> bool:
        """Follow the target until a signal says stop; then give everything back, or not. Whether what is held is to stay so."""
        # Python calls a handler when it next runs code in this thread. A signal that comes just before it goes to sleep, or
        # that the kernel gives to another thread, must wake it up for that.
        signal.set_wakeup_fd(self.inbox.waking, warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._stop)
        # Without anything to read anew it means what it always does: the terminal has gone.
        signal.signal(signal.SIGHUP, self._stop if self._reload is None else self._read_again)
        self._stopping |= self._is_stopped()
        self._notifier.ready()
        # The first turn reads the target.
        self._device.configuration_changed = True
        pause: float | None = 0.0
        while not self._stopping:
            pause = self._notifier.stay_alive(self._clock(), self.turn(pause))
        self._notifier.stopping()
        if self._policy.keeps and self._balloon.actual:
            _log.info("stopping: %s stay in the balloon, for the next agent", format_size(self._balloon.actual))
            return True
        _log.info("stopping: giving back %s", format_size(self._balloon.actual))
        self._empty()
        return False

    def turn(self, pause: float | None) -> float | None:
        """Take in what happens within ``pause`` seconds (for ever if None), and make one step. Returns the next pause."""
        try:
            self._take_events(pause)
            if self._recovery.problem is not None:
                if not self._recovery.revive():
                    self._relieve_while_announcing()
                    return self._show_problem()
                self._back_again()
            self._heed_device()
            pause = self._advance()
            # An interrupt that came while a buffer was waited for may have told of more than that buffer.
            if self._device.configuration_changed:
                return 0.0
            now = self._clock()
            pauses = [pause, self._need.pause(now, self._balloon.actual), self._questions.answer(self._balloon.ledger)]
            if self._device.stats_wanted:
                pauses.append(max(0.0, self._statistics_due - self._clock()))
            if self._target.is_rejected:
                # Memory that was plugged in can make it a target that makes sense.
                pauses.append(LONGEST_RETRY)
            return sooner(*pauses)
        except DeviceFailed as error:
            # At once if it is the first time. What the step had begun is in the ledger, and still held.
            self._recovery.failed(error)
            return self._show_problem()

    def _show_problem(self) -> float | None:
        """The device cannot be used for now. Returns for how long at least; None until something happens."""
        if self._recovery.absent:
            self._target.forget()
        decision = self._decide()
        if self._recovery.absent:
            self._publish(State.ABSENT, Decision(0, "there is no device", 0), self._recovery.problem)
            return sooner(self._recovery.wait, self._questions.answer(self._balloon.ledger))
        wait = 0.0 if self._recovery.announcing else self._recovery.wait
        # One that is about to be brought back is not called failed: whoever waits for the balloon goes on waiting.
        self._publish(State.FAILED if wait else State.RECOVERING, decision, self._recovery.problem)
        return sooner(wait, self._questions.answer(self._balloon.ledger))

    def _back_again(self) -> None:
        self._read_target()
        # Who died meanwhile could not be dealt with; what they held may have been announced before they did.
        while self._dead:
            self._balloon.holder_lost(self._dead[-1])
            self._dead.pop()
        self._balloon.blocks_lost(self._gone)
        self._gone.clear()

    def _stop(self, number: int, _: object) -> None:
        self._stopping = True
        self.inbox.wake()

    def _read_again(self, number: int, _: object) -> None:
        self._reloading = True
        self.inbox.wake()

    def _take_policy(self) -> None:
        """SIGHUP: all of the new policy, or none of it."""
        self._reloading = False
        if self._reload is None:
            return
        self._notifier.reloading()
        try:
            self._policy = self._reload()
        except Exception as error:
            # Whatever is wrong with a file, the balloon is not given up for it.
            _log.error("nothing is changed: %s", error or type(error).__name__)
        self._try_anew()
        self._notifier.ready()

    def _take_events(self, pause: float | None) -> None:
        """Wait for something to happen, at most ``pause`` seconds (for ever if None), and take it in."""
        events = Events()
        # Commands first: what the rest may find out about the device must not keep them waiting.
        events.expect_input(self.inbox.fileno(), self._take_messages)
        for holder in self._holders:
            events.expect_input(holder.pidfd, partial(self._holder_died, holder.name))
        signs = self._need.signs(self._clock(), self._balloon.actual)
        events.expect(signs, lambda ready: self._need.hear(self._clock(), ready))
        if self._plugging is not None:
            events.expect_input(self._plugging.fileno(), self._hear_of_devices)
        if self._blocks is not None:
            events.expect_input(self._blocks.fileno(), self._hear_of_blocks)
        # Of one that has failed, too, the kernel may want it back, and waits until it is let go.
        works = self._recovery.problem is None
        interrupt_fd = self._line.interrupt_fd if works else self._line.request_fd
        if interrupt_fd is not None:
            events.expect_input(interrupt_fd, partial(self._hear_device, works=works))
        events.wait(pause)

    def _take_messages(self) -> None:
        self._take_commands()
        if self._reloading:
            self._take_policy()

    def _hear_device(self, *, works: bool) -> None:
        if self._line.serve_interrupt() and works:
            self._device.handle_interrupt()

    def _hear_of_devices(self) -> None:
        assert self._plugging is not None
        try:
            if self._plugging.drain():
                self._recovery.look_again()
        except OSError as error:
            # A socket that has failed would be ready for ever.
            self._plugging = None
            _log.warning(_UNHEARD, "devices that are plugged in", error)

    def _hear_of_blocks(self) -> None:
        assert self._blocks is not None
        try:
            self._lose_blocks(self._blocks.lost())
        except OSError as error:
            self._blocks = None
            _log.warning(_UNHEARD, "memory blocks that others bring online", error)

    def _take_commands(self) -> None:
        for command in self.inbox.take():
            if isinstance(command, Question):
                self._questions.add(command)
                continue
            self._mode = command.mode
            self._set_size = self._balloon.actual if command.mode == Mode.HOLD else command.size or 0
            self._done = command.number
            try:
                self._remember(self._mode, self._set_size)
            except OSError as error:
                _log.warning("an agent after this one will not know what was asked: %s", error)
            self._try_anew()

    def _heed_device(self) -> None:
        if self._device.configuration_changed:
            self._read_target()
        if self._device.stats_wanted and self._clock() >= self._statistics_due:
            self._statistics_due = self._clock() + STATISTICS_INTERVAL
            try:
                self._device.give_stats(self._statistics.read())
            except OSError as error:
                _log.debug("no statistics for now: %s", error)
        if self._target.has_become_possible():
            self._read_target()

    def _read_target(self) -> None:
        self._device.configuration_changed = False
        self._target.read(self._device)
        self._try_anew()

    def _try_anew(self) -> None:
        """Something has changed: what fell short before may be possible now."""
        self._retry, self._retry_at = FIRST_RETRY, 0.0
        self._coarsening.begin_anew()

    def _holder_died(self, name: str) -> None:
        self._holders.kill(name)
        works = self._recovery.problem is None
        if not works and not self._device.quiet:
            # The host may act on these frames yet, and cannot be told: they stay in the ledger until it was, or was reset.
            if self._balloon.ledger.of_holder(name):
                self._balloon.note_death(name)
                self._dead.append(name)
            _log.warning("holder %s has died; what it held is the guest's, and the host cannot be told yet", name)
            return
        size = self._balloon.holder_lost(name, tell_host=works)
        if size and self._device.bears_loss:
            # For want of memory, as far as anybody knows.
            self._need.relief.lose(self._clock(), self._balloon.actual)
        self._try_anew()
        _log.warning("holder %s has died; the %s that it held are the guest's", name, format_size(size))

    def _lose_blocks(self, names: list[str]) -> None:
        works = self._recovery.problem is None
        if not works and not self._device.quiet:
            # The host cannot be told yet. Those that it is told of anew are looked at before that.
            self._gone += names
        elif self._balloon.blocks_lost(names, tell_host=works):
            self._try_anew()

    def _advance(self) -> float | None:
        """At most one step, and the snapshot after it. Returns how long to wait for events before the next one."""
        self._relieve()
        if self._clock() < self._retry_at:
            # Woken up by something else: the pause before the next try is not over.
            return self._retry_at - self._clock()
        before = self._balloon.actual
        decision = self._decide()
        # Who is in need is not helped by memory that is taken beforehand, unless the host insists.
        floor = None if not self._need.relief.active else 0 if self._may_fall_below else self._target.size
        step = self._balloon.step(decision.size, floor, quickly=self._need.relief.active)
        if step.moved or step.shortfall is not None:
            self._need.moved(self._clock())
        if step.moved:
            state = State.INFLATING if decision.size > before else State.DEFLATING
            self._try_anew()
            pause: float | None = 0.0
        elif step.shortfall is None:
            state, pause = State.RESTING, None
        else:
            state, pause = State.SHORT, self._retry
            self._retry_at = self._clock() + self._retry
            self._retry = min(self._retry * 2, LONGEST_RETRY)
        if step.moved and self._balloon.actual == decision.size:
            state, pause = State.RESTING, None
        if state in (State.RESTING, State.SHORT):
            self._balloon.rest()
        if state == State.RESTING and not self._need.relief.active:
            tries = self._coarsening.tries
            pause = self._coarsening.step()
            if self._coarsening.tries > tries:
                self._need.moved(self._clock())
        self._publish(state, decision, step.shortfall)
        return pause

    def _relieve_while_announcing(self) -> None:
        """Whoever is in need of memory gets what the device has not been told of yet: that takes no word with the host."""
        if not self._recovery.announcing:
            return
        if self._device.configuration_changed:
            self._read_target()
        self._relieve()
        decision = self._decide()
        if self._need.relief.active and decision.size < self._balloon.actual:
            floor = 0 if self._may_fall_below else self._target.size
            if self._balloon.give_way(decision.size, min(floor, decision.size)):
                self._need.moved(self._clock())

    def _relieve(self) -> None:
        wanted = self._decide().wanted
        least = 0 if self._may_fall_below else min(wanted, self._target.size)
        if self._need.look(self._clock(), self._balloon.actual, wanted, least):
            self._try_anew()

    @property
    def _may_fall_below(self) -> bool:
        """Whether need counts where the host asks for more."""
        said = self._policy.below_target
        return self._device.deflates_on_oom if said is None else said

    def _decide(self) -> Decision:
        return decide(
            Wishes(
                host_target=self._target.size,
                ram=self._ram,
                most=self._target.most,
                now=self._balloon.actual,
                mode=self._mode,
                size=self._set_size,
                lower=self._policy.lower,
                upper=self._policy.upper,
                cap=self._need.relief.cap,
                below_target=self._may_fall_below,
            )
        )

    def _publish(self, state: State, decision: Decision, shortfall: str | None) -> None:
        self._reporter.publish(state, decision, shortfall, self._mode, self._done)

    def _empty(self) -> None:
        while self._balloon.actual and self._recovery.problem is None:
            try:
                step = self._balloon.step(0)
            except DeviceFailed as error:
                # It is about to be reset for good. If that succeeds, the memory goes back; if not, it stays held.
                self._recovery.count(error.kind, str(error))
                return
            self._publish(State.DEFLATING, Decision(0, "the agent stops", 0), step.shortfall)
            if not step.moved:
                # What the guest does not take back stays held and in the state file: the next agent goes on with it.
                _log.error("%s stay in the balloon: %s", format_size(self._balloon.actual), step.shortfall)
                return
