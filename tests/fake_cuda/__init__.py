"""A training step on fake tensors of device "cuda", without a card: which operations stop for the host, and where.

    OMP_NUM_THREADS=1 python -m tests.fake_cuda [--types llama qwen3] [--meshes tp2 ...] [--table FILE] [--golden]

It needs a build of torch without CUDA, and a C++ compiler.
"""
