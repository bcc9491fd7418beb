"""Fused operations of MoCo: Triton for CUDA, ATen or C++ for the CPU.

`reference` is what the loss, the queue and the updates are compared with; batch norm and
convolutions of the CPU are compared with torch's own, the views with PIL's.
"""

from fastmoco_kernels.ema import ema_
from fastmoco_kernels.info_nce import InfoNCE, enqueue_, info_nce, info_nce_enqueue
from fastmoco_kernels.network.batch_norm import batch_norm_act
from fastmoco_kernels.network.max_pool import max_pool
from fastmoco_kernels.sgd_ema import sgd_ema_
from fastmoco_kernels.views.crop_resize import crop_resize
from fastmoco_kernels.views.photometric import photometric

__all__ = [
    "InfoNCE",
    "batch_norm_act",
    "crop_resize",
    "ema_",
    "enqueue_",
    "info_nce",
    "info_nce_enqueue",
    "max_pool",
    "photometric",
    "sgd_ema_",
]
