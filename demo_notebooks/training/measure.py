"""Measure what the demo model can do, print the table, and fail if a target is missed.

python demo_notebooks/training/measure.py            # print the figures
python demo_notebooks/training/measure.py --write    # and put them into the card
"""

from __future__ import annotations

import argparse
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

sys.path.insert(0, str(Path(__file__).resolve().parent))
import batches
import corpus
import ioi
import words

MODEL_FOLDER = Path(__file__).resolve().parent.parent / "model"
HEADLINE = ioi.Example("When Mary and John went to the store, John gave a drink to", "Mary", "John")
IOI_TEST_SEED = 2024
ROWS_AT_ONCE = 64
OPENINGS = (
    "One day, Tom",
    "The dog",
    "Once upon a time, there was a girl",
    '"Where are you going?" asked',
    "Anna was a clever girl.",
    "The weather",
)


@dataclass(frozen=True)
class Row:
    """One line of the table; ``passed`` is None where nothing is demanded."""

    what: str
    figure: str
    target: str = ""
    passed: bool | None = None


class Subject:
    """A model with its tokenizer, and the few questions that are put to it."""

    def __init__(self, folder: Path = MODEL_FOLDER) -> None:
        self.tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(str(folder))
        self.model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(str(folder)).eval()

    @torch.no_grad()
    def last_logits(self, prompts: list[str]) -> Tensor:
        """Give the logits [prompts, vocabulary] of the token after each prompt."""
        found = []
        for at in range(0, len(prompts), ROWS_AT_ONCE):
            part = prompts[at : at + ROWS_AT_ONCE]
            rows = self.tokenizer(part, return_tensors="pt", padding=True, padding_side="right")
            logits = self.model(**rows).logits
            found.append(logits[torch.arange(len(part)), rows.attention_mask.sum(dim=1) - 1])
        return torch.cat(found)

    def first_tokens(self, answers: list[str]) -> Tensor:
        """Give the id of the first token of each answer after a space; [answers]."""
        spaced = [f" {answer}" for answer in answers]
        return torch.tensor([ids[0] for ids in self.tokenizer(spaced, add_special_tokens=False).input_ids])

    def hits(self, prompts: list[str], answers: list[str]) -> Tensor:
        """Tell for each prompt whether its answer is the likeliest next token; [prompts]."""
        return self.last_logits(prompts).argmax(dim=-1) == self.first_tokens(answers)


def ioi_hits(subject: Subject, tests: list[ioi.Example]) -> Tensor:
    """Tell for each test whether the indirect object is the top token; [tests]."""
    return subject.hits([test.prompt for test in tests], [test.answer for test in tests])


def headline(subject: Subject) -> tuple[float, float]:
    """Give the probability of Mary and her lead over the next token in logits."""
    logits = subject.last_logits([HEADLINE.prompt])[0]
    mary = int(subject.first_tokens([HEADLINE.answer]))
    rest = logits.clone()
    rest[mary] = -math.inf
    return float(logits.softmax(-1)[mary]), float(logits[mary] - rest.max())


@torch.no_grad()
def induction(subject: Subject, period: int, rows: int = 48, seed: int = 7) -> tuple[float, float]:
    """Give the mean loss on the first and on the second pass over random tokens."""
    tokenizer = subject.tokenizer
    ids = batches.repeated_tokens(
        torch.Generator().manual_seed(seed),
        rows=rows,
        period=period,
        length=2 * period + 1,
        bos=tokenizer.bos_token_id,
        vocab=len(tokenizer),
        special=len(tokenizer.all_special_ids),
    )
    logits = subject.model(ids).logits[:, :-1]
    losses = functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
    return float(losses[:, :period].mean()), float(losses[:, period:].mean())


def fact_hits(subject: Subject, *, new_wording: bool = False) -> dict[str, Tensor]:
    """Tell for every listed fact whether its answer is the top token, by relation."""
    facts = corpus.load_facts()
    prompts = [fact.new_wording if new_wording else fact.prompt for fact in facts]
    hits = subject.hits(prompts, [fact.answer for fact in facts])
    relations = dict.fromkeys(fact.relation for fact in facts)
    return {name: hits[[at for at, fact in enumerate(facts) if fact.relation == name]] for name in relations}


@torch.no_grad()
def perplexity(subject: Subject, count: int = 400) -> float:
    """Give the perplexity per token on freshly generated stories."""
    total, tokens = 0.0, 0
    pad = subject.tokenizer.pad_token_id
    stories = sorted(corpus.held_out_stories(count), key=len)
    for at in range(0, count, ROWS_AT_ONCE):
        rows = subject.tokenizer(
            stories[at : at + ROWS_AT_ONCE], return_tensors="pt", padding=True, padding_side="right"
        )
        logits = subject.model(**rows).logits[:, :-1].transpose(1, 2)
        targets = rows.input_ids[:, 1:]
        total += float(functional.cross_entropy(logits, targets, ignore_index=pad, reduction="sum"))
        tokens += int((targets != pad).sum())
    return math.exp(total / tokens)


def continuations(subject: Subject) -> list[tuple[str, str]]:
    """Continue the openings: the first half greedily, the rest by seeded sampling."""
    torch.manual_seed(0)
    told = []
    for number, opening in enumerate(OPENINGS):
        sampled = number >= len(OPENINGS) // 2
        rows = subject.tokenizer(opening, return_tensors="pt")
        ids = subject.model.generate(**rows, max_new_tokens=60, do_sample=sampled)
        text = subject.tokenizer.decode(ids[0], skip_special_tokens=True)
        told.append(("sampled" if sampled else "greedy", text))
    return told


def _share(hits: Tensor) -> str:
    return f"{100 * hits.float().mean().item():.1f} % of {len(hits)}"


def _ioi_rows(subject: Subject, count: int) -> list[Row]:
    probability, lead = headline(subject)
    tests = ioi.examples(IOI_TEST_SEED, count)
    hits = ioi_hits(subject, tests)
    known = tuple(scene + giving for scene in ioi.SCENES for giving in ioi.GIVINGS)
    seen = ioi.examples(IOI_TEST_SEED, count, names=words.TRAIN_NAMES, templates=known)
    enough = 0.95
    return [
        Row(
            f"“{HEADLINE.prompt}” → Mary",
            f"p = {probability:.3f}, {lead:.1f} logits ahead",
            "at least 2 logits ahead",
            lead >= 2,
        ),
        Row(
            "indirect object, held-out names and templates",
            _share(hits),
            "at least 95 %",
            hits.float().mean().item() >= enough,
        ),
        Row(
            "— receiver named first (ABBA)",
            _share(hits[0::2]),
            "at least 95 %",
            hits[0::2].float().mean().item() >= enough,
        ),
        Row(
            "— giver named first (BABA)",
            _share(hits[1::2]),
            "at least 95 %",
            hits[1::2].float().mean().item() >= enough,
        ),
        Row("indirect object, trained names and templates", _share(ioi_hits(subject, seen))),
    ]


def measure(subject: Subject, count: int = 1200) -> list[Row]:
    """Make the whole table."""
    rows = _ioi_rows(subject, count)
    for period in (20, 50, 100):
        first, second = induction(subject, period)
        rows.append(
            Row(
                f"{period} random tokens, twice: loss on the first and the second pass",
                f"{first:.2f} and {second:.2f} (ratio {second / first:.3f})",
                "ratio at most 0.25",
                second <= first / 4,
            )
        )
    facts = fact_hits(subject)
    every = torch.cat(list(facts.values()))
    rows.append(Row("listed facts", _share(every), "at least 95 %", every.float().mean().item() >= 0.95))
    rows.extend(Row(f"— {name}", _share(hits)) for name, hits in facts.items())
    reworded = torch.cat(list(fact_hits(subject, new_wording=True).values()))
    rows.append(Row("the same facts in a wording never trained", _share(reworded)))
    rows.append(Row("perplexity per token, newly generated stories", f"{perplexity(subject):.2f}"))
    return rows


def as_markdown(rows: list[Row]) -> str:
    """Lay the rows out as a Markdown table."""
    lines = ["| what | measured | target |", "| --- | --- | --- |"]
    lines += [f"| {row.what} | {row.figure} | {row.target} |" for row in rows]
    return "\n".join(lines)


def write_between(text: str, name: str, content: str) -> str:
    """Replace what stands between ``<!-- name -->`` and ``<!-- end name -->``."""
    start, end = f"<!-- {name} -->", f"<!-- end {name} -->"
    before, found, rest = text.partition(start)
    _, closed, after = rest.partition(end)
    if not (found and closed):
        message = f"the card has no {start} … {end}"
        raise ValueError(message)
    return f"{before}{start}\n{content}\n{end}{after}"


def main() -> int:
    """Measure; exit 1 if a target is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=MODEL_FOLDER, help="model folder")
    parser.add_argument("--write", action="store_true", help="put the figures into the card")
    options = parser.parse_args()
    subject = Subject(options.model)
    rows = measure(subject)
    told = continuations(subject)
    print(as_markdown(rows))
    samples = "\n".join(f"- {how}: {text}" for how, text in told)
    print(f"\n{samples}")
    if options.write:
        card = options.model / "README.md"
        text = card.read_text(encoding="utf-8")
        text = write_between(text, "figures", as_markdown(rows))
        text = write_between(text, "samples", samples)
        card.write_text(text, encoding="utf-8")
    missed = [row.what for row in rows if row.passed is False]
    for what in missed:
        print(f"target missed: {what}", file=sys.stderr)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
