"""Does one frame's mu know where Breakout's ball is? Fits an MLP from mu to the ball's place.

    python -m experiments.probe runs/a/checkpoint.pt runs/b/checkpoint.pt --frames 10000

One policy (--policy; unless told, the last checkpoint's) plays, and every encoder sees the same frames: those
with the ball between bricks and paddle. They are split by whole games, to learn from, to stop by and to test
on. Prints a Markdown table of the last part. Paddle, bricks and score may tell of the ball, too: the column
"erased" has the mean R^2 of a second MLP, fitted to the same frames without the ball.
"""

import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from gymnasium.wrappers import AtariPreprocessing

import vae_ppo
from experiments.evaluate import guarded, load, value_jacobian
from vae_ppo import UserError, number

NEAR, PIXELS = 5, np.array([84 / 160, 84 / 210])  # of the 84x84 frame; of it per pixel of the screen, (x, y)


class OneGame:
    """What vae_ppo.make_envs returns, of one game in gymnasium's own wrappers, which show the memory. `seen`
    has for each frame the game's number and the ball's x and y in the 84x84 frame, or NaN."""

    num_envs, fire, game, over = 1, 1, 0, True

    def __init__(self):
        env = gym.make("ALE/Breakout-v5", frameskip=1, repeat_action_probability=0.0)
        self.env, self.seen = AtariPreprocessing(env, noop_max=30), []

    def reset(self, seed):
        self.env.reset(seed=seed)
        obs, *_, info = self.step(None)
        return obs, info

    def step(self, action):
        """After a game's end, the action is ignored as by ale-py's NEXT_STEP."""
        if self.over:
            self.env.reset()
            self.game, self.lives, action = self.game + 1, 0, [self.fire]
        obs, reward, terminated, truncated, info = self.env.step(int(action[0]))
        # On all of 13 925 screens the ball was 2x4 pixels, its left edge memory[99] - 49, its upper edge
        # memory[101] + 9. Bricks end at 92, the paddle begins at 189; the margins are for the ball's place a
        # screen before, which is in the frame, too. memory[101] is 0 until the ball is served.
        memory = self.env.unwrapped.ale.getRAM().astype(float)
        ball = np.array([memory[99] - 48, memory[101] + 11]) * PIXELS - 0.5  # its centre
        self.seen.append((self.game, *(ball if 90 <= memory[101] <= 171 else ball * np.nan)))
        lost, self.lives, self.over = info["lives"] < self.lives, info["lives"], terminated or truncated
        done = (np.array([x]) for x in (reward, terminated or lost, truncated))
        return obs[None, None], *done, {"episode_frame_number": np.array([info["episode_frame_number"]])}


def split(rows, game):
    """The rows of three fifths of the games, of one and of one."""
    names = np.random.default_rng(0).permutation(game[rows].unique().numpy())
    if len(names) < 5:
        raise UserError(
            f"{len(names)} games are too few to test on others than one learns from: raise --frames"
        )
    parts = np.split(names, (len(names) // 5, 2 * (len(names) // 5)))
    return [rows[np.isin(game[rows], part)] for part in parts[::-1]]


def fit(x, ball, learn, stop, test):
    """An MLP from x (B, n) to ball (B, 2), the one best on the rows `stop`. Returns its answers (test, 2)."""
    torch.manual_seed(0)
    middle, scale = ball[learn].mean(0), ball[learn].std(0)
    x, y = (x - x[learn].mean(0)) / (x[learn].std(0) + 1e-6), (ball - middle) / scale
    hidden = nn.Linear(x.shape[1], 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU()
    model, best, age = nn.Sequential(*hidden, nn.Linear(64, 2)), float("inf"), 0
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    while age < 20:  # epochs without a gain
        for rows in learn[torch.randperm(len(learn))].split(128):
            optimizer.zero_grad()
            F.mse_loss(model(x[rows]), y[rows]).backward()
            optimizer.step()
        with torch.no_grad():
            loss, age = F.mse_loss(model(x[stop]), y[stop]).item(), age + 1
            if loss < best:
                best, age, answer = loss, 0, model(x[test]) * scale + middle
    return answer


def near_ball(agent, frames, first, ball, rows):
    """The share of |dV/dx| that is within NEAR pixels of the ball, and that area's share of the frame."""
    size = value_jacobian(agent, frames[vae_ppo.stack_index(rows, first[rows], agent.num_stack)]).abs()
    y, x, (ball_x, ball_y) = torch.arange(84)[:, None], torch.arange(84), ball[rows].T[..., None, None]
    near = (x - ball_x).square() + (y - ball_y).square() <= NEAR**2
    share = (size * near).sum((1, 2)) / size.sum((1, 2))
    return f"{100 * share.mean():.1f} % (area {100 * near.float().mean():.1f} %)"


def cells(answer, erased, ball):
    squares = (ball - ball.mean(0)).square().sum(0)
    r2, r2_erased = (1 - (x - ball).square().sum(0) / squares for x in (answer, erased))
    error = (answer - ball).norm(dim=1).mean()
    return f"{r2[0]:.2f} | {r2[1]:.2f} | {r2.mean():.2f} | {r2_erased.mean():.2f} | {error:.1f}"


@torch.no_grad()
def encode(agent, frames):
    return torch.cat([agent.encode(batch)[0] for batch in frames.split(500)])


def compare(own):
    player, agents = own.policy or own.checkpoints[-1], {path: load(path) for path in own.checkpoints}
    _, _, policy = loaded = load(player)
    for _, args, _ in (*agents.values(), loaded):
        if args.env_id != "ALE/Breakout-v5":
            raise UserError(f"{args.env_id}: the probe knows the memory of ALE/Breakout-v5 alone")
    torch.manual_seed(own.seed)
    envs, ro = OneGame(), vae_ppo.Rollout(policy, own.frames - 1, 1, torch.device("cpu"))
    vae_ppo.rollout(policy, vae_ppo.Games(envs, envs.fire, own.seed), ro)
    frames, first = ro.frames[ro.C :, 0], ro.first[:, 0] - ro.C  # first: the row where the episode began
    game, ball = torch.tensor(np.array(envs.seen)).float().split((1, 2), 1)
    learn, stop, test = parts = split(ball[:, 0].isfinite().nonzero()[:, 0], game[:, 0])
    erased, some = frames.clone(), test[:: max(1, len(test) // 200)]
    erased[:, 38:75, 4:80] = frames[:, 38:75, 4:80].amin(0)  # between bricks and paddle nothing else moves

    print(f"Made by `python -m experiments.probe {' '.join(sys.argv[1:])}`: {len(frames)} frames of")
    print(f"{int(game.max())} games that {player} played.")
    print(f"{len(learn)} to learn from, {len(stop)} to stop by, {len(test)} to test on.")
    print(f"Near the ball: the share of abs(dV/dx) within {NEAR} pixels of it.\n")
    print("| from | R^2 of x | of y | mean | erased | error, pixels | near the ball |")
    print("|---|---|---|---|---|---|---|")
    constant = ball[learn].mean(0).expand(len(test), 2)
    print(f"| constant: the mean place | {cells(constant, constant, ball[test])} | |")
    for path, (_, args, agent) in agents.items():
        answers = (fit(encode(agent, x), ball, *parts) for x in (frames, erased))
        near = "" if args.mode == "pretrain" else near_ball(agent, frames, first, ball, some)
        name = f"mu of {args.mode}, {Path(path).parent.name}"
        print(f"| {name} | {cells(*answers, ball[test])} | {near} |", flush=True)


def main():
    parser = vae_ppo.Parser(description=__doc__.split("\n")[0])
    parser.add_argument("checkpoints", nargs="+", metavar="checkpoint")
    parser.add_argument("--policy", metavar="CHECKPOINT", help="who plays; unless told, the last checkpoint")
    parser.add_argument("--frames", type=number(int, 100), default=10_000)
    parser.add_argument("--seed", type=number(int, 0, 2**31 - 1), default=1000, help="of the games")
    return guarded("probe.py", compare, parser)


if __name__ == "__main__":
    sys.exit(main())
