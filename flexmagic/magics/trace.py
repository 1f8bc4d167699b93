"""``%%flextrace``: an intervention written as ordinary code, in the order of the forward."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from IPython.core.magic import cell_magic, magics_class, needs_local_scope, no_var_expand
from IPython.core.magic_arguments import argument, magic_arguments

from flexmagic.errors import InputError
from flexmagic.magics.arguments import expanded, names, parse, sites, unquoted
from flexmagic.magics.desk import DeskMagics
from flexmagic.magics.generating import check_generating, generating, sampling, telling
from flexmagic.magics.inputs import inputs_of, value_of
from flexmagic.magics.status_line import waiting

if TYPE_CHECKING:
    from collections.abc import Mapping

    from flexmagic.client.run import Run
    from flexmagic.client.sweep import Sweep


@magics_class
class TraceMagics(DeskMagics):
    """Straight-line interventions."""

    @magic_arguments()
    @argument("prompt", nargs="*", help="a text in quotes; several make a batch")
    @argument(
        "--inputs", metavar="EXPR", help="instead of a text: ids, or a dict of the model's own arguments"
    )
    @argument("--name", help="the variable of the notebook that gets the run")
    @argument(
        "--given",
        nargs="+",
        default=[],
        metavar="NAME=EXPR",
        help="values of the notebook that the cell may use",
    )
    @argument(
        "--over", nargs="+", default=[], metavar="NAME=EXPR", help="run once for each value, or for each pair"
    )
    @argument("--capture", nargs="+", default=[], metavar="SITE", help="capture these sites too")
    @argument("--backward", metavar="LOSS", help="differentiate this expression over logits, output and ids")
    @generating
    @argument("--seed", type=int, default=0, help="fixes all random draws in the cell and in hooks")
    @argument("--only", nargs="+", metavar="NAME", help="let only these hooks or groups act in this run")
    @argument("--without", nargs="+", default=[], metavar="NAME", help="let these not act in this run")
    @argument(
        "--limit",
        type=float,
        default=60.0,
        metavar="SECONDS",
        help="what the cell may take between two sites",
    )
    @needs_local_scope
    @no_var_expand
    @cell_magic
    def flextrace(self, line: str, cell: str, local_ns: dict[str, Any] | None = None) -> Run | Sweep | None:
        """Run the model once with the cell's code in the middle of it, on every rank, on whole tensors.

        Reading ``model.layers[2].output`` waits until the forward is there; assign it or write into it,
        and the model goes on with that. ``.input`` is the first tensor that a module takes, ``.inputs``
        all of them, and where a module returns several, ``.output[0]`` is one. ``save.name = value`` puts
        a value into ``run.context``. ``model.lm_head(h)`` is what a module makes of whole tensors,
        ``model.norm.weight`` a parameter. The cell sees the engines' namespace and what ``--given`` names,
        and nothing else of the notebook. Example, which moves a value from the first prompt to the second::

            %%flextrace "The capital of France is" "The capital of Italy is" --name run
            h = model.layers[2].output
            h[1, -1] = h[0, -1]
            save.top = model.output.logits[:, -1].argmax(-1)

        With ``--generate N`` the model generates. Step 0, the whole prompt, is where the cell begins::

            %%flextrace "Once upon a time" --generate 8
            for step in model.steps[2:4]:
                model.layers[1].mlp.output *= 2

        With ``--over`` the cell runs once for each value, of each pair of values::

            %%flextrace "clean" "corrupt" --name grid --over layer=range(4) position=range(5)
            h = model.layers[layer].output
            h[1, position] = h[0, position]
            save.p = model.output.logits[1, -1].softmax(-1)[5]
        """
        args = parse(self.flextrace, expanded(self.shell, line, local_ns))
        if args is None:
            return None
        _ = self._desk.session.model  # without one, that is what to say first
        check_generating(args, "backward")
        given, over = self._values("--given", args.given), self._values("--over", args.over)
        options: dict[str, Any] = {
            "given": given,
            "capture": sites(args.capture),
            "backward": None if args.backward is None else unquoted(args.backward),
            "seed": args.seed,
            "only": None if args.only is None else names(args.only),
            "without": names(args.without),
            "max_new_tokens": args.generate,
            "generating": sampling(args),
            "limit": args.limit,
            "first_line": 2,
        }
        inputs = inputs_of(self.shell, args, "%%flextrace")
        made = self._made(inputs, cell, over, options)
        if args.name is None:
            return made
        self._desk.shell.user_ns[args.name] = made
        return None

    def _made(self, inputs: Any, cell: str, over: Mapping[str, Any], options: dict[str, Any]) -> Run | Sweep:
        """Run the cell, or sweep it over values; the text of a generation is shown as it comes."""
        generates = options["max_new_tokens"] is not None
        what, quiet = ("Generating", 0.0) if generates else ("Running", 1.0)
        made: Run | Sweep
        with waiting(self._desk.shell, what, quiet=quiet, cancel=self._desk.session.cancel) as status:
            progress = telling(status.now) if generates else status.tick
            if over:
                made = self._desk.session.sweep(inputs, cell, over, progress=progress, **options)
            else:
                made = self._desk.session.trace(inputs, cell, progress=progress, **options)
            status.done(repr(made))
        return made

    def _values(self, option: str, words: list[str]) -> dict[str, Any]:
        """What ``NAME=EXPR`` words give, evaluated in the notebook."""
        out = {}
        for word in map(unquoted, words):
            name, equals, text = word.partition("=")
            if not equals or not name.isidentifier():
                raise InputError(f"{option} {word}: write a name and an expression, as in layer=range(4).")
            out[name] = value_of(self.shell, f"{option} {name}", text)
        return out
