"""The model's parameters: read whole by name, edited in place on all ranks, and put back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from flexmagic.client.failures import describe
from flexmagic.client.table import Table
from flexmagic.engine.code import check, from_function, from_text
from flexmagic.errors import HookError, ModelError
from flexmagic.layout.parameters import parameter_layout
from flexmagic.layout.patterns import check_pattern, listed, missing, path_matches
from flexmagic.layout.sites import nearest

if TYPE_CHECKING:
    import torch

    from flexmagic.client.calls import Calls
    from flexmagic.engine.model_verbs import ModelReport
    from flexmagic.layout.layout import Layout
    from flexmagic.layout.seen import Seen

Code = str | Callable[..., Any]
"""A body in which ``x`` is a whole parameter, or a function ``(x, h)``."""


@dataclass(frozen=True)
class WeightEdited:
    """An edit that was made: its number, the parameters, and its code as text."""

    number: int
    names: tuple[str, ...]
    text: str
    weights: Weights

    def undo(self) -> None:
        """Put the parameters back, bit for bit.

        Raises :class:`ModelError` if it is undone already, or if a later edit wrote into one of them.
        """
        self.weights.undo(self.number)

    def __repr__(self) -> str:
        """Number and parameters."""
        return f"<Weight edit {self.number} of {', '.join(self.names)}>"


class Weights:
    """The parameters of a loaded model, and the edits made to them, the last one on top."""

    alive: bool

    def __init__(self, calls: Calls, reports: list[ModelReport]) -> None:
        self._calls = calls
        self._reports = reports
        known = sorted({n: made for report in reports for n, made in report.edits.items()}.items())
        self._edits = [WeightEdited(number, names, text, self) for number, (names, text) in known]

    def parameter(self, name: str) -> torch.Tensor:
        """A whole parameter by name, in its own dtype on the CPU; nothing else of the model moves.

        Raises :class:`ModelError` for an unknown name, :class:`LayoutError` if the ranks hold
        different values and do not say how they join.
        """
        import torch

        from flexmagic.layout.assemble import assemble

        (name,) = self._parameters(name, exact=True)
        parts = {rank: p for rank, p in enumerate(self._calls.all("parameter", name)) if p is not None}
        layout = self._layout(name, {rank: part.seen for rank, part in parts.items()})
        dtype = getattr(torch, layout.dtype)
        pieces = {
            rank: torch.from_numpy(parts[rank].raw.copy()).view(dtype).reshape(parts[rank].seen.shape)
            for rank in layout.owners()
        }
        return assemble(layout, pieces)

    def parameter_form(self, name: str) -> tuple[tuple[int, ...] | None, str]:
        """The whole shape of a parameter, if it is known without asking, and its dtype."""
        held = [report.parameters[name] for report in self._reports if name in report.parameters]
        whole = next((report.whole[name] for report in self._reports if name in report.whole), None)
        return whole, held[0][1]

    @property
    def parameter_bytes(self) -> list[int]:
        """Bytes of parameters on each rank."""
        return [report.local_bytes for report in self._reports]

    def edit(
        self,
        parameters: str | Sequence[str],
        code: Code,
        *,
        seed: int = 0,
        first_line: int = 1,
    ) -> WeightEdited:
        """Edit parameters in place on every rank, or on none, until it is undone.

        ``code``: as of a hook, a body or a function ``(x, h)``, here of the whole parameter ``x``;
        ``site`` is its name. Each rank writes its own part. ``parameters``: names or patterns.
        ``seed`` fixes random draws, which do not depend on the number of ranks.

        Raises :class:`ModelError` for an unknown name, :class:`LayoutError` for one whose whole is not
        known, :class:`HookError` for code that fails.
        """
        from flexmagic.engine.weight_edits import WeightEdit

        names = self._parameters(*listed(parameters))
        if isinstance(code, str):
            source = from_text("weights", 1, code, first_line)
        else:
            source = from_function("weights", 1, code)
        check(source)
        if source.captures_only:
            msg = f'This edit has no code. Say what becomes of x, e.g. model.edit("{names[0]}", "x *= 0.5").'
            raise HookError(msg)
        seen = self._calls.all("seen_parameters", names)
        layouts = {
            name: self._layout(name, {r: of[name] for r, of in enumerate(seen) if name in of})
            for name in names
        }
        try:
            numbers = self._calls.all("edit_weights", WeightEdit(source, layouts, seed))
        except HookError as error:
            if not error.failures:
                raise
            said = describe(error.failures, self._calls.world_size)
            msg = f"{said}\nNo parameter was changed: mend the code and try again."
            raise HookError(msg, error.failures) from None
        self._edits.append(WeightEdited(max(numbers), tuple(names), source.text.strip(), self))
        return self._edits[-1]

    def undo(self, number: int | None = None) -> None:
        """Take an edit back, bit for bit; the last one without a number.

        Raises :class:`ModelError` if there is none, or if a later edit wrote into what it did.
        """
        at = next((i for i, e in enumerate(self._edits) if number in {None, e.number}), None)
        if at is None:
            known = ", ".join(str(edit.number) for edit in self._edits) or "none"
            msg = f"There is no edit {'' if number is None else number} to undo. Edits: {known}."
            raise ModelError(msg.replace("  ", " "))
        edit = self._edits[-1] if number is None else self._edits[at]
        later = [e for e in self._edits if e.number > edit.number and set(e.names) & set(edit.names)]
        if later:
            msg = f"Edit {later[-1].number} was made to the same parameter later: undo that one first."
            raise ModelError(msg)
        self._calls.all("undo_weights", edit.number)
        self._edits.remove(edit)

    def restore(self) -> None:
        """Take back all edits: every parameter has the bits it was loaded with."""
        self._calls.all("restore_weights")
        self._edits.clear()

    @property
    def edits(self) -> Table:
        """The edits that are in force, in order."""
        rows = tuple((str(e.number), ", ".join(e.names), e.text) for e in self._edits)
        return Table(("edit", "parameters", "code"), rows, "" if rows else "No parameter is edited.")

    def _parameters(self, *wanted: str, exact: bool = False) -> list[str]:
        """The names that patterns stand for, in the model's order."""
        names = list(dict.fromkeys(name for report in self._reports for name in report.parameters))
        for pattern in wanted:
            if not exact:
                check_pattern(pattern)
            absent = (None if pattern in names else pattern) if exact else missing(pattern, names)
            if absent is not None:
                near = nearest(absent, names)
                hint = (
                    f"Did you mean {' or '.join(near)}?" if near else "Type %flexmodel --layout to see names."
                )
                msg = f"The model has no parameter {absent!r}. {hint}"
                raise ModelError(msg)
        return [n for n in names if any(n == w or (not exact and path_matches(w, n)) for w in wanted)]

    def _layout(self, name: str, parts: Mapping[int, Seen]) -> Layout:
        first = self._reports[0]
        held = [weight for weight in first.weights if weight.name == name]
        return parameter_layout(first.mesh, name, parts, first.whole.get(name), held)
