"""Where and when hooks act, in which order and which of them; plain torch hooks are the truth."""

import zlib

import pytest
import torch

from flexmagic import HookError, InputError, LayoutError, SiteError

from .conftest import MODEL, PROMPT, clear, relative

pytestmark = pytest.mark.engines

SITE = "model.layers.1.mlp"
TEXTS = ["The capital of France is", "The capital of Italy is"]


def truth(edited, ids, edits):
    with edited(edits) as model, torch.no_grad():
        return model(ids, use_cache=False).logits


@pytest.mark.parametrize("site", [SITE, "model.layers.1.mlp.up_proj"])
def test_hooks_on_one_site_compose_in_the_order_of_the_list(loaded, edited, ids, site):
    loaded.hook(site, "x += 1", name="plus")
    loaded.hook(site, "x *= 10", name="times")
    assert [row[0] for row in loaded.hooks.table().rows] == ["plus", "times"]
    plus_first = loaded.run(PROMPT)
    assert plus_first[site].after == ("plus v1", "times v1")
    assert "after plus v1, times v1" in repr(plus_first[site])
    loaded.hooks["plus"].remove()
    loaded.hook(site, "x += 1", name="plus")
    times_first = loaded.run(PROMPT)
    assert times_first[site].after == ("times v1", "plus v1")
    one, other = plus_first.logits.torch(), times_first.logits.torch()
    assert relative(one, other) > 1e-3
    assert relative(one, truth(edited, ids, {site: lambda x: (x + 1) * 10})) <= 1e-5
    assert relative(other, truth(edited, ids, {site: lambda x: x * 10 + 1})) <= 1e-5


@pytest.mark.parametrize("site", [SITE, "model.layers.1.mlp.up_proj"])
def test_a_hook_without_body_captures_at_its_place_in_the_order(loaded, site):
    plain = loaded.run(PROMPT, capture=site)[site].torch()
    loaded.hook(site, name="first")
    loaded.hook(site, "x += 1", name="plus")
    loaded.hook(site, name="look")
    loaded.hook(site, "x *= 10", name="times")
    loaded.hook(site, name="last")
    run = loaded.run(PROMPT)
    assert torch.equal(run[site, "first"].torch(), plain)
    assert torch.equal(run[site, "look"].torch(), plain + 1)
    assert torch.equal(run[site].torch(), (plain + 1) * 10)
    assert torch.equal(run[site, "last"].torch(), run[site].torch())
    assert (run[site, "first"].after, run[site, "first"].before) == ((), ("plus v1", "times v1"))
    assert (run[site, "look"].after, run[site, "look"].before) == (("plus v1",), ("times v1",))
    assert "after plus v1, before times v1" in repr(run[site, "look"])
    assert run.sites.count(f"{site}:output") == 1
    with pytest.raises(SiteError, match="No hook 'plus' without a body"):
        _ = run[site, "plus"]


@pytest.mark.parametrize("axes", [{"fsdp": 2}, {"dp": 2}, {"pp": 2}], ids=str)
def test_every_distribution_is_as_one_process(session, edited, axes):
    """Composition, rows and tokens, a condition on another layer's value, on sites of both halves."""
    clear(session)
    session.load(MODEL, attn="eager", **axes)
    plain = session.run(TEXTS)
    for layer in (0, 3):
        site = f"model.layers.{layer}.mlp"
        session.hook(site, "x += 1; ctx['seen'] = step", name=f"plus {layer}", row=1)
        session.hook(site, name=f"look {layer}")
        session.hook(site, "x *= 10", name=f"times {layer}", token="-2:", when="ctx.get('seen') == 0")
    run = session.run(TEXTS)

    def edit(x):
        x = x.clone()
        x[1] += 1
        x[:, -2:] *= 10
        return x

    edits = {f"model.layers.{layer}.mlp": edit for layer in (0, 3)}
    reference = truth(edited, torch.tensor(run.ids), edits)
    assert relative(run.logits.torch(), plain.logits.torch()) > 1e-3
    assert relative(run.logits.torch(), reference) <= 1e-5
    assert run["model.layers.3.mlp"].after == ("plus 3 v1", "times 3 v1")
    assert run["model.layers.3.mlp", "look 3"].before == ("times 3 v1",)
    assert run["model.layers.3.mlp", "look 3"].shape == run["model.layers.3.mlp"].shape
    clear(session)
    check_noise(session, edited, SITE)


@pytest.mark.parametrize("inside", ["", ".up_proj"])
@pytest.mark.parametrize("picked", [(-1, [-1]), ("2:5", [2, 3, 4]), ("0,3", [0, 3]), (-3, [-3])])
def test_tokens_of_the_whole_tensor_are_edited_and_no_others(loaded, edited, ids, inside, picked):
    site, (token, index) = SITE + inside, picked
    plain = loaded.run(PROMPT, capture=site)
    loaded.hook(site, f"assert x.shape[:2] == (1, {len(index)}); x *= 3", name="h", token=token)
    run = loaded.run(PROMPT)
    changed, before = run[site].torch(), plain[site].torch()
    there = torch.zeros(before.shape[1], dtype=torch.bool)
    there[index] = True
    assert torch.equal(changed[:, ~there], before[:, ~there])
    assert torch.equal(changed[:, there], before[:, there] * 3)
    assert relative(run.logits.torch(), plain.logits.torch()) > 1e-5

    def edit(x):
        x = x.clone()
        x[:, index] *= 3
        return x

    assert relative(run.logits.torch(), truth(edited, ids, {site: edit})) <= 1e-5


def test_rows_of_the_batch_are_edited_and_no_others(loaded, edited):
    plain = loaded.run(TEXTS, capture=SITE)
    loaded.hook(SITE, "return x + 1", name="h", row=1, token="1:")
    run = loaded.run(TEXTS)
    changed, before = run[SITE].torch(), plain[SITE].torch()
    assert torch.equal(changed[0], before[0])
    assert torch.equal(changed[1, :1], before[1, :1])
    assert torch.equal(changed[1, 1:], before[1, 1:] + 1)
    assert torch.equal(run.logits.torch()[0], plain.logits.torch()[0])

    def edit(x):
        x = x.clone()
        x[1, 1:] += 1
        return x

    assert relative(run.logits.torch(), truth(edited, torch.tensor(run.ids), {SITE: edit})) <= 1e-5


def test_one_heads_pattern_is_replaced_and_the_others_keep_their_bits(loaded, one_process, ids):
    """Head 7 lives on the last rank and shares the values of key-value head 3."""
    values, heads = "model.layers.1.self_attn.v_proj", "model.layers.1.self_attn.o_proj:input"
    plain = loaded.run(PROMPT, capture=heads)
    loaded.hook(values, "ctx['v'] = x.unflatten(-1, (4, 32))[:, :, 3].clone()", name="values")
    body = (
        "mean = torch.ones(x.shape[1], x.shape[1]).tril()\nmean /= mean.sum(-1, keepdim=True)\n"
        "x[..., 7 * 32 :] = mean @ ctx['v']"
    )
    loaded.hook(heads, body, name="pattern")
    run = loaded.run(PROMPT)
    before, after = plain[heads].torch(), run[heads].torch()
    assert torch.equal(after[..., : 7 * 32], before[..., : 7 * 32])
    assert relative(run.logits.torch(), plain.logits.torch()) > 1e-4
    kept = {}

    def replace(_module, args):
        x = args[0].clone()
        mean = torch.ones(x.shape[1], x.shape[1]).tril()
        x[..., 7 * 32 :] = mean / mean.sum(-1, keepdim=True) @ kept["v"]
        return (x,)

    attention = one_process.model.layers[1].self_attn
    hooks = [
        attention.v_proj.register_forward_hook(
            lambda _m, _a, out: kept.update(v=out.unflatten(-1, (4, 32))[:, :, 3].clone())
        ),
        attention.o_proj.register_forward_pre_hook(replace),
    ]
    with torch.no_grad():
        reference = one_process(ids, use_cache=False).logits
    for hook in hooks:
        hook.remove()
    assert relative(run.logits.torch(), reference) <= 1e-5


def test_what_has_no_such_dim_is_refused(loaded):
    with pytest.raises(LayoutError, match=r"token -1 has no meaning at .*it has 2 seq dims"):
        loaded.hook("model.layers.1.self_attn:output[1]", "x *= 0", name="h", token=-1)
    with pytest.raises(InputError, match="leave --row and --token away"):
        loaded.hook(SITE, name="h", token=-1)
    with pytest.raises(InputError, match="a rank's own piece"):
        loaded.hook(SITE, "x *= 0", name="h", token=-1, local=True)
    assert len(loaded.hooks) == 0
    loaded.hook(SITE, "x *= 0", name="h", token=99)
    with pytest.raises(HookError, match="there is no token 99: this tensor has 15"):
        loaded.run(PROMPT)


def test_every_kth_run_and_conditions(loaded, capsys):
    plain = loaded.run(PROMPT).logits.torch()
    loaded.hook(SITE, "x *= 2", name="h", every=2)
    for _ in range(4):
        run = loaded.run(PROMPT)
        assert torch.equal(run.logits.torch(), plain) == (run.number % 2 == 1)
    assert run[SITE].shape
    loaded.hook(SITE, "x *= 2", name="h", when=f"run == {run.number + 2} and index == 1")
    skipped, acted = loaded.run(PROMPT), loaded.run(PROMPT)
    assert torch.equal(skipped.logits.torch(), plain)
    assert not torch.equal(acted.logits.torch(), plain)
    assert skipped[SITE].after == ()
    assert skipped.warnings == (
        f"hook 'h' did not act: when run == {acted.number} and index == 1 was never met.",
    )
    assert "Note: hook 'h' did not act" in capsys.readouterr().out
    assert acted.warnings == ()


def test_a_condition_on_ctx_is_met_on_all_ranks_or_refused(loaded):
    plain = loaded.run(PROMPT).logits.torch()
    loaded.hook("model.layers.0.mlp", "ctx['go'] = bool(x.abs().max() > 0)", name="says")
    loaded.hook("model.layers.1.mlp.up_proj", "x *= 2", name="acts", when="ctx.get('go')")
    assert not torch.equal(loaded.run(PROMPT).logits.torch(), plain)
    loaded.hook("model.layers.0.mlp", "ctx['go'] = rank == 1", name="says")
    with pytest.raises(HookError, match="left different values on the ranks"):
        loaded.run(PROMPT)
    loaded.hook("model.layers.0.mlp", "ctx['go'] = False", name="says")
    assert torch.equal(loaded.run(PROMPT).logits.torch(), plain)


def test_a_condition_that_fails_and_a_capture_that_waits(loaded):
    plain = loaded.run(PROMPT)
    loaded.hook(SITE, "x *= 2", name="h", when="site[run + 1000] == 'a'")
    with pytest.raises(
        HookError, match=r"hook 'h' failed at model.layers.1.mlp:output, on every rank:\nIndexErr"
    ):
        loaded.run(PROMPT)
    loaded.hook(SITE, "x *= 2", name="h", when="ctx['absent']")
    with pytest.raises(HookError, match="KeyError: 'absent'"):
        loaded.run(PROMPT)
    loaded.hooks["h"].remove()
    with pytest.raises(InputError, match="leave --when away"):
        loaded.hook(SITE, name="look", when="run > 1")
    loaded.hook(SITE, name="look", every=2)
    runs = [loaded.run(PROMPT) for _ in range(2)]
    assert [f"{SITE}:output" in run.sites for run in runs] == [run.number % 2 == 0 for run in runs]
    assert torch.equal(runs[0].logits.torch(), plain.logits.torch())


def test_ranges_and_expressions_name_sites(loaded):
    loaded.hook("model.layers.{1..2}.mlp", name="range")
    loaded.hook(r"/model\.layers\.[03]\.mlp\.(up|gate)_proj/", name="regex")
    sites = loaded.run(PROMPT).sites
    assert [s for s in sites if s.endswith("mlp:output")] == [f"model.layers.{n}.mlp:output" for n in (1, 2)]
    assert len([s for s in sites if "_proj" in s]) == 4
    with pytest.raises(SiteError, match=r"no module 'model\.layers\.4\.mlp', which .* names"):
        loaded.hook("model.layers.{2..5}.mlp", name="beyond")


def test_a_hook_that_does_not_act_is_said_after_the_run(loaded):
    loaded.hook(SITE, "x *= 2", name="later", step="1:")
    loaded.hook(f"{SITE}:grad_output", "x *= 2", name="gradient")
    assert loaded.run(PROMPT).warnings == (
        "hook 'later' did not act: it is for step 1:, and this run had one step, step 0.",
        "hook 'gradient' did not act: its sites are gradients, and this run has no loss.",
    )


def test_groups_are_switched_together(loaded):
    def result(**options):
        return float(loaded.run(PROMPT, **options).logits.torch().double().sum())

    none = result()
    loaded.hook("model.layers.0.mlp", "x *= 2", name="a1", group="A")
    loaded.hook("model.layers.1.mlp", "x *= 3", name="a2", group="A")
    loaded.hook("model.layers.2.mlp", "x *= 4", name="b")
    hooks = loaded.hooks
    everything = result()
    hooks.disable("b")
    only_a = result()
    hooks.complement("A")
    only_b = result()
    assert [hook.name for hook in hooks.enabled] == ["b"]
    hooks.enable()
    assert result() == everything
    hooks.complement("b")
    assert result() == only_a
    hooks.disable()
    assert result() == none
    assert len({none, only_a, only_b, everything}) == 4
    hooks.enable()
    assert result(only="A") == only_a
    assert result(only=["a1", "a2"]) == only_a
    assert result(without="A") == only_b
    assert result(only=[]) == none
    with hooks.only("A"):
        assert result() == only_a
        hooks.enable("b")
    assert result() == everything
    for call in (hooks.enable, hooks.complement, lambda name: loaded.run(PROMPT, without=name)):
        with pytest.raises(
            HookError, match=r"no hook 'C' and no group of that name. Hooks: a1, a2, b. Groups: A."
        ):
            call("C")
    with pytest.raises(HookError, match="name of a hook and of a group"):
        loaded.hook(SITE, "x *= 2", name="A")


def test_hooks_go_to_a_file_and_back(loaded, tmp_path):
    def double(x, h):
        h.ctx["seen"] = True
        return x * 2

    loaded.hook("model.layers.{0..1}.mlp", "x *= 2", name="a", group="A", token="1:")
    loaded.hook("model.layers.2.mlp", double, name="f")
    loaded.hook("model.layers.3", name="look")
    loaded.hooks.disable("look")
    wanted, table = loaded.run(PROMPT).logits.torch(), str(loaded.hooks.table())
    path = loaded.hooks.export(tmp_path / "hooks.toml")
    assert loaded.hooks.export(tmp_path / "some.toml", "A").read_text().count("[[hook]]") == 1
    for hook in list(loaded.hooks):
        hook.remove()
    assert not torch.equal(loaded.run(PROMPT).logits.torch(), wanted)
    assert [hook.name for hook in loaded.hooks.load(path)] == ["a", "f", "look"]
    assert str(loaded.hooks.table()) == table
    run = loaded.run(PROMPT)
    assert torch.equal(run.logits.torch(), wanted)
    assert run.context == {"seen": True}
    again = loaded.hooks.export(tmp_path / "again.toml")
    assert again.read_text().replace("again.toml", "hooks.toml") == path.read_text()


def test_a_file_with_one_wrong_hook_changes_none(loaded, tmp_path):
    loaded.hook("model.layers.0.mlp", "x *= 2", name="a")
    wanted = loaded.run(PROMPT).logits.torch()
    path = tmp_path / "hooks.toml"
    path.write_text(
        'flexmagic-hooks = 1\n[[hook]]\nname = "a"\nsites = ["model.layers.1.mlp"]\ncode = "x *= 9"\n'
        '[[hook]]\nname = "b"\nsites = ["model.layers.7.mlp"]\ncode = "x *= 9"\n'
    )
    with pytest.raises(SiteError, match=r"model\.layers\.7\.mlp"):
        loaded.hooks.load(path)
    assert [(hook.name, hook.version) for hook in loaded.hooks] == [("a", 1)]
    assert torch.equal(loaded.run(PROMPT).logits.torch(), wanted)


def test_versions_differ_by_their_lines_and_come_back(loaded):
    loaded.hook(SITE, "x *= 2\n", name="h")
    with pytest.raises(HookError, match="one version only"):
        loaded.hooks["h"].diff()
    loaded.hook(SITE, "x *= 3\n", name="h", token=-1)
    assert repr(loaded.hooks["h"]) == f"<Hook h v2 on {SITE}:output, token -1, enabled>"
    said = loaded.hooks["h"].diff().splitlines()
    assert said[:2] == ["--- h v1", "+++ h v2"]
    assert {"-x *= 2", "+x *= 3", f"+%%flexhook {SITE}:output --name h --token=-1"} <= set(said)
    assert loaded.hooks["h"].cell == f"%%flexhook {SITE}:output --name h --token=-1\nx *= 3\n"


@pytest.mark.parametrize("refusing", [0, 1])
def test_an_engine_that_refuses_a_hook_leaves_every_engine_with_the_old_one(loaded, refusing):
    hook = loaded.hook(SITE, "x *= 2", name="h")
    wanted = loaded.run(PROMPT).logits.torch()
    engine = loaded._cluster.client[refusing]
    engine.execute(
        "import flexmagic.engine.runtime as _r\n_build = _r.build\n"
        "def _refuse(*_): raise _r.ModelError('not here')\n_r.build = _refuse",
        block=True,
    )
    try:
        with pytest.raises(Exception, match="not here"):
            loaded.hook(SITE, "x *= 3", name="h")
    finally:
        engine.execute("_r.build = _build", block=True)
    view = loaded._cluster.client[:]
    view.execute(
        "from flexmagic.engine.slot import Slot\n"
        f"_mine = {loaded._id!r}\n"
        "_known = sorted((n, v, s.text) for (o, n, v), (s, _c) in Slot.runtime.hooks.items() "
        "if (o, n) == (_mine, 'h'))",
        block=True,
    )
    assert view["_known"] == [[("h", 1, "x *= 2")]] * 2
    assert hook.version == 1
    assert torch.equal(loaded.run(PROMPT).logits.torch(), wanted)


def check_noise(session, edited, site):
    """One process draws the same, bit for bit, from the seed that run, site, hook and call make."""
    plain = session.run(TEXTS)
    session.hook(site, "noise = torch.randn_like(x)\nctx['noise'] = noise\nx += noise", name="noise")
    first, again, third = session.repeat(TEXTS, [5, 5, 6])
    assert [run.seed for run in (first, again, third)] == [5, 5, 6]
    assert relative(first.logits.torch(), plain.logits.torch()) > 1e-3
    assert torch.equal(again.logits.torch(), first.logits.torch())
    assert relative(third.logits.torch(), first.logits.torch()) > 1e-3
    drawn = []

    def noise(x):
        with torch.random.fork_rng():
            torch.manual_seed(zlib.crc32(f"5|{site}:output|noise|1".encode()))
            drawn.append(torch.randn_like(x))
        return x + drawn[0]

    want = truth(edited, torch.tensor(first.ids), {site: noise})
    assert torch.equal(first.context["noise"], drawn[0])
    assert relative(first.logits.torch(), want) <= 1e-5


@pytest.mark.parametrize("site", [SITE, "model.layers.1.mlp.up_proj"])
def test_noise_is_the_same_whatever_the_number_of_ranks(loaded, edited, site):
    check_noise(loaded, edited, site)


def test_repeated_runs_differ_in_their_seeds_only(loaded):
    loaded.hook(SITE, "x += torch.randn_like(x)", name="noise")
    runs = loaded.repeat(PROMPT, 3, seed=7, capture=SITE)
    assert [run.seed for run in runs] == [7, 8, 9]
    assert [run.number - runs[0].number for run in runs] == [0, 1, 2]
    alone = loaded.run(PROMPT, seed=8, capture=SITE)
    assert torch.equal(runs[1][SITE].torch(), alone[SITE].torch())
    assert not torch.equal(runs[0][SITE].torch(), alone[SITE].torch())
    texts = loaded.repeat(PROMPT, [1, 2], max_new_tokens=2)
    assert [(run.steps, run.seed) for run in texts] == [(2, 1), (2, 2)]
    assert loaded.runs[runs[2].number].seed == 9
    for none in (0, -1, []):
        with pytest.raises(InputError, match="makes no run"):
            loaded.repeat(PROMPT, none)
