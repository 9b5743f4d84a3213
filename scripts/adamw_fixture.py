#!/usr/bin/env python3
"""Makes tests/fixtures/train/adamw.safetensors: weights and moments of a hundred steps of PyTorch's AdamW, on a CPU, in f32.

    pip install torch safetensors numpy packaging
    python3 scripts/adamw_fixture.py

Weights, which decay where they have two dimensions, and gradients come from a hash, which the test (tests/suites/train/fixture.rs)
computes too, so that the file has no more than what PyTorch makes of them: `STEP.weights.i`, `STEP.exp_avg.i` and
`STEP.exp_avg_sq.i` after some of the steps. Norms of gradients are clipped, the learning rate follows PyTorch's own schedulers, and
one tensor's is a quarter of the others'. The metadata names PyTorch's version.
"""

from pathlib import Path

import torch
from safetensors.torch import save_file

OUT = Path(__file__).parent.parent / "tests" / "fixtures" / "train" / "adamw.safetensors"
SHAPES = [[], [3], [7, 5], [13, 9]]
QUARTERED = 2
STEPS, KEPT = 100, (1, 10, 100)
RATE, BETAS, EPS, DECAY = 0.01, (0.9, 0.95), 1e-8, 0.1
CLIP, WARM_UP = 2.0, 10


def mixed(x):
    """lowbias32 (Wellons 2018)."""
    x ^= x >> 16
    x = x * 0x7FEB352D & 0xFFFFFFFF
    x ^= x >> 15
    x = x * 0x846CA68B & 0xFFFFFFFF
    return x ^ x >> 16


def tensor(step, number):
    """Numbers from -0.25 to 0.75, over 1, 2, 4 or 8 by the step; the weights are those of step 0."""
    shape = torch.Size(SHAPES[number])
    hashes = [mixed(step << 16 | number << 12 | i) for i in range(shape.numel())]
    scale = 2.0 ** -(step % 4)
    return torch.tensor([((x >> 8) / 2**24 - 0.25) * scale for x in hashes], dtype=torch.float32).reshape(shape)


def main():
    weights = [tensor(0, i).requires_grad_() for i in range(len(SHAPES))]
    groups = [
        {
            "params": [weight],
            "lr": RATE * (0.25 if i == QUARTERED else 1),
            "weight_decay": DECAY if weight.dim() >= 2 else 0.0,
        }
        for i, weight in enumerate(weights)
    ]
    adam = torch.optim.AdamW(groups, betas=BETAS, eps=EPS)
    rise = torch.optim.lr_scheduler.LinearLR(adam, 1 / WARM_UP, total_iters=WARM_UP - 1)
    fall = torch.optim.lr_scheduler.CosineAnnealingLR(adam, STEPS - WARM_UP)
    schedule = torch.optim.lr_scheduler.SequentialLR(adam, [rise, fall], [WARM_UP])
    kept = {}
    for step in range(1, STEPS + 1):
        for i, weight in enumerate(weights):
            weight.grad = tensor(step, i)
        torch.nn.utils.clip_grad_norm_(weights, CLIP)
        adam.step()
        schedule.step()
        if step in KEPT:
            for i, weight in enumerate(weights):
                kept[f"{step}.weights.{i}"] = weight.detach().clone()
                for moment in ("exp_avg", "exp_avg_sq"):
                    kept[f"{step}.{moment}.{i}"] = adam.state[weight][moment].clone()
    OUT.parent.mkdir(parents=True, exist_ok=True)
    save_file(kept, OUT, {"package": f"torch {torch.__version__}"})
    print(f"{OUT.name}: {OUT.stat().st_size} bytes, torch {torch.__version__}")


if __name__ == "__main__":
    main()
