"""``%flexrun``: one forward under the enabled hooks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from IPython.core.magic import line_magic, magics_class, needs_local_scope, no_var_expand
from IPython.core.magic_arguments import argument, magic_arguments

from flexmagic.errors import InputError
from flexmagic.magics.arguments import expanded, names, parse, sites, texts, unquoted
from flexmagic.magics.desk import DeskMagics, waiting

if TYPE_CHECKING:
    from flexmagic.client.run import Run


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
    @needs_local_scope
    @no_var_expand
    @line_magic
    def flexrun(self, line: str, local_ns: dict[str, Any] | None = None) -> Run | None:
        """Run the model once and return the :class:`Run`.

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
        """
        args = parse(self.flexrun, expanded(self.shell, line, local_ns))
        if args is None:
            return None
        session = self._desk.session
        _ = session.model  # without one, that is what to say first
        inputs = self._inputs(args)
        with waiting(self._desk.shell, "Running", quiet=1.0) as status:
            run = session.run(
                inputs,
                capture=sites(args.capture),
                backward=None if args.backward is None else unquoted(args.backward),
                seed=args.seed,
                only=None if args.only is None else names(args.only),
                without=names(args.without),
                progress=status.tick,
            )
            status.done(repr(run))
        return run

    def _inputs(self, args: Any) -> Any:
        prompts = texts(args.prompt)
        if bool(prompts) == bool(args.inputs):
            msg = 'Give a prompt or --inputs, one of them: %flexrun "The capital of France is"'
            raise InputError(msg)
        if prompts:
            return prompts[0] if len(prompts) == 1 else prompts
        assert self.shell is not None  # registered on one
        try:
            return self.shell.ev(unquoted(args.inputs))
        except Exception as error:  # noqa: BLE001 - the user's expression may raise anything
            msg = f"--inputs {args.inputs}: {type(error).__name__}: {error}"
            raise InputError(msg) from None
