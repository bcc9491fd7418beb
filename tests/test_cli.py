"""The console command: its verbs, its refusals and its completion."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import fastmoco
from fastmoco import cli, completion
from fastmoco.config import Config, flatten
from fastmoco.config.command import CommandParser
from fastmoco.evaluate import options
from fastmoco.machine import host
from fastmoco.transfer import command as transfer

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("arguments", [[], ["--help"], ["--version"]])
def test_help_and_version_import_nothing_large(arguments: list[str]) -> None:
    code = (
        "import sys; from fastmoco.cli import main; code = main(sys.argv[1:]);"
        "print(code, *{name.split('.')[0] for name in sys.modules})"
    )
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    *printed, last = done.stdout.splitlines()
    code_, *loaded = last.split()
    assert code_ == "0"
    assert not set(loaded) & {"torch", "numpy", "jsonargparse", "yaml", "matplotlib", "PIL"}
    if arguments == ["--version"]:
        assert printed == [f"fastmoco {fastmoco.__version__}"]
    else:
        assert all(f"  {verb} " in done.stdout for verb in cli.VERBS)


@pytest.mark.parametrize("verb", cli.VERBS)
def test_every_verb_names_its_options(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main([verb, "--help"])
    assert end.value.code == 0
    printed = capsys.readouterr().out
    assert f"fastmoco {verb}" in printed
    assert all(word in printed for word in cli.VERBS[verb].words)
    if verb in ("train", "doctor"):
        assert "--moco.temperature" in printed


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["trian"], "did you mean train?"),
        (["qqq"], "choose one of train, doctor"),
        (["--config", "x.yaml"], "fastmoco train --config"),
        (["train", "--moco.temprature", "1"], "temprature"),
        (["train", "--config", "nowhere.yaml"], "nowhere.yaml"),
        (["doctor", "--moco.queue_size", "many"], "queue_size"),
        (["preview", "--samples", "0"], "at least 1"),
        (["prepare", "mnist", "--out", "x"], "invalid choice: 'mnist'"),
        (["prepare", "cifar10"], "--out"),
        (["report"], "run_dir"),
        (["report", "nowhere"], "nowhere/metrics.jsonl"),
        (["completion", "tcsh"], "'tcsh'"),
    ],
)
def test_bad_input_is_one_sentence(
    arguments: list[str], part: str, capfd: pytest.CaptureFixture[str]
) -> None:
    try:
        code = cli.main(arguments)
    except SystemExit as end:
        code = int(str(end.code))
    assert code == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("fastmoco: ")
    assert part in line


TRUNK = "--checkpoint=~/trunk"
PATHS = [
    *(["knn", TRUNK], ["embed", "~/trunk", "--out=x.csv"], ["retrieval", TRUNK]),
    *(["linear", TRUNK], ["finetune", TRUNK], ["export", "~/trunk", "--to=timm", "--out=x"]),
    *([verb, TRUNK, "--data.root=rendered", "--out=x"] for verb in ("detect", "segment")),
    ["detect", "--checkpoint=supervised:~/trunk", "--data.root=rendered", "--out=x"],
    ["segment", "--checkpoint=random:${HOME}/trunk", "--data.root=rendered", "--out=x"],
    ["detect", "--checkpoint=random", "--data.root=~/trunk", "--out=x"],
    ["detect", "--config=~/trunk"],
    ["segment", "--config", "${HOME}/trunk"],
    ["train", "--config=~/trunk"],
    ["preview", "--config", "${HOME}/trunk"],
    ["experiment", "~/trunk.yaml", "--out=x"],
    *(["report", "~/trunk"], ["inspect", "--data.root=~/trunk"], ["preview", "--replay=~/trunk"]),
    ["shapes", "--photographs=~/trunk", "--out=x"],
]


@pytest.mark.parametrize("arguments", PATHS, ids=" ".join)
def test_every_path_of_a_command_is_spelled_out(
    arguments: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Shells leave `~` after `=` as it is; what is not there is named in full."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "trunk.yaml").write_text("[]")  # no grid: it is named where it is found
    assert cli.main(arguments) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert f"{tmp_path}/trunk" in line


@pytest.mark.parametrize("seed", ["-1", "18446744073709551616"])  # 2 to the power of 64
@pytest.mark.parametrize("verb", ["detect", "segment", "linear", "finetune", "shapes", "train"])
def test_a_seed_that_nothing_can_be_drawn_by_is_one_sentence(
    verb: str, seed: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    given = {
        "train": ["--run.dir", str(tmp_path / "run"), f"--run.seed={seed}", "--run.max_steps=1"],
        "shapes": [*("--train=1", "--val=1", "--pretrain=0", "--out"), str(tmp_path / "x")],
    }
    trunk = ["--checkpoint", "random:resnet18", "--data.root", "rendered", "--batch_size=0"]
    options = given.get(verb, [*trunk, "--out", str(tmp_path / "x")])
    with contextlib.suppress(SystemExit):
        own = [] if verb == "train" else [f"--seed={seed}"]
        assert cli.main([verb, *options, *own]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert "seed" in line
    assert f"{seed} " in line or f"{seed}," in line
    assert "between 0 and 18446744073709551615" in line
    assert list(tmp_path.iterdir()) == []


def test_interrupted_before_there_is_anything_to_save(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr("fastmoco.report.main", interrupted)
    assert cli.main(["report", "x"]) == 130
    assert capsys.readouterr().err == "fastmoco: interrupted\n"


def test_report_draws_and_sums_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    step = {"kind": "train", "step": 40, "epoch": 2.0, "loss": 3.25, "pretext_top1": 0.5}
    records = [
        {**step, "step": 20, "epoch": 1.0, "loss_random": 4.0, "lr": 0.1},
        {**step, "loss_random": 4.0, "lr": 0.1},
        {"kind": "knn", "step": 40, "epoch": 2.0, "knn_top1": 0.625},
    ]
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (tmp_path / "metrics.jsonl").write_text(lines + '{"kind": "train", "st')
    assert cli.main(["report", str(tmp_path)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "step 40, epoch 2.00: loss 3.250 (random 4.00), pretext 50.0 %",
        "kNN top-1: trained encoder 62.5 %",
        str(tmp_path / "curves.png"),
        str(tmp_path / "report.html"),
    ]
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def complete(*words: str) -> set[str]:
    """What bash offers for the last word."""
    line = " ".join(f"'{word}'" for word in words)
    script = f"""{completion.bash()}
COMP_WORDS=({line}); COMP_CWORD={len(words) - 1}; _fastmoco; printf '%s\\n' "${{COMPREPLY[@]}}"
"""
    done = subprocess.run(
        ["bash", "--norc", "-c", script], capture_output=True, text=True, check=True
    )
    return set(done.stdout.split())


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
def test_bash_completes_verbs_options_and_values(tmp_path: Path) -> None:
    assert complete("fastmoco", "") == {*cli.VERBS, "--help", "--version"}
    assert complete("fastmoco", "tr") == {"train"}
    fields = {f"--{name}" for name in flatten(Config())}
    assert complete("fastmoco", "train", "--") == {*fields, "--config", "--help"}
    assert complete("fastmoco", "preview", "--s") == {"--samples"}
    assert complete("fastmoco", "doctor", "--data.back") == {"--data.backend"}
    assert complete("fastmoco", "train", "--data.backend", "") == {
        "auto",
        "array",
        "dali",
        "nvjpeg",
        "pil",
    }
    assert complete("fastmoco", "train", "--data.verify", "t") == {"true"}
    assert complete("fastmoco", "prepare", "ci") == {"cifar10"}
    (tmp_path / "recipe.yaml").touch()
    path = str(tmp_path / "rec")
    assert complete("fastmoco", "train", "--config", path) == {f"{path}ipe.yaml"}
    assert complete("fastmoco", "report", path) == {f"{path}ipe.yaml"}


def test_texts_for_fish_end_where_they_should() -> None:
    """`'` ends a text in quotes there unless a backslash stands before it."""
    command = re.compile(r"complete(?: (?:-{1,2}[a-z]+|[\w.-]+|'(?:\\.|[^'\\])*'))+")
    lines = completion.fish().splitlines()
    assert [line for line in lines if not command.fullmatch(line)] == []
    told = [line.partition(" -d ")[2] for line in lines if " -d " in line]
    found = [re.sub(r"\\(.)", r"\1", text[1:-1]) for text in told]
    assert found == [verb.help for verb in cli.VERBS.values()]


@pytest.mark.parametrize("shell", ["bash", "fish", "zsh"])
def test_scripts_hold_every_option_and_parse(
    shell: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["completion", shell]) == 0
    script = capsys.readouterr().out
    words = set(re.findall(r"[\w.]+", script))
    assert {*flatten(Config()), *cli.VERBS, "config", "cifar10", "samples"} <= words
    if shutil.which(shell):
        (tmp_path / "script").write_text(script)
        subprocess.run([shell, "-n", str(tmp_path / "script")], check=True)


def test_commands_that_compute_settle_their_process_before_they_work(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As training does: else every large tensor is mapped anew."""
    parser = CommandParser("x")
    transfer.shared_options(parser)
    given = ["--checkpoint=x", "--data.root=x", "--out=x", "--device=cpu"]
    order: list[str] = []

    def work(*_: object) -> bool:
        order.append("work")
        return True

    def evaluate(*_: object) -> None:
        order.append("work")

    monkeypatch.setattr(host, "settle", lambda device: order.append(f"settle {device}"))
    assert transfer.command(parser, given, work) == 0
    assert options.command(parser, given, evaluate) == 0
    assert order == ["settle cpu", "work"] * 2
