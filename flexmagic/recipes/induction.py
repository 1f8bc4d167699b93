"""Induction heads: those that look for what followed the same token before."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from flexmagic.errors import InputError
from flexmagic.recipes.named import Named
from flexmagic.recipes.places import TOKENIZER, depth, place

if TYPE_CHECKING:
    from flexmagic import Shown
    from flexmagic.client.session import Session

LOGITS = ":output.logits"
MEASURED = """\
import torch
found = {"induction": [], "previous": [], "duplicate": []}
for site in sites:
    pattern = model[site].float()
    for name, back in (("induction", period - 1), ("previous", 1), ("duplicate", period)):
        along = pattern.diagonal(offset=-back, dim1=-2, dim2=-1)
        found[name].append(along[..., first + period - back :].mean((0, -1)))
logits = model.output.logits[:, :-1].float()
right = torch.tensor(ids, device=logits.device)[:, 1:]
save.loss = -logits.log_softmax(-1).gather(-1, right[..., None])[..., 0].mean(0)
for name, values in found.items():
    setattr(save, name, torch.stack(values))
"""
"""Queries of the second pass only; ``first`` is where the first pass begins."""


@dataclass(frozen=True, eq=False)
class Induction:
    """What heads look at, and what the model loses, on random tokens that are said twice.

    ``score``: ``[layer, head]``, the mean attention from a token's second occurrence to what followed its
    first; ``previous``: to the token before; ``duplicate``: to its first occurrence; all in the second pass.
    ``loss``: ``[position]``, in nats, of predicting each token from those before, the mean over rows.
    """

    score: Named
    previous: Named
    duplicate: Named
    loss: Named
    period: int

    @property
    def first_loss(self) -> float:
        """The mean loss on the first pass, which cannot be predicted."""
        return float(self.loss.values[: -self.period].mean())

    @property
    def second_loss(self) -> float:
        """The mean loss on the second pass, but for its first token, which nothing announces."""
        return float(self.loss.values[-self.period + 1 :].mean())

    def heads(self, least: float = 0.4) -> list[tuple[int, int]]:
        """The heads ``(layer, head)`` that score so much or more, the highest first."""
        found = [(row["induction"], row["layer"], row["head"]) for row in self.score.rows()]
        return [(layer, head) for score, layer, head in sorted(found, reverse=True) if score >= least]

    def rows(self) -> list[dict[str, Any]]:
        """One dict for each head with its three scores: what a data frame takes."""
        parts = zip(self.score.rows(), self.previous.rows(), self.duplicate.rows(), strict=True)
        return [{**a, **b, **c} for a, b, c in parts]

    def grid(self) -> Shown:
        """Layers by heads."""
        return self.score.grid("induction score")

    def _ipython_display_(self) -> None:
        self.grid()._ipython_display_()

    def __repr__(self) -> str:
        """The loss of both passes and the highest score."""
        best = max(self.score.rows(), key=lambda row: float(row["induction"]))
        return (
            f"<Induction: loss {self.first_loss:.2f}, then {self.second_loss:.2f}; "
            f"layer {best['layer']} head {best['head']} scores {best['induction']:.2f}>"
        )


def induction(
    session: Session, *, period: int = 25, rows: int = 4, seed: int = 0, progress: Any = None
) -> Induction:
    """Score every head and measure the loss on ``rows`` of ``period`` random tokens, said twice.

    The tokens are drawn evenly from the vocabulary without its special ones, under ``seed``; where the
    tokenizer has a token that begins a text, it stands before them. Only means travel. Enabled hooks act, so
    that an ablation is measured by calling this again.

    Raises :class:`SiteError` for a model without attention patterns: load it with ``attn="eager"``.
    Source: Olsson et al. 2022, "In-context learning and induction heads" (arXiv 2209.11895); the first
    experiment of FlexModel (arXiv 2312.03140).
    """
    if period < 2 or rows < 1:
        raise InputError(f"Induction needs 2 tokens or more in a row or more, not {period} in {rows}.")
    model = session.model
    sites = [str(place(model, f"blocks.{n}.attn.pattern")[0]) for n in range(depth(model))]
    ids, first = _drawn(session, period, rows, seed)
    given = {"sites": sites, "period": period, "first": first, "ids": ids}
    run = session.trace(ids, MEASURED, given=given, progress=progress)
    found = {name: run.context[name].cpu().numpy() for name in ("induction", "previous", "duplicate", "loss")}
    run.release()
    of_heads = {name: Named(found[name], ("layer", "head"), name) for name in found if name != "loss"}
    return Induction(
        of_heads["induction"], of_heads["previous"], of_heads["duplicate"],
        Named(found["loss"], ("position",), "loss"), period,
    )  # fmt: skip


def _drawn(session: Session, period: int, rows: int, seed: int) -> tuple[list[list[int]], int]:
    """Random tokens twice, and how many stand before them."""
    code = (
        f"def _asked():\n    t = {TOKENIZER}\n"
        "    return None if t is None else (len(t), sorted(t.all_special_ids), t.bos_token_id)\n_asked()"
    )
    known = session.run_cell(code).value
    if known is None:
        rules = {str(site): rule for site, rule in session.model.rules.items()}
        size = rules[LOGITS].dims[-1].size if LOGITS in rules else None
        if size is None:
            raise InputError(
                "This model has no tokenizer and no logits, so that its vocabulary is not known."
            )
        known = (size, [], None)
    size, special, begin = known
    ordinary = np.setdiff1d(np.arange(size), special)
    drawn = np.random.default_rng(seed).choice(ordinary, (rows, period))
    before = [] if begin is None else [int(begin)]
    return [[*before, *row, *row] for row in drawn.tolist()], len(before)
