#!/usr/bin/env python3
"""Trains the model of examples/train_gpt in PyTorch, on the same batches from the same weights, and writes its losses:

    cargo run --release --features cuda --example train_gpt -- --device cuda:0 --steps 1000 \\
        --export run.safetensors --log ours.csv
    python3 scripts/torch_train_gpt.py run.safetensors torch.csv
    python3 scripts/compare_losses.py ours.csv torch.csv

Products and attention are in bf16, everything else is in f32 (there, what lies between operations is bf16, too). On the first GPU, or without one on the CPU.
`--compile` lets torch.compile have the model.
"""

import math
import sys
import time

import torch
from torch.nn.functional import cross_entropy, gelu, layer_norm, scaled_dot_product_attention

from torch_peers import read_safetensors

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WARM_UP_STEPS, FINAL_RATE = 20, 0.1
# Before the clock starts: the first steps choose kernels and compile.
UNTIMED_STEPS = 5
PARTS = ("attention_norm", "q", "k", "v", "attention_out", "mlp_norm", "mlp_in", "mlp_out")


def product(x, weight, dtype=torch.float32):
    return (x.bfloat16() @ weight.bfloat16()).to(dtype)


def norm(x, gain):
    return layer_norm(x, gain.shape, gain, eps=1e-5)


def logits(weights, layers, heads, tokens):
    x = weights["embedding"][tokens] + weights["positions"][: tokens.shape[1]]
    for layer in range(layers):
        of = {name: weights[f"block{layer}.{name}"] for name in PARTS}
        normed = norm(x, of["attention_norm"])
        q, k, v = (product(normed, of[name], torch.bfloat16) for name in "qkv")
        q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
        attended = scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        x = x + product(attended, of["attention_out"])
        hidden = gelu(product(norm(x, of["mlp_norm"]), of["mlp_in"]), approximate="tanh")
        x = x + product(hidden, of["mlp_out"])
    return product(norm(x, weights["norm"]), weights["embedding"].t())


def rate(step, steps):
    """The part of the peak: a linear warm-up, then half a cosine."""
    if step < WARM_UP_STEPS:
        return (step + 1) / WARM_UP_STEPS
    progress = (step - WARM_UP_STEPS) / max(steps - WARM_UP_STEPS, 1)
    return FINAL_RATE + (1 - FINAL_RATE) * 0.5 * (1 + math.cos(math.pi * progress))


def main():
    paths = [arg for arg in sys.argv[1:] if arg != "--compile"]
    if len(paths) != 2:
        sys.exit(__doc__)
    run = read_safetensors(paths[0], DEVICE)
    windows, peak = run.pop("run.windows"), run.pop("run.rate").item()
    _, layers, heads, *_ = run.pop("run.config").tolist()
    weights = {name: tensor.requires_grad_() for name, tensor in run.items()}
    steps, batch, width = windows.shape

    def loss_of(tokens, targets):
        return cross_entropy(logits(weights, layers, heads, tokens).flatten(0, 1), targets.flatten())

    loss_of = torch.compile(loss_of) if "--compile" in sys.argv else loss_of
    adam = torch.optim.AdamW(weights.values(), lr=peak, betas=(0.9, 0.98), eps=1e-8, weight_decay=0.1)
    losses, started = [], None
    for step, window in enumerate(windows.int()):
        if step == UNTIMED_STEPS:
            started = time.perf_counter()
        loss = loss_of(window[:, :-1], window[:, 1:].long())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights.values(), 1.0)
        adam.param_groups[0]["lr"] = peak * rate(step, steps)
        adam.step()
        adam.zero_grad()
        losses.append(loss.item())
    if started is not None:
        seconds = (time.perf_counter() - started) / (steps - UNTIMED_STEPS)
        print(f"{seconds * 1e3:.1f} ms a step, {batch * (width - 1) / seconds:.0f} tokens/s")
    name = f"torch {torch.__version__} bf16"
    with open(paths[1], "w", encoding="utf-8") as file:
        file.write("".join(f"{step},{loss}\n" for step, loss in [("step", name), *enumerate(losses, 1)]))


if __name__ == "__main__":
    main()
