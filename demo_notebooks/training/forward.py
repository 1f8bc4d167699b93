"""The forward pass used in training: the model's own computation, arranged to be quick.

It reads the parameters of a ``LlamaForCausalLM`` and computes the same logits as the
model does, with joined projections, explicit attention and one cast of the weights
to bfloat16.  On two processor cores this is nearly twice as fast for short rows.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM


class QuickForward:
    """Compute the logits of a Llama model in a chosen precision."""

    def __init__(self, model: LlamaForCausalLM, dtype: torch.dtype = torch.bfloat16) -> None:
        self.model = model
        self.dtype = dtype
        config: LlamaConfig = model.config
        self.heads = config.num_attention_heads
        self.groups = config.num_key_value_heads
        self.width = config.head_dim
        self.epsilon = config.rms_norm_eps
        length = config.max_position_embeddings
        base = config.rope_parameters["rope_theta"]
        rates = base ** (-torch.arange(0, self.width, 2) / self.width)
        angles = torch.outer(torch.arange(length).float(), rates)
        self.cosine = torch.cat((angles.cos(), angles.cos()), dim=-1).to(dtype)
        self.sine = torch.cat((-angles.sin(), angles.sin()), dim=-1).to(dtype)
        self.mask = torch.full((length, length), float("-inf")).triu(1).to(dtype)

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        """Root-mean-square norm of ``x`` [..., width]."""
        return functional.rms_norm(x, (x.shape[-1],), weight.to(self.dtype), self.epsilon)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Causal grouped-query attention.

        ``query`` is [rows, heads, length, head width]; ``key`` and ``value`` have the
        key-value heads in place of the heads.  The result has the shape of ``query``.
        """
        rows, _, length, width = query.shape
        share = self.heads // self.groups
        shape = (rows * self.groups, -1, width)
        mask = self.mask[:length, :length].repeat(share, 1)
        key = key.reshape(shape)
        scores = torch.baddbmm(mask, query.reshape(shape), key.transpose(1, 2), alpha=width**-0.5)
        return torch.bmm(scores.softmax(-1), value.reshape(shape)).view(query.shape)

    def _attention(self, layer: torch.nn.Module, x: Tensor) -> Tensor:
        """Attention of one layer on ``x`` [rows, length, model width]."""
        rows, length, _ = x.shape
        attn = layer.self_attn
        joined = torch.cat((attn.q_proj.weight, attn.k_proj.weight, attn.v_proj.weight))
        qkv = functional.linear(x, joined.to(self.dtype))
        qkv = qkv.view(rows, length, self.heads + 2 * self.groups, self.width)
        turn = qkv[:, :, : self.heads + self.groups]
        half = self.width // 2
        swapped = torch.cat((turn[..., half:], turn[..., :half]), dim=-1)
        turn = turn * self.cosine[:length, None] + swapped * self.sine[:length, None]
        query = turn[:, :, : self.heads].transpose(1, 2)
        key = turn[:, :, self.heads :].transpose(1, 2)
        value = qkv[:, :, self.heads + self.groups :].transpose(1, 2)
        mixed = self._attend(query, key, value).transpose(1, 2).reshape(rows, length, -1)
        return functional.linear(mixed, attn.o_proj.weight.to(self.dtype))

    def _feed_forward(self, layer: torch.nn.Module, x: Tensor) -> Tensor:
        """Gated feed-forward network of one layer on ``x`` [rows, length, model width]."""
        joined = torch.cat((layer.mlp.gate_proj.weight, layer.mlp.up_proj.weight))
        gate, up = functional.linear(x, joined.to(self.dtype)).chunk(2, dim=-1)
        hidden = functional.silu(gate) * up
        return functional.linear(hidden, layer.mlp.down_proj.weight.to(self.dtype))

    def hidden(self, ids: Tensor) -> Tensor:
        """Compute the normed last hidden states [rows, length, width] of ``ids``."""
        body = self.model.model
        x = functional.embedding(ids, body.embed_tokens.weight).to(self.dtype)
        for layer in body.layers:
            x = x + self._attention(layer, self._norm(x, layer.input_layernorm.weight))
            x = x + self._feed_forward(layer, self._norm(x, layer.post_attention_layernorm.weight))
        return self._norm(x, body.norm.weight)

    def logits(self, hidden: Tensor) -> Tensor:
        """Compute the logits [..., vocabulary] of hidden states [..., width]."""
        return functional.linear(hidden, self.model.lm_head.weight.to(self.dtype))
