"""Panels on a session that is not there: what they show, check and refuse; nothing runs of what they show."""

from types import SimpleNamespace

import pytest

from flexmagic.errors import ClusterError, HookError
from flexmagic.view.panels import ClusterPanel, HooksPanel, ModelPanel, syntax_of

HOSTILE = "</script><img src=x onerror=alert(1)>\u202e"


class Hooks(list):
    sent = ()

    def register(self, _model, sites, code, **options):
        if "refuse" in code:
            raise HookError(f"rank 1 does not compile it {HOSTILE}")
        self.sent = (sites, code, options)
        return SimpleNamespace(name=options["name"], version=2)


def hook(name="damp", text="x *= 0.5"):
    source = SimpleNamespace(text=text, local=True, limits="limits")
    current = SimpleNamespace(source=source, patterns=())
    return SimpleNamespace(
        name=name,
        version=1,
        last_error=f"rank 0, m, line 1: ValueError: {HOSTILE}",
        state="enabled",
        enabled=True,
        sites=["m.*"],
        group="A",
        current=current,
    )


@pytest.mark.parametrize(
    ("code", "wrong"),
    [
        ("", ""),
        ("x *= 2\nreturn x", ""),
        ("if step:\n    x += 1", ""),
        ("x *=", "line 1: invalid syntax"),
        ("x = 1\ny = (", "line 2: '(' was never closed"),
    ],
)
def test_the_syntax_of_a_body_is_checked_by_its_own_lines(code, wrong):
    assert syntax_of(code) == wrong


def test_an_edit_keeps_what_else_the_hook_is_and_wrong_ones_are_not_sent():
    session = SimpleNamespace(hooks=Hooks([hook()]), model=None, world_size=4)
    panel = HooksPanel(session)
    assert panel.source.value == "x *= 0.5"
    assert "last error: rank 0, m, line 1: ValueError: &lt;/script&gt;" in panel.failed.value
    apply = panel.children[-2].children[0]
    panel.source.value = "x *="
    assert "invalid syntax" in panel.syntax.value
    apply.click()
    assert session.hooks.sent == ()
    panel.source.value = "x *= 3"
    assert panel.syntax.value == ""
    apply.click()
    sites, code, options = session.hooks.sent
    assert (sites, code) == (["m.*"], "x *= 3")
    assert options == {"name": "damp", "local": True, "limits": "limits", "group": "A", "first_line": 1}
    assert "damp v2 is on all 4 ranks" in panel.said.text
    panel.source.value = "refuse"
    apply.click()
    assert "HookError: rank 1 does not compile it </script><img" in panel.said.text
    assert "\u202e" not in panel.said.text


def test_switching_is_the_hooks_own_switch():
    one = hook()
    panel = HooksPanel(SimpleNamespace(hooks=Hooks([one]), model=None, world_size=2))
    panel.on.value = False
    assert one.enabled is False


def test_no_hooks_and_a_dead_cluster_are_sentences():
    panel = HooksPanel(SimpleNamespace(hooks=Hooks(), model=None, world_size=2))
    assert "There are no hooks yet." in panel.said.text

    def gone():
        raise ClusterError("the controller has ended. Type %flexcluster start -n 2.")

    cluster = ClusterPanel(SimpleNamespace(status=gone))
    assert "ClusterError: the controller has ended." in cluster.said.text


def test_the_cluster_is_read_recovered_and_cancelled():
    done = []
    table = SimpleNamespace(_repr_html_=lambda: f"<table>{len(done)}</table>")
    session = SimpleNamespace(
        status=lambda: table,
        cancel=lambda: done.append("cancel"),
        recover=lambda say: done.append(say) or "Mended.",
    )
    panel = ClusterPanel(session)
    refresh, recover, cancel = panel.children[1].children
    assert panel.table.value == "<table>0</table>"
    cancel.click()
    refresh.click()
    assert panel.table.value == "<table>1</table>"
    recover.click()
    assert "Mended." in panel.said.text
    assert panel.table.value == "<table>2</table>"


class Rules:
    surveyed = True

    def __init__(self, count):
        rule = SimpleNamespace(
            refused="", describe=lambda: "[seq, 256] tp: Replicate", how="equal on all ranks"
        )
        self.rules = {f"m.{n}:output": rule for n in range(count)}
        self.rules[f"{HOSTILE}:output"] = SimpleNamespace(refused=f"no {HOSTILE}", describe=str, how="")

    def standing_for(self, pattern):
        return [(pattern, None)]

    def __str__(self):
        return HOSTILE


def test_thousands_of_sites_are_searched_and_hostile_names_shown_as_they_are():
    panel = ModelPanel(SimpleNamespace(hooks=Hooks([hook()]), model=Rules(3000), world_size=2))
    assert len(panel.sites.options) == 500
    assert "3,001 sites" in panel.about.value
    panel.search.value = "m.2999"
    ((text, site),) = panel.sites.options
    assert "tp: Replicate" in text
    panel.sites.value = site
    assert "equal on all ranks" in panel.about.value
    panel.search.value = "refused"
    panel.sites.value = panel.sites.options[0][1]
    assert "<img" not in panel.about.value + panel.title.value
    assert "\u202e" not in panel.about.value + panel.title.value + panel.sites.options[0][0]
