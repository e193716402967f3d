"""A process that is known by its number, when the number has become another's."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from balloon_agent.linux.process import Process
from balloon_agent.memory.holders import Holders
from balloon_agent.memory.left_behind import HOLDER

# In a PID namespace of its own: the next process there has the number that is written to ns_last_pid, and one more.
RECYCLED = """
import os, signal, subprocess, sys, time
from pathlib import Path
from balloon_agent.memory.holders import Holders
from balloon_agent.linux.niceness import AHEAD, give_priority
holders = Holders(Path(sys.argv[1]))
holders.start()
holder = holders.start()
holder.request({"op": "hello"})
os.kill(holder.pid, signal.SIGKILL)
deadline = time.monotonic() + 60
while True:
    # Nobody waits for one that was forked: the kernel forgets its number by itself.
    Path("/proc/sys/kernel/ns_last_pid").write_text(str(holder.pid - 1))
    other = subprocess.Popen(["sleep", "60"], start_new_session=True)
    if other.pid == holder.pid:
        break
    assert time.monotonic() < deadline
    other.kill()
    other.wait()
before = Path(f"/proc/{other.pid}/oom_score_adj").read_text(), os.getpriority(os.PRIO_PROCESS, other.pid)
for on in (True, False):
    holder.set_fuse(on)
assert not give_priority(AHEAD, holder.process)
after = Path(f"/proc/{other.pid}/oom_score_adj").read_text(), os.getpriority(os.PRIO_PROCESS, other.pid)
holder.kill()
print("untouched" if after == before and other.poll() is None else f"{before} {after} {other.poll()}")
other.kill()
"""


def test_who_has_a_dead_holders_number_is_not_touched(tmp_path: Path) -> None:
    namespace = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]
    if subprocess.run([*namespace, "true"], capture_output=True, check=False).returncode:
        pytest.skip("NOT TESTED HERE: no PID namespace is to be had")
    script = [sys.executable, "-c", RECYCLED, str(tmp_path / "holders")]
    done = subprocess.run([*namespace, *script], capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout == "untouched\n", done.stderr


def test_who_has_a_dead_workers_number_is_not_ended(tmp_path: Path) -> None:
    """Not even a holder: it may be that of another agent."""
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)", HOLDER])
    folder = tmp_path / "holders"
    folder.mkdir()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(folder / f"worker-{other.pid}"))
    try:
        assert Holders(folder).adopt() == []
        assert list(folder.iterdir()) == []
        assert other.poll() is None
    finally:
        other.kill()
        other.wait()


def test_what_is_known_of_a_process_is_that_process() -> None:
    child = subprocess.Popen(["sleep", "60"])
    process = Process(child.pid)
    assert not process.ends_within(0)
    with open(process.open("status", os.O_RDONLY), encoding="ascii") as file:
        assert f"\nPid:\t{child.pid}\n" in file.read()
    process.signal(9)
    assert process.ends_within(60)
    # Its number is its own as long as nobody has waited for it; but it is not there any more.
    with pytest.raises(ProcessLookupError, match="has ended"):
        process.open("status", os.O_RDONLY)
    child.wait()
    process.signal(9)
    with pytest.raises(ProcessLookupError, match="has ended"):
        process.open("status", os.O_RDONLY)
    process.close()
    with pytest.raises(ProcessLookupError):
        Process(child.pid)
