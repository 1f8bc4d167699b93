"""The settings of a notebook: defaults that a configuration file, a kernelspec or the environment may set."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from traitlets import Bool, Float, Int, TraitError, Unicode
from traitlets.config import Application, Configurable

from flexmagic.errors import InputError

if TYPE_CHECKING:
    from IPython.core.interactiveshell import InteractiveShell

ENVIRONMENT = "FLEXMAGIC_"
"""What the names of environment variables begin with: ``FLEXMAGIC_ENGINES`` is ``FlexMagic.engines``."""


class FlexMagic(Configurable):
    """``c.FlexMagic.engines = 4`` in ``ipython_config.py``; ``%config FlexMagic.engines = 4`` in a cell."""

    engines = Int(2, min=1, help="engines that %flexcluster start starts, one per rank").tag(config=True)
    oversubscribe = Bool(default_value=False, help="let several engines share a device").tag(config=True)
    keep = Bool(default_value=False, help="leave the engines running when the notebook ends").tag(config=True)
    background = Bool(
        default_value=False, help="the kernel starts the cluster at once, while cells already run"
    ).tag(config=True)
    profile = Unicode("", help="the running cluster, by id or profile, that is attached to instead").tag(
        config=True
    )
    model = Unicode("", help="folder or hub id of the model that the kernel loads at once").tag(config=True)
    model_options = Unicode("", help="the options of %flexmodel for it, e.g. --tp 2").tag(config=True)
    run_limit = Float(0.0, min=0.0, help="seconds after which any call is ended; 0 for no limit").tag(
        config=True
    )
    alone_limit = Float(
        10.0, min=0.1, help="seconds that user code may take on some ranks while the others wait"
    ).tag(config=True)
    captures = Unicode("", help="what each rank keeps of runs, e.g. 4GB; without: 2GiB").tag(config=True)

    def __init__(self, shell: InteractiveShell) -> None:
        self._from: dict[str, str] = {}
        super().__init__(parent=shell)
        self._shell = shell
        for name, trait in self.traits(config=True).items():
            text = os.environ.get(variable := f"{ENVIRONMENT}{name.upper()}")
            if text is not None and name not in self.config.FlexMagic:
                try:
                    setattr(self, name, trait.from_string(text))
                except (TraitError, ValueError) as error:
                    msg = f"The environment's {variable}={text!r} cannot be used: {error}"
                    raise InputError(msg) from None
                self._from[name] = f"environment, {variable}"
        self._begun = {name: getattr(self, name) for name in self.traits(config=True)}

    def listed(self) -> Iterator[tuple[str, Any, str, str]]:
        """Name, value, where it is from and what it means, of every setting."""
        for name, trait in self.traits(config=True).items():
            yield name, getattr(self, name), self._source(name), str(trait.help)

    def _source(self, name: str) -> str:
        if getattr(self, name) != self._begun[name]:
            return "set in this session"
        if name in self._from:
            return self._from[name]
        application: Any = self._shell.parent
        while application is not None and not isinstance(application, Application):
            application = application.parent  # a kernel stands between the shell and it
        if name in getattr(application, "cli_config", {}).get("FlexMagic", {}):
            return "command line, as of a kernelspec"
        if name in self.config.FlexMagic:
            files = [str(path) for path in getattr(application, "loaded_config_files", [])]
            return ", ".join(["configuration", *files])
        return "default"
