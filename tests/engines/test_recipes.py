"""Recipes give on engines what the same method gives on the model in one process."""

import numpy as np
import pytest
import torch
from IPython.core.interactiveshell import InteractiveShell

from flexmagic.errors import InputError, SiteError
from flexmagic.recipes import induction, logit_lens, patching, steering, steering_vector

from .conftest import MODEL, PROMPT, Edited, relative

pytestmark = pytest.mark.engines

CORRUPT = PROMPT.replace("John gave", "Mary gave")
DIFFERENT = 10
"""The one position at which the prompts differ."""
LAST = 14
METRIC = "logits[-1, right] - logits[-1, wrong]"
TOKENS = {"right": " Mary", "wrong": " John"}
HAPPY = (["Tom was very happy", "The girl was so happy"], ["Tom was very sad", "The girl was so sad"])


@pytest.fixture
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(MODEL)


@torch.no_grad()
def lens_of(model, ids):
    """Log-probabilities ``[layer, batch, position, vocab]`` by the model's own modules, one process."""
    seen = []
    edits = {
        "model.embed_tokens": seen.append,
        **{f"model.layers.{n}": seen.append for n in range(4)},
    }
    with Edited(model, edits) as edited:
        edited(ids, use_cache=False)
    return torch.stack([model.lm_head(model.model.norm(h)).log_softmax(-1) for h in seen])


@torch.no_grad()
def metric_of(model, tokenizer, place=None, denoising=True):
    """The metric of the corrupt prompt with the clean one's values, or the reverse, one process.

    ``place``: path, element of its output and index ``[position, feature]``.
    """
    clean, corrupt = (tokenizer(text, return_tensors="pt")["input_ids"] for text in (PROMPT, CORRUPT))
    source, into = (clean, corrupt) if denoising else (corrupt, clean)
    right, wrong = (tokenizer(text, add_special_tokens=False)["input_ids"][0] for text in TOKENS.values())
    if place is None:
        logits = model(into).logits[0, -1]
        return float(logits[right] - logits[wrong])
    path, index = place
    kept, module = {}, model.get_submodule(path)

    def remember(_module, args):
        kept["x"] = args[0].clone()

    def put(_module, args):
        x = args[0].clone()
        x[(0, *index)] = kept["x"][(0, *index)]
        return (x, *args[1:])

    for hook, ids in ((remember, source), (put, into)):
        handle = module.register_forward_pre_hook(hook)
        try:
            logits = model(ids, use_cache=False).logits[0, -1]
        finally:
            handle.remove()
    return float(logits[right] - logits[wrong])


def check_lens(session, one_process, ids):
    lens = logit_lens(session, PROMPT, top=3, track=[" Mary"])
    truth = lens_of(one_process, ids)
    assert lens.logprobs.values.shape == (5, 1, ids.shape[1], 3)
    assert relative(lens.logprobs.values, truth.gather(-1, torch.as_tensor(lens.ids))) <= 1e-5
    assert relative(lens.logprobs.values, truth.topk(3).values) <= 1e-5
    mary = next(i for i, text in lens.texts.items() if text == " Mary")
    assert relative(lens.tracked.values[..., 0], truth[..., mary]) <= 1e-5
    logits = session.run(PROMPT).logits.torch()
    assert relative(lens.logits.values[-1], logits.topk(3).values) <= 1e-5
    assert (np.diff(lens.tracked.values[:, 0, -1, 0]) > 0).sum() >= 3  # layers say different things
    return lens


def check_patching(session, one_process, tokenizer):
    clean, corrupt = (metric_of(one_process, tokenizer, denoising=d) for d in (False, True))
    assert clean - corrupt > 10
    places = {"before": [3], "differs": [DIFFERENT], "last": [LAST], "all": range(15)}
    found = patching(session, PROMPT, CORRUPT, METRIC, tokens=TOKENS, layers=[0, 2], positions=places)
    assert found.clean == pytest.approx(clean, rel=1e-5)
    assert found.corrupt == pytest.approx(corrupt, rel=1e-5)
    for row, layer in enumerate([0, 2]):
        assert found.effect.values[row, 0] == 0
        for column, at in enumerate([3, DIFFERENT, LAST, slice(None)]):
            truth = metric_of(one_process, tokenizer, (f"model.layers.{layer}", (at,)))
            assert found.metric.values[row, column] == pytest.approx(truth, rel=1e-5, abs=1e-5)
    assert found.effect.values[:, 3] == pytest.approx([1, 1], abs=1e-5)
    assert found.effect.values[0, 1] == pytest.approx(1, abs=1e-5)
    assert found.effect.at(layer=2, group=0).values == 0
    assert {row["layer"] for row in found.rows()} == {0, 2}
    assert abs(found.effect.values[1, 1]) < 0.1 < found.effect.values[1, 2]
    return found


def check_induction(session):
    found = induction(session, period=10, rows=2)
    assert 0.3 < found.score.values.max() <= 1
    assert found.second_loss < found.first_loss / 4
    return found


def test_tensor_parallel_equals_one_process(loaded, one_process, ids, tokenizer):
    lens = check_lens(loaded, one_process, ids)
    assert lens.text() == " Mary"
    assert lens.rows()[-3]["text"] == " Mary"
    assert lens.rows()[-1].items() >= {"token": " to", "position": LAST}.items()
    assert "' Mary'" in repr(lens)
    check_patching(loaded, one_process, tokenizer)


@pytest.mark.parametrize("how", ["fsdp", "pp"])
def test_other_splits_equal_one_process(session, one_process, ids, tokenizer, how):
    session.load(MODEL, attn="eager", **{how: 2})
    check_lens(session, one_process, ids)
    check_patching(session, one_process, tokenizer)
    check_induction(session)


def test_heads_are_patched_one_by_one_and_noise_is_the_reverse(loaded, one_process, tokenizer):
    found = patching(
        loaded, PROMPT, CORRUPT, METRIC, tokens=TOKENS, site="attn.z", layers=[0], denoising=False
    )
    assert found.effect.dims == ("layer", "head")
    truth = [
        metric_of(
            one_process,
            tokenizer,
            ("model.layers.0.self_attn.o_proj", (slice(None), slice(32 * h, 32 * h + 32))),
            denoising=False,
        )
        for h in range(8)
    ]
    assert found.metric.values[0] == pytest.approx(truth, rel=1e-5, abs=1e-5)
    best = found.largest(1)[0]
    assert (best["layer"], best["head"]) == (0, 2)
    assert best["effect"] > 0.5
    assert [row["effect"] for row in found.rows()] == found.effect.values.ravel().tolist()


@pytest.mark.parametrize(
    ("prompts", "options", "said"),
    [
        ((PROMPT, PROMPT + " a"), {}, "15 and 16 tokens"),
        ((PROMPT, PROMPT), {}, "the same"),
        ((PROMPT, CORRUPT), {"metric": "logits[-1]"}, r"shape \[2048\]"),
        ((PROMPT, CORRUPT), {"metric": "logits[-1"}, "no expression"),
        ((PROMPT, CORRUPT), {"tokens": {"right": " unlikely", "wrong": 5}}, "one is needed"),
        ((PROMPT, CORRUPT), {"tokens": {"logits": 5}}, "cannot be named"),
        ((PROMPT, CORRUPT), {"positions": {"far": [99]}}, "not in the 15 tokens"),
        ((PROMPT, CORRUPT), {"metric": "logits[0, 5]", "tokens": {}}, "nothing to find"),
        ((PROMPT, CORRUPT), {"site": "mlp"}, "choose one of"),
    ],
)
def test_what_cannot_be_patched_is_refused(loaded, prompts, options, said):
    options = {"metric": METRIC, "tokens": TOKENS, "layers": [0], **options}
    with pytest.raises(InputError, match=said):
        patching(loaded, *prompts, options.pop("metric"), **options)


@torch.no_grad()
def test_induction_heads_are_those_that_the_loss_depends_on(loaded, one_process, tokenizer):
    found = induction(loaded, period=12, rows=2, seed=3)
    drawn = np.random.default_rng(3).choice(
        np.setdiff1d(np.arange(len(tokenizer)), tokenizer.all_special_ids), (2, 12)
    )
    ids = torch.tensor([[tokenizer.bos_token_id, *row, *row] for row in drawn.tolist()])
    out = one_process(ids, output_attentions=True)
    queries = range(13, 25)
    for name, back in (("score", 11), ("previous", 1), ("duplicate", 12)):
        truth = [[p[:, h, q, q - back] for q in queries] for p in out.attentions for h in range(8)]
        truth = torch.stack([torch.stack(each).mean() for each in truth]).reshape(4, 8)
        assert relative(getattr(found, name).values, truth) <= 1e-5
    loss = torch.nn.functional.cross_entropy(out.logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
    assert relative(found.loss.values, loss.mean(0)) <= 1e-5
    assert found.first_loss == pytest.approx(float(loss[:, :12].mean()), rel=1e-4)
    assert found.second_loss == pytest.approx(float(loss[:, 13:].mean()), abs=1e-4)

    heads = found.heads()
    assert {layer for layer, _ in heads} == {1}
    without = {}
    for layer in (1, 2):
        hook = loaded.hook(f"blocks.{layer}.attn.z", "x[:] = 0", name="ablate")
        without[layer] = induction(loaded, period=12, rows=2, seed=3)
        hook.remove()
    assert without[1].second_loss > found.first_loss / 2
    assert without[2].second_loss < without[1].second_loss / 4


def test_patterns_that_are_not_returned_are_missed_in_words(session):
    session.load(MODEL, tp=2)
    with pytest.raises(SiteError, match="eager"):
        induction(session)


@torch.no_grad()
def test_steering_adds_a_direction_in_every_step(loaded, one_process, tokenizer):
    site, prompt = "blocks.1.resid_post", "Lily looked at the sky. She was"
    vector = steering_vector(loaded, *HAPPY, site)
    kept = []
    means = []
    with Edited(one_process, {"model.layers.1": lambda out: kept.append(out[0, -1])}) as model:
        for texts in HAPPY:
            kept.clear()
            for text in texts:
                model(**tokenizer(text, return_tensors="pt"))
            means.append(torch.stack(kept).mean(0))
    assert relative(vector, means[0] - means[1]) <= 1e-5

    found = steering(
        loaded, prompt, vector, site=site, scales=(-2, 0, 2), max_new_tokens=5,
        metric="logits[-1, a] - logits[-1, b]", tokens={"a": " happy", "b": " sad"},
    )  # fmt: skip
    assert np.all(np.diff(found.metric.values) > 0)
    plain = loaded.generate(prompt, 5)
    assert found.texts[1] == plain.text[0]
    assert np.array_equal(found.logits[1], plain.step(0).logits.numpy()[0, -1])  # bit for bit
    assert len(set(found.texts)) == 3
    for scale, text in zip((-2, 2), found.texts[::2], strict=True):
        edit = {"model.layers.1": lambda out, scale=scale: out + scale * torch.as_tensor(vector)}
        with Edited(one_process, edit) as model:
            ids = tokenizer(prompt, return_tensors="pt")
            made = model.generate(**ids, max_new_tokens=5, do_sample=False)
        assert tokenizer.decode(made[0, ids["input_ids"].shape[1] :], skip_special_tokens=True) == text


def test_the_magics_call_the_recipes(loaded):
    from flexmagic.magics import desk_of, load, unload

    shell = InteractiveShell()
    load(shell)
    desk_of(shell).take(loaded)
    try:
        lens = shell.run_line_magic("flexlens", f'"{PROMPT}" --top 2 --track " Mary"')
        assert lens.text() == " Mary"
        assert "logit lens" in lens.grid().to_html()
        patched = shell.run_line_magic(
            "flexpatch",
            f'"{PROMPT}" "{CORRUPT}" --metric "logits[-1, a] - logits[-1, b]" --tokens "a= Mary" "b= John" '
            "--site attn_out --layers range(1) --noise",
        )
        assert patched.largest(1)[0]["position"] == LAST
        assert not patched.denoising
        assert "patching attn_out, corrupt into clean" in patched.grid().to_html()
        assert shell.run_line_magic("flexinduction", "--period 8 --rows 1").heads()
        steered = shell.run_line_magic(
            "flexsteer",
            '"She was" --toward "Tom was happy" --away "Tom was sad" --scales "(0, 1)" --generate 2',
        )
        assert len(steered.texts) == 2
    finally:
        desk_of(shell)._session = None
        unload(shell)
