"""balloonctl: see and set the balloon by hand.

``status`` is what monitoring scripts ask again and again. It is answered from here, with hardly an import, by an agent that
has the text ready; everything else, and whatever goes wrong, is for ``commands``.
"""

import sys

from balloon_agent.paths import DEFAULT_RUN_DIR, SOCKET_NAME

# Seconds; commands waits longer.
QUICK_DEADLINE = 5.0
# How an answer with nothing but text begins.
_BEGIN = b'{"ok":true,"text":"'


def quick_status(words: list[str]) -> str | None:
    """The text for ``status``, or None: another command, other options, or no such answer."""
    if words not in (["status"], ["status", "--json"]):
        return None
    # Below socket and json: importing those takes longer than all the rest.
    from _json import scanstring
    from _socket import AF_UNIX, SOCK_STREAM, socket

    connection = socket(AF_UNIX, SOCK_STREAM)
    try:
        connection.settimeout(QUICK_DEADLINE)
        connection.connect(f"{DEFAULT_RUN_DIR}/{SOCKET_NAME}")
        connection.sendall(b'{"op":"status","show":"%s"}\n' % (b"words" if len(words) == 1 else b"json"))
        line = b""
        while not line.endswith(b"\n"):
            data = connection.recv(65536)
            if not data:
                return None
            line += data
    except OSError:
        return None
    finally:
        connection.close()
    if not line.startswith(_BEGIN):
        return None
    text: str = scanstring(line.decode(), len(_BEGIN))[0]
    return text


def main(argv: list[str] | None = None) -> int:
    """Exit codes: 0 done, 1 refused, 2 a wrong command line, 3 fell short of the size, 4 no agent."""
    words = sys.argv[1:] if argv is None else list(argv)
    try:
        text = quick_status(words)
        if text is None:
            from .commands import main

            code = main(words)
        else:
            sys.stdout.write(text + "\n")
            code = 0
        # Here, where it can still be said that it failed.
        sys.stdout.flush()
    except KeyboardInterrupt:
        # The agent goes on with what it was told.
        sys.stderr.write("\n")
        return 130
    except OSError as error:
        return _unwritten(error)
    return code


def _unwritten(error: OSError) -> int:
    import os

    # Nothing more is to be written when this process ends.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    if isinstance(error, BrokenPipeError):
        # Whoever read the output has had enough.
        return 0
    sys.stderr.write(f"balloonctl: error: the output cannot be written: {error.strerror}\n")
    return 1


if __name__ == "__main__":
    sys.exit(main())
