"""The reader finds the same trunk under every name the field gives it, or says what it lacks."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision import models

from fastmoco.config import ConfigError
from fastmoco.network.encoder import build_encoder
from fastmoco.network.resnet import BACKBONES
from fastmoco.weights import files
from fastmoco.weights.architecture import Architecture, Stem, recognize
from fastmoco.weights.names import WRAPPERS
from fastmoco.weights.read import Weights, interpret, read

State = dict[str, Tensor]
MLP = {
    **{"0.weight": torch.randn(512, 512), "0.bias": torch.randn(512)},
    **{"2.weight": torch.randn(8, 512), "2.bias": torch.randn(8)},
}
LINEAR = {"weight": torch.randn(8, 512), "bias": torch.randn(8)}


def prefixed(prefix: str, state: State) -> State:
    return {prefix + name: tensor for name, tensor in state.items()}


def stored(folder: Path, content: Any, name: str = "weights.pth") -> Weights:
    torch.save(content, folder / name)
    return read(folder / name)


def interpreted(content: dict[str, Any]) -> Weights:
    """As `stored`, without writing 45 MB for every case."""
    return interpret(content, Path("weights.pth"))


def assert_same(found: State, wanted: State) -> None:
    assert found.keys() == wanted.keys()
    assert not [name for name in wanted if not torch.equal(found[name], wanted[name])]


def noise(state: State) -> State:
    """Other weights under the same names: a key encoder that must not be taken."""
    return {name: tensor + 1 for name, tensor in state.items()}


@pytest.mark.parametrize(
    "prefix",
    [
        *("", *(f"{wrapper}." for wrapper in sorted(WRAPPERS))),
        *("module.encoder_q.", "_orig_mod.module.encoder_q.", "module.encoder_q._orig_mod."),
        *("model.backbone.", "module._orig_mod.backbone.module.", "encoder_q.encoder."),
    ],
)
def test_prefixes_in_any_combination(trunk: State, prefix: str) -> None:
    found = interpreted({"state_dict": prefixed(prefix, trunk)})
    assert_same(found.trunk, trunk)
    assert found.architecture == Architecture("resnet18", 1.0, "imagenet")
    assert found.features == 512


def test_blocks_that_were_compiled_one_by_one(trunk: State) -> None:
    state = {n.replace("layer3.", "layer3._orig_mod."): t for n, t in trunk.items()}
    assert_same(interpreted(state).trunk, trunk)


@pytest.mark.parametrize("head", [MLP, LINEAR], ids=["v2", "v1"])
@pytest.mark.parametrize("left", ["all", "encoder_q", "no keys"])
def test_published_moco_files(tmp_path: Path, trunk: State, head: State, left: str) -> None:
    fc = prefixed("fc.", head)
    queue = {"module.queue": torch.randn(8, 40), "module.queue_ptr": torch.zeros(1).long()}
    parts = {
        "all": [queue, prefixed("module.encoder_k.", noise({**trunk, **fc}))],
        "encoder_q": [],
        "no keys": [queue],
    }
    state = prefixed("module.encoder_q.", {**trunk, **fc})
    for part in parts[left]:
        state = {**part, **state}
    found = stored(tmp_path, {"epoch": 200, "arch": "resnet18", "state_dict": state}, "a.pth.tar")
    assert_same(found.trunk, trunk)
    assert_same(found.head, fc)
    assert (found.kind, found.epoch) == ("official", 200)
    assert found.head_kind == ("mlp" if head is MLP else "linear")


def test_torchvision_and_timm_without_their_classifiers(tmp_path: Path, trunk: State) -> None:
    theirs = timm.create_model("resnet18", num_classes=10)
    theirs.load_state_dict(trunk, strict=False)
    ours = models.resnet18()
    ours.load_state_dict(trunk, strict=False)
    for content in (theirs.state_dict(), {"model": ours.state_dict(), "epoch": 3}):
        found = stored(tmp_path, content)
        assert_same(found.trunk, trunk)
        assert (found.kind, found.head_kind, found.head) == ("torchvision", "none", {})


def test_files_from_before_bn_counted_its_batches(tmp_path: Path, trunk: State) -> None:
    old = {n: t for n, t in trunk.items() if not n.endswith("num_batches_tracked")}
    found = stored(tmp_path, old).trunk
    models.resnet18().load_state_dict(found, strict=False)
    assert_same({n: t for n, t in found.items() if n in old}, old)
    assert {int(t) for n, t in found.items() if n not in old} == {0}


class LightlyHead(nn.Module):
    """As lightly's MoCoProjectionHead: the layers are one attribute further down."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 8))


class LightlyMoCo(nn.Module):
    """As lightly's example: children of a ResNet by number, the key encoder beside it."""

    def __init__(self, resnet: nn.Module) -> None:
        super().__init__()
        self.backbone = nn.Sequential(*list(resnet.children())[:-1])
        self.projection_head = LightlyHead()
        self.backbone_momentum = copy.deepcopy(self.backbone)
        self.projection_head_momentum = LightlyHead()
        for parameter in self.backbone_momentum.parameters():
            parameter.data.add_(1)


def test_lightly_checkpoints(tmp_path: Path, trunk: State) -> None:
    resnet = models.resnet18()
    resnet.load_state_dict(trunk, strict=False)
    module = LightlyMoCo(resnet)
    found = stored(tmp_path, {"epoch": 9, "state_dict": module.state_dict()}, "epoch=9.ckpt")
    assert_same(found.trunk, trunk)
    assert torch.equal(found.head["fc.2.weight"], module.projection_head.layers[2].weight)  # type: ignore[arg-type]
    assert (found.kind, found.head_kind, found.epoch) == ("lightly", "mlp", 9)


def test_lightly_imagenet_benchmark_trains_the_query_encoder(tmp_path: Path, trunk: State) -> None:
    state = prefixed("backbone.", noise(trunk)) | prefixed("query_backbone.", trunk)
    state |= prefixed("projection_head.layers.", noise(MLP))
    state |= prefixed("query_projection_head.layers.", MLP)
    found = stored(tmp_path, {"state_dict": state})
    assert_same(found.trunk, trunk)
    assert_same(found.head, prefixed("fc.", MLP))


def test_lightly_small_resnet(tmp_path: Path, trunk: State) -> None:
    """Its children are numbered without ReLU and pooling, and its stem is 3x3."""
    numbers = {"conv1": "0", "bn1": "1", **{f"layer{i}": str(i + 1) for i in (1, 2, 3, 4)}}
    small = {**trunk, "conv1.weight": torch.randn(64, 3, 3, 3)}
    state = {}
    for name, tensor in small.items():
        first, rest = name.split(".", 1)
        state[f"backbone.{numbers[first]}.{rest.replace('downsample', 'shortcut')}"] = tensor
    found = stored(tmp_path, {"state_dict": state})
    assert_same(found.trunk, small)
    assert (found.architecture.stem, found.kind) == ("cifar", "lightly")


@pytest.mark.parametrize("name", ["backbone", "encoder"])
def test_solo_learn_checkpoints(tmp_path: Path, trunk: State, name: str) -> None:
    state = prefixed(f"{name}.", trunk) | prefixed(f"momentum_{name}.", noise(trunk))
    state |= prefixed("projector.", MLP) | prefixed("momentum_projector.", noise(MLP))
    state |= {"classifier.weight": torch.randn(10, 512), "classifier.bias": torch.randn(10)}
    state |= {"queue": torch.randn(2, 8, 40), "queue_ptr": torch.zeros(1).long()}
    found = stored(tmp_path, {"epoch": 1, "state_dict": state}, "last.ckpt")
    assert_same(found.trunk, trunk)
    assert_same(found.head, prefixed("fc.", MLP))
    assert (found.kind, found.head_kind) == ("solo-learn", "mlp")


def test_solo_learn_stem_with_other_padding_is_said(tmp_path: Path, trunk: State) -> None:
    state = prefixed("backbone.", {**trunk, "conv1.weight": torch.randn(64, 3, 3, 3)})
    found = stored(tmp_path, state | prefixed("projector.", MLP))
    assert "padding 2" in found.describe()


def test_safetensors_and_half_precision(tmp_path: Path, trunk: State) -> None:
    save_file(trunk, tmp_path / "a.safetensors")
    assert_same(read(tmp_path / "a.safetensors").trunk, trunk)
    half = {n: t.half() if t.is_floating_point() else t for n, t in trunk.items()}
    found = stored(tmp_path, half)
    exact = {n: t.float() if t.is_floating_point() else t for n, t in half.items()}
    assert_same(found.trunk, exact)


def test_safetensors_are_written_in_place(
    tmp_path: Path, trunk: State, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No further file of a random name beside it, which a power loss could leave behind."""

    def write(path: Path, put: Callable[[Path], object]) -> None:
        path.touch()
        before = path.stat().st_ino
        put(path)
        assert path.stat().st_ino == before

    monkeypatch.setattr(files, "write", write)
    files.write_safetensors(tmp_path / "a.safetensors", trunk, {"epochs": "3"})
    save_file(trunk, tmp_path / "b.safetensors", {"format": "pt", "epochs": "3"})
    (one, data), (other, wanted) = (_parts(tmp_path / f"{n}.safetensors") for n in "ab")
    assert one == other
    assert data == wanted


def _parts(path: Path) -> tuple[Any, bytes]:
    """Header and tensors of a safetensors file, whose metadata have no order."""
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:end]), content[end:]


@pytest.mark.parametrize("link", [True, False])
def test_our_run_directory_and_checkpoint(run: Path, link: bool) -> None:
    pointer = run / "latest.pth.tar"
    file = pointer.resolve()
    if not link:  # as where the file system has no links
        pointer.unlink()
        pointer.write_text(file.name)
    assert read(pointer).path == read(run).path == file
    found = read(run)
    assert (found.kind, found.epoch, found.head_kind) == ("fastmoco", 2, "mlp")
    assert found.config is not None
    assert "queue_size: 40" in found.config
    state = torch.load(file, weights_only=True)["state_dict"]
    queries = {n.removeprefix("module.encoder_q."): t for n, t in state.items() if "_q." in n}
    assert_same({**found.trunk, **found.head}, queries)


@pytest.mark.parametrize("stem", get_args(Stem))
@pytest.mark.parametrize("arch", sorted(BACKBONES))
def test_every_architecture_is_recognized_by_its_shapes(arch: str, stem: Stem) -> None:
    """At half width as well, but R50w2x at half width is a ResNet-50."""
    for width in (1.0, 0.5):
        built = Architecture(arch, width, stem)
        with torch.device("meta"):
            state = build_encoder(built.config()).state_dict()
        trunk = {n: t for n, t in state.items() if not n.startswith("fc.")}
        same = {
            ("resnet50_w2x", 0.5): ("resnet50", 1.0),
            ("resnet50_w4x", 0.5): ("resnet50_w2x", 1.0),
        }
        name, factor = same.get((arch, width), (arch, width))
        assert recognize(trunk, "x") == Architecture(name, factor, stem)


@pytest.mark.parametrize("stem", get_args(Stem))
@pytest.mark.parametrize("width", [1.0, 0.5])
def test_the_encoder_computes_what_the_trained_one_does(width: float, stem: Stem) -> None:
    """Fresh from the file's tensors, in torchvision's own class where it has the architecture."""
    built = Architecture("resnet18", width, stem)
    trained = build_encoder(built.config())
    for tensor in trained.state_dict().values():
        if tensor.dim() == 1:  # of batch norm: scales, shifts, statistics
            tensor += torch.rand(tensor.shape)
    trunk = {n: t for n, t in trained.state_dict().items() if not n.startswith("fc.")}
    found = built.build(trunk)
    assert (type(found) is models.ResNet) == (width == 1)
    x = torch.randn(2, 3, 32, 32).double()
    with torch.no_grad():
        torch.testing.assert_close(found.double()(x), trained.double().eval().trunk(x))


def refused(content: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as error:
        interpreted(content)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_partial_matches_name_what_is_wrong(trunk: State) -> None:
    short = {n: t for n, t in trunk.items() if not n.startswith("layer4.1.")}
    sentence = refused(short)
    assert "nearest is resnet18" in sentence
    assert "missing: layer4.1.conv1.weight, layer4.1.bn1.weight" in sentence
    assert "and 9 more" in sentence
    extra = {**trunk, "layer1.0.se.fc1.weight": torch.randn(4, 64)}
    assert "not part of it: layer1.0.se.fc1.weight" in refused(extra)
    wide = {**trunk, "layer2.0.conv1.weight": torch.randn(128, 64, 5, 5)}
    assert "layer2.0.conv1.weight (128, 64, 5, 5) instead of" in refused(wide)
    odd = {**trunk, "conv1.weight": torch.randn(64, 3, 5, 5)}
    assert "conv1.weight (64, 3, 5, 5) instead of (64, 3, 7, 7)" in refused(odd)
    deep = timm.create_model("resnet18d").state_dict()
    assert "conv1.0.weight" in refused(deep)
    with torch.device("meta"):
        unknown = models.resnet152().state_dict()
    assert "nearest is resnet101" in refused(unknown)


def test_nothing_matches(trunk: State) -> None:
    vit = {"patch_embed.weight": torch.randn(4, 3, 2, 2), "blocks.0.norm1.weight": torch.ones(4)}
    sentence = refused({"model": vit})
    assert "none of its 2 names (patch_embed.weight, blocks.0.norm1.weight)" in sentence
    assert "none of its 0 names" in refused({"epoch": 3})
    keys = prefixed("module.encoder_k.", trunk)
    assert "module.encoder_k.conv1.weight" in refused({"state_dict": keys})


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["layer3.1.conv2.weight", "bn1.running_var"])
def test_weights_of_a_run_that_diverged_are_refused(trunk: State, name: str, value: float) -> None:
    """Their features would still have neighbours, and kNN an accuracy."""
    broken = {**trunk, name: trunk[name].clone()}
    broken[name].view(-1)[-1] = value
    with pytest.raises(ConfigError, match=f"weights.pth holds NaN or infinite values, in {name}:"):
        interpreted(broken)


def test_two_encoders_that_claim_the_same_names(trunk: State) -> None:
    twice = prefixed("model.backbone.", trunk) | prefixed("backbone.", trunk)
    assert_same(interpreted(twice).trunk, trunk)  # one module under two names
    two = prefixed("model.", trunk) | prefixed("backbone.", noise(trunk))
    assert "both mean conv1.weight" in refused(two)


class Explosive:
    """Runs code when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


def test_no_file_can_run_code(tmp_path: Path, trunk: State) -> None:
    mark = tmp_path / "executed"
    with pytest.raises(ConfigError, match="more than tensors"):
        stored(tmp_path, {**trunk, "extra": Explosive(mark)})
    (tmp_path / "detectron2.pkl").write_bytes(pickle.dumps({"model": Explosive(mark)}))
    with pytest.raises(ConfigError, match="cannot be read"):
        read(tmp_path / "detectron2.pkl")
    assert not mark.exists()


def test_missing_damaged_and_empty(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        read(tmp_path / "no.pth")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="holds no weights"):
        read(tmp_path / "empty")
    for name in ("half.pth", "half.safetensors"):
        (tmp_path / name).write_bytes(b"half a file")
        with pytest.raises(ConfigError, match="damaged"):
            read(tmp_path / name)
    with pytest.raises(ConfigError, match="holds a list"):
        stored(tmp_path, [torch.zeros(1)])
