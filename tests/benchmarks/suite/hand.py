"""Row (c), as typed: what a user's cells take, as times of ``%%px pass`` on the same two engines."""

from __future__ import annotations

import contextlib
import io
import statistics
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from suite.pairs import Spread, in_turn, ratio, timed
from suite.report import Report, Row

WIDTH, LAYERS = 64, 1000
"""Of the toy, and of the tree in which names are completed: each of its layers has ten modules."""


def whole() -> nn.Module:
    """Two layers."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH))


def toy(rank: int, world_size: int, device: Any, mesh: Any) -> nn.Module:
    """The first layer cut by columns and the second by rows."""
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    return parallelize_module(whole(), mesh["tp"], {"0": ColwiseParallel(), "1": RowwiseParallel()})


class Block(nn.Module):
    """Ten modules, itself counted."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.ModuleDict({name: nn.Identity() for name in ("q", "k", "v", "o")})
        self.mlp = nn.ModuleDict({name: nn.Identity() for name in ("up", "gate", "down")})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """What it is given."""
        for part in (*self.attn.values(), *self.mlp.values()):
            x = part(x)
        return x


def tree(rank: int, world_size: int, device: Any, mesh: Any) -> nn.Module:
    """Ten thousand modules that do nothing."""
    return nn.Sequential(*(Block() for _ in range(LAYERS)))


@contextlib.contextmanager
def shell_of(session: Any) -> Iterator[Any]:
    """An IPython shell with our magics on this session, and ipyparallel's on the same engines."""
    from IPython.core.interactiveshell import InteractiveShell

    from flexmagic.magics import load

    shell = InteractiveShell.instance()
    load(shell)
    shell._flexmagic_desk.take(session)
    view = session._cluster.client[:]
    view.block = True  # as ipyparallel's own start of a cluster sets it
    view.activate()
    try:
        yield shell
    finally:
        shell._flexmagic_desk.drop()
        InteractiveShell.clear_instance()


def hand_rows(report: Report, rounds: int) -> None:
    """Cells of a user's, and the completion of a name."""
    from flexmagic import Session

    numbers = iter(range(10**6))
    with Session.start(2, oversubscribe=True) as session, shell_of(session) as shell:
        session.load(toy, tp=2, unsharded=whole)
        shell.user_ns["batch"] = {"input": torch.zeros(1, WIDTH)}
        quiet = contextlib.redirect_stdout(io.StringIO())

        def typed(magic: str, line: str, cell: str) -> None:
            with quiet:
                shell.run_cell_magic(magic, line, cell)

        def ran() -> None:
            with quiet:
                shell.run_line_magic("flexrun", "--inputs batch")

        ran()  # the survey, which the first run of such a model brings
        ways = {
            "%%px pass": lambda: typed("px", "", "pass"),
            "hook": lambda: typed("flexhook", "0 --name small", f"x *= 1 + {next(numbers)} * 1e-9"),
            "run": ran,
        }
        times = in_turn(ways, max(rounds, 2) * 4)  # they are short
        assert session.hooks["small"].version > 1
        report.keep_times("c, as typed", times)
        for name, what, target in (
            ("hook", "a hook's cell typed again", "<= 0.5"),
            ("run", "%flexrun of two layers, with that hook", "<= 1.0"),
        ):
            found = ratio(times, name, "%%px pass")
            report.add(Row("c", what, "%%px pass", found, target, rounds=len(times[name])))
        session.load(tree, tp=2)
        session.run({"input": torch.zeros(1, 2)})
        _completion_row(report, shell, session, rounds)


def _completion_row(report: Report, shell: Any, session: Any, rounds: int) -> None:
    """Milliseconds from a typed ``<Tab>`` to the names, in a tree of ten thousand modules."""
    from IPython.core.completer import provisionalcompleter

    assert len(session.model.paths) >= 10_000
    cells = ("%%flexhook 99", "%%flexhook 999.ml", "%%flexhook *.mlp.", "%%flexhook *.mlp.up:")

    def offered(cell: str) -> None:
        with provisionalcompleter():
            assert list(shell.Completer.completions(cell, len(cell))), cell

    for cell in cells:
        offered(cell)
    taken = [max(1000 * timed(lambda cell=cell: offered(cell)) for cell in cells) for _ in range(rounds)]
    value = Spread.of(taken)
    report.keep_times("c, completion, ms", {"slowest of four": [statistics.median(taken)]})
    what = f"a name completed in {len(session.model.paths):,} modules"
    report.add(Row("c", what, "(milliseconds)", value, "<= 50", " ms", rounds))
