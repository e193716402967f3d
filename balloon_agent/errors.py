"""Everything that can go wrong, by kind. Each message is one line: the value, the limit and the remedy."""

from __future__ import annotations

from dataclasses import dataclass


class BalloonError(Exception):
    """The base of all errors that this package raises on purpose.

    ``found`` has the value and the limit, ``remedy`` the way out of it, and is empty where there is none to name. The message
    is both.
    """

    def __init__(self, found: str, remedy: str = "") -> None:
        super().__init__(_joined(found, remedy))
        self.found, self.remedy = found, remedy


@dataclass(frozen=True)
class Obstacle:
    """The reason for which something cannot be had on this machine, and its remedy, as in an error that nobody has raised."""

    found: str
    remedy: str = ""

    def __str__(self) -> str:
        return _joined(self.found, self.remedy)

    @classmethod
    def of(cls, error: Exception) -> Obstacle:
        """The obstacle that an error tells of; without a remedy if it is none of ours."""
        return cls(error.found, error.remedy) if isinstance(error, BalloonError) else cls(str(error))


def _joined(found: str, remedy: str) -> str:
    return f"{found}; {remedy}" if remedy else found


class BadInput(BalloonError):
    """What the user asked for makes no sense."""


class NotPermitted(BalloonError):
    """A privilege is missing."""


class Unsupported(BalloonError):
    """This machine is none that the agent runs on, and will not be the next time."""


class DeviceNotFound(BalloonError):
    """There is no such device, or none at all."""


class DeviceNotReady(DeviceNotFound):
    """There is one, and it is too early to take it."""


class DeviceBusy(BalloonError):
    """Somebody else uses the device."""


class DriverUnavailable(BalloonError):
    """The kernel has no driver that gives the device to userspace, or it would not take it."""


class FeatureMissing(BalloonError):
    """The device does not offer what this program needs."""


class DeviceFailed(BalloonError):
    """The device cannot go on as it is: it must be reset before anything else. ``kind`` is its name in the metrics."""

    kind = "other"


class DeviceMisbehaved(DeviceFailed):
    """The device said something that the specification forbids. Nothing it says is believed after that."""

    kind = "misbehaved"


class UsedRingInvalid(DeviceMisbehaved):
    """The device returned a buffer that it was not given, or more of them than it was given."""

    kind = "used_ring"


class ConfigurationInvalid(DeviceMisbehaved):
    """A register of the device's configuration has a value out of its range."""

    kind = "configuration"


class DeviceNeedsReset(DeviceFailed):
    """The device says itself that it can only be reset."""

    kind = "needs_reset"


class DeviceWasReset(DeviceFailed):
    """Somebody else has reset the device, which has forgotten us."""

    kind = "was_reset"


class DeviceGone(DeviceFailed):
    """The device does not answer at all: all its registers read as ones."""

    kind = "gone"


class DeviceTaken(DeviceFailed):
    """Somebody else has taken the device from the driver that we reach it through."""

    kind = "taken"


class DeviceWanted(DeviceFailed):
    """The kernel asks for the device: somebody unplugs it, or takes it from its driver, and waits until we let go of it."""

    kind = "wanted"


class DeviceTimeout(DeviceFailed):
    """The device did not answer in time."""

    kind = "timeout"


class Shortage(BalloonError):
    """Nothing could be taken, and why."""


class Unfinished(Shortage):
    """Nothing could be taken yet, but there is more to try: others may have their turn first."""


class GaveWay(Unfinished):
    """Taking was given up since somebody else needs the memory: this is no time to try anything else."""


class StillHeld(BalloonError):
    """The guest did not take memory back: it is provably still nobody's but the balloon's."""


class HolderLost(BalloonError):
    """A process that holds memory for us has died, or does not answer."""


class FrameMoved(BalloonError):
    """Held memory is not where it was. What was posted may be somebody else's: a fatal finding for that extent."""


class AgentUnreachable(BalloonError):
    """No agent answers on the control socket."""
