"""The part for an NVIDIA card: forwards there in bf16, what the host waits for, and copies to the notebook.

The same code runs on a CPU (``--dry-card``), where it proves that it works and measures nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from suite.forward import on_all, sites
from suite.models import llama, views_of
from suite.on_ranks import Work
from suite.pairs import Spread, in_turn, ratio
from suite.report import Report, Row

LAYERS, WIDTH, BATCH, SEQ = 8, 1024, 8, 256


def cuda_rows(
    report: Report, folder: Path, rounds: int, *, dry: bool = False, width: int = WIDTH, layers: int = LAYERS
) -> None:
    """One rank on the card, then two that share it. Without a card, says so. ``dry``: a little on a CPU."""
    if not torch.cuda.is_available() and not dry:
        report.note("CUDA: no NVIDIA card here, not run; its code ran on a CPU in the tests only")
        return
    if dry:
        width, layers = 64, 2
    path = llama(folder, width=width, layers=layers, heads=width // 32)
    for ranks in (1, 2):
        try:
            _on(report, path, rounds, ranks, width=width, layers=layers)
        except Exception as error:  # what a card does not carry is named, with its words
            if dry:
                raise
            report.note(f"CUDA, {ranks} ranks on one card: not run: {type(error).__name__}: {error}")


def _on(report: Report, path: Path, rounds: int, ranks: int, *, width: int, layers: int) -> None:
    from flexmagic import Session

    with Session.start(ranks, oversubscribe=True) as session:
        session.load(path, tp=ranks, dtype="bfloat16")
        where = sites(layers, width)[1]
        views = views_of(session)
        told = views[0].apply_sync(backend)
        label = f"{told}, bf16, {ranks} rank{'s' if ranks > 1 else ''}"
        for edit in (False, True):
            found = on_all(session, Work(where.paths, where.width, BATCH, SEQ, rounds, edit, rivals=()))
            verb = "edit" if edit else "retrieve"
            value = ratio(found.times, "flexmagic", "plain hooks")
            _add(report, f"{label}: {verb} at {where.words}", "plain torch hooks", value, rounds, edit=edit)
        work = Work(where.paths, where.width, BATCH, SEQ, rounds, edit=False, rivals=())
        launched = [view.apply_async(launches, work) for view in views]
        times, waits = next(iter([answer.get() for answer in launched]))
        value = ratio(times, "flexmagic", "plain hooks")
        _add(report, f"{label}: the host's time to launch a retrieval", "plain torch hooks", value, rounds)
        report.note(f"CUDA: {label}: {waits}")
        copied = views[0].apply_sync(copies, rounds, BATCH * SEQ, where.width // ranks)
        for name, spread in copied.items():
            _add(report, f"{label}: a piece to the host, {name}", "as looks do it", spread, rounds, edit=True)


def _add(report: Report, what: str, against: str, value: Spread, rounds: int, *, edit: bool = False) -> None:
    report.add(Row("CUDA", what, against, value, "" if edit else "<= 1.03", rounds=rounds))


# --- what runs on an engine, on whichever device it has


def backend() -> str:
    """The device and what carries the ranks' messages between its tensors."""
    from flexmagic.engine.slot import Slot

    assert Slot.runtime is not None
    device = Slot.runtime.place.device
    group = Slot.runtime.groups.own
    return f"{device.type}, {group._get_backend(device).name()}"


def launches(work: Work) -> tuple[dict[str, list[float]], str]:
    """Seconds until the host has launched a forward, with nothing waited for, and whether captures wait."""
    from flexmagic.engine.slot import Slot
    from suite.on_ranks import Bench

    bench = Bench(Slot.runtime, work)
    bench.waits = False
    ways: dict[str, Callable[[], float | None]] = {"plain hooks": bench.plain, "flexmagic": bench.flexmagic}
    bench.numbers = 1  # the plain hooks need not add up what they keep, for which the host would wait
    times = in_turn(ways, work.rounds)
    if bench.device.type != "cuda":
        return times, "nothing to wait for on this device"
    torch.cuda.set_sync_debug_mode("error")  # torch raises where the host would wait for the card
    try:
        bench.flexmagic()
    except RuntimeError as error:
        return times, f"a retrieval makes the host wait: {str(error).splitlines()[0]}"
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return times, "torch saw no operation in a retrieval for which the host waits"


def copies(rounds: int, rows: int, columns: int) -> dict[str, Any]:
    """A piece in bf16 from the device to the host: as looks bring it, and by pinned memory aside."""
    from flexmagic.engine import look
    from flexmagic.engine.slot import Slot

    assert Slot.runtime is not None
    device = Slot.runtime.place.device
    card = device.type == "cuda"
    piece = torch.rand(rows, columns).to(torch.bfloat16).to(device)
    pinned = torch.empty(piece.shape, dtype=piece.dtype, pin_memory=card)
    stream = torch.cuda.Stream(device) if card else None
    whole = (slice(0, rows), slice(0, columns))

    def timed(copy: Callable[[], Any]) -> Callable[[], float]:
        def once() -> float:
            started = time.perf_counter()
            copy()
            return time.perf_counter() - started

        return once

    def aside() -> None:
        if stream is None:
            pinned.copy_(piece)
            return
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            pinned.copy_(piece, non_blocking=True)
        stream.synchronize()

    ways = {
        "look": timed(lambda: look.slice_bytes(piece, whole)),
        "pinned, on a side stream": timed(aside),
        "pageable, on the same stream": timed(piece.cpu),
    }
    times = in_turn(ways, rounds)
    raw = np.frombuffer(look.slice_bytes(piece, whole), np.uint8)
    assert (raw == pinned.view(torch.uint8).numpy().reshape(-1)).all()
    return {name: ratio(times, name, "look") for name in ways if name != "look"}
