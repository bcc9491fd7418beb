"""Every kernel as the compiler makes it for sm_80, sm_90 and sm_100; no device is needed."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch

from fastmoco_kernels import aot
from fastmoco_kernels.info_nce_launch import exact_shift, launch_configuration, precision
from fastmoco_kernels.launch import Launch

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
CASES = [(arch, case) for arch in aot.ARCHITECTURES for case in aot.recipe_cases(arch)]
MATRIX = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}


def check(case: aot.Case, arch: int) -> aot.Compiled:
    made = aot.compile_for(case.launch, arch)
    assert made.spills == 0, f"{case.name}: {made.spills} spills, {made.registers} registers"
    assert made.shared_bytes <= aot.SHARED_LIMIT[arch]
    return made


@pytest.mark.parametrize(
    ("arch", "case"), CASES, ids=[f"sm_{arch}-{case.name}" for arch, case in CASES]
)
def test_recipes_compile_without_spills(arch: int, case: aot.Case) -> None:
    made = check(case, arch)
    assert bool(made.tensor_core) == bool(case.operations)
    if case.operations and "N=256" in case.name and "bfloat16 queue" in case.name:
        assert any(op.startswith(MATRIX[arch]) for op in made.operations), made.operations
    if case.name.startswith(("ema", "sgd")):
        lists = {"ema": 2, "ema with bfloat16 shadow": 2, "sgd_ema": 4}[case.name]
        wide = sum(n for op, n in made.operations.items() if op.startswith("LDG") and ".128" in op)
        stores = sum(n for op, n in made.operations.items() if "STG" in op and ".128" in op)
        assert wide >= 2 * lists, made.operations
        assert stores >= 2 * (1 if lists == 2 else 3)
    if case.name.startswith("max_pool"):  # a thread has eight channels, and eight bytes of index
        moves = {op for op in made.operations if op.startswith(("LDG", "STG"))}
        assert moves
        assert all(".128" in op or ".64" in op for op in moves), moves

    if case.name.startswith("photometric"):
        found = made.operations
        if "columns" in case.name:  # 16 neighbouring bytes per thread; the rest are the row's
            assert (found["LDG.E.128"], found["STG.E.128"]) == (15, 3), found
            assert not any(".U8" in op for op in found), found
        # A colour is three bytes, and a thread has four or eight colours in registers.
        fused = made.operations["FFMA"]
        assert fused == 0 or aot.compile_for(fusing(case.launch), arch).operations["FFMA"] > fused

    if case.name.startswith("crop_resize"):  # a thread has a column, a byte of which is one load
        double = any(op.startswith("DMUL") for op in made.operations)
        assert double == (case.name == "crop_resize coefficients")
        if double:  # fused, weights would not be PIL's
            whole = aot.compile_for(fusing(case.launch), arch).operations
            assert whole["DADD"] < made.operations["DADD"]

    if case.name.startswith("batch norm") and "merge" not in case.name:
        accesses = Counter((op[:3], ".128" in op) for op in made.operations.elements())
        writes = "statistics" not in case.name and ("sums" not in case.name or "add" in case.name)
        assert accesses["LDG", True] >= 4, made.operations
        assert accesses["LDG", False] == 0, made.operations
        assert (accesses["STG", True] >= 2) == writes, made.operations


def fusing(launch: Launch) -> Launch:
    """The launch as it would be if products and sums might be fused."""
    return replace(launch, fused_multiply_add=True)


def test_narrow_loads_would_be_noticed() -> None:
    """The alignment promise is what makes the loads wide: without it there are none."""
    launch = aot.update_cases(90)[0].launch
    launch.arguments["ALIGNED"] = False
    made = aot.compile_for(launch, 90)
    assert not any(".128" in op for op in made.operations)


Key = tuple[object, ...]
TILE = slice(0, 5)  # of a key: tile sizes, warps and stages; behind it dtypes, shift and precision


def configurations(arch: int) -> dict[Key, aot.Case]:
    """One partial launch per tile shape, pair of dtypes and kind of shift that can be chosen."""
    found: dict[Key, aot.Case] = {}
    for dtype, queue_dtype in ((BF16, F32), (BF16, BF16), (F16, F32), (F32, F32), (F32, BF16)):
        for n in (32, 256):
            for c in (64, 128, 256, 512):
                for temperature in (0.2, 0.02):
                    tiles = launch_configuration(n, 65536, c, dtype, arch)
                    exact = exact_shift(dtype, temperature)
                    shape = (*tiles[:3], *tiles[-2:])
                    key = (*shape, dtype, queue_dtype, exact, precision(dtype, tiles.block_c))
                    if key not in found:
                        case, _ = aot.info_nce_cases(
                            n, c, 65536, dtype, queue_dtype, arch, temperature
                        )
                        found[key] = case
    return found


def one_of_each_tile(arch: int) -> dict[Key, aot.Case]:
    """Of `configurations`, one per tile shape; what else can vary goes round with `arch`."""
    by_tile: dict[Key, list[Key]] = {}
    every = configurations(arch)
    for key in every:
        by_tile.setdefault(key[TILE], []).append(key)
    turn = 2 * aot.ARCHITECTURES.index(arch)
    chosen = [keys[(turn + i) % len(keys)] for i, keys in enumerate(by_tile.values())]
    return {key: every[key] for key in chosen}


def check_configurations(cases: dict[Key, aot.Case], arch: int) -> None:
    for key, case in cases.items():
        made = check(case, arch)
        assert (made.tensor_core > 0) == ("tf32x3" in key or key[5] == BF16 or key[5] == F16)


def test_the_chosen_configurations_have_every_tile_and_every_kind() -> None:
    chosen, every = set[Key](), set[Key]()
    for arch in aot.ARCHITECTURES:
        here, all_here = one_of_each_tile(arch), configurations(arch)
        assert {key[TILE] for key in here} == {key[TILE] for key in all_here}
        chosen |= here.keys()
        every |= all_here.keys()
    assert {key[5:] for key in chosen} == {key[5:] for key in every}


@pytest.mark.parametrize("arch", aot.ARCHITECTURES)
def test_a_configuration_of_each_tile_compiles_without_spills(arch: int) -> None:
    check_configurations(one_of_each_tile(arch), arch)


@pytest.mark.slow
@pytest.mark.parametrize("arch", aot.ARCHITECTURES)
def test_every_configuration_compiles_without_spills(arch: int) -> None:
    cases = configurations(arch)
    assert len(cases) > 30
    check_configurations(cases, arch)
