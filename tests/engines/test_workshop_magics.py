"""A workshop as it is typed: the owner opens it in one notebook, and a guest joins in another."""

import numpy as np
import pytest
from IPython.core.interactiveshell import InteractiveShell
from IPython.utils.capture import capture_output

from flexmagic import ClusterError, HookError, InputError

from .conftest import PROMPT, relative

pytestmark = [pytest.mark.engines, pytest.mark.timeout(240)]


@pytest.fixture
def shells(loaded):
    """An owner's shell at the shared session, and a guest's with nothing."""
    made = [InteractiveShell(), InteractiveShell()]
    before = [sorted(shell.magics_manager.magics["line"]) for shell in made]
    for shell in made:
        shell.run_line_magic("load_ext", "flexmagic")
    made[0]._flexmagic_desk.take(loaded)
    yield made
    made[0]._flexmagic_desk._session = None  # the engines are the other tests' too
    for shell, magics in zip(made, before, strict=True):
        shell.run_line_magic("unload_ext", "flexmagic")
        assert sorted(shell.magics_manager.magics["line"]) == magics


def typed(shell, cell):
    with capture_output() as said:
        result = shell.run_cell(cell)
    typed.said = said.stdout
    result.raise_error()
    return result.result


def test_a_workshop_as_it_is_typed(shells, loaded, tmp_path):
    owner, guest = shells
    typed(owner, f'%flexworkshop open --guests 3 --limits "runs=100" --log {tmp_path}/log.jsonl')
    line = next(line for line in typed.said.splitlines() if line.startswith("%flexcluster join"))
    assert "runs=100" in typed.said
    typed(guest, f"{line} --as ann")
    assert "To come back to this place: %flexcluster join 127.0.0.1:" in typed.said
    plain = typed(guest, f'%flexrun "{PROMPT}"').logits.numpy()
    typed(guest, '%flexhook model.layers.1.mlp --do "scale 0.25" --token -1 --name damp')
    run = typed(guest, f'run = %flexrun "{PROMPT}" --capture model.layers.*.mlp\nrun')
    typed(owner, '%flexhook model.layers.1.mlp --do "scale 0.25" --token -1 --name damp')
    owners = typed(owner, f'%flexrun "{PROMPT}" --capture model.layers.*.mlp')
    loaded.hooks["damp"].remove()
    assert relative(run.logits.numpy(), plain) > 1e-3
    assert np.array_equal(run.logits.numpy(), owners.logits.numpy())
    assert "after damp v1" in repr(run["model.layers.1.mlp"])
    typed(guest, "run['model.layers.1.mlp']")
    assert "model.layers.1.mlp" in typed.said, "a terminal shows it as text"
    assert "damp" in str(typed(guest, "%flexhook"))
    typed(guest, "%flexhook model.layers.2 --do \"patch run['model.layers.1.mlp']\" --name put")
    patched = typed(guest, f'%flexrun "{PROMPT}" --capture model.layers.2')["model.layers.2"].numpy()
    assert np.array_equal(patched, run["model.layers.1.mlp"].numpy())
    assert guest.complete("%flexhook model.lay")[1]
    said = str(typed(owner, "%flexworkshop"))
    assert "ann" in said
    for cell in (
        "%%px\n1",
        "%flexmodel somewhere",
        "%flexcluster recover",
        "%flexpanel",
        "%%flextrace 'x'\nx",
    ):
        with pytest.raises(ClusterError, match="owner's"):
            typed(guest, cell)
    with pytest.raises(ClusterError, match="guest yourself"):
        typed(guest, "%flexworkshop open")
    with pytest.raises(InputError, match="not both"):
        typed(guest, "%%flexhook model.layers.1 --do zero\nx *= 2")
    typed(owner, '%flexhook model.layers.1.mlp --do "scale 0.25" --token -1 --name half')
    typed(owner, "%flexworkshop send half")
    loaded.hooks["half"].remove()
    assert "after their next cell" in typed.said
    hooks = str(typed(guest, "%flexhook"))
    assert "%flexworkshop take half" in typed.said, "said once, after the next cell"
    assert "half" not in hooks, "nothing is registered by itself"
    assert "%flexworkshop take half" in str(typed(guest, "%flexworkshop"))
    assert typed.said.count("%flexworkshop take half") == 1, "in the table, and not once more"
    typed(guest, "%flexworkshop take half")
    cell = guest.rl_next_input
    assert cell == "%flexhook model.layers.1.mlp:output --name half --token=-1 --do 'scale 0.25'"
    typed(guest, cell)
    assert "half" in str(typed(guest, "%flexhook"))
    typed(owner, "%%flexworkshop send\n%%flexhook model.layers.{1..2} --name twice\nx *= 2")
    typed(guest, "%flexworkshop take twice")
    assert guest.rl_next_input == "%%flexhook model.layers.{1..2} --name twice\nx *= 2"
    typed(owner, f'mine = %flexrun "{PROMPT}" --capture model.layers.2.mlp')
    typed(owner, '%flexworkshop show mine["model.layers.2.mlp"]')
    view = typed(guest, "seen = %flexworkshop view\nseen.numpy()")
    assert np.array_equal(view, owner.user_ns["mine"]["model.layers.2.mlp"].numpy())
    found = typed(owner, "%flexworkshop collect model.layers.2 max")
    assert found.values == {"ann": patched.max()}
    assert "sent by the owner" in str(typed(guest, "%flexcluster"))
    for shell, cell, match in (
        (owner, "%flexworkshop send", "Send which hook"),
        (owner, "%flexworkshop show", "Show what"),
        (owner, "%flexworkshop collect", "Collect what"),
        (owner, "%%flexworkshop pause\nx", "A cell is what is sent"),
        (owner, "%flexworkshop take half", "no action 'take'"),
        (guest, "%flexworkshop dance", "no action 'dance'"),
        (guest, "%flexworkshop view x", "View which"),
    ):
        with pytest.raises(InputError, match=match):
            typed(shell, cell)
    with pytest.raises(HookError, match="Offered: half, twice"):
        typed(guest, "%flexworkshop take other")
    with pytest.raises(ClusterError, match="pause is the owner's"):
        typed(guest, "%flexworkshop pause")
    typed(guest, "%flexcluster stop")
    typed(owner, "%flexworkshop close")
    with pytest.raises(ClusterError, match="No workshop is open"):
        typed(owner, "%flexworkshop pause")
