"""Whether a rank's weights are still what they were: by torch's own counters, and by sums over their bits."""

from __future__ import annotations

from flexmagic.engine.distributed import local_part
from flexmagic.engine.origin import versions_of
from flexmagic.engine.private import come_to_rest
from flexmagic.engine.runtime import Runtime
from flexmagic.engine.slot import verb
from flexmagic.engine.tensors import checksum


@verb
def weight_versions(runtime: Runtime) -> dict[str, int]:
    """How often each of this rank's parameters was written into."""
    return versions_of(runtime.model)


@verb
def weight_sums(runtime: Runtime) -> dict[str, tuple[int, int]]:
    """Exact sums over the bits of each of this rank's parameters, which see what the counters do not."""
    come_to_rest(runtime.model)
    return {name: checksum(local_part(p)) for name, p in runtime.model.named_parameters()}
