"""Every package that fastmoco and its development need, as installed here, with its licence.

    python -m tests.support.dependencies > .ci/constraints-3.11.txt

is the lock of continuous integration for this version of Python.
"""

from __future__ import annotations

import re
import sys
import tomllib
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
LOCK = ROOT / ".ci" / f"constraints-{sys.version_info.major}.{sys.version_info.minor}.txt"
NVIDIA = "NVIDIA"
"""Not free, but given away with CUDA."""
# Kinds that allow any use and ask of changed copies at most (MPL) that changed files stay open.
KINDS = {
    "MIT": r"\bMIT|\bMIT-CMU|0BSD",
    "BSD": r"\b(Free)?BSD",
    "Apache": r"Apache",
    "PSF": r"Python Software Foundation|\bPSF",
    "MPL": r"\bMPL|Mozilla",
    "ISC": r"\bISC",
    "public domain": r"Unlicense|CC0|Public Domain",
    "NVIDIA": r"NVIDIA|Other/Proprietary",
}
FORBIDDEN = re.compile(r"\bA?GPL|GNU (Affero )?General|SSPL|Non-?Commercial|BUSL|CC-BY-NC", re.I)
# What their metadata leaves out.
KNOWN = {"cuda-toolkit": NVIDIA}

HEAD = """\
# Versions for continuous integration on Python {version}, and the licence of each package.
# Written by: python -m tests.support.dependencies
# No hashes: wheels of torch come from other places on other machines.
"""


def installed() -> dict[str, metadata.Distribution]:
    """What the project and its extra `dev` need here, directly or not, by canonical name."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras: dict[str, list[str]] = project["optional-dependencies"]
    pending = [(Requirement(text), "") for text in [*project["dependencies"], *extras["dev"]]]
    found: dict[str, metadata.Distribution] = {}
    seen: set[tuple[str, frozenset[str]]] = set()
    while pending:
        need, extra = pending.pop()
        if need.marker is not None and not need.marker.evaluate({"extra": extra}):
            continue
        name, wanted = canonicalize_name(need.name), frozenset(need.extras)
        if (name, wanted) in seen:
            continue
        seen.add((name, wanted))
        if name == project["name"]:
            pending += [(Requirement(text), "") for one in wanted for text in extras[one]]
            continue
        try:
            found[name] = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue  # an extra that is not installed
        for text in found[name].requires or []:
            pending += [(Requirement(text), one) for one in ("", *wanted)]
    return found


def licence(package: metadata.Distribution) -> str:
    """What the package says of its licence, in its own words, on one line; empty for nothing."""
    told = package.metadata

    def all_of(name: str) -> list[str]:
        return [str(value) for value in told.get_all(name) or []]

    classifiers = [c for c in all_of("Classifier") if c.startswith("License ::")]
    last = [c.rpartition("::")[2].strip() for c in classifiers]
    text = "; ".join(all_of("License-Expression") or last or all_of("License"))
    first = (text.strip().splitlines() or [""])[0][:120]
    return first or KNOWN.get(canonicalize_name(told["Name"]), "")


def kinds(text: str) -> list[str]:
    """The kinds of a licence; none where it is unknown or not for everybody."""
    if FORBIDDEN.search(text):
        return []
    return [kind for kind, pattern in KINDS.items() if re.search(pattern, text)]


def main() -> None:
    """Print the lock."""
    print(HEAD.format(version=".".join(map(str, sys.version_info[:2]))), end="")
    for name, package in sorted(installed().items()):
        print(f"{name}=={package.version.partition('+')[0]}  # {licence(package)}")


if __name__ == "__main__":
    main()
