"""The contestants of `bench/throughput.py`: our step, its ceilings, the baseline, the loader.

Each factory takes the configuration as YAML text and builds everything that is not to be timed.
N local batch, S image side.
"""

from __future__ import annotations

import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from itertools import count, cycle, islice
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from bench.measure.contest import synchronize
from bench.steps.published import OfficialMoCo, OfficialStep, as_published
from bench.steps.switches import Run, layers_off, switch_off
from fastmoco.config import Config, ConfigError, dump, parse_text
from fastmoco.data.batch import Batch
from fastmoco.data.loader import Loader, build_loader
from fastmoco.machine import ranks
from fastmoco.machine.host import settle
from fastmoco.machine.precision import choose_precision
from fastmoco.machine.ranks import World
from fastmoco.method.build import build_step, compile_encoders
from fastmoco.method.cuda_graph import GIVES_UP
from fastmoco.method.moco import build_moco
from fastmoco.method.step import Step
from fastmoco.network.encoder import Embed, NormalizePixels, build_encoder
from fastmoco.run.checkpoint import Saver
from fastmoco.train import join_world
from fastmoco_kernels.inductor import name_operands_by_type

FOREVER = 10**9
MAY_WAIT = 3  # steps, which compile and capture
_STORE: Any = dist.HashStore  # type: ignore[attr-defined]


@dataclass
class Bench:
    """A contestant of `bench.measure.contest` around a function that does one step."""

    device: torch.device
    step: Callable[[], object]
    loader: Loader | None = None
    known: dict[str, Any] = field(default_factory=dict)
    """Facts from the beginning."""
    compiled: bool = False

    @property
    def wait_s(self) -> float:
        """Seconds so far in which the step waited for the loader."""
        return self.loader.wait_s if self.loader else 0.0

    def run(self, steps: int) -> None:
        """Do `steps` steps."""
        for _ in range(steps):
            self.step()

    def facts(self) -> dict[str, Any]:
        """Threads, notes, and the FLOPs of an eager step on the CPU that no loader feeds."""
        known = {"threads": torch.get_num_threads(), **self.known}
        if self.device.type == "cpu" and not self.compiled and not self.loader:
            known.setdefault("gflop_per_step", self._gflop())
        return known

    def _gflop(self) -> float:
        """Nominal FLOPs of one step with ATen's layers, for torch cannot look into ours; / 1e9."""
        with layers_off(), FlopCounterMode(display=False) as counter:
            self.step()
        return round(float(counter.get_total_flops()) / 1e9, 3)

    def close(self) -> None:
        """End the loader's processes and the process group."""
        if self.loader:
            self.loader.close()
        ranks.stop()


def _built(config: str, settled: bool = True) -> tuple[Config, World]:
    """The configuration and this process, `settled` as `fastmoco.train` settles it or not."""
    parsed = parse_text(config)
    world = join_world(parsed)
    if settled:
        settle(world.device)
    return parsed, world


def _synthetic(config: Config, world: World) -> Iterator[Batch]:
    """Micro-batches of noise that are on the device already, for ever."""
    noise = replace(config, data=replace(config.data, source="synthetic"))
    return build_loader(noise, device=world.device).batches(0, FOREVER)


def matrix_product(config: str) -> Bench:
    """torch's product of two fp32 matrices of 2048 x 2048, a measure for the FLOPs of a step."""
    _, world = _built(config)
    left, right = (torch.ones(2048, 2048, device=world.device) for _ in range(2))
    return Bench(world.device, lambda: left @ right, known={"gflop_per_step": 2e-9 * 2048**3})


def loader_alone(config: str) -> Bench:
    """Batches on the device as fast as they come; nothing else uses the machine."""
    parsed, world = _built(config)
    loader = build_loader(parsed, device=world.device)
    batches = loader.batches(0, FOREVER)

    def step() -> None:
        list(islice(batches, parsed.optim.accumulate))

    return Bench(world.device, step, loader=loader, known={"loader": loader.description})


def our_step(config: str, without: Sequence[str] = ()) -> Bench:
    """The step of `fastmoco.train` on images that are on the device already.

    `without` switches improvements off, by their names in `bench.steps.switches.WITHOUT`.
    """
    step, run, world = numbered_step(config, without)
    began = time.perf_counter()
    compiled = compile_encoders(parse_text(config), world.device)
    if compiled:
        run()
        synchronize(world.device)
    known = {"first_step_s": round(time.perf_counter() - began, 1)} if compiled else {}
    return Bench(world.device, switch_off(run, step, without), known=known, compiled=compiled)


def silent_step(
    config: str, cuda_graph: Literal["off", "on"] = "off", cudnn_benchmark: bool = False
) -> Bench:
    """Our step where a host synchronization is an error, but for its first `MAY_WAIT` steps.

    `cudnn_benchmark` lets cuDNN time its algorithms in the first of them, as training never does.
    Raises `ConfigError` naming a call that waits, and where the step gives up its CUDA graph.
    """
    parsed = parse_text(config)
    torch.backends.cudnn.benchmark = cudnn_benchmark
    machine = our_step(dump(replace(parsed, run=replace(parsed.run, cuda_graph=cuda_graph))))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", GIVES_UP)
        try:
            machine.run(MAY_WAIT)
        except RuntimeWarning as refused:
            raise ConfigError(str(refused)) from refused
    run = machine.step

    def silent() -> None:
        torch.cuda.set_sync_debug_mode("error")
        try:
            run()
        except RuntimeError as error:
            if "synchroniz" not in str(error):
                raise
            raise ConfigError(f"A step makes the host wait for the device: {error}") from error
        finally:
            torch.cuda.set_sync_debug_mode("default")

    return replace(machine, step=silent) if machine.device.type == "cuda" else machine


def numbered_step(config: str, without: Sequence[str] = ()) -> tuple[Step, Run, World]:
    """Our step, and a function that runs it once on the next synthetic images."""
    parsed, world = _built(config, settled="kept_memory" not in without)
    step, batches = _ours(parsed, world), _synthetic(parsed, world)
    if "uint8_input" in without:
        batches = cycle([_as_floats(batch) for batch in islice(batches, 2)])
    return step, _numbered(step, batches, parsed.optim.accumulate), world


def _as_floats(batch: Batch) -> Batch:
    """Images normalized beforehand, as fp32 (N, S, S, 3)."""
    normalize_pixels = NormalizePixels(batch.im_q.device)
    im_q, im_k = (normalize_pixels(views).permute(0, 2, 3, 1) for views in (batch.im_q, batch.im_k))
    return Batch(im_q, im_k)


def fed_step(
    config: str, over: Callable[[Iterator[Batch]], Iterator[Batch]] = iter
) -> tuple[Step, Bench]:
    """The step of `fastmoco.train` fed by its loader, synthetic where the configuration says so.

    `over` may wrap the iterator of batches.
    """
    parsed, world = _built(config)
    step = _ours(parsed, world)
    loader = build_loader(parsed, device=world.device, key_rows=step.shuffle.key_rows)
    run = _numbered(step, over(loader.batches(0, FOREVER)), parsed.optim.accumulate)
    return step, Bench(world.device, run, loader=loader, known={"loader": loader.description})


@dataclass
class Saving(Bench):
    """A contestant that saves as the trainer does, while it goes on."""

    saver: Saver = field(kw_only=True)
    done: int = 0

    def run(self, steps: int) -> None:
        """Begin a checkpoint, then do the steps."""
        if sentence := self.saver.save_if_due(self.done, overdue=True):
            raise RuntimeError(sentence)
        super().run(steps)
        self.done += steps

    def close(self) -> None:
        """Wait for the last checkpoint, and end as the others do."""
        with self.saver:
            pass
        shutil.rmtree(self.saver.folder)
        super().close()


def saving_step(config: str) -> Saving:
    """Our step, with a checkpoint at the beginning of every window."""
    parsed = parse_text(config)
    parsed = replace(parsed, run=replace(parsed.run, dir=tempfile.mkdtemp(prefix="saving-")))
    step, run, world = numbered_step(config)
    return Saving(world.device, run, saver=Saver(step, parsed, world, FOREVER))


def end_to_end(config: str) -> Bench:
    """The step of `fastmoco.train` fed by its loader."""
    return fed_step(config)[1]


def _ours(config: Config, world: World) -> Step:
    moco = build_moco(config, config.bn_group_size(world.size), world.device)
    compiled = compile_encoders(config, world.device)
    return build_step(config, moco, world, compile_encoders=compiled)


def _numbered(step: Step, batches: Iterator[Batch], accumulate: int) -> Run:
    numbers = count()
    return lambda: step(list(islice(batches, accumulate)), next(numbers))


def bare_encoder(config: str) -> Bench:
    """Supervised forward and backward of the encoder, plus one forward: the step's ceiling.

    Neither a loss over a queue nor optimizer, EMA, shuffle or unit vectors; otherwise the same
    network, precision and batch.
    """
    parsed, world = _built(config)
    group = parsed.bn_group_size(world.size)
    of_q, of_k = (build_encoder(parsed.model, group).to(world.device).train() for _ in range(2))
    compiled = compile_encoders(parsed, world.device)
    batches = _synthetic(parsed, world)
    dtype = choose_precision(parsed.run.precision, world.device).dtype
    plain_q, plain_k = _Logits(of_q, dtype), _Logits(of_k, dtype)
    if compiled:
        name_operands_by_type()
        plain_q.compile(dynamic=False)
        plain_k.compile(dynamic=False)
    batch_size = parsed.local_batch_size(world.size)
    labels = torch.zeros(batch_size, dtype=torch.long, device=world.device)

    def step() -> None:
        for batch in islice(batches, parsed.optim.accumulate):
            with torch.no_grad():
                plain_k(batch.im_k)
            F.cross_entropy(plain_q(batch.im_q), labels).backward()
        of_q.zero_grad(set_to_none=True)

    return Bench(world.device, step, compiled=compiled)


class _Logits(Embed):
    """The encoder as a classifier: its output in fp32, not normalized."""

    def forward(self, images: Tensor) -> Tensor:
        device = images.device.type
        with torch.autocast(device, self.precision, enabled=self.precision != torch.float32):
            logits: Tensor = self.encoder(self.normalize_pixels(images))
        return logits.float()


def official_step(config: str, kept_memory: bool = False) -> Bench:
    """The published step (`published.py`) on fp32 images that are on the device already.

    `kept_memory` gives it our step's allocator setting, which the published code does not make.
    """
    parsed, world = _built(config, settled=kept_memory)
    torch.manual_seed(parsed.run.seed)
    encoder = build_encoder(parsed.model).to(world.device)
    queue = F.normalize(torch.randn(parsed.model.dim, parsed.moco.queue_size), dim=0)
    step = published_step(parsed, encoder, queue)
    normalize_pixels = NormalizePixels(world.device)
    pool = [
        [normalize_pixels(images).contiguous() for images in (batch.im_q, batch.im_k)]
        for batch in islice(_synthetic(parsed, world), 2)
    ]
    turns = cycle(pool)
    return Bench(world.device, lambda: step(*next(turns)))


def published_step(config: Config, encoder: nn.Module, queue: Tensor) -> OfficialStep:
    """The published step from a copy of the encoder and of the queue (C, K), in a process group."""
    if not dist.is_initialized():
        backend = "nccl" if next(encoder.parameters()).is_cuda else "gloo"
        dist.init_process_group(backend, store=_STORE(), rank=0, world_size=1)
    moco, optim = config.moco, config.optim
    model = OfficialMoCo(
        as_published(deepcopy(encoder)),
        queue,
        momentum=moco.momentum,
        temperature=moco.temperature,
    )
    return OfficialStep(
        model.to(next(encoder.parameters()).device).train(),
        lr=config.resolved_lr(),
        momentum=optim.momentum,
        decay=optim.weight_decay,
    )
