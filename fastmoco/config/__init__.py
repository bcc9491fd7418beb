"""Configuration of a run: typed fields, cross-field checks, YAML and command line.

Every refusal is a `ConfigError` whose one sentence says what is wrong, where, and what to do.
"""

from fastmoco.config.checks import check, check_pixel_options, check_pixels, warnings
from fastmoco.config.fields import (
    AugmentConfig,
    Config,
    ConfigError,
    DataConfig,
    KnnConfig,
    MocoConfig,
    ModelConfig,
    OneRankError,
    OptimConfig,
    RunConfig,
    ShuffleBN,
    flatten,
)
from fastmoco.config.parsing import dump, load, parse, parse_text, recipe_path, validated

__all__ = [
    "AugmentConfig",
    "Config",
    "ConfigError",
    "DataConfig",
    "KnnConfig",
    "MocoConfig",
    "ModelConfig",
    "OneRankError",
    "OptimConfig",
    "RunConfig",
    "ShuffleBN",
    "check",
    "check_pixel_options",
    "check_pixels",
    "dump",
    "flatten",
    "load",
    "parse",
    "parse_text",
    "recipe_path",
    "validated",
    "warnings",
]
