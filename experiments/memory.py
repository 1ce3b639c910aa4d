"""Does memory stay flat? Trains joint in a small configuration for many iterations and samples its memory.

    python -m experiments.memory --iterations 10000 > experiments/memory.md

Prints a Markdown table: iteration, resident memory of the process in MiB (Linux).
"""

import argparse
import csv
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SMALL = "--num-envs 2 --num-steps 8 --segment-length 8 --num-minibatches 2 --update-epochs 1 --target-kl 0"


def resident(pid):
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) / 1024 if "VmRSS:" in status else None


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--iterations", type=int, default=10_000)
    parser.add_argument("--every", type=float, default=10.0, help="seconds between samples")
    args = parser.parse_args()
    samples = []
    with tempfile.TemporaryDirectory() as folder:
        flags = (
            f"--mode joint {SMALL} --total-timesteps {16 * args.iterations} --runs-dir {folder} --run-name m"
        )
        command = [sys.executable, "vae_ppo.py", *flags.split()]
        process = subprocess.Popen(command, stdout=sys.stderr)
        metrics = Path(folder, "m", "metrics.csv")
        while process.poll() is None:
            memory = resident(process.pid)
            if memory and metrics.exists():
                with metrics.open() as file:
                    samples.append((sum(1 for _ in csv.reader(file)) - 1, memory))
            time.sleep(args.every)
    print(f"Made by `python -m experiments.memory --iterations {args.iterations}`, which runs")
    print(f"`vae_ppo.py --mode joint {SMALL}`.")
    print("\n| iteration | resident MiB |\n|---|---|")
    for iteration, memory in samples[:: max(1, len(samples) // 20)]:
        print(f"| {iteration} | {memory:.0f} |")
    sys.exit(process.returncode)


if __name__ == "__main__":
    main()
