"""Completion of verbs, options and values: `fastmoco completion bash|zsh|fish` prints a script.

The script holds all words, so that pressing Tab starts no Python. For bash, in ~/.bashrc:
`eval "$(fastmoco completion bash)"`; for zsh the same, after `compinit`; for fish
`fastmoco completion fish > ~/.config/fish/completions/fastmoco.fish`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Literal, get_args, get_origin, get_type_hints

from fastmoco.cli import VERBS, Verb
from fastmoco.config import Config
from fastmoco.config.command import CommandParser


def options() -> dict[str, tuple[str, ...]]:
    """Every option of training, with its values where there are few."""
    found: dict[str, tuple[str, ...]] = {"config": ()}
    for group, kind in get_type_hints(Config).items():
        for name, hint in get_type_hints(kind).items():
            few = get_args(hint) if get_origin(hint) is Literal else ()
            found[f"{group}.{name}"] = ("true", "false") if hint is bool else few
    return found


def _words(verb: Verb) -> str:
    dashed = [f"--{name}" for name in options()] if verb.configured else []
    return " ".join([*verb.words, *dashed, "--help"])


def bash() -> str:
    """The script for bash."""
    values = "".join(
        f'    --{name}) words="{" ".join(few)}" ;;\n' for name, few in options().items() if few
    )
    verbs = "".join(f'    {name}) words="{_words(verb)}" ;;\n' for name, verb in VERBS.items())
    return f"""\
_fastmoco() {{
  local cur="${{COMP_WORDS[COMP_CWORD]}}" before="${{COMP_WORDS[COMP_CWORD-1]}}" words=""
  if [ "$COMP_CWORD" -eq 1 ]; then
    COMPREPLY=($(compgen -W "{" ".join(VERBS)} --help --version" -- "$cur"))
    return
  fi
  case "$before" in
{values}    --help) return ;;
    --*) COMPREPLY=($(compgen -f -- "$cur")); return ;;
    *) case "${{COMP_WORDS[1]}}" in
{verbs}    esac ;;
  esac
  COMPREPLY=($(compgen -W "$words" -- "$cur"))
  if [ "${{#COMPREPLY[@]}}" -eq 0 ]; then COMPREPLY=($(compgen -f -- "$cur")); fi
}}
complete -o filenames -F _fastmoco fastmoco
"""


def zsh() -> str:
    """The script for zsh, which can run the one for bash."""
    return f"autoload -U +X bashcompinit && bashcompinit\n{bash()}"


def fish() -> str:
    """The script for fish."""
    lines = [
        f"complete -c fastmoco -f -n __fish_use_subcommand -a {name} -d {_fish_text(verb.help)}"
        for name, verb in VERBS.items()
    ]
    configured = " ".join(name for name, verb in VERBS.items() if verb.configured)
    for name, few in options().items():
        values = f"-x -a '{' '.join(few)}'" if few else "-r"
        seen = f"'__fish_seen_subcommand_from {configured}'"
        lines.append(f"complete -c fastmoco -n {seen} -l {name} {values}")
    for name, verb in VERBS.items():
        for word in verb.words:
            option = f"-l {word[2:]} -r" if word.startswith("--") else f"-f -a {word}"
            lines.append(f"complete -c fastmoco -n '__fish_seen_subcommand_from {name}' {option}")
    return "\n".join(lines) + "\n"


def _fish_text(text: str) -> str:
    """In quotes, in which fish reads a backslash before a quote and before another backslash."""
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"


def main(arguments: Sequence[str] | None = None) -> int:
    """`fastmoco completion SHELL`."""
    scripts = {"bash": bash, "fish": fish, "zsh": zsh}
    parser = CommandParser(prog="fastmoco completion", description=__doc__)
    parser.add_argument("shell", choices=sorted(scripts))
    sys.stdout.write(scripts[parser.parse_args(arguments).shell]())
    return 0


if __name__ == "__main__":
    sys.exit(main())
