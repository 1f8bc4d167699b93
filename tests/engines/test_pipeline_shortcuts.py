"""Parts of a run left out over pipeline stages: what does not run does so on no rank, as in one process."""

import pytest
import torch

from flexmagic import FlexError, ModelError

from .conftest import PROMPT, relative
from .stages import PRUNED
from .test_shortcuts import logits, skipped

pytestmark = pytest.mark.engines

COUNTED = """
_calls = {}
def _count(path):
    return lambda *_: _calls.__setitem__(path, _calls.get(path, 0) + 1)
_paths = {f"model.layers.{n}.mlp.down_proj": n // 2 for n in range(4)}
_handles = [model.stage_module.get_submodule(path).register_forward_hook(_count(path))
            for path, stage in _paths.items() if stage == rank]
"""


@pytest.fixture
def counted(staged):
    """How often each layer's MLP ran since the last time, on the rank that has it."""
    view = staged._cluster.client[:]
    view.execute(COUNTED, block=True)

    def read():
        found = view["_calls"]
        view.execute("_calls.clear()", block=True)
        return [sum(of.get(f"model.layers.{n}.mlp.down_proj", 0) for of in found) for n in range(4)]

    yield read
    view.execute("[h.remove() for h in _handles]", block=True)


STOPS = {
    ":input": [0, 0, 0, 0],
    "model.layers.0": [1, 0, 0, 0],
    "model.layers.1": [1, 1, 0, 0],
    "model.layers.2:input": [1, 1, 0, 0],
    "model.layers.2.self_attn.o_proj": [1, 1, 0, 0],
    "model.norm": [1, 1, 1, 1],
}


@pytest.mark.parametrize("site", STOPS)
def test_nothing_after_a_stop_runs_on_any_stage(staged, counted, site):
    texts = [PROMPT, "Paris is"]
    plain = staged.run(texts, capture=[site, "model.layers.0.mlp"])
    assert counted() == [1, 1, 1, 1]
    run = staged.run(texts, stop_at=site)
    assert counted() == STOPS[site]
    for name in run.sites:
        assert torch.equal(run[name].torch(), plain[name].torch()), name
    assert run.sites
    with pytest.raises(FlexError, match="was to stop at"):
        run[":output.logits"]
    assert torch.equal(staged.run(texts).logits.torch(), plain.logits.torch())


def test_a_stop_comes_after_the_edits_there_and_the_next_run_is_whole(staged, one_process, ids):
    plain = staged.run(PROMPT, capture="model.layers.1").logits.torch()
    staged.hook("model.layers.1", "x *= 3\nctx['seen'] = 1", name="h")
    run = staged.run(PROMPT, stop_at="model.layers.1")
    assert relative(run["model.layers.1"].torch(), staged.run(PROMPT)["model.layers.1"].torch()) == 0
    assert run["model.layers.1"].info.hook == "after h v1"
    staged.hooks.remove("h")
    assert torch.equal(staged.run(PROMPT).logits.torch(), plain)


def test_skipped_modules_run_on_no_rank_and_the_rest_is_as_in_one_process(staged, counted, one_process, ids):
    plain = staged.run(PROMPT).logits.torch()
    counted()
    run = staged.run(PROMPT, skip={"model.layers.1": None, "model.layers.2.mlp": 0.5, "model.layers.3": None})
    assert counted() == [1, 0, 0, 0]
    with (
        skipped(one_process, "model.layers.1", lambda x, *_a, **_k: x),
        skipped(one_process, "model.layers.2.mlp", lambda x: torch.full_like(x, 0.5)),
        skipped(one_process, "model.layers.3", lambda x, *_a, **_k: x),
    ):
        wanted = logits(one_process, ids)
    assert relative(run.logits.torch(), plain) > 1e-2
    assert relative(run.logits.torch(), wanted) <= 1e-5
    assert torch.equal(staged.run(PROMPT).logits.torch(), plain)
    counted()
    generated = staged.generate(PROMPT, max_new_tokens=3, skip="model.layers.{1,3}")
    assert counted() == [3, 0, 3, 0]
    with (
        skipped(one_process, "model.layers.1", lambda x, *_a, **_k: x),
        skipped(one_process, "model.layers.3", lambda x, *_a, **_k: x),
    ):
        assert generated.ids == one_process.generate(ids, max_new_tokens=3).tolist()


def test_a_module_over_several_stages_cannot_be_skipped(staged):
    with pytest.raises(ModelError, match="reaches over several pipeline stages"):
        staged.run(PROMPT, skip="model")
    assert staged.run(PROMPT).logits.shape[0] == 1


def test_torchs_schedules_are_cut_short_in_one_piece(session, one_process):
    session.load_cell(PRUNED, pp=2)
    texts = [PROMPT, "Paris is", "When", "John", "The"]
    plain = session.run(texts, capture=["model.layers.1", "model.layers.3"])
    for site in ("model.layers.1", "model.layers.3"):
        run = session.run(texts, stop_at=site)
        assert relative(run[site].torch(), plain[site].torch()) <= 1e-5
    batch = torch.tensor(session.run([[5, 6, 7], [8, 9, 10]]).ids)
    run = session.run(batch, skip=["model.layers.{1..2}"])
    with (
        skipped(one_process, "model.layers.1", lambda x, *_a, **_k: x),
        skipped(one_process, "model.layers.2", lambda x, *_a, **_k: x),
    ):
        wanted = logits(one_process, batch)
    assert relative(run.logits.torch(), session.run(batch).logits.torch()) > 1e-2
    assert relative(run.logits.torch(), wanted) <= 1e-5
