"""What a test VM is made of, fetched or built once and kept in ${BALLOON_CACHE:-~/.cache/balloon-agent}."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
# Debian's meta package: it depends on the current kernel of the release.
KERNEL_META_PACKAGE = "linux-image-amd64"


class MissingPart(RuntimeError):
    """Something that a VM needs cannot be had; the message says what and why."""


@dataclass(frozen=True)
class Kernel:
    """A Debian kernel, unpacked: ``image`` to boot, its modules below ``root``."""

    version: str
    image: Path
    root: Path


def cache_root() -> Path:
    return Path(os.environ.get("BALLOON_CACHE") or Path.home() / ".cache" / "balloon-agent")


def qemu_prefix() -> Path:
    """Our patched QEMU, built if needed (minutes): bin/qemu-system-x86_64 and share/ lie below the path."""
    result = subprocess.run([REPOSITORY / "contrib/qemu/build"], stdout=subprocess.PIPE, text=True, check=False)
    if result.returncode:
        raise MissingPart(f"contrib/qemu/build ended with {result.returncode}; its messages are above")
    return Path(result.stdout.strip())


def debian_qemu() -> Path:
    """Debian's own QEMU, unpatched; installed if it is missing."""
    binary = Path("/usr/bin/qemu-system-x86_64")
    if not binary.exists():
        with _locked(cache_root() / "apt"):
            install = ("apt-get", "install", "-y", "-qq", "--no-install-recommends", "qemu-system-x86")
            try:
                _apt(*install)
            except MissingPart:
                _apt("apt-get", "update", "-qq")
                _apt(*install)
    return binary


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _apt(*arguments: str, cwd: Path | None = None) -> str:
    result = subprocess.run(
        arguments,
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "LC_ALL": "C", "DEBIAN_FRONTEND": "noninteractive"},
    )
    if result.returncode:
        raise MissingPart(f"{' '.join(arguments)}: {result.stderr.strip() or result.returncode}")
    return result.stdout


def _kernel_package() -> tuple[str, str]:
    """Name and version of the kernel package that this Debian offers now."""
    for refresh in (False, True):
        if refresh:
            with _locked(cache_root() / "apt"):
                _apt("apt-get", "update", "-qq")
        depends = re.search(r"^\s*Depends: (linux-image-\S+)", _apt_cache("depends", KERNEL_META_PACKAGE), re.MULTILINE)
        if depends:
            version = re.search(r"^Version: (\S+)", _apt_cache("show", "--no-all-versions", depends[1]), re.MULTILINE)
            if version:
                return depends[1], version[1]
    raise MissingPart(f"apt knows no package {KERNEL_META_PACKAGE}: is Debian's main archive among its sources?")


def _apt_cache(*arguments: str) -> str:
    # apt-cache fails for an unknown package, which here only means: ask again after an update.
    return subprocess.run(["apt-cache", *arguments], capture_output=True, text=True, check=False).stdout


def debian_kernel() -> Kernel:
    """Debian's current kernel, downloaded and unpacked without installing it."""
    package, package_version = _kernel_package()
    version = package.removeprefix("linux-image-")
    folder = cache_root() / "kernel" / f"{package}_{package_version}"
    kernel = Kernel(version, folder / f"boot/vmlinuz-{version}", folder)
    with _locked(folder.parent):
        if not kernel.image.exists():
            with tempfile.TemporaryDirectory(dir=folder.parent) as work:
                _apt("apt-get", "-qq", "-o", "APT::Sandbox::User=root", "download", package, cwd=Path(work))
                (archive,) = Path(work).glob("*.deb")
                unpacked = Path(work) / "root"
                subprocess.run(["dpkg", "-x", archive, unpacked], check=True)
                subprocess.run(["depmod", "-b", unpacked, version], check=True)
                shutil.rmtree(folder, ignore_errors=True)
                unpacked.rename(folder)
    return kernel
