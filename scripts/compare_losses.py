#!/usr/bin/env python3
"""How far the losses of training runs are apart (files of `train_gpt --log` and of torch_train_gpt.py):

    python3 scripts/compare_losses.py ours.csv deterministic.csv torch.csv another-seed.csv
    python3 scripts/compare_losses.py --seeds 1.csv,torch-1.csv 2.csv,torch-2.csv 3.csv,torch-3.csv

Each loss is the mean over 20 steps. Of every pair of runs: the largest and the root mean square difference after the
warm-up, and the difference at the end. Runs of different seeds show what is noise.

With `--seeds` an argument has all runs of one seed, of the same implementations for each: the root mean squares of what
implementations differ by on one seed, and seeds of one implementation. It fails where the former is not smaller. A seed decides the
batches, too. No packages are needed.
"""

import argparse
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


def apart(left, right):
    """The differences after the warm-up."""
    if len(left) != len(right):
        sys.exit(f"runs of {len(left)} and of {len(right)} steps")
    return [abs(x - y) for x, y in zip(left, right)][WARM_UP if len(left) > WARM_UP else 0 :]


def root_mean_square(numbers):
    return math.sqrt(sum(x * x for x in numbers) / len(numbers))


def pairs(paths):
    all_runs = [run for path in paths for run in runs(path)]
    for name, losses in all_runs:
        print(f"{name}: {len(losses)} steps, {losses[-1]:.4f} at the end")
    for (a, left), (b, right) in itertools.combinations(all_runs, 2):
        far = apart(left, right)
        print(f"{a} | {b}: largest {max(far):.4f}, root mean square {root_mean_square(far):.4f}, at the end {far[-1]:.4f}")


def seeds(groups):
    """An implementation is the name of a column, without the file that it is in."""
    of_seeds = [{name.split(": ", 1)[1]: losses for path in group.split(",") for name, losses in runs(path)} for group in groups]
    names = list(of_seeds[0])
    if len(of_seeds) < 2 or any(set(of_seed) != set(names) for of_seed in of_seeds):
        sys.exit("every seed, of two at least, wants the same implementations")

    def line(what, rms):
        print(f"{what}: {', '.join(f'{x:.4f}' for x in rms)}")
        return rms

    for name in names:
        line(f"{name}, at the end", [of_seed[name][-1] for of_seed in of_seeds])
    print("root mean squares of differences, of two implementations on each seed:")
    of_two = [
        x
        for a, b in itertools.combinations(names, 2)
        for x in line(f"  {a} | {b}", [root_mean_square(apart(of_seed[a], of_seed[b])) for of_seed in of_seeds])
    ]
    print("and of one implementation on each two seeds:")
    of_one = [
        x
        for name in names
        for x in line(
            f"  {name}",
            [root_mean_square(apart(a[name], b[name])) for a, b in itertools.combinations(of_seeds, 2)],
        )
    ]
    print(f"the largest of the former is {max(of_two) / min(of_one):.3f} of the smallest of the latter")
    if max(of_two) >= min(of_one):
        sys.exit("implementations differ by more than seeds")


def main():
    description, _, more = __doc__.partition(":\n\n")
    parser = argparse.ArgumentParser(
        description=description, epilog=more, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", action="store_true", help="each argument has all runs of one seed")
    parser.add_argument("files", nargs="+", metavar="FILE", help="losses; with --seeds FILE,FILE,...")
    args = parser.parse_args()
    (seeds if args.seeds else pairs)(args.files)


if __name__ == "__main__":
    main()
