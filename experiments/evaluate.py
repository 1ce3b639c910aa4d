"""Play whole games with a checkpoint's policy, and show what it sees: the paper's Fig. 1 and Fig. 4.

    pip install matplotlib==3.11.2
    python -m experiments.evaluate runs/Breakout-joint-kappa20-seed1/checkpoint.pt --episodes 30

Prints the scores' statistics. Writes eval.json, episode.webm (the first minute of the game of the median
score), reconstruction.png and jacobian.png beside the checkpoint or into --out. A pretrain checkpoint has no
policy: chance plays, or the policy of another checkpoint (--policy), and there is no jacobian.png.
"""

import argparse
import json
import sys
import zlib
from pathlib import Path

import cv2
import gymnasium as gym
import numpy as np
import torch
import torch.nn as nn
from matplotlib.figure import Figure
from matplotlib.patches import Circle

import vae_ppo
from vae_ppo import UserError, number

FPS, SECONDS = 15, 60  # of 60 frames a second a step takes 4: as fast as the game


def load(path):
    """A checkpoint of any mode. Returns its dict, its arguments and its agent."""
    checkpoint = vae_ppo.load_checkpoint(path)
    agent = vae_ppo.Agent(len(checkpoint["weights"]["actor.bias"]), *checkpoint["sizes"])
    vae_ppo.load_state(agent, checkpoint["weights"], path)
    if checkpoint["args"]["mode"] == "pretrain":
        nn.init.zeros_(agent.actor.weight)  # equal logits, as in vae_ppo.collect_frames
    return checkpoint, argparse.Namespace(**checkpoint["args"]), agent


class FirstGames(vae_ppo.Games):
    """Games that keep, of each one's first whole game, the actions as sent, the score, the frames' checksum.
    Were it the games that end first, wherever they are played, short ones would be too many."""

    def __init__(self, envs, fire, seeds):
        super().__init__(envs, fire, seeds)
        self.seeds, self.playing, self.result = seeds, np.ones(len(seeds), dtype=bool), np.zeros(len(seeds))
        self.actions, self.checksum = [[] for _ in seeds], [zlib.crc32(frame) for frame in self.frame]

    def step(self, action):
        sent, score, clock = np.where(self.reset_row, self.fire, action), self.score, self.clock
        answer = super().step(action)
        for n in np.flatnonzero(self.playing):
            if self.clock[n] < clock[n]:  # this is a second game's first frame
                self.playing[n], self.result[n] = False, score[n]
            else:
                self.actions[n].append(sent[n])
                self.checksum[n] = zlib.crc32(self.frame[n], self.checksum[n])
        return answer


def replay(games, n, steps=None, **picture):
    """Game n again, from its seed and actions, perhaps as another picture. Returns frames (rows, height,
    width[, 3]) uint8, and of each the row of its episode's first frame (rows,)."""
    spec = games.envs.spec
    envs = gym.make_vec(spec.id, **spec.kwargs | {"num_envs": 1} | picture)
    frames, first, done = [envs.reset(seed=games.seeds[n : n + 1])[0][0, 0]], [0], False
    for row, action in enumerate(games.actions[n][:steps], 1):
        obs, _, terminated, truncated, _ = envs.step(np.array([action]))
        frames.append(obs[0, 0])
        first.append(row if done else first[-1])
        done = terminated[0] or truncated[0]
    return np.stack(frames), torch.tensor(first)


def statistics(scores):
    """Mean, standard deviation, mean of the middle half, and a bootstrap 95 % interval of the mean."""
    cut, many = len(scores) // 4, np.random.default_rng(0).choice(scores, (10_000, len(scores)))
    answer = {"mean": np.mean(scores), "std": np.std(scores)}
    answer |= {"iqm": np.mean(np.sort(scores)[cut : len(scores) - cut])}
    answer |= {"interval": np.quantile(many.mean(1), (0.025, 0.975))}
    return {name: np.round(value, 3).tolist() for name, value in answer.items()}


@torch.no_grad()
def reconstruct(agent, frames):
    """Frames (B, 84, 84) uint8 -> p(x | mu) of each pixel (B, 84, 84)."""
    return torch.sigmoid(agent.decoder(agent.encode(torch.from_numpy(frames))[0])).numpy()


def value_jacobian(agent, stacks):
    """dV/dx of the newest frames (B, 84, 84) of stacks (B, num_stack, 84, 84) uint8, the others constant."""
    with torch.no_grad():
        older = agent.encode(stacks[:, :-1].flatten(0, 1))[0].unflatten(0, (len(stacks), -1))
    newest = stacks[:, -1].float().requires_grad_()
    features = torch.cat((older, agent.encode(newest)[0][:, None]), 1).flatten(1)
    return torch.autograd.grad(agent.policy(features)[1].sum(), newest)[0]


def find_balls(frames):
    """The ball's centre (rows, 2), x and y, or NaN: nothing else is between Breakout's bricks and paddle. A
    frame, as the maximum of two, has the ball twice: this is their middle."""
    field = frames[:, 38:75, 5:79].astype(np.float32)
    x, y, weight = field.sum(1) @ np.arange(5, 79), field.sum(2) @ np.arange(38, 75), field.sum((1, 2))
    return np.stack((x, y), 1) / np.where(weight, weight, np.nan)[:, None]


def film(path, labels, *pictures):
    """Side by side a game (rows, 210, 160, 3) and twice (rows, 84, 84), uint8. Pixels enlarged 4 times make
    VP8's blocks of 4x4, and so a small file."""
    places = (0, 256), (272, 336), (624, 336)  # left edge and width
    canvas = np.full((368, 960, 3), 255, dtype=np.uint8)
    for (x, _), label in zip(places, labels, strict=True):
        cv2.putText(canvas, label, (x, 22), cv2.FONT_HERSHEY_SIMPLEX, 0.6, (0, 0, 0), 1, cv2.LINE_AA)
    # OpenCV says that it does not support this tag, and writes the right one: the film plays in browsers
    video = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"VP80"), FPS, canvas.shape[1::-1])
    if not video.isOpened():
        raise UserError(f"{path}: this OpenCV cannot write WebM, pip's opencv-python can")
    for parts in zip(*pictures, strict=True):
        for (x, width), part in zip(places, parts, strict=True):
            part = cv2.resize(part, (width, 336), interpolation=cv2.INTER_NEAREST)
            canvas[32:, x : x + width] = np.atleast_3d(part)[..., ::-1]  # BGR
        video.write(canvas)
    video.release()


def draw(path, title, names, pictures, balls):
    """Pictures (rows, columns, 84, 84[, 3]) in the paper's manner, a circle around each ball (columns, 2)."""
    rows, columns = pictures.shape[:2]
    figure = Figure(figsize=(13, 13 * rows / columns), layout="constrained")
    axes = figure.subplots(rows, columns)
    for row, name in zip(axes, names, strict=True):
        row[0].set_ylabel(name)
    for cell, picture, ball in zip(axes.flat, np.concatenate(pictures), balls, strict=True):
        cell.imshow(picture, cmap="gray", vmin=0, vmax=pictures.max())
        cell.add_patch(Circle(ball, 5, fill=False, color="red"))
        cell.set(xticks=[], yticks=[])
    figure.suptitle(title)
    figure.savefig(path, dpi=100)


def show(folder, title, args, agent, games, n):
    """Film game n, and picture what the decoder makes of it and where V looks."""
    frames, first = replay(games, n)
    if zlib.crc32(frames) != games.checksum[n]:
        raise UserError("the replayed frames are not those that were played: nothing is drawn")
    screens, _ = replay(games, n, FPS * SECONDS, grayscale=False, img_height=210, img_width=160)
    seen = frames[: len(screens)]
    name = "decoded mu" + " (decoder from before adapt)" * (args.mode == "adapt")
    decoded = (255 * reconstruct(agent, seen)).astype(np.uint8)
    film(folder / "episode.webm", ("the game", "what the network sees", name), screens, seen, decoded)

    balls = find_balls(frames) if args.env_id == "ALE/Breakout-v5" else np.full((len(frames), 2), np.nan)
    shown = np.flatnonzero(np.isfinite(balls[:, 0])) if np.isfinite(balls).any() else np.arange(len(frames))
    rows = shown[np.linspace(0, len(shown) - 1, 6).astype(int)]
    x, decoded = frames[rows] / 255, reconstruct(agent, frames[rows])
    pictures = np.stack((x, decoded, abs(x - decoded)))
    names = "frame", name.replace(" (", "\n("), "absolute error"
    draw(folder / "reconstruction.png", title, names, pictures, np.tile(balls[rows], (3, 1)))
    if args.mode == "pretrain":
        return
    rows = shown[np.linspace(len(shown) // 2, len(shown) - 1, 8).astype(int)]  # bricks are missing
    stacks = frames[vae_ppo.stack_index(torch.from_numpy(rows), first[rows], agent.num_stack)]
    size = value_jacobian(agent, torch.from_numpy(stacks)).abs().numpy()
    mean, top = size.mean((1, 2), keepdims=True), np.quantile(size, 0.995, (1, 2), keepdims=True)
    blue = np.where(size > mean, np.clip(size / top, 0, 1), 0)[..., None]
    pictures = (1 - blue) * frames[rows][..., None] / 255 + blue * np.array([0.1, 0.4, 1.0])
    pictures, title = pictures.reshape(2, 4, 84, 84, 3), f"{title}: where |dV/dx| is above its mean"
    draw(folder / "jacobian.png", title, ("", ""), pictures, balls[rows])


def evaluate(own):
    checkpoint, args, agent = load(own.checkpoint)
    folder = Path(own.out or Path(own.checkpoint).parent)
    folder.mkdir(parents=True, exist_ok=True)
    args.num_envs, args.seed, args.env_threads = own.episodes, own.seed, 0
    games = FirstGames(*vae_ppo.make_envs(args), vae_ppo.reseed(args, 0, 0))
    player = load(own.policy)[2] if own.policy else agent
    ro = vae_ppo.Rollout(player, 128, own.episodes, torch.device("cpu"))
    while games.playing.any():  # ale-py ends a game after 27 000 steps at the latest
        vae_ppo.rollout(player, games, ro)
    scores, global_step = games.result.tolist(), checkpoint["global_step"]
    facts = {"mode": args.mode, "game": args.env_id, "global_step": global_step, "policy": own.policy}
    facts |= {"seed": own.seed, "episodes": own.episodes, "scores": scores} | statistics(scores)
    (folder / "eval.json").write_text(json.dumps(facts) + "\n")
    name = (
        f"{args.env_id}, {args.mode} after {global_step:,} {'frames' if args.mode == 'pretrain' else 'steps'}"
    )
    print(f"{name}: scores of {own.episodes} whole games")
    print("mean {mean:.2f}, standard deviation {std:.2f}, interquartile mean {iqm:.2f}".format(**facts))
    print("bootstrap 95 % interval of the mean: {:.2f} to {:.2f}".format(*facts["interval"]))
    n = int(np.argsort(scores, kind="stable")[(len(scores) - 1) // 2])
    show(folder, f"{name}, a game of score {scores[n]:g}", args, agent, games, n)
    print(f"saved eval.json, the film and the pictures in {folder}")


def guarded(name, function, parser):
    """Parse and call. What the user can mend becomes one sentence. Returns the exit code."""
    try:
        function(parser.parse_args())
        return 0
    except (UserError, gym.error.Error) as error:
        message = str(error)
    except OSError as error:
        message = f"{error.filename}: {error.strerror}"
    print(f"{name}: error: {message}", file=sys.stderr)
    return 2


def main():
    parser = vae_ppo.Parser(description=__doc__.split("\n")[0])
    parser.add_argument("checkpoint")
    parser.add_argument("--episodes", type=number(int, 1, 1000), default=30)
    parser.add_argument("--seed", type=number(int, 0, 2**31 - 1), default=1000, help="not the run's own")
    parser.add_argument(
        "--policy", metavar="CHECKPOINT", help="who plays; unless told, the checkpoint itself"
    )
    parser.add_argument("--out", metavar="FOLDER", help="unless told, the checkpoint's own")
    return guarded("evaluate.py", evaluate, parser)


if __name__ == "__main__":
    sys.exit(main())
