"""Turn documents into batches of token rows with a loss weight for every target."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass

import corpus
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

SPAN_WEIGHT = 4.0
CHUNK = 4096


@dataclass(frozen=True)
class Batch:
    """Token rows ``ids`` [rows, length] and the weight of predicting each of them."""

    ids: Tensor
    weights: Tensor


def _encode(
    tokenizer: PreTrainedTokenizerBase, docs: list[corpus.Document]
) -> list[tuple[list[int], list[float]]]:
    """Tokenize; every token that overlaps a marked span gets the larger weight."""
    encoded = tokenizer([doc.text for doc in docs], return_offsets_mapping=True)
    rows = []
    for doc, ids, offsets in zip(docs, encoded.input_ids, encoded.offset_mapping, strict=True):
        weights = [1.0] * len(ids)
        for start, end in doc.spans:
            for place, (left, right) in enumerate(offsets):
                if left < end and right > start and right > left:
                    weights[place] = SPAN_WEIGHT
        rows.append(([*ids, tokenizer.eos_token_id], [*weights, 1.0]))
    return rows


def _pad(rows: list[tuple[list[int], list[float]]], pad_id: int, limit: int) -> Batch:
    length = min(limit, max(len(ids) for ids, _ in rows))
    ids = torch.full((len(rows), length), pad_id)
    weights = torch.zeros(len(rows), length)
    for number, (row, row_weights) in enumerate(rows):
        kept = min(length, len(row))
        ids[number, :kept] = torch.tensor(row[:kept])
        weights[number, :kept] = torch.tensor(row_weights[:kept])
    return Batch(ids, weights)


def text_batches(
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    *,
    tokens: int,
    context: int,
    shares: tuple[float, float, float] = corpus.SHARES,
) -> Iterator[Batch]:
    """Yield batches of whole documents of like length, one document to a row.

    One batch in eight holds rows as long as the context instead, each of many
    documents one after the other, so that late positions are trained too.
    """
    rng = random.Random(seed)
    source = corpus.documents(seed, shares=shares)
    pad_id = tokenizer.pad_token_id
    while True:
        rows = _encode(tokenizer, list(itertools.islice(source, CHUNK)))
        packed_count = len(rows) // 8
        packed, short = rows[:packed_count], sorted(rows[packed_count:], key=lambda r: len(r[0]))
        batches = []
        group: list[tuple[list[int], list[float]]] = []
        for row in short:
            if group and len(row[0]) * (len(group) + 1) > tokens:
                batches.append(_pad(group, pad_id, context))
                group = []
            group.append(row)
        ids = [i for row, _ in packed for i in row]
        weights = [x for _, row in packed for x in row]
        long = [
            (ids[at : at + context], weights[at : at + context])
            for at in range(0, len(ids) - context, context)
        ]
        per = max(1, tokens // context)
        batches.extend(_pad(long[at : at + per], pad_id, context) for at in range(0, len(long), per))
        rng.shuffle(batches)
        yield from batches


def repeated_tokens(
    rng: torch.Generator, *, rows: int, period: int, length: int, bos: int, vocab: int, special: int
) -> Tensor:
    """Make rows [rows, length]: the beginning token, then random tokens over and over."""
    once = torch.randint(special, vocab, (rows, period), generator=rng)
    times = -(-(length - 1) // period)
    start = torch.full((rows, 1), bos)
    return torch.cat((start, once.repeat(1, times)), dim=1)[:, :length]


def longest_period(number: int, context: int) -> int:
    """Give the longest period of batch ``number``: short at first, then growing faster."""
    slow, fast = 4 + 0.06 * number, 28 + 0.25 * (number - 400)
    return int(min(max(slow, fast), (context - 1) // 2))


def repeat_batches(
    tokenizer: PreTrainedTokenizerBase, seed: int, *, tokens: int, context: int, growing: bool = True
) -> Iterator[Batch]:
    """Yield batches of random tokens said two or three times, with a period for each batch.

    Periods are short at first and grow, unless ``growing`` is false: then all are drawn at once.
    The first pass cannot be predicted, so it has no part in the loss.  Rows are as
    short as their periods allow: many different short rows teach copying soonest, and
    a copied token can only be looked for in the right place once it can be copied.
    """
    rng = torch.Generator().manual_seed(seed)
    choose = random.Random(seed)
    special = len(tokenizer.all_special_ids)
    for number in itertools.count():
        longest = longest_period(number, context) if growing else (context - 1) // 2
        period = choose.randint(2, longest)
        length = min(context, period * choose.choice((2, 3)) + 1)
        ids = repeated_tokens(
            rng,
            rows=max(1, tokens // length),
            period=period,
            length=length,
            bos=tokenizer.bos_token_id,
            vocab=len(tokenizer),
            special=special,
        )
        weights = torch.ones(ids.shape)
        weights[:, : period + 1] = 0.0
        yield Batch(ids, weights)
