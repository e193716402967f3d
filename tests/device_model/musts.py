"""What the specification (virtio 1.3) and the proposal (RFC) demand of a balloon driver, as far as a device can see it.

Each is a sentence of its own words by name; the model checks it where ``must`` is called with that name.
"""

from __future__ import annotations

MUSTS = {
    "2.1.1 status": "a status bit is never cleared but by a reset",
    "2.1.1 needs reset": "a device that was seen to need a reset is not used before that",
    "2.2.1 features": "no feature is accepted that is not offered",
    "2.7 alignment": "each part of a virtqueue is aligned",
    "2.7 memory": "rings and buffers lie in memory that was shared with the device",
    "2.7.4.2 order": "device-writable buffers come after device-readable ones",
    "2.7.5 length": "no buffer is empty, and none is larger than what was shared",
    "2.7.5.2 loop": "a chain of descriptors has no loop",
    "2.7.6.1 index": "the available index only ever goes up, by as many chains as there are",
    "2.7.8 used ring": "the used ring is the device's to write",
    "2.7.10.1 flags": "the available ring's flags are 0 or 1",
    "2.7.13 in use": "a descriptor is not made available again before the device has used it",
    "2.7.13 altered": "descriptors and buffers do not change while they are the device's",
    "3.1.1 order": "ACKNOWLEDGE, DRIVER, FEATURES_OK, DRIVER_OK: in this order",
    "3.1.1 late features": "no feature is accepted after FEATURES_OK",
    "3.1.1 re-read": "FEATURES_OK is read back before anything is set up",
    "3.1.1 early notification": "no queue is notified before DRIVER_OK",
    "3.1.1 bus master": "the device may address memory only once it was reset",
    "4.1.3.1 width": "a register is accessed whole, and with its own width",
    "4.1.4.3.2 read-only": "read-only registers are not written",
    "4.1.4.3.2 configured first": "a queue is configured before it is enabled, and not after",
    "4.1.4.3.2 enable": "queue_enable is only ever set to 1",
    "4.1.4.3.2 power of two": "the queue size is a power of two",
    "4.1.4.3.2 reset": "after a reset device_status is read until it is 0, before anything else",
    "4.1.5.1.3 size": "the queue size is not above the device's",
    "4.1.5.2 notification": "a queue is notified at its own place, with its number in 16 bits",
    "5.5.2 queue": "only queues whose feature was negotiated are set up and used",
    "5.5.4 configuration": "of the configuration only actual is written, whole and in one store",
    "5.5.6 frames": "a buffer is whole 32-bit numbers of frames of the guest",
    "5.5.6 unused": "what is inflated or reported is used by nobody, and not in the balloon",
    "5.5.6.1 use before inflate ack": "a page is not used between its inflate and the acknowledgement of that",
    "5.5.6.1 deflate before inflate ack": "no page is deflated before its inflate was acknowledged",
    "5.5.6.1 deflate queue": "no page of the balloon is used that the device was not told of",
    "5.5.6.1 tell host": "with MUST_TELL_HOST no page is used before its deflate was acknowledged",
    "5.5.6.1 below target": "without DEFLATE_ON_OOM the balloon is not made smaller than the target",
    "5.5.6.1 actual": "actual is updated after every change",
    "5.5.6.3.1 one buffer": "there is at most one buffer on the statistics queue",
    "5.5.6.3.1 first buffer": "after initialisation there is a buffer on the statistics queue",
    "5.5.6.3.1 another buffer": "after the device has used it there is another buffer on the statistics queue",
    "5.5.6.3.1 whole entries": "statistics are whole entries of 10 bytes, no tag twice",
    "5.5.6.3.1 same set": "the same statistics are there every time",
    "5.5.6.7.1 use before ack": "a reported page is not used before the report was acknowledged",
    "5.5.6.7.1 writable": "reported ranges are device-writable buffers, and nothing else is",
    "6.1 version 1": "VERSION_1 is accepted if it is offered",
    "RFC entry": "an entry is whole: a frame, and a size in bytes that is a multiple of 4096, above 0 and below 4 GiB",
}


class Breach(AssertionError):
    """The driver did what the specification forbids. ``name`` tells what, as in MUSTS."""

    def __init__(self, name: str, what: str) -> None:
        super().__init__(f"{name}: {MUSTS[name]}: {what}")
        self.name = name


def must(condition: object, name: str, what: str = "") -> None:
    if not condition:
        raise Breach(name, what)
