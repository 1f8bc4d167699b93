"""The shipped Llama cut into the stages of a pipeline, as a user's cell would do it."""

from .conftest import MODEL

STAGES = f"""
import torch
from torch import nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe
from transformers import AutoConfig, AutoModelForCausalLM

folder, cut = {str(MODEL)!r}, LAYERS // 2

class Stage(nn.Module):
    def __init__(self, whole, first, last):
        super().__init__()
        self.model = nn.Module()
        self.model.rotary_emb = whole.model.rotary_emb
        layers = range(0 if first else cut, cut if first else LAYERS)
        self.model.layers = nn.ModuleDict({{str(n): whole.model.layers[n] for n in layers}})
        if first:
            self.model.embed_tokens = whole.model.embed_tokens
        if last:
            self.model.norm, self.lm_head = whole.model.norm, whole.lm_head

    def forward(self, x):
        if hasattr(self.model, "embed_tokens"):
            x = self.model.embed_tokens(x)
        places = torch.arange(x.shape[1])[None]
        turned = self.model.rotary_emb(x, position_ids=places)
        for layer in self.model.layers.values():
            x = layer(x, position_embeddings=turned, position_ids=places, attention_mask=None)
        return self.lm_head(self.model.norm(x)) if hasattr(self, "lm_head") else x

whole = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa").eval()
at = mesh["pp"].get_local_rank()
unsharded = lambda: AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
""".replace("LAYERS", "4")

SCHEDULE = """
part = Stage(whole, at == 0, at == 1)
stage = PipelineStage(part, at, 2, device, group=mesh["pp"].get_group())
model = KIND(stage, n_microbatches=PIECES)
"""


def cell(pieces, kind="ScheduleGPipe", before="", after=""):
    """A cell that assigns a schedule; ``before`` it the whole model may be sharded."""
    return STAGES + before + SCHEDULE.replace("KIND", kind).replace("PIECES", str(pieces)) + after


SHARDED = """
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

cols = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
plan = {f"model.layers.*.self_attn.{name}": ColwiseParallel() for name in cols[:3]}
plan |= {f"model.layers.*.mlp.{name}": ColwiseParallel() for name in cols[3:]}
plan |= {f"model.layers.*.{name}": RowwiseParallel() for name in ("self_attn.o_proj", "mlp.down_proj")}
parallelize_module(whole, mesh["tp"], plan)
"""
"""Tensor parallel layers over the mesh's ``tp`` axis; what hooks see there are plain local tensors."""

PRUNED = """
import torch
from torch import nn
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe
from transformers import AutoTokenizer, LlamaForCausalLM

class Skipped(nn.Identity):
    def forward(self, x, **options):
        return x

class Half(LlamaForCausalLM):
    def forward(self, x, **options):
        if at:
            options["inputs_embeds"] = x
        else:
            options["input_ids"] = x
        out = self.model(**options).last_hidden_state
        return {"logits": self.lm_head(out)} if at else out

at = mesh["pp"].get_local_rank()
part = Half.from_pretrained(FOLDER).eval()
for n in range(4):
    if (n >= 2) != bool(at):
        part.model.layers[n] = Skipped()
if at:
    part.model.embed_tokens = None
else:
    part.model.norm, part.lm_head = Skipped(), None
stage = PipelineStage(part, at, 2, device, group=mesh["pp"].get_group())
model = ScheduleGPipe(stage, n_microbatches=4)
tokenizer = AutoTokenizer.from_pretrained(FOLDER)
""".replace("FOLDER", repr(str(MODEL)))
"""A user's subclass of the whole Llama, of which each stage keeps its own layers; it has a configuration."""
