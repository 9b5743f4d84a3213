#!/usr/bin/env python3
"""How fast PyTorch trains the models of `examples/train_gpt --preset`, eager and compiled: a JSON line for each.

    python3 scripts/torch_train.py                             # all presets, eager and compiled
    python3 scripts/torch_train.py gpt2-124m --mode compile    # one of them
    python3 scripts/torch_train.py byte-86m --steps 30 --batch 8

bf16 autocast over f32 weights, fused AdamW, gradients clipped to a norm of 1, random tokens; on the first GPU, each
model in a process of its own, so that the peak of memory is the model's. A step is timed from its batch to the end of
its optimizer, the device waited for at the ends of the measured steps alone; the loss stays on the device.

Model FLOPs of a token: 6 for each parameter that multiplies, embeddings that are looked up left out but a tied output
layer counted, and 12 · layers · width · context for attention, causal or not (PaLM, appendix B). MFU is their share of
989 TFLOP/s, an H100's or H200's dense bf16; `--peak` sets another.
"""

import argparse
import dataclasses
import json
import subprocess
import sys
import time

import torch
from torch import nn
from torch.nn import functional as F

WARM_UP = 8  # The first steps choose kernels and compile.
MODES = ("eager", "compile")


@dataclasses.dataclass
class Preset:
    batch: int
    seq: int
    vocabulary: int
    layers: int
    width: int
    heads: int
    kv_heads: int
    hidden: int
    llama: bool = False
    bias: bool = False


PRESETS = {
    "gpt2-124m": Preset(32, 1024, 50304, 12, 768, 12, 12, 3072, bias=True),
    "llama-1b": Preset(8, 2048, 128256, 16, 2048, 32, 8, 8192, llama=True),
    "byte-86m": Preset(16, 1024, 256, 12, 768, 12, 12, 3072),
}


class Rotary(nn.Module):
    def __init__(self, seq, dim, base=500_000.0):
        super().__init__()
        angles = torch.outer(torch.arange(seq), base ** (-torch.arange(0, dim, 2) / dim))
        self.register_buffer("cos", angles.cos().bfloat16(), persistent=False)
        self.register_buffer("sin", angles.sin().bfloat16(), persistent=False)

    def forward(self, x):
        a, b = x.chunk(2, -1)
        return torch.cat((a * self.cos - b * self.sin, b * self.cos + a * self.sin), -1)


class Block(nn.Module):
    def __init__(self, p, norm):
        super().__init__()
        self.p, self.dim = p, p.width // p.heads
        self.attention_norm, self.mlp_norm = norm(), norm()
        self.qkv = nn.Linear(p.width, (p.heads + 2 * p.kv_heads) * self.dim, bias=p.bias)
        self.out = nn.Linear(p.width, p.width, bias=p.bias)
        self.up = nn.Linear(p.width, (2 if p.llama else 1) * p.hidden, bias=p.bias)
        self.down = nn.Linear(p.hidden, p.width, bias=p.bias)

    def forward(self, x, rotary):
        p, (batch, seq, _) = self.p, x.shape
        q, k, v = self.qkv(self.attention_norm(x)).split([n * self.dim for n in (p.heads, p.kv_heads, p.kv_heads)], -1)
        q, k, v = (t.view(batch, seq, -1, self.dim).transpose(1, 2) for t in (q, k, v))
        if rotary is not None:
            q, k = rotary(q), rotary(k)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=p.heads != p.kv_heads)
        x = x + self.out(attended.transpose(1, 2).reshape(batch, seq, -1))
        return x + self.down(self.activate(self.up(self.mlp_norm(x))))

    def activate(self, up):
        if self.p.llama:
            gate, up = up.chunk(2, -1)
            return F.silu(gate) * up
        return F.gelu(up, approximate="tanh")


class Model(nn.Module):
    def __init__(self, p):
        super().__init__()
        norm = (lambda: nn.RMSNorm(p.width, eps=1e-5)) if p.llama else (lambda: nn.LayerNorm(p.width, bias=p.bias))
        self.p = p
        self.embedding = nn.Embedding(p.vocabulary, p.width)
        self.positions = None if p.llama else nn.Embedding(p.seq, p.width)
        self.rotary = Rotary(p.seq, p.width // p.heads) if p.llama else None
        self.blocks = nn.ModuleList(Block(p, norm) for _ in range(p.layers))
        self.norm = norm()
        for weight in self.parameters():
            if weight.dim() > 1:
                nn.init.normal_(weight, std=0.02)

    def forward(self, tokens, targets):
        x = self.embedding(tokens)
        if self.positions is not None:
            x = x + self.positions.weight
        for block in self.blocks:
            x = block(x, self.rotary)
        logits = F.linear(self.norm(x), self.embedding.weight)  # tied
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


def flops_of_a_token(model, p):
    looked_up = 0 if model.positions is None else model.positions.weight.numel()
    parameters = sum(weight.numel() for weight in model.parameters()) - looked_up
    return 6 * parameters + 12 * p.layers * p.width * p.seq


def decay_groups(model):
    weights = list(model.parameters())
    decay = [w for w in weights if w.dim() > 1]
    rest = [w for w in weights if w.dim() <= 1]
    return [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]


def warm_up(step):
    """Takes the steps that choose kernels and compile, waits for the device, and gives the first one's loss."""
    first = step(0)
    for i in range(1, WARM_UP):
        step(i)
    torch.cuda.synchronize()
    return first


def timed(step, steps):
    """Seconds of a step, the device waited for at the end, and the last one's loss."""
    started = time.perf_counter()
    for i in range(steps):
        last = step(i)
    torch.cuda.synchronize()
    return (time.perf_counter() - started) / steps, last


def measure(name, mode, args):
    p = PRESETS[name]
    p = dataclasses.replace(p, batch=args.batch or p.batch)
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    torch.cuda.reset_peak_memory_stats()
    with torch.device("cuda"):
        model = Model(p)
    loss_of = torch.compile(model) if mode == "compile" else model
    adam = torch.optim.AdamW(decay_groups(model), lr=3e-4, betas=(0.9, 0.95), fused=True)
    batches = torch.randint(p.vocabulary, (4, p.batch, p.seq + 1), device="cuda")

    def step(i):
        window = batches[i % len(batches)]
        with torch.autocast("cuda", torch.bfloat16):
            loss = loss_of(window[:, :-1], window[:, 1:])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adam.step()
        adam.zero_grad(set_to_none=True)
        return loss.detach()

    first = warm_up(step)
    seconds, last = timed(step, args.steps)
    rate = p.batch * p.seq / seconds
    return {
        "model": name,
        "mode": mode,
        "torch": torch.__version__,
        "gpu": torch.cuda.get_device_name(),
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "batch": p.batch,
        "seq": p.seq,
        "ms_per_step": round(seconds * 1e3, 2),
        "tokens_per_s": round(rate),
        "mfu": round(rate * flops_of_a_token(model, p) / (args.peak * 1e12), 4),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
        "loss": [round(loss.item(), 4) for loss in (first, last)],
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("presets", nargs="*", metavar="PRESET", help=f"{', '.join(PRESETS)} [default: all]")
    parser.add_argument("--mode", choices=MODES, help="[default: both]")
    parser.add_argument("--steps", type=int, default=30, help="measured steps [default: 30]")
    parser.add_argument("--batch", type=int, help="[default: the preset's]")
    parser.add_argument("--peak", type=float, default=989.0, help="TFLOP/s that MFU is a share of [default: 989]")
    args = parser.parse_args()
    for name in args.presets:
        if name not in PRESETS:
            parser.error(f"no preset {name}; there are {', '.join(PRESETS)}")
    runs = [(name, mode) for name in args.presets or PRESETS for mode in ([args.mode] if args.mode else MODES)]
    if len(runs) == 1:
        print(json.dumps(measure(*runs[0], args)), flush=True)
        return
    failed = 0
    for name, mode in runs:
        like = ["--steps", str(args.steps), "--peak", str(args.peak)]
        like += ["--batch", str(args.batch)] if args.batch else []
        failed += subprocess.run([sys.executable, __file__, name, "--mode", mode, *like], check=False).returncode != 0
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
