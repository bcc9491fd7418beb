"""The rendered shapes on disk: `fastmoco shapes --out DIR`, to try detection without a download.

    DIR/coco       annotations/instances_{train,val}.json, train/, val/
    DIR/voc        VOC2007 with boxes and classes of pixels, classes.txt
    DIR/pretrain   pictures of the same kind without annotations, for `fastmoco train`

All pictures are JPEGs of quality 95. The same options give the same files.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from xml.sax.saxutils import escape

from PIL import Image
from tqdm import tqdm

from fastmoco.config import ConfigError
from fastmoco.config.command import CommandParser, as_seed
from fastmoco.data.sources.listing import walk
from fastmoco.data.sources.measure import in_parallel
from fastmoco.machine.host import machine_cores
from fastmoco.machine.stopping import exit_code
from fastmoco.transfer.datasets.rendered import CLASSES, SIZES, coco_content, pixel_classes
from fastmoco.transfer.datasets.scenes import DIFFICULT, Layout, layout, picture
from fastmoco.transfer.datasets.voc import CLASS_FILE

PRETRAIN = 2000
VOC_LISTS = {"train": "trainval", "val": "test"}
VOC_FOLDERS = ("Annotations", "JPEGImages", "SegmentationClass")


def write_shapes(
    out: Path,
    *,
    train: int = SIZES["train"],
    val: int = SIZES["val"],
    pretrain: int = PRETRAIN,
    seed: int = 0,
    photographs: list[Path] | None = None,
    processes: int = 0,
) -> None:
    """Draws the scenes into a folder, which exists only once it is complete.

    processes: 0 for one per core. Raises `ConfigError` if `out` exists or cannot be written, and
    for a photograph that cannot be read.
    """
    if out.exists():
        raise ConfigError(f"{out} exists already: choose another folder or remove it.")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as place:
            complete = Path(place) / out.name
            counts = {"train": train, "val": val, "pretrain": pretrain}
            _write(complete, counts, seed, photographs or [], processes or machine_cores())
            os.rename(complete, out)
    except OSError as error:
        raise ConfigError(f"{out} cannot be written ({error.strerror or error}).") from error


def _write(
    out: Path, counts: dict[str, int], seed: int, photographs: list[Path], processes: int
) -> None:
    voc = out / "voc" / "VOC2007"
    folders = [out / "coco" / name for name in ("annotations", "train", "val")]
    for folder in [*folders, *(voc / name for name in VOC_FOLDERS), out / "pretrain"]:
        folder.mkdir(parents=True)
    (out / "voc" / CLASS_FILE).write_text("".join(f"{name}\n" for name in CLASSES))
    with contextlib.ExitStack() as stack:
        each: Callable[..., Iterable[Layout]] = map
        if processes > 1:
            pool = stack.enter_context(in_parallel(many=True, workers=processes))
            each = partial(pool.map, chunksize=8)
        for split, count in counts.items():
            work = each(partial(_scene, out, split, seed, photographs), range(count))
            layouts = list(tqdm(work, split, count, leave=False, disable=None))
            if split != "pretrain":
                _lists(out, voc, split, layouts)


def _scene(out: Path, split: str, seed: int, photographs: list[Path], index: int) -> Layout:
    """Draw one scene, in all layouts; runs in a process of its own."""
    what = layout(split, seed, index)
    image = Image.fromarray(picture(what, split, seed, index, photographs))
    if split == "pretrain":
        image.save(out / "pretrain" / f"{index:06d}.jpg", quality=95)
        return what
    image.save(out / "coco" / split / f"{index:06d}.jpg", quality=95)
    voc, name = out / "voc" / "VOC2007", _voc_name(split, index)
    image.save(voc / "JPEGImages" / f"{name}.jpg", quality=95)
    labels = Image.fromarray(pixel_classes(what))
    labels.putpalette(voc_palette())
    labels.save(voc / "SegmentationClass" / f"{name}.png")
    (voc / "Annotations" / f"{name}.xml").write_text(voc_xml(what, name))
    return what


def _lists(out: Path, voc: Path, split: str, layouts: list[Layout]) -> None:
    """COCO's annotation file and VOC's lists of a split."""
    file = out / "coco" / "annotations" / f"instances_{split}.json"
    content = coco_content(layouts)
    for one in content["annotations"]:
        del one["difficult"]  # COCO's evaluation knows no such flag
    file.write_text(json.dumps(content))
    names = "".join(f"{_voc_name(split, index)}\n" for index in range(len(layouts)))
    for task, part in (("Main", VOC_LISTS[split]), ("Segmentation", split)):
        path = voc / "ImageSets" / task / f"{part}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(names)


def _voc_name(split: str, index: int) -> str:
    return f"{split}_{index:06d}"


def voc_xml(what: Layout, name: str) -> str:
    """An annotation of VOC, whose boxes count pixels from 1, both ends included."""
    objects = []
    for one in what.shapes:
        x1, y1, x2, y2 = one.box
        edges = {"xmin": x1 + 1, "ymin": y1 + 1, "xmax": x2, "ymax": y2}
        box = "".join(f"<{edge}>{value}</{edge}>" for edge, value in edges.items())
        objects.append(
            f"  <object><name>{escape(one.name)}</name><difficult>{int(one.visible < DIFFICULT)}"
            f"</difficult><bndbox>{box}</bndbox></object>\n"
        )
    return (
        f"<annotation>\n  <folder>VOC2007</folder><filename>{name}.jpg</filename>\n"
        f"  <size><width>{what.width}</width><height>{what.height}</height><depth>3</depth>"
        "</size>\n"
        f"{''.join(objects)}</annotation>\n"
    )


def voc_palette() -> list[int]:
    """VOC's 256 colours, three numbers each: the bits of an index, dealt out in turn."""
    return [
        sum(((index >> (3 * place + channel)) & 1) << (7 - place) for place in range(8))
        for index in range(256)
        for channel in range(3)
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; exit code 2 with one sentence where it cannot be done."""
    parser = CommandParser(
        prog="fastmoco shapes",
        description="Draw shapes with boxes, masks and keypoints, in the layouts of COCO and VOC.",
    )
    add = parser.add_argument
    add("--out", type=Path, required=True, help="a folder that does not exist yet")
    for split, count in {**SIZES, "pretrain": PRETRAIN}.items():
        add(f"--{split}", type=int, default=count, help=f"pictures, by default {count}")
    add("--seed", type=as_seed, default=0, help="other scenes for another number, from 0 on")
    add("--photographs", type=Path, help="a folder of pictures to draw on, not the demo's")
    given = parser.parse_args(arguments)
    try:
        for name in ("train", "val", "pretrain"):
            if getattr(given, name) < (name != "pretrain"):
                raise ConfigError(f"--{name} {getattr(given, name)} is too few pictures.")
        write_shapes(
            given.out,
            train=given.train,
            val=given.val,
            pretrain=given.pretrain,
            seed=given.seed,
            photographs=_photographs(given.photographs),
        )
    except ConfigError as error:
        print(f"fastmoco: {error}", file=sys.stderr)
        return 2
    print(
        f"{given.out}: pre-train with --data.root {given.out / 'pretrain'}, detect with "
        f"--data.root {given.out / 'coco'} or {given.out / 'voc'}."
    )
    return 0


def _photographs(folder: Path | None) -> list[Path]:
    """All pictures below a folder. Raises `ConfigError` where there is none."""
    if folder is None:
        return []
    try:
        found = [folder / inner / name for inner, _, names in walk(str(folder)) for name in names]
    except OSError as error:
        reason = error.strerror or error
        raise ConfigError(f"--photographs {folder} cannot be listed: {reason}.") from error
    if not found:
        raise ConfigError(f"--photographs {folder} holds no picture.")
    return found


if __name__ == "__main__":
    sys.exit(exit_code(main))
