"""Virtual machines for the demo, the tests and the benchmarks."""

from .cache import REPOSITORY, Kernel, MissingPart, Prometheus, cache_root, debian_kernel, prometheus, qemu_prefix, wheels
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
    "Prometheus",
    "VirtualMachine",
    "cache_root",
    "debian_kernel",
    "prometheus",
    "qemu_prefix",
    "use_kvm",
    "wheels",
]
