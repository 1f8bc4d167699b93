"""Distributed interchange: a subspace, found by training, in which one prompt's values answer for another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from flexmagic.errors import InputError
from flexmagic.recipes.aside import LOGITS, encoded, hooked, persistent, without_module
from flexmagic.recipes.named import Named
from flexmagic.recipes.places import place, token_of

if TYPE_CHECKING:
    from flexmagic import Shown
    from flexmagic.client.session import Session

NAME = "interchange_subspace"
HARD = 1e-3
"""The temperature at which a boundary is tested: each dim is taken or not."""
SWAP, SAID, WARM = f"{NAME} swap", f"{NAME} said", f"{NAME} temperature"
CODE = f"""\
half = len(x) // 2
base, source = x[:half, {{position}}].detach(), x[half:, {{position}}].detach()
x = x.clone()
x[:half, {{position}}] = modules["{{name}}"](base, source, persistent["{WARM}"])
"""
LOSS = (
    "torch.nn.functional.cross_entropy(logits[:{half}, -1].float(), "
    "torch.tensor({targets}, device=logits.device))"
)
CHOSEN = f'ctx["{SAID}"] = x[: len(x) // 2, -1].argmax(-1)'


@dataclass(frozen=True, eq=False)
class Interchange:
    """A subspace at a place of the model, and how often its values alone bring the other prompt's answer.

    ``accuracy``: the share of held-out pairs where the base, with the source's values in the subspace, is
    answered as it should be; ``untrained``: with the random subspace that training began with; ``all``: with
    the source's whole activation. ``basis``: ``[width, size]``, orthonormal. ``losses``: ``[step]``, in nats.
    """

    accuracy: float
    untrained: float
    all: float
    basis: NDArray[np.float32]
    losses: Named
    site: str
    position: int

    @property
    def size(self) -> int:
        """The number of dims of the subspace; of a boundless one, those within its boundary."""
        return self.basis.shape[1]

    def lines(self) -> Shown:
        """The loss over the steps."""
        from flexmagic import lines

        return lines({"loss": self.losses.values}, title=f"subspace at {self.site}", over="step")

    def rows(self) -> list[dict[str, Any]]:
        """One dict with size and accuracies: what a data frame takes."""
        return [
            {
                "site": self.site, "position": self.position, "size": self.size, "accuracy": self.accuracy,
                "untrained": self.untrained, "all": self.all,
            }
        ]  # fmt: skip

    def _ipython_display_(self) -> None:
        self.lines()._ipython_display_()

    def __repr__(self) -> str:
        """Size and accuracies."""
        return (
            f"<Interchange {self.site} at {self.position}: {self.size} of {self.basis.shape[0]} dims, "
            f"{self.accuracy:.1%} of held-out pairs; untrained {self.untrained:.1%}, all dims {self.all:.1%}>"
        )


def interchange(
    session: Session,
    bases: Sequence[Any],
    sources: Sequence[Any],
    targets: Sequence[str | int],
    *,
    site: str = "blocks.0.resid_post",
    position: int = -1,
    size: int | None = 4,
    steps: int = 60,
    rows: int = 8,
    lr: float = 1e-2,
    held_out: float = 0.3,
    seed: int = 0,
    progress: Any = None,
) -> Interchange:
    """Train a rotation of the residual stream, of which a few dims carry what tells two prompts apart.

    Each base runs with the values that its source has, at ``site`` and ``position``, in a subspace of
    ``size`` dims: ``base + (source - base) Q Qᵀ``. ``targets``: the token that the base should then be
    answered with, by its text or id. ``Q`` is trained, through the frozen model, for the likelihood of the
    targets; ``size=None``: boundless, a rotation of all dims, with a boundary that is trained too and
    becomes sharp meanwhile. ``held_out`` is the share of pairs, drawn under ``seed``, that it is tested on.
    Enabled hooks act.

    Raises :class:`InputError` for texts of different numbers of tokens, or too few, and :class:`SiteError`.
    Source: Geiger et al. 2023 (arXiv 2303.02536); boundless: Wu et al. 2023 (2305.08809).
    """
    from flexmagic.recipes.trainable import Subspace

    pairs, wanted = _pairs(session, bases, sources, targets, position)
    model = session.model
    own, heads = place(model, site)
    width = model.rules[own].dims[-1].size
    if heads is not None or width is None:
        raise InputError(f"{site} has no one width: take the residual stream, such as blocks.0.resid_post.")
    if size is not None and not 1 <= size <= width:
        raise InputError(f"A subspace of {size} dims is none of {width}.")
    order = np.random.default_rng(seed).permutation(len(pairs)).tolist()
    count = round(held_out * len(pairs))
    if not 0 < count < len(pairs):
        raise InputError(f"held_out={held_out} of {len(pairs)} pairs leaves none on one side.")
    test, train = order[:count], order[count:]
    hooks = {
        SWAP: ([str(own)], CODE.format(position=position, name=NAME)), SAID: ([LOGITS], CHOSEN),
    }  # fmt: skip
    with without_module(session, NAME), persistent(session, WARM), hooked(session, hooks) as enabled:
        task = _Task(session, pairs, wanted, enabled, progress)
        session.modules.build(NAME, lambda: Subspace(width, width, boundless=False), seed=seed)
        whole = task.accuracy(test, rows)
        session.modules.build(NAME, lambda: Subspace(width, size or width, boundless=size is None), seed=seed)
        untrained = task.accuracy(test, rows)
        losses = [
            task.step(_turn(train, step, rows), step / max(steps - 1, 1), lr, size) for step in range(steps)
        ]
        found = task.accuracy(test, rows)
        basis = _basis(session, width, size)
    shown = Named(np.array(losses), ("step",), "loss")
    return Interchange(found, untrained, whole, basis, shown, site, position)


@dataclass(frozen=True, eq=False)
class _Task:
    """The pairs, and the runs that a subspace is trained and tested with."""

    session: Session
    pairs: list[tuple[list[int], list[int]]]
    wanted: list[int]
    enabled: list[str]
    progress: Any

    def ids(self, some: list[int]) -> list[list[int]]:
        """Bases, then sources, as rows of one batch."""
        return [self.pairs[i][0] for i in some] + [self.pairs[i][1] for i in some]

    def accuracy(self, some: list[int], rows: int) -> float:
        """The share of pairs that are answered with their targets."""
        self.session.persistent[WARM] = HARD
        right = 0
        for at in range(0, len(some), rows):
            part = some[at : at + rows]
            only = [*self.enabled, SWAP, SAID]
            run = self.session.run(self.ids(part), only=only, progress=self.progress)
            said = run.context[SAID].cpu().tolist()
            right += sum(token == self.wanted[i] for i, token in zip(part, said, strict=True))
            run.release()
        return right / len(some)

    def step(self, part: list[int], done: float, lr: float, size: int | None) -> float:
        """One step of training; ``done``: the share of them that are over."""
        self.session.persistent[WARM] = 1.0 if size is not None else 10.0 ** (1 - 2 * done)
        loss = LOSS.format(half=len(part), targets=[self.wanted[i] for i in part])
        if size is None:  # a boundary costs what it takes
            loss += f' + modules["{NAME}"].boundary'
        only = [*self.enabled, SWAP]
        run = self.session.run(self.ids(part), only=only, backward=loss, progress=self.progress)
        value = run.loss
        assert value is not None  # the run has a loss
        run.release()
        self.session.modules.step("adam", names=[NAME], lr=lr)
        return value


def _turn(train: list[int], step: int, rows: int) -> list[int]:
    """The pairs of a step, each in its turn."""
    return [train[(step * rows + i) % len(train)] for i in range(min(rows, len(train)))]


def _basis(session: Session, width: int, size: int | None) -> NDArray[np.float32]:
    """The trained basis; of a boundless subspace the dims within its boundary."""
    from flexmagic.recipes.trainable import Subspace

    module = Subspace(width, size or width, boundless=size is None)
    module.load_state_dict(session.modules[NAME].state_dict())
    taken = module.mask(HARD) > 0.5
    out: NDArray[np.float32] = module.basis()[:, taken].detach().numpy()
    return out


def _pairs(
    session: Session,
    bases: Sequence[Any],
    sources: Sequence[Any],
    targets: Sequence[str | int],
    position: int,
) -> tuple[list[tuple[list[int], list[int]]], list[int]]:
    """The ids of bases and sources, and those of the targets."""
    first, second = encoded(session, bases), encoded(session, sources)
    if not len(first) == len(second) == len(targets):
        raise InputError(
            f"There are {len(first)} bases, {len(second)} sources and {len(targets)} targets: give as many "
            "of each."
        )
    lengths = sorted({len(row) for row in (*first, *second)})
    if len(lengths) > 1:
        raise InputError(f"Texts that are interchanged have equally many tokens; these have {lengths}.")
    if not -lengths[0] <= position < lengths[0]:
        raise InputError(f"position {position} is not in the {lengths[0]} tokens of the texts.")
    known = {token: token_of(session, token) for token in dict.fromkeys(targets)}
    return list(zip(first, second, strict=True)), [known[token] for token in targets]
