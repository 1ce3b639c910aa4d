"""Make the runs behind the figures, as many at once as --processes says.

    python -m experiments.run fixed adapt joint-kappa20 --steps 10M
    python -m experiments.run joint-kappa1 joint-kappa10 --steps 1M --seeds 1 2 3

A run's name tells its game, model, length and seed: runs/Breakout-adapt-10M-seed1. Ctrl-C or
SIGTERM saves all and ends; the same command goes on. The first checkpoints after 100 000, 200 000,
1M and 3M steps are kept beside the last one.
"""

import argparse
import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

PLAYER = "experiments/weights/joint-kappa20-10M-seed1.pt"  # plays the frames of other VAEs
VAE = "experiments/weights/pretrain-seed1.pt"
MODELS = {
    "fixed": f"vae_ppo.py --mode fixed --vae {VAE}",
    "adapt": f"vae_ppo.py --mode adapt --vae {VAE}",
    "plain-ppo": "vae_ppo.py --mode joint --kappa 1e6",  # hardly any VAE
    # An encoder that nothing has trained, and fixed with it
    "untrained": "vae_ppo.py --mode pretrain --num-frames 16 --vae-epochs 1 --learning-rate 1e-30",
    "fixed-untrained": "vae_ppo.py --mode fixed --vae "
    "runs/Breakout-untrained-seed{seed}/checkpoint.pt",
}
for kappa in (1, 10, 20, 100, 1000, 10_000):
    MODELS[f"joint-kappa{kappa}"] = f"vae_ppo.py --mode joint --kappa {kappa}"
    for guide in (0.25, 0.5, 0.75, 0.9):  # these want `git apply experiments/guided.patch` first
        MODELS[f"guide{guide}-kappa{kappa}"] = MODELS[f"joint-kappa{kappa}"] + f" --guide {guide}"
for times in (1, 2, 3, 4):
    script = f"-m experiments.large_ball {times}"
    vae = f"runs/Breakout-vae-ball{times}-seed{{seed}}/checkpoint.pt"
    MODELS[f"vae-ball{times}"] = f"{script} --mode pretrain --policy {PLAYER}"
    MODELS[f"fixed-ball{times}"] = f"{script} --mode fixed --vae {vae}"
KEPT = (100_000, 200_000, 1_000_000, 3_000_000)
stop = threading.Event()


def keep(path):
    """Give the first checkpoints after these steps a second name, which stays: the script replaces
    its file, and never writes into it."""
    step = torch.load(path, map_location="cpu", weights_only=True)["global_step"]
    for steps in KEPT:
        kept = path.with_stem(f"checkpoint-{steps}")
        if step >= steps and not kept.exists():
            kept.hardlink_to(path)


def run(name, command, threads):
    """Run a command to its end; a finished run ends at once. Returns its exit code."""
    if stop.is_set():
        return 0
    path = Path("runs", name, "checkpoint.pt")
    command = [sys.executable, *command.split(), "--run-name", name]
    command += ["--env-threads", str(threads), "--checkpoint-every", "10"]
    command += ["--resume"] * path.parent.exists()
    print(" ".join(command), flush=True)
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    with open(f"runs/{name}.log", "a") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    saved_at = 0
    while process.poll() is None and not stop.is_set():
        time.sleep(1)
        if "pretrain" not in command and path.exists() and path.stat().st_mtime > saved_at:
            saved_at = path.stat().st_mtime
            keep(path)
    process.terminate()  # unless it has ended: it ends its iteration, saves, and exits
    process.wait()
    print(f"{name} ended with exit code {process.returncode}, see runs/{name}.log", flush=True)
    return 0 if stop.is_set() else process.returncode


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "models", nargs="+", choices=MODELS, metavar="model", help=", ".join(MODELS)
    )
    parser.add_argument("--steps", default="10M", help="of each run, like 500k or 10M")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--processes", type=int, default=2, help="runs at once")
    parser.add_argument("--threads", type=int, default=1, help="cores of each run")
    args = parser.parse_args()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: stop.set())
    Path("runs").mkdir(exist_ok=True)
    steps = int(args.steps.replace("k", "000").replace("M", "000000"))
    runs = []
    with ThreadPoolExecutor(args.processes) as pool:
        for seed, model in itertools.product(args.seeds, args.models):
            command = MODELS[model].format(seed=seed) + f" --seed {seed}"
            name = f"Breakout-{model}-seed{seed}"
            if "pretrain" not in command:
                command += f" --total-timesteps {steps}"
                name = f"Breakout-{model}-{args.steps}-seed{seed}"
            runs.append(pool.submit(run, name, command, args.threads))
    failed = [future.result() for future in runs if future.result()]
    return 130 if stop.is_set() else len(failed) > 0


if __name__ == "__main__":
    sys.exit(main())
