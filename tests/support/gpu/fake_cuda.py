"""Trace the step for CUDA without a GPU: fake tensors, a fake process group, no driver.

Test only, and in a process of its own: it replaces functions of torch and one slot of a C++ table
whose layout belongs to torch 2.14. What it proves is what is traced: graphs, layouts, collectives,
copies to the host. Nothing runs, so numbers, speed and stream order stay open.
"""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
import types
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._dynamo import device_interface
from torch._dynamo.device_interface import CudaInterface
from torch._inductor import config as inductor_config
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

# Operations that bring a value or a number of elements to the host, by their ATen names.
SYNCHRONIZING = {
    "aten._local_scalar_dense",
    "aten.nonzero",
    "aten.equal",
    "aten.is_nonzero",
    "aten.masked_select",
    "aten._unique2",
}
# cuDNN convolves in channels-last as soon as one operand lies so.
_FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}
_SLOTS = 80
_HAS_PRIMARY_CONTEXT = 4
_alive: list[object] = []


def allow_backward_without_driver() -> None:
    """Let the autograd engine run on fake CUDA tensors.

    Before a backward the engine asks the CUDA hooks whether a device has a context, and the hooks
    assert that there is a device. The hooks object gets a copy of its virtual table in which this
    one question is answered with no.
    """
    if _alive or torch.cuda.device_count() > 0:
        return
    word = ctypes.sizeof(ctypes.c_void_p)
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
    get_hooks = library._ZN2at6detail12getCUDAHooksEv
    get_hooks.restype = ctypes.c_void_p
    slot = ctypes.c_void_p.from_address(get_hooks())
    table = (ctypes.c_void_p * (_SLOTS + 2))()  # two words of type information stand before it
    assert slot.value is not None
    ctypes.memmove(table, slot.value - 2 * word, (_SLOTS + 2) * word)
    no = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p, ctypes.c_int8)(
        lambda hooks, device: False
    )
    table[2 + _HAS_PRIMARY_CONTEXT] = ctypes.cast(no, ctypes.c_void_p).value
    _alive.extend((table, no))
    slot.value = ctypes.addressof(table) + 2 * word


def _convolution_format(image: Tensor, weight: Tensor, backend: object) -> torch.memory_format:
    """Memory format of a convolution's output; without a device torch assumes a slow kernel."""
    wanted = _FORMATS.get(image.dim())
    if wanted is None:
        return torch.contiguous_format
    lies_so = [
        t.is_contiguous(memory_format=wanted) and not t.is_contiguous() for t in (image, weight)
    ]
    return wanted if any(lies_so) else torch.contiguous_format


PROPERTIES: dict[str, dict[str, Any]] = {
    "A100": {"name": "NVIDIA A100", "major": 8, "minor": 0, "multi_processor_count": 108},
    "H100": {"name": "NVIDIA H100", "major": 9, "minor": 0, "multi_processor_count": 132},
}


@contextmanager
def cuda_without_device(gpu: str = "H100") -> Iterator[None]:
    """Answer what torch asks about devices as if one `gpu` were there."""
    properties = types.SimpleNamespace(
        **PROPERTIES[gpu],
        total_memory=80 << 30,
        warp_size=32,
        regs_per_multiprocessor=65536,
        max_threads_per_multi_processor=2048,
        max_threads_per_block=1024,
    )
    capability = (properties.major, properties.minor)
    answers: dict[str, Callable[..., Any]] = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "_lazy_init": lambda: None,
        "get_device_properties": lambda device=None: properties,
        "get_device_capability": lambda device=None: capability,
        "is_bf16_supported": lambda including_emulation=True: True,
        "is_current_stream_capturing": lambda: False,
        "get_rng_state": lambda device="cuda": torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": lambda *a, **k: None,
        "_exchange_device": lambda device: 0,
        "_maybe_exchange_device": lambda device: 0,
    }
    with ExitStack() as stack:
        for name, answer in answers.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, answer))
        for name in ("_cuda_getDevice", "_cuda_exchangeDevice", "_cuda_maybeExchangeDevice"):
            zero = mock.patch.object(torch._C, name, create=True, return_value=0)
            stack.enter_context(zero)
        # That a device is available must not make fake tensors touch it.
        untouched = property(lambda mode: True)
        stack.enter_context(mock.patch.object(FakeTensorMode, "avoid_device_init", untouched))
        stack.enter_context(
            mock.patch.object(
                torch._C, "_conv_determine_backend_memory_format", _convolution_format
            )
        )
        stack.enter_context(mock.patch.object(Tensor, "pin_memory", _pinned))
        FakeTensorMode.cache_clear()  # it may hold layouts from before
        yield


@contextmanager
def inductor_without_device() -> Iterator[None]:
    """Inside `cuda_without_device`: Inductor writes code for that GPU; nothing compiles it."""
    properties = torch.cuda.get_device_properties()
    capability = 10 * properties.major + properties.minor
    answers: list[tuple[Any, str, Any]] = [
        (CudaInterface, "get_device_properties", staticmethod(lambda device=None: properties)),
        (CudaInterface, "get_compute_capability", staticmethod(lambda device=None: capability)),
        (torch.utils._triton, "triton_hash_with_backend", lambda: ""),  # asks the driver
    ]
    device_interface.caching_worker_device_properties["cuda"] = [properties]
    device_interface.caching_worker_current_devices["cuda"] = 0
    # Constants are folded by computing them, on the device.
    with ExitStack() as stack:
        for owner, name, answer in answers:
            stack.enter_context(mock.patch.object(owner, name, answer))
        stack.enter_context(
            inductor_config.patch(joint_graph_constant_folding=False, compile_threads=1)
        )
        yield


def _pinned(tensor: Tensor) -> Tensor:
    """An alias that the watch takes for page-locked memory."""
    alias = tensor.detach()
    alias.__dict__["pinned"] = True
    return alias


@contextmanager
def fake_world(size: int) -> Iterator[None]:
    """A process group of `size` ranks of which only this one exists; collectives do nothing."""
    store = FakeStore()
    dist.init_process_group("fake", store=store, rank=0, world_size=size)
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextmanager
def absent_gpus(ranks: int) -> Iterator[None]:
    """A machine of H100s for whoever traces and compiles; one of `ranks` ranks is here."""
    allow_backward_without_driver()
    torch.autograd.set_multithreading_enabled(False)
    with ExitStack() as stack:
        stack.enter_context(cuda_without_device())
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        if ranks > 1:
            stack.enter_context(fake_world(ranks))
        stack.enter_context(inductor_without_device())
        yield


def to_fake_cuda_(module: nn.Module) -> None:
    """Replace every parameter and buffer by a fake CUDA tensor of the same shape and strides.

    Call it inside a `FakeTensorMode`: the module is built as always, on the CPU, and keeps the
    memory formats that it really has.
    """
    for child in module.modules():
        both: list[dict[str, Any]] = [child._parameters, child._buffers]
        for tensors in both:
            for name, t in list(tensors.items()):
                if t is None:
                    continue
                fake = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="cuda")
                is_parameter = isinstance(t, nn.Parameter)
                tensors[name] = nn.Parameter(fake, t.requires_grad) if is_parameter else fake


class Watch(TorchDispatchMode):
    """Counts operations by name and collects those for which the host waits.

    These are: a value that is read (`.item()`), a number of elements that depends on values (masks,
    `nonzero`), a copy to the host, and a copy to the device that is not both asynchronous and from
    page-locked memory. Where everything is on the CPU there are no copies to see. A custom op is
    one operation. Compiled code does not run under a dispatch mode. Convolutions that are not in
    channels-last are collected too.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts: Counter[str] = Counter()
        self.host_syncs: list[str] = []
        self.other_layouts: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = str(func).removesuffix(".default")
        self.counts[name] += 1
        waits = _copies_to_host(name, args, out) or _copies_from_pageable(name, args, kwargs, out)
        if name in SYNCHRONIZING or waits or _selects(name, args):
            self.host_syncs.append(name)
        if "convolution" in name:
            images = [a for a in args if isinstance(a, Tensor) and a.dim() == 4]
            if not all(_is_channels_last(t) for t in images):
                self.other_layouts.append(f"{name} {[t.shape for t in images]}")
        return out


def _copies_to_host(name: str, args: tuple[Any, ...], out: Any) -> bool:
    if name == "aten.copy_":
        return bool(args[0].device.type == "cpu" and args[1].device.type == "cuda")
    if not isinstance(out, Tensor) or out.device.type != "cpu":
        return False
    return any(isinstance(a, Tensor) and a.device.type == "cuda" for a in args)


def _copies_from_pageable(
    name: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any
) -> bool:
    if name == "aten.copy_":
        there, source, asynchronous = args[0], args[1], args[2:3] == (True,)
    elif name == "aten._to_copy":
        there, source, asynchronous = out, args[0], False
    else:
        return False
    asynchronous = asynchronous or kwargs.get("non_blocking", False)
    crosses = bool(source.device.type == "cpu" and there.device.type == "cuda")
    return crosses and not (asynchronous and _is_pinned(source))


def _is_pinned(tensor: Tensor) -> bool:
    """Whether a tensor lies in page-locked memory; a fake one carries that as an attribute."""
    if isinstance(tensor, FakeTensor) or "pinned" in tensor.__dict__:
        return bool(tensor.__dict__.get("pinned", False))
    return tensor.is_pinned()


def _selects(name: str, args: tuple[Any, ...]) -> bool:
    """Whether a mask decides how many elements there will be."""
    if not name.startswith(("aten.index.", "aten.index_put")):
        return False
    return any(isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8) for i in args[1])


def _is_channels_last(t: Tensor) -> bool:
    # A 1x1 kernel or a single channel is both at once.
    return t.is_contiguous(memory_format=torch.channels_last)


def printed_by(module: str, *arguments: str) -> dict[str, Any]:
    """The JSON of the last line that a module prints which fakes a GPU in a process of its own."""
    root = Path(__file__).resolve().parents[3]
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(root), str(root / "kernels")])},
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found
