"""The file form: one self-contained HTML page, without scripts, that can be mailed and archived."""

from __future__ import annotations

import base64
import html
from pathlib import Path
from typing import TYPE_CHECKING

from flexmagic.view import header
from flexmagic.view.caption import sheet_caption
from flexmagic.view.picture import Look
from flexmagic.view.plane import default_plane
from flexmagic.view.png import PAGE_WIDTH, to_png
from flexmagic.view.sheet import compose_sheet
from flexmagic.view.table import disagreements, rank_table
from flexmagic.view.text import body
from flexmagic.view.words import visible

if TYPE_CHECKING:
    import os

    from flexmagic.view.source import Source

MOST_LABELS = 512

# No script, no network: whatever a model wrote into a token, the page can run and fetch nothing.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
_STYLE = """
:root { color-scheme: light dark }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
h1 { font: 600 1.25rem ui-monospace, monospace; overflow-wrap: anywhere }
.facts { display: flex; flex-wrap: wrap; gap: .25rem .75rem; padding: 0; list-style: none }
.warning { border-left: 4px solid #d97706; padding: .25rem .75rem }
img { max-width: 100%; height: auto; background: #fff; border-radius: 4px }
table { border-collapse: collapse } th, td { padding: .1rem .75rem .1rem 0; text-align: right }
th { font-weight: 500; text-align: left }
pre { overflow-x: auto; font: 13px/1.4 ui-monospace, monospace }
ol { columns: 12rem; font: 13px/1.5 ui-monospace, monospace; overflow-wrap: anywhere }
"""


def to_html(source: Source, path: str | os.PathLike[str] | None = None) -> str:
    """Return the page, and write it to ``path`` where one is given.

    It holds the header, the statistics, the picture and what it says, a few values, and the labels
    of the rows, all escaped. Raises what the source raises, and ``OSError`` for the file.
    """
    page = _page(source)
    if path is not None:
        Path(path).write_text(page, encoding="utf-8")
    return page


def _page(source: Source) -> str:
    info = source.info
    title = html.escape(header.title(info))
    picture = base64.b64encode(to_png(source)).decode()
    said = sheet_caption(compose_sheet(source, Look())) if 0 not in info.shape else ()
    stats = source.stats() if 0 not in info.shape else None
    pairs = header.stats_pairs(stats) if stats is not None else ()
    warnings = (*header.warnings(info), *header.odd_values(stats), *(disagreements(source) if stats else ()))
    spoken = html.escape(" ".join([header.title(info), *said]))
    rows = "".join(f"<tr><th>{name}</th><td>{text}</td></tr>" for name, text in pairs)
    parts = [
        f"<h1>{title}</h1>",
        _list("ul", header.facts(info, source.bytes_moved), "facts"),
        *(f'<p class="warning">{html.escape(text)}</p>' for text in warnings),
        f'<p><img alt="{spoken}" width="{PAGE_WIDTH}" src="data:image/png;base64,{picture}"></p>',
        *(f"<p>{html.escape(text)}</p>" for text in said),
        f"<h2>Statistics</h2><table>{rows}</table>" if rows else "",
        _by_rank(source) if rows else "",
        "<h2>Who owns what</h2>" + _list("ul", header.ownership(info)) if info.pieces else "",
        f"<h2>First and last values</h2><pre>{html.escape(body(source))}</pre>",
        _labels(source),
    ]
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head>'
        f"<body>{''.join(parts)}</body></html>\n"
    )


def _by_rank(source: Source) -> str:
    if not source.info.pieces:
        return ""
    return f"<h2>By rank</h2><pre>{html.escape(str(rank_table(source)))}</pre>"


def _list(tag: str, texts: tuple[str, ...], name: str = "") -> str:
    items = "".join(f"<li>{html.escape(text)}</li>" for text in texts)
    return f'<{tag} class="{name}">{items}</{tag}>' if name else f"<{tag}>{items}</{tag}>"


def _labels(source: Source) -> str:
    """Return the labels of the rows (the tokens), cut visibly if there are too many."""
    info = source.info
    plane = default_plane(info)
    dim = plane.rows if plane.rows >= 0 else plane.cols
    labels = source.labels(dim, plane.fixed) if dim >= 0 else None
    if not labels:
        return ""
    texts = tuple(visible(text) for text in labels[:MOST_LABELS])
    rest = len(labels) - len(texts)
    more = f"<p>and {rest:,} more</p>" if rest else ""
    items = "".join(f'<li value="{i}">{html.escape(text)}</li>' for i, text in enumerate(texts))
    return f"<h2>Along {html.escape(visible(info.dims[dim]))}</h2><ol>{items}</ol>{more}"
