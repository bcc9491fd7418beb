"""From YAML files and the command line to a `Config`, and back to YAML."""

from __future__ import annotations

import contextlib
import math
import sys
from argparse import ArgumentError
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from itertools import zip_longest
from pathlib import Path, PurePath
from typing import Any

import yaml
from jsonargparse import ArgumentParser, Namespace, set_loader, set_parsing_settings

from fastmoco.config.command import print_any_name
from fastmoco.config.fields import Config, ConfigError
from fastmoco.config.paths import spelled_out


def recipe_path(name: str) -> Path:
    """Path of a recipe that ships with fastmoco, such as `demo`, in a checkout or installed."""
    package = Path(__file__).resolve().parent.parent
    for folder in (package / "configs", package.parent / "configs"):
        if (folder / f"{name}.yaml").is_file():
            return folder / f"{name}.yaml"
    raise ConfigError(f"The recipe {name}.yaml is not part of this installation of fastmoco.")


class Words(yaml.SafeLoader):
    """Leaves on, off, yes, no, true and dates in a file as words: the field's type reads them."""


Words.yaml_implicit_resolvers = {
    first: [(tag, regexp) for tag, regexp in known if not tag.endswith((":bool", ":timestamp"))]
    for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


# Fields of older versions, with the value that they had unless somebody chose another.
REMOVED: dict[str, object] = {
    **{"knn.temperature": 0.07, "knn.batch_size": 256},
    **{"optim.gamma": 0.1},
}


def _without_removed(values: Any) -> Any:
    """What a file holds, without removed fields that were left at their defaults.

    Runs and checkpoints of older versions name every field, so these load. A removed field with
    another value stays in and is refused as an unknown key: it would have no effect.
    """
    if not isinstance(values, dict):
        return values
    kept = dict(values)
    for group, fields_in in values.items():
        if isinstance(fields_in, dict):
            kept[group] = {
                name: value
                for name, value in fields_in.items()
                if REMOVED.get(f"{group}.{name}", _NEVER) != value
            }
    return kept


_NEVER = object()
_MOST_LEAVES = 100_000


def _read(text: Any, loader: type[yaml.SafeLoader] = Words) -> Any:
    values = yaml.load(text, Loader=loader)
    if _leaves(values, {}) > _MOST_LEAVES:
        raise yaml.YAMLError("its aliases stand for more values than a configuration has")
    return _without_removed(values)


def _leaves(value: Any, known: dict[int, float]) -> float:
    """How many values it is written out, where aliases stand for them; infinite in a circle.

    Ten lines of YAML can stand for ten million words, at which parsers work for minutes.
    """
    if not isinstance(value, dict | list):
        return 1
    if id(value) not in known:
        known[id(value)] = math.inf
        inner = value.values() if isinstance(value, dict) else value
        known[id(value)] = 1 + sum(_leaves(one, known) for one in inner)
    return known[id(value)]


def _parser(prog: str = "fastmoco train") -> ArgumentParser:
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    set_loader("words", _read, (yaml.YAMLError,))
    parser = ArgumentParser(
        prog=prog,
        parser_mode="words",
        description="Without arguments the demo recipe runs.",
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_argument("--config", action="config", help="YAML file; later options override it.")
    parser.add_class_arguments(Config)
    return parser


def _assemble(
    parser: ArgumentParser, parsed: Namespace, files: Mapping[str, Any] | None = None
) -> Config:
    """Raises `ConfigError` for a group or a field that stands there without any value."""
    for name in _empty(parsed.as_dict()):
        given = [path for path, values in (files or {}).items() if name in _empty(values)]
        where = f"{given[-1]}: " if given else ""
        lacks = "has no value: write one" if "." in name else "holds no fields: write some"
        raise ConfigError(f"{where}{name} {lacks}, or leave {name} out.")
    groups = parser.instantiate(parsed)
    return Config(**{field.name: groups[field.name] for field in fields(Config)})


def _empty(values: Mapping[str, Any]) -> list[str]:
    """Names of groups that hold no fields, and of fields that hold nothing."""
    groups = [field.name for field in fields(Config)]
    found = [name for name in groups if name in values and not isinstance(values[name], dict)]
    for group in groups:
        inner = values.get(group)
        named = inner.items() if isinstance(inner, dict) else ()
        found += [f"{group}.{name}" for name, value in named if value is None]
    return found


# What jsonargparse and yaml raise for a file or an option that is no configuration.
UNREADABLE = (
    *(ArgumentError, OSError, TypeError, LookupError, ValueError, AttributeError),
    *(RecursionError, yaml.YAMLError),
)


def parse(arguments: Sequence[str] | None = None, prog: str = "fastmoco train") -> Config:
    """Configuration from `--config FILE` and dotted overrides; none at all means the demo recipe.

    Raises `ConfigError` for an unknown key, a wrong type or an unreadable file.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    print_any_name()
    parser = _parser(prog)
    given = _spelled(arguments) or ["--config", str(recipe_path("demo"))]
    files = _files(given)
    for path, values in files.items():
        if not isinstance(values, dict):
            raise ConfigError(f"{path} holds no fields with values, so it is no configuration.")
    try:
        return _assemble(parser, parser.parse_args(given), files)
    except UNREADABLE as error:
        raise ConfigError(" ".join(str(error).split())) from error


def _files(arguments: Sequence[str]) -> dict[str, Any]:
    """What the files of `--config` hold, by path; those that cannot be read are left out."""
    found: dict[str, Any] = {}
    for argument, following in zip_longest(arguments, arguments[1:], fillvalue=""):
        name, sign, path = argument.partition("=")
        if name == "--config":
            path = path if sign else following
            with contextlib.suppress(*UNREADABLE):
                found[path] = _read(Path(path).read_text(encoding="utf-8"))
    return found


def _spelled(arguments: Sequence[str]) -> list[str]:
    """The same with the files of `--config` spelled out, as every path of a command is."""
    found: list[str] = []
    for argument in arguments:
        name, sign, path = argument.partition("=")
        if sign and name == "--config":
            argument = f"{name}={spelled_out(path)}"
        elif found[-1:] == ["--config"]:
            argument = spelled_out(argument)
        found.append(argument)
    return found


class _Plain(yaml.SafeDumper):
    """Writes paths, which callers from Python may give, as their text."""


_Plain.add_multi_representer(PurePath, lambda dumper, path: dumper.represent_str(str(path)))


def dump(config: Config) -> str:
    """YAML text that `--config` reads back into an equal configuration."""
    plain = asdict(config)
    plain["optim"]["milestones"] = list(config.optim.milestones)
    return str(yaml.dump(plain, Dumper=_Plain, sort_keys=False))


def validated(config: Config) -> Config:
    """The same run with every field of its declared type, paths as text.

    Python does not check the types of a dataclass. Raises `ConfigError` where a file with these
    values would be refused.
    """
    if not isinstance(config, Config):
        raise ConfigError(f"Training takes a fastmoco.Config, not a {type(config).__name__}.")
    for group in fields(Config):
        value, kind = getattr(config, group.name), group.default_factory
        if not isinstance(value, kind):  # type: ignore[arg-type]
            name = kind.__name__  # type: ignore[union-attr]
            raise ConfigError(f"{group.name} is {value!r}, but must be of type {name}.")
    try:
        return parse_text(dump(config))
    except (ArgumentError, TypeError, yaml.YAMLError) as error:
        raise ConfigError(" ".join(str(error).split())) from error


def load(path: Path) -> Config:
    """Configuration from a file that `dump` wrote. Raises `ConfigError` where it is damaged."""
    return parse(["--config", str(path)])


def parse_text(text: str) -> Config:
    """Configuration from the text that `dump` returned, as checkpoints carry it."""
    parser = _parser()
    return _assemble(parser, parser.parse_object(_read(text, yaml.SafeLoader)))
