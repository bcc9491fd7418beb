"""16-bit and many-channel sets in a whole run: views, resume, kNN, exports and pictures."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from fastmoco.config import (
    AugmentConfig,
    Config,
    ConfigError,
    DataConfig,
    KnnConfig,
    OptimConfig,
    check,
    load,
)
from fastmoco.data.backends.choose import choose_backend
from fastmoco.data.loader import build_loader, make_plan
from fastmoco.data.pixels.resolve import resolve_pixels
from fastmoco.data.pixels.rule import PixelRule
from fastmoco.data.preview import __main__ as preview
from fastmoco.data.reader import Reader, read_work
from fastmoco.data.sources.choose import open_source, resolve_folders
from fastmoco.data.table import ViewTable
from fastmoco.evaluate import embed, finetune, knn
from fastmoco.evaluate.linear import __main__ as linear
from fastmoco.train import main
from fastmoco.weights import export
from fastmoco.weights.read import load_encoder, read
from tests.support.data.images import npy, png, tiff
from tests.support.oracles import float_oracle
from tests.support.runs.final_state import assert_same_bits, final_state

CPU = torch.device("cpu")
SIDE = 12
NO_COLOUR = AugmentConfig(image_size=SIDE, saturation=0, hue=0, grayscale_p=0)
FORMS: dict[str, tuple[int, str, Callable[[np.ndarray], bytes]]] = {
    "x-ray png": (1, ".png", lambda pixels: png(pixels[0])),
    "x-ray tiff": (1, ".tif", lambda pixels: tiff(pixels[0])),
    "satellite npy": (13, ".npy", npy),
    "satellite tiff": (13, ".tiff", lambda pixels: tiff(pixels, photometric="minisblack")),
}


def low_byte(label: int, channels: int, rng: np.random.Generator) -> np.ndarray:
    """(channels, 24, 20) uint16 with the high byte 60 everywhere; below it a slope, or stripes."""
    y, x = np.mgrid[:24, :20]
    wave = (y / 12 - 1, np.sin(x * 2.0 + rng.uniform(0, 6)))[label]
    low = np.rint(100 * (wave + 1)).astype(np.uint16)
    return np.stack([low + np.uint16(60 * 256)] * channels)


def make_set(root: Path, form: str) -> Path:
    channels, suffix, encode = FORMS[form]
    rng = np.random.default_rng(0)
    for part, count in (("train", 12), ("test", 6)):
        for label, name in enumerate(("slopes", "stripes")):
            (root / part / name).mkdir(parents=True)
            for number in range(count):
                pixels = low_byte(label, channels, rng)
                assert (pixels >> 8 == 60).all()  # what is left of it in 8 bits
                (root / part / name / f"{number}{suffix}").write_bytes(encode(pixels))
    return root


@pytest.mark.parametrize("backend", ["array", "pil"])
@pytest.mark.parametrize("form", FORMS)
def test_batches_equal_the_oracle(form: str, backend: str, tmp_path: Path) -> None:
    channels = FORMS[form][0]
    rng = np.random.default_rng(0)
    raw = [rng.integers(500, 60_000, (channels, 20, 17 + n), np.uint16) for n in range(6)]
    for number, pixels in enumerate(raw):
        (tmp_path / f"{number}{FORMS[form][1]}").write_bytes(FORMS[form][2](pixels))
    data = DataConfig(root=str(tmp_path), channels=channels, backend=backend, workers=1)  # type: ignore[arg-type]
    optim = OptimConfig(global_batch_size=6)
    config = Config(data=data, augment=NO_COLOUR, optim=optim, knn=KnnConfig(every=0))
    config = resolve_pixels(resolve_folders(config))
    low, high = min(p.min() for p in raw), max(p.max() for p in raw)
    assert config.data.intensity == (low, high)
    source = open_source(config)
    plan = make_plan(config, source, 6)
    work = read_work(Reader(source, config.run.seed, PixelRule.of(config.data)), plan, NO_COLOUR, 0)
    with build_loader(config, device=CPU) as loader:
        (batch,) = loader.batches(0, 1)
    for views, packed in ((batch.im_q, work.rows_q), (batch.im_k, work.rows_k)):
        assert views.dtype == torch.float32
        table = ViewTable.unpack(packed)
        for row, one in enumerate(work.queries):
            mapped = (raw[one.sample].transpose(1, 2, 0) - float(low)) * 255 / float(high - low)
            expected = float_oracle.view(mapped, table, row, SIDE, "v2")
            np.testing.assert_allclose(views[row].numpy(), expected, atol=2e-3)


def arguments(root: Path, run: Path, channels: int, backend: str) -> list[str]:
    return [
        *("--data.root", str(root), "--run.dir", str(run), "--data.channels", str(channels)),
        *("--data.backend", backend, "--data.workers", "1", "--augment.image_size", str(SIDE)),
        *("--augment.saturation", "0", "--augment.hue", "0", "--augment.grayscale_p", "0"),
        *("--model.arch", "resnet18", "--model.width", "0.125", "--model.stem", "cifar"),
        *("--moco.queue_size", "24", "--moco.bn_group_size", "4", "--model.dim", "8"),
        *("--optim.global_batch_size", "8", "--optim.epochs", "2", "--run.device", "cpu"),
        *("--knn.every", "1", "--knn.resize", "14", "--knn.k", "5", "--run.precision", "fp32"),
    ]


@dataclass(frozen=True)
class Trained:
    channels: int
    root: Path
    run: Path
    options: list[str]


RUNS = [("x-ray png", "pil"), ("satellite npy", "array")]


@pytest.fixture(scope="module", params=RUNS, ids=lambda run: run[0])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    form, backend = request.param
    place = tmp_path_factory.mktemp("float")
    root, run, channels = make_set(place / "set", form), place / "run", FORMS[form][0]
    options = arguments(root, run, channels, backend)
    assert main(options) == 0
    return Trained(channels, root, run, options)


def last_knn(run: Path) -> float:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return float([line["knn_top1"] for line in lines if line["kind"] == "knn"][-1])


def test_a_run_sees_what_is_in_the_low_byte(trained: Trained) -> None:
    assert last_knn(trained.run) >= 0.8  # chance is a half
    with Image.open(trained.run / "views.png") as views:
        assert views.mode == "RGB"


def test_runs_stop_and_go_on_bit_by_bit(
    trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = shutil.copytree(trained.root, tmp_path / "set")
    options = [*trained.options, "--data.root", str(root), "--run.dir", str(tmp_path / "run")]
    assert main([*options, "--run.max_steps", "4"]) == 0
    assert main(options) == 0
    assert_same_bits(final_state(trained.run), final_state(tmp_path / "run"))
    first = load(tmp_path / "run" / "config.yaml").data
    assert first.intensity == (60 * 256, 60 * 256 + 200)
    # What is added later does not move the range of the run, although `auto` is asked for again.
    for one in (root / "train" / "slopes").iterdir():
        pixels = np.full((trained.channels, 24, 20), 65_535, np.uint16)
        encoded = png(pixels[0]) if one.suffix == ".png" else npy(pixels)
        one.with_stem(f"new{one.stem}").write_bytes(encoded)
    capsys.readouterr()
    assert main(options) == 2
    assert " added: " in capsys.readouterr().err
    assert main([*options, "--run.resume_changes", "allow"]) == 0
    assert load(tmp_path / "run" / "config.yaml").data == first
    assert f"values {60 * 256} to {60 * 256 + 200} become 0 to 255" in capsys.readouterr().out


def test_exports_say_how_pixels_are_read(trained: Trained) -> None:
    first, place = load(trained.run / "config.yaml").data, trained.run / "encoder.safetensors"
    with safe_open(place, "pt") as file:
        facts = file.metadata()
    assert facts["num_channels"] == str(trained.channels)
    assert json.loads(facts["mean"]) == list(first.mean)
    for weights in (read(trained.run), read(place)):
        for name in ("channels", "intensity", "mean", "std"):
            assert getattr(weights.pixels, name) == getattr(first, name)
    images = torch.zeros(2, trained.channels, SIDE, SIDE)
    assert load_encoder(place)(images).shape == (2, 64)


def test_commands_read_pixels_as_the_run_did(
    trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """From a checkpoint and from an export alike: without the range every view would be black."""
    root, export = str(trained.root), trained.run / "encoder.safetensors"
    view = ["--image_size", str(SIDE), "--resize", "14"]
    found = []
    for checkpoint in (trained.run, export):
        more = ["--checkpoint", str(checkpoint), "--data.root", root, "--precision", "fp32"]
        assert knn.main([*more, *view, "--k", "5"]) == 0
        found.append(capsys.readouterr().out.splitlines()[2:])
    assert found[0] == found[1]
    assert f"{100 * last_knn(trained.run):.2f}" in "\n".join(found[0])
    out = tmp_path / "features.npz"
    assert embed.main([str(export), "--data.root", root, "--out", str(out), *view]) == 0
    assert np.load(out)["features"].shape == (24, 64)
    assert preview.main([*trained.options, "--out", str(tmp_path / "p.png")]) == 0


@pytest.mark.parametrize("kind", ["cached", "full", "finetune"])
def test_classifiers_read_pixels_as_the_run_did(
    kind: str, trained: Trained, tmp_path: Path
) -> None:
    options = [
        *("--checkpoint", str(trained.run / "encoder.safetensors"), "--out", str(tmp_path)),
        *("--data.root", str(trained.root), "--image_size", str(SIDE), "--resize", "14"),
        *("--batch_size", "8", "--epochs", "8", "--device", "cpu", "--workers", "1"),
    ]
    if kind == "cached":
        options[-2:] = ["--cached", "--crops", "2"]
    assert (finetune if kind == "finetune" else linear).main(options) == 0
    (line,) = (tmp_path / "results.jsonl").read_text().splitlines()
    assert json.loads(line)["val_top1"] >= 0.8  # chance is a half


def test_hub_folder_and_state_dicts_of_other_channels(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    run = tmp_path / "run"
    options = [
        *("--data.source", "synthetic", "--data.synthetic_samples", "8", "--data.channels", "5"),
        *("--augment.saturation", "0", "--augment.hue", "0", "--augment.grayscale_p", "0"),
        *("--model.arch", "resnet18", "--augment.image_size", "32", "--optim.epochs", "1"),
        *("--moco.queue_size", "8", "--moco.bn_group_size", "4", "--optim.global_batch_size", "8"),
        *("--run.device", "cpu", "--knn.every", "0", "--run.dir", str(run), "--model.dim", "8"),
        *("--run.precision", "fp32"),
    ]
    assert main(options) == 0
    images = torch.randn(2, 5, 32, 32)
    expected = load_encoder(run)(images)
    *_, line = export.export(run, "hub-folder", tmp_path / "hub")
    facts = json.loads((tmp_path / "hub" / "config.json").read_text())
    assert facts["num_channels"] == 5
    assert facts["pretrained_cfg"]["input_size"][0] == 5
    assert len(facts["pretrained_cfg"]["mean"]) == 5
    space: dict[str, Any] = {"timm": timm, "torch": torch}
    exec(line, space)
    torch.testing.assert_close(space["model"].eval()(images), expected)
    for library, suffix in (("torchvision", ".pth"), ("timm", ".safetensors")):
        out = tmp_path / f"{library}{suffix}"
        _, *lines = export.export(run, library, out)
        exec("import safetensors.torch, torchvision\n" + "\n".join(lines), space)
        torch.testing.assert_close(space["model"].eval()(images), expected)


def resolved(tmp_path: Path, arrays: list[np.ndarray], **options: Any) -> DataConfig:
    for number, array in enumerate(arrays):
        (tmp_path / f"{number}.npy").write_bytes(npy(array))
    data = DataConfig(root=str(tmp_path), **options)
    return resolve_pixels(Config(data=data, knn=KnnConfig(every=0))).data


def test_statistics_are_those_of_the_mapped_pixels(tmp_path: Path) -> None:
    """8-bit pictures keep their own range beside deep ones."""
    rng = np.random.default_rng(1)
    deep = [rng.normal(300, 40, (2, 20, 20)).astype(np.float32) for _ in range(5)]
    shallow = [rng.integers(0, 256, (2, 20, 20), np.uint8)]
    found = resolved(tmp_path, [*deep, *shallow], channels=2)
    low, high = (float(f([f(one) for one in deep])) for f in (np.min, np.max))
    assert found.intensity == (low, high)
    mapped = [(one.astype(np.float64) - low) / (high - low) for one in deep]
    pixels = np.concatenate([*mapped, shallow[0] / 255.0], axis=2)
    statistics = np.array([found.mean, found.std])
    expected = [pixels.mean(axis=(1, 2)), pixels.std(axis=(1, 2))]
    np.testing.assert_allclose(statistics, expected, rtol=1e-6)


def test_percentiles_leave_out_the_odd_values(tmp_path: Path) -> None:
    one = np.random.default_rng(0).integers(1000, 2000, (60, 60), np.uint16)
    one[0, :2] = 0, 65_535
    found = resolved(tmp_path, [one], channels=1, intensity="percentiles")
    assert isinstance(found.intensity, tuple)
    np.testing.assert_allclose(found.intensity, np.percentile(one, [0.1, 99.9]))


def going_on(data: DataConfig, **options: Any) -> DataConfig:
    """A run that was begun with `data` and is asked for again with these options."""
    asked = Config(data=DataConfig(root=data.root, **{"channels": 1, **options}))
    return resolve_pixels(replace(asked, knn=KnnConfig(every=0)), begun=Config(data=data)).data


def test_a_range_stays_until_another_rule_is_asked_for(tmp_path: Path) -> None:
    one = np.random.default_rng(0).integers(1000, 2000, (60, 60), np.uint16)
    one[0, :2] = 0, 65_535
    auto = resolved(tmp_path, [one], channels=1)
    percentiles = going_on(auto, intensity="percentiles")
    assert percentiles.intensity != auto.intensity == (0, 65_535)
    assert going_on(percentiles, intensity="percentiles") == percentiles
    assert going_on(percentiles).intensity == auto.intensity
    (tmp_path / "new.npy").write_bytes(
        npy(one + np.uint32(70_000))
    )  # neither range is the sample's any more
    for begun, options in ((auto, {}), (percentiles, {"intensity": "percentiles"})):
        assert going_on(begun, **options) == begun


def test_statistics_stay_until_others_are_asked_for(tmp_path: Path) -> None:
    """Of 8-bit RGB, where `default` is not what `auto` measures."""
    rgb = np.random.default_rng(0).integers(0, 256, (20, 20, 3), np.uint8)
    default = resolved(tmp_path, [rgb])
    auto = resolved(tmp_path, [rgb], mean="auto")
    assert going_on(default, channels=3, mean="auto").mean == auto.mean != default.mean
    assert going_on(auto, channels=3).mean == "default"
    (tmp_path / "new.npy").write_bytes(npy(rgb // 2))
    assert going_on(auto, channels=3, mean="auto") == auto


def test_a_run_on_8_bits_refuses_percentiles_when_it_goes_on(tmp_path: Path) -> None:
    one = np.random.default_rng(0).integers(0, 255, (9, 9), np.uint8)
    begun = resolved(tmp_path, [one], channels=1)
    assert going_on(begun) == begun
    with pytest.raises(ConfigError, match=r"percentiles, but .* no sampled picture has"):
        going_on(begun, intensity="percentiles")


def test_8_bit_rgb_stays_as_it_was(tmp_path: Path) -> None:
    rgb = np.random.default_rng(0).integers(0, 256, (20, 20, 3), np.uint8)
    found = resolved(tmp_path, [rgb])
    assert (found.intensity, found.mean, found.std) == ("auto", "default", "default")
    assert not found.float_views
    measured = resolved(tmp_path, [rgb], mean="auto")
    np.testing.assert_allclose(measured.mean, rgb.mean(axis=(0, 1)) / 255)  # type: ignore[arg-type]
    assert measured.std == "default"


@pytest.mark.parametrize(
    ("arrays", "options", "sentence"),
    [
        ([np.full((9, 9), 7, np.uint16)], {}, "All values of the sampled pictures are 7"),
        ([np.zeros((9, 9), np.uint8)], {"intensity": "percentiles"}, "no sampled picture has"),
        ([np.zeros((9, 9, 4), np.uint8)], {}, r"0\.npy: 4 channels, but data\.channels is 3"),
    ],
)
def test_a_set_without_a_range_is_refused(
    arrays: list[np.ndarray], options: dict[str, Any], sentence: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=sentence):
        resolved(tmp_path, arrays, **options)


@pytest.mark.parametrize(
    ("data", "augment", "sentence"),
    [
        (
            {"channels": 13},
            AugmentConfig(),
            r"saturation and augment\.hue and augment\.grayscale_p",
        ),
        ({"channels": 1}, replace(NO_COLOUR, hue=0.1), r"augment\.hue are for 3 channels"),
        ({"channels": 4, "backend": "dali"}, NO_COLOUR, r"backend dali makes views of 8-bit RGB"),
        ({"channels": 4, "mean": (0.1, 0.2)}, NO_COLOUR, r"data\.mean has 2 numbers, but .* is 4"),
        ({"std": (1.0, 0.0, 1.0)}, AugmentConfig(), r"data\.std is \[1\.0, 0\.0, 1\.0\]"),
        ({"intensity": (5.0, 5.0)}, AugmentConfig(), r"data\.intensity is \[5\.0, 5\.0\]"),
        ({"channels": 0}, NO_COLOUR, r"data\.channels is 0"),
    ],
)
def test_what_does_not_fit_is_refused(
    data: dict[str, Any], augment: AugmentConfig, sentence: str
) -> None:
    with pytest.raises(ConfigError, match=sentence):
        check(Config(data=DataConfig(**data), augment=replace(augment, image_size=64)), 1)


def test_jitter_that_never_happens_asks_for_no_colour() -> None:
    augment = AugmentConfig(jitter_p=0, grayscale_p=0)
    check(Config(data=DataConfig(channels=4), augment=augment), 1)


def test_dali_does_not_take_deep_pictures() -> None:
    data = DataConfig(intensity=(0.0, 4095.0), backend="dali")
    with pytest.raises(ConfigError, match=r"data\.backend is dali.*8-bit RGB"):
        choose_backend(Config(data=data), torch.device("cuda"))
    auto = Config(data=replace(data, backend="auto"))
    assert choose_backend(auto, torch.device("cuda")) == "array"
