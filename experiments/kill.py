"""Kill a small joint run at random moments, resume it each time, and check what is left on disk.

    python -m experiments.kill --kills 30

Some moments are during start-up, most while it trains, and with a checkpoint after every iteration many
while one is being written. After each SIGKILL the checkpoint must load; at the end metrics.csv must have
every iteration once. Prints one line per kill, and the verdict; exit code 1 if a promise was broken.
"""

import argparse
import csv
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import vae_ppo

STEPS = 2 * 16  # of one iteration
FLAGS = """--mode joint --num-envs 2 --num-steps 16 --segment-length 8 --num-minibatches 2 --update-epochs 1
    --checkpoint-every 1 --env-threads 1 --no-cuda""".split()


def start(folder, total):
    run = ["--runs-dir", str(folder), "--run-name", "killed", "--total-timesteps", str(total)]
    resume = ["--resume"] * (folder / "killed").exists()
    command = [sys.executable, vae_ppo.__file__, *FLAGS, *run, *resume]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def saved_step(folder):
    """The step of the checkpoint, 0 without one. Raises UserError if it cannot be read."""
    path = folder / "killed/checkpoint.pt"
    return vae_ppo.load_checkpoint(path)["global_step"] if path.exists() else 0


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng, torn, partial = random.Random(args.seed), 0, 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        log, last = folder / "killed/metrics.csv", 0
        for kill in range(1, args.kills + 1):
            process, size = start(folder, 10**9), log.stat().st_size if log.exists() else 0
            if kill % 5:  # every fifth dies in its start-up
                while process.poll() is None and not (log.exists() and log.stat().st_size > size):
                    time.sleep(0.01)
            time.sleep(rng.uniform(0, 1.5))
            process.send_signal(signal.SIGKILL)
            errors = process.communicate()[1]
            assert process.returncode == -signal.SIGKILL, f"it ended by itself: {errors[-300:]}"
            step = saved_step(folder)
            assert step >= last and step % STEPS == 0, f"the checkpoint went back from {last} to {step}"
            last, partial = step, partial + (folder / "killed/checkpoint.tmp").exists()
            torn += log.exists() and not log.read_bytes().endswith(b"\n")
            print(f"kill {kill}: checkpoint of step {step}", flush=True)
        total = last + 3 * STEPS
        process = start(folder, total)
        errors = process.communicate()[1]
        assert process.returncode == 0, errors[-300:]
        with log.open() as file:
            steps = [int(row["global_step"]) for row in csv.DictReader(file)]
        assert steps == list(range(STEPS, total + 1, STEPS)), "metrics.csv has gaps or repeats"
        assert saved_step(folder) == total
        left = sorted(path.suffix for path in (folder / "killed").iterdir() if "tfevents" not in path.name)
        assert left == [".csv", ".pt"], left
    print(
        f"{args.kills} kills, {partial} of them while a checkpoint was written, {torn} while a row was: ",
        end="",
    )
    print(f"{total // STEPS} iterations, each once in metrics.csv, and every checkpoint loaded")


if __name__ == "__main__":
    try:
        main()
    except (AssertionError, vae_ppo.UserError) as error:
        os.write(2, f"broken promise: {error}\n".encode())
        sys.exit(1)
