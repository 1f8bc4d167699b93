"""Methods that train something, or take parts away, as magics; each calls one function of the recipes."""

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

    from flexmagic.recipes.ablation import Ablation
    from flexmagic.recipes.interchange import Interchange
    from flexmagic.recipes.probing import Probe
    from flexmagic.recipes.tuned import TunedLens


@magics_class
class LearnedMagics(DeskMagics):
    """Methods that train something, or take parts away."""

    @magic_arguments()
    @argument("prompt", nargs="*", help="texts of equally many tokens, each in quotes")
    @argument("--texts", metavar="EXPR", help="instead: a list of texts, or of lists of ids")
    @argument("--metric", default="loss", metavar="EXPR", help="over logits [batch, seq, vocab] and --tokens")
    @argument("--tokens", nargs="+", default=[], metavar="NAME=TEXT", help='such as "right= Mary"')
    @argument("--site", default="attn.z", metavar="NAME", help="attn.z, mlp.neurons, attn_out, mlp_out, …")
    @argument("--how", default="zero", choices=("zero", "mean", "resample"), help="what takes its place")
    @argument("--reference", metavar="EXPR", help="the texts of the mean, or of the other values")
    @argument("--layers", metavar="EXPR", help="these layers only, such as range(2)")
    @argument("--units", metavar="EXPR", help="these heads or neurons only")
    @needs_local_scope
    @no_var_expand
    @line_magic
    def flexablate(self, line: str, local_ns: dict[str, Any] | None = None) -> Ablation | None:
        """Measure the model without each head, neuron, attention or MLP.

        The value is a ``flexmagic.recipes.Ablation``: how the metric, by default the loss, changes. Example::

            %flexablate "When Mary and John went to the store, John gave a drink to" --site attn.z
        """
        args = parse(self.flexablate, expanded(self.shell, line, local_ns))
        if args is None:
            return None
        from flexmagic.recipes.ablation import ablation

        given = texts(args.prompt)
        if bool(given) == (args.texts is not None):
            raise InputError("Give texts in quotes or --texts, one of them.")
        return done(
            self._desk,
            f"Ablating {args.site}",
            lambda progress: ablation(
                self._desk.session, given or self._value(args, "texts"), unquoted(args.metric),
                site=args.site, how=args.how, reference=self._value(args, "reference"),
                tokens=tokens_of(args.tokens), layers=self._value(args, "layers"),
                units=self._value(args, "units"), progress=progress,
            ),
        )  # fmt: skip

    @magic_arguments()
    @argument("--texts", metavar="EXPR", help="a list of texts")
    @argument("--labels", metavar="EXPR", help="a class for each text, or lists of one for each token")
    @argument("--site", default="resid_post", metavar="NAME", help="resid_pre, attn_out, mlp_out, …")
    @argument("--position", type=int, default=-1, metavar="N", help="the token that is read")
    @argument("--layers", metavar="EXPR", help="these layers only, such as range(2)")
    @argument("--seed", type=int, default=0, help="fixes what is held out, and the control task")
    @needs_local_scope
    @no_var_expand
    @line_magic
    def flexprobe(self, line: str, local_ns: dict[str, Any] | None = None) -> Probe | None:
        """Fit a linear probe to the activations of each layer, and test it on texts that it has not seen.

        The value is a ``flexmagic.recipes.Probe``, with the score of a control task. Example::

            found = %flexprobe --texts sentences --labels kinds
        """
        args = parse(self.flexprobe, expanded(self.shell, line, local_ns))
        if args is None:
            return None
        from flexmagic.recipes.probing import probe

        if args.texts is None or args.labels is None:
            raise InputError("Give the texts and their classes: --texts sentences --labels kinds")
        return done(
            self._desk,
            f"Probing {args.site}",
            lambda progress: probe(
                self._desk.session, self._value(args, "texts"), self._value(args, "labels"),
                site=args.site, position=args.position, layers=self._value(args, "layers"), seed=args.seed,
                progress=progress,
            ),
        )  # fmt: skip

    @magic_arguments()
    @argument("--texts", metavar="EXPR", help="a list of texts to train on")
    @argument("--load", metavar="FILE", help="instead: a lens that was saved")
    @argument("--steps", type=int, default=50, metavar="N", help="so many steps of training")
    @argument("--rows", type=int, default=8, metavar="N", help="so many texts in a step")
    @argument("--lr", type=float, default=1e-3, help="the optimizer's learning rate")
    @argument("--separately", action="store_true", help="train layer by layer, in less memory")
    @argument("--save", metavar="FILE", help="write the trained lens to a safetensors file")
    @needs_local_scope
    @no_var_expand
    @line_magic
    def flextuned(self, line: str, local_ns: dict[str, Any] | None = None) -> TunedLens | None:
        """Train a tuned lens: for each layer a map to what the model would say.

        The value is a ``flexmagic.recipes.TunedLens``, which ``%flexlens --tuned`` reads with. Example::

            tuned = %flextuned --texts sentences --steps 100
            %flexlens "The capital of France is" --tuned tuned
        """
        args = parse(self.flextuned, expanded(self.shell, line, local_ns))
        if args is None:
            return None
        from flexmagic.recipes.tuned import TunedLens, tuned_lens

        if (args.texts is None) == (args.load is None):
            raise InputError("Give texts to train on, or a saved lens: --texts sentences, or --load FILE")
        if args.load is not None:
            return TunedLens.load(self._desk.session, unquoted(args.load))
        made = done(
            self._desk,
            "Training the lens",
            lambda progress: tuned_lens(
                self._desk.session, self._value(args, "texts"), steps=args.steps, rows=args.rows, lr=args.lr,
                together=not args.separately, progress=progress,
            ),
        )  # fmt: skip
        if args.save is not None:
            made.save(unquoted(args.save))
        return made

    @magic_arguments()
    @argument("--bases", metavar="EXPR", help="a list of texts that are answered")
    @argument("--sources", metavar="EXPR", help="for each the text whose values it gets")
    @argument("--targets", metavar="EXPR", help="for each the token that it is then to be answered with")
    @argument("--site", default="blocks.0.resid_post", metavar="NAME", help="where values are interchanged")
    @argument("--position", type=int, default=-1, metavar="N", help="the token at which they are")
    @argument("--size", default="4", metavar="N", help="dims of the subspace, or boundless")
    @argument("--steps", type=int, default=60, metavar="N", help="so many steps of training")
    @argument("--lr", type=float, default=1e-2, help="the optimizer's learning rate")
    @needs_local_scope
    @no_var_expand
    @line_magic
    def flexinterchange(self, line: str, local_ns: dict[str, Any] | None = None) -> Interchange | None:
        """Train a subspace in which one prompt's values bring the other prompt's answer.

        The value is a ``flexmagic.recipes.Interchange``, tested on pairs that were held out. Example::

            %flexinterchange --bases clean --sources corrupt --targets answers --size 2
        """
        args = parse(self.flexinterchange, expanded(self.shell, line, local_ns))
        if args is None:
            return None
        from flexmagic.recipes.interchange import interchange

        if None in (args.bases, args.sources, args.targets):
            raise InputError("Give --bases, --sources and --targets, lists of equal length.")
        if not args.size.isdigit() and args.size != "boundless":
            raise InputError(f"--size {args.size}: give a number of dims, or boundless.")
        size = None if args.size == "boundless" else int(args.size)
        return done(
            self._desk,
            f"Training a subspace at {args.site}",
            lambda progress: interchange(
                self._desk.session, self._value(args, "bases"), self._value(args, "sources"),
                self._value(args, "targets"), site=args.site, position=args.position, size=size,
                steps=args.steps, lr=args.lr, progress=progress,
            ),
        )  # fmt: skip

    def _value(self, args: Namespace, name: str) -> Any:
        """The value of an option that is an expression; ``None`` for one that was not given."""
        text = getattr(args, name)
        return None if text is None else value_of(self.shell, f"--{name}", text)
