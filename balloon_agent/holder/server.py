"""A holder's answers to the agent: memory is taken and given back, and as a worker it does work that may block."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterator
from contextlib import closing
from typing import Any

from balloon_agent.errors import NotPermitted, Shortage
from balloon_agent.frames import FRAME, HUGE
from balloon_agent.linux import huge_page_pools, memory_blocks
from balloon_agent.linux.pagemap import Pagemap

from . import allocate, holes
from .cancellation import GivenWay, GivingWay
from .oom_victim import SYSCALLS as OUTLASTING
from .oom_victim import first_to_end
from .protocol import VERSION, LineReader, encode

# What a holder needs the numbers of.
SYSCALLS = ("io_uring_setup", "io_uring_register", *OUTLASTING)
# Seconds until the first connection. It is there as a rule before this process is.
CALL_DEADLINE = 60.0


class Holder:
    """The extents of this process, and what can be asked of it."""

    def __init__(
        self,
        memory_root: str = memory_blocks.MEMORY_ROOT,
        hugepages_root: str = huge_page_pools.HUGEPAGES_ROOT,
        giving_way: GivingWay | None = None,
    ) -> None:
        self._giving_way = GivingWay() if giving_way is None else giving_way
        self._memory_root = memory_root
        self._hugepages_root = hugepages_root
        self._pagemap = Pagemap()
        self._held: dict[str, allocate.Held] = {}
        # Whether the last huge pages that were asked for all came.
        self._plenty = False
        # Through all processes, for huge pages with holes; and what is left of it.
        self._walk: holes.Walk | None = None
        self._rest_of_walk: Iterator[list[holes.Holed]] = iter(())
        # In a forked child: where it is to listen, until ``main`` begins anew with that.
        self.born_with: tuple[str, socket.socket] | None = None

    @property
    def empty(self) -> bool:
        return not self._held

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """The answer to one request; what goes wrong is in it, in words."""
        self._giving_way.begin()
        operation = {
            "hello": self._hello,
            "take": self._take,
            "give_back": self._give_back,
            "offline": self._offline,
            "online": self._online,
            "pool": self._pool,
            "split": self._split,
            "reclaim": self._reclaim,
            "fork": self._fork,
        }.get(request.get("op", ""))
        if operation is None:
            return {"ok": False, "error": f"unknown request {request.get('op')!r}"}
        try:
            return {"ok": True, **operation(request)}
        except (Shortage, LookupError, NotPermitted, GivenWay) as error:
            return {"ok": False, "error": str(error)}
        except OSError as error:
            return {"ok": False, "error": str(error), "errno": error.errno}

    def _hello(self, _: dict[str, Any]) -> dict[str, Any]:
        return {"version": VERSION, "pid": os.getpid(), "extents": [self._described(name) for name in self._held]}

    def _described(self, name: str) -> dict[str, Any]:
        held = self._held[name]
        return {"name": name, "source": held.source, "pin": held.pin, "pieces": [*held.pieces]}

    def _take(self, request: dict[str, Any]) -> dict[str, Any]:
        name, count, pinned = request["name"], request["count"], request["pinned"]
        watch, check = allocate.Stopwatch(), self._giving_way.check
        match request["source"]:
            case "thp":
                plenty, self._plenty = self._plenty, False
                compact = request["compact"]
                held = allocate.take_thp(self._pagemap, count, watch, check, pinned=pinned, compact=compact, plenty=plenty)
                self._plenty = sum(piece.frames for piece in held.pieces) * FRAME == count * HUGE
            case "hugetlb" | "hugetlb-1g" as source:
                held = allocate.take_hugetlb(self._pagemap, source, count, watch, check, pinned=pinned)
            case "pages":
                held = allocate.take_pages(self._pagemap, count, watch, check, pinned=pinned)
            case other:
                raise LookupError(f"no source {other!r}")
        try:
            # Asked while the frames were looked up. Then the agent has no memory for a long answer, either.
            check()
        except GivenWay:
            allocate.let_go(held)
            raise
        self._held[name] = held
        return {**self._described(name), "seconds": watch.seconds}

    def _extent(self, name: str) -> allocate.Held:
        if name not in self._held:
            raise LookupError(f"no extent {name!r} is held here")
        return self._held[name]

    def _give_back(self, request: dict[str, Any]) -> dict[str, Any]:
        failed: dict[str, str] = {}
        for name in request["names"]:
            try:
                allocate.let_go(self._extent(name))
                del self._held[name]
            except (LookupError, OSError) as error:
                failed[name] = str(error)
        return {"failed": failed}

    def _offline(self, request: dict[str, Any]) -> dict[str, Any]:
        """Blocks one after the other, until one fails, ``most`` are offline, ``seconds`` are over, or others need memory."""
        watch = allocate.Stopwatch()
        done: list[int] = []
        failed: tuple[int, int | None, str | None] | None = None
        for number in request["blocks"]:
            try:
                with self._giving_way.interrupting():
                    memory_blocks.set_state(self._memory_root, number, "offline")
                done.append(number)
            except GivenWay:
                # It may have come too late.
                if memory_blocks.state(self._memory_root, number) == "offline":
                    done.append(number)
            except OSError as error:
                # In order, so that it is known how far this has come, should it not come back from the next one.
                failed = (number, error.errno, error.strerror)
            watch.lap("populate")
            if failed is not None or len(done) == request["most"] or watch.seconds["populate"] >= request["seconds"]:
                break
            if self._giving_way.asked:
                break
        return {"done": done, "failed": failed, "seconds": watch.seconds}

    def _online(self, request: dict[str, Any]) -> dict[str, Any]:
        failed: dict[str, str] = {}
        for number, state in request["blocks"]:
            try:
                memory_blocks.set_state(self._memory_root, number, state)
            except OSError as error:
                failed[str(number)] = str(error)
        return {"failed": failed}

    def _pool(self, request: dict[str, Any]) -> dict[str, Any]:
        """Set how many huge pages of one size there are, as far as the kernel can; it does not say when it cannot."""
        watch = allocate.Stopwatch()
        huge_page_pools.set_pages(self._hugepages_root, request["bytes"], request["pages"])
        watch.lap("populate")
        return {"pages": huge_page_pools.pages(self._hugepages_root, request["bytes"]), "seconds": watch.seconds}

    def _split(self, request: dict[str, Any]) -> dict[str, Any]:
        """Split huge pages with holes, until ``frames`` are free, ``seconds`` are over, or all processes are looked through.

        ``begin`` with the first process, or go on where the last request has ended. ``done`` if nothing is left to look at.
        ``denied`` processes may not be looked through. ``problem``, in words, if nothing can be split here.
        """
        watch = allocate.Stopwatch()
        freed, done = 0, True
        try:
            splitter = holes.Splitter()
        except OSError as error:
            return {"freed": 0, "done": True, "denied": 0, "problem": f"{error.filename}: {error.strerror}"}
        if request["begin"] or self._walk is None:
            self._walk = holes.Walk(request["skip"])
            self._rest_of_walk = iter(self._walk)
        with closing(splitter):
            for found in self._rest_of_walk:
                for holed in found:
                    splitter.split(holed)
                freed += holes.freed(self._pagemap, found)
                watch.lap("populate")
                if freed >= request["frames"] or watch.seconds["populate"] >= request["seconds"]:
                    done = False
                    break
        denied = self._walk.denied
        if done:
            self._walk = None
        return {"freed": freed, "done": done, "denied": denied, "problem": None}

    def _reclaim(self, request: dict[str, Any]) -> dict[str, Any]:
        """Write ``text`` to ``path``, a file that has the kernel reclaim memory. ``problem`` is an error number if that failed.

        EAGAIN is none: so much was not to be had, but what was is free.
        """
        try:
            fd = os.open(request["path"], os.O_WRONLY | os.O_CLOEXEC)
            try:
                with self._giving_way.interrupting():
                    os.write(fd, request["text"].encode())
            finally:
                os.close(fd)
        except OSError as error:
            return {"problem": None if error.errno == errno.EAGAIN else error.errno}
        return {"problem": None}

    def _fork(self, request: dict[str, Any]) -> dict[str, Any]:
        # The mappings of what is held are not inherited (MADV_DONTFORK), the descriptors are: see main.
        listener = listen(request["socket"])
        child = os.fork()
        if child == 0:
            self.born_with = (request["socket"], listener)
        else:
            listener.close()
        return {"pid": child}


def serve(listener: socket.socket, holder: Holder) -> None:
    """Serve one connection after the other, until nothing is held and the last one has gone; or in a child, at once."""
    # Whoever wanted this holder may have died since, or have gone to another one.
    listener.settimeout(CALL_DEADLINE)
    while True:
        try:
            with first_to_end():
                connection, _ = listener.accept()
        except TimeoutError:
            return
        listener.settimeout(None)
        with connection:
            reader = LineReader(connection)
            try:
                with first_to_end():
                    request = reader.read()
                while request is not None:
                    answer = encode(holder.answer(request))
                    if holder.born_with is not None:
                        return
                    # Before the agent hears that something is held, the order is settled.
                    with first_to_end():
                        connection.sendall(answer)
                        request = reader.read()
            except (OSError, ValueError):
                pass  # the agent died in the middle of a word; what is held stays held
        if holder.empty:
            return


def listen(path: str) -> socket.socket:
    """A socket that listens at ``path``."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(path)
    listener.listen(4)
    return listener
