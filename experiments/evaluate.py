"""What a checkpoint has learnt: whole games, Fig. 1 and 4 of the paper, the ball in mu."""

import json
import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
from matplotlib.figure import Figure
from PIL import Image, ImageDraw

import vae_ppo
from experiments import large_ball
from experiments.run import count

# Where nothing but the ball moves: top, bottom, left, right, margins of y and x
FIELDS = {"ALE/Breakout-v5": (38, 75, 4, 80, 3, 0), "ALE/Pong-v5": (14, 77, 11, 73, 0, 4)}


def load(path, **settings):
    """A checkpoint of any mode. Returns its arguments, with its steps, and its agent."""
    saved = vae_ppo.load_checkpoint(path, Namespace(**settings), *settings)
    args = Namespace(**saved["args"], global_step=saved["global_step"])
    agent = vae_ppo.Agent(len(saved["weights"]["actor.bias"]), args.latent_dim, args.num_stack)
    agent.load_state_dict(saved["weights"])
    return args, agent.requires_grad_(False)


def new_games(args, num_envs, seed):
    args = Namespace(**vars(args) | {"num_envs": num_envs, "env_threads": 0})
    torch.manual_seed(seed)
    return vae_ppo.Games(*vae_ppo.make_envs(args), seed)


def watch(player, args, num_envs=1, steps=2000, seed=1001):
    """Stacks (B, num_stack, 84, 84), balls (B, 2) in their newest frames, and the rows with one.
    A ball is x and y, to 2 pixels. NaN: it may not be whole, or the game is another."""
    buffer = vae_ppo.Buffer(player, steps, num_envs)
    vae_ppo.rollout(player, new_games(args, num_envs, seed), buffer)
    stacks = buffer.frames[buffer.stack[:-1], torch.arange(num_envs)[:, None]].flatten(0, 1)
    top, bottom, left, right, dy, dx = FIELDS.get(args.env_id, (0, 84, 0, 84, 84, 84))
    field = stacks[:, -1, top:bottom, left + 1 : right - 1].float()  # the edge mixes with walls
    field -= field.amin((1, 2), keepdim=True)
    x = field.sum(1) @ torch.arange(left + 1, right - 1).float() / field.sum((1, 2))  # 0 / 0 is NaN
    y = field.sum(2) @ torch.arange(top, bottom).float() / field.sum((1, 2))
    whole = (y - top >= dy) & (bottom - y >= dy) & (x - left >= dx) & (right - x >= dx)
    balls = torch.stack([x, y], dim=1).where(whole[:, None], torch.nan)
    return stacks, balls, whole.nonzero()[:, 0]


def decode(agent, frames):
    """What the decoder makes of the mu of frames (B, 84, 84), between 0 and 1."""
    return agent.decoder(agent.encode(frames)[0]).sigmoid()


def colour_value(agent, stacks):
    """The newest frames (B, 84, 84, 3), blue where |dV/dx| is above its mean (Fig. 4)."""
    stacks = stacks.float().requires_grad_()
    _, value = agent.policy(agent.encode(stacks)[0].flatten(1))
    size = torch.autograd.grad(value.sum(), stacks)[0][:, -1, :, :, None].abs()
    top = size.flatten(1).quantile(0.995, dim=1)[:, None, None, None]
    blue = (size / top).clamp(max=1) * (size > size.mean((1, 2), keepdim=True))
    return (1 - blue) * stacks.detach()[:, -1, ..., None] / 255 + blue * torch.tensor([0.1, 0.4, 1])


def show(axes, picture, ball):
    """A picture between 0 and 1, and the ball in a circle."""
    axes.imshow(picture, cmap="gray", vmin=0, vmax=1)
    axes.plot(*ball, "ro", fillstyle="none", markersize=11)
    axes.set(xticks=[], yticks=[])


def draw(path, rows, balls, crosses=None):
    """A row for each {label: pictures}, and a column for each ball."""
    figure = Figure((8.5, 0.3 + 8.5 * len(rows) / len(balls)), layout="constrained")
    for row, label in zip(figure.subplots(len(rows), len(balls), squeeze=False), rows, strict=True):
        row[0].set_ylabel(label, fontsize=11 if crosses else 8)
        for number, cell in enumerate(row):
            show(cell, rows[label][number], balls[number])
            if crosses:
                cell.plot(*crosses[label][number], "yx", markersize=9, markeredgewidth=2)
    figure.savefig(path, dpi=120)


def film(path, panels):
    """Panels {title: pictures} side by side, as a GIF."""
    pictures = [x if x.ndim == 4 else x[..., None].expand(*x.shape, 3) for x in panels.values()]
    small = (torch.cat(pictures, dim=2) * 15).round().byte() * 17  # 16 shades make a small file
    header = Image.new("RGB", (252 * len(panels), 24))  # 3 * 84 = 252
    for number, title in enumerate(panels):
        ImageDraw.Draw(header).text((252 * number + 126, 12), title, anchor="mm", font_size=16)
    large = small.numpy().repeat(3, axis=1).repeat(3, axis=2)
    images = [Image.fromarray(np.vstack([header, x])).quantize(48) for x in large]
    images[0].save(path, save_all=True, append_images=images[1:], duration=70)


def play(options):
    args, agent = load(options.checkpoint)
    folder = Path("watched", args.run_name)
    folder.mkdir(parents=True, exist_ok=True)
    games = new_games(args, options.episodes, seed=1000)
    buffer = vae_ppo.Buffer(agent, 1, options.episodes)
    scores = np.full(options.episodes, np.nan)  # of the first games, not of the shortest
    while np.isnan(scores).any():  # ale-py's limit is 27 000 steps
        score, frame_number = games.score, games.frame_number
        vae_ppo.rollout(agent, games, buffer)
        scores = np.where(np.isnan(scores) & (games.frame_number < frame_number), score, scores)
    means = np.random.default_rng(0).choice(scores, (10_000, len(scores))).mean(axis=1)
    low, high = np.quantile(means, [0.025, 0.975]).round(3)
    facts = {"global_step": args.global_step, "mean": scores.mean(), "interval": [low, high]}
    path = folder / f"scores-{args.global_step}-{len(scores)}.json"
    path.write_text(json.dumps(facts | {"scores": scores.tolist()}) + "\n")
    stacks, balls, rows = watch(agent, args)
    rows = rows if len(rows) else torch.arange(len(stacks))
    some = rows[torch.linspace(0, len(rows) - 1, 6).long()]
    start = balls[:, 0].isfinite().float().unfold(0, 100, 1).mean(1).argmax()  # most balls
    stacks = torch.cat([stacks[some], stacks[start : start + 100]])
    panels = {"frame": stacks[:, -1] / 255, "decoded from mu": decode(agent, stacks[:, -1])}
    if args.mode != "pretrain":
        panels["what the value looks at"] = colour_value(agent, stacks)
    draw(folder / "pictures.png", {title: x[:6] for title, x in panels.items()}, balls[some])
    film(folder / "episode.gif", {title: x[6:] for title, x in panels.items()})
    print(f"{len(scores)} games, mean {scores.mean():.1f} (95 %: {low} to {high}), see {folder}")


def read_balls(agent, frames, balls, parts):
    """Fit an MLP from mu to balls (B, 2). Returns what it reads, and the test's R^2 of x and y."""
    learn, stop, test = parts
    torch.manual_seed(0)
    x = torch.cat([agent.encode(batch)[0] for batch in frames.split(500)])
    x = (x - x[learn].mean(0)) / (x[learn].std(0) + 1e-6)
    y = (balls - balls[learn].mean(0)) / balls[learn].std(0)
    layers = nn.Linear(x.shape[1], 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2)
    model = nn.Sequential(*layers)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    best, age = float("inf"), 0
    while age < 20:  # epochs without a gain
        for rows in learn[torch.randperm(len(learn))].split(128):
            optimizer.zero_grad()
            (model(x[rows]) - y[rows]).square().mean().backward()
            optimizer.step()
        places = model(x).detach()
        loss = (places - y)[stop].square().mean()
        age += 1
        if loss < best:
            best, age, answer = loss, 0, places
    r2 = 1 - (answer - y)[test].square().mean(0) / y[test].var(0, correction=0)
    return answer * balls[learn].std(0) + balls[learn].mean(0), r2


def probe(options):
    """A row of CSV for each checkpoint. Learns from 12 games, stops by 4, tests on 4."""
    settings, player = load(options.policy or options.checkpoints[-1])
    stacks, balls, rows = watch(player, settings, 20, options.frames // 20, seed=1000)
    frames, balls, part = stacks[rows, -1], balls[rows], rows % 20 % 5
    _, _, test = parts = [x.nonzero()[:, 0] for x in (part < 3, part == 3, part == 4)]
    if min(len(x) for x in parts) < 10:
        sys.exit(f"{len(rows)} frames have a ball (known in Breakout and Pong): raise --frames")
    large_ball.paint(frames, options.ball)
    erased = frames.clone()
    top, bottom, left, right, *_ = FIELDS[settings.env_id]
    erased[:, top:bottom, left:right] = frames[:, top:bottom, left:right].amin(0)
    pixels = torch.cartesian_prod(torch.arange(84.0), torch.arange(84.0)).flip(1)  # x and y
    near = (torch.cdist(balls[test], pixels) <= 3).unflatten(1, (84, 84))  # to the ball
    true = frames[test][near].float().mean() / 255
    shown = test[torch.linspace(0, len(test) - 1, 5).long()]
    crosses = {}
    print("run,mode,global_step,player,ball_size,r2_x,r2_y,r2,r2_erased,ball_decoded,ball_true")
    for path in options.checkpoints:
        args, agent = load(path, env_id=settings.env_id)
        places, r2 = read_balls(agent, frames, balls, parts)
        _, r2_erased = read_balls(agent, erased, balls, parts)
        drawn = decode(agent, frames[test])[near].mean()
        numbers = [f"{x:.4f}" for x in (*r2, r2.mean(), r2_erased.mean(), drawn, true)]
        about = [args.run_name, args.mode, args.global_step, settings.run_name, options.ball]
        print(*about, *numbers, sep=",", flush=True)
        label = f"{args.mode}\nR$^2$ = {r2.mean():.2f}" + " " * len(crosses)  # no label twice
        crosses[label] = places[shown]
    if options.picture:
        draw(options.picture, dict.fromkeys(crosses, frames[shown] / 255), balls[shown], crosses)


if __name__ == "__main__":
    parser = ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    add = commands.add_parser("play", help="whole games, pictures and a film").add_argument
    add("checkpoint", help="of any mode; one of pretrain plays at random; the ball has size 1")
    add("--episodes", type=count, default=100, help="whole games (default: 100)")
    add = commands.add_parser("probe", help="R^2 of the ball in mu, as CSV").add_argument
    add("checkpoints", nargs="+", help="of runs on Breakout, or all on Pong")
    add("--policy", help="checkpoint that plays; if not given, the last one")
    add("--frames", type=count, default=20_000, help="how many it plays (default: 20000)")
    add("--ball", type=count, default=1, help="Breakout's ball is so many times as large")
    add("--picture", type=Path, help="file for a picture of what the MLPs read")
    options = parser.parse_args()
    {"play": play, "probe": probe}[options.command](options)
