"""Where TRITON_INTERPRET=1 only the tests in `interpreted/` run, elsewhere only the others."""

from __future__ import annotations

import os

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

collect_ignore_glob = ["test_*.py", "cpu/*"] if INTERPRETED else ["interpreted/*"]

if INTERPRETED:
    from tests.kernels.interpreter import install_bfloat16

    install_bfloat16()
