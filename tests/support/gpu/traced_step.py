"""One step of the R50 recipe on fake CUDA tensors among eight fake ranks; prints what it found.

    python -m tests.support.gpu.traced_step resnet50 whole|eager|code [MECHANISM]

`whole` is the step as torch.compile gets it on CUDA, through AOTAutograd; `eager` is the step of
one rank without a compiler, for the queue in fp16, operation by operation, with its metrics. `code`
is what Inductor writes for an H100 of the step of one rank, with a stem and a single block.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._inductor.graph import GraphLowering
from torch._subclasses.fake_tensor import FakeTensorMode

from fastmoco.config import parse, recipe_path
from fastmoco.data.batch import Batch
from fastmoco.machine.ranks import World
from fastmoco.method.build import build_step
from fastmoco.method.compiled_step import WholeStep
from fastmoco.method.memory_bank import allocate_bank
from fastmoco.method.moco import build_moco
from fastmoco.method.optim.update import set_lr
from fastmoco.network.resnet import BACKBONES, BasicBlock, ResNet
from fastmoco.run.metrics import Metrics
from tests.support.gpu.fake_cuda import (
    SYNCHRONIZING,
    Watch,
    allow_backward_without_driver,
    cuda_without_device,
    fake_world,
    inductor_without_device,
    to_fake_cuda_,
)

Found = dict[str, Any]


class Graphs:
    """A compiler backend that keeps what AOTAutograd hands to it and runs it as it is."""

    def __init__(self) -> None:
        self.graphs: list[torch.fx.GraphModule] = []

    def keep(self, graph: torch.fx.GraphModule, inputs: Any) -> Any:
        self.graphs.append(graph)
        return graph.forward

    def found(self) -> Found:
        """Collectives, layouts and copies to the host in all graphs."""
        nodes = [node for graph in self.graphs for node in graph.graph.nodes]
        calls = [node for node in nodes if node.op == "call_function"]
        names = Counter(str(node.target).removesuffix(".default") for node in calls)
        convolutions = [node for node in calls if "convolution" in str(node.target)]
        return {
            "graphs": len(self.graphs),
            "operations": sum(names.values()),
            "collectives": {n: c for n, c in names.items() if n.startswith("_c10d")},
            "fused": sorted(_fused(calls)),
            "convolutions": len(convolutions),
            "other_layouts": [str(n) for n in convolutions if not all(map(_is_nhwc, _images(n)))],
            "weight_casts": [str(n) for n in calls if _casts_weight(n)],
            "image_copies": [str(n) for n in calls if _copies_images(n)],
            "host_syncs": [n for n in names if n in SYNCHRONIZING]
            + [str(n) for n in calls if _leaves_device(n)],
        }


def _fused(calls: list[torch.fx.Node]) -> Iterator[str]:
    """Our own operations; those that write to their inputs stand inside a functional wrapper."""
    for node in calls:
        for target in (node.target, *node.args[:1]):
            if isinstance(target, torch._ops.OpOverload) and target.namespace == "fastmoco":
                yield target._opname


def _values(node: torch.fx.Node) -> list[Tensor]:
    value = node.meta.get("val")
    values = value if isinstance(value, (tuple, list)) else [value]
    return [v for v in values if isinstance(v, Tensor)]


def _images(node: torch.fx.Node) -> list[Tensor]:
    """Four-dimensional inputs and outputs."""
    every = [v for source in (node, *node.all_input_nodes) for v in _values(source)]
    return [v for v in every if v.dim() == 4]


def _is_nhwc(t: Tensor) -> bool:
    return t.is_contiguous(memory_format=torch.channels_last)


def _copies_images(node: torch.fx.Node) -> bool:
    return "clone" in str(node.target) and bool(_images(node))


def _casts_weight(node: torch.fx.Node) -> bool:
    """Whether it brings a convolution's weight, an input of the graph, into another type."""
    casts = str(node.target).startswith(("aten._to_copy", "prims.convert_element_type"))
    inputs = [v for n in node.all_input_nodes if n.op == "placeholder" for v in _values(n)]
    return casts and any(v.dim() == 4 and v.is_floating_point() for v in inputs)


def _leaves_device(node: torch.fx.Node) -> bool:
    sources = [v for source in node.all_input_nodes for v in _values(source)]
    was_there = any(v.device.type == "cuda" for v in sources)
    return was_there and any(v.device.type == "cpu" for v in _values(node))


def stem_and_one_block(**options: Any) -> ResNet:
    """A ResNet with every kind of layer, of which the compiler is done in seconds."""
    short = ResNet(BasicBlock, [1, 1, 1, 1], **options)
    short.layer2 = short.layer3 = short.layer4 = nn.Sequential()
    short.fc = nn.Linear(64, 1000)
    return short


class Written(BaseException):
    """The code is written. Not an `Exception`: the compiler would wrap that in its own."""


def code_of(run: Callable[[], object]) -> str:
    """What Inductor writes for a compiled function in its first call; Triton compiles nothing."""

    def stop(code: str) -> None:
        raise Written(code)

    writing = mock.patch.object(GraphLowering, "save_output_code", staticmethod(stop))
    with (
        writing,
        torch._inductor.config.patch(force_disable_caches=True),
        inductor_without_device(),
    ):
        try:
            run()
        except Written as written:
            return str(written.args[0])
    raise AssertionError("no code was written")


def main() -> None:
    arch, how, mechanism = [*sys.argv[1:], "queue"][:3]
    if how == "code":
        BACKBONES[arch] = stem_and_one_block
    allow_backward_without_driver()
    torch.autograd.set_multithreading_enabled(False)
    arguments = ["--config", str(recipe_path("moco_v2_r50_200ep")), f"--model.arch={arch}"]
    arguments += ["--run.cuda_graph=off"]  # what a graph launches is the same; none can be here
    if how == "eager" and mechanism == "queue":
        arguments.append("--run.precision=fp16")  # with its gradient scaler
    if mechanism != "queue":  # in bf16: torch's scaler asks the device whether to step torch's SGD
        arguments += [f"--moco.mechanism={mechanism}", "--optim.name=sgd", "--moco.queue_size=1024"]
    config = parse(arguments)
    ranks = 8 if how == "whole" else 1
    world = World(0, 0, ranks, torch.device("cuda", 0), "nccl" if ranks > 1 else "none")
    moco = build_moco(config, config.bn_group_size(ranks), torch.device("cpu"))
    allocate_bank(config, moco, 4096)
    graphs, watch = Graphs(), Watch()
    group = nullcontext() if how == "code" else fake_world(ranks)
    with cuda_without_device(), FakeTensorMode(allow_non_fake_inputs=True), group:
        to_fake_cuda_(moco)
        step = build_step(config, moco, world, compile_encoders=how != "eager")
        set_lr(step.optimizer, 0.03)
        side = config.augment.image_size
        shape = (config.local_batch_size(ranks), side, side, 3)
        images = torch.empty(shape, dtype=torch.uint8, device="cuda")
        if how == "whole":
            assert isinstance(step, WholeStep)
            rebuilt = replace(step, backend=aot_autograd(fw_compiler=graphs.keep))
            order = torch.empty(step.shuffle.indices(0).shape, dtype=torch.int64, device="cuda")
            rebuilt.run_graph(images, images, order)
            found = graphs.found()
            found["breaks"] = sum(torch._dynamo.utils.counters["graph_break"].values())
        elif how == "code":
            assert isinstance(step, WholeStep)
            order = torch.empty(step.shuffle.indices(0).shape, dtype=torch.int64, device="cuda")
            code = code_of(lambda: step.run_graph(images, images, order))
            calls = re.findall(r"torch\.ops\.fastmoco\.(\w+)\.default\(", code)
            kernels = code.count("async_compile.triton(")
            found = {
                "atomics": code.count("tl.atomic_add("),
                "kernels": kernels,
                "fused": sorted(calls),
            }
        else:
            metrics = Metrics(world, config.model.dim)
            with watch:
                numbers = np.arange(2 * len(images)).reshape(-1, 2)
                metrics.add(step([Batch(images, images, numbers)], 0))
            found = {
                "host_syncs": watch.host_syncs,
                "other_layouts": watch.other_layouts,
                "operations": sum(watch.counts.values()),
            }
    print(json.dumps(found), flush=True)
    # Autograd was told of a device without a driver: what it holds cannot be given back, and an
    # ordinary exit crashes about every second time after everything has been printed.
    os._exit(0)


if __name__ == "__main__":
    main()
