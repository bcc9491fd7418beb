"""What a run is about to do, in the lines printed at its start."""

from __future__ import annotations

import math

import torch

from fastmoco.config import Config, warnings
from fastmoco.data.backends.choose import missing_dali
from fastmoco.data.loader import Loader
from fastmoco.data.pixels.survey import Survey
from fastmoco.data.sources.choose import recognized, shared_images
from fastmoco.machine.precision import choose_precision
from fastmoco.machine.ranks import World
from fastmoco.method.build import captures, compile_encoders, compile_reason
from fastmoco.network.batchnorm import norm_choice
from fastmoco.network.convolution import convolution_choice


def start_lines(config: Config, world: World, *, loader: Loader, done: int) -> list[str]:
    """Every resolved choice with its reason; one line per subject."""
    moco, optim, local = config.moco, config.optim, config.local_batch_size(world.size)
    device = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else "CPU"
    compiled = compile_encoders(config, world.device)
    auto = f" (auto: {compile_reason(world.device)})" if config.run.compile == "auto" else ""
    graph = ", the whole step a CUDA graph" * captures(config, world, compiled=compiled)
    strategy = config.shuffle_bn(world.size)
    why = f" (auto: {world.size} rank{'s' * (world.size > 1)})" * (moco.shuffle_bn == "auto")
    precision = choose_precision(config.run.precision, world.device)
    scaled = f" ({optim.lr:g} x {optim.global_batch_size}/256)" * (optim.lr_scaling == "linear")
    wide = f" x {config.model.width:g}" * (config.model.width != 1)
    steps_per_epoch = loader.steps_per_epoch
    total = steps_per_epoch * optim.epochs
    slow = f", m = {moco.momentum:g}" * (moco.mechanism == "queue")
    lines = [
        f"device    {world.size} x {device}, collectives {world.backend}",
        f"data      {loader.num_samples:,} images in {config.data.root or config.data.source}; "
        f"{loader.description}",
        *(f"files     {note}" for note in [*recognized(config), *loader.notes]),
        *pixel_lines(config, loader.survey),
        f"model     {config.model.arch}{wide}, {config.model.stem} stem, {config.model.head} head, "
        f"C = {config.model.dim}; views {config.augment.recipe}, {config.augment.image_size} px",
        f"moco      {moco.mechanism}, K = {config.negatives()}{slow}, T = {moco.temperature:g}, "
        f"loss of a random guess {math.log(1 + config.negatives()):.2f}"
        f"{', symmetric' * moco.symmetric}",
        f"batch     {optim.global_batch_size} global = {world.size} ranks x {optim.accumulate} "
        f"micro-batches x {local}; {steps_per_epoch} steps per epoch, {total} in all",
        f"optimizer {optim.name}, lr {config.resolved_lr():g}{scaled}, {optim.schedule} schedule"
        f"{f' after {optim.warmup_epochs} epochs of warm-up' * (optim.warmup_epochs > 0)}, "
        f"momentum {optim.momentum:g}, weight decay {optim.weight_decay:g}",
        f"precision {precision}",
        f"layers    torch.compile {'on' if compiled else 'off'}{auto}{graph}; "
        f"batch norm {norm_choice(world.device, compiled)}, convolutions "
        f"{convolution_choice(world.device, precision.name, compiled)}",
        f"shuffle   {strategy}{why}, BN groups of {config.bn_group_size(world.size)}",
    ]
    if done:
        lines.append(f"resumed   after step {done} (epoch {done / steps_per_epoch:.2f})")
    return lines


def pixel_lines(config: Config, survey: Survey | None) -> list[str]:
    """How pixels are read, in one line; none where there are no files."""
    data = config.data
    if survey is None:
        return []
    turned = {"ignore": "ignored", "apply": "applied"}[data.exif]
    exif = (
        f"EXIF orientation {turned}, {survey.turned} of {survey.looked_at} sampled files carry one"
    )
    if not data.float_views:
        views = f"8-bit RGB, transparency over {data.alpha_over}"
    else:
        many = f"{data.channels} channel{'s' * (data.channels > 1)}"
        views = f"float32 views of {many}, never rounded or clipped"
    if not isinstance(data.intensity, str):
        views += f"; values {data.intensity[0]:g} to {data.intensity[1]:g} become 0 to 255"
    for name in ("mean", "std"):
        numbers = getattr(data, name)
        if not isinstance(numbers, str):
            more = ", ..." if len(numbers) > 4 else ""
            views += f"; {name} {', '.join(f'{x:.3g}' for x in numbers[:4])}{more}"
    return [f"pixels    {views}; {exif}"]


def start_warnings(config: Config, world: World, loader: Loader) -> list[str]:
    """What this rank warns of before the first step, one sentence each."""
    sentences = [*loader.warnings, *shared_images(config)]
    sentences += warnings(config, world.size, loader.num_samples)
    if loader.survey:
        sentences += loader.survey.warnings()
    if warning := choose_precision(config.run.precision, world.device).warning:
        sentences.append(warning)
    if lost := missing_dali(config, world.device):
        sentences.append(lost)
    return sentences
