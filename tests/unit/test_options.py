"""Options: flags, the configuration file, and what can change while the agent runs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from balloon_agent.cli import agent
from balloon_agent.errors import BadInput
from balloon_agent.options import (
    OPTIONS,
    Options,
    fixed_changes,
    gather,
)

MIB = 1 << 20
# A value for each that is not its default, as the file has it.
OTHERS: dict[str, object] = {
    "device": "0000:00:05.0",
    "driver": "vfio-pci",
    "vfio-noiommu": True,
    "run-dir": "/run/other",
    "sources": ["thp", "pages"],
    "channel": "classic",
    "frames-per-buffer": 512,
    "allow-unpinned": True,
    "reserve": "64M",
    "lower-limit": "4M",
    "upper-limit": 8 * MIB,
    "relief": False,
    "relief-below-target": "never",
    "relief-cooldown": 2.5,
    "overcommit": False,
    "on-stop": "keep",
    "control-group": "root",
    "control-group-may": "change",
    "metrics-listen": "[::1]:9000",
    "metrics-certificate": "/etc/a.pem",
    "metrics-key": "/etc/a.key",
    "metrics-client-ca": "/etc/ca.pem",
    "verbose": True,
}


def toml(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return f"[{', '.join(toml(each) for each in value)}]"
    return f'"{value}"' if isinstance(value, str) else str(value)


def flag(name: str, value: object) -> list[str]:
    if isinstance(value, bool):
        return [f"--{name}" if value else f"--no-{name}"]
    return [f"--{name}", ",".join(value) if isinstance(value, list) else str(value)]


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "agent.toml"
    path.write_text(text)
    return path


def flags_of(words: list[str]) -> dict[str, object]:
    given = vars(agent.parser().parse_args(["run", *words]))
    return {name: value for name, value in given.items() if name not in ("command", "config", "check_config")}


def test_every_option_is_a_flag_and_a_key_and_means_the_same(tmp_path: Path) -> None:
    assert OTHERS.keys() == {option.name for option in OPTIONS}
    file = written(tmp_path, "".join(f"{name} = {toml(value)}\n" for name, value in OTHERS.items()))
    by_file = gather({}, file)
    by_flags = gather(flags_of([word for name, value in OTHERS.items() for word in flag(name, value)]), None)
    assert by_file == by_flags
    assert all(getattr(by_file, option.field) != option.default for option in OPTIONS)


def test_a_flag_says_more_than_the_file_and_the_file_more_than_the_default(tmp_path: Path) -> None:
    file = written(tmp_path, 'reserve = "64M"\nsources = ["pages"]\nrelief = false\n')
    options = gather(flags_of(["--reserve", "32M", "--relief"]), file)
    assert (options.reserve, options.sources, options.relief) == (32 * MIB, ("pages",), True)
    assert options.channel == Options().channel


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("\n# a comment\nreserv = 3\n", 3, "reserv: there is no such option; known are device"),
        ('verbose = true\nreserve = "12q"\n', 2, "reserve: '12q' is no size"),
        ("reserve = 100\n", 1, "reserve: .*not a multiple of 4096"),
        ("reserve = -4096\n", 1, "reserve: '-4096' is no size"),
        ("reserve = 1.5\n", 1, "reserve: 1.5 is no text"),
        ('\nchannel = "gold"\n', 2, "channel: 'gold' is none of auto, cont"),
        ('relief = "yes"\n', 1, "relief: 'yes' is not true or false"),
        ("sources = [1]\n", 1, r"sources: \[1\] is no list of sources"),
        ('sources = "gold"\n', 1, "sources: unknown source gold"),
        ("relief-cooldown = 0\n", 1, "relief-cooldown: 0 is not more than 0"),
        ("frames-per-buffer = 100\n", 1, "frames-per-buffer: 100 is none of 256, 512"),
        ("frames-per-buffer = 1.5\n", 1, "frames-per-buffer: 1.5 is no whole number"),
        ('control-group = "no such group"\n', 1, "control-group: there is no group .*groupadd"),
        (f"relief-cooldown = 1{'0' * 400}\n", 1, "relief-cooldown: 10*0 is no number of seconds"),
        ('control-group = "\\u0000"\n', 1, "control-group: '.x00' is no text"),
        ('run-dir = "/x\\u0000y"\n', 1, "run-dir: '/x.x00y' is no text"),
        ('metrics-key = "relative.pem"\n', 1, "metrics-key: 'relative.pem' is no absolute path"),
        ('metrics-listen = "9758"\n', 1, "metrics-listen: '9758' is no address"),
        ("\n\n[metrics]\nlisten = 3\n", 3, "metrics: there is no such option"),
        ('"verbose" = 1\n', 1, "verbose: 1 is not true or false"),
    ],
)
def test_a_bad_file_is_refused_with_line_and_key(tmp_path: Path, text: str, line: int, words: str) -> None:
    file = written(tmp_path, text)
    with pytest.raises(BadInput, match=f"agent.toml, line {line}, {words}") as caught:
        gather({}, file)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"reserve = \n", "line 1"),
        (b'a = 1\nb = "\n', "line 2"),
        (b"\xff\xfe", "no TOML"),
        (b"[" * 5000, "no TOML"),
        (b"reserve = 1" + b"0" * 5000, "no TOML"),
    ],
)
def test_what_is_no_toml_is_refused_with_the_line(tmp_path: Path, content: bytes, words: str) -> None:
    file = tmp_path / "agent.toml"
    file.write_bytes(content)
    with pytest.raises(BadInput, match=words):
        gather({}, file)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"none\.toml cannot be read: No such file"):
        gather({}, tmp_path / "none.toml")


@given(st.binary(max_size=200))
def test_no_file_does_worse_than_be_refused(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    file = tmp_path_factory.getbasetemp() / "fuzzed.toml"
    file.write_bytes(content)
    try:
        gather({}, file)
    except BadInput as error:
        said = str(error)
    else:
        said = f"{file} makes sense"
    assert "fuzzed.toml" in said


def test_options_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(BadInput, match=r"lower limit, 8388608 bytes, is above the upper one, 4194304"):
        gather({"lower_limit": "8M", "upper_limit": "4M"}, None)
    with pytest.raises(BadInput, match="metrics-certificate"):
        gather({"metrics_client_ca": "/etc/ca.pem"}, None)


def test_what_cannot_change_while_the_agent_runs_is_known() -> None:
    before = Options()
    assert fixed_changes(before, Options(reserve=4096, on_stop="keep", sources=("pages",), verbose=True)) == []
    assert fixed_changes(before, Options(channel="classic", metrics_listen="[::]:1")) == ["channel", "metrics-listen"]


def run(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "balloon_agent.cli.agent", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_check_config_says_whether_it_makes_sense_and_changes_nothing(tmp_path: Path) -> None:
    good = run("run", "--check-config", "--config", str(written(tmp_path, 'reserve = "64M"\n')))
    assert (good.returncode, good.stderr) == (0, "")
    assert "makes sense" in good.stdout
    papers = run("run", "--check-config", "--metrics-certificate", str(tmp_path / "none.pem"))
    assert papers.returncode == 1
    assert "none.pem" in papers.stderr
    bad = run("run", "--check-config", "--config", str(written(tmp_path, "\nreserv = 1\n")))
    assert bad.returncode == 1
    assert "agent.toml, line 2, reserv" in bad.stderr
    assert bad.stderr.count("\n") == 1


def test_help_has_every_option_and_its_default() -> None:
    text = run("run", "--help").stdout
    assert all(f"--{option.name}" in text for option in OPTIONS)
    assert "blocks,thp,pages" in text
