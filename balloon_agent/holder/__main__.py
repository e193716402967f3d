"""The holder: a small process that owns balloon memory, and does for the agent what may block or must outlive it.

It serves one connection at a time, keeps what it holds when the agent goes, and ends when it holds nothing and nobody
is connected. It imports little, since each holder costs the guest memory; a further one is a fork of the first, which
costs less than a tenth of that.

    main(SOCKET, LISTEN_FD, NAME=NUMBER...)

SOCKET is the path that the inherited listening socket is bound to; the rest are system call numbers.
"""

from __future__ import annotations

import gc
import os
import signal
import socket
import sys
from contextlib import suppress

from balloon_agent.linux import libc
from balloon_agent.linux.oom_score import PROTECTED, protect

from .cancellation import GivingWay
from .oom_victim import outlast_pins
from .server import Holder, serve

STDERR = 2


def stay_in_memory() -> None:
    """Keep this process, and all that it will hold, off the kernel's lists of what can be reclaimed.

    With swap, reclaim would look at each held page time and again and could take none, since they are pinned; and a program in
    need would have to wait until this process has been swapped in. A limit on locked memory is one on pins, too.
    """
    with suppress(OSError):
        libc.lock_all_memory(shares=True)


def main(argv: list[str]) -> int:
    path, fd = argv[0], int(argv[1])
    libc.use_numbers({name: int(number) for name, _, number in (text.partition("=") for text in argv[2:])})
    # A terminal's Ctrl-C goes to the whole group, and a holder outlives the agent on purpose. Children are not waited for.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    giving_way = GivingWay()
    giving_way.listen()
    listener = socket.socket(fileno=fd)
    # Objects that are there now stay: keep the collector from writing to pages that children share.
    gc.freeze()
    while True:
        # Like the agent, and whatever its parent was. Only what the host has acknowledged, and may be told of afterwards, could
        # be on the OOM fuse.
        protect(PROTECTED)
        outlast_pins()
        stay_in_memory()
        holder = Holder(giving_way=giving_way)
        serve(listener, holder)
        if holder.born_with is None:
            # The agent has renamed it (see left_behind.rename), or not yet, or cleared it away.
            for name in (path, f"{path}-{os.getpid()}"):
                with suppress(FileNotFoundError):
                    os.unlink(name)
            return 0
        # A child: a holder of its own, with nothing of its parent's. Above all not its pins, which would hold for ever.
        path, born = holder.born_with
        listener.detach()
        listener = born
        os.closerange(STDERR + 1, listener.fileno())
        os.closerange(listener.fileno() + 1, os.sysconf("SC_OPEN_MAX"))
        os.setsid()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
