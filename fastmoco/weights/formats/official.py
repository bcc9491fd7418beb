"""The file of the official MoCo trainer: written by every checkpoint of ours, and resumed from.

`epoch`, `arch`, `state_dict` and `optimizer`; names `module.encoder_q.*` and `module.encoder_k.*`,
queue (C, K). The official optimizer holds the parameters of the whole model, encoder_q's first, but
only encoder_q's ever have gradients and momentum.

C feature dimension, K queue length.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastmoco.config import Config, ConfigError
from fastmoco.method.step import Step
from fastmoco.weights.checksums import first
from fastmoco.weights.files import epoch_said
from fastmoco_kernels import ema_

PREFIX = "module."


def official_state_dict(step: Step) -> dict[str, Tensor]:
    """The model under its official names, on the CPU, queue (C, K) and queue_ptr first."""
    ours = step.moco.state_dict()
    state = {f"{PREFIX}queue": ours.pop("queue").T, f"{PREFIX}queue_ptr": ours.pop("queue_ptr")}
    state |= {f"{PREFIX}{name}": tensor for name, tensor in ours.items()}
    # Contiguous, so that the file does not carry our memory format into other programs.
    return {name: copied(tensor) for name, tensor in state.items()}


def copied(tensor: Tensor) -> Tensor:
    """A copy on the CPU, contiguous: training may go on while it is written.

    From a GPU into pinned memory, complete when the current stream has come that far.
    """
    source, gpu, layout = tensor.detach(), tensor.is_cuda, torch.contiguous_format
    host = torch.empty_like(source, device="cpu", memory_format=layout, pin_memory=gpu)
    return host.copy_(source, non_blocking=gpu)


def load_model(step: Step, state: Mapping[str, Tensor], place: str) -> None:
    """Load what `official_state_dict` gave, or the official trainer wrote, into the step in place.

    Raises `ConfigError`, with names, unless every entry is there and has this run's shape.
    """
    given = {name.removeprefix(PREFIX): t for name, t in state.items()}
    if "queue" in given:
        given["queue"] = given["queue"].T
    wanted = step.moco.state_dict()
    missing = [name for name in wanted if name not in given]
    if missing:
        raise ConfigError(
            f"{place} does not fit this run: it lacks {first(missing)}; set model.arch and "
            "model.head to what the file was trained with."
        )
    differing = [
        f"{n} {_kind(t)} there and {_kind(wanted[n])} now" if n in wanted else n
        for n, t in given.items()
        if n not in wanted or _kind(t) != _kind(wanted[n])
    ]
    if differing:
        raise ConfigError(
            f"{place} does not fit this run: {first(differing)}; set model.arch, model.head, "
            "model.dim and moco.queue_size to what the file was trained with."
        )
    ptr, length = int(given["queue_ptr"]), len(step.moco.queue)
    if not 0 <= ptr < max(1, length):
        raise ConfigError(f"{place} does not fit: queue_ptr {ptr} is not in its {length} keys.")
    step.moco.load_state_dict(given)


def _kind(tensor: Tensor) -> str:
    """Shape, and the type where it is not fp32."""
    kind = "" if tensor.dtype == torch.float32 else f" {tensor.dtype}".replace("torch.", "")
    return f"{tuple(tensor.shape)}{kind}"


def is_complete(content: Mapping[str, Any]) -> bool:
    """Whether a file has all that the official trainer resumes from."""
    state = content.get("state_dict")
    return (
        isinstance(state, Mapping)
        and {"epoch", "optimizer"} <= content.keys()
        and all(f"{PREFIX}{name}" in state for name in ("queue", "queue_ptr"))
        and any(name.startswith(f"{PREFIX}encoder_k.") for name in state)
    )


def official_optimizer(saved: Mapping[str, Any], state: Mapping[str, Tensor]) -> dict[str, Any]:
    """The state dict of an optimizer of encoder_q as the official trainer's.

    Its group lists the parameters of encoder_k as well, behind encoder_q's and without momentum.
    `state` is the official state dict, by whose names the parameters are counted. What is in the
    official form already stays as it is.
    """
    encoder = f"{PREFIX}encoder_q."
    parameters = sum(n.startswith(encoder) and n.endswith(("weight", "bias")) for n in state)
    momentum = {
        index: {n: copied(t) if isinstance(t, Tensor) else t for n, t in entry.items()}
        for index, entry in saved["state"].items()
    }
    group = {**saved["param_groups"][0], "params": list(range(2 * parameters))}
    return {"state": momentum, "param_groups": [group]}


def load_optimizer(step: Step, saved: Mapping[str, Any], place: str) -> None:
    """Load the momentum of encoder_q from an official state dict or an older one of ours.

    Raises `ConfigError` for the optimizer of another model.
    """
    params: list[Tensor] = step.optimizer.param_groups[0]["params"]
    groups = saved.get("param_groups", [])
    listed = [len(group["params"]) for group in groups]
    if listed not in ([len(params)], [2 * len(params)]):
        raise ConfigError(
            f"{place} cannot be resumed from: its optimizer has groups of {listed} parameters, and "
            f"that of this run {len(params)} of encoder_q and as many of encoder_k."
        )
    kept = {i: entry for i, entry in saved["state"].items() if i < len(params)}
    state = {i: {n: _laid_out(t, params[i]) for n, t in entry.items()} for i, entry in kept.items()}
    # The settings are this run's, which may have been allowed to differ from the file's.
    group = {**step.optimizer.param_groups[0], "params": list(range(len(params)))}
    step.optimizer.load_state_dict({"state": state, "param_groups": [group]})


def _laid_out(value: Any, param: Tensor) -> Any:
    """A buffer in its parameter's memory format, in which the update reads both."""
    if isinstance(value, Tensor) and value.shape == param.shape:
        return torch.empty_like(param, requires_grad=False).copy_(value)
    return value


def resume_official(
    content: Mapping[str, Any], step: Step, config: Config, steps_per_epoch: int, place: str
) -> int:
    """Go on exactly where the official trainer stopped; the number of steps done.

    Weights, BN statistics, queue, cursor and momentum are taken over, and the learning rate follows
    from the epoch. The official step moves encoder_k at its start and ours at its end, so
    the move that the file still lacks is made here. The order of the images is our own.

    Raises `ConfigError` if the file is incomplete or does not fit, or if its momentum or weight
    decay are not those of this run.
    """
    if not is_complete(content):
        raise ConfigError(
            f"{place} cannot be resumed from: it lacks encoder_k, the queue, the optimizer or the "
            "epoch; to start a new run from its encoder, name it in model.init_from."
        )
    load_model(step, content["state_dict"], place)
    settings = {"momentum": config.optim.momentum, "weight_decay": config.optim.weight_decay}
    group = content["optimizer"]["param_groups"][0]
    changed = [
        f"optim.{name} ({group[name]} there, {value} now)"
        for name, value in settings.items()
        if group.get(name, value) != value
    ]
    if changed:
        raise ConfigError(
            f"{place} was trained with another {' and '.join(changed)}: "
            "restore those values to resume it."
        )
    load_optimizer(step, content["optimizer"], place)
    params_q, params_k = step.moco.parameter_pairs()
    ema_(params_k, params_q, config.moco.momentum)
    return epoch_said(content["epoch"], place) * steps_per_epoch
