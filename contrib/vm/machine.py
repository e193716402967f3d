"""A virtual machine for the demo, the tests and the benchmarks: booted once, then told what to run.

virtme-ng boots Debian's kernel on a copy-on-write view of this machine's own files, so this checkout and its
virtual environment are there, at the same paths. Or QEMU boots a system of its own (see system), which systemd runs and which
keeps what is written to its disk until the machine ends. QEMU's monitor is reached with qemu.qmp.
"""

from __future__ import annotations

import itertools
import json
import os
import queue
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil
from qemu.qmp.legacy import QEMUMonitorProtocol

from .cache import REPOSITORY, MissingPart, debian_kernel, qemu_prefix
from .smaps import GuestRam, mapping_at
from .system import PORT, System

BOOT_DEADLINE = 240.0  # seconds: about 10 under TCG on an idle machine, many times that on a crowded one
GUEST_PROGRAM = Path(__file__).with_name("guest.py")
# Drivers of devices that no test looks at, and what is of no use to an emulated kernel: loading them is a quarter of a boot.
UNUSED_MODULES = (
    "ahci,libahci,libata,ata_piix,scsi_mod,sr_mod,sg,psmouse,serio_raw,evdev,pcspkr,button,lpc_ich,i2c_i801,i2c_piix4,i2c_smbus,"
    "iTCO_wdt,i6300esb,watchdog,kvm,kvm_amd,kvm_intel,ccp,powernow_k8,acpi_cpufreq,crct10dif_pclmul,crc32_pclmul,crc32c_intel,"
    "ghash_clmulni_intel,sha512_ssse3,sha256_ssse3,sha1_ssse3,aesni_intel,crypto_simd,cryptd,drm,bochs"
)
# A guest that believes in fast string instructions zeroes memory a byte at a time under TCG.
TCG_CPU = "max,-erms,-fsrm"
# MiB of translated code. TCG lists it by the page that it was in; a write to that page searches the list once for each piece.
# With the default of 1 GiB the code from before a reset slows the next boot down, by minutes at worst.
TRANSLATED_MIB = 64


class GuestError(RuntimeError):
    """The guest did not do what was asked; the message carries the command and its output."""


@dataclass
class Output:
    """How a command in the guest ended."""

    argv: Sequence[str]
    code: int
    out: str
    err: str

    def check(self) -> Output:
        """Itself if the command succeeded, GuestError otherwise."""
        if self.code != 0:
            raise GuestError(f"{shlex.join(self.argv)} ended with {self.code}\n{self.out}{self.err}")
        return self


@dataclass
class Process:
    """A command in the guest. ``out`` and ``err`` grow while it runs."""

    machine: VirtualMachine
    number: int
    argv: Sequence[str]
    pid: int | None = None
    out: str = ""
    err: str = ""
    code: int | None = None
    changed: threading.Condition = field(default_factory=threading.Condition)

    def wait(self, timeout: float) -> Output:
        """Its end, within ``timeout`` seconds; GuestError after that."""
        self._until(lambda: self.code is not None, timeout, "to end")
        assert self.code is not None
        return Output(self.argv, self.code, self.out, self.err)

    def wait_for(self, text: str, timeout: float) -> None:
        """Until ``text`` stands in its output; GuestError after ``timeout`` seconds or if it ends without."""
        self._until(lambda: text in self.out + self.err or self.code is not None, timeout, f"to print {text!r}")
        if text not in self.out + self.err:
            raise GuestError(
                f"{shlex.join(self.argv)} ended with {self.code} before it printed {text!r}:\n{self.out}{self.err}"
            )

    def signal(self, number: int) -> None:
        self.machine.request(op="signal", id=self.number, number=int(number))

    def write(self, text: str) -> None:
        """To its standard input; it must have been started with ``keep_stdin``."""
        self.machine.request(op="write", id=self.number, text=text)

    def close_stdin(self) -> None:
        self.machine.request(op="close", id=self.number)

    def _until(self, done: Any, timeout: float, what: str) -> None:
        with self.changed:
            if not self.changed.wait_for(lambda: done() or self.machine.gone, timeout):
                raise GuestError(f"{shlex.join(self.argv)}: waited {timeout:g} s for it {what}\n{self.out}{self.err}")
        if not done():
            raise GuestError(
                f"the machine went away while {shlex.join(self.argv)} ran\n{self.out}{self.err}\n{self.machine.log()}"
            )


def use_kvm() -> bool:
    """KVM only where a real module serves it: /dev/kvm alone can be a facade that boots no stock kernel."""
    loaded = any(Path("/sys/module", name).exists() for name in ("kvm_intel", "kvm_amd"))
    return loaded and os.access("/dev/kvm", os.R_OK | os.W_OK)


def guard(script: str) -> Callable[[], None]:
    """A process that runs a shell script when this process dies, even by SIGKILL. Returns how to call it off."""
    end, keep = os.pipe()
    watcher = subprocess.Popen(["/bin/sh", "-c", f"read _ && exit 0; {script}"], stdin=end, start_new_session=True)
    os.close(end)

    def call_off() -> None:
        with suppress(BrokenPipeError):
            os.write(keep, b"done\n")
        os.close(keep)
        watcher.wait()

    return call_off


class VirtualMachine:
    """A context manager: the guest is up inside the ``with`` and nothing of it is left after, whatever happened.

    ``memory_mib`` and ``cpus`` size the guest; ``devices`` are ``-device`` values for QEMU, ``qemu_options`` whole
    further options, ``append`` goes to the kernel's command line. ``qemu`` is a binary; our patched one if None. With ``cache``
    the guest keeps what it has read of Python and of this checkout: programs start faster, and it has less memory to spare.
    With ``system`` it is that one which boots, and not a view of this machine.
    """

    def __init__(
        self,
        memory_mib: int = 1024,
        cpus: int = 1,
        devices: Sequence[str] = (),
        qemu_options: Sequence[str] = (),
        append: Sequence[str] = (),
        qemu: Path | None = None,
        cache: bool = False,
        system: System | None = None,
    ) -> None:
        self.memory_mib = memory_mib
        self.cpus = cpus
        self.devices = list(devices)
        self.qemu_options = list(qemu_options)
        self.append = list(append)
        self.qemu = qemu
        self.system = system
        self.cached = [REPOSITORY, Path(os.__file__).parent] if cache else []
        self.gone = False
        self._numbers = itertools.count(1)
        self._processes: dict[int, Process] = {}
        self._write_lock = threading.Lock()
        self._ready: queue.Queue[bool] = queue.Queue()
        self._stack = ExitStack()
        self._monitor_lock = threading.Lock()
        self._ram_address: int | None = None

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            self._boot(stack)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self._stack.close()

    # -- the guest ------------------------------------------------------------------------------------------------

    def start(
        self, argv: Sequence[str], *, env: Mapping[str, str] | None = None, stdin: str = "", keep_stdin: bool = False
    ) -> Process:
        """Start a command in the guest, as root, and return at once."""
        process = Process(self, next(self._numbers), list(argv))
        self._processes[process.number] = process
        self.request(op="start", id=process.number, argv=list(argv), env=dict(env or {}), stdin=stdin, keep_stdin=keep_stdin)
        return process

    def run(
        self, argv: Sequence[str], *, timeout: float = 120.0, env: Mapping[str, str] | None = None, stdin: str = ""
    ) -> Output:
        """Run a command in the guest to its end; GuestError if that takes more than ``timeout`` seconds."""
        return self.start(argv, env=env, stdin=stdin).wait(timeout)

    def shell(self, script: str, *, timeout: float = 120.0) -> str:
        """What a shell script prints in the guest; GuestError if it fails."""
        return self.run(["/bin/sh", "-ec", script], timeout=timeout).check().out

    def request(self, **message: Any) -> None:
        with self._write_lock, suppress(BrokenPipeError):
            assert self._process.stdin
            self._process.stdin.write(json.dumps(message).encode() + b"\n")
            self._process.stdin.flush()

    def reboot(self) -> None:
        """Have systemd shut the guest down and the machine boot it again. GuestError if it does not come up."""
        assert self.system is not None, "a view of this machine has nothing that would outlast it"
        self.start(["systemctl", "reboot"])
        self._wait_until_up("after a reboot")
        self._processes.clear()

    # -- the host's side ------------------------------------------------------------------------------------------

    def qmp(self, command: str, **arguments: Any) -> Any:
        """One QMP command's return value."""
        with self._monitor_lock:
            return self._monitor.cmd(command, **arguments)

    def set_balloon(self, guest_mib: int) -> None:
        """QEMU's ``balloon N``: the guest is to keep ``guest_mib``."""
        self.qmp("balloon", value=guest_mib << 20)

    def balloon_actual(self) -> int:
        """Bytes that the guest keeps, by what it told the host."""
        return int(self.qmp("query-balloon")["actual"])

    def wait_balloon(self, guest_mib: int, timeout: float) -> float:
        """Seconds until the guest has exactly ``guest_mib``; GuestError after ``timeout``."""
        wanted, begin = guest_mib << 20, time.monotonic()
        while (actual := self.balloon_actual()) != wanted:
            passed = time.monotonic() - begin
            if passed > timeout:
                raise GuestError(f"the balloon stands at {actual / 2**20:g} MiB, not {guest_mib}, after {timeout:g} s")
            # The monitor has no event that is not throttled to one a second: ask it, to within a hundredth of the time.
            time.sleep(max(0.005, passed / 100))
        return time.monotonic() - begin

    def guest_ram(self) -> GuestRam:
        """What the host spends on the guest's RAM right now."""
        if self._ram_address is None:
            answer = self.qmp("human-monitor-command", **{"command-line": "gpa2hva 0x100000"})
            self._ram_address = int(answer.split()[-1], 16)
        return mapping_at(Path(f"/proc/{self.qemu_pid}/smaps").read_text(), self._ram_address)

    def log(self) -> str:
        """The kernel's console and QEMU's messages so far."""
        return "\n".join(
            path.read_text(errors="replace") for path in (self._folder / "console", self._folder / "messages") if path.exists()
        )

    # -- boot and end ---------------------------------------------------------------------------------------------

    def _boot(self, stack: ExitStack) -> None:
        prefix = qemu_prefix() if self.qemu is None else None
        self._folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="balloon-vm-", ignore_cleanup_errors=True)))
        monitor_path = self._folder / "qmp"
        options = [f"-qmp unix:{monitor_path},server=on,wait=off", f"-serial file:{self._folder}/console"]
        if prefix is not None:
            options.append(f"-L {prefix}/share")
        kvm = use_kvm()
        if not kvm:
            options.append(f"-cpu {TCG_CPU}")
        options += [f"-device {device}" for device in self.devices]
        for number, path in enumerate(self.cached):
            options.append(f"-virtfs local,path={path},mount_tag=cached{number},security_model=none,readonly=on")
        options += self.qemu_options
        binary = str(self.qemu or f"{prefix}/bin/qemu-system-x86_64")
        argv = self._view(binary, kvm, options) if self.system is None else self._own(self.system, binary, kvm, options)
        messages = stack.enter_context((self._folder / "messages").open("wb"))
        programs = f"{Path(sys.executable).parent}:/usr/sbin:/sbin:{os.environ['PATH']}"
        environment = {**os.environ, "PATH": programs, "TERM": "dumb"}
        # virtme-ng and QEMU in a process group of their own: one signal ends them all.
        self._process = subprocess.Popen(
            argv,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=messages,
            env=environment,
            start_new_session=True,
        )
        stack.callback(self._end)
        stack.callback(guard(f"kill -s KILL -- -{self._process.pid}"))
        self._reader = threading.Thread(target=self._read_events, name="guest events", daemon=True)
        self._reader.start()
        self._wait_until_up(shlex.join(argv))
        self.qemu_pid = self._find_qemu()
        self._monitor = QEMUMonitorProtocol(str(monitor_path))
        self._monitor.connect(negotiate=True)
        stack.callback(self._monitor.close)
        for number, path in enumerate(self.cached):
            self.shell(f"mount -t 9p -o ro,version=9p2000.L,trans=virtio,msize=524288,cache=loose cached{number} {path}")

    def _view(self, binary: str, kvm: bool, options: Sequence[str]) -> list[str]:
        """What boots a view of this machine."""
        vng = Path(sys.executable).with_name("vng")
        if not vng.exists():
            raise MissingPart(f"{vng} is missing: install virtme-ng into this environment (tests/run does)")
        return [
            str(vng),
            f"--run={debian_kernel().image}",
            "--disable-microvm",
            "--disable-monitor",
            "--force-9p",
            f"--memory={self.memory_mib}M",
            f"--cpus={self.cpus}",
            f"--qemu={binary}",
            f"--rodir={REPOSITORY}",
            f"--cwd={REPOSITORY}",
            f"--exec=exec {shlex.join([sys.executable, '-I', '-S', str(GUEST_PROGRAM)])}",
            *([] if kvm else ["--disable-kvm"]),
            *(f"--append={item}" for item in (f"module_blacklist={UNUSED_MODULES}", *self.append)),
            *(f"--qemu-opts={option}" for option in options),
        ]

    def _own(self, system: System, binary: str, kvm: bool, options: Sequence[str]) -> list[str]:
        """What boots a system of its own: its disk is written to in a snapshot, which goes with QEMU."""
        accelerator = "kvm -cpu host" if kvm else f"tcg,tb-size={TRANSLATED_MIB}"
        parts = [
            f"-accel {accelerator} -machine q35 -m {self.memory_mib}M -smp {self.cpus}",
            f"-kernel {system.kernel.image} -initrd {system.initramfs} -nodefaults -display none",
            f"-drive file={system.disk},format=raw,if=none,id=root,snapshot=on -device virtio-blk-pci,drive=root",
            "-device virtio-serial-pci -chardev stdio,id=control,signal=off",
            f"-device virtserialport,chardev=control,name={PORT}",
            *options,
        ]
        line = ("console=ttyS0", "quiet", *self.append)
        return [binary, *shlex.split(" ".join(parts)), "-append", " ".join(line)]

    def _wait_until_up(self, what: str) -> None:
        try:
            up = self._ready.get(timeout=BOOT_DEADLINE)
        except queue.Empty:
            up = False
        if not up:
            raise GuestError(f"the guest did not come up within {BOOT_DEADLINE:g} s\n{what}\n{self.log()[-6000:]}")

    def _find_qemu(self) -> int:
        if self.system is not None:
            return self._process.pid
        for child in psutil.Process(self._process.pid).children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                if "qemu" in child.name():
                    return child.pid
        raise GuestError(f"no QEMU process runs below virtme-ng\n{self.log()}")

    def _read_events(self) -> None:
        assert self._process.stdout
        for line in self._process.stdout:
            try:
                event = json.loads(line)
            except ValueError:
                continue  # not ours: something wrote to the guest's console
            self._handle(event)
        self.gone = True
        self._ready.put(False)
        for process in list(self._processes.values()):
            with process.changed:
                process.changed.notify_all()

    def _handle(self, event: dict[str, Any]) -> None:
        if event["event"] == "ready":
            self._ready.put(True)
            return
        process = self._processes[event["id"]]
        with process.changed:
            match event["event"]:
                case "started":
                    process.pid = event["pid"]
                case "out":
                    process.out += event["text"]
                case "err":
                    process.err += event["text"]
                case "exit":
                    process.code = event["code"]
                    del self._processes[event["id"]]
            process.changed.notify_all()

    def _end(self) -> None:
        # A test machine has nothing to save: kill it, and wait until it is gone, so that its memory is the host's.
        # Its children are listed first: QEMU is not a child of ours, so that nobody waits for it once virtme-ng is dead.
        family: list[psutil.Process] = []
        with suppress(psutil.NoSuchProcess):
            family = psutil.Process(self._process.pid).children(recursive=True)
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        psutil.wait_procs(family, timeout=30)
        with suppress(BrokenPipeError):
            assert self._process.stdin
            self._process.stdin.close()
        if self._process.stdout:
            self._process.stdout.close()
