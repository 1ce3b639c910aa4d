"""What a checkpoint has learnt: whole games, the paper's Fig. 1 and Fig. 4, the ball in mu.

    pip install matplotlib==3.11.2
    python -m experiments.evaluate play runs/Breakout-adapt-10M-seed1/checkpoint.pt
    python -m experiments.evaluate probe runs/Breakout-adapt-10M-seed1/checkpoint*.pt \\
        --policy runs/policy-for-data/checkpoint.pt > experiments/results/probe.csv

play: the scores' statistics, eval.json, and of one more game episode.gif, reconstruction.png
(Fig. 1) and jacobian.png (Fig. 4), beside the checkpoint or in --out. A pretrain checkpoint has no
policy: chance plays, or --policy, and there is no jacobian.png.

probe: fits an MLP from one frame's mu to the place of Breakout's ball, for each checkpoint and the
weights that its run began with. One policy plays 20 games at once and all see its frames: 12 games
to learn from, 4 to stop by, 4 to test on. Paddle, bricks and score tell of the ball, too: r2_erased
is of an MLP for the same frames without the ball. near_ball is the share of |dV/dx| within 5 pixels
of the ball, area that of the picture. Prints a CSV.
"""

import argparse
import csv
import json
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import vae_ppo
from experiments import guarded
from vae_ppo import UserError

BREAKOUT = "ALE/Breakout-v5"


def load(path, **settings):
    """A checkpoint of any mode. Returns its steps, its arguments and its agent."""
    saved = vae_ppo.load_checkpoint(path, **settings)
    args = argparse.Namespace(**saved["args"])
    agent = vae_ppo.Agent(len(saved["weights"]["actor.bias"]), args.latent_dim, args.num_stack)
    try:
        agent.load_state_dict(saved["weights"])
    except RuntimeError:
        raise UserError(f"{path} has the weights of another network than vae_ppo.py's") from None
    if args.mode == "pretrain":
        nn.init.zeros_(agent.actor.weight)  # all actions are equally likely
    return saved["global_step"], args, agent


def start_games(args, num_envs, seed, games=vae_ppo.Games):
    args = argparse.Namespace(**vars(args) | {"num_envs": num_envs, "seed": seed, "env_threads": 0})
    return games(*vae_ppo.make_envs(args), vae_ppo.reseed(args, 0, 0))


def value_jacobian(agent, stacks):
    """dV/dx of the newest frames of stacks (B, num_stack, 84, 84) uint8, the others constant."""
    with torch.no_grad():
        older, _ = agent.encode(stacks[:, :-1])
    newest = stacks[:, -1].float().requires_grad_()
    mu, _ = agent.encode(newest)
    _, value = agent.policy(torch.cat([older, mu[:, None]], dim=1).flatten(1))
    return torch.autograd.grad(value.sum(), newest)[0]  # (B, 84, 84)


def find_balls(frames):
    """x and y of the ball (B, 2) in frames (B, 84, 84), NaN where it is not between bricks and
    paddle, where nothing else is. A frame, as the maximum of two, has the ball twice: this is their
    middle, within 2 pixels of where the emulator's memory has the ball."""
    field = frames[:, 38:75, 5:79].float()
    weight = field.sum((1, 2))
    x = field.sum(1) @ torch.arange(5.0, 79) / weight  # 0 / 0 is NaN
    y = field.sum(2) @ torch.arange(38.0, 75) / weight
    balls = torch.stack([x, y], dim=1)
    balls[(y < 41) | (y > 72)] = torch.nan  # a part of it may be outside
    return balls


# ---- play ----
class FirstGames(vae_ppo.Games):
    """Games that keep the score of each one's first whole game. Were it those that end first,
    wherever they are played, short games would be too many."""

    result = np.nan  # while it is played

    def step(self, action):
        score, clock = self.score, self.clock
        answer = super().step(action)
        over = np.isnan(self.result) & (self.clock < clock)
        self.result = np.where(over, score, self.result)
        return answer


def statistics(scores):
    """Mean, standard deviation, interquartile mean, bootstrap 95 % interval of the mean."""
    cut = len(scores) // 4
    resampled = np.random.default_rng(0).choice(scores, (10_000, len(scores)))
    return {
        "mean": round(np.mean(scores), 3),
        "std": round(np.std(scores), 3),
        "iqm": round(np.mean(np.sort(scores)[cut : len(scores) - cut]), 3),
        "interval": np.quantile(resampled.mean(axis=1), [0.025, 0.975]).round(3).tolist(),
    }


@torch.no_grad()
def reconstruct(agent, frames):
    """p(x | mu) of each pixel of frames (B, 84, 84)."""
    mu, _ = agent.encode(frames)
    return torch.sigmoid(agent.decoder(mu))


def in_blue(agent, stacks):
    """The newest frames (B, 84, 84, 3), blue where |dV/dx| is above its mean."""
    size = value_jacobian(agent, stacks).abs()
    mean = size.mean((1, 2), keepdim=True)
    top = size.flatten(1).quantile(0.995, dim=1)[:, None, None]
    blue = ((size / top).clamp(max=1) * (size > mean))[..., None]
    return (1 - blue) * stacks[:, -1, :, :, None] / 255 + blue * torch.tensor([0.1, 0.4, 1.0])


def draw(path, title, rows, balls):
    """A row for each {label: pictures (columns, 84, 84[, 3]) between 0 and 1}; balls in circles."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Circle

    figure = Figure(figsize=(13, 0.5 + 13 * len(rows) / len(balls)), layout="constrained")
    axes = figure.subplots(len(rows), len(balls), squeeze=False)
    for row, (label, pictures) in zip(axes, rows.items(), strict=True):
        row[0].set_ylabel(label)
        for cell, picture, ball in zip(row, pictures, balls, strict=True):
            cell.imshow(picture, cmap="gray", vmin=0, vmax=1)
            cell.add_patch(Circle(ball, 5, fill=False, color="red"))
            cell.set(xticks=[], yticks=[])
    figure.suptitle(title)
    figure.savefig(path, dpi=100)


def film(path, panels):
    """Pictures (steps, 84, 84, 3) between 0 and 1, side by side, twice as large."""
    from PIL import Image

    pictures = (torch.cat(panels, dim=2) * 15).round() * 17  # 16 shades make a small file
    pictures = [Image.fromarray(x.byte().numpy()) for x in pictures]
    pictures = [x.resize((2 * x.width, 2 * x.height), Image.Resampling.NEAREST) for x in pictures]
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=70, loop=0)


def play(own):
    """Play --episodes whole games at once, say how they went, and draw another one."""
    global_step, args, agent = load(own.checkpoints[0])
    player = load(own.policy, env_id=args.env_id)[2] if own.policy else agent
    folder = Path(own.out or Path(own.checkpoints[0]).parent)
    folder.mkdir(parents=True, exist_ok=True)
    games = start_games(args, own.episodes, own.seed, FirstGames)
    buffer = vae_ppo.Buffer(player, 128, own.episodes, "cpu")
    while np.isnan(games.result).any():  # ale-py ends a game after 27 000 steps at the latest
        vae_ppo.rollout(player, games, buffer)
    facts = {"mode": args.mode, "game": args.env_id, "global_step": global_step}
    facts |= {"policy": own.policy, "seed": own.seed, "episodes": own.episodes}
    facts |= {"scores": games.result.tolist()} | statistics(games.result)
    (folder / "eval.json").write_text(json.dumps(facts) + "\n")
    unit = "frames" if args.mode == "pretrain" else "steps"
    title = f"{args.env_id}, {args.mode} after {global_step:,} {unit}"
    print(f"{title}: scores of {own.episodes} whole games")
    print("mean {mean}, standard deviation {std}, interquartile mean {iqm}".format(**facts))
    print("bootstrap 95 % interval of the mean: {} to {}".format(*facts["interval"]))

    buffer = vae_ppo.Buffer(player, 2000, 1, "cpu")
    vae_ppo.rollout(player, start_games(args, 1, own.seed + 1), buffer)
    stacks = buffer.frames[buffer.stack[:-1, 0], 0]  # (2000, num_stack, 84, 84)
    frames = stacks[:, -1]
    balls = find_balls(frames)
    if args.env_id != BREAKOUT:
        balls[:] = torch.nan
    t = torch.arange(len(frames)) if balls.isnan().all() else balls[:, 0].isfinite().nonzero()[:, 0]
    t = t[torch.linspace(0, len(t) - 1, 6).long()]  # six in which there is a ball
    decoded = reconstruct(agent, frames[t])
    name = "decoded mu" if args.mode != "adapt" else "decoded mu\n(decoder from before adapt)"
    rows = {"frame": frames[t] / 255, name: decoded, "error": (frames[t] / 255 - decoded).abs()}
    draw(folder / "reconstruction.png", title, rows, balls[t])
    filmed = slice(0, 200)  # 14 seconds, less than 2 MB
    panels = [frames[filmed] / 255, reconstruct(agent, frames[filmed])]
    panels = [x[..., None].expand(*x.shape, 3) for x in panels]
    if args.mode != "pretrain":
        blue = {"in blue: |dV/dx|\nabove its mean": in_blue(agent, stacks[t])}
        draw(folder / "jacobian.png", title, blue, balls[t])
        panels.append(in_blue(agent, stacks[filmed]))
    film(folder / "episode.gif", panels)
    print(f"eval.json, episode.gif and the pictures are in {folder}")


# ---- probe ----
def fit(x, ball, learn, stop, test):
    """An MLP from x (B, latent_dim) to ball (B, 2), the one best on the rows `stop`. Returns R^2 of
    the ball's x and y on the rows `test` (2,)."""
    torch.manual_seed(0)
    x = (x - x[learn].mean(0)) / (x[learn].std(0) + 1e-6)
    y = (ball - ball[learn].mean(0)) / ball[learn].std(0)
    hidden = nn.Linear(x.shape[1], 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU()
    model = nn.Sequential(*hidden, nn.Linear(64, 2))
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    best, age = float("inf"), 0
    while age < 20:  # epochs without a gain
        for rows in learn[torch.randperm(len(learn))].split(128):
            optimizer.zero_grad()
            F.mse_loss(model(x[rows]), y[rows]).backward()
            optimizer.step()
        with torch.no_grad():
            loss = F.mse_loss(model(x[stop]), y[stop]).item()
            age += 1
            if loss < best:
                best, age, answer = loss, 0, model(x[test])
    return 1 - (answer - y[test]).square().mean(0) / y[test].var(0, correction=0)


def near_ball(agent, stacks, balls):
    """The share of |dV/dx| within 5 pixels of the ball, and that area's share of the picture."""
    size = value_jacobian(agent, stacks).abs()
    from_x = torch.arange(84) - balls[:, 0, None, None]  # (B, 1, 84)
    from_y = torch.arange(84)[:, None] - balls[:, 1, None, None]
    near = from_x.square() + from_y.square() <= 25  # (B, 84, 84)
    share = (size * near).sum((1, 2)) / size.sum((1, 2))
    return share.mean().item(), near.float().mean().item()


def first_weights(args, agent):
    """The agent as it was when its run began: --vae's or random."""
    if args.vae:
        return load(args.vae)[2]
    torch.manual_seed(args.seed)
    return vae_ppo.Agent(agent.actor.out_features, args.latent_dim, args.num_stack)


@torch.no_grad()
def encode(agent, frames):
    return torch.cat([agent.encode(batch)[0] for batch in frames.split(500)])


def probe(own):
    """Print one row for each checkpoint and, before it, for the weights that its run began with."""
    _, args, player = load(own.policy or own.checkpoints[-1], env_id=BREAKOUT)
    buffer = vae_ppo.Buffer(player, own.frames // 20, 20, "cpu")
    vae_ppo.rollout(player, start_games(args, 20, own.seed), buffer)
    ball = find_balls(buffer.frames[buffer.C : -1].flatten(0, 1))
    row = ball[:, 0].isfinite().nonzero()[:, 0]
    t, game = row // 20, row % 20
    ball = ball[row]
    stacks = buffer.frames[buffer.stack[t, game], game[:, None]]  # (B, num_stack, 84, 84)
    parts = [game % 5 < 3, game % 5 == 3, game % 5 == 4]  # to learn from, to stop by, to test on
    parts = [part.nonzero()[:, 0] for part in parts]
    if min(len(part) for part in parts) < 10:
        raise UserError(f"the ball is in {len(row)} frames, which are too few: raise --frames")
    frames = stacks[:, -1]
    erased = frames.clone()
    erased[:, 38:75, 4:80] = frames[:, 38:75, 4:80].amin(0)  # where nothing but the ball moves
    some = parts[2][:: max(1, len(parts[2]) // 200)]

    table = csv.writer(sys.stdout)
    table.writerow("run mode global_step r2_x r2_y r2 r2_erased near_ball area".split())
    seen = set()
    for path in own.checkpoints:
        steps, args, agent = load(path, env_id=BREAKOUT, num_stack=player.num_stack)
        run = args.run_name
        agents = {steps: agent} if run in seen else {0: first_weights(args, agent), steps: agent}
        seen.add(run)
        for steps, agent in agents.items():
            r2 = fit(encode(agent, frames), ball, *parts)
            r2_erased = fit(encode(agent, erased), ball, *parts).mean().item()
            numbers = [*r2.tolist(), r2.mean().item(), r2_erased]
            numbers += near_ball(agent, stacks[some], ball[some])
            table.writerow([run, args.mode, steps, *[f"{x:.3f}" for x in numbers]])
            sys.stdout.flush()


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=["play", "probe"])
    parser.add_argument("checkpoints", nargs="+", metavar="checkpoint", help="one; probe: several")
    parser.add_argument("--policy", help="checkpoint of who plays; by default the last of these")
    parser.add_argument("--seed", type=int, default=1000, help="of the games, not the run's own")
    parser.add_argument("--episodes", type=int, default=100, help="play")
    parser.add_argument("--out", help="folder, by default the checkpoint's own; play")
    parser.add_argument("--frames", type=int, default=20_000, help="probe")
    own = parser.parse_args()
    if min(own.seed + 1, own.episodes, own.frames // 20) < 1:
        parser.error("--seed must be 0 or more, --episodes 1, --frames 20")
    if own.what == "play" and len(own.checkpoints) > 1:
        parser.error("play takes one checkpoint")
    return guarded(play if own.what == "play" else probe, own)


if __name__ == "__main__":
    sys.exit(main())
