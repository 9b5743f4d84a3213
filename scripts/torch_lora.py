#!/usr/bin/env python3
"""How fast PyTorch fine-tunes the models of `examples/lora_llama --preset`, eager and compiled: a JSON line for each.

    python3 scripts/torch_lora.py                                   # llama-1b, eager and compiled
    python3 scripts/torch_lora.py llama-8b --mode eager --recompute
    python3 scripts/torch_lora.py llama-1b --batch 8 --seq 1024 --rank 16

Frozen random weights in bf16, low-rank matrices in f32 beside all seven projections of each layer, cast at each use, fused
AdamW, gradients clipped to a norm of 1, random tokens; on the first GPU, each run in a process of its own, so that the peak
of memory is the run's. A step is timed from its batch to the end of its optimizer, the device waited for at the ends of the
measured steps alone; the loss stays on the device.
"""

import argparse
import dataclasses
import json
import subprocess
import sys

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from torch_train import MODES, PRESETS as TRAINED, Rotary, timed, warm_up

LLAMA_1B = dataclasses.replace(TRAINED["llama-1b"], batch=8, seq=1024)
PRESETS = {
    "llama-1b": LLAMA_1B,
    "llama-8b": dataclasses.replace(LLAMA_1B, layers=32, width=4096, hidden=14336),
}


def frozen(*dims):
    return nn.Parameter(torch.randn(*dims, dtype=torch.bfloat16) * dims[-1] ** -0.5, requires_grad=False)


class Linear(nn.Module):
    def __init__(self, inner, outer, args):
        super().__init__()
        self.weight, self.scale = frozen(outer, inner), args.alpha / args.rank
        self.a = nn.Parameter(torch.randn(args.rank, inner) * inner**-0.5)
        self.b = nn.Parameter(torch.zeros(outer, args.rank))

    def forward(self, x):
        low = F.linear(x, self.a.to(x.dtype)) * self.scale
        return F.linear(x, self.weight) + F.linear(low, self.b.to(x.dtype))


class Norm(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width, dtype=torch.bfloat16), requires_grad=False)

    def forward(self, x):
        return F.rms_norm(x, self.weight.shape, self.weight, 1e-5)


class Block(nn.Module):
    def __init__(self, p, args):
        super().__init__()
        self.p, self.dim = p, p.width // p.heads
        kv = p.kv_heads * self.dim
        linear = lambda inner, outer: Linear(inner, outer, args)
        self.attention_norm, self.mlp_norm = Norm(p.width), Norm(p.width)
        self.q, self.k, self.v = linear(p.width, p.width), linear(p.width, kv), linear(p.width, kv)
        self.o = linear(p.width, p.width)
        self.gate, self.up = linear(p.width, p.hidden), linear(p.width, p.hidden)
        self.down = linear(p.hidden, p.width)

    def forward(self, x, rotary):
        batch, seq, _ = x.shape
        normed = self.attention_norm(x)
        heads = lambda linear: linear(normed).view(batch, seq, -1, self.dim).transpose(1, 2)
        q, k, v = rotary(heads(self.q)), rotary(heads(self.k)), heads(self.v)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + self.o(attended.transpose(1, 2).reshape(batch, seq, -1))
        normed = self.mlp_norm(x)
        return x + self.down(F.silu(self.gate(normed)) * self.up(normed))


class Model(nn.Module):
    def __init__(self, p, args):
        super().__init__()
        self.recompute = args.recompute
        self.embedding = frozen(p.vocabulary, p.width)
        self.head = self.embedding if p.width == LLAMA_1B.width else frozen(p.vocabulary, p.width)
        self.rotary = Rotary(p.seq, p.width // p.heads)
        self.blocks = nn.ModuleList(Block(p, args) for _ in range(p.layers))
        self.norm = Norm(p.width)

    def forward(self, tokens, targets):
        x = F.embedding(tokens, self.embedding)
        for block in self.blocks:
            if self.recompute:
                x = checkpoint(block, x, self.rotary, use_reentrant=False)
            else:
                x = block(x, self.rotary)
        logits = F.linear(self.norm(x), self.head)
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


def measure(name, mode, args):
    p = dataclasses.replace(PRESETS[name], batch=args.batch, seq=args.seq)
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = Model(p, args)
    loss_of = torch.compile(model) if mode == "compile" else model
    learnt = [weight for weight in model.parameters() if weight.requires_grad]
    adam = torch.optim.AdamW(learnt, lr=2e-4, weight_decay=0.0, fused=True)
    batches = torch.randint(p.vocabulary, (4, p.batch, p.seq + 1), device="cuda")

    def step(i):
        window = batches[i % len(batches)]
        loss = loss_of(window[:, :-1], window[:, 1:])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learnt, 1.0)
        adam.step()
        adam.zero_grad(set_to_none=True)
        return loss.detach()

    warm_up(step)
    torch.cuda.reset_peak_memory_stats()
    seconds, last = timed(step, args.steps)
    return {
        "model": name,
        "mode": mode,
        "recompute": args.recompute,
        "torch": torch.__version__,
        "gpu": torch.cuda.get_device_name(),
        "learnt": sum(weight.numel() for weight in learnt),
        "batch": p.batch,
        "seq": p.seq,
        "ms_per_step": round(seconds * 1e3, 2),
        "tokens_per_s": round(p.batch * p.seq / seconds),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
        "loss": round(last.item(), 4),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("preset", nargs="?", choices=PRESETS, default="llama-1b", help="[default: llama-1b]")
    parser.add_argument("--mode", choices=MODES, help="[default: both]")
    parser.add_argument("--steps", type=int, default=30, help="measured steps [default: 30]")
    parser.add_argument("--batch", type=int, default=8, help="[default: 8]")
    parser.add_argument("--seq", type=int, default=1024, help="[default: 1024]")
    parser.add_argument("--rank", type=int, default=16, help="[default: 16]")
    parser.add_argument("--alpha", type=float, default=32.0, help="[default: 32]")
    parser.add_argument("--recompute", action="store_true", help="compute blocks again in the backward pass")
    args = parser.parse_args()
    if args.mode:
        print(json.dumps(measure(args.preset, args.mode, args)), flush=True)
        return
    runs = [subprocess.run([sys.executable, *sys.argv, "--mode", mode], check=False) for mode in MODES]
    sys.exit(any(run.returncode for run in runs))


if __name__ == "__main__":
    main()
