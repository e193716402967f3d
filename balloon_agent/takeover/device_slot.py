"""The device in our hands: locked, bound, its registers open. And another one in its place, once it was unplugged."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack, suppress
from pathlib import Path

from balloon_agent.access.binding import (
    AUTO,
    KERNEL_DRIVER,
    Binding,
    choose_driver,
    obstacle,
    take,
)
from balloon_agent.access.host import SYSFS
from balloon_agent.access.names import DRIVERS, UIO_DRIVER, VFIO_DRIVER
from balloon_agent.access.pci import PciFunction, find_balloon, functions
from balloon_agent.access.transport import PciTransport
from balloon_agent.access.uio import UioTransport
from balloon_agent.access.vfio import VfioTransport
from balloon_agent.balloon.device import BalloonDevice
from balloon_agent.errors import (
    DeviceBusy,
    DeviceFailed,
    DeviceNotFound,
    DeviceNotReady,
    DriverUnavailable,
    NotPermitted,
)
from balloon_agent.options import Options

from .lock import lock_device
from .state import StateFile

# Seconds that the kernel has to give a device that was plugged in to its own driver.
SETTLING = 1.0
_log = logging.getLogger(__name__)


class Seat:
    """Holds one function at a time, from ``take`` until ``close`` or ``vacate``.

    ``close`` gives it back to whom it was taken from; what it was like before is on record in ``state``. While ``held`` says
    that memory is held, in words, it stays with a driver for userspace: the kernel's would begin with an empty balloon.
    """

    def __init__(
        self,
        options: Options,
        state: StateFile,
        held: Callable[[], str | None] = lambda: None,
        present: Callable[[], Iterable[PciFunction]] = functions,
        clock: Callable[[], float] = time.monotonic,
        sysfs_root: Path = SYSFS,
        alive: Callable[[], None] = lambda: None,
    ) -> None:
        self._alive = alive
        self._options = options
        self._state = state
        self._held = held
        self._present = present
        self._clock = clock
        self._sysfs_root = sysfs_root
        self._stack = ExitStack()
        self.device: BalloonDevice | None = None
        self.transport: PciTransport | None = None
        self.function: PciFunction | None = None
        # One that the kernel has asked for: it may still be there for a moment, and is not to be taken again.
        self._left: int | None = None
        # Whether ``device`` speaks for the function that is being taken, or is held.
        self._attached = False
        self._leaving = False
        # The driver that was tried last, and the one that had the function before that.
        self._tried, self._found_with = "", ""
        # One that has no driver yet, and when that was seen.
        self._newcomer: tuple[int | None, float] | None = None

    # -- what the daemon waits for ---------------------------------------------------------------------------------

    @property
    def interrupt_fd(self) -> int | None:
        return None if self.transport is None else self.transport.interrupt_fd

    @property
    def request_fd(self) -> int | None:
        return None if self.transport is None else self.transport.request_fd

    def serve_interrupt(self) -> bool:
        """Whether there was an interrupt. DeviceFailed if the device is not ours any more."""
        return self.transport is not None and self.transport.interrupts() is not None

    @property
    def address(self) -> str:
        return "" if self.function is None else self.function.address

    @property
    def driver(self) -> str:
        return "" if self.transport is None else self.transport.driver

    @property
    def frames(self) -> set[int]:
        """The frames of the ring pages."""
        return set() if self.transport is None else self.transport.memory.frames

    def verify(self) -> None:
        """FrameMoved if a ring page is not where the device was told that it is."""
        if self.transport is not None:
            self.transport.memory.verify()

    # -- taking and leaving ----------------------------------------------------------------------------------------

    def take(self, function: PciFunction | None = None) -> BalloonDevice:
        """Have ``function``, or else the balloon that the options say, in our hands; not started yet.

        The same object stands for each device that follows the first. On any failure everything is as it was, but while memory
        is held the kernel's driver does not get it back.
        """
        if function is None:
            function = self._find()
            if self.device is not None:
                self._let_settle(function)
        try:
            return self._take(function, self._options.driver)
        except (DriverUnavailable, NotPermitted, DeviceBusy) as error:
            if not self._may_do_without_vfio(function):
                raise
            _log.warning("%s; then by %s", error, UIO_DRIVER)
        return self._take(function, UIO_DRIVER, instead_of=VFIO_DRIVER)

    def _may_do_without_vfio(self, function: PciFunction) -> bool:
        """Whether vfio was chosen for being the better way, and there is another; nobody else has the function."""
        options = self._options
        return (
            self._tried == VFIO_DRIVER
            and options.driver == AUTO
            and not options.vfio_noiommu
            # With vfio it is if memory is held: see ``_bind``.
            and self._found_with != VFIO_DRIVER
            and function.driver in (None, KERNEL_DRIVER, VFIO_DRIVER)
            and obstacle(function, UIO_DRIVER, self._sysfs_root) is None
        )

    def _take(self, function: PciFunction, wanted: str, instead_of: str | None = None) -> BalloonDevice:
        self._attached, self._tried, self._found_with = False, "", function.driver or ""
        with ExitStack() as stack:
            stack.callback(lock_device(function.address).close)
            self._bind(function, wanted, instead_of, stack)
            self.function = function
            stack.callback(self._forget)
            # Whatever is open then: nobody is asked to take it from us while it is.
            stack.callback(self._close_transport)
            self.transport = transport = self._open(function)
            if self.device is None:
                self.device = BalloonDevice(
                    transport, self._options.channel, self._options.frames_per_buffer, alive=self._alive
                )
            else:
                self.device.attach(transport)
            self._attached = True
            # Whatever an earlier driver has left going: from here on it leaves memory alone, or we leave it alone.
            self.device.stop()
            self._stack = stack.pop_all()
        self._left = None
        return self.device

    def _let_settle(self, function: PciFunction) -> None:
        """DeviceNotReady while the kernel is about to give a newcomer a driver: it is announced before that."""
        if function.driver is not None:
            return
        now, identity = self._clock(), function.identity
        if self._newcomer is None or self._newcomer[0] != identity:
            self._newcomer = (identity, now)
        if now - self._newcomer[1] < SETTLING:
            raise DeviceNotReady(f"{function.address} has just been plugged in")

    def forget_absent(self) -> None:
        """Strike out what is on record of devices that are not there any more."""
        there = {function.address for function in self._present()}
        for address in self._state.previous_drivers.keys() - there:
            _log.info("%s is not there any more", address)
            self._state.forget_driver(address)

    def _find(self) -> PciFunction:
        present = list(self._present())
        left = [each for each in present if self._left is not None and each.identity == self._left]
        try:
            return find_balloon(self._options.device, [each for each in present if each not in left])
        except DeviceNotFound as error:
            if not left:
                raise
            raise DeviceNotFound(
                f"{left[0].address} was taken from the agent (it has {left[0].driver or 'no driver'} now), and is left alone: "
                "restart the agent for it to have it again"
            ) from error

    def _open(self, function: PciFunction) -> PciTransport:
        if function.driver == VFIO_DRIVER:
            return VfioTransport(function, noiommu=self._options.vfio_noiommu)
        return UioTransport(function)

    def _bind(self, function: PciFunction, wanted: str, instead_of: str | None, stack: ExitStack) -> None:
        state, current, bus = self._state, function.driver, self._sysfs_root / "bus/pci"
        self._tried = driver = choose_driver(function, wanted, self._sysfs_root, noiommu=self._options.vfio_noiommu)
        # One that follows another was plugged in, and would be the kernel's by now.
        default = KERNEL_DRIVER if current is None and self.device is not None else current
        known = state.previous_drivers.get(function.address, default)
        # Without a driver it is if somebody died while it was handed over.
        home = known if current in (*DRIVERS, None) else current
        on_record = (known,) if function.address in state.previous_drivers else None
        state.record_driver(function.address, home)
        try:
            # If that fails with memory held, it goes back to nobody rather than to the kernel.
            take(function, driver, None if self._held() else home, bus, instead_of=instead_of)
        except BaseException:
            if on_record is None:
                state.forget_driver(function.address)
            else:
                state.record_driver(function.address, *on_record)
            raise
        identity = function.identity

        def give_back() -> None:
            # One that an earlier agent left with us may have been left so because it could not be reset.
            quiet = not self._attached or self.device is None or self.device.quiet
            if not self._attached and current == driver:
                # It was not got at, and nothing was changed: it is with whom it was.
                if on_record is None:
                    state.forget_driver(function.address)
                return
            if not quiet or self.transport is not None:
                # The kernel's driver would wait for its reset for ever, in the kernel.
                _log.error("%s is left with %s: it was not reset", function.address, function.driver or "no driver")
                return
            if not self._leaving and (held := self._held()):
                # Also where this agent knows nothing of what is held, or has failed before it could.
                _log.info("%s stays with %s while memory is held: %s", function.address, function.driver, held)
                return
            if function.identity == identity and identity != self._left:
                Binding(function, driver, home, bus).restore()
            state.forget_driver(function.address)

        stack.callback(give_back)

    def _close_transport(self) -> None:
        if self.transport is None:
            return
        if self._attached and self.device is not None:
            # Rings that the device may still write to stay where they are until this process is no more.
            if not self.device.quiet and self.frames:
                return
            self.device.detach()
        self.transport.close()
        self.transport = None

    def _forget(self) -> None:
        self.function = None

    def vacate(self) -> bool:
        """Let go of a device that is gone or wanted by the kernel, if it cannot act on memory any more; whether that is so."""
        if self.function is None:
            return True
        assert self.device is not None
        with suppress(DeviceFailed):
            self.device.stop()
        return self.device.quiet

    def leave(self) -> None:
        """After ``vacate``: close everything. The function is given back to no driver."""
        if self.function is not None:
            self._left = self.function.identity
        self._leaving = True
        try:
            self.close()
        finally:
            self._leaving = False

    def close(self) -> None:
        """Idempotent. The device must have been reset, or it stays where it is."""
        self._stack.close()
