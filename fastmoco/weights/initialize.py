"""Start a run from weights that exist already: `model.init_from`."""

from __future__ import annotations

import torch

from fastmoco.config import Config, ConfigError
from fastmoco.method.moco import MoCo
from fastmoco.weights.architecture import Architecture, shapes
from fastmoco.weights.read import read


@torch.no_grad()
def start_from(config: Config, moco: MoCo) -> str:
    """Load `model.init_from` into both encoders in place; one line that says what was loaded.

    The projection head is taken over where the file has one of the same kind and size. The queue
    stays random.

    Raises `ConfigError` if the file cannot be read, is incomplete, or holds another architecture
    than this run's.
    """
    weights = read(config.model.init_from)
    model = config.model
    here = Architecture(model.arch, model.width, model.stem, config.data.channels)
    if shapes(here) != shapes(weights.architecture):
        raise ConfigError(
            f"model.init_from names {weights.path}, a {weights.architecture}, but this run trains "
            f"a {here}: set model.arch, model.width, model.stem and data.channels to the file's."
        )
    state = moco.encoder_q.state_dict()
    ours = {name: tensor.shape for name, tensor in state.items() if name.startswith("fc.")}
    fits = ours == {name: tensor.shape for name, tensor in weights.head.items()}
    state |= weights.trunk | (weights.head if fits else {})
    for encoder in (moco.encoder_q, moco.encoder_k):
        encoder.load_state_dict(state)
    head = "" if fits else ", without its head"
    return f"weights   start as {weights.describe()}{head}"
