"""Benchmarks: every published number is a row that one of these programs wrote."""

import fastmoco  # noqa: F401  # its environment has to be set before torch is loaded
