"""Checks of a configuration before anything expensive starts."""

from __future__ import annotations

import importlib.util
import math
from itertools import pairwise

from fastmoco.config.fields import Config, ConfigError, DataConfig, OptimConfig, flatten

_INFINITE = float("inf")
MOST_SEED = 2**64 - 1
"""The largest seed that torch and NumPy take."""
RGB8_BACKENDS = ("dali", "nvjpeg")
"""Values of `data.backend` whose views are of 8-bit RGB only."""
_BOUNDS: dict[str, tuple[float, float]] = {
    **dict.fromkeys(
        [f"run.{name}" for name in ("log_every", "checkpoint_every", "timeout_s")]
        + [f"optim.{name}" for name in ("epochs", "global_batch_size", "accumulate")]
        + ["knn.k", "knn.resize", "data.synthetic_samples"],
        (1, _INFINITE),
    ),
    **dict.fromkeys(
        [f"run.{name}" for name in ("keep_checkpoints", "keep_every", "max_steps")]
        + ["run.checkpoint_minutes"]
        + [
            "optim.lr",
            "optim.weight_decay",
            "optim.warmup_epochs",
            "knn.every",
            "knn.max_bank",
            "moco.bn_group_size",
        ],
        (0, _INFINITE),
    ),
    **dict.fromkeys(
        [f"augment.{name}" for name in ("brightness", "contrast", "saturation")]
        + [f"augment.{name}_p" for name in ("jitter", "grayscale", "blur", "flip")]
        + ["moco.momentum", "moco.bank_momentum", "optim.momentum"],
        (0, 1),
    ),
    **dict.fromkeys(["data.workers", "data.threads"], (0, 1024)),
    **dict.fromkeys(["augment.blur_min", "augment.blur_max"], (0, 16)),
    "run.seed": (0, MOST_SEED),
    "data.prefetch": (1, 64),
    "data.shuffle_window": (0, 2**62),
    "data.max_pixels": (1, 2**40),
    "data.channels": (1, 1024),
    "data.max_bad_share": (0, 1),
    "augment.image_size": (8, 4096),
    "augment.min_area": (1e-6, 1),
    "augment.hue": (0, 0.5),
    "model.dim": (1, 4096),
    "model.width": (1 / 64, 16),
    "moco.queue_size": (1, 2**24),
}


def check(config: Config, world_size: int) -> None:
    """Raise `ConfigError` for the first value or pair of values that cannot train."""
    for name, (low, high) in _BOUNDS.items():
        value = flatten(config)[name]
        if not low <= value <= high:  # type: ignore[operator]
            ends = [f"{end:g}" if isinstance(end, float) else str(end) for end in (low, high)]
            raise ConfigError(f"{name} is {value}, but must lie between {' and '.join(ends)}.")
    for name, value in flatten(config).items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{name} is {value}, but must be finite.")
    if config.moco.temperature <= 0:
        raise ConfigError("moco.temperature must be greater than 0.")
    if config.augment.blur_min > config.augment.blur_max:
        raise ConfigError(
            f"augment.blur_min {config.augment.blur_min} exceeds augment.blur_max "
            f"{config.augment.blur_max}: swap them."
        )
    _check_schedule(config.optim)
    check_pixel_options(config)
    if config.model.width * 64 % 1:
        raise ConfigError(
            f"model.width {config.model.width} makes {config.model.width * 64:g} of the stem's 64 "
            "channels: choose a multiple of 1/64, such as 0.5 or 0.25."
        )
    if config.model.stem == "imagenet" and config.augment.image_size < 32:
        # Besides being useless, a 1x1 input to a strided 3x3 convolution makes oneDNN's bf16 weight
        # gradient return uninitialized memory (seen in torch 2.14.1 on AVX512-BF16).
        raise ConfigError(
            f"augment.image_size {config.augment.image_size} is too small for the imagenet stem, "
            "which shrinks it 32 times: set it to at least 32, or model.stem to cifar."
        )
    local, group = config.local_batch_size(world_size), config.bn_group_size(world_size)
    if local % group:
        raise ConfigError(
            f"moco.bn_group_size {group} does not divide the local batch of {local} "
            f"(optim.global_batch_size {config.optim.global_batch_size} on {world_size} ranks "
            f"x {config.optim.accumulate} micro-batches): choose a divisor of {local}."
        )
    if group < 2:
        raise ConfigError(
            f"A BN group of {group} sample has no variance to normalize with: raise "
            f"optim.global_batch_size above {world_size * config.optim.accumulate}."
        )
    if config.run.tracker != "none" and importlib.util.find_spec(config.run.tracker) is None:
        raise ConfigError(
            f"run.tracker is {config.run.tracker}, but the package is not installed: pip install "
            f"{config.run.tracker}, or set run.tracker to none."
        )
    _check_mechanism(config)


def _check_schedule(optim: OptimConfig) -> None:
    if optim.warmup_epochs >= optim.epochs:
        raise ConfigError(
            f"optim.warmup_epochs {optim.warmup_epochs} leaves nothing of optim.epochs "
            f"{optim.epochs}: choose fewer."
        )
    if any(a >= b for a, b in pairwise((0, *optim.milestones))):
        raise ConfigError(
            f"optim.milestones is {list(optim.milestones)}, but must be epochs after the first, "
            "each later than the one before."
        )


def _check_mechanism(config: Config) -> None:
    """Raise `ConfigError` for options that `moco.mechanism` cannot honour."""
    moco, optim = config.moco, config.optim
    if moco.symmetric and moco.shuffle_bn == "loader":
        # The loader brings only the keys of other samples, and those would be the queries.
        raise ConfigError(
            "moco.symmetric needs both views of a sample on one rank, and moco.shuffle_bn loader "
            "sends the second elsewhere: set moco.shuffle_bn to auto."
        )
    if moco.mechanism != "queue" and optim.name == "sgd_ema":
        raise ConfigError(
            f"moco.mechanism {moco.mechanism} has one encoder and no EMA, so that optim.name "
            "sgd_ema does not fit: set optim.name to sgd."
        )
    if moco.mechanism == "end_to_end" and optim.accumulate > 1:
        raise ConfigError(
            f"optim.accumulate {optim.accumulate} would leave moco.mechanism end_to_end only the "
            "keys of a part of the global batch as negatives: set optim.accumulate to 1."
        )
    if moco.mechanism == "memory_bank":
        _check_memory_bank(config)
    if moco.mechanism != "queue":
        return
    enqueued = config.optim.global_batch_size * (2 if config.moco.symmetric else 1)
    if enqueued > config.moco.queue_size:
        raise ConfigError(
            f"moco.queue_size {config.moco.queue_size} is smaller than the {enqueued} keys that "
            f"one step enqueues: raise it to at least {enqueued}."
        )


def _check_memory_bank(config: Config) -> None:
    if config.data.source == "synthetic":
        raise ConfigError(
            "moco.mechanism memory_bank needs samples that come back, and data.source synthetic "
            "is noise without sample numbers: choose another data.source."
        )
    if config.moco.symmetric or config.moco.shuffle_bn not in ("auto", "none"):
        option = "symmetric true" if config.moco.symmetric else "shuffle_bn"
        raise ConfigError(
            f"moco.mechanism memory_bank encodes no keys, so that moco.{option} has nothing to do: "
            "leave it at its default."
        )


def check_pixels(data: DataConfig) -> None:
    """Raise `ConfigError` for pixels that cannot be made, or not be normalized."""
    for name in ("mean", "std"):
        numbers = getattr(data, name)
        if not isinstance(numbers, str) and len(numbers) != data.channels:
            raise ConfigError(
                f"data.{name} has {len(numbers)} numbers, but data.channels is {data.channels}: "
                "give one for each channel, or auto."
            )
        if not isinstance(numbers, str) and not all(map(math.isfinite, numbers)):
            raise ConfigError(f"data.{name} is {list(numbers)}, but must be of finite numbers.")
    if not isinstance(data.std, str) and min(data.std) <= 0:
        raise ConfigError(f"data.std is {list(data.std)}, but must be greater than 0.")
    if not isinstance(data.intensity, str) and not all(map(math.isfinite, data.intensity)):
        raise ConfigError(f"data.intensity is {list(data.intensity)}, but must be finite.")
    if not isinstance(data.intensity, str) and not data.intensity[0] < data.intensity[1]:
        raise ConfigError(
            f"data.intensity is {list(data.intensity)}: the first value becomes 0 and the second, "
            "which must be larger, 255."
        )
    if not all(0 <= level <= 255 for level in data.alpha_over):
        raise ConfigError(
            f"data.alpha_over is {list(data.alpha_over)}, but takes three levels from 0 to 255."
        )


def check_pixel_options(config: Config) -> None:
    """Raise `ConfigError` for options of pixels and views that do not fit together."""
    data, augment = config.data, config.augment
    check_pixels(data)
    if data.channels == 3:
        return
    jittered = [n for n in ("saturation", "hue") if augment.jitter_p and getattr(augment, n)]
    for_rgb = [*jittered, *["grayscale_p"] * (augment.grayscale_p > 0)]
    if for_rgb:
        names = " and ".join(f"augment.{name}" for name in for_rgb)
        raise ConfigError(
            f"data.channels is {data.channels}, but {names} are for 3 channels: set to 0."
        )
    if data.backend in RGB8_BACKENDS:
        raise ConfigError(
            f"data.channels is {data.channels}, but data.backend {data.backend} makes views of "
            "8-bit RGB only: set it to array or pil."
        )


def warnings(config: Config, world_size: int, num_samples: int) -> list[str]:
    """Settings that train, but probably not as meant; one sentence each."""
    found = []
    if config.moco.mechanism == "queue" and 2 * config.moco.queue_size > num_samples:
        found.append(
            f"moco.queue_size {config.moco.queue_size} exceeds half of the {num_samples} "
            "training images, so that a query often meets older keys of its own image as "
            "negatives: lower it to at most half the data set."
        )
    groups = config.local_batch_size(world_size) // config.bn_group_size(world_size)
    strategy = config.shuffle_bn(world_size)
    stays = strategy == "split" or (strategy != "none" and world_size == 1)
    if stays and groups == 1:
        found.append(
            "All samples of a rank share one BN group, so shuffling keys inside it changes "
            "nothing and BN can leak which key is positive: lower moco.bn_group_size."
        )
    if strategy == "split" and 1 < groups < 4:
        # Seen on the demo images: two groups, pretext accuracy above 75 % and kNN standing still.
        found.append(
            f"With only {groups} BN groups on a device, a key still shares 1/{groups} of its group "
            "with its query's, and BN can leak: lower moco.bn_group_size to have at least 4."
        )
    return found
