"""The Python door: `fastmoco.train`, `fastmoco.Config` and `fastmoco.load_encoder`."""

from __future__ import annotations

import doctest
import os
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torchvision.models import ResNet

import fastmoco
from fastmoco.config import (
    AugmentConfig,
    ConfigError,
    DataConfig,
    MocoConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
)
from fastmoco.machine import stopping
from fastmoco.method.moco import build_moco

ROOT = Path(__file__).resolve().parent.parent


def tiny(folder: Path, **run: int) -> fastmoco.Config:
    return fastmoco.Config(
        run=RunConfig(dir=folder, device="cpu", **run),  # type: ignore[arg-type]
        data=DataConfig(source="synthetic", synthetic_samples=16),
        augment=AugmentConfig(image_size=32),
        model=ModelConfig(arch="resnet18", dim=8),
        moco=MocoConfig(queue_size=32, bn_group_size=2),
        optim=OptimConfig(global_batch_size=8),
    )


def handlers() -> list[object]:
    return [signal.getsignal(name) for name in (signal.SIGINT, signal.SIGTERM)]


def test_the_example_of_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    failed, tried = doctest.testmod(fastmoco)
    assert (failed, tried) == (0, 8)


ORDERS = {
    "the package": "import fastmoco as f; t = f.train",
    "the module first": "import fastmoco.train; import fastmoco as f; t = f.train",
    "the function first": "import fastmoco as f; t = f.train; import fastmoco.train; t = f.train",
    "from the package": "from fastmoco import train as t",
    "from the module": "from fastmoco.train import main; import fastmoco as f; t = f.train",
    "a name for the module": "import fastmoco.train as t",
}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks a process per order of imports")
def test_train_is_a_function_and_a_module_in_any_order() -> None:
    code = f"""
import os, sys
import fastmoco.run.checkpoint, fastmoco.doctor.findings, fastmoco.run.curves  # all but train

assert "fastmoco.train" not in sys.modules
for name, order in {ORDERS!r}.items():
    child = os.fork()
    if not child:
        try:
            exec(order)
            import fastmoco.api
            fastmoco.api.train = lambda config: ("trained", config)
            ok = t(7) == ("trained", 7) and callable(t.main) and sys.modules["fastmoco.train"] is t
        except BaseException as error:
            print(name, repr(error))
            ok = False
        sys.stdout.flush()
        os._exit(0 if ok else 1)
    assert os.waitpid(child, 0)[1] == 0, name
"""
    subprocess.run([sys.executable, "-c", code], check=True, env=environment())


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}


def test_importing_it_imports_nothing_large() -> None:
    code = (
        "import sys, fastmoco; assert {'train', 'Config', 'load_encoder'} <= set(dir(fastmoco));"
        "print(*{name.split('.')[0] for name in sys.modules})"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=True
    )
    loaded = set(done.stdout.split())
    assert not loaded & {"torch", "torchvision", "numpy", "jsonargparse", "yaml", "matplotlib"}
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        fastmoco.trian  # noqa: B018


def test_twice_in_a_process_and_in_a_thread(tmp_path: Path) -> None:
    """The second call resumes the first; signals, threads and random state are as before."""
    before, threads, random = handlers(), torch.get_num_threads(), torch.get_rng_state()
    first = fastmoco.train(tiny(tmp_path / "run", max_steps=2))
    assert first.metrics["step"] == 2
    results: list[fastmoco.api.Trained] = []

    def second() -> None:
        results.append(fastmoco.train(tiny(tmp_path / "run", max_steps=3)))

    thread = threading.Thread(target=second)
    thread.start()
    thread.join()
    (result,) = results
    assert (result.folder, result.metrics["step"], result.finished) == (tmp_path / "run", 3, True)
    assert {"loss", "lr", "pretext_top1", "epoch"} <= result.metrics.keys()
    assert handlers() == before
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), random)
    assert not torch.distributed.is_initialized()


def test_errors_are_exceptions_and_leave_nothing_behind(tmp_path: Path) -> None:
    before = handlers()
    good = tiny(tmp_path)
    for config, part in (
        (replace(good, optim=replace(good.optim, accumulate=3)), "divisible"),
        (replace(good, model=replace(good.model, arch="resnet19")), "model.arch"),  # type: ignore[arg-type]
        (replace(good, moco=replace(good.moco, queue_size="many")), "moco.queue_size"),  # type: ignore[arg-type]
        (replace(good, optim=None), "optim is None, but must be of type OptimConfig"),  # type: ignore[arg-type]
        ({"run.dir": "x"}, "not a dict"),
    ):
        with pytest.raises(ConfigError, match=part) as caught:
            fastmoco.train(config)  # type: ignore[arg-type]
        assert "\n" not in str(caught.value)
    with pytest.raises(fastmoco.run.progress.DivergedError):
        fastmoco.train(replace(good, optim=replace(good.optim, lr=1e30)))
    assert handlers() == before


def test_a_script_without_a_guard_is_told_so(tmp_path: Path) -> None:
    """Rendering the demo starts processes, each of which runs the script again."""
    script = tmp_path / "script.py"
    script.write_text(
        "import fastmoco\nfrom fastmoco.config import DataConfig\n"
        "try:\n    fastmoco.train(fastmoco.Config(data=DataConfig(source='demo')))\n"
        "except fastmoco.config.ConfigError as error:\n    print('REFUSED', error)\n"
    )
    done = subprocess.run(
        [sys.executable, str(script)],
        env={**environment(), "FASTMOCO_CACHE": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert "REFUSED A process that was to read or render images died" in done.stdout
    assert '`if __name__ == "__main__":` in a script' in done.stderr
    assert "Traceback" not in done.stderr


def test_signals_ask_to_stop_and_get_their_handlers_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def mine(*_: object) -> None:
        raise AssertionError("the handler from outside")

    monkeypatch.setattr(stopping, "ONE_REQUEST_S", 1e9)
    previous = signal.signal(signal.SIGINT, mine)
    try:
        with stopping.StopRequest() as request:
            request.patient = True
            assert not request.made
            for name in (signal.SIGINT, signal.SIGTERM, signal.SIGINT):  # one key press
                signal.raise_signal(name)
            assert request.made
            monkeypatch.setattr(stopping, "ONE_REQUEST_S", -1.0)
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is mine
    finally:
        signal.signal(signal.SIGINT, previous)


@pytest.mark.parametrize(
    ("arch", "stem", "width"),
    [("resnet18", "imagenet", 1.0), ("resnet18", "cifar", 1.0), ("resnet18", "imagenet", 0.5)],
)
def test_encoder_is_the_trunk(tmp_path: Path, arch: str, stem: str, width: float) -> None:
    """torchvision's class computes what our encoder computes in evaluation mode."""
    model = ModelConfig(arch=arch, stem=stem, width=width, dim=8)  # type: ignore[arg-type]
    config = replace(tiny(tmp_path), model=model)
    moco = build_moco(config, 0, torch.device("cpu"))
    images = torch.randn(4, 3, 32, 32)
    for _ in range(2):
        moco.encoder_q(images)  # moves the running statistics away from their start
    state = {f"module.{name}": t.detach().clone() for name, t in moco.state_dict().items()}
    file = tmp_path / "official.pth.tar"  # as the official scripts write it: nothing of ours
    torch.save({"epoch": 1, "arch": arch, "state_dict": state, "optimizer": {}}, file)
    random = torch.get_rng_state()
    encoder = fastmoco.load_encoder(file)
    assert torch.equal(torch.get_rng_state(), random)
    assert type(encoder) is ResNet or width != 1
    assert not encoder.training
    assert all(p.requires_grad and p.device.type == "cpu" for p in encoder.parameters())
    features = encoder(images)
    assert features.shape == (4, round(512 * width))
    expected = moco.eval().encoder_q.trunk(images)
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-5)


def test_what_is_no_encoder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nowhere does not exist"):
        fastmoco.load_encoder(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="holds no weights yet"):
        fastmoco.load_encoder(tmp_path)
    text = tmp_path / "text.pth.tar"
    text.write_text("no checkpoint")
    with pytest.raises(ConfigError, match="cannot be read as weights"):
        fastmoco.load_encoder(text)
    torch.save({"arch": "resnet18", "state_dict": {}}, text)
    with pytest.raises(ConfigError, match="none of its 0 names"):
        fastmoco.load_encoder(text)
