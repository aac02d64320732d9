"""The structure of the package: imports run downwards only, and no room hides behind another's name."""

import ast
import types
from pathlib import Path

import pytest

import art_clat

PACKAGE = Path(art_clat.__file__).parent

#: The rooms, from the bottom up. A module imports from its own room and from those below it.
ORDER = (
    *("utils", "config", "layers", "models", "attacks", "selection", "training", "trainer"),
    *("robustness", "leaderboard", "report", "cli", "__main__"),
)
#: What runs beside the trainer, and must not know of it.
APART = {"robustness": {"selection", "training", "trainer"}, "leaderboard": {"selection", "training", "trainer"}}


def modules():
    return sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def room_of(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_rooms(path):
    """The rooms a module imports from, also within functions and for type checkers."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            names = [node.module] if node.module != "art_clat" else [f"art_clat.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        yield from (name.split(".")[1] for name in names if name.startswith("art_clat.") and name.count("."))


def test_every_module_is_in_a_room():
    assert {room_of(path) for path in modules()} <= set(ORDER)


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_run_downwards_only(path):
    room = room_of(path)
    for other in imported_rooms(path):
        if other in ORDER:  # not a name that the package itself exports
            assert ORDER.index(other) <= ORDER.index(room), f"{room} imports from {other}, which is above it"
            assert other not in APART.get(room, ()), f"{room} must not import from {other}"


def test_no_circles_within_a_room():
    """A module's imports, followed to their end, never lead back to it."""
    edges = {}
    for path in modules():
        name = ".".join(["art_clat", *path.relative_to(PACKAGE).with_suffix("").parts]).removesuffix(".__init__")
        tree = ast.parse(path.read_text(encoding="utf-8"))
        edges[name] = {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.module}

    def reaches(start, goal, seen):
        return any(
            nxt == goal or (nxt not in seen and not seen.add(nxt) and reaches(nxt, goal, seen))
            for nxt in edges.get(start, ())
        )

    for name in edges:
        assert not reaches(name, name, set()), f"{name} is in a circle of imports"


def test_no_export_hides_a_module():
    for name in art_clat.__all__:
        exported = getattr(art_clat, name)
        assert not isinstance(exported, types.ModuleType)
        assert not (PACKAGE / f"{name}.py").exists() and not (PACKAGE / name).is_dir()


def test_modules_and_functions_are_short():
    """No module over 400 lines, no class over 300, no function over 60 without its docstring and signature."""
    for path in modules():
        text = path.read_text(encoding="utf-8")
        assert text.count("\n") <= 400, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ClassDef):
                assert node.end_lineno - node.lineno < 300, f"{path}: {node.name}"
            if isinstance(node, ast.FunctionDef):
                has_docstring = ast.get_docstring(node) is not None
                body = node.body[1:] if has_docstring else node.body
                length = node.end_lineno - body[0].lineno + 1 if body else 0
                assert length <= 60, f"{path}: {node.name} has {length} lines"
