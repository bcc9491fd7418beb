"""A folder to share an encoder: what `timm.create_model("hf-hub:...")` loads, and a model card.

`model.safetensors`, `config.json`, `README.md` and, of a finished run, `curves.png`. Upload the
folder to a model repository, or load it in place with `timm.create_model("local-dir:FOLDER")`.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import yaml

from fastmoco.config import ConfigError
from fastmoco.network.encoder import pixel_statistics
from fastmoco.weights.files import write, write_safetensors
from fastmoco.weights.formats.constructors import TIMM_ARGUMENTS, TIMM_NAMES
from fastmoco.weights.pixels import pixel_header
from fastmoco.weights.read import Weights

# Groups of the configuration that a reader of the card needs. `run` and `knn` hold local paths.
RECIPE = ("augment", "model", "moco", "optim")


def write_hub_folder(weights: Weights, folder: Path) -> None:
    """Write the folder, which must not hold anything yet.

    The run's record, `metrics.jsonl` and `curves.png`, is looked for beside the checkpoint.

    Raises `ConfigError` if the folder is in use, or for what timm cannot build.
    """
    if not weights.architecture.is_common or weights.architecture.stem == "cifar":
        raise ConfigError(
            f"timm has no {weights.architecture}, so no hub folder can describe it to timm: export "
            "with --to safetensors and load that with fastmoco.load_encoder."
        )
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder} is in use: name a new folder in --out.")
    recipe: dict[str, Any] = yaml.safe_load(weights.config) if weights.config else {}
    write_safetensors(folder / "model.safetensors", weights.trunk, header(weights))
    _write_text(folder / "config.json", json.dumps(timm_config(weights, recipe), indent=2) + "\n")
    curves = weights.path.parent / "curves.png"
    if curves.is_file():
        shutil.copyfile(curves, folder / "curves.png")
    _write_text(folder / "README.md", _card(weights, recipe, curves.is_file()))


def header(weights: Weights) -> dict[str, str]:
    """The texts that our safetensors files carry."""
    built = weights.architecture
    facts = {"arch": built.arch, "width": f"{built.width:g}", "stem": built.stem}
    facts["source"] = weights.kind
    age = {} if weights.epoch is None else {"epoch": str(weights.epoch)}
    return facts | age | pixel_header(weights.pixels)


def timm_config(weights: Weights, recipe: dict[str, Any]) -> dict[str, Any]:
    """`config.json` as timm reads it: architecture, and how an image becomes its input."""
    mean, std = pixel_statistics(weights.pixels)
    channels = weights.architecture.channels
    arguments: dict[str, Any] = dict(TIMM_ARGUMENTS.get(weights.architecture.arch, {}))
    side = recipe.get("augment", {}).get("image_size", 224)
    resize = recipe.get("knn", {}).get("resize", round(side / 0.875))
    return {
        "architecture": TIMM_NAMES[weights.architecture.arch],
        "num_classes": 0,
        "num_features": weights.features,
        "global_pool": "avg",
        "num_channels": channels,
        "model_args": arguments if channels == 3 else {**arguments, "in_chans": channels},
        "pretrained_cfg": {
            "tag": "moco",
            "custom_load": False,
            "input_size": [channels, side, side],
            "fixed_input_size": False,
            "interpolation": "bilinear",
            "crop_pct": side / resize,
            "crop_mode": "center",
            "mean": list(mean),
            "std": list(std),
            "num_classes": 0,
            "pool_size": [-(-side // 32)] * 2,
            # timm sums or repeats the weights of a first convolution that it knows to be for RGB.
            "first_conv": "conv1" if channels == 3 else None,
            "classifier": "fc",
        },
    }


def _write_text(path: Path, text: str) -> None:
    write(path, lambda partial: partial.write_text(text, encoding="utf-8"))


CARD = """---
library_name: timm
pipeline_tag: image-feature-extraction
tags: [moco, self-supervised-learning, image-feature-extraction]
---
# {title}

A {arch} encoder, pre-trained without labels with Momentum Contrast
([arXiv 1911.05722](https://arxiv.org/abs/1911.05722),
[arXiv 2003.04297](https://arxiv.org/abs/2003.04297)). It has no classifier: it maps {image}
to {width} features.

```python
import timm
model = timm.create_model("hf-hub:OWNER/NAME", pretrained=True)  # or "local-dir:FOLDER"
```

{training}
## Quality

{quality}
{curves}"""


def _card(weights: Weights, recipe: dict[str, Any], curves: bool) -> str:
    return CARD.format(
        title=f"MoCo {weights.architecture.arch}",
        arch=weights.architecture.arch,
        width=weights.features,
        image=_image(weights.architecture.channels),
        training=_training(weights, recipe),
        quality=_quality(weights.path.parent / "metrics.jsonl", weights.epoch),
        curves="\n![Loss, pretext and kNN accuracy over the run](curves.png)\n" * curves,
    )


def _image(channels: int) -> str:
    return "an RGB image" if channels == 3 else f"an image of {channels} channels"


def _training(weights: Weights, recipe: dict[str, Any]) -> str:
    """The data and the recipe; local folders are named by their last part only."""
    age = "" if weights.epoch is None else f"Trained for {weights.epoch} epochs. "
    if not recipe:
        return f"## Training\n\n{age}Weights of kind {weights.kind}; the recipe is not known.\n"
    data = recipe["data"]
    name = Path(data.get("root") or data["source"]).name
    text = yaml.safe_dump({n: recipe[n] for n in RECIPE if n in recipe}, sort_keys=False)
    return f"## Training\n\n{age}Data: {name} ({data['source']}).\n\n```yaml\n{text}```\n"


def _quality(metrics: Path, epoch: int | None) -> str:
    """The kNN accuracy after `epoch` epochs beside the marks it had to beat, as a table.

    Of the weights of another epoch it would say nothing. None: the last of the run.
    """
    lines = metrics.read_text(encoding="utf-8").splitlines() if metrics.is_file() else []
    last: dict[str, Any] = {}
    for record in map(_record, lines):
        own = record.get("kind") == "knn" and epoch in (None, record.get("epoch"))
        if own or record.get("kind") == "knn_baseline":
            last |= record
    rows = [
        f"| {label} | {100 * float(last[name]):.1f} % |"
        for name, label in (
            ("knn_top1", "**this encoder**"),
            ("untrained", "untrained encoder"),
            ("raw_pixel", "raw pixels"),
            ("chance", "chance"),
        )
        if last.get(name) is not None
    ]
    if "knn_top1" not in last:
        return "Not evaluated."
    return "\n".join(["| kNN on held-out images | top-1 |", "|---|---:|", *rows])


def _record(line: str) -> dict[str, Any]:
    """One line of metrics.jsonl; empty for the half line that a killed run leaves."""
    try:
        record = json.loads(line)
    except ValueError:
        return {}
    return record if isinstance(record, dict) else {}
