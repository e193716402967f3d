"""What an agent can be told: each option is declared once, and is a flag of the command line and a key of a file.

The file is flat TOML; a flag says more than the file, and the file more than the default.
"""

from __future__ import annotations

import grp
import re
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from balloon_agent.access.names import DRIVERS, UIO_DRIVER, VFIO_DRIVER
from balloon_agent.balloon.channels import AUTO, CHANNEL_NAMES, FRAMES_PER_BUFFER, FRAMES_PER_HUGE_BUFFER
from balloon_agent.errors import BadInput
from balloon_agent.memory.sources.source import DEFAULT_SOURCES, SOURCE_NAMES
from balloon_agent.paths import DEFAULT_RUN_DIR
from balloon_agent.size import parse_size
from balloon_agent.sizing.relief import COOLDOWN

DEFLATE, KEEP = "deflate", "keep"
READ, CHANGE = "read", "change"
ALWAYS, NEVER = "always", "never"
LONGEST_FILE = 1 << 20
LONGEST_COOLDOWN = 3600.0


@dataclass(frozen=True)
class Options:
    """Sizes in bytes, times in seconds. None is what the option's help calls its default."""

    device: str | None = None
    driver: str = AUTO
    vfio_noiommu: bool = False
    run_dir: Path = Path(DEFAULT_RUN_DIR)
    sources: Sequence[str] = DEFAULT_SOURCES
    channel: str = AUTO
    frames_per_buffer: int = FRAMES_PER_BUFFER
    allow_unpinned: bool = False
    reserve: int | None = None
    lower_limit: int = 0
    upper_limit: int | None = None
    relief: bool = True
    relief_below_target: str = AUTO
    relief_cooldown: float = COOLDOWN
    overcommit: bool = True
    on_stop: str = DEFLATE
    control_group: str | None = None
    control_group_may: str = READ
    metrics_listen: str = "127.0.0.1:9758"
    metrics_certificate: Path | None = None
    metrics_key: Path | None = None
    metrics_client_ca: Path | None = None
    verbose: bool = False


@dataclass(frozen=True)
class Option:
    """``read`` makes the value of what a flag (a string) or the file says; BadInput if it makes no sense. None for a switch.

    ``reloads`` if it can change while the agent runs.
    """

    name: str
    help: str
    read: Callable[[object], Any] | None = None
    metavar: str | None = None
    choices: Sequence[Any] = ()
    reloads: bool = False

    @property
    def field(self) -> str:
        """Its name in Options."""
        return self.name.replace("-", "_")

    @property
    def default(self) -> Any:
        return getattr(_DEFAULTS, self.field)

    def value(self, given: object) -> Any:
        """What is given, as Options has it. BadInput with the value and the remedy."""
        if self.read is None:
            if not isinstance(given, bool):
                raise BadInput(f"{given!r} is not true or false")
            return given
        value = self.read(given)
        if self.choices and value not in self.choices:
            raise BadInput(f"{given!r} is none of {', '.join(str(choice) for choice in self.choices)}")
        return value


_DEFAULTS = Options()


def _text(given: object) -> str:
    if not isinstance(given, str) or not given.strip() or not given.isprintable():
        raise BadInput(f"{given!r} is no text: write it in quotes")
    return given.strip()


def _path(given: object) -> Path:
    path = Path(_text(given))
    if not path.is_absolute():
        raise BadInput(f"{given!r} is no absolute path: it would depend on where the agent was started")
    return path


def _size(given: object) -> int:
    if isinstance(given, int) and not isinstance(given, bool):
        given = str(given)
    return parse_size(_text(given))


def _number(given: object) -> int:
    try:
        return int(_text(given)) if isinstance(given, str) else _whole(given)
    except ValueError as error:
        raise BadInput(f"{given!r} is no whole number") from error


def _whole(given: object) -> int:
    if not isinstance(given, int) or isinstance(given, bool):
        raise ValueError
    return given


def _seconds(given: object) -> float:
    try:
        if isinstance(given, bool) or not isinstance(given, int | float | str):
            raise ValueError
        seconds = float(given)
    except (ValueError, OverflowError) as error:
        raise BadInput(f"{given!r} is no number of seconds") from error
    if not 0 < seconds <= LONGEST_COOLDOWN:
        raise BadInput(f"{given!r} is not more than 0 and at most {LONGEST_COOLDOWN:g} seconds")
    return seconds


def _sources(given: object) -> tuple[str, ...]:
    names = given.split(",") if isinstance(given, str) else given
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise BadInput(f"{given!r} is no list of sources: known are {', '.join(SOURCE_NAMES)}")
    wanted = tuple(name.strip() for name in names if name.strip())
    unknown = [name for name in wanted if name not in SOURCE_NAMES]
    if unknown or not wanted:
        raise BadInput(f"unknown source {', '.join(unknown) or '(none)'}: known are {', '.join(SOURCE_NAMES)}")
    return wanted


def _group(given: object) -> str:
    name = _text(given)
    try:
        grp.getgrnam(name)
    except KeyError as error:
        raise BadInput(f"there is no group {name!r}: groupadd --system {name}") from error
    return name


def parse_listen(text: str) -> tuple[str, int]:
    """``127.0.0.1:9758`` or ``[::1]:9758`` as host and port. BadInput for anything else."""
    host, _, port = text.rpartition(":")
    if not host or not port.isdecimal() or not 0 <= int(port) <= 65535:
        raise BadInput(f"{text!r} is no address to listen on: write HOST:PORT, such as 127.0.0.1:9758, with a port up to 65535")
    return host.strip("[]"), int(port)


def _listen(given: object) -> str:
    parse_listen(_text(given))
    return _text(given)


OPTIONS = (
    Option("device", "PCI address of the balloon (default: the only one there is)", _text, "ADDRESS"),
    Option(
        "driver",
        f"how to reach the balloon ({AUTO}: {VFIO_DRIVER} where an IOMMU gives it a group of its own, else {UIO_DRIVER})",
        _text,
        "NAME",
        (AUTO, *DRIVERS),
    ),
    Option("vfio-noiommu", f"use {VFIO_DRIVER} without an IOMMU, where the kernel allows that: the device can write anywhere"),
    Option("run-dir", "where sockets and state are; root's, and closed to others", _path, "DIR"),
    Option(
        "sources",
        f"where to take memory from, the first first, of {', '.join(SOURCE_NAMES)}",
        _sources,
        "LIST",
        reloads=True,
    ),
    Option(
        "channel",
        "which of the device's queues carry memory (auto: the best that the device offers)",
        _text,
        "NAME",
        (AUTO, *CHANNEL_NAMES),
    ),
    Option(
        "frames-per-buffer",
        f"on the classic queues; {FRAMES_PER_HUGE_BUFFER} for a host whose memory lies in 2 MiB pages",
        _number,
        "N",
        (FRAMES_PER_BUFFER, FRAMES_PER_HUGE_BUFFER),
    ),
    Option("allow-unpinned", "where io_uring is forbidden, hold memory without a pin, at the guest's peril: for experiments"),
    Option(
        "reserve",
        "memory above the kernel's own reserves that inflating leaves (default: 5 % of RAM, or 64M if that is more)",
        _size,
        "SIZE",
        reloads=True,
    ),
    Option("lower-limit", "the balloon is to have that much, whoever asks for less", _size, "SIZE", reloads=True),
    Option(
        "upper-limit",
        "the balloon is to have no more than that, whoever asks (default: all of RAM)",
        _size,
        "SIZE",
        reloads=True,
    ),
    Option("relief", "shrink when the guest runs short of memory, and return later"),
    Option(
        "relief-below-target",
        "whether to shrink even below the host's target (auto: if the host offers deflate-on-oom)",
        _text,
        "WHEN",
        (AUTO, ALWAYS, NEVER),
        reloads=True,
    ),
    Option(
        "relief-cooldown",
        "seconds without need before memory is taken again; longer each time that was too early",
        _seconds,
        "SECONDS",
        reloads=True,
    ),
    Option(
        "overcommit",
        "make vm.overcommit_memory 1 if it is 0, while blocks are offline: else large mappings are refused",
    ),
    Option(
        "on-stop",
        "what becomes of the balloon when the agent ends: given back, or kept for the next agent",
        _text,
        "WHAT",
        (DEFLATE, KEEP),
        reloads=True,
    ),
    Option("control-group", "a group whose members may use the control socket, too (default: root alone)", _group, "GROUP"),
    Option("control-group-may", "whether that group may only see, or change too", _text, "WHAT", (READ, CHANGE)),
    Option("metrics-listen", "where to serve /metrics", _listen, "HOST:PORT"),
    Option("metrics-certificate", "serve metrics by TLS 1.3, with this certificate (PEM)", _path, "FILE"),
    Option("metrics-key", "the certificate's key (default: in the same file)", _path, "FILE"),
    Option("metrics-client-ca", "let only clients scrape that have a certificate of this authority (PEM)", _path, "FILE"),
    Option("verbose", "log more", reloads=True),
)
_BY_NAME = {option.name: option for option in OPTIONS}
assert {option.field for option in OPTIONS} == {field.name for field in fields(Options)}


def read_file(path: Path) -> dict[str, Any]:
    """What a configuration file says, by field. BadInput with line and key."""
    try:
        with path.open("rb") as file:
            data = file.read(LONGEST_FILE + 1)
    except OSError as error:
        raise BadInput(f"{path} cannot be read: {error.strerror}") from error
    if len(data) > LONGEST_FILE:
        raise BadInput(f"{path} is no configuration: it has more than {LONGEST_FILE} bytes")
    try:
        text = data.decode()
        content = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{path} is no TOML: {error}") from error
    values: dict[str, Any] = {}
    for key, given in content.items():
        where = f"{path}, line {_line_of(key, text)}, {key}"
        option = _BY_NAME.get(key)
        if option is None:
            raise BadInput(f"{where}: there is no such option; known are {', '.join(_BY_NAME)}")
        try:
            values[option.field] = option.value(given)
        except BadInput as error:
            raise BadInput(f"{where}: {error}") from error
    return values


def _line_of(key: str, text: str) -> int:
    """The line that a key, or a table of that name, begins in."""
    pattern = re.compile(rf"""\s*\[*\s*(["']?){re.escape(key)}\1\s*[=.\]]""")
    return next((number for number, line in enumerate(text.splitlines(), 1) if pattern.match(line)), 1)


def gather(flags: Mapping[str, object], file: Path | None) -> Options:
    """All options. ``flags`` are those that were given, by field. BadInput names the flag, or the file's line and key."""
    values = {} if file is None else read_file(file)
    for name, given in flags.items():
        option = _BY_NAME[name.replace("_", "-")]
        try:
            values[name] = option.value(given)
        except BadInput as error:
            raise BadInput(f"--{option.name}: {error}") from error
    options = Options(**values)
    if options.upper_limit is not None and options.upper_limit < options.lower_limit:
        raise BadInput(f"the lower limit, {options.lower_limit} bytes, is above the upper one, {options.upper_limit}")
    if options.metrics_certificate is None and (options.metrics_key or options.metrics_client_ca):
        raise BadInput("metrics-key and metrics-client-ca are for TLS, which takes a metrics-certificate")
    return options


def fixed_changes(before: Options, after: Options) -> list[str]:
    """The options that differ, and cannot change while the agent runs."""
    return [
        option.name
        for option in OPTIONS
        if not option.reloads and getattr(before, option.field) != getattr(after, option.field)
    ]
