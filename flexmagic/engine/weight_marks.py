"""Whether a rank's weights are still what they were: by torch's own counters, and by sums over their bits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.distributed.tensor import DTensor

from flexmagic.engine.distributed import local_part
from flexmagic.engine.private import come_to_rest
from flexmagic.engine.runtime import Runtime
from flexmagic.engine.slot import verb
from flexmagic.engine.tensors import checksum
from flexmagic.engine.tree import parameters_of


@verb
def weight_versions(runtime: Runtime) -> dict[str, int]:
    """How often each of this rank's parameters was written into, as a whole or in the rank's own part.

    A DTensor's counter does not know of what was written into its part alone, as edits of weights do.
    """
    with torch.no_grad():  # in which a part is the tensor itself, not a view of it
        return {
            name: p._version + (p.to_local()._version if isinstance(p, DTensor) else 0)  # noqa: SLF001
            for name, p in parameters_of(runtime.model).items()
        }


@verb
def weight_sums(runtime: Runtime) -> dict[str, tuple[int, int]]:
    """Exact sums over the bits of each of this rank's parameters, which see what the counters do not."""
    come_to_rest(runtime.model)
    return {name: checksum(local_part(p)) for name, p in parameters_of(runtime.model).items()}


@verb
def put_back(runtime: Runtime, names: Sequence[str]) -> None:
    """Give parameters the bits again that they had when they were loaded, and on top what edits made of them.

    They come from the model that was just loaded beside the one in use, on which the edits are made first: if
    one fails, nothing is written. All ranks call it together; raises :class:`HookError`.
    """
    assert runtime.built is not None  # just loaded
    (fresh, _), runtime.built = runtime.built, None
    come_to_rest(runtime.model)
    runtime.edits.again(names, fresh.model, runtime.groups, runtime.namespace)
    loaded = parameters_of(fresh.model)
    with torch.no_grad():
        for name, parameter in parameters_of(runtime.model).items():
            if name in names:
                local_part(parameter).copy_(local_part(loaded[name]))
