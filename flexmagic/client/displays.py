"""What was displayed on an engine, displayed where the notebook or script is."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flexmagic.engine.screen import Bundle


def displayed(shown: Bundle) -> None:
    """Display it as it was there; outside IPython its text is printed."""
    from IPython import get_ipython

    shell = get_ipython()
    if shell is None:
        print(shown.data.get("text/plain", f"[{', '.join(shown.data)}]"))  # noqa: T201 - as hooks' prints are
        return
    transient = {"display_id": shown.display_id} if shown.display_id else {}
    shell.display_pub.publish(
        data=dict(shown.data), metadata=dict(shown.metadata), transient=transient, update=shown.update
    )
