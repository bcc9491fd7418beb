"""Hostile files: none stops the loader, each is reported, all other rows stay what they were."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch

from fastmoco.config import AugmentConfig, Config, ConfigError, DataConfig, OptimConfig, RunConfig
from fastmoco.data.backends.choose import has_dali
from fastmoco.data.loader import build_loader
from fastmoco.data.sources.folder import FolderSource
from tests.support.data.hostile import build_corpus, hostile_files, jpeg

CPU = torch.device("cpu")
BATCH = 16
needs_dali = pytest.mark.skipif(not has_dali(), reason="DALI is not installed")


def configuration(root: Path, tmp_path: Path, backend: str, share: float = 0.6) -> Config:
    return Config(
        run=RunConfig(dir=str(tmp_path / f"run_{root.name}_{backend}"), seed=5),
        data=DataConfig(
            root=str(root),
            backend=backend,  # type: ignore[arg-type]
            workers=1,
            threads=1,
            max_bad_share=share,
        ),
        augment=AugmentConfig(image_size=32),
        optim=OptimConfig(global_batch_size=BATCH),
    )


Batches = tuple[list[torch.Tensor], np.ndarray, dict[str, str]]


def run(config: Config, steps: int, between: Callable[[int], None] = lambda _: None) -> Batches:
    """Views of every row, the samples asked for, and what was reported, by file name."""
    views, asked = [], []
    with build_loader(config, device=CPU) as loader:
        for step, batch in enumerate(loader.batches(0, steps)):
            views += [torch.cat([batch.im_q, batch.im_k], dim=2)]
            asked.append(loader.plan.queries(step).samples)
            between(step)
    path = Path(config.run.dir) / "bad_samples.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return views, np.concatenate(asked), {Path(row["name"]).name: row["reason"] for row in rows}


@pytest.mark.parametrize(
    "backend", ["array", "pil", "nvjpeg", pytest.param("dali", marks=needs_dali)]
)
def test_hostile_files_are_replaced_reported_and_harmless(tmp_path: Path, backend: str) -> None:
    assert len(hostile_files()) >= 25
    expected = build_corpus(tmp_path / "bad", hostile=True)
    build_corpus(tmp_path / "good", hostile=False)
    names = sorted(path.name for path in (tmp_path / "good").iterdir())
    steps = len(names) // BATCH + 2  # into the second epoch
    with_bad, asked, reported = run(configuration(tmp_path / "bad", tmp_path, backend), steps)
    without, same, _ = run(configuration(tmp_path / "good", tmp_path, backend), steps)
    assert np.array_equal(asked, same)
    survivors = np.array([names[sample] not in expected for sample in asked])
    assert survivors.sum() > 0
    for a, b in zip(torch.cat(with_bad)[survivors], torch.cat(without)[survivors], strict=True):
        assert torch.equal(a, b)
    replaced = torch.cat(with_bad)[~survivors]
    assert len(replaced) > 15
    assert replaced.float().std(dim=(1, 2, 3)).min() > 0  # real images, not empty memory
    drawn = {names[sample] for sample in asked} & expected
    assert drawn <= set(reported) <= expected
    assert all(reported[name] for name in drawn)
    again, _, _ = run(configuration(tmp_path / "bad", tmp_path / "again", backend), steps)
    assert all(torch.equal(a, b) for a, b in zip(with_bad, again, strict=True))


def test_backends_agree_on_what_is_bad(tmp_path: Path) -> None:
    build_corpus(tmp_path / "bad", hostile=True)
    backends = ["array", "dali"] if has_dali() else ["array", "pil"]
    reports = [
        run(configuration(tmp_path / "bad", tmp_path, backend), 5)[2] for backend in backends
    ]
    assert set(reports[0]) == set(reports[1])
    assert "empty" in reports[0]["empty.jpg"]
    assert "pixels exceed" in reports[0]["bomb.jpg"]
    assert "FileNotFoundError" in reports[0]["dangling.jpg"]


@pytest.mark.parametrize("backend", ["array", pytest.param("dali", marks=needs_dali)])
def test_files_that_vanish_or_rot_during_training(tmp_path: Path, backend: str) -> None:
    build_corpus(tmp_path / "some", hostile=False)
    files = sorted((tmp_path / "some").iterdir())
    config = configuration(tmp_path / "some", tmp_path, backend)
    before, _, _ = run(config, 8)
    gone, cut, grown = files[3], files[11], files[17]

    def change(step: int) -> None:
        if step == 0:
            gone.unlink()
            cut.write_bytes(cut.read_bytes()[:400])
            grown.write_bytes(jpeg() + b"more")

    views, asked, reported = run(config, 8, change)
    # What was on its way is unchanged; from step 6 on nothing was prefetched before the change.
    late = [k for k, sample in enumerate(asked) if k >= 6 * BATCH and sample not in (3, 11, 17)]
    assert torch.equal(torch.cat(views)[late], torch.cat(before)[late])
    assert set(reported) <= {gone.name, cut.name}
    assert {3, 11} & set(asked[6 * BATCH :].tolist()) <= {
        files.index(path) for path in (gone, cut) if path.name in reported
    }


def test_a_file_without_permission_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The refusal is simulated, since root may read everything; workers are forked with it."""
    build_corpus(tmp_path / "some", hostile=False)
    config = configuration(tmp_path / "some", tmp_path, "array")
    before, asked, _ = run(config, 4)
    read = FolderSource.read

    def refusing(source: FolderSource, sample: int) -> bytes:
        if sample == 7:
            raise PermissionError(13, "Permission denied")
        return read(source, sample)

    monkeypatch.setattr(FolderSource, "read", refusing)
    views, _, reported = run(config, 4)
    others = asked != 7
    assert not others.all()
    assert torch.equal(torch.cat(views)[others], torch.cat(before)[others])
    assert not torch.equal(torch.cat(views)[~others], torch.cat(before)[~others])
    assert list(reported.values()) == ["PermissionError: Permission denied"]


def test_too_many_bad_files_stop_the_run_with_one_sentence(tmp_path: Path) -> None:
    build_corpus(tmp_path / "bad", hostile=True)
    with pytest.raises(ConfigError, match=r"max_bad_share 0\.01") as caught:
        run(configuration(tmp_path / "bad", tmp_path, "array", share=0.01), 3)
    assert "bad_samples.jsonl" in str(caught.value)
    assert "\n" not in str(caught.value)


@needs_dali
def test_only_culprits_cost_the_search_a_pipeline() -> None:
    from fastmoco.data.backends.dali import graph

    data = [jpeg(quality=50 + number) for number in range(32)]
    for culprit in (0, 13):
        data[culprit] = data[culprit][:400] + b"\xff\xc4\x00\x01 a broken table"
    with mock.patch.object(graph, "decoder_of_one", wraps=graph.decoder_of_one) as built:
        assert graph.refused_by_decoder(data, None) == [0, 13]
    assert built.call_count == 3


@needs_dali
@pytest.mark.parametrize("kind", ["OutOfMemoryError", "AcceleratorError"])
def test_a_fault_of_the_device_is_no_fault_of_an_image(kind: str) -> None:
    from fastmoco.data.backends.dali import engine as engines
    from fastmoco.data.backends.dali import graph

    error: type[Exception] = getattr(torch, kind)
    engine = engines.DaliEngine(Config(), mock.Mock(), mock.Mock(), CPU)
    with (
        mock.patch.object(engine, "_run", side_effect=error),
        mock.patch.object(engines, "read_work", side_effect=AssertionError("searches for images")),
        pytest.raises(error),
    ):
        engine.next()
    fails = mock.Mock(side_effect=error)
    with (
        mock.patch.object(graph, "decoder_of_one", return_value=mock.Mock(run=fails)),
        pytest.raises(error),
    ):
        graph.refused_by_decoder([jpeg()], None)
