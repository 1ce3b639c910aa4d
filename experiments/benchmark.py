"""How fast, and why: everything that plays Breakout here, measured in turn. Nothing else may run.

    pip install stable-baselines3==2.9.2
    python -m experiments.benchmark speed > experiments/benchmark.md
    python -m experiments.benchmark scaling > experiments/scaling.md
    python -m experiments.benchmark memory > experiments/memory.md
    python -m experiments.benchmark operators > experiments/operators.md

All print Markdown. `--flags='--num-envs 8'` hands flags to the script.
"""

import contextlib
import os
import platform
import shlex
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
from torch.profiler import profile

import vae_ppo
from experiments import main


def start_games(mode, flags):
    """As `vae_ppo.train` begins, but without the KL stop. Returns arguments, device and games."""
    vae = "--vae unused" if mode in ("fixed", "adapt") else ""
    command = f"--mode {mode} {vae} --target-kl 0 --run-name unused {flags}"
    args = vae_ppo.parse_args(command.split())
    device, _ = vae_ppo.start_process(args)
    return args, device, vae_ppo.Games(*vae_ppo.make_envs(args), vae_ppo.reseed(args, 0, 0))


# ---- Contenders: each returns the steps of an iteration, its rollout and its update ----
def emulator(flags):
    """The vector environment alone, actions uniformly at random."""
    args, _, games = start_games("joint", flags)
    shape = (args.num_steps, args.num_envs)
    actions = np.random.default_rng(0).integers(0, games.envs.single_action_space.n, shape)
    return actions.size, lambda: [games.step(action) for action in actions], lambda: None


def ours(mode, flags):
    """fixed, adapt or joint, as `vae_ppo.train` runs it."""
    args, device, games = start_games(mode, flags)
    agent, optimizer = vae_ppo.make_agent(args, int(games.envs.single_action_space.n), device)
    buffer = vae_ppo.Buffer(agent, args.num_steps, args.num_envs, device)
    rollout = partial(vae_ppo.rollout, agent, games, buffer)
    update = partial(vae_ppo.update, agent, optimizer, buffer, args)
    return args.num_steps * args.num_envs, rollout, update


def naive_loss(agent, buffer, mb, args):
    """Joint's loss the plain way: encode and decode all the num_stack frames of each sample. A test
    compares it with the script's."""
    frames = buffer.frames[mb["rows"]]
    game = torch.arange(frames.shape[1], device=frames.device)[:, None]
    stacks = frames[mb["stack"], game]  # (L, B, num_stack, 84, 84)
    mu, logvar = agent.encode(stacks)
    logits, value = agent.policy(mu.flatten(-2))
    l_ppo, metrics = vae_ppo.ppo_loss(logits, value, mb, args)
    flat = [x.flatten(0, 2) for x in (mu, logvar, stacks)]
    l_vae, _ = vae_ppo.vae_loss(agent.decoder, *flat, args.beta)
    return args.kappa * l_ppo + l_vae, metrics


def naive(network, flags):
    """Joint as first written down: minibatches of single steps, each of them a stack of frames. The
    rollout is ours, since what the plain way costs is the update."""
    vae_ppo.Agent = network
    vae_ppo.minibatch_loss = naive_loss
    return ours("joint", f"{flags} --segment-length 1")


def with_relu(*layers):
    return [part for layer in layers for part in (layer, nn.ReLU())]


class MirroredAgent(vae_ppo.Agent):
    """The Nature CNN, and its mirror image in transposed convolutions as decoder."""

    def __init__(self, num_actions, latent_dim, num_stack):
        super().__init__(num_actions, latent_dim, num_stack)
        down = with_relu(nn.Conv2d(1, 32, 8, 4), nn.Conv2d(32, 64, 4, 2), nn.Conv2d(64, 64, 3))
        up = with_relu(nn.ConvTranspose2d(64, 64, 3), nn.ConvTranspose2d(64, 32, 4, 2))
        first = with_relu(nn.Linear(latent_dim, 512), nn.Linear(512, 64 * 7 * 7))
        last = nn.ConvTranspose2d(32, 1, 8, 4), nn.Flatten(1, 2)
        self.encoder = nn.Sequential(*down, nn.Flatten(), *with_relu(nn.Linear(64 * 7 * 7, 512)))
        self.mu = nn.Linear(512, latent_dim)
        self.logvar = nn.Linear(512, latent_dim)
        self.decoder = nn.Sequential(*first, nn.Unflatten(1, (64, 7, 7)), *up, *last)
        self.to(memory_format=torch.channels_last)


def stable_baselines3(flags):
    """Its PPO with its usual Atari settings, no VAE: 8 games x 128 steps, 4 epochs of 256."""
    from stable_baselines3 import PPO
    from stable_baselines3.common.env_util import make_atari_env
    from stable_baselines3.common.vec_env import SubprocVecEnv, VecFrameStack

    envs = make_atari_env("BreakoutNoFrameskip-v4", 8, seed=1, vec_env_cls=SubprocVecEnv)
    settings = {"n_steps": 128, "n_epochs": 4, "batch_size": 256, "ent_coef": 0.01}
    model = PPO("CnnPolicy", VecFrameStack(envs, 4), **settings)
    return 1024, lambda: model.learn(1024, reset_num_timesteps=False), lambda: None


CONTENDERS = {
    "emulator alone (`AtariVectorEnv`)": emulator,
    "fixed": partial(ours, "fixed"),
    "adapt": partial(ours, "adapt"),
    "joint": partial(ours, "joint"),
    "naive joint, same networks": partial(naive, vae_ppo.Agent),
    "naive joint, Nature CNN and its mirror image": partial(naive, MirroredAgent),
    "Stable-Baselines3 PPO (no VAE)": stable_baselines3,
}


# ---- Measuring ----
def seconds(work):
    start = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def memory_of(pid, kind):
    """MiB of a process and its children. VmHWM: their peaks; VmRSS: now (Linux)."""
    status = Path(f"/proc/{pid}/status")
    text = status.read_text() if status.exists() else ""
    if kind not in text:
        return 0
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    own = int(text.split(f"{kind}:")[1].split()[0]) / 1024
    return own + sum(memory_of(child, kind) for child in children)


def measure(name, flags):
    """Steps/s, seconds of rollout and update, peak MiB of this process and of the GPU."""
    steps, *parts = CONTENDERS[name](flags)
    for _ in range(2):  # the first warms up
        times = [seconds(part) for part in parts]
    gpu = torch.cuda.max_memory_allocated() / 2**20
    return steps / sum(times), *times, memory_of(os.getpid(), "VmHWM"), gpu


def print_table(jobs, repetitions):
    """Measure jobs {label: (contender, flags)} in turn, and print a row for each."""
    seen = {label: [] for label in jobs}
    for _ in range(repetitions):
        for label, job in jobs.items():
            with ProcessPoolExecutor(1, get_context("spawn")) as process:
                seen[label].append(process.submit(measure, *job).result())
    print("\n| | steps/s | lowest - highest | rollout s | update s | peak MiB | GPU MiB |")
    print("|---|---|---|---|---|---|---|")
    for label, answers in seen.items():
        speed, rollout, update, memory, gpu = np.median(answers, axis=0)
        lowest, highest = min(answers)[0], max(answers)[0]
        print(f"| {label} | {speed:.0f} | {lowest:.0f} - {highest:.0f} | {rollout:.2f} ", end="")
        print(f"| {update:.2f} | {memory:.0f} | {gpu:.0f} |", flush=True)


def speed(repetitions=5, only=("",), flags=""):
    """Median of the steps/s of one iteration (a rollout and all its updates) without the KL stop,
    of the contenders with a word of --only in their name. They take turns, in a new process each
    time, so that a drift of the machine's speed meets all."""
    names = [name for name in CONTENDERS if any(word in name for word in only)]
    if not names:
        raise vae_ppo.UserError(f"--only takes words of {'; '.join(CONTENDERS)}")
    print_table({name: (name, flags) for name in names}, repetitions)


def scaling(repetitions=5, flags=""):
    """The same of joint with more games, stacked frames, latents; of 32 steps, so that 256 games
    take seconds."""
    sizes = {"num-envs": (8, 16, 32, 64, 128, 256), "num-stack": (1, 2, 4, 8)}
    sizes["latent-dim"] = (5, 20, 80)
    for flag, numbers in sizes.items():
        own = f"--num-steps 32 --segment-length 16 {flags} --{flag}"
        print_table({f"`--{flag} {n}`": ("joint", f"{own} {n}") for n in numbers}, repetitions)


def memory(iterations=10_000, flags=""):
    """Resident memory of the script, over many short iterations, the KL ending each (Linux)."""
    command = "--mode joint --num-envs 2 --num-steps 8 --num-minibatches 2 --update-epochs 1"
    command += f" --target-kl 1e-12 --total-timesteps {16 * iterations} --run-name memory {flags}"
    samples = []

    def rollout(*inputs, rollout=vae_ppo.rollout):
        samples.append(memory_of(os.getpid(), "VmRSS"))
        rollout(*inputs)

    vae_ppo.rollout = rollout
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        code = vae_ppo.main([*command.split(), "--runs-dir", folder])
    print(f"\n`{command}`\n\n| iteration | resident MiB |\n|---|---|")
    for iteration in range(0, len(samples), max(1, len(samples) // 20)):
        print(f"| {iteration} | {samples[iteration]:.0f} |")
    return code


def operators(only="adapt", flags=""):
    """The time of torch's operators in a rollout and in an update of a mode."""
    _, *parts = ours(only, flags)
    for name, part in zip(("rollout", "update"), parts, strict=True):
        part()  # warms up
        with profile() as profiler:
            whole = seconds(part)
        print(f"\n{name}: {whole:.2f} s, of which in operators\n")
        print("| operator | s | share |\n|---|---|---|")
        events = sorted(profiler.key_averages(), key=lambda event: -event.self_cpu_time_total)
        for event in events[:12]:
            spent = event.self_cpu_time_total / 1e6
            print(f"| `{event.key}` | {spent:.3f} | {spent / whole:.0%} |")


def machine():
    info = Path("/proc/cpuinfo")
    cpu = info.read_text() if info.exists() else platform.processor()
    cpu = cpu.split("model name\t: ")[-1].split("\n")[0]
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    software = f"Python {platform.python_version()}, torch {torch.__version__}"
    return f"{os.cpu_count()} cores of {cpu}, {gpu}; {software}"


if __name__ == "__main__":
    print(f"Made by `python -m experiments.benchmark {shlex.join(sys.argv[1:])}`: {machine()}.")
    main(__doc__, speed, scaling, memory, operators)
