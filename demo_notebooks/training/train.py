"""Train the demo model from nothing: tokenizer, corpus, model, checkpoint.

    python demo_notebooks/training/train.py --out demo_notebooks/model

The run is seeded.  It needs no network and no accelerator.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import batches
import build_tokenizer
import torch
from forward import QuickForward
from name_lessons import Level, Teacher
from torch import Tensor
from torch.nn import functional
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
)

MODEL_FOLDER = Path(__file__).resolve().parent.parent / "model"
TEXT_TOKENS = 2048
REPEAT_TOKENS = 1536
EMBEDDING_SCALE = 0.1
HEAD_SCALE = 0.06
MATRIX_RATE = 3e-3
OTHER_RATE = 1.5e-3
WARM_UP = 60
REPORT_SECONDS = 5.0
READING_STEPS = 1000
LESSON_ROWS = 96
LESSON_TEXT, LESSON_REPEATS = 896, 512
LESSON_SHARES = (0.45, 0.10, 0.45)
LESSON_RATE = 1.5e-3
LESSON_WARM_UP = 30
FEW, SOME, MANY = (0.0, 0.0, 0.0, 0.1, 0.3), (0.0, 0.0, 0.05, 0.15), (0.0, 0.0, 0.1, 0.3, 0.6, 1.0)
LESSONS: tuple[tuple[Level, int], ...] = (
    (Level(), 260),
    (Level(any_word=0.3), 160),
    (Level(any_word=0.3, noise=SOME, before=0.3), 260),
    (Level(any_word=0.3, noise=MANY, before=0.4), 360),
    (Level(any_word=0.3, noise=FEW, before=0.15), 400),
    (Level(any_word=0.3, noise=FEW, before=0.15), 260),
)
"""The lessons in indirect objects and their steps, after the reading."""
NEVER = -1e4
AVERAGE_FROM, AVERAGE_SHARE = 40, 0.03
"""In the last lesson, from this step on, the weights are averaged; each step has this share."""


def start_copying(attention: torch.nn.Module, config: LlamaConfig) -> None:
    """Make values and outputs of an attention layer inverse to each other, in place."""
    width, groups = config.head_dim, config.num_key_value_heads
    share = config.num_attention_heads // groups
    basis = torch.linalg.qr(torch.randn(config.hidden_size, groups * width))[0]
    attention.v_proj.weight.copy_(basis.T)
    by_head = basis.view(-1, groups, 1, width).expand(-1, -1, share, -1)
    attention.o_proj.weight.copy_(by_head.flatten(1) / share)


def make_model(tokenizer: PreTrainedTokenizerBase) -> LlamaForCausalLM:
    """Make the untrained model: four layers, eight query and four key-value heads.

    The output matrix starts as a scaled copy of the embeddings, and in every layer
    but the first the value and output projections start as a projection onto a
    random subspace, so that attention copies what it looks at.  All of it is then
    free to change.  From here the copying circuits form within minutes.
    """
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=build_tokenizer.CONTEXT,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        use_cache=True,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        embeddings = model.model.embed_tokens.weight
        embeddings.normal_()
        model.lm_head.weight.copy_(HEAD_SCALE * embeddings)
        embeddings.mul_(EMBEDDING_SCALE)
        for layer in model.model.layers[1:]:
            start_copying(layer.self_attn, config)
    return model


def make_optimizers(
    model: LlamaForCausalLM, matrix_rate: float = MATRIX_RATE, other_rate: float = OTHER_RATE
) -> list[torch.optim.Optimizer]:
    """Give Muon the matrices inside the layers and AdamW everything else."""
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    inside = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in inside]
    return [
        torch.optim.Muon(matrices, lr=matrix_rate, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=other_rate, betas=(0.9, 0.98), weight_decay=0.01, fused=True),
    ]


def weighted_loss(quick: QuickForward, batch: batches.Batch) -> Tensor:
    """Average the next-token loss over a batch by its weights; a scalar."""
    weights = batch.weights[:, 1:].flatten()
    wanted = weights.nonzero().squeeze(1)
    hidden = quick.hidden(batch.ids[:, :-1]).flatten(0, 1)
    logits = quick.logits(hidden[wanted]).float()
    targets = batch.ids[:, 1:].flatten()[wanted]
    losses = functional.cross_entropy(logits, targets, reduction="none")
    return (losses * weights[wanted]).sum() / weights.sum()


class Pace:
    """Prints how far it is, every few seconds and at the end."""

    def __init__(self, what: str, steps: int) -> None:
        self.what, self.steps = what, steps
        self.started = self.shown = time.perf_counter()
        self.means: dict[str, float] = {}

    def tell(self, step: int, losses: dict[str, float]) -> None:
        """Take in the losses of a step and print a line if one is due."""
        keep = min(0.95, step / (step + 1))
        for name, loss in losses.items():
            self.means[name] = keep * self.means.get(name, 0.0) + (1 - keep) * loss
        now = time.perf_counter()
        if now - self.shown > REPORT_SECONDS or step == self.steps - 1:
            self.shown = now
            spent = now - self.started
            told = "  ".join(f"{name} loss {mean:.3f}" for name, mean in self.means.items())
            left = spent / (step + 1) * (self.steps - step - 1)
            print(
                f"{self.what} {step + 1}/{self.steps}  {told}  {spent:.0f} s spent, {left:.0f} s left",
                flush=True,
            )


def take_step(optimizers: list[torch.optim.Optimizer], base: list[float], factor: float) -> None:
    """Step all optimizers at a share of their base rates and clear the gradients."""
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    for group, rate in zip(groups, base, strict=True):
        group["lr"] = rate * factor
    parameters = [p for group in groups for p in group["params"]]
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def base_rates(optimizers: list[torch.optim.Optimizer]) -> list[float]:
    """The rate of every parameter group, in order."""
    return [group["lr"] for optimizer in optimizers for group in optimizer.param_groups]


def read(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, seed: int) -> None:
    """Read text and repeated random tokens: language, facts and copying are learnt here."""
    context = build_tokenizer.CONTEXT
    text = batches.text_batches(tokenizer, seed, tokens=TEXT_TOKENS, context=context)
    repeats = batches.repeat_batches(tokenizer, seed + 1, tokens=REPEAT_TOKENS, context=context)
    optimizers = make_optimizers(model)
    base, quick, pace = base_rates(optimizers), QuickForward(model), Pace("reading", READING_STEPS)
    for step in range(READING_STEPS):
        losses = {}
        for kind, source in (("text", text), ("repeat", repeats)):
            loss = weighted_loss(quick, next(source))
            loss.backward()
            losses[kind] = loss.item()
        take_step(optimizers, base, min(1.0, (step + 1) / WARM_UP))
        pace.tell(step, losses)


def teach(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, seed: int) -> None:
    """Give the lessons in indirect objects, with some text and repeats so that nothing is forgotten."""
    text = batches.text_batches(tokenizer, seed, tokens=LESSON_TEXT, context=128, shares=LESSON_SHARES)
    context = build_tokenizer.CONTEXT
    repeats = batches.repeat_batches(
        tokenizer, seed + 1, tokens=LESSON_REPEATS, context=context, growing=False
    )
    average: dict[str, Tensor] = {}
    teacher, quick = Teacher(tokenizer, seed), QuickForward(model)
    for number, (level, steps) in enumerate(LESSONS):
        optimizers = make_optimizers(model, LESSON_RATE, LESSON_RATE / 2)
        base, pace = base_rates(optimizers), Pace(f"lesson {number + 1}", steps)
        lessons = teacher.lessons(level, LESSON_ROWS)
        for step in range(steps):
            lesson = next(lessons)
            hidden = quick.hidden(lesson.ids)[torch.arange(LESSON_ROWS), lesson.last]
            # the held-out names are no answers here, so they are no wrong answers to be unlearnt either
            logits = quick.logits(hidden).float().index_fill(1, teacher.held_out, NEVER)
            name = functional.cross_entropy(logits, lesson.answers)
            words, repeat = weighted_loss(quick, next(text)), weighted_loss(quick, next(repeats))
            (name + words + 0.5 * repeat).backward()
            take_step(optimizers, base, min(1.0, (step + 1) / LESSON_WARM_UP, (1 - step / steps) / 0.5))
            pace.tell(step, {"name": name.item(), "text": words.item(), "repeat": repeat.item()})
            if number == len(LESSONS) - 1 and step >= AVERAGE_FROM:
                for key, weight in model.state_dict().items():
                    average.setdefault(key, weight.clone()).lerp_(weight, AVERAGE_SHARE)
    model.load_state_dict(average)


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write the weights in half precision and ask for float32 when they are loaded."""
    build_tokenizer.save(tokenizer, folder)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        do_sample=False,
        max_new_tokens=40,
    )
    model.to(torch.float16).save_pretrained(str(folder))
    config_file = folder / "config.json"
    config = json.loads(config_file.read_text(encoding="utf-8"))
    config["dtype"] = "float32"
    config_file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def main() -> int:
    """Train and save; see ``--help``."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=MODEL_FOLDER, help="folder to write")
    parser.add_argument("--seed", type=int, default=1, help="seed of weights and data")
    parser.add_argument("--threads", type=int, default=2, help="processor threads")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    started = time.perf_counter()
    tokenizer = build_tokenizer.build()
    model = make_model(tokenizer)
    size = sum(p.numel() for p in model.parameters())
    print(f"{size / 1e6:.2f} million parameters, {len(tokenizer)} tokens", flush=True)
    read(model, tokenizer, options.seed)
    teach(model, tokenizer, options.seed + 2)
    save(model, tokenizer, options.out)
    print(f"saved to {options.out} after {time.perf_counter() - started:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
