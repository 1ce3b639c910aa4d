"""Does it hold? Kills a run at random moments; runs every mode on games of all kinds.

    python -m experiments.stress kill --kills 30
    python -m experiments.stress games > experiments/games.md

kill: a small joint run gets SIGKILL, sometimes in its start-up, mostly while it trains and saves,
and is resumed. After each kill the checkpoint must load; at the end metrics.csv must have every
iteration once. games: a few iterations of each mode, with and without sticky actions, in a Markdown
table: did it end with exit code 0, finite metrics and a checkpoint that loads? Exit code 1 if
something did not hold.
"""

import argparse
import contextlib
import csv
import io
import math
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import vae_ppo
from experiments import guarded

GAMES = "Breakout Pong SpaceInvaders Freeway MontezumaRevenge Boxing Skiing".split()
GAMES += "Tennis Pitfall MsPacman Enduro Seaquest Venture PrivateEye".split()
SMALL = "--no-cuda --env-threads 1 --num-envs 2"
PPO = "--num-steps 16 --segment-length 8 --num-minibatches 2 --update-epochs 1"
STEPS = 2 * 16  # of an iteration


def start(folder, total):
    flags = f"--mode joint {SMALL} {PPO} --checkpoint-every 1 --total-timesteps {total}"
    flags += f" --runs-dir {folder} --run-name killed"
    command = [sys.executable, vae_ppo.__file__, *flags.split()]
    if (folder / "killed").exists():
        command.append("--resume")
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def kill(own, folder):
    """Kill the run --kills times, then let it end. Raises AssertionError, or UserError from a
    checkpoint that does not load."""
    rng = random.Random(own.seed)
    path, log = folder / "killed/checkpoint.pt", folder / "killed/metrics.csv"
    saved, partial = 0, 0
    for number in range(1, own.kills + 1):
        size = log.stat().st_size if log.exists() else 0
        process = start(folder, 10**8)
        while number % 5 and process.poll() is None:  # every fifth dies in its start-up
            if log.exists() and log.stat().st_size > size:
                break
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 1.5))
        process.kill()
        _, errors = process.communicate()
        assert process.returncode < 0, f"it ended by itself: {errors[-300:]}"
        step = vae_ppo.load_checkpoint(path)["global_step"] if path.exists() else 0
        assert step >= saved and step % STEPS == 0, f"it went back from step {saved} to {step}"
        saved = step
        partial += path.with_suffix(".tmp").exists()
        print(f"kill {number}: checkpoint of step {step}", flush=True)
    total = saved + 3 * STEPS
    process = start(folder, total)
    _, errors = process.communicate()
    assert process.returncode == 0, errors[-300:]
    with log.open() as file:
        steps = [int(row["global_step"]) for row in csv.DictReader(file)]
    assert steps == list(range(STEPS, total + 1, STEPS)), "metrics.csv has gaps or repeats"
    assert vae_ppo.load_checkpoint(path)["global_step"] == total
    print(f"{own.kills} kills, {partial} of them while a checkpoint was written: every one loads,")
    print(f"and each of the {len(steps)} iterations is once in metrics.csv")


def run(flags, folder):
    """Run the script here. "ok": exit code 0, finite metrics, a checkpoint that loads."""
    errors = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(errors):
        code = vae_ppo.main(flags.split())
    if code:
        return errors.getvalue().splitlines()[-1]
    vae_ppo.load_checkpoint(folder / "checkpoint.pt")
    with (folder / "metrics.csv").open() as file:
        values = [float(x) for row in csv.DictReader(file) for x in row.values() if x]
    return "ok" if values and all(map(math.isfinite, values)) else "metrics are not finite"


def games(own, folder):
    """Print a row for each game and kind of actions. Returns 1 if a mode failed."""
    print(f"| game | sticky | {' | '.join(vae_ppo.MODES)} |")
    print("|---|---|" + "---|" * len(vae_ppo.MODES))
    failed = 0
    for game in own.games:
        for sticky in (0, 0.25):
            results = []
            for mode, (networks, _) in vae_ppo.MODES.items():
                name = f"{game}-{sticky}-{mode}"
                flags = f"--mode {mode} {SMALL} --env-id ALE/{game}-v5 --runs-dir {folder}"
                flags += f" --run-name {name} --repeat-action-probability {sticky}"
                if "actor" not in networks:
                    flags += " --num-frames 256 --vae-epochs 1"
                else:
                    flags += f" {PPO} --total-timesteps {8 * STEPS}"
                if "decoder" not in networks:
                    flags += f" --vae {folder}/{game}-{sticky}-pretrain/checkpoint.pt"
                results.append(run(flags, folder / name))
            failed = failed or set(results) != {"ok"}
            print(f"| {game} | {sticky} | {' | '.join(results)} |", flush=True)
    return int(failed)


def check(own):
    with tempfile.TemporaryDirectory() as folder:
        try:
            return (kill if own.what == "kill" else games)(own, Path(folder))
        except AssertionError as error:
            print(f"broken promise: {error}", file=sys.stderr)
            return 1


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=["kill", "games"])
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0, help="of the moments; kill")
    parser.add_argument("--games", nargs="+", default=GAMES)
    return guarded(check, parser.parse_args())


if __name__ == "__main__":
    sys.exit(main())
