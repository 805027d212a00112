"""A converted checkpoint read by CTranslate2, whose Llama is its own: its logits beside those of the model saved.

    pip install ctranslate2
    OMP_NUM_THREADS=1 python -m tests.other_reader

CTranslate2's converter reads the directory by its file names and keys; what it computes with them is its own code.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import ctranslate2  # type: ignore[import-not-found]
import numpy as np
import torch
import transformers
from ctranslate2.converters import TransformersConverter  # type: ignore[import-not-found]
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from ndtrain.convert import convert
from tests.convert_cases import save_checkpoint

WORDS = 260


def main() -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=WORDS, **sizes, **heads)).eval()
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, WORDS)}
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(vocabulary, unk_token="<unk>")),
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
    )
    words = [f"w{i}" for i in np.random.default_rng(0).integers(3, WORDS, 24)]
    with torch.no_grad():
        want = model(torch.tensor([[vocabulary[word] for word in words]])).logits[0]
    with tempfile.TemporaryDirectory() as folder:
        step, out = Path(folder) / "step", Path(folder) / "out"
        save_checkpoint(model, step)
        convert(step, out, max_shard_size="200KB")
        tokenizer.save_pretrained(out)
        theirs = TransformersConverter(str(out)).convert(str(Path(folder) / "ct2"))
        generator = ctranslate2.Generator(theirs, device="cpu", compute_type="float32")
        got = torch.from_numpy(np.array(generator.forward_batch([words])))[0]
    difference = float((got - want).abs().max() / want.abs().max())
    print(f"ctranslate2 {ctranslate2.__version__}: logits of {tuple(got.shape)} differ by {difference:.1e}")
    assert difference < 1e-5


if __name__ == "__main__":
    main()
