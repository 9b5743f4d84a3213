#!/usr/bin/env python3
"""How far the losses of training runs are apart (files of `train_gpt --log` and of torch_train_gpt.py):

    python3 scripts/compare_losses.py ours.csv deterministic.csv torch.csv another-seed.csv

Each loss is the mean over 20 steps. Of every pair of runs: the largest and the root mean square difference after the
warm-up, and the difference at the end. Runs of different seeds show what is noise. No packages are needed.
"""

import csv
import itertools
import math
import sys

SMOOTHING, WARM_UP = 20, 100


def smoothed(losses):
    means = []
    for end in range(1, len(losses) + 1):
        recent = losses[max(0, end - SMOOTHING) : end]
        means.append(sum(recent) / len(recent))
    return means


def runs(path):
    """Every run of a file by a name: a column after that of the steps."""
    with open(path, encoding="utf-8", newline="") as file:
        (_, *names), *rows = csv.reader(file)
    for column, name in enumerate(names, 1):
        yield f"{path}: {name}", smoothed([float(row[column]) for row in rows])


def main():
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    all_runs = [run for path in sys.argv[1:] for run in runs(path)]
    for name, losses in all_runs:
        print(f"{name}: {len(losses)} steps, {losses[-1]:.4f} at the end")
    for (a, left), (b, right) in itertools.combinations(all_runs, 2):
        if len(left) != len(right):
            sys.exit(f"{a} has {len(left)} steps, {b} has {len(right)}")
        after = WARM_UP if len(left) > WARM_UP else 0
        apart = [abs(x - y) for x, y in zip(left, right)][after:]
        rms = math.sqrt(sum(x * x for x in apart) / len(apart))
        print(f"{a} | {b}: largest {max(apart):.4f}, root mean square {rms:.4f}, at the end {apart[-1]:.4f}")


if __name__ == "__main__":
    main()
