"""A run's loss: evaluated on the whole output on every rank, so that its gradient is that of one process."""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from flexmagic.engine.code import HookSource, build_script, failure, shifted
from flexmagic.engine.exchange import Exchange
from flexmagic.engine.pipeline import Pipeline, Tape
from flexmagic.engine.stage_output import backward, from_the_last, of_output, with_output
from flexmagic.engine.tensors import leaves, local_of, replace_leaf
from flexmagic.layout.assemble import own_part
from flexmagic.layout.layout import Layout
from flexmagic.layout.rule import Rule
from flexmagic.layout.sites import Site

LOGITS = ".logits"
NAMES = ("output", "logits", "ids", "ctx", "modules")
"""What a loss may use besides the engine's own namespace."""


@dataclass(frozen=True)
class LossSource:
    """What a user gives as loss: an expression over the names of :func:`loss_names`, a function, a cell.

    A function gets one object with these as attributes; a cell's loss is its last expression.
    """

    text: str = ""
    function: Callable[[Any], Any] | None = None
    cell: HookSource | None = None

    def evaluate(self, namespace: Mapping[str, Any], names: Mapping[str, Any]) -> torch.Tensor:
        """The loss, a scalar; raises :class:`TypeError` for anything that is no number to differentiate."""
        if self.cell is not None:
            loss = build_script(self.cell, NAMES, dict(namespace))(dict(names))
        elif self.function is not None:
            loss = self.function(SimpleNamespace(**names))
        else:
            code = compile(self.text.strip(), "<backward>", "eval")
            loss = eval(code, {**namespace, "torch": torch, **names})  # noqa: S307 - the user's own expression
        if not isinstance(loss, torch.Tensor) or loss.numel() != 1 or not loss.is_floating_point():
            kind = (
                f"{loss.dtype}{list(loss.shape)}" if isinstance(loss, torch.Tensor) else type(loss).__name__
            )
            msg = f"the loss must be one number, it is {kind}; sum or average it"
            raise TypeError(msg)
        if not loss.requires_grad:
            msg = "the loss does not depend on what the model computed with gradients"
            raise TypeError(msg)
        return loss.reshape(())

    def explain(self, error: Exception) -> str:
        """What went wrong, of a cell with the user's line: the last one if all lines went well."""
        said = f"{type(error).__name__}: {error}"
        if self.cell is None:
            return said
        found = failure(0, error, self.cell.filename, source=self.cell)
        line = found.line or ast.parse(shifted(self.cell)).body[-1].lineno
        return f"line {line}:\n    {self.cell.line(line).strip()}\n{said}"


@dataclass(frozen=True)
class Outputs:
    """A forward's whole output, for a loss on every rank, and what hooks saved in the forward.

    ``back``: carries the loss's gradient on through the stages of a pipeline, once it is known at the
    output; ``None`` where the loss's own backward does it all.
    """

    whole: Any
    context: Mapping[str, Any]
    back: Callable[[], None] | None = None


def outputs_of(
    model: nn.Module,
    arguments: Mapping[str, Any],
    rules: Mapping[Site, Rule],
    exchange: Exchange,
    context: Mapping[str, Any],
) -> Outputs:
    """Run a model; all ranks together. ``context``: what hooks save in it meanwhile."""
    if not isinstance(model, Pipeline):
        return Outputs(whole_output(model(**arguments), rules, exchange), context)
    attached: list[torch.Tensor] = []

    def forward() -> list[torch.Tensor]:
        output = model(**arguments)
        if not model.stage.is_last:
            return []
        whole = whole_output(output, rules, exchange)
        message = with_output(whole, context, attached).to(model.stage.device)
        return [*attached, message]

    model.tape = tape = Tape()
    try:
        *found, message = from_the_last(model, forward)
    finally:
        model.tape = None
    leaves_ = [tensor.detach().requires_grad_() for tensor in found]
    whole, saved = of_output([*(leaf.clone() for leaf in leaves_), message])

    def back() -> None:
        given = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves_]
        backward(model, tape, lambda: (attached, given))

    return Outputs(whole, saved, back)


def whole_output(output: Any, rules: Mapping[Site, Rule], exchange: Exchange) -> Any:
    """The model's output with every tensor whole, this rank's own part still attached to its graph.

    Tensors of which the whole is not known are ``None`` in it: a loss never sees a piece.
    """
    for where, tensor in list(leaves(output)):
        rule = rules.get(Site("", "output", where))
        if rule is None or rule.refused or exchange.rank not in rule.ranks:
            output = replace_leaf(output, where, None)
        else:
            output = replace_leaf(output, where, _attached(rule, exchange, local_of(tensor)))
    return output


def _attached(rule: Rule, exchange: Exchange, local: torch.Tensor) -> torch.Tensor:
    """The whole of a site; its derivative by this rank's piece is that of the piece itself."""
    layout, whole = exchange.gather(rule, local.detach(), well=True)
    if not local.requires_grad:
        return whole
    return local if layout.replicated else whole + _spread(layout, exchange.rank, local - local.detach())


def _spread(layout: Layout, rank: int, piece: torch.Tensor) -> torch.Tensor:
    """A tensor of the whole's shape that is zero but for a rank's piece."""
    out = piece.new_zeros(layout.shape)
    for there, here in own_part(layout, rank):
        out[there] = piece[here]
    return out


def loss_names(output: Any, ids: Any, context: Mapping[str, Any], modules: Any) -> dict[str, Any]:
    """What a loss may use.

    ``output``, its ``logits`` where it has some, the input's ``ids``, what hooks saved in ``ctx``, and
    the session's ``modules``.
    """
    found = dict(leaves(output))
    return {"output": output, "logits": found.get(LOGITS), "ids": ids, "ctx": context, "modules": modules}
