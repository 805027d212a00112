"""Attention of packed documents: one causal call for each, against one call under a dense mask, in one run on the CPU.

    OMP_NUM_THREADS=1 python tests/benchmarks/attention_documents.py

Forward and backward of a Llama's block stack on one row, with model.attn = "auto" and "sdpa", alternating.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch
import transformers

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from ndtrain.data.batches import documents_of  # noqa: E402
from ndtrain.parallel.documents import AttentionByDocuments  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {"seq": 8192, "documents": 16, "layers": 2, "hidden": 256, "rounds": 5}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    config = transformers.LlamaConfig(
        vocab_size=256,
        hidden_size=options.hidden,
        intermediate_size=3 * options.hidden,
        num_hidden_layers=options.layers,
        num_attention_heads=options.hidden // 64,
        num_key_value_heads=max(1, options.hidden // 128),
        max_position_embeddings=options.seq,
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).model
    ids = torch.randint(256, (1, options.seq))

    def step(positions: torch.Tensor) -> torch.Tensor:
        model.zero_grad()
        out: torch.Tensor = model(input_ids=ids, position_ids=positions, use_cache=False).last_hidden_state
        out.square().sum().backward()
        return out.detach()

    for count in (options.documents, 1):
        positions = torch.arange(options.seq // count).repeat(count)[None]
        documents = torch.from_numpy(documents_of(positions.numpy()))
        times: dict[str, list[float]] = {"dense": [], "by documents": []}
        found: dict[str, torch.Tensor] = {}
        by_documents = AttentionByDocuments(model)  # type: ignore[arg-type]
        for _ in range(options.rounds + 1):
            began = time.perf_counter()
            found["dense"] = step(positions)
            middle = time.perf_counter()
            with by_documents.given(documents):
                found["by documents"] = step(positions)
            times["dense"].append(middle - began)
            times["by documents"].append(time.perf_counter() - middle)
        dense, apart = (statistics.median(clock[1:]) for clock in times.values())
        error = float((found["dense"] - found["by documents"]).abs().max())
        print(
            f"{options.seq:,} tokens of {count} documents: under a mask {dense:.2f} s, by documents {apart:.2f} s, "
            f"ratio {dense / apart:.2f}; largest difference {error:.1e}"
        )


if __name__ == "__main__":
    main()
