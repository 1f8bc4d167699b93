"""What is said about a tensor before any of its data is drawn. Pure.

Everything here is text that was escaped already; what HTML needs on top, the HTML form does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from flexmagic.view.words import plural, ranks, short, size, span, visible

if TYPE_CHECKING:
    from flexmagic.view.source import Info, Piece, Stats

MOST_OWNERS = 16
_LONG = 400


def title(info: Info) -> str:
    """Return the site."""
    return visible(info.site)


def shape_text(info: Info) -> str:
    """Return every dim with its name: ``(batch 1, seq 16, hidden 512)``."""
    dims = ", ".join(f"{visible(name, 40)} {n:,}" for name, n in zip(info.dims, info.shape, strict=True))
    return f"({dims})" if dims else "a single number"


def facts(info: Info, moved: int = 0) -> tuple[str, ...]:
    """Return the facts of the header, one short text each; ``moved`` is how many bytes a look at it took."""
    holders = {piece.rank for piece in info.pieces}
    held = ""
    if info.nbytes:
        held = size(info.nbytes) + (f" on {ranks(sorted(holders))}" if holders else "")
    texts = [
        shape_text(info),
        visible(info.dtype),
        visible(info.mesh),
        *(visible(placement) for placement in info.placements),
        visible(info.hook),
        visible(info.run) + (f", step {info.step}" if info.step is not None else ""),
        held,
        f"{size(moved)} moved" if moved and holders else "",
    ]
    return tuple(text.lstrip(", ") for text in texts if text)


def ownership(info: Info) -> tuple[str, ...]:
    """Return who owns what, one text per different part: ``rank 1: hidden[256:512]``."""
    parts: dict[tuple[tuple[int, int], ...], list[int]] = {}
    for piece in info.pieces:
        parts.setdefault(piece.spans, []).append(piece.rank)
    texts = []
    for spans, who in parts.items():
        lost = set(info.missing_ranks).issuperset(who)
        texts.append(f"{ranks(who)}: {_part(info, spans)}" + (" (missing)" if lost else ""))
    if len(texts) > MOST_OWNERS:
        texts[MOST_OWNERS:] = [f"and {len(texts) - MOST_OWNERS} more parts"]
    return tuple(texts)


def _part(info: Info, spans: Piece | tuple[tuple[int, int], ...]) -> str:
    """Say what part of the whole a box is, naming only the dims that are split."""
    named = [
        f"{visible(name, 40)}[{span(*at)}]"
        for name, at, n in zip(info.dims, spans, info.shape, strict=True)  # type: ignore[arg-type]
        if at != (0, n)
    ]
    if any(start == stop for start, stop in spans):  # type: ignore[union-attr]
        return "nothing"
    return ", ".join(named) if named else "all of it"


def warnings(info: Info) -> tuple[str, ...]:
    """Return everything the reader must know before trusting the picture."""
    texts = [visible(text, _LONG) for text in info.warnings]
    if info.missing_ranks:
        texts.insert(
            0,
            f"{ranks(info.missing_ranks)} cannot answer: what nobody else owns is hatched, "
            "and no count or statistic includes it.",
        )
    if info.partial:
        texts.append("The ranks hold summands of this tensor; what is shown is their sum.")
    texts += [_uneven(info, dim) for dim in range(len(info.shape))]
    return tuple(text for text in texts if text)


def _uneven(info: Info, dim: int) -> str:
    """Return which ranks hold how much of a dim if they hold unequally much, else nothing."""
    spans: dict[int, set[tuple[int, int]]] = {}
    for piece in info.pieces:
        spans.setdefault(piece.rank, set()).add(piece.spans[dim])
    sizes: dict[int, list[int]] = {}
    for rank, held in spans.items():
        sizes.setdefault(sum(stop - start for start, stop in held), []).append(rank)
    if len(sizes) < 2:
        return ""
    each = ", ".join(f"{n:,} on {ranks(who)}" for n, who in sorted(sizes.items(), reverse=True))
    return f"Uneven along {visible(info.dims[dim], 40)}: {each}."


def odd_values(stats: Stats | None) -> tuple[str, ...]:
    """Return a warning of what is not finite, or nothing."""
    if stats is None:
        return ()
    counts = (("NaN", stats.nan), ("+Inf", stats.posinf), ("-Inf", stats.neginf))
    found = ", ".join(f"{name} {count:,}" for name, count in counts if count)
    return (f"Not finite: {found} of {plural(stats.n, 'value')}.",) if found else ()


def stats_pairs(stats: Stats) -> tuple[tuple[str, str], ...]:
    """Return the statistics as (name, text); counts are exact."""
    return (
        ("values", f"{stats.n:,}"),
        ("NaN", f"{stats.nan:,}"),
        ("+Inf", f"{stats.posinf:,}"),
        ("-Inf", f"{stats.neginf:,}"),
        ("zeros", f"{stats.zeros:,}"),
        ("min", short(stats.min)),
        ("max", short(stats.max)),
        ("mean", short(stats.mean)),
        ("std", short(stats.std)),
        *((("masked", f"{stats.masked:,}"),) if stats.masked else ()),
    )
