"""Memory is used again only where nothing refers to what came before."""

import mmap

import numpy as np
import pytest
import torch

from flexmagic.client.spare import LEAST, MOST, Spare

SIZE = LEAST + 12344


def address(array):
    return array.__array_interface__["data"][0]


def test_memory_is_used_again_once_nobody_has_it():
    spare = Spare()
    first = spare.array(SIZE)
    first[:] = 7
    at = address(first)
    del first
    again = spare.array(SIZE)
    assert address(again) == at
    assert again.nbytes == SIZE
    assert again.flags.writeable


@pytest.mark.parametrize(
    "held",
    [
        lambda array: array,
        lambda array: array[5:7],
        lambda array: array.view(np.uint8).reshape(-1, 5)[1:, 2],
        lambda array: torch.from_numpy(array)[3:],
        lambda array: torch.from_numpy(array)[: SIZE // 4 * 4].view(torch.float32).numpy()[1:],
        lambda array: memoryview(array)[3:9],
        lambda array: [torch.from_numpy(array).view(-1, 5)],
    ],
)
def test_whoever_has_a_view_keeps_what_is_there(held):
    spare = Spare()
    array = spare.array(SIZE)
    array[:] = 7
    kept = held(array)
    del array
    other = spare.array(SIZE)
    other[:] = 1
    assert (np.asarray(kept[0] if isinstance(kept, list) else kept).reshape(-1).view(np.uint8) == 7).all()


@pytest.mark.parametrize("nbytes", [0, 1, LEAST - 1, MOST + 1])
def test_small_and_very_large_arrays_are_not_kept(nbytes):
    spare = Spare()
    assert spare.array(nbytes).nbytes == nbytes
    assert spare._kept is None


def test_no_little_array_holds_much_memory():
    spare = Spare()
    spare.array(4 * SIZE)
    array = spare.array(SIZE)
    assert isinstance(array.base, (mmap.mmap, memoryview))
    assert len(spare._kept) == SIZE
