"""Capabilities that the agent has a use for, by their numbers: include/uapi/linux/capability.h."""

from __future__ import annotations

from enum import IntEnum


class Capability(IntEnum):
    CHOWN = 0
    IPC_LOCK = 14
    SYS_MODULE = 16
    SYS_PTRACE = 19
    SYS_ADMIN = 21
    SYS_NICE = 23
    SYS_RESOURCE = 24
