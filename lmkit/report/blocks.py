"""The report as blocks, and the two ways to write them: one self-contained HTML page, and Markdown."""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --dim: #5c6570; --page: #fff; --card: #f4f6f8; --line: #d8dee4;
        --warn: #fff4d6; --warn-line: #d9a400; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e8ec; --dim: #9aa4af; --page: #14181d; --card: #1e242b;
        --line: #353d46; --warn: #38300f; --warn-line: #b58a00; } }
* { box-sizing: border-box; }
body { font: 16px/1.55 system-ui, sans-serif; color: var(--ink); background: var(--page); max-width: 62rem;
       margin: 0 auto; padding: 1.5rem 1rem 4rem; overflow-wrap: break-word; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .5rem; }
h2 { font-size: 1.25rem; margin: 2.5rem 0 .6rem; border-bottom: 1px solid var(--line); padding-bottom: .25rem; }
h3 { font-size: 1rem; margin: 1.4rem 0 .4rem; }
.dim, small, figcaption { color: var(--dim); }
small { font-size: .8em; white-space: nowrap; }
.note, .warnings { border-left: 4px solid var(--line); background: var(--card); padding: .6rem .9rem; margin: 1rem 0; }
.warnings { border-color: var(--warn-line); background: var(--warn); }
.warnings ul { margin: .3rem 0 0; padding-left: 1.2rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .35rem .8rem .35rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th:first-child, td:first-child { text-align: left; min-width: 6.5rem; position: sticky; left: 0;
                                 background: var(--page); }
@media (max-width: 34rem) { table { font-size: .8rem; } th, td { padding-right: .45rem; } small { white-space: normal; }
                            th:first-child, td:first-child { min-width: 4.8rem; } }
thead th { color: var(--dim); font-weight: 600; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 21rem), 1fr)); gap: 1rem; }
figure { margin: 0; max-width: 31rem; }
figure img { width: 100%; height: auto; background: #fff; border: 1px solid var(--line); border-radius: 6px; }
figcaption { font-size: .85rem; margin-top: .2rem; }
details { border: 1px solid var(--line); border-radius: 6px; margin: .5rem 0; padding: .4rem .8rem; }
summary { cursor: pointer; }
.answers { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 13rem), 1fr)); gap: .8rem;
           margin: .6rem 0; }
.answers > div { background: var(--card); border-radius: 6px; padding: .5rem .7rem; font-size: .9rem; }
.answers p { margin: .2rem 0 0; white-space: pre-wrap; }
pre { background: var(--card); border-radius: 6px; padding: .7rem .9rem; overflow-x: auto; font-size: .85rem; }
"""


@dataclass(frozen=True)
class Heading:
    text: str


@dataclass(frozen=True)
class Text:
    """A paragraph; set apart when it is a note."""

    text: str
    note: bool = False


@dataclass(frozen=True)
class Warnings:
    lines: Sequence[str]


@dataclass(frozen=True)
class Table:
    """header and rows of cells; an interval in brackets at a cell's end goes on a line of its own in HTML."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Figures:
    """(file, caption) of pictures that may stand beside each other."""

    files: Sequence[tuple[Path, str]]


@dataclass(frozen=True)
class Answers:
    """One prompt and (model, facts, text) of every answer to it. opened: shown without a click."""

    prompt: str
    answers: Sequence[tuple[str, str, str]]
    opened: bool


@dataclass(frozen=True)
class Code:
    text: str


Block = Heading | Text | Warnings | Table | Figures | Answers | Code


def to_html(title: str, blocks: Sequence[Block]) -> str:
    """One page with everything in it: no script, no request, pictures inline."""
    body = "\n".join(_html(block) for block in blocks)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{STYLE}</style></head>\n"
        f"<body>\n<h1>{html.escape(title)}</h1>\n{body}\n</body></html>\n"
    )


def to_markdown(title: str, blocks: Sequence[Block], folder: Path) -> str:
    """The same as Markdown, pictures as links relative to `folder`."""
    return "\n\n".join([f"# {title}", *(_markdown(block, folder) for block in blocks)]) + "\n"


def _html(block: Block) -> str:
    match block:
        case Heading(text):
            return f"<h2>{html.escape(text)}</h2>"
        case Text(text, note):
            return f'<p class="{"note" if note else "text"}">{html.escape(text)}</p>'
        case Warnings(lines):
            items = "".join(f"<li>{html.escape(line)}</li>" for line in lines)
            return f'<div class="warnings"><strong>Warnings</strong><ul>{items}</ul></div>'
        case Table(header, rows):
            head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
            body = "".join(f"<tr>{''.join(f'<td>{_cell(cell)}</td>' for cell in row)}</tr>" for row in rows)
            return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
        case Figures(files):
            return f'<div class="figures">{"".join(_figure(path, caption) for path, caption in files)}</div>'
        case Answers(prompt, answers, opened):
            cells = "".join(
                f'<div><strong>{html.escape(model)}</strong> <span class="dim">{html.escape(facts)}</span>'
                f"<p>{html.escape(text)}</p></div>"
                for model, facts, text in answers
            )
            summary = f"<summary>{html.escape(prompt)}</summary>"
            return f'<details{" open" if opened else ""}>{summary}<div class="answers">{cells}</div></details>'
        case Code(text):
            return f"<pre>{html.escape(text)}</pre>"


def _cell(text: str) -> str:
    return re.sub(r" (\[[^\]]*\])$", r"<br><small>\1</small>", html.escape(text))


def _figure(path: Path, caption: str) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    caption = html.escape(caption)
    return (
        f'<figure><img alt="{caption}" src="data:image/png;base64,{data}"><figcaption>{caption}</figcaption></figure>'
    )


def _markdown(block: Block, folder: Path) -> str:
    match block:
        case Heading(text):
            return f"## {_plain(text)}"
        case Text(text, note):
            return f"> {_plain(text)}" if note else _plain(text)
        case Warnings(lines):
            return "\n".join(["**Warnings**", "", *(f"- {_plain(line)}" for line in lines)])
        case Table(header, rows):
            lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
            return "\n".join(
                f"| {' | '.join(_plain(cell).replace('|', chr(92) + '|') for cell in row)} |" for row in lines
            )
        case Figures(files):
            return "\n\n".join(
                f"![{path.stem}]({path.relative_to(folder).as_posix()})\n{_plain(c)}" for path, c in files
            )
        case Answers(prompt, answers, _):
            quoted = [f"- **{_plain(model)}** {_plain(facts)}: {_plain(text)}" for model, facts, text in answers]
            return "\n".join([f"**{_plain(prompt)}**", "", *quoted])
        case Code(text):
            return f"```\n{text}\n```"


def _plain(text: str) -> str:
    """Text on one line whose characters mean themselves in Markdown, also where a model wrote markup.

    >>> _plain("best_of_8 [3.1, 3.5] <b> [a](b)")
    'best_of_8 [3.1, 3.5] \\\\<b> [a]\\\\(b)'
    """
    one_line = " ".join(text.split())
    return re.sub(r"[\\`*<]|(?<!\w)_|_(?!\w)|(?<=\])\(", lambda found: "\\" + found[0], one_line)
