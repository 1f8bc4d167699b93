"""Random models of the sizes that the rows need, written once per run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch


def views_of(session: Any) -> list[Any]:
    """ipyparallel's views of a session's engines, in rank order."""
    return [session._cluster.client[engine] for engine in session._calls.ranks.engines]


def llama(folder: Path, *, width: int = 512, layers: int = 8, heads: int = 8, vocab: int = 2048) -> Path:
    """A random float32 Llama with a tokenizer of the shipped model; returns its folder."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    path = folder / f"llama-{width}-{layers}"
    if not path.is_dir():
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=vocab,
            hidden_size=width,
            intermediate_size=width * 4,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            max_position_embeddings=512,
        )
        LlamaForCausalLM(config).eval().save_pretrained(str(path))
        shipped = Path(__file__).parents[3] / "demo_notebooks" / "model"
        AutoTokenizer.from_pretrained(str(shipped)).save_pretrained(str(path))
    return path
