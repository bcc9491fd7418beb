"""What the recipes launch for the views of a batch, for `fastmoco_kernels.aot`."""

from __future__ import annotations

from fastmoco_kernels.launch import Launch
from fastmoco_kernels.views import crop_resize, photometric


def view_launches(views: int, side: int) -> list[tuple[str, Launch, int]]:
    """Names, launches over meta tensors, and least bytes moved."""
    made = crop_resize.recipe_launches(views, side)
    return made + photometric.recipe_launches(views, side)
