"""The settings that a data set asks for, as lines that `fastmoco train` takes as they are.

N pictures, K keys in the queue, S side of a view.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from fastmoco.config import Config, DataConfig, check
from fastmoco.data.inspect.contents import Contents
from fastmoco.data.pixels.resolve import resolve_pixels
from fastmoco.data.pixels.rule import PixelRule
from fastmoco.data.pixels.survey import survey
from fastmoco.data.sources.source import Source

_LARGEST_SIDE, _SMALLEST_SIDE, _STEP = 224, 32, 32
_CIFAR_STEM_TO = 64
_MOST_KEYS = 65_536
_ENLARGED = 4  # times, at most, of the crops of 19 in 20 pictures
_LARGEST_AREA = 0.5
# The percentiles instead of the extremes where those lie so many times as far apart.
_OUTLIERS = 2.0
_PACK_SIDE = 25 / 14  # times S: 400 for 224, which costs the views 37.5 dB (docs/data.md)
# Options of a start or of a machine, which say nothing about the set.
_NOT_OF_THE_SET = {"rescan", "verify", "workers", "threads", "prefetch", "backend"}


@dataclass(frozen=True)
class Line:
    """One setting and the reason for it."""

    name: str
    value: Any
    why: str


@dataclass(frozen=True)
class Advice:
    """What to train with; no lines where nothing can be."""

    lines: list[Line]
    notes: list[str]
    """What else to do, one sentence each."""

    def yaml(self) -> str:
        """A file for `--config`."""
        groups: dict[str, list[Line]] = {}
        for line in self.lines:
            groups.setdefault(line.name.split(".")[0], []).append(line)
        text = []
        for group, lines in groups.items():
            text.append(f"{group}:")
            for line in lines:
                shown = f"  {line.name.split('.')[1]}: {_written(line.value)}"
                text.append(f"{shown}  # {line.why}" if line.why else shown)
        return "\n".join(text) + "\n"

    def options(self) -> list[str]:
        """The same for a command line."""
        words = []
        for line in self.lines:
            text = line.value if isinstance(line.value, str) else _written(line.value)
            words += [f"--{line.name}", text]
        return words

    def command(self) -> str:
        """The same for a shell, in lines of one option."""
        words = self.options()
        pairs = zip(words[::2], words[1::2], strict=True)
        return " \\\n  ".join(
            ["fastmoco train", *(f"{name} {shlex.quote(value)}" for name, value in pairs)]
        )


def _written(value: Any) -> str:
    """A value as YAML writes it in one line; of text only what needs quotes has them."""
    plain = list(value) if isinstance(value, tuple) else value
    text: str = yaml.safe_dump(plain, default_flow_style=True, width=1 << 20, allow_unicode=True)
    return text.removesuffix("\n").removesuffix("\n...").strip()


def without_colour(config: Config) -> Config:
    """The same run with the augmentations of RGB off where its pictures have other channels."""
    if config.data.channels == 3:
        return config
    augment = replace(config.augment, saturation=0.0, hue=0.0, grayscale_p=0.0)
    return replace(config, augment=augment)


def measured(config: Config, source: Source) -> Config:
    """The run with the range, mean and deviation of its pictures, rounded to what matters.

    config: from `resolve_folders`, with `data.channels` chosen already. The range is that of the
    percentiles where a few values lie far outside of them. Raises `ConfigError` as training does.
    """
    data = resolve_pixels(config, source).data
    seen = survey(source, PixelRule.of(config.data))
    if config.data.intensity == "auto" and seen.deep and not isinstance(data.intensity, str):
        (low, high), (first, last) = data.intensity, seen.deep.percentiles
        if last > first and high - low > _OUTLIERS * (last - first):
            asked = replace(config, data=replace(config.data, intensity="percentiles"))
            data = resolve_pixels(asked, source).data
    numbers = {name: _rounded(getattr(data, name)) for name in ("intensity", "mean", "std")}
    return replace(config, data=replace(data, **numbers))


def advise(config: Config, contents: Contents, source: Source) -> tuple[Config, Advice]:
    """The configuration with the advice in it, and the advice. config: from `measured`."""
    sides = contents.shorter_sides()
    side = view_side(sides)
    lines = _data_lines(config.data, contents)
    lines += _view_lines(config, side, sides, config.data.channels)
    lines += _training_lines(config, contents.total)
    if side <= _CIFAR_STEM_TO:
        lines.append(Line("model.stem", "cifar", f"views of {side} pixels are small for a 7 x 7"))
    advised = _applied(config, lines)
    check(advised, 1)
    return advised, Advice(lines, _notes(config, contents, source, side))


def _rounded(value: Any) -> Any:
    if isinstance(value, str):
        return value
    return tuple(float(f"{number:.6g}") for number in value)


def _data_lines(data: DataConfig, contents: Contents) -> list[Line]:
    why = {
        "channels": _channels_why(data.channels),
        "intensity": "8 bits" if isinstance(data.intensity, str) else "these become 0 and 255",
        "mean": "ImageNet's" if isinstance(data.mean, str) else "measured",
        "std": "",
    }
    default = DataConfig()
    lines = []
    for name in (field.name for field in fields(DataConfig)):
        value = getattr(data, name)
        told = name in ("root", *why)
        if told or (name not in _NOT_OF_THE_SET and value != getattr(default, name)):
            lines.append(Line(f"data.{name}", value, why.get(name, "")))
    share = contents.bad_share
    if share > DataConfig.max_bad_share and share > data.max_bad_share:
        allowed = min(1.0, np.ceil(125 * share + 1) / 100)
        lines = [line for line in lines if line.name != "data.max_bad_share"]
        why_share = f"{100 * share:.1f} % are bad and are replaced by others"
        lines.append(Line("data.max_bad_share", float(allowed), why_share))
    return lines


def _channels_why(channels: int) -> str:
    if channels == 3:
        return "RGB"
    return "nearly all are gray" if channels == 1 else f"most have {channels}"


def view_side(shorter: NDArray[np.int32]) -> int:
    """S: a multiple of 32 that three in four pictures are no smaller than, at most 224.

    Smaller than 32, the median, since there is no choice.
    """
    quarter, median = np.quantile(shorter, (0.25, 0.5), method="inverted_cdf")
    side = min(_LARGEST_SIDE, int(quarter) // _STEP * _STEP)
    return side or max(8, min(_SMALLEST_SIDE, int(median)))


def _view_lines(config: Config, side: int, shorter: NDArray[np.int32], channels: int) -> list[Line]:
    small = int(np.quantile(shorter, 0.05, method="inverted_cdf"))
    needed = (side / (_ENLARGED * max(small, 1))) ** 2
    area, why = config.augment.min_area, "of the picture, to 1: the range of crops"
    if needed > area:
        area = float(np.ceil(100 * min(needed, _LARGEST_AREA)) / 100)
        why = f"some pictures have only {small} pixels: smaller crops would be blurred"
    lines = [
        Line("augment.image_size", side, "of the shorter sides 3 in 4 are no smaller"),
        Line("augment.min_area", area, why),
    ]
    if channels != 3:
        names = ("saturation", "hue", "grayscale_p")
        lines += [Line(f"augment.{name}", 0, "for RGB only") for name in names]
    return lines


def power_of_two(limit: float) -> int:
    """The largest that is no larger, at least 1."""
    return 1 << max(0, int(limit).bit_length() - 1)


def _training_lines(config: Config, total: int) -> list[Line]:
    """K of an eighth of N at most: a query seldom meets an older key of its own picture."""
    eighth = power_of_two(total / 8)
    batch = min(config.optim.global_batch_size, max(2, eighth))
    keys = max(min(eighth, _MOST_KEYS), batch * (2 if config.moco.symmetric else 1))
    lines = [Line("moco.queue_size", keys, f"at most an eighth of the {total:,} pictures")]
    if batch != config.optim.global_batch_size:
        lines.append(Line("optim.global_batch_size", batch, "no more than K"))
        lines.append(Line("optim.lr_scaling", "linear", "the rate is that of 256"))
    group = min(config.moco.bn_group_size or batch, max(2, batch // 4))
    while batch % group:
        group -= 1
    if group != config.moco.bn_group_size:
        lines.append(Line("moco.bn_group_size", group, "at least four groups, or BN leaks"))
    return lines


def _applied(config: Config, lines: Sequence[Line]) -> Config:
    groups: dict[str, dict[str, Any]] = {}
    for line in lines:
        group, name = line.name.split(".")
        groups.setdefault(group, {})[name] = line.value
    changed = {name: replace(getattr(config, name), **values) for name, values in groups.items()}
    return replace(config, **changed)


def pack_side(side: int) -> int:
    """`--short-side` for views of this side."""
    return round(_PACK_SIDE * side)


def _notes(config: Config, contents: Contents, source: Source, side: int) -> list[str]:
    short = pack_side(side)
    share = float((contents.shorter_sides() > short).mean())
    root = shlex.quote(config.data.root)
    kind = "" if config.data.source == "folder" else f"--data.source {config.data.source} "
    deep = {look.kind.bits > 8 for look in contents.good if look.kind}
    if deep == {True} or config.data.channels not in (1, 3):
        gain = "keeps every picture as it is, and saves opening files"
    elif share < 0.01:
        gain = "makes hardly any picture smaller, and saves opening files"
    else:
        gain = f"makes {100 * share:.0f} % of the pictures smaller, which are faster to decode"
    notes = [f"fastmoco pack {kind}--data.root {root} --out PACK --short-side {short} {gain}."]
    turned = sum(n for value, n in contents.counts("orientation").items() if value != "1")
    if turned and config.data.exif == "ignore":
        notes.append(
            f"{turned:,} pictures are to be turned by EXIF, which training ignores: "
            "data.exif apply turns them."
        )
    return notes + survey(source, PixelRule.of(config.data)).warnings()
