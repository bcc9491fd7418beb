"""Exports hold the same bits, and the programs they are for load them strictly."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
import torchvision
from torch import Tensor, nn
from torchvision.models import resnet18

import fastmoco
from fastmoco.config import Config, DataConfig
from fastmoco.method.step import Step
from fastmoco.weights.architecture import NETWORKS, Architecture, shapes
from fastmoco.weights.export import export, export_trunk, main
from fastmoco.weights.formats.constructors import loading_lines
from fastmoco.weights.formats.detectron2 import detectron2_name
from fastmoco.weights.read import load_encoder, read

ROOT = Path(__file__).resolve().parents[2]
QUERY = "module.encoder_q."
State = dict[str, Tensor]


def official_state(path: Path) -> State:
    state: State = torch.load(path, weights_only=True)["state_dict"]
    return state


def trunk_of(run: Path) -> State:
    """The trunk in the checkpoint of a run, read without the reader."""
    state = official_state(run / "latest.pth.tar")
    queries = {n.removeprefix(QUERY): t for n, t in state.items() if n.startswith(QUERY)}
    return {n: t for n, t in queries.items() if not n.startswith("fc.")}


def assert_same(found: State, wanted: State) -> None:
    assert found.keys() == wanted.keys()
    assert not [name for name in wanted if not torch.equal(found[name], wanted[name])]


def executed(lines: list[str]) -> nn.Module:
    """The model that printed lines of Python make."""
    libraries = (torch, torchvision, timm, safetensors, fastmoco)
    names: dict[str, Any] = {library.__name__: library for library in libraries}
    exec("\n".join(line.strip() for line in lines), names)
    model = names["model"]
    assert isinstance(model, nn.Module)
    return model.eval()


@pytest.mark.parametrize(
    ("to", "name"),
    [
        *(("torchvision", "a.pth"), ("torchvision", "a.safetensors"), ("timm", "a.pth")),
        *(("timm", "a.safetensors"), ("safetensors", "a.safetensors"), ("official", "a.pth.tar")),
        ("hub-folder", "folder"),
    ],
)
def test_round_trip_to_identical_bits(run: Path, to: str, name: str) -> None:
    out = run.parent / name
    assert main([str(run), "--to", to, "--out", str(out)]) == 0
    assert_same(read(out).trunk, trunk_of(run))
    assert read(out).architecture == Architecture("resnet18", 1.0, "imagenet")
    assert read(out).epoch == (None if to in ("torchvision", "timm") and "pth" in name else 2)


@pytest.mark.parametrize("to", ["torchvision", "timm", "hub-folder"])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_libraries_load_the_trunk_strictly_and_give_its_features(
    run: Path, to: str, suffix: str
) -> None:
    """The printed lines are run as they are; they load with strict=True."""
    out = run.parent / (f"a{suffix}" if to != "hub-folder" else f"folder{suffix}")
    read_line, *lines = export(run, to, out)
    assert "resnet18" in read_line
    model = executed(lines)
    assert type(model).__module__.split(".")[0] == (
        "torchvision" if to == "torchvision" else "timm"
    )
    x = torch.randn(2, 3, 64, 64).double()
    with torch.no_grad():
        torch.testing.assert_close(model.double()(x), load_encoder(run).double()(x))


@pytest.mark.parametrize("library", ["torchvision", "timm"])
@pytest.mark.parametrize(
    ("arch", "stem"), [*((a, "imagenet") for a in NETWORKS), ("resnet18", "cifar")]
)
def test_lines_build_every_architecture_that_the_libraries_have(
    arch: str, stem: Any, library: str
) -> None:
    architecture = Architecture(arch, 1.0, stem)
    *lines, load = loading_lines(architecture, Path("x.pth"), library)
    assert load.startswith("model.load_state_dict(")
    with torch.device("meta"):
        model = executed(lines)
    found = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert found == shapes(architecture)


def test_other_architectures_are_loaded_by_fastmoco(
    run: Path, config: Config, new_step: Callable[..., Step], tmp_path: Path
) -> None:
    """The cifar stem needs one line more, another width needs our class."""
    for model, count in (({"stem": "cifar"}, 4), ({"width": 0.25}, 1)):
        settings = replace(config, model=replace(config.model, **model))
        moco = new_step(settings).moco
        _, *lines = export_trunk(moco, tmp_path, 1, DataConfig()).splitlines()
        assert len(lines) == count
        x = torch.randn(2, 3, 32, 32)
        with torch.no_grad():
            torch.testing.assert_close(executed(lines)(x), moco.encoder_q.eval().trunk(x))


def test_torch_hub_loads_any_of_them(run: Path) -> None:
    x = torch.randn(1, 3, 32, 32)
    found = torch.hub.load(str(ROOT), "encoder", source="local", path=str(run))
    assert torch.equal(found(x), load_encoder(run)(x))


def test_the_official_linear_evaluation_reads_every_official_file(run: Path) -> None:
    """As that script does: encoder_q without its head; only the classifier may be missing."""
    export(run, "safetensors", run.parent / "trunk.safetensors")
    for source in (run, run.parent / "trunk.safetensors"):
        out = run.parent / "official.pth.tar"
        export(source, "official", out)
        state = official_state(out)
        for name in list(state):
            if name.startswith(QUERY) and not name.startswith(f"{QUERY}fc"):
                state[name[len(QUERY) :]] = state[name]
            del state[name]
        missing, unexpected = resnet18().load_state_dict(state, strict=False)
        assert set(missing) == {"fc.weight", "fc.bias"}
        assert not unexpected
        assert_same(state, trunk_of(run))


def test_official_of_our_checkpoint_is_complete(run: Path) -> None:
    out = run.parent / "official.pth.tar"
    _, sentence = export(run, "official", out)
    assert "main_moco.py --resume and main_lincls.py read it" in sentence
    ours, theirs = (torch.load(p, weights_only=True) for p in (run / "latest.pth.tar", out))
    assert_same(theirs["state_dict"], ours["state_dict"])
    assert theirs["optimizer"]["param_groups"][0]["params"] == list(range(128))
    assert len(theirs["optimizer"]["state"]) == 64
    stripped = run.parent / "stripped.pth.tar"
    torch.save(
        {"state_dict": {n: t for n, t in ours["state_dict"].items() if "_q." in n}}, stripped
    )
    assert "--resume does not" in export(stripped, "official", out)[1]
    assert_same(
        official_state(out), {n: t for n, t in ours["state_dict"].items() if "encoder_q" in n}
    )


def converter_name(name: str) -> str:
    """What the official Detectron2 converter makes of a name of encoder_q, step by step."""
    if "layer" not in name:
        name = "stem." + name
    for stage in (1, 2, 3, 4):
        name = name.replace(f"layer{stage}", f"res{stage + 1}")
    for norm in (1, 2, 3):
        name = name.replace(f"bn{norm}", f"conv{norm}.norm")
    return name.replace("downsample.0", "shortcut").replace("downsample.1", "shortcut.norm")


def converted(state: State) -> dict[str, np.ndarray[Any, Any]]:
    """The model in its pickle, from an official state dict."""
    queries = {n.replace(QUERY, ""): t for n, t in state.items() if n.startswith(QUERY)}
    return {converter_name(name): tensor.numpy() for name, tensor in queries.items()}


@pytest.mark.parametrize("arch", NETWORKS)
def test_detectron2_names_are_the_converters_and_no_two_are_one(arch: str) -> None:
    names = [*shapes(Architecture(arch, 1.0, "imagenet")), "fc.0.weight", "fc.2.bias"]
    found = [detectron2_name(name) for name in names]
    assert found == [converter_name(name) for name in names]
    assert len(set(found)) == len(names)


def test_detectron2_pickle_is_that_of_the_official_converter(run: Path) -> None:
    out = run.parent / "detectron2.pkl"
    export(run, "detectron2", out)
    content = pickle.loads(out.read_bytes())
    wanted = converted(official_state(run / "latest.pth.tar"))
    assert content["__author__"] == "MOCO"
    assert content["matching_heuristics"] is True
    assert content["model"].keys() == wanted.keys()
    for name, array in wanted.items():
        found = content["model"][name]
        assert found.dtype == array.dtype, name
        assert np.array_equal(found, array), name
    assert {"stem.conv1.norm.running_var", "res3.0.shortcut.norm.weight"} <= content["model"].keys()


def test_hub_folder_says_how_it_was_made(run: Path) -> None:
    out = run.parent / "hub"
    export(run, "hub-folder", out)
    card = (out / "README.md").read_text()
    assert "| **this encoder** | 51.5 % |" in card
    assert "| untrained encoder | 30.0 % |" in card
    assert "queue_size: 40" in card
    assert "Trained for 2 epochs. Data: folder" in card
    assert "](curves.png)" in card
    assert (out / "curves.png").read_bytes() == b"a picture"
    assert str(run.parent) not in card
    theirs = json.loads((out / "config.json").read_text())["pretrained_cfg"]
    model = timm.create_model(f"local-dir:{out}", pretrained=True)
    data = timm.data.resolve_model_data_config(model)  # type: ignore[attr-defined, no-untyped-call]
    assert tuple(data["input_size"]) == (3, 224, 224)
    assert data["crop_pct"] == theirs["crop_pct"] == 224 / 256
    assert tuple(data["mean"]) == tuple(theirs["mean"]) == (0.485, 0.456, 0.406)
    assert timm.create_model(f"local-dir:{out}", pretrained=True, num_classes=5).num_classes == 5


def test_the_card_does_not_tell_the_accuracy_of_another_epoch(run: Path) -> None:
    metrics = run / "metrics.jsonl"
    kept = [line for line in metrics.read_text().splitlines() if '"epoch": 2.0' not in line]
    metrics.write_text("\n".join(kept))
    export(run, "hub-folder", run.parent / "hub")
    assert "Not evaluated." in (run.parent / "hub" / "README.md").read_text()


def test_card_of_weights_from_elsewhere(trunk: State, tmp_path: Path) -> None:
    torch.save(trunk, tmp_path / "a.pth")
    export(tmp_path / "a.pth", "hub-folder", tmp_path / "hub")
    card = (tmp_path / "hub" / "README.md").read_text()
    assert "the recipe is not known" in card
    assert "Not evaluated." in card
    assert "curves" not in card


def refused(capfd: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert main([str(argument) for argument in arguments]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("fastmoco: ")
    return line


def test_what_cannot_be_exported_is_one_sentence(
    run: Path, trunk: State, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    cifar, wide = tmp_path / "cifar.pth", tmp_path / "wide.pth"
    torch.save({**trunk, "conv1.weight": torch.zeros(64, 3, 3, 3)}, cifar)
    narrow = shapes(Architecture("resnet18", 0.25, "imagenet"))
    torch.save({name: torch.zeros(shape) for name, shape in narrow.items()}, wide)
    out = tmp_path / "out"
    assert "does not exist" in refused(capfd, tmp_path / "no", "--to", "timm", "--out", out)
    assert "must end in .pkl" in refused(capfd, run, "--to", "detectron2", "--out", out)
    assert ".safetensors" in refused(capfd, run, "--to", "safetensors", "--out", out)
    pickled = tmp_path / "out.pkl"
    assert "7x7" in refused(capfd, cifar, "--to", "detectron2", "--out", pickled)
    assert "timm has no resnet18 with the cifar stem" in refused(
        capfd, cifar, "--to", "hub-folder", "--out", out
    )
    for to in ("torchvision", "timm", "hub-folder"):
        assert "width 0.25" in refused(capfd, wide, "--to", to, "--out", out)
    assert "is in use" in refused(capfd, run, "--to", "hub-folder", "--out", run)
    assert "Cannot write" in refused(capfd, run, "--to", "timm", "--out", wide / "a.pth")
    assert not out.exists()
    assert not pickled.exists()
    assert not list(tmp_path.glob(".*"))
