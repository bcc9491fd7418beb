"""Start a run from weights that exist already: `model.init_from`."""

from __future__ import annotations

import torch

from fastmoco.config import Config, ConfigError
from fastmoco.moco import MoCo
from fastmoco.weights.read import read


@torch.no_grad()
def start_from(config: Config, moco: MoCo) -> str:
    """Load `model.init_from` into both encoders in place; one line that says what was loaded.

    The projection head is taken over where the file has one of the same kind and size. The queue
    stays random.

    Raises `ConfigError` if the file cannot be read, is incomplete, or holds another architecture or
    stem than this run's.
    """
    weights = read(config.model.init_from)
    there, here = (weights.arch, weights.stem), (config.model.arch, config.model.stem)
    if there != here:
        raise ConfigError(
            f"model.init_from names {weights.path}, which holds {there[0]} with the {there[1]} "
            f"stem, but this run trains {here[0]} with the {here[1]} stem: set model.arch and "
            "model.stem to the file's."
        )
    state = moco.encoder_q.state_dict()
    ours = {name: tensor.shape for name, tensor in state.items() if name.startswith("fc.")}
    fits = ours == {name: tensor.shape for name, tensor in weights.head.items()}
    state |= weights.trunk | (weights.head if fits else {})
    for encoder in (moco.encoder_q, moco.encoder_k):
        encoder.load_state_dict(state)
    head = "trunk and head" if fits else "trunk; the head starts at random"
    return f"weights   {head} from {weights.describe()}"
