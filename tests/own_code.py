"""A tiny model with code of its own, as its author would publish it: config, model, a helper, and a tokenizer."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import transformers

CONFIG = """
from transformers import PreTrainedConfig


class SmallConfig(PreTrainedConfig):
    model_type = "small_own"

    def __init__(self, vocab_size=261, hidden_size=32, slope=0.5, **more):
        self.vocab_size, self.hidden_size, self.slope = vocab_size, hidden_size, slope
        super().__init__(**more)
"""

HELPER = """
import torch


def bend(x, slope):
    return torch.where(x > 0, x, slope * x)
"""

MODEL = """
import torch
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from .configuration_small import SmallConfig
from .helper_small import bend


class SmallForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = SmallConfig

    def __init__(self, config):
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.up = nn.Linear(config.hidden_size, config.hidden_size)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.embed

    def get_output_embeddings(self):
        return self.head

    def forward(self, input_ids=None, position_ids=None, labels=None, **more):
        x = self.embed(input_ids)
        logits = self.head(x + bend(self.up(x), self.config.slope))
        return CausalLMOutput(logits=logits)
"""

TOKENIZER = """
from transformers import PreTrainedTokenizer

from .helper_tokens import LETTERS


class SmallTokenizer(PreTrainedTokenizer):
    vocab_files_names = {}
    model_input_names = ["input_ids", "attention_mask"]

    @property
    def vocab_size(self):
        return len(LETTERS)

    def get_vocab(self):
        return {letter: i for i, letter in enumerate(LETTERS)} | self.added_tokens_encoder

    def _tokenize(self, text, **more):
        return list(text)

    def _convert_token_to_id(self, token):
        return LETTERS.index(token) if token in LETTERS else 0

    def _convert_id_to_token(self, index):
        return LETTERS[index]

    def save_vocabulary(self, directory, filename_prefix=None):
        return ()
"""

TOKENS = "LETTERS = [chr(i) for i in range(9, 127)]\n"

FILES = {
    "configuration_small.py": CONFIG,
    "helper_small.py": HELPER,
    "modeling_small.py": MODEL,
    "tokenization_small.py": TOKENIZER,
    "helper_tokens.py": TOKENS,
}


def save_own_code(directory: Path) -> Path:
    """Write the model with random weights, as its author would, and return `directory`."""
    directory.mkdir(parents=True)
    for name, text in FILES.items():
        (directory / name).write_text(text)
    (directory / "train.py").write_text("raise SystemExit('not part of the model')\n")
    config = {
        "model_type": "small_own",
        "architectures": ["SmallForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_small.SmallConfig",
            "AutoModelForCausalLM": "modeling_small.SmallForCausalLM",
        },
        "vocab_size": 261,
        "hidden_size": 32,
        "slope": 0.25,
        "dtype": "float32",
    }
    (directory / "config.json").write_text(json.dumps(config))
    tokenizer = {
        "tokenizer_class": "SmallTokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_small.SmallTokenizer", None]},
        "eos_token": "<|end|>",
        "pad_token": "<|end|>",
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    torch.manual_seed(5)
    made = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.from_pretrained(directory, trust_remote_code=True), trust_remote_code=True
    )
    from safetensors.torch import save_file

    save_file(made.state_dict(), directory / "model.safetensors", metadata={"format": "pt"})
    return directory
