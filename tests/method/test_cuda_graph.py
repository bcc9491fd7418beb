"""The captured step, with a capture that the CPU can do, against the step that is not captured."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastmoco.config import Config, ConfigError
from fastmoco.data.batch import Batch
from fastmoco.machine.ranks import World
from fastmoco.method.build import build_step, captures
from fastmoco.method.compiled_step import WholeStep
from fastmoco.method.cuda_graph import WARMUP, CapturedStep, Run
from fastmoco.method.optim.update import SGDWithEMA, set_lr
from fastmoco.method.step import StepResult
from tests.support.gpu.fake_cuda import cuda_without_device
from tests.support.ranks import Ranks
from tests.support.tiny import BATCH, CONFIG, LR, ONE, build_tiny, images

# The recording cannot look into the CPU's own batch norm either.
aten_batch_norm = mock.patch(
    "fastmoco.network.batchnorm.supports", new=mock.Mock(return_value=False)
)

COMPILED = replace(CONFIG, run=replace(CONFIG.run, compile="on"))
STEPS = WARMUP + 4
H100 = World(0, 0, 1, torch.device("cuda", 0), "none")


class Recording(TorchDispatchMode):
    """As a CUDA graph does, keeps every operation with the tensors it was called with.

    `replay` repeats the operations on the same tensors, results included. Numbers that the host
    knew are kept as they were. Nothing that is recorded has happened: `undone` brings back `state`.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out

    def replay(self) -> None:
        with torch.no_grad():
            for func, args, kwargs, out in self.calls:
                new = func(*args, **kwargs)
                for there, here in zip(tree_leaves(out), tree_leaves(new), strict=True):
                    if isinstance(there, Tensor):
                        there.copy_(here)


class Recorder:
    """A `capture` for the CPU; `damage` may change what a replay returns or does."""

    def __init__(self, damage: Callable[[StepResult], None] = lambda result: None) -> None:
        self.captures, self.replays, self.damage = 0, 0, damage
        self.step: CapturedStep | None = None

    def __call__(self, run: Run, stream: object) -> Run:
        assert self.step is not None
        self.captures += 1
        state = self.step._state()
        before = [t.clone() for t in state]
        with Recording() as recording:
            result = run()
        for tensor, value in zip(state, before, strict=True):
            tensor.copy_(value)

        def replay() -> StepResult:
            self.replays += 1
            recording.replay()
            self.damage(result)
            return result

        return replay


def fails(run: Run, stream: object) -> Run:
    raise RuntimeError("operation not permitted when stream is capturing")


def succeeds(run: Run, stream: object) -> Run:
    """As far as one rank knows; nothing runs, for it would wait for the other."""

    def replay() -> StepResult:
        raise AssertionError("replayed on one rank alone")

    return replay


def step_for(world: World, capture: Any = None, config: Config = COMPILED) -> WholeStep:
    """The step of this rank, captured where there is something to capture it with.

    Not compiled, for the recording cannot look into compiled code.
    """
    moco = build_tiny(config, BATCH // world.size)
    step = build_step(config, moco, world, compile_encoders=True)
    assert isinstance(step, WholeStep)
    parts = {name: getattr(step, name) for name in step.__dataclass_fields__}
    made = CapturedStep(**parts, capture=capture) if capture else WholeStep(**parts)
    made._graph = made._whole
    if isinstance(capture, Recorder):
        capture.step = made  # type: ignore[assignment]
    return made


def addresses(step: WholeStep) -> list[int]:
    moments = cast(SGDWithEMA, step.optimizer).momentum_buffers()
    return [t.data_ptr() for t in (*step.moco.parameters(), *step.moco.buffers(), *moments)]


@aten_batch_norm
def steps(step: WholeStep, world: World, numbers: range) -> list[Tensor]:
    """What the steps return, each at a rate and with images and shuffles of its own."""
    found: list[Tensor] = []
    local = BATCH // world.size
    mine = slice(world.rank * local, (world.rank + 1) * local)
    for number in numbers:
        set_lr(step.optimizer, LR / (1 + number))
        views = images(number)
        found += step([Batch(views.im_q[mine], views.im_k[mine])], number)
    return found


def state(step: WholeStep) -> list[Tensor]:
    moments = cast(SGDWithEMA, step.optimizer).momentum_buffers()
    return [*step.moco.state_dict().values(), *moments]


def same(left: list[Tensor], right: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


@pytest.fixture(scope="module")
def ordinary() -> tuple[list[Tensor], list[Tensor]]:
    """Results and last state of the step that is not captured."""
    step = step_for(ONE)
    results = steps(step, ONE, range(STEPS))
    return results, [t.clone() for t in state(step)]


def test_replays_equal_the_ordinary_step_bit_for_bit_and_no_state_moves(
    ordinary: tuple[list[Tensor], list[Tensor]],
) -> None:
    recorder = Recorder()
    step = step_for(ONE, recorder)
    results = steps(step, ONE, range(1))
    before = addresses(step)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        results += steps(step, ONE, range(1, STEPS))
    assert same(results, ordinary[0])
    assert same(state(step), ordinary[1])
    assert addresses(step) == before
    # One replay is compared in the step that captures; from the next on there is nothing else.
    assert (recorder.captures, recorder.replays) == (1, STEPS - WARMUP)


@pytest.mark.parametrize("what", ["loss", "momentum", "counter", "nan"])
def test_a_replay_that_differs_is_never_used(
    what: str, ordinary: tuple[list[Tensor], list[Tensor]]
) -> None:
    def damage(result: StepResult) -> None:
        assert recorder.step is not None
        if what == "loss":
            result.loss.mul_(1.1)
        elif what == "nan":
            result.q[0, 0, 0] = torch.nan
        elif what == "counter":
            recorder.step.moco.queue_ptr.add_(1)
        else:
            cast(SGDWithEMA, recorder.step.optimizer).momentum_buffers()[-1].mul_(1.1)

    recorder = Recorder(damage)
    step = step_for(ONE, recorder)
    with pytest.warns(RuntimeWarning, match="a replay gives another result") as told:
        results = steps(step, ONE, range(STEPS))
    assert len([w for w in told if "CUDA graph" in str(w.message)]) == 1
    assert same(results, ordinary[0])
    assert same(state(step), ordinary[1])
    assert (recorder.captures, recorder.replays) == (1, 1)


def test_a_loaded_optimizer_is_captured_again(
    ordinary: tuple[list[Tensor], list[Tensor]],
) -> None:
    recorder = Recorder()
    step = step_for(ONE, recorder)
    results = steps(step, ONE, range(WARMUP + 2))
    step.optimizer.load_state_dict(step.optimizer.state_dict())
    results += steps(step, ONE, range(WARMUP + 2, STEPS))
    assert same(results, ordinary[0])
    assert recorder.captures == 1  # the steps since are the new warm-up
    steps(step, ONE, range(STEPS, STEPS + 2))
    assert recorder.captures == 2


def where_one_rank_fails(world: World) -> tuple[bool, list[str]]:
    """Whether results are those of the ordinary step, and the warnings of this rank."""
    config = replace(COMPILED, moco=replace(COMPILED.moco, bn_group_size=0))
    truth = step_for(world, config=config)
    want = [*steps(truth, world, range(STEPS)), *state(truth)]
    mine = step_for(world, fails if world.rank == 1 else succeeds, config)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        found = [*steps(mine, world, range(STEPS)), *state(mine)]
    sentences = [str(w.message) for w in told if "CUDA graph" in str(w.message)]
    return same(found, want), sentences


def test_a_capture_that_fails_on_one_rank_is_used_on_none(two_ranks: Ranks) -> None:
    (first, told), (second, silent) = two_ranks.run(where_one_rank_fails)
    assert first
    assert second
    assert silent == []
    assert len(told) == 1
    assert "rank 1: operation not permitted when stream is capturing" in told[0]


@cuda_without_device()
def captured(config: Config, world: World, mode: str, compiled: bool = True) -> bool:
    run = replace(config.run, cuda_graph=mode)  # type: ignore[arg-type]
    return captures(replace(config, run=run), world, compiled=compiled)


def test_which_steps_are_captured() -> None:
    large = replace(CONFIG, optim=replace(CONFIG.optim, global_batch_size=256))
    eight = replace(H100, size=8, backend="nccl")
    for config, world in ((CONFIG, H100), (large, H100), (large, eight)):
        assert captured(config, world, "on")
        assert captured(config, world, "auto") == (world.size == 1)
        assert not captured(config, world, "off")
    fp16 = replace(CONFIG, run=replace(CONFIG.run, precision="fp16"))
    parts = replace(CONFIG, optim=replace(CONFIG.optim, accumulate=2))
    for impossible in ((CONFIG, ONE, True), (CONFIG, H100, False), (fp16, H100), (parts, H100)):
        config, world, *compiled = impossible
        assert not captured(config, world, "off", *compiled)
        assert not captured(config, world, "auto", *compiled)
        with pytest.raises(ConfigError, match=r"run\.cuda_graph is on, but only a step"):
            captured(config, world, "on", *compiled)
