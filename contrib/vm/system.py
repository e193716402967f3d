"""A Debian system with a disk of its own, for a VM that systemd runs: made once, and kept in the cache by what it is made from.

It is small, and complete where it matters here: systemd, udev, kmod, Python with venv, and of the kernel's modules those that
its devices need. The control program of the harness (guest.py) is a service in it, on a virtio port.
"""

from __future__ import annotations

import inspect
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from .cache import Kernel, MissingPart, cache_root, debian_kernel, digest, have_program, locked

# Where the harness speaks with its program in the guest.
PORT = "balloon.test"
PACKAGES = ("systemd", "systemd-sysv", "udev", "kmod", "python3", "python3-venv")
# For the disk to be found, before there is udev; and for all that udev and services load later.
EARLY_MODULES = ("virtio_pci", "virtio_blk", "crc32c_generic", "ext4")
LATE_MODULES = ("virtio_console", "virtio_balloon", "uio_pci_generic", "vfio_pci", "vfio_iommu_type1")
# What begins by itself and is nothing to these tests.
UNITS_OUT = ("apt-daily.timer", "apt-daily-upgrade.timer", "dpkg-db-backup.timer", "e2scrub_all.timer", "e2scrub_reap.service")
DISK_MIB = 1024
GUEST_PROGRAM = Path(__file__).with_name("guest.py")

_SERVICE = f"""\
[Unit]
Description=Control program of the test harness
# Not pulled down, nor held up, by anything that is tested.
After=sysinit.target
StartLimitIntervalSec=0

[Service]
ExecStart=/usr/bin/python3 -I -S /usr/lib/balloon-test/guest.py
StandardInput=file:/dev/virtio-ports/{PORT}
StandardOutput=file:/dev/virtio-ports/{PORT}
# The port may come later than this.
Restart=always
RestartSec=100ms
OOMScoreAdjust=-1000

[Install]
WantedBy=multi-user.target
"""
_INIT = """\
#!/bin/busybox sh
/bin/busybox mount -t devtmpfs dev /dev
for module in /modules/*; do /bin/busybox insmod $module; done
# A driver's probe may outlast insmod.
until [ -b /dev/vda ]; do /bin/busybox usleep 10000; done
/bin/busybox mount -t ext4 /dev/vda /root
/bin/busybox umount /dev
exec /bin/busybox switch_root /root /sbin/init
"""


@dataclass(frozen=True)
class System:
    """``disk`` is a raw image of an ext4 file system, to be written to in a snapshot only."""

    kernel: Kernel
    disk: Path
    initramfs: Path


def debian_system() -> System:
    """Debian's current release as a minimal system, made in a minute if it is not in the cache."""
    kernel = debian_kernel()
    recipe = inspect.getsource(sys.modules[__name__])
    folder = cache_root() / "system" / digest(recipe, GUEST_PROGRAM.read_bytes(), kernel.root.name)
    with locked(folder.parent):
        if not folder.exists():
            have_program("mmdebstrap", "mmdebstrap")
            have_program("mke2fs", "e2fsprogs")
            with tempfile.TemporaryDirectory(dir=folder.parent) as work:
                made = Path(work) / "made"
                made.mkdir()
                _make_disk(kernel, Path(work) / "root", made / "disk")
                _make_initramfs(kernel, Path(work) / "early", made / "initramfs")
                made.rename(folder)
    return System(kernel, folder / "disk", folder / "initramfs")


def _do(*argv: str | Path, cwd: Path | None = None, stdin: str | None = None) -> str:
    environment = {**os.environ, "LC_ALL": "C", "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin"}
    result = subprocess.run(argv, cwd=cwd, input=stdin, capture_output=True, text=True, check=False, env=environment)
    if result.returncode:
        raise MissingPart(f"{argv[0]}: {result.stderr.strip()[-2000:] or result.returncode}")
    return result.stdout


def _module_files(kernel: Kernel, names: tuple[str, ...]) -> list[Path]:
    """The modules and those that they need, in the order in which they can be loaded."""
    found: list[Path] = []
    for name in names:
        for line in _do("modprobe", "-d", kernel.root, "-S", kernel.version, "--show-depends", name).splitlines():
            kind, _, path = line.partition(" ")
            if kind == "insmod" and Path(path.strip()) not in found:
                found.append(Path(path.strip()))
    return found


def _make_disk(kernel: Kernel, root: Path, disk: Path) -> None:
    _do("mmdebstrap", "--quiet", "--variant=minbase", f"--include={','.join(PACKAGES)}", _suite(), root)
    for path in _module_files(kernel, EARLY_MODULES + LATE_MODULES):
        target = root / "usr" / path.relative_to(kernel.root)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    modules = Path("lib/modules", kernel.version)
    for path in (kernel.root / modules).glob("modules.[bo]*"):
        if not path.name.endswith(".bin"):
            shutil.copy(path, root / "usr" / modules)
    _do("depmod", "-b", root, kernel.version)
    program = root / "usr/lib/balloon-test/guest.py"
    program.parent.mkdir()
    shutil.copy(GUEST_PROGRAM, program)
    (root / "etc/systemd/system/balloon-test.service").write_text(_SERVICE)
    _do("systemctl", f"--root={root}", "enable", "balloon-test.service")
    _do("systemctl", f"--root={root}", "mask", *UNITS_OUT)
    # Nothing is to happen at the first boot only.
    (root / "etc/machine-id").write_text("0123456789abcdef0123456789abcdef\n")
    (root / "etc/hostname").write_text("guest\n")
    (root / "etc/fstab").write_text("")
    for unneeded in ("var/lib/apt/lists", "var/cache/apt", "usr/share/doc", "usr/share/locale"):
        shutil.rmtree(root / unneeded)
    with disk.open("wb") as file:
        file.truncate(DISK_MIB << 20)
    _do("mke2fs", "-q", "-t", "ext4", "-m", "0", "-O", "^has_journal", "-d", root, disk)
    # Gigabytes of files are nothing to leave to whoever clears up.
    shutil.rmtree(root)


def _suite() -> str:
    """The release that this machine has: its packages are what the tests are about."""
    for line in Path("/etc/os-release").read_text().splitlines():
        key, _, value = line.partition("=")
        if key == "VERSION_CODENAME":
            return value.strip('"')
    raise MissingPart("/etc/os-release has no VERSION_CODENAME: this machine runs no Debian release")


def _make_initramfs(kernel: Kernel, folder: Path, image: Path) -> None:
    for name in ("bin", "dev", "modules", "root"):
        (folder / name).mkdir(parents=True)
    shutil.copy(have_program("busybox", "busybox-static"), folder / "bin/busybox")
    for number, path in enumerate(_module_files(kernel, EARLY_MODULES)):
        shutil.copy(path, folder / f"modules/{number:02}-{path.name}")
    (folder / "init").write_text(_INIT)
    (folder / "init").chmod(0o755)
    names = "\n".join(str(path.relative_to(folder)) for path in sorted(folder.rglob("*")))
    with image.open("wb") as file:
        subprocess.run(["busybox", "cpio", "-o", "-H", "newc"], cwd=folder, input=names.encode(), stdout=file, check=True)
