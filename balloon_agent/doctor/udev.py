"""Rules of udev's that bring memory blocks online: blocks in the balloon are offline, and such a rule takes them out of it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

from balloon_agent.linux import memory_blocks

from .machine import (
    Finding,
    Machine,
    ok,
    warn,
)

# The first that has a file of a name hides those of that name in the others, whatever is in it: udev_rules_load() in
# src/udev/udev-rules.c of systemd, by conf_files_list_strv().
FOLDERS = ("etc", "run", "usr/local/lib", "usr/lib", "lib")
# KEY{attribute}OPERATOR"value": udev_rule_parse_value() there.
_TOKEN = re.compile(r'([A-Z_]+)(?:\{([^}]*)\})?\s*(==|!=|\+=|-=|:=|=)\s*[ei]{0,2}"((?:\\"|[^"])*)"')
# These are conditions, even where they look like an assignment.
_TESTS = ("PROGRAM", "IMPORT")
# Both come from `udevadm trigger`, and "add" from memory that is plugged in; "online" and "offline" from the kernel alone.
_ACTIONS = ("add", "change")
_SHOWN = 3


class _Rule(NamedTuple):
    line: int
    tokens: list[tuple[str, str, str, str]]

    def applies(self, event: dict[str, str]) -> bool | None:
        """Whether the rule's conditions hold for an event; None if that depends on what is not in it."""
        certain: bool | None = True
        for key, attribute, operator, value in self.tokens:
            if operator not in ("==", "!=") and key not in _TESTS:
                continue
            known = event.get(f"{key}{{{attribute}}}" if attribute else key)
            if known is None:
                certain = None
            elif any(fnmatchcase(known, pattern) for pattern in value.split("|")) != (operator == "=="):
                return False
        return certain

    def value(self, key: str) -> str | None:
        return next((value for name, _, _, value in self.tokens if name == key), None)


def _event(action: str, subsystem: str, name: str) -> dict[str, str]:
    known = {"ACTION": action, "SUBSYSTEM": subsystem, "SUBSYSTEMS": subsystem, "KERNEL": name}
    return {**known, "DEVPATH": f"/devices/system/{subsystem}/{name}", "ATTR{state}": "offline"}


def udev_rules(machine: Machine) -> Finding:
    if "blocks" not in machine.options.sources:
        return ok("`blocks` is not among the sources")
    found = [
        f"/{path.relative_to(machine.root)}, line {line}, {what}" for path in _files(machine) for line, what in _look(path)
    ]
    if not found:
        return ok("none brings memory blocks online")
    more = f" (and {len(found) - _SHOWN} more)" if len(found) > _SHOWN else ""
    policy = machine.read(f"{memory_blocks.MEMORY_ROOT.lstrip('/')}/auto_online_blocks")
    instead = (
        f"the kernel does it by itself for new ones (auto_online_blocks is {policy})"
        if policy is not None and policy.startswith("online")
        else "memhp_default_state=online has the kernel do it, for new ones alone"
    )
    return warn(
        f"{'; '.join(found[:_SHOWN])}{more}: also one that is in the balloon, at each `udevadm trigger`",
        f"take that out, in a copy in /etc/udev/rules.d if it lies elsewhere, then udevadm control --reload; {instead}",
    )


def _files(machine: Machine) -> list[Path]:
    by_name: dict[str, Path] = {}
    for folder in FOLDERS:
        for path in (machine.root / folder / "udev/rules.d").glob("*.rules"):
            by_name.setdefault(path.name, path)
    return [by_name[name] for name in sorted(by_name)]


def _look(path: Path) -> Iterator[tuple[int, str]]:
    """Line and deed of each rule in a file that has a block brought online, or runs a program that may do so."""
    rules = list(_rules(path.read_text(errors="replace")))
    applying: dict[tuple[str, str], set[int]] = {}
    for action in _ACTIONS:
        applying[action, "memory"] = _reached(rules, _event(action, "memory", "memory42"))
        applying[action, "other"] = _reached(rules, _event(action, "other", "other42"))
    for rule in rules:
        actions = [action for action in _ACTIONS if rule.line in applying[action, "memory"]]
        # What is run for devices of every kind has nothing to do with memory.
        is_for_blocks = any(rule.line not in applying[action, "other"] for action in actions)
        for key, attribute, operator, value in rule.tokens if actions else ():
            if operator in ("==", "!="):
                continue
            # The value may be a substitution: $env{.state} in Red Hat's.
            if key == "ATTR" and ((attribute == "state" and value != "offline") or (attribute, value) == ("online", "1")):
                yield rule.line, "brings memory blocks online"
            elif key == "RUN" and attribute != "builtin" and is_for_blocks:
                yield rule.line, f"runs {value.split(' ')[0]} for memory blocks, which may bring them online"


def _rules(text: str) -> Iterator[_Rule]:
    """The rules of a file: lines that end in a backslash go on; those that begin with # do not count, in between either."""
    start, parts = 0, ""
    for number, line in enumerate(map(str.strip, text.splitlines()), 1):
        if line.startswith("#"):
            continue
        start = start if parts else number
        parts += line.removesuffix("\\")
        if not line.endswith("\\"):
            if parts:
                yield _Rule(start, _TOKEN.findall(parts))
            parts = ""


def _reached(rules: list[_Rule], event: dict[str, str]) -> set[int]:
    """The lines of the rules that may apply. GOTO leads to a label further below, and in the same file."""
    lines: set[int] = set()
    wanted: str | None = None
    for rule in rules:
        if wanted is not None and rule.value("LABEL") != wanted:
            continue
        wanted = None
        applies = rule.applies(event)
        if applies is False:
            continue
        lines.add(rule.line)
        if applies:
            wanted = rule.value("GOTO")
    return lines
