"""README and docs: what they say of options, metrics and checks is what the code has, and their links lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from balloon_agent.balloon.channels import AUTO
from balloon_agent.doctor.doctor import CHECKS, name_of
from balloon_agent.options import OPTIONS, Option

ROOT = Path(__file__).parents[2]
PAPERS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
RELOADS = "↻"
_LINK = re.compile(r"\]\(([^)#]*)(?:#([^)]*))?\)")


def rows(name: str, title: str) -> list[list[str]]:
    """The cells of a table, by the first cell of its head."""
    lines = (ROOT / "docs" / name).read_text().splitlines()
    begin = next(number for number, line in enumerate(lines) if line.startswith(f"| {title} |"))
    table = []
    for line in lines[begin + 2 :]:
        if not line.startswith("|"):
            break
        table.append([cell.strip() for cell in line.strip("|").split("|")])
    return table


def shown(option: Option) -> str | None:
    """The default as the table has it; None for one that stands for something else."""
    default = option.default
    if default is None:
        return None
    if isinstance(default, bool):
        return str(default).lower()
    if isinstance(default, float):
        return f"{default:g}"
    return ",".join(default) if isinstance(default, tuple | list) else str(default)


def test_the_table_of_options_is_that_of_the_program() -> None:
    said = {}
    for key, meaning, default in rows("operation.md", "option"):
        match = re.fullmatch(rf"`([a-z-]+) = ([A-Z:]+)`( {RELOADS})?", key)
        assert match, key
        said[match[1]] = (match[2], match[3] is not None, meaning, default)
    assert said.keys() == {option.name for option in OPTIONS}
    for option in OPTIONS:
        metavar, reloads, meaning, default = said[option.name]
        assert (metavar, reloads) == (option.metavar or "BOOL", option.reloads), option.name
        assert meaning, option.name
        if (expected := shown(option)) is not None:
            assert default == f"`{expected}`", option.name
        else:
            assert not default.startswith("`"), option.name
        for choice in option.choices:
            assert str(choice) in meaning or choice == AUTO, (option.name, choice)


def test_the_example_marks_the_same_options_as_reloadable() -> None:
    comment, marked = "", {}
    for line in (ROOT / "deploy/balloon-agent.toml").read_text().splitlines():
        if match := re.match(r"#([a-z-]+) = ", line):
            marked[match[1]] = RELOADS in comment
            comment = ""
        elif line.startswith("# "):
            comment += line
        else:
            comment = ""
    assert marked == {option.name: option.reloads for option in OPTIONS if option.name != "run-dir"}


def test_each_check_of_doctor_has_its_remedy() -> None:
    named = {name for cells in rows("troubleshooting.md", "check") for name in re.findall("`([a-z-]+)`", cells[0])}
    assert {name_of(check) for check in CHECKS} <= named


def anchors(paper: Path) -> set[str]:
    """Titles as GitHub makes anchors of them."""
    titles = re.findall(r"^#+ (.+)$", paper.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("paper", PAPERS, ids=lambda paper: paper.name)
def test_links_lead_somewhere(paper: Path) -> None:
    for path, anchor in _LINK.findall(paper.read_text()):
        if path.startswith("https://"):
            continue
        target = paper.parent / path if path else paper
        assert target.exists(), path
        if anchor:
            assert anchor in anchors(target), (path, anchor)


@pytest.mark.parametrize(("name", "most"), [("README.md", 150), ("CONTRIBUTING.md", 90)])
def test_the_first_papers_are_short(name: str, most: int) -> None:
    assert len((ROOT / name).read_text().splitlines()) <= most
