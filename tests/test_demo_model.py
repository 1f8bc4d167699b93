"""The shipped demo model loads, and still does what its card says it does."""

from __future__ import annotations

import importlib
import json
import math
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors import safe_open

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "demo_notebooks" / "model"
TRAINING = ROOT / "demo_notebooks" / "training"
LARGEST_BYTES = 12_000_000


@pytest.fixture(scope="module")
def scripts() -> Iterator[dict[str, ModuleType]]:
    """Import the training scripts by their plain names, and forget them afterwards."""
    names = ("words", "story_templates", "stories", "ioi", "corpus", "batches", "forward", "measure")
    path, known = list(sys.path), set(sys.modules)
    sys.path.insert(0, str(TRAINING))
    try:
        yield {name: importlib.import_module(name) for name in names}
    finally:
        sys.path[:] = path
        for name in set(names) - known:
            sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def subject(scripts: dict[str, ModuleType]) -> Any:
    """The model and tokenizer as anyone loads them, without a network."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        return scripts["measure"].Subject(MODEL)


def test_weights_are_small_and_half_precision_on_disk() -> None:
    """The shipped file keeps to its size and holds nothing but half-precision tensors."""
    file = MODEL / "model.safetensors"
    assert file.stat().st_size <= LARGEST_BYTES
    with safe_open(str(file), framework="pt") as weights:
        dtypes = {weights.get_slice(name).get_dtype() for name in weights.keys()}  # noqa: SIM118
    assert dtypes <= {"F16", "BF16"}


def test_loads_in_float32_with_grouped_heads(subject: Any) -> None:
    """Default arguments give float32 parameters and the documented architecture."""
    assert {p.dtype for p in subject.model.parameters()} == {torch.float32}
    config = subject.model.config
    assert config.model_type == "llama"
    assert (config.num_attention_heads, config.num_key_value_heads) == (8, 4)
    assert 4 <= config.num_hidden_layers <= 6
    assert config.vocab_size % 4 == 0
    assert config.intermediate_size % 4 == 0
    assert len(subject.tokenizer) == config.vocab_size
    head, embeddings = subject.model.lm_head.weight, subject.model.model.embed_tokens.weight
    assert head.data_ptr() != embeddings.data_ptr()


@pytest.mark.parametrize(
    "text",
    [
        "plain words",
        "  two spaces, and a trailing one ",
        "tab\tnewline\n\r\nnull\x00end",
        "naïve Ünïcødé — “quotes” … 日本語 العربية",
        "family 👨‍👩‍👧 flag 🇫🇷 e\u0301 \u200b\ufeff",
        "don't , stop . now !",
        "x" * 500,
        "",
    ],
)
def test_tokenizer_round_trips(subject: Any, text: str) -> None:
    """Any text comes back unchanged, and begins with the beginning token once."""
    ids = subject.tokenizer(text).input_ids
    bos = subject.tokenizer.bos_token_id
    assert ids[0] == bos
    assert bos not in ids[1:]
    assert subject.tokenizer.decode(ids, skip_special_tokens=True) == text


def test_names_and_answers_are_single_tokens(scripts: dict[str, ModuleType], subject: Any) -> None:
    """Every name and every fact answer is one token after a space."""
    words, facts = scripts["words"], scripts["corpus"].load_facts()
    wanted = {*words.TRAIN_NAMES, *words.HELD_OUT_NAMES, *(fact.answer for fact in facts)}
    split = [
        word
        for word in sorted(wanted)
        if len(subject.tokenizer(f" {word}", add_special_tokens=False).input_ids) != 1
    ]
    assert split == []


def test_generates_greedily_and_stops(subject: Any) -> None:
    """Generation is greedy by default, repeatable, and ends with the end token."""
    rows = subject.tokenizer("The capital of France is", return_tensors="pt")
    first, second = subject.model.generate(**rows), subject.model.generate(**rows)
    assert torch.equal(first, second)
    assert first[0, -1] == subject.tokenizer.eos_token_id
    text = subject.tokenizer.decode(first[0], skip_special_tokens=True)
    assert text.startswith("The capital of France is Paris")


def test_gives_the_drink_to_mary(scripts: dict[str, ModuleType], subject: Any) -> None:
    """The best-known sentence of its kind is completed with a comfortable lead."""
    probability, lead = scripts["measure"].headline(subject)
    assert probability >= 0.8
    assert lead >= 2


def test_held_out_names_are_held_out(scripts: dict[str, ModuleType]) -> None:
    """No held-out name and no held-out clause is in any indirect-object training sentence."""
    ioi, words = scripts["ioi"], scripts["words"]
    assert not set(words.TRAIN_NAMES) & set(words.HELD_OUT_NAMES)
    rng = __import__("random").Random(5)
    seen = {word.strip(".,") for _ in range(3000) for word in ioi.training_document(rng)[0].split()}
    assert seen & set(words.TRAIN_NAMES) == set(words.TRAIN_NAMES)
    assert not seen & set(words.HELD_OUT_NAMES)
    for template in ioi.HELD_OUT_TEMPLATES:
        assert not any(template.startswith(scene) for scene in ioi.SCENES)
        assert not any(template.endswith(giving) for giving in ioi.GIVINGS)


def test_indirect_objects_on_held_out_names(scripts: dict[str, ModuleType], subject: Any) -> None:
    """Held-out names in held-out templates: the right name is the top token, in either order."""
    tests = scripts["ioi"].examples(31, 480)
    assert len({test.prompt for test in tests}) > 450
    hits = scripts["measure"].ioi_hits(subject, tests).float()
    assert hits[0::2].mean().item() >= 0.95
    assert hits[1::2].mean().item() >= 0.95


@pytest.mark.parametrize("period", [20, 50, 100])
def test_repeated_random_tokens(scripts: dict[str, ModuleType], subject: Any, period: int) -> None:
    """The second pass over random tokens costs at most a quarter of the first."""
    first, second = scripts["measure"].induction(subject, period, rows=24, seed=11)
    assert second <= first / 4
    assert second <= math.log(len(subject.tokenizer)) / 4


def test_facts_are_recalled(scripts: dict[str, ModuleType], subject: Any) -> None:
    """At least 95 % of the listed facts are the top token after their prompt."""
    hits = torch.cat(list(scripts["measure"].fact_hits(subject).values()))
    assert len(hits) >= 60
    assert hits.float().mean().item() >= 0.95


def test_fact_list_leaves_no_easy_way(scripts: dict[str, ModuleType]) -> None:
    """Prompts are distinct, hide their answers, and no single answer serves many of them."""
    facts = scripts["corpus"].load_facts()
    assert len({fact.prompt for fact in facts}) == len(facts)
    assert not [fact for fact in facts if fact.answer in fact.prompt.split()]
    answers = Counter(fact.answer for fact in facts)
    assert max(answers.values()) / len(facts) < 0.2
    assert len({fact.answer for fact in facts if fact.relation == "capital"}) >= 30
    stated = json.loads((TRAINING / "facts.json").read_text(encoding="utf-8"))["relations"]
    for relation in stated.values():
        openings = [statement.partition("{answer}")[0].strip() for statement in relation["statements"]]
        assert relation["prompt"] in openings
        assert relation["new_wording"] not in openings


def test_quick_forward_is_the_same_model(scripts: dict[str, ModuleType], subject: Any) -> None:
    """The forward pass used in training computes the logits of the model it trains."""
    quick = scripts["forward"].QuickForward(subject.model, torch.float32)
    ids = torch.randint(3, 1000, (3, 40), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        ours, theirs = quick.logits(quick.hidden(ids)), subject.model(ids).logits
    assert torch.allclose(ours, theirs, atol=2e-3)
