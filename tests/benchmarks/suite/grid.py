"""Row (e): a patching grid, layers × positions, in one process, against others' documented forms.

The clean run's residual stream is put into the corrupt run before each layer, at each position; what is
kept is the logit of one token at the last place. All must give the same grid.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from suite import nnsight_ways
from suite.models import llama
from suite.pairs import Slow, in_turn, ratio
from suite.report import Report, Row

TOKEN = 5
SECONDS = 240.0
"""For all rounds of a grid: what is many times slower takes part in fewer, never in less than five."""

CODE = """
x = model.layers[layer].input
x[0, position] = clean[layer, position]
save.p = model.output.logits[0, -1, 5]
"""
KEEP = """
kept = []
for layer in model.layers:
    kept.append(layer.input[0])
save.clean = torch.stack(kept)
"""
WORDS = {
    "hooks": "plain torch hooks, a forward per cell",
    "nnsight": "NNsight, a trace per cell",
    "nnsight invokes": "NNsight, a layer's invokes in one trace",
    "transformer_lens": "TransformerLens get_act_patch_resid_pre",
    "pyvene": "pyvene, an intervention per cell",
}

Grid = Callable[[], torch.Tensor]


def grid_rows(
    report: Report,
    folder: Path,
    rounds: int,
    *,
    layers: int = 12,
    positions: int = 20,
    width: int = 128,
    only: tuple[str, ...] = (),
) -> None:
    """Measure; each way makes the whole grid, its clean run included. ``only``: not all of the rivals."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from flexmagic import Session

    path = llama(folder, width=width, layers=layers, heads=width // 32)
    model = AutoModelForCausalLM.from_pretrained(str(path)).eval()
    tokenizer = AutoTokenizer.from_pretrained(str(path))
    generator = torch.Generator().manual_seed(1)
    clean, corrupt = torch.randint(5, 1000, (2, 1, positions), generator=generator)
    with Session.start(1, oversubscribe=True) as session:
        session.load(path, tp=1)
        ways: dict[str, Grid] = {
            "hooks": lambda: _hooks(model, clean, corrupt),
            "flexmagic": lambda: _flexmagic(session, clean, corrupt, layers, positions),
        }
        truth = ways["hooks"]()
        assert truth.std() > 0
        for name, make in {
            "nnsight": lambda: _nnsight(model, tokenizer, clean, corrupt, nnsight_ways.grid),
            "nnsight invokes": lambda: _nnsight(
                model, tokenizer, clean, corrupt, nnsight_ways.grid_of_invokes
            ),
            "transformer_lens": lambda: _transformer_lens(path, clean, corrupt),
            "pyvene": lambda: _pyvene(path, clean, corrupt),
        }.items():
            if not only or name in only:
                _try(report, ways, name, make, truth)
        _check("flexmagic", ways["flexmagic"](), truth)
        quiet = {name: _silent(way) for name, way in ways.items()}
        others = frozenset({"nnsight", "transformer_lens", "pyvene"})
        times = in_turn(quiet, rounds, slow=Slow(others, SECONDS))
    report.keep_times(f"e: width {width}", times)
    what = f"patching grid of {layers} layers × {positions} positions, width {width}: speed"
    rivals = [name for name in ways if name not in ("hooks", "flexmagic")]
    middle = {name: sorted(times[name])[len(times[name]) // 2] for name in rivals}
    fastest = min(rivals, key=middle.__getitem__, default="")
    for name in [*rivals, "hooks"]:
        target = ">= 1.5" if name == fastest else ""
        value = ratio(times, name, "flexmagic")
        report.add(Row("e", what, WORDS[name], value, target, rounds=len(times[name])))
    few = min(map(len, times.values()))
    if few < rounds:
        report.note(f"(e) width {width}: what is slowest was taken in {few} of the {rounds} rounds")


def _try(
    report: Report, ways: dict[str, Grid], name: str, make: Callable[[], Grid], truth: torch.Tensor
) -> None:
    try:
        way = make()
        found: list[torch.Tensor] = []
        _silent(lambda: found.append(way()))()
        _check(name, found[0], truth)
    except Exception as error:  # noqa: BLE001 - a rival that does not run is named, with its words
        first = (str(error).strip().splitlines() or [""])[0][:150]
        report.note(f"(e) {WORDS[name]} was not run: {type(error).__name__}: {first}")
    else:
        ways[name] = way


def _check(name: str, found: torch.Tensor, truth: torch.Tensor) -> None:
    worst = float((found - truth).abs().max() / truth.abs().max())
    if found.shape != truth.shape or worst > 1e-4:
        raise AssertionError(f"{name} gives another grid: {worst:.1e} apart")


def _silent(way: Callable[[], Any]) -> Callable[[], None]:
    def once() -> None:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            way()

    return once


def _flexmagic(
    session: Any, clean: torch.Tensor, corrupt: torch.Tensor, layers: int, positions: int
) -> torch.Tensor:
    kept = session.trace(clean, KEEP).context["clean"]
    over = {"layer": range(layers), "position": range(positions)}
    return torch.from_numpy(session.sweep(corrupt, CODE, over, given={"clean": kept})["p"])


@torch.no_grad()
def _hooks(model: Any, clean: torch.Tensor, corrupt: torch.Tensor) -> torch.Tensor:
    kept: list[torch.Tensor] = []
    blocks = model.model.layers
    handles = [b.register_forward_pre_hook(lambda _m, args: kept.append(args[0])) for b in blocks]
    model(clean)
    for handle in handles:
        handle.remove()
    grid = torch.zeros(len(blocks), clean.shape[1])
    for layer, block in enumerate(blocks):
        for position in range(clean.shape[1]):

            def patch(_module: Any, args: Any, layer: int = layer, position: int = position) -> Any:
                x = args[0].clone()
                x[0, position] = kept[layer][0, position]
                return (x, *args[1:])

            handle = block.register_forward_pre_hook(patch)
            grid[layer, position] = model(corrupt).logits[0, -1, TOKEN]
            handle.remove()
    return grid


def _nnsight(model: Any, tokenizer: Any, clean: torch.Tensor, corrupt: torch.Tensor, way: Any) -> Grid:
    from nnsight import LanguageModel

    wrapped = LanguageModel(model, tokenizer=tokenizer)
    return lambda: way(wrapped, clean, corrupt, TOKEN)


def _transformer_lens(path: Path, clean: torch.Tensor, corrupt: torch.Tensor) -> Grid:
    from transformer_lens import patching
    from transformer_lens.model_bridge import TransformerBridge

    logging.disable(logging.WARNING)
    bridge = TransformerBridge.boot_transformers(str(path), device="cpu")

    def grid() -> torch.Tensor:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _, cache = bridge.run_with_cache(clean)
            return patching.get_act_patch_resid_pre(
                bridge, corrupt, cache, lambda logits: logits[0, -1, TOKEN]
            )

    return grid


def _pyvene(path: Path, clean: torch.Tensor, corrupt: torch.Tensor) -> Grid:
    import pyvene
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(str(path)).eval()

    @torch.no_grad()
    def grid() -> torch.Tensor:
        out = torch.zeros(model.config.num_hidden_layers, clean.shape[1])
        for layer in range(len(out)):
            config = pyvene.IntervenableConfig(
                [pyvene.RepresentationConfig(layer, "block_input", "pos", 1)], pyvene.VanillaIntervention
            )
            intervenable = pyvene.IntervenableModel(config, model)
            for position in range(out.shape[1]):
                _, patched = intervenable(
                    {"input_ids": corrupt}, [{"input_ids": clean}], {"sources->base": (position, position)}
                )
                out[layer, position] = patched.logits[0, -1, TOKEN]
        return out

    return grid
