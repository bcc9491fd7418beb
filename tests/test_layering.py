"""The arrows of the design: which room of the house may import from which."""

from __future__ import annotations

import ast
import re
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted(
    path
    for folder in ("fastmoco", "kernels/fastmoco_kernels", "bench")
    for path in (ROOT / folder).rglob("*.py")
)

# Rooms from the ground up. A room imports from itself, from what it stands on, and from all that
# this stands on in turn. docs/architecture.md says the same.
STANDS_ON: dict[str, set[str]] = {
    "fastmoco_kernels": set(),
    "config": set(),
    "machine": {"fastmoco_kernels"},
    "network": {"config", "machine"},
    "data": {"config", "machine"},
    "method": {"network", "data"},
    "weights": {"method"},
    "doctor": {"method"},
    "evaluate": {"weights"},
    "run": {"weights"},
    "transfer": {"run"},  # its runs leave behind what others do
    "train": {"run", "evaluate", "doctor"},
    "experiments": {"train"},
    "cli": {"experiments"},
}
# Files beside the rooms that belong to one of them: its Python door, and what the console needs.
BELONGS_TO = {"api": "train", "report": "train", "__main__": "cli", "completion": "cli"}
# Inside bench/: the folders, and the programs above them.
BENCH_STANDS_ON: dict[str, set[str]] = {
    "measure": set(),
    "steps": {"measure"},
    "races": {"measure"},
}


def below(room: str) -> set[str]:
    """The room and everything that it stands on."""
    return {room}.union(*(below(lower) for lower in STANDS_ON[room]))


def part_of(module: str) -> str:
    """`fastmoco.data.order` -> `data`; modules outside fastmoco keep their top name."""
    pieces = module.split(".")
    part = pieces[1] if pieces[0] == "fastmoco" and len(pieces) > 1 else pieces[0]
    return BELONGS_TO.get(part, part)


def module_name(path: Path) -> str:
    relative = path.relative_to(ROOT)
    pieces = relative.with_suffix("").parts
    return ".".join(pieces[1:] if pieces[0] == "kernels" else pieces).removesuffix(".__init__")


def imports_in(tree: ast.AST, path: Path) -> Iterator[str]:
    """Every module that a node below `tree` imports, by statement or by name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import hides its arrow"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            named = node.args[0]
            literal = isinstance(named, ast.Constant)
            at_the_top = path.parent == ROOT / "fastmoco" or path.is_relative_to(ROOT / "bench")
            assert literal or at_the_top, f"{path}: hides its arrow"
            if isinstance(named, ast.Constant):
                yield str(named.value)


def imports_of(path: Path) -> set[str]:
    return set(imports_in(ast.parse(path.read_text()), path))


def imports_at_start(path: Path) -> set[str]:
    """What is imported together with the file, not by a function that is called later."""
    tree = ast.parse(path.read_text())
    statements = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    return {name for node in statements for name in imports_in(node, path)}


def tops(path: Path) -> set[str]:
    return {name.split(".")[0] for name in imports_of(path)}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_arrows_point_down(path: Path) -> None:
    own = {part_of(name) for name in imports_of(path) if name.split(".")[0] == "fastmoco"}
    own |= tops(path) & {"fastmoco_kernels", "bench"}
    own -= {"fastmoco", "__version__"}
    if path.is_relative_to(ROOT / "bench"):
        folder = path.relative_to(ROOT / "bench").parts[0]
        inside = {name.split(".")[1] for name in imports_of(path) if name.startswith("bench.")}
        if folder in BENCH_STANDS_ON:
            assert inside <= BENCH_STANDS_ON[folder] | {folder}
        return
    assert "bench" not in own, "only benchmarks import benchmarks"
    part = part_of(module_name(path))
    if part == "fastmoco":  # the package itself: variables set before torch loads, nothing more
        assert imports_at_start(path) <= {
            "fastmoco.machine.environment",
            *("importlib", "importlib.import_module"),
            *("typing", "typing.TYPE_CHECKING", "typing.Any"),
        }
        return
    assert part in STANDS_ON, f"say in STANDS_ON where {part} stands"
    assert own <= below(part), f"{part} does not stand on {own - below(part)}"


def test_the_rooms_have_no_circle() -> None:
    for room, lower in STANDS_ON.items():
        assert all(room not in below(one) for one in lower)


def test_the_page_names_these_arrows_and_files_that_exist() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| (.*?) \|", page, re.M)
    assert {room: set(re.findall(r"\w+", lower)) for room, lower in rows} == STANDS_ON
    files = set(re.findall(r"`([\w/]+\.py)`", page))
    assert len(files) > 30
    for name in files:
        assert any((ROOT / folder / name).is_file() for folder in (".", "fastmoco")), name


def test_kernels_import_torch_and_triton_only() -> None:
    outside = {"torch", "triton", "fastmoco_kernels"}
    for path in FILES:
        if path.is_relative_to(ROOT / "kernels"):
            third_party = tops(path) - sys.stdlib_module_names
            assert third_party <= outside, f"{path}: {third_party - outside}"


def test_one_room_imports_torch_distributed_and_one_file_imports_dali() -> None:
    for path in FILES:
        names = imports_of(path)
        if path.is_relative_to(ROOT / "fastmoco") and path.parent.name != "machine":
            assert not any(n.startswith("torch.distributed") for n in names), path
        if path != ROOT / "fastmoco" / "data" / "backends" / "dali" / "graph.py":
            assert not any(n.startswith("nvidia") for n in names), path


@pytest.mark.parametrize("start", ["backends.dali.reader", "sources.measure", "sources.folder"])
def test_reader_and_scan_processes_start_without_torch(start: str) -> None:
    """They are many, and importing torch takes each of them seconds."""
    by_name = {module_name(path): path for path in FILES}
    pending, seen = [f"fastmoco.data.{start}"], set[str]()
    while pending:
        name = pending.pop()
        if name in seen or name not in by_name:
            continue
        seen.add(name)
        found = imports_at_start(by_name[name])
        heavy = {n for n in found if n.split(".")[0] in ("torch", "torchvision", "nvidia")}
        assert not heavy, f"{name} imports {heavy}"
        pending += found
        pending.append(name.rpartition(".")[0])  # importing a module imports its package
    assert len(seen) > 3


def test_no_folder_holds_more_files_than_a_reader_can_overlook() -> None:
    tests = (ROOT / "tests").rglob("*.py")
    sources = [path for end in ("*.cpp", "*.h") for path in (ROOT / "kernels").rglob(end)]
    files = [*FILES, *tests, *sources]
    counts = Counter(path.parent for path in files if path.name != "__init__.py")
    for folder, count in counts.items():
        assert count <= (20 if folder.name == "fastmoco_kernels" else 12), folder


def test_files_stay_as_short_as_a_reader_can_take_in() -> None:
    for path in FILES:
        limit = 250 if path.is_relative_to(ROOT / "kernels") else 400
        limit = 200 if path == ROOT / "fastmoco" / "train.py" else limit
        assert len(path.read_text().splitlines()) <= limit, path
