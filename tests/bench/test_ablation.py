"""Switching improvements off changes the cost of a step and not what is learned."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from unittest import mock

import pytest
import torch

from bench.ablation import ALL_OFF, OURS, PUBLISHED, rows_of, safety, variants
from bench.measure.contest import Contestant, Result, Window
from bench.measure.program import options, parser
from bench.steps.contestants import numbered_step, saving_step
from bench.steps.switches import WITHOUT, switch_off, switches
from fastmoco.config import Config, dump, parse, parse_text
from fastmoco.run import checkpoint
from fastmoco_kernels.convolution import convolution_cpu, convolution_fp32_cpu
from tests.support.compiled import needs

TINY = [
    *("--data.source", "synthetic", "--augment.image_size", "32", "--model.arch", "resnet18"),
    *("--optim.global_batch_size", "8", "--moco.bn_group_size", "4", "--moco.queue_size", "64"),
    *("--run.device", "cpu", "--run.precision", "fp32"),
]


def of(*overrides: str) -> dict[str, Contestant]:
    """The variants of an ablation with these options, by name."""
    own = options(parser("ablation", ""), [*TINY, *overrides], trains=True)
    return {variant.name: variant for variant in variants(own)}


def queue_after_two_steps(without: tuple[str, ...], config: str = "") -> torch.Tensor:
    step, run, _ = numbered_step(config or dump(parse(TINY)), without)
    run = switch_off(run, step, without)
    run()
    run()
    return step.moco.queue


@pytest.mark.parametrize("without", [(name,) for name in WITHOUT] + [WITHOUT])
def test_what_is_switched_off_does_not_change_the_keys(without: tuple[str, ...]) -> None:
    apart = queue_after_two_steps(without) - queue_after_two_steps(())
    assert float(apart.abs().max()) < 1e-3


def test_everything_off_learns_the_same() -> None:
    given = of("--run.precision", "bf16")[ALL_OFF].arguments
    off = queue_after_two_steps(tuple(given["without"]), given["config"])
    assert float((off - queue_after_two_steps(())).abs().max()) < 1e-3


def test_switched_off_means_off() -> None:
    step, run, _ = numbered_step(dump(parse(TINY)), ("channels_last", "uint8_input"))
    seen: list[torch.Tensor] = []
    stem = step.moco.encoder_q.get_submodule("conv1")
    stem.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    with mock.patch("fastmoco.network.encoder.NormalizePixels.forward", side_effect=AssertionError):
        switch_off(run, step, ("channels_last", "uint8_input"))()
    assert seen[0].is_contiguous()
    assert not seen[0].is_contiguous(memory_format=torch.channels_last)
    weights = stem.weight
    assert isinstance(weights, torch.Tensor)
    assert weights.is_contiguous()


def movement(without: tuple[str, ...], precision: str) -> list[torch.Tensor]:
    """By how much one step moves each weight of a convolution."""
    config = dump(parse([*TINY, "--run.precision", precision]))
    step, run, _ = numbered_step(config, without)
    weights = [p for p in step.moco.encoder_q.parameters() if p.ndim == 4]
    before = [weight.detach().clone() for weight in weights]
    switch_off(run, step, without)()
    return [w.detach() - b for w, b in zip(weights, before, strict=True)]


@needs(convolution_cpu.reason())
def test_weight_gradients_switched_off_become_onednns_and_learn_the_same() -> None:
    ours = movement((), "bf16")
    way = "fastmoco.network.convolution.convolution_cpu.convolution"
    with mock.patch(way, side_effect=AssertionError):
        theirs = movement(("weight_gradients",), "bf16")
        with pytest.raises(AssertionError):
            movement((), "bf16")
    apart = [float((a - b).norm() / b.norm()) for a, b in zip(ours, theirs, strict=True)]
    assert 0 < max(apart) < 1e-2  # oneDNN's are rounded to bf16


@needs(convolution_fp32_cpu.reason())
def test_convolutions_switched_off_become_onednns_and_learn_the_same() -> None:
    ours = movement((), "fp32")
    way = "fastmoco.network.convolution.convolution_fp32_cpu.convolution"
    with mock.patch(way, side_effect=AssertionError):
        theirs = movement(("convolutions",), "fp32")
        with pytest.raises(AssertionError):
            movement((), "fp32")
    apart = [float((a - b).norm() / b.norm()) for a, b in zip(ours, theirs, strict=True)]
    assert 0 < max(apart) < 1e-3


def test_weight_gradients_are_a_switch_where_our_kernel_computes_them() -> None:
    bf16, fp32 = (parse([*TINY, "--run.precision", name]) for name in ("bf16", "fp32"))

    def named(config: Config, cuda: bool = False, compiled: bool = False, why: str = "") -> bool:
        with mock.patch("fastmoco_kernels.convolution.convolution_cpu.reason", return_value=why):
            return "weight gradients" in [s.name for s in switches(config, cuda, compiled)]

    assert named(bf16)
    assert not named(fp32)
    assert not named(bf16, cuda=True)
    assert not named(bf16, compiled=True)
    assert not named(bf16, why="no such unit")


def test_convolutions_are_a_switch_in_fp32_where_our_kernels_compute_them() -> None:
    bf16, fp32 = (parse([*TINY, "--run.precision", name]) for name in ("bf16", "fp32"))

    def named(config: Config, cuda: bool = False, compiled: bool = False, why: str = "") -> bool:
        with mock.patch(
            "fastmoco_kernels.convolution.convolution_fp32_cpu.reason", return_value=why
        ):
            return "convolutions" in [s.name for s in switches(config, cuda, compiled)]

    assert named(fp32)
    assert not named(bf16)
    assert not named(fp32, cuda=True)
    assert not named(fp32, compiled=True)
    assert not named(fp32, why="no such unit")


def test_rows_are_relative_to_the_whole() -> None:
    results = {
        OURS: Result([Window(1, 2.0, 4.0, 0.0)] * 3, {}),
        "other": Result([Window(1, 3.0, 8.0, 0.0)] * 3, {}),
    }
    rows = rows_of(results, {"batch": 8})
    assert rows[0]["relative"] == [1.0, 1.0, 1.0]
    assert rows[1]["relative"] == [1.5, 1.5, 1.5]
    assert rows[1]["relative_cpu"] == 2.0
    assert rows[1]["step_ms"] == [3000.0, 3000.0, 3000.0]


def test_one_thing_is_off_at_a_time_and_then_all_of_them() -> None:
    found = of("--run.precision", "bf16")
    ours = found.pop(OURS)
    assert "without" not in ours.arguments
    assert found.pop(PUBLISHED).factory.endswith(":official_step")

    def off(variant: Contestant) -> int:
        """How many lines of the configuration differ from ours, and names in `without`."""
        texts = (v.arguments["config"].splitlines() for v in (variant, ours))
        changed = sum(a != b for a, b in zip(*texts, strict=True))
        without: Sequence[str] = variant.arguments.get("without", ())
        return int(changed) + len(without)

    counts = [off(variant) for variant in found.values()]
    assert set(counts[:-1]) == {1}
    assert counts[-1] == len(found) - 1
    assert list(found)[-1] == ALL_OFF


def test_safety_is_a_checkpoint_per_window_and_steps_that_may_be_left_out() -> None:
    own = options(parser("ablation", ""), TINY, trains=True)
    ours, saves, skips = safety(own)
    assert (ours.factory, skips.factory) == (variants(own)[0].factory,) * 2
    assert parse_text(skips.arguments["config"]).run.nonfinite == "skip"
    module, name = saves.factory.split(":")
    assert getattr(import_module(module), name) is saving_step


def test_a_contestant_saves_at_the_beginning_of_each_window(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    saved: list[int] = []
    real = checkpoint.Saver.save_if_due

    def spy(saver: checkpoint.Saver, done: int, *, overdue: bool = False, end: bool = False) -> str:
        saved.append(done)
        said = real(saver, done, overdue=overdue, end=end)
        assert Path(saver._config.run.dir).is_dir()
        return said

    monkeypatch.setattr(checkpoint.Saver, "save_if_due", spy)
    small = ["--model.stem=cifar", "--model.width=0.125", "--model.dim=8"]
    contestant = saving_step(dump(parse([*TINY, *small])))
    for steps in (2, 3, 1):
        contestant.run(steps)
    contestant.close()
    assert saved == [0, 2, 5]


def test_variants_that_change_nothing_here_are_left_out() -> None:
    names = " ".join(of("--optim.name", "sgd"))
    for absent in ("fp32 (", "fused update", "torch.compile"):
        assert absent not in names
    with mock.patch("bench.measure.program.device_of", return_value=torch.device("cuda")):
        names = " ".join(of("--run.precision", "bf16"))
    assert "torch.compile (eager" in names
    assert "malloc" not in names


def test_the_host_launches_every_variant() -> None:
    """Else what cannot be a CUDA graph would seem to be worth what the graph is."""
    found = {parse_text(str(one.arguments["config"])).run.cuda_graph for one in of().values()}
    assert found == {"off"}
