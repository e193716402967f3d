"""Taking, pinning and holding memory of the running kernel."""

from __future__ import annotations

import errno
import math
import os
import re
import resource
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest

from balloon_agent.access.dma import DmaMemory
from balloon_agent.errors import HolderLost, Shortage
from balloon_agent.frames import (
    FRAME,
    FRAMES_PER_HUGE,
    HUGE,
    Run,
    total,
)
from balloon_agent.holder import allocate, cancellation
from balloon_agent.holder.mapping import Pieces
from balloon_agent.holder.server import Holder, listen, serve
from balloon_agent.linux.niceness import AHEAD, ORDINARY, give_priority
from balloon_agent.linux.oom_score import FIRST_CHOICE, PROTECTED
from balloon_agent.linux.pagemap import Pagemap
from balloon_agent.linux.pin import pin
from balloon_agent.linux.process import Process, is_readable
from balloon_agent.memory.holder_client import HolderClient
from balloon_agent.memory.holders import Holders
from balloon_agent.memory.ledger.ledger import Extent, Ledger
from balloon_agent.memory.sources.held import HeldSource, extent_of

KPF_BUDDY, KPF_NOPAGE = 1 << 10, 1 << 20
OWN_MEMORY_LIMIT_KIB = 12 << 10
CAP_SYS_RESOURCE = 24


def wait_until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true in time"
        time.sleep(0.01)


@pytest.fixture
def pagemap() -> Iterator[Pagemap]:
    pagemap = Pagemap()
    yield pagemap
    pagemap.close()


@pytest.fixture
def holders(tmp_path: Path) -> Iterator[Holders]:
    holders = Holders(tmp_path / "holders")
    yield holders
    for holder in holders:
        holders.kill(holder.name)


def take(holder: HolderClient, name: str, source: str, count: int) -> Extent:
    request = {"op": "take", "name": name, "source": source, "count": count, "pinned": True, "compact": True}
    answer = holder.request(request)
    assert answer["ok"], answer
    return extent_of(answer, holder.name)


def test_huge_pages_are_whole_aligned_and_in_place(pagemap: Pagemap) -> None:
    held = allocate.take_thp(pagemap, 4, allocate.Stopwatch())
    try:
        runs = list(held.pieces.runs())
        assert total(runs) == 4 * HUGE
        assert all(run.first % FRAMES_PER_HUGE == 0 and run.count % FRAMES_PER_HUGE == 0 for run in runs)
        assert held.pieces.are_in_place(pagemap, held.unit)
    finally:
        allocate.let_go(held)


def test_what_cannot_be_unmapped_around_huge_pages_goes_with_them(pagemap: Pagemap, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a process that has as many mappings as it may have. Neither the memory nor its pin is left behind."""
    taken: list[int] = []

    def fails(base: int, *_: object) -> None:
        taken.extend(frame for frame in pagemap.huge_frames(-(-base // HUGE) * HUGE, 2) if frame is not None)
        raise OSError(errno.ENOMEM, "munmap")

    pagemap.flags([])  # opens what it reads from
    before = len(os.listdir("/proc/self/fd"))
    monkeypatch.setattr(allocate, "_unmap_between", fails)
    with pytest.raises(OSError, match="munmap"):
        allocate.take_thp(pagemap, 2, allocate.Stopwatch())
    assert taken
    assert len(os.listdir("/proc/self/fd")) == before
    wait_until(lambda: not any(pagemap.are_huge(taken)))


def test_single_pages_come_in_the_exact_number(pagemap: Pagemap) -> None:
    held = allocate.take_pages(pagemap, 511, allocate.Stopwatch())
    try:
        assert total(held.pieces.runs()) == 511 * FRAME
        assert held.pieces.are_in_place(pagemap, held.unit)
    finally:
        allocate.let_go(held)


def test_memory_that_is_elsewhere_is_noticed(pagemap: Pagemap) -> None:
    """A page that was replaced behind our back must not pass for the one that was posted."""
    from balloon_agent.linux import libc

    held = allocate.take_pages(pagemap, 4, allocate.Stopwatch())
    spare = allocate.take_pages(pagemap, 64, allocate.Stopwatch())
    address, size = next(iter(held.pieces)).address, 4 * FRAME
    before = [frame for run in held.pieces.runs() for frame in range(run.first, run.end)]
    os.close(held.pin)
    libc.advise(address, size, libc.MADV_DONTNEED)
    assert allocate.populate(address, size) is None
    held.pin = pin([(address, size)])
    # The same frames may come back, by chance; then there is nothing to notice.
    moved = pagemap.frames(address, 4) != before
    assert held.pieces.are_in_place(pagemap, held.unit) is not moved
    libc.advise(address, size, libc.MADV_DONTNEED)
    assert not held.pieces.are_in_place(pagemap, held.unit)
    for one in (held, spare):
        allocate.let_go(one)


def test_ring_pages_know_their_frames(pagemap: Pagemap) -> None:
    memory = DmaMemory(pagemap)
    pages = memory.allocate(3)
    assert {page.address for page in pages} == {frame * FRAME for frame in memory.frames}
    assert all(bytes(page.view) == bytes(FRAME) for page in pages)
    pages[1].view[:4] = b"ring"
    memory.verify()
    memory.close()


def test_a_holder_takes_and_gives_back(holders: Holders) -> None:
    holder = holders.start()
    huge, small = take(holder, "a", "thp", 2), take(holder, "b", "pages", 3)
    assert (huge.size, small.size) == (2 * HUGE, 3 * FRAME)
    ledger = Ledger()
    ledger.add(huge)
    ledger.add(small)  # they do not overlap
    assert holder.request({"op": "give_back", "names": ["a"]}) == {"ok": True, "failed": {}}
    assert holder.request({"op": "give_back", "names": ["a", "b"]})["failed"] == {
        name: f"no extent {name!r} is held here" for name in "a"
    }
    assert not holder.request({"op": "dance"})["ok"]


def own_memory_kib(pid: int) -> int:
    rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
    own = {line.split()[0]: int(line.split()[1]) for line in rollup.splitlines()[1:]}
    return own["Private_Dirty:"]


def test_a_holder_is_small(holders: Holders) -> None:
    holder = holders.start()
    second = holders.start()
    for one in (holder, second):
        one.request({"op": "hello"})
        assert own_memory_kib(one.pid) < OWN_MEMORY_LIMIT_KIB


def test_a_holder_runs_nothing_from_where_the_agent_was_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root may have been in anybody's folder then."""
    hostile, ran = tmp_path / "hostile", tmp_path / "ran"
    (hostile / "balloon_agent/holder").mkdir(parents=True)
    program = f"open({str(ran)!r}, 'w').close()"
    for name in ("json", "ctypes", "signal", "sitecustomize", "balloon_agent/__init__", "balloon_agent/holder/__main__"):
        (hostile / f"{name}.py").write_text(program)
    monkeypatch.chdir(hostile)
    monkeypatch.setenv("PYTHONPATH", str(hostile))
    monkeypatch.setattr(sys, "path", ["", ".", *sys.path])
    holders = Holders(Path("../holders"))
    try:
        for holder in (holders.start(), holders.start()):
            assert holder.request({"op": "hello"})["pid"] == holder.pid
            assert Path(f"/proc/{holder.pid}/cwd").readlink() == Path("/")
    finally:
        for holder in holders:
            holders.kill(holder.name)
    assert not ran.exists()


def test_a_forked_holder_keeps_nothing_of_its_parents(holders: Holders) -> None:
    """A pin inherited by a child would keep memory from the guest after it was given back."""
    parent = holders.start()
    extent = take(parent, "a", "thp", 1)
    child = holders.start()
    assert child.request({"op": "hello"})["extents"] == []
    links = [os.readlink(path) for path in Path(f"/proc/{child.pid}/fd").iterdir()]
    assert not any("io_uring" in link for link in links)
    assert parent.request({"op": "give_back", "names": ["a"]})["failed"] == {}
    assert extent.size == HUGE


def test_all_of_a_program_stays_in_memory() -> None:
    """Nobody has run most of it yet, and nothing has been read ahead of it."""
    script = """
import mmap, os, sys, tempfile
from balloon_agent.linux import libc
with tempfile.NamedTemporaryFile(dir="/var/tmp") as file:
    file.truncate(64 << 12)
    os.fsync(file.fileno())
    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    code = mmap.mmap(file.fileno(), 0, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_EXEC)
    nobodys = mmap.mmap(-1, 256 << 20)
    libc.lock_all_memory()
    print(open("/proc/self/smaps").read())
"""
    smaps = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout
    mappings = re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", smaps, flags=re.MULTILINE)[1:]
    files = [mapping for mapping in mappings if re.match(r"\S+ r..p \S+ \S+ [1-9]\d* +/", mapping)]
    assert any("/var/tmp/" in mapping for mapping in files)
    assert any("libc" in mapping for mapping in files)
    for mapping in files:
        size, rss = (int(value) for value in re.findall(r"^(?:Size|Rss): +(\d+) kB", mapping, re.MULTILINE))
        assert size == rss, mapping
        assert re.search(r"^VmFlags:.* lo\b", mapping, re.MULTILINE), mapping
    # What nobody has touched takes nothing.
    assert sum(int(kib) for kib in re.findall(r"^Rss: +(\d+) kB", smaps, re.MULTILINE)) < 64 << 10


def test_what_has_just_been_taken_goes_back_when_somebody_needs_it(pagemap: Pagemap, monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked when nothing was left to do but to look the frames up: the agent would need memory for them, too."""
    way, let_go = cancellation.GivingWay(), allocate.let_go
    gone: list[allocate.Held] = []

    def take_pages(*_: object, **__: object) -> allocate.Held:
        held = taken(pagemap, 4, allocate.Stopwatch())
        way.asked = True
        return held

    def let_go_of(held: allocate.Held) -> None:
        gone.append(held)
        let_go(held)

    taken = allocate.take_pages
    monkeypatch.setattr(allocate, "take_pages", take_pages)
    monkeypatch.setattr(allocate, "let_go", let_go_of)
    holder = Holder(giving_way=way)
    answer = holder.answer({"op": "take", "name": "a", "source": "pages", "count": 4, "pinned": True, "compact": True})
    assert answer == {"ok": False, "error": cancellation.WHY}
    assert holder.empty
    assert len(gone) == 1


def mappings(pid: int) -> list[tuple[int, int, str]]:
    """Where each begins and ends, and what /proc/PID/smaps says of it."""
    smaps = Path(f"/proc/{pid}/smaps").read_text()
    each = re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", smaps, flags=re.MULTILINE)[1:]
    return [(*(int(at, 16) for at in text.split(maxsplit=1)[0].split("-")), text) for text in each]  # type: ignore[misc]


def test_a_holder_and_what_it_holds_are_locked(holders: Holders) -> None:
    """Reclaim would look at pinned memory in vain, and swap out who is to give it back. A fork inherits no lock."""
    first = holders.start()
    for holder in (first, holders.start()):
        pieces: list[list[int]] = []
        for source, count in (("thp", 2), ("pages", 64)):
            request = {"op": "take", "name": source, "source": source, "count": count, "pinned": True, "compact": True}
            pieces += holder.request(request)["pieces"]
        found = 0
        for begin, end, text in mappings(holder.pid):
            holds = any(begin < address + frames * FRAME and address < end for address, _, frames in pieces)
            found += holds
            if holds or "[heap]" in text or "/libc.so" in text:
                assert re.search(r"^VmFlags:.* lo\b", text, re.MULTILINE), text
        assert found
        # And it takes no more than without that.
        assert own_memory_kib(holder.pid) < OWN_MEMORY_LIMIT_KIB + (2 * HUGE + 64 * FRAME >> 10)


SMALL_PAGES_ONLY = """
import ctypes
from balloon_agent.errors import Shortage
from balloon_agent.holder import __main__ as program, allocate
from balloon_agent.linux.pagemap import Pagemap
PR_SET_THP_DISABLE = 41
program.stay_in_memory()
ctypes.CDLL(None).prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0)
try:
    allocate.take_thp(Pagemap(), 4, allocate.Stopwatch())
except Shortage as error:
    print(error)
"""


def test_what_is_locked_and_no_huge_page_goes_back_all_the_same() -> None:
    done = subprocess.run([sys.executable, "-c", SMALL_PAGES_ONLY], capture_output=True, text=True, check=False)
    assert done.stdout == "huge pages came back as pages of 4096 bytes: memory is fragmented\n", done.stderr


def test_a_second_thread_keeps_a_holders_address_space_and_nothing_else(holders: Holders) -> None:
    first = holders.start()
    take(first, "a", "thp", 1)
    for holder in (first, holders.start()):
        take(holder, "b", "thp", 1)
        (other,) = {int(task.name) for task in Path(f"/proc/{holder.pid}/task").iterdir()} - {holder.pid}
        assert list(Path(f"/proc/{holder.pid}/task/{other}/fd").iterdir()) == []
        assert "/[aio]" in Path(f"/proc/{holder.pid}/maps").read_text()
        # Nor does it hear anything.
        (blocked,) = re.findall(r"^SigBlk:\s+(\S+)$", Path(f"/proc/{holder.pid}/task/{other}/status").read_text(), re.MULTILINE)
        assert int(blocked, 16) & (1 << cancellation.SIGNAL - 1)


def test_a_holder_runs_ahead_of_all_others_until_it_has_something_to_do(holders: Holders) -> None:
    """That is, while it waits: it would be the first to have its turn if it were killed."""
    first = holders.start()
    first.request({"op": "hello"})
    for holder in (first, holders.start()):
        wait_until(lambda pid=holder.pid: os.sched_getscheduler(pid) == os.SCHED_FIFO)  # type: ignore[misc]
        seen = set()
        with ThreadPoolExecutor(1) as others:
            taken = others.submit(take, holder, "a", "thp", 32)
            while not taken.done():
                seen.add(os.sched_getscheduler(holder.pid))
        assert taken.result().size
        assert os.SCHED_OTHER in seen
        # At once: it may be killed as soon as anybody knows what it holds.
        for _ in range(100):
            holder.request({"op": "hello"})
            assert os.sched_getscheduler(holder.pid) == os.SCHED_FIFO


def test_there_is_no_duplicate_of_a_dead_holders_pin(holders: Holders) -> None:
    """Whether its process has been waited for, as that of a fork is at once, or has not."""
    for holder in (holders.start(), holders.start()):
        take(holder, "a", "thp", 1)
        pin = holder.request({"op": "hello"})["extents"][0]["pin"]
        os.close(holder.duplicate(pin))
        with pytest.raises(HolderLost, match="died before its pin"):
            # As of one that has closed them all, and has not ended yet.
            holder.duplicate(pin + 100)
        os.kill(holder.pid, signal.SIGKILL)
        assert select.select([holder.pidfd], [], [], 60.0)[0]
        with pytest.raises(HolderLost, match="died before its pin"):
            holder.duplicate(pin)


def test_when_a_killed_holder_is_gone_its_memory_is_back(holders: Holders, pagemap: Pagemap) -> None:
    """Which is why the OOM killer does not take another one meanwhile. On a busy machine one may be gone too early."""
    holders.start().request({"op": "hello"})
    tries, in_time = 20, 0
    for _ in range(tries):
        holder = holders.start()
        extent = take(holder, "a", "thp", 4)
        os.kill(holder.pid, signal.SIGKILL)
        assert select.select([holder.pidfd], [], [], 60.0)[0]
        in_time += not any(
            pagemap.are_huge(first for run in extent.runs for first in range(run.first, run.end, FRAMES_PER_HUGE))
        )
        holders.kill(holder.name)
    assert in_time > tries // 2


def test_a_holder_keeps_what_it_holds_when_the_agent_goes(tmp_path: Path) -> None:
    first = Holders(tmp_path / "holders")
    extent = take(first.start(), "a", "thp", 2)
    first.close(lambda name: False)
    second = Holders(tmp_path / "holders")
    try:
        (found,) = second.adopt()
        (description,) = found.extents
        assert extent_of(description, found.name) == extent
        assert Pieces(description["pieces"]).are_in_place(found.pagemap, HUGE)
        assert found.request({"op": "give_back", "names": ["a"]})["failed"] == {}
        pid = found.pid
    finally:
        second.close(lambda name: True)
    wait_until(lambda: not Path(f"/proc/{pid}").exists() or "Z" in Path(f"/proc/{pid}/stat").read_text().split()[2])
    assert list((tmp_path / "holders").iterdir()) == []


def test_the_socket_of_a_dead_holder_is_cleared_away(tmp_path: Path) -> None:
    first = Holders(tmp_path / "holders")
    holder = first.start()
    holder.request({"op": "hello"})
    os.kill(holder.pid, signal.SIGKILL)
    with pytest.raises(HolderLost):
        holder.request({"op": "hello"})
    second = Holders(tmp_path / "holders")
    assert second.adopt() == []
    assert second.end_unclaimed() == []
    assert list((tmp_path / "holders").iterdir()) == []


def test_frames_in_flight_outlive_their_holder(holders: Holders, pagemap: Pagemap) -> None:
    """SIGKILL of a holder between translation and answer: the frames stay allocated until the host has answered."""
    ledger = Ledger()
    source = HeldSource("thp", HUGE, holders, ledger, 1 << 30)
    (extent,) = source.take(4 * HUGE)
    ledger.add(extent)
    assert extent.holder is not None
    holder = holders[extent.holder]
    os.kill(holder.pid, signal.SIGKILL)
    holders.kill(holder.name)  # waits for its end
    for run in extent.runs:
        assert not times_mapped(run.first)
        heads = range(run.first, run.end, FRAMES_PER_HUGE)
        assert not any(flags & (KPF_BUDDY | KPF_NOPAGE) for flags in pagemap.flags(heads)), "a frame went free in flight"
        assert all(pagemap.are_huge(heads))
    source.settle(extent)

    # What went free may be somebody else's huge page a moment later, who has it mapped.
    wait_until(lambda: all(times_mapped(run.first) or not all(pagemap.are_huge([run.first])) for run in extent.runs))


def times_mapped(frame: int) -> int:
    """Source: Documentation/admin-guide/mm/pagemap.rst, /proc/kpagecount."""
    with open("/proc/kpagecount", "rb", buffering=0) as file:
        return int.from_bytes(os.pread(file.fileno(), 8, 8 * frame), "little")


def no_answer(*_: object) -> None:
    raise HolderLost("no answer")


def test_a_holder_without_descriptors_is_not_the_end(holders: Holders) -> None:
    """As many extents of single pages as it may have files open, and then there is another holder."""
    ledger = Ledger()
    source = HeldSource("pages", FRAME, holders, ledger, 1 << 30)

    def take_one() -> Extent:
        (extent,) = source.take(FRAME)
        ledger.add(extent)
        source.settle(extent)
        return extent

    first = take_one()
    assert first.holder is not None
    pid = holders[first.holder].pid
    taken = {int(fd.name) for fd in Path(f"/proc/{pid}/fd").iterdir()}
    # One more.
    _, limit = [number for number in range(len(taken) + 2) if number not in taken][:2]
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (limit, limit))
    second, third, fourth = take_one(), take_one(), take_one()
    assert first.holder == second.holder != third.holder == fourth.holder
    assert ledger.size == 4 * FRAME
    # It has one again when it has given something back.
    ledger.remove(first.name)
    assert source.give_back([first]) == {}
    assert take_one().holder == first.holder
    assert take_one().holder == third.holder


def test_an_agent_without_descriptors_loses_nothing(holders: Holders) -> None:
    """What it cannot guard on its way to the host it does not take."""
    ledger = Ledger()
    source = HeldSource("pages", FRAME, holders, ledger, 1 << 30)
    (extent,) = source.take(FRAME)
    ledger.add(extent)
    source.settle(extent)
    assert extent.holder is not None
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, before[1]))
    others: list[int] = []
    try:
        with suppress(OSError):
            while True:
                others.append(os.dup(0))
        with pytest.raises(Shortage, match=r"not to be had: .*Too many open files"):
            source.take(FRAME)
        (held,) = holders[extent.holder].request({"op": "hello"})["extents"]
        assert held["name"] == extent.name
        # Nor is there another holder to be had, with what it would have held.
        with pytest.raises(OSError, match="Too many open files"):
            holders.start()
    finally:
        for fd in others:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    (extent,) = source.take(FRAME)
    source.settle(extent)


def test_what_a_holder_has_is_seen_from_outside(holders: Holders, monkeypatch: pytest.MonkeyPatch) -> None:
    """In place; gone, as the OOM killer takes it from who still lives for a moment; and with nobody left to look at."""
    source = HeldSource("thp", HUGE, holders, Ledger(), 1 << 30)
    (extent,) = source.take(2 * HUGE)
    assert source.in_place(extent)
    (gone,) = source.take(HUGE)
    assert extent.holder is not None
    holder = holders[extent.holder]
    # Behind the source's back, but by one that lives on and says so; and then by one that does not.
    assert holder.request({"op": "give_back", "names": [gone.name]})["failed"] == {}
    assert not source.in_place(gone)
    os.kill(holder.pid, signal.SIGSTOP)
    monkeypatch.setattr(HolderClient, "request", no_answer)
    with pytest.raises(HolderLost, match="no answer"):
        source.in_place(gone)
    # What is held still is seen without a word of its holder; and that there is nobody any more.
    assert source.in_place(extent)
    os.kill(holder.pid, signal.SIGKILL)
    assert select.select([holder.pidfd], [], [], 60.0)[0]
    with pytest.raises(HolderLost, match="has died"):
        source.in_place(extent)
    for one in (extent, gone):
        source.settle(one)


def test_a_worker_that_ends_leaves_no_socket_and_no_complaint(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    holders = Holders(tmp_path / "holders")
    holders.start().request({"op": "hello"})
    holders.start(holds_memory=False).request({"op": "hello"})
    holders.close(lambda name: True)
    assert list((tmp_path / "holders").iterdir()) == []
    assert capfd.readouterr().err == ""


def test_the_worker_of_a_dead_agent_is_ended(tmp_path: Path) -> None:
    first = Holders(tmp_path / "holders")
    first.start().request({"op": "hello"})
    worker = first.start(holds_memory=False)
    worker.request({"op": "hello"})
    os.kill(worker.pid, signal.SIGSTOP)  # as if it were stuck: it would answer nobody
    second = Holders(tmp_path / "holders")
    wait_until(lambda: Path(f"/proc/{worker.pid}").exists())
    for holder in first:
        if holder.holds_memory:
            holder.close()
    second.adopt()
    # It has ended by then, though its number may be there for a moment yet.
    assert select.select([worker.pidfd], [], [], 0)[0]
    wait_until(lambda: not Path(f"/proc/{worker.pid}").exists())
    second.close(lambda name: True)


@pytest.mark.parametrize("forked", [False, True])
def test_what_a_stuck_holder_has_is_the_guests_when_it_is_not_adopted(tmp_path: Path, pagemap: Pagemap, forked: bool) -> None:
    first = Holders(tmp_path / "holders")
    parent = first.start()
    parent.request({"op": "hello"})
    stuck = first.start() if forked else parent
    extent = take(stuck, "a", "thp", 2)
    heads = [frame for run in extent.runs for frame in range(run.first, run.end, FRAMES_PER_HUGE)]
    for holder in first:
        # Before it hears that nobody is connected: one that holds nothing would be on its way out, and stay there.
        os.kill(holder.pid, signal.SIGSTOP)
        holder.close()
    second = Holders(tmp_path / "holders")
    assert second.adopt(seconds=0.2) == []
    assert all(pagemap.are_huge(heads))
    assert second.end_unclaimed() == []
    # What goes free is somebody else's huge page perhaps, a moment later.
    wait_until(lambda: all(times_mapped(head) or not all(pagemap.are_huge([head])) for head in heads))
    assert list((tmp_path / "holders").iterdir()) == []


def test_a_stuck_holder_is_given_up(holders: Holders) -> None:
    holder = holders.start()
    holder.request({"op": "hello"})
    os.kill(holder.pid, signal.SIGSTOP)
    with pytest.raises(HolderLost, match=r"no answer to hello within 0\.1 s"):
        holder.request({"op": "hello"}, 0.1)
    holders.kill(holder.name)
    assert not Path(f"/proc/{holder.pid}").exists()


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def test_before_each_wait_for_a_holder_the_agent_says_that_it_is_alive(tmp_path: Path) -> None:
    """One step can be many of them, a minute each at worst."""
    said: list[str] = []
    waits = "start"
    holders = Holders(tmp_path / "holders", alive=lambda: said.append(waits))
    holder = holders.start()
    waits = "up"
    holder.request({"op": "hello"})
    os.kill(holder.pid, signal.SIGSTOP)
    waits = "stuck"
    with pytest.raises(HolderLost):
        holder.request({"op": "hello"}, 0.1)
    waits = "end"
    holders.kill(holder.name)
    # Once for its start, which is waited for at the first request.
    assert said == ["up", "up", "stuck", "end"]


def test_who_does_not_fork_in_time_keeps_what_it_holds(holders: Holders, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another one, or a new one, will do as well."""
    monkeypatch.setattr("balloon_agent.memory.holders.FORK_DEADLINE", 0.2)
    holder = holders.start()
    extent = take(holder, "a", "pages", 4)
    os.kill(holder.pid, signal.SIGSTOP)
    other = holders.start()
    assert parent_of(other.pid) == os.getpid()
    other.request({"op": "hello"})
    # The slow one is not waited for again.
    monkeypatch.setattr("balloon_agent.memory.holders.FORK_DEADLINE", 60.0)
    assert holder.is_slow
    assert parent_of(holders.start().pid) == other.pid
    os.kill(holder.pid, signal.SIGCONT)
    # What it answers to the first request is taken for no other answer.
    (description,) = holder.request({"op": "hello"})["extents"]
    assert extent_of(description, holder.name) == extent
    assert not holder.is_slow
    assert parent_of(holders.start().pid) == holder.pid


def test_who_is_not_called_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fork that came too late, or a holder whose agent was killed just then."""
    monkeypatch.setattr("balloon_agent.holder.server.CALL_DEADLINE", 0.01)
    with listen(str(tmp_path / "socket")) as listener:
        serve(listener, Holder())


def test_who_cannot_be_taken_off_the_fuse_is_never_on_it(holders: Holders) -> None:
    """Without CAP_SYS_RESOURCE it is permitted to make a process the first choice, and not to take that back."""
    holder = holders.start()
    path = Path(f"/proc/{holder.pid}/oom_score_adj")
    before = int(path.read_text())
    holder.set_fuse(True)
    during = int(path.read_text())
    holder.set_fuse(False)
    after = int(path.read_text())
    may_protect = int(re.search(r"CapEff:\s+(\w+)", Path("/proc/self/status").read_text())[1], 16) >> CAP_SYS_RESOURCE & 1  # type: ignore[index]
    assert (during, after) == ((FIRST_CHOICE, PROTECTED) if may_protect else (before, before))


def test_what_should_be_short_runs_ahead_of_others_for_a_while_only(holders: Holders, monkeypatch: pytest.MonkeyPatch) -> None:
    holder = holders.start()
    holder.request({"op": "hello"})
    given: list[tuple[int, Process]] = []
    monkeypatch.setattr("balloon_agent.memory.holder_client.give_priority", lambda *what: given.append(what))
    holder.request({"op": "hello"}, short=True)
    expected = [(AHEAD, holder.process), (ORDINARY, holder.process)]
    assert given == expected
    monkeypatch.setattr("balloon_agent.memory.holder_client.AHEAD_FOR", 0.01)
    os.kill(holder.pid, signal.SIGSTOP)
    with pytest.raises(HolderLost):
        holder.request({"op": "hello"}, 0.1, short=True)
    assert given == expected * 2


@pytest.mark.parametrize("source", ["thp", "pages"])
def test_who_takes_memory_gives_way(tmp_path: Path, source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of it is given up, at once, and the next request is another matter."""
    is_needed = True
    holders = Holders(tmp_path / "holders", lambda: 0.0 if is_needed else math.inf)
    holder = holders.start()
    try:
        holder.request({"op": "hello"})
        given: list[tuple[int, Process]] = []
        monkeypatch.setattr("balloon_agent.memory.holder_client.give_priority", lambda *what: given.append(what))
        # Somebody looks while it is at it, and before it could be through.
        monkeypatch.setattr("balloon_agent.memory.holder_client.LOOK", 0.001)
        request = {"op": "take", "name": "a", "source": source, "pinned": True, "compact": True}
        request["count"] = (1 << 30) // (HUGE if source == "thp" else FRAME)
        answer = holder.request(request, takes=True)
        assert not answer["ok"], "a gigabyte was there within a millisecond"
        assert answer["error"] == "given up half-way: somebody else needs the memory"
        assert holder.gave_way
        assert given == [(AHEAD, holder.process), (ORDINARY, holder.process)]
        assert holder.request({"op": "hello"})["extents"] == []
        assert not holder.gave_way
        assert own_memory_kib(holder.pid) < OWN_MEMORY_LIMIT_KIB, "it has kept what it gave up"
        # Memory that nobody else needs is taken, and what takes none does not give way.
        is_needed = False
        request["count"] = 2
        assert holder.request(request, takes=True)["ok"]
        is_needed = True
        assert holder.request({"op": "give_back", "names": ["a"]}) == {"ok": True, "failed": {}}
        assert not holder.gave_way
    finally:
        holders.kill(holder.name)


def test_who_has_not_begun_is_asked_again_until_it_gives_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a busy processor the holder may have its turn only after the agent has asked it to give way."""
    asked: list[float] = []

    def leeway() -> float:
        asked.append(time.monotonic())
        return 0.0

    holders = Holders(tmp_path / "holders", leeway)
    holder = holders.start()
    try:
        holder.request({"op": "hello"})
        signals: list[int] = []
        send = signal.pidfd_send_signal

        def count(pidfd: int, number: int) -> None:
            signals.append(number)
            send(pidfd, number)
            if len(signals) == 3:
                # What was asked of it while it was stopped is all forgotten when it begins.
                os.kill(holder.pid, signal.SIGCONT)

        monkeypatch.setattr(signal, "pidfd_send_signal", count)
        os.kill(holder.pid, signal.SIGSTOP)
        request = {"op": "take", "name": "a", "source": "pages", "count": (1 << 30) // FRAME, "pinned": True}
        answer = holder.request(request, takes=True)
        assert not answer["ok"]
        assert len(asked) == 1, "once there is need, there is"
        assert len(signals) > 3
    finally:
        holders.kill(holder.name)


def test_a_holder_that_is_asked_too_late_is_asked_nothing(holders: Holders) -> None:
    """It has answered by then; what comes next does not give way. So it is with one that was forked."""
    parent = holders.start()
    parent.request({"op": "hello"})
    for holder in (parent, holders.start()):
        holder.request({"op": "hello"})
        os.kill(holder.pid, cancellation.SIGNAL)
        assert take(holder, f"a-{holder.name}", "thp", 1)


def test_a_system_call_is_given_up_too(tmp_path: Path) -> None:
    """As that which takes a block offline: Python would begin it anew. Here it is one that never ends."""
    way = cancellation.GivingWay()
    before = signal.getsignal(cancellation.SIGNAL)
    state = tmp_path / "memory7/state"
    state.parent.mkdir()
    os.mkfifo(state)
    pipe = os.open(state, os.O_RDWR | os.O_NONBLOCK)
    try:
        with suppress(BlockingIOError):
            while True:
                os.write(pipe, bytes(4096))
        way.listen()
        answers: list[dict[str, object]] = []
        subject = Holder(str(tmp_path), giving_way=way)
        me = threading.get_native_id()

        def ask() -> None:
            wait_until(lambda: "pipe" in Path(f"/proc/self/task/{me}/wchan").read_text() or bool(answers))
            os.kill(os.getpid(), cancellation.SIGNAL)

        asker = threading.Thread(target=ask)
        asker.start()
        answers.append(subject.answer({"op": "offline", "blocks": [7, 8], "most": 2, "seconds": 60}))
        asker.join()
        (answer,) = answers
        assert (answer["done"], answer["failed"]) == ([], None)
    finally:
        os.close(pipe)
        signal.signal(cancellation.SIGNAL, before)


def test_a_session_of_its_own_has_the_same_priority(holders: Holders) -> None:
    """Where sessions compete with each other, niceness alone would do nothing."""
    enabled = Path("/proc/sys/kernel/sched_autogroup_enabled")
    if not enabled.exists() or enabled.read_text().strip() != "1":
        pytest.skip("NOT TESTED HERE: sessions do not compete with each other (sched_autogroup_enabled)")
    holder = holders.start()
    holder.request({"op": "hello"})
    for steps in (AHEAD, ORDINARY):
        assert give_priority(steps, holder.process)
        assert Path(f"/proc/{holder.pid}/autogroup").read_text().split()[-1] == str(os.getpriority(os.PRIO_PROCESS, holder.pid))


def test_a_priority_that_is_not_to_be_had_is_no_reason_to_give_a_holder_up(
    holders: Holders, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise BlockingIOError(errno.EAGAIN, "too often")

    holder = holders.start()
    monkeypatch.setattr(os, "setpriority", fails)
    assert not give_priority(AHEAD, holder.process)
    assert holder.request({"op": "hello"}, short=True)["ok"]


def test_a_holder_is_as_ordinary_a_process_as_any(holders: Holders) -> None:
    before = os.getpriority(os.PRIO_PROCESS, 0)
    try:
        assert give_priority(AHEAD)
        assert os.getpriority(os.PRIO_PROCESS, 0) < before
        first = holders.start()
    finally:
        assert give_priority(ORDINARY)
    second = holders.start()
    for holder in (first, second):
        holder.request({"op": "hello"})
        assert os.getpriority(os.PRIO_PROCESS, holder.pid) == before


def test_runs_of_a_huge_extent_are_joined_where_they_touch(holders: Holders) -> None:
    extent = take(holders.start(), "a", "thp", 8)
    assert total(extent.runs) == 8 * HUGE
    assert all(isinstance(run, Run) for run in extent.runs)


def test_a_worker_that_was_killed_and_does_not_end_is_known_until_it_does(
    holders: Holders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a system call that no signal ends, it may do yet what it was asked for."""
    worker = holders.start(holds_memory=False)
    worker.request({"op": "hello"})
    os.kill(worker.pid, signal.SIGSTOP)
    with monkeypatch.context() as stuck:
        stuck.setattr(HolderClient, "kill", lambda self: False)
        holders.kill(worker.name)
    assert holders.unended_workers == {worker.name}
    # Nor does the next agent take it for gone, if it cannot end it either.
    with monkeypatch.context() as stuck:
        stuck.setattr("balloon_agent.memory.left_behind.signal.pidfd_send_signal", lambda *_: None)
        later = Holders(tmp_path / "holders")
        later.adopt(0.1)
    assert later.unended_workers == {worker.name}
    pidfd = os.pidfd_open(worker.pid)
    signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    assert is_readable(pidfd, 60)
    os.close(pidfd)
    assert holders.unended_workers == later.unended_workers == set()
    assert not (tmp_path / "holders" / worker.name).exists()
