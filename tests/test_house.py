"""The house: packages stand on floors, and a module imports only from its own package or from floors below."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]
FLOORS = [
    {"core"},
    {"metrics", "search", "data"},
    {"encoders"},
    {"features"},
    {"results"},
    {"reports", "runner"},
    {"viz", "training", "tasks"},
    {"cli"},
]
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts if parts[0] == "neco_bench" else ("neco_bench", *parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports() -> dict[str, set[str]]:
    """Modules of this project that each module imports, anywhere in its text."""
    files = [*(ROOT / "neco_bench").rglob("*.py"), *(ROOT / "tasks").rglob("*.py")]
    modules = {module_name(path): path for path in files}
    graph: dict[str, set[str]] = {}
    for name, path in modules.items():
        graph[name] = set()
        if name == "neco_bench":  # the public names, loaded when they are first used
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                graph[name] |= {alias.name for alias in node.names if alias.name in modules}
            elif isinstance(node, ast.ImportFrom) and node.module:
                below = {f"{node.module}.{alias.name}" for alias in node.names}
                graph[name] |= (below & modules.keys()) or ({node.module} & modules.keys())
    return graph


def room(module: str) -> str:
    return [*module.split("."), ""][1]


def test_every_module_has_a_room() -> None:
    loose = [m for m in imports() if room(m) not in FLOOR and m not in ("neco_bench", "neco_bench.__main__")]
    assert loose == []


def test_no_import_goes_upwards() -> None:
    upwards = [
        f"{module} imports {other}"
        for module, others in imports().items()
        for other in others
        if room(module) in FLOOR and room(other) not in ("", room(module)) and FLOOR[room(other)] >= FLOOR[room(module)]
    ]
    assert upwards == []


def test_no_import_circle() -> None:
    graph = imports()
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join([*path[path.index(module) :], module])
        if module not in done:
            for other in sorted(graph[module]):
                visit(other, (*path, module))
            done.add(module)

    for module in graph:
        visit(module, ())
