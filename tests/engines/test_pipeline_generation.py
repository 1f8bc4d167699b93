"""Text generated over pipeline stages: tokens, steps and hooks are those of one process."""

import pytest
import torch
from transformers import AutoTokenizer

from flexmagic import FlexError, HookError, ModelError

from .conftest import MODEL, PROMPT, relative
from .stages import PRUNED, cell
from .test_generation import TEXTS, truth

pytestmark = pytest.mark.engines
__all__ = ["truth"]

EARLY, LATE = "model.layers.1.mlp", "model.layers.3.mlp"


def test_greedy_tokens_and_every_step_on_both_stages_equal_one_process(staged, truth, ids):
    said = []
    early, late = truth(EARLY), truth(LATE)
    wanted = early(ids, 5)
    assert torch.equal(late(ids, 5), wanted)
    pattern = "model.layers.3.self_attn:output[1]"
    run = staged.generate(
        PROMPT, max_new_tokens=5, capture=[EARLY, LATE, pattern], progress=lambda *told: said.append(told)
    )
    assert run.ids == wanted.tolist()
    assert run.steps == 5
    for n in range(run.steps):
        step = run.step(n)
        for site, reference in ((EARLY, early), (LATE, late)):
            assert relative(step[site].torch(), reference.kept[n]) <= 1e-5, (n, site)
        assert relative(step.logits.torch(), early.logits[n]) <= 1e-5
        assert step[pattern].shape[-2:] == (step[EARLY].shape[1], ids.shape[1] + n)
    assert run.step(2)[LATE].shape == (1, 1, 256)


@pytest.mark.parametrize("site", [EARLY, LATE])
def test_texts_of_different_length_under_a_hook_at_some_steps(staged, truth, site):
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    batch = tokenizer(TEXTS, return_tensors="pt", padding=True, padding_side="left")
    assert not batch["attention_mask"].all()
    plain = staged.generate(TEXTS, max_new_tokens=5)
    assert plain.ids == truth()(batch["input_ids"], 5, attention_mask=batch["attention_mask"]).tolist()

    def edit(x, step):
        if 1 <= step < 3:
            x[1] *= -4
        return x

    reference = truth(site, edit)
    wanted = reference(batch["input_ids"], 5, attention_mask=batch["attention_mask"])
    staged.hook(site, "x *= -4\nctx['count'] = ctx.get('count', 0) + 1", name="h", step="1:3", row=1)
    run = staged.generate(TEXTS, max_new_tokens=5)
    assert relative(run.step(2).logits.torch(), plain.step(2).logits.torch()) > 1e-3
    assert torch.equal(run.step(0).logits.torch(), plain.step(0).logits.torch())
    assert run.ids == wanted.tolist()
    assert run.context["count"] == 2
    for n in range(run.steps):
        assert relative(run.step(n).logits.torch(), reference.logits[n]) <= 1e-5


def test_sampled_tokens_and_beams_are_those_of_one_process(staged, truth, ids):
    options = {"do_sample": True, "temperature": 1.5, "top_k": 0}
    with torch.random.fork_rng():
        torch.manual_seed(1)
        wanted = truth()(ids, 8, **options)
    run = staged.generate(PROMPT, max_new_tokens=8, seed=1, **options)
    assert run.ids == wanted.tolist()
    assert run.ids != staged.generate(PROMPT, max_new_tokens=8, seed=8, **options).ids
    beams = staged.generate(PROMPT, max_new_tokens=4, num_beams=3, capture=LATE)
    assert beams.ids == truth()(ids, 4, num_beams=3).tolist()
    assert beams.step(1)[LATE].shape == (3, 1, 256)


def test_what_a_later_stage_saves_is_there_in_the_next_step_on_all(staged):
    staged.hook(EARLY, "ctx['seen'] = [*ctx.get('seen', []), ctx.get('late')]", name="early")
    staged.hook(LATE, "ctx['late'] = ctx.get('late', 0) + 1", name="late")
    assert staged.generate(PROMPT, max_new_tokens=3).context["seen"] == [None, 1, 2]


@pytest.mark.parametrize("site", [EARLY, LATE])
def test_a_hook_that_fails_in_one_step_ends_the_generation_on_all_stages(staged, truth, ids, site):
    staged.hook(site, "1 / 0", name="broken", step=2)
    with pytest.raises(HookError, match="division by zero") as caught:
        staged.generate(PROMPT, max_new_tokens=5)
    assert {f.rank for f in caught.value.failures} == {0 if site == EARLY else 1}
    staged.hooks.remove("broken")
    assert staged.generate(PROMPT, max_new_tokens=5).ids == truth()(ids, 5).tolist()


def test_a_stage_of_torchs_schedules_generates_if_its_class_does(session, truth, ids):
    session.load_cell(PRUNED, pp=2)
    run = session.generate(TEXTS, max_new_tokens=4, capture=LATE)
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    batch = tokenizer(TEXTS, return_tensors="pt", padding=True, padding_side="left")
    reference = truth(LATE)
    wanted = reference(batch["input_ids"], 4, attention_mask=batch["attention_mask"])
    assert run.ids == wanted.tolist()
    assert relative(run.step(2)[LATE].torch(), reference.kept[2]) <= 1e-5


def test_other_stages_generate_as_their_unsharded_form_does_without_a_cache(session, one_process, ids):
    session.load_cell(cell(2), pp=2)
    batch = torch.cat([ids, ids.flip(1)])
    plain = session.generate(batch, max_new_tokens=4)
    assert plain.ids == one_process.generate(batch, max_new_tokens=4).tolist()
    session.hook(LATE, "x[:, -1] *= -3", name="h", step="1:")
    run = session.generate(batch, max_new_tokens=4, capture=EARLY)
    kept = []

    def edit(_m, _a, out):
        kept.append(1)
        return out if len(kept) == 1 else torch.cat([out[:, :-1], out[:, -1:] * -3], 1)

    handle = one_process.get_submodule(LATE).register_forward_hook(edit)
    wanted = one_process.generate(batch, max_new_tokens=4, use_cache=False)
    handle.remove()
    assert run.ids == wanted.tolist() != plain.ids
    assert run.step(3)[EARLY].shape == (2, ids.shape[1] + 3, 256)
    padded = {"input_ids": batch, "attention_mask": torch.ones_like(batch)}
    padded["attention_mask"][0, 0] = 0
    with pytest.raises(FlexError, match="does not take attention_mask"):
        session.generate(padded, max_new_tokens=2)
    session.hooks.remove("h")
    session.load_cell(cell(2, after="del unsharded\n"), pp=2)
    with pytest.raises(ModelError, match=r"Stage has no generate\(\) of its own"):
        session.generate([[5, 6, 7]])
