"""Where code can come from: packages, their licences, and files that are only ever data."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.dependencies import LOCK, NVIDIA, ROOT, installed, kinds, licence

SOURCES = [
    *(ROOT / "fastmoco").rglob("*.py"),
    *(ROOT / "kernels").rglob("*.py"),
    *(ROOT / "bench").rglob("*.py"),
]


def test_every_dependency_may_be_used_by_everybody() -> None:
    unknown = {
        name: licence(package)
        for name, package in installed().items()
        if not (found := kinds(licence(package)))
        or (NVIDIA in found and not name.startswith(("nvidia-", "cuda-")))
    }
    assert unknown == {}, "look at these licences, and add their kind or drop the package"


@pytest.mark.parametrize(
    "text", ["GPL-3.0-only", "GNU General Public License v3", "AGPL-3.0", "CC-BY-NC-4.0", "", "?"]
)
def test_licences_that_are_not_for_everybody_have_no_kind(text: str) -> None:
    assert kinds(text) == []


@pytest.mark.skipif(not LOCK.exists(), reason=f"continuous integration has no {LOCK.name}")
def test_the_lock_names_every_dependency_and_its_licence() -> None:
    rows = re.findall(r"^(\S+?)==\S+  # (.*)$", LOCK.read_text(), re.M)
    assert len(rows) == len(set(rows)) > 50
    listed = dict(rows)
    assert sorted(installed().keys() - listed.keys()) == [], (
        "new packages: python -m tests.support.dependencies > " + str(LOCK.relative_to(ROOT))
    )
    for name, package in installed().items():
        assert kinds(licence(package)) == kinds(listed[name]), name


# What would run code that lies in data, or hand text to a shell.
RUNS = {
    *("eval", "exec", "compile", "os.system", "os.popen", "subprocess.getoutput"),
    *("pickle.load", "pickle.loads", "pickle.Unpickler", "marshal.load", "marshal.loads"),
    *("shelve.open", "joblib.load", "dill.load", "yaml.load_all", "yaml.unsafe_load"),
    *("yaml.full_load", "runpy.run_path", "torch.jit.load", "torch.package.PackageImporter"),
}
# Loaders of YAML that make nothing but numbers, text, lists and mappings.
SAFE = ("SafeLoader", "CSafeLoader", "Words")


def dangers(tree: ast.AST) -> Iterator[str]:
    """Calls that could run what a file holds."""
    names: dict[str, str] = {}  # `from pickle import loads`
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
        elif isinstance(node, ast.Import):
            names |= {a.asname or a.name: a.name for a in node.names}
    safe = set(SAFE)
    for node in ast.walk(tree):
        if isinstance(node, ast.arg) and node.annotation:  # which mypy holds callers to
            safe |= {node.arg} if ast.unparse(node.annotation) == "type[yaml.SafeLoader]" else set()
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        top, dot, rest = ast.unparse(node.func).partition(".")
        called = names.get(top, top) + dot + rest
        given = {k.arg: ast.unparse(k.value) for k in node.keywords}
        if called in RUNS or given.get("shell") == "True" or given.get("allow_pickle") == "True":
            yield called
        if called == "torch.load" and given.get("weights_only") != "True":
            yield called
        loader = given.get("Loader", ast.unparse(node.args[1]) if len(node.args) > 1 else "")
        if called == "yaml.load" and loader.rpartition(".")[2] not in safe:
            yield called


# Reads what the same process has pickled, in its memory, and no file.
OWN_MEMORY = {"fastmoco/transfer/datasets/detection.py": ["pickle.loads"]}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_data_is_run_as_code(path: Path) -> None:
    allowed = OWN_MEMORY.get(path.relative_to(ROOT).as_posix(), [])
    assert list(dangers(ast.parse(path.read_text()))) == allowed


@pytest.mark.parametrize(
    "code",
    [
        "import torch\ntorch.load(path)",
        "import torch\ntorch.load(path, weights_only=False)",
        "from torch import load\nload(path)",
        "import yaml\nyaml.load(text)",
        "import yaml\nyaml.load(text, yaml.Loader)",
        "import yaml\ndef read(text, loader: type[yaml.Loader]): yaml.load(text, Loader=loader)",
        "import yaml as y\ny.load(text, Loader=y.FullLoader)",
        "import pickle as p\np.loads(data)",
        "from pickle import Unpickler as U\nU(file)",
        "eval(text)",
        "import numpy as np\nnp.load(path, allow_pickle=True)",
        "import subprocess\nsubprocess.run(text, shell=True)",
    ],
)
def test_what_would_run_data_is_found(code: str) -> None:
    assert len(list(dangers(ast.parse(code)))) == 1


def test_the_words_loader_makes_nothing_but_data() -> None:
    import yaml

    from fastmoco.config import parsing

    assert issubclass(parsing.Words, yaml.SafeLoader)
    for text in ("!!python/object/apply:os.getcwd []", "!!python/name:os.system"):
        with pytest.raises(yaml.YAMLError):
            yaml.load(text, Loader=parsing.Words)
