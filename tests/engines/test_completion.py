"""Completing and pointing at names while engines hold a model, as a kernel asks for it."""

from types import SimpleNamespace

import pytest
from IPython.core.completer import provisionalcompleter

from flexmagic.engine.watch import MEETING, USER
from flexmagic.magics.inspection import Inspection

from .conftest import PROMPT
from .test_control import held, looked  # noqa: F401 - a fixture
from .test_magics import desk, shell, typed  # noqa: F401 - fixtures

pytestmark = pytest.mark.engines


def offered(shell, text):  # noqa: F811
    """What IPython offers at the ``|``."""
    at = text.index("|")
    with provisionalcompleter():
        return [c.text for c in shell.Completer.completions(text.replace("|", ""), at)]


def test_names_are_offered_and_nothing_else(desk, loaded):  # noqa: F811
    loaded._cluster.client[:].execute("of_the_engines = 'text'", block=True)
    typed(desk, "%%flexhook model.norm --name damp --group Alpha\nctx['saved'] = 1")
    typed(desk, "%%flexhook lm_head --name other")
    typed(desk, "%%flexloss gap\nlogits.sum()")
    typed(desk, f'run = %flexrun "{PROMPT}"')
    for text, some, none in [
        ("%%flexhook model.la|", {"model.layers"}, {"model.norm"}),
        ("%%flexhook model.layers.|\nx *= 2", {"model.layers.*", "model.layers.0"}, set()),
        ("%%flexhook model.layers.*.ml|", {"model.layers.*.mlp"}, {"model.layers.0.mlp"}),
        ("%%flexhook model.norm:in|", {"model.norm:input[0]"}, {"model.norm:output"}),
        ("run = %flexrun 'text' --capture model.n|", {"model.norm"}, set()),
        ("%flexrun 'text' --st|", {"--stop-at"}, {"--seed"}),
        ("%flexhook --disable da|", {"damp"}, {"other"}),
        ("%flexhook --group A|", {"Alpha"}, set()),
        ("%%flexweights model.norm.we|", {"model.norm.weight"}, set()),
        ("%flexcluster st|", {"start", "status", "stop"}, {"attach"}),
        ("%flexcluster attach |", {loaded.cluster_name, "default"}, {"attach"}),
        ("%flexrun 'text' --backward ga|", {"gap"}, {"damp"}),
        ("%%flexhook model.layers.0.mlp --name q\nx.me|", {"mean", "median"}, {"abs"}),
        ("%%flexhook model.layers.0.mlp --name q\ny = module.down|", {"down_proj"}, {"up_proj"}),
        ("%%flexhook model.layers.*.mlp\nmodule.down_proj.wei|", {"weight"}, set()),
        ('%%flexhook model.norm\nctx["sav|', {'"saved"]'}, set()),
        ("%%flexhook model.norm\nof_the_engines.up|", {"upper"}, set()),
        ('run["model.no|', {"model.norm"}, set()),
    ]:
        found = set(offered(desk, text))
        assert some <= found, text
        assert not none & found, text


def test_members_are_told_while_a_run_is_going_on(held, session):  # noqa: F811
    looked(held, [MEETING, USER])
    assert "down_proj" in session.known.members("model.layers.0.mlp", ["module"])


def test_without_a_cluster_options_are_offered_and_names_are_not(shell):  # noqa: F811
    assert "--capture" in offered(shell, "%flexrun --ca|")
    assert not [text for text in offered(shell, "%%flexhook model.la|") if "layers" in text]


class Kernel:
    """The one method of a kernel that is asked."""

    def do_inspect(self, code, cursor_pos, **options):
        return {"found": False, "code": code, "at": cursor_pos, **options}


def test_pointing_at_a_site_tells_what_is_known_of_it(desk):  # noqa: F811
    typed(desk, "%%flexhook model.layers.0.mlp --name damp\nx *= 0.5")
    kernel = Kernel()
    inspection = Inspection(SimpleNamespace(kernel=kernel), desk._flexmagic_desk)
    inspection.add()
    told = kernel.do_inspect("%%flexhook model.layers.0.mlp", 20)
    text = told["data"]["text/plain"]
    assert told["found"]
    assert text.startswith("model.layers.0.mlp: LlamaMLP")
    assert ":output [batch, seq, hidden" in text
    assert "model.layers.0.mlp.down_proj.weight [" in text
    assert "hook 'damp' v1, enabled" in text
    several = kernel.do_inspect('run["model.layers.*.mlp"]', 12)["data"]["text/plain"]
    assert several.startswith("model.layers.*.mlp: 4 modules, of which the first is model.layers.0.mlp")
    assert kernel.do_inspect("%%flexhook model.nowhere", 18, detail_level=1)["detail_level"] == 1
    inspection.remove()
    assert "do_inspect" not in vars(kernel)
