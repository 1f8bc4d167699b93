"""Measuring one cell: every site against the same model in one process, and edits against plain hooks."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from flexmagic.engine.probe import observe
from flexmagic.errors import FlexError, LayoutError
from flexmagic.layout.sites import Site

from . import models
from .cells import Cell

TOLERANCE = 1e-5


@dataclass
class Measured:
    """What a cell came to.

    ``right``: sites that equal the single process, of which ``split`` are in pieces. ``refused``:
    reasons by site, layer numbers starred. ``wrong``: what is neither, which must stay empty.
    """

    right: int = 0
    split: int = 0
    refused: dict[str, str] = field(default_factory=dict)
    wrong: dict[str, str] = field(default_factory=dict)
    refused_sites: int = 0
    whole: set[Site] = field(default_factory=set)

    def refuse(self, site: Site, reason: str) -> None:
        """Note a refused site under its starred name; of several layers, the first one's reason."""
        self.refused_sites += 1
        self.refused.setdefault(starred(str(site)), reason)

    def frozen(self, edits: list[str]) -> dict[str, Any]:
        """What is kept of it: counts, the refused by reason, the edits that equal the single process."""
        by_reason: dict[str, list[str]] = {}
        for site, reason in sorted(self.refused.items()):
            by_reason.setdefault(reason, []).append(site)
        return {
            "right": self.right,
            "split": self.split,
            "refused sites": self.refused_sites,
            "refused": by_reason,
            "edits": edits,
        }


def starred(text: str) -> str:
    """A site or reason with the numbers of layers and experts left open."""
    return re.sub(r"\.\d+(?=[.:\s]|$)", ".*", text)


class OneProcess:
    """The undistributed model in this process, with what it does without any edit."""

    def __init__(self, cell: Cell, folder: Path) -> None:
        where = models.write(cell.model, folder / cell.model.replace(" ", "-"))
        self.model = models.whole(cell.model, where)
        self.inputs = models.inputs(cell.model, cell.strategy.rows)
        self.truth: dict[Site, torch.Tensor] = {}
        observe(self.model, self.call, lambda s, t: self.truth.update({s: t.clone()}))

    def call(self):
        """One forward without gradients, in the way a session makes it."""
        cached = hasattr(getattr(self.model, "config", None), "use_cache")
        with torch.no_grad():
            return self.model(**self.inputs, **({"use_cache": False} if cached else {}))


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest difference relative to the largest value of ``b``; infinite for other kinds of tensors."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return float("inf")
    if not a.is_floating_point():
        return 0.0 if torch.equal(a, b) else float("inf")
    if not a.numel():
        return 0.0
    return float((a - b).abs().max().double() / b.abs().max().double().clamp_min(1e-30))


def measure(session, one: OneProcess) -> Measured:
    """Compare every site of the loaded model with the single process."""
    session.run(one.inputs)  # a model whose input cannot be guessed is surveyed here
    rules = session.model.rules
    given = [s for s, rule in rules.items() if not rule.refused and (s.path, s.port) != ("", "output")]
    wanted = {f"{site.path}:{site.port}" for site in given}
    run = session.run(one.inputs, capture=sorted(wanted))
    out = Measured()
    for site in dict.fromkeys([*one.truth, *rules]):
        rule = rules.get(site)
        if rule is None:
            out.refuse(site, "no rank has such a site")
        elif rule.refused:
            out.refuse(site, rule.refused)
        else:
            _compare(out, run, site, one.truth.get(site))
    return out


def _compare(out: Measured, run, site: Site, truth: torch.Tensor | None) -> None:
    try:
        activation = run[str(site)]
        value = activation.torch()
    except LayoutError as error:
        out.refuse(site, f"in a run: {str(error).removeprefix(f'{site}: ')}")
        return
    except FlexError as error:
        out.wrong[str(site)] = f"{type(error).__name__}: {error}"
        return
    if truth is None:
        out.wrong[str(site)] = "given out, though one process has no such site"
        return
    difference = relative(value, truth)
    if difference > TOLERANCE:
        kind = f"{tuple(value.shape)} {value.dtype} for {tuple(truth.shape)} {truth.dtype}"
        out.wrong[str(site)] = f"off by {difference:.1e}: {kind}; {activation.layout.how}"
        return
    out.right += 1
    out.split += not activation.layout.replicated
    out.whole.add(site)


# --- edits --------------------------------------------------------------------------------------------

COLUMN = "n = x.shape[-1] // 2; x[..., n - 2 : n + 2] *= 3"
HEAD = "x[..., -(x.shape[-1] // {heads}) :] *= 0"
ROW = "x[-1] *= 0.5"

EDITS = {
    "Llama": [
        ("model.layers.1.mlp.up_proj:output", COLUMN),
        ("model.layers.1.self_attn.o_proj:input[0]", HEAD.format(heads=8)),
        ("model.layers.0:output", ROW),
    ],
    "GPT-2": [
        ("transformer.h.1.mlp.c_fc:output", COLUMN),
        ("transformer.h.1.attn.c_proj:input[0]", HEAD.format(heads=4)),
        ("transformer.h.0.ln_1:output", ROW),
    ],
    "Mixtral": [
        ("model.layers.1.mlp:output", COLUMN),
        ("model.layers.1.self_attn.o_proj:input[0]", HEAD.format(heads=8)),
        ("model.layers.0:output", ROW),
    ],
    "by hand": [
        ("blocks.1.up:output", COLUMN),
        ("blocks.1.down:input[0]", HEAD.format(heads=5)),
        ("nested:output.parts[0]", ROW),
        ("choose:output.values", COLUMN.replace("n - 2 : n + 2", "n")),
        ("seq_first:output", "x[:, -1] *= 0.5"),
    ],
    "BERT": [
        ("encoder.layer.1.intermediate.dense:output", COLUMN),
        ("encoder.layer.1.attention.output.dense:input[0]", HEAD.format(heads=8)),
        ("encoder.layer.0:output", ROW),
    ],
}
"""Per model, a middle column, the last head (or its like), and the last row of the batch."""
EDITS["an odd width"] = EDITS["by hand"]
EDITS["experts and one key-value head"] = EDITS["experts and two key-value heads"] = EDITS["Mixtral"]
EDITS["one key-value head"] = EDITS["two key-value heads"] = EDITS["Llama"]


def final(truth: dict[Site, torch.Tensor]) -> Site:
    """The site of what the model returns in the end."""
    return next(s for s in truth if s.path == "" and s.port == "output")


def edited_in_one_process(one: OneProcess, place: str, body: str) -> torch.Tensor:
    """What the model returns under the same edit, made by a plain torch hook."""
    from flexmagic.engine.tensors import leaves, replace_leaf

    site = Site.parse(place)

    def edit(value):
        x = dict(leaves(value))[site.leaf].clone()
        exec(body, {"x": x, "torch": torch})  # noqa: S102 - a line of the table above
        return replace_leaf(value, site.leaf, x)

    module = one.model.get_submodule(site.path)
    if site.port == "input":
        handle = module.register_forward_pre_hook(lambda _m, args: edit(args))
    else:
        handle = module.register_forward_hook(lambda _m, _a, output: edit(output))
    try:
        return dict(leaves(one.call()))[final(one.truth).leaf]
    finally:
        handle.remove()


def compare_edits(session, one: OneProcess, cell: Cell) -> tuple[list[str], dict[str, str]]:
    """The edits that equal the single process, and what went otherwise by site."""
    good, bad = [], {}
    end = final(one.truth)
    for place, body in EDITS[cell.model]:
        rule = session.model.rules.get(Site.parse(place))
        if rule is None or rule.refused or session.model.rules[end].refused:
            continue
        truth = edited_in_one_process(one, place, body)
        effect = relative(truth, one.truth[end])
        hook = session.hook(place, body, name="edit")
        try:
            changed = session.run(one.inputs)[str(end)].torch()
        except FlexError as error:
            bad[place] = f"{type(error).__name__}: {error}"
            continue
        finally:
            hook.remove()
        difference = relative(changed, truth)
        if effect < 1e-4:
            bad[place] = f"the edit has no effect: {effect:.1e}"
        elif difference > TOLERANCE:
            bad[place] = f"off by {difference:.1e}, the edit changes {effect:.1e}"
        else:
            good.append(place)
    after = session.run(one.inputs)
    if not session.model.rules[end].refused and relative(after[str(end)].torch(), one.truth[end]) > TOLERANCE:
        bad["afterwards"] = "the model is not what it was"
    return good, bad
