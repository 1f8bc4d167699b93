"""``%flexmodel`` and ``%%flexmodel``: load a model over the ranks, or build one there; look at it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from IPython.core.magic import line_cell_magic, magics_class
from IPython.core.magic_arguments import argument, magic_arguments

from flexmagic.errors import InputError
from flexmagic.magics.arguments import parse, unquoted
from flexmagic.magics.desk import DeskMagics
from flexmagic.magics.status_line import waiting

if TYPE_CHECKING:
    from argparse import Namespace

    from flexmagic.client.model import Model
    from flexmagic.client.session import Session
    from flexmagic.client.table import Table
    from flexmagic.client.waiting import Progress


def load(session: Session, path: str, options: str, progress: Progress | None = None) -> Model:
    """Load a model as the line ``%flexmodel PATH OPTIONS`` does; raises as it does."""
    args = parse(ModelMagics.flexmodel, f"{path!r} {options}")
    if args is None or args.layout or args.names or args.unwrap:
        msg = f"{options!r} are no options of loading a model."
        raise InputError(msg)
    return _load(session, args, progress=progress)


def _load(session: Session, args: Namespace, **more: Any) -> Model:
    sizes = {name: getattr(args, name) for name in ("tp", "pp", "dp", "fsdp")}
    return session.load(unquoted(args.path), dtype=args.dtype, attn=args.attn, **sizes, **more)


@magics_class
class ModelMagics(DeskMagics):
    """The model that the engines hold together."""

    @magic_arguments()
    @argument("path", nargs="?", help="folder or hub id of a Hugging Face causal language model")
    @argument("--tp", type=int, help="tensor parallel over this many ranks (default: all of them)")
    @argument("--pp", type=int, help="pipeline parallel: the layers in this many stages")
    @argument("--dp", type=int, help="data parallel: the rows of a batch over this many ranks")
    @argument("--fsdp", type=int, help="data parallel with the weights sharded over this many ranks")
    @argument("--dtype", help="float32, bfloat16, ... (default: what the model's configuration says)")
    @argument("--attn", help="attention implementation; eager also returns the attention patterns")
    @argument("--layout", action="store_true", help="show every site with its whole shape and layout")
    @argument("--names", action="store_true", help="show the standard names, such as blocks.3.attn.pattern")
    @argument("--unwrap", action="store_true", help="let go of the model, without a trace on it")
    @line_cell_magic
    def flexmodel(self, line: str, cell: str | None = None) -> Table | None:
        """Load a model split over the engines, build one in a cell, or show the one there is.

        In a cell, the code runs on every engine and assigns ``model`` (a torch.nn.Module,
        distributed in any way, or a schedule of torch.distributed.pipelining) and, if there are,
        ``tokenizer`` and ``unsharded``, a function that makes the same model undistributed;
        ``rank``, ``world_size``, ``device`` and ``mesh`` are at hand. Examples::

            %flexmodel demo_notebooks/model --tp 2
            %flexmodel              (the module tree, with shapes and layouts)
            %flexmodel --layout     (every site)
            %flexmodel --names      (what blocks.3.attn.pattern and the like are here)

            %%flexmodel
            model = MyModel().to(device)
        """
        args = parse(self.flexmodel, line)
        if args is None:
            return None
        if cell is not None:
            sizes = {"tp": args.tp, "pp": args.pp, "dp": args.dp, "fsdp": args.fsdp}
            if args.path:
                msg = "A %%flexmodel cell builds the model itself and takes no path."
                raise InputError(msg)
            with waiting(self._desk.shell, "Building the model", cancel=self._desk.session.cancel) as status:
                model = self._desk.session.load_cell(cell, first_line=2, progress=status.tick, **sizes)
                status.done(str(model))
        elif args.path:
            with waiting(
                self._desk.shell, f"Loading {args.path}", cancel=self._desk.session.cancel
            ) as status:
                status.done(str(_load(self._desk.session, args, progress=status.tick)))
        elif args.unwrap:
            left = self._desk.session.model.unwrap()
            print(
                "The engines have let go of the model."
                + (f" {left} hooks of others are on it." if left else "")
            )
        else:
            shown = self._desk.session.model
            if args.names:
                return shown.aliases()
            return shown.layout_table() if args.layout else shown.tree()
        return None
