"""Text generation by the model's own ``generate`` on every rank, its forwards seen one by one.

Every rank generates the whole batch from the same draws. After each token the ranks compare what
they chose: where one stopped and another went on, they would wait for each other for good.
"""

from __future__ import annotations

import inspect
import time
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch._dynamo import OptimizedModule
from torch.nn.parallel import DistributedDataParallel

from flexmagic.engine.agreement import numbers_of_all
from flexmagic.engine.distributed import Loaded
from flexmagic.engine.draws import seed_model
from flexmagic.engine.exchange import RunStopped
from flexmagic.engine.groups import Groups
from flexmagic.engine.inputs import Prepared
from flexmagic.engine.instrument import OTHER_FAILED, Instrument
from flexmagic.engine.pipeline import Pipeline
from flexmagic.engine.progress import Token
from flexmagic.engine.rows import batch_of
from flexmagic.engine.runtime import RunPlan, RunReply, Runtime
from flexmagic.engine.shortcuts import check_stages, shortened
from flexmagic.engine.stage_whole import form_of, whole_of
from flexmagic.engine.surveying import everyone
from flexmagic.engine.tensors import as_bytes
from flexmagic.engine.tracing import step_begins, step_ends, traced_steps
from flexmagic.engine.tree import inner_of, modules_of, unwrapped
from flexmagic.errors import InputError, ModelError
from flexmagic.layout.rule import Extent
from flexmagic.layout.sites import LOGITS

OURS = {
    "assistant_model": "with an assistant, forwards are no steps",
    "prompt_lookup_num_tokens": "with looked-up tokens, forwards are no steps",
    "prefill_chunk_size": "the prefill is one step",
    "return_dict_in_generate": "what a run keeps, capture= says",
    "streamer": "tokens are told as they come anyway",
    "synced_gpus": "all ranks take the same steps anyway",
}
"""Options of ``generate`` that cannot be passed on, and why."""


@dataclass(frozen=True)
class Request:
    """What is asked of ``generate``: the most new tokens, and its own options."""

    max_new_tokens: int
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Step:
    """One forward: the ids it ran on, ``[rows][seq]``, and this rank's report of it."""

    ids: list[list[int]]
    reply: RunReply


@dataclass(frozen=True)
class Generated:
    """What one rank generated: the forwards, and all ids of each row, of which ``prompt`` were given."""

    steps: list[Step]
    ids: list[list[int]]
    prompt: int


def generate(runtime: Runtime, plan: RunPlan, prepared: Prepared, request: Request) -> Generated:
    """Generate under the plan's hooks and captures; each step's are kept under a key of its own.

    Raises :class:`ModelError` or :class:`InputError` on all ranks alike where it cannot start.
    """
    assert runtime.loaded is not None  # the client has a model
    if plan.trace is not None:
        check_stages(runtime.loaded, "A trace goes through a generation only where each rank has all layers")
    model = generator(runtime.loaded, runtime.groups)
    options = _options(model, prepared, request)
    instrument = runtime.instrument(plan, Extent(shared_out=False))
    instrument.at_once = True  # what is cached is for the whole batch
    steps = _Steps(runtime, plan, instrument, request.max_new_tokens)
    beams = options.get("num_beams") or getattr(model.generation_config, "num_beams", None) or 1
    steps.rated = beams == 1  # a beam's token may come from another row's logits
    root = modules_of(runtime.model)[""]
    ids: list[list[int]] = []
    prompt = options["input_ids"].shape[1] if "input_ids" in options else 0
    attached = shortened(runtime.loaded, instrument, runtime.rules, plan.short, runtime.forms)
    with (
        attached,
        torch.compiler.set_stance("force_eager"),
        torch.random.fork_rng(runtime.place.generators),
    ):
        seed_model(plan.seed)
        handles = (
            root.register_forward_pre_hook(steps.begin, prepend=True, with_kwargs=True),
            root.register_forward_hook(steps.end),
        )
        try:
            with traced_steps(instrument, request.max_new_tokens):
                ids = model.generate(
                    **options, stopping_criteria=[*request.options.get("stopping_criteria", ()), steps]
                )
                ids = torch.as_tensor(ids).tolist()
                steps.cut(max(len(ids[0]) - prompt, 1))
        except RunStopped as stop:
            instrument.outcome.stopped = stop.reason or OTHER_FAILED
            steps.close()
        except Exception as problem:  # noqa: BLE001 - whatever the model raises goes to the user
            if not steps.done and not steps.running:
                raise InputError(f"The model does not generate so: {problem}") from None
            steps.close(f"{type(problem).__name__}: {problem}")
        finally:
            for handle in handles:
                handle.remove()
    runtime.captures.remember(plan.key, instrument.context)
    return Generated(steps.done, ids, prompt)


def generator(loaded: Loaded, groups: Groups) -> Any:
    """The module whose ``generate`` is used; all ranks ask together.

    Raises :class:`ModelError` on all alike where its forwards would be wrong, or it has none.
    """
    model: nn.Module | None = loaded.model
    while model is not None and (inside := inner_of(model)) is not None:
        if not isinstance(model, (DistributedDataParallel, OptimizedModule, Pipeline)):
            raise ModelError(
                f"Text is not generated through {type(model).__name__}, which gathers weights around its own "
                "forward only. Shard the model with fully_shard instead."
            )
        model = inside
    found = unwrapped(loaded.model)
    if all(everyone(groups, callable(getattr(found, "generate", None)))):
        return whole_of(loaded.model) if isinstance(loaded.model, Pipeline) else found
    form = form_of(loaded.unsharded) if isinstance(loaded.model, Pipeline) else None
    if not all(everyone(groups, form is not None)):
        raise ModelError(f"{type(found).__name__} has no generate() of its own, so it generates no text.")
    assert isinstance(loaded.model, Pipeline)  # nothing else has a form
    return whole_of(loaded.model, form=form)


def _options(model: Any, prepared: Prepared, request: Request) -> dict[str, Any]:
    """The arguments of ``generate``; raises :class:`InputError` for what cannot be asked of it here."""
    if request.max_new_tokens < 1:
        raise InputError(f"{request.max_new_tokens} new tokens are none: ask for 1 or more.")
    for name in request.options.keys() & OURS.keys():
        raise InputError(f"generate's option {name} cannot be set here: {OURS[name]}.")
    options = {**prepared.arguments, "max_new_tokens": request.max_new_tokens, **request.options}
    options.pop("stopping_criteria", None)
    ids = options.get("input_ids")
    if isinstance(ids, torch.Tensor):
        options.setdefault("attention_mask", torch.ones_like(ids))
        context = getattr(model.config, "max_position_embeddings", None)
        if isinstance(context, int) and ids.shape[1] + request.max_new_tokens > context:
            raise InputError(
                f"{ids.shape[1]} tokens and {request.max_new_tokens} new ones are more than the model's "
                f"context of {context}. Ask for {max(context - ids.shape[1], 0)} at most."
            )
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        options.setdefault("logits_to_keep", 0)  # all of them, as in any other run
    return options


class _Steps:
    """The forwards of one generation, numbered, each with its captures and report.

    Also what transformers calls a stopping criterion, which is asked after each chosen token.
    """

    def __init__(self, runtime: Runtime, plan: RunPlan, instrument: Instrument, total: int) -> None:
        self._runtime, self._plan, self._instrument, self._total = runtime, plan, instrument, total
        self._first = 0
        self._ids: list[list[int]] = []
        self._started = 0.0
        self.done: list[Step] = []
        self.running = self.rated = False
        self._logits: torch.Tensor | None = None
        self._tokens: list[Token] = []

    def begin(self, _module: nn.Module, _args: Any, arguments: dict[str, Any]) -> None:
        """Before a forward: what it runs on."""
        ids = arguments.get("input_ids")
        embedded = arguments.get("inputs_embeds")
        shown = ids if isinstance(ids, torch.Tensor) else embedded
        seq = shown.shape[1] if isinstance(shown, torch.Tensor) else None
        step = len(self.done)
        if step == 0:
            self._first = seq or 0
        past = max(self._first + step - seq, 0) if seq is not None else 0
        self._ids = ids.tolist() if isinstance(ids, torch.Tensor) else []
        self._started, self.running = time.perf_counter(), True
        rows = len(shown) if isinstance(shown, torch.Tensor) else batch_of(arguments)
        self._instrument.begin_step(step, Extent(rows, seq, shared_out=False, past=past))
        step_begins(self._instrument, step)

    def end(self, _module: nn.Module, _args: Any, output: Any) -> None:
        """After a forward: close its captures."""
        step_ends(self._instrument)
        self._logits = getattr(output, "logits", None)
        self.close()

    def cut(self, number: int) -> None:
        """Forget steps beyond so many: a model on a GPU may have looked one further than it had to."""
        del self.done[number:]
        self._instrument.outcome = self.done[-1].reply.outcome

    def close(self, error: str = "") -> None:
        """Keep a forward's report, also of one that did not end; what is said later goes to the last one."""
        if self.running:
            self.running = False
            key = (*self._plan.key, len(self.done))
            reply = self._runtime.report(key, self._instrument, self._started, error)
            self.done.append(Step(self._ids, reply))
        elif error:
            self.done[-1].reply.outcome.stopped = error

    def __call__(self, input_ids: torch.Tensor, _scores: Any, **_options: Any) -> torch.Tensor:
        """After a token was chosen: go on only if all ranks are well and chose the same.

        Nothing is finished here: that is for the model's own criteria. Raises :class:`RunStopped`.
        """
        well = not self._instrument.outcome.failures and not self._instrument.outcome.stopped
        digest = zlib.crc32(as_bytes(input_ids.cpu().contiguous()).numpy().data)
        said = numbers_of_all(self._runtime.groups, [int(well), digest])
        if not all(ok for ok, _ in said):
            raise RunStopped
        if len({chosen for _, chosen in said}) > 1:
            raise RunStopped(
                f"the ranks chose different tokens in step {len(self.done) - 1}: their logits differ"
            )
        self._tell(input_ids)
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    def _tell(self, ids: torch.Tensor) -> None:
        if self._runtime.place.rank != 0:
            return
        done = len(self.done)
        new = ids[0, -done:].tolist()
        assert self._runtime.loaded is not None  # it is generating
        tokenizer = self._runtime.loaded.tokenizer
        text = " ".join(map(str, new)) if tokenizer is None else tokenizer.decode(new)
        last = str(new[-1]) if tokenizer is None else tokenizer.decode(new[-1:])
        self._tokens.append((last, self._chance(new[-1])))
        self._runtime.tell(text, done, self._total, list(self._tokens))

    def _chance(self, token: int) -> float | None:
        """How likely the first row's last logits make a token; ``None`` where they are not all here."""
        rule = self._runtime.rules.get(LOGITS)
        whole = rule is not None and not rule.refused and rule.replicated and 0 in rule.ranks
        if not (self.rated and whole) or type(self._logits) is not torch.Tensor:
            return None
        return float(self._logits[0, -1].float().softmax(-1)[token])
