"""What limits the speed on a CPU? An update of adapt operator by operator, a rollout of fixed part by part.

    python -m experiments.operators > experiments/operators.md

Prints Markdown: time of each operator per minibatch; the encoder's floating-point work, and the time it
would take at the speed of a large matrix product; seconds of a rollout by part, and of the parts alone; the
cost of a checkpoint. Nothing else may run meanwhile.
"""

import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

import vae_ppo
from experiments.benchmark import machine, make_args


def seconds(function, repetitions=9):
    """Median time of a call, after one to warm up."""
    times = []
    for _ in range(repetitions + 1):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def matmul_speed():
    """GFLOP/s of a 2048 x 2048 matrix product."""
    a = torch.randn(2048, 2048)
    return 2 * 2048**3 / seconds(lambda: a @ a) / 1e9


def encoder_work(agent):
    """GFLOP per frame: a forward pass, and a backward one of twice the work (less for the first layer)."""
    work, x = 0.0, torch.zeros(1, 1, 84, 84)
    for layer in [*agent.encoder, agent.mu]:
        x = layer(x)
        if hasattr(layer, "weight"):
            places = x[0, 0].numel() if x.dim() == 4 else 1
            work += 2 * layer.weight.numel() * places * (2 if layer is agent.encoder[0] else 3)
    return work / 1e9


def set_up(mode):
    args = make_args(mode, "")
    vae_ppo.start_process(args)
    envs, fire = vae_ppo.make_envs(args)
    agent = vae_ppo.Agent(int(envs.single_action_space.n), args.latent_dim, args.num_stack)
    games = vae_ppo.Games(envs, fire, vae_ppo.reseed(args, 0, 0))
    ro = vae_ppo.Rollout(agent, args.num_steps, args.num_envs, torch.device("cpu"))
    return args, agent, games, ro


def profile_update():
    args, agent, games, ro = set_up("adapt")
    optimizer = torch.optim.Adam(vae_ppo.trainable_parameters(agent, "adapt"), 1e-4, eps=1e-5, fused=True)
    vae_ppo.rollout(agent, games, ro)

    def update():
        vae_ppo.update(agent, optimizer, ro, args)

    count = args.update_epochs * args.num_minibatches
    whole = seconds(update, 5) / count * 1e3
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        update()
    events = sorted(profiler.key_averages(), key=lambda e: -e.self_cpu_time_total)
    total = sum(e.self_cpu_time_total for e in events)
    frames = args.num_envs * args.num_steps // args.num_minibatches
    frames += frames // args.segment_length * (args.num_stack - 1)
    speed, work = matmul_speed(), encoder_work(agent) * frames
    print(f"One minibatch of adapt: {frames} frames, {whole:.1f} ms without the profiler.\n")
    print("| operator | ms per minibatch | share |\n|---|---|---|")
    for event in events[:14]:
        ms = event.self_cpu_time_total / count / 1e3
        print(f"| `{event.key}` | {ms:.2f} | {event.self_cpu_time_total / total:.0%} |")
    print(
        f"\nThe encoder's {work:.2f} GFLOP at the {speed:.0f} GFLOP/s of a large matrix product take "
        f"{work / speed * 1e3:.1f} ms: {work / speed * 1e3 / whole:.0%} of the minibatch, "
        f"which runs at {work / whole * 1e3:.0f} GFLOP/s all in all."
    )


def profile_rollout():
    args, agent, games, ro = set_up("fixed")
    T, N = args.num_steps, args.num_envs
    alone = seconds(lambda: [games.step(np.random.randint(0, 4, N)) for _ in range(T)])
    with torch.no_grad():
        encode = (T + 1) * seconds(lambda: agent.encode(ro.frames[3]), 200)
    spent = dict.fromkeys(("emulator", "encoder", "policy"), 0.0)

    def timed(part, function):
        def call(*inputs):
            start = time.perf_counter()
            result = function(*inputs)
            spent[part] += time.perf_counter() - start
            return result

        return call

    games.envs.step = timed("emulator", games.envs.step)
    agent.encode, agent.policy = timed("encoder", agent.encode), timed("policy", agent.policy)
    for _ in range(3):
        vae_ppo.rollout(agent, games, ro)
    spent.update(dict.fromkeys(spent, 0.0))
    rounds = 7
    start = time.perf_counter()
    for _ in range(rounds):
        vae_ppo.rollout(agent, games, ro)
    whole = (time.perf_counter() - start) / rounds
    print(f"\nA rollout of {T} steps of {N} games: {whole:.2f} s.\n")
    print("| part | s in the rollout | s alone |\n|---|---|---|")
    rest = whole - sum(spent.values()) / rounds
    for part, own in (("emulator", f"{alone:.2f}"), ("encoder", f"{encode:.2f}"), ("policy", "")):
        print(f"| {part} | {spent[part] / rounds:.2f} | {own} |")
    print(f"| the rest: copies, stacks, drawing actions | {rest:.2f} | |")


def checkpoint_cost():
    args, agent, _, _ = set_up("joint")
    optimizer = torch.optim.Adam(vae_ppo.trainable_parameters(agent, "joint"), 1e-4, eps=1e-5, fused=True)
    vae_ppo.apply_gradient(optimizer, sum(p.sum() for p in agent.parameters()))
    with tempfile.TemporaryDirectory(dir=".") as folder:
        path = Path(folder, "checkpoint.pt")
        cost = seconds(lambda: vae_ppo.save_checkpoint(path, agent, optimizer, args, 1, 1, []))
        size = path.stat().st_size / 2**20
    print(f"\nA checkpoint of joint has {size:.0f} MiB and takes {cost:.3f} s, flushed to disk;")
    print(f"by default there is one every {args.checkpoint_every} iterations.")


if __name__ == "__main__":
    print(f"Made by `python -m experiments.operators`: {machine()}.\n")
    profile_update()
    profile_rollout()
    checkpoint_cost()
