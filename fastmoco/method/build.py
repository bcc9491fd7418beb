"""The training step that a configuration describes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from fastmoco.config import Config, ConfigError
from fastmoco.machine.collectives import average_gradients
from fastmoco.machine.precision import choose_precision
from fastmoco.machine.ranks import World
from fastmoco.method.compiled_step import WholeStep
from fastmoco.method.cuda_graph import CapturedStep
from fastmoco.method.end_to_end import EndToEndStep
from fastmoco.method.memory_bank import MemoryBankStep
from fastmoco.method.moco import MoCo
from fastmoco.method.nonfinite import Guard
from fastmoco.method.optim.update import build_ema, build_optimizer
from fastmoco.method.shuffle_bn import build_shuffle
from fastmoco.method.step import Step
from fastmoco.network.encoder import Embed, pixel_statistics
from fastmoco_kernels.inductor import name_operands_by_type
from fastmoco_kernels.launch import HAS_TRITON


def compile_encoders(config: Config, device: torch.device) -> bool:
    """What `run.compile` means here: `auto` compiles on CUDA only, where triton is installed.

    Raises `ConfigError` where it is on and cannot be.
    """
    cuda = device.type == "cuda"
    if cuda and not HAS_TRITON:
        if config.run.compile == "on":
            raise ConfigError(
                "run.compile is on, but triton, which torch.compile needs on CUDA, is not "
                "installed: install it (it is made for Linux) or set run.compile to off."
            )
        return False
    return config.run.compile == "on" or (config.run.compile == "auto" and cuda)


def compile_reason(device: torch.device) -> str:
    """Why `run.compile` auto means what it does on this device."""
    if device.type == "cuda" and not HAS_TRITON:
        return "triton is not installed"
    return "only CUDA pays back the compile time"


def is_one_graph(config: Config, world: World, *, compiled: bool) -> bool:
    """Whether a step whose encoders are compiled or not is compiled as a whole."""
    precision = choose_precision(config.run.precision, world.device)
    return (
        compiled
        and config.optim.accumulate == 1
        and not config.moco.symmetric
        and config.optim.name == "sgd_ema"
        and precision.name != "fp16"
    )


def captures(config: Config, world: World, *, compiled: bool) -> bool:
    """Whether this step, with its encoders compiled or not, is to be a CUDA graph.

    `auto` captures no collectives: where one rank fails to, the others may wait for it for ever.
    Raises `ConfigError` where `run.cuda_graph` is on and cannot be.
    """
    asked = config.run.cuda_graph == "on" or (config.run.cuda_graph == "auto" and world.size == 1)
    possible = world.device.type == "cuda" and is_one_graph(config, world, compiled=compiled)
    if config.run.cuda_graph == "on" and not possible:
        raise ConfigError(
            "run.cuda_graph is on, but only a step that is compiled as a whole, on CUDA, can be a "
            "CUDA graph: set it to off, or see what run.compile says of whole steps."
        )
    return asked and possible


def _kind(config: Config, world: World, *, compiled: bool) -> Callable[..., Step]:
    """The class of the step, with what it alone takes."""
    captured = captures(config, world, compiled=compiled)
    if is_one_graph(config, world, compiled=compiled):
        return partial(CapturedStep if captured else WholeStep, world=world)
    if config.moco.mechanism == "end_to_end":
        return partial(EndToEndStep, world=world)
    if config.moco.mechanism == "memory_bank":
        return partial(
            MemoryBankStep,
            world=world,
            seed=config.run.seed,
            negatives=config.negatives(),
            bank_momentum=config.moco.bank_momentum,
        )
    return Step


def build_step(config: Config, moco: MoCo, world: World, *, compile_encoders: bool) -> Step:
    """The step of this run; precision, compilation and shuffle-BN strategy are fixed here.

    Raises `ConfigError` if the chosen optimizer, or the CUDA graph that is asked for, is not
    available, `ValueError` for SyncBN with shuffle-BN.
    """
    strategy = config.shuffle_bn(world.size)
    if strategy != "none" and any(isinstance(m, nn.SyncBatchNorm) for m in moco.modules()):
        raise ValueError(
            "SyncBN gives every rank the same statistics, so shuffling keys between ranks cancels "
            "out: use plain or split BN, or set moco.shuffle_bn to none."
        )
    precision = choose_precision(config.run.precision, world.device)
    statistics = pixel_statistics(config.data)
    embed_q: nn.Module = Embed(moco.encoder_q, precision.dtype, statistics)
    embed_k: nn.Module = Embed(moco.encoder_k, precision.dtype, statistics)
    optimizer = build_optimizer(config, moco)
    scaler = torch.amp.GradScaler(world.device.type, enabled=precision.name == "fp16")
    views = 2 if config.moco.symmetric else 1
    guard = Guard(
        moco,
        optimizer,
        scaler,
        world,
        keys=views * config.optim.global_batch_size,
        skip=config.run.nonfinite == "skip",
    )
    build = _kind(config, world, compiled=compile_encoders)
    if compile_encoders:
        name_operands_by_type()
    if not is_one_graph(config, world, compiled=compile_encoders):
        if compile_encoders:
            embed_q.compile(dynamic=False)
            embed_k.compile(dynamic=False)
        embed_q = average_gradients(embed_q, world)
    return build(
        moco=moco,
        embed_q=embed_q,
        embed_k=embed_k,
        shuffle=build_shuffle(
            strategy,
            world=world,
            local=config.local_batch_size(world.size),
            seed=config.run.seed,
        ),
        optimizer=optimizer,
        ema=build_ema(config, moco, optimizer),
        scaler=scaler,
        guard=guard,
        temperature=config.moco.temperature,
        symmetric=config.moco.symmetric,
        precision=precision,
    )
