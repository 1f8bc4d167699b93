"""One run's hooks and captures on a live model: attached when it starts, gone when it ends."""

from __future__ import annotations

import contextlib
import functools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any, Self

import torch
from torch import nn

from flexmagic.engine.active_hook import ActiveHook, places_of
from flexmagic.engine.captures import Captures, RunKey
from flexmagic.engine.code import NAMES, failure
from flexmagic.engine.draws import cannot_draw, same_draws
from flexmagic.engine.exchange import Exchange, RunStopped
from flexmagic.engine.gradients import watch_leaves, watched
from flexmagic.engine.lasting import Lasting
from flexmagic.engine.limits import Picks, Window
from flexmagic.engine.micro_batches import MicroBatches
from flexmagic.engine.outcome import Edit, Outcome
from flexmagic.engine.prints import Prints
from flexmagic.engine.roaming import Roaming
from flexmagic.engine.screen import Screen
from flexmagic.engine.site_value import SiteValue, gradient_at
from flexmagic.engine.tensors import check_result, checksum, leaves, like_original, local_of, replace_leaf
from flexmagic.engine.tree import modules_of
from flexmagic.errors import RankFailure
from flexmagic.layout.layout import Layout
from flexmagic.layout.part import Places
from flexmagic.layout.rule import Extent, Rule
from flexmagic.layout.sites import Site, layer_of

OTHER_FAILED = "another rank's hook failed"


class Instrument:
    """Attaches hooks and captures to a model for the length of a ``with`` block.

    Outside the block the model has no hook of ours. Inside, user code never lets an exception
    escape into the forward: it is recorded, the original value passes on, and all ranks end the run
    together at their next exchange, so that every started collective is completed.

    ``skipped``: modules that do not run. ``ends_at``: where nothing is attached any more later.
    ``at_once``: no pipeline may cut the batch, whatever the hooks.
    """

    def __init__(
        self,
        model: nn.Module,
        rules: Mapping[Site, Rule],
        exchange: Exchange,
        captures: Captures,
        *,
        run: RunKey,
        seed: int,
        hooks: list[ActiveHook],
        capture: frozenset[Site],
        capture_at: Mapping[Site, Picks] | None = None,
        lasting: Lasting | None = None,
    ) -> None:
        self._model = model
        self._batches = MicroBatches(model, rules)
        self._rules = rules
        self.exchange = exchange
        self._captures = captures
        self._run = run
        self._seed = seed
        self.hooks = hooks
        self._capture = capture
        self._capture_at = capture_at or {}
        self._lasting = lasting or Lasting()
        self.step, self.generates = 0, False
        self.skipped: frozenset[str] = frozenset()
        self.ends_at: Site | None = None
        self._idle = self.at_once = False
        self._handles: list[Any] = []
        self._visits: Counter[Site | None] = Counter()
        self.context: dict[str, Any] = {}
        self.outcome = Outcome()
        self.prints = Prints()

    def __enter__(self) -> Self:
        """Attach one torch hook per module and port that is looked at."""
        code = [hook.source for hook in self.hooks if not hook.source.captures_only]
        whole = self.at_once or any(not source.local for source in code)
        captured = self._capture.union(self._capture_at)
        self._batches.start(captured, whole=whole, context=self.context)
        self._modules = {p: m for p, m in modules_of(self._model).items() if p not in self.skipped}
        places = places_of(captured if self.ends_at is None else captured | {self.ends_at}, self.hooks)
        for path, port in places:
            self._attach(path, port)
        self._roaming = Roaming(self.hooks, self._modules, set(places), self._attach, lambda: self._idle)
        return self

    @property
    def idle(self) -> bool:
        """Whether what runs now is not the run's own forward."""
        return self._idle

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Nothing is hooked or captured in a block: what runs there is not the run's own forward."""
        self._idle = True
        try:
            yield
        finally:
            self._idle = False

    def begin_step(self, step: int, extent: Extent) -> None:
        """A generation's next forward begins: with captures, counts and a report of its own."""
        self.step, self.generates = step, True
        self._run = (*self._run[:2], step)
        self._batches = MicroBatches(self._model, self._rules)
        self.exchange = replace(self.exchange, extent=extent)
        self.outcome = Outcome()

    def _attach(self, path: str, port: str, passes: Callable[[], bool] = lambda: False) -> None:
        """Put one torch hook on a module that is here and runs; ``passes`` says there that it may go on."""
        if (module := self._modules.get(path)) is None:
            return
        if port == "input":
            handle = module.register_forward_pre_hook(self._on_input(path, passes), with_kwargs=True)
        elif port == "output":
            handle = module.register_forward_hook(self._on_output(path, passes))
        elif port == "grad_input":
            handle = module.register_forward_pre_hook(self._before_gradients(path), with_kwargs=True)
        else:
            handle = module.register_forward_hook(self._after_gradients(path))
        self._handles.append(handle)

    def __exit__(self, *exc: object) -> None:
        """Take everything off again."""
        self._roaming.stop()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._batches.stop()
        self.outcome.refused.update(self._captures.join(self._run, self._batches.join))

    def _on_output(self, path: str, passes: Callable[[], bool]) -> Callable[..., Any]:
        def hook(module: nn.Module, _args: Any, output: Any) -> Any:
            if passes():
                return None
            changed = self._visit(module, path, "output", output)
            return None if changed is output else changed

        site = Site(path)
        plain = site in self._capture and self._holds(site) and not self._batches.several
        if not plain or any(site in hook.sites for hook in self.hooks):
            return hook

        def keep(module: nn.Module, args: Any, output: Any) -> Any:
            if type(output) is not torch.Tensor:  # some other form of one, or several
                return hook(module, args, output)
            self.outcome.calls[site] += 1
            self._captures.keep(self._run, site, output)
            return None

        return keep

    def _on_input(self, path: str, passes: Callable[[], bool]) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> Any:
            if passes():
                return None
            new_args = self._visit(module, path, "input", args)
            new_kwargs = self._visit(module, path, "input", kwargs)
            return None if new_args is args and new_kwargs is kwargs else (new_args, new_kwargs)

        return hook

    def _before_gradients(self, path: str) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> Any:
            visit = functools.partial(self._visit_gradient, module)
            return tuple(watched(value, path, "grad_input", visit) for value in (args, kwargs))

        return hook

    def _after_gradients(self, path: str) -> Callable[..., Any]:
        def hook(module: nn.Module, _args: Any, output: Any) -> None:
            watch_leaves(output, path, "grad_output", functools.partial(self._visit_gradient, module))

        return hook

    def _visit_gradient(self, module: nn.Module, site: Site, gradient: torch.Tensor) -> torch.Tensor | None:
        """Run hooks on a gradient and keep it; the new gradient where a hook edited it."""
        hooks = self._acting(site)
        if not self._holds(site) or (not hooks and not self._captures_now(site)):
            return None
        self.outcome.calls[site] += 1
        local = local_of(gradient).detach()
        changed = self._apply(hooks, site, module, local) if hooks else local
        self._captures.keep(self._run, site, changed)
        return None if changed is local else like_original(changed, gradient)

    def at_parameter(self, site: Site, gradient: torch.Tensor) -> torch.Tensor:
        """What hooks at a parameter's gradient leave of it; the model has no use for it."""
        hooks = self._acting(site)
        if not hooks:
            return gradient
        self.outcome.calls[site] += 1
        return self._apply(hooks, site, modules_of(self._model)[site.path.rpartition(".")[0]], gradient)

    def _visit(self, module: nn.Module, path: str, port: str, value: Any) -> Any:
        if self._idle:
            return value
        for where, tensor in list(leaves(value)):
            site = Site(path, port, where)
            if not self._holds(site):
                continue
            hooks = self._acting(site)
            if not hooks and not self._captures_now(site):
                continue
            self._visits[site] += 1
            self.outcome.calls[site] = max(self.outcome.calls[site], self._batches.call(site))
            local = local_of(tensor)
            gradient = gradient_at(site, tensor, self._rules)
            changed = self._apply(hooks, site, module, local, gradient) if hooks else local
            if changed is not local:
                value = replace_leaf(value, where, like_original(changed, tensor))
            self._captures.keep(self._run, site, changed, self._batches.part)
        return value

    def _acting(self, site: Site) -> list[ActiveHook]:
        """The hooks of a site that act in this step, as far as is known before its value is: on all ranks."""
        return [hook for hook in self.hooks if hook.acts_at(site) and self._is_time(hook, site)]

    def _is_time(self, hook: ActiveHook, site: Site) -> bool:
        limits = hook.source.limits
        if limits.step is not None and not limits.step.covers(self.step):
            return False
        if limits.asks_hooks or self.outcome.failures:
            return True  # decided after the exchange, in which all ranks take part
        try:
            return limits.holds(self._condition_names(site))
        except Exception as error:  # noqa: BLE001 - the user's condition; the same on all ranks
            self.outcome.failures.append(self._failure(hook, site, error))
            return False

    def _captures_now(self, site: Site) -> bool:
        steps = self._capture_at.get(site)
        return site in self._capture or (steps is not None and steps.covers(self.step))

    def _condition_names(self, site: Site) -> dict[str, Any]:
        """What a condition on a hook may use: see :data:`CONDITION_NAMES`."""
        return {
            "run": self._run[1],
            "step": self.step,
            "ctx": self.context,
            "site": str(site),
            "index": layer_of(site.path),
            "seed": self._seed,
        }

    def _holds(self, site: Site) -> bool:
        """Whether what this rank has at a site is the model's: not a stand-in for another stage's."""
        rule = self._rules.get(site)
        return rule is not None and (bool(rule.refused) or self.exchange.rank in rule.ranks)

    def _apply(
        self,
        hooks: list[ActiveHook],
        site: Site,
        module: nn.Module,
        local: torch.Tensor,
        gradient: Rule | None = None,
    ) -> torch.Tensor:
        """Run a site's hooks one after the other; returns ``local`` itself if none edited.

        A hook that only captures keeps what the hooks before it have left.
        """
        value = SiteValue(self._rules[site], self.exchange, local, gradient)
        parts = all(hook.limited or hook.source.local or hook.source.captures_only for hook in hooks)
        for hook in hooks:
            if hook.source.captures_only:
                if self._batches.part is None:  # the hooks after this one may write into what it keeps
                    self._captures.keep(self._run, site.seen_by(hook.source.name), value.piece().clone())
                continue
            apart = hook.elementwise and value.may_be_apart
            if hook.source.local or apart:
                x = value.piece().clone()
                changed = self._guarded(hook, site, module, x, alike=not apart)
                if changed is not None:
                    value.put_piece(changed)
            else:
                well = not self.outcome.failures and not self.outcome.stopped
                try:
                    x, cut = (
                        value.part(functools.partial(self._places, hook, site), well=well)
                        if parts
                        else (value.whole(well=well, copied=not hook.own_rows), False)
                    )
                except RunStopped as stop:
                    if len(self._rules[site].ranks) == self._rules[site].mesh.size:
                        raise
                    # ranks of other stages wait for what this forward will send them
                    self.outcome.stopped = stop.reason or OTHER_FAILED
                    return local
                changed = self._guarded(hook, site, module, x, cut=cut)
                hook.settle(well=not self.outcome.failures)
                if changed is not None:
                    (value.put_part if cut else value.put_whole)(changed)
        return local if self.outcome.failures else value.piece()

    def _guarded(
        self,
        hook: ActiveHook,
        site: Site,
        module: nn.Module,
        x: torch.Tensor,
        *,
        cut: bool = False,
        alike: bool = True,
    ) -> torch.Tensor | None:
        """What the body left of ``x``, or ``None`` if it changed nothing or failed.

        ``cut``: ``x`` is no more than what it is limited to. ``alike``: ranks are to be left with the same.
        """
        if self.outcome.failures:
            return None
        known = site.is_gradient or gradient_at(site, None, self._rules) is not None
        names = {"module": module, "rank": self.exchange.rank, **self._condition_names(site)}
        names |= self._lasting.names(local=hook.source.local, differentiable=known)
        names = {name: names[name] for name in NAMES if name != "x"}
        printed = Screen()
        try:
            window = self._window(hook, site, x, cut=cut)
            if window is None:
                self.outcome.edits.append(
                    Edit(str(site), hook.source.name, edited=False, local=hook.source.local, ran=False)
                )
                return None
            part = window.cut(x)
            before = part._version  # noqa: SLF001 - torch's documented counter
            with self.prints.taken(printed), self._draws(hook, site), self.outcome.timing(hook.source.name):
                result = hook.call({"x": part, **names})
            check_result(result, part.shape, part.dtype, part.device)
        except RunStopped:  # all ranks end here, in what a trace had them do together
            raise
        except BaseException as error:  # noqa: BLE001 - even SystemExit must not end an engine; it becomes data
            self.outcome.failures.append(self._failure(hook, site, error))
            return None
        finally:
            self.outcome.note(str(site), hook.source.name, printed)
        edited = result is not part or part._version != before  # noqa: SLF001
        if edited and not window.everything:
            if not (result is part and window.is_view):
                window.paste(x, result)
            result = x
        alike = alike and not hook.source.local and self._rules[site].mesh.size > 1
        sums = checksum(result) if edited and alike else (0, 0)
        self.outcome.edits.append(Edit(str(site), hook.source.name, edited, sums, hook.source.local))
        return result if edited else None

    @contextlib.contextmanager
    def contained(self, hook: ActiveHook, site: Site | None = None) -> Iterator[None]:
        """Code of a hook that runs at no site of this rank: what it raises or prints is data, as at one.

        ``site``: that of another pipeline stage at which it is.
        """
        printed, where = Screen(), "" if site is None else str(site)
        self._visits[site] += site is not None
        try:
            with self.prints.taken(printed), self._draws(hook, site):
                yield
        except RunStopped:
            raise
        except BaseException as error:  # noqa: BLE001 - as in a hook's body
            self.outcome.failures.append(self._failure(hook, site, error))
        finally:
            self.outcome.note(where, hook.source.name, printed)

    def _failure(self, hook: ActiveHook, site: Site | None, error: BaseException) -> RankFailure:
        """An exception as data; it lets go of its frames, which hold tensors."""
        source, where = hook.source, "" if site is None else str(site)
        step = self.step if self.generates else None
        found = failure(self.exchange.rank, error, source.filename, site=where, source=source, step=step)
        error.__traceback__ = None
        return found

    def _places(self, hook: ActiveHook, site: Site, whole: Layout) -> Places | None:
        return hook.places_in(self._rules[site].dims, whole.shape, self.exchange.extent.past)

    def _window(self, hook: ActiveHook, site: Site, x: torch.Tensor, *, cut: bool) -> Window | None:
        """The part of the tensor that the body sees; ``None`` if its condition fails or there is none."""
        if hook.source.limits.asks_hooks and not hook.source.limits.holds(self._condition_names(site)):
            return None
        dims, past = self._rules[site].dims, self.exchange.extent.past
        return hook.window(dims, x.shape, past, cut=cut, strict=not self.generates)

    def _draws(self, hook: ActiveHook, site: Site | None) -> contextlib.AbstractContextManager[None]:
        """Random numbers that depend on the run's seed, site, hook and call, and on nothing else."""
        if type(hook) is ActiveHook and hook.source.function is None and cannot_draw(hook.source.text):
            return contextlib.nullcontext()
        which = "" if hook.heads is None else str(hook.heads.starts)
        call = 0 if site is None else self._visits[site]
        return same_draws(f"{self._seed}|{site}{which}|{hook.source.name}|{call}")
