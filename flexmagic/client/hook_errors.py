"""What a hook's code failed with last, kept with the hook for whoever looks at it later."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

from flexmagic.client.hooks import Hook
from flexmagic.errors import HookError


@contextlib.contextmanager
def noted(hooks: Iterable[Hook]) -> Iterator[None]:
    """Keep the errors of a run with the hooks that raised them; a run that goes well takes them away."""
    known = list(hooks)
    try:
        yield
    except HookError as error:
        for hook in known:
            mine = [f for f in error.failures if f.hook == hook.name or f.hook.startswith(f"{hook.name} v")]
            if mine:
                first = mine[0]
                where = f", line {first.line}" if first.line is not None else ""
                hook.last_error = f"rank {first.rank}, {first.site}{where}: {first.kind}: {first.message}"
        raise
    for hook in known:
        if hook.enabled:
            hook.last_error = ""
