"""Causes and attributions as magics, each of which calls one function of the recipes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from IPython.core.magic import line_magic, magics_class, needs_local_scope, no_var_expand
from IPython.core.magic_arguments import argument, magic_arguments

from flexmagic.errors import InputError
from flexmagic.magics.arguments import expanded, parse, texts, unquoted
from flexmagic.magics.desk import DeskMagics
from flexmagic.magics.inputs import value_of
from flexmagic.magics.recipes import done, tokens_of

if TYPE_CHECKING:
    from argparse import Namespace

    from flexmagic.recipes.attention import Attention, AttentionEffect
    from flexmagic.recipes.causal import CausalTracing
    from flexmagic.recipes.direct import LogitAttribution
    from flexmagic.recipes.gradients import Attribution
    from flexmagic.recipes.integrated import Integrated
    from flexmagic.recipes.patching import Patching
    from flexmagic.recipes.paths import PathPatching

METRIC = 'Give a metric: --metric "logits[-1, 5]"'


@magics_class
class CauseMagics(DeskMagics):
    """What causes an answer, and what is worth how much to it."""

    @magic_arguments()
    @argument("prompt", nargs="*", help="a text in quotes")
    @argument("--subject", metavar="TEXT", help="the part of the prompt that gets noise, in quotes")
    @argument("--answer", metavar="TOKEN", help="in quotes; without it what the model says")
    @argument("--site", default="resid_post", metavar="NAME", help="what is restored: mlp_out, attn_out, …")
    @argument("--window", type=int, default=1, metavar="N", help="restore N layers around each together")
    @argument("--samples", type=int, default=10, metavar="N", help="so many draws of the noise")
    @argument("--noise", type=float, default=3.0, help="in standard deviations of the embeddings")
    @argument("--seed", type=int, default=0, help="fixes the draws")
    @argument("--layers", metavar="EXPR", help="these layers only, such as range(2)")
    @argument("--positions", metavar="EXPR", help='groups of positions by name, such as {"names": [2, 4]}')
    @needs_local_scope
    @no_var_expand
    @line_magic
    def flexcausal(self, line: str, local_ns: dict[str, Any] | None = None) -> CausalTracing | None:
        """Make a subject unreadable by noise, and show which hidden states bring the answer back.

        The value is a ``flexmagic.recipes.CausalTracing``. Example::

            traced = %flexcausal "The capital of France is" --subject "France" --answer " Paris"
        """
        args = parse(self.flexcausal, expanded(self.shell, line, local_ns))
        if args is None:
            return None
        from flexmagic.recipes.causal import causal_tracing

        prompts, options = texts(args.prompt), self._values(args, "layers", "positions")
        if len(prompts) != 1 or args.subject is None:
            raise InputError('Give a text in quotes, and a part of it: --subject "France"')
        answer = None if args.answer is None else unquoted(args.answer)
        return done(self._desk,
            "Causal tracing",
            lambda progress: causal_tracing(
                self._desk.session, prompts[0], unquoted(args.subject), answer=answer, site=args.site,
                window=args.window, samples=args.samples, noise=args.noise, seed=args.seed,
                progress=progress, **options,
            ),
        )  # fmt: skip

    @magic_arguments()
    @argument("prompt", nargs="*", help="the clean text and the corrupt one, each in quotes")
    @argument("--metric", metavar="EXPR", help="over logits [seq, vocab] and the names of --tokens")
    @argument("--tokens", nargs="+", default=[], metavar="NAME=TEXT", help='such as "right= Mary"')
    @argument("--senders", default="attn.z", metavar="NAME", help="what sends: attn.z, attn_out or mlp_out")
    @argument("--receivers", nargs="+", default=[], metavar="NAME", help="such as blocks.2.attn.q[5]")
    @argument("--direct", action="store_true", help="not through MLPs between")
    @argument("--denoise", action="store_true", help="put clean values into the corrupt prompt")
    @argument("--layers", metavar="EXPR", help="senders in these layers only, such as range(2)")
    @argument("--positions", metavar="EXPR", help='groups of positions by name, such as {"names": [2, 4]}')
    @needs_local_scope
    @no_var_expand
    @line_magic
    def flexpath(self, line: str, local_ns: dict[str, Any] | None = None) -> PathPatching | None:
        """Show how much of each sender's effect reaches the answer through the receivers alone.

        The value is a ``flexmagic.recipes.PathPatching``. Without ``--receivers`` it is what each sender adds
        to the logits directly. Example::

            %flexpath "Paris is in" "Rome is in" --metric "logits[-1, 5]" --receivers "blocks.2.attn.q[5]"
        """
        args = parse(self.flexpath, expanded(self.shell, line, local_ns))
        if args is None:
            return None
        from flexmagic.recipes.paths import path_patching

        clean, corrupt = _two(args)
        options = self._values(args, "layers", "positions")
        return done(self._desk,
            "Path patching",
            lambda progress: path_patching(
                self._desk.session, clean, corrupt, unquoted(args.metric), senders=args.senders,
                receivers=[unquoted(word) for word in args.receivers], through_mlps=not args.direct,
                denoising=args.denoise, tokens=tokens_of(args.tokens), progress=progress, **options,
            ),
        )  # fmt: skip

    @magic_arguments()
    @argument("prompt", nargs="*", help="a text in quotes; a second one is the corrupt one or the baseline")
    @argument("--metric", metavar="EXPR", help="over logits [seq, vocab] and the names of --tokens")
    @argument("--tokens", nargs="+", default=[], metavar="NAME=TEXT", help='such as "right= Mary"')
    @argument("--integrated", action="store_true", help="integrated gradients of the embeddings")
    @argument("--steps", type=int, default=32, metavar="N", help="points of the path of --integrated")
    @argument("--site", default="resid_pre", metavar="NAME", help="where: attn_out, attn.z, …")
    @argument("--noise", action="store_true", help="estimate corrupt values in the clean prompt")
    @argument("--layers", metavar="EXPR", help="these layers only, such as range(2)")
    @argument("--positions", metavar="EXPR", help='groups of positions by name, such as {"names": [2, 4]}')
    @needs_local_scope
    @no_var_expand
    @line_magic
    def flexattribute(
        self, line: str, local_ns: dict[str, Any] | None = None
    ) -> Attribution | Patching | Integrated | None:
        """Show what activations are worth to a metric, by its gradient.

        Of one text it is gradient times activation, of two attribution patching, an estimate of what
        ``%flexpatch`` would measure; with ``--integrated``, integrated gradients from the second text to the
        first, or from embeddings of zero. Example::

            %flexattribute "Paris is in" "Rome is in" --metric "logits[-1, a]" --tokens "a= France"
        """
        args = parse(self.flexattribute, expanded(self.shell, line, local_ns))
        if args is None:
            return None
        prompts, options = texts(args.prompt), self._values(args, "layers", "positions")
        if not 1 <= len(prompts) <= 2 or args.metric is None:
            raise InputError(f"Give one text in quotes, or two. {METRIC}")
        return done(
            self._desk, "Attributing", lambda progress: self._attributed(args, prompts, options, progress)
        )

    def _attributed(
        self, args: Namespace, prompts: list[str], options: dict[str, Any], progress: Any
    ) -> Attribution | Patching | Integrated:
        from flexmagic.recipes.gradients import attribution_patching, gradient_times_activation
        from flexmagic.recipes.integrated import integrated_gradients

        session, metric = self._desk.session, unquoted(args.metric)
        tokens, site = tokens_of(args.tokens), args.site
        if args.integrated:
            return integrated_gradients(
                session, prompts[0], metric, baseline=prompts[1] if len(prompts) > 1 else None,
                tokens=tokens, steps=args.steps, progress=progress,
            )  # fmt: skip
        if len(prompts) == 1:
            return gradient_times_activation(
                session, prompts[0], metric, site=site, tokens=tokens, progress=progress, **options
            )
        return attribution_patching(
            session, prompts[0], prompts[1], metric, site=site, denoising=not args.noise, tokens=tokens,
            progress=progress, **options,
        )  # fmt: skip

    @magic_arguments()
    @argument("prompt", nargs="*", help="a text in quotes")
    @argument("--metric", metavar="EXPR", help="linear in logits [seq, vocab], with the names of --tokens")
    @argument("--tokens", nargs="+", default=[], metavar="NAME=TEXT", help='such as "right= Mary"')
    @argument("--no-heads", action="store_true", help="layers as a whole; no weights travel then")
    @needs_local_scope
    @no_var_expand
    @line_magic
    def flexdla(self, line: str, local_ns: dict[str, Any] | None = None) -> LogitAttribution | None:
        """Show what each part of the residual stream adds to a metric: direct logit attribution.

        The value is a ``flexmagic.recipes.LogitAttribution``, whose parts sum up to the metric. Example::

            %flexdla "Paris is in" --metric "logits[-1, a] - logits[-1, b]" --tokens "a= France" "b= Italy"
        """
        args = parse(self.flexdla, expanded(self.shell, line, local_ns))
        if args is None:
            return None
        from flexmagic.recipes.direct import logit_attribution

        prompts = texts(args.prompt)
        if len(prompts) != 1 or args.metric is None:
            raise InputError(f"Give a text in quotes. {METRIC}")
        return done(self._desk,
            "Attributing",
            lambda progress: logit_attribution(
                self._desk.session, prompts[0], unquoted(args.metric), tokens=tokens_of(args.tokens),
                heads=not args.no_heads, progress=progress,
            ),
        )  # fmt: skip

    @magic_arguments()
    @argument("prompt", nargs="*", help="a text in quotes; of a second one the patterns are taken")
    @argument("--metric", metavar="EXPR", help="over logits [seq, vocab] and the names of --tokens")
    @argument("--tokens", nargs="+", default=[], metavar="NAME=TEXT", help='such as "right= Mary"')
    @argument("--edges", metavar="EXPR", help='what is cut, such as {"back to the name": [(-1, 4)]}')
    @argument("--together", action="store_true", help="all heads of a layer at once")
    @argument("--layers", metavar="EXPR", help="these layers only, such as range(2)")
    @needs_local_scope
    @no_var_expand
    @line_magic
    def flexattention(
        self, line: str, local_ns: dict[str, Any] | None = None
    ) -> Attention | AttentionEffect | None:
        """Show the attention patterns of all heads, or with a metric what it does without them.

        With ``--metric`` each head is knocked out in turn, or ``--edges`` of it are cut, or its pattern is
        that of a second text. The values are a ``flexmagic.recipes.Attention`` and an ``AttentionEffect``.
        Example::

            %flexattention "Paris is in" --metric "logits[-1, a]" --tokens "a= France"
        """
        args = parse(self.flexattention, expanded(self.shell, line, local_ns))
        if args is None:
            return None
        prompts, options = texts(args.prompt), self._values(args, "layers", "edges")
        if not 1 <= len(prompts) <= 2:
            raise InputError("Give one text in quotes, or two of equally many tokens.")
        if args.edges and len(prompts) > 1:
            raise InputError("Edges are cut in one text, patterns are taken from a second: one of both.")
        if args.metric is None and (len(prompts) > 1 or args.edges or args.together):
            raise InputError(f"To change attention is to ask what it does to something. {METRIC}")
        return done(
            self._desk, "Attention", lambda progress: self._attended(args, prompts, options, progress)
        )

    def _attended(
        self, args: Namespace, prompts: list[str], options: dict[str, Any], progress: Any
    ) -> Attention | AttentionEffect:
        from flexmagic.recipes.attention import attention, attention_knockout, attention_replacement

        session = self._desk.session
        if args.metric is None:
            return attention(session, prompts[0], progress=progress, **options)
        metric, tokens = unquoted(args.metric), tokens_of(args.tokens)
        changing: dict[str, Any] = {
            "tokens": tokens,
            "together": args.together,
            "progress": progress,
            **options,
        }
        if len(prompts) == 1:
            return attention_knockout(session, prompts[0], metric, **changing)
        return attention_replacement(session, prompts[0], prompts[1], metric, **changing)

    def _values(self, args: Namespace, *names: str) -> dict[str, Any]:
        """The values of options that are expressions of the notebook; of those that were given."""
        given = {name: getattr(args, name) for name in names}
        return {
            name: value_of(self.shell, f"--{name}", text) for name, text in given.items() if text is not None
        }


def _two(args: Namespace) -> list[str]:
    """The clean and the corrupt text of a line with a metric."""
    prompts = texts(args.prompt)
    if len(prompts) != 2 or args.metric is None:
        raise InputError(f"Give two texts in quotes. {METRIC}")
    return prompts
