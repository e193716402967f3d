"""The daemon's surroundings: control socket, metrics, state, lock, command lines."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from balloon_agent.api.client import ask, ask_status
from balloon_agent.api.control import LONGEST_REQUEST, ControlServer
from balloon_agent.api.messages import Answer, encode
from balloon_agent.api.snapshot import Board, Snapshot, State
from balloon_agent.cli import agent, commands
from balloon_agent.errors import (
    AgentUnreachable,
    BadInput,
    BalloonError,
    DeviceBusy,
)
from balloon_agent.guest.shared_sysctls import Changed
from balloon_agent.options import parse_listen
from balloon_agent.sizing.governor import Mode
from balloon_agent.takeover.lock import lock_device, lock_run_dir
from balloon_agent.takeover.state import StateFile

MIB = 1 << 20
SNAPSHOT = Snapshot(
    version="1.2.3",
    pid=42,
    device="0000:00:05.0",
    driver="uio_pci_generic",
    channel="cont",
    offered_features=0x42,
    negotiated_features=0x1_0000_0040,
    state=State.RESTING,
    reason="the host's target",
    target_bytes=10 * MIB,
    actual_bytes=10 * MIB,
    host_target_bytes=10 * MIB,
    held_bytes={"thp": 8 * MIB, "pages": 2 * MIB},
    phase_seconds_total={"take": 1.5, "post": 0.25},
)


class FakeOwner:
    """Takes commands as the owner thread would, at once."""

    def __init__(self) -> None:
        self.board = Board(SNAPSHOT)
        self.taken: list[tuple[str, int | None]] = []
        self.limit = 1 << 40

    def command(self, mode: Mode, size: int | None) -> int:
        if size is not None and size > 1 << 30:
            raise BadInput("too much")
        self.taken.append((mode, size))
        number = len(self.taken)
        target = min(size or 0, self.limit)
        self.board.publish(replace(self.board.latest, mode=mode, target_bytes=target, commands_done=number))
        return number

    def locate(self, cell_bytes: int) -> bytes:
        return encode(Answer(ok=True, map={"thp": [(3, cell_bytes)]}))


@pytest.fixture
def owner(tmp_path: Path) -> Iterator[FakeOwner]:
    owner = FakeOwner()
    server = ControlServer(tmp_path, owner.board, owner, lambda: {"free_memory": 7 * MIB})
    server.start()
    yield owner
    server.stop()
    assert not (tmp_path / "control").exists()


def test_status_and_set_and_follow(owner: FakeOwner, tmp_path: Path) -> None:
    path = tmp_path / "control"
    assert ask_status(path, {"op": "status"}, 60)["actual_bytes"] == 10 * MIB
    assert ask_status(path, {"op": "set", "size": 4096}, 60)["mode"] == "manual"
    assert ask_status(path, {"op": "follow"}, 60)["mode"] == "follow"
    assert owner.taken == [("manual", 4096), ("follow", None)]
    assert path.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    "request_line",
    [
        b"hello\n",
        b"[]\n",
        b"{}\n",
        b'{"op": "set"}\n',
        b'{"op": "set", "size": true}\n',
        b'{"op": "set", "size": "1G"}\n',
        b'{"op": "set", "size": 1099511627776}\n',
        b'{"op": "wait", "timeout": -1}\n',
        b'{"op": "wait", "timeout": 1e99}\n',
        b'{"op": "status"' + b" " * LONGEST_REQUEST + b"}\n",
        b"[" * 3000 + b"\n",
        b"\xff\xfe\n",
    ],
)
def test_nonsense_is_answered_and_harms_nobody(owner: FakeOwner, tmp_path: Path, request_line: bytes) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(60)
        connection.connect(str(tmp_path / "control"))
        connection.sendall(request_line)
        answer = json.loads(connection.makefile("rb").readline())
    assert answer["ok"] is False
    assert answer["error"]
    assert owner.taken == []
    assert ask_status(tmp_path / "control", {"op": "status"}, 60)["pid"] == 42


def test_a_waiting_client_is_answered_when_the_balloon_comes_to_rest(owner: FakeOwner, tmp_path: Path) -> None:
    owner.board.publish(replace(SNAPSHOT, state=State.INFLATING))
    answers: list[object] = []
    waiting = threading.Thread(
        target=lambda: answers.append(ask_status(tmp_path / "control", {"op": "wait", "timeout": 60}, 90)["state"])
    )
    waiting.start()
    # Others are served meanwhile.
    assert ask_status(tmp_path / "control", {"op": "status"}, 60)["state"] == "inflating"
    assert answers == []
    owner.board.publish(replace(SNAPSHOT, state=State.SHORT))
    waiting.join(60)
    assert answers == ["short"]


def test_a_wait_ends_at_its_time(owner: FakeOwner, tmp_path: Path) -> None:
    owner.board.publish(replace(SNAPSHOT, state=State.INFLATING))
    assert ask_status(tmp_path / "control", {"op": "wait", "timeout": 0.01}, 60)["state"] == "inflating"


@pytest.mark.parametrize("listen", ["", "9758", "host:", "host:port", "127.0.0.1:70000", "127.0.0.1:-1"])
def test_a_bad_listen_address_is_refused(listen: str) -> None:
    with pytest.raises(BadInput, match="HOST:PORT"):
        parse_listen(listen)


def test_state_outlives_its_writer(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    first = StateFile(path)
    first.record_driver("0000:00:05.0", "virtio-pci")
    first.record_blocks({7: "DMA32"})
    second = StateFile(path)
    assert second.previous_drivers == {"0000:00:05.0": "virtio-pci"}
    assert second.blocks == {7: "DMA32"}
    second.forget_blocks([7])
    second.forget_driver("0000:00:05.0")
    assert list(tmp_path.iterdir()) == []


def test_what_was_asked_for_outlives_the_agent_and_not_its_work(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    first = StateFile(path)
    first.record_driver("0000:00:05.0", "virtio-pci")
    first.record_wish(Mode.MANUAL, 4096)
    second = StateFile(path)
    assert second.wish == ("manual", 4096)
    second.forget_driver("0000:00:05.0")
    assert second.wish is None
    assert not path.exists()


@pytest.mark.parametrize("content", ["", "{", '{"version": 2}', "[]", '{"version": 1}', '{"version": 1, "blocks": 3}'])
def test_a_damaged_state_is_not_guessed_at(tmp_path: Path, content: str) -> None:
    path = tmp_path / "state.json"
    path.write_text(content)
    with pytest.raises(BalloonError, match=r"state\.json"):
        StateFile(path)
    assert path.read_text() == content


def test_a_signal_before_the_daemon_listens_interrupts_nothing_and_is_not_forgotten() -> None:
    program = """
import os, select, signal
from balloon_agent.agent.stopping import Stopping
stopping = Stopping()
assert not stopping.is_asked and not select.select([stopping], [], [], 0)[0]
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
    os.kill(os.getpid(), number)
assert select.select([stopping], [], [], 60)[0]
assert stopping.is_asked
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


@pytest.mark.parametrize(("version", "foreign"), [(1, False), (2, False), (3, True)])
def test_a_state_of_another_version_is_not_what_a_start_fails_for(tmp_path: Path, version: int, foreign: bool) -> None:
    """An older one had less to note. What a newer one means is not known for certain: it is to be undone, not gone on with."""
    path = tmp_path / "state.json"
    content = {"version": version, "previous_drivers": {"0000:00:05.0": "virtio-pci"}, "blocks": {"7": "Normal"}}
    path.write_text(json.dumps(content | ({"pools": {}, "sysctls": {}, "news": [1]} if foreign else {})))
    state = StateFile(path)
    assert state.previous_drivers == {"0000:00:05.0": "virtio-pci"}
    assert state.blocks == {7: "Normal"}
    assert state.is_foreign is foreign
    state.forget_blocks([7])
    assert not StateFile(path).is_foreign


def test_the_lock_names_its_holder_and_goes_with_it(tmp_path: Path) -> None:
    lock = lock_device("0000:00:05.0", tmp_path)
    other = lock_device("0000:00:06.0", tmp_path)
    with pytest.raises(DeviceBusy, match=f"0000:00:05.0 .* process {os.getpid()}"):
        lock_device("0000:00:05.0", tmp_path)
    lock.close()
    lock_device("0000:00:05.0", tmp_path).close()
    other.close()
    folder = lock_run_dir(tmp_path)
    with pytest.raises(DeviceBusy, match=str(tmp_path)):
        lock_run_dir(tmp_path)
    folder.close()


def test_without_an_agent_balloonctl_says_how_to_start_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert commands.main(["status", "--run-dir", str(tmp_path)]) == commands.NO_AGENT
    error = capsys.readouterr().err
    assert "no agent answers" in error
    assert "balloon-agent run" in error
    assert error.count("\n") == 1
    with pytest.raises(AgentUnreachable):
        ask(tmp_path / "control", {"op": "status"}, 1)


def test_balloonctl_says_whether_the_size_was_reached(
    owner: FakeOwner, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert commands.main(["status", "--json", "--run-dir", str(tmp_path)]) == commands.REACHED
    assert json.loads(capsys.readouterr().out)["device"] == "0000:00:05.0"
    owner.board.publish(replace(SNAPSHOT, state=State.SHORT, shortfall="the guest is full"))
    assert commands.main(["set", "20M", "--run-dir", str(tmp_path)]) == commands.FELL_SHORT
    captured = capsys.readouterr()
    assert "short by 10 MiB: the guest is full" in captured.err
    # A limit, or need of memory: it has what it is to have, and not what was asked for.
    owner.limit = 10 * MIB
    owner.board.publish(replace(SNAPSHOT, reason="the upper limit; set by hand is 20 MiB"))
    assert commands.main(["set", "20M", "--run-dir", str(tmp_path)]) == commands.FELL_SHORT
    assert "short by 10 MiB: the upper limit; set by hand is 20 MiB" in capsys.readouterr().err
    owner.board.publish(replace(SNAPSHOT, state=State.INFLATING))
    assert commands.main(["set", "9M", "--timeout", "0", "--run-dir", str(tmp_path)]) == commands.FELL_SHORT
    assert "short by 1 MiB: still inflating, see --timeout" in capsys.readouterr().err
    assert commands.main(["set", "10M", "--timeout", "0", "--run-dir", str(tmp_path)]) == commands.REACHED
    assert commands.main(["set", "20M", "--no-wait", "--run-dir", str(tmp_path)]) == commands.REACHED
    assert owner.taken[-1] == ("manual", 20 * MIB)


@pytest.mark.parametrize("size", ["100", "12q", "2T"])
def test_balloonctl_refuses_a_wrong_size(
    owner: FakeOwner, tmp_path: Path, capsys: pytest.CaptureFixture[str], size: str
) -> None:
    assert commands.main(["set", size, "--run-dir", str(tmp_path)]) == commands.REFUSED
    assert capsys.readouterr().err.count("\n") == 1
    assert owner.taken == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["run", "--sources", "gold"], "unknown source gold"),
        (["run", "--sources", ","], "unknown source"),
        (["run", "--reserve", "x"], "no size"),
    ],
)
def test_the_agent_refuses_a_wrong_option_in_one_line(arguments: list[str], words: str) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "balloon_agent.cli.agent", *arguments], capture_output=True, text=True, timeout=60, check=False
    )
    assert result.returncode == 1
    assert words in result.stderr
    assert result.stderr.count("\n") == 1


def test_the_agent_refuses_to_run_without_root() -> None:
    # The imports come first: an ordinary user may not be able to read this interpreter's modules.
    program = (
        "import os, sys\nfrom balloon_agent.cli.agent import main\nimport balloon_agent.agent.run\n"
        "os.getuid() or os.setuid(65534)\nsys.exit(main(['run']))"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 1
    assert f"must run as root, not as user {os.getuid() or 65534}" in result.stderr
    assert result.stderr.count("\n") == 1


ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_manual_pages_say_what_the_commands_take(tmp_path: Path) -> None:
    """They are made from the command lines, and kept: contrib/manual/make writes them anew."""
    subprocess.run([ROOT / "contrib/manual/make", tmp_path], check=True, timeout=300)
    for name in ("balloonctl.1", "balloon-agent.8"):
        assert (tmp_path / name).read_text() == (ROOT / "deploy/man" / name).read_text(), "run contrib/manual/make"


@pytest.mark.parametrize(
    ("program", "typed", "offered"),
    [
        ("balloonctl", "st", "status stats"),
        ("balloonctl", "set --", "--help --run-dir --json --timeout --no-wait --guest"),
        ("balloon-agent", "re", "restore"),
        ("balloon-agent", "run --re", "--reserve --relief --relief-below-target --relief-cooldown"),
    ],
)
def test_a_shell_completes_what_is_typed(program: str, typed: str, offered: str) -> None:
    words = [program, *typed.split()]
    script = (
        f"source <({Path(sys.executable).with_name(program)} completion bash); COMP_WORDS=({' '.join(words)}); "
        f"COMP_CWORD={len(words) - 1}; _shtab_{program.replace('-', '_')}; echo ${{COMPREPLY[@]}}"
    )
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == offered, done.stderr


def test_help_names_every_command() -> None:
    assert "run" in agent.parser().format_help()
    assert all(word in commands.parser().format_help() for word in commands.COMMANDS)


def test_what_a_setting_was_made_is_on_record_and_missing_in_older_files(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    StateFile(path).record_sysctl("vm.overcommit_memory", Changed(0, (0, 1)))
    assert StateFile(path).sysctls == {"vm.overcommit_memory": Changed(0, (0, 1))}
    content = json.loads(path.read_text())
    # As earlier versions have it, which read this one, too.
    assert content["sysctls"] == {"vm.overcommit_memory": 0}
    del content["sysctls_written"]
    path.write_text(json.dumps(content))
    assert StateFile(path).sysctls == {"vm.overcommit_memory": Changed(0)}
    StateFile(path).record_sysctl("vm.overcommit_memory", None)
    assert not path.exists()
