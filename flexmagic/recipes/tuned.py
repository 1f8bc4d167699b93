"""The tuned lens: what each layer knows of the answer, read by a map that was trained for that layer."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from flexmagic.errors import InputError, SiteError
from flexmagic.recipes.aside import LOGITS, batches, encoded, hooked, persistent, without_module
from flexmagic.recipes.lens import Lens, lens_of
from flexmagic.recipes.named import Named
from flexmagic.recipes.places import depth, place, token_of

if TYPE_CHECKING:
    from flexmagic import Shown
    from flexmagic.client.run import Run
    from flexmagic.client.session import Session

NAME = "tuned_lens"
STATES, TARGET, LAYERS = f"{NAME} states", f"{NAME} target", f"{NAME} layers"
"""What the hooks keep: ``[layer, batch, seq, width]``, ``[batch, seq, vocab]``, and the layers to be read."""
KEEP, JOIN, AIM, READ, FAR, BEST = (
    f"{NAME} {what}" for what in ("keep", "join", "aim", "read", "far", "best")
)
"""The hooks by name."""
CODE = {
    KEEP: 'ctx["{name} " + str({numbers}[site])] = x.detach()',
    JOIN: f'persistent["{STATES}"] = torch.stack([ctx.pop("{NAME} " + str(n)) for n in range({{count}})])',
    AIM: f'persistent["{TARGET}"] = x.detach().float().log_softmax(-1)',
    READ: (
        f'kept, lens = persistent["{STATES}"], modules["{{name}}"]\n'
        f'x = torch.cat([lens(kept[n], n) for n in persistent["{LAYERS}"]])\n'
        f'ctx["{TARGET}"] = persistent["{TARGET}"]'
    ),
    FAR: (
        f'p = ctx["{TARGET}"]\n'
        "q = x.float().log_softmax(-1).unflatten(0, (-1, len(p)))\n"
        f'ctx["{FAR}"] = (p.exp() * (p - q)).sum(-1).mean((1, 2))'
    ),
    BEST: (
        "logprobs = x.float().log_softmax(-1)\n"
        "best = logprobs.topk({top})\n"
        'ctx["ids"], ctx["logprobs"] = best.indices, best.values\n'
        'ctx["logits"], ctx["tracked"] = x.float().gather(-1, best.indices), logprobs[..., {tracked}]'
    ),
}
LOSS = (
    "(lambda q, p: (p.exp() * (p - q)).sum(-1).mean((1, 2)).sum())("
    f"logits.float().log_softmax(-1).unflatten(0, (-1, len(ctx['{TARGET}']))), ctx['{TARGET}'])"
)
"""KL(model ‖ lens) in nats, the mean over rows and positions, the sum over the layers that are read."""


@dataclass(frozen=True, eq=False)
class TunedLens:
    """A trained lens: a module of the session, ``session.modules[name]``, with a map for each layer.

    ``losses``: ``[step]``, the sum over the layers of the mean KL divergence from the model's own prediction,
    in nats; of a lens trained layer by layer ``[layer, step]``; empty for one that was loaded.
    """

    session: Session
    losses: Named
    name: str = NAME

    def save(self, path: str | Path) -> Path:
        """Write the maps to a safetensors file."""
        return self.session.modules.save(path, self.name)

    @classmethod
    def load(cls, session: Session, path: str | Path, name: str = NAME) -> TunedLens:
        """Read what :meth:`save` has written, for the model that is loaded; raises :class:`InputError`."""
        _register(session, name)
        session.modules.load(path)
        return cls(session, Named(np.zeros(0), ("step",), "loss"), name)

    def read(
        self,
        inputs: Sequence[Any] | str,
        *,
        top: int = 5,
        track: Sequence[str | int] = (),
        progress: Any = None,
    ) -> Lens:
        """Read the residual stream as :func:`logit_lens` does, each layer through its own map.

        ``inputs``: a text, or several of equally many tokens, or their ids. One forward, and for each layer
        one of the model's end alone. Enabled hooks act in the first.
        """
        one = isinstance(inputs, str) or (len(inputs) > 0 and isinstance(inputs[0], int))
        ids = encoded(self.session, [inputs] if one else inputs)
        if len(batches(ids, len(ids))) > 1:
            raise InputError("The texts have different numbers of tokens: read them one by one.")
        tracked = [token_of(self.session, token) for token in track]
        count = depth(self.session.model)
        found: dict[str, list[NDArray[Any]]] = {n: [] for n in ("ids", "logprobs", "logits", "tracked")}
        with _hooks(self.session, self.name, top=top, tracked=tracked) as own:
            first = _keep(self.session, ids, own, progress)
            for layer in range(count + 1):
                self.session.persistent[LAYERS] = [layer]
                run = _end(self.session, ids, [READ, BEST], progress=progress)
                for name, values in found.items():
                    values.append(run.context[name].cpu().numpy())
                run.release()
        tokens = [list(row) for row in first.tokens] or [[str(i) for i in row] for row in ids]
        return lens_of(
            self.session, {n: np.stack(v) for n, v in found.items()}, tokens, tracked, "tuned lens"
        )

    def divergence(self, texts: Sequence[Any], *, rows: int = 8, progress: Any = None) -> Named:
        """KL(model ‖ lens) in nats, ``[layer]``, the mean over tokens; see :func:`divergence`."""
        return divergence(self.session, texts, name=self.name, rows=rows, progress=progress)

    def lines(self) -> Shown:
        """The loss over the steps; of a lens trained layer by layer, a line for each."""
        from flexmagic import lines

        if len(self.losses.dims) == 1:
            return lines({"all layers": self.losses.values}, title="tuned lens: KL in nats", over="step")
        each = {f"layer {n}": values for n, values in enumerate(self.losses.values)}
        return lines(each, title="tuned lens: KL in nats", over="step")

    def __repr__(self) -> str:
        """How many maps there are, and the first and last loss."""
        told = ""
        if self.losses.values.size:
            first, last = (self.losses.values[..., at].sum() for at in (0, -1))
            told = f", loss {first:.3f} → {last:.3f} nats in {self.losses.values.shape[-1]} steps"
        return f"<TunedLens modules.{self.name}: {depth(self.session.model)} layers{told}>"


def tuned_lens(
    session: Session,
    texts: Sequence[Any],
    *,
    steps: int = 50,
    rows: int = 8,
    lr: float = 1e-3,
    optimizer: str = "adam",
    together: bool = True,
    name: str = NAME,
    progress: Any = None,
) -> TunedLens:
    """Train a map for each layer that turns its residual stream into the last layer's, as far as it can.

    The maps ``h + h Wᵀ + b`` begin as the identity, which is the logit lens, and are trained so that the
    model's own final norm and unembedding say of ``h`` what the whole model says: the loss is the KL
    divergence from its prediction. Layer 0 is what enters the first layer. The model is frozen; its norm
    and unembedding stay where they are, split as they are.

    ``texts``: training texts, of which ``rows`` of equally many tokens make a batch; each of ``steps`` takes
    the next one: one forward of the model that keeps what leaves each layer on the engines, and one of its
    end alone, with all layers as rows of one batch, backward into the maps. ``together=False``: layer by
    layer, which gives the same maps with less memory. ``optimizer`` and ``lr`` are torch's. Enabled hooks
    act in the first of both.

    Raises :class:`InputError` for texts that are none, :class:`SiteError` for a model without the standard
    names. Source: Belrose et al. 2023, "Eliciting latent predictions from transformers with the tuned lens"
    (arXiv 2303.08112); the second experiment of FlexModel (2312.03140).
    """
    if steps < 1:
        raise InputError(f"Training takes 1 step or more, not {steps}.")
    ids = encoded(session, texts)
    parts = batches(ids, rows)
    count = _register(session, name)
    groups = [list(range(count))] if together else [[layer] for layer in range(count)]
    losses = np.zeros((len(groups), steps))
    with _hooks(session, name) as own:
        for at, layers in enumerate(groups):
            session.persistent[LAYERS] = layers
            for step in range(steps):
                batch = [ids[i] for i in parts[step % len(parts)]]
                _keep(session, batch, own, progress)
                run = _end(session, batch * len(layers), [READ], backward=LOSS, progress=progress)
                losses[at, step] = run.loss
                run.release()
                session.modules.step(optimizer, names=[name], lr=lr)
    shown = Named(losses[0], ("step",), "loss") if together else Named(losses, ("layer", "step"), "loss")
    return TunedLens(session, shown, name)


def divergence(
    session: Session, texts: Sequence[Any], *, name: str | None = None, rows: int = 8, progress: Any = None
) -> Named:
    """How far each layer's lens is from what the model says: KL(model ‖ lens) in nats, ``[layer]``.

    The mean over all tokens of ``texts``. ``name``: of a tuned lens in ``session.modules``; without it, of
    the logit lens. The last layer's is 0. Raises as :func:`tuned_lens` does.
    """
    ids = encoded(session, texts)
    plain = f"{NAME}_identity"
    count = depth(session.model) if name is not None else _register(session, plain)
    total = np.zeros(count + 1)
    with without_module(session, plain), _hooks(session, name or plain) as own:
        session.persistent[LAYERS] = list(range(count + 1))
        for part in batches(ids, rows):
            batch = [ids[i] for i in part]
            _keep(session, batch, own, progress)
            run = _end(session, batch * (count + 1), [READ, FAR], progress=progress)
            total += run.context[FAR].double().cpu().numpy() * len(part) * len(batch[0])
            run.release()
    labels = {"layer": ("after", ("input", *(f"layer {n}" for n in range(count))))}
    return Named(total / sum(map(len, ids)), ("layer",), "KL", labels)


def _register(session: Session, name: str) -> int:
    """Put maps that are the identity on all ranks; returns how many."""
    from flexmagic.recipes.trainable import Translators

    model = session.model
    count, (site, _) = depth(model), place(model, "blocks.0.resid_pre")
    width = model.rules[site].dims[-1].size
    assert width is not None  # a residual stream has one
    session.modules[name] = Translators(count, width)
    return count


@contextlib.contextmanager
def _hooks(session: Session, name: str, *, top: int = 1, tracked: Sequence[int] = ()) -> Iterator[list[str]]:
    """The hooks that keep a forward's states and read them; yields the user's enabled ones."""
    session.modules[name]  # raises for a lens that is not there
    model = session.model
    count = depth(model)
    names = ["blocks.0.resid_pre", *(f"blocks.{n}.resid_post" for n in range(count))]
    sites = [str(place(model, each)[0]) for each in names]
    norm = f"{place(model, 'final_norm')[0].path}:input"
    numbers = {site: n for n, site in enumerate(sites)}
    logits = model.rules.get(place(model, LOGITS)[0])
    if logits is None:
        raise SiteError("This model returns no logits, so that it has no lens.")
    size = logits.dims[-1].size
    if top < 1 or (size is not None and top > size):
        raise InputError(
            f"A lens shows 1 token or more at each place, and no more than there are, not {top}."
        )
    bodies = {
        KEEP: (sites, CODE[KEEP].format(name=NAME, numbers=numbers)),
        JOIN: ([norm], CODE[JOIN].format(count=count + 1)),
        AIM: ([LOGITS], CODE[AIM]),
        READ: ([norm], CODE[READ].format(name=name)),
        FAR: ([LOGITS], CODE[FAR]),
        BEST: ([LOGITS], CODE[BEST].format(top=top, tracked=list(tracked))),
    }
    with persistent(session, STATES, TARGET, LAYERS), hooked(session, bodies) as own:
        yield own


def _keep(session: Session, ids: list[list[int]], own: list[str], progress: Any) -> Run:
    """One forward of the whole model; what leaves each layer, and what the model says, stays there."""
    run = session.run(ids, only=[*own, KEEP, JOIN, AIM], progress=progress)
    run.release()
    return run


def _end(session: Session, ids: list[list[int]], hooks: list[str], **options: Any) -> Run:
    """One forward of the model's end alone, on what was kept; ``ids``: as many rows as are read."""
    return session.run(ids, only=hooks, skip="blocks.*", **options)
