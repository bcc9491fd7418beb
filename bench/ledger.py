"""What the compiled step launches and moves on an H100, counted without one.

    python -m bench.ledger --ranks 1 --batch 256 [--publish] [options of fastmoco.train]

Inductor compiles the step of `moco_v2_r50_200ep` for fake tensors of an absent GPU, among `--ranks`
ranks of which one exists, with `--batch` images on each. It is stopped when its code is written:
Triton compiles nothing and nothing runs. Of generated kernels the code itself says what they load
and store. Of other operations FLOPs and bytes follow from their shapes: every operand is read and
every result written once, or what `fastmoco_kernels.aot.CALLS` says. Takes some minutes. The last
line holds the sums; *ms* is the model of `bench.roofline`.
"""

from __future__ import annotations

import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import astuple, dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._inductor import config as inductor_config
from torch._inductor.codegen.common import InplacedBuffer
from torch._inductor.codegen.simd import SIMDKernel
from torch._inductor.dependencies import MemoryDep
from torch._inductor.graph import GraphLowering
from torch._inductor.scheduler import BaseSchedulerNode, Scheduler
from torch._inductor.utils import sympy_product
from torch._inductor.virtualized import V
from torch.fx.node import map_arg
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from bench.measure.program import Options, command, parser
from bench.measure.rows import Row
from bench.pages.tables import markdown
from bench.roofline import Kernel, times
from fastmoco.config import Config, ConfigError, recipe_path
from fastmoco.machine.ranks import World
from fastmoco.method.build import build_step
from fastmoco.method.compiled_step import WholeStep
from fastmoco.method.moco import build_moco
from fastmoco.method.optim.update import set_lr
from fastmoco_kernels import aot
from tests.support.gpu.fake_cuda import absent_gpus, to_fake_cuda_

# How Inductor names what it generates: triton_poi_fused_add_3 and so on.
GENERATED = {"poi": "pointwise", "for": "pointwise", "red": "reductions", "per": "reductions"}
DEFINITION = re.compile(r"^(\w+) = async_compile\.triton\('\w+', '''(.*?)^'''", re.M | re.S)
CALL = re.compile(r"^ +(\w+)\.run\(", re.M)
MOVED = re.compile(r"'kernel_num_gb': ([0-9.e+-]+)")
OURS = "fastmoco"
MATRIX = ("convolution", "convolution_backward", "mm", "addmm", "bmm")


class Written(BaseException):
    """The code is written. Not an `Exception`: the compiler would wrap that in its own."""


@dataclass
class Ledger:
    """What was counted in one step."""

    kernels: list[Kernel]
    generated: int
    """Different generated kernels."""
    ops: list[str]
    """Those of our ops that are called."""

    def total(self, name: str) -> int:
        """Sum over all calls of `launches`, `bytes`, `flops` or `atomics`."""
        return sum(kernel.calls * getattr(kernel, name) for kernel in self.kernels)

    def last_line(self) -> str:
        """The sums."""
        return (
            f"launches {self.total('launches')}, GB moved {self.total('bytes') / 1e9:.3f}, "
            f"atomics {self.total('atomics')}, generated kernels {self.generated}"
        )


def count(run: Callable[[], object]) -> Ledger:
    """What the code does that Inductor writes for `run`, a compiled function and its first call.

    Call it among `absent_gpus`. Raises ValueError where no code was written.
    """
    codes: list[str] = []
    others: list[Kernel] = []
    names: set[str] = set()
    generate = Scheduler.codegen

    def codegen(scheduler: Scheduler) -> None:
        for node in filter(_works, scheduler.nodes):
            called = _origin(node)
            others.append(_other(node, called))
            if called is not None and called.target.namespace == OURS:
                names.add(called.target.overloadpacket.__name__)
        generate(scheduler)

    def written(code: str) -> None:
        codes.append(code)
        raise Written

    with (
        mock.patch.object(Scheduler, "codegen", codegen),
        mock.patch.object(GraphLowering, "save_output_code", staticmethod(written)),
        # The code says what a kernel moves only where somebody wants to know its bandwidth.
        mock.patch.object(SIMDKernel, "estimate_kernel_num_bytes", bytes_moved),
        inductor_config.patch(profile_bandwidth=True, force_disable_caches=True),
    ):
        try:
            run()
        except Written:
            generated = list(_generated(codes[0]))
            kernels = Counter([*generated, *others])
            merged = [Kernel(k.part, n, *astuple(k)[2:]) for k, n in kernels.items()]
            return Ledger(merged, len(DEFINITION.findall(codes[0])), sorted(names))
    raise ValueError("Inductor wrote no code: was the function compiled?")


def _generated(code: str) -> Iterator[Kernel]:
    """Generated kernels, one for each call."""
    sources = dict(DEFINITION.findall(code))
    for name in CALL.findall(code):
        moved = MOVED.search(sources[name])
        part = GENERATED.get(name.split("_")[1], "reductions")  # others are several of them in one
        size = round(1e9 * float(moved[1])) if moved else 0
        yield Kernel(part, 1, 1, size, 0, sources[name].count("tl.atomic_"))


def bytes_moved(kernel: SIMDKernel[Any]) -> int:
    """What a generated kernel loads and stores: of no buffer more than all of it, once.

    Inductor's own estimate counts a buffer once per place in which a thread reads it, so nine times
    for the windows of a max pooling.
    """
    inplaced = kernel.args.inplace_buffers.values()
    twice = {buffer.other_names[-1] for buffer in inplaced if isinstance(buffer, InplacedBuffer)}
    accesses = kernel.features.buf_accesses()
    elements, total = int(sympy_product(kernel.numels.values())), 0
    for name in kernel.args.python_argdefs()[1]:
        if name in accesses:
            places = {d.index if isinstance(d, MemoryDep) else d for d in accesses[name]}
            read = min(len(places) * elements, int(V.graph.get_numel(name)))
            total += read * V.graph.get_dtype(name).itemsize * (1 + (name in twice))
    return total


def _works(node: BaseSchedulerNode) -> bool:
    """Whether the operation of a library or of ours: neither generated code nor a name for data."""
    name = type(node.node).__name__
    return node.is_extern() and name != "MultiOutput" and "Wait" not in name


def _other(node: BaseSchedulerNode, called: Any) -> Kernel:
    """What an operation does that is not generated, by its call in the graph."""
    if called is None:  # such as a copy between devices
        return Kernel("copies", 1, 1, int(node.get_read_write_buffers_sizes()))
    args, kwargs = map_arg((called.args, called.kwargs), lambda argument: argument.meta["val"])
    return cost(called.target, args, kwargs, called.meta["val"])


def _origin(node: BaseSchedulerNode) -> Any:
    """The call in the graph that became this operation; there its name may lack an underscore."""
    if node.node is None:
        return None
    asked = getattr(node.node, "op_overload", None)
    for called in node.node.get_origins():
        target = called.target
        same = isinstance(target, torch._ops.OpOverload) and asked is not None
        if same and _name(target) == _name(asked):
            return called
    return None


def _name(target: Any) -> str:
    return str(target.overloadpacket).rstrip("_")


def cost(target: Any, args: Any, kwargs: Any, result: Any) -> Kernel:
    """Launches, bytes and FLOPs of one call, from the shapes of its operands and results."""
    packet, name = target.overloadpacket, target.overloadpacket.__name__
    written = [
        value
        for argument, value in zip(target._schema.arguments, args, strict=False)
        if argument.alias_info is not None and argument.alias_info.is_write
    ]
    # The graph says of an op that only writes in place that it returns what it has written.
    made = [result for returned in target._schema.returns if returned.alias_info is None][:1]
    launches, size = 1, _size(args, kwargs, made, written)
    if target.namespace == OURS:
        cases = aot.CALLS[name](*args, **kwargs) if name in aot.CALLS else []
        if cases:
            launches, size = len(cases), sum(case.bytes for case in cases)
        return Kernel("our ops", 1, launches, size)
    if target.namespace == "_c10d_functional":
        return Kernel("collectives", 1, launches, size)
    if name == "convolution_backward":  # one launch per gradient, and each reads that of the output
        launches = sum(args[-1])
        size += (launches - 1) * _size(args[0])
    flops = flop_registry[packet](*args, **kwargs, out_val=result) if packet in flop_registry else 0
    return Kernel("convolutions" if name in MATRIX else "copies", 1, launches, size, int(flops))


def _size(*trees: object) -> int:
    """Bytes of all tensors."""
    leaves = [leaf for leaf in tree_leaves(trees) if isinstance(leaf, Tensor)]
    return sum(leaf.numel() * leaf.element_size() for leaf in leaves)


def count_step(config: Config, ranks: int) -> Ledger:
    """What one compiled step does on one of `ranks` H100s."""
    world = World(0, 0, ranks, torch.device("cuda", 0), "nccl" if ranks > 1 else "none")
    moco = build_moco(config, config.bn_group_size(ranks), torch.device("cpu"))
    with absent_gpus(ranks):
        to_fake_cuda_(moco)
        step = build_step(config, moco, world, compile_encoders=True)
        if not isinstance(step, WholeStep):
            raise ConfigError("These options leave no step that is compiled as a whole.")
        set_lr(step.optimizer, 0.03)
        side = config.augment.image_size
        shape = (config.local_batch_size(ranks), side, side, 3)
        images = torch.empty(shape, dtype=torch.uint8, device="cuda")
        order = torch.empty(step.shuffle.indices(0).shape, dtype=torch.int64, device="cuda")
        return count(lambda: step.run_graph(images, images, order))


def row_of(ledger: Ledger, config: Config, ranks: int) -> Row:
    """The row of a ledger, with its kernels as they are to be read by `bench.roofline`."""
    return {
        "benchmark": "ledger",
        "case": {
            "gpu": "H100",
            "arch": config.model.arch,
            "image_size": config.augment.image_size,
            "ranks": ranks,
            "batch": config.local_batch_size(ranks),
            "ops": ledger.ops,
        },
        "contestant": "compiled step",
        "launches": ledger.total("launches"),
        "gb_moved": round(ledger.total("bytes") / 1e9, 3),
        "atomics": ledger.total("atomics"),
        "generated_kernels": ledger.generated,
        "kernels": [list(astuple(kernel)) for kernel in ledger.kernels],
    }


PARSER = parser("ledger", __doc__, only=False, windows=False, steps=False)
PARSER.add_argument("--ranks", type=int, choices=range(1, 1025), metavar="W", default=1)
PARSER.add_argument("--batch", type=int, default=256, help="images on each rank")


def words(own: Options) -> list[str]:
    """The recipe with what was asked for. What a CUDA graph launches is the same."""
    recipe = ["--config", str(recipe_path("moco_v2_r50_200ep"))]
    batch = f"--optim.global_batch_size={own.ranks * own.batch}"
    return [*recipe, *own.rest, batch, "--run.cuda_graph=off"]


@command(PARSER, words=words)
def main(own: Options) -> Iterator[list[Row]]:
    """One row; then the modelled times and the sums."""
    if torch.cuda.is_available():
        raise ConfigError("A GPU is here: this counts for one that is not; hide it.")
    ledger = count_step(own.config, own.ranks)
    row = row_of(ledger, own.config, own.ranks)
    yield [row]
    print("\n".join(["", *markdown(*times([{"": row}])), "", ledger.last_line()]), flush=True)


if __name__ == "__main__":
    code = main()
    sys.stderr.flush()
    # What autograd holds of a device without a driver cannot be given back: an ordinary exit would
    # crash about every second time.
    os._exit(code)
