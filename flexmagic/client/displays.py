"""What was printed or displayed on an engine, where the notebook or script is."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flexmagic.engine.screen import Bundle


def printed(text: str) -> None:
    """Print a text; in a terminal over the line that says what is waited for."""
    print(f"\r\x1b[2K{text}" if sys.stdout.isatty() else text)  # noqa: T201 - as hooks' prints are


def displayed(shown: Bundle) -> None:
    """Display it as it was there; outside IPython its text is printed."""
    from IPython import get_ipython

    shell = get_ipython()
    if shell is None:
        printed(shown.data.get("text/plain", f"[{', '.join(shown.data)}]"))
        return
    transient = {"display_id": shown.display_id} if shown.display_id else {}
    shell.display_pub.publish(
        data=dict(shown.data), metadata=dict(shown.metadata), transient=transient, update=shown.update
    )
