"""A roofline model of the step on GPUs that are not here: `python -m bench.roofline`.

Runs one real step of two images on the CPU, records every operation with its FLOPs and the bytes
that it reads and writes, scales what depends on the batch, and divides by data-sheet rates. An
operation takes the longer of its arithmetic and its traffic; times add up. Every figure is
*modelled*, none is measured; the efficiencies are calibrated on published ResNet-50 figures.

N local batch.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from bench.measure.program import markdown
from bench.measure.rows import ROOT
from bench.pages.tables import between
from bench.steps.contestants import Bench, bare_encoder, our_step
from bench.steps.switches import layers_off
from fastmoco.config import dump, parse

# Images of the traced step. No weight has a first dimension of 2, so that this marks a batch.
TRACED = 2
BATCH = 256


@dataclass(frozen=True)
class Gpu:
    """Dense matrix rate in FLOP/s and memory bandwidth in bytes/s, from the data sheet."""

    name: str
    flops: float
    bandwidth: float


GPUS = (
    Gpu("V100 SXM2 (fp16)", 125e12, 0.9e12),
    Gpu("A100 SXM 80 GB (bf16)", 312e12, 2.039e12),
    Gpu("H100 SXM (bf16)", 989e12, 3.35e12),
    Gpu("B200 (bf16)", 2250e12, 8.0e12),
)
# What a good kernel reaches of the data-sheet rates, before calibration.
MATRIX_SHARE, MEMORY_SHARE = 0.60, 0.85
LAUNCH_S = 4e-6

# Images per second of supervised ResNet-50 training with mixed precision on one GPU, published by
# NVIDIA (DeepLearningExamples, PyTorch, ResNet-50 v1.5, container 21.03, DGX-1 16GB and DGX A100).
PUBLISHED = {"V100 SXM2 (fp16)": 1200.0, "A100 SXM 80 GB (bf16)": 2470.0}

VIEWS = {
    *("view", "t", "transpose", "detach", "expand", "alias", "as_strided", "unsqueeze", "slice"),
    *("select", "_unsafe_view", "squeeze", "permute", "split", "empty_like", "empty", "lift_fresh"),
    *("empty_strided", "new_empty_strided", "split_with_sizes", "unbind", "_reshape_alias"),
}
# Passes over the activation that a kernel makes beyond reading its inputs and writing its outputs:
# statistics need a pass of their own before anything can be normalized.
EXTRA_READS = {"native_batch_norm": 1, "native_batch_norm_backward": 2}
PARTS = {
    "convolution": "convolution",
    "convolution_backward": "convolution",
    "mm": "convolution",
    "addmm": "convolution",
    "native_batch_norm": "batch norm",
    "native_batch_norm_backward": "batch norm",
    "info_nce": "loss",
    "info_nce_enqueue": "loss",
    "mean_with_gradient": "loss",
    "sgd_ema_": "update",
}


@dataclass(frozen=True)
class Operation:
    """One traced operation, scaled to a batch of `BATCH`."""

    name: str
    flops: float
    bytes: float

    @property
    def part(self) -> str:
        """Which row of the table it belongs to."""
        return PARTS.get(self.name, "pointwise")

    def seconds(self, gpu: Gpu) -> float:
        """Modelled time, without calibration."""
        arithmetic = self.flops / (gpu.flops * MATRIX_SHARE)
        return max(arithmetic, self.bytes / (gpu.bandwidth * MEMORY_SHARE), LAUNCH_S)


class Recorder(TorchDispatchMode):
    """Collects the operations that run inside it."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations: list[Operation] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = func.overloadpacket.__name__
        if name not in VIEWS:
            self._record(func, name, args, kwargs, result)
        return result

    def _record(self, func: Any, name: str, args: Any, kwargs: Any, result: Any) -> None:
        flops = 0.0
        if func.overloadpacket in flop_registry:
            flops = flop_registry[func.overloadpacket](*args, **kwargs, out_val=result)
        inputs = _tensors((args, kwargs))
        size = sum(map(scaled_bytes, (*inputs, *_tensors(result))))
        if name in EXTRA_READS:
            size += EXTRA_READS[name] * scaled_bytes(inputs[0])
        self.operations.append(Operation(name, flops * BATCH / TRACED, size))


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def scaled_bytes(tensor: Tensor) -> float:
    """Bytes of a tensor as it would be with a batch of `BATCH`."""
    batched = tensor.ndim > 1 and tensor.shape[0] == TRACED
    return tensor.numel() * tensor.element_size() * (BATCH / TRACED if batched else 1)


def fused(operations: Iterable[Operation]) -> list[Operation]:
    """The same step after Inductor: pointwise work rides on the passes that batch norm makes.

    A ReLU is free in the pass that writes the normalized values; adding the residual reads one
    more tensor; in the backward the mask costs batch norm two more reads instead of a kernel.
    """
    found = []
    for op in operations:
        if op.part != "pointwise":
            found.append(op)
        elif op.name == "threshold_backward":  # three tensors become two reads
            found.append(Operation(op.name, 0.0, op.bytes * 2 / 3))
        elif op.name in ("add_", "add"):  # read, read and write become one read
            found.append(Operation(op.name, 0.0, op.bytes / 3))
        elif op.name.startswith("max_pool"):
            found.append(op)
    return found


def trace(make: Callable[[str], Bench], config: str) -> list[Operation]:
    """Operations of one step of a contestant of `bench.steps.contestants`."""
    machine = make(config)
    machine.run(1)  # momentum buffers are made in the first step
    recorder = Recorder()
    # ATen's operations, as on CUDA: what the CPU runs in their place cannot be recorded.
    with layers_off(), recorder:
        machine.run(1)
    machine.close()
    return recorder.operations


def supervised(operations: Sequence[Operation]) -> list[Operation]:
    """Of the traced bare encoder what is left without the key forward that it begins with."""
    starts = [index for index, op in enumerate(operations) if op.name == "addcmul"]
    return list(operations[starts[1] :])


def by_part(operations: Iterable[Operation], gpu: Gpu) -> dict[str, float]:
    """Modelled milliseconds of every part."""
    total: dict[str, float] = {}
    for op in operations:
        total[op.part] = total.get(op.part, 0.0) + 1e3 * op.seconds(gpu)
    return total


def calibration(plain: Sequence[Operation]) -> dict[str, float]:
    """Published over modelled time of supervised training; GPUs without a figure take A100's."""
    found = {
        gpu.name: BATCH / PUBLISHED[gpu.name] / sum(op.seconds(gpu) for op in plain)
        for gpu in GPUS
        if gpu.name in PUBLISHED
    }
    newest = found["A100 SXM 80 GB (bf16)"]
    return {gpu.name: found.get(gpu.name, newest) for gpu in GPUS}


def lines(step: Sequence[Operation], plain: Sequence[Operation]) -> list[str]:
    """The table of docs/performance.md: a line per GPU."""
    factors, kinds = calibration(plain), {"eager": list(step), "fused": fused(step)}
    gpus = []
    shown = ("convolution", "batch norm", "pointwise")
    for gpu in GPUS:
        times = {kind: by_part(ops, gpu) for kind, ops in kinds.items()}
        total = {kind: factors[gpu.name] * sum(found.values()) for kind, found in times.items()}
        gpus.append(
            [
                gpu.name,
                f"{factors[gpu.name]:.2f}",
                *(f"{factors[gpu.name] * times['eager'][part]:.1f}" for part in shown),
                *(f"{1e3 * BATCH / total[kind]:.0f}" for kind in kinds),
            ]
        )
    columns = ["calibration", *(f"{part}, ms" for part in shown), "images/s eager", "and fused"]
    return markdown([f"GPU, *modelled*, batch {BATCH}", *columns], gpus)


def main(arguments: Sequence[str] | None = None) -> int:
    """Bring the table of docs/performance.md up to date and print them."""
    argparse.ArgumentParser("bench.roofline", description=__doc__).parse_args(arguments)
    recipe = parse(
        [
            *("--data.source", "synthetic", "--run.device", "cpu", "--run.compile", "off"),
            # As on the GPUs: what `auto` means differs between processors.
            *("--run.precision", "bf16"),
            *("--optim.global_batch_size", str(TRACED), "--moco.bn_group_size", str(TRACED)),
        ]
    )
    text = dump(recipe)
    made = "\n".join(lines(trace(our_step, text), supervised(trace(bare_encoder, text))))
    print(made)
    page = ROOT / "docs" / "performance.md"
    page.write_text(between(page.read_text(), "model", made))
    return 0


if __name__ == "__main__":
    sys.exit(main())
