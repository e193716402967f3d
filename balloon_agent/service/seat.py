"""The device in our hands: locked, bound, its registers open. And another one in its place, once it was unplugged."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from contextlib import ExitStack, suppress

from balloon_agent.access.binding import choose_driver, take
from balloon_agent.access.names import DRIVERS, VFIO_DRIVER
from balloon_agent.access.pci import PciFunction, find_balloon, functions
from balloon_agent.access.transport import PciTransport
from balloon_agent.access.uio import UioTransport
from balloon_agent.access.vfio import VfioTransport
from balloon_agent.balloon.device import BalloonDevice
from balloon_agent.errors import DeviceFailed, DeviceNotFound

from .lock import lock_device
from .options import Options
from .state import State

_log = logging.getLogger(__name__)


class Seat:
    """Holds one function at a time, from ``take`` until ``close`` or ``vacate``.

    ``close`` gives it back to whom it was taken from, unless it ``stays``; what it was like before is on record in ``state``.
    """

    def __init__(
        self,
        options: Options,
        state: State,
        stays: Callable[[], bool] = lambda: False,
        present: Callable[[], Iterable[PciFunction]] = functions,
    ) -> None:
        self._options = options
        self._state = state
        self._stays = stays
        self._present = present
        self._stack = ExitStack()
        self.device: BalloonDevice | None = None
        self.transport: PciTransport | None = None
        self.function: PciFunction | None = None
        # One that the kernel has asked for: it may still be there for a moment, and is not to be taken again.
        self._left: int | None = None
        # Whether ``device`` speaks for the function that is being taken, or is held.
        self._attached = False

    # -- what the daemon waits for ---------------------------------------------------------------------------------

    @property
    def interrupt_fd(self) -> int | None:
        return None if self.transport is None else self.transport.interrupt_fd

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

        The same object stands for each device that follows the first. On any failure everything is as it was.
        """
        if function is None:
            function = self._find()
        self._attached = False
        with ExitStack() as stack:
            stack.callback(lock_device(function.address).close)
            self._bind(function, stack)
            self.function = function
            stack.callback(self._forget)
            self.transport = transport = self._open(function)
            stack.callback(self._close_transport)
            if self.device is None:
                self.device = BalloonDevice(transport, self._options.channel, self._options.frames_per_buffer)
            else:
                self.device.attach(transport)
            self._attached = True
            # Whatever an earlier driver has left going: from here on it leaves memory alone, or we leave it alone.
            self.device.stop()
            self._stack = stack.pop_all()
        self._left = None
        return self.device

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

    def _bind(self, function: PciFunction, stack: ExitStack) -> None:
        state, current = self._state, function.driver
        driver = choose_driver(function, self._options.driver, noiommu=self._options.vfio_noiommu)
        known = state.previous_drivers.get(function.address, current)
        on_record = (known,) if function.address in state.previous_drivers else None
        # Without a driver it is if somebody died while it was handed over.
        state.record_driver(function.address, known if current in (*DRIVERS, None) else current)
        try:
            binding = take(function, driver, known)
        except BaseException:
            if on_record is None:
                state.forget_driver(function.address)
            else:
                state.record_driver(function.address, *on_record)
            raise
        identity = function.identity

        def give_back() -> None:
            # One that an earlier agent left with us may have been left so because it could not be reset.
            quiet = self.device.quiet if self._attached and self.device is not None else current not in DRIVERS
            if not quiet:
                # The kernel's driver would wait for its reset for ever, in the kernel.
                _log.error("%s is left with %s: it was not reset", function.address, function.driver or "no driver")
                return
            if self._stays():
                # The kernel's driver would begin with an empty balloon, and the host with what is held already.
                _log.info("%s stays with %s", function.address, function.driver)
                return
            if function.identity == identity and identity != self._left:
                binding.restore()
            state.forget_driver(function.address)

        stack.callback(give_back)

    def _close_transport(self) -> None:
        assert self.transport is not None
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
        self.close()

    def close(self) -> None:
        """Idempotent. The device must have been reset, or it stays where it is."""
        self._stack.close()
