"""The loader: the right samples and rows, on any number of ranks, from any step."""

from __future__ import annotations

import functools
import pickle
import subprocess
import sys
import tomllib
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch

from fastmoco.config import AugmentConfig, Config, ConfigError, DataConfig, OptimConfig, RunConfig
from fastmoco.data.backends import choose as loaders
from fastmoco.data.backends import workers
from fastmoco.data.backends.choose import has_dali
from fastmoco.data.backends.pil import execute
from fastmoco.data.batch import Batch
from fastmoco.data.loader import build_loader
from fastmoco.data.order import EpochOrder, permute
from fastmoco.data.pixels.rule import RGB8
from fastmoco.data.table import draw_uniforms, view_table
from fastmoco_kernels import photometric
from tests.support.data.boxes import PIL_OF_TODAY
from tests.support.data.images import open_rgb

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
needs_dali = pytest.mark.skipif(not has_dali(), reason="DALI is not installed")
BACKENDS = ["pil", "array", "nvjpeg", pytest.param("dali", marks=needs_dali)]


def configuration(root: Path, tmp_path: Path, backend: str = "pil", **optim: int) -> Config:
    return Config(
        run=RunConfig(dir=str(tmp_path / "run"), seed=11),
        data=DataConfig(root=str(root), backend=backend, workers=2),  # type: ignore[arg-type]
        augment=AugmentConfig(image_size=32),
        optim=OptimConfig(**({"global_batch_size": 16} | optim)),  # type: ignore[arg-type]
    )


def drawn(config: Config, start: int, end: int, **build: object) -> list[Batch]:
    with build_loader(config, device=CPU, **build) as loader:  # type: ignore[arg-type]
        return list(loader.batches(start, end))


def same(a: list[Batch], b: list[Batch]) -> bool:
    return len(a) == len(b) and all(
        torch.equal(x.im_q, y.im_q) and torch.equal(x.im_k, y.im_k)
        for x, y in zip(a, b, strict=True)
    )


# A permutation of 16 rows keyed with the micro-batch; readers need not import this file for it.
rolled = functools.partial(permute, np.arange(16), 16)


def oracle(config: Config, root: Path, step: int, view: int) -> torch.Tensor:
    """The global batch of a step, written out: files in sorted order, one row after another."""
    files = sorted(root.rglob("*.jpg"), key=lambda path: (str(path.parent), path.name))
    batch = config.optim.global_batch_size
    epoch, nth = divmod(step, len(files) // batch)
    views = []
    for position in range(nth * batch, (nth + 1) * batch):
        sample = int(EpochOrder(len(files), 11).samples(epoch, np.array([position]))[0])
        image = open_rgb(files[sample].read_bytes())
        uniforms = draw_uniforms(11, epoch, view, position, 1)
        table = view_table(config.augment, uniforms, np.array([image.size], np.int32))
        views.append(torch.from_numpy(execute(image, table, 0, 32, "v2").copy()))
    return torch.stack(views)


@pytest.mark.parametrize("backend", ["pil", "nvjpeg"])
def test_batches_are_the_oracles(photos: Path, tmp_path: Path, backend: str) -> None:
    """All of nvJPEG's but its decoder."""
    config = configuration(photos, tmp_path, backend)
    batches = drawn(config, 0, 5)  # 3 steps per epoch: the last batches are of epoch 1
    for step, batch in enumerate(batches):
        assert batch.im_q.dtype == torch.uint8
        assert batch.im_q.shape == (16, 32, 32, 3)
        for view, found in enumerate((batch.im_q, batch.im_k)):
            wrong = (found.float() - oracle(config, photos, step, view).float()).abs()
            assert wrong.max() <= (0 if backend == "pil" or PIL_OF_TODAY else 16)
            assert wrong.mean() < 0.5


@pytest.mark.parametrize("key_rows", [None, rolled])
def test_views_whose_colours_a_device_makes_are_the_oracles_but_for_the_resize(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key_rows: object
) -> None:
    """Several parts of 6 samples, which arrive as crops and rows; 16 is no multiple of 6."""
    monkeypatch.setattr(workers, "_PART", 6)
    config = configuration(photos, tmp_path, "array")
    finished = drawn(config, 0, 2, key_rows=key_rows)
    monkeypatch.setattr(workers, "leaves_colours", lambda *_: True)
    with mock.patch.object(workers, "photometric", wraps=photometric) as op:
        batches = drawn(config, 0, 2, key_rows=key_rows)
    assert op.call_count == 2  # both views of a batch at once
    for step, batch in enumerate(batches):
        assert batch.im_q.shape == batch.im_k.shape == (16, 32, 32, 3)
        assert np.array_equal(batch.replaced, finished[step].replaced)
        wrong = (batch.im_q.float() - oracle(config, photos, step, 0).float()).abs()
        assert wrong.mean() < 0.25
        assert wrong.mean(dim=(1, 2, 3)).max() < 1
        wrong = (batch.im_k.float() - finished[step].im_k.float()).abs()
        assert wrong.mean() < 0.1  # whose boxes have weights of 8 bits
    one_view = drawn(config, 0, 1, labelled=True)[0]
    assert torch.equal(one_view.im_q, batches[0].im_q)
    assert one_view.im_k.shape == (0, 32, 32, 3)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["array", "nvjpeg", pytest.param("dali", marks=needs_dali)])
def test_batches_on_a_gpu_are_the_oracles_but_for_decoder_and_resize(
    photos: Path, tmp_path: Path, backend: str
) -> None:
    config = configuration(photos, tmp_path, backend)
    with build_loader(config, device=torch.device("cuda")) as loader:
        for step, batch in enumerate(loader.batches(0, 4)):
            assert batch.im_q.device.type == batch.im_k.device.type == "cuda"
            for view, found in enumerate((batch.im_q, batch.im_k)):
                wrong = (found.cpu().float() - oracle(config, photos, step, view).float()).abs()
                assert wrong.mean() < (0.25 if backend == "array" else 2)


def test_only_array_on_a_gpu_leaves_the_colours_of_rgb_to_it() -> None:
    cuda, deep = torch.device("cuda"), replace(RGB8, channels=4)
    assert workers.leaves_colours("array", cuda, RGB8)
    assert not workers.leaves_colours("array", CPU, RGB8)
    assert not workers.leaves_colours("pil", cuda, RGB8)
    assert deep.float_views
    assert not workers.leaves_colours("array", cuda, deep)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_epoch_shows_every_sample_at_most_once(
    photos: Path, tmp_path: Path, backend: str
) -> None:
    config = configuration(photos, tmp_path, backend)
    with build_loader(config, device=CPU) as loader:
        assert (loader.num_samples, loader.steps_per_epoch) == (60, 3)
        batches = list(loader.batches(0, 3))
        assert loader.wait_s > 0
        assert loader.backend == backend
        assert backend in loader.description
    views = torch.cat([batch.im_q for batch in batches]).flatten(1)
    assert len(torch.unique(views, dim=0)) == 48


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("key_rows", [None, rolled])
def test_resume_anywhere_is_exact(
    photos: Path, tmp_path: Path, backend: str, key_rows: object
) -> None:
    config = configuration(photos, tmp_path, backend)
    whole = drawn(config, 0, 7, key_rows=key_rows)
    assert same(drawn(config, 4, 7, key_rows=key_rows), whole[4:])
    with build_loader(config, device=CPU, key_rows=key_rows) as loader:  # type: ignore[arg-type]
        piecewise = [
            batch for first, last in pairwise([0, 2, 3, 7]) for batch in loader.batches(first, last)
        ]
        assert same(piecewise, whole)
        assert same(list(loader.batches(1, 3)), whole[1:3])


@pytest.mark.parametrize(
    ("backend", "world_size", "key_rows"),
    [
        ("pil", 2, None),
        ("array", 4, None),
        ("array", 2, rolled),
        ("array", 4, rolled),
        ("nvjpeg", 2, rolled),
        pytest.param("dali", 4, None, marks=needs_dali),  # a pipeline takes seconds to build
        pytest.param("dali", 2, rolled, marks=needs_dali),
    ],
)
def test_ranks_share_the_global_batches(
    photos: Path, tmp_path: Path, backend: str, world_size: int, key_rows: object
) -> None:
    config = configuration(photos, tmp_path, backend)
    alone = drawn(config, 2, 5, key_rows=key_rows)
    ranks = [
        drawn(config, 2, 5, rank=rank, world_size=world_size, key_rows=key_rows)
        for rank in range(world_size)
    ]
    joined = [
        Batch(
            torch.cat([ranks[r][i].im_q for r in range(world_size)]),
            torch.cat([ranks[r][i].im_k for r in range(world_size)]),
        )
        for i in range(3)
    ]
    assert same(joined, alone)


@pytest.mark.parametrize("backend", BACKENDS)
def test_key_rows_permute_the_keys_only(photos: Path, tmp_path: Path, backend: str) -> None:
    config = configuration(photos, tmp_path, backend)
    plain, permuted = drawn(config, 1, 3), drawn(config, 1, 3, key_rows=rolled)
    for step, (a, b) in enumerate(zip(plain, permuted, strict=True), start=1):
        assert torch.equal(a.im_q, b.im_q)
        assert torch.equal(a.im_k[rolled(step)], b.im_k)


def test_parts_of_workers_join_to_the_same_batches(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configuration(photos, tmp_path, "array")
    whole = drawn(config, 1, 4, key_rows=rolled)
    monkeypatch.setattr("fastmoco.data.backends.workers._PART", 5)  # four parts of four rows
    assert same(drawn(config, 1, 4, key_rows=rolled), whole)


@pytest.mark.parametrize("backend", BACKENDS)
def test_accumulation_cuts_the_global_batch(photos: Path, tmp_path: Path, backend: str) -> None:
    whole = drawn(configuration(photos, tmp_path, backend), 2, 4)
    cut = drawn(configuration(photos, tmp_path, backend, accumulate=2), 2, 4)
    joined = [
        Batch(torch.cat([a.im_q, b.im_q]), torch.cat([a.im_k, b.im_k]))
        for a, b in zip(cut[::2], cut[1::2], strict=True)
    ]
    assert same(joined, whole)


def test_synthetic_batches_agree_between_ranks_and_resume(tmp_path: Path) -> None:
    config = configuration(tmp_path, tmp_path)
    config = replace(config, data=DataConfig(source="synthetic", synthetic_samples=100))
    whole = drawn(config, 0, 6)
    assert whole[0].im_q.shape == (16, 32, 32, 3)
    assert not torch.equal(whole[0].im_q, whole[0].im_k)
    assert same(drawn(config, 3, 6), whole[3:])
    second = drawn(config, 0, 6, rank=1, world_size=2)
    assert all(torch.equal(a.im_q[8:], b.im_q) for a, b in zip(whole, second, strict=True))


def refused(config: Config) -> str:
    with pytest.raises(ConfigError) as caught:
        build_loader(config, device=CPU)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_unusable_roots_are_one_clear_sentence(photos: Path, tmp_path: Path) -> None:
    missing = tmp_path / "nowhere"
    assert str(missing) in refused(configuration(missing, tmp_path))
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "no image file" in refused(configuration(empty, tmp_path))
    (empty / "a.jpg").write_bytes(b"this is text")
    assert "none can be read" in refused(configuration(empty, tmp_path))
    too_large = configuration(photos, tmp_path, global_batch_size=64)
    assert "exceeds the 60 samples" in refused(too_large)


def test_key_rows_and_sources_travel_to_processes(photos: Path, tmp_path: Path) -> None:
    from fastmoco.data.sources.choose import open_source

    source = open_source(configuration(photos, tmp_path))
    packed = pickle.dumps(source)
    again = pickle.loads(packed)
    assert len(packed) < 1000  # a path, not the index
    assert [again.name(i) for i in range(60)] == [source.name(i) for i in range(60)]
    assert again.read(59) == source.read(59)


def test_import_needs_no_dali() -> None:
    code = "import sys, fastmoco.data.loader; assert 'nvidia.dali' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_dali_is_an_extra_for_each_cuda() -> None:
    """What the trainer tells a user to install is what pyproject.toml has under that name."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert not any("dali" in line for line in project["dependencies"])
    extras = project["optional-dependencies"]
    for cuda, extra in loaders.DALI_EXTRAS.items():
        (line,) = extras[extra]
        assert line.startswith(f"nvidia-dali-cuda{cuda}0>=")
    assert "dali" in extras["dev"][0]  # so that these tests run with it


def test_without_dali_a_gpu_is_told_what_it_loses(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, gpu = configuration(photos, tmp_path), torch.device("cuda")
    config = replace(config, data=replace(config.data, backend="auto"))
    monkeypatch.setattr(loaders, "has_dali", lambda: False)
    for cuda, extra in (("12.8", "dali-cuda12"), ("13.0", "dali")):
        monkeypatch.setattr(torch.version, "cuda", cuda)
        sentence = loaders.missing_dali(config, gpu)
        assert sentence.endswith(f'pip install "fastmoco[{extra}]"')
    assert loaders.missing_dali(config, torch.device("cpu")) == ""
    chosen = replace(config, data=replace(config.data, backend="array"))
    assert loaders.missing_dali(chosen, gpu) == ""
    monkeypatch.setattr(torch.version, "cuda", None)  # ROCm
    assert loaders.missing_dali(config, gpu) == ""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(loaders, "has_dali", lambda: True)
    assert loaders.missing_dali(config, gpu) == ""


def test_dali_that_is_asked_for_and_missing_is_refused(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configuration(photos, tmp_path)
    monkeypatch.setattr(loaders, "has_dali", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    sentence = refused(replace(config, data=replace(config.data, backend="dali")))
    assert 'pip install "fastmoco[dali-cuda12]"' in sentence


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("ranks", [1, 2])
def test_for_labels_an_epoch_is_every_image_once_in_one_view(
    photos: Path, tmp_path: Path, backend: str, ranks: int
) -> None:
    count = len(list(photos.rglob("*.jpg")))
    assert count == 60  # so that the third batch of 26 is incomplete
    config = configuration(photos, tmp_path, backend, global_batch_size=26)
    two_views = drawn(config, 0, 1, world_size=ranks)
    seen: list[int] = []
    for rank in range(ranks):
        with build_loader(config, rank=rank, world_size=ranks, device=CPU, labelled=True) as loader:
            assert loader.steps_per_epoch == 3
            for step, batch in enumerate(loader.batches(0, 3)):
                mine, everyone = loader.plan.counted(step)
                assert everyone == [26, 26, 8][step]
                assert batch.im_q.shape == (26 // ranks, 32, 32, 3)
                assert batch.im_k.shape == (0, 32, 32, 3)
                if step == 0 and rank == 0:
                    assert torch.equal(batch.im_q, two_views[0].im_q)
                seen += batch.replaced[:mine, 1].tolist()
    assert sorted(seen) == list(range(count))
