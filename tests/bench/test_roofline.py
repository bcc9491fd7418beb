"""The roofline model: what it counts, checked against figures known from elsewhere."""

from __future__ import annotations

from bench.roofline import BATCH, GPUS, TRACED, Operation, by_part, fused, supervised, trace
from bench.steps.contestants import bare_encoder
from fastmoco.config import dump, parse


def test_traced_flops_are_those_of_resnet50() -> None:
    recipe = [
        *("--data.source", "synthetic", "--run.device", "cpu", "--model.head", "linear"),
        *("--run.precision", "fp32"),  # as many operations, and faster where bf16 is emulated
        *("--optim.global_batch_size", str(TRACED), "--moco.bn_group_size", str(TRACED)),
    ]
    plain = supervised(trace(bare_encoder, dump(parse(recipe))))
    gflop = sum(op.flops for op in plain) / BATCH / 1e9
    # 4.09 G multiply-adds per 224-pixel image, two FLOPs each; forward, and twice that backward.
    # The first convolution needs no gradient for its input.
    assert 0.95 * 6 * 4.09 < gflop < 6 * 4.09
    passes = [op for op in plain if op.name.startswith("native_batch_norm")]
    assert len(passes) == 2 * 53
    assert len([op for op in plain if op.name.startswith("max_pool2d")]) == 2


def test_fusion_removes_pointwise_traffic_only() -> None:
    eager = [
        Operation("convolution", 1e12, 1e9),
        Operation("native_batch_norm", 0.0, 3e9),
        Operation("threshold_backward", 0.0, 3e9),
        Operation("relu_", 0.0, 2e9),
    ]
    assert [op.bytes for op in fused(eager)] == [1e9, 3e9, 2e9]
    before, after = (by_part(ops, GPUS[0]) for ops in (eager, fused(eager)))
    assert before["convolution"] == after["convolution"]
    assert after["pointwise"] < before["pointwise"]
