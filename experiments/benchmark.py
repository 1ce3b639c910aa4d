"""How fast, and why: everything that plays Breakout here, measured in turn. Nothing else may run.

    pip install stable-baselines3==2.9.2
    python -m experiments.benchmark speed > experiments/benchmark.md
    python -m experiments.benchmark scaling > experiments/scaling.md
    python -m experiments.benchmark memory > experiments/memory.md
    python -m experiments.benchmark operators > experiments/operators.md

speed, scaling: median of the steps/s of one iteration (a rollout and all its updates) without the
KL stop, for each contender or size. They take turns, in a new process each time, so that a drift of
the machine's speed meets all. memory: of the script, over many short iterations. operators: where
the time of a rollout and of an update of adapt goes. All print Markdown.
"""

import argparse
import multiprocessing
import os
import platform
import shlex
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn

import vae_ppo
from experiments import guarded
from vae_ppo import layer_init

SIZES = {
    "num-envs": (8, 16, 32, 64, 128, 256),
    "num-stack": (1, 2, 4, 8),
    "latent-dim": (5, 20, 80),
}
SMALL = "--num-envs 2 --num-steps 8 --segment-length 8 --num-minibatches 2 --update-epochs 1"


def make_args(mode, flags):
    vae = "" if "decoder" in vae_ppo.MODES[mode][0] else "--vae unused"
    command = f"--mode {mode} --target-kl 0 --run-name unused {vae} {flags}"
    return vae_ppo.parse_args(command.split())


def start_games(args):
    return vae_ppo.Games(*vae_ppo.make_envs(args), vae_ppo.reseed(args, 0, 0))


def set_up(mode, flags, network=vae_ppo.Agent):
    """What `vae_ppo.train` makes before its loop."""
    args = make_args(mode, flags)
    device, _, _ = vae_ppo.start_process(args)
    games = start_games(args)
    num_actions = int(games.envs.single_action_space.n)
    agent = network(num_actions, args.latent_dim, args.num_stack).to(device)
    if args.compile:
        for part in agent.children():
            part.compile()
    networks, _ = vae_ppo.MODES[mode]
    parameters = [p for name in networks for p in getattr(agent, name).parameters()]
    optimizer = torch.optim.Adam(parameters, args.learning_rate, eps=1e-5, fused=True)
    buffer = vae_ppo.Buffer(agent, args.num_steps, args.num_envs, device)
    return args, agent, optimizer, games, buffer


def clock():
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


# ---- Contenders: each returns a function that makes an iteration: steps, and two times ----
def emulator(flags):
    """The vector environment alone, actions uniformly at random."""
    args = make_args("joint", flags)
    games = start_games(args)
    rng = np.random.default_rng(0)

    def iteration():
        start = clock()
        for _ in range(args.num_steps):
            games.step(rng.integers(0, games.envs.single_action_space.n, args.num_envs))
        return args.num_steps * args.num_envs, clock() - start, 0.0

    return iteration


def ours(mode, flags, network=vae_ppo.Agent):
    """fixed, adapt or joint, as `vae_ppo.train` runs it."""
    args, agent, optimizer, games, buffer = set_up(mode, flags, network)

    def iteration():
        start = clock()
        vae_ppo.rollout(agent, games, buffer)
        middle = clock()
        vae_ppo.update(agent, optimizer, buffer, args)
        return args.num_steps * args.num_envs, middle - start, clock() - middle

    return iteration


def naive_loss(agent, buffer, mb, args):
    """Joint's loss the plain way: encode and decode all the num_stack frames of each sample."""
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
    vae_ppo.minibatch_loss = naive_loss
    return ours("joint", f"{flags} --segment-length 1", network)


def with_relu(*layers):
    return [part for layer in layers for part in (layer_init(layer), nn.ReLU())]


class MirroredAgent(vae_ppo.Agent):
    """The Nature CNN, and its mirror image in transposed convolutions as decoder."""

    def __init__(self, num_actions, latent_dim, num_stack):
        super().__init__(num_actions, latent_dim, num_stack)
        down = (nn.Conv2d(1, 32, 8, 4), nn.Conv2d(32, 64, 4, 2), nn.Conv2d(64, 64, 3))
        up = (nn.ConvTranspose2d(64, 64, 3), nn.ConvTranspose2d(64, 32, 4, 2))
        self.encoder = nn.Sequential(
            *with_relu(*down), nn.Flatten(), *with_relu(nn.Linear(64 * 7 * 7, 512))
        )
        self.mu = layer_init(nn.Linear(512, latent_dim), std=1.0)
        self.logvar = layer_init(nn.Linear(512, latent_dim), std=0.01)
        self.decoder = nn.Sequential(
            *with_relu(nn.Linear(latent_dim, 512), nn.Linear(512, 64 * 7 * 7)),
            nn.Unflatten(1, (64, 7, 7)),
            *with_relu(*up),
            layer_init(nn.ConvTranspose2d(32, 1, 8, 4), std=1.0),
            nn.Flatten(1, 2),
        )
        self.to(memory_format=torch.channels_last)


def check_same_loss():
    """The naive loss is the script's, both without noise. With stacks its VAE part is the same in
    the mean alone, since the naive one counts a frame as often as it is in a stack."""
    noise, torch.randn_like = torch.randn_like, torch.zeros_like
    torch.set_default_dtype(torch.float64)
    for num_stack in (1, 4):
        flags = f"--no-cuda --num-envs 4 --num-steps 32 --num-stack {num_stack} --num-minibatches 1"
        args, agent, _, games, buffer = set_up("joint", flags)
        vae_ppo.rollout(agent, games, buffer)
        mb = next(vae_ppo.minibatches(buffer, *vae_ppo.gae(buffer, 0.99, 0.95), args))
        loss, metrics = vae_ppo.minibatch_loss(agent, buffer, mb, args)
        plain_loss, plain_metrics = naive_loss(agent, buffer, mb, args)
        if num_stack == 1:
            torch.testing.assert_close(loss, plain_loss, rtol=1e-9, atol=0)
        for name, x in plain_metrics.items():
            torch.testing.assert_close(metrics[name], x, rtol=1e-9, atol=1e-12)
    torch.randn_like = noise
    torch.set_default_dtype(torch.float32)


def stable_baselines3(flags):
    """Its PPO with its usual Atari settings, no VAE: 8 games x 128 steps, 4 epochs of 256."""
    from stable_baselines3 import PPO
    from stable_baselines3.common.env_util import make_atari_env
    from stable_baselines3.common.vec_env import SubprocVecEnv, VecFrameStack

    envs = make_atari_env("BreakoutNoFrameskip-v4", 8, seed=1, vec_env_cls=SubprocVecEnv)
    settings = {"n_steps": 128, "n_epochs": 4, "batch_size": 256, "ent_coef": 0.01}
    model = PPO("CnnPolicy", VecFrameStack(envs, 4), **settings)

    def iteration():
        start = clock()
        model.learn(1024, reset_num_timesteps=False)  # one rollout and its update
        return 1024, clock() - start, 0.0

    return iteration


CONTENDERS = {  # function, and its arguments before the flags
    "emulator alone (`AtariVectorEnv`)": (emulator,),
    "fixed": (ours, "fixed"),
    "adapt": (ours, "adapt"),
    "joint": (ours, "joint"),
    "naive joint, same networks": (naive, vae_ppo.Agent),
    "naive joint, Nature CNN and its mirror image": (naive, MirroredAgent),
    "Stable-Baselines3 PPO (no VAE)": (stable_baselines3,),
}


# ---- Measuring ----
def memory_of(pid, kind):
    """MiB of a process and its children. VmHWM: their peaks; VmRSS: now (Linux)."""
    status = Path(f"/proc/{pid}/status")
    text = status.read_text() if status.exists() else ""
    if kind not in text:
        return 0
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    own = int(text.split(f"{kind}:")[1].split()[0]) / 1024
    return own + sum(memory_of(child, kind) for child in children)


def measure(contender, flags):
    """Steps/s, seconds of rollout and update, peak MiB of this process and of the GPU."""
    function, *inputs = CONTENDERS[contender]
    iteration = function(*inputs, flags)
    iteration()  # warms up
    steps, rollout, update = iteration()
    gpu = torch.cuda.max_memory_allocated() / 2**20 if torch.cuda.is_available() else 0
    return steps / (rollout + update), rollout, update, memory_of(os.getpid(), "VmHWM"), gpu


def print_table(jobs, repetitions):
    """Measure jobs {label: (contender, flags)} in turn, and print a row for each."""
    seen = {label: [] for label in jobs}
    for _ in range(repetitions):
        for label, job in jobs.items():
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
                seen[label].append(process.submit(measure, *job).result())
    print("\n| | steps/s | lowest - highest | rollout s | update s | peak MiB | GPU MiB |")
    print("|---|---|---|---|---|---|---|")
    for label, answers in seen.items():
        speed, rollout, update, memory, gpu = np.median(answers, axis=0)
        lowest, highest = min(answers)[0], max(answers)[0]
        print(f"| {label} | {speed:.0f} | {lowest:.0f} - {highest:.0f} | {rollout:.2f} ", end="")
        print(f"| {update:.2f} | {memory:.0f} | {gpu:.0f} |", flush=True)


def speed(own):
    check_same_loss()
    names = [n for n in CONTENDERS if not own.only or any(part in n for part in own.only)]
    print_table({name: (name, own.flags) for name in names}, own.repetitions)


def scaling(own):
    """joint with more games, stacked frames, latents; 32 steps, so that 256 games take seconds."""
    for flag, sizes in SIZES.items():
        flags = f"--num-steps 32 --segment-length 16 {own.flags} --{flag}"
        print_table({f"`--{flag} {n}`": ("joint", f"{flags} {n}") for n in sizes}, own.repetitions)


def memory(own):
    """Resident memory of the script while it runs, the KL ending every update (Linux)."""
    with tempfile.TemporaryDirectory() as folder:
        flags = f"--mode joint {SMALL} --target-kl 1e-12 --total-timesteps {16 * own.iterations}"
        flags += f" --runs-dir {folder} --run-name memory {own.flags}"
        process = subprocess.Popen([sys.executable, vae_ppo.__file__, *flags.split()], stdout=2)
        samples = []
        while process.poll() is None:
            time.sleep(1)
            metrics = Path(folder, "memory/metrics.csv")
            mib = memory_of(process.pid, "VmRSS")
            if metrics.exists() and mib > 0:
                samples.append((metrics.read_text().count("\n") - 1, mib))
    print(f"\n`{flags}`\n\n| iteration | resident MiB |\n|---|---|")
    for iteration, mib in samples[:: max(1, len(samples) // 20)]:
        print(f"| {iteration} | {mib:.0f} |")
    return process.returncode


def operators(own):
    """The time of torch's operators in a rollout and in an update of adapt."""
    from torch.profiler import profile

    args, agent, optimizer, games, buffer = set_up("adapt", own.flags)
    for work, inputs in (
        (vae_ppo.rollout, (agent, games, buffer)),
        (vae_ppo.update, (agent, optimizer, buffer, args)),
    ):
        work(*inputs)  # warms up
        start = clock()
        with profile() as profiler:
            work(*inputs)
        whole = clock() - start
        print(f"\n{work.__name__}: {whole:.2f} s, of which in operators\n")
        print("| operator | s | share |\n|---|---|---|")
        events = sorted(profiler.key_averages(), key=lambda event: -event.self_cpu_time_total)
        for event in events[:12]:
            seconds = event.self_cpu_time_total / 1e6
            print(f"| `{event.key}` | {seconds:.3f} | {seconds / whole:.0%} |")


def machine():
    cpu = platform.processor()
    if os.path.exists("/proc/cpuinfo"):
        cpu = Path("/proc/cpuinfo").read_text().split("model name\t: ")[-1].split("\n")[0]
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    software = f"Python {platform.python_version()}, torch {torch.__version__}"
    return f"{os.cpu_count()} cores of {cpu}, {gpu}; {software}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = {function.__name__: function for function in (speed, scaling, memory, operators)}
    parser.add_argument("what", choices=commands)
    parser.add_argument("--repetitions", type=int, default=5, help="speed, scaling")
    parser.add_argument("--only", nargs="+", help="contenders with one of these in the name; speed")
    parser.add_argument("--iterations", type=int, default=10_000, help="memory")
    parser.add_argument("--flags", default="", help="for the script: --flags='--num-envs 8'")
    own = parser.parse_args()
    print(f"Made by `python -m experiments.benchmark {shlex.join(sys.argv[1:])}`: {machine()}.")
    return guarded(commands[own.what], own)


if __name__ == "__main__":
    sys.exit(main())
