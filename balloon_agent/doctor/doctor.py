"""``balloon-agent doctor``: what is in an agent's way in this guest, and what to do about it. Changes nothing."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping

from . import (
    agent,
    device,
    kernel,
    memory,
    process,
    udev,
)
from .machine import (
    Finding,
    Level,
    Machine,
    warn,
)

# None: there is nothing to be said.
Check = Callable[[Machine], Finding | None]
CHECKS: tuple[Check, ...] = (
    process.user,
    kernel.kernel,
    kernel.supported,
    agent.options,
    device.device,
    device.features,
    device.deflate_on_oom,
    device.driver,
    device.module,
    device.interrupt_pin,
    device.iommu,
    device.lockdown,
    kernel.io_uring,
    kernel.pagemap,
    kernel.ptrace,
    process.capabilities,
    process.locked_memory,
    process.open_files,
    process.control_group,
    memory.memory_blocks,
    udev.udev_rules,
    memory.movable_zone,
    memory.hugepages,
    memory.thp_enabled,
    memory.thp_defrag,
    memory.thp_shrinking,
    memory.hidden_memory,
    memory.compaction,
    memory.overcommit,
    memory.panic_on_oom,
    memory.oom_victim,
    process.systemd_oomd,
    memory.swap,
    memory.hibernation,
    kernel.tracepoints,
    kernel.psi,
    agent.agent,
    agent.left_behind,
    agent.control_socket,
    agent.metrics_port,
)
_COLOURS = {Level.OK: "32", Level.WARN: "33", Level.FAIL: "31"}


def name_of(check: Check) -> str:
    """As it is printed: io-uring."""
    return check.__name__.replace("_", "-")


def examine(machine: Machine) -> dict[str, Finding]:
    """What each check has found, by its name. One that cannot look says so, and why."""
    found = {name_of(check): _try(check, machine) for check in CHECKS}
    return {name: finding for name, finding in found.items() if finding is not None}


def _printable(text: str) -> str:
    """One line, whatever the files that it quotes may say."""
    return "".join(character if character.isprintable() else " " for character in text)


def _try(check: Check, machine: Machine) -> Finding | None:
    finding = _look(check, machine)
    if finding is None:
        return None
    remedy = None if finding.remedy is None else _printable(finding.remedy)
    return Finding(finding.level, _printable(finding.found), remedy)


def _look(check: Check, machine: Machine) -> Finding | None:
    try:
        return check(machine)
    except PermissionError as error:
        return warn(f"{error.filename or 'this'} may not be looked at: {error.strerror}", "run this as root")
    except (OSError, ValueError, LookupError, TypeError) as error:
        return warn(f"this could not be made out: {type(error).__name__}: {error}", "look at it yourself")


def exit_code(findings: Mapping[str, Finding]) -> int:
    """0 if nothing fails, 1 otherwise."""
    return int(any(finding.level is Level.FAIL for finding in findings.values()))


def as_json(findings: Mapping[str, Finding]) -> str:
    """A list of objects with check, level, found, remedy (or null)."""
    return json.dumps([{"check": name, **finding._asdict()} for name, finding in findings.items()], indent=1)


def as_text(findings: Mapping[str, Finding], *, coloured: bool = False) -> str:
    """A line for each, and one below it with what to do."""
    width = max(map(len, findings), default=0)
    lines = []
    for name, finding in findings.items():
        begin, end = (f"\033[{_COLOURS[finding.level]}m", "\033[0m") if coloured else ("", "")
        lines.append(f"{begin}{finding.level:4}{end}  {name:{width}}  {finding.found}")
        if finding.remedy is not None:
            lines.append(f"{'':{width + 8}}-> {finding.remedy}")
    counts = [sum(finding.level is level for finding in findings.values()) for level in Level]
    lines.append(", ".join(f"{count} {level}" for count, level in zip(counts, Level, strict=True)))
    return "\n".join(lines)
