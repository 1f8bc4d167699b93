"""The magics in an IPython shell over real engines: what a user types, and what comes back."""

import pytest
import torch
from IPython.core.interactiveshell import InteractiveShell
from IPython.utils.capture import capture_output

from flexmagic import ClusterError, FlexError, InputError, Run

from .conftest import MODEL, PROMPT, clear

pytestmark = pytest.mark.engines


@pytest.fixture
def shell():
    """A fresh shell with the extension loaded and nothing started."""
    InteractiveShell.clear_instance()
    shell = InteractiveShell.instance()
    before = snapshot(shell)
    shell.run_line_magic("load_ext", "flexmagic")
    yield shell
    shell._flexmagic_desk._session = None  # the engines are the other tests' too
    shell.run_line_magic("unload_ext", "flexmagic")
    assert snapshot(shell) == before
    InteractiveShell.clear_instance()


def snapshot(shell):
    magics = {kind: sorted(names) for kind, names in shell.magics_manager.magics.items()}
    return magics, len(shell.input_transformers_cleanup), sorted(k for k in vars(shell) if "flex" in k)


@pytest.fixture
def desk(shell, loaded):
    """The shell at the shared session, the shipped model loaded."""
    shell._flexmagic_desk.take(loaded)
    return shell


def typed(shell, cell):
    """Run a cell as typed; returns its value, raises its error."""
    with capture_output() as said:
        result = shell.run_cell(cell)
    typed.said = said.stdout
    result.raise_error()
    return result.result


def failing(shell, cell):
    """The text a user sees for a cell that fails."""
    with pytest.raises(FlexError):
        typed(shell, cell)
    return typed.said


def test_the_ten_lines_of_the_readme(desk):
    typed(desk, "%%flexhook model.layers.*.mlp --name damp\nx[:, -1] *= 0.5")
    run = typed(desk, f'run = %flexrun "{PROMPT}"\nrun')
    assert isinstance(run, Run)
    activation = typed(desk, 'run["model.layers.3.mlp"]')
    assert activation.shape == (1, len(run.tokens[0]), 256)
    assert "after damp v1" in typed.said
    assert "tp: Replicate" in typed.said


def test_before_a_start_and_before_a_model_the_next_step_is_said(shell, session):
    for cell in (
        '%flexrun "x"',
        "%flexmodel",
        "%%flexhook a\nx",
        "%flexhook",
        "%flexcluster",
        "%flexcluster stop",
    ):
        assert "Type %flexcluster start" in failing(shell, cell)
    assert "Traceback" not in typed.said
    shell._flexmagic_desk.take(session)
    if session._model is not None and session._model.alive:
        session.model.unwrap()
    for cell in ('%flexrun "x"', "%flexmodel", "%%flexhook a\nx"):
        assert "Type %flexmodel PATH" in failing(shell, cell)


def test_a_second_start_is_a_message_not_a_second_cluster(desk, loaded):
    said = failing(desk, "%flexcluster start -n 2")
    assert "A cluster is running" in said
    assert "%flexcluster stop" in said
    assert desk._flexmagic_desk.session is loaded


def test_an_empty_body_only_captures(desk):
    for cell in (
        "%%flexhook model.layers.1.mlp",
        "%%flexhook model.layers.1.mlp\n",
        "%flexhook model.layers.1.mlp",
    ):
        hook = typed(desk, cell)
        assert hook.current.source.captures_only
        run = typed(desk, f'run = %flexrun "{PROMPT}"\nrun')
        assert "model.layers.1.mlp:output" in run.sites
    assert len(typed(desk, "%flexhook").rows) == 1


def test_running_the_cell_again_replaces_and_the_list_switches(desk):
    typed(desk, "%%flexhook model.layers.0.mlp --name h\nx *= 2")
    typed(desk, "%%flexhook model.layers.0.mlp --name h\nx *= 3")
    assert [row[:2] for row in typed(desk, "%flexhook").rows] == [("h", "v2")]
    assert typed(desk, "%flexhook --undo h").rows[0][1] == "v1"
    assert typed(desk, "%flexhook --disable h").rows[0][-1] == "disabled"
    assert typed(desk, "%flexhook --enable h").rows[0][-1] == "enabled"
    assert typed(desk, "%flexhook --remove h").rows == ()
    assert "no hook 'h'" in failing(desk, "%flexhook --remove h")


def test_patterns_positions_and_groups_as_typed(desk):
    layer = 1  # noqa: F841 - what a line may name is the notebook's
    typed(desk, "layer = 3")
    typed(
        desk,
        "%%flexhook model.layers.{1..2}.mlp,model.layers.{layer}.mlp --name a --group A --token -1\nx *= 2",
    )
    typed(desk, "%%flexhook /model.layers.[0-9]{1}.mlp.(up|gate)_proj/ --name b --row 0 --token -3:\nx *= 2")
    typed(
        desk, "%%flexhook model.layers.{0,3}.self_attn.o_proj --name c --when 'run > 0 and step == 0'\nx *= 2"
    )
    rows = {row[0]: row for row in typed(desk, "%flexhook").rows}
    assert rows["a"][2:4] == ("model.layers.{1..2}.mlp:output, model.layers.3.mlp:output", "token -1")
    assert rows["a"][5:] == ("A", "enabled")
    assert rows["b"][2:4] == ("/model.layers.[0-9]{1}.mlp.(up|gate)_proj/:output", "row 0, token -3:")
    assert rows["c"][2:4] == ("model.layers.{0,3}.self_attn.o_proj:output", "when run > 0 and step == 0")
    run = typed(desk, f'r = %flexrun "{PROMPT}"\nr')
    assert run["model.layers.3.mlp"].after == ("a v1",)
    assert run["model.layers.3.mlp.up_proj"].after == ("b v1",)
    assert run["model.layers.0.self_attn.o_proj"].after == ("c v1",)
    assert "no module 'model.layers.4.mlp'" in failing(desk, "%%flexhook model.layers.{2..5}.mlp\nx *= 2")
    assert "count from 0" in failing(desk, "%%flexhook model.layers.0.mlp --step -1\nx *= 2")


def test_hooks_are_chosen_by_run_and_switched_by_group(desk):
    for name, group in (("a", " --group A"), ("b", " --group A"), ("c", "")):
        typed(desk, f"%%flexhook model.layers.0.mlp --name {name}{group}\nx += 1")

    def acting(options=""):
        run = typed(desk, f'r = %flexrun "{PROMPT}" {options}\nr')
        return [hook[0] for hook in run["model.layers.0.mlp"].after]

    capture = "--capture model.layers.0.mlp"
    assert acting() == ["a", "b", "c"]
    assert acting("--only a,c") == ["a", "c"]
    assert acting("--without A") == ["c"]
    assert acting("--only A --without b") == ["a"]
    typed(desk, "%flexhook --complement A")
    assert acting() == ["c"]
    typed(desk, "%flexhook --disable *")
    assert acting(capture) == []
    typed(desk, "%flexhook --enable a c")
    assert acting() == ["a", "c"]
    assert "no hook 'Z' and no group of that name. Hooks: a, b, c. Groups: A." in failing(
        desk, f'%flexrun "{PROMPT}" --only a,Z'
    )
    assert "no hook 'Z'" in failing(desk, "%flexhook --enable Z")


def test_text_is_generated_and_shown_as_it_comes(desk):
    run = typed(desk, f'r = %flexrun "{PROMPT}" --generate 5 --capture model.layers.1.mlp\nr')
    assert run.steps == 5
    assert f"Generating 5/5: {run.text[0]}" in typed.said
    assert repr(run) in typed.said
    assert typed(desk, 'r.step(3)["model.layers.1.mlp"]').shape == (1, 1, 256)
    assert "step 3" in typed.said
    sampled = typed(
        desk, f'r = %flexrun "{PROMPT}" --generate 5 --sample --temperature 5 --top-k 0 --seed 1\nr'
    )
    assert sampled.ids != run.ids
    assert "with --generate N only" in failing(desk, f'%flexrun "{PROMPT}" --top-k 3')
    assert "one forward" in failing(desk, f'%flexrun "{PROMPT}" --generate 3 --backward logits.sum()')


def test_parts_are_left_out_and_runs_repeated(desk):
    plain = typed(desk, f'r = %flexrun "{PROMPT}"\nr')
    stopped = typed(desk, f'r = %flexrun "{PROMPT}" --capture model.layers.* --stop-at model.layers.1\nr')
    assert [s for s in stopped.sites if s.count(".") == 2] == [
        "model.layers.0:output",
        "model.layers.1:output",
    ]
    desk.user_ns["mean"] = torch.ones(256)
    line = "--skip model.layers.{0..1}.mlp model.layers.2 model.layers.3.mlp=mean"
    runs = typed(desk, f'r = %flexrun "{PROMPT}" --repeat 2 {line}\nr')
    assert [run.number for run in runs] == [stopped.number + 1, stopped.number + 2]
    assert not torch.equal(runs[0].logits.torch(), plain.logits.torch())
    assert torch.equal(runs[0].logits.torch(), runs[1].logits.torch())
    assert typed(desk, f'r = %flexrun "{PROMPT}" --no-grad\nr').sites == plain.sites
    assert typed(desk, f'r = %flexrun "{PROMPT}" --grad\nr').sites == plain.sites
    assert "1 or more" in failing(desk, f'%flexrun "{PROMPT}" --repeat 0')
    assert "--stop-at needs one forward" in failing(
        desk, f'%flexrun "{PROMPT}" --generate 2 --stop-at lm_head'
    )
    assert "NameError" in failing(desk, f'%flexrun "{PROMPT}" --skip lm_head=nothing')


def test_versions_files_and_the_source_brought_back(desk, tmp_path):
    typed(desk, "%%flexhook model.layers.0.mlp --name h --step 0\nx *= 2")
    typed(desk, "%%flexhook model.layers.0.mlp --name h --step 0\nx *= 3")
    typed(desk, "%flexhook --diff h")
    assert "-x *= 2" in typed.said.splitlines()
    assert "+x *= 3" in typed.said.splitlines()
    typed(desk, "%flexhook --edit h")
    assert desk.rl_next_input == "%%flexhook model.layers.0.mlp:output --name h --step 0\nx *= 3\n"
    typed(desk, desk.rl_next_input)
    assert typed(desk, "%flexhook").rows[0][1] == "v3"
    line = "/model.layers.[01].mlp/ model.layers.{2,3} --name 'my hook' --group 'a b' --token -2: --every 3"
    typed(desk, f"%%flexhook {line} --when \"index < 3 and 'a' != site\"\nx *= 3")
    made = desk._flexmagic_desk.session.hooks["my hook"].current
    typed(desk, "%flexhook --edit 'my hook'")
    typed(desk, desk.rl_next_input)
    again = desk._flexmagic_desk.session.hooks["my hook"].current
    assert again.source.version == 2
    assert (again.patterns, again.group) == (made.patterns, made.group)
    assert (again.source.text, again.source.limits) == (made.source.text, made.source.limits)
    path = tmp_path / "hooks.toml"
    typed(desk, f"%flexhook --export {path} h")
    assert str(path) in typed.said
    typed(desk, "%flexhook --remove *")
    assert typed(desk, f"%flexhook --import {path}").rows[0][:4] == (
        "h",
        "v1",
        "model.layers.0.mlp:output",
        "step 0",
    )
    path.write_bytes(b"\x80\x04\x95\x00")
    assert "it is binary. Hook files are text" in failing(desk, f"%flexhook --import {path}")


def test_errors_show_the_users_line_and_no_frame_of_ours(desk):
    said = failing(desk, "%%flexhook model.layers.0.mlp --name bad\nx *= 2\nx +")
    assert "line 3" in said
    assert "    x +" in said
    typed(desk, "%%flexhook model.layers.0.mlp --name bad\nx *= 2\nx += nope")
    said = failing(desk, f'%flexrun "{PROMPT}"')
    assert "line 3, on every rank" in said
    assert "x += nope" in said
    for word in ("Traceback", "site-packages", "session.py", "File "):
        assert word not in said


def test_options_that_are_wrong_are_one_sentence(desk):
    assert "%flexhook? for its options" in failing(desk, "%flexhook --nonsense")
    assert "no action 'frob'" in failing(desk, "%flexcluster frob")
    assert "invalid int" in failing(desk, "%flexcluster start -n two")
    assert "Give a prompt or --inputs" in failing(desk, "%flexrun")
    assert "takes no path" in failing(desk, "%%flexmodel some/path\nmodel = 1")
    assert "NameError" in failing(desk, "%flexrun --inputs unknown_name")


@pytest.mark.parametrize("magic", ["flexcluster", "flexmodel", "flexhook", "flexrun"])
def test_help_shows_options_and_an_example_before_anything_is_started(shell, magic):
    assert typed(shell, f"%{magic} -h") is None
    assert f"%{magic}" in typed.said
    assert "Example" in typed.said
    assert "options:" in typed.said or "optional arguments:" in typed.said


def test_prompts_in_all_their_quotes(desk):
    both = typed(desk, 'r = %flexrun "John\'s store" \'The "dog"\'\nr')
    assert "'" in "".join(both.tokens[0])
    assert "".join(both.tokens[1]).count('"') == 2
    assert "".join(typed(desk, "r = %flexrun John's store\nr").tokens[0]) == "".join(both.tokens[0])
    assert "double quotes" in failing(desk, '%flexrun "John')
    bare = typed(desk, "r = %flexrun The capital of France is\nr")
    quoted = typed(desk, 'r = %flexrun "The capital of France is"\nr')
    assert bare.ids == quoted.ids
    desk.user_ns["batch"] = [[1, 2, 3]]
    assert typed(desk, "r = %flexrun --inputs batch\nr").ids == [[1, 2, 3]]


def test_ordinary_python_around_the_magics(desk):
    """%%time, exec, a function, a loop and a one-line body."""
    assert typed(desk, f'%time r = get_ipython().run_line_magic("flexrun", \'"{PROMPT}"\')\nr').sites
    typed(
        desk,
        "def go(scale):\n"
        "    get_ipython().run_cell_magic('flexhook', 'model.layers.0.mlp --name h', f'x *= {scale}')\n"
        f"    return get_ipython().run_line_magic('flexrun', '\"{PROMPT}\"').logits.torch()\n"
        "results = [go(s) for s in (1, 2)]\n"
        "exec('again = go(2)')",
    )
    results, again = desk.user_ns["results"], desk.user_ns["again"]
    assert not torch.equal(*results)
    call = "get_ipython().run_line_magic('flexrun', '\"one two\" --capture {place}')"
    typed(desk, f"def look(place):\n    return {call}\nfound = look('model.layers.2')")
    assert "model.layers.2:output" in desk.user_ns["found"].sites
    assert torch.equal(results[1], again)


def test_hooks_see_what_px_defined_on_the_engines(desk, loaded):
    loaded._cluster.client[:].execute("strength = 0.25", block=True)
    typed(desk, "%%flexhook model.layers.0.mlp --name h\nx *= strength\nprint('used', strength)")
    typed(desk, f'r = %flexrun "{PROMPT}"\nr')
    assert typed.said.count("used 0.25") == 1


def test_what_hooks_print_is_shown_while_the_run_goes_on(desk, tmp_path):
    """The hook goes on only when its first words have been shown."""
    go = tmp_path / "go"
    body = (
        "import os, sys, time\nprint('begun', file=sys.stderr)\n"
        f"while not os.path.exists({str(go)!r}):\n    print(end=''); time.sleep(0.05)\nprint('done')"
    )
    typed(desk, f"%%flexhook model.layers.0.mlp --name slow\n{body}")
    running, lines = desk._flexmagic_desk.session._running, []
    show = running.printer

    def watch(text):
        lines.append(text)
        go.touch()

    running.printer = watch
    try:
        typed(desk, f'run = %flexrun "{PROMPT}"')
    finally:
        running.printer = show
    assert lines[0] == "begun"
    said = "\n".join(lines)
    assert said.count("begun") == said.count("done") == 1


def test_plain_cells_run_on_the_engines_until_they_are_asked_back(desk):
    typed(desk, "plain_cell = 1")
    typed(desk, "%flexcells engines")
    try:
        assert typed(desk, "plain_cell = 2\nmodel.training") is False
        assert typed(desk, "print('once')\nplain_cell") == 2  # the engines' own
        assert typed.said.count("once") == 1
        assert typed(desk, "rank * 10") == {0: 0, 1: 10}
        assert "line 2, on every rank" in failing(desk, "a = 1\nmissing + a")
        assert "ZeroDivisionError" in failing(desk, "1 / 0")
        assert len(typed(desk, "%flexhook").rows) == 0  # magics stay here
    finally:
        desk.run_cell("del plain_cell")  # on the engines, where other tests go on
        typed(desk, "%flexcells notebook")
    assert typed(desk, "plain_cell") == 1


def test_the_whole_traceback_is_there_when_asked_for(desk):
    typed(
        desk, "%%flexhook model.layers.0.mlp --name bad\ndef inner(x):\n    return x + missing\nx = inner(x)"
    )
    said = failing(desk, f'%flexrun "{PROMPT}"')
    assert "Traceback" not in said
    assert "    return x + missing\n               ^^^^^^^\n" in said
    typed(desk, "%flextb")
    assert "On rank 0, 1:\nTraceback (most recent call last):" in typed.said
    assert "in inner" in typed.said
    assert "In the notebook:" in typed.said


def test_ranks_that_print_different_things_are_told_apart(desk):
    typed(desk, "%%flexhook model.layers.0.mlp --name h\nprint('I am', rank)")
    typed(desk, f'r = %flexrun "{PROMPT}"')
    assert typed.said.splitlines()[:2] == ["[rank 0] I am 0", "[rank 1] I am 1"]


def test_a_loss_gives_gradients_at_the_named_sites(desk):
    site = "model.layers.*.mlp:grad_output"
    run = typed(desk, f'r = %flexrun "{PROMPT}" --backward "logits[:, -1, 5].sum()" --capture {site}\nr')
    assert run["model.layers.3.mlp:grad_output"].shape == (1, len(run.tokens[0]), 256)
    assert run.loss == pytest.approx(float(run.logits[0, -1, 5]))
    assert "give the run a loss" in failing(desk, f'%flexrun "{PROMPT}" --capture {site}')


def test_the_axes_of_the_mesh_are_options(desk, loaded):
    clear(loaded)
    typed(desk, f"%flexmodel {MODEL} --fsdp 2")
    assert "fsdp=2" in typed.said
    run = typed(desk, 'r = %flexrun "Tom gave a book to" "Mary and John went home"\nr')
    assert run.logits.shape[0] == 2
    assert "fsdp: Shard(dim=0)" in repr(run.logits)
    assert "for 4 ranks" in failing(desk, f"%flexmodel {MODEL} --tp 2 --dp 2")
    typed(
        desk,
        "%%flexmodel --dp 2\nimport torch\ntorch.manual_seed(0)\n"
        "assert mesh.mesh_dim_names == ('dp',)\nmodel = torch.nn.Linear(3, 2)",
    )
    desk.user_ns["x"] = torch.ones(5, 3)
    run = typed(desk, "r = %flexrun --inputs {'input':x}\nr")
    assert repr(run[":output"]).count("dp: Shard(dim=0)") == 1


def test_the_model_is_shown_as_a_tree_and_as_layouts(desk):
    tree = typed(desk, "%flexmodel")
    assert tree.columns == ("module", "class", "output", "layout")
    up = [row for row in tree.rows if row[0].strip() == "up_proj"]
    assert [row[3] for row in up] == ["tp: Shard(dim=2)"]  # one layer stands for all that are alike
    assert any(row[0].strip() == "0 … 3" for row in tree.rows)
    table = typed(desk, "%flexmodel --layout")
    assert len(table.rows) > 100
    assert all(row[3] for row in table.rows)
    assert "gathered" not in str(table)


def test_a_cell_that_builds_a_model(desk, loaded):
    clear(loaded)
    typed(
        desk,
        "%%flexmodel\n"
        "torch.manual_seed(0)\n"
        "from torch.nn import Linear, ReLU, Sequential\n"
        "model = Sequential(Linear(4, 8), ReLU(), Linear(8, 2)).to(device)\n"
        "assert mesh.size() == world_size == 2",
    )
    assert "Sequential" in typed.said
    desk.user_ns["batch"] = {"input": torch.randn(3, 4)}
    typed(desk, "%%flexhook 1 --name relu\nx[:, 0] = 5")
    run = typed(desk, "run = %flexrun --inputs batch --capture 0\nrun")
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    with torch.no_grad():
        hidden = model[1](model[0](desk.user_ns["batch"]["input"]))
        hidden[:, 0] = 5
        assert torch.allclose(run[":output"].torch(), model[2](hidden), atol=1e-6)
    said = failing(desk, "%%flexmodel\nmodel = None\nmodel.layers")
    assert "line 3, on every rank" in said
    assert "model.layers" in said
    typed(desk, "%flexmodel --unwrap")


def test_a_wrong_path_says_so_and_the_status_line_ends(desk):
    said = failing(desk, "%flexmodel /nowhere --tp 2")
    assert "not done" in said
    assert "config.json" in said


def test_loading_twice_and_reloading_change_nothing(shell):
    before = snapshot(shell)
    shell.run_line_magic("load_ext", "flexmagic")
    shell.run_line_magic("reload_ext", "flexmagic")
    assert snapshot(shell) == before


def test_a_start_from_the_magic_shows_progress_and_a_table(shell):
    with pytest.raises(ClusterError):
        typed(shell, "%flexcluster stop")
    table = typed(shell, "%flexcluster start -n 1")
    assert "1 up" in typed.said
    assert "1 engines are up" in typed.said or "1 engine is up" in typed.said
    assert len(table.rows) == 1
    typed(shell, f"%flexmodel {MODEL}")
    assert "LlamaForCausalLM" in typed.said
    run = typed(shell, f'r = %flexrun "{PROMPT}"\nr')
    assert run.logits.layout.replicated
    typed(shell, "%flexcluster stop")
    assert not shell._flexmagic_desk.has_session


def test_stopping_leaves_the_engines_of_another_notebook_alone(shell, loaded):
    typed(shell, f"%flexcluster attach {loaded.cluster_name}")
    assert typed(shell, "%flexmodel").columns[0] == "module"  # the model that was loaded there
    typed(shell, "%flexcluster stop")
    assert "still run" in typed.said
    assert "--force" in typed.said
    assert loaded.run(PROMPT).sites


def test_an_input_error_is_not_a_traceback(desk):
    with pytest.raises(InputError):
        typed(desk, '%flexrun ""')
    assert "InputError: The prompt is empty" in typed.said


def test_weights_are_edited_in_a_cell_and_put_back(desk, loaded):
    name = "model.layers.1.mlp.down_proj.weight"
    before = loaded.model.parameter(name)
    made = typed(desk, f"%%flexweights {name}\nx[:, 300] = 0")
    assert made.names == (name,)
    assert not loaded.model.parameter(name)[:, 300].any()
    assert name in str(typed(desk, "%flexweights"))
    assert "No parameter is edited" in str(typed(desk, "%flexweights --undo"))
    assert torch.equal(loaded.model.parameter(name), before)
    assert "x[999, 999] = 0" in failing(desk, f"%%flexweights {name}\nx[999, 999] = 0")
    assert "no edit to undo" in failing(desk, "%flexweights --undo")
    assert "An edit is a cell" in failing(desk, f"%flexweights {name}")
    assert "blocks.*.attn.pattern" in str(typed(desk, "%flexmodel --names"))


def test_one_prompt_without_and_with_a_hook_is_compared(desk):
    typed(desk, "%%flexhook model.layers.1.mlp --name damp\nx[:, -1] *= 0.5")
    found = typed(desk, f'%flexcompare "{PROMPT}" --hook damp --capture model.layers.*.mlp')
    rows = {row.site: row for row in found}
    assert rows["model.layers.0.mlp:output"].texts[-1] == "bit-equal"
    one = found["model.layers.1.mlp:output"]
    assert (one.b.numpy()[:, -1] == one.a.numpy()[:, -1] * 0.5).all()
    assert abs(one.a.numpy()[:, -1]).max() > 0
    assert rows["model.layers.1.mlp:output"].change.same >= one.a.numpy()[:, :-1].size
    typed(desk, f'a = %flexrun "{PROMPT}"')
    typed(desk, f'b = %flexrun "{PROMPT}" --seed 3')
    assert {row.texts[-1] for row in typed(desk, "%flexcompare a b")} == {"bit-equal"}
    assert "Name two runs" in failing(desk, "%flexcompare a")


def test_panels_work_on_the_session(desk, loaded):
    hooks = typed(desk, "%%flexhook model.layers.1.mlp --name damp\nx[:, -1] *= 0.5") and typed(
        desk, "%flexpanel hooks"
    )
    hooks.source.value = "x[:, -1] *= 0"
    apply, undo, *_ = hooks.children[-2].children
    apply.click()
    assert "damp v2 is on all 2 ranks" in hooks.said.text
    assert loaded.run(PROMPT)["model.layers.1.mlp"].numpy()[:, -1].max() == 0
    hooks.source.value = "x[:, -1] *="
    apply.click()
    assert "Nothing was sent. line 1" in hooks.said.text
    hooks.source.value = "x[:, 10_000] += 1"
    apply.click()
    failing(desk, f'%flexrun "{PROMPT}"')
    hooks.children[-2].children[-1].click()
    assert "last error: rank 0, model.layers.1.mlp:output, line 1: IndexError" in hooks.failed.value
    undo.click()
    loaded.run(PROMPT)
    assert loaded.hooks["damp"].last_error == ""
    undo.click()
    assert loaded.hooks["damp"].version == 1
    hooks.on.value = False
    assert not loaded.hooks["damp"].enabled
    model = typed(desk, "%flexpanel model")
    model.search.value = "layers.2.mlp:output"
    ((text, site),) = model.sites.options
    assert site == "model.layers.2.mlp:output"
    assert "256" in text
    model.sites.value = site
    assert model.cell.value.startswith("%%flexhook model.layers.2.mlp:output --name look")
    model.cell.value += "x *= 0"
    model.children[-2].children[1].click()
    assert "look v1" in model.sites.options[0][0]
    assert not loaded.run(PROMPT)["model.layers.2.mlp"].numpy().any()
    cluster = typed(desk, "%flexpanel cluster")
    assert cluster.table.value.count("idle") == 2
    assert "There is no" in failing(desk, "%flexpanel sites") or "no panel" in typed.said
