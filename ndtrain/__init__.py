"""ndtrain: train any Hugging Face causal LM with N-D parallelism."""

__version__ = "0.1.0"
