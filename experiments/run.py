"""Make the runs behind the figures. Ctrl-C and the like save them; the same command goes on.
The first checkpoints after 100 000, 200 000, 1M and 3M steps are kept beside the last one."""

import itertools
import os
import signal
import subprocess
import sys
import time
from argparse import ArgumentParser
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

signals = []
PLAYER = "experiments/weights/joint-kappa20-10M-seed1.pt"  # plays the frames of other VAEs
UNTRAINED = "runs/Breakout-untrained-seed%/checkpoint.pt"  # an encoder that never learnt
MODELS = {
    "joint-kappa1e6": "vae_ppo.py --mode joint --kappa 1e6",  # plain PPO: hardly any VAE
    "untrained": "vae_ppo.py --mode pretrain --num-frames 16 --vae-epochs 1 --learning-rate 1e-30",
}
for mode in ("fixed", "adapt"):
    MODELS[mode] = f"vae_ppo.py --mode {mode} --vae experiments/weights/pretrain-seed1.pt"
    MODELS[f"{mode}-untrained"] = f"vae_ppo.py --mode {mode} --vae {UNTRAINED}"
for kappa in (1, 10, 20, 100, 1000, 10_000):
    joint = f"vae_ppo.py --mode joint --kappa {kappa}"
    MODELS[f"joint-kappa{kappa}"] = joint
    for guide in (0.25, 0.5, 0.75, 0.9):  # after `git apply experiments/guided.patch`
        MODELS[f"guide{guide}-kappa{kappa}"] = f"{joint} --guide {guide}"
for times in (1, 2, 3, 4):
    script = f"-m experiments.large_ball --ball {times} --mode"
    MODELS[f"vae-ball{times}"] = f"{script} pretrain --policy {PLAYER}"
    vae = f"runs/Breakout-vae-ball{times}-seed%/checkpoint.pt"
    MODELS[f"fixed-ball{times}"] = f"{script} fixed --vae {vae}"
for game in ("Pong", "Boxing"):  # first <game>-policy, then its VAEs
    base = f"vae_ppo.py --env-id ALE/{game}-v5 --mode"
    MODELS[f"{game}-policy"] = MODELS[f"{game}-joint"] = f"{base} joint"
    MODELS[f"{game}-vae"] = f"{base} pretrain --policy runs/{game}-policy-500k-seed11/checkpoint.pt"
    for mode in ("fixed", "adapt"):
        MODELS[f"{game}-{mode}"] = f"{base} {mode} --vae runs/{game}-vae-seed%/checkpoint.pt"
RECIPE = " --update-epochs 10 --num-minibatches 32 --segment-length 1 --learning-rate 2.5e-4"
for model in ("adapt", "joint-kappa20"):
    MODELS[f"{model}-authors"] = MODELS[model] + RECIPE + " --target-kl 0"


def count(text):
    """The number that "500k" or "10M" means, from 1 on: a type for argparse."""
    number = int(float(text.replace("k", "e3").replace("M", "e6")))
    if number < 1:
        raise ValueError
    return number


def run(model, seed, steps):
    """Start or resume a run, and keep its first checkpoints. Returns its exit code."""
    if signals:
        return 0
    flags = MODELS[model].replace("%", str(seed)) + f" --seed {seed}"
    name = model if "--env-id" in flags else f"Breakout-{model}"
    if "--mode pretrain" not in flags:
        flags += f" --total-timesteps {steps}"
        name += f"-{steps / 1000:g}k".replace("000k", "M")
    name += f"-seed{seed}"
    path = Path("runs", name, "checkpoint.pt")
    flags += f" --run-name {name} --env-threads 1 --checkpoint-every 10"
    flags += " --resume" if path.parent.exists() else ""
    print(flags, f"> runs/{name}.log", flush=True)
    with open(f"runs/{name}.log", "a") as log:
        env = os.environ | {"OMP_NUM_THREADS": "1"}
        command = [sys.executable, *flags.split()]
        process = subprocess.Popen(command, env=env, stdout=log, stderr=log, process_group=0)
    while process.poll() is None:
        time.sleep(5)
        if signals:
            process.terminate()  # it ends its iteration, saves, and exits
            process.wait()
        elif path.exists() and "pretrain" not in command:
            step = torch.load(path, "cpu", weights_only=True)["global_step"]
            for mark in (100_000, 200_000, 1_000_000, 3_000_000):
                kept = path.with_stem(f"checkpoint-{mark}")
                if step >= mark and not kept.exists():
                    kept.hardlink_to(path)  # it is replaced, never changed
    print(f"{name} ended with exit code {process.returncode}", flush=True)
    return process.returncode


if __name__ == "__main__":
    parser = ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("models", nargs="+", choices=MODELS, metavar="model", help=", ".join(MODELS))
    add("--steps", type=count, default="10M", help="of each run, like 500k or 10M")
    add("--seeds", nargs="+", type=int, default=[1, 2, 3], help="a run of each model for each")
    add("--processes", type=count, default=2, help="runs at once, of one core each")
    options = parser.parse_args()
    Path("runs").mkdir(exist_ok=True)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores SIGHUP
            signal.signal(number, lambda number, _: signals.append(number))
    pairs = itertools.product(options.seeds, options.models)
    with ThreadPoolExecutor(options.processes) as pool:
        jobs = [pool.submit(run, model, seed, options.steps) for seed, model in pairs]
    sys.exit(any(job.result() for job in jobs))
