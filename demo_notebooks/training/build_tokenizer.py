"""Train the byte-level BPE tokenizer of the demo model.

Every text round-trips, because all 256 bytes are in the vocabulary.  Names, places,
objects and fact answers become single tokens with their leading space.  The beginning
token is added to every text by default, which is how the model is trained.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import corpus
import ioi
import words
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

BOS, EOS, PAD = "<bos>", "<eos>", "<pad>"
VOCAB_SIZE = 2048
CONTEXT = 256
SAMPLE_DOCUMENTS = 30_000
WORD_WEIGHT = 400


def whole_words() -> list[str]:
    """List the words that are to be single tokens after a space."""
    found = set(words.GIRLS + words.BOYS + words.PLACES + words.OBJECTS)
    for fact in corpus.load_facts():
        found.update((fact.subject, fact.answer))
    for template in ioi.HELD_OUT_TEMPLATES:
        found.update(word.strip(".,") for word in template.split() if "{" not in word)
    return sorted(found)


def _texts(seed: int) -> Iterator[str]:
    for word in whole_words():
        yield f" {word}" * WORD_WEIGHT
    for document in itertools.islice(corpus.documents(seed), SAMPLE_DOCUMENTS):
        yield document.text


def build(seed: int = 0) -> PreTrainedTokenizerFast:
    """Train the tokenizer on a sample of the corpus."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(seed), trainer)
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                single=f"{BOS} $A",
                pair=f"{BOS} $A {BOS} $B",
                special_tokens=[(BOS, tokenizer.token_to_id(BOS))],
            ),
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )


def save(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(str(folder))
