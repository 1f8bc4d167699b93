"""`flexmagic demo`: the main job of the package in a minute, with a report and a page to look at."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import flexmagic
from flexmagic.cli.one_process import OneProcess, largest_difference
from flexmagic.cli.page import write_page
from flexmagic.client.table import Table, size_text
from flexmagic.errors import FlexError, InputError

PROMPT = "When Mary and John went to the store, John gave a drink to"

SITES = (
    "model.layers.0.self_attn.q_proj",
    "model.layers.0.self_attn:output[0]",
    "model.layers.1.self_attn.o_proj:input[0]",
    "model.layers.2.mlp.up_proj",
    "model.layers.3.mlp",
)
"""What is looked at: places that a tensor-parallel model splits along different dims, or not at all."""

LOGITS = ":output.logits"
ROUNDING = 1e-5
"""The largest relative difference in float32 that another order of summation explains."""

EDITED = "model.layers.*.self_attn:output[0]"
READ = "model.layers.*.mlp"


def silence(x: Any, _h: Any) -> None:
    """At the last word, let an attention say nothing; `x: [batch, seq, feature]`."""
    x[:, -1] *= 0


def measure(x: Any, h: Any) -> None:
    """Note how long the vector at the last word is; `x: [batch, seq, feature]`, which stays as it is."""
    h.ctx[h.index] = float(x[0, -1].norm())


def run_demo(*, engines: int = 2, model: str | None = None, page: str | None = None) -> None:
    """Start engines, load a model over them, run it with and without an edit, and print a report.

    ``model``: a directory, by default the model that comes with the source. ``page``: where the
    first demo notebook, executed, is written as HTML; ``None`` leaves it out. Raises
    :class:`InputError` for what is not there.
    """
    if engines < 1:
        msg = "--engines must be at least 1."
        raise InputError(msg)
    path = _model_directory(model)
    notebook = _shipped("01_first_hook.ipynb") if page is not None else None
    _say(f"Starting {engines} engines, one process for each part of the model (a few seconds) ...")
    with flexmagic.Session.start(engines, oversubscribe=True) as session:
        _report(session, path)
    if page is not None and notebook is not None:
        _say(f"\nRunning the notebook {notebook.name} from top to bottom (a minute at most) ...")
        write_page(notebook, Path(page))
        _say(f"It is here with all its pictures, readable offline: {Path(page).resolve()}")


def _report(session: flexmagic.Session, path: Path) -> None:
    one = OneProcess(path)
    model = session.load(path)
    parts = [f"{size_text(n)} on engine {rank}" for rank, n in enumerate(model.parameter_bytes)]
    _say(f"\n{session.status()}\n")
    _say(f"Model: {model.name} with {size_text(one.parameter_bytes)} of weights, split: {', '.join(parts)}.")
    _say(f'Prompt: "{PROMPT}"')

    session.hook(READ, measure, name="measure")
    before = session.run(PROMPT, capture=SITES)
    lengths = [f"{length:.2f}" for _, length in sorted(before.context.items())]
    _say(f"\nA hook that reads, on {READ}: the vector at the last word is {', '.join(lengths)} long.")

    session.hook(EDITED, silence, name="silence")
    after = session.run(PROMPT, capture=SITES)
    _say(f"A hook that edits, on {EDITED}: x[:, -1] *= 0.")
    _say("The last word can no longer look back at the names, and the model guesses something else:\n")

    expected_before = one.run(PROMPT, SITES)
    expected_after = one.run(PROMPT, SITES, (EDITED, silence))
    _say(_next_words(before.logits[0, -1], after.logits[0, -1], one))
    _compare([(before, *expected_before), (after, *expected_after)])


def _next_words(before: NDArray[Any], after: NDArray[Any], one: OneProcess, most: int = 4) -> Table:
    """The likeliest next tokens of either run, from logits `[vocab]`, and their probabilities in both."""
    was, now = _softmax(before), _softmax(after)
    tokens = dict.fromkeys([*np.argsort(-was)[:most].tolist(), *np.argsort(-now)[:most].tolist()])
    rows = tuple((repr(one.word(t)), f"{was[t]:6.1%}", f"{now[t]:6.1%}") for t in tokens)
    return Table(("next word", "before", "after the edit"), rows)


def _softmax(x: NDArray[Any]) -> NDArray[Any]:
    shifted = np.exp(x.astype(np.float64) - x.max())
    return shifted / shifted.sum()


def _compare(runs: Sequence[tuple[flexmagic.Run, NDArray[Any], dict[str, NDArray[Any]]]]) -> None:
    """Print each site's whole shape, its layout and how far it is from one process.

    ``runs``: a run with the logits and the sites' tensors that it should have given. Raises
    :class:`FlexError` if anything is further away than rounding explains.
    """
    rows, far = [], []
    for site in [*SITES, LOGITS]:
        whole = runs[0][0][site]
        away = [
            largest_difference(run[site].numpy(), logits if site == LOGITS else seen[site])
            for run, logits, seen in runs
        ]
        places = ", ".join(whole.layout.describe_placements())
        rows.append((site, whole.layout.describe_shape(), places, *(f"{value:.1e}" for value in away)))
        far += away
    columns = ("site", "whole tensor", "on the engines", "difference", "edited")
    title = "Put together from the pieces, against the same model in one process:"
    _say(f"\n{Table(columns, tuple(rows), title)}")
    largest = float(np.max(far))  # NaN if any is
    if not largest <= ROUNDING:
        msg = f"The engines and one process disagree by {largest:.1e}, more than rounding explains."
        raise FlexError(msg)
    _say(f"\nThe largest difference is {largest:.1e} of a tensor's largest value: rounding, nothing else.")


def _model_directory(given: str | None) -> Path:
    """The model's directory: as given, or the one that comes with the source."""
    path = Path(given) if given is not None else _shipped("model")
    if not (path / "config.json").is_file():
        msg = f"There is no model in {path}: it has no config.json."
        raise InputError(msg)
    return path


def _shipped(name: str) -> Path:
    """Something of ``demo_notebooks``, beside the source or in the current directory."""
    places = [Path(flexmagic.__file__).parents[1] / "demo_notebooks", Path("demo_notebooks")]
    for place in places:
        if (place / name).exists():
            return place / name
    msg = (
        f"demo_notebooks/{name} is not here. Call flexmagic demo in a checkout of the source, "
        "or say --model PATH --no-notebook."
    )
    raise InputError(msg)


def _say(text: object) -> None:
    print(text, flush=True)
