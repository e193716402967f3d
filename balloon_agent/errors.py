"""Everything that can go wrong, by kind. Each message is one line: the value, the limit and the remedy."""

from __future__ import annotations


class BalloonError(Exception):
    """The base of all errors that this package raises on purpose."""


class BadInput(BalloonError):
    """What the user asked for makes no sense."""


class NotPermitted(BalloonError):
    """A privilege is missing."""


class DeviceNotFound(BalloonError):
    """There is no such device, or none at all."""


class DeviceBusy(BalloonError):
    """Somebody else uses the device."""


class DriverUnavailable(BalloonError):
    """The kernel has no driver that gives the device to userspace, or it would not take it."""


class FeatureMissing(BalloonError):
    """The device does not offer what this program needs."""


class DeviceMisbehaved(BalloonError):
    """The device said something that the specification forbids. Nothing it says is believed after that."""


class DeviceTimeout(BalloonError):
    """The device did not answer in time."""


class Shortage(BalloonError):
    """Nothing could be taken, and why."""


class Unfinished(Shortage):
    """Nothing could be taken yet, but there is more to try: others may have their turn first."""


class StillHeld(BalloonError):
    """The guest did not take memory back: it is provably still nobody's but the balloon's."""


class HolderLost(BalloonError):
    """A process that holds memory for us has died, or does not answer."""


class FrameMoved(BalloonError):
    """Held memory is not where it was. What was posted may be somebody else's: a fatal finding for that extent."""


class AgentUnreachable(BalloonError):
    """No agent answers on the control socket."""
