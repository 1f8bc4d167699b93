"""The README's own snippets for those who come from other libraries do what they say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from .conftest import PROMPT, Edited, relative

pytestmark = pytest.mark.engines
README = Path(__file__).parents[2] / "README.md"


def snippets():
    part = re.search(r"<!-- ours -->(.*?)<!-- end ours -->", README.read_text(encoding="utf-8"), re.DOTALL)
    return re.findall(r"```python\n(.*?)```", part[1], re.DOTALL)


def test_the_same_task_as_in_other_libraries(loaded, one_process, ids):
    kept = []

    def damp(out):
        out = out.clone()
        out[:, -1] *= 0.5
        return out

    with Edited(one_process, {"model.layers.1.mlp": damp, "model.layers.3.mlp": kept.append}) as model:
        logits = model(ids, use_cache=False).logits
    with torch.no_grad():
        assert relative(one_process(ids, use_cache=False).logits, logits.detach()) > 1e-3
    found = snippets()
    assert len(found) == 2
    for text in found:
        *lines, last = text.strip().splitlines()
        names = {"session": loaded, "prompt": PROMPT}
        exec("\n".join(lines), names)  # noqa: S102 - our own README
        mlp, whole = eval(last, names)  # noqa: S307 - as above
        assert relative(mlp, kept[0].detach()) <= 1e-5
        assert relative(whole, logits.detach()) <= 1e-5
        for hook in list(loaded.hooks):
            hook.remove()
