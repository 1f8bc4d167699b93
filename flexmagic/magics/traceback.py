"""``%flextb``: everything there is to know of the last error."""

from __future__ import annotations

import traceback

from IPython.core.magic import line_magic, magics_class
from IPython.core.magic_arguments import magic_arguments

from flexmagic.errors import FlexError, UserCodeError
from flexmagic.magics.arguments import parse
from flexmagic.magics.desk import DeskMagics


@magics_class
class TracebackMagics(DeskMagics):
    """Tracebacks, which errors leave away until they are asked for."""

    @magic_arguments()
    @line_magic
    def flextb(self, line: str) -> None:
        """Print the whole traceback of the last error of a magic, of each rank and of the notebook.

        Example::

            %flextb
        """
        if parse(self.flextb, line) is None:
            return
        error = self._desk.last_error
        print("There was no error yet." if error is None else whole(error))


def whole(error: FlexError) -> str:
    """The tracebacks of the ranks' user code, and that of the notebook."""
    remote: dict[str, list[int]] = {}
    for failure in error.failures if isinstance(error, UserCodeError) else ():
        remote.setdefault(failure.trace, []).append(failure.rank)
    parts = [f"On rank {', '.join(map(str, ranks))}:\n{text}" for text, ranks in remote.items() if text]
    here = "".join(traceback.format_exception(error))
    return "\n".join([*parts, f"In the notebook:\n{here}" if parts else here])
