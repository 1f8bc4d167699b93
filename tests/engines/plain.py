"""The recipes that train, once more in one process with plain torch hooks: the truth of their tests."""

from __future__ import annotations

import copy

import torch

from flexmagic.recipes.trainable import Subspace, Translators


class Plain:
    """A model in one process, by its own paths; ``out`` and ``down``: those in a block."""

    def __init__(self, model, blocks, norm, *, out="self_attn.o_proj", down="mlp.down_proj"):
        self.model, self.norm = model, model.get_submodule(norm)
        self.blocks, self.head = model.get_submodule(blocks), model.lm_head
        self.out, self.down = out, down

    def states(self, ids):
        """The residual stream ``[layer, batch, seq, width]`` before all layers and after each; the logits."""
        found, handles = [], []
        handles.append(self.blocks[0].register_forward_pre_hook(lambda _m, args: found.append(args[0])))
        keep = [
            block.register_forward_hook(lambda _m, _a, out: found.append(_tensor(out)))
            for block in self.blocks
        ]
        handles += keep
        with torch.no_grad():
            logits = self.model(torch.as_tensor(ids), use_cache=False).logits
        for handle in handles:
            handle.remove()
        return torch.stack(found), logits

    def tuned(self, batches, lr):
        """The losses of a tuned lens that is trained on one batch after the other, and the maps."""
        lens = Translators(len(self.blocks), self.states(batches[0])[0].shape[-1])
        optimizer = torch.optim.Adam(lens.parameters(), lr=lr)
        losses = []
        for ids in batches:
            states, logits = self.states(ids)
            loss = sum(self.far(lens(states[n], n), logits) for n in range(len(self.blocks)))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        return losses, lens

    def far(self, h, logits):
        """The mean KL divergence, in nats, of what is read off ``h`` from the model's prediction."""
        p, q = logits.log_softmax(-1), self.head(self.norm(h)).log_softmax(-1)
        return torch.nn.functional.kl_div(q, p, log_target=True, reduction="none").sum(-1).mean()

    def swapped(self, module, layer, ids, position):
        """The last logits of the bases with a subspace at a layer's output; ``ids``: bases, then sources."""
        half = len(ids) // 2

        def swap(_module, _args, out):
            x = _tensor(out).clone()
            base, source = x[:half, position].detach(), x[half:, position].detach()
            x[:half, position] = module(base, source)
            return (x, *out[1:]) if isinstance(out, tuple) else x

        handle = self.blocks[layer].register_forward_hook(swap)
        try:
            return self.model(torch.as_tensor(ids), use_cache=False).logits[:half, -1]
        finally:
            handle.remove()

    def interchanged(self, batches, layer, position, *, size, lr, seed=0):
        """The losses of a subspace that is trained on ``(ids, targets)``, one after the other."""
        width = self.states(batches[0][0])[0].shape[-1]
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            module = Subspace(width, size, boundless=False)
        optimizer = torch.optim.Adam(module.parameters(), lr=lr)
        losses = []
        for ids, targets in batches:
            said = self.swapped(module, layer, ids, position)
            loss = torch.nn.functional.cross_entropy(said, torch.tensor(targets))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        self.model.zero_grad()
        return losses, copy.deepcopy(module)

    @torch.no_grad()
    def ablated(self, ids, layer=0, columns=None, put=None, *, neurons=False):
        """The mean loss of some texts, with ``put(x)`` in columns of what enters an output projection."""
        ids = torch.as_tensor(ids)

        def edit(_module, args):
            x = args[0].clone()
            x[..., columns] = put(x[..., columns])
            return (x, *args[1:])

        handles = []
        if put is not None:
            module = self.blocks[layer].get_submodule(self.down if neurons else self.out)
            handles.append(module.register_forward_pre_hook(edit))
        logits = self.model(ids, use_cache=False).logits
        for handle in handles:
            handle.remove()
        return float(torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()))

    @torch.no_grad()
    def entering(self, ids, layer, *, neurons=False):
        """What enters a layer's output projection, ``[batch, seq, features]``."""
        kept = []
        module = self.blocks[layer].get_submodule(self.down if neurons else self.out)
        handle = module.register_forward_pre_hook(lambda _m, args: kept.append(args[0]))
        self.model(torch.as_tensor(ids), use_cache=False)
        handle.remove()
        return kept[0]


def _tensor(out):
    return out[0] if isinstance(out, tuple) else out
