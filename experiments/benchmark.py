"""Steps per second of everything that plays Breakout here, measured in turn in one run.

    pip install stable-baselines3==2.9.2
    python -m experiments.benchmark --repetitions 5 > experiments/benchmark.md

Each contender lives in a process of its own and waits for its turn, so a drift of the machine's speed meets
all of them. A repetition is one iteration: a rollout and all its updates, without the KL stop. Prints a
Markdown table: median steps/s, its ratio to the emulator alone, seconds of rollout and update, peak memory.
Nothing else may run meanwhile.
"""

import argparse
import math
import multiprocessing
import os
import platform
import statistics
import sys
import time

import numpy as np
import torch

import vae_ppo
from experiments.decoders import agent_with, mirrored

FLAGS = "--target-kl 0 --run-name unused --total-timesteps 1000000"


def make_args(mode, more=""):
    vae = " --vae unused" if mode in vae_ppo.ONLY_IN["vae"] else ""
    return vae_ppo.parse_args(f"--mode {mode} {FLAGS}{vae} {more}".split())


def clock():
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def emulator(more):
    """The vector environment alone, uniformly random actions."""
    args = make_args("joint", more)
    envs, fire = vae_ppo.make_envs(args)
    games = vae_ppo.Games(envs, fire, vae_ppo.reseed(args, 0, 0))
    rng = np.random.default_rng(0)

    def repetition():
        start = clock()
        for _ in range(args.num_steps):
            games.step(rng.integers(0, envs.single_action_space.n, args.num_envs))
        return args.num_steps * args.num_envs, clock() - start, 0.0

    return repetition


def ours(mode, more, decoder=None):
    """One iteration of fixed, adapt or joint, as `vae_ppo.train` runs it."""
    args = make_args(mode, more)
    device, _, _ = vae_ppo.start_process(args)
    envs, fire = vae_ppo.make_envs(args)
    num_actions = int(envs.single_action_space.n)
    agent = agent_with(decoder, num_actions, args.latent_dim, args.num_stack).to(device)
    minibatch_loss = vae_ppo.minibatch_loss
    if args.compile:
        agent.encode, agent.policy, minibatch_loss = map(
            torch.compile, (agent.encode, agent.policy, minibatch_loss)
        )
    parameters = vae_ppo.trainable_parameters(agent, mode)
    optimizer = torch.optim.Adam(parameters, args.learning_rate, eps=1e-5, fused=True)
    games = vae_ppo.Games(envs, fire, vae_ppo.reseed(args, 0, 0))
    ro = vae_ppo.Rollout(agent, args.num_steps, args.num_envs, device)

    def repetition():
        start = clock()
        vae_ppo.rollout(agent, games, ro)
        middle = clock()
        vae_ppo.update(agent, optimizer, ro, args, minibatch_loss)
        return args.num_steps * args.num_envs, middle - start, clock() - middle

    return repetition


def naive_loss(agent, stacks, mb, args):
    """Joint's loss the plain way: encode and decode all of stacks (B, num_stack, 84, 84)."""
    mu, logvar = agent.encode(stacks.flatten(0, 1))
    log_probs, value = agent.policy(mu.unflatten(0, stacks.shape[:2]).flatten(1))
    loss, metrics = vae_ppo.ppo_loss(log_probs, value, mb, args)
    recon, kl = vae_ppo.vae_loss(agent, mu, logvar, stacks.flatten(0, 1))
    return args.kappa * loss + recon + args.beta * kl, metrics


def naive(more, decoder=None):
    """Joint as first written down: gymnasium's vector environment of stacks, random minibatches of stacks."""
    import gymnasium as gym
    from gymnasium.wrappers import AtariPreprocessing, FrameStackObservation

    args = make_args("joint", more)
    T, N, S = args.num_steps, args.num_envs, args.num_stack
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def make():
        env = gym.make(args.env_id, frameskip=1, repeat_action_probability=0.0)
        return FrameStackObservation(AtariPreprocessing(env, terminal_on_life_loss=True), S)

    envs = gym.vector.AsyncVectorEnv([make] * N)
    agent = agent_with(decoder, int(envs.single_action_space.n), args.latent_dim, S).to(device)
    parameters = vae_ppo.trainable_parameters(agent, "joint")
    optimizer = torch.optim.Adam(parameters, args.learning_rate, eps=1e-5, fused=True)
    stacks = torch.zeros(T + 1, N, S, 84, 84, dtype=torch.uint8, device=device)
    stacks[T] = torch.from_numpy(envs.reset(seed=1)[0])

    def repetition():
        start = clock()
        stacks[0] = stacks[T]
        rows = {k: [] for k in ("actions", "log_probs", "values", "rewards", "done")}
        with torch.no_grad():
            for t in range(T + 1):
                features = agent.encode(stacks[t].flatten(0, 1))[0].unflatten(0, (N, S)).flatten(1)
                log_probs, values = agent.policy(features)
                rows["values"].append(values)
                if t == T:
                    break
                actions = torch.multinomial(log_probs.exp(), 1).squeeze(1)
                obs, reward, terminated, truncated, _ = envs.step(actions.cpu().numpy())
                stacks[t + 1] = torch.from_numpy(obs)
                done = torch.from_numpy(terminated | truncated).float()
                step = (actions, log_probs, torch.from_numpy(np.sign(reward)).float(), done)
                for key, x in zip(("actions", "log_probs", "rewards", "done"), step, strict=True):
                    rows[key].append(x.to(device))
        rows = {k: torch.stack(v) for k, v in rows.items()}
        middle = clock()
        advantages, returns = vae_ppo.gae(
            rows["rewards"], rows["values"], rows["done"], rows["done"], args.gamma, args.gae_lambda
        )
        data = {"actions": rows["actions"], "log_probs": rows["log_probs"], "values": rows["values"][:T]}
        data |= {"advantages": advantages, "returns": returns, "valid": torch.ones_like(returns)}
        data, flat = {k: v.flatten(0, 1) for k, v in data.items()}, stacks[:T].flatten(0, 1)
        for _ in range(args.update_epochs):
            for index in torch.randperm(T * N, device=flat.device).chunk(args.num_minibatches):
                mb = {k: v[index] for k, v in data.items()}
                loss, _ = naive_loss(agent, flat[index], mb, args)
                vae_ppo.apply_gradient(optimizer, loss, args.max_grad_norm)
        return T * N, middle - start, clock() - middle

    return repetition


def stable_baselines3(more):
    """Stable-Baselines3's PPO with its usual Atari settings, no VAE: 8 envs x 128 steps, 4 epochs of 256."""
    from stable_baselines3 import PPO
    from stable_baselines3.common.env_util import make_atari_env
    from stable_baselines3.common.vec_env import SubprocVecEnv, VecFrameStack

    envs = make_atari_env("BreakoutNoFrameskip-v4", n_envs=8, seed=1, vec_env_cls=SubprocVecEnv)
    model = PPO("CnnPolicy", VecFrameStack(envs, 4), n_steps=128, n_epochs=4, batch_size=256, ent_coef=0.01)

    def repetition():
        start = clock()
        model.learn(1024, reset_num_timesteps=False)  # one rollout and its update
        return 1024, clock() - start, 0.0

    return repetition


CONTENDERS = {
    "emulator alone (`AtariVectorEnv`)": emulator,
    "fixed": lambda more: ours("fixed", more),
    "adapt": lambda more: ours("adapt", more),
    "joint": lambda more: ours("joint", more),
    "naive joint, same networks": naive,
    "naive joint, mirrored decoder": lambda more: naive(more, mirrored),
    "Stable-Baselines3 PPO (no VAE)": stable_baselines3,
}


def check_same_loss():
    """The naive loss of a batch equals the script's, where both are told the same noise: none."""
    args = make_args("joint", "--num-envs 4 --num-steps 32 --num-minibatches 1")
    agent = agent_with(None)
    envs, fire = vae_ppo.make_envs(args)
    ro = vae_ppo.Rollout(agent, args.num_steps, args.num_envs, torch.device("cpu"))
    vae_ppo.rollout(agent, vae_ppo.Games(envs, fire, vae_ppo.reseed(args, 0, 0)), ro)
    envs.close()
    advantages, returns = vae_ppo.gae(
        ro.rewards, ro.values, ro.terminated, ro.done, args.gamma, args.gae_lambda
    )
    mb = next(vae_ppo.minibatches(ro, advantages, returns, args))
    segments = torch.arange(len(mb["frames"]))[:, None, None]
    stacks = mb["frames"][segments, mb["stack"]].flatten(0, 1)
    flat = {k: v.flatten(0, 1) for k, v in mb.items()}
    noise, torch.randn_like = torch.randn_like, torch.zeros_like
    try:
        ours_ppo = vae_ppo.minibatch_loss(agent, mb, args)[1]
        ours_newest = ours_ppo["vae/recon_loss"] + ours_ppo["vae/kl"]
        naive_ppo = naive_loss(agent, stacks, flat, args)[1]
        naive_newest = sum(vae_ppo.vae_loss(agent, *agent.encode(stacks[:, -1]), stacks[:, -1]))
    finally:
        torch.randn_like = noise
    for key in naive_ppo:
        torch.testing.assert_close(ours_ppo[key], naive_ppo[key], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours_newest, naive_newest, rtol=1e-4, atol=1e-3)


def peak_memory(pid):
    """Peak resident memory of a process and of its children, MiB (Linux; nan elsewhere)."""
    try:
        status = open(f"/proc/{pid}/status").read()
        children = open(f"/proc/{pid}/task/{pid}/children").read().split()
    except OSError:
        return math.nan
    return int(status.split("VmHWM:")[1].split()[0]) / 1024 + sum(map(peak_memory, children))


def serve(name, more, pipe):
    """A contender's process: one repetition per message. Answers steps, two times, two peak memories."""
    try:
        repetition = CONTENDERS[name](more)
    except (ImportError, vae_ppo.UserError) as error:
        pipe.send(str(error))
        return
    pipe.send(None)
    while pipe.recv():
        steps, rollout, update = repetition()
        gpu = torch.cuda.max_memory_allocated() / 2**20 if torch.cuda.is_available() else 0
        pipe.send((steps, rollout, update, peak_memory(os.getpid()), gpu))


def machine():
    model = platform.processor() or "unknown processor"
    if os.path.exists("/proc/cpuinfo"):
        lines = open("/proc/cpuinfo").read().splitlines()
        model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), model)
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ", no GPU"
    software = f"Python {platform.python_version()}, torch {torch.__version__}"
    return f"{os.cpu_count()} cores of {model}{gpu}; {software}"


def measure(jobs, repetitions):
    """Run jobs {label: (contender, flags)} in turn. Returns {label: [answer of `serve`, ...]}."""
    spawn, workers = multiprocessing.get_context("spawn"), {}
    for label, (name, flags) in jobs.items():
        pipe, theirs = spawn.Pipe()
        process = spawn.Process(target=serve, args=(name, flags, theirs))
        process.start()
        failed = pipe.recv()
        if failed:
            print(f"{label}: not run, {failed}", file=sys.stderr)
        else:
            workers[label] = (process, pipe)
    seen = {label: [] for label in workers}
    for repetition in range(repetitions + 1):  # the first warms up
        for label, (_, pipe) in workers.items():
            pipe.send(True)
            answer = pipe.recv()
            print(f"{repetition} {label}: {answer[0] / (answer[1] + answer[2]):.0f} steps/s", file=sys.stderr)
            if repetition:
                seen[label].append(answer)
    for process, pipe in workers.values():
        pipe.send(False)
        process.join()
    return seen


def print_table(seen):
    print(
        "| | steps/s, median | lowest - highest | / first row | rollout s | update s | peak MiB | GPU MiB |"
    )
    print("|---|---|---|---|---|---|---|---|")
    base = None
    for name, rows in seen.items():
        speeds = sorted(r[0] / (r[1] + r[2]) for r in rows)
        median = statistics.median(speeds)
        base = base or median
        rollout, update = (statistics.median(r[i] for r in rows) for i in (1, 2))
        memory, gpu = (max(r[i] for r in rows) for i in (3, 4))
        print(
            f"| {name} | {median:.0f} | {speeds[0]:.0f} - {speeds[-1]:.0f} | {median / base:.2f} "
            f"| {rollout:.2f} | {update:.2f} | {memory:.0f} | {gpu:.0f} |"
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--only", nargs="*", help="contenders whose name contains one of these")
    parser.add_argument("--flags", default="", help="flags for the script, as one string: '--num-envs 8'")
    args = parser.parse_args()
    check_same_loss()
    names = [name for name in CONTENDERS if not args.only or any(part in name for part in args.only)]
    seen = measure({name: (name, args.flags) for name in names}, args.repetitions)
    command = f"python -m experiments.benchmark --repetitions {args.repetitions}"
    command += f" --only {' '.join(args.only or [])}" * bool(args.only)
    command += f" --flags '{args.flags}'" * bool(args.flags)
    print(f"Made by `{command}`: {machine()}.\n")
    print_table(seen)


if __name__ == "__main__":
    main()
