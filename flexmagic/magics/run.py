"""``%flexrun``: one forward under the enabled hooks."""

from __future__ import annotations

from argparse import BooleanOptionalAction
from typing import TYPE_CHECKING, Any

from IPython.core.magic import line_cell_magic, magics_class, needs_local_scope, no_var_expand
from IPython.core.magic_arguments import argument, magic_arguments

from flexmagic.client.pace import Counted
from flexmagic.errors import InputError
from flexmagic.magics.arguments import expanded, names, parse, sites, unquoted
from flexmagic.magics.desk import DeskMagics
from flexmagic.magics.generating import SAMPLING, check_generating, generating, sampling, telling
from flexmagic.magics.inputs import inputs_of, value_of
from flexmagic.magics.status_line import StatusLine, in_notebook, waiting

if TYPE_CHECKING:
    from collections.abc import Sequence

    from flexmagic.client.run import Run
    from flexmagic.client.waiting import Progress
    from flexmagic.view.stream import Stream


def skips(words: Sequence[str]) -> dict[str, str | None]:
    """What ``--skip`` names, and for ``SITE=VALUE`` the expression of what passes instead."""
    found: dict[str, str | None] = {}
    for word in words:
        site, equals, value = word.partition("=")
        if equals:
            found[unquoted(site)] = value
        else:
            found |= dict.fromkeys(sites([word]))
    return found


def check(args: Any) -> None:
    """Raise :class:`InputError` for options that mean nothing together."""
    check_generating(args, "backward", "stop_at", "grad")
    if args.stream and args.generate is None:
        raise InputError("--stream means something with --generate N only.")
    if args.repeat < 1:
        msg = f"--repeat {args.repeat}: give a number of runs, 1 or more."
        raise InputError(msg)


ONE_INPUT = ("prompt", "inputs", "backward", "stop_at", "skip", "repeat", "generate", "stream", *SAMPLING)
"""What means something for one input only, not for a cell that has its own."""


@magics_class
class RunMagics(DeskMagics):
    """Runs of the model."""

    @magic_arguments()
    @argument("prompt", nargs="*", help="a text in quotes; several make a batch")
    @argument(
        "--inputs", metavar="EXPR", help="instead of a text: ids, or a dict of the model's own arguments"
    )
    @argument("--capture", nargs="+", default=[], metavar="SITE", help="capture these sites too")
    @argument("--backward", metavar="LOSS", help="differentiate this expression over logits, output and ids")
    @argument("--seed", type=int, default=0, help="fixes all random draws in hooks")
    @argument("--only", nargs="+", metavar="NAME", help="let only these hooks or groups act in this run")
    @argument("--without", nargs="+", default=[], metavar="NAME", help="let these not act in this run")
    @argument("--stop-at", metavar="SITE", help="end the run there: later layers do not run on any rank")
    @argument(
        "--skip",
        nargs="+",
        default=[],
        metavar="SITE",
        help="do not run these modules: their input passes, or SITE=VALUE",
    )
    @argument(
        "--repeat",
        type=int,
        default=1,
        metavar="N",
        help="run N times, the seed one higher each time; a list",
    )
    @argument(
        "--grad", action=BooleanOptionalAction, default=False, help="keep what gradients need, without a loss"
    )
    @generating
    @argument(
        "--stream", action="store_true", help="generate: a view of the tokens as they come, by likelihood"
    )
    @argument("--name", help="of a cell: the variable of the notebook that gets its forwards")
    @needs_local_scope
    @no_var_expand
    @line_cell_magic
    def flexrun(
        self, line: str, cell: str | None = None, local_ns: dict[str, Any] | None = None
    ) -> Run | list[Run] | Any:
        """Run the model once and return the :class:`Run`; as a cell, run any code on every engine.

        Captured are the sites of the enabled hooks, the model's outputs and what ``--capture``
        names. Example::

            run = %flexrun "The capital of France is" --capture model.layers.*.mlp
            run["model.layers.3.mlp"]

        With a loss, gradients are sites too: those of the loss on the whole batch, as in one
        process. The ports are ``grad_output``, ``grad_input`` and, after a parameter's name,
        ``grad``::

            site = "model.layers.*.mlp:grad_output"
            run = %flexrun "Paris is" --backward "logits[:, -1, 5].sum()" --capture {site}
            run["model.layers.3.mlp:grad_output"]

        A generation has steps, of which step 0 sees the whole prompt; hooks and captures act in each::

            run = %flexrun "Once upon a time" --generate 20 --sample --temperature 0.8 --stream
            run.step(3)["model.layers.3.mlp"]

        Parts of the model can be left out::

            run = %flexrun "Paris is" --capture model.layers.* --stop-at model.layers.2
            run = %flexrun "Paris is" --skip model.layers.{1..2} model.layers.3.mlp=0

        In a cell, hooks and captures act in every forward that it makes with ``model``; the value of its
        last expression comes back, once if all ranks have the same, else by rank. ``--name`` keeps the
        forwards as runs::

            %%flexrun --capture model.layers.3.mlp --name made
            ids = tokenizer("Paris is", return_tensors="pt").input_ids
            model(ids).logits[0, -1].argmax()
        """
        args = parse(self.flexrun, expanded(self.shell, line, local_ns))
        if args is None:
            return None
        _ = self._desk.session.model  # without one, that is what to say first
        if cell is not None:
            return self._cell(args, cell)
        check(args)
        inputs = inputs_of(self.shell, args, "%flexrun")
        generates = args.generate is not None
        what, quiet = ("Generating", 0.0) if generates else ("Running", 1.0)
        runs: list[Run] = []
        with waiting(self._desk.shell, what, quiet=quiet, cancel=self._desk.session.cancel) as status:
            counted = Counted(status.tick, "runs", args.repeat)
            for counted.done in range(args.repeat):
                options = self._options(args, args.seed + counted.done)
                heard = status.tick if args.repeat == 1 else counted.heard
                runs.append(
                    self._generate(args, inputs, options, status)
                    if generates
                    else self._run(args, inputs, options, heard)
                )
            status.done(repr(runs[0]) if args.repeat == 1 else f"{args.repeat} runs")
        return runs[0] if args.repeat == 1 else runs

    def _cell(self, args: Any, cell: str) -> Any:
        """Any code on every engine."""
        given = {**vars(args), "repeat": args.repeat if args.repeat != 1 else None}
        wrong = [name for name in ONE_INPUT if given[name] not in (None, [], False)]
        if wrong:
            what = "a prompt" if wrong[0] == "prompt" else f"--{wrong[0].replace('_', '-')}"
            raise InputError(
                f"A %%flexrun cell makes its own forwards and takes no {what.removeprefix('a ')}."
            )
        options = self._options(args, args.seed)
        del options["skip"]
        with waiting(self._desk.shell, "Running", quiet=1.0, cancel=self._desk.session.cancel) as status:
            made = self._desk.session.run_cell(
                cell, grad=args.grad, progress=status.tick, first_line=2, **options
            )
            status.done(repr(made))
        if args.name is not None:
            self._desk.shell.user_ns[args.name] = made
        return made.value

    def _options(self, args: Any, seed: int) -> dict[str, Any]:
        """What a run and a generation have in common."""
        return {
            "capture": sites(args.capture),
            "seed": seed,
            "only": None if args.only is None else names(args.only),
            "without": names(args.without),
            "skip": {
                site: None if text is None else value_of(self.shell, "--skip", text)
                for site, text in skips(args.skip).items()
            },
        }

    def _run(self, args: Any, inputs: Any, options: dict[str, Any], progress: Progress | None) -> Run:
        return self._desk.session.run(
            inputs,
            backward=None if args.backward is None else unquoted(args.backward),
            grad=args.grad,
            stop_at=None if args.stop_at is None else unquoted(args.stop_at),
            progress=progress,
            **options,
        )

    def _generate(self, args: Any, inputs: Any, options: dict[str, Any], status: StatusLine) -> Run:
        """Show the text in the status line as it comes."""
        stream = self._stream(args)
        try:
            return self._desk.session.generate(
                inputs, args.generate, progress=telling(status.now, stream), **options, **sampling(args)
            )
        finally:
            if stream is not None:
                stream.end()

    def _stream(self, args: Any) -> Stream | None:
        """The view in which the text appears, where one was asked for and can be."""
        if not args.stream or not in_notebook(self._desk.shell):
            return None
        from flexmagic.view.stream import Stream

        return Stream("generated")
