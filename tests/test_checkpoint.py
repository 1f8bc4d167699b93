"""Parts of weights looked up in the whole ones."""

import pytest
import torch
from safetensors.torch import save_file

from flexmagic.engine.checkpoint import Checkpoint, Place, spans_in, stands_at

WHOLE = torch.arange(24.0).reshape(6, 4)


@pytest.mark.parametrize(
    ("rows", "spans"),
    [([0, 1, 2], ((0, 3),)), ([4, 5, 0], ((4, 6), (0, 1))), ([1, 3, 5], ((1, 2), (3, 4), (5, 6)))],
)
@pytest.mark.parametrize("dim", [0, 1])
def test_spans_are_found_in_the_order_in_which_they_are_held(rows, spans, dim):
    whole = WHOLE if dim == 0 else WHOLE.T
    part = whole.index_select(dim, torch.tensor(rows))
    assert spans_in(part, whole, dim) == spans
    assert stands_at(part, whole, dim, spans)
    assert not stands_at(part + 1, whole, dim, spans)
    assert not stands_at(part, whole, dim, spans[1:])


def test_what_is_not_there_or_there_twice_is_told_apart():
    assert spans_in(WHOLE[:2] + 100, WHOLE, 0) is Place.ABSENT
    assert spans_in(WHOLE[:2], torch.cat([WHOLE, WHOLE]), 0) is Place.TWICE
    assert spans_in(WHOLE[:2].bfloat16(), WHOLE, 0) == ((0, 2),)  # loaded in another dtype


def test_a_checkpoint_is_a_folder_or_a_model_in_the_hubs_cache(tmp_path, monkeypatch):
    snapshot = tmp_path / "models--who--what" / "snapshots" / "1234"
    snapshot.mkdir(parents=True)
    save_file({"w": WHOLE}, snapshot / "model.safetensors")
    refs = tmp_path / "models--who--what" / "refs"
    refs.mkdir()
    (refs / "main").write_text("1234")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    for source in (snapshot, "who/what"):
        assert Checkpoint(source).shape("w") == (6, 4)
        assert torch.equal(Checkpoint(source).tensor("w"), WHOLE)
        assert Checkpoint(source).shape("v") is None
    for nothing in (None, "", "who/else", "/no/such/folder", "no folder: at all"):
        assert Checkpoint(nothing).shape("w") is None
