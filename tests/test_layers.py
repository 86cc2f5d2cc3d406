"""The direction of imports: a folder may use those below it, never those above; and there is no circle."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "rlhf_pipeline"
# From the top. Folders of one row must not use each other, unless the row is a list of one.
LAYERS = [
    ["__main__"],
    ["cli"],
    ["smoke"],
    ["terminal"],
    ["sweep"],
    ["report"],
    ["arena"],
    ["use"],
    ["run"],
    ["comparison"],
    ["forecast"],
    ["stages", "plan"],
    ["rewards", "judges", "hacking"],
    ["ppo", "data"],
    ["models"],
    ["callbacks"],
    ["fingerprint"],
    ["rundir"],
    ["recipe"],
    ["devices", "hub", "kinds", "local", "ranks", "shares", "user_code"],
    ["errors"],
    ["__init__"],
]


def level(module: str) -> int:
    """The row of a module's folder, counted from the top."""
    part = module.split(".")[1] if "." in module else "__init__"
    return next(i for i, row in enumerate(LAYERS) if part in row)


def folder(module: str) -> str:
    return module.split(".")[1] if "." in module else "__init__"


def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name."""
    found = {}
    for file in PACKAGE.rglob("*.py"):
        parts = ["rlhf_pipeline", *file.relative_to(PACKAGE).with_suffix("").parts]
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


def imports(file: Path, known: set[str]) -> set[str]:
    """The package's modules that a file imports, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name in known}
        elif isinstance(node, ast.ImportFrom) and node.module in known:
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                found.add(name if name in known else node.module)
    return found


def arrows(package: dict[str, Path]) -> list[tuple[str, str]]:
    return [(module, used) for module, file in package.items() for used in imports(file, set(package))]


def wrong(pairs: list[tuple[str, str]]) -> list[str]:
    """The imports that point upwards, or sideways to another folder of the same row."""
    return sorted(
        f"{module} imports {used}"
        for module, used in pairs
        if folder(module) != folder(used) and level(used) <= level(module)
    )


def circles(pairs: list[tuple[str, str]]) -> list[list[str]]:
    """Modules that import each other in turn, each circle once."""
    uses: dict[str, set[str]] = {}
    for module, used in pairs:
        if module != used:
            uses.setdefault(module, set()).add(used)
    found, state = [], {}

    def visit(module: str, path: list[str]) -> None:
        state[module] = "open"
        for used in sorted(uses.get(module, ())):
            if state.get(used) == "open":
                found.append([*path[path.index(used) :], used])
            elif used not in state:
                visit(used, [*path, used])
        state[module] = "closed"

    for module in sorted(uses):
        if module not in state:
            visit(module, [module])
    return found


def test_every_folder_has_its_place() -> None:
    assert not {folder(module) for module in modules()} - {name for row in LAYERS for name in row}


def test_imports_point_downwards() -> None:
    assert wrong(arrows(modules())) == []


def test_there_is_no_circle() -> None:
    assert circles(arrows(modules())) == []


@pytest.mark.parametrize(
    ("pair", "upwards"),
    [
        (("rlhf_pipeline.rundir.layout", "rlhf_pipeline.run.launch"), True),
        (("rlhf_pipeline.ppo.trainer", "rlhf_pipeline.data.prepare"), True),
        (("rlhf_pipeline.run.launch", "rlhf_pipeline.rundir.layout"), False),
    ],
)
def test_an_arrow_upwards_is_found(pair: tuple[str, str], upwards: bool) -> None:
    assert bool(wrong([pair])) is upwards


def test_a_circle_is_found() -> None:
    assert circles([("a", "b"), ("b", "c"), ("c", "a"), ("d", "a")]) == [["a", "b", "c", "a"]]


def test_ppo_uses_nothing_of_trl_and_nothing_what_trl_may_drop() -> None:
    """TRL removed its PPOTrainer, which was one of its experimental parts, in a minor version."""
    for file in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            for name in names:
                assert not name.startswith("trl.experimental"), file
                assert not (name.split(".")[0] == "trl" and file.parent.name == "ppo"), file
