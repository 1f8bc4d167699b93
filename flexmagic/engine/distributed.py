"""Models on a rank: loading one split over the ranks, or taking the one a user's cell built."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from flexmagic.engine.progress import Tell, told
from flexmagic.engine.stage_making import as_model
from flexmagic.engine.tree import unwrapped
from flexmagic.errors import ModelError
from flexmagic.layout.mesh import Mesh


@dataclass(frozen=True)
class LoadSpec:
    """What to load and how to split it: plain data from the client."""

    source: str
    mesh: Mesh
    dtype: str | None = None
    attention: str | None = None

    def size(self, axis: str) -> int:
        """The number of ranks along an axis, 1 for one the mesh does not have."""
        return dict(zip(self.mesh.axes, self.mesh.shape, strict=True)).get(axis, 1)


@dataclass(frozen=True)
class Loaded:
    """A model on this rank, its tokenizer if it has one, and the mesh it lies on.

    ``unsharded``: makes the same model undistributed, where the user's cell says how. ``folder``:
    where its checkpoint is, if it came from one on disk.
    """

    model: nn.Module
    tokenizer: Any
    mesh: Mesh
    source: str
    unsharded: Callable[[], nn.Module] | None = None

    @property
    def folder(self) -> str | None:
        """The folder the weights came from, as far as the model says it."""
        found = getattr(getattr(unwrapped(self.model), "config", None), "_name_or_path", None)
        return found if isinstance(found, str) and found else None


def check_source(spec: LoadSpec) -> Any:
    """The configuration at a path or hub id; raise :class:`ModelError` for what cannot be split so."""
    from transformers import AutoConfig

    path = Path(spec.source).expanduser()
    if path.exists() and not (path / "config.json").is_file():
        msg = f"{spec.source} is no model: there is no config.json in it."
        raise ModelError(msg)
    try:
        config = AutoConfig.from_pretrained(str(path) if path.exists() else spec.source)
    except Exception as error:  # noqa: BLE001 - configurations check themselves and raise what they like
        lines = str(error).strip().splitlines() or [type(error).__name__]
        if path.exists():
            msg = f"The configuration in {spec.source} is not valid: {lines[-1].strip()}"
            raise ModelError(msg) from None
        first = lines[0]
        msg = (
            f"{spec.source} is neither a folder with a model nor a model id that can be reached: {first} "
            "Type %flexmodel with the path of a folder that holds config.json and *.safetensors."
        )
        raise ModelError(msg) from None
    if spec.dtype is not None and not isinstance(getattr(torch, spec.dtype, None), torch.dtype):
        msg = f"{spec.dtype!r} is no dtype of torch; try float32, bfloat16 or float16."
        raise ModelError(msg)
    _check_split(config, spec.size("tp"))
    if spec.size("pp") > 1 and spec.size("tp") > 1 and _transformers() <= LAST_WITHOUT_STAGES_OF_SHARDS:
        msg = f"transformers {'.'.join(map(str, _transformers()))} cannot load {spec.mesh}. {BY_HAND}"
        raise ModelError(msg)
    return config


LAST_WITHOUT_STAGES_OF_SHARDS = (5, 23)
"""The last transformers known to fail, with a KeyError, at pipeline stages of tensor-parallel layers."""

BY_HAND = (
    "Build the model in a %%flexmodel cell instead: shard its layers with parallelize_module on "
    'mesh["tp"], make a PipelineStage on mesh["pp"] of this rank\'s part, and assign a schedule to `model`.'
)


def _transformers() -> tuple[int, ...]:
    """The major and minor version of transformers."""
    return tuple(int(part) for part in version("transformers").split(".")[:2])


def _check_split(config: Any, tp: int) -> None:
    for words, attribute in (
        ("attention heads", "num_attention_heads"),
        ("key-value heads", "num_key_value_heads"),
    ):
        heads = getattr(config, attribute, None)
        if isinstance(heads, int) and heads % tp:
            fitting = [n for n in range(1, heads + 1) if heads % n == 0]
            msg = (
                f"--tp {tp} does not divide the model's {heads} {words}. "
                f"Use one of {', '.join(map(str, fitting))}."
            )
            raise ModelError(msg)


def load(spec: LoadSpec, tell: Tell) -> Loaded:
    """Load a Hugging Face model, each rank reading only its own part of the weights.

    How it is split is transformers' own doing. ``tell`` hears how far it is. Raises
    :class:`ModelError` with the loader's reason.
    """
    from transformers import AutoModelForCausalLM

    # sizes that do not fit are named below, which the loader's own error does not do
    options: dict[str, Any] = {"output_loading_info": True, "ignore_mismatched_sizes": True}
    if spec.dtype is not None:
        options["dtype"] = getattr(torch, spec.dtype)
    if spec.attention is not None:
        options["attn_implementation"] = spec.attention
    if spec.mesh.size > 1:
        options["distributed_config"] = _distributed_config(spec.mesh)
    source = _expanded(spec.source)
    try:
        with _quiet(), told(tell):
            model, info = AutoModelForCausalLM.from_pretrained(source, **options)
    except (OSError, ValueError, RuntimeError, ImportError, KeyError, AttributeError) as error:
        unsaid = isinstance(error, (KeyError, AttributeError))
        reason = f"{type(error).__name__}: {error}" if unsaid else str(error)
        several = f"\nIf transformers cannot load {spec.mesh}: {BY_HAND}" if len(spec.mesh.axes) > 1 else ""
        msg = f"{spec.source} could not be loaded: {reason}{several}"
        raise ModelError(msg) from None
    check_keys(spec.source, info)
    return Loaded(as_model(model.eval()), _tokenizer(source), spec.mesh, spec.source)


def check_keys(source: str, info: Mapping[str, Any]) -> None:
    """Raise :class:`ModelError` with names unless the checkpoint holds the model's weights and no others.

    ``info``: what the loader reports; tied weights and those the model's class ignores are not in it.
    """
    problems = []
    if info["missing_keys"]:
        problems.append(f"it lacks {_some(info['missing_keys'])}, which would be random numbers")
    if info["mismatched_keys"]:
        shapes = {
            f"{key} (a rank gets {[*there]}, not {[*here]})" for key, there, here in info["mismatched_keys"]
        }
        problems.append(f"it has another shape of {_some(shapes)}")
    if info["unexpected_keys"]:
        problems.append(f"it has {_some(info['unexpected_keys'])}, which the model has not")
    if problems:
        msg = (
            f"The weights in {source} are not those of the model that its config.json describes: "
            f"{'; '.join(problems)}. Correct either, or build the model in a %%flexmodel cell."
        )
        raise ModelError(msg)


def _some(names: Iterable[str], most: int = 3) -> str:
    """The first few names in order, and how many more there are."""
    listed = sorted(names)
    more = f" and {len(listed) - most} more" if len(listed) > most else ""
    return f"{', '.join(listed[:most])}{more}"


SIZES = {"pp": "pp_size", "dp": "dp_replicate_size", "fsdp": "fsdp_size", "tp": "tp_size"}
"""What transformers calls the size of each axis."""


def _distributed_config(mesh: Mesh) -> Any:
    """How transformers is told of a mesh; raises :class:`ModelError` if its version knows no such axis."""
    import transformers
    from transformers.distributed import DistributedConfig

    known = {field.name for field in dataclasses.fields(DistributedConfig)}
    unknown = [axis for axis in mesh.axes if SIZES[axis] not in known]
    if unknown:
        msg = (
            f"transformers {transformers.__version__} cannot load a model with --{unknown[0]}; "
            f"a newer version can. {BY_HAND}"
        )
        raise ModelError(msg)
    return DistributedConfig(**{SIZES[axis]: size for axis, size in zip(mesh.axes, mesh.shape, strict=True)})


def _expanded(source: str) -> str:
    path = Path(source).expanduser()
    return str(path) if path.exists() else source


def _tokenizer(source: str) -> Any:
    from transformers import AutoTokenizer

    try:
        with _quiet():
            found = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError, KeyError, ImportError):
        return None  # a model without a tokenizer still takes token ids
    return found if len(found) > len(found.all_special_ids) else None  # of a bare configuration: no words


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the loader's bars and notes off the engine's output; errors still come as exceptions."""
    from transformers.utils import logging as their_logging

    level = their_logging.get_verbosity()
    their_logging.set_verbosity(logging.ERROR)
    their_logging.disable_progress_bar()
    try:
        yield
    finally:
        their_logging.set_verbosity(level)
        their_logging.enable_progress_bar()


def local_part(parameter: torch.Tensor) -> torch.Tensor:
    """The rank's own part of a parameter."""
    return parameter.to_local().detach() if isinstance(parameter, DTensor) else parameter.detach()
