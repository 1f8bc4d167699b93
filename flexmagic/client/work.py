"""What is done with a loaded model: hooks put on its sites, and runs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

from flexmagic.client.generation import Generation
from flexmagic.client.hook_book import HookBook, Names
from flexmagic.client.hook_errors import noted
from flexmagic.client.hooks import Hook
from flexmagic.client.losses import Losses
from flexmagic.client.model import Model
from flexmagic.client.modules import Modules, Registered
from flexmagic.client.pace import Counted
from flexmagic.client.planning import Skipped
from flexmagic.client.run import Run
from flexmagic.client.running import Running
from flexmagic.client.waiting import Progress
from flexmagic.engine.limits import Limits, Picked
from flexmagic.errors import InputError


class Work(ABC):
    """The part of a session that works on its model; how it comes by one is the session's."""

    hooks: HookBook
    losses: Losses
    modules: Modules
    cancel: Callable[[], None]
    """Ends what is being waited for, as an interrupt would; from any thread."""
    _running: Running

    @property
    @abstractmethod
    def model(self) -> Model:
        """The loaded model; raises :class:`ModelError` if there is none."""

    def hook(
        self,
        sites: str | Sequence[str],
        code: str | Callable[..., Any] = "",
        *,
        name: str | None = None,
        group: str | None = None,
        local: bool = False,
        step: Picked | None = None,
        row: Picked | None = None,
        token: Picked | None = None,
        every: int = 1,
        when: str = "",
        first_line: int = 1,
    ) -> Hook:
        """Register code at sites, on every engine or on none; the same name replaces.

        ``code`` is a hook's body, or a function ``(x, h)`` that may return the new value; an empty
        body only captures. ``x`` is the whole tensor, with ``local`` each rank's own piece. A run
        with a hook on whole tensors sends a pipeline its batch in one piece, not in micro-batches;
        with ``local`` hooks alone each micro-batch's piece comes by itself.

        ``row`` and ``token`` restrict ``x`` to rows and token positions of the whole tensor, as
        ``3``, ``-1``, ``"1:3"``, a slice or a list: all dims stay, and other places keep their bits.
        Tokens count from the start of their row, also in the later steps of a generation. ``step``:
        act in these steps of a generation only, its prefill being step 0. ``every``: act in the runs
        whose number it divides. ``when``: a condition over ``run``, ``step``, ``ctx``, ``site``,
        ``index`` and ``seed``. ``group``: what the hook is switched with.

        Several hooks on one site act in the order of :attr:`hooks`, each on what the one before left.

        Raises :class:`InputError`, :class:`SiteError`, :class:`LayoutError` or :class:`HookError`.
        """
        limits = Limits.read(step, row, token, every, when)
        return self.hooks.register(
            self.model, sites, code, name=name, local=local, limits=limits, group=group, first_line=first_line
        )

    def adapter(
        self,
        sites: str | Sequence[str],
        rank: int = 4,
        *,
        scale: float = 1.0,
        name: str | None = None,
        seed: int = 0,
    ) -> Registered:
        """Attach low-rank adapters beside modules: ``output + scale · (input Aᵀ) Bᵀ`` on whole tensors.

        ``A`` is ``[rank, in]`` and drawn under ``seed``, ``B`` is ``[out, rank]`` and zero, so that
        nothing changes before training. The adapter is one of :attr:`modules`, under ``name``
        (``adapter``), trained by runs with a loss and ``session.modules.step(...)``; the model's own
        weights stay. Its hooks are a group of the same name. ``del session.modules[name]`` takes it off.
        Source: LoRA, arXiv 2106.09685.

        Raises :class:`InputError`, :class:`SiteError`, :class:`LayoutError` or :class:`ModelError`.
        """
        return self.modules.adapter(sites, rank, scale, name, seed)

    def run(
        self,
        inputs: Any,
        *,
        capture: str | Sequence[str] = (),
        seed: int = 0,
        grad: bool = False,
        backward: str | Callable[[Any], Any] | None = None,
        only: Names | None = None,
        without: Names | None = None,
        stop_at: str | None = None,
        skip: Skipped = (),
        progress: Progress | None = None,
    ) -> Run:
        """One forward under the enabled hooks, and one backward if there is a loss.

        ``inputs``: a text, a list of texts, token ids ``[seq]`` or ``[batch, seq]``, or a dict of
        the model's own keyword arguments. Captured are the hooks' sites, the model's own outputs
        and the ``capture`` patterns. ``seed`` fixes all random draws in hooks.

        ``backward``: a loss to differentiate, as an expression over ``logits``, ``output`` and
        ``ids``, which are those of the whole batch, ``ctx`` and ``modules``, as a function of an object
        with these attributes, or the name of one of :attr:`losses`. It adds to the gradients of the
        :attr:`modules` that hooks called. Gradients, at the ports ``grad_output``, ``grad_input`` and,
        for a parameter, ``grad``, are those of that loss on the whole batch, as in one process, however
        the rows are shared out. The model's own ``.grad`` fields stay as they were. ``grad``: run the
        forward with autograd on, without a loss.

        ``only``: hooks or groups that act in this run, whatever is enabled; ``without``: those that
        do not. Hooks that did nothing are said, and listed in ``run.warnings``.

        ``stop_at``: a site after which nothing more runs on any rank. ``skip``: modules that do not
        run; the first input of each passes instead, or, of a dict, the value: a number or a tensor
        that fits the whole. A module that returns another shape than it takes cannot be skipped.

        Raises :class:`InputError`, :class:`HookError` or :class:`ModelError`.
        """
        with noted(self.hooks):
            return self._running.run(
                self.model, inputs, capture, progress=progress, only=only, without=without,
                seed=seed, grad=grad, backward=self.losses.meant(backward), stop_at=stop_at, skip=skip,
            )  # fmt: skip

    def repeat(
        self,
        inputs: Any,
        times: int | Sequence[int],
        *,
        seed: int = 0,
        max_new_tokens: int | None = None,
        **options: Any,
    ) -> list[Run]:
        """Several runs that differ in their seeds only: ``seed``, ``seed + 1`` and so on, ``times`` of them.

        ``times`` may also be a list of the seeds themselves. With ``max_new_tokens`` each is a generation.
        Options and errors are those of :meth:`run`, or of :meth:`generate`; ``run.seed`` is a run's seed.
        """
        seeds = range(seed, seed + times) if isinstance(times, int) else list(times)
        if not seeds:
            msg = f"Repeating {times} times makes no run: give a number, 1 or more, or a list of seeds."
            raise InputError(msg)
        counted = Counted(options.pop("progress", None), "runs", len(seeds))
        made: list[Run] = []
        for each in seeds:
            counted.done = len(made)
            every: dict[str, Any] = {**options, "seed": each, "progress": counted.heard}
            if max_new_tokens is None:
                made.append(self.run(inputs, **every))
            else:
                made.append(self.generate(inputs, max_new_tokens, **every))
        return made

    def generate(
        self,
        inputs: Any,
        max_new_tokens: int = 20,
        *,
        capture: str | Sequence[str] = (),
        seed: int = 0,
        only: Names | None = None,
        without: Names | None = None,
        skip: Skipped = (),
        progress: Progress | None = None,
        **options: Any,
    ) -> Generation:
        """Text by the model's own ``generate`` on every rank, hooks and captures active in every step.

        ``options`` go to the model's ``generate``, such as ``do_sample=True`` and ``temperature``. Step
        0 is the prefill. All ranks choose the same tokens, sampled ones from the same draws, which
        ``seed`` fixes; should they ever differ, the run is refused. However a model shares out rows,
        each rank generates the whole batch. ``progress`` hears of the text as it comes. The rest is as
        in :meth:`run`.

        Raises :class:`InputError`, :class:`HookError`, or :class:`ModelError` for a model that has no
        ``generate``, or whose FSDP1 wrappers it does not reach.
        """
        with noted(self.hooks):
            return self._running.generate(
                self.model, inputs, capture, max_new_tokens, options,
                progress=progress, only=only, without=without, seed=seed, skip=skip,
            )  # fmt: skip
