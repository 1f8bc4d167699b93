"""Methods of interpretability as magics, each of which calls one function of the recipes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

from IPython.core.magic import line_magic, magics_class, needs_local_scope, no_var_expand
from IPython.core.magic_arguments import argument, magic_arguments

from flexmagic.errors import InputError
from flexmagic.magics.arguments import bytes_of, expanded, parse, texts, unquoted
from flexmagic.magics.desk import DeskMagics
from flexmagic.magics.inputs import inputs_of, value_of
from flexmagic.magics.status_line import waiting

if TYPE_CHECKING:
    from collections.abc import Callable

    from flexmagic.magics.desk import Desk
    from flexmagic.recipes.induction import Induction
    from flexmagic.recipes.lens import Lens
    from flexmagic.recipes.patching import Patching
    from flexmagic.recipes.steering import Steering
    from flexmagic.recipes.tuned import TunedLens

Made = TypeVar("Made")


@magics_class
class RecipeMagics(DeskMagics):
    """Methods of interpretability."""

    @magic_arguments()
    @argument("prompt", nargs="*", help="a text in quotes; several make a batch")
    @argument(
        "--inputs", metavar="EXPR", help="instead of a text: ids, or a dict of the model's own arguments"
    )
    @argument("--top", type=int, default=5, metavar="K", help="so many likeliest tokens at each place")
    @argument(
        "--track",
        nargs="+",
        default=[],
        metavar="TOKEN",
        help="follow these tokens, each in quotes",
    )
    @argument("--tuned", metavar="EXPR", help="read with a tuned lens, the value of %%flextuned")
    @needs_local_scope
    @no_var_expand
    @line_magic
    def flexlens(self, line: str, local_ns: dict[str, Any] | None = None) -> Lens | None:
        """Show what the model would say after each layer at each position: the logit lens, or a tuned one.

        The value is a ``flexmagic.recipes.Lens``. Example::

            lens = %flexlens "The capital of France is" --track " Paris"
        """
        args = parse(self.flexlens, expanded(self.shell, line, local_ns))
        if args is None:
            return None
        from flexmagic.recipes.lens import logit_lens

        inputs, track = inputs_of(self.shell, args, "%flexlens"), [unquoted(word) for word in args.track]
        if args.tuned is not None:
            tuned = _tuned(value_of(self.shell, "--tuned", args.tuned), args.tuned)
            return done(
                self._desk,
                "Reading each layer",
                lambda progress: tuned.read(inputs, top=args.top, track=track, progress=progress),
            )
        return done(
            self._desk,
            "Reading each layer",
            lambda progress: logit_lens(
                self._desk.session, inputs, top=args.top, track=track, progress=progress
            ),
        )

    @magic_arguments()
    @argument("prompt", nargs="*", help="the clean text and the corrupt one, each in quotes")
    @argument("--metric", metavar="EXPR", help="over logits [seq, vocab] and the names of --tokens")
    @argument("--tokens", nargs="+", default=[], metavar="NAME=TEXT", help='such as "right= Mary"')
    @argument("--site", default="resid_pre", metavar="NAME", help="what is patched: attn_out, attn.z, …")
    @argument("--noise", action="store_true", help="put corrupt values into the clean prompt")
    @argument("--step", type=float, default=1.0, metavar="X", help="so much of the way to the other value")
    @argument("--memory", metavar="SIZE", help="that patched prompts may take together on a rank, as 4GB")
    @argument("--layers", metavar="EXPR", help="these layers only, such as range(2)")
    @argument("--positions", metavar="EXPR", help='groups of positions by name, such as {"names": [2, 4]}')
    @needs_local_scope
    @no_var_expand
    @line_magic
    def flexpatch(self, line: str, local_ns: dict[str, Any] | None = None) -> Patching | None:
        """Run one prompt with another's activations, place by place, and show what each changes.

        The value is a ``flexmagic.recipes.Patching``: 0 is no effect, 1 is the other prompt's metric.
        ``--site`` is ``resid_pre``, ``resid_mid``, ``resid_post``, ``attn_out`` or ``mlp_out``, by layer and
        position, or ``attn.z``, ``attn.q``, ``attn.k`` or ``attn.v``, by layer and head. Example::

            %flexpatch "Paris is in" "Rome is in" --metric "logits[-1, a]" --tokens "a= France"
        """
        args = parse(self.flexpatch, expanded(self.shell, line, local_ns))
        if args is None:
            return None
        from flexmagic.recipes.patching import patching

        prompts = texts(args.prompt)
        if len(prompts) != 2 or args.metric is None:
            raise InputError('Give two texts in quotes, and a metric: --metric "logits[-1, 5]"')
        options: dict[str, Any] = {
            name: None if text is None else value_of(self.shell, f"--{name}", text)
            for name, text in (("layers", args.layers), ("positions", args.positions))
        }
        if args.memory is not None:
            options["memory"] = bytes_of(unquoted(args.memory))
        return done(
            self._desk,
            f"Patching {args.site}",
            lambda progress: patching(
                self._desk.session, prompts[0], prompts[1], unquoted(args.metric),
                site=args.site, denoising=not args.noise, tokens=tokens_of(args.tokens),
                step=args.step, progress=progress, **options,
            ),
        )  # fmt: skip

    @magic_arguments()
    @argument("--period", type=int, default=25, metavar="N", help="so many random tokens, said twice")
    @argument("--rows", type=int, default=4, metavar="N", help="so many of such texts")
    @argument("--seed", type=int, default=0, help="fixes the tokens that are drawn")
    @line_magic
    def flexinduction(self, line: str) -> Induction | None:
        """Score how much each head looks for what followed the same token before.

        The value is a ``flexmagic.recipes.Induction``, with the loss at each position. Example::

            found = %flexinduction --period 30
        """
        args = parse(self.flexinduction, line)
        if args is None:
            return None
        from flexmagic.recipes.induction import induction

        return done(
            self._desk,
            "Measuring induction",
            lambda progress: induction(
                self._desk.session, period=args.period, rows=args.rows, seed=args.seed, progress=progress
            ),
        )

    @magic_arguments()
    @argument("prompt", nargs="*", help="the text that is continued, in quotes")
    @argument("--toward", nargs="+", default=[], metavar="TEXT", help="texts in quotes to steer toward")
    @argument("--away", nargs="+", default=[], metavar="TEXT", help="texts in quotes to steer away from")
    @argument("--site", default="blocks.0.resid_post", metavar="NAME", help="where the direction is added")
    @argument("--scales", default="(-2, 0, 2)", metavar="EXPR", help="how often it is added")
    @argument("--metric", default="logits[-1].max()", metavar="EXPR", help="over logits and --tokens")
    @argument("--tokens", nargs="+", default=[], metavar="NAME=TEXT", help='such as "a= happy"')
    @argument("--generate", type=int, default=12, metavar="N", help="generate up to N tokens")
    @needs_local_scope
    @no_var_expand
    @line_magic
    def flexsteer(self, line: str, local_ns: dict[str, Any] | None = None) -> Steering | None:
        """Generate with a direction added to the residual stream, once for each scale.

        The direction is the mean of the texts ``--toward`` minus that of those ``--away``, at their last
        token. The value is a ``flexmagic.recipes.Steering``. Example::

            %flexsteer "She was" --toward "Tom was happy" --away "Tom was sad" --scales "(0, 2)"
        """
        args = parse(self.flexsteer, expanded(self.shell, line, local_ns))
        if args is None:
            return None
        from flexmagic.recipes.steering import steering, steering_vector

        prompts, session = texts(args.prompt), self._desk.session
        if len(prompts) != 1:
            raise InputError("Give one text to continue, in quotes.")
        toward, away = texts(args.toward), texts(args.away)
        scales = value_of(self.shell, "--scales", args.scales)
        return done(
            self._desk,
            "Generating",
            lambda progress: steering(
                session, prompts[0], steering_vector(session, toward, away, args.site), site=args.site,
                scales=scales, metric=unquoted(args.metric), tokens=tokens_of(args.tokens),
                max_new_tokens=args.generate, progress=progress,
            ),
        )  # fmt: skip


def done(desk: Desk, what: str, do: Callable[[Any], Made]) -> Made:
    """What a recipe gives, waited for with a line that says how long it takes, and a button."""
    with waiting(desk.shell, what, quiet=1.0, cancel=desk.session.cancel) as status:
        made = do(status.tick)
        status.done(what)
    return made


def _tuned(value: Any, text: str) -> TunedLens:
    """A tuned lens; raises :class:`InputError` for anything else."""
    from flexmagic.recipes.tuned import TunedLens

    if not isinstance(value, TunedLens):
        raise InputError(f"--tuned {text}: give the value of %flextuned, not {type(value).__name__}.")
    return value


def tokens_of(words: list[str]) -> dict[str, str | int]:
    """Names and the tokens that they mean; raises :class:`InputError` for a word without a name."""
    out: dict[str, str | int] = {}
    for word in map(unquoted, words):
        name, equals, text = word.partition("=")
        if not equals:
            raise InputError(f'--tokens {word}: write a name and a token, in quotes: "right= Mary".')
        out[name] = unquoted(text)
    return out
