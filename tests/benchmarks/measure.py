"""What the benchmarks measure with: seconds, memory, and the machine's best FLOP/s."""

import json
import tempfile
import time
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile


def seconds(work):
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def peak_megabytes(work):
    """The most that `work` holds at once in tensors of its own; what was there before is free."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        work()
    with tempfile.TemporaryDirectory() as folder:
        profiled.export_chrome_trace(f"{folder}/trace.json")
        events = json.loads(Path(folder, "trace.json").read_text())["traceEvents"]
    held = most = 0
    for event in sorted((e for e in events if e.get("name") == "[memory]"), key=lambda e: e["ts"]):
        held += event["args"]["Bytes"]
        most = max(most, held)
    return most / 1e6


# What no one can leave out: a job done by these operations alone could not take less.
KERNELS = ("aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm",
           "aten::_scaled_dot_product_flash_attention_for_cpu",
           "aten::_scaled_dot_product_flash_attention_for_cpu_backward")


def kernel_seconds(work):
    """Seconds of `work` in matrix products and attention alone; the rest of it is around them."""
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        work()
    return sum(event.self_cpu_time_total for event in profiled.key_averages()
               if event.key in KERNELS) / 1e6


def matmul_peak():
    """FLOP/s of the fastest of some large float32 matrix products."""
    a, b = torch.randn(2, 2048, 2048)
    return 2 * 2048**3 / min(seconds(lambda: a @ b) for _ in range(12))


def training_flops(model, B, T):
    """Floating-point operations in the matrix products of one full training step on (B, T) tokens.

    Every weight costs 2 a token in the forward and 4 in the backward pass, and so does every
    feature of the T / 2 keys, and of the values, that a token's queries meet on average.
    """
    c = model.config  # a tied embedding is counted once: as the head, for the lookup is free
    weights = sum(p.numel() for p in model.parameters() if p.dim() == 2)
    return 6 * B * T * (weights + c.n_layer * c.n_head * c.head_dim * T)
