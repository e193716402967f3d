"""What a test VM is made of, fetched or built once and kept in ${BALLOON_CACHE:-~/.cache/balloon-agent}."""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
# Debian's meta package: it depends on the current kernel of the release.
KERNEL_META_PACKAGE = "linux-image-amd64"
PROMETHEUS_PACKAGE = "prometheus"


class MissingPart(RuntimeError):
    """Something that a VM needs cannot be had; the message says what and why."""


@dataclass(frozen=True)
class Prometheus:
    """Debian's Prometheus, unpacked: both programs run from where they are, and guests see them at the same paths."""

    server: Path
    promtool: Path


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
        _install("qemu-system-x86")
    return binary


def have_program(name: str, package: str) -> Path:
    """Where a program is, installed if it is missing."""
    places = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    if shutil.which(name, path=places) is None:
        _install(package)
    found = shutil.which(name, path=places)
    if found is None:
        raise MissingPart(f"{package} has no program {name}")
    return Path(found)


def _install(package: str) -> None:
    with locked(cache_root() / "apt"):
        install = ("apt-get", "install", "-y", "-qq", "--no-install-recommends", package)
        try:
            _apt(*install)
        except MissingPart:
            _apt("apt-get", "update", "-qq")
            _apt(*install)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Nobody else makes anything in a folder of the cache meanwhile."""
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


def _refreshing(look: Callable[[], tuple[str, str] | None], package: str) -> tuple[str, str]:
    """Name and version that ``look`` finds in what apt knows, or else once that has been fetched anew."""
    found = look()
    if found is None:
        with locked(cache_root() / "apt"):
            _apt("apt-get", "update", "-qq")
        found = look()
    if found is None:
        raise MissingPart(f"apt knows no package {package}: is Debian's main archive among its sources?")
    return found


def _offered(package: str) -> tuple[str, str] | None:
    """Name and version of a package that this Debian offers now."""
    version = re.search(r"^Version: (\S+)", _apt_cache("show", "--no-all-versions", package), re.MULTILINE)
    return (package, version[1]) if version else None


def _offered_kernel() -> tuple[str, str] | None:
    depends = re.search(r"^\s*Depends: (linux-image-\S+)", _apt_cache("depends", KERNEL_META_PACKAGE), re.MULTILINE)
    return _offered(depends[1]) if depends else None


def _apt_cache(*arguments: str) -> str:
    # apt-cache fails for an unknown package, which here only means: ask again after an update.
    return subprocess.run(["apt-cache", *arguments], capture_output=True, text=True, check=False).stdout


def _unpack(package: str, folder: Path, finish: Callable[[Path], object] = lambda unpacked: None) -> None:
    """Have a package's files below ``folder``, without installing it. ``finish`` makes them complete before they are there."""
    with tempfile.TemporaryDirectory(dir=folder.parent) as work:
        _apt("apt-get", "-qq", "-o", "APT::Sandbox::User=root", "download", package, cwd=Path(work))
        (archive,) = Path(work).glob("*.deb")
        unpacked = Path(work) / "root"
        subprocess.run(["dpkg", "-x", archive, unpacked], check=True)
        finish(unpacked)
        shutil.rmtree(folder, ignore_errors=True)
        unpacked.rename(folder)


def debian_kernel() -> Kernel:
    """Debian's current kernel, downloaded and unpacked without installing it."""
    package, package_version = _refreshing(_offered_kernel, KERNEL_META_PACKAGE)
    version = package.removeprefix("linux-image-")
    folder = cache_root() / "kernel" / f"{package}_{package_version}"
    kernel = Kernel(version, folder / f"boot/vmlinuz-{version}", folder)
    with locked(folder.parent):
        if not kernel.image.exists():
            _unpack(package, folder, lambda unpacked: subprocess.run(["depmod", "-b", unpacked, version], check=True))
    return kernel


def prometheus() -> Prometheus:
    """Debian's Prometheus, downloaded and unpacked: installing it would start it."""
    package, version = _refreshing(lambda: _offered(PROMETHEUS_PACKAGE), PROMETHEUS_PACKAGE)
    folder = cache_root() / "prometheus" / f"{package}_{version}"
    found = Prometheus(folder / "usr/bin/prometheus", folder / "usr/bin/promtool")
    with locked(folder.parent):
        if not found.promtool.exists():
            _unpack(package, folder, _check_libraries)
    return found


def _check_libraries(unpacked: Path) -> None:
    """Only the C library is asked for by Debian's build: should that change, say so here and not when it does not start."""
    for program in (unpacked / "usr/bin").iterdir():
        listed = subprocess.run(["ldd", program], capture_output=True, text=True, check=False).stdout
        lacking = [line.split()[0] for line in listed.splitlines() if "not found" in line]
        if lacking:
            raise MissingPart(f"{program.name} of {PROMETHEUS_PACKAGE} needs {', '.join(lacking)}: install what has it")


def digest(*parts: str | bytes) -> str:
    """A name for what is made of these."""
    return hashlib.sha256(b"\0".join(part.encode() if isinstance(part, str) else part for part in parts)).hexdigest()[:16]


def wheels(folder: Path) -> Path:
    """Below ``folder``, as wheels: this checkout, what it needs, and what makes it, in the versions that deploy/ pins."""
    locks = sorted((REPOSITORY / "deploy").glob("*.lock"))
    kept = cache_root() / "wheels" / digest(*(path.read_bytes() for path in locks), sys.version)
    pip = (sys.executable, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check", "--no-deps")
    made = folder / "wheels"
    made.mkdir()
    _pip(*pip, "--no-build-isolation", "--wheel-dir", str(made), str(REPOSITORY))
    with locked(kept.parent):
        if not kept.exists():
            with tempfile.TemporaryDirectory(dir=kept.parent) as work:
                files = [word for path in locks for word in ("-r", str(path))]
                _pip(*pip, "--require-hashes", "--only-binary", ":all:", "--wheel-dir", f"{work}/all", *files)
                Path(work, "all").rename(kept)
    for wheel in kept.iterdir():
        shutil.copy(wheel, made)
    return made


def _pip(*argv: str) -> None:
    result = subprocess.run(argv, capture_output=True, text=True, check=False)
    if result.returncode:
        raise MissingPart(f"{' '.join(argv)}: {result.stderr.strip() or result.returncode}")
