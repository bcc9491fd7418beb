"""The compiled step as a CUDA graph, which the host starts with one call instead of a thousand.

N local batch, S image side.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from fastmoco.machine.collectives import gather_objects
from fastmoco.method.compiled_step import WholeStep
from fastmoco.method.optim.update import SGDWithEMA
from fastmoco.method.step import StepResult

Run = Callable[[], StepResult]
Capture = Callable[[Run, "torch.cuda.Stream | None"], Run]
"""From a function and a stream to one that replays what the function put on the stream."""

GIVES_UP = "fastmoco: the step does not run as a CUDA graph"
WARMUP = 2  # the first step compiles; the second is the first that allocates as all others do
# By how much a replay may differ from the ordinary step: of what the step changes, and of the
# values. cuDNN may add up weight gradients in another order each time.
OF_CHANGE, OF_VALUE = 1e-2, 1e-6


def capture_cuda_graph(run: Run, stream: torch.cuda.Stream | None) -> Run:
    """Record on a side stream what `run` launches, without running it; raises `RuntimeError`.

    What a replay returns lies where the next one writes.
    """
    graph = torch.cuda.CUDAGraph()
    # The threads of the loader, of checkpoints and of NCCL may go on to pin memory and to wait.
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        result = run()

    def replay() -> StepResult:
        graph.replay()
        return result

    return replay


@dataclass
class CapturedStep(WholeStep):
    """The compiled step, captured after `WARMUP` steps and replayed from then on.

    Everything that changes from step to step is in tensors that stay where they are: images and
    shuffle indices are copied there, the learning rate is filled in, the rest is the state. Before
    it is relied on, one replay is compared with the ordinary step from the same state. Where the
    capture fails or the two differ, on any rank, all ranks keep the ordinary step and say so once.
    """

    capture: Capture = capture_cuda_graph

    def __post_init__(self) -> None:
        super().__post_init__()
        cuda = self.world.device.type == "cuda"
        self._stream = torch.cuda.Stream(self.world.device) if cuda else None
        self._inputs: list[Tensor] = []
        self._replay: Run | None = None
        self._given_up = False
        self._warmup = WARMUP
        # A loaded state dict brings momentum buffers at other addresses.
        self.optimizer.register_load_state_dict_post_hook(lambda _: self._forget())

    def _forget(self) -> None:
        self._replay, self._warmup = None, WARMUP

    def run_graph(self, im_q: Tensor, im_k: Tensor, order: Tensor) -> StepResult:
        """The step on images and shuffle indices that are on the device."""
        if self._given_up:
            return super().run_graph(im_q, im_k, order)
        self.set_rate()
        if not self._inputs:
            self._inputs = [torch.empty_like(t) for t in (im_q, im_k, order)]
        for ours, given in zip(self._inputs, (im_q, im_k, order), strict=True):
            ours.copy_(given)
        if self._replay is None and self._warmup == 0:
            return self._capture()
        if self._replay is None:
            self._warmup -= 1
            return self._aside()
        return _copied(self._replay())

    def _ordinary(self) -> StepResult:
        return self.launch(*self._inputs)

    def _aside(self) -> StepResult:
        """The ordinary step on the stream that is to be captured, as CUDA asks of a warm-up."""
        with _on(self._stream):
            return self._ordinary()

    def _capture(self) -> StepResult:
        """Capture, compare, and do the step at hand, the ordinary way."""
        made, reason = None, ""
        try:
            made = self.capture(self._ordinary, self._stream), self._copies(), self._copies()
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:200] or type(error).__name__
        if self._refused(reason) or made is None:
            made = None  # gives its memory back
            return self._aside()
        replay, before, replayed = made
        found = _copied(replay())
        for state, was, kept in zip(self._state(), before, replayed, strict=True):
            kept.copy_(state)
            state.copy_(was)
        result = self._aside()
        outputs = found.loss, found.q
        mine, truth = [*replayed, *outputs], [*self._state(), result.loss, result.q]
        apart = _distance([*before, *(torch.zeros_like(t) for t in outputs)], mine, truth)
        if not self._refused("" if apart <= 1 else "a replay gives another result"):
            self._replay = replay
        return result

    def _copies(self) -> list[Tensor]:
        return [t.clone() for t in self._state()]

    def _state(self) -> list[Tensor]:
        """All that a step changes."""
        moments = cast(SGDWithEMA, self.optimizer).momentum_buffers()
        return [t.detach() for t in (*self.moco.parameters(), *self.moco.buffers(), *moments)]

    def _refused(self, reason: str) -> bool:
        """Whether any rank has a reason against the graph; then all keep the ordinary step."""
        reasons = gather_objects(reason, self.world)
        told = [f"rank {rank}: {text}" for rank, text in enumerate(reasons) if text]
        self._given_up = bool(told)
        if told and self.world.is_main:
            warnings.warn(
                f"{GIVES_UP} ({told[0]}); it goes on as before, right but slower where the host is "
                "slower than the device.",
                RuntimeWarning,
                stacklevel=2,
            )
        return self._given_up


@contextmanager
def _on(stream: torch.cuda.Stream | None) -> Iterator[None]:
    """Work on a side stream, between what the current one did before and does after."""
    if stream is None:
        yield
        return
    current = torch.cuda.current_stream(stream.device)
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        yield
    current.wait_stream(stream)


def _copied(result: StepResult) -> StepResult:
    return StepResult(*(t.clone() for t in result))


def _distance(before: list[Tensor], mine: list[Tensor], truth: list[Tensor]) -> float:
    """The largest distance of `mine` from `truth`, where 1 is allowed; waits for the device."""
    found = []
    for was, a, b in zip(before, mine, truth, strict=True):
        if not b.is_floating_point():
            found.append(2 * (a != b).any().double())
            continue
        was, a, b = was.double(), a.double(), b.double()
        allowed = OF_CHANGE * (b - was).norm() + OF_VALUE * b.norm() + 1e-30
        found.append(((a - b).norm() / allowed).nan_to_num(nan=torch.inf))
    return float(torch.stack(found).max())
