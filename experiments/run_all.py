"""Every run of the paper's figures, as many at once as --processes says.

    python -m experiments.run_all --total-timesteps 10000000 --only fixed adapt joint-kappa20
    python -m experiments.run_all --total-timesteps 1000000 --only joint-kappa1 joint-kappa10

fixed and adapt start from the published VAE. Each run is of one length, which its name tells:
runs/Breakout-adapt-10M-seed1. Ctrl-C or SIGTERM saves all and ends; the same command goes on. The
first checkpoints after 100 000, 1M and 3M steps are kept, for the probe.
"""

import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import vae_ppo
from experiments import UserError, main

VAE = "experiments/weights/pretrain-seed1.pt"
MODELS = {
    "fixed": f"--mode fixed --vae {VAE}",
    "adapt": f"--mode adapt --vae {VAE}",
    "joint-kappa20": "--mode joint --kappa 20",
    "joint-kappa1": "--mode joint --kappa 1",
    "joint-kappa10": "--mode joint --kappa 10",
    "joint-kappa100": "--mode joint --kappa 100",
    "joint-kappa1e6": "--mode joint --kappa 1e6",  # the control: hardly any VAE
}
stop = threading.Event()


def keep(path):
    """Give the first checkpoints after these steps a second name, which stays: the script replaces
    its file, and never writes into it."""
    step = vae_ppo.load_checkpoint(path)["global_step"]
    for steps in (100_000, 1_000_000, 3_000_000):
        kept = path.with_stem(f"checkpoint-{steps}")
        if step >= steps and not kept.exists():
            kept.hardlink_to(path)


def run(name, flags, threads):
    """Run the script to its end; a finished run ends at once. Raises UserError if it fails."""
    if stop.is_set():
        return
    print(f"{name}: {flags}", flush=True)
    path = Path("runs", name, "checkpoint.pt")
    resume = "--resume" if path.parent.exists() else ""
    flags += f" --run-name {name} {resume} --env-threads {threads} --checkpoint-every 10"
    command = [sys.executable, vae_ppo.__file__, *flags.split()]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    with open(f"runs/{name}.log", "a") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    saved_at = 0
    while process.poll() is None and not stop.is_set():
        time.sleep(1)
        if path.exists() and path.stat().st_mtime > saved_at:
            saved_at = path.stat().st_mtime
            keep(path)
    process.terminate()  # unless it has ended: it ends its iteration, saves, and exits
    process.wait()
    print(f"{name}: ended with {process.returncode}", flush=True)
    if process.returncode and not stop.is_set():
        raise UserError(f"{name} failed, see runs/{name}.log")


def run_all(only=tuple(MODELS), seeds=(1, 2, 3), total_timesteps=10_000_000, processes=2):
    """Raises UserError if a run fails, after all the others."""
    if unknown := set(only) - set(MODELS):
        raise UserError(f"--only takes {', '.join(MODELS)}, and not {', '.join(unknown)}")
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: stop.set())
    Path("runs").mkdir(exist_ok=True)
    threads = max(1, os.cpu_count() // processes)
    runs = []
    with ThreadPoolExecutor(processes) as pool:
        for seed, model in itertools.product(seeds, only):
            name = f"Breakout-{model}-{total_timesteps / 1e6:g}M-seed{seed}"
            flags = f"{MODELS[model]} --seed {seed} --total-timesteps {total_timesteps}"
            runs.append(pool.submit(run, name, flags, threads))
    for future in runs:
        future.result()
    return 130 if stop.is_set() else 0


if __name__ == "__main__":
    main(__doc__, run_all)
