"""fastmoco: Momentum Contrast (MoCo v1 and v2) pre-training, exact, fast and honest."""

__version__ = "0.1.0"
