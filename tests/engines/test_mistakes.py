"""What typical mistakes look like on screen, word for word: `mistakes.txt` is what a user reads.

After a change on purpose: ``MISTAKES=write pytest tests/engines/test_mistakes.py`` writes it anew.
"""

import os
import re
from pathlib import Path

import pytest
from IPython.utils.capture import capture_output

from .test_magics import desk, shell  # noqa: F401 - fixtures

pytestmark = pytest.mark.engines
GOLDEN = Path(__file__).with_name("mistakes.txt")
MOST_LINES = 25

BEFORE_THE_START = {
    "run before the start": ["%flexrun 'The capital of France is'"],
    "hook before the start": ["%%flexhook model.layers.0.mlp\nx *= 2"],
    "model before the start": ["%flexmodel model --tp 2"],
    "a magic that is not there": ["%flexrum 'The capital of France is'"],
    "a cell magic that is not there": ["%%flexhok model.layers.0.mlp\nx *= 2"],
}
"""Mistakes in a notebook without a cluster."""

MISTAKES = {
    "a module that is not there": ["%%flexhook model.layers.*.mpl --name damp\nx *= 0.5"],
    "a layer beyond the last": ["%%flexhook model.layers.{2..9}.mlp\nx *= 0.5"],
    "a port that is not there": ["%%flexhook model.layers.0.mlp:outputs\nx *= 0.5"],
    "an option that is not there": ["%%flexhook model.layers.0.mlp --nmae damp\nx *= 0.5"],
    "an option without its value": ["%%flexhook model.layers.0.mlp --name\nx *= 0.5"],
    "an open brace": ["%%flexhook model.layers.{0,1.mlp\nx *= 0.5"],
    "one percent sign for two": ["%flexhook model.layers.0.mlp\nx *= 0.5"],
    "no site": ["%%flexhook --name damp\nx *= 0.5"],
    "missing indentation": ["%%flexhook model.layers.0.mlp\nfor i in range(3):\nx *= i"],
    "a bracket left open": ["%%flexhook model.layers.0.mlp\nx[:, -1 *= 0.5"],
    "an unknown name in a hook": [
        "%%flexhook model.layers.0.mlp --name damp\nx *= strenght",
        "%flexrun 'Paris'",
    ],
    "a notebook's variable in a hook": [
        "factor = 2",
        "%%flexhook model.layers.0.mlp --name damp\nx *= factor",
        "%flexrun 'Paris'",
    ],
    "a wrong shape": ["%%flexhook model.layers.0.mlp --name cut\nx = x[..., :7]", "%flexrun 'Paris is'"],
    "a wrong dtype": ["%%flexhook model.layers.0.mlp --name half\nx = x.half()", "%flexrun 'Paris is'"],
    "no tensor comes back": ["%%flexhook model.layers.0.mlp --name wrong\nx = 'text'", "%flexrun 'Paris is'"],
    "one rank does something else": [
        "%%flexhook model.layers.0.mlp --name branch\nif rank == 0: x *= 2",
        "%flexrun 'Paris is'",
    ],
    "an index beyond the end": [
        "%%flexhook model.layers.0.mlp --name far\nx[:, 99] = 0",
        "%flexrun 'Paris is'",
    ],
    "a failure deep in a library": [
        "%%flexhook model.layers.0.mlp --name deep\nimport torch\nx = torch.nn.functional.linear(x, x)",
        "%flexrun 'Paris is'",
    ],
    "missing quotes": ["%flexrun The capital --captre model.norm"],
    "an open quote": ['%flexrun "The capital'],
    "an empty prompt": ["%flexrun"],
    "ids outside the vocabulary": ["%flexrun --inputs [[99999999]]"],
    "a hook that is not there": ["%flexhook --disable dmap"],
    "a site that was not captured": ["run = %flexrun 'Paris is'", "run['model.layers.0.mlp']"],
    "a loss that is no number": ["%flexrun 'Paris is' --backward logits"],
    "a loss with a typing error": ["%flexrun 'Paris is' --backward logit.sum()"],
    "steps without a generation": ["%flexrun 'Paris is' --temperature 0.5"],
    "a folder that holds no model": ["%flexmodel /nowhere/model --tp 2"],
    "a split that does not fit": ["%flexmodel {model} --tp 3"],
    "a second start": ["%flexcluster start -n 2"],
    "an action that is not there": ["%flexcluster begin"],
    "a trace that reads backwards": [
        "%%flextrace 'Paris is'\nlate = model.layers[2].output\nearly = model.layers[0].output"
    ],
    "a name that a trace has already": [
        "found = 3",
        "%%flextrace 'Paris is' --given model=found\nsave.late = model.layers[2].output",
    ],
    "a variable that the notebook has not": ["%flexrun --inputs batch"],
    "engines that are no number": ["%flexcluster start -n two"],
    "a setting of another magic": ["%flexmodel {model} --tp 2 --capture model.norm"],
    "letters that look alike": ["%%flexhook model.lаyers.0.mlp --name cyrillic\nx *= 2"],  # noqa: RUF001
    "quotes of a word processor": ["%%flexhook model.layers.0.mlp --name quotes\nctx[“a”] = 1"],
}
"""Cells by what is wrong with the last one."""

BEFORE_THE_MODEL = {
    "run before the model": ["%flexrun 'Paris is'"],
    "hook before the model": ["%%flexhook model.layers.0.mlp\nx *= 2"],
    "a trace before the model": ["%%flextrace 'Paris is'\nmodel.layers[0].output[:] = 0"],
}
"""Mistakes at a cluster that has no model."""

RIGHT = {
    "line ends of Windows": "%%flexhook model.layers.0.mlp --name crlf\r\nx *= 2\r\nx += 1",
    "only comments": "%%flexhook model.layers.0.mlp --name comments\n# nothing yet",
    "letters of all languages": "%%flexhook model.layers.0.mlp --name größe\nfaktor_ü = 2\nx *= faktor_ü",
}
"""What looks like a mistake and is none."""


def shown(shell, cells):  # noqa: F811
    """What the notebook shows for the last cell."""
    for cell in cells:
        with capture_output() as said:
            result = shell.run_cell(cell)
    assert not result.success, cells
    text = re.sub(r"\x1b\[[0-9;]*m", "", said.stdout + said.stderr).strip()
    text = re.sub(r"(?m)^Running: not done .*\n", "", text)  # said of what took more than a second
    text = re.sub(r"\(\d+\.\d s\)", "(0.1 s)", text)
    return re.sub(r"flexmagic-[0-9a-f]{6}", "flexmagic-1a2b3c", text)


def golden():
    text = GOLDEN.read_text(encoding="utf-8")
    return dict(part.split("\n", 1) for part in text.split("=== ")[1:])


def compare(told):
    """Compare with the file, or write it."""
    if os.environ.get("MISTAKES") == "write":
        known = golden() if GOLDEN.exists() else {}
        known |= {name: f"{text}\n\n" for name, text in told.items()}
        order = [*BEFORE_THE_START, *BEFORE_THE_MODEL, *MISTAKES]
        GOLDEN.write_text("".join(f"=== {n}\n{known[n]}" for n in order if n in known), encoding="utf-8")
    known = golden()
    for name, text in told.items():
        assert text == known[name].strip(), name


def check(name, text, cells):
    lines = text.splitlines()
    assert len(lines) <= MOST_LINES, name
    assert not re.search(r"flexmagic/\w+|site-packages|Traceback|File \"", text), name
    words = set(re.findall(r"[\w.*{}\[\]]{3,}", " ".join(cells)))
    assert words & set(re.findall(r"[\w.*{}\[\]]{3,}", text)), f"{name}: nothing of what the user typed"


def test_mistakes_before_the_start(shell):  # noqa: F811
    told = {name: shown(shell, cells) for name, cells in BEFORE_THE_START.items()}
    for name, text in told.items():
        check(name, text, BEFORE_THE_START[name])
    compare(told)


def test_mistakes(desk, loaded):  # noqa: F811
    told = {}
    for name, typed in MISTAKES.items():
        cells = [cell.replace("{model}", str(loaded.model._first.source)) for cell in typed]
        told[name] = shown(desk, cells).replace(str(loaded.model._first.source), "MODEL")
        check(name, told[name], cells)
        for hook in list(loaded.hooks):
            hook.remove()
    compare(told)


def test_mistakes_before_the_model(desk, loaded):  # noqa: F811
    loaded.model.unwrap()
    told = {name: shown(desk, cells) for name, cells in BEFORE_THE_MODEL.items()}
    for name, text in told.items():
        check(name, text, BEFORE_THE_MODEL[name])
    compare(told)


@pytest.mark.parametrize("name", RIGHT)
def test_what_looks_like_a_mistake_and_is_none(name, desk, loaded):  # noqa: F811
    result = desk.run_cell(RIGHT[name])
    result.raise_error()
    assert loaded.run("Paris is").sites
