from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from flexmagic.engine.inputs import prepare
from flexmagic.errors import InputError

CPU = torch.device("cpu")


class Tokenizer:
    pad_token = "<pad>"  # noqa: S105 - a padding token

    def __call__(self, texts, *, return_tensors, padding):
        ids = [[ord(c) - 96 for c in text] for text in texts]
        width = max(map(len, ids))
        return {
            "input_ids": torch.tensor([row + [0] * (width - len(row)) for row in ids]),
            "attention_mask": torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in ids]),
        }

    def decode(self, ids):
        return "".join(chr(i + 96) for i in ids)


def language_model(**config):
    model = nn.Linear(1, 1)
    model.config = SimpleNamespace(
        **{"vocab_size": 30, "max_position_embeddings": 6, "use_cache": True} | config
    )
    return model


def arguments(inputs, model=None, tokenizer=None):
    return prepare(inputs, model or language_model(), tokenizer or Tokenizer(), CPU)


def test_a_text_is_one_row_and_texts_are_a_padded_batch():
    one = arguments("abc")
    assert one.arguments["input_ids"].tolist() == [[1, 2, 3]]
    assert one.tokens == [["a", "b", "c"]]
    assert one.arguments["use_cache"] is False
    assert "attention_mask" not in one.arguments
    two = arguments(["abc", "z"])
    assert two.arguments["input_ids"].tolist() == [[1, 2, 3], [26, 0, 0]]
    assert two.arguments["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert "attention_mask" not in arguments(["ab", "cd"]).arguments


@pytest.mark.parametrize("ids", [[1, 2], [[1, 2]], np.array([1, 2]), torch.tensor([[1, 2]]), (1, 2)])
def test_token_ids_come_in_many_forms(ids):
    got = arguments(ids).arguments["input_ids"]
    assert got.tolist() == [[1, 2]]
    assert got.dtype == torch.int64


def test_a_dict_is_the_models_own_arguments():
    got = arguments({"x": np.ones((2, 2)), "flag": True}, nn.Linear(2, 2)).arguments
    assert torch.equal(got["x"], torch.ones(2, 2, dtype=torch.float64))
    assert got["flag"] is True
    assert "use_cache" not in got


@pytest.mark.parametrize(
    ("inputs", "said"),
    [
        ("", "empty"),
        ("   ", "empty"),
        (["ab", ""], "empty"),
        ("abcdefg", "7 tokens; the model's context is 6"),
        ([1, 30], "id 30 is outside the vocabulary of 30"),
        ([-1, 3], "id -1"),
        ([1.5], "whole numbers"),
        ([], "whole numbers"),
        ([[[1]]], "whole numbers"),
        (object(), "object is no input"),
        (None, "NoneType is no input"),
    ],
)
def test_bad_input_is_one_sentence(inputs, said):
    with pytest.raises(InputError, match=said):
        arguments(inputs)


def test_a_text_needs_a_tokenizer_and_a_batch_a_padding_token():
    with pytest.raises(InputError, match="no tokenizer"):
        prepare("abc", language_model(), None, CPU)
    unpadded = Tokenizer()
    unpadded.pad_token = None
    with pytest.raises(InputError, match="padding token"):
        arguments(["a", "bc"], tokenizer=unpadded)
