"""Standard names on tiny random models of each family: each tensor is what its name says."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from flexmagic.engine.probe import observe
from flexmagic.engine.tree import modules_of
from flexmagic.layout.dims import PROBES, name_dims
from flexmagic.layout.heads import Heads
from flexmagic.layout.sites import Site
from flexmagic.layout.standard import OF_HEADS, TENSORS, Standard, Structure, is_standard

SMALL = {
    "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48, "vocab_size": 103,
    "num_hidden_layers": 3, "max_position_embeddings": 32, "initializer_range": 0.2,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
GROUPED = {"num_key_value_heads": 2}
FAMILIES = {
    "llama": GROUPED,
    "mistral": GROUPED,
    "qwen2": GROUPED,
    "qwen3": GROUPED | {"head_dim": 16},
    "gemma": GROUPED | {"head_dim": 8},
    "gemma2": GROUPED | {"head_dim": 8},
    "mixtral": GROUPED | {"num_local_experts": 2},
    "phi3": GROUPED | {"original_max_position_embeddings": 32},
    "gpt2": {"n_inner": 48},
    "gpt_neox": {},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "phi": {},
    "bloom": {},
    "falcon": {"new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1},
}
SIDE_BY_SIDE = {"gpt_neox", "phi", "falcon"}
UNUSED = {"use_cache": False}


def made(kind):
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **(SMALL | FAMILIES[kind]))
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def values_of(model, ids):
    found = {}
    observe(model, lambda: model(input_ids=ids, **UNUSED), lambda s, t: found.setdefault(s, t.clone()))
    return found


def standard_names(model):
    ids = [torch.randint(3, 100, shape) for shape in PROBES]
    with torch.no_grad():
        first, second = (values_of(model, i) for i in ids)
    dims = {s: name_dims(tuple(t.shape), tuple(second[s].shape), {}) for s, t in first.items()}
    kinds = {path: type(module).__name__ for path, module in modules_of(model).items()}
    weighted = frozenset(p for p, m in modules_of(model).items() if any(True for _ in m.parameters()))

    def look(sites, tokens, edit):
        handles = []
        if edit is not None:
            handles.append(model.get_submodule(edit[0].path).register_forward_hook(changing(edit[1])))
        with torch.no_grad():
            found = values_of(model, torch.arange(5, 5 + tokens)[None])
        for handle in handles:
            handle.remove()
        return {site: found[site] for site in sites}

    known = {s: d for s, d in dims.items() if d is not None}
    return Standard(Structure(kinds, weighted, known), look).find()


def changing(features):
    def hook(_module, _args, out):
        out = out.clone()
        out[:, 0, list(features)] += out.abs().max() + 1
        return out

    return hook


@pytest.mark.parametrize("kind", FAMILIES)
def test_every_name_is_what_it_says(kind):
    model = made(kind)
    names = standard_names(model)
    with torch.no_grad():
        values = values_of(model, torch.randint(3, 100, (2, 9)))

    def value(name):
        meaning = names[name]
        assert not meaning.missing, (name, meaning.missing)
        x = values[Site(meaning.path, meaning.port or "output", meaning.leaf)]
        return x if meaning.heads is None else meaning.heads.cut(x)

    for layer in range(3):
        at = f"blocks.{layer}."
        pre, post, attn, mlp = (
            value(at + name) for name in ("resid_pre", "resid_post", "attn_out", "mlp_out")
        )
        mlp = mlp.reshape(pre.shape)
        torch.testing.assert_close(pre + attn + mlp, post, rtol=1e-4, atol=1e-4)
        if layer:
            assert torch.equal(pre, value(f"layers.{layer - 1}.resid_post"))
        if kind in SIDE_BY_SIDE:
            assert "side by side" in names[at + "resid_mid"].missing
        else:
            torch.testing.assert_close(
                value(at + "resid_mid").reshape(pre.shape), pre + attn, rtol=1e-4, atol=1e-4
            )
        pattern, q, k, v, z = (value(f"{at}attn.{name}") for name in OF_HEADS)
        heads, groups = q.shape[2], k.shape[2]
        assert pattern.shape == (2, 4, 9, 9)
        assert heads == 4
        assert (
            groups == v.shape[2] == (2 if "num_key_value_heads" in FAMILIES[kind] or kind == "falcon" else 4)
        )
        mixed = torch.einsum("bhst,bthd->bshd", pattern, v.repeat_interleave(4 // groups, 2))
        torch.testing.assert_close(mixed.reshape(z.shape), z, rtol=1e-4, atol=1e-5)
        if kind in {"gpt2", "opt"}:
            scores = torch.einsum("bshd,bthd->bhst", q, k) / (1 if kind == "opt" else q.shape[-1] ** 0.5)
            scores = scores.masked_fill(torch.ones(9, 9).triu(1).bool(), float("-inf"))
            scale = 1 if kind == "gpt2" else q.shape[-1] ** -0.5
            torch.testing.assert_close((scores * scale).softmax(-1), pattern, rtol=1e-3, atol=1e-4)
    assert value("embed").shape == (2, 9, 32)
    assert value("unembed").shape == (2, 9, 103)
    assert value("final_norm").shape == (2, 9, 32)
    assert all(f"blocks.{n}.{name}" in names for n in range(3) for name in TENSORS)


def test_heads_that_are_evenly_apart_are_views():
    x = torch.arange(2 * 24.0).reshape(2, 24)
    for heads in (Heads.evenly(4, 2, 8), Heads.evenly(4, 2, 2, 6)):
        part = heads.cut(x)
        assert part.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
        assert part.shape == (2, 4, 2)
        assert torch.equal(part[:, 1], x[:, heads.starts[1] : heads.starts[1] + 2])
        part.zero_()
    assert int((x == 0).sum()) > 16
    odd = Heads((0, 2, 6, 8), 2)
    part = odd.cut(x)
    assert odd.step is None
    odd.paste(x, part + 1)
    assert torch.equal(odd.cut(x), part + 1)


def test_what_may_be_a_standard_name():
    assert all(map(is_standard, ("blocks.*.attn.q", "layers.3", "embed", "unembed")))
    assert not any(map(is_standard, ("model.layers.3", "blocksy", "embedding")))


def test_keys_that_come_before_queries_are_found_by_what_they_change():
    """The same GPT-2, its projection's output and what takes it apart turned round."""
    plain, turned = made("gpt2"), made("gpt2")
    for block in turned.transformer.h:
        for of in (block.attn.c_attn.weight, block.attn.c_attn.bias):
            query, key, value = of.data.split(32, -1)
            of.data = torch.cat((key, query, value), -1)
        block.attn.c_attn.register_forward_hook(lambda _m, _a, out: Turned.of(out))
    ids = torch.randint(3, 100, (2, 9))
    with torch.no_grad():
        assert torch.equal(turned(ids).logits, plain(ids).logits)
        names = standard_names(turned)["blocks.1.attn.q"], standard_names(plain)["blocks.1.attn.q"]
        found = [values_of(m, ids)[Site(n.path)] for m, n in zip((turned, plain), names, strict=True)]
    assert names[0].heads.starts != names[1].heads.starts
    assert torch.equal(names[0].heads.cut(found[0]), names[1].heads.cut(found[1]))


class Turned(torch.Tensor):
    """A projection's output whose parts come out of ``split`` as keys, queries and values do."""

    @classmethod
    def of(cls, tensor):
        return tensor.as_subclass(cls)

    def split(self, size, dim=0):
        first, second, third = self.as_subclass(torch.Tensor).split(size, dim)
        return second, first, third
