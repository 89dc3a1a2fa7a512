"""The rooms of the house: what a file imports lies on its own floor or below, and never in a circle."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FLOORS = (
    "dnnlib torch_utils sampling networks data generation metrics inverse training toy".split()
)  # from the ground up
DOORS = {path.stem for path in ROOT.glob("*.py")} | {"training.plot", "metrics.train_demo_classifier"}


def sources() -> dict[str, Path]:
    """Files by the name they are imported under: rooms, doors, benches and the launchers' Python."""
    files = [path for room in (*FLOORS, "bench", "quick_start") for path in (ROOT / room).rglob("*.py")]
    names = {}
    for path in (*files, *ROOT.glob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return names


def imports(text: str, known: set[str]) -> set[str]:
    """Modules of `known` that a file imports, at its top, in a function or for its types only."""
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute here"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                found.add(full if full in known else node.module)
    return found & known


SOURCES = sources()
EDGES = {name: imports(path.read_text(encoding="utf-8"), set(SOURCES)) for name, path in SOURCES.items()}


def test_every_room_is_known():
    rooms = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert rooms - {"tests"} == set(FLOORS)


@pytest.mark.parametrize("room", FLOORS)
def test_a_room_imports_from_its_own_floor_or_below(room):
    below = FLOORS[: FLOORS.index(room) + 1]
    up = [
        f"{name} imports {used}"
        for name, uses in EDGES.items()
        for used in uses
        if name.partition(".")[0] == room and used.partition(".")[0] not in below
    ]
    assert not up


def test_nothing_imports_a_door():
    assert not [f"{name} imports {used}" for name, uses in EDGES.items() for used in uses & DOORS]


def test_no_file_imports_itself_by_way_of_others():
    done, way = set(), []

    def follow(name):
        assert name not in way, " -> ".join([*way[way.index(name) :], name])
        if name in done:
            return
        way.append(name)
        for used in sorted(EDGES[name]):
            follow(used)
        way.pop()
        done.add(name)

    for name in sorted(EDGES):
        follow(name)


def test_the_reader_of_imports_sees_all_kinds():
    text = "import a.b\nfrom a import b as c, other\ndef f():\n    from d import e\n    from d.e import g\n"
    assert imports(text, {"a", "a.b", "d", "d.e"}) == {"a", "a.b", "d.e"}


MAX_LINES = 350  # of a file
MAX_FUNCTION = 60
MAX_HOUSE = 12_500  # lines of Python and shell outside tests, benches and the toy; lower it with every cut


def tracked(*endings: str) -> list[Path]:
    skipped = {".venv", ".git", "build", "out", "training-runs"}
    return [
        path for end in endings for path in ROOT.rglob(f"*{end}") if not skipped & set(path.relative_to(ROOT).parts)
    ]


def lines(path: Path) -> int:
    return path.read_text(encoding="utf-8").count("\n")


def test_files_are_short():
    house = [path for path in tracked(".py", ".sh") if path.relative_to(ROOT).parts[0] != "tests"]
    assert not {str(path.relative_to(ROOT)): lines(path) for path in house if lines(path) > MAX_LINES}


def test_functions_are_short():
    long = {}
    for path in tracked(".py"):
        if path.relative_to(ROOT).parts[0] == "tests":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno + 1 > MAX_FUNCTION:
                long[f"{path.relative_to(ROOT)}:{node.name}"] = node.end_lineno - node.lineno + 1
    assert not long


def test_the_house_stays_small():
    house = [path for path in tracked(".py", ".sh") if path.relative_to(ROOT).parts[0] not in ("tests", "bench", "toy")]
    assert sum(map(lines, house)) <= MAX_HOUSE
