"""How the HTML pages of fastmoco look: one file each, no script, no network; light, dark, print."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Iterator
from contextlib import contextmanager
from html import escape
from pathlib import Path

from fastmoco.config import ConfigError
from fastmoco.machine import durable

# Six colours that stay apart for colour-blind readers (Okabe and Ito), darkened for white paper.
STYLE = """
:root{--paper:#fff;--ink:#23272e;--faint:#626a76;--line:#e3e6ea;--warn:#fdf1e3;--warn-ink:#8a4b00;
--c0:#1f5fbf;--c1:#b45309;--c2:#0f7b5f;--c3:#a03a86;--c4:#5b6470;--c5:#8a7000;
color-scheme:light dark}
@media screen and (prefers-color-scheme:dark){:root{--paper:#16181c;--ink:#e6e9ee;--faint:#9aa3b0;
--line:#31353c;--warn:#33260f;--warn-ink:#f4bf75;--c0:#7aaef5;--c1:#f2a65a;--c2:#56c9a6;
--c3:#e08fc9;--c4:#aab3bf;--c5:#d9c255}}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);font:15px/1.5 system-ui,sans-serif}
main{max-width:1200px;margin:0 auto;padding:16px}
h1{font-size:1.5rem;margin:.3em 0;overflow-wrap:anywhere}
h2{font-size:1.15rem;margin:1.6em 0 .6em}
.summary{margin:.6em 0;overflow-wrap:anywhere}
.calm{color:var(--faint)}
.alarms{background:var(--warn);color:var(--warn-ink);padding:.4em 1em;border-radius:6px;
overflow-wrap:anywhere}
.alarms h2{margin:.3em 0}
.alarms ul{margin:.3em 0;padding-left:1.2em}
.pictures{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,560px),1fr));gap:20px}
.pictures img{max-width:100%;height:auto;background:#fff}
figure{margin:0;min-width:0;break-inside:avoid}
figcaption{font-weight:600}
figure p{margin:.2em 0;color:var(--faint);font-size:13px}
details{margin:1.4em 0}
pre{overflow-x:auto;font-size:12px}
@media print{main{max-width:none;padding:0}body{font-size:11pt}details{display:none}
h2,figcaption{break-after:avoid}
.pictures{display:block}.pictures figure{margin-bottom:5mm}.pictures img{max-height:210mm}}
"""


def words(text: str) -> str:
    """Text for a page, in which a number and its percent sign stay on one line."""
    return escape(text).replace(" %", "\u00a0%")


def picture(title: str, caption: str, kind: str, data: bytes) -> str:
    """A picture in the page itself. kind: `png` or `jpeg`."""
    return (
        f"<figure><figcaption>{escape(title)}</figcaption>{embedded(title, kind, data)}"
        f"<p>{escape(caption)}</p></figure>"
    )


def embedded(title: str, kind: str, data: bytes) -> str:
    """`<img>` with its bytes. kind: `png` or `jpeg`."""
    text = b64encode(data).decode()
    return f'<img alt="{escape(title)}" src="data:image/{kind};base64,{text}">'


def document(title: str, what: str, body: str, style: str = "") -> str:
    """The whole text of a page. what: follows the title in the browser. style: further CSS."""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<link rel="icon" href="data:,">'  # or a browser asks for /favicon.ico
        f"<title>{escape(title)}: {escape(what)}</title><style>{STYLE}{style}</style></head>"
        f"<body><main>{body}</main></body></html>\n"
    )


def write_page(out: Path, text: str) -> None:
    """The file appears whole, whoever reads it. Raises `ConfigError` where it cannot be written."""
    with _a_sentence(out):
        # Names of files need not be valid text.
        durable.replace(out, lambda partial: partial.write_text(text, "utf-8", "backslashreplace"))


def require_writable(out: Path) -> None:
    """Raise `ConfigError` where `write_page` would."""
    with _a_sentence(out):
        durable.require_writable(out)


@contextmanager
def _a_sentence(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigError(f"Cannot write the page {out}: {error}.") from error
