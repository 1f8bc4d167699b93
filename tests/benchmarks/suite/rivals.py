"""The same forward in others' hands, each as it documents: out of a bench, a way that says its seconds.

A library that leaves something on the model has it taken off again for the others' turns.
"""

from __future__ import annotations

import contextlib
import re
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist

Bench = Any
Way = Callable[[], float]


def nnsight(bench: Bench) -> Way:
    """NNsight 0.8.1: a trace of the same model, as each rank runs it under ``%%px``."""
    from nnsight import LanguageModel

    from suite import nnsight_ways

    if bench.model not in _WRAPPED:  # a second wrapper would find the first one's marks, and put nothing
        before = _forwards(bench.model)
        made = LanguageModel(bench.model, tokenizer=bench.runtime.loaded.tokenizer)
        _WRAPPED[bench.model] = made, before, _forwards(bench.model)
        _put(bench.model, before)
    wrapped, before, after = _WRAPPED[bench.model]
    way = nnsight_ways.edit if bench.work.edit else nnsight_ways.retrieve

    def once() -> float:
        with _having(bench.model, before, after):
            return float(bench.timed(lambda: way(wrapped, bench.ids, bench.work.paths)))

    return once


_WRAPPED: weakref.WeakKeyDictionary[torch.nn.Module, tuple[Any, Any, Any]] = weakref.WeakKeyDictionary()


def _forwards(model: torch.nn.Module) -> dict[torch.nn.Module, Any]:
    """The forwards that were put on single modules."""
    return {m: m.__dict__["forward"] for m in model.modules() if "forward" in m.__dict__}


def _put(model: torch.nn.Module, forwards: dict[torch.nn.Module, Any]) -> None:
    for module in model.modules():
        module.__dict__.pop("forward", None)
        if module in forwards:
            module.__dict__["forward"] = forwards[module]


@contextlib.contextmanager
def _having(model: torch.nn.Module, before: Any, after: Any) -> Iterator[None]:
    _put(model, after)
    try:
        yield
    finally:
        _put(model, before)


def flexmodel(bench: Bench) -> Way:
    """FlexModel 0.1.0, with ``process_group=WORLD``, which a CPU needs; wrapped once and used again."""
    from flex_model.core import FlexModel, HookFunction

    tensor, data = (1, bench.world) if bench.rows > 1 else (bench.world, 1)
    batch = bench.work.batch if bench.rows > 1 else None
    shape = (batch, None, None) if bench.rows > 1 else (None, None, bench.work.width)

    def half(_module: Any, x: torch.Tensor, _ctx: Any, _modules: Any) -> torch.Tensor:
        return x * 0.5

    kept: dict[str, Any] = {}
    wrapped = FlexModel(
        bench.model,
        kept,
        tensor_parallel_size=tensor,
        pipeline_parallel_size=1,
        data_parallel_size=data,
        process_group=dist.group.WORLD,
    )
    modules = [bench.model.get_submodule(path) for path in bench.work.paths]
    before = [set(module._forward_hooks) for module in modules]
    for path in bench.work.paths:
        edits = half if bench.work.edit else None
        wrapped.register_forward_hook(HookFunction(path, shape, editing_function=edits))
    # its own way to disable hooks does not bring them back, and to wrap again makes process groups each time
    added = [
        {number: hook for number, hook in module._forward_hooks.items() if number not in had}
        for module, had in zip(modules, before, strict=True)
    ]

    def take_off() -> None:
        for module, hooks in zip(modules, added, strict=True):
            for number in hooks:
                module._forward_hooks.pop(number, None)

    def once() -> float:
        kept.clear()
        for module, hooks in zip(modules, added, strict=True):
            module._forward_hooks.update(hooks)
        try:
            return float(bench.timed(lambda: wrapped(input_ids=bench.ids, use_cache=False)))
        finally:
            take_off()

    take_off()
    return once


# --- in one process only


def pyvene(bench: Bench) -> Way:
    """pyvene: an intervention per module, that collects or halves all positions."""
    import pyvene as pv

    names = [re.sub(r"\.(\d+)", r"[\1]", path) for path in bench.work.paths]
    does = (
        {"intervention": lambda base, _source: base * 0.5}
        if bench.work.edit
        else {"intervention_type": pv.CollectIntervention}
    )
    wrapped = pv.IntervenableModel(
        [{"component": f"{name}.output", **does} for name in names], model=bench.model
    )

    def once() -> float:
        found: list[Any] = []

        def forward() -> Any:
            found[:] = wrapped({"input_ids": bench.ids}, unit_locations=None, use_cache=False)
            return found[1]

        passed = float(bench.timed(forward))
        if not bench.work.edit and not bench.numbers:
            bench.total = sum(float(x.abs().sum()) for x in found[0][1])
        return passed

    return once


def transformer_lens(bench: Bench) -> Way:
    """TransformerLens: its bridge over the same checkpoint, a cache of those names, or hooks at them."""
    from transformer_lens.model_bridge import TransformerBridge

    bridge = TransformerBridge.boot_transformers(bench.work.folder, device=str(bench.device))
    names = [
        f"blocks.{path.split('.')[2]}.{'mlp.in.hook_out' if 'up_proj' in path else 'hook_out'}"
        for path in bench.work.paths
    ]

    def half(x: torch.Tensor, hook: Any) -> torch.Tensor:
        return x * 0.5

    def once() -> float:
        cache: dict[str, torch.Tensor] = {}

        def forward() -> Any:
            if bench.work.edit:
                return bridge.run_with_hooks(bench.ids, fwd_hooks=[(name, half) for name in names])
            logits, found = bridge.run_with_cache(bench.ids, names_filter=names)
            cache.update(found.items())
            return logits

        passed = float(bench.timed(forward))
        if not bench.work.edit and not bench.numbers:
            bench.total = sum(float(cache[name].abs().sum()) for name in names)
        return passed

    return once


def baukit(bench: Bench) -> Way:
    """Hooks as baukit's ``TraceDict`` puts them: one per layer, found by name, that edits, then retains."""

    def half(output: torch.Tensor, _layer: str) -> torch.Tensor:
        return output * 0.5

    def once() -> float:
        kept: dict[str, Any] = {}

        def forward() -> Any:
            with TraceDict(bench.model, bench.work.paths, half if bench.work.edit else None) as traced:
                out = bench.forward()
            kept.update({name: trace.output for name, trace in traced.items()})
            return out

        passed = float(bench.timed(forward))
        if not bench.work.edit and not bench.numbers:
            bench.total = sum(float(x.abs().sum()) for x in kept.values())
        return passed

    return once


class _Trace:
    """One layer's hook: what came out, edited and retained."""

    def __init__(self, model: torch.nn.Module, name: str, edit: Callable[..., Any] | None) -> None:
        self.output: Any = None
        found = next(module for path, module in model.named_modules() if path == name)

        def retain(_module: Any, _inputs: Any, output: Any) -> Any:
            if edit is not None:
                output = edit(output, name)
            self.output = output
            return output

        self.handle = found.register_forward_hook(retain)


class TraceDict(OrderedDict[str, _Trace], contextlib.AbstractContextManager["TraceDict"]):
    """Traces of several layers of a model by their names, taken off when the block ends."""

    def __init__(
        self, model: torch.nn.Module, names: tuple[str, ...], edit: Callable[..., Any] | None
    ) -> None:
        super().__init__((name, _Trace(model, name, edit)) for name in names)

    def __exit__(self, *exc: object) -> None:
        """Take the hooks off."""
        for trace in self.values():
            trace.handle.remove()
