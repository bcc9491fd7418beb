"""Paths as people write them; bash is the reference for braces."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fastmoco.config import ConfigError, dump, parse, parse_text
from fastmoco.config.command import CommandParser
from fastmoco.config.paths import matching, spelled_out
from fastmoco.data.sources.choose import resolve_folders


def test_home_and_variables(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    monkeypatch.setenv("DATA_SET", "pets")
    monkeypatch.chdir(tmp_path)
    expected = {
        "~": "/home/somebody",
        "~/a/~": "/home/somebody/a/~",
        "${HOME}/${DATA_SET}": "/home/somebody/pets",
        "$HOME/$DATA_SET.txt": "/home/somebody/pets.txt",
        "a$": "a$",
        "file:///a/b%20c%FF": os.fsdecode(b"/a/b c\xff"),
        "file://localhost/a": "/a",
        "": "",
    }
    assert {path: spelled_out(path) for path in expected} == expected
    for path in ("$NOT_SET_AT_ALL/a", "${NOT_SET_AT_ALL}"):
        with pytest.raises(ConfigError, match="NOT_SET_AT_ALL, which is not set"):
            spelled_out(path)
    with pytest.raises(ConfigError, match="who does not exist"):
        spelled_out("~nobody_of_this_name/a")
    for name in ("~", "$NOT_SET_AT_ALL"):  # what exists is taken as it is
        (tmp_path / name).mkdir()
        assert spelled_out(name) == name


def test_what_no_file_can_be_called_is_a_sentence() -> None:
    for path, told in {
        "a\0b": r"holds a NUL byte",
        "x" * 300: r"xxx\.\.\.xxx.* is too long",
        "a/" * 3000: r"a/\.\.\.a/.* is too long",
        "~/" + "x" * 300: r"xxx\.\.\.xxx.* is too long",
    }.items():
        with pytest.raises(ConfigError, match=told) as refused:
            spelled_out(path)
        assert len(str(refused.value)) < 120
    many = "{" + ",".join(f"{n:04d}" for n in range(300)) + "}.tar"
    assert spelled_out(many) == many
    assert spelled_out(f"s3://b/{'x' * 5000}").startswith("s3://")


@pytest.mark.skipif(not shutil.which("bash"), reason="bash is the reference")
@pytest.mark.parametrize(
    "pattern",
    [
        *("x{0..11}.tar", "x{008..11}", "x{3..1}", "x{0..10..5}y", "{a,b}/{0..1}", "{b,a}"),
        *("x{a,{0..2}}", "x{-1..1}", "x{a}", "x{}", "x{a..}", "plain", "x{a,}", "{{0..1},9}y{1,2}"),
    ],
)
def test_braces_are_those_of_bash(pattern: str, tmp_path: Path) -> None:
    shown = subprocess.run(
        ["bash", "-c", f"printf '%s\\n' {pattern}"], capture_output=True, text=True, check=True
    )
    words = [tmp_path / word for word in shown.stdout.splitlines()]
    for word in words:
        word.parent.mkdir(exist_ok=True)
        word.touch()
    # The folder itself exists: it is the pattern as a whole that must not.
    assert matching(f"{tmp_path}/{pattern}") == [str(word) for word in words]


def test_stars_are_sorted_and_what_is_missing_is_named(tmp_path: Path) -> None:
    for name in ("b/1.tar", "b/0.tar", "a/2.tar", "a/x[1].tar", ".c/3.tar", "a/deep/4.tar"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()

    def found(pattern: str) -> list[str]:
        return [str(Path(p).relative_to(tmp_path)) for p in matching(f"{tmp_path}/{pattern}")]

    assert found("*/*.tar") == ["a/2.tar", "a/x[1].tar", "b/0.tar", "b/1.tar"]
    assert found("{b,a}/?.tar") == ["b/0.tar", "b/1.tar", "a/2.tar"]
    assert found("**/4.tar") == ["a/deep/4.tar"]
    assert found("a/x[1].tar") == ["a/x[1].tar"]
    assert found("nothing") == ["nothing"]
    for pattern, missing in (("b/{0..2}.tar", "b/2.tar"), ("*.tar", r"\*.tar")):
        with pytest.raises(ConfigError, match=f"{missing} does not exist"):
            found(pattern)


def test_names_that_are_no_text_are_kept_and_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    name = os.fsdecode(b"/data/b\xe4d")
    config = parse([f"--data.root={name}"])
    assert parse_text(dump(config)) == config
    for start in (lambda: CommandParser(prog="fastmoco any"), lambda: parse(["--data.root=a"])):
        written = io.BytesIO()
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, "utf-8", "strict"))
        start()
        print(name, flush=True)
        assert written.getvalue() == b"/data/b\\udce4d\n"


def test_every_folder_of_a_run_and_of_a_command_is_spelled_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Shells leave `~` after `=` as it is."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "images").mkdir()
    fields = ("run.dir", "run.resume", "data.root", "knn.train_root", "knn.test_root")
    given = [f"--{name}=~/images" for name in (*fields, "model.init_from")]
    config = resolve_folders(parse(given))
    for path in (config.run.dir, config.run.resume, config.data.root, config.model.init_from):
        assert path == str(tmp_path / "images")
    assert config.knn.train_root == config.knn.test_root == str(tmp_path / "images")
    assert resolve_folders(parse(["--data.root=~/images"])).run.resume == "auto"
    parser = CommandParser(prog="fastmoco any")
    parser.add_argument("--out", type=Path)
    parser.add_argument("files", type=Path, nargs="*")
    parsed = parser.parse_args(["--out=~/a", "${HOME}/b", "c"])
    assert [parsed.out, *parsed.files] == [tmp_path / "a", tmp_path / "b", Path("c")]
    with pytest.raises(SystemExit) as ended:
        parser.parse_args(["--out=$NOT_SET_AT_ALL/a"])
    assert ended.value.code == 2
