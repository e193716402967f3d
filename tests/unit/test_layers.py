"""The walls between the layers, read off the imports themselves."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "balloon_agent"
GROUND = ("errors", "paths", "frames", "size")
# From the ground up: a layer imports from those before it, and from itself.
LAYERS = (
    *GROUND, "linux", "virtio", "access", "balloon", "holder", "memory", "guest", "sizing", "options", "api", "takeover",
    "agent", "doctor", "cli",
)  # fmt: skip
# Nobody's but its own and the command line's.
TOPS = ("agent", "doctor")


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def layer(module: str) -> str:
    return module.split(".")[1]


def imports(module: str) -> Iterator[str]:
    """Modules of this package that ``module`` imports, wherever in it."""
    path = MODULES[module]
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in MODULES)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            if base in MODULES:
                for alias in node.names:
                    yield f"{base}.{alias.name}" if f"{base}.{alias.name}" in MODULES else base


INNER = [module for module in MODULES if module != "balloon_agent"]
IMPORTS = {module: {found for found in imports(module) if found != "balloon_agent"} for module in INNER}


def test_every_module_is_in_a_layer() -> None:
    assert {layer(module) for module in INNER} == {*LAYERS}
    # If none were found, the tests below would say nothing.
    assert sum(len(found) for found in IMPORTS.values()) > 200


@pytest.mark.parametrize("module", INNER)
def test_no_import_runs_up(module: str) -> None:
    own = LAYERS.index(layer(module))
    assert [found for found in IMPORTS[module] if LAYERS.index(layer(found)) > own] == []


def test_no_circle_of_imports() -> None:
    TopologicalSorter(IMPORTS).prepare()


def test_agent_and_doctor_stand_beside_each_other() -> None:
    for module, found in IMPORTS.items():
        if layer(module) != "cli":
            assert {layer(each) for each in found} & {*TOPS} <= {layer(module)}, module


def test_a_holder_imports_what_linux_offers_and_nothing_of_the_agent() -> None:
    for module, found in IMPORTS.items():
        if layer(module) in ("holder", "linux"):
            assert {layer(each) for each in found} <= {"linux", "frames", "errors", layer(module)}, module


@pytest.mark.parametrize("folder", ["virtio", "linux"])
def test_the_word_balloon_is_not_in(folder: str) -> None:
    for path in (PACKAGE / folder).glob("*.py"):
        text = re.sub(r"balloon_agent|BalloonError|balloon-agent", "", path.read_text())
        assert not re.search("balloon", text, re.IGNORECASE), path


def test_memory_knows_no_device() -> None:
    for module, found in IMPORTS.items():
        if layer(module) == "memory":
            assert not {layer(each) for each in found} & {"virtio", "access", "balloon"}, module
