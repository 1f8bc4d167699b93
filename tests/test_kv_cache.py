"""The cache of keys and values is found under the name that the installed transformers gives it."""

import inspect

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from flexmagic.engine.kv_cache import NAMES, cache_in, name_in, tokens_in


def test_generate_hands_over_the_cache_under_a_known_name():
    config = LlamaConfig(
        vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2
    )
    model, seen = LlamaForCausalLM(config), []
    names = set(inspect.signature(model.forward).parameters)
    assert names & set(NAMES)
    model.register_forward_pre_hook(
        lambda _m, _a, given: seen.append((cache_in(given), tokens_in(given))), with_kwargs=True
    )
    model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=3, do_sample=False, eos_token_id=None)
    assert [tokens for _, tokens in seen] == [0, 3, 4]
    assert all(isinstance(cache, DynamicCache) for cache, _ in seen)
    output = model(torch.tensor([[1, 2]]), use_cache=True)
    assert isinstance(getattr(output, name_in(output)), DynamicCache)


def test_what_is_no_cache_is_none():
    assert cache_in({"cache": {"a": 1}, "past_key_values": None}) is None
    assert tokens_in({"input_ids": torch.zeros(1, 2)}) == 0
    assert name_in(torch.zeros(2)) is None
