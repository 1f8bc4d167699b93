"""How much memory each rank takes while a model is loaded, beside what the whole model weighs.

    python tests/benchmarks/loading.py --gigabytes 1 --strategy tp fsdp pp

A random Llama is written to a temporary folder and loaded over two ranks by each strategy. Printed
per strategy and rank: bytes of its own parameters, and the peak of the process's anonymous memory
above what it was before (mapped files do not count), both as shares of the whole model. The peak
includes the survey that ends the loading: one small forward, in which sharded data parallelism
gathers several layers at a time.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import torch

from flexmagic import Session

PER_LAYER = 12  # width² parameters of a layer: 4 of attention, 8 of the feed-forward network


def make_model(folder: Path, gigabytes: float, layers: int = 12, vocab: int = 2048) -> int:
    """Write a random float32 Llama of about this size; returns its bytes."""
    from transformers import LlamaConfig, LlamaForCausalLM

    parameters = gigabytes * 2**30 / 4
    width = int((parameters / (layers * PER_LAYER)) ** 0.5) // 128 * 128
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=width,
        intermediate_size=width * 8 // 3 // 64 * 64,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 64,
        max_position_embeddings=64,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    model.save_pretrained(str(folder), max_shard_size="256MB")
    return sum(p.numel() * p.element_size() for p in model.parameters())


def start_sampling() -> None:
    """Start noting the peak of an engine's anonymous memory; runs there, so it brings its own imports."""
    import builtins
    import threading
    import time

    class Sampler(threading.Thread):
        def __init__(self):
            super().__init__(daemon=True)
            self.stop, self.peak = threading.Event(), 0
            self.before = self.now()

        @staticmethod
        def now():
            with open("/proc/self/status") as status:  # noqa: PTH123 - a kernel file
                return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))

        def run(self):
            while not self.stop.is_set():
                self.peak = max(self.peak, self.now())
                time.sleep(0.002)

    builtins._sampler = Sampler()
    builtins._sampler.start()


def stop_sampling() -> int:
    """The peak above what there was before, in bytes."""
    import builtins

    sampler = builtins._sampler
    sampler.stop.set()
    sampler.join()
    return int(sampler.peak - sampler.before)


def measure(strategy: str, folder: Path, ranks: int = 2) -> tuple[list[int], list[int]]:
    """Each rank's own parameter bytes and its peak while loading."""
    with Session.start(ranks, oversubscribe=True) as session:
        views = [session._cluster.client[engine] for engine in session._calls.ranks.engines]
        for view in views:
            view.apply_sync(start_sampling)
        model = session.load(folder, **{strategy: ranks})
        peaks = [view.apply_sync(stop_sampling) for view in views]
        return model.parameter_bytes, peaks


def main() -> int:
    """Measure and print; exit 1 if a rank goes over the share that is allowed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--strategy", nargs="+", default=["tp", "fsdp", "pp"])
    parser.add_argument("--most", type=float, default=0.6, help="largest share of the model per rank")
    options = parser.parse_args()
    failed = False
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        size = make_model(folder, options.gigabytes)
        print(f"model: {size / 2**30:.2f} GiB")
        for strategy in options.strategy:
            own, peaks = measure(strategy, folder)
            for rank, (parameters, peak) in enumerate(zip(own, peaks, strict=True)):
                failed = failed or min(parameters, peak) > options.most * size
                print(
                    f"{strategy}=2 rank {rank}: own parameters {parameters / size:.2f}, "
                    f"peak of anonymous memory {peak / size:.2f} of the model",
                    flush=True,
                )
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
