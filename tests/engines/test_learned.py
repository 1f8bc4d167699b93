"""Recipes that train or ablate give on engines what the same gives on the model in one process."""

import numpy as np
import pytest
import torch
from IPython.core.interactiveshell import InteractiveShell
from transformers import AutoModelForCausalLM, AutoTokenizer

from flexmagic.errors import InputError, SiteError
from flexmagic.recipes import (
    TunedLens,
    ablation,
    divergence,
    interchange,
    logit_lens,
    probe,
    steering,
    tuned_lens,
)
from flexmagic.recipes.probing import _tested, fitted

from .conftest import MODEL, PROMPT, relative
from .matrix import models
from .plain import Plain
from .test_aliases import GPT2

pytestmark = pytest.mark.engines

SPLITS = [{"tp": 2}, {"fsdp": 2}, {"pp": 2}]
NAMES = ("Mary", "John", "Tom", "Lily", "Anna", "Ben")
PAIRS = [(a, b) for a in NAMES for b in NAMES if a != b]
GIVEN = "When {0} and {1} went to the store, {2} gave a drink to"
FIRST = [GIVEN.format(a, b, a) for a, b in PAIRS]
SECOND = [GIVEN.format(a, b, b) for a, b in PAIRS]
STORIES = [
    "Once upon a time, there was a girl called Lily.",
    "The dog is big. Tom has a brown apple there.",
    "The capital of France is Paris.",
    "The capital of Italy is Rome.",
]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(MODEL)


@pytest.fixture(scope="module")
def plain(one_process):
    return Plain(one_process, "model.layers", "model.norm")


@pytest.fixture(params=SPLITS, ids=lambda sizes: next(iter(sizes)))
def split(request, session):
    """The shipped model, split in each way; nothing of a recipe is left afterwards."""
    session.load(MODEL, attn="eager", **request.param)
    yield session
    assert not len(session.hooks)
    assert not len(session.persistent)
    for name in list(session.modules):
        del session.modules[name]


def ids_of(tokenizer, texts):
    return [tokenizer(text)["input_ids"] for text in texts]


# --- every way of splitting --------------------------------------------------------------------------


def test_recipes_equal_one_process_however_the_model_is_split(split, plain, tokenizer):
    check_tuned(split, plain, ids_of(tokenizer, STORIES[2:] + FIRST[:2]))
    check_probe(split, plain, ids_of(tokenizer, FIRST[:12] + SECOND[:12]), ["a"] * 12 + ["b"] * 12)
    targets = [tokenizer(f" {b}", add_special_tokens=False)["input_ids"][0] for _, b in PAIRS[:8]]
    check_interchange(split, plain, ids_of(tokenizer, SECOND[:8]), ids_of(tokenizer, FIRST[:8]), targets)
    check_ablation(split, plain, ids_of(tokenizer, FIRST[:3]), width=32)


def check_tuned(session, plain, ids):
    """Two batches of texts, of different lengths, in three steps."""
    lengths = sorted({len(row) for row in ids}, key=[len(row) for row in ids].index)
    of = [[row for row in ids if len(row) == n] for n in lengths]
    steps = 3
    want, maps = plain.tuned([of[step % len(of)] for step in range(steps)], 1e-3)
    assert want[len(of)] < 0.99 * want[0]
    first = divergence(session, ids)
    states = [plain.states(rows) for rows in of]
    sizes = np.array([len(rows) * len(rows[0]) for rows in of])
    far = np.array([[float(plain.far(h, logits).detach()) for h in every] for every, logits in states])
    assert first.values == pytest.approx((far * sizes[:, None]).sum(0) / sizes.sum(), rel=1e-4, abs=1e-6)
    assert abs(first.values[-1]) < 1e-6
    lens = tuned_lens(session, ids, steps=steps)
    assert lens.losses.values == pytest.approx(want, rel=1e-3)
    state = session.modules[lens.name].state_dict()
    for name, value in maps.state_dict().items():
        assert float((state[name] - value).norm()) <= 2e-2 * float(value.norm()), name
    second = lens.divergence(ids)
    assert (second.values[:-1] < first.values[:-1]).all()
    del session.modules[lens.name]


def check_probe(session, plain, ids, labels):
    found = probe(session, ids, labels, seed=1)
    features = plain.states(ids)[0][1:, :, -1].double().numpy()
    held = _tested(ids, labels, np.random.default_rng(1), 0.3, each=False)
    truth = np.array([found.classes.index(label) for label in labels])
    for at, x in enumerate(features):
        scale = np.sqrt((x[~held] ** 2).mean())
        assert found.scale[at] == pytest.approx(scale, rel=1e-5)
        maps = fitted(x[~held] / scale, truth[~held], 2, 1e-3)
        assert relative(found.maps[at], maps) <= 1e-3
        said = (x[held] / scale) @ maps[:, :-1].T + maps[:, -1]
        assert found.score.values[at] == pytest.approx((said.argmax(-1) == truth[held]).mean())
    return found


def check_interchange(session, plain, bases, sources, targets):
    """Three steps of training, and what the subspace does to the held-out pairs before."""
    layer, site = 0, "blocks.0.resid_post"
    found = interchange(session, bases, sources, targets, site=site, size=2, steps=3, rows=4, held_out=0.25)
    order = np.random.default_rng(0).permutation(len(bases)).tolist()
    count = round(0.25 * len(bases))
    train, batches = order[count:], []
    for step in range(3):
        part = [train[(step * 4 + i) % len(train)] for i in range(4)]
        batches.append(([bases[i] for i in part] + [sources[i] for i in part], [targets[i] for i in part]))
    want, module = plain.interchanged(batches, layer, -1, size=2, lr=1e-2)
    assert len(set(want)) == 3
    assert found.losses.values == pytest.approx(want, rel=1e-3)
    basis = module.basis().detach().numpy()
    overlap = np.linalg.svd(basis.T @ found.basis, compute_uv=False)
    assert overlap == pytest.approx([1, 1], abs=1e-3)
    with torch.no_grad():
        ids = [bases[i] for i in order[:count]] + [sources[i] for i in order[:count]]
        said = plain.swapped(module, layer, ids, -1).argmax(-1).tolist()
    assert found.accuracy == np.mean([a == targets[i] for a, i in zip(said, order[:count], strict=True)])


def check_ablation(session, plain, ids, width, *, neurons=True):
    """A head by each way, and two neurons, as in one process; nothing else of the layer changes."""
    whole, entering = plain.ablated(ids), plain.entering(ids, 0)
    put = {
        "zero": torch.zeros_like,
        "mean": lambda x: x * 0 + entering.mean((0, 1))[columns],
        "resample": lambda _x: entering[[(i + 1) % len(ids) for i in range(len(ids))]][..., columns],
    }
    for how, new in put.items():
        found = ablation(session, ids, how=how, layers=[0], units=[1, 2])
        assert found.whole == pytest.approx(whole, rel=1e-5)
        want = []
        for head in (1, 2):
            columns = slice(width * head, width * (head + 1))
            want.append(plain.ablated(ids, 0, columns, new))
        assert abs(np.array(want) - whole).max() > 1e-4
        assert found.metric.values[0] == pytest.approx(want, rel=1e-5)
        assert found.effect.values[0] == pytest.approx(np.array(want) - whole, abs=1e-5)
    if neurons:
        found = ablation(session, ids, site="mlp.neurons", layers=[1], units=[3, 40])
        want = [plain.ablated(ids, 1, slice(n, n + 1), torch.zeros_like, neurons=True) for n in (3, 40)]
        assert found.metric.values[0] == pytest.approx(want, rel=1e-5)
        assert [row["neuron"] for row in found.rows()] == [3, 40]


# --- other families ----------------------------------------------------------------------------------


RANDOM = torch.randint(3, 200, (8, 9), generator=torch.Generator().manual_seed(0)).tolist()


@pytest.mark.parametrize("family", ["GPT-2", "Mixtral"])
def test_they_run_on_other_families_by_the_standard_names(session, tmp_path, family):
    folder = models.write(family, tmp_path)
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    if family == "GPT-2":
        session.load_cell(GPT2.format(folder=str(folder)), fsdp=2)
        plain = Plain(model, "transformer.h", "transformer.ln_f", out="attn.c_proj", down="mlp.c_proj")
    else:
        session.load(folder, attn="eager", tp=2)
        plain = Plain(model, "model.layers", "model.norm")
    check_tuned(session, plain, RANDOM[:4])
    check_probe(session, plain, RANDOM, ["a", "b"] * 4)
    check_interchange(session, plain, RANDOM, RANDOM[::-1], [row[0] for row in RANDOM])
    check_ablation(session, plain, RANDOM[:3], 16 if family == "GPT-2" else 8, neurons=family == "GPT-2")
    if family == "Mixtral":
        with pytest.raises(SiteError, match="mixture of experts"):
            ablation(session, RANDOM[:2], site="mlp.neurons")


# --- what they find ----------------------------------------------------------------------------------


def test_the_tuned_lens_begins_as_the_logit_lens_and_is_saved(loaded, tmp_path):
    lens = TunedLens.load(loaded, saved_identity(loaded, tmp_path))
    untrained, plain = lens.read(PROMPT, track=[" Mary"]), logit_lens(loaded, PROMPT, track=[" Mary"])
    assert relative(untrained.logprobs.values, plain.logprobs.values) <= 1e-5
    assert relative(untrained.tracked.values, plain.tracked.values) <= 1e-5
    assert untrained.text() == " Mary"
    one = tuned_lens(loaded, STORIES[2:], steps=3)
    trained = one.read(PROMPT)
    assert relative(trained.logprobs.values[:4], plain.logprobs.values[:4]) > 1e-3
    assert relative(trained.logprobs.values[4], plain.logprobs.values[4]) <= 1e-5
    path = one.save(tmp_path / "lens.safetensors")
    by_layer = tuned_lens(loaded, STORIES[2:], steps=3, together=False)
    assert by_layer.losses.values.shape == (4, 3)
    assert by_layer.losses.values.sum(0) == pytest.approx(one.losses.values, rel=1e-3)
    again = TunedLens.load(loaded, path).read(PROMPT)
    assert np.array_equal(again.logprobs.values, trained.logprobs.values)
    assert "tuned lens" in again.grid().to_html()
    with pytest.raises(InputError, match="1 step or more"):
        tuned_lens(loaded, STORIES, steps=0)
    with pytest.raises(InputError, match="list of texts"):
        tuned_lens(loaded, PROMPT)
    with pytest.raises(InputError, match="one by one"):
        one.read(STORIES)
    del loaded.modules[one.name]


def saved_identity(session, folder):
    """A file of maps that are the identity."""
    lens = tuned_lens(session, STORIES[2:], steps=1, lr=0.0)
    return lens.save(folder / "identity.safetensors")


def test_enabled_hooks_act_in_the_lens(loaded):
    loaded.hook("blocks.3.resid_post", "x[:] = 0", name="gone")
    assert divergence(loaded, [PROMPT]).values[-1] == pytest.approx(0, abs=1e-6)
    blind = divergence(loaded, [PROMPT]).values
    loaded.hooks.remove("gone")
    assert abs(divergence(loaded, [PROMPT]).values[:-1] - blind[:-1]).max() > 0.1


def test_a_probe_reads_a_fact_that_the_control_task_has_not(loaded):
    names = (*NAMES, "Lars", "Elsa", "Roger", "Pamela", "Lisa")
    pairs = [(i, j) for i in range(len(names)) for j in range(len(names)) if i != j]
    who = np.random.default_rng(0).integers(2, size=len(pairs)).tolist()
    texts = [
        GIVEN.format(names[i], names[j], names[j if w else i]) for (i, j), w in zip(pairs, who, strict=True)
    ]
    labels = ["second" if w else "first" for w in who]
    found = probe(loaded, texts, labels, seed=2, rows=60)
    assert found.score.values.max() > 0.8
    assert abs(found.control.values - 0.5).mean() < 0.15
    words = probe(loaded, texts[:8], [["to" if n % 2 else "at" for n in range(15)]] * 8, layers=[0])
    assert len(words.score.values) == 1
    for wrong, said in (
        ({"labels": ["a"] * len(texts)}, "nothing to tell apart"),
        ({"position": 99}, "not in the 15 tokens"),
        ({"keys": [1]}, "keys names 1 examples"),
    ):
        options = {"labels": labels, **wrong}
        with pytest.raises(InputError, match=said):
            probe(loaded, texts, options.pop("labels"), **options)


def test_a_subspace_carries_who_is_meant(loaded):
    targets = [f" {b}" for _, b in PAIRS]
    found = interchange(
        loaded, SECOND, FIRST, targets, site="blocks.1.resid_post", size=16, steps=12, rows=10
    )
    assert found.all > 0.8
    assert found.untrained < 0.3
    assert found.accuracy > found.untrained + 0.4
    assert found.losses.values[-2:].mean() < found.losses.values[:2].mean() / 2
    boundless = interchange(loaded, SECOND[:8], FIRST[:8], targets[:8], size=None, steps=2, rows=4)
    assert 0 < boundless.size < 256
    assert boundless.basis.T @ boundless.basis == pytest.approx(np.eye(boundless.size), abs=1e-5)
    for wrong, said in (
        ((SECOND[:3], FIRST[:3], targets[:2]), "3 bases, 3 sources and 2 targets"),
        ((SECOND[:1], STORIES[:1], targets[:1]), "equally many tokens"),
        ((SECOND[:1], FIRST[:1], targets[:1]), "leaves none"),
    ):
        with pytest.raises(InputError, match=said):
            interchange(loaded, *wrong)
    with pytest.raises(InputError, match="has no one width"):
        interchange(loaded, SECOND[:4], FIRST[:4], targets[:4], site="blocks.0.attn.z")


def test_what_cannot_be_ablated_is_refused(loaded):
    for options, said in (
        ({"how": "half"}, "no way to ablate"),
        ({"site": "mlp"}, "choose one of"),
        ({"site": "mlp_out", "units": [1]}, "leave units away"),
        ({"units": [8]}, "counted from 0"),
        ({"how": "resample"}, "no other to be resampled from"),
        ({"metric": "logits[0"}, "no expression"),
        ({"metric": "logits[0, -1]"}, r"shape \[2048\]"),
    ):
        with pytest.raises(InputError, match=said):
            ablation(loaded, PROMPT, options.pop("metric", "loss"), **{"layers": [0], **options})
    with pytest.raises(InputError, match="different numbers of tokens"):
        ablation(loaded, STORIES)
    parts = ablation(loaded, PROMPT, "logits[0, -1, mary]", tokens={"mary": " Mary"}, site="attn_out")
    assert parts.effect.dims == ("layer",)
    assert "ablation of attn_out" in parts.grid().to_html()


@pytest.mark.parametrize("sizes", [{"fsdp": 2}, {"pp": 2}])
def test_steering_generates_on_every_split(session, one_process, tokenizer, sizes):
    session.load(MODEL, attn="eager", **sizes)
    vector = torch.randn(256, generator=torch.Generator().manual_seed(0))
    site, prompt = "blocks.1.resid_post", "Lily looked at the sky. She was"
    found = steering(session, prompt, vector, site=site, scales=(0, 1), max_new_tokens=4)
    plain = session.generate(prompt, 4)
    assert found.texts[0] == plain.text[0]
    assert np.array_equal(found.logits[0], plain.step(0).logits.numpy()[0, -1])  # bit for bit
    handle = one_process.model.layers[1].register_forward_hook(lambda _m, _a, out: out + vector)
    ids = tokenizer(prompt, return_tensors="pt")
    with torch.no_grad():
        made = one_process.generate(**ids, max_new_tokens=4, do_sample=False)
        logits = one_process(**ids).logits[0]
    handle.remove()
    said = tokenizer.decode(made[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
    assert found.texts[1] == said
    assert relative(found.logits[1], logits[-1]) <= 1e-5
    assert found.metric.values[1] == pytest.approx(float(logits[-1].max()), rel=1e-5)
    assert relative(found.logits[0], found.logits[1]) > 1e-2
    with pytest.raises(InputError, match="cannot be named 'x'"):
        steering(session, prompt, vector, tokens={"x": 5})


def test_the_magics_call_them(loaded, tmp_path):
    from flexmagic.magics import desk_of, load, unload

    shell = InteractiveShell()
    load(shell)
    desk_of(shell).take(loaded)
    shell.user_ns |= {
        "first": FIRST[:8], "second": SECOND[:8], "kinds": ["a", "b"] * 4, "stories": STORIES[2:],
        "targets": [f" {b}" for _, b in PAIRS[:8]],
    }  # fmt: skip
    run = shell.run_line_magic
    try:
        ablated = run("flexablate", f'"{PROMPT}" --layers [0] --units "[2, 3]"')
        assert ablated.effect.values.shape == (1, 2)
        assert len(run("flexprobe", "--texts first --labels kinds --layers [0]").rows()) == 1
        file = tmp_path / "lens.safetensors"
        tuned = run("flextuned", f"--texts stories --steps 2 --save {file}")
        shell.user_ns["tuned"] = run("flextuned", f"--load {file}")
        assert tuned.losses.values.shape == (2,)
        assert run("flexlens", f'"{PROMPT}" --tuned tuned').name == "tuned lens"
        found = run("flexinterchange", "--bases second --sources first --targets targets --steps 1 --size 2")
        assert found.size == 2
        for name, line, said in (
            ("flexlens", f'"{PROMPT}" --tuned kinds', "not list"),
            ("flexablate", "", "one of them"),
            ("flexprobe", "--texts first", "--labels"),
            ("flextuned", "", "or a saved lens"),
            ("flexinterchange", "--bases first", "--sources"),
            ("flexinterchange", "--bases a --sources b --targets c --size half", "boundless"),
        ):
            with pytest.raises(InputError, match=said):
                run(name, line)
    finally:
        del loaded.modules["tuned_lens"]
        desk_of(shell)._session = None
        unload(shell)
