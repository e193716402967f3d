"""What is installed: the unit, udev's rules, the example of a configuration; and that install and uninstall leave no trace."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

from balloon_agent.access.pci import BALLOON_IDS
from balloon_agent.options import OPTIONS, read_file
from balloon_agent.virtio.spec import VENDOR
from contrib.vm import REPOSITORY, wheels

DEPLOY = REPOSITORY / "deploy"
RULES = REPOSITORY / "udev/60-balloon-agent.rules"
UNITS = ("balloon-agent.service", "balloon-agent-restore.service")
MOST_EXPOSURE = 50  # tenths
SETTING = "proc/sys/kernel/io_uring_disabled"
# One match or assignment of a rule: KEY{attribute}OPERATOR"value".
TOKEN = re.compile(r'([A-Z]+)(?:\{([^}]+)\})?(==|!=|\+=|=|:=)"([^"]*)"')


def tool(*argv: object, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(part) for part in argv],
        capture_output=True,
        text=True,
        check=False,
        stdin=subprocess.DEVNULL,
        cwd=cwd,
        env={**os.environ, **environment},
    )


# -- the unit ------------------------------------------------------------------------------------------------------------


@pytest.fixture(params=UNITS)
def unit(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """As installed, with a program that is there, and beside the other one."""
    program = tmp_path / "sbin/balloon-agent"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    for name in UNITS:
        text = (DEPLOY / "systemd" / name).read_text().replace("@SANDBOX@\n", sandbox())
        (tmp_path / name).write_text(text.replace("@PREFIX@", str(tmp_path)).replace("@CONFIG@", "/etc/balloon-agent.toml"))
    return tmp_path / str(request.param)


def sandbox() -> str:
    """The part of the agent's unit that the other one has, too."""
    text = (DEPLOY / "systemd" / UNITS[0]).read_text()
    return text[text.index("# -- what it may do") : text.index("[Install]")]


def test_systemd_finds_nothing_to_say_about_the_unit(unit: Path) -> None:
    # The manual pages that it names are not installed here.
    said = tool("systemd-analyze", "verify", "--man=no", unit)
    assert (said.returncode, said.stdout, said.stderr) == (0, "", "")


def test_the_unit_is_hardened(unit: Path) -> None:
    said = tool("systemd-analyze", "security", "--offline=true", "--no-pager", f"--threshold={MOST_EXPOSURE}", unit)
    assert said.returncode == 0, said.stdout.splitlines()[-1]


def test_every_permission_has_its_reason() -> None:
    lines = (DEPLOY / "systemd/balloon-agent.service").read_text().splitlines()
    permits = re.compile(r"(CapabilityBoundingSet=\w|ReadWritePaths=|DeviceAllow=|RestrictAddressFamilies=|SystemCallFilter=)")
    found = 0
    for number, line in enumerate(lines):
        if permits.match(line):
            found += 1
            key = line.partition("=")[0]
            before = number - 1
            # Several devices may have one reason; each capability and each path has its own.
            while key == "DeviceAllow" and lines[before].startswith(("DeviceAllow=", "DevicePolicy=")):
                before -= 1
            while key != "CapabilityBoundingSet" and lines[before].startswith("ProtectSystem="):
                before -= 1
            assert lines[before].startswith("# "), line
    assert found >= 12


# -- udev's rules --------------------------------------------------------------------------------------------------------


def rules() -> list[list[tuple[str, str, str, str]]]:
    """Each rule as its tokens: key, attribute, operator, value."""
    text = re.sub(r"^#.*\n", "", RULES.read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    found = []
    for line in filter(None, map(str.strip, text.splitlines())):
        tokens = TOKEN.findall(line)
        assert ", ".join(f'{key}{"{" + name + "}" if name else ""}{op}"{value}"' for key, name, op, value in tokens) == re.sub(
            r",\s+", ", ", line
        ), f"not what a rule looks like: {line}"
        found.append(tokens)
    return found


def test_rules_are_rules() -> None:
    every = [token for rule in rules() for token in rule]
    assert {key for key, *_ in every} <= {"ACTION", "SUBSYSTEM", "ATTR", "TAG", "ENV", "TEST", "PROGRAM", "GOTO", "LABEL"}
    labels = [value for key, _, _, value in every if key == "LABEL"]
    assert {value for key, _, _, value in every if key == "GOTO"} == set(labels)
    # Modules are loaded by 80-drivers.rules.
    assert RULES.name < "80-drivers.rules"


def test_rules_speak_of_the_devices_that_the_agent_drives() -> None:
    (rule,) = [rule for rule in rules() if ("SUBSYSTEM", "", "==", "pci") in rule]
    matched = {name: value for key, name, op, value in rule if (key, op) == ("ATTR", "==")}
    assert int(matched["vendor"], 16) == VENDOR
    assert tuple(int(part, 16) for part in matched["device"].split("|")) == BALLOON_IDS


def test_the_unit_is_wanted_by_what_the_rules_name() -> None:
    (alias,) = [value for rule in rules() for _, name, _, value in rule if name == "SYSTEMD_ALIAS"]
    device = tool("systemd-escape", "--path", "--suffix=device", alias).stdout.strip()
    assert f"WantedBy={device}\n" in (DEPLOY / "systemd/balloon-agent.service").read_text()
    (tested,) = [value for rule in rules() for key, _, _, value in rule if key == "TEST"]
    assert tested == f"/etc/systemd/system/{device}.wants/balloon-agent.service"


# -- the configuration ---------------------------------------------------------------------------------------------------


def test_the_example_has_every_option_with_its_default(tmp_path: Path) -> None:
    text = (DEPLOY / "balloon-agent.toml").read_text()
    # A group is looked up.
    lines = [line[1:].replace('"balloon"', '"root"') for line in text.splitlines() if re.match(r"#[a-z-]+ = ", line)]
    path = tmp_path / "all.toml"
    path.write_text("\n".join(lines))
    told = read_file(path)
    # Where it runs is the unit's matter.
    assert set(told) == {option.field for option in OPTIONS} - {"run_dir"}
    for option in OPTIONS:
        if option.default is not None and option.field in told:
            assert told[option.field] == option.default, option.name
    path.write_text(text)
    assert read_file(path) == {}


# -- install and uninstall -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return wheels(tmp_path_factory.mktemp("packages"))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A system that is not running, of a kernel that forbids io_uring."""
    root = tmp_path / "root"
    (root / "usr/local/bin").mkdir(parents=True)
    (root / SETTING).parent.mkdir(parents=True)
    (root / SETTING).write_text("2\n")
    return root


def install(*argv: object) -> subprocess.CompletedProcess[str]:
    return tool(DEPLOY / "install", *argv)


def uninstall(*argv: object) -> subprocess.CompletedProcess[str]:
    return tool(DEPLOY / "uninstall", *argv)


def listing(root: Path) -> dict[str, tuple[str, ...]]:
    """All that is there, with its kind, its mode, and what is in it."""
    found: dict[str, tuple[str, ...]] = {}
    for path in root.rglob("*"):
        if path.is_symlink():
            found[str(path)] = ("link", os.readlink(path))
        elif path.is_dir():
            found[str(path)] = ("folder", oct(path.stat().st_mode))
        else:
            found[str(path)] = ("file", oct(path.stat().st_mode), hashlib.sha256(path.read_bytes()).hexdigest())
    return found


@pytest.mark.slow
def test_installed_twice_and_removed_twice_nothing_is_left(root: Path, packages: Path) -> None:
    before = listing(root)
    first = install("--root", root, "--wheels", packages)
    assert first.returncode == 0, first.stderr
    there = listing(root)
    lib = root / "usr/local/lib"
    unit = (lib / "systemd/system/balloon-agent.service").read_text()
    assert "ExecStart=/usr/local/sbin/balloon-agent run --config /etc/balloon-agent.toml\n" in unit
    restore = (lib / "systemd/system/balloon-agent-restore.service").read_text()
    assert "ExecStart=/usr/local/sbin/balloon-agent restore\n" in restore
    for text in (unit, restore):
        assert sandbox() in text
        assert "@" not in re.sub(r"modprobe@|^#.*$|@\w+-?\w*", "", text, flags=re.MULTILINE)
    wants = root / "etc/systemd/system/sys-subsystem-balloon.device.wants/balloon-agent.service"
    assert os.readlink(wants) == "/usr/local/lib/systemd/system/balloon-agent.service"
    # Nothing in it knows that it was not where it is going to be.
    for program in (root / "usr/local/bin/balloonctl", root / "usr/local/sbin/balloon-agent"):
        target = root / os.readlink(program)[1:]
        assert target.read_text().startswith("#!/usr/local/lib/balloon-agent/")
    assert "complete -" in (root / "usr/local/share/bash-completion/completions/balloonctl").read_text()
    # What forbids io_uring to root is changed, and said.
    assert "io_uring" in first.stderr
    assert (lib / "sysctl.d/60-balloon-agent.conf").exists()

    assert install("--root", root, "--wheels", packages).returncode == 0
    assert listing(root) == there

    for _ in range(2):
        said = uninstall("--root", root)
        assert said.returncode == 0, said.stderr
        changed = {path for path in before.keys() | listing(root).keys() if before.get(path) != listing(root).get(path)}
        assert changed == set()


@pytest.mark.slow
def test_what_somebody_has_changed_is_kept_and_what_others_have_added_too(root: Path, packages: Path) -> None:
    (root / SETTING).write_text("0\n")
    assert install("--root", root, "--prefix", "/opt/balloon", "--wheels", packages, "--no-enable").returncode == 0
    assert not (root / "etc/sysctl.d").exists()
    assert (root / "etc/systemd/system/balloon-agent.service").exists()
    assert not list(root.glob("etc/systemd/system/*.wants"))
    config = root / "etc/balloon-agent.toml"
    config.write_text('reserve = "128M"\n')
    (root / "opt/other").write_text("")
    again = install("--root", root, "--prefix", "/opt/balloon", "--wheels", packages, "--no-enable")
    assert again.returncode == 0
    assert "is kept" in again.stderr
    # Two installations would have one unit.
    assert "of another installation" in install("--root", root, "--wheels", packages).stderr

    said = uninstall("--root", root, "--prefix", "/opt/balloon")
    assert str(config) in said.stderr
    assert config.read_text() == 'reserve = "128M"\n'
    assert sorted(path.name for path in (root / "opt").iterdir()) == ["other"]
    assert uninstall("--root", root, "--prefix", "/opt/balloon", "--purge").returncode == 0
    assert not config.exists()


@pytest.mark.slow
def test_an_installation_that_fails_undoes_itself(root: Path, packages: Path, tmp_path: Path) -> None:
    before = listing(root)
    # A package that is needed is missing: pip fails.
    lacking = tmp_path / "lacking"
    lacking.mkdir()
    for wheel in packages.glob("*.whl"):
        if not wheel.name.startswith("psutil"):
            (lacking / wheel.name).hardlink_to(wheel)
    failed = install("--root", root, "--wheels", lacking)
    assert failed.returncode == 1
    assert "psutil" in failed.stderr
    assert listing(root) == before

    # Somebody else's file is in the way, late.
    other = root / "usr/local/lib/modules-load.d/balloon-agent.conf"
    other.parent.mkdir(parents=True)
    other.write_text("mine\n")
    before = listing(root)
    failed = install("--root", root, "--wheels", packages)
    assert failed.returncode == 1
    assert f"{other} is there already" in failed.stderr
    assert listing(root) == before


@pytest.mark.slow
def test_one_that_was_cut_off_can_be_removed(root: Path, packages: Path) -> None:
    before = listing(root)
    assert install("--root", root, "--wheels", packages).returncode == 0
    # As a machine that went down leaves it: all of the manifest, and not all that is on it.
    for path in ("usr/local/lib/systemd/system/balloon-agent.service", "usr/local/bin/balloonctl", "etc/balloon-agent.toml"):
        (root / path).unlink()
    (python,) = root.glob("usr/local/lib/balloon-agent/*/bin/python3")
    python.unlink()
    assert uninstall("--root", root).returncode == 0
    assert listing(root) == before


# -- what is taken from the network ----------------------------------------------------------------------------------------

PINNED = re.compile(r"^([a-z0-9-]+)==([^ ]+)((?: --hash=sha256:[0-9a-f]{64})+)$")


def pinned(path: Path) -> dict[str, str]:
    """What is in a lock file: version by name. Fails for any line that is anything else than a version with its hashes."""
    text = re.sub(r"^#.*\n", "", path.read_text(), flags=re.MULTILINE)
    found = {}
    for line in re.sub(r" *\\\n *", " ", text).splitlines():
        pin = PINNED.match(line)
        assert pin is not None, f"{path.name}: {line}"
        found[pin[1]] = pin[2]
    return found


@pytest.mark.parametrize("name", ["requirements", "build"])
def test_all_that_is_required_is_pinned_by_its_hashes(name: str) -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
    required = project["project"]["dependencies"] if name == "requirements" else project["build-system"]["requires"]
    versions = pinned(DEPLOY / f"{name}.lock")
    for requirement in required:
        package, operator, least = re.fullmatch(r"([a-z-]+)(>=)([0-9.]+)", requirement).groups()  # type: ignore[union-attr]
        assert operator == ">="
        assert [*map(int, versions[package].split("."))] >= [*map(int, least.split("."))]


def install_from(checkout: Path, root: Path, packages: Path) -> subprocess.CompletedProcess[str]:
    """From a folder that stands for the network."""
    return tool(checkout / "deploy/install", "--root", root, PIP_NO_INDEX="1", PIP_FIND_LINKS=str(packages))


@pytest.mark.slow
def test_packages_from_the_network_are_installed(root: Path, packages: Path) -> None:
    said = install_from(REPOSITORY, root, packages)
    assert said.returncode == 0, said.stderr
    (site,) = (root / "usr/local/lib/balloon-agent").glob("*/lib/python3*/site-packages")
    assert {"balloon_agent", "msgspec", "rich"} <= {path.name for path in site.iterdir()}
    # What made the package is of no use to it.
    assert not (site / "hatchling").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("name", "package"), [("requirements", "msgspec"), ("build", "hatchling")])
def test_packages_other_than_the_pinned_ones_are_refused(
    root: Path, packages: Path, tmp_path: Path, name: str, package: str
) -> None:
    before = listing(root)
    checkout = tmp_path / "checkout"
    shutil.copytree(REPOSITORY, checkout, ignore=shutil.ignore_patterns(".*", "__pycache__", "tests"))
    path = checkout / f"deploy/{name}.lock"
    pins = re.split(r"\n(?=[a-z])", path.read_text())
    path.write_text(
        "\n".join(re.sub("sha256:.{8}", "sha256:deadbeef", pin) if pin.startswith(package) else pin for pin in pins)
    )
    said = install_from(checkout, root, packages)
    assert said.returncode == 1
    assert package in said.stderr
    assert "DO NOT MATCH THE HASHES" in said.stderr
    assert listing(root) == before


@pytest.mark.slow
def test_nothing_from_the_folder_of_who_installs_is_run_or_kept_from_others(root: Path, packages: Path, tmp_path: Path) -> None:
    hostile, marker = tmp_path / "hostile", tmp_path / "marker"
    hostile.mkdir()
    for name in ("ensurepip", "pathlib", "venv", "compileall", "pip", "runpy", "shutil", "usercustomize", "sitecustomize"):
        (hostile / f"{name}.py").write_text(f"open({str(marker)!r}, 'a').write('{name} ')\n")
    careless = ("bash", "-c", 'umask 077; exec "$@"', "bash")
    said = tool(*careless, DEPLOY / "install", "--root", root, "--wheels", packages, cwd=hostile, PYTHONPATH=str(hostile))
    assert not marker.exists(), marker.read_text()
    assert said.returncode == 0, said.stderr
    installed = [path for path in (root / "usr/local/lib/balloon-agent").rglob("*") if not path.is_symlink()]
    assert [path for path in installed if path.stat().st_mode & 0o044 != 0o044] == []


@pytest.mark.parametrize(
    ("argv", "code", "words"),
    [
        (["--what"], 2, "unknown argument: --what"),
        (["--prefix"], 2, "--prefix needs a folder"),
        (["--prefix", "opt"], 1, "no absolute path"),
        (["--prefix", "/opt/a b"], 1, "characters other than"),
        (["--prefix", "/home/me"], 1, "where the service may not look"),
        (["--root", "/nowhere"], 1, "--root /nowhere is no folder"),
        (["--wheels", "/nowhere", "--root", "/usr"], 1, "pip wheel --wheel-dir /nowhere"),
    ],
)
def test_install_says_what_it_cannot_do_with(argv: list[str], code: int, words: str) -> None:
    said = install(*argv)
    assert said.returncode == code
    assert words in said.stderr.splitlines()[0]


def test_only_root_installs_and_only_under_systemd() -> None:
    nobody = ("setpriv", "--reuid=65534", "--clear-groups") if os.geteuid() == 0 else ()
    said = tool(*nobody, "bash", DEPLOY / "install")
    # A checkout may lie where nobody else can read it.
    assert said.returncode != 0
    assert "must run as root, not as user" in said.stderr or "Permission denied" in said.stderr
    if os.geteuid() == 0 and not Path("/run/systemd/system").exists():
        assert "systemd does not run this machine" in install().stderr


def test_an_old_python_is_refused(tmp_path: Path) -> None:
    # Where there is none of the distribution's own that would do, the one of the PATH is asked.
    old = tmp_path / "python3"
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && echo Python 3.9.2; exit 1\n')
    old.chmod(0o755)
    script = (DEPLOY / "install").read_text().replace("python=/usr/bin/python3", f"python={old}")
    program = tmp_path / "deploy/install"
    program.parent.mkdir()
    program.write_text(script)
    (tmp_path / "root").mkdir()
    said = subprocess.run(
        ["bash", program, "--root", tmp_path / "root"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"},
    )
    assert said.returncode == 1
    assert said.stderr == f"install: {old} is Python 3.9.2: Python 3.11 or later is needed\n"
