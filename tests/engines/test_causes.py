"""Causes and attributions on engines are those of the same method on the model in one process."""

import contextlib

import numpy as np
import pytest
import torch
from IPython.core.interactiveshell import InteractiveShell

from flexmagic.errors import InputError, ModelError, SiteError
from flexmagic.recipes import (
    attention,
    attention_knockout,
    attention_replacement,
    attribution_patching,
    causal_tracing,
    faithfulness,
    gradient_times_activation,
    integrated_gradients,
    logit_attribution,
    patching,
    path_patching,
)

from .conftest import MODEL, PROMPT, relative

pytestmark = pytest.mark.engines

CORRUPT = PROMPT.replace("John gave", "Mary gave")
DIFFERENT, LAST = 10, 14
FACT, SUBJECT = "The capital of France is", 4
METRIC = "logits[-1, right] - logits[-1, wrong]"
TOKENS = {"right": " Mary", "wrong": " John"}
ALL = slice(None)


class Truth:
    """The shipped model in one process, with plain torch hooks."""

    def __init__(self, model, tokenizer):
        self.model, self._tokenizer = model, tokenizer
        self.right, self.wrong = (self.token(text) for text in TOKENS.values())
        self.clean, self.corrupt = self.ids(PROMPT), self.ids(CORRUPT)

    def ids(self, text):
        return self._tokenizer(text, return_tensors="pt")["input_ids"]

    def token(self, text):
        return self._tokenizer(text, add_special_tokens=False)["input_ids"][0]

    @contextlib.contextmanager
    def hooked(self, edits):
        """``edits``: functions of the first input or of the output, by ``path:in`` or ``path:out``."""
        handles = []
        for name, edit in edits.items():
            path, port = name.split(":")
            module = self.model.get_submodule(path)
            if port == "in":

                def before(_module, args, kwargs, edit=edit):
                    first = args[0] if args else kwargs["hidden_states"]
                    new = edit(first)
                    if new is None:
                        return None
                    return ((new, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": new})

                handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
            else:

                def after(_module, _args, out, edit=edit):
                    new = edit(out[0] if isinstance(out, tuple) else out)
                    return None if new is None else ((new, *out[1:]) if isinstance(out, tuple) else new)

                handles.append(module.register_forward_hook(after))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def logits(self, ids, edits=None, **options):
        with self.hooked(edits or {}):
            return self.model(ids, use_cache=False, **options).logits

    def metric(self, ids, edits=None, **options):
        last = self.logits(ids, edits, **options)[0, -1]
        return last[self.right] - last[self.wrong]

    def kept(self, ids, names):
        """Values at places in a plain forward."""
        found = {}
        self.logits(ids, {name: lambda x, name=name: found.__setitem__(name, x) for name in names})
        return found

    def with_gradients(self, ids, names, row=0):
        """Values and the metric's gradients there, of one row."""
        found = {}

        def keep(x, name):
            x.retain_grad()
            found[name] = x

        with torch.enable_grad(), self.hooked({n: lambda x, n=n: keep(x, n) for n in names}):
            last = self.model(ids, use_cache=False).logits[row, -1]
            (last[self.right] - last[self.wrong]).backward()
        self.model.zero_grad()
        return {name: (x.detach()[row], x.grad[row]) for name, x in found.items()}


@pytest.fixture(scope="module")
def truth(one_process):
    from transformers import AutoTokenizer

    with torch.no_grad():
        yield Truth(one_process, AutoTokenizer.from_pretrained(MODEL))


@pytest.fixture(params=["tp", "fsdp", "pp"])
def split(request, session):
    """The shipped model split in one way."""
    if request.param == "tp":
        return request.getfixturevalue("loaded")
    if request.param == "pp":
        return request.getfixturevalue("staged")
    session.load(MODEL, attn="eager", **{request.param: 2})
    return session


def put(place, value):
    """An edit that writes a value at a place of a copy."""

    def edit(x):
        x = x.clone()
        x[place] = value
        return x

    return edit


# --- causal tracing ------------------------------------------------------------------------------------


def traced(truth, samples=3, noise=4.0, seed=5):
    """What causal tracing gives in one process: a function of the places that are restored."""
    ids = truth.ids(FACT)
    embeddings = truth.kept(ids, ["model.embed_tokens:out"])["model.embed_tokens:out"]
    drawn = torch.randn(samples, 1, 256, generator=torch.Generator().manual_seed(seed))
    wrong = embeddings.repeat(samples, 1, 1)
    wrong[:, SUBJECT : SUBJECT + 1] += noise * embeddings.std() * drawn
    answer = truth.token(" Paris")

    def probability(names=(), at=()):
        clean = truth.kept(ids, names)
        edits = {name: put((ALL, list(at)), clean[name][:, list(at)]) for name in names}
        logits = truth.logits(ids.repeat(samples, 1), {"model.embed_tokens:out": lambda _x: wrong, **edits})
        return float(logits[:, -1].softmax(-1)[:, answer].mean())

    return probability, float(noise * embeddings.std())


def check_causal_tracing(session, truth):
    probability, spread = traced(truth)
    options = {"answer": " Paris", "samples": 3, "noise": 4.0, "seed": 5}
    places = {"before": [2], "subject": [SUBJECT], "last": [-1], "all": range(6)}
    found = causal_tracing(
        session, FACT, "France", **options, layers=[0, 2], positions=places, site="resid_pre"
    )
    assert found.clean > 0.5
    assert found.clean - found.corrupt > 0.3
    assert found.corrupt == pytest.approx(probability(), rel=1e-5)
    assert (found.subject, found.noise) == ((SUBJECT,), pytest.approx(spread, rel=1e-5))
    for row, layer in enumerate([0, 2]):
        assert found.effect.values[row, 0] == 0
        for column, at in enumerate(places.values()):
            want = probability([f"model.layers.{layer}:in"], at)
            assert found.metric.values[row, column] == pytest.approx(want, rel=1e-5, abs=1e-7)
        assert found.metric.values[row, 3] == pytest.approx(found.clean, rel=1e-5)
    assert found.metric.values[0, 1] == pytest.approx(found.clean, rel=1e-5)

    middle = causal_tracing(
        session, FACT, "France", **options, site="resid_mid", positions={"all": range(6)}, layers=[1]
    )
    assert middle.metric.values[0, 0] == pytest.approx(middle.clean, rel=1e-5)

    found = causal_tracing(session, FACT, "France", **options, site="mlp_out", window=2, layers=[1])
    assert found.metric.dims == ("layer", "position")
    want = [probability(["model.layers.0.mlp:out", "model.layers.1.mlp:out"], [at]) for at in range(6)]
    assert relative(found.metric.values[0], want) <= 1e-5
    assert abs(found.effect.values[0, SUBJECT]) > 0.01


# --- paths ---------------------------------------------------------------------------------------------


def path_truth(truth, sender, receivers, *, frozen_mlps):
    """Path patching in three runs: ``sender`` is a place and what of it; ``receivers`` likewise."""
    name, columns = sender
    mlps = [f"model.layers.{n}.mlp:out" for n in range(4)] if frozen_mlps else []
    nodes = [f"model.layers.{n}.self_attn.o_proj:in" for n in range(4)] + mlps
    original, other = (truth.kept(ids, {*nodes, name}) for ids in (truth.clean, truth.corrupt))
    edits = {node: lambda _x, node=node: original[node] for node in nodes}
    edits[name] = lambda x: put((..., columns), other[name][..., columns])(
        original[name] if name in nodes else x
    )
    received = {}
    places = {place for place, _ in receivers}

    def between(place):
        def keep(x):
            new = edits[place](x) if place in edits else x
            received[place] = new
            return new

        return keep

    truth.logits(truth.clean, {**edits, **{place: between(place) for place in places}})
    patched = {}
    for place, of in receivers:
        before = patched.get(place, lambda x: x)
        patched[place] = lambda x, p=place, of=of, b=before: put((..., of), received[p][..., of])(b(x))
    return float(truth.metric(truth.clean, patched))


def head(n):
    return slice(32 * n, 32 * n + 32)


def check_paths(session, truth):
    found = path_patching(session, PROMPT, CORRUPT, METRIC, tokens=TOKENS, layers=[0, 3])
    assert found.clean == pytest.approx(float(truth.metric(truth.clean)), rel=1e-5)
    end = [("model.layers.3:out", ALL)]
    for row, layer in enumerate([0, 3]):
        for n in (2, 5):
            sender = (f"model.layers.{layer}.self_attn.o_proj:in", head(n))
            want = path_truth(truth, sender, end, frozen_mlps=False)
            assert found.metric.values[row, n] == pytest.approx(want, rel=1e-5, abs=1e-5)
    plain = patching(
        session, PROMPT, CORRUPT, METRIC, tokens=TOKENS, site="attn.z", layers=[3], denoising=False
    )
    assert relative(found.metric.values[1], plain.metric.values[0]) <= 1e-5  # nothing attends after it

    to = ["blocks.1.attn.q[3]", "blocks.2.attn.v[1]", "blocks.3.mlp_out"]
    receivers = [
        ("model.layers.1.self_attn.q_proj:out", head(3)),
        ("model.layers.2.self_attn.v_proj:out", head(1)),
        ("model.layers.3.mlp:out", ALL),
    ]
    for mlps, senders in ((True, "attn.z"), (False, "attn.z"), (True, "mlp_out")):
        found = path_patching(
            session, PROMPT, CORRUPT, METRIC, tokens=TOKENS, senders=senders, receivers=to,
            through_mlps=mlps, layers=[0],
        )  # fmt: skip
        one = found.effect.values.reshape(-1)
        at = int(abs(one).argmax())
        sender = (
            ("model.layers.0.self_attn.o_proj:in", head(at))
            if senders == "attn.z"
            else ("model.layers.0.mlp:out", ALL)
        )
        want = path_truth(truth, sender, receivers, frozen_mlps=not mlps)
        assert abs(one[at]) > 1e-3
        assert found.metric.values.reshape(-1)[at] == pytest.approx(want, rel=1e-5, abs=1e-5)
    late = path_patching(
        session, PROMPT, CORRUPT, METRIC, tokens=TOKENS, receivers="blocks.1.attn.q", layers=[2]
    )
    assert not late.effect.values.any()  # what comes later cannot send back


def check_middle(session, truth):
    """Between attention and MLP both what the MLP gets and what it is added to are patched."""
    names = {name: f"model.layers.1{path}" for name, path in (("pre", ":in"), ("added", ".self_attn:out"))}
    one, other = (truth.kept(ids, names.values()) for ids in (truth.clean, truth.corrupt))
    before, after = (sum(found[name] for name in names.values()) for found in (other, one))
    options = {"tokens": TOKENS, "site": "resid_mid", "layers": [1]}
    for at in (LAST, slice(None)):
        edit = {names["added"]: lambda x, at=at: put((0, at), x[0, at] + (after - before)[0, at])(x)}
        want = float(truth.metric(truth.corrupt, edit))
        places = {"here": range(15)[at] if isinstance(at, slice) else [at]}
        found = patching(session, PROMPT, CORRUPT, METRIC, **options, positions=places)
        assert found.metric.values[0, 0] == pytest.approx(want, rel=1e-5, abs=1e-4)
    assert found.effect.values[0, 0] == pytest.approx(1, abs=1e-5)
    places = {"last": [LAST], "before": [3]}
    slope = faithfulness(session, PROMPT, CORRUPT, METRIC, **options, step=0.001, positions=places)
    assert slope.off < 0.02
    assert slope.measured.effect.values[0, 0] > 0.1
    assert slope.measured.effect.values[0, 1] == 0


# --- gradients -----------------------------------------------------------------------------------------


def check_gradients(session, truth):
    places = [f"model.layers.{n}:in" for n in (0, 2)]
    kept = truth.with_gradients(truth.clean, places)
    found = gradient_times_activation(session, PROMPT, METRIC, tokens=TOKENS, layers=[0, 2])
    assert relative(found.value.values, torch.stack([(x * g).sum(-1) for x, g in kept.values()])) <= 1e-5
    assert found.metric == pytest.approx(float(truth.metric(truth.clean)), rel=1e-5)

    batch = torch.cat([truth.clean, truth.corrupt])
    name = "model.layers.0.self_attn.o_proj:in"
    (x, g) = truth.with_gradients(batch, [name], row=0)[name]
    other = truth.kept(truth.corrupt, [name])[name][0]
    by_head = ((other - x) * g).sum(0).reshape(8, 32).sum(-1)
    estimate = attribution_patching(
        session, PROMPT, CORRUPT, METRIC, tokens=TOKENS, site="attn.z", layers=[0], denoising=False
    )
    whole = estimate.corrupt - estimate.clean
    assert relative(estimate.effect.values[0], by_head / whole) <= 1e-5
    assert abs(estimate.effect.values).max() > 0.05

    slope = faithfulness(
        session, PROMPT, CORRUPT, METRIC, tokens=TOKENS, layers=[1, 2], step=0.01,
        positions={"last": [LAST], "before": [3], "all": range(15)},
    )  # fmt: skip
    assert abs(slope.measured.effect.values).max() > 0.1
    assert slope.off < 0.02
    assert not slope.measured.effect.values[:, 1].any()
    assert not slope.estimated.effect.values[:, 1].any()
    whole = faithfulness(
        session, PROMPT, CORRUPT, METRIC, tokens=TOKENS, layers=[1, 2], positions={"all": range(15)}
    )
    assert whole.measured.effect.values == pytest.approx(np.ones((2, 1)), abs=1e-4)
    assert whole.off > slope.off


def check_integrated(session, truth):
    points, weights = np.polynomial.legendre.leggauss(20)
    name, mean = "model.embed_tokens:out", 0
    x, base = (truth.kept(ids, [name])[name][0] for ids in (truth.clean, truth.corrupt))
    for at, weight in zip((points + 1) / 2, weights / 2, strict=True):
        now = (base + at * (x - base))[None].requires_grad_()
        with torch.enable_grad():
            truth.metric(truth.clean, {name: lambda _x, now=now: now}).backward()
        mean = mean + weight * now.grad[0]
    truth.model.zero_grad()
    found = integrated_gradients(session, PROMPT, METRIC, baseline=CORRUPT, tokens=TOKENS, steps=20)
    assert relative(found.value.values, ((x - base) * mean).sum(-1)) <= 1e-5
    assert found.metric - found.baseline > 10
    assert found.baseline == pytest.approx(float(truth.metric(truth.corrupt)), rel=1e-5)
    assert found.gap < 0.01
    assert int(abs(found.value.values).argmax()) == DIFFERENT
    rough = integrated_gradients(session, PROMPT, METRIC, baseline=CORRUPT, tokens=TOKENS, steps=1)
    assert rough.gap > found.gap


# --- direct logit attribution --------------------------------------------------------------------------


def check_direct(session, truth):
    names = [f"model.layers.{n}.{part}" for n in range(4) for part in ("self_attn:out", "mlp:out")]
    kept = truth.kept(truth.clean, ["model.layers.0:in", *names, "model.layers.3:out"])
    norm, head_ = truth.model.model.norm, truth.model.lm_head.weight
    scale = kept["model.layers.3:out"][0, -1].pow(2).mean().add(norm.variance_epsilon).rsqrt()
    onto = (head_[truth.right] - head_[truth.wrong]) * norm.weight * scale
    want = [float(kept[name][0, -1] @ onto) for name in ("model.layers.0:in", *names)]
    found = logit_attribution(session, PROMPT, METRIC, tokens=TOKENS)
    assert found.metric == pytest.approx(float(truth.metric(truth.clean)), rel=1e-5)
    assert relative(found.parts.values, [*want, 0, 0]) <= 1e-5
    assert found.parts.values.sum() == pytest.approx(found.metric, rel=1e-5)
    assert found.gap < 1e-5
    assert relative(found.heads.values.sum(-1), want[1::2]) <= 1e-5
    for layer in (0, 2):
        path = f"model.layers.{layer}.self_attn.o_proj"
        z = truth.kept(truth.clean, [f"{path}:in"])[f"{path}:in"][0, -1]
        weight = truth.model.get_submodule(path).weight
        each = [float(weight[:, head(n)] @ z[head(n)] @ onto) for n in range(8)]
        assert relative(found.heads.values[layer], each) <= 1e-5
    assert found.accumulated.values[-1] == pytest.approx(found.metric, rel=1e-5)
    assert relative(np.diff(found.accumulated.values), np.add(want[1::2], want[2::2])) <= 1e-5


# --- attention -----------------------------------------------------------------------------------------


def masked(truth, layer, edges):
    """The metric with edges masked in all heads of a layer, by the attention's own mask."""
    module = truth.model.get_submodule(f"model.layers.{layer}.self_attn")

    def cut(_module, args, kwargs):
        mask = kwargs["attention_mask"].clone()
        for query, key in edges:
            mask[..., query, key] = torch.finfo(mask.dtype).min
        return args, {**kwargs, "attention_mask": mask}

    handle = module.register_forward_pre_hook(cut, with_kwargs=True)
    try:
        return float(truth.metric(truth.clean))
    finally:
        handle.remove()


def check_attention(session, truth):
    patterns = truth.model(truth.clean, output_attentions=True).attentions
    found = attention(session, PROMPT, layers=[0, 3])
    assert relative(found.pattern().values, torch.stack([patterns[0][0], patterns[3][0]])) <= 1e-5
    assert relative(found.head(3, 5).values, patterns[3][0, 5]) <= 1e-5

    plain = float(truth.metric(truth.clean))
    out = attention_knockout(session, PROMPT, METRIC, tokens=TOKENS, layers=[0, 2])
    for row, layer in enumerate([0, 2]):
        for n in (2, 6):
            edit = {f"model.layers.{layer}.self_attn.o_proj:in": put((..., head(n)), 0)}
            want = float(truth.metric(truth.clean, edit))
            assert out.metric.values[row, n] == pytest.approx(want, rel=1e-5, abs=1e-5)
            assert out.effect.values[row, n] == pytest.approx(want - plain, abs=2e-4)
    assert abs(out.effect.values).max() > 3

    edges = {"to the actor": [(-1, DIFFERENT)], "to all before": [(LAST, key) for key in range(LAST)]}
    out = attention_knockout(
        session, PROMPT, METRIC, tokens=TOKENS, edges=edges, together=True, layers=[0, 1]
    )
    assert out.effect.dims == ("layer", "edges")
    for row in (0, 1):
        for column, of in enumerate(edges.values()):
            assert out.metric.values[row, column] == pytest.approx(masked(truth, row, of), rel=1e-5, abs=1e-4)
    assert abs(out.effect.values[0]).min() > 1

    def mixed(layer, n, pattern):
        path = f"model.layers.{layer}.self_attn"
        values = truth.kept(truth.clean, [f"{path}.v_proj:out"])[f"{path}.v_proj:out"]
        result = pattern @ values[0, :, head(n // 2)]  # two heads share values
        return float(truth.metric(truth.clean, {f"{path}.o_proj:in": put((0, ALL, head(n)), result)}))

    others = truth.model(truth.corrupt, output_attentions=True).attentions
    out = attention_replacement(session, PROMPT, CORRUPT, METRIC, tokens=TOKENS, layers=[1])
    best = out.largest(1)[0]
    assert abs(best["effect"]) > 1
    want = mixed(1, best["head"], others[1][0, best["head"]])
    assert best["metric"] == pytest.approx(want, rel=1e-5, abs=1e-4)
    flat = np.tril(np.ones((15, 15)))
    flat /= flat.sum(-1, keepdims=True)
    out = attention_replacement(session, PROMPT, flat, METRIC, tokens=TOKENS, layers=[0])
    want = mixed(0, 2, torch.as_tensor(flat).float())
    assert out.metric.values[0, 2] == pytest.approx(want, rel=1e-5, abs=1e-4)
    assert abs(out.effect.values[0, 2]) > 1


CHECKS = {
    "causal tracing": check_causal_tracing,
    "paths": check_paths,
    "middle": check_middle,
    "gradients": check_gradients,
    "integrated gradients": check_integrated,
    "direct logit attribution": check_direct,
    "attention": check_attention,
}


def test_every_split_equals_one_process(split, truth):
    for check in CHECKS.values():
        check(split, truth)
        assert not split.hooks


# --- refusals and magics -------------------------------------------------------------------------------

REFUSED = {
    "France is not in it": lambda s: causal_tracing(s, FACT, "Spain"),
    "choose one of": lambda s: causal_tracing(s, FACT, "France", site="attn.z"),
    "and a metric is one number": lambda s: causal_tracing(s, FACT, "France", metric="logits[-1]"),
    "has heads 0 to 3": lambda s: path_patching(
        s, PROMPT, CORRUPT, METRIC, tokens=TOKENS, receivers="blocks.1.attn.v[4]"
    ),
    "has no heads": lambda s: path_patching(
        s, PROMPT, CORRUPT, METRIC, tokens=TOKENS, receivers="blocks.1.mlp_out[0]"
    ),
    "name what reads it": lambda s: path_patching(
        s, PROMPT, CORRUPT, METRIC, tokens=TOKENS, receivers="blocks.1.resid_mid"
    ),
    "cannot send": lambda s: path_patching(s, PROMPT, CORRUPT, METRIC, tokens=TOKENS, senders="resid_pre"),
    "A step of 0": lambda s: patching(s, PROMPT, CORRUPT, METRIC, tokens=TOKENS, step=0),
    "Give one prompt": lambda s: gradient_times_activation(s, [PROMPT], "logits[-1, 5]"),
    "1 step or more": lambda s: integrated_gradients(s, PROMPT, "logits[-1, 5]", steps=0),
    "has 15 tokens": lambda s: attention_replacement(s, PROMPT, np.ones((3, 3)), "logits[-1, 5]"),
    "a group or more": lambda s: attention_knockout(s, PROMPT, "logits[-1, 5]", edges={}),
}


@pytest.mark.parametrize("said", REFUSED)
def test_what_cannot_be_asked_is_refused(loaded, said):
    with pytest.raises(InputError, match=said.replace("France is not in it", "not in the prompt")):
        REFUSED[said](loaded)


def test_what_is_not_linear_has_no_direct_attribution(loaded):
    with pytest.raises(ModelError, match="not linear"):
        logit_attribution(loaded, PROMPT, "logits[-1].softmax(-1)[right]", tokens=TOKENS, heads=False)


def test_patterns_that_are_not_returned_are_missed_in_words(session):
    session.load(MODEL, tp=2)
    with pytest.raises(SiteError, match="eager"):
        attention(session, PROMPT)


def test_the_magics_call_the_recipes(loaded):
    from flexmagic.magics import desk_of, load, unload

    shell = InteractiveShell()
    load(shell)
    desk_of(shell).take(loaded)
    metric = '--metric "logits[-1, a] - logits[-1, b]" --tokens "a= Mary" "b= John"'
    both = f'"{PROMPT}" "{CORRUPT}" {metric}'
    try:
        run = shell.run_line_magic
        assert run("flexcausal", f'"{FACT}" --subject France --samples 2 --layers [0]').clean > 0.5
        assert run(
            "flexpath", f'{both} --layers [3] --receivers "blocks.3.resid_post" --direct'
        ).effect.dims == (
            "layer",
            "head",
        )
        assert run("flexattribute", f'"{PROMPT}" {metric} --site attn.z').value.dims == ("layer", "head")
        assert run("flexattribute", f"{both} --noise --layers [0]").estimated
        assert run("flexattribute", f"{both} --integrated --steps 3").steps == 3
        assert run("flexdla", f'"{PROMPT}" {metric} --no-heads').heads is None
        assert len(run("flexattention", f'"{PROMPT}"').sites) == 4
        cut = run("flexattention", f'"{PROMPT}" {metric} --edges "{{\'back\': [(-1, 10)]}}" --together')
        assert "edges cut" in cut.grid().to_html()
        assert run("flexattention", f"{both} --layers [1]").effect.values.shape == (1, 8)
        assert run("flexpatch", f"{both} --step 0.5 --memory 4MB --layers [0]").effect.values[0, 0] == 0
        with pytest.raises(InputError, match="Give a metric"):
            run("flexdla", f'"{PROMPT}"')
        with pytest.raises(InputError, match="part of it"):
            run("flexcausal", f'"{PROMPT}"')
    finally:
        desk_of(shell)._session = None
        unload(shell)
