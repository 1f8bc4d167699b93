"""Messages between a guest and the gateway: one JSON object and binary frames, and nothing else.

``FXW1``, the header's length in four bytes, the header, then the frames, whose lengths the header lists.
An array is a frame and ``{"frame", "dtype", "shape"}``. Nothing is ever unpickled.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from flexmagic.errors import InputError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

VERSION = 2
"""Of the requests and their answers; both sides must have the same."""

MAGIC = b"FXW1"
HEADER = 1 << 20
"""Bytes of the longest header."""

FRAMES = 64
"""The most frames of one message."""

DTYPES = (
    "float16", "float32", "float64", "int8", "int16", "int32", "int64", "uint8", "bool",
    "complex64", "complex128",
)  # fmt: skip
"""What an array may consist of."""

_LENGTH = struct.Struct(">I")


class MalformedError(InputError):
    """Bytes that are no message of this version."""


def pack(header: Mapping[str, Any], frames: Sequence[bytes] = ()) -> bytes:
    """One message as bytes."""
    text = json.dumps({**header, "frames": [len(frame) for frame in frames]}).encode()
    return b"".join([MAGIC, _LENGTH.pack(len(text)), text, *frames])


def unpack(raw: bytes, *, longest: int = HEADER, strict: bool = True) -> tuple[dict[str, Any], list[bytes]]:
    """Header and frames of a message. ``strict``: no NaN or infinity in the header.

    Raises :class:`MalformedError` for anything else than exactly one message.
    """
    start = len(MAGIC) + _LENGTH.size
    if len(raw) < start or raw[: len(MAGIC)] != MAGIC:
        raise MalformedError("This is no message of a workshop.")
    (length,) = _LENGTH.unpack_from(raw, len(MAGIC))
    if length > longest or start + length > len(raw):
        raise MalformedError("The message's header is too long, or cut off.")
    try:
        found = json.loads(raw[start : start + length], parse_constant=_refuse if strict else None)
    except (ValueError, RecursionError):
        raise MalformedError("The message's header is no JSON.") from None
    lengths = found.pop("frames", None) if isinstance(found, dict) else None
    if (
        not isinstance(lengths, list)
        or len(lengths) > FRAMES
        or any(type(n) is not int or n < 0 for n in lengths)
    ):
        raise MalformedError("The message's header does not list its frames.")
    if start + length + sum(lengths) != len(raw):
        raise MalformedError("The message's frames are not as long as its header says.")
    out, at = [], start + length
    for n in lengths:
        out.append(raw[at : at + n])
        at += n
    return found, out


def _refuse(name: str) -> Any:
    raise ValueError(name)


def put(array: NDArray[Any], frames: list[bytes]) -> dict[str, Any]:
    """Add an array to the frames; returns what stands for it in the header."""
    if array.dtype.name not in DTYPES:
        raise InputError(f"Arrays of {array.dtype} do not travel; these do: {', '.join(DTYPES)}.")
    frames.append(array.tobytes())  # row-major, whatever it is in memory
    return {"frame": len(frames) - 1, "dtype": array.dtype.name, "shape": list(array.shape)}


def take(said: Any, frames: Sequence[bytes]) -> NDArray[np.generic]:
    """The array that something in the header stands for; raises :class:`MalformedError` for anything else."""
    import numpy as np

    if not isinstance(said, dict) or said.keys() != {"frame", "dtype", "shape"}:
        raise MalformedError("An array is a frame, a dtype and a shape.")
    at, dtype, shape = said["frame"], said["dtype"], said["shape"]
    if type(at) is not int or not 0 <= at < len(frames) or dtype not in DTYPES:
        raise MalformedError("An array names a frame that is not there, or a dtype that does not travel.")
    if not isinstance(shape, list) or len(shape) > 8 or any(type(n) is not int or n < 0 for n in shape):
        raise MalformedError("An array's shape is at most 8 whole numbers.")
    kind = np.dtype(dtype)
    if math.prod(shape) * kind.itemsize != len(frames[at]):
        raise MalformedError("An array's frame is not as long as its shape says.")
    return np.frombuffer(frames[at], kind).reshape(shape)
