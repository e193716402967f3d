"""Virtual machines for the demo, the tests and the benchmarks."""

from .cache import REPOSITORY, Kernel, MissingPart, cache_root, debian_kernel, qemu_prefix
from .machine import GuestError, Output, Process, VirtualMachine, use_kvm
from .smaps import GuestRam

__all__ = [
    "REPOSITORY",
    "GuestError",
    "GuestRam",
    "Kernel",
    "MissingPart",
    "Output",
    "Process",
    "VirtualMachine",
    "cache_root",
    "debian_kernel",
    "qemu_prefix",
    "use_kvm",
]
