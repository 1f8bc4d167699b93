"""The cells of the matrix: which strategy is tried on which model, on how many ranks."""

from __future__ import annotations

import importlib.util
import textwrap
from dataclasses import dataclass, field
from pathlib import Path

from . import models

MODELS = ("Llama", "GPT-2", "Mixtral", "by hand", "BERT")
"""The columns of the table."""


@dataclass(frozen=True)
class Strategy:
    """One row of the table.

    ``function``: of :mod:`strategies`, with its ``options``; without one, the model is loaded from
    its folder with ``axes``. ``instead``: for a column, the checkpoint that shows what the row is
    about. ``without``: per column why there is no such cell. ``everywhere``: a reason for all others.
    ``unsharded``: whether the cell says how the module by hand is made undistributed. ``needs``: a
    library that may be missing. ``pending``: why the whole row is not measured; it has no columns then.
    """

    name: str
    axes: dict[str, int]
    function: str = ""
    options: dict[str, object] = field(default_factory=dict)
    rows: int = models.ROWS
    columns: tuple[str, ...] = MODELS
    instead: dict[str, str] = field(default_factory=dict)
    without: dict[str, str] = field(default_factory=dict)
    everywhere: str = ""
    needs: str = ""
    pending: str = ""
    unsharded: bool = True
    core: tuple[str, ...] = ()

    @property
    def module(self) -> str:
        """Where the function is."""
        if self.needs:
            return "deepspeeds"
        return {"pipelined": "pipelines", "megatron": "by_hand"}.get(
            self.function.split("_")[0], "strategies"
        )

    @property
    def missing(self) -> str:
        """Why it cannot be tried here; empty if it can."""
        absent = self.needs and importlib.util.find_spec(self.needs) is None
        return f"{self.needs} is not installed" if absent else ""

    @property
    def ranks(self) -> int:
        """The number of ranks it takes."""
        out = 1
        for size in self.axes.values():
            out *= size
        return out


NOT_CAUSAL = "loading by path is for causal language models"
NO_PLAN = "transformers has no tensor-parallel plan for it"
NO_STAGES = "transformers has no pipeline plan for it"
FUSED = "torch's plans know no such layer"
ALL_HEADS = "every query head has its own keys and values"
NO_HEADS = "it has no heads"
LLAMA = "shown on Llama"
CONFIGURED = "its configuration says what the whole is"
NO_EXPERTS = "it has no experts"

_GROUPED = {"columns": ("Llama", "Mixtral"), "without": {"by hand": NO_HEADS}, "everywhere": ALL_HEADS}
_LOADED = {"without": {"by hand": "it has no checkpoint", "BERT": NOT_CAUSAL}}

_TWO = {"columns": ("Llama", "GPT-2"), "everywhere": "shown on Llama and GPT-2"}

STRATEGIES = (
    Strategy(
        "tensor parallel, loaded by path", {"tp": 2}, core=("Llama",),
        columns=("Llama", "Mixtral"), without=_LOADED["without"] | {"GPT-2": NO_PLAN},
    ),
    Strategy(
        "tensor parallel, torch’s plan, local outputs", {"tp": 2}, "torch_tp", core=("BERT",),
        columns=("Llama", "Mixtral", "by hand", "BERT"), without={"GPT-2": FUSED},
    ),
    Strategy(
        "tensor parallel, torch’s plan, DTensor outputs", {"tp": 2}, "torch_tp", {"shown": True},
        instead={"by hand": "an odd width"},
        columns=("Llama", "by hand", "BERT"), core=("Llama",),
        without={"GPT-2": FUSED, "Mixtral": "between its sharded layers nothing is element-wise"},
    ),
    Strategy(
        "tensor parallel by hand, plain weights", {"tp": 2}, "megatron", core=("GPT-2", "Mixtral", "by hand"),
        instead={"by hand": "an odd width"},
    ),
    Strategy(
        "the same, and nothing said of the whole", {"tp": 2}, "megatron", unsharded=False,
        columns=("by hand",), everywhere=CONFIGURED, core=("by hand",),
    ),
    Strategy(
        "the same, interleaved columns", {"tp": 2}, "megatron", {"interleaved": True},
        core=("Llama",),
    ),
    Strategy(
        "the same, sum deferred", {"tp": 2}, "megatron", {"deferred": True}, core=("Llama", "GPT-2"),
    ),
    Strategy(
        "the same, fewer key-value heads than ranks", {"tp": 2}, "megatron", **_GROUPED,
        instead={"Llama": "one key-value head", "Mixtral": "experts and one key-value head"},
    ),
    Strategy(
        "sequence parallel, torch’s plan", {"tp": 2}, "sequence_parallel", core=("Llama",),
        columns=("Llama", "Mixtral"), without={"GPT-2": FUSED}, everywhere="shown on Llama and Mixtral",
    ),
    Strategy(
        "sequence parallel by hand", {"tp": 2}, "megatron_sequence", core=("GPT-2",),
        columns=("GPT-2", "by hand"), everywhere="shown on GPT-2 and the module with odd outputs",
    ),
    Strategy("DDP, even batch", {"dp": 2}, "ddp"),
    Strategy("DDP, uneven batch", {"dp": 2}, "ddp", rows=3, core=("by hand",)),
    Strategy(
        "DDP, and nothing said of the whole", {"dp": 2}, "ddp", rows=3, unsharded=False,
        columns=("by hand",), everywhere=CONFIGURED,
    ),
    Strategy(
        "DDP, loaded by path", {"dp": 2}, columns=("Llama", "GPT-2", "Mixtral"), **_LOADED,
    ),
    Strategy("FSDP1", {"fsdp": 2}, "fsdp1", core=("Llama",)),
    Strategy("FSDP1 through Accelerate", {"fsdp": 2}, "fsdp1_accelerate"),
    Strategy("FSDP2, even batch", {"fsdp": 2}, "fsdp2", core=("BERT",)),
    Strategy("FSDP2, uneven batch", {"fsdp": 2}, "fsdp2", rows=3, core=("by hand",)),
    Strategy(
        "FSDP2, loaded by path", {"fsdp": 2}, columns=("Llama", "GPT-2", "Mixtral"), **_LOADED,
    ),
    Strategy("DeepSpeed ZeRO-3", {"dp": 2}, "zero3", rows=3, needs="deepspeed", **_TWO),
    Strategy(
        "DeepSpeed ZeRO-3 through Accelerate", {"dp": 2}, "zero3_accelerate", needs="deepspeed", **_TWO
    ),
    Strategy(
        "DeepSpeed AutoTP", {"tp": 2}, "auto_tp", needs="deepspeed", columns=("Llama",),
        without={"GPT-2": "DeepSpeed has only kernel injection for it"}, everywhere="shown on Llama",
    ),
    Strategy("DeepSpeed kernel injection", {"tp": 2}, columns=(), pending="not run: it needs CUDA"),
    Strategy("device_map, weights in memory", {"tp": 2}, "offloaded", {"to": "cpu"}),
    Strategy("device_map, weights on disk", {"tp": 2}, "offloaded", {"to": "disk"}, core=("GPT-2",)),
    Strategy(
        "pipeline, loaded by path", {"pp": 2}, columns=("Llama", "Mixtral"), core=("Llama",),
        without=_LOADED["without"] | {"GPT-2": NO_STAGES},
    ),
    Strategy("pipeline, torch’s schedules, 1 micro-batch", {"pp": 2}, "pipelined", core=("BERT",)),
    Strategy(
        "pipeline, torch’s schedules, 4 micro-batches", {"pp": 2}, "pipelined", {"micro_batches": 4}, rows=6,
        core=("GPT-2", "by hand"),
    ),
    Strategy(
        "expert parallel, one batch", {"tp": 2}, "expert_parallel", {"tp_size": 2, "ep_size": 2},
        columns=("Mixtral",), everywhere=NO_EXPERTS, core=("Mixtral",),
    ),
    Strategy(
        "expert parallel, tokens exchanged", {"fsdp": 2}, "expert_parallel", {"fsdp_size": 2, "ep_size": 2},
        columns=("Mixtral",), everywhere=NO_EXPERTS,
    ),
    Strategy(
        "TP × DP, loaded by path", {"dp": 2, "tp": 2}, columns=("Llama", "Mixtral"),
        without=_LOADED["without"] | {"GPT-2": NO_PLAN},
    ),
    Strategy(
        "TP × DP by hand", {"dp": 2, "tp": 2}, "megatron_ddp",
    ),
    Strategy(
        "tensor parallel by hand, two key-value heads on four ranks", {"tp": 4}, "megatron", **_GROUPED,
        instead={"Llama": "two key-value heads", "Mixtral": "experts and two key-value heads"},
    ),
    Strategy(
        "TP × FSDP2, loaded by path", {"fsdp": 2, "tp": 2}, columns=("Llama", "Mixtral"),
        without=_LOADED["without"] | {"GPT-2": NO_PLAN},
    ),
    Strategy(
        "TP × FSDP2, torch’s plan, uneven batch", {"fsdp": 2, "tp": 2}, "torch_tp_fsdp2", rows=3,
        columns=("Llama", "Mixtral", "by hand", "BERT"), without={"GPT-2": FUSED},
    ),
    Strategy("TP × FSDP2 by hand, uneven batch", {"fsdp": 2, "tp": 2}, "megatron_fsdp2", rows=3),
    Strategy(
        "PP × TP, torch’s schedules", {"pp": 2, "tp": 2}, "pipelined_tp", {"micro_batches": 2}, rows=3,
        core=("Llama",),
    ),
)  # fmt: skip
"""All rows. One that is ``pending`` has no columns; a function is of :mod:`strategies` or beside it."""


@dataclass(frozen=True)
class Cell:
    """One strategy on one model."""

    strategy: Strategy
    column: str

    @property
    def name(self) -> str:
        """What the frozen results and the tests call it."""
        return f"{self.strategy.name} / {self.column}"

    @property
    def model(self) -> str:
        """The model of :mod:`models`."""
        return self.strategy.instead.get(self.column, self.column)

    @property
    def core(self) -> bool:
        """Whether the ordinary run of the tests measures it."""
        return self.column in self.strategy.core

    def why_not(self) -> str:
        """The reason why a column has no cell in this row."""
        return self.strategy.pending or self.strategy.without.get(self.column) or self.strategy.everywhere

    @property
    def says_the_whole(self) -> bool:
        """Whether the cell says how its model is made undistributed.

        A checkpoint has experts one by one, the model has them stacked: only a whole model shows
        where plain parts of the stack stand.
        """
        stacked = self.column == "Mixtral" and self.strategy.module == "by_hand"
        return self.strategy.unsharded and (stacked or self.model in models.BY_HAND)

    def load(self, session, folder: Path) -> None:
        """Distribute the model over the session's ranks in this cell's way."""
        where = models.write(self.model, folder / self.model.replace(" ", "-"))
        if not self.strategy.function:
            session.load(where, attn="eager", **self.strategy.axes)
            return
        options = dict(self.strategy.options)
        if self.strategy.function == "expert_parallel":
            options["folder"] = str(where)
        text = f"""
            import sys
            if {str(Path(__file__).parents[1])!r} not in sys.path:
                sys.path.insert(0, {str(Path(__file__).parents[1])!r})
            from matrix import by_hand, deepspeeds, models, pipelines, strategies
            made = models.whole({self.model!r}, {str(where)!r})
            model = {self.strategy.module}.{self.strategy.function}(made, {self.model!r}, mesh, **{options!r})
            if {self.says_the_whole}:
                unsharded = lambda: models.whole({self.model!r}, {str(where)!r})
        """
        session.load_cell(textwrap.dedent(text), **self.strategy.axes)


CELLS = [Cell(strategy, column) for strategy in STRATEGIES for column in strategy.columns]
