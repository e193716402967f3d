"""Agents that are stopped or killed at instants spread over a start that goes on with what another one left. Needs root.

    python instants.py COUNT

Run in a guest. Every agent is a fork of this process, so that Python starts once. An instant is a number of function calls,
counted from when the agent reads its options to the first step of its balloon. Prints JSON, a line each: how the first agent
fared, how many calls there are, and for each instant what is left, and how the agent after it fared.
"""

from __future__ import annotations

import json
import os
import select
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

from balloon_agent.access import binding
from balloon_agent.access.pci import PciFunction, functions
from balloon_agent.agent import stock
from balloon_agent.api.snapshot import Board, Snapshot
from balloon_agent.cli import agent as command
from balloon_agent.linux import libc
from balloon_agent.memory.left_behind import HOLDER
from balloon_agent.sizing import balloon

DEADLINE = 300.0
# Three holders of these have the 40 MiB of a balloon that are not blocks.
CAPACITY = 16 << 20
KERNEL_DRIVER = binding.KERNEL_DRIVER
ENDS = ((signal.SIGTERM, "keep"), (signal.SIGKILL, "keep"), (signal.SIGTERM, "deflate"), (signal.SIGKILL, "deflate"))
Tell = Callable[..., None]


class Surroundings:
    """What agents run in: here a guest with a balloon."""

    options: tuple[str, ...] = ()

    def prepare(self) -> None:
        """In the process of each agent, before that runs."""

    def is_holder(self, arguments: list[bytes]) -> bool:
        """Whether a process with these arguments is one of ours."""
        return HOLDER.encode() in arguments

    def driver(self) -> str | None:
        """Who has the balloon."""
        (found,) = (function for function in functions() if function.is_balloon)
        return found.driver

    def held(self) -> dict[str, int]:
        """What is held, by the kernel's word and not by the agent's: blocks that are not online, and processes."""
        blocks = Path("/sys/devices/system/memory").glob("memory*/state")
        holders = 0
        for process in Path("/proc").iterdir():
            if process.name.isdecimal():
                try:
                    holders += self.is_holder((process / "cmdline").read_bytes().split(b"\0"))
                except OSError:
                    continue
        return {"blocks": sum(path.read_text() != "online\n" for path in blocks), "holders": holders}


def _lock_nothing(*, shares: bool = False) -> None:
    pass


class Agent:
    """An agent in a process of its own. ``prepare`` is called in that before it runs, with what is to tell of results."""

    def __init__(self, prepare: Callable[[Tell], None], *options: str) -> None:
        readable, writable = os.pipe()
        self._pid = os.fork()
        if self._pid == 0:
            code = 1
            try:
                os.close(readable)

                def tell(**result: object) -> None:
                    os.write(writable, json.dumps(result).encode() + b"\n")

                prepare(tell)
                code = command.main(["run", *options])
            except BaseException:
                traceback.print_exc()
            os._exit(code)
        os.close(writable)
        self._results = os.fdopen(readable)

    def end(self) -> tuple[int, dict[str, Any]]:
        """Wait for its end: its exit code, or the negative number of its signal, and all that it has told."""
        pidfd = os.pidfd_open(self._pid)
        if not select.select([pidfd], [], [], DEADLINE)[0]:
            os.kill(self._pid, signal.SIGKILL)
            raise TimeoutError(f"an agent did not end within {DEADLINE:g} s")
        os.close(pidfd)
        _, status = os.waitpid(self._pid, 0)
        result: dict[str, Any] = {}
        for line in self._results:
            result |= json.loads(line)
        self._results.close()
        return os.waitstatus_to_exitcode(status), result


class Instants:
    """Starts agents in the same surroundings, and ends them."""

    def __init__(self, around: Surroundings) -> None:
        self._around = around

    def _prepare(self, tell: Tell) -> None:
        """As many holders as on a much larger guest. When the kernel's driver gets the device, what is held then is told."""
        self._around.prepare()
        stock.HOLDER_CAPACITY = stock.LEAST_CAPACITY = balloon.STEP = CAPACITY
        stock.CAPACITY_SHARE = 1 << 62
        # Reading in all of the program takes a third of a start, in which nothing is taken or given back.
        libc.lock_all_memory = _lock_nothing
        hand_over = binding._hand_over

        def look(function: PciFunction, driver: str | None, bus: Path) -> None:
            if driver == KERNEL_DRIVER:
                tell(handed_over_with=self._around.held())
            hand_over(function, driver, bus)

        binding._hand_over = look

    def go_on(self) -> dict[str, Any]:
        """An agent that reaches what the host asks for. It is killed then, and leaves all of it."""

        def prepare(tell: Tell) -> None:
            self._prepare(tell)
            publish = Board.publish

            def watch(self: Board, snapshot: Snapshot) -> None:
                publish(self, snapshot)
                if snapshot.state == "resting" and snapshot.host_target_bytes:
                    tell(actual=snapshot.actual_bytes, target=snapshot.host_target_bytes, sources=dict(snapshot.held_bytes))
                    os.kill(os.getpid(), signal.SIGKILL)

            Board.publish = watch  # type: ignore[method-assign]

        code, result = Agent(prepare, *self._around.options).end()
        return {"code": code, "reached": result, "left": self._around.held(), "driver": self._around.driver()}

    def end_at(self, instant: int, number: signal.Signals, on_stop: str) -> dict[str, Any]:
        """One that gets a signal when so many functions were called. At its first step it is killed, and tells how many."""

        def prepare(tell: Tell) -> None:
            self._prepare(tell)
            calls = 0

            def count(frame: FrameType, event: str, _: object) -> None:
                nonlocal calls
                if event not in ("call", "c_call") or (not calls and frame.f_code.co_name != "gather"):
                    return
                calls += 1
                if calls == instant:
                    sys.setprofile(None)
                    tell(where=f"{frame.f_code.co_qualname} in {Path(frame.f_code.co_filename).name}")
                    os.kill(os.getpid(), number)
                elif frame.f_code.co_name == "_advance":
                    sys.setprofile(None)
                    tell(calls=calls)
                    os.kill(os.getpid(), signal.SIGKILL)

            sys.setprofile(count)

        code, result = Agent(prepare, "--on-stop", on_stop, *self._around.options).end()
        after = {"signal": number.name, "on_stop": on_stop, "instant": instant, "code": code, "told": result}
        return after | {"driver": self._around.driver(), "held": self._around.held()}


def main(count: int, around: Surroundings) -> None:
    """Print what is described above, for so many instants."""
    instants = Instants(around)
    print(json.dumps(instants.go_on()), flush=True)
    calls = instants.end_at(0, signal.SIGKILL, "keep")["told"]["calls"]
    print(json.dumps(calls), flush=True)
    for number in range(count):
        after = instants.end_at(calls * (number + 1) // (count + 1), *ENDS[number % len(ENDS)])
        print(json.dumps(after | {"next": instants.go_on()}), flush=True)


def check(output: str, count: int, target: int, blocks: int) -> None:
    """Of that output: nothing was lost or handed out twice, and every next agent reached its target exactly."""
    first, calls, *after = (json.loads(line) for line in output.splitlines())
    _reached_exactly(first, target)
    assert first["left"]["blocks"] == blocks, first
    assert first["left"]["holders"] >= 3, first
    assert calls > 1000
    assert len(after) == count
    for each in after:
        assert "where" in each["told"], each
        # Not even for a moment, and as seen by the guest's kernel.
        assert not any(each["told"].get("handed_over_with", {}).values()), each
        assert each["driver"] != KERNEL_DRIVER or not any(each["held"].values()), each
        is_kept = each["signal"] == "SIGKILL" or each["on_stop"] == "keep"
        assert bool(each["held"]["holders"]) is is_kept, each
        assert bool(each["held"]["blocks"]) is (is_kept and blocks > 0), each
        assert (each["driver"] == KERNEL_DRIVER) is not is_kept, each
        assert each["code"] == (0 if each["signal"] == "SIGTERM" else -9), each
        _reached_exactly(each["next"], target)


def _reached_exactly(went: dict[str, Any], target: int) -> None:
    assert went["code"] == -9, went
    assert went["reached"]["actual"] == went["reached"]["target"] == target, went
    assert not any(went["reached"].get("handed_over_with", {}).values()), went
    assert went["driver"] != KERNEL_DRIVER, went
    assert went["left"]["holders"], went


if __name__ == "__main__":
    main(int(sys.argv[1]), Surroundings())
