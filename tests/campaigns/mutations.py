"""Ways in which a file is damaged, foreign or hostile. Each takes its path and a generator."""

from __future__ import annotations

import os
import pickle
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fastmoco.weights.checksums import CHECKSUMS, OURS, checksums

Mutation = Callable[[Path, random.Random], None]
EXECUTED = "EXECUTED"
"""Name of the file that hostile code would leave beside the file that it is in."""


def flip(path: Path, draw: random.Random) -> None:
    """One bit."""
    data = bytearray(path.read_bytes())
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    _overwrite(path, bytes(data))


def cut(path: Path, draw: random.Random) -> None:
    """A beginning of it."""
    _overwrite(path, path.read_bytes()[: draw.randrange(path.stat().st_size)])


def empty(path: Path, draw: random.Random) -> None:
    """Nothing in it."""
    _overwrite(path, b"")


def zeros(path: Path, draw: random.Random) -> None:
    """A block of zeros in it, as after a power loss."""
    data = bytearray(path.read_bytes())
    at, size = draw.randrange(len(data)), draw.randrange(1, 4096)
    data[at : at + size] = bytes(len(data[at : at + size]))
    _overwrite(path, bytes(data))


def noise(path: Path, draw: random.Random) -> None:
    """Random bytes, as many as before."""
    _overwrite(path, draw.randbytes(path.stat().st_size))


def more(path: Path, draw: random.Random) -> None:
    """Random bytes after its end."""
    _overwrite(path, path.read_bytes() + draw.randbytes(draw.randrange(1, 3000)))


def page(path: Path, draw: random.Random) -> None:
    """What a download through a login page gives."""
    _overwrite(path, b"<!DOCTYPE html>\n<html><body>Please log in</body></html>\n")


def deep(path: Path, draw: random.Random) -> None:
    """Lists in lists, as JSON and as YAML."""
    _overwrite(path, b"[" * 50_000)


def laughs(path: Path, draw: random.Random) -> None:
    """YAML whose aliases stand for ten million words."""
    lines = ["a0: &a0 [lol]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 8)]
    _overwrite(path, "\n".join(lines).encode())


def tagged(path: Path, draw: random.Random) -> None:
    """YAML that calls a function where a loader lets it."""
    mark = path.with_name(EXECUTED)
    _overwrite(path, f'run: !!python/object/apply:os.mkdir ["{mark}"]\n'.encode())


def classed(path: Path, draw: random.Random) -> None:
    """YAML that names a class to build, as jsonargparse reads it."""
    mark = path.with_name(EXECUTED)
    text = f'run:\n  class_path: os.mkdir\n  init_args:\n    path: "{mark}"\n'
    _overwrite(path, text.encode())


def folder(path: Path, draw: random.Random) -> None:
    """A folder of its name."""
    path.unlink()
    path.mkdir()


def fifo(path: Path, draw: random.Random) -> None:
    """A pipe of its name, which nobody writes."""
    path.unlink()
    os.mkfifo(path)


def endless(path: Path, draw: random.Random) -> None:
    """A link to a file without end."""
    path.unlink()
    path.symlink_to("/dev/zero")


def nowhere(path: Path, draw: random.Random) -> None:
    """A link to nothing."""
    path.unlink()
    path.symlink_to(path.with_name("nowhere"))


def swapped(path: Path, draw: random.Random) -> None:
    """The contents of another file beside it."""
    others = sorted(p for p in path.parent.iterdir() if p.is_file() and p.resolve() != path)
    shutil.copy(draw.choice(others), path)


class _Calls:
    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self._path),)


def pickled(path: Path, draw: random.Random) -> None:
    """A pickle that calls a function."""
    _overwrite(path, pickle.dumps(_Calls(path.with_name(EXECUTED))))


def saved_code(path: Path, draw: random.Random) -> None:
    """The same in a file of `torch.save`."""
    torch.save({"state_dict": _Calls(path.with_name(EXECUTED))}, path)


def _tensor(content: dict[str, Any], draw: random.Random) -> tuple[dict[str, Any], str]:
    state = content["state_dict"]
    names = [name for name, tensor in state.items() if tensor.is_floating_point() and tensor.dim()]
    return state, draw.choice(sorted(names))


def _rewriting(change: Callable[[Any, str], None], *, checked: bool) -> Mutation:
    """A change of one tensor; checked: with checksums that fit, as another program writes them."""

    def mutate(path: Path, draw: random.Random) -> None:
        content = torch.load(path, weights_only=True)
        change(*_tensor(content, draw))
        if checked:
            content[OURS][CHECKSUMS] = checksums(content)
        torch.save(content, path)

    return mutate


def _nan(state: Any, name: str) -> None:
    state[name].reshape(-1)[0] = float("nan")


def _half(state: Any, name: str) -> None:
    state[name] = state[name].half()


def _shape(state: Any, name: str) -> None:
    state[name] = state[name].reshape(-1)[:-1].clone()


def _gone(state: Any, name: str) -> None:
    del state[name]


def _value(state: Any, name: str) -> None:
    state[name].reshape(-1)[0] += 1


def _text(state: Any, name: str) -> None:
    state[name] = "a text"


def _overwrite(path: Path, data: bytes) -> None:
    path.write_bytes(data)


BYTES: dict[str, Mutation] = {
    "a bit flipped": flip,
    "cut off": cut,
    "empty": empty,
    "a block of zeros": zeros,
    "noise": noise,
    "bytes added": more,
    "a web page": page,
    "another file of the run": swapped,
    "pickled code": pickled,
}
NAMES: dict[str, Mutation] = {
    "a folder": folder,
    "a pipe": fifo,
    "a link to /dev/zero": endless,
    "a link to nothing": nowhere,
}
TEXT: dict[str, Mutation] = {
    "deep nesting": deep,
    "aliases of ten million words": laughs,
    "a YAML tag with code": tagged,
    "a class to build": classed,
}
TENSORS: dict[str, Mutation] = {
    "NaN": _rewriting(_nan, checked=False),
    "NaN, new checksums": _rewriting(_nan, checked=True),
    "fp16": _rewriting(_half, checked=False),
    "fp16, new checksums": _rewriting(_half, checked=True),
    "another shape": _rewriting(_shape, checked=True),
    "a tensor gone": _rewriting(_gone, checked=True),
    "another value": _rewriting(_value, checked=False),
    "a text for a tensor": _rewriting(_text, checked=True),
    "code in torch.save": saved_code,
}
