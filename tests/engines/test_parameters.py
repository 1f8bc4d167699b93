"""Parameters are whole whatever holds them in parts, and nothing else of the model is gathered."""

from __future__ import annotations

import pytest
import torch

from flexmagic import ModelError

from .conftest import MODEL, PROMPT

NAMES = ("model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight", "model.norm.weight")


FSDP1 = f"""
import functools
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

policy = functools.partial(transformer_auto_wrap_policy, transformer_layer_cls={{LlamaDecoderLayer}})
whole = AutoModelForCausalLM.from_pretrained({str(MODEL)!r})
model = FullyShardedDataParallel(whole, auto_wrap_policy=policy, use_orig_params=True, device_id=device)
"""


@pytest.mark.parametrize("how", ["tp", "fsdp", "dp", "pp", "fsdp1"])
def test_a_parameter_is_whole(session, one_process, how):
    if how == "fsdp1":
        session.load_cell(FSDP1, fsdp=2)
    else:
        session.load(MODEL, **{how: 2})
    whole = dict(one_process.named_parameters())
    before = session.model.parameter_bytes
    for name in NAMES:
        assert torch.equal(session.model.parameter(name), whole[name]), name
    assert session.model.parameter_bytes == before
    assert session.run([[1, 2, 3]]).logits.shape == (1, 3, 2048)


def test_gradients_of_flat_parameters_are_refused_with_the_way_out(session):
    session.load_cell(FSDP1, fsdp=2)
    with pytest.raises(ModelError, match="fully_shard"):
        session.run(PROMPT, backward="logits.sum()")
