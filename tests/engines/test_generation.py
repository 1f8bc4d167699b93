"""Generation: tokens, steps and hooks equal to the model's own generate in one process."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from flexmagic import FlexError, HookError, InputError, LayoutError, ModelError

from .conftest import MODEL, PROMPT, clear, relative
from .matrix import models
from .test_aliases import GPT2

pytestmark = pytest.mark.engines

SITE = "model.layers.1.mlp"
TEXTS = ["The capital of France is", "When Mary and John went to the store, John gave"]


class Truth:
    """The one-process model's own generate, with outputs of a module edited and kept at every step."""

    def __init__(self, model, path, edit=lambda x, _step: x):
        self._model, self._path, self._edit = model, path, edit

    def __call__(self, ids, n, **options):
        self.kept, self.logits = [], []

        def after(_m, _a, out):
            self.kept.append(self._edit(out.clone(), len(self.kept)))
            return self.kept[-1]

        handles = [
            self._model.get_submodule(self._path).register_forward_hook(after),
            self._model.register_forward_hook(lambda _m, _a, out: self.logits.append(out.logits.clone())),
        ]
        options.setdefault("attention_mask", torch.ones_like(ids))
        try:
            return self._model.generate(ids, max_new_tokens=n, logits_to_keep=0, **options)
        finally:
            for handle in handles:
                handle.remove()


@pytest.fixture
def truth(one_process):
    return lambda path=SITE, edit=lambda x, _step: x: Truth(one_process, path, edit)


def test_greedy_tokens_and_every_steps_captures_equal_one_process(loaded, truth, ids):
    reference = truth()
    wanted = reference(ids, 6)
    run = loaded.generate(PROMPT, max_new_tokens=6, capture=[SITE, f"{SITE}.up_proj"])
    assert run.ids == wanted.tolist()
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    assert run.text == [tokenizer.decode(wanted[0, ids.shape[1] :], skip_special_tokens=True)]
    assert "".join(run.tokens[0]).endswith(run.text[0])
    assert run.steps == len(reference.kept)
    for n in range(run.steps):
        step = run.step(n)
        assert relative(step[SITE].torch(), reference.kept[n]) <= 1e-5
        assert relative(step.logits.torch(), reference.logits[n]) <= 1e-5
        assert step[f"{SITE}.up_proj"].shape[:2] == reference.kept[n].shape[:2]
        assert (
            step.ids == (wanted[:, : ids.shape[1]] if n == 0 else wanted[:, [ids.shape[1] + n - 1]]).tolist()
        )
    assert run[SITE].shape == (1, 1, 256)
    assert torch.equal(run[SITE].torch(), run.step(-1)[SITE].torch())
    assert run[SITE].info.step == run.steps - 1
    with pytest.raises(InputError, match="no step 6: this run has steps 0 to 5"):
        run.step(6)
    run.release()
    with pytest.raises(FlexError):
        run.step(0)[SITE].numpy()


def test_patterns_cover_the_cache_too(loaded, ids):
    site = "model.layers.1.self_attn:output[1]"
    run = loaded.generate(PROMPT, max_new_tokens=3, capture=site)
    seq = ids.shape[1]
    assert [run.step(n)[site].shape for n in range(3)] == [
        (1, 8, seq, seq),
        (1, 8, 1, seq + 1),
        (1, 8, 1, seq + 2),
    ]
    assert run.step(2)[site].numpy().sum(-1) == pytest.approx(1, abs=1e-5)


def test_without_a_cache_every_step_sees_all_tokens(loaded, ids):
    cached = loaded.generate(PROMPT, max_new_tokens=3)
    run = loaded.generate(PROMPT, max_new_tokens=3, capture=SITE, use_cache=False)
    assert run.ids == cached.ids
    assert run.step(2)[SITE].shape == (1, ids.shape[1] + 2, 256)


@pytest.mark.parametrize("seed", [0, 1])
def test_sampled_tokens_are_those_of_one_process(loaded, truth, ids, seed):
    options = {"do_sample": True, "temperature": 1.5, "top_k": 0}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        wanted = truth()(ids, 8, **options)
    run = loaded.generate(PROMPT, max_new_tokens=8, seed=seed, **options)
    assert run.ids == wanted.tolist()
    assert run.ids != loaded.generate(PROMPT, max_new_tokens=8, seed=seed + 7, **options).ids


def test_texts_of_different_length_are_one_batch(loaded, truth):
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    batch = tokenizer(TEXTS, return_tensors="pt", padding=True, padding_side="left")
    assert not batch["attention_mask"].all()
    reference = truth()
    wanted = reference(batch["input_ids"], 5, attention_mask=batch["attention_mask"])
    run = loaded.generate(TEXTS, max_new_tokens=5, capture=SITE)
    assert run.ids == wanted.tolist()
    assert len(run.text) == 2
    assert relative(run.step(1)[SITE].torch(), reference.kept[1]) <= 1e-5
    beams = loaded.generate(TEXTS, max_new_tokens=4, num_beams=2, capture=SITE)
    expected = truth()(batch["input_ids"], 4, attention_mask=batch["attention_mask"], num_beams=2)
    assert beams.ids == expected.tolist()
    assert beams.step(1)[SITE].shape == (4, 1, 256)


def test_a_neuron_of_the_last_rank_is_ablated_in_step_three_only(loaded, truth, ids):
    """The last columns of up_proj are on rank 1 alone."""
    site = f"{SITE}.up_proj"
    plain = loaded.generate(PROMPT, max_new_tokens=6, capture=site)
    loaded.hook(site, "assert step == 3; x[..., -1] = x[..., -1] * 0 + 100", name="ablate", step=3)
    run = loaded.generate(PROMPT, max_new_tokens=6)

    def edit(x, step):
        if step == 3:
            x[..., -1] = 100
        return x

    reference = truth(site, edit)
    assert run.ids == reference(ids, 6).tolist()
    for n in range(3):
        assert torch.equal(run.step(n).logits.torch(), plain.step(n).logits.torch())
        assert torch.equal(run.step(n)[site].torch(), plain.step(n)[site].torch())
        assert run.step(n)[site].after == ()
    assert relative(run.step(3).logits.torch(), plain.step(3).logits.torch()) > 1e-4
    assert run.step(3)[site].after == ("ablate v1",)
    for n in range(run.steps):
        assert relative(run.step(n).logits.torch(), reference.logits[n]) <= 1e-5


def test_steering_acts_in_its_steps(loaded, truth, ids):
    site = "model.layers.2"
    plain = loaded.generate(PROMPT, max_new_tokens=6)
    loaded.hook(site, "x += 30 * torch.sin(torch.arange(x.shape[-1]))", name="steer", step="1:3")
    run = loaded.generate(PROMPT, max_new_tokens=6)

    def steer(x, step):
        return x + 30 * torch.sin(torch.arange(x.shape[-1])) if step in {1, 2} else x

    reference = truth(site, steer)
    wanted = reference(ids, 6)
    assert run.ids == wanted.tolist()
    assert run.ids != plain.ids
    assert [bool(run.step(n)[site].after) for n in range(6)] == [False, True, True, False, False, False]
    for n in range(6):
        assert relative(run.step(n).logits.torch(), reference.logits[n]) <= 1e-5


def test_token_positions_count_from_the_start_in_every_step(loaded, ids):
    plain = loaded.generate(PROMPT, max_new_tokens=4, capture=SITE)
    seq = ids.shape[1]
    loaded.hook(SITE, "ctx.setdefault('seen', []).append((step, x.shape[1]))", name="h", token=[2, seq + 1])
    run = loaded.generate(PROMPT, max_new_tokens=4)
    assert run.context == {"seen": [(0, 1), (2, 1)]}
    loaded.hook(SITE, "ctx.setdefault('seen', []).append((step, x.shape[1]))", name="h", token=-1)
    run = loaded.generate(PROMPT, max_new_tokens=4)
    assert run.context == {"seen": [(n, 1) for n in range(4)]}
    assert run.ids == plain.ids


def test_captures_of_some_steps_and_hooks_beyond_the_end(loaded):
    loaded.hook(SITE, name="look", step="1:3")
    loaded.hook("model.layers.2.mlp", "x *= 0", name="late", step="9:")
    run = loaded.generate(PROMPT, max_new_tokens=4)
    assert [f"{SITE}:output" in run.step(n).sites for n in range(4)] == [False, True, True, False]
    assert run[SITE].info.step == 2
    assert run.warnings == ("hook 'late' did not act: it is for step 9:, and this run had steps 0 to 3.",)


def test_a_hook_that_fails_in_a_later_step_ends_the_run_on_all_ranks(loaded):
    plain = loaded.generate(PROMPT, max_new_tokens=4)
    for body in ("if step == 2: 1 / 0", "if step == 2 and rank == 1: 1 / 0"):
        loaded.hook("model.layers.3.mlp", body, name="bad")
        with pytest.raises(HookError, match="ZeroDivisionError"):
            loaded.generate(PROMPT, max_new_tokens=4)
    loaded.hooks["bad"].remove()
    assert loaded.generate(PROMPT, max_new_tokens=4).ids == plain.ids


def test_ranks_that_choose_different_tokens_are_refused(loaded):
    loaded.hook("lm_head", "x[..., 5 + rank] = 1e4", name="split", step=1, local=True)
    with pytest.raises(FlexError, match="chose different tokens in step 1"):
        loaded.generate(PROMPT, max_new_tokens=4)
    loaded.hooks["split"].remove()
    assert loaded.generate(PROMPT, max_new_tokens=2).steps == 2


def test_the_text_is_told_as_it_comes(loaded):
    heard = []
    run = loaded.generate(PROMPT, max_new_tokens=8, progress=heard.append)
    told = [waited.ranks[0] for waited in heard if waited.ranks]
    what, done, total = told[-1]
    assert (done, total) == (8, 8)
    assert what.strip().startswith(run.text[0].strip())
    tokens = heard[-1].tokens
    assert "".join(text for text, _ in tokens) == what
    chances = [float(run.step(n).logits.torch()[0, -1].softmax(-1).max()) for n in range(8)]
    assert [chance for _, chance in tokens] == pytest.approx(chances, rel=1e-6)
    assert 0 < min(chances) < max(chances) < 1
    loaded.generate(PROMPT, max_new_tokens=2, num_beams=2, progress=heard.append)
    assert [chance for _, chance in heard[-1].tokens] == [None, None]  # another row's logits may have made it


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"max_new_tokens": 0}, "ask for 1 or more"),
        ({"max_new_tokens": 300}, "more than the model's context of 256. Ask for 241"),
        ({"streamer": 1}, "cannot be set here: tokens are told"),
        ({"temprature": 1}, "does not generate so.*temprature"),
    ],
)
def test_what_cannot_be_asked_of_generate_is_said(loaded, options, said):
    with pytest.raises(InputError, match=f"(?s){said}"):
        loaded.generate(PROMPT, **options)
    assert loaded.generate(PROMPT, max_new_tokens=1).steps == 1


def test_shared_out_weights_and_rows_generate_the_same(session, truth):
    clear(session)
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    batch = tokenizer(TEXTS, return_tensors="pt", padding=True, padding_side="left")
    for axes in ({"fsdp": 2}, {"dp": 2}):
        clear(session)
        session.load(MODEL, attn="eager", **axes)
        session.hook(SITE, "x *= 3", name="h", step="1:", row=1)

        def edit(x, step):
            if step:
                x[1] *= 3
            return x

        reference = truth(SITE, edit)
        wanted = reference(batch["input_ids"], 5, attention_mask=batch["attention_mask"])
        run = session.generate(TEXTS, max_new_tokens=5)
        assert run.ids == wanted.tolist()
        for n in range(run.steps):
            assert relative(run.step(n)[SITE].torch(), reference.kept[n]) <= 1e-5


def test_models_without_generate_are_refused(session):
    session.load_cell("import torch\ntorch.manual_seed(0)\nmodel = torch.nn.Linear(2, 2)")
    with pytest.raises(ModelError, match=r"Linear has no generate\(\) of its own"):
        session.generate({"input": torch.ones(1, 2)})


def test_positions_of_several_rows_are_whole_where_every_rank_has_all_rows(session, tmp_path):
    """GPT-2 has one row of positions in the survey, and one for each row in a generation."""
    folder = models.write("GPT-2", tmp_path)
    clear(session)
    session.load_cell(GPT2.format(folder=str(folder)), fsdp=2)
    one = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    site = "transformer.wpe"
    ids = torch.randint(3, 200, (2, 5), generator=torch.Generator().manual_seed(0))
    reference = Truth(one, site, lambda x, _step: x * 3)
    wanted = reference(ids, 3)
    plain = session.generate(ids, 3)
    session.hook(site, "x *= 3", name="h")
    run = session.generate(ids, 3)
    assert run.ids == wanted.tolist()
    assert relative(run.step(0).logits.torch(), plain.step(0).logits.torch()) > 1e-3
    for n in range(3):
        assert run.step(n)[site].shape == (2, 5 if n == 0 else 1, 64)
        assert relative(run.step(n)[site].torch(), reference.kept[n]) <= 1e-6
    clear(session)
    own = {"input_ids": ids, "position_ids": torch.tensor([[0, 1, 2, 3, 4], [3, 4, 5, 6, 7]])}
    run = session.run(own, capture=site)
    with torch.no_grad():
        assert relative(run.logits.torch(), one(**own, use_cache=False).logits) <= 1e-5
    with pytest.raises(LayoutError, match="with position_ids each data group may have another"):
        _ = run[site]
    assert session.run(ids, capture=site)[site].shape == (1, 5, 64)
