"""Does it hold? Kills a run at random moments; runs every mode on games of all kinds.

python -m experiments.stress kill --kills 30
python -m experiments.stress games > experiments/games.md
"""

import random
import sys
import tempfile
import time
from pathlib import Path
from subprocess import PIPE, STDOUT, Popen

import vae_ppo
from experiments import main

GAMES = "Breakout Pong SpaceInvaders Freeway MontezumaRevenge Boxing Skiing".split()
GAMES += "Tennis Pitfall MsPacman Enduro Seaquest Venture PrivateEye".split()
SMALL = "--no-cuda --env-threads 1 --num-envs 2"
PPO = "--num-steps 16 --segment-length 8 --num-minibatches 2 --update-epochs 1"
STEPS = 2 * 16  # of an iteration


def start(folder, flags):
    """A run in a process of its own, from its checkpoint on where there is the folder."""
    flags += f" {SMALL} --runs-dir {folder.parent} --run-name {folder.name}"
    flags += " --resume" if folder.exists() else ""
    command = [sys.executable, vae_ppo.__file__, *flags.split()]
    return Popen(command, stdout=PIPE, stderr=STDOUT, text=True)


def kill(kills=30, seed=0):
    """Kill a small joint run with SIGKILL, sometimes in its start-up, mostly while it trains and
    saves, and resume it. After each kill its checkpoint must load; at the end metrics.csv must have
    every iteration once."""
    rng = random.Random(seed)
    flags = f"--mode joint {PPO} --checkpoint-every 1 --total-timesteps"
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent, "killed")
        path, log = folder / "checkpoint.pt", folder / "metrics.csv"
        step, partial = 0, 0
        for number in range(1, kills + 1):
            started = time.time()
            process = start(folder, f"{flags} 100000000")
            while number % 5 and process.poll() is None:  # every fifth dies in its start-up
                if log.exists() and log.stat().st_mtime > started:
                    break
                time.sleep(0.01)
            time.sleep(rng.uniform(0, 1.5))
            process.kill()
            said, _ = process.communicate()
            assert process.returncode < 0, f"it ended by itself: {said[-300:]}"
            before = step
            step = vae_ppo.load_checkpoint(path)["global_step"] if path.exists() else 0
            assert step >= before and step % STEPS == 0, f"it went from step {before} to {step}"
            partial += path.with_suffix(".tmp").exists()
            print(f"kill {number}: checkpoint of step {step}", flush=True)
        total = step + 3 * STEPS
        process = start(folder, f"{flags} {total}")
        said, _ = process.communicate()
        assert process.returncode == 0, said[-300:]
        assert vae_ppo.load_checkpoint(path)["global_step"] == total
        rows = log.read_text().splitlines()[1:]
    steps = [int(row.split(",")[0]) for row in rows]
    assert steps == list(range(STEPS, total + 1, STEPS)), "metrics.csv has gaps or repeats"
    print(f"{kills} kills, {partial} of them while a checkpoint was written: every one loads,")
    print(f"and each of the {len(steps)} iterations is once in metrics.csv")


def games(games=tuple(GAMES)):
    """A few iterations of each mode, with and without sticky actions, in a Markdown table: "ok" is
    exit code 0, which no metric that is not finite leaves, and a checkpoint that loads."""
    print(f"| game | sticky | {' | '.join(vae_ppo.MODES)} |")
    print("|---|---|" + "---|" * len(vae_ppo.MODES))
    ppo = f"{PPO} --total-timesteps {8 * STEPS}"
    failed = False
    with tempfile.TemporaryDirectory() as parent:
        for game, sticky in [(game, sticky) for game in games for sticky in (0, 0.25)]:
            vae = f"--vae {parent}/{game}-{sticky}-pretrain/checkpoint.pt"
            flags = {"pretrain": "--num-frames 256 --vae-epochs 1", "joint": ppo}
            flags |= {"fixed": f"{ppo} {vae}", "adapt": f"{ppo} {vae}"}
            results = []
            for mode in vae_ppo.MODES:
                folder = Path(parent, f"{game}-{sticky}-{mode}")
                own = f"--env-id ALE/{game}-v5 --repeat-action-probability {sticky}"
                process = start(folder, f"--mode {mode} {own} {flags[mode]}")
                said, _ = process.communicate()
                results.append(said.splitlines()[-1] if process.returncode else "ok")
                if process.returncode == 0:
                    vae_ppo.load_checkpoint(folder / "checkpoint.pt")
            failed = failed or set(results) != {"ok"}
            print(f"| {game} | {sticky} | {' | '.join(results)} |", flush=True)
    return int(failed)


if __name__ == "__main__":
    main(__doc__, kill, games)
