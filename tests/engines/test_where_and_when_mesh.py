"""Where and when hooks act on tensor-parallel ranks crossed with data-parallel ones, on four engines."""

import contextlib

import pytest
import torch

from flexmagic import Session

from .conftest import MODEL, clear, relative
from .test_gradients import check_derivatives, check_parameters, gradients_of
from .test_modules import check_adapter, check_gradients
from .test_where_and_when import check_noise

pytestmark = [pytest.mark.engines]

TEXTS = ["The capital of France is", "The capital of Italy is", "Tom gave a book to"]
SHARDED = "model.layers.1.mlp.up_proj"
LATE = "model.layers.3.mlp"


@pytest.fixture(scope="module")
def four():
    with Session.start(4, oversubscribe=True) as session:
        session.load(MODEL, tp=2, dp=2, attn="eager")
        yield session


@pytest.fixture
def crossed(four):
    clear(four)
    yield four
    clear(four)


@contextlib.contextmanager
def edits(model, by_path):
    """Outputs of modules edited by functions of the output and the number of the call."""
    handles = []
    for path, edit in by_path.items():
        calls = []

        def after(_m, _a, out, edit=edit, calls=calls):
            calls.append(None)
            return edit(out.clone(), len(calls) - 1)

        handles.append(model.get_submodule(path).register_forward_hook(after))
    try:
        yield model
    finally:
        for handle in handles:
            handle.remove()


def masked(model, ids):
    """Logits of rows of which shorter ones are padded with id 0."""
    ids = torch.tensor(ids)
    return model(ids, attention_mask=(ids != 0).long(), use_cache=False).logits


def test_rows_tokens_and_order_equal_one_process(crossed, one_process):
    """Rows are shared out two to one; the middle one and the last are edited."""
    plain = crossed.run(TEXTS, capture=[SHARDED, LATE])
    for site in (SHARDED, LATE):
        crossed.hook(site, "x += 1", name=f"plus {site}", row="1:", token=-1)
        crossed.hook(site, name=f"look {site}")
        crossed.hook(site, "x *= 10", name=f"times {site}", row=1)
    run = crossed.run(TEXTS)

    def edit(x, _call):
        x[1:, -1] += 1
        x[1] *= 10
        return x

    before, after = plain[SHARDED].torch(), run[SHARDED].torch()
    assert torch.equal(after, edit(before.clone(), 0))
    assert torch.equal(run[SHARDED, f"look {SHARDED}"].torch()[1, -1], before[1, -1] + 1)
    with edits(one_process, {SHARDED: edit, LATE: edit}), torch.no_grad():
        reference = masked(one_process, run.ids)
    assert relative(run.logits.torch(), plain.logits.torch()) > 1e-3
    assert relative(run.logits.torch(), reference) <= 1e-5


def test_text_is_that_of_one_process(crossed, one_process):
    crossed.hook(SHARDED, "x[..., -1] = 100", name="ablate", step="2:", row=2)
    run = crossed.generate(TEXTS[1:] + TEXTS[:1], max_new_tokens=5)

    def edit(x, call):
        if call >= 2:
            x[2, :, -1] = 100
        return x

    ids = torch.tensor([row[: run._made.prompt] for row in run.ids])
    kept = []
    handle = one_process.register_forward_hook(lambda _m, _a, out: kept.append(out.logits))
    with edits(one_process, {SHARDED: edit}):
        wanted = one_process.generate(
            ids, attention_mask=(ids != 0).long(), max_new_tokens=5, logits_to_keep=0
        )
    handle.remove()
    assert run.ids == wanted.tolist()
    for n in range(run.steps):
        assert relative(run.step(n).logits.torch(), kept[n]) <= 1e-5


def test_skipped_modules_pass_what_lies_otherwise(crossed, one_process):
    projection = "model.layers.1.self_attn.o_proj"
    plain = crossed.run(TEXTS)
    run = crossed.run(TEXTS, skip=[projection, "model.layers.2"])
    layer, module = one_process.model.layers[2], one_process.get_submodule(projection)
    layer.forward, module.forward = lambda x, *_a, **_k: x, lambda x: x
    try:
        with torch.no_grad():
            reference = masked(one_process, run.ids)
    finally:
        del layer.forward, module.forward
    assert relative(run.logits.torch(), plain.logits.torch()) > 1e-3
    assert relative(run.logits.torch(), reference) <= 1e-5
    stopped = crossed.run(TEXTS, stop_at=SHARDED)
    again = crossed.run(TEXTS, capture=SHARDED)
    assert torch.equal(stopped[SHARDED].torch(), again[SHARDED].torch())
    assert torch.equal(again.logits.torch(), plain.logits.torch())


def test_noise_is_that_of_one_process(crossed, edited):
    check_noise(crossed, edited, SHARDED)


@pytest.mark.full
@pytest.mark.timeout(300)
def test_gradients_and_edited_ones_are_those_of_one_process(crossed, one_process):
    truth = gradients_of(one_process)
    check_derivatives(crossed, one_process, truth)
    check_parameters(crossed, truth)


@pytest.fixture
def without_modules(crossed):
    yield crossed
    clear(crossed)
    for name in list(crossed.modules):
        del crossed.modules[name]


@pytest.mark.full
@pytest.mark.timeout(300)
def test_modules_are_trained_as_in_one_process(without_modules, one_process):
    check_gradients(without_modules, one_process)


@pytest.mark.full
@pytest.mark.timeout(300)
def test_an_adapter_is_trained_as_in_one_process(without_modules, one_process):
    check_adapter(without_modules, one_process)
