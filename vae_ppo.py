"""Guiding Representation Learning in Deep Generative Models with Policy Gradients, in one file.

    python vae_ppo.py --mode joint --kappa 20 --cuda  # kappa * L_PPO + L_VAE (eq. 3), from scratch
    python vae_ppo.py --mode pretrain --policy runs/Breakout-joint-kappa20-seed1/checkpoint.pt  # VAE alone
    python vae_ppo.py --mode fixed --vae runs/Breakout-pretrain-seed1/checkpoint.pt  # PPO, frozen encoder
    python vae_ppo.py --mode adapt --vae runs/Breakout-pretrain-seed1/checkpoint.pt  # PPO trains the encoder

A VAE trained alone on Atari Breakout leaves out the ball, so no policy can play from its latent space. Policy
gradients sent through the encoder put the ball back. One encoder q(z|x) with shared weights reads each of the
last num_stack frames; PPO reads U, their concatenated latent means."""

import argparse
import csv
import ctypes
import io
import math
import os
import shutil
import signal
import sys
import time
import warnings
from collections import deque
from pathlib import Path

import ale_py
import gymnasium as gym
import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

# ---- Arguments ----
PPO_MODES = ("fixed", "adapt", "joint")
PPO_FLAGS = """total_timesteps num_steps num_stack anneal_lr gamma gae_lambda num_minibatches segment_length
    update_epochs norm_adv clip_coef clip_vloss ent_coef vf_coef max_grad_norm target_kl""".split()
ONLY_IN = {"vae": ("fixed", "adapt"), "kappa": ("joint",), "beta": ("pretrain", "joint")}
ONLY_IN |= dict.fromkeys(PPO_FLAGS, PPO_MODES)
ONLY_IN |= dict.fromkeys(("policy", "num_frames", "vae_epochs"), ("pretrain",))
MAY_CHANGE = "total_timesteps vae_epochs checkpoint_every cuda compile env_threads resume run_name runs_dir"


class UserError(Exception):
    """What the user can mend: `main` prints its one sentence and returns 2."""


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message} (see --help)")


def number(kind, low, high=1e10):
    """An argparse type: a number in [low, high]."""

    def number(text):
        if low <= kind(text) <= high:  # never so for NaN
            return kind(text)
        raise argparse.ArgumentTypeError(f"{text} is not between {low:g} and {high:g}")

    return number


def build_parser():
    """The command line. Each default says where it is from; "authors": their code, the paper is silent."""
    size, seed, flag = number(int, 1), number(int, 0, 2**31 - 1), argparse.BooleanOptionalAction
    fraction, weight, positive = number(float, 0, 1), number(float, 0), number(float, 1e-12)
    parser = Parser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.formatter_class = argparse.ArgumentDefaultsHelpFormatter
    # fmt: off
    add = parser.add_argument_group("run").add_argument
    add("--mode", choices=("pretrain", *PPO_MODES), required=True, help="what is trained, by which loss")
    add("--env-id", default="ALE/Breakout-v5", help="any ALE/*-v5 game: the paper's")
    add("--seed", type=seed, default=1, help="of weights, actions and games")
    add("--cuda", action=flag, help="run on the GPU; unless told, if there is one")
    add("--compile", action=flag, default=False, help="torch.compile encoder, policy and losses: LeanRL")
    add("--torch-deterministic", action=flag, default=True, help="repeatable CUDA kernels: CleanRL")
    add("--runs-dir", default="runs", help="where runs are kept")
    add("--run-name", help="folder in it; unless told, made of game, mode, kappa and seed")
    add("--resume", action="store_true", help="go on from the run's checkpoint; games start anew")
    add("--checkpoint-every", type=size, default=20, metavar="ITERATIONS", help="2 minutes on 2 cores")
    add("--vae", metavar="CHECKPOINT", help="the pretrained VAE (fixed, adapt)")
    add("--policy", metavar="CHECKPOINT", help="who plays for the frames (pretrain); unless told, chance")
    add = parser.add_argument_group("environment").add_argument
    add("--num-envs", type=size, default=16, help="games at once: authors")
    add("--repeat-action-probability", type=fraction, default=0.0, help="sticky actions: none, as the paper")
    add("--env-threads", type=number(int, 0), default=0, help="of the emulator; 0: one per core")
    add = parser.add_argument_group("VAE (pretrain, joint)").add_argument
    add("--latent-dim", type=size, default=20, help="of z: authors")
    add("--kappa", type=positive, default=20.0, help="weight of L_PPO (joint): the paper's best")
    add("--beta", type=weight, default=1.0, help="weight of the VAE's KL: the paper's bound")
    add("--num-frames", type=size, default=25_000, help="to collect (pretrain): the paper")
    add("--vae-epochs", type=size, default=20, help="passes over them (pretrain): loss nearly flat")
    add = parser.add_argument_group("PPO (fixed, adapt, joint)").add_argument
    add("--total-timesteps", type=size, default=10_000_000, help="env steps of 4 game frames: the paper")
    add("--learning-rate", type=positive, help="unless told, 1e-3, adapt 2.5e-4, pretrain 1e-4")
    add("--anneal-lr", action=flag, default=True, help="learning rate linearly to 0: authors")
    add("--num-steps", type=size, default=128, help="steps of each game per rollout: authors")
    add("--num-stack", type=size, default=4, help="frames that the policy sees: the paper's n")
    add("--num-minibatches", type=size, default=16, help="per epoch: measured, see README")
    add("--segment-length", type=size, default=32, help="a minibatch is made of runs of so many steps")
    add("--update-epochs", type=size, default=4, help="passes over a rollout: CleanRL")
    add("--gamma", type=fraction, default=0.99, help="discount: authors")
    add("--gae-lambda", type=fraction, default=0.95, help="lambda of GAE: authors")
    add("--norm-adv", action=flag, default=True, help="normalise advantages per minibatch: CleanRL")
    add("--clip-coef", type=weight, default=0.1, help="epsilon of eq. 5: authors")
    add("--clip-vloss", action=flag, default=True, help="clip the value loss, too: authors")
    add("--ent-coef", type=weight, default=0.01, help="c_H, weight of the entropy: authors")
    add("--vf-coef", type=weight, default=0.5, help="c2, weight of the value loss: authors")
    add("--max-grad-norm", type=weight, default=0.5, help="clip the gradient's norm, 0: never; authors")
    add("--target-kl", type=weight, default=0.015, help="no update past this KL, 0: no limit; authors")
    return parser


def parse_args(argv=None):
    """Read and check the command line; --resume takes the run's own settings. Raises UserError."""
    parser = build_parser()
    args = parser.parse_args(argv)
    unset = argparse.Namespace(**dict.fromkeys(vars(args), argparse.SUPPRESS))
    given = {k: v for k, v in vars(parser.parse_args(argv, unset)).items() if v != argparse.SUPPRESS}
    kappa = f"-kappa{args.kappa:g}" * (args.mode == "joint")  # without the time: other commands name it
    args.run_name = args.run_name or f"{args.env_id[4:-3]}-{args.mode}{kappa}-seed{args.seed}"
    path = Path(args.runs_dir, args.run_name, "checkpoint.pt")
    if path.parent.exists() and not args.resume:
        raise UserError(f"{path.parent} exists: go on with --resume, or choose another --run-name")
    if args.resume and not path.parent.exists():
        raise UserError(f"there is no run {path.parent} to resume: leave out --resume")
    if path.exists():  # not so in a run that was killed before its first checkpoint: it starts again
        saved = load_checkpoint(path)["args"]
        for key in saved.keys() & given.keys() - set(MAY_CHANGE.split()):
            if saved[key] != given[key]:
                raise UserError(f"{path} has {key} {saved[key]}: resume it so, not with {given[key]}")
        saved = {str(k): v if v is None or isinstance(v, bool) else str(v) for k, v in saved.items()}
        parser.set_defaults(**saved | {"run_name": args.run_name, "runs_dir": args.runs_dir})
        args = parser.parse_args(argv)
    args.learning_rate = args.learning_rate or {"pretrain": 1e-4, "adapt": 2.5e-4}.get(args.mode, 1e-3)
    batch, length = args.num_envs * args.num_steps * (args.mode in PPO_MODES), args.segment_length
    unused = [key.replace("_", "-") for key in given if args.mode not in ONLY_IN.get(key, (args.mode,))]
    for wrong, message in (
        (args.compile and not shutil.which("g++"), "--compile needs g++: install it, or leave the flag out"),
        (unused, f"--mode {args.mode} does not use --{', --'.join(unused)}: leave it out"),
        (args.mode in ONLY_IN["vae"] and not args.vae, "--mode fixed and adapt need --vae: run pretrain"),
        (args.num_steps % length, f"--segment-length {length} must divide --num-steps {args.num_steps}"),
        (batch // length % args.num_minibatches, f"--num-minibatches must divide {batch // length} segments"),
        (args.total_timesteps < batch, f"--total-timesteps must be at least one rollout, {batch} steps"),
    ):
        if wrong:
            raise UserError(message)
    return args


# ---- Environment ----
def make_envs(args):
    """ale-py's vector environment, one grey 84x84 frame a step (skip 4, max of two), and FIRE.
    `life_loss_info` ends an episode at a lost life, not the game. In a game without FIRE, it is NOOP."""
    if gym.spec(args.env_id).namespace != "ALE":
        raise UserError(f"--env-id {args.env_id} is not a game of ale-py: name one like ALE/Breakout-v5")
    rules = dict(stack_num=1, noop_max=30, use_fire_reset=True, life_loss_info=True, reward_clipping=False)
    rules["repeat_action_probability"] = args.repeat_action_probability  # make_vec's own default is 0.25
    envs = gym.make_vec(args.env_id, num_envs=args.num_envs, num_threads=args.env_threads, **rules)
    actions = envs.ale.get_action_set()
    return envs, actions.index(ale_py.Action.FIRE) if ale_py.Action.FIRE in actions else 0


class Games:
    """num_envs games, their whole-game scores, and one rule for the end of a life and the end of a game.
    The step after any `done` is a reset row: after a lost life it serves the ball (FIRE), after a game over
    the environment ignores it and returns the new game's first frame. It belongs to no episode."""

    def __init__(self, envs, fire, seeds, scores=()):
        obs, info = envs.reset(seed=seeds)
        self.envs, self.fire, self.frame = envs, fire, obs[:, 0]  # (N, 84, 84) uint8
        self.clock, self.reset_row = info["episode_frame_number"], np.zeros(envs.num_envs, dtype=bool)
        self.score, self.scores = np.zeros(envs.num_envs), deque(scores, maxlen=100)  # raw, whole games

    def step(self, action):
        """One step of each game. Returns frame (N, 84, 84) uint8, raw reward, terminated, truncated (N,)."""
        action = np.where(self.reset_row, self.fire, action)
        obs, reward, terminated, truncated, info = self.envs.step(action)
        new_game = info["episode_frame_number"] < self.clock  # unlike `lives`, right for every game
        self.scores.extend(self.score[new_game].tolist())
        self.score = np.where(new_game, 0, self.score) + reward
        self.clock, self.frame = info["episode_frame_number"], obs[:, 0]
        self.reset_row = terminated | truncated
        return self.frame, reward, terminated, truncated


def reseed(args, rank, iteration):
    """Seed torch for one iteration, so that a resumed run draws what it would have drawn.
    Returns seeds for new games (num_envs,). No other run, process or iteration has the same."""
    seeds = np.random.SeedSequence([args.seed, rank, iteration]).generate_state(args.num_envs + 1) >> 1
    torch.manual_seed(int(seeds[-1]))
    return seeds[:-1].astype(np.int64)


# ---- Model ----
def init(layer, std=2**0.5):
    nn.init.orthogonal_(layer.weight, std)
    nn.init.zeros_(layer.bias)
    return layer


class Agent(nn.Module):
    """Encoder q(z|x) and decoder p(x|z) of one frame; policy and value, which see nothing but U."""

    def __init__(self, num_actions, latent_dim, num_stack):
        super().__init__()
        self.num_stack = num_stack
        self.encoder = nn.Sequential(  # the Nature CNN, (B, 1, 84, 84) -> (B, 512)
            *(init(nn.Conv2d(1, 32, 8, stride=4)), nn.ReLU()),
            *(init(nn.Conv2d(32, 64, 4, stride=2)), nn.ReLU()),
            *(init(nn.Conv2d(64, 64, 3)), nn.ReLU(), nn.Flatten()),
            *(init(nn.Linear(64 * 7 * 7, 512)), nn.ReLU()),
        )
        self.mu, self.logvar = init(nn.Linear(512, latent_dim), 1.0), init(nn.Linear(512, latent_dim), 0.01)
        self.decoder = nn.Sequential(  # (B, latent_dim) -> logits (B, 84, 84)
            *(init(nn.Linear(latent_dim, 256)), nn.ReLU()),
            *(init(nn.Linear(256, 84 * 84), 1.0), nn.Unflatten(1, (84, 84))),
        )
        second = init(nn.Linear(64, 64)), nn.Tanh()
        self.trunk = nn.Sequential(init(nn.Linear(num_stack * latent_dim, 64)), nn.Tanh(), *second)
        self.actor, self.critic = init(nn.Linear(64, num_actions), 0.01), init(nn.Linear(64, 1), 1.0)
        self.to(memory_format=torch.channels_last)  # makes the encoder twice as fast on a CPU

    def encode(self, frames):
        """Frames (B, 84, 84) uint8 -> mu, logvar of q(z|x), each (B, latent_dim)."""
        hidden = self.encoder(frames.unsqueeze(1) / 255)
        return self.mu(hidden), self.logvar(hidden)

    def policy(self, features):
        """U (..., num_stack * latent_dim) -> log pi(.|U) (..., num_actions) and V(U) (...)."""
        hidden = self.trunk(features)
        return F.log_softmax(self.actor(hidden), dim=-1), self.critic(hidden).squeeze(-1)


def stack_index(row, first, num_stack):
    """Rows of the frames in the stack that ends at `row`, oldest first: (..., num_stack).
    The episode's `first` row is repeated while the episode is younger than the stack."""
    age = torch.arange(num_stack - 1, -1, -1, device=row.device)
    return torch.maximum(row[..., None] - age, first[..., None])


def stack_features(mu, index):
    """U: mu (B, rows, latent_dim), index (B, L, num_stack) -> (B, L, num_stack * latent_dim)."""
    return mu[torch.arange(len(mu), device=mu.device)[:, None, None], index].flatten(2)


# ---- Losses ----
def mean_over_ranks(x):
    """The mean of x over all processes; x itself where there is only one."""
    if dist.is_initialized():
        x = x / dist.get_world_size()
        try:
            dist.all_reduce(x)
        except RuntimeError:
            raise UserError("another process of this run has ended: start all again, with --resume") from None
    return x


def masked_mean(x, valid):
    """The mean of x over valid rows; over several processes, their mean is the mean of all valid rows."""
    return (x * valid).sum() / mean_over_ranks(valid.sum()).clamp(min=1)


def vae_loss(agent, mu, logvar, frames):
    """The terms of L_VAE (eq. 2), means over B frames: -E_q[log p(x|z)] and KL(q(z|x) || N(0, I)), which sum
    over pixels and over latents. mu, logvar (B, latent_dim), frames (B, 84, 84) uint8."""
    z = mu + torch.randn_like(mu) * (0.5 * logvar).exp()
    recon = F.binary_cross_entropy_with_logits(agent.decoder(z), frames / 255, reduction="sum") / len(frames)
    kl = 0.5 * (mu.square() + logvar.exp() - 1 - logvar).sum(1).mean()
    return recon, kl


def ppo_loss(log_probs, value, mb, args):
    """L_PPO = -(c1 * J_clip - c2 * L_V + c_H * H), c1 = 1 (eq. 4-7), over valid rows; and metrics.
    log_probs (..., num_actions) and value (...) are the network's now, `mb` holds the rollout's."""
    valid, action, advantages = mb["valid"], mb["actions"][..., None], mb["advantages"]
    ratio = (log_probs - mb["log_probs"]).gather(-1, action).squeeze(-1).exp()
    if args.norm_adv:
        advantages = advantages - mean_over_ranks(masked_mean(advantages, valid))
        advantages = advantages / (mean_over_ranks(masked_mean(advantages.square(), valid)).sqrt() + 1e-8)
    clipped = ratio.clamp(1 - args.clip_coef, 1 + args.clip_coef)
    j_clip = masked_mean(torch.minimum(ratio * advantages, clipped * advantages), valid)
    v_error = (value - mb["returns"]).square()
    if args.clip_vloss:
        near = mb["values"] + (value - mb["values"]).clamp(-args.clip_coef, args.clip_coef)
        v_error = torch.maximum(v_error, (near - mb["returns"]).square())
    l_v = 0.5 * masked_mean(v_error, valid)
    entropy = masked_mean(-(log_probs.exp() * log_probs).sum(-1), valid)
    kl = masked_mean((mb["log_probs"].exp() * (mb["log_probs"] - log_probs)).sum(-1), valid)  # old || new
    clipfrac = masked_mean(((ratio - 1).abs() > args.clip_coef).float(), valid)
    metrics = {"losses/policy_loss": -j_clip, "losses/value_loss": l_v, "losses/entropy": entropy}
    metrics = {**metrics, "losses/approx_kl": kl, "losses/clipfrac": clipfrac}  # torch 2.6 compiles no |
    return -(j_clip - args.vf_coef * l_v + args.ent_coef * entropy), metrics


# ---- Modes: the paper on one screen ----
def trainable_parameters(agent, mode):
    """What the optimizer owns. Nothing else decides what a mode trains."""
    encoder = [*agent.encoder.parameters(), *agent.mu.parameters()]
    vae = [*encoder, *agent.logvar.parameters(), *agent.decoder.parameters()]
    policy = [*agent.trunk.parameters(), *agent.actor.parameters(), *agent.critic.parameters()]
    return {"pretrain": vae, "fixed": policy, "adapt": encoder + policy, "joint": vae + policy}[mode]


def minibatch_loss(agent, mb, args):
    """The loss over B segments of L steps, and metrics. frames (B, C + L, 84, 84) begin C = num_stack - 1
    earlier: each is encoded once, not num_stack times. `taps` are zeros, for the losses' gradients at U."""
    if args.mode == "fixed":
        mu = mb["mu"]  # kept from the rollout: the encoder stands still
    else:
        B, encoded = len(mb["frames"]), agent.encode(mb["frames"].flatten(0, 1))
        mu, logvar = (x.unflatten(0, (B, -1)) for x in encoded)  # (B, C + L, latent_dim)
    mu_ppo, mu_vae = mu + mb["taps"]
    log_probs, value = agent.policy(stack_features(mu_ppo, mb["stack"]))
    loss, metrics = ppo_loss(log_probs, value, mb, args)
    if args.mode != "joint":
        return loss, metrics
    C = agent.num_stack - 1  # the first C frames are another segment's to decode
    recon, kl = vae_loss(agent, *(x[:, C:].flatten(0, 1) for x in (mu_vae, logvar, mb["frames"])))
    loss = args.kappa * loss + recon + args.beta * kl  # eq. 3: the gradients meet at U
    return loss, {**metrics, "vae/recon_loss": recon, "vae/kl": kl}


# ---- Rollout and GAE ----
class Rollout:
    """T steps of N games, the C = num_stack - 1 frames before them and the one frame after them.
    Row C + t of `frames` is the newest that the policy saw at step t. Stacks are indices, not copies."""

    def __init__(self, agent, T, N, device):
        self.C = C = agent.num_stack - 1
        self.frames = torch.zeros(C + T + 1, N, 84, 84, dtype=torch.uint8, device=device)
        self.mu = torch.zeros(C + T + 1, N, agent.mu.out_features, device=device)
        self.first = torch.full((T + 1, N), T + C, device=device)  # row of the episode's first frame
        self.reset_row = torch.zeros(T + 1, N, dtype=torch.bool, device=device)
        self.actions = torch.zeros(T, N, dtype=torch.long, device=device)
        self.log_probs = torch.zeros(T, N, agent.actor.out_features, device=device)  # all: the KL is exact
        self.values = torch.zeros(T + 1, N, device=device)
        self.rewards, self.terminated, self.done = torch.zeros(3, T, N, device=device)


@torch.no_grad()
def rollout(agent, games, ro):
    """Play T steps into `ro`. The weights stand still, so only the newest frame is encoded."""
    C, (T, N) = ro.C, ro.actions.shape
    row = torch.arange(C, C + T + 1, device=ro.frames.device)[:, None].expand(-1, N)
    ro.frames[:C], ro.first[0] = ro.frames[T : T + C].clone(), ro.first[T] - T
    ro.reset_row[0], ro.frames[C] = ro.reset_row[T], torch.from_numpy(games.frame)
    ro.mu[:C] = agent.encode(ro.frames[:C].flatten(0, 1))[0].view_as(ro.mu[:C])  # with the new weights
    for t in range(T + 1):
        ro.mu[C + t] = agent.encode(ro.frames[C + t])[0]
        stack = stack_index(row[t], ro.first[t], C + 1)[:, None]  # (N, 1, num_stack)
        log_probs, ro.values[t] = agent.policy(stack_features(ro.mu.transpose(0, 1), stack).squeeze(1))
        if t == T:  # needed V alone
            break
        ro.log_probs[t], ro.actions[t] = log_probs, torch.multinomial(log_probs.exp(), 1).squeeze(1)
        frame, reward, terminated, truncated = games.step(ro.actions[t].cpu().numpy())
        ro.frames[C + t + 1] = torch.from_numpy(frame)
        ro.rewards[t] = torch.from_numpy(np.sign(reward))  # learn from the sign, report the raw score
        ro.terminated[t], ro.done[t] = torch.from_numpy(terminated), torch.from_numpy(terminated | truncated)
        ro.reset_row[t + 1] = ro.done[t] > 0
        ro.first[t + 1] = torch.where(ro.reset_row[t], row[t + 1], ro.first[t])  # what a reset row returns


def gae(rewards, values, terminated, done, gamma, gae_lambda):
    """GAE (Schulman et al. 2016): advantages, returns. All are (T, N), but values (T + 1, N). The row after a
    done holds the true last frame, whose V bootstraps a truncated episode. Every done cuts the sum."""
    advantages, last = torch.zeros_like(rewards), torch.zeros_like(rewards[0])
    for t in reversed(range(len(rewards))):
        delta = rewards[t] + gamma * values[t + 1] * (1 - terminated[t]) - values[t]
        advantages[t] = last = delta + gamma * gae_lambda * (1 - done[t]) * last
    return advantages, advantages + values[:-1]


# ---- Update ----
def minibatches(ro, advantages, returns, args):
    """One epoch: each segment of L steps of one game once, in random order, as (B, L, ...) tensors."""
    C, L, (T, N), device = ro.C, args.segment_length, ro.actions.shape, ro.frames.device
    for segment in torch.randperm(T // L * N, device=device).chunk(args.num_minibatches):
        t0, env = segment[:, None] // N * L, segment[:, None] % N  # (B, 1)
        t, rows = t0 + torch.arange(L, device=device), t0 + torch.arange(C + L, device=device)
        mb = {"actions": ro.actions[t, env], "log_probs": ro.log_probs[t, env], "values": ro.values[t, env]}
        mb |= {"advantages": advantages[t, env], "returns": returns[t, env], "valid": ~ro.reset_row[t, env]}
        mb["stack"] = stack_index(t + C - t0, ro.first[t, env] - t0, C + 1)  # in rows of the segment
        mb["taps"] = torch.zeros(2, *rows.shape, ro.mu.shape[-1], device=device, requires_grad=True)
        yield mb | ({"mu": ro.mu[rows, env]} if args.mode == "fixed" else {"frames": ro.frames[rows, env]})


def apply_gradient(optimizer, loss, max_grad_norm=0.0):
    """One step of Adam on the gradient, averaged over processes and clipped unless max_grad_norm is 0."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    optimizer.zero_grad()
    loss.backward()
    for p in parameters:
        p.grad = mean_over_ranks(p.grad)
    norm = nn.utils.clip_grad_norm_(parameters, max_grad_norm or math.inf)
    optimizer.step()
    return {"grad/norm": norm}


def mean_metrics(seen):
    return {k: torch.stack([m[k].detach() for m in seen]).mean().item() for k in seen[0]} if seen else {}


def update(agent, optimizer, ro, args, minibatch_loss=minibatch_loss):
    """Epochs of minibatches, until KL(old || new) passes the target. Returns metrics."""
    advantages, returns = gae(ro.rewards, ro.values, ro.terminated, ro.done, args.gamma, args.gae_lambda)
    seen = []
    for mb in (mb for _ in range(args.update_epochs) for mb in minibatches(ro, advantages, returns, args)):
        loss, metrics = minibatch_loss(agent, mb, args)
        approx_kl = mean_over_ranks(metrics["losses/approx_kl"].detach()).item()  # waits for the device
        if stopped := 0 < args.target_kl < approx_kl:
            break
        metrics |= apply_gradient(optimizer, loss, args.max_grad_norm)
        if args.mode == "joint":
            ppo_at_u, metrics["grad/vae_at_U"] = mb["taps"].grad.flatten(1).norm(dim=1)
            metrics["grad/ppo_at_U"] = ppo_at_u / args.kappa
        seen.append(metrics)
    valid, error = ~ro.reset_row[:-1], returns - ro.values[:-1]
    explained = 1 - error[valid].var() / returns[valid].var().clamp(min=1e-8)
    metrics = {"losses/updates": len(seen), "losses/kl_stop": int(stopped), "losses/approx_kl": approx_kl}
    return mean_metrics(seen) | metrics | {"losses/explained_variance": explained.item()}


# ---- Pretraining ----
def collect_frames(args, games, device):
    """Frames (num_frames, 84, 84) uint8 of games played by --policy or, without it, by chance."""
    saved = load_checkpoint(args.policy, "--policy", PPO_MODES, args.env_id) if args.policy else {}
    player = Agent(int(games.envs.single_action_space.n), *saved.get("sizes", (args.latent_dim, 1)))
    nn.init.zeros_(player.actor.weight)  # equal logits: every action equally likely
    load_state(player, saved.get("weights", player.state_dict()), f"--policy {args.policy}")
    ro = Rollout(player, math.ceil(args.num_frames / args.num_envs), args.num_envs, device)
    rollout(player.to(device), games, ro)
    return ro.frames[ro.C : -1].flatten(0, 1)[: args.num_frames]


def pretrain_epoch(agent, optimizer, frames, args):
    """One pass over the frames with L_VAE alone (eq. 2). Returns metrics."""
    seen = []
    for batch in torch.randperm(len(frames), device=frames.device).split(128):  # authors
        recon, kl = vae_loss(agent, *agent.encode(frames[batch]), frames[batch])
        norm = apply_gradient(optimizer, recon + args.beta * kl)
        seen.append({"vae/recon_loss": recon, "vae/kl": kl} | norm)
    return mean_metrics(seen)


# ---- Checkpoint and log ----
COLUMNS = """global_step charts/episodic_return charts/SPS charts/learning_rate losses/policy_loss
    losses/value_loss losses/entropy losses/approx_kl losses/clipfrac losses/explained_variance losses/updates
    losses/kl_stop vae/recon_loss vae/kl grad/norm grad/ppo_at_U grad/vae_at_U""".split()


def load_checkpoint(path, flag="the checkpoint", modes=None, env_id=None):
    """Read a checkpoint, executing nothing. Raises UserError if damaged, or of another mode or game."""
    try:
        with warnings.catch_warnings(action="ignore"):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        mode, game = checkpoint["args"]["mode"], checkpoint["args"]["env_id"]
        assert "optimizer" in checkpoint and sum(checkpoint["scores"], 0.0) > -math.inf
        assert type(checkpoint["iteration"]) is type(checkpoint["global_step"]) is int
        inputs, latent_dim = (checkpoint["weights"][k].shape[-1] for k in ("trunk.0.weight", "mu.bias"))
        checkpoint["sizes"] = latent_dim, inputs // latent_dim  # latent_dim, num_stack
    except OSError as error:
        raise UserError(f"{flag} {path}: {error.strerror}") from None
    except Exception:  # torch raises whatever a damaged file makes it stumble over
        raise UserError(f"{flag} {path} is damaged or not made by vae_ppo.py: name another") from None
    if modes and (mode not in modes or game != env_id):
        raise UserError(f"{flag} {path} is of --mode {mode}, {game}: give {' or '.join(modes)}, {env_id}")
    return checkpoint


def load_state(target, state, name):
    """`target.load_state_dict(state)` for networks and optimizers. Raises UserError if it does not fit."""
    try:
        target.load_state_dict(state)
    except (RuntimeError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{name} does not fit these flags: {str(error).splitlines()[-1].strip()}") from None


def load_vae(agent, args):
    """Take encoder and decoder, and nothing else, from the checkpoint that --vae names."""
    weights = load_checkpoint(args.vae, "--vae", ("pretrain",), args.env_id)["weights"]
    own = {k: v for k, v in agent.state_dict().items() if k.startswith(("trunk", "actor", "critic"))}
    load_state(agent, weights | own, f"--vae {args.vae}")


def save_checkpoint(path, agent, optimizer, args, iteration, global_step, scores):
    """Replace the checkpoint as a whole or not at all. Random generators need no place in it (`reseed`)."""
    state = {"weights": agent.state_dict(), "optimizer": optimizer.state_dict(), "args": vars(args)}
    buffer, temporary = io.BytesIO(), path.with_suffix(".tmp")
    torch.save(state | {"iteration": iteration, "global_step": global_step, "scores": list(scores)}, buffer)
    try:
        with temporary.open("wb") as file:
            file.write(buffer.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


SYMPTOMS = {  # a value below which a run ails, and what to try
    "losses/entropy": (0.01, "the policy no longer explores: raise --ent-coef"),
    "losses/updates": (2, "the KL stop comes at once: lower --learning-rate or raise --target-kl"),
    "vae/kl": (0.01, "the latents carry nothing: lower --beta"),
}


class Log:
    """metrics.csv, TensorBoard and the progress bar. A resumed run drops the rows after its checkpoint."""

    def __init__(self, folder, global_step, total):
        path, temporary = folder / "metrics.csv", folder / "metrics.tmp"
        rows = list(csv.reader(path.read_text().splitlines()))[1:] if path.exists() else []
        with temporary.open("w", newline="") as file:
            kept = [row for row in rows if len(row) == len(COLUMNS) and int(row[0]) <= global_step]
            csv.writer(file).writerows([COLUMNS, *kept])
        temporary.replace(path)
        self.file = path.open("a", newline="", buffering=1)  # a row at a time
        self.tensorboard = SummaryWriter(folder, purge_step=global_step + 1)
        self.ailing = dict.fromkeys(SYMPTOMS, 0)  # iterations in a row
        self.bar = tqdm(total=total, initial=global_step, unit="step", unit_scale=True, dynamic_ncols=True)

    def write(self, metrics):
        csv.writer(self.file).writerow([metrics.get(column, "") for column in COLUMNS])
        for column, value in metrics.items():
            self.tensorboard.add_scalar(column, value, metrics["global_step"])
        self.bar.set_postfix(score=metrics.get("charts/episodic_return", math.nan), refresh=False)
        self.bar.update(metrics["global_step"] - self.bar.n)
        for column, (low, advice) in SYMPTOMS.items():
            n = self.ailing[column]
            self.ailing[column] = n + 1 if metrics.get(column, low) < low else n * (n >= 10)
            if n == 9 < self.ailing[column]:  # said once
                self.bar.write(f"warning: {column} below {low} in ten iterations: {advice}", file=sys.stderr)


# ---- Train ----
NEXT = dict.fromkeys(("fixed", "adapt"), "tensorboard --logdir {runs_dir}")
NEXT |= {"joint": "python vae_ppo.py --mode pretrain --env-id {env_id} --policy {path}"}
NEXT |= {"pretrain": "python vae_ppo.py --mode adapt --env-id {env_id} --vae {path}"}


def start_process(args):
    """Choose the device and, under torchrun, join the other processes. Returns device, rank, world size."""
    if sys.platform == "linux":  # keep freed memory: fewer page faults, an update 15 % faster on 2 cores
        for option, size in ((-1, 2**30), (-3, 2**25)):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
            ctypes.CDLL(None).mallopt(option, size)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if args.cuda and not torch.cuda.is_available():
        print("warning: torch finds no GPU here, so this runs on the CPU", file=sys.stderr)
    use_cuda = torch.cuda.is_available() and args.cuda is not False
    if use_cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(args.torch_deterministic)
        torch.set_float32_matmul_precision("high")  # TF32, as cuDNN's convolutions
    if world > 1:
        dist.init_process_group("nccl" if use_cuda else "gloo")
    return torch.device("cuda" if use_cuda else "cpu"), rank, world


def train(args):
    """Run one mode from its start, or from its checkpoint, to its end. Returns the exit code."""
    path = Path(args.runs_dir, args.run_name, "checkpoint.pt")
    saved = load_checkpoint(path) if path.exists() else {}
    device, rank, world = start_process(args)
    envs, fire = make_envs(args)
    torch.manual_seed(args.seed)
    agent = Agent(int(envs.single_action_space.n), args.latent_dim, args.num_stack).to(device)
    if args.vae and not saved:
        load_vae(agent, args)
    fast = torch.compile if args.compile else lambda function: function
    agent.encode, agent.policy, loss_fn = map(fast, (agent.encode, agent.policy, minibatch_loss))
    parameters = trainable_parameters(agent, args.mode)
    optimizer = torch.optim.Adam(parameters, args.learning_rate, eps=1e-5, fused=True)
    start, global_step = saved.get("iteration", 0), saved.get("global_step", 0)
    if saved:
        load_state(agent, saved["weights"], path)
        load_state(optimizer, saved["optimizer"], path)
    if args.mode == "pretrain":  # resumed, it collects the same frames again
        games = Games(envs, fire, reseed(args, rank, 0))
        frames, batch, num_iterations = collect_frames(args, games, device), args.num_frames, args.vae_epochs
    else:
        games = Games(envs, fire, reseed(args, rank, start), saved.get("scores", ()))
        ro = Rollout(agent, args.num_steps, args.num_envs, device)
        batch = args.num_envs * args.num_steps
        num_iterations = args.total_timesteps // (batch * world)
    batch *= world
    if rank == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        total, unit = num_iterations * batch, "frames" if args.mode == "pretrain" else "steps of 4 frames"
        rule = f"sticky actions {args.repeat_action_probability:g}, a lost life ends the episode"
        print(f"{args.mode} on {args.env_id} | {device} x {world} | {rule} | {total:,} {unit}", flush=True)
        log = Log(path.parent, global_step, total)
    stop, clock = [], time.perf_counter()
    for number in (signal.SIGINT, signal.SIGTERM):  # finish the iteration, save, end
        signal.signal(number, lambda number, _: stop.append(number))

    for iteration in range(start + 1, num_iterations + 1):
        reseed(args, rank, iteration)
        if args.mode == "pretrain":
            metrics = pretrain_epoch(agent, optimizer, frames, args)
        else:
            if args.anneal_lr:
                optimizer.param_groups[0]["lr"] = (1 - (iteration - 1) / num_iterations) * args.learning_rate
            rollout(agent, games, ro)
            metrics = update(agent, optimizer, ro, args, loss_fn)
        if not all(map(math.isfinite, metrics.values())):
            raise UserError(f"iteration {iteration}: loss or gradient is not finite; none of it is saved")
        global_step, before, clock = global_step + batch, clock, time.perf_counter()
        metrics |= {"global_step": global_step, "charts/SPS": round(batch / (clock - before))}
        metrics["charts/learning_rate"] = optimizer.param_groups[0]["lr"]
        metrics |= {"charts/episodic_return": sum(games.scores) / len(games.scores)} if games.scores else {}
        stopping = mean_over_ranks(torch.tensor(float(len(stop)), device=device)).item() > 0
        if rank == 0:
            log.write(metrics)
            if stopping or iteration % args.checkpoint_every == 0 or iteration == num_iterations:
                save_checkpoint(path, agent, optimizer, args, iteration, global_step, games.scores)
        if stopping:
            break
    if rank == 0:
        for part in (log.bar, log.file, log.tensorboard):
            part.close()
        following = "the same with --resume" if stop else NEXT[args.mode].format(path=path, **vars(args))
        print(f"saved {path} and metrics.csv; next: {following}")
    return 128 + stop[0] if stop else 0


def main(argv=None):
    """Parse, train, and say in one sentence what the user can mend. Returns the exit code."""
    try:
        return train(parse_args(argv))
    except (UserError, gym.error.Error, ImportError) as error:
        message = str(error)
    except OSError as error:
        message = f"{error.filename or 'the run folder'}: {error.strerror}"
    except RuntimeError as error:
        if "memory" not in str(error):
            raise
        message = "out of memory: choose smaller sizes, for instance --num-envs"
    except KeyboardInterrupt:
        return 130
    print(f"vae_ppo.py: error: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
