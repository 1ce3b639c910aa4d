"""Every mode on games of all kinds, with and without sticky actions: a smoke run of a few hundred steps each.

    python -m experiments.games > experiments/games.md

Prints a Markdown table: actions, whether there is FIRE, the rewards that were seen, and whether each mode
ended with exit code 0, finite metrics and a checkpoint that loads.
"""

import contextlib
import csv
import io
import math
import os
import sys
import tempfile
from pathlib import Path

import vae_ppo

GAMES = """Breakout Pong SpaceInvaders Freeway MontezumaRevenge Boxing Skiing Tennis Pitfall MsPacman Enduro
    Seaquest Venture PrivateEye""".split()
SMALL = "--no-cuda --num-envs 2"
PPO = "--num-steps 64 --segment-length 16 --num-minibatches 2 --update-epochs 1 --total-timesteps 256"


def rewards_seen(game, steps=1000):
    """The least and the greatest reward of some random play, and what the game is like."""
    args = vae_ppo.parse_args(f"--mode joint --env-id ALE/{game}-v5 --run-name unused".split())
    envs, fire = vae_ppo.make_envs(args)
    games = vae_ppo.Games(envs, fire, vae_ppo.reseed(args, 0, 0))
    envs.action_space.seed(0)
    rewards = [games.step(envs.action_space.sample())[1] for _ in range(steps)]
    low, high = min(r.min() for r in rewards), max(r.max() for r in rewards)
    return int(envs.single_action_space.n), "yes" if fire else "no", f"{low} to {high}"


def run(flags, name):
    """Exit code 0, finite metrics, a checkpoint that loads: "ok", or else what went wrong."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as errors:
        code = vae_ppo.main([*flags.split(), *SMALL.split(), "--run-name", name])
    if code:
        return errors.getvalue().splitlines()[-1]
    vae_ppo.load_checkpoint(Path("runs", name, "checkpoint.pt"))
    with open(f"runs/{name}/metrics.csv") as file:
        values = [float(x) for row in csv.DictReader(file) for x in row.values() if x]
    return "ok" if values and all(map(math.isfinite, values)) else "metrics are not finite"


def main():
    modes, failed = ("pretrain", *vae_ppo.PPO_MODES), 0
    print(
        "Made by `python -m experiments.games`: a smoke run of each mode; rewards of 16 000 random steps.\n"
    )
    print(f"| game | actions | FIRE | rewards | sticky | {' | '.join(modes)} |")
    print("|---|---|---|---|---|" + "---|" * len(modes))
    for game in GAMES:
        kind = rewards_seen(game)
        for sticky in (0, 0.25):
            common = f"--env-id ALE/{game}-v5 --repeat-action-probability {sticky}"
            results, vae = [], f"{game}{sticky}pretrain"
            for mode in modes:
                more = "--num-frames 256 --vae-epochs 1" if mode == "pretrain" else PPO
                more += f" --vae runs/{vae}/checkpoint.pt" * (mode in vae_ppo.ONLY_IN["vae"])
                results.append(run(f"--mode {mode} {common} {more}", f"{game}{sticky}{mode}"))
            failed += results.count("ok") < len(modes)
            print(f"| {game} | {' | '.join(map(str, kind))} | {sticky} | {' | '.join(results)} |", flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        sys.exit(main())
