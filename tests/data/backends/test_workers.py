"""What a worker of the loader may take of the machine."""

from __future__ import annotations

import numpy as np
from threadpoolctl import threadpool_info, threadpool_limits
from torch.utils.data import DataLoader, Dataset

from fastmoco.data.backends.workers import _in_worker


class ThreadsOfNumpy(Dataset[int]):
    """Most threads that a product of NumPy may take in the process which asks."""

    def __getitem__(self, index: int) -> int:
        np.ones((8, 8)) @ np.ones((8, 8))
        return max(
            int(one["num_threads"]) for one in threadpool_info() if one["user_api"] == "blas"
        )

    def __len__(self) -> int:
        return 1


def test_a_worker_multiplies_on_one_thread_and_the_trainer_on_all() -> None:
    loader = DataLoader(
        ThreadsOfNumpy(),
        batch_size=None,
        num_workers=1,
        worker_init_fn=_in_worker,
        multiprocessing_context="fork",
    )
    with threadpool_limits(2, user_api="blas"):
        assert list(loader) == [1]
        assert ThreadsOfNumpy()[0] == 2
