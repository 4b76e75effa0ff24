"""Triton kernels, one file per op. Importing this package does not import triton; importing an op's file does."""
