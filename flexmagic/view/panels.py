"""Panels beside a notebook: the model's sites, the hooks, and the cluster.

They work on a session as users do, through its public calls, so they know no other room.
"""

from __future__ import annotations

import ast
import textwrap
from typing import Any

import ipywidgets

from flexmagic.errors import FlexError
from flexmagic.view.inserter import CellInserter
from flexmagic.view.panel import Panel, escaped
from flexmagic.view.words import plural, visible

WIDE = ipywidgets.Layout(width="auto")
MOST_SITES = 500
WIDEST_SITE = 44


def syntax_of(code: str, first_line: int = 1) -> str:
    """Return what is wrong with a hook's body and in which line; nothing if it can be compiled."""
    body = textwrap.indent(code, " ") if code.strip() else " pass"
    try:
        ast.parse(f"def hook():\n{body}\n pass")
    except SyntaxError as error:
        return f"line {max((error.lineno or 2) - 1, 1) + first_line - 1}: {error.msg}"
    return ""


class ModelPanel(Panel):
    """The model's sites with shapes, layouts and the hooks that sit there; a click writes a hook's cell."""

    def __init__(self, session: Any) -> None:
        super().__init__()
        self._session = session
        self.search = ipywidgets.Text(
            placeholder="part of a site or layout", description="Search", layout=WIDE
        )
        self.sites = ipywidgets.Select(description="Sites", rows=14, layout=WIDE)
        self.about = ipywidgets.HTML()
        self.cell = ipywidgets.Textarea(description="Cell", rows=4, layout=WIDE)
        again = self.button("Read again", self.read, "Read the model's sites and hooks again")
        self.inserter = CellInserter(
            lambda done: self.say(
                "" if done else "This front end takes no cells from a panel: copy the text."
            )
        )
        insert = self.button("Insert this cell", self.insert, "Put it below this panel, to be edited and run")
        register = self.button("Register this hook", self.register, "On every engine, or on none")
        self.search.observe(lambda _: self.fill(), "value")
        self.sites.observe(lambda _: self.chosen(), "value")
        self.title = ipywidgets.HTML()
        buttons = ipywidgets.HBox([insert, register, again, self.inserter])
        self.children = (self.title, self.search, self.sites, self.about, self.cell, buttons, self.said)
        self._rows: list[tuple[str, str]] = []
        self.does(self.read)(None)
        self.settle()

    def read(self) -> str:
        """Read sites, layouts and hooks afresh."""
        model = self._session.model
        hooks = [(hook, self._targets(hook)) for hook in self._session.hooks]
        self._rows = []
        wide = min(max((len(str(site)) for site in model.rules), default=0), WIDEST_SITE)
        for site, rule in model.rules.items():
            shape = "refused" if rule.refused else rule.describe()
            here = [
                f"{hook.name} v{hook.version}"
                for hook, targets in hooks
                if any(t.matches(site) for t in targets)
            ]
            mark = f"   \N{LEFTWARDS ARROW} {', '.join(here)}" if here else ""
            self._rows.append((str(site), visible(f"{site!s:<{wide}}   {shape}{mark}", 300)))
        self.title.value = f"<b>{escaped(str(model))}</b>"
        self.fill()
        return "" if model.surveyed else "Layouts are known after the first run."

    def _targets(self, hook: Any) -> list[Any]:
        try:
            return [
                own
                for pattern in hook.current.patterns
                for own, _ in self._session.model.standing_for(pattern)
            ]
        except FlexError:
            return []

    def fill(self) -> None:
        """Show the sites that the search names."""
        words = self.search.value.lower().split()
        found = [(text, site) for site, text in self._rows if all(word in text.lower() for word in words)]
        rest = len(found) - MOST_SITES
        self.sites.options = found[:MOST_SITES]
        more = f", the first {MOST_SITES} shown" if rest > 0 else ""
        self.about.value = plural(len(found), "site") + more
        if len(found) == 1:
            self.sites.value = found[0][1]

    def chosen(self) -> None:
        """Say what is known of the chosen site, and write the cell of a hook there."""
        site = self.sites.value
        if site is None:
            return
        rule = next((r for s, r in self._session.model.rules.items() if str(s) == site), None)
        if rule is not None:
            how = f"refused: {rule.refused}" if rule.refused else f"{rule.describe()}. Known by: {rule.how}"
            self.about.value = f"<code>{escaped(site)}</code> {escaped(how)}"
        self.cell.value = f"%%flexhook {site} --name look\n"

    def insert(self) -> None:
        """Put the cell into the notebook."""
        self.inserter.insert(self.cell.value)

    def register(self) -> str:
        """Register the cell's hook."""
        head, _, body = self.cell.value.partition("\n")
        words = head.replace("%%flexhook", "").split()
        name = words[words.index("--name") + 1] if "--name" in words[:-1] else None
        if wrong := syntax_of(body, 2):
            return f"Nothing was sent. {wrong}"
        sites = words[: next((i for i, word in enumerate(words) if word.startswith("--")), len(words))]
        hook = self._session.hook(sites, body, name=name, first_line=2)
        self.read()
        return f"{hook.name} v{hook.version} is on all {self._session.world_size} ranks."


class HooksPanel(Panel):
    """The hooks: on and off, versions, going back, and editing with a check of the syntax."""

    def __init__(self, session: Any) -> None:
        super().__init__()
        self._session = session
        self.which = ipywidgets.Select(description="Hooks", rows=6, layout=WIDE)
        self.on = ipywidgets.Checkbox(description="acts")
        self.source = ipywidgets.Textarea(description="Source", rows=6, layout=WIDE)
        self.syntax, self.failed = ipywidgets.HTML(), ipywidgets.HTML()
        buttons = [
            self.button("Apply to all ranks", self.apply, "On every engine, or on none"),
            self.button("Undo", self.undo, "Go back to the version before"),
            self.button("Remove", self.remove),
            self.button("Read again", self.read),
        ]
        shown = (self.which, self.on, self.failed, self.source, self.syntax)
        self.children = (*shown, ipywidgets.HBox(buttons), self.said)
        self.which.observe(lambda _: self.chosen(), "value")
        self.on.observe(lambda change: self.switch(on=change["new"]), "value")
        self.source.observe(lambda _: self.check(), "value")
        self.does(self.read)(None)
        self.settle()

    @property
    def hook(self) -> Any:
        """The chosen hook, or None."""
        return next((hook for hook in self._session.hooks if hook.name == self.which.value), None)

    def read(self) -> str:
        """Read the hooks afresh."""
        before = self.which.value
        options = [
            (visible(f"{h.name} v{h.version}   {h.state}   {', '.join(h.sites)}", 300), h.name)
            for h in self._session.hooks
        ]
        self.which.options = options
        names = [name for _, name in options]
        self.which.value = before if before in names else (names[0] if names else None)
        self.chosen()
        return "" if names else "There are no hooks yet."

    def chosen(self) -> None:
        """Show the chosen hook's state and source."""
        hook = self.hook
        self.on.disabled = self.source.disabled = hook is None
        self.failed.value = ""
        if hook is not None:
            last = f"<code>last error: {escaped(hook.last_error)}</code>" if hook.last_error else ""
            self.failed.value = last
            self.on.value = hook.enabled
            self.source.value = hook.current.source.text

    def switch(self, *, on: bool) -> None:
        """Let the hook act, or not."""
        hook = self.hook
        if hook is not None and hook.enabled != on:
            hook.enabled = on
            self.read()

    def check(self) -> None:
        """Say what is wrong with the source as it stands."""
        wrong = syntax_of(self.source.value)
        self.syntax.value = f"<code>{escaped(wrong)}</code>" if wrong else ""

    def apply(self) -> str:
        """Make the source a new version on every rank, all else as it was."""
        hook = self.hook
        if hook is None:
            return "Choose a hook."
        if wrong := syntax_of(self.source.value):
            return f"Nothing was sent. {wrong}"
        now = hook.current.source
        made = self._session.hooks.register(
            self._session.model, hook.sites, self.source.value, name=hook.name, local=now.local,
            limits=now.limits, group=hook.group, first_line=1,
        )  # fmt: skip
        self.read()
        return f"{made.name} v{made.version} is on all {self._session.world_size} ranks."

    def undo(self) -> str:
        """Go back to the version before."""
        hook = self.hook
        if hook is None:
            return "Choose a hook."
        hook.undo()
        self.read()
        return f"{hook.name} is v{hook.version} again."

    def remove(self) -> str:
        """Remove the hook."""
        hook = self.hook
        if hook is None:
            return "Choose a hook."
        hook.remove()
        self.read()
        return f"{hook.name} is removed."


class ClusterPanel(Panel):
    """The ranks: where they sit, memory, what they do; bringing them back, and ending what runs."""

    def __init__(self, session: Any) -> None:
        super().__init__()
        self._session = session
        self.table = ipywidgets.HTML()
        buttons = [
            self.button("Refresh", self.read),
            self.button("Recover", self.recover, "Start engines again that ended, free those that hang"),
            self.button(
                "Cancel what runs", self.cancel, "End the call that is being waited for, on all ranks"
            ),
        ]
        self.children = (self.table, ipywidgets.HBox(buttons), self.said)
        self.does(self.read)(None)
        self.settle()

    def read(self) -> None:
        """Ask the ranks how they are; they answer while they are at work too."""
        self.table.value = self._session.status()._repr_html_()

    def recover(self) -> str:
        """Put the engines in order again."""
        done = str(self._session.recover(say=self.say))
        self.read()
        return done

    def cancel(self) -> str:
        """End what runs."""
        self._session.cancel()
        return "Cancelled what was running, if anything was."
