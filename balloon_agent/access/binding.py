"""Taking a PCI function from its driver, and giving it back.

What was there before is remembered by the caller (``previous``) before anything changes, and comes back on any failure.
"""

from __future__ import annotations

import logging
import subprocess
from pathlib import Path

from balloon_agent.errors import DeviceBusy, DriverUnavailable, NotPermitted

from .pci import PciFunction

UIO_DRIVER = "uio_pci_generic"
# Whom we take a balloon from without asking: the kernel's own driver, ourselves, nobody.
KERNEL_DRIVER = "virtio-pci"
_log = logging.getLogger(__name__)


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text)
    except PermissionError as error:
        raise NotPermitted(f"{path}: {error.strerror}; run as root, and see whether the kernel is locked down") from error


def require_driver(driver: str, bus: Path) -> None:
    """Make sure that the kernel has ``driver``, loading its module if need be. DriverUnavailable if it has not."""
    folder = bus / "drivers" / driver
    if folder.exists():
        return
    try:
        result = subprocess.run(["modprobe", driver], capture_output=True, text=True, timeout=30, check=False)
        said = result.stderr.strip().splitlines()[-1] if result.stderr.strip() else f"exit code {result.returncode}"
    except (OSError, subprocess.TimeoutExpired) as error:
        said = str(error)
    if not folder.exists():
        raise DriverUnavailable(
            f"the kernel has no driver {driver} ({said}): "
            "install the kernel's full module package, or a kernel with CONFIG_UIO_PCI_GENERIC"
        )


class Binding:
    """A function in the hands of ``driver``, until ``restore``. ``previous`` is whom it belonged to."""

    def __init__(self, function: PciFunction, driver: str, previous: str | None, bus: Path) -> None:
        self.function = function
        self.driver = driver
        self.previous = previous
        self._bus = bus

    def restore(self) -> None:
        """Give the function back to its previous driver. Idempotent."""
        if self.function.driver == self.previous:
            return
        _hand_over(self.function, self.previous, self._bus)
        _log.info("%s is back with %s", self.function.address, self.previous or "no driver")


def take(
    function: PciFunction, driver: str = UIO_DRIVER, previous: str | None = None, bus: Path = Path("/sys/bus/pci")
) -> Binding:
    """Bind ``function`` to ``driver``; on any failure its old driver is bound again.

    ``previous`` says whom it belonged to if it is bound to ``driver`` already (an agent died and left it so).
    The kernel's balloon driver gives its pages back to the guest when it is unbound.
    """
    current = function.driver
    if current not in (None, KERNEL_DRIVER, driver):
        raise DeviceBusy(
            f"{function.address} is bound to {current}, which may be using it: "
            f"unbind it first (echo {function.address} > {function.path}/driver/unbind)"
        )
    require_driver(driver, bus)
    if current == driver:
        return Binding(function, driver, previous, bus)
    # Nobody has it if somebody was killed while it was handed over: then it is still whose it was before that.
    binding = Binding(function, driver, previous if current is None else current, bus)
    try:
        _hand_over(function, driver, bus)
    except BaseException:
        binding.restore()
        raise
    _log.info("%s taken from %s by %s", function.address, current or "no driver", driver)
    return binding


def _hand_over(function: PciFunction, driver: str | None, bus: Path) -> None:
    """Unbind whoever has it, and have the kernel probe ``driver`` for it; no driver at all if None."""
    override = function.path / "driver_override"
    _write(override, f"{driver}\n" if driver else "\n")
    try:
        if function.driver is not None:
            _write(function.path / "driver/unbind", function.address)
        if driver is not None:
            try:
                _write(bus / "drivers_probe", function.address)
            except OSError as error:
                raise DriverUnavailable(f"{driver} did not take {function.address}: {error.strerror}; see dmesg") from error
            if function.driver != driver:
                raise DriverUnavailable(
                    f"{driver} did not take {function.address} (it has {function.driver or 'no driver'}); see dmesg"
                )
    finally:
        # An override left behind would bind the function to us again at the next rescan.
        _write(override, "\n")
