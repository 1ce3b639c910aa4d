"""Every run of the paper's figures, one after the other, or as many at once as the cores bear.

    python -m experiments.run_all --total-timesteps 1000000 --processes 2

A policy for the data (joint, 500 000 steps) -> the VAE's pretraining -> fixed, adapt and joint (kappa 20)
with three seeds; joint with kappa 1 and 10; fixed without the KL stop, and on a VAE that saw random play.
Ctrl-C stops all; the same command goes on where each run stood, and leaves out what is finished. Then
`experiments.publish` and `experiments.plot` make data and curves.
"""

import argparse
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import vae_ppo

HERE = Path(__file__).parent.parent
VAE = "runs/Breakout-pretrain-seed1/checkpoint.pt"


def jobs(total, seeds):
    """{run name: (flags, the run it needs)}, in the order in which they are to start."""
    short = f"--total-timesteps {min(total, 500_000)}"
    plan = {"policy-for-data": (f"--mode joint --seed 11 {short}", None)}
    pretrain = "--mode pretrain --policy runs/policy-for-data/checkpoint.pt"
    plan["Breakout-pretrain-seed1"] = (pretrain, "policy-for-data")
    for seed in seeds:
        more = f"--seed {seed} --total-timesteps {total}"
        plan[f"Breakout-adapt-seed{seed}"] = (f"--mode adapt --vae {VAE} {more}", "Breakout-pretrain-seed1")
        plan[f"Breakout-joint-kappa20-seed{seed}"] = (f"--mode joint --kappa 20 {more}", None)
        plan[f"Breakout-fixed-seed{seed}"] = (f"--mode fixed --vae {VAE} {more}", "Breakout-pretrain-seed1")
    for kappa in (1, 10):
        flags = f"--mode joint --kappa {kappa} --seed 1 --total-timesteps {total}"
        plan[f"Breakout-joint-kappa{kappa}-seed1"] = (flags, None)
    plan["Breakout-pretrain-on-random-play-seed1"] = ("--mode pretrain", None)
    for name, vae, more in (
        ("without-kl-stop", "pretrain", "--target-kl 0"),
        ("on-random-play", "pretrain-on-random-play", ""),
    ):
        needed = f"Breakout-{vae}-seed1"
        flags = f"--mode fixed --vae runs/{needed}/checkpoint.pt {more} --seed 1 --total-timesteps {total}"
        plan[f"Breakout-fixed-{name}-seed1"] = (flags, needed)
    return plan


def finished(name, flags):
    """Whether the run has all the steps that its flags end with; pretrain, all its epochs."""
    path = Path("runs", name, "checkpoint.pt")
    if not path.exists():
        return False
    saved = vae_ppo.load_checkpoint(path)
    args = saved["args"]
    if args["mode"] == "pretrain":
        return saved["iteration"] >= args["vae_epochs"]
    batch = args["num_envs"] * args["num_steps"]
    return saved["global_step"] >= int(flags.split()[-1]) // batch * batch


def start(name, flags, threads):
    resume = ["--resume"] * Path("runs", name).exists()
    command = [sys.executable, str(HERE / "vae_ppo.py"), *flags.split(), "--run-name", name, *resume]
    log = open(f"runs/{name}.log", "a")
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    return subprocess.Popen(
        [*command, "--env-threads", str(threads)], env=environment, stdout=log, stderr=log
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--total-timesteps", type=int, default=1_000_000)
    parser.add_argument("--seeds", type=int, nargs="*", default=[1, 2, 3])
    parser.add_argument("--processes", type=int, default=max(1, os.cpu_count() // 2), help="runs at once")
    args = parser.parse_args()
    Path("runs").mkdir(exist_ok=True)
    plan, running, stopped = jobs(args.total_timesteps, args.seeds), {}, []
    done = {name for name in plan if finished(name, plan[name][0])}
    waiting = [name for name in plan if name not in done]
    threads = max(1, os.cpu_count() // args.processes)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: stopped.append(number))
    told = False
    while True:
        ready = [name for name in waiting if plan[name][1] in done | {None}]
        if not running and (stopped or not ready):
            return 130 if stopped else int(bool(waiting))
        if stopped and not told:
            told = True
            for process in running.values():
                process.send_signal(signal.SIGTERM)  # it saves, and ends
        elif ready and not stopped and len(running) < args.processes:
            name = ready[0]
            waiting.remove(name)
            print(f"{name}: {plan[name][0]}", flush=True)
            running[name] = start(name, plan[name][0], threads)
        for name, process in list(running.items()):
            if process.poll() is not None:
                running.pop(name)
                done |= {name} if process.returncode == 0 else set()
                print(f"{name}: ended with {process.returncode}, see runs/{name}.log", flush=True)
        time.sleep(1)


if __name__ == "__main__":
    sys.exit(main())
