"""Colours where no JupyterLab gives them: VS Code's own, those of a bare page, and their change."""

import base64
import json
from pathlib import Path

import lab
import numpy as np
import pytest
from selenium.webdriver.common.keys import Keys

from flexmagic.view.arrays import ArraySource, info_of
from flexmagic.view.pieces import split
from flexmagic.view.said import Said
from flexmagic.view.widget import TensorView

CODE = {
    "dark": ("#d4d4d4", "#1e1e1e", "#007fd4"),
    "light": ("#333333", "#ffffff", "#0090f1"),
}
"""Foreground, background and focus of VS Code's default themes."""
PAGE = """<!doctype html><meta charset="utf-8"><style>{css}</style>
<body class="vscode-{kind}"><div id="here" style="width:900px"></div>
<div class="flexmagic-panel"><label>Search</label><input type="text" value="mlp">
<select size="2"><option>model.layers.0.mlp:output</option></select><textarea>x *= 2</textarea>
<button>Apply</button><div class="widget-html-content"><table><thead><tr><th>rank</th></tr></thead>
<tbody><tr><td>0</td></tr></tbody></table><code>last error: none</code></div>
<div class="fxm-said fxm-said-something">Nothing was sent.</div></div>
<script type="module">
{esm}
const bytes = (text) => new DataView(Uint8Array.from(atob(text), (c) => c.charCodeAt(0)).buffer);
const answers = {answers}, heard = [];
const model = {{
  get: () => "", on: (_, f) => heard.push(f), off: () => {{}},
  send: (question) => setTimeout(() => {{
    const answer = answers[question.kind];
    if (!answer) return;
    const content = {{ ...answer.content, view: question.view, id: question.id, asked: question.kind }};
    for (const f of heard) f(content, answer.buffers.map(bytes));
  }}, 0),
}};
render({{ model, el: document.getElementById("here") }});
</script>"""


def answers():
    """What Python says to a view of a tensor with a warning, and to its table."""
    x = np.random.default_rng(0).normal(size=(6, 40)).astype(np.float32)
    x[1, 2] = np.nan
    tokens = ["When", " Mary", "</script>", "and", " John", "went"]
    info = info_of(
        x, site="model.layers.3.mlp:output", dims=("seq", "hidden"), pieces=split(x.shape, 1, (30, 10))
    )
    view, sent = TensorView(ArraySource(x, info, {0: tokens})), {}
    for kind in ("look", "table"):
        view.send = lambda content, buffers=None, kind=kind: sent.update(
            {kind: {"content": content, "buffers": [base64.b64encode(b).decode() for b in buffers or []]}}
        )
        view._answer(view, {"kind": kind, "view": "v", "id": 1, "width": 860}, [])
    return view, json.dumps(sent)


@pytest.fixture
def open_page(browser, tmp_path):
    def opened(root="", kind="dark"):
        view, sent = answers()
        css = f":root {{ color-scheme: light dark; {root} }}\n{view._css}\n{Said._css}"
        page: Path = tmp_path / "page.html"
        # "</" would end the script, as it would anywhere; messages come over a socket in a notebook
        page.write_text(
            PAGE.format(css=css, kind=kind, esm=view._esm, answers=sent.replace("</", "<\\/")), "utf-8"
        )
        browser.driver.get(page.as_uri())
        browser.one(".fxm[data-look]")
        browser.js("for (const d of document.querySelectorAll('details')) d.open = true")
        browser.one(".fxm-table td")
        return lab.TensorCanvas(browser, browser.one(".fxm"))

    return opened


def variables(kind):
    names = ("editor-foreground", "editor-background", "focusBorder")
    return "".join(f"--vscode-{name}: {value};" for name, value in zip(names, CODE[kind], strict=True))


def background(browser, css):
    return browser.js(f"return getComputedStyle(document.querySelector('{css}')).backgroundColor")


def rgb(text):
    return f"rgb({', '.join(str(int(text[i : i + 2], 16)) for i in (1, 3, 5))})"


@pytest.mark.parametrize("kind", CODE)
def test_the_themes_of_vs_code_are_followed(browser, open_page, kind):
    view = open_page(variables(kind), kind)
    for css in (".fxm", ".flexmagic-panel"):
        assert background(browser, css) == rgb(CODE[kind][1])
        found = browser.contrasts(browser.one(css))
        assert len(found) > (30 if css == ".fxm" else 6)
        assert found[0][0] >= 4.5, found[:5]
    view.canvas.send_keys(Keys.HOME)
    assert browser.js("return getComputedStyle(arguments[0]).outlineColor", view.canvas) == rgb(CODE[kind][2])
    browser.screenshot(f"vs_code_{kind}")


def darkest_and_lightest(view):
    """Of the numbers beside the map."""
    lay = view.data("map")
    pixels = view.pixels(0, lay["top"], lay["row_label_space"], 20)
    inks = [sum(p[:3]) for p in pixels if p[3] > 200]
    return min(inks), max(inks)


def test_the_canvas_is_painted_anew_when_the_theme_changes(browser, open_page):
    view = open_page(variables("light"), "light")
    assert darkest_and_lightest(view)[1] < 400
    browser.js(
        "document.documentElement.style.cssText = arguments[0]; document.body.className = 'vscode-dark'",
        variables("dark"),
    )
    lab.wait_for(lambda: darkest_and_lightest(view)[0] > 400, message="light letters")
    assert background(browser, ".fxm") == rgb(CODE["dark"][1])


def test_a_bare_page_follows_the_system(browser, open_page):
    scheme = [{"name": "prefers-color-scheme", "value": "dark"}]
    browser.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": scheme})
    try:
        open_page()
        for css in (".fxm", ".flexmagic-panel"):
            found = browser.contrasts(browser.one(css))
            assert found[0][0] >= 4.5, found[:5]
        assert background(browser, ".fxm") == "rgb(18, 18, 18)"
    finally:
        browser.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
