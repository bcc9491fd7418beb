"""The arrows of the design: which part of the project may import which."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted(
    path
    for folder in ("fastmoco", "kernels/fastmoco_kernels", "bench")
    for path in (ROOT / folder).rglob("*.py")
)

# Parts from the bottom up: a file imports from its own part and from those named beside it.
ALLOWED: dict[str, set[str]] = {
    "fastmoco_kernels": set(),
    "config": set(),
    "machine": {"fastmoco_kernels"},
    "distributed": {"fastmoco_kernels", "host"},
    "batchnorm": {"fastmoco_kernels"},
    "convolution": {"fastmoco_kernels"},
    "resnet": {"convolution"},
    "host": {"machine"},
    "data": {"fastmoco_kernels", "config", "host"},
    "report": {"config"},
    "encoder": {"batchnorm", "config", "resnet"},
    "shuffle": {"config", "distributed"},
    "moco": {"fastmoco_kernels", "config", "encoder"},
    "agreement": {"config", "distributed", "machine", "moco"},
    "optim": {"fastmoco_kernels", "config", "moco"},
    "step": {
        "fastmoco_kernels",
        "config",
        "distributed",
        "encoder",
        "machine",
        "moco",
        "optim",
        "shuffle",
    },
    "weights": {"fastmoco_kernels", "config", "encoder", "resnet", "moco", "step"},
    "checkpoint": {"config", "distributed", "step", "weights"},
    "stopping": set(),
    "evaluate": {"config", "distributed", "encoder", "machine", "moco"},
    "metrics": {"fastmoco_kernels", "distributed", "host"},
    "logbook": {"metrics"},
    "progress": {"fastmoco_kernels", "config", "distributed", "host", "logbook", "metrics"},
    "banner": {"fastmoco_kernels", "batchnorm", "config", "convolution", "distributed", "machine"},
}
# Entry points stand on top of everything but the benchmarks.
TOP = {"fastmoco", "__main__", "api", "cli", "completion", "doctor", "train"}


def part_of(module: str) -> str:
    """`fastmoco.data.order` -> `data`; modules outside the three packages keep their top name."""
    pieces = module.split(".")
    return pieces[1] if pieces[0] == "fastmoco" and len(pieces) > 1 else pieces[0]


def module_name(path: Path) -> str:
    relative = path.relative_to(ROOT)
    pieces = relative.with_suffix("").parts
    return ".".join(pieces[1:] if pieces[0] == "kernels" else pieces).removesuffix(".__init__")


def imports_of(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import hides its arrow"
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def tops(path: Path) -> set[str]:
    return {name.split(".")[0] for name in imports_of(path)}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_arrows_point_one_way(path: Path) -> None:
    part = part_of(module_name(path))
    own = {part_of(name) for name in imports_of(path) if name.split(".")[0] == "fastmoco"}
    own |= tops(path) & {"fastmoco_kernels", "bench"}
    own -= {"fastmoco"}
    if path.is_relative_to(ROOT / "bench"):
        return
    assert "bench" not in own, "only benchmarks import benchmarks"
    if part not in TOP:
        assert part in ALLOWED, f"say in ALLOWED what {part} may import"
        assert own <= ALLOWED[part] | {part}
        assert not own & (TOP - {"fastmoco"}), "nothing imports an entry point"


def test_kernels_import_torch_and_triton_only() -> None:
    outside = {"torch", "triton", "fastmoco_kernels"}
    for path in FILES:
        if path.is_relative_to(ROOT / "kernels"):
            third_party = {name for name in tops(path) if name not in sys_stdlib()}
            assert third_party <= outside, f"{path}: {third_party - outside}"


def test_one_importer_of_torch_distributed_and_of_dali() -> None:
    for path in FILES:
        names = imports_of(path)
        if path != ROOT / "fastmoco" / "distributed.py" and path.is_relative_to(ROOT / "fastmoco"):
            assert not any(n.startswith("torch.distributed") for n in names), path
        if path != ROOT / "fastmoco" / "data" / "pipeline.py":
            assert not any(n.startswith("nvidia") for n in names), path


def sys_stdlib() -> frozenset[str]:
    import sys

    return frozenset(sys.stdlib_module_names)
