"""Imports go down only, no modules import each other in a circle, and no file outgrows one sitting.

Every import counts: those inside functions and those for type checkers too.
"""

import ast
import subprocess
import sys

import pytest

from tests.conftest import REPOSITORY

PACKAGE = REPOSITORY / "recbole_ssm"

# From the top. A module of no room here belongs to the ground (keys, arguments, files, errors ...): all may import it,
# and it imports nothing but the ground.
FLOORS = (
    "cli", "study", "doctor", "bench", "commands", "quick_start", "starting", "serving", "model", "llm", "trainer",
    "evaluation", "config", "conflicts", "data", "layers", "optim", "ops", "compat",
)  # fmt: skip
WITHOUT_RECBOLE = ("layers", "optim", "ops")


def modules():
    """``{"ops.ssd": its file}`` of all modules of the package; a package is called as its folder, the top ``""``."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        *folders, name = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(folders if name == "__init__" else [*folders, name])] = path
    return found


MODULES = modules()


def imported_names(path):
    """The dotted names that a file imports anywhere: ``from a import b`` gives ``a.b``."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: write imports with the package's name"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def module_of(name):
    """The module of the package that a dotted name is, or is taken from."""
    inside = name.removeprefix("recbole_ssm").removeprefix(".")
    if inside in MODULES:
        return inside
    if inside in ("load_recommender", "run_recbole_ssm"):
        return "quick_start"  # the package hands these on
    return inside.rpartition(".")[0]


IMPORTS = {
    module: {module_of(name) for name in imported_names(path) if name.partition(".")[0] == "recbole_ssm"}
    for module, path in MODULES.items()
}
# From the top of the package others take its version only. What it hands on is imported when somebody asks for it.
IMPORTS[""] = set()


def floor_of(module):
    """The number of a module's floor, 0 the highest."""
    room = module.partition(".")[0]
    return FLOORS.index(room) if room in FLOORS else 0 if room == "__main__" else len(FLOORS)


def reachable(module):
    """All modules that a module's imports lead to."""
    found, waiting = set(), [module]
    while waiting:
        for imported in IMPORTS[waiting.pop()] - found:
            found.add(imported)
            waiting.append(imported)
    return found


def test_imports_go_down_only():
    climbs = {
        f"{module} -> {imported}"
        for module, names in IMPORTS.items()
        for imported in names
        if floor_of(imported) < floor_of(module)
    }
    assert climbs == set()


def test_no_modules_import_each_other_in_a_circle():
    circles = {module for module in IMPORTS if module in reachable(module)}
    assert circles == set()


def test_no_file_is_too_long():
    most = {".py": 450, ".cpp": 650, ".h": 650}
    files = [path for path in PACKAGE.rglob("*") if path.suffix in most and path.name != "keys.py"]
    long = {
        path.relative_to(PACKAGE).as_posix()
        for path in files
        if len(path.read_text(encoding="utf-8").splitlines()) > most[path.suffix]
    }
    assert long == set()


@pytest.mark.parametrize("room", WITHOUT_RECBOLE)
def test_the_lower_floors_need_neither_recbole_nor_pandas(room):
    for module, path in MODULES.items():
        if module.partition(".")[0] == room:
            roots = {name.partition(".")[0] for name in imported_names(path)}
            assert not roots & {"recbole", "pandas"}, module
    check = f"import sys, recbole_ssm.{room}; assert not {{'recbole', 'pandas'}} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", check], check=True, cwd=REPOSITORY)
