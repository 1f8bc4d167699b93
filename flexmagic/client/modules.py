"""A session's modules: registered on every rank alike, called in hooks, trained, saved and loaded."""

from __future__ import annotations

import contextlib
import re
import sys
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flexmagic.client.adapters import adapt, detach
from flexmagic.client.table import Table
from flexmagic.errors import InputError, ModelError

if TYPE_CHECKING:
    import torch
    from torch import nn

    from flexmagic.client.calls import Calls
    from flexmagic.client.work import Work

FORMAT = "flexmagic modules"


@dataclass(frozen=True)
class Registered:
    """One module: the same on every rank; what is shown of it is rank 0's."""

    name: str
    kind: str
    size: int
    modules: Modules

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Its parameters and buffers, on the CPU."""
        return self.modules.ask(0, "module_state", self.name)

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Give it these parameters and buffers on every rank.

        Raises :class:`InputError` if they do not fit.
        """
        known = {key: tuple(value.shape) for key, value in self.state_dict().items()}
        given = {key: tuple(value.shape) for key, value in state.items()}
        if given != known:
            msg = f"This state is not that of module {self.name!r}: it has {given}, the module {known}."
            raise InputError(msg)
        self.modules.tell("load_module_state", self.name, state)

    def gradients(self) -> dict[str, torch.Tensor]:
        """The gradients added up since the last step, on the CPU; those that there are."""
        return self.modules.ask(0, "module_gradients", self.name)

    def __repr__(self) -> str:
        """Name, class and number of parameters."""
        return f"<Module {self.name}: {self.kind}, {self.size:,} parameters>"


class Modules:
    """The modules of a session by name.

    ``session.modules["probe"] = torch.nn.Linear(256, 2)`` registers one on every rank; hooks call it as
    ``modules.probe(x)`` on whole tensors. A run with a loss adds to its gradients, which are those of
    one process and the same on all ranks; :meth:`step` then changes its parameters alike everywhere.
    The model itself is not trained.
    """

    def __init__(self, calls: Calls, owner: Callable[[], str], work: Work) -> None:
        self._calls = calls
        self._owner = owner
        self._work = work
        self._known: dict[str, Registered] = {}

    def __setitem__(self, name: str, module: nn.Module) -> None:
        """Register a module on every rank as it is here; one of the same name is replaced.

        Raises :class:`InputError` for a name that is none or for what is no module.
        """
        from torch import nn
        from torch.nn.parameter import UninitializedParameter

        if not name.isidentifier() or name.startswith("_"):
            msg = f"{name!r} cannot be written as modules.{name}. Choose a name such as probe."
            raise InputError(msg)
        given: Any = module
        if not isinstance(given, nn.Module):
            msg = (
                f"modules[{name!r}] must be a torch.nn.Module, not {type(given).__name__}. "
                "Write e.g. torch.nn.Linear(256, 2)."
            )
            raise InputError(msg)
        parameters = list(module.parameters())
        if any(isinstance(p, UninitializedParameter) for p in parameters):
            msg = f"Module {name!r} has parameters without a size yet: call it once on an example first."
            raise InputError(msg)
        with by_value(module):
            self.tell("put_module", name, module)
        size = sum(p.numel() for p in parameters)
        self._known[name] = Registered(name, type(module).__name__, size, self)

    def __getitem__(self, name: str) -> Registered:
        """The module of a name; raises :class:`InputError` naming those there are."""
        if name not in self._known:
            known = ", ".join(self._known) or "none yet"
            msg = (
                f"There is no module {name!r}. Modules: {known}. "
                f'Register one: session.modules["{name}"] = torch.nn.Linear(256, 2).'
            )
            raise InputError(msg)
        return self._known[name]

    def __delitem__(self, name: str) -> None:
        """Forget a module on every rank, and the hooks of an adapter."""
        self[name]  # raises for an unknown name
        detach(self._work.hooks, name)
        self.tell("drop_module", name)
        del self._known[name]

    def __iter__(self) -> Iterator[str]:
        """The names."""
        return iter(self._known)

    def __len__(self) -> int:
        """The number of modules."""
        return len(self._known)

    def build(self, name: str, factory: Callable[[], nn.Module], *, seed: int = 0) -> Registered:
        """Register what a function makes under a seed; the notebook's own draws are not disturbed."""
        import torch

        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self[name] = factory()
        return self[name]

    def adapter(
        self, sites: str | Sequence[str], rank: int, scale: float, name: str | None, seed: int
    ) -> Registered:
        """Attach low-rank adapters beside modules; see :meth:`Session.adapter`."""
        wanted = adapt(self._work.model, sites, rank, scale, name)
        if wanted.name in self._known:
            del self[wanted.name]
        made = self.build(wanted.name, wanted.build, seed=seed)
        try:
            wanted.attach(self._work.hook)
        except BaseException:
            del self[wanted.name]
            raise
        return made

    def step(self, optimizer: str = "adamw", *, names: Sequence[str] | None = None, **options: Any) -> None:
        """One step of torch's optimizer of that name, on every rank alike; gradients are then forgotten.

        ``options`` are the optimizer's own, such as ``lr=1e-3``; its state is kept from step to step, for
        each module by itself, until another optimizer is named. ``names``: which modules, by default
        all that have gradients.

        Raises :class:`InputError` for an unknown optimizer, option or module, or without gradients, and
        :class:`ModelError` if the ranks' modules are not the same afterwards.
        """
        kind = _optimizer(optimizer)
        wanted = [self[name] for name in names or tuple(self)]
        having = self.ask(0, "graded_modules")
        graded = [module.name for module in wanted if module.name in having]
        if not graded:
            msg = (
                "No module has gradients. Run with a loss that depends on one first: "
                'session.run(inputs, backward="...") with a hook that calls modules.NAME(x).'
            )
            raise InputError(msg)
        said = self.tell("step_modules", graded, kind, options)
        odd = [rank for rank, sums in enumerate(said) if sums != said[0]]
        if odd:
            msg = (
                f"After the step, rank {', '.join(map(str, odd))} has other parameters than rank 0. "
                "Load a saved state with session.modules.load(path), or register the modules again."
            )
            raise ModelError(msg)

    def zero_grad(self) -> None:
        """Forget the gradients of all modules."""
        self.tell("forget_gradients")

    def save(self, path: str | Path, *names: str) -> Path:
        """Write the named modules' parameters and buffers, or all, to a safetensors file."""
        from safetensors.torch import save_file

        state = {
            f"{name}.{key}": value.contiguous()
            for name in names or tuple(self)
            for key, value in self[name].state_dict().items()
        }
        if not state:
            msg = 'No module to save. Register one: session.modules["probe"] = torch.nn.Linear(256, 2).'
            raise InputError(msg)
        try:
            save_file(state, str(path), {"format": FORMAT})
        except OSError as error:
            msg = f"{path} cannot be written: {error}. Choose another path."
            raise InputError(msg) from None
        return Path(path)

    def load(self, path: str | Path) -> None:
        """Read a file of :meth:`save` into the modules of the same names, all of them or none.

        Raises :class:`InputError` for another file, or for modules that are not there or do not fit.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            state = load_file(str(path))
        except (OSError, SafetensorError) as error:
            msg = f"{path} is no file of session.modules.save: {error}."
            raise InputError(msg) from None
        found: dict[str, dict[str, torch.Tensor]] = {}
        for key, value in state.items():
            name, _, rest = key.partition(".")
            found.setdefault(name, {})[rest] = value
        before = {name: self[name].state_dict() for name in found}
        done: list[str] = []
        try:
            for name, of_module in found.items():
                self[name].load_state_dict(of_module)
                done.append(name)
        except InputError:
            for name in done:
                self[name].load_state_dict(before[name])
            raise

    def receive(self) -> None:
        """Take over the modules that the engines hold already, of a notebook that has ended."""
        self._known = {
            name: Registered(name, kind, size, self)
            for name, (kind, size) in self.ask(0, "module_kinds").items()
        }

    def restore(self) -> None:
        """Give ranks that were started again the modules of one that has them."""
        has = self.tell("module_sums")
        for name in self._known:
            whole = next((rank for rank, sums in enumerate(has) if name in sums), None)
            lost = [rank for rank, sums in enumerate(has) if name not in sums]
            if whole is not None and lost:
                module, optimizer = self.ask(whole, "give_module", name)
                self._calls.some(
                    {rank: ("put_module", (self._owner(), name, module, optimizer), {}) for rank in lost}
                )

    def ask(self, rank: int, verb: str, *args: Any) -> Any:
        """A verb about modules on one rank."""
        return self._calls.one(rank, verb, self._owner(), *args)

    def tell(self, verb: str, *args: Any) -> list[Any]:
        """A verb about modules on every rank."""
        return self._calls.all(verb, self._owner(), *args)

    def table(self) -> Table:
        """Name, class and number of parameters of every module."""
        rows = tuple((m.name, m.kind, f"{m.size:,}") for m in self._known.values())
        return Table(("module", "class", "parameters"), rows, "" if rows else "No modules yet.")

    def __repr__(self) -> str:
        """The table as text."""
        return str(self.table())


@contextlib.contextmanager
def by_value(module: nn.Module) -> Iterator[None]:
    """Let the classes of a module travel with it where the engines may not have the files they are in."""
    import cloudpickle

    installed = [Path(path).resolve() for path in sysconfig.get_paths().values()]
    local = {}
    for part in module.modules():
        home = sys.modules.get(type(part).__module__)
        file = getattr(home, "__file__", None)
        if home is None or file is None or home.__name__.partition(".")[0] == "flexmagic":
            continue
        if not any(Path(file).resolve().is_relative_to(path) for path in installed):
            local[home.__name__] = home
    for home in local.values():
        cloudpickle.register_pickle_by_value(home)
    try:
        yield
    finally:
        for home in local.values():
            cloudpickle.unregister_pickle_by_value(home)


def _optimizer(name: str) -> str:
    """The class of ``torch.optim`` that a name means, whatever its letters' case."""
    import torch

    kinds = {
        kind.lower(): kind
        for kind, value in vars(torch.optim).items()
        if isinstance(value, type) and issubclass(value, torch.optim.Optimizer) and kind != "Optimizer"
    }
    found = kinds.get(re.sub(r"\W|_", "", name).lower())
    if found is None or found == "LBFGS":
        known = ", ".join(sorted(set(kinds) - {"lbfgs"}))
        msg = f"There is no optimizer {name!r}. Choose one of {known}."
        raise InputError(msg)
    return found
