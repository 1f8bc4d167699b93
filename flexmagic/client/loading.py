"""Making the engines' model: loaded from files, or built by the user's code; on every rank or on none."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from flexmagic.client import failures
from flexmagic.client.calls import Calls
from flexmagic.client.displays import printed
from flexmagic.client.model import Model
from flexmagic.client.streaming import Streaming
from flexmagic.client.waiting import Progress
from flexmagic.errors import CellError, FlexError, ModelError
from flexmagic.layout.mesh import Mesh

if TYPE_CHECKING:
    from flexmagic.engine.code import HookSource

Sizes = Mapping[str, int | None]
"""How many ranks each axis of the mesh has; ``None`` for an axis that was not asked for."""


class Loading:
    """Has all ranks make a model; only when every one has its part does it replace the former."""

    def __init__(self, calls: Calls) -> None:
        self._calls = calls

    def load(
        self, source: str, sizes: Sizes, dtype: str | None, attn: str | None, progress: Progress | None
    ) -> Model:
        """Load a model from a folder or hub id. Raises :class:`ModelError`."""
        from flexmagic.engine.distributed import LoadSpec

        spec = LoadSpec(source, self._mesh(sizes), dtype, attn)
        self._calls.one(0, "check_model", spec)
        return self._adopted("load_model", spec, progress=progress)

    def build(
        self,
        builder: Callable[..., Any],
        sizes: Sizes,
        unsharded: Callable[[], Any] | None,
        progress: Progress | None,
    ) -> Model:
        """Have a function build the model. Raises :class:`ModelError` or :class:`CellError`."""
        from flexmagic.engine.code import from_function

        return self._built(from_function("model", 1, builder), sizes, unsharded, progress)

    def run_cell(self, text: str, first_line: int, sizes: Sizes, progress: Progress | None) -> Model:
        """Have a cell build the model. Raises :class:`ModelError` or :class:`CellError`."""
        from flexmagic.engine.code import check_cell, from_text

        cell = from_text("model", 1, text, first_line)
        check_cell(cell)
        return self._built(cell, sizes, None, progress)

    def _mesh(self, sizes: Sizes) -> Mesh:
        """The mesh over all ranks with the sizes asked for."""
        ranks = self._calls.world_size
        given = {axis: size for axis, size in sizes.items() if size is not None}
        product = math.prod(given.values())
        if not given:
            return Mesh.of(tp=ranks)
        if product != ranks:
            asked = " ".join(f"--{axis} {size}" for axis, size in given.items())
            msg = (
                f"{asked} is for {product} ranks, but there are {ranks} engines, one per rank. "
                f"Choose sizes whose product is {ranks}, or start {product} engines."
            )
            raise ModelError(msg)
        return Mesh.of(**given)

    def _built(
        self,
        cell: HookSource,
        sizes: Sizes,
        unsharded: Callable[[], Any] | None,
        progress: Progress | None,
    ) -> Model:
        said = Streaming(printed, self._calls.world_size)
        heard = said.beside(progress)
        try:
            return self._adopted("build_model", cell, self._mesh(sizes), unsharded, progress=heard)
        except CellError as error:
            raise failures.cell_error(error, self._calls.world_size) from None
        finally:
            said.end()

    def _adopted(self, verb: str, *args: Any, progress: Progress | None) -> Model:
        try:
            self._calls.all(verb, *args, progress=progress)
        except FlexError:
            with contextlib.suppress(FlexError):  # a stuck rank has said so already
                self._calls.all("drop_built")
            raise
        return Model(self._calls, self._calls.all("adopt_model", progress=progress))
