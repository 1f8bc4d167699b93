"""Row (d): bringing a whole activation to the notebook, by size; half of it is on each of two engines."""

from __future__ import annotations

from multiprocessing import shared_memory
from typing import Any

import numpy as np
import psutil

from suite.models import views_of
from suite.pairs import in_turn, ratio
from suite.report import Report, Row

WIDTH = 1024
PAGE = 1024
"""Values on a page of float32: one of each is read, so that nothing comes later than it is measured."""


def place(rank: int, rows: int, number: int) -> None:
    """On an engine: its half of the columns, as a capture, for ``pull`` and in shared memory by hand."""
    import torch
    from IPython import get_ipython

    from flexmagic.engine.slot import Slot
    from flexmagic.layout.sites import Site

    piece = torch.rand(rows, WIDTH // 2, generator=torch.Generator().manual_seed(rank))
    assert Slot.runtime is not None
    Slot.runtime.captures.keep(("benchmark", number), Site("made"), piece)
    get_ipython().user_ns["piece"] = piece.numpy()


def write_by_hand(name: str, rank: int, rows: int) -> None:
    """On an engine: copy its half into a named segment that the notebook has made."""
    from multiprocessing import resource_tracker, shared_memory

    import numpy as np
    from IPython import get_ipython

    segment = shared_memory.SharedMemory(name)
    resource_tracker.unregister(segment._name, "shared_memory")
    whole = np.ndarray((rows, WIDTH), np.float32, segment.buf)
    half = WIDTH // 2
    whole[:, rank * half : (rank + 1) * half] = get_ipython().user_ns["piece"]
    del whole
    segment.close()


def forget(number: int) -> None:
    """On an engine: let go of all of it."""
    from IPython import get_ipython

    from flexmagic.engine.slot import Slot

    assert Slot.runtime is not None
    Slot.runtime.captures.drop(("benchmark", number))
    get_ipython().user_ns.pop("piece", None)


def activation(session: Any, rows: int, number: int) -> Any:
    """The handle of what :func:`place` has made."""
    from flexmagic.client.activation import Activation, Origin
    from flexmagic.layout.layout import Layout
    from flexmagic.layout.mesh import Mesh
    from flexmagic.layout.sites import Site

    half = WIDTH // 2
    blocks = tuple((((0, rows),), ((r * half, (r + 1) * half),)) for r in range(2))
    layout = Layout((rows, WIDTH), ("rows", "columns"), "float32", Mesh(("tp",), (2,)), blocks)
    lives = tuple(session._calls.lives)
    origin = Origin(("benchmark", number), Site("made"), (), (), (), rows * WIDTH * 4, lives)
    return Activation(session._calls, origin, layout, dict)


def transfer_rows(report: Report, rounds: int, sizes: tuple[int, ...] = (1, 4, 16, 64, 256, 1024)) -> None:
    """Measure by size in MB; large ones in fewer rounds, never below fifteen."""
    from flexmagic import Session

    with Session.start(2, oversubscribe=True) as session:
        views = views_of(session)
        controller = _controllers(session)
        before = _memory(controller)
        for number, megabytes in enumerate(sizes):
            rows = megabytes * (1 << 20) // (WIDTH * 4)
            for rank, view in enumerate(views):
                view.apply_sync(place, rank, rows, number)
            _one_size(report, session, activation(session, rows, number), megabytes, rounds)
            for view in views:
                view.apply_sync(forget, number)
        grown = (_memory(controller) - before) / (1 << 20)
        moved = sum(sizes) * (rounds + 1)
        what = f"controller's memory after {moved / 1024:.0f} GB of flexmagic's and as much of pull"
        report.note(f"(d) {what}: {grown:+.0f} MB (of which pull's alone is in row (h))")


def _one_size(report: Report, session: Any, act: Any, megabytes: int, rounds: int) -> None:
    views = views_of(session)
    rows = act.shape[0]
    source = np.random.default_rng(0).random((rows, WIDTH), np.float32)

    def flexmagic() -> None:
        _touch(act.numpy())

    def pull() -> None:
        pending = [view.pull("piece", block=False) for view in views]
        _touch(np.concatenate([answer.get() for answer in pending], 1))

    def by_hand() -> None:
        segment = shared_memory.SharedMemory(create=True, size=rows * WIDTH * 4)
        pending = [view.apply_async(write_by_hand, segment.name, r, rows) for r, view in enumerate(views)]
        for answer in pending:
            answer.get()
        _touch(np.ndarray((rows, WIDTH), np.float32, segment.buf).copy())
        segment.close()
        segment.unlink()

    def memcpy() -> None:
        _touch(source.copy())

    ways = {"flexmagic": flexmagic, "pull": pull, "by hand": by_hand, "memcpy": memcpy}
    times = in_turn(ways, rounds)
    assert (act.numpy()[:3, : WIDTH // 2] == views[0].pull("piece", block=True)[:3]).all()
    report.keep_times(f"d: {megabytes} MB", times)
    large = megabytes >= 64
    what = f"a whole activation of {megabytes} MB: speed"
    n = len(times["pull"])
    report.add(Row("d", what, "view.pull", ratio(times, "pull", "flexmagic"), ">= 5" * large, rounds=n))
    report.add(Row("d", what, "memcpy", ratio(times, "memcpy", "flexmagic"), ">= 0.5" * large, rounds=n))
    report.add(Row("d", what, "shared memory by hand", ratio(times, "by hand", "flexmagic"), rounds=n))


def _touch(array: np.ndarray[Any, Any]) -> float:
    return float(array.reshape(-1)[::PAGE].sum())


def _controllers(session: Any) -> list[psutil.Process]:
    main = psutil.Process(session._cluster._cluster.controller.pid)
    return [main, *main.children(recursive=True)]


def _memory(processes: list[psutil.Process]) -> int:
    return sum(process.memory_full_info().uss for process in processes)
