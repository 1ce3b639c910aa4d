"""The speed of everything that plays Breakout here, measured in turn. Nothing else may run."""

import os
import sys
import time
from argparse import ArgumentParser
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import torch
import torch.nn as nn

import vae_ppo

CONTENDERS = ("emulator", "fixed", "adapt", "joint")
CONTENDERS += ("naive joint, same networks", "naive joint, Nature CNN", "Stable-Baselines3 PPO")
VAE = "experiments/weights/pretrain-seed1.pt"


def naive_loss(agent, buffer, segments, args):
    """Joint's loss the plain way: encode and decode all num_stack frames of each step."""
    mb = vae_ppo.gather(buffer, segments, args.segment_length)
    game = torch.arange(len(segments), device=segments.device)[:, None]
    frames = buffer.frames[mb["rows"]][mb["stack"], game].flatten(0, 2)  # L * B * num_stack
    mu, logvar = agent.encode(frames)
    logits, value = agent.policy(mu.view(*mb["actions"].shape, -1))
    l_ppo, metrics = vae_ppo.ppo_loss(logits, value, mb, args)
    l_vae, _ = vae_ppo.vae_loss(agent, frames, mu, logvar, args)
    return args.kappa * l_ppo + l_vae, metrics


class NatureAgent(vae_ppo.Agent):
    """The Nature CNN, and its mirror image in transposed convolutions as decoder."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        relu = nn.ReLU()
        down = nn.Conv2d(1, 32, 8, 4), relu, nn.Conv2d(32, 64, 4, 2), relu, nn.Conv2d(64, 64, 3)
        self.encoder = nn.Sequential(*down, relu, nn.Flatten(), nn.Linear(64 * 7 * 7, 512), relu)
        self.mu, self.logvar = nn.Linear(512, sizes[1]), nn.Linear(512, sizes[1])
        first = nn.Linear(sizes[1], 512), relu, nn.Linear(512, 64 * 7 * 7), relu
        up = nn.ConvTranspose2d(64, 64, 3), relu, nn.ConvTranspose2d(64, 32, 4, 2), relu
        last = nn.ConvTranspose2d(32, 1, 8, 4), nn.Flatten(1, 2)
        self.decoder = nn.Sequential(*first, nn.Unflatten(1, (64, 7, 7)), *up, *last)
        self.to(memory_format=torch.channels_last)


def measure(name, flags):
    """Steps/s of the fourth iteration: a rollout and its updates. The others warm up."""
    if name == "Stable-Baselines3 PPO":  # no VAE; its usual Atari settings
        from stable_baselines3 import PPO  # pip install stable-baselines3==2.9.2
        from stable_baselines3.common.env_util import make_atari_env
        from stable_baselines3.common.vec_env import SubprocVecEnv, VecFrameStack

        envs = make_atari_env("BreakoutNoFrameskip-v4", 8, seed=1, vec_env_cls=SubprocVecEnv)
        envs = VecFrameStack(envs, 4)
        model = PPO("CnnPolicy", envs, n_steps=128, n_epochs=4, batch_size=256, ent_coef=0.01)
        learn = (model.learn(1024, reset_num_timesteps=False) for _ in range(4))
        steps = 1024
    else:
        if name.startswith("naive"):  # only the update is naive
            vae_ppo.minibatch_loss = naive_loss
            flags += " --segment-length 1"
        if name == "naive joint, Nature CNN":
            vae_ppo.Agent = NatureAgent
        mode = f"{name} --vae {VAE}" if name in ("fixed", "adapt") else "joint"
        args = vae_ppo.parse_args(f"--mode {mode} --target-kl 0 --run-name unused {flags}".split())
        device, _ = vae_ppo.start_process(args)
        games = vae_ppo.Games(*vae_ppo.make_envs(args), args.seed)
        agent, optimizer = vae_ppo.make_agent(args, 4, device)
        learn = vae_ppo.learn_policy(agent, optimizer, games, args, [0] * 4)
        if name == "emulator":
            actions = np.random.default_rng(0).integers(0, 4, (args.num_steps, args.num_envs))
            learn = ([games.step(action) for action in actions] for _ in range(4))
        steps = args.num_steps * args.num_envs
    for _ in range(4):
        start = time.perf_counter()
        next(learn)  # its metrics wait for the GPU
    return steps / (time.perf_counter() - start)


if __name__ == "__main__":
    parser = ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--repetitions", type=int, choices=range(1, 10), default=5, help="of each (default: 5)")
    add("--only", nargs="+", choices=CONTENDERS, default=CONTENDERS, help="measure only these")
    add("--flags", default="", help="of vae_ppo.py, like --flags='--num-envs 8'")
    options = parser.parse_args()
    results = {name: [] for name in options.only}
    with ProcessPoolExecutor(1, max_tasks_per_child=1) as pool:  # a new process for each
        for name in [*results] * options.repetitions:  # a drift of the speed meets all
            results[name].append(pool.submit(measure, name, options.flags).result())
            print(f"{name}: {results[name][-1]:.0f} steps/s", file=sys.stderr)
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    print(f"\n{os.cpu_count()} cores, {gpu}, torch {torch.__version__}.\n")
    print("| | steps/s | lowest - highest |\n|---|---|---|")
    for name, speeds in results.items():
        print(f"| {name} | {np.median(speeds):.0f} | {min(speeds):.0f} - {max(speeds):.0f} |")
