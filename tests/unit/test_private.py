"""What lies in the run directory and where the device is locked is believed: so both are root's alone, or refused."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from balloon_agent.api.control import Access, ControlServer
from balloon_agent.api.snapshot import Board
from balloon_agent.errors import BadInput, DeviceBusy
from balloon_agent.linux import private
from balloon_agent.takeover.lock import (
    device_lock,
    lock_device,
    lock_run_dir,
    who_drives,
)
from tests.unit.test_service import SNAPSHOT, FakeOwner

ADDRESS = "0000:00:05.0"
SOMEBODY = 65534
by_root = pytest.mark.skipif(os.geteuid() != 0, reason="giving files to another user takes root")


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o7777


def made(path: Path, bits: int) -> Path:
    path.mkdir(parents=True)
    path.chmod(bits)
    return path


def agent(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "balloon_agent.cli.agent", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


@contextmanager
def locked(path: Path, text: str = "") -> Iterator[None]:
    path.touch(0o600)
    with path.open("r+") as file:
        file.write(text)
        file.flush()
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


# -- directories -----------------------------------------------------------------------------------------------------------


def test_a_run_dir_is_made_closed_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        lock_run_dir(tmp_path / "a/b").close()
    finally:
        os.umask(before)
    assert (mode(tmp_path / "a"), mode(tmp_path / "a/b")) == (0o755, 0o700)


@pytest.mark.parametrize("bits", [0o1777, 0o777, 0o770, 0o702])
def test_a_run_dir_that_others_may_write_to_is_refused_and_left_as_it_is(tmp_path: Path, bits: int) -> None:
    folder = made(tmp_path / "shared", bits)
    with pytest.raises(BadInput, match=rf"others than root may write to {folder} \(mode {bits:04o}\): .* choose another"):
        lock_run_dir(folder)
    assert mode(folder) == bits
    assert list(folder.iterdir()) == []


def test_only_where_nobody_else_can_replace_it_may_a_run_dir_lie_in_what_is_everybodys(tmp_path: Path) -> None:
    sticky = made(tmp_path / "sticky", 0o1777)
    lock_run_dir(sticky / "mine").close()
    assert mode(sticky / "mine") == 0o700
    shared = made(tmp_path / "shared", 0o777)
    assert private.obstacle(made(shared / "mine", 0o700)) == f"others than root may write to {shared} (mode 0777)"


@by_root
def test_a_run_dir_of_somebody_else_or_on_a_way_of_theirs_is_refused(tmp_path: Path) -> None:
    theirs = made(tmp_path / "theirs", 0o700)
    mine = made(tmp_path / "mine", 0o700)
    link = tmp_path / "link"
    link.symlink_to(mine)
    assert private.obstacle(link) is None
    os.chown(theirs, SOMEBODY, SOMEBODY)
    os.lchown(link, SOMEBODY, SOMEBODY)
    assert private.obstacle(theirs) == f"{theirs} belongs to user {SOMEBODY}, and not to root"
    assert private.obstacle(theirs / "below") == f"{theirs} belongs to user {SOMEBODY}, and not to root"
    assert private.obstacle(link) == f"{link} belongs to user {SOMEBODY}, and not to root"


def test_a_link_leads_to_where_it_leads(tmp_path: Path) -> None:
    shared = made(tmp_path / "shared", 0o777)
    (tmp_path / "link").symlink_to(made(shared / "mine", 0o700))
    assert private.obstacle(tmp_path / "link") == f"others than root may write to {shared} (mode 0777)"


def test_a_file_is_no_directory(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(BadInput, match="file is no directory"):
        lock_run_dir(tmp_path / "file")


def test_the_configuration_is_refused_with_it_before_anything_is_stopped_for_it(tmp_path: Path) -> None:
    folder = made(tmp_path / "shared", 0o1777)
    said = agent("run", "--check-config", "--run-dir", str(folder))
    assert said.returncode == 1
    assert said.stderr.count("\n") == 1
    assert f"--run-dir {folder}: others than root may write to" in said.stderr
    assert agent("run", "--check-config", "--run-dir", str(tmp_path / "new")).returncode == 0
    assert not (tmp_path / "new").exists()


@by_root
@pytest.mark.parametrize("command", ["run", "restore"])
def test_nothing_is_changed_or_believed_in_one_that_is_everybodys(tmp_path: Path, command: str) -> None:
    folder = made(tmp_path / "shared", 0o1777)
    (folder / "state.json").write_text("{")
    said = agent(command, "--run-dir", str(folder))
    assert (said.returncode, said.stderr.count("\n")) == (1, 1)
    assert "others than root may write to" in said.stderr
    assert (mode(folder), os.listdir(folder)) == (0o1777, ["state.json"])


@by_root
@pytest.mark.parametrize(
    ("bits", "group", "then"),
    [(0o700, "root", 0o710), (0o710, None, 0o700), (0o755, None, 0o755), (0o755, "root", 0o755), (0o750, "root", 0o750)],
)
def test_only_a_directory_with_the_agents_own_modes_is_given_another(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, bits: int, group: str | None, then: int
) -> None:
    folder = made(tmp_path / "run", bits)
    server = ControlServer(folder, Board(SNAPSHOT), FakeOwner(), access=Access(group))
    server.stop()
    assert mode(folder) == then
    # A group that may not get through is told of.
    assert ("mode 0750, and stays so" in caplog.text) == (bits == 0o750)


# -- locks -----------------------------------------------------------------------------------------------------------------


def test_a_lock_follows_no_link(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_text("content")
    made(tmp_path / "locks", 0o700)
    device_lock(ADDRESS, tmp_path / "locks").symlink_to(precious)
    with pytest.raises(OSError, match="Too many levels of symbolic links"):
        lock_device(ADDRESS, tmp_path / "locks", tmp_path)
    assert precious.read_text() == "content"


@pytest.mark.parametrize(("text", "words"), [("4711\n", "process 4711"), ("\x1b[2J4711", "process unknown"), ("", "unknown")])
def test_what_a_lock_says_is_believed_if_it_is_a_number(tmp_path: Path, text: str, words: str) -> None:
    with locked(device_lock(ADDRESS, tmp_path), text), pytest.raises(DeviceBusy, match=words) as caught:
        lock_device(ADDRESS, tmp_path, tmp_path)
    assert str(caught.value).isprintable()


def test_the_device_is_locked_where_nobody_else_can(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="must be root's alone"):
        lock_device(ADDRESS, made(tmp_path / "lock", 0o1777))
    assert private.obstacle(device_lock(ADDRESS).parent) is None


def test_an_agent_of_a_version_before_is_noticed(tmp_path: Path) -> None:
    old = made(tmp_path / "lock", 0o1777)
    assert who_drives(ADDRESS, tmp_path / "locks", old) is None
    with locked(old / f"balloon-agent-{ADDRESS}.lock"):
        assert who_drives(ADDRESS, tmp_path / "locks", old) == os.getpid()
        with pytest.raises(DeviceBusy, match=f"{ADDRESS} is used by another agent already, process {os.getpid()}"):
            lock_device(ADDRESS, tmp_path / "locks", old)
    lock_device(ADDRESS, tmp_path / "locks", old).close()


@pytest.mark.parametrize("bits", [0o644, 0o660, 0o606])
def test_a_lock_that_anybody_could_have_is_no_agents(tmp_path: Path, bits: int) -> None:
    """Made by another user, or linked to a file of root's that everybody may read."""
    path = tmp_path / f"balloon-agent-{ADDRESS}.lock"
    with locked(path):
        path.chmod(bits)
        assert who_drives(ADDRESS, tmp_path / "locks", tmp_path) is None
        lock_device(ADDRESS, tmp_path / "locks", tmp_path).close()


@by_root
def test_a_forged_lock_keeps_nobody_out(tmp_path: Path) -> None:
    path = tmp_path / f"balloon-agent-{ADDRESS}.lock"
    with locked(path):
        os.chown(path, SOMEBODY, SOMEBODY)
        lock_device(ADDRESS, tmp_path / "locks", tmp_path).close()
        link = tmp_path / "balloon-agent-0000:00:06.0.lock"
        link.symlink_to(path)
        assert who_drives("0000:00:06.0", tmp_path / "locks", tmp_path) is None


@pytest.mark.parametrize("bits", [None, 0o700])
def test_anybody_may_see_who_drives_a_device(tmp_path: Path, bits: int | None) -> None:
    """And nobody but root may have its lock; whatever the umask is, and whoever has made the directory."""
    if bits is not None:
        made(tmp_path / "locks", bits)
    before = os.umask(0o077)
    try:
        lock_device("0000:00:05.0", tmp_path / "locks", tmp_path / "old", tmp_path / "proc").close()
    finally:
        os.umask(before)
    assert mode(tmp_path / "locks") == 0o755
    assert mode(tmp_path / "locks/0000:00:05.0.lock") == 0o600


def test_a_lock_that_comes_to_nothing_is_let_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kept by nobody, it would be in the way of the next try."""

    def chmod(path: Path, mode: int) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    folders = (tmp_path / "locks", tmp_path / "old", tmp_path / "proc")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "chmod", chmod)
        with pytest.raises(OSError, match="Read-only file system"):
            lock_device(ADDRESS, *folders)
    lock_device(ADDRESS, *folders).close()
