"""The custom operations as a GPU runs them, their kernels interpreted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from fastmoco_kernels.info_nce import _info_nce, _info_nce_enqueue
from fastmoco_kernels.network import batch_norm
from fastmoco_kernels.network.max_pool import _backward, _max_pool
from fastmoco_kernels.views.crop_resize import _crop_resize
from fastmoco_kernels.views.photometric import COLUMNS, _photometric


def _calls() -> dict[str, tuple[Any, tuple[Any, ...]]]:
    """Every operation that returns something, with arguments."""
    x = torch.randn(4, 8, 6, 5).contiguous(memory_format=torch.channels_last)
    running = (torch.zeros(8), torch.ones(8), torch.tensor(0))
    affine = (torch.ones(8), torch.zeros(8), torch.zeros(2, 8), torch.ones(2, 8))
    q, k, queue = torch.randn(4, 16), torch.randn(4, 16), torch.randn(32, 16)
    index = torch.zeros(4, 8, 3, 3, dtype=torch.uint8)
    index = index.contiguous(memory_format=torch.channels_last)
    dy = torch.ones(4, 8, 3, 3).contiguous(memory_format=torch.channels_last)
    pixels = torch.zeros(2, 8, 8, 3, dtype=torch.uint8)
    boxes = torch.tensor([[0, 0, 6, 6]])
    return {
        "statistics": (batch_norm._statistics, (x, *running, 0.1, 2)),
        "apply": (batch_norm._apply, (x, x.clone(), *affine, 1e-5, True)),
        "backward": (batch_norm._backward, (x.clone(), x, x.clone(), *affine, 1e-5, True)),
        "plain backward": (batch_norm._backward, (x.clone(), x, None, *affine, 1e-5, True)),
        "max_pool": (_max_pool, (x, 3, 2, 1)),
        "max_pool backward": (_backward, (dy, index, 6, 5, 3, 2, 1)),
        "info_nce": (_info_nce, (q, k, queue, 0.2)),
        "enqueue": (
            _info_nce_enqueue,
            (q, k, k.clone(), queue, torch.zeros(1, dtype=torch.int64), 0.2),
        ),
        "photometric": (_photometric, (pixels, torch.zeros(2, COLUMNS))),
        "crop_resize": (
            _crop_resize,
            ([torch.zeros(3, 6, 6, dtype=torch.uint8)], torch.tensor([0]), boxes, 4),
        ),
    }


@pytest.mark.parametrize("name", list(_calls()))
def test_what_an_operation_returns_shares_no_memory(name: str) -> None:
    """torch refuses it at the first call on a GPU, and `opcheck` sees the form of the CPU only."""
    operation, arguments = _calls()[name]
    found = operation._backend_fns["cuda"](*arguments)
    tensors = [t for t in tree_leaves([arguments, found]) if isinstance(t, Tensor)]
    memory = [t.untyped_storage().data_ptr() for t in tensors if t.numel()]
    assert len(set(memory)) == len(memory)
