"""The C library calls that Python does not wrap, with errno turned into OSError.

mmap'd memory is handled by address here, not through Python's ``mmap`` objects: those cannot be unmapped in part.
System call numbers come from python-ptrace's tables, which know them for each architecture.
"""

from __future__ import annotations

import ctypes
import importlib
import os
from contextlib import suppress

# CDLL(None) is the C library this interpreter already has: no search for it, which would start a process.
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long)
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_libc.mlock.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_libc.munlock.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_libc.mlockall.argtypes = (ctypes.c_int,)
_libc.syscall.restype = ctypes.c_long

PROT_READ_WRITE = 1 | 2
MAP_SHARED, MAP_PRIVATE, MAP_ANONYMOUS, MAP_NORESERVE = 0x01, 0x02, 0x20, 0x4000
# include/uapi/linux/memfd.h: the size of huge pages is in the flags, as its logarithm.
_MFD_CLOEXEC, _MFD_HUGETLB, _MFD_HUGE_SHIFT = 0x1, 0x4, 26
_MAP_FAILED = ctypes.c_void_p(-1).value

# include/uapi/asm-generic/mman-common.h
MADV_DONTNEED, MADV_DONTFORK, MADV_HUGEPAGE, MADV_NOHUGEPAGE, MADV_DONTDUMP, MADV_POPULATE_WRITE = 4, 10, 14, 15, 16, 23
MCL_CURRENT, MCL_FUTURE, MCL_ONFAULT = 1, 2, 4

# malloc.h of glibc
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8
LARGE = 128 << 10  # bytes

_MACHINES = {"x86_64": "x86_64", "aarch64": "aarch64", "riscv64": "riscv64", "ppc64le": "powerpc64"}


def _check(result: int, call: str) -> int:
    if result == -1:
        number = ctypes.get_errno()
        raise OSError(number, f"{call}: {os.strerror(number)}")
    return result


_numbers: dict[str, int] = {}


def use_numbers(numbers: dict[str, int]) -> None:
    """Take system call numbers from somebody who has looked them up: a holder is spared the tables, and their memory."""
    _numbers.update(numbers)


def syscall_number(name: str) -> int:
    """A system call's number on this machine. OSError(ENOSYS) if it is not known here."""
    if name in _numbers:
        return _numbers[name]
    module = _MACHINES.get(os.uname().machine)
    if module is not None:
        for number, known in importlib.import_module(f"ptrace.syscall.linux.{module}").SYSCALL_NAMES.items():
            if known == name:
                _numbers[name] = int(number)
                return int(number)
    raise OSError(38, f"{name}: not known for {os.uname().machine}")


def syscall(name: str, *arguments: int) -> int:
    """A raw system call; OSError with its name on failure."""
    return _check(_libc.syscall(ctypes.c_long(syscall_number(name)), *(ctypes.c_long(value) for value in arguments)), name)


def map_anonymous(size: int) -> int:
    """The address of ``size`` bytes of private memory, not yet there: kept out of core dumps and of children."""
    return _map(size, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1)


def map_shared(fd: int, size: int) -> int:
    """The address of the first ``size`` bytes of a file, shared with it: kept out of core dumps and of children."""
    return _map(size, MAP_SHARED, fd)


def _map(size: int, flags: int, fd: int) -> int:
    address = _libc.mmap(None, size, PROT_READ_WRITE, flags, fd, 0)
    if address == _MAP_FAILED:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), f"mmap of {size} bytes")
    try:
        # A fork would split and copy pinned huge pages; a core dump would read what the host has taken.
        advise(address, size, MADV_DONTFORK)
        advise(address, size, MADV_DONTDUMP)
    except BaseException:
        unmap(address, size)
        raise
    return int(address)


def memfd_huge(name: str, size: int) -> int:
    """A file descriptor of an empty file in huge pages of ``size`` bytes. OSError ENOENT, ENODEV if there are none such."""
    return os.memfd_create(name, _MFD_CLOEXEC | _MFD_HUGETLB | (size.bit_length() - 1) << _MFD_HUGE_SHIFT)


def unmap(address: int, size: int) -> None:
    _check(_libc.munmap(address, size), "munmap")


def advise(address: int, size: int, advice: int) -> None:
    _check(_libc.madvise(address, size, advice), f"madvise({advice})")


def lock(address: int, size: int) -> None:
    """Keep memory from being swapped out. It may be moved all the same."""
    _check(_libc.mlock(address, size), "mlock")


def unlock(address: int, size: int) -> None:
    """Let memory be swapped out, and given up, again."""
    _check(_libc.munlock(address, size), "munlock")


def lock_all_memory(*, shares: bool = False) -> None:
    """Keep every page of this process, present and future, once it has been touched; and of the files it is made of, all.

    Code that has not run yet would have to be read in when it does: just when memory is wanted, and has run out. A process that
    ``shares`` its pages with its parent goes on doing so: what it may write to would be copied if all of it were to be there.
    """
    _check(_libc.mlockall(MCL_CURRENT | MCL_FUTURE | MCL_ONFAULT), "mlockall")
    with open("/proc/self/maps", encoding="utf-8", errors="surrogateescape") as maps:
        mappings = [line.split(maxsplit=5) for line in maps]
    for addresses, access, _, _, _, *path in mappings:
        # Not what is shared: buffers and the like have the name of a file, too.
        if access[0] == "r" and access[3] == "p" and not (shares and access[1] == "w") and path and path[0].startswith("/"):
            begin, end = (int(address, 16) for address in addresses.split("-"))
            # As much as there is: it can be gone by now, or its file be shorter.
            with suppress(OSError):
                lock(begin, end - begin)


def bound_heap() -> None:
    """Have the allocator give back to the kernel what has been freed, as far as it can. To be called before there are threads.

    Locked memory goes back by munmap and brk alone: MADV_DONTNEED, which glibc uses for a thread's own arena (shrink_heap() in
    malloc/arena.c), is refused (madvise_dontneed_free_valid_vma() in mm/madvise.c). So there is one arena, the one that brk
    shrinks; and what is large is always mapped, whereas glibc would raise that bound, up to 32 MiB, as such memory is freed.
    """
    for parameter, value in ((_M_ARENA_MAX, 1), (_M_MMAP_THRESHOLD, LARGE), (_M_TRIM_THRESHOLD, LARGE)):
        # Another C library than glibc has none of this.
        with suppress(AttributeError):
            _libc.mallopt(parameter, value)


def view(address: int, size: int) -> memoryview:
    """A view of mapped memory. Whoever unmaps it must have dropped the view before."""
    return memoryview((ctypes.c_char * size).from_address(address)).cast("B")


def perf_event_open(attributes: bytes, cpu: int, flags: int) -> int:
    """A descriptor for the events that ``attributes`` (struct perf_event_attr) describe, of all processes on one processor."""
    buffer = ctypes.create_string_buffer(attributes, len(attributes))
    return syscall("perf_event_open", ctypes.addressof(buffer), -1, cpu, -1, flags)
