"""What the whole package promises, whatever is in it."""

import ast
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import urae

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "urae"
MODULES = sorted(PACKAGE.rglob("*.py"))

# from the ground up: a package imports from lower levels only
LEVELS = [
    {"choices", "config", "geometry", "hub", "storage"},
    {"local_attention"},
    {"flow", "resolution", "content_cache", "undo"},
    {"backbones"},
    {"adapters"},
    {"features", "generate"},
    {"train", "evaluate"},
    {"miniature"},
    {"study", "web"},
    {"cli"},
]
LEVEL = {name: level for level, names in enumerate(LEVELS) for name in names}
ENTRANCES = {"__init__", "__main__"}


def part_of(module: str) -> str:
    """Return the part of urae that a dotted module name belongs to; '' for urae itself."""
    return module.split(".")[1] if "." in module else ""


def name_of(path: Path) -> str:
    return ".".join(["urae", *path.relative_to(PACKAGE).with_suffix("").parts])


def imports_of(path: Path) -> set[str]:
    """Name the modules of urae that a file imports, wherever in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            names.add(node.module)
        elif isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
    return {name for name in names if name.split(".")[0] == "urae"}


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_point_downwards(path):
    part = part_of(name_of(path))
    if part in ENTRANCES:
        return
    assert part in LEVEL, f"urae.{part} is new: give it a level"
    for name in imports_of(path):
        imported = part_of(name)
        if imported in ("", part):  # its own package, or urae's version
            continue
        assert LEVEL[imported] < LEVEL[part], f"{name_of(path)} imports {name}, which is not below"


def test_every_level_is_there():
    there = {part_of(name_of(path)) for path in MODULES} - ENTRANCES
    assert there == LEVEL.keys()


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_a_module_is_described_and_short(path):
    source = path.read_text()
    assert ast.get_docstring(ast.parse(source)), f"{path} has no docstring"
    assert source.count("\n") <= 400


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_only_the_command_line_prints_and_exits(path):
    if part_of(name_of(path)) == "cli":
        return
    tree = ast.parse(path.read_text())
    calls = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    assert not calls & {"print", "exit", "sys.exit", "input"}


def test_public_names():
    assert set(urae.__all__) == {"adapt", "optimize", "restore", "ResolutionPolicy", "__version__"}
    for name in urae.__all__:
        assert getattr(urae, name)
    with pytest.raises(AttributeError, match="no attribute 'train_all'"):
        urae.train_all  # noqa: B018


def test_version_is_that_of_the_project():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert urae.__version__ == project["version"]


@pytest.mark.parametrize(
    "code",
    [
        "import urae",
        "from urae.cli.main import app; app(['--help'], standalone_mode=False)",
        "from urae.cli.main import app; app(['train', '--help'], standalone_mode=False)",
    ],
)
def test_torch_is_imported_only_when_needed(code):
    check = "import sys; heavy = {'torch', 'diffusers', 'transformers'} & sys.modules.keys(); "
    done = subprocess.run(
        [sys.executable, "-c", f"{code}; {check} sys.exit(', '.join(heavy) or 0)"],
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": "100"},
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_type_hints_are_shipped():
    assert (PACKAGE / "py.typed").is_file()


def test_licence():
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text
    assert "Version 2.0, January 2004" in text
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["license"] == "Apache-2.0"


def test_torchvision_is_no_dependency():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lists = [project["dependencies"], *project["optional-dependencies"].values()]
    named = [each for dependencies in lists for each in dependencies]
    assert any(each.startswith("torch>=") for each in named)
    assert not any(each.startswith("torchvision") for each in named)
    assert not any("torchvision" in path.read_text() for path in MODULES)
