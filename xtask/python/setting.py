"""Where the steps run and in what: set once, before the steps are imported."""

import contextlib

import torch

device = torch.device("cpu")
dtype = torch.float32


def choose(name, precision):
    global device, dtype
    device = torch.device(name)
    dtype = {"f32": torch.float32, "bf16": torch.bfloat16}[precision]


def wait():
    if device.type == "cuda":
        torch.cuda.synchronize()


def training():
    """Products in `dtype`, weights and their updates in f32."""
    if dtype == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype)


def memory():
    """The most that tensors had of a GPU at once."""
    return {"peak_gpu_bytes": torch.cuda.max_memory_allocated()} if device.type == "cuda" else {}
