"""A command line whose refusals are one sentence, as everywhere in fastmoco."""

from __future__ import annotations

import argparse
from typing import NoReturn


class CommandParser(argparse.ArgumentParser):
    """`argparse.ArgumentParser` that prints no usage before an error; exit code 2."""

    def error(self, message: str) -> NoReturn:
        """End with the sentence."""
        self.exit(2, f"fastmoco: {message} (see {self.prog} --help)\n")
