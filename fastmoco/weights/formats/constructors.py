"""What torchvision and timm call our architectures, and the lines that load an exported trunk."""

from __future__ import annotations

from pathlib import Path

from fastmoco.weights.architecture import NETWORKS, Architecture

# Where the name differs from ours.
TORCHVISION_CALLS = {
    "resnext50_32x8d": "torchvision.models.ResNet(torchvision.models.resnet.Bottleneck, "
    "[3, 4, 6, 3], groups=32, width_per_group=8)",
}
TIMM_NAMES = {arch: arch for arch in NETWORKS} | {"resnext50_32x8d": "resnext50_32x4d"}
TIMM_ARGUMENTS: dict[str, dict[str, int]] = {"resnext50_32x8d": {"base_width": 8}}


def timm_call(arch: str) -> str:
    """The call of timm that builds the trunk of `arch`, which must be in `TIMM_NAMES`."""
    options = {**TIMM_ARGUMENTS.get(arch, {}), "num_classes": 0}
    written = ", ".join(f"{name}={value}" for name, value in options.items())
    return f'timm.create_model("{TIMM_NAMES[arch]}", {written})'


def loading_lines(architecture: Architecture, path: Path, library: str) -> list[str]:
    """Lines of Python that load the trunk at `path` into a model of `library`, strictly.

    `library` is torchvision or timm; for what they do not have, the lines are fastmoco's. Neither
    has the cifar stem as an option, so one line more replaces two layers.
    """
    arch = architecture.arch
    if not architecture.is_common:
        return [f'model = fastmoco.load_encoder("{path}")']
    load = "safetensors.torch.load_file" if path.suffix == ".safetensors" else "torch.load"
    option = "" if path.suffix == ".safetensors" else ", weights_only=True"
    plain = TORCHVISION_CALLS.get(arch, f"torchvision.models.{arch}()")
    made = plain if library == "torchvision" else timm_call(arch)
    lines = [f"model = {made}"]
    if library == "torchvision":
        lines.append("model.fc = torch.nn.Identity()")
    channels = architecture.channels
    if architecture.stem == "cifar":
        first = f"torch.nn.Conv2d({channels}, 64, 3, padding=1, bias=False)"
        lines.append(f"model.conv1, model.maxpool = {first}, torch.nn.Identity()")
    elif channels != 3:
        first = f"torch.nn.Conv2d({channels}, 64, 7, stride=2, padding=3, bias=False)"
        lines.append(f"model.conv1 = {first}")
    return [*lines, f'model.load_state_dict({load}("{path}"{option}))']
