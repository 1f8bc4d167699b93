"""Straight-line interventions: each against the same one in this process with plain torch hooks."""

import pytest
import torch

from flexmagic import CellError, HookError, InputError, Session
from flexmagic.errors import FlexError, StuckError

from .conftest import MODEL, PROMPT, clear, relative

pytestmark = pytest.mark.engines

TEXTS = ["The capital of France is", "The capital of Italy is"]
SHARDED = "model.layers.1.mlp.up_proj"
WAYS = {"tp": {"tp": 2}, "fsdp": {"fsdp": 2}}


@pytest.fixture(scope="module", params=WAYS)
def split(request, engines):
    """The shared engines with the shipped model split in one way."""
    clear(engines)
    engines.load(MODEL, attn="eager", **WAYS[request.param])
    yield engines
    clear(engines)


def reference(model, ids, edits):
    """Logits under functions of modules' outputs, which share a dict."""
    kept, handles = {}, []
    for path, edit in edits.items():
        module = model.get_submodule(path)
        handles.append(module.register_forward_hook(lambda _m, _a, out, edit=edit: edit(out, kept)))
    try:
        with torch.no_grad():
            return model(torch.tensor(ids), use_cache=False).logits, kept
    finally:
        for handle in handles:
            handle.remove()


def check(session, one_process, code, edits, **options):
    """A trace has an effect, and the one that the same edits have in this process."""
    plain = session.run(TEXTS).logits.torch()
    run = session.trace(TEXTS, code, **options)
    logits, kept = reference(one_process, run.ids, edits)
    assert relative(run.logits.torch(), plain) > 1e-3
    assert relative(run.logits.torch(), logits) <= 1e-5
    assert torch.equal(session.run(TEXTS).logits.torch(), plain)
    return run, kept


def changed(x, place, value):
    x = x.clone()
    x[place] = value
    return x


def test_reads_are_whole_and_change_nothing(split, one_process):
    plain = split.run(TEXTS, capture=SHARDED)
    run = split.trace(
        TEXTS,
        "save.up = model.layers[1].mlp.up_proj.output\n"
        "save.first = model.layers[2].input\n"
        "save.pattern = model.layers[3].self_attn.output[1]\n"
        "save.logits = model.output.logits",
    )
    assert torch.equal(run.logits.torch(), plain.logits.torch())
    assert torch.equal(run.context["logits"], plain.logits.torch())
    assert torch.equal(run.context["up"], plain[SHARDED].torch())
    edits = {
        SHARDED: lambda x, kept: kept.update(up=x),
        "model.layers.1": lambda x, kept: kept.update(first=x),
        "model.layers.3.self_attn": lambda x, kept: kept.update(pattern=x[1]),
    }
    _, kept = reference(one_process, run.ids, edits)
    assert run.context["pattern"].shape[1] == one_process.config.num_attention_heads
    for name, value in kept.items():
        assert relative(run.context[name], value) <= 1e-5


def test_a_value_of_layer_1_is_used_in_the_last_layer(split, one_process):
    code = "early = model.layers[1].output\nmodel.layers[3].output = model.layers[3].output + 2 * early"
    edits = {
        "model.layers.1": lambda x, kept: kept.update(early=x),
        "model.layers.3": lambda x, kept: x + 2 * kept["early"],
    }
    check(split, one_process, code, edits)


def test_one_prompt_is_patched_with_another_of_the_batch(split, one_process):
    code = "model.layers[2].output[1, -1] = model.layers[2].output[0, -1]"
    edits = {"model.layers.2": lambda x, _: changed(x, (1, -1), x[0, -1])}
    run, _ = check(split, one_process, code, edits)
    assert torch.equal(run.logits.torch()[0], split.run(TEXTS).logits.torch()[0])


def test_a_sharded_site_is_edited_in_place_and_by_assignment(split, one_process):
    code = (
        "model.layers[1].mlp.up_proj.output[..., -3:] = 5\n"
        "x = model.layers[2].mlp.up_proj.output\n"
        "for n in range(3):\n"
        "    x = x + n\n"
        "model.layers[2].mlp.up_proj.output = x"
    )
    edits = {
        SHARDED: lambda x, _: changed(x, (..., slice(-3, None)), 5),
        "model.layers.2.mlp.up_proj": lambda x, _: x + 3,
    }
    check(split, one_process, code, edits)


def test_an_input_and_an_element_of_a_tuple_are_assigned(split, one_process):
    code = (
        "model.layers[1].mlp.down_proj.input = model.layers[1].mlp.down_proj.input * 3\n"
        "model.layers[2].self_attn.output[0] = model.layers[2].self_attn.output[0] * 2"
    )
    edits = {
        "model.layers.1.mlp.down_proj": lambda x, _: 3 * x,
        "model.layers.2.self_attn": lambda x, _: (x[0] * 2, x[1]),
    }
    check(split, one_process, code, edits)


def test_random_draws_are_the_seeds_and_not_the_ranks(split):
    code = "model.layers[1].mlp.up_proj.output += torch.randn_like(model.layers[1].mlp.up_proj.output)"
    first, second, other = (split.trace(TEXTS, code, seed=seed).logits.torch() for seed in (1, 1, 2))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


def test_hooks_act_before_the_trace_and_share_their_context(split, one_process):
    split.hook("model.layers.1.mlp", "x += 1\nctx['said'] = 3", name="before")
    code = "model.layers[1].mlp.output *= 10\nsave.more = ctx['said'] + save.said"
    edits = {"model.layers.1.mlp": lambda x, _: (x + 1) * 10}
    run = split.trace(TEXTS, code, capture="model.layers.1.mlp")
    logits, _ = reference(one_process, run.ids, edits)
    assert relative(run.logits.torch(), logits) <= 1e-5
    assert run.context["more"] == 6
    assert "after before v1, trace v1" in repr(run["model.layers.1.mlp"])
    clear(split)


def test_functions_given_names_and_the_engines_namespace(split, one_process):
    split._cluster.client[:].execute("factor = 2", block=True)
    double = {"model.layers.1.mlp": lambda x, _: 2 * x}
    check(split, one_process, "model.layers[layer].mlp.output *= factor", double, given={"layer": 1})

    def function(model, save, factor):
        for layer in model.layers:
            h = layer.mlp.output
            if layer is not model.layers[1]:
                h *= factor
                save.last = h.shape

    every = {f"model.layers.{n}.mlp": lambda x, _: 3 * x for n in range(4)}
    run, _ = check(split, one_process, function, every, given={"factor": 3})
    assert tuple(run.context["last"]) == (2, len(run.ids[0]), 256)


def test_a_grid_of_patches_is_one_call(split, one_process):
    code = (
        "h = model.layers[layer].output\n"
        "h[1, position] = h[0, position]\n"
        "save.p = model.output.logits[1, -1].softmax(-1)[5]"
    )
    positions = len(split.run(TEXTS).ids[0])
    sweep = split.sweep(TEXTS, code, {"layer": range(4), "position": range(positions)})
    ids = sweep.runs[0].ids
    grid = torch.zeros(4, positions)
    for layer in range(4):
        for position in range(positions):
            edits = {
                f"model.layers.{layer}": lambda x, _, p=position: changed(x, (1, p), x[0, p]),
            }
            grid[layer, position] = reference(one_process, ids, edits)[0][1, -1].softmax(-1)[5]
    assert sweep["p"].shape == (4, positions)
    assert grid.std() > 0
    assert relative(sweep["p"], grid) <= 1e-4
    with pytest.raises(InputError, match="No value 'q' was saved"):
        sweep["q"]


def test_gradients_are_those_of_one_process(split, one_process):
    code = "model.layers[1].mlp.up_proj.output[..., -3:] = 5\nmodel.layers[2].output *= 1.5"
    site = "model.layers.1:grad_output"
    plain = split.run(TEXTS, backward="logits[:, -1, 5].sum()", capture=site)
    run = split.trace(TEXTS, code, backward="logits[:, -1, 5].sum()", capture=site)
    kept = {}

    def keep(x, _):
        x.retain_grad()
        kept["x"] = x

    edits = {
        SHARDED: lambda x: changed(x, (..., slice(-3, None)), 5),
        "model.layers.1": lambda x: keep(x, None),
        "model.layers.2": lambda x: x * 1.5,
    }
    handles = [
        one_process.get_submodule(path).register_forward_hook(lambda _m, _a, out, edit=edit: edit(out))
        for path, edit in edits.items()
    ]
    one_process(torch.tensor(run.ids), use_cache=False).logits[:, -1, 5].sum().backward()
    for handle in handles:
        handle.remove()
    one_process.zero_grad()
    assert relative(run[site].torch(), plain[site].torch()) > 1e-3
    assert relative(run[site].torch(), kept["x"].grad) <= 1e-5
    carried = "h = model.layers[1].output\nmodel.layers[2].output = model.layers[2].output + h"
    with pytest.raises(HookError, match=r"(?s)line 2.*cannot carry a value.*detach"):
        split.trace(TEXTS, carried, backward="logits[:, -1, 5].sum()")
    split.trace(TEXTS, carried.replace("+ h", "+ h.detach()"), backward="logits[:, -1, 5].sum()")


# --- what goes wrong ---------------------------------------------------------------------------------

BAD = {
    "h = model.layers[2].output\nx = model.layers[1].output": (
        "line 2.*x = model.*read after it had passed.*Move"
    ),
    "model.layers[1].output = model.layers[3].output": "line 1.*cannot go back to an earlier site",
    "x = 1\ny = model.layers[9].output": "line 2.*numbers 0 to 3; there is no 9",
    "model.layers[1].mpl.output": "line 1.*Did you mean mlp",
    "model.layers[1].mlp.outptu": "line 1.*Did you mean output",
    "model.layers[1].mlp.output = 3": "line 1.*assigned int; it takes a tensor",
    "model.layers[1].mlp.output = None": "line 1.*assigned NoneType; it takes a tensor",
    "\nh = model.layers[1].mlp.output\nmodel.layers[1].mlp.output = h[:1]": (
        "line 3.*shape and dtype must stay"
    ),
    "h = model.layers[1].output\nk = model.layers[2].output\nh += 1\nmodel.output.logits": (
        "line 4.*written into after the site had passed.*clone"
    ),
    "h = model.layers[1].output[0]\nk = model.layers[2].output\nh += 1": (
        "written into after the site had passed"
    ),
    "model.layers[1].self_attn.output + 1": r"line 1.*name one of model.layers.1.self_attn:output\[0\]",
    "torch.relu(model.layers[1].self_attn.output)": r"line 1.*name one of model.layers.1.self_attn:output",
    "model.layers[1].self_attn.output[:, -1]": r"line 1.*name one of model.layers.1.self_attn:output\[0\]",
    "model.norm.variance_epsilon": "line 1.*only a piece.*parameter",
    "model.lm_head(1)": "line 1.*was given no tensor",
    "model.layers[1].grad_output": "line 1.*give the run a loss",
    "save.y = undefined": "line 1.*NameError",
    "if rank == 1:\n    1 / 0": "line 2, on rank 1:.*ZeroDivisionError",
    "h = model.layers[1].mlp.up_proj.output\nif rank == 0:\n    1 / 0": (
        "line 3, on rank 0:.*ZeroDivisionError"
    ),
    "model.layers[1].mlp.output\nraise SystemExit": "line 2.*SystemExit",
    "if rank:\n    model.layers[1].output": (
        "different sites: on rank 0 for nothing more, on rank 1 for model.layers.1"
    ),
    "model.layers[1].output *= rank + 1": "left different values on the ranks",
    "while True:\n    model.layers[1].output *= 1": "line 2.*loop without an end",
}


@pytest.fixture
def unharmed(loaded):
    """The model gives the same logits after the mistake as before, and then has no hook on it."""
    before = loaded.run(TEXTS).logits.torch()
    yield loaded
    assert torch.equal(loaded.run(TEXTS).logits.torch(), before)


@pytest.mark.parametrize("code", BAD)
def test_what_cannot_be_had_is_said_with_the_line_and_the_fix(unharmed, code):
    with pytest.raises(FlexError, match=f"(?s){BAD[code]}") as caught:
        unharmed.trace(TEXTS, code)
    assert len(str(caught.value).splitlines()) <= 6


def test_a_site_that_is_never_reached(unharmed):
    for options in ({"skip": "model.layers.2"}, {"stop_at": "model.layers.1"}):
        with pytest.raises(HookError, match=r"line 2(?s:.)*model.layers.2.mlp:output was never reached"):
            unharmed.trace(TEXTS, "x = 1\ny = model.layers[2].mlp.output", **options)


def test_a_loop_without_any_site_is_ended_with_its_line(unharmed):
    with pytest.raises(StuckError, match=r"(?s)loop without end\?.*'trace', line [23].*(n \+= 1|while True)"):
        unharmed.trace(TEXTS, "n = 0\nwhile True:\n    n += 1", limit=1.0)
    with pytest.raises(
        StuckError, match=r"(?s)loop without end\?.*line [23], at model.layers.1:output.*(n \+= 1|while True)"
    ):
        unharmed.trace(TEXTS, "n = model.layers[1].output[0, 0, 0]\nwhile True:\n    n += 1", limit=1.0)


def test_nothing_is_sent_that_does_not_compile(unharmed):
    with pytest.raises(CellError, match=r"line 2; nothing was sent(?s:.)*\^"):
        unharmed.trace(TEXTS, "x = 1\nx +=")
    with pytest.raises(CellError, match=r"syntax error on line 1"):
        unharmed.trace(TEXTS, "return 3")
    with pytest.raises(InputError, match="is empty"):
        unharmed.trace(TEXTS, "# nothing")
    with pytest.raises(InputError, match="no free name"):
        unharmed.trace(TEXTS, "x = 1", given={"model": 3})


def test_names_of_the_notebook_and_of_earlier_traces_do_not_leak(unharmed):
    leftover = 3
    unharmed.trace(TEXTS, "mine = 4\nsave.mine = mine")
    for name in ("leftover", "mine"):
        with pytest.raises(HookError, match=f"NameError: name '{name}' is not defined"):
            unharmed.trace(TEXTS, f"save.y = {name}")
    assert leftover == 3


def test_untouched_sites_cause_no_exchange(unharmed):
    view = unharmed._cluster.client[:]
    view.execute(COUNT, block=True)
    unharmed.trace(TEXTS, "model.layers[1].output\nmodel.layers[2].mlp.up_proj.output")
    view.execute("Exchange.gather = was", block=True)
    assert view["gathered"] == [["model.layers.1:output", "model.layers.2.mlp.up_proj:output"]] * 2


COUNT = """
from flexmagic.engine.exchange import Exchange
gathered, was = [], Exchange.gather

def gather(self, rule, local, **how):
    gathered.append(str(rule.site))
    return was(self, rule, local, **how)

Exchange.gather = gather
"""


def test_after_unwrap_nothing_is_left(session):
    model = session.load(MODEL, tp=2)
    session.trace(TEXTS, "model.layers[1].output *= 2")
    with pytest.raises(HookError):
        session.trace(TEXTS, "model.layers[1].output *= undefined")
    assert model.unwrap() == 0


@pytest.mark.parametrize("dims", [{"tp": 2, "dp": 2}])
@pytest.mark.slow
def test_on_four_ranks(one_process, dims):
    with Session.start(4, oversubscribe=True) as four:
        four.load(MODEL, attn="eager", **dims)
        code = (
            "up = model.layers[1].mlp.up_proj.output\n"
            "up[1, -1] = up[0, -1] * 2\n"
            "model.layers[3].mlp.up_proj.output = model.layers[3].mlp.up_proj.output + up"
        )
        edits = {
            SHARDED: lambda x, kept: kept.setdefault("up", changed(x, (1, -1), x[0, -1] * 2)),
            "model.layers.3.mlp.up_proj": lambda x, kept: x + kept["up"],
        }
        check(four, one_process, code, edits)
        with pytest.raises(HookError, match=r"line 2, on rank 3"):
            four.trace(TEXTS, "model.layers[1].output\nif rank == 3: 1 / 0")
        check(four, one_process, code, edits)


# --- generations -------------------------------------------------------------------------------------


def generated(model, ids, n, path, edit):
    """Tokens and every step's logits of the model's own generate, a module's outputs edited by step."""
    logits, calls = [], []

    def after(_m, _a, out):
        calls.append(None)
        return edit(out.clone(), len(calls) - 1)

    handles = [
        model.get_submodule(path).register_forward_hook(after),
        model.register_forward_hook(lambda _m, _a, out: logits.append(out.logits.clone())),
    ]
    try:
        mask = torch.ones_like(ids)
        return model.generate(ids, attention_mask=mask, max_new_tokens=n, logits_to_keep=0), logits
    finally:
        for handle in handles:
            handle.remove()


def test_a_trace_acts_in_the_steps_that_it_goes_through(split, one_process):
    """A value of the prompt's step is added in two later ones, on a sharded site."""
    code = (
        "early = model.layers[1].mlp.up_proj.output[:, -1:]\n"
        "for step in model.steps[2:4]:\n"
        "    x = model.layers[1].mlp.up_proj.output\n"
        "    x += 20 * early\n"
        "    save.last = step\n"
        "    save.logits = model.output.logits"
    )
    plain = split.generate(PROMPT, 6)
    run = split.trace(PROMPT, code, max_new_tokens=6)
    kept = {}

    def edit(x, step):
        if step == 0:
            kept["early"] = x[:, -1:].clone()
        return x + 20 * kept["early"] if step in {2, 3} else x

    ids = torch.tensor([row[: run._made.prompt] for row in run.ids])
    wanted, logits = generated(one_process, ids, 6, SHARDED, edit)
    assert run.ids == wanted.tolist()
    assert run.steps == 6
    for n in range(6):
        assert relative(run.step(n).logits.torch(), logits[n]) <= 1e-5
        same = torch.equal(run.step(n).logits.torch(), plain.step(n).logits.torch())
        assert same == (n < 2)
    assert run.context["last"] == 3
    assert torch.equal(run.context["logits"], run.step(3).logits.torch())
    assert run.step(2).seed == 0


def test_steps_without_an_end_are_those_that_there_are(split):
    code = (
        "tokens = []\n"
        "for step in model.steps:\n"
        "    tokens.append(model.output.logits[:, -1].argmax(-1))\n"
        "save.tokens = torch.stack(tokens, -1)\n"
        "for step in model.steps[step + 1:]:\n"
        "    1 / 0"
    )
    plain = split.generate(TEXTS, 4)
    run = split.trace(TEXTS, code, max_new_tokens=4)
    assert run.ids == plain.ids
    new = [row[run._made.prompt :] for row in run.ids]
    assert run.context["tokens"].tolist() == new
    for n in range(plain.steps):
        assert torch.equal(run.step(n).logits.torch(), plain.step(n).logits.torch())


BAD_STEPS = {
    "x = 1\nfor step in model.steps[2:9]:\n    model.layers[1].output": (
        "line 2.*step 3 was never reached: the generation had steps 0 to 2.*Generate more"
    ),
    "for step in model.steps[2:3]: pass\nfor step in model.steps[1:2]:\n    pass": (
        r"line 2.*step 1 has passed; the generation is at step 2.*model.steps\[3:\]"
    ),
    "x = model.steps[3]": r"line 1.*for step in model.steps\[3:4\]",
    "x = model.steps[-1:]": "line 1.*counted from the start",
    "for step in model.steps[1:3]:\n    a = model.layers[2].output\n    b = model.layers[1].output": (
        "line 3.*read after it had passed.*model.steps"
    ),
    "for step in model.steps[2:3]:\n    if rank: 1 / 0": "line 2, on rank 1.*ZeroDivisionError",
    "for step in model.steps[rank:3]:\n    model.output.logits": "different sites: on rank 0 for .*on rank 1",
    "for step in model.steps: pass\nmodel.output.logits": "line 2.*after the forward was over",
}


@pytest.mark.parametrize("code", BAD_STEPS)
def test_wrong_steps_are_said_with_the_line(unharmed, code):
    with pytest.raises(FlexError, match=f"(?s){BAD_STEPS[code]}") as caught:
        unharmed.trace(TEXTS, code, max_new_tokens=4)
    assert len(str(caught.value).splitlines()) <= 6


def test_a_run_of_one_forward_has_no_steps_and_a_generation_no_loss(unharmed):
    with pytest.raises(HookError, match=r"(?s)line 1.*is one forward and has no steps.*--generate"):
        unharmed.trace(TEXTS, "for step in model.steps: pass")
    with pytest.raises(InputError, match="need one forward"):
        unharmed.trace(TEXTS, "x = 1", max_new_tokens=2, backward="logits.sum()")
    with pytest.raises(HookError, match=r"(?s)line 2.*model.layers.2.mlp:output was never reached in step 1"):
        unharmed.trace(
            TEXTS,
            "for step in model.steps[1:]:\n    model.layers[2].mlp.output",
            max_new_tokens=3,
            skip="model.layers.2",
        )
