"""Other Hugging Face models over two engines: every site right, or on the frozen list of the refused."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from flexmagic import InputError, ModelError, Session
from flexmagic.engine.probe import observe

from .conftest import MODEL, PROMPT, relative
from .matrix.models import CHECKPOINTS, SMALL, made

pytestmark = pytest.mark.engines

FAMILIES = {
    "llama, odd width, biases": (
        "llama",
        {"intermediate_size": 171, "attention_bias": True, "mlp_bias": True},
        set(),
    ),
    "llama, tied embeddings": ("llama", {"tie_word_embeddings": True}, set()),
    "phi3, fused projections": ("phi3", {"original_max_position_embeddings": 64}, set()),
    "gemma2, norms after": ("gemma2", {"head_dim": 8}, set()),
    "gpt-neox, fused and parallel": ("gpt_neox", {}, set()),
    "qwen3, norms on heads": ("qwen3", {"head_dim": 8}, set()),
    "mixtral, experts": (
        "mixtral",
        {"num_local_experts": 4, "num_experts_per_tok": 2},
        # inside the experts the number of tokens depends on the data
        {f"model.layers.{i}.mlp.experts.act_fn:{port}" for i in range(2) for port in ("input[0]", "output")},
    ),
}
IDS = torch.randint(3, 200, (3, 11), generator=torch.Generator().manual_seed(0))


def checkpoint(folder, kind, options):
    """A tiny random model on disk."""
    grouped = {} if kind == "gpt_neox" else {"num_key_value_heads": 4}
    return made(AutoModelForCausalLM, kind, SMALL | grouped | options, folder)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_site_equals_one_process_or_is_refused_as_listed(session, tmp_path, family):
    kind, options, expected_refused = FAMILIES[family]
    folder = checkpoint(tmp_path, kind, options)
    rules = session.load(folder, attn="eager").rules
    refused = {str(site) for site, rule in rules.items() if rule.refused}
    assert refused == expected_refused
    truth = {}
    one = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    observe(one, lambda: one(input_ids=IDS, use_cache=False), lambda s, t: truth.setdefault(s, t.clone()))
    assert set(truth) == set(rules)
    places = sorted({f"{s.path}:{s.port}" for s in rules if s.path} | {":input"})
    run = session.run(IDS, capture=places)
    split = 0
    for site, rule in rules.items():
        if not rule.refused:
            activation = run[str(site)]
            split += not activation.layout.replicated
            assert relative(activation.torch(), truth[site]) <= 1e-5, site
    # the plan for phi3 gathers the outputs of its fused projections, so that nothing split is to be seen
    assert split >= 8 or kind == "phi3"


def test_a_model_without_a_plan_for_tensor_parallelism_is_refused(session, tmp_path):
    config = AutoConfig.for_model("gpt2", n_embd=64, n_head=4, n_layer=1, vocab_size=203, n_positions=64)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"could not be loaded: .*no `tp_plan`"):
        session.load(tmp_path)


def test_gradients_of_one_unit_of_fully_shard_and_no_words_without_a_tokenizer(session, tmp_path):
    folder = made(AutoModelForCausalLM, *CHECKPOINTS["GPT-2"], tmp_path)
    session.load(folder, fsdp=2, attn="eager")
    site, loss = "transformer.h.0:grad_output", "logits[:, -1, 5].sum()"
    run = session.run(IDS, backward=loss, capture=site)
    one, kept = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval(), []
    handle = one.transformer.h[0].register_forward_hook(lambda _m, _a, out: kept.append(out))
    logits = one(IDS, use_cache=False).logits
    handle.remove()
    (want,) = torch.autograd.grad(logits[:, -1, 5].sum(), kept)
    assert relative(run[site].torch(), want) <= 1e-5
    with pytest.raises(InputError, match="no tokenizer"):
        session.run("any text")


def test_bfloat16_keeps_its_bits(session):
    session.load(MODEL, dtype="bfloat16")
    run = session.run(PROMPT, capture="model.layers.1.mlp.up_proj")
    activation = run["model.layers.1.mlp.up_proj"]
    assert activation.dtype == "bfloat16"
    whole = activation.torch()
    assert whole.dtype == torch.bfloat16
    assert activation.numpy().dtype == "float32"
    assert torch.equal(torch.from_numpy(activation.numpy()), whole.float())
    assert torch.equal(torch.from_numpy(activation[0, 3:7, ::5]), whole[0, 3:7, ::5].float())
    with pytest.raises(ModelError, match='dtype="float32"'):
        session.run(PROMPT, backward="logits[0, -1, 5]")


@pytest.mark.slow
def test_four_ranks_hold_a_quarter_each(one_process, ids):
    with Session.start(4, oversubscribe=True) as four:
        four.load(MODEL, tp=4)
        run = four.run(PROMPT, capture=["model.layers.*.mlp.*", "model.layers.*.self_attn.*"])
        with torch.no_grad():
            assert relative(run.logits.torch(), one_process(ids, use_cache=False).logits) <= 1e-5
        keys = run["model.layers.0.self_attn.k_proj"]
        assert [block[2] for block in keys.layout.blocks] == [((a, a + 32),) for a in (0, 32, 64, 96)]
        with torch.no_grad():
            hidden = one_process.model.embed_tokens(ids)
            layer = one_process.model.layers[0]
            expected = layer.self_attn.k_proj(layer.input_layernorm(hidden))
        assert relative(keys.torch(), expected) <= 1e-5
        plain = run.logits.torch()
        four.hook("model.layers.1.mlp.up_proj", "x[..., -1] += 100", name="last_neuron")
        assert relative(four.run(PROMPT).logits.torch(), plain) > 1e-4
