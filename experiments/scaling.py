"""How joint's cost grows with the number of games, of stacked frames and of latents.

    python -m experiments.scaling > experiments/scaling.md

Each size is measured in turn in one run, as in `experiments.benchmark`; 32 steps a rollout instead of 128,
so that 256 games take seconds. Prints Markdown tables. Nothing else may run meanwhile.
"""

import argparse

from experiments.benchmark import machine, measure, print_table

SIZES = {"num-envs": (8, 16, 32, 64, 128, 256), "num-stack": (1, 2, 4, 8), "latent-dim": (5, 20, 80)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repetitions", type=int, default=5)
    args = parser.parse_args()
    print(f"Made by `python -m experiments.scaling --repetitions {args.repetitions}`: {machine()}.")
    for flag, sizes in SIZES.items():
        jobs = {
            f"`--{flag} {n}`": ("joint", f"--num-steps 32 --segment-length 16 --{flag} {n}") for n in sizes
        }
        print(flush=True)
        print_table(measure(jobs, args.repetitions))


if __name__ == "__main__":
    main()
