"""Every run of the paper's figures, as many at once as --processes says.

    python -m experiments.run_all --total-timesteps 10000000 --only fixed adapt joint-kappa20
    python -m experiments.run_all --total-timesteps 1000000 --only joint-kappa1 joint-kappa10

A policy for the data, then the VAE's pretraining, then the models. Each run is of one length, which
its name tells: runs/Breakout-adapt-10M-seed1. Ctrl-C or SIGTERM saves all and ends; the same
command goes on. The first checkpoints after 100 000 and 1M steps are kept, for the probe.
"""

import argparse
import functools
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import vae_ppo
from experiments import guarded
from vae_ppo import UserError

DATA = "policy-for-data"
VAE = "Breakout-pretrain-seed1"
MODELS = {
    "fixed": f"--mode fixed --vae runs/{VAE}/checkpoint.pt",
    "adapt": f"--mode adapt --vae runs/{VAE}/checkpoint.pt",
    "joint-kappa20": "--mode joint --kappa 20",
    "joint-kappa1": "--mode joint --kappa 1",
    "joint-kappa10": "--mode joint --kappa 10",
    "joint-kappa1e6": "--mode joint --kappa 1e6",  # the control: hardly any VAE
}
KEEP = (100_000, 1_000_000)  # steps after which a checkpoint is kept
stop = threading.Event()


@functools.cache
def global_step(path, saved_at):
    return vae_ppo.load_checkpoint(path)["global_step"]


def keep_checkpoints(folder):
    """Copy the checkpoints of KEEP to other names: the script replaces its own, as a whole."""
    path = folder / "checkpoint.pt"
    for steps in KEEP:
        kept = folder / f"checkpoint-{steps}.pt"
        if path.exists() and not kept.exists():
            if global_step(path, path.stat().st_mtime_ns) >= steps:
                temporary = kept.with_suffix(".tmp")
                shutil.copyfile(path, temporary)
                temporary.replace(kept)


def run(name, flags, threads):
    """Start the script, or go on with its run, and wait for its end. A finished run ends at once.
    Raises UserError if it fails."""
    if stop.is_set():
        return
    print(f"{name}: {flags}", flush=True)
    command = [sys.executable, vae_ppo.__file__, *flags.split(), "--run-name", name]
    if Path("runs", name).exists():
        command.append("--resume")
    command += ["--env-threads", str(threads), "--checkpoint-every", "10"]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    with open(f"runs/{name}.log", "a") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    told = False
    while process.poll() is None:
        if stop.is_set() and not told:
            process.terminate()  # it ends its iteration, saves, and exits
            told = True
        time.sleep(1)
        keep_checkpoints(Path("runs", name))
    print(f"{name}: ended with {process.returncode}", flush=True)
    if process.returncode and not stop.is_set():
        raise UserError(f"{name} failed, see runs/{name}.log")


def run_all(own):
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: stop.set())
    Path("runs").mkdir(exist_ok=True)
    if "fixed" in own.only or "adapt" in own.only:
        run(DATA, "--mode joint --seed 11 --total-timesteps 500000", os.cpu_count())
        run(VAE, f"--mode pretrain --policy runs/{DATA}/checkpoint.pt", os.cpu_count())
    threads = max(1, os.cpu_count() // own.processes)
    with ThreadPoolExecutor(own.processes) as pool:
        runs = []
        for seed in own.seeds:
            for model in own.only:
                name = f"Breakout-{model}-{own.total_timesteps / 1e6:g}M-seed{seed}"
                flags = f"{MODELS[model]} --seed {seed} --total-timesteps {own.total_timesteps}"
                runs.append(pool.submit(run, name, flags, threads))
    for future in runs:
        future.result()
    return 130 if stop.is_set() else 0


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--total-timesteps", type=int, default=10_000_000, help="of each run")
    parser.add_argument("--processes", type=int, default=2, help="runs at once")
    own = parser.parse_args()
    if own.processes < 1 or own.total_timesteps < 1:
        parser.error("--processes and --total-timesteps must be 1 or more")
    return guarded(run_all, own)


if __name__ == "__main__":
    sys.exit(main())
