"""Standard names on real engines: the same recipe on two families, whole heads, edits of the sites below."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from flexmagic.errors import InputError, SiteError

from .conftest import MODEL, relative
from .matrix import models

IDS = torch.randint(3, 200, (2, 9), generator=torch.Generator().manual_seed(0))
GPT2 = """
from transformers import AutoModelForCausalLM
from torch.distributed.fsdp import fully_shard
model = AutoModelForCausalLM.from_pretrained({folder!r}, attn_implementation="eager")
for block in model.transformer.h:
    fully_shard(block, mesh=mesh["fsdp"])
fully_shard(model, mesh=mesh["fsdp"])
unsharded = lambda: AutoModelForCausalLM.from_pretrained({folder!r}, attn_implementation="eager")
"""
LLAMA = {
    "attn": "model.layers.1.self_attn", "mlp": "model.layers.1.mlp", "q": "model.layers.1.self_attn.q_proj",
    "block": "model.layers.1", "embed": "model.embed_tokens", "final_norm": "model.norm",
    "unembed": "lm_head", "result": "model.layers.1.self_attn.o_proj",
}  # fmt: skip
OF_GPT2 = {
    "attn": "transformer.h.1.attn", "mlp": "transformer.h.1.mlp", "q": "transformer.h.1.attn.c_attn",
    "block": "transformer.h.1", "embed": "transformer.wte", "final_norm": "transformer.ln_f",
    "unembed": "lm_head", "result": "transformer.h.1.attn.c_proj",
}  # fmt: skip


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    return models.write("GPT-2", tmp_path_factory.mktemp("gpt2"))


@pytest.fixture(params=["llama", "gpt2"])
def family(request, session, one_process, gpt2):
    """A loaded model, the same in one process, its own names, and its heads."""
    if request.param == "llama":
        session.load(MODEL, tp=2, attn="eager")
        return session, one_process, LLAMA, one_process.config
    session.load_cell(GPT2.format(folder=str(gpt2)), fsdp=2)
    one = AutoModelForCausalLM.from_pretrained(gpt2, attn_implementation="eager").eval()
    return session, one, OF_GPT2, one.config


def in_one_process(model, names, edits=None):
    """Every named tensor of a layer in one process; ``edits``: of a head's queries, in place."""
    found, handles = {}, []

    def keep(name, port):
        def on(_module, args, kwargs, *out):
            value = out[0] if port == "output" else (args[0] if args else kwargs["hidden_states"])
            found[name, port] = value

        return on

    for name, path in names.items():
        module = model.get_submodule(path)
        if name == "q" and edits is not None:
            handles.append(module.register_forward_hook(lambda _m, _a, out: edits(out.clone())))
        handles.append(module.register_forward_pre_hook(keep(name, "input"), with_kwargs=True))
        handles.append(module.register_forward_hook(keep(name, "output"), with_kwargs=True))
    with torch.no_grad():
        found["logits"] = model(IDS, use_cache=False).logits
    for handle in handles:
        handle.remove()
    return found


def test_one_recipe_reads_two_families(family):
    session, one, names, config = family
    want = in_one_process(one, names)
    heads, groups = (
        config.num_attention_heads,
        getattr(config, "num_key_value_heads", config.num_attention_heads),
    )
    wanted = [
        "resid_pre",
        "resid_mid",
        "resid_post",
        "attn_out",
        "mlp_out",
        "attn.pattern",
        "attn.q",
        "attn.k",
    ]
    wanted = [f"blocks.1.{name}" for name in [*wanted, "attn.v", "attn.z"]]
    run = session.run(IDS, capture=[*wanted, "embed", "final_norm", "unembed", "layers[1].mlp"])
    got = {name: run[name].torch() for name in wanted}
    block = want["block", "output"]
    pairs = [
        (got["blocks.1.resid_pre"], want["block", "input"]),
        (got["blocks.1.resid_post"], block[0] if isinstance(block, tuple) else block),
        (got["blocks.1.attn_out"], want["attn", "output"][0]),
        (got["blocks.1.resid_mid"], want["block", "input"] + want["attn", "output"][0]),
        (got["blocks.1.mlp_out"], want["mlp", "output"]),
        (got["blocks.1.attn.pattern"], want["attn", "output"][1]),
        (run["layers[1].mlp"].torch(), want["mlp", "output"]),
        (run["embed"].torch(), want["embed", "output"]),
        (run["final_norm"].torch(), want["final_norm", "output"]),
        (run["unembed"].torch(), want["logits"]),
        (got["blocks.1.attn.z"].flatten(-2), want["result", "input"]),
    ]
    for n, (value, truth) in enumerate(pairs):
        assert relative(value, truth) <= 1e-5, n
    q = want["q", "output"]
    width = config.hidden_size // heads
    assert relative(got["blocks.1.attn.q"], q[..., : heads * width].unflatten(-1, (heads, width))) <= 1e-5
    assert got["blocks.1.attn.k"].shape == got["blocks.1.attn.v"].shape == (2, 9, groups, width)
    assert run["blocks.1.attn.q"].dims == ("batch", "seq", "heads", "head_dim")
    part = run["blocks.1.attn.q"][1, -1, heads - 1]
    assert relative(part, got["blocks.1.attn.q"][1, -1, heads - 1]) == 0
    assert run["blocks.1.attn.q"].layout.describe_placements()


def test_editing_heads_edits_the_site_below(family):
    session, one, names, config = family
    heads, width = config.num_attention_heads, config.hidden_size // config.num_attention_heads

    def edit(out):
        out[:, -1, width : 2 * width] *= -3
        return out

    want, plain = in_one_process(one, names, edit), in_one_process(one, names)
    session.hook("blocks.1.attn.q", "x[:, :, 1] *= -3", name="turn", token=-1)
    run = session.run(IDS, capture=["blocks.1.attn.q", "blocks.1.attn.z", "blocks.1.attn.pattern"])
    assert relative(plain["logits"], want["logits"]) > 1e-4
    assert relative(run.logits.torch(), want["logits"]) <= 1e-5
    assert relative(run["blocks.1.attn.z"].torch().flatten(-2), want["result", "input"]) <= 1e-5
    session.hooks["turn"].remove()
    before = session.run(IDS, capture=["blocks.1.attn.pattern"])["blocks.1.attn.pattern"].torch()
    changed = run["blocks.1.attn.pattern"].torch()
    assert not torch.equal(changed[:, 1], before[:, 1])
    others = [head for head in range(heads) if head != 1]
    assert torch.equal(changed[:, others], before[:, others])
    session.hook(["blocks.0.attn.k", "blocks.0.attn.v"], lambda x, h: x * 1, name="same")
    same = session.run(IDS)
    assert relative(same.logits.torch(), plain["logits"]) <= 1e-5
    session.hook("blocks.*.attn.q", "x = torch.zeros_like(x)", name="flat")
    run = session.run(IDS, capture=["blocks.0.attn.pattern"])
    flat = run["blocks.0.attn.pattern"].torch()
    assert relative(flat[:, :, -1], torch.full_like(flat[:, :, -1], 1 / 9)) <= 1e-5


def test_the_models_own_names_win_and_mistakes_say_what_there_is(loaded):
    model = loaded.model
    table = str(model.aliases())
    assert "blocks.*.resid_mid" in table
    assert "model.layers.*.post_attention_layernorm:input" in table
    with pytest.raises(SiteError, match=r"Did you mean blocks\.0\.resid_mid"):
        loaded.run(IDS, capture=["blocks.0.resid_middle"])
    with pytest.raises(SiteError, match=r"no standard name 'blocks\.17\.attn'"):
        loaded.hook("blocks.17.attn", "x *= 2")
    with pytest.raises(SiteError, match="has no input"):
        loaded.run(IDS, capture=["blocks.0.resid_mid:input"])
    with pytest.raises(InputError, match="rank's own piece"):
        loaded.hook("blocks.0.attn.q", "x *= 2", local=True)
    assert loaded.run(IDS, stop_at="blocks.1.resid_mid").sites
    skipped = loaded.run(IDS, skip="blocks.2")
    assert torch.equal(skipped.logits.torch(), loaded.run(IDS, skip="model.layers.2").logits.torch())
    run = loaded.run(IDS, backward="logits[:, -1].sum()", capture=["blocks.1.resid_mid:grad_output"])
    assert run["blocks.1.resid_mid:grad_output"].shape == (2, 9, 256)
    made = loaded.generate(IDS[:1], 3, capture=["blocks.1.attn.q"])
    assert made.step(1)["blocks.1.attn.q"].shape[:2] == (1, 1)
    flash = loaded.load(MODEL, tp=2)
    with pytest.raises(SiteError, match='attn="eager"'):
        loaded.run(IDS, capture=["blocks.0.attn.pattern"])
    assert flash.standing_for is not None


def test_a_module_of_the_users_own_name_is_meant(session):
    session.load_cell("""
import torch
from torch import nn

class Layers(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(50, 8)
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(8, 8)) for _ in range(2)])

    def forward(self, input_ids):
        x = self.embed(input_ids)
        for block in self.blocks:
            x = x + block(x)
        return x

model = Layers()
unsharded = Layers
""")
    run = session.run([[1, 2, 3]], capture=["blocks.1", "embed"])
    assert run["blocks.1"].site == "blocks.1:output"
    with pytest.raises(SiteError, match="attention"):
        session.run([[1, 2, 3]], capture=["blocks.1.attn.q"])
