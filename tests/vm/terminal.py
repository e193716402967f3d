"""Run in a guest beside an agent: every command of balloonctl, on a terminal of its own, as somebody would type it."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import pexpect

BALLOONCTL = str(Path(sys.executable).with_name("balloonctl"))
DEADLINE = 120
WIDTH, HEIGHT = 100, 40
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
# What is typed, the exit code, and what is to be seen, in this order; the agent starts with an empty balloon.
SESSION: list[tuple[str, int, list[str]]] = [
    ("--help", 0, ["status", "deflate", "watch", "map", "Exit codes"]),
    ("--version", 0, [r"balloonctl \d"]),
    ("status", 0, ["balloon  0 MiB of 0 MiB", "the host's target", "cont queues"]),
    ("set 200M", 0, ["inflating", "of 200 MiB", r"balloon  200 MiB of 200 MiB \(set by hand\)"]),
    ("set +64M", 0, ["balloon  264 MiB"]),
    ("set -64M --no-wait", 0, ["of 200 MiB"]),
    ("set 10%", 0, ["balloon  9[0-9][.0-9]* MiB"]),
    ("set --guest 900M", 0, ["balloon  124 MiB"]),
    ("hold", 0, ["mode hold"]),
    ("stats", 0, ["inflated", "queue inflate_cont", "runs, inflate", "time, take", "guest, free memory"]),
    ("map", 0, ["0 MiB  ", "each 2 MiB: ", r"T thp 12[0-9.]+ MiB", "free"]),
    ("map --cell 8M", 0, ["each 8 MiB: "]),
    ("watch --count 1", 0, ["balloon", "target", "hold"]),
    ("follow", 0, ["balloon  0 MiB of 0 MiB", "mode follow"]),
    ("deflate --timeout 60", 0, ["balloon  0 MiB of 0 MiB"]),
    ("schema", 0, ["json-schema.org", "one line of JSON"]),
    # What it falls short of, and why.
    ("set 950M", 3, ["short by .* MiB: .*the guest can spare .* kept in reserve"]),
    ("set 0", 0, ["balloon  0 MiB of 0 MiB"]),
    # Bad input: what was said, the limit, and the remedy.
    ("set 12q", 1, ["'12q' is no size: write a number"]),
    ("set 100", 1, ["not a multiple of 4096"]),
    ("set 2T", 1, ["2199023255552 bytes is no size for this balloon: a multiple of 4096 up to"]),
    ("set 101%", 1, ["'101%' is no share"]),
    ("set -1G", 1, ["'-1G' is more than the 0 MiB"]),
    ("set --guest 2G", 1, ["'2G' is more than the 1024 MiB that the machine has"]),
    ("set 1G --timeout -1", 1, ["--timeout -1 is not from 0 to 3600"]),
    ("set", 2, ["one of the arguments SIZE --guest is required"]),
    ("set 1G --guest 1G", 2, ["not allowed with argument"]),
    ("frobnicate", 2, ["invalid choice: 'frobnicate'"]),
    ("", 2, ["required: COMMAND"]),
    ("map --cell 3M", 1, ["--cell 3 MiB is no multiple of 2M, or"]),
    ("map --cell x", 1, ["'x' is no size"]),
    ("watch --count 0", 1, ["--count 0 is less than 1"]),
    ("status --run-dir /nowhere", 4, ["no agent answers at /nowhere/control: start it with"]),
]
AS_JSON = (
    "status --json",
    "stats --json",
    "map --json",
    "hold --json",
    "set 4M --json",
    "deflate --json",
    "watch --json --count 1",
)


def type_in(words: str) -> Any:
    environment = {**os.environ, "TERM": "xterm"}
    command = f"{BALLOONCTL} {words}"
    return pexpect.spawn(command, timeout=DEADLINE, encoding="utf-8", dimensions=(HEIGHT, WIDTH), env=environment)


def see(words: str, code: int, texts: list[str]) -> str:
    """Type a command, watch it to its end, and find each of the texts, one after the other."""
    terminal = type_in(words)
    terminal.expect(pexpect.EOF)
    terminal.close()
    shown = " ".join(ESCAPES.sub("", terminal.before).replace("\r", "\n").split("\n"))
    at = 0
    for text in texts:
        found = re.compile(text).search(shown, at)
        assert found, f"balloonctl {words}: no {text!r} in {shown[at:]!r} of {shown!r}"
        at = found.end()
    whole: str = terminal.before
    assert terminal.exitstatus == code, f"balloonctl {words}: ended with {terminal.exitstatus}: {shown!r}"
    if code == 1:
        assert "error:" in shown, shown
        assert whole.count("\n") == 1, f"not one line: {whole!r}"
    return whole


def main() -> None:
    for words, code, texts in SESSION:
        if words == "watch --count 1":
            watch_a_change(words, texts)
            continue
        see(words, code, texts)
    for words in AS_JSON:
        if words.startswith("watch"):
            terminal = type_in(words)
            # The first line is what is there; the next one comes with a change.
            terminal.expect("\n")
            first = terminal.before
            see("set 8M --json", 0, [])
            terminal.expect(pexpect.EOF)
            states = [json.loads(line)["actual_bytes"] for line in (first, *terminal.before.splitlines())]
            terminal.close()
            assert (terminal.exitstatus, len(states)) == (0, 2), states
            continue
        json.loads(see(words, 0, []))
    interrupt("watch", "balloon")
    interrupt("set 700M", "inflating")
    print("all of them")


def watch_a_change(words: str, texts: list[str]) -> None:
    """It is drawn at once, and again when something changes; then it ends, as it was told."""
    terminal = type_in(words)
    for text in texts:
        terminal.expect(text)
    see("hold --json", 0, [])
    terminal.expect(pexpect.EOF)
    terminal.close()
    assert terminal.exitstatus == 0, terminal.before


def interrupt(words: str, text: str) -> None:
    """Press Ctrl-C once ``text`` is there: that ends the looking and the waiting, and the cursor is back."""
    terminal = type_in(words)
    terminal.expect(text)
    terminal.sendintr()
    terminal.expect(pexpect.EOF)
    terminal.close()
    shown: str = terminal.before
    assert terminal.exitstatus == 130, terminal.exitstatus
    assert "Traceback" not in shown
    assert "\x1b[?25h" in shown, f"the cursor is not back: {shown!r}"


if __name__ == "__main__":
    main()
