"""fastmoco: Momentum Contrast (MoCo v1 and v2) pre-training, exact, fast and honest."""

import fastmoco.machine.environment  # noqa: F401  # before anything loads torch

__version__ = "0.1.0"
