"""What code on engines prints, logs, draws and displays, as the notebook shows it."""

import pytest
from IPython.utils.capture import capture_output

from .test_magics import desk, shell, typed  # noqa: F401 - fixtures

pytestmark = pytest.mark.engines

HTML = "from IPython.display import HTML, display\nprint('before')\ndisplay(HTML({html}))\nprint('after')\n"
BAR = """
from tqdm.auto import tqdm
for n in tqdm(range(2000), desc="of the hook"): pass
"""


def shown(shell, cell):  # noqa: F811
    """What a cell prints, and what it displays: the text, and bundles by MIME type."""
    with capture_output() as said:
        shell.run_cell(cell).raise_error()
    return said.stdout, [output.data for output in said.outputs]


def test_what_a_hook_displays_is_displayed_here_once(desk):  # noqa: F811
    typed(desk, "%%flexhook model.layers.0.mlp --name h\n" + HTML.format(html="f'<b>{x.shape[-1]}</b>'"))
    text, displayed = shown(desk, "run = %flexrun 'Paris is'")
    assert text == "before\nafter\n"
    assert [data["text/html"] for data in displayed] == ["<b>256</b>"]


def test_what_ranks_display_differently_is_labelled_and_said(desk):  # noqa: F811
    typed(desk, "%%flexhook model.layers.0.mlp --name h\n" + HTML.format(html="f'<b>{rank}</b>'"))
    text, displayed = shown(desk, "run = %flexrun 'Paris is'")
    labels = ["before", "[rank 0]", "[rank 0] after", "[rank 1]", "[rank 1] after"]
    assert text.splitlines()[:-1] == labels
    assert [data["text/html"] for data in displayed] == ["<b>0</b>", "<b>1</b>"]
    assert "hook 'h' printed different things on the ranks at model.layers.0.mlp:output" in text
    assert "printed different things" in desk.user_ns["run"].warnings[0]


def test_figures_that_are_left_open_are_displayed_at_the_end(desk):  # noqa: F811
    pytest.importorskip("matplotlib")
    text, displayed = shown(desk, "%%flexcells\nimport matplotlib.pyplot as plt\nplt.plot([1, 2]);")
    assert not text
    assert [data["image/png"][:5] for data in displayed] == ["iVBOR"]


def test_a_cell_on_the_engines_displays_here(desk):  # noqa: F811
    text, displayed = shown(desk, "%%flexcells\n" + HTML.format(html="'<i>all</i>'"))
    assert text == "before\nafter\n"
    assert [data["text/html"] for data in displayed] == ["<i>all</i>"]


def test_bars_of_all_ranks_are_one_that_has_come_to_its_end(desk):  # noqa: F811
    typed(desk, "%%flexhook model.layers.0.mlp --name h" + BAR)
    text, _ = shown(desk, "run = %flexrun 'Paris is'")
    lines = text.splitlines()
    assert len(lines) == 1, text
    assert lines[0].startswith("of the hook: 100%|")
    assert "2000/2000 [" in lines[0]
    assert not desk.user_ns["run"].warnings


def test_what_handlers_of_logging_write_that_the_user_made_is_shown(desk, loaded):  # noqa: F811
    made = (
        "import logging, sys\nlogger = logging.getLogger('mine')\nlogger.addHandler(logging.StreamHandler())"
    )
    loaded._cluster.client[:].execute(made, block=True)
    typed(desk, "%%flexhook model.layers.0.mlp --name h\nlogger.warning('width %s', x.shape[-1])")
    try:
        assert shown(desk, "run = %flexrun 'Paris is'")[0] == "width 256\n"
    finally:
        loaded._cluster.client[:].execute("logger.handlers.clear()", block=True)


def test_captures_near_their_budget_are_told_of(desk, loaded):  # noqa: F811
    held = loaded.run("Paris is", capture="model.layers.*")._answers[0].reply.room.held
    loaded.limit(captures=int(held * 1.1))
    try:
        assert "%flexcluster limit --captures" in shown(desk, "run = %flexrun 'Paris is'")[0]
    finally:
        loaded.limit(captures=2 << 30)


def test_what_hooks_warn_of_is_shown_once(desk):  # noqa: F811
    typed(desk, "%%flexhook model.layers.0.mlp --name h\nimport warnings; warnings.warn('careful')")
    text, _ = shown(desk, "run = %flexrun 'Paris is'")
    assert text.count("UserWarning: careful") == 1


def test_a_slow_hook_is_told_of(desk):  # noqa: F811
    typed(desk, "%%flexhook model.layers.0.mlp --name h\nimport time; time.sleep(1.2)")
    assert "hook 'h' was slow: its code took 1." in shown(desk, "run = %flexrun 'Paris is'")[0]


def test_what_a_cell_prints_that_builds_a_model_is_shown(desk, loaded):  # noqa: F811
    cell = "print('building')\nmodel = torch.nn.Linear(2, 2)"
    assert "building\n" in shown(desk, f"%%flexmodel\n{cell}")[0]
