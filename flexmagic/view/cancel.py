"""A button that ends what a cell waits for, where a click arrives while that cell still runs.

It does in kernels with subshells (ipykernel 7) under front ends that send a widget's messages over one
(JupyterLab from 4.4 on, unless `commsOverSubshells` is switched off there). Elsewhere a click waits for
the cell's end, and the interrupt is the way.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from IPython.display import display

if TYPE_CHECKING:
    from collections.abc import Callable

    from IPython.core.interactiveshell import InteractiveShell

TOOLTIP = "End this on all ranks, as an interrupt of the kernel does"


class CancelButton:
    """The button, from its first showing to :meth:`close`; ``cancel`` is called in a thread of its own.

    It is shown where one before it was, whose ``handle`` is given, or in a place of its own.
    """

    def __init__(self, cancel: Callable[[], None], handle: Any = None) -> None:
        from ipywidgets import Button

        from flexmagic.view.widget import answer_where_asked

        self._cancel = cancel
        self._button = Button(description="Cancel", icon="stop", tooltip=TOOLTIP)
        self._button.on_click(self._clicked)
        data = {"application/vnd.jupyter.widget-view+json": self._view(), "text/plain": ""}
        if handle is None:
            handle = display(data, raw=True, display_id=True)
        else:
            handle.update(data, raw=True)
        self.handle: Any = handle
        answer_where_asked(self._button)

    def _view(self) -> dict[str, Any]:
        return {"version_major": 2, "version_minor": 0, "model_id": self._button.model_id}

    def _clicked(self, button: Any) -> None:
        button.disabled, button.description = True, "Cancelling …"
        self._cancel()  # last, since it may take the button away

    def close(self) -> None:
        """Take it away, also from what is saved of the notebook."""
        self.handle.update({"text/plain": ""}, raw=True)
        self._button.close()


def cancel_button(
    shell: InteractiveShell, cancel: Callable[[], None], handle: Any = None
) -> CancelButton | None:
    """A button on display; ``None`` where no click could arrive in time, or there are no widgets."""
    kernel = getattr(shell, "kernel", None)
    if kernel is None or "kernel subshells" not in kernel.kernel_info.get("supported_features", ()):
        return None
    try:
        return CancelButton(cancel, handle)
    except ImportError:
        return None
