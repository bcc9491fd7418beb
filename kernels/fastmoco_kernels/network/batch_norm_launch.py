"""How the batch norm kernels are launched: shapes to pieces, tiles and buffers.

x is (N, C, H, W) in channels-last memory, G groups of N / G samples, `rows` = N H W / G.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from fastmoco_kernels.info_nce_launch import MULTIPROCESSORS
from fastmoco_kernels.launch import Launch, architecture
from fastmoco_kernels.network import batch_norm_backward_triton as backward_kernels
from fastmoco_kernels.network import batch_norm_triton as kernels

WARPS = 4
TILE = 2048  # elements: of bfloat16 two accesses of 16 bytes by each of 128 threads
MERGE_TILE = 2048
REDUCING_PROGRAMS = 16  # per multiprocessor: enough for its memory, and few partial results
MAPPED_TILES = 4  # per program: what it loads per channel is then a tenth of its work


class Configuration(NamedTuple):
    """Tiles, and how the rows of a group are cut."""

    block_r: int
    block_c: int
    reduced_rows: int
    """Rows of a piece in the passes that reduce."""
    pieces: int
    mapped_rows: int
    """Rows of a program in the passes that write."""


def _power_of_two(value: int) -> int:
    """The least power of two that is not less than value."""
    return 1 << (value - 1).bit_length()


def launch_configuration(
    groups: int, rows: int, channels: int, multiprocessors: int
) -> Configuration:
    """Tiles for (groups, rows, channels): 64 channels wide, 128 bytes of bfloat16."""
    block_c = min(64, max(16, _power_of_two(channels)))
    block_r = TILE // block_c
    columns = groups * -(-channels // block_c)
    wanted = max(1, REDUCING_PROGRAMS * multiprocessors // columns)
    tiles = -(-rows // block_r)
    reduced_rows = block_r * -(-tiles // min(wanted, tiles))
    return Configuration(
        block_r, block_c, reduced_rows, -(-rows // reduced_rows), MAPPED_TILES * block_r
    )


@cache
def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return MULTIPROCESSORS[architecture(device)]
    return torch.cuda.get_device_properties(device).multi_processor_count


class Shape(NamedTuple):
    """x as the kernels see it, and its configuration."""

    groups: int
    rows: int
    channels: int
    tiles: Configuration

    @property
    def sizes(self) -> dict[str, int]:
        """Arguments of every kernel."""
        return {"C": self.channels, "rows": self.rows}

    def pass_over(self, rows_per_program: int) -> tuple[tuple[int, int, int], dict[str, object]]:
        """Grid and arguments of a launch over x."""
        tiles = self.tiles
        columns = -(-self.channels // tiles.block_c)
        grid = (columns, -(-self.rows // rows_per_program), self.groups)
        blocks = {"BLOCK_R": tiles.block_r, "BLOCK_C": tiles.block_c}
        return grid, {**self.sizes, "rows_per_program": rows_per_program, **blocks}

    def merge(self) -> tuple[tuple[int], dict[str, object]]:
        """Grid and arguments of a launch over partial results: 32 bytes of every group."""
        block_c = 8
        block_g = min(_power_of_two(self.groups), 64)
        blocks = {"BLOCK_G": block_g, "BLOCK_C": block_c}
        blocks["BLOCK_P"] = MERGE_TILE // (block_g * block_c)
        counts = {"pieces": self.tiles.pieces, "groups": self.groups}
        return (-(-self.channels // block_c),), {**self.sizes, **counts, **blocks}

    def partials(self, x: Tensor) -> Tensor:
        """Two float32 numbers per piece and channel."""
        return x.new_empty(2, self.groups, self.tiles.pieces, self.channels, dtype=torch.float32)

    def per_group(self, x: Tensor) -> Tensor:
        """A float32 number per group and channel."""
        return x.new_empty(self.groups, self.channels, dtype=torch.float32)


def shape_of(x: Tensor, groups: int, tiles: Configuration | None = None) -> Shape:
    """x (N, C, H, W) as the kernels see it."""
    channels = x.shape[1]
    rows = x.numel() // (groups * channels)
    found = tiles or launch_configuration(groups, rows, channels, _multiprocessors(x.device))
    return Shape(groups, rows, channels, found)


def statistics_plan(
    x: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    counter: Tensor,
    momentum: float,
    shape: Shape,
) -> tuple[list[Launch], Tensor, Tensor]:
    """The launches that find mean and var (G, C) of x and move the running ones."""
    # Each in memory of its own: what a custom operation returns must not share any.
    part, mean, var = shape.partials(x), shape.per_group(x), shape.per_group(x)
    parts = {"part_mean": part[0], "part_square": part[1]}
    grid, arguments = shape.pass_over(shape.tiles.reduced_rows)
    reduce = Launch(kernels.statistics_kernel, grid, {"x": x, **parts, **arguments}, WARPS)
    merge_grid, merge_arguments = shape.merge()
    running = {"running_mean": running_mean, "running_var": running_var, "counter": counter}
    arguments = {
        **{**parts, "mean": mean, "var": var, **running, **merge_arguments},
        **{"rows_per_program": shape.tiles.reduced_rows, "momentum": momentum},
    }
    merge = Launch(kernels.merge_statistics_kernel, merge_grid, arguments, WARPS)
    return [reduce, merge], mean, var


def normalize_plan(
    x: Tensor,
    residual: Tensor | None,
    affine: dict[str, Tensor],
    eps: float,
    relu: bool,
    shape: Shape,
) -> tuple[Launch, Tensor]:
    """The launch that makes y; `affine` holds weight, bias (C,), mean and var (G, C)."""
    y = torch.empty_like(x)
    grid, arguments = shape.pass_over(shape.tiles.mapped_rows)
    tensors = {"x": x, "residual": residual, "y": y, **affine}
    options = {"eps": eps, "RELU": relu}
    return Launch(kernels.normalize_kernel, grid, {**tensors, **arguments, **options}, WARPS), y


class Gradients(NamedTuple):
    """Launches of the backward and what they fill."""

    launches: list[Launch]
    dx: Tensor
    g: Tensor
    """Gradient of the residual; dy itself where no y is given."""
    grad_weight: Tensor
    grad_bias: Tensor


def backward_plan(
    dy: Tensor,
    x: Tensor,
    y: Tensor | None,
    affine: dict[str, Tensor],
    eps: float,
    relu: bool,
    shape: Shape,
) -> Gradients:
    """The backward launches. y, the output, is given where a residual was added before a ReLU."""
    part, mean_g, slope = shape.partials(x), shape.per_group(x), shape.per_group(x)
    grad_weight, grad_bias = (x.new_empty(shape.channels, dtype=torch.float32) for _ in range(2))
    g = dy if y is None else torch.empty_like(x)
    options = {"eps": eps, "RECOMPUTE": relu and y is None}
    parts = {"part_sum": part[0], "part_dot": part[1]}
    found = {"mean_g": mean_g, "slope": slope}
    grid, arguments = shape.pass_over(shape.tiles.reduced_rows)
    tensors = {"x": x, "dy": dy, "y": y, "g": None if y is None else g, **affine, **parts}
    sums = Launch(
        backward_kernels.gradient_sums_kernel, grid, {**tensors, **arguments, **options}, WARPS
    )
    merge_grid, arguments = shape.merge()
    arguments |= {**parts, "var": affine["var"], **found, "eps": eps}
    arguments |= {"grad_weight": grad_weight, "grad_bias": grad_bias}
    merge = Launch(backward_kernels.merge_gradients_kernel, merge_grid, arguments, WARPS)
    dx = torch.empty_like(x)
    grid, arguments = shape.pass_over(shape.tiles.mapped_rows)
    tensors = {"x": x, "g": g, "dx": dx, **affine, **found}
    last = Launch(
        backward_kernels.input_gradient_kernel, grid, {**tensors, **arguments, **options}, WARPS
    )
    return Gradients([sums, merge, last], dx, g, grad_weight, grad_bias)
