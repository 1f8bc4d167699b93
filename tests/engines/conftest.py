"""Two real engines on this machine, shared by the tests of this folder, and the one-process truth."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from flexmagic import Session

MODEL = Path(__file__).parents[2] / "demo_notebooks" / "model"
PROMPT = "When Mary and John went to the store, John gave a drink to"


@pytest.fixture(scope="session")
def engines():
    """A started session; the tests share it and leave it without hooks."""
    torch.set_num_threads(1)
    with Session.start(2, oversubscribe=True) as session:
        yield session


@pytest.fixture
def session(engines):
    """The shared session, hooks taken off before and after."""
    clear(engines)
    yield engines
    clear(engines)


def clear(session):
    """Take all hooks off; an engine that a failed test has ended is replaced: one failure stays one."""
    if session._calls.ranks.ended():
        session.recover()
    for hook in list(session.hooks):
        hook.remove()


_SHIPPED = {}


@pytest.fixture
def loaded(session):
    """The session with the shipped model, eager attention so that patterns are sites too."""
    if not holds_shipped_model(session):
        _SHIPPED["model"] = session.load(MODEL, tp=2, attn="eager")
    return session


@pytest.fixture(scope="module")
def own_cluster():
    """The shipped model on a cluster of one file alone."""
    torch.set_num_threads(1)
    with Session.start(2, oversubscribe=True) as session:
        session.load(MODEL, tp=2, attn="eager")
        yield session


@pytest.fixture
def owner(own_cluster):
    """A session whose engines may be killed; one that a failed test has left dead is replaced."""
    if own_cluster._calls.ranks.ended():
        own_cluster.recover()
    return own_cluster


def holds_shipped_model(session):
    """Whether the model that ``loaded`` made is still the one there is."""
    model = _SHIPPED.get("model")
    return model is not None and model.alive and session._model is model


@pytest.fixture
def staged(session):
    """The session with the shipped model in two pipeline stages, eager attention as in ``loaded``."""
    model = _SHIPPED.get("staged")
    if model is None or not model.alive or session._model is not model:
        _SHIPPED["staged"] = session.load(MODEL, pp=2, attn="eager")
    return session


@pytest.fixture(scope="session")
def one_process():
    """The shipped model in this process: the truth."""
    return AutoModelForCausalLM.from_pretrained(MODEL, attn_implementation="eager").eval()


@pytest.fixture(scope="session")
def ids():
    """The prompt's token ids, ``[1, seq]``."""
    return AutoTokenizer.from_pretrained(MODEL)(PROMPT, return_tensors="pt")["input_ids"]


class Edited:
    """The one-process model under plain torch hooks ``{module path: function of the output}``."""

    def __init__(self, model, edits):
        self._model, self._edits, self._handles = model, edits, []

    def __enter__(self):
        for path, edit in self._edits.items():
            module = self._model.get_submodule(path)
            self._handles.append(module.register_forward_hook(lambda _m, _a, out, edit=edit: edit(out)))
        return self._model

    def __exit__(self, *exc):
        for handle in self._handles:
            handle.remove()


@pytest.fixture(scope="session")
def edited(one_process):
    return lambda edits: Edited(one_process, edits)


def relative(a, b):
    """Largest difference relative to the largest value of the reference ``b``."""
    a, b = torch.as_tensor(a).double(), torch.as_tensor(b).double()
    assert a.shape == b.shape, (a.shape, b.shape)
    return float((a - b).abs().max() / b.abs().max().clamp_min(1e-30)) if b.numel() else 0.0


@pytest.fixture(scope="session")
def names():
    return (f"hook{i}" for i in itertools.count())
