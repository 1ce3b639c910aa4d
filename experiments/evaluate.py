"""What a checkpoint has learnt: whole games, the paper's Fig. 1 and Fig. 4, the ball in mu.

    pip install matplotlib==3.11.2
    python -m experiments.evaluate play runs/Breakout-adapt-10M-seed1/checkpoint.pt
    python -m experiments.evaluate probe runs/Breakout-adapt-10M-seed1/checkpoint*.pt \\
        --policy experiments/weights/joint-kappa20-10M-seed1.pt
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import vae_ppo
from experiments import UserError, main

BREAKOUT = "ALE/Breakout-v5"


def load(path, **settings):
    """A checkpoint of any mode. Returns its arguments, with its steps, and its agent."""
    saved = vae_ppo.load_checkpoint(path, **settings)
    args = argparse.Namespace(**saved["args"], global_step=saved["global_step"])
    with vae_ppo.reading(path):
        num_actions = len(saved["weights"]["actor.bias"])
        agent = vae_ppo.Agent(num_actions, args.latent_dim, args.num_stack)
        agent.load_state_dict(saved["weights"])
    if args.mode == "pretrain":
        nn.init.zeros_(agent.actor.weight)  # all actions are equally likely
    return args, agent


def new_games(args, num_envs, seed, kind=vae_ppo.Games):
    args = argparse.Namespace(**vars(args) | {"num_envs": num_envs, "seed": seed, "env_threads": 0})
    return kind(*vae_ppo.make_envs(args), vae_ppo.reseed(args, 0, 0))


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


def watch(player, games, steps):
    """What the player sees: stacks (steps * N, num_stack, 84, 84), the ball in the newest frame of
    each, and the rows in which there is one."""
    buffer = vae_ppo.Buffer(player, steps, games.envs.num_envs, "cpu")
    vae_ppo.rollout(player, games, buffer)
    stacks = buffer.frames[buffer.stack[:-1], torch.arange(buffer.N)[:, None]].flatten(0, 1)
    balls = find_balls(stacks[:, -1])
    return stacks, balls, balls[:, 0].isfinite().nonzero()[:, 0]


def value_jacobian(agent, stacks):
    """|dV/dx| (B, 84, 84) of the newest frames of stacks (B, num_stack, 84, 84)."""
    stacks = stacks.float().requires_grad_()
    mu, _ = agent.encode(stacks)
    _, value = agent.policy(mu.flatten(1))
    return torch.autograd.grad(value.sum(), stacks)[0][:, -1].abs()


# ---- Pictures ----
def see(agent, stacks):
    """Pictures (B, 84, 84, 3) between 0 and 1: the newest frames; what the decoder makes of their
    mu; these frames again, blue where |dV/dx| is above its mean."""
    if stacks.shape[1] != agent.num_stack:  # another agent's: for the decoder, the newest will do
        stacks = stacks[:, -1:].expand(-1, agent.num_stack, -1, -1)
    frames = stacks[:, -1] / 255
    mu, _ = agent.encode(stacks[:, -1])
    decoded = agent.decoder(mu).sigmoid().detach()
    size = value_jacobian(agent, stacks)
    mean = size.mean((1, 2), keepdim=True)
    top = size.flatten(1).quantile(0.995, dim=1)[:, None, None]
    blue = (size / top).clamp(max=1) * (size > mean)
    frames, decoded, blue = [x[..., None].expand(-1, -1, -1, 3) for x in (frames, decoded, blue)]
    return frames, decoded, (1 - blue) * frames + blue * torch.tensor([0.1, 0.4, 1.0])


def show(axes, picture, ball):
    """A picture, the ball in a circle."""
    from matplotlib.patches import Circle

    axes.imshow(picture)
    axes.add_patch(Circle(ball, 5, fill=False, color="red"))
    axes.set(xticks=[], yticks=[])


def draw(path, title, rows, balls):
    """A row for each {label: pictures}, a column for each ball."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 0.5 + 13 * len(rows) / len(balls)), layout="constrained")
    axes = figure.subplots(len(rows), len(balls), squeeze=False)
    for row, (label, pictures) in zip(axes, rows.items(), strict=True):
        row[0].set_ylabel(label)
        for cell, picture, ball in zip(row, pictures, balls, strict=True):
            show(cell, picture, ball)
    figure.suptitle(title)
    figure.savefig(path, dpi=100)


def film(path, panels):
    """Pictures side by side, twice as large."""
    from PIL import Image

    pictures = (torch.cat(panels, dim=2) * 15).round() * 17  # 16 shades make a small file
    large = pictures.byte().repeat_interleave(2, dim=1).repeat_interleave(2, dim=2)
    first, *others = [Image.fromarray(picture) for picture in large.numpy()]
    first.save(path, save_all=True, append_images=others, duration=70, loop=0)


# ---- Whole games ----
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


def play(checkpoint, policy="", seed=1000, episodes=100, out=""):
    """Play whole games, and say in eval.json how they went. Of one more game make episode.gif,
    reconstruction.png (Fig. 1) and jacobian.png (Fig. 4), beside the checkpoint or in --out. A
    pretrain checkpoint has no policy: chance plays, or --policy, and there is no jacobian.png."""
    args, agent = load(checkpoint)
    player = agent
    if policy:
        if args.mode != "pretrain":
            raise UserError(f"{checkpoint} has a policy: leave out --policy")
        args.policy = policy
        player = vae_ppo.load_player(args, agent.actor.out_features)
    folder = Path(out or Path(checkpoint).parent)
    folder.mkdir(parents=True, exist_ok=True)
    games = new_games(args, episodes, seed, FirstGames)
    buffer = vae_ppo.Buffer(player, 128, episodes, "cpu")
    while np.isnan(games.result).any():  # ale-py ends a game after 27 000 steps at the latest
        vae_ppo.rollout(player, games, buffer)
    scores, cut = games.result, episodes // 4
    middle = np.sort(scores)[cut : episodes - cut]
    means = np.random.default_rng(0).choice(scores, (10_000, episodes)).mean(axis=1)  # bootstrap
    facts = {"mode": args.mode, "game": args.env_id, "global_step": args.global_step}
    facts |= {"policy": policy or None, "seed": seed, "episodes": episodes}
    facts |= {"scores": scores.tolist(), "mean": round(scores.mean(), 3)}
    facts |= {"std": round(scores.std(), 3), "iqm": round(middle.mean(), 3)}
    facts["interval"] = np.quantile(means, [0.025, 0.975]).round(3).tolist()  # of the mean, 95 %
    (folder / "eval.json").write_text(json.dumps(facts) + "\n")
    unit = "frames" if args.mode == "pretrain" else "steps"
    title = f"{args.env_id}, {args.mode} after {args.global_step:,} {unit}"
    told = [f"{name} {facts[name]}" for name in ("episodes", "mean", "interval", "std", "iqm")]
    print(f"{title}: {', '.join(told)}")

    stacks, balls, t = watch(player, new_games(args, 1, seed + 1), 2000)
    if args.env_id != BREAKOUT:
        balls[:] = torch.nan
    if balls.isnan().all():
        t = torch.arange(len(stacks))
    t = t[torch.linspace(0, len(t) - 1, 6).long()]  # six in which there is a ball
    frames, decoded, blue = see(agent, stacks[t])
    name = "decoded mu" if args.mode != "adapt" else "decoded mu\n(decoder from before adapt)"
    rows = {"frame": frames, name: decoded, "error": (frames - decoded).abs()}
    draw(folder / "reconstruction.png", title, rows, balls[t])
    panels = see(agent, stacks[:200])  # 14 seconds, less than 2 MB
    if args.mode == "pretrain":
        panels = panels[:2]
    else:
        rows = {"in blue: |dV/dx|\nabove its mean": blue}
        draw(folder / "jacobian.png", title, rows, balls[t])
    film(folder / "episode.gif", panels)
    print(f"eval.json, the pictures and episode.gif are in {folder}")


# ---- The ball in mu ----
def fit(agent, frames, balls, learn, stop, test):
    """An MLP from the mu of frames to balls (B, 2), the one best on the rows `stop`. Returns R^2 of
    the ball's x and y on the rows `test` (2,)."""
    torch.manual_seed(0)
    with torch.no_grad():
        x = torch.cat([agent.encode(batch)[0] for batch in frames.split(500)])
    x = (x - x[learn].mean(0)) / (x[learn].std(0) + 1e-6)
    y = (balls - balls[learn].mean(0)) / balls[learn].std(0)
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
    size = value_jacobian(agent, stacks)
    from_x = torch.arange(84) - balls[:, 0, None, None]  # (B, 1, 84)
    from_y = torch.arange(84)[:, None] - balls[:, 1, None, None]
    near = from_x.square() + from_y.square() <= 25  # (B, 84, 84)
    share = (size * near).sum((1, 2)) / size.sum((1, 2))
    return share.mean(), near.float().mean()


def probe(checkpoints: list, policy="", seed=1000, frames=20_000):
    """Fit an MLP from one frame's mu to the place of Breakout's ball, for each checkpoint and the
    weights that its run began with. --policy, or the last of them, plays 20 games at once and all
    see its frames: 12 games to learn from, 4 to stop by, 4 to test on. Paddle, bricks and score
    tell of the ball, too: r2_erased is of an MLP for the same frames without the ball. near_ball is
    the share of |dV/dx| within 5 pixels of the ball, area that of the picture. Prints a CSV."""
    played_by, player = load(policy or checkpoints[-1], env_id=BREAKOUT)
    stacks, balls, rows = watch(player, new_games(played_by, 20, seed), frames // 20)
    stacks, balls = stacks[rows], balls[rows]
    part = rows % 20 % 5  # of five games
    parts = [x.nonzero()[:, 0] for x in (part < 3, part == 3, part == 4)]
    if min(len(x) for x in parts) < 10:
        raise UserError(f"the ball is in {len(rows)} frames, which are too few: raise --frames")
    newest = stacks[:, -1]
    erased = newest.clone()
    erased[:, 38:75, 4:80] = newest[:, 38:75, 4:80].amin(0)  # where nothing but the ball moves
    some = parts[2][:: max(1, len(parts[2]) // 200)]
    print("run,mode,global_step,player,r2_x,r2_y,r2,r2_erased,near_ball,area")
    seen = set()
    for path in checkpoints:
        args, agent = load(path, env_id=BREAKOUT, num_stack=player.num_stack)
        agents = {args.global_step: agent}
        if args.run_name not in seen:
            first, _ = vae_ppo.make_agent(args, agent.actor.out_features, "cpu")
            vae_ppo.restore(first, None, args, Path("no checkpoint"))  # but --vae, if given
            agents = {0: first} | agents
        seen.add(args.run_name)
        for steps, agent in agents.items():
            r2 = fit(agent, newest, balls, *parts)
            r2_erased = fit(agent, erased, balls, *parts).mean()
            numbers = [*r2, r2.mean(), r2_erased, *near_ball(agent, stacks[some], balls[some])]
            cells = [f"{x:.3f}" for x in numbers]
            about = [args.run_name, args.mode, steps, played_by.run_name]
            print(*about, *cells, sep=",", flush=True)


if __name__ == "__main__":
    main(__doc__, play, probe)
