"""Guiding Representation Learning in Deep Generative Models with Policy Gradients, in one file.

    python vae_ppo.py --mode joint --kappa 20 --cuda
    python vae_ppo.py --mode pretrain --policy runs/Breakout-joint-kappa20-seed1/checkpoint.pt
    python vae_ppo.py --mode fixed --vae runs/Breakout-pretrain-seed1/checkpoint.pt
    python vae_ppo.py --mode adapt --vae runs/Breakout-pretrain-seed1/checkpoint.pt

A VAE trained alone on Atari Breakout leaves out the ball, so no policy can play from its latent
space. Policy gradients sent through the encoder put the ball back.

    x           a frame: 84x84, grey, uint8
    mu, logvar  mean and log-variance of q(z|x), the encoder's answer to one frame
    z           a sample of q(z|x), from which the decoder makes p(x|z)
    U           mu of the last num_stack frames, concatenated: all that the policy sees
    T, N        steps of a rollout, games played at once
    L, B        steps of a segment (a piece of one game), segments of a minibatch
    C           num_stack - 1: the frames that a first step needs from before it
    L_VAE       the loss of the VAE, eq. 2
    L_PPO       the loss of the policy, eq. 5
    kappa       weight of L_PPO against L_VAE
"""

import argparse
import csv
import fcntl
import io
import math
import os
import shutil
import signal
import sys
import time
from collections import deque
from contextlib import contextmanager
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "20000")  # torch's idle threads soon sleep

import ale_py
import gymnasium as gym
import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.distributions import Categorical
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

# ---- Arguments ----
FLAGS = {  # by mode: name, default, what it is ("authors": as in their code)
    "pretrain, fixed, adapt, joint": [
        ("env_id", "ALE/Breakout-v5", "any ALE/*-v5 game (paper)"),
        ("seed", 1, "of weights, actions and games"),
        ("cuda", True, "run on the GPU, if there is one"),
        ("compile", False, "torch.compile the networks (needs g++)"),
        ("torch_deterministic", True, "CUDA kernels that repeat"),
        ("runs_dir", "runs", "where runs are kept"),
        ("run_name", "", "folder in it; default: of game, mode, kappa and seed"),
        ("resume", False, "go on from the checkpoint, with new games"),
        ("checkpoint_every", 20, "iterations"),
        ("track", False, "log to Weights & Biases, too"),
        ("learning_rate", 0.0, "of Adam; 0: that of the mode, see MODES"),
        ("num_envs", 16, "N, games at once (authors)"),
        ("repeat_action_probability", 0.0, "sticky actions (paper)"),
        ("env_threads", 0, "of the emulator; 0: one per core"),
        ("latent_dim", 20, "numbers in z (authors)"),
    ],
    "pretrain": [
        ("policy", "", "checkpoint of who plays; else uniformly random"),
        ("num_frames", 25_000, "to play (paper)"),
        ("vae_epochs", 20, "passes over these frames"),
    ],
    "pretrain, joint": [("beta", 1.0, "weight of the KL in L_VAE (paper)")],
    "joint": [("kappa", 20.0, "weight of L_PPO (paper's best)")],
    "fixed, adapt": [("vae", "", "checkpoint of a pretrain run")],
    "fixed, adapt, joint": [
        ("total_timesteps", 10_000_000, "of 4 game frames each (paper)"),
        ("anneal_lr", True, "learning rate linearly to 0 (authors)"),
        ("num_steps", 128, "T, steps of a rollout (authors)"),
        ("num_stack", 4, "frames that the policy sees (paper)"),
        ("num_minibatches", 16, "of an epoch"),
        ("segment_length", 8, "L, steps in a row in a minibatch"),
        ("update_epochs", 4, "passes over a rollout (CleanRL)"),
        ("gamma", 0.99, "discount (authors)"),
        ("gae_lambda", 0.95, "lambda of GAE (authors)"),
        ("norm_adv", True, "normalise advantages in a minibatch (CleanRL)"),
        ("clip_coef", 0.1, "epsilon of J_clip (authors)"),
        ("clip_vloss", True, "clip the value loss, too (authors)"),
        ("ent_coef", 0.01, "c_H, weight of the entropy (authors)"),
        ("vf_coef", 0.5, "c2, weight of the value loss (authors)"),
        ("max_grad_norm", 0.5, "clip the gradient to it; 0: never (authors)"),
        ("target_kl", 0.015, "KL that ends an update; 0: none does (authors)"),
    ],
}
MAY_CHANGE = """resume runs_dir run_name cuda compile env_threads checkpoint_every track
    total_timesteps vae_epochs""".split()  # on resuming


class UserError(Exception):
    """What the user can mend: `main` prints its one sentence and returns 2."""


def parse_args(argv=None):
    """The checked command line. What is wrong ends the program with exit code 2."""
    parser = argparse.ArgumentParser(allow_abbrev=False, usage=argparse.SUPPRESS)
    parser.formatter_class = argparse.ArgumentDefaultsHelpFormatter
    parser.add_argument("--mode", choices=MODES, required=True, help="what learns")
    for modes, flags in FLAGS.items():
        group = parser.add_argument_group(modes)
        for name, default, text in flags:
            how = {"type": type(default)}
            if isinstance(default, bool):
                how = {"action": argparse.BooleanOptionalAction}
            group.add_argument("--" + name.replace("_", "-"), default=default, help=text, **how)
    args = parser.parse_args(argv)
    for modes, flags in FLAGS.items():
        for name, default, _ in flags:
            value = getattr(args, name)
            if args.mode not in modes.split(", ") and value != default:
                parser.error(f"--mode {args.mode} does not use {name}")
            low = 1 if type(value) is int and name not in ("seed", "env_threads") else 0
            high = 1 if name in ("gamma", "gae_lambda", "repeat_action_probability") else 1e9
            if type(value) in (int, float) and not low <= value <= high:
                parser.error(f"{name} must be a number from {low} to {high:g}, not {value}")
    if args.mode in ("fixed", "adapt") and not args.vae:
        parser.error(f"--mode {args.mode} needs --vae, a checkpoint of --mode pretrain")
    segments = args.num_steps // args.segment_length * args.num_envs
    if args.num_steps % args.segment_length or segments % args.num_minibatches:
        parser.error("segment_length must divide num_steps, num_minibatches the segments")
    if args.kappa < 1e-6:
        parser.error("kappa must be at least 1e-6, which leaves the VAE to itself")
    if args.compile and not shutil.which(os.environ.get("CXX", "g++")):
        parser.error("--compile needs a C++ compiler: install g++, or leave out --compile")
    _, learning_rate = MODES[args.mode]
    args.learning_rate = args.learning_rate or learning_rate
    args.world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if not args.run_name:
        game = args.env_id.split("/")[-1].removesuffix("-v5")
        kappa = f"-kappa{args.kappa:g}" if args.mode == "joint" else ""
        args.run_name = f"{game}-{args.mode}{kappa}-seed{args.seed}"
    folder = Path(args.runs_dir, args.run_name)
    if folder.name != args.run_name or args.run_name == "..":
        parser.error(f"--run-name must name a folder, not {args.run_name}")
    if folder.exists() != args.resume:
        how = "does not exist: leave out" if args.resume else "exists: add"
        parser.error(f"{folder} {how} --resume, or choose another --run-name")
    return args


# ---- Model ----
def layer_init(layer, std=2**0.5):
    nn.init.orthogonal_(layer.weight, std)
    nn.init.zeros_(layer.bias)
    return layer


class Agent(nn.Module):
    """The VAE of one frame, and the policy, which sees nothing but U."""

    def __init__(self, num_actions, latent_dim, num_stack):
        super().__init__()
        self.num_stack = num_stack
        self.encoder = nn.Sequential(  # that of A3C (Mnih et al. 2016), one channel
            layer_init(nn.Conv2d(1, 16, 8, stride=4)),
            nn.ReLU(),
            layer_init(nn.Conv2d(16, 32, 4, stride=2)),
            nn.ReLU(),
            nn.Flatten(),
            layer_init(nn.Linear(32 * 9 * 9, 256)),
            nn.ReLU(),
        )
        self.mu = layer_init(nn.Linear(256, latent_dim), std=1.0)
        self.logvar = layer_init(nn.Linear(256, latent_dim), std=0.01)
        self.decoder = nn.Sequential(  # z (..., latent_dim) -> logits of p(x|z)
            layer_init(nn.Linear(latent_dim, 256)),
            nn.ReLU(),
            layer_init(nn.Linear(256, 84 * 84), std=1.0),
            nn.Unflatten(-1, (84, 84)),
        )
        self.trunk = nn.Sequential(
            layer_init(nn.Linear(num_stack * latent_dim, 64)),
            nn.Tanh(),
            layer_init(nn.Linear(64, 64)),
            nn.Tanh(),
        )
        self.actor = layer_init(nn.Linear(64, num_actions), std=0.01)
        self.critic = layer_init(nn.Linear(64, 1), std=1.0)
        self.to(memory_format=torch.channels_last)  # twice as fast on a CPU

    def encode(self, frames):
        """q(z|x): frames (..., 84, 84) uint8 -> mu, logvar, each (..., latent_dim)."""
        hidden = self.encoder(frames.reshape(-1, 1, 84, 84) / 255)
        hidden = hidden.unflatten(0, frames.shape[:-2])
        return self.mu(hidden), self.logvar(hidden)

    def policy(self, features):
        """U (..., num_stack * latent_dim) -> logits of pi (..., num_actions), V (...)."""
        hidden = self.trunk(features)
        return self.actor(hidden), self.critic(hidden).squeeze(-1)


def stack_features(mu, stack):
    """U (..., N, num_stack * latent_dim): mu (rows, N, latent_dim) at the rows `stack`."""
    game = torch.arange(mu.shape[1], device=mu.device)[:, None]
    return mu[stack, game].flatten(-2)


# ---- Losses ----
def vae_loss(decoder, mu, logvar, frames, beta):
    """L_VAE and metrics: sums over pixels and latents, means over frames (..., 84, 84)."""
    z = mu + (0.5 * logvar).exp() * torch.randn_like(mu)
    logits = decoder(z)
    nats = F.binary_cross_entropy_with_logits(logits, frames / 255, reduction="sum")
    recon_loss = nats / frames.shape[:-2].numel()  # -E_q[log p(x|z)]
    kl = 0.5 * (mu.square() + logvar.exp() - 1 - logvar).sum(-1).mean()  # KL(q || N(0, I))
    l_vae = recon_loss + beta * kl  # eq. 2, negated: a loss
    return l_vae, {"vae/recon_loss": recon_loss.detach(), "vae/kl": kl.detach()}


def masked_mean(x, valid):
    """The mean of x over the steps that belong to an episode."""
    return (x * valid).sum() / valid.sum().clamp(min=1)


def masked_var(x, valid):
    return masked_mean((x - masked_mean(x, valid)).square(), valid)


def ppo_loss(logits, value, mb, args):
    """L_PPO and metrics, of logits (..., num_actions) and value (...) now, and of those of
    the rollout in `mb`."""
    pi = Categorical(logits=logits)
    pi_old = Categorical(logits=mb["logits"])
    valid = mb["valid"]
    advantages = mb["advantages"]
    if args.norm_adv:
        deviation = masked_var(advantages, valid).sqrt()
        advantages = (advantages - masked_mean(advantages, valid)) / (deviation + 1e-8)
    ratio = (pi.log_prob(mb["actions"]) - pi_old.log_prob(mb["actions"])).exp()
    clipped_ratio = ratio.clamp(1 - args.clip_coef, 1 + args.clip_coef)
    gain = torch.minimum(ratio * advantages, clipped_ratio * advantages)
    j_clip = masked_mean(gain, valid)
    v_error = (value - mb["returns"]).square()
    if args.clip_vloss:
        change = (value - mb["values"]).clamp(-args.clip_coef, args.clip_coef)
        v_error = torch.maximum(v_error, (mb["values"] + change - mb["returns"]).square())
    l_v = 0.5 * masked_mean(v_error, valid)
    entropy = masked_mean(pi.entropy(), valid)
    l_ppo = -(j_clip - args.vf_coef * l_v + args.ent_coef * entropy)  # eq. 5, c1 = 1
    kl = (pi_old.probs * (pi_old.logits - pi.logits)).sum(-1)  # KL(pi_old || pi), exact
    metrics = {
        "losses/policy_loss": -j_clip,
        "losses/value_loss": l_v,
        "losses/entropy": entropy,
        "losses/approx_kl": masked_mean(kl, valid),
        "losses/clipfrac": masked_mean((ratio - 1).abs() > args.clip_coef, valid),
    }
    return l_ppo, {name: x.detach() for name, x in metrics.items()}


# ---- Modes: the paper on one screen ----
POLICY = ("trunk", "actor", "critic")
VAE = ("encoder", "mu", "logvar", "decoder")
MODES = {  # networks that Adam trains, and its default learning rate
    "pretrain": (VAE, 1e-4),  # L_VAE
    "fixed": (POLICY, 1e-3),  # L_PPO; the encoder is that of a pretrained VAE
    "adapt": (POLICY + ("encoder", "mu"), 5e-4),  # L_PPO; trains that encoder on
    "joint": (POLICY + VAE, 1e-3),  # kappa * L_PPO + L_VAE, from scratch
}


def minibatch_loss(agent, buffer, mb, args):
    """The loss of fixed, adapt or joint over B segments of L steps, and metrics.
    Each frame is encoded once, and read by the num_stack steps that see it."""
    networks, _ = MODES[args.mode]
    if "encoder" in networks:
        frames = buffer.frames[mb["rows"]]  # (C + L, B, 84, 84)
        mu, logvar = agent.encode(frames)  # (C + L, B, latent_dim)
    else:
        mu = buffer.mu[mb["rows"]]  # of the rollout: the encoder stands still
    mu_ppo = mu.clone()  # at which the gradient of L_PPO alone is measured
    features = stack_features(mu_ppo, mb["stack"])  # U: (L, B, num_stack * latent_dim)
    logits, value = agent.policy(features)
    l_ppo, metrics = ppo_loss(logits, value, mb, args)
    if "decoder" not in networks:
        return l_ppo, metrics
    own = slice(agent.num_stack - 1, None)  # the C before only complete the stacks
    mu_vae = mu[own]  # at which that of L_VAE is
    l_vae, more = vae_loss(agent.decoder, mu_vae, logvar[own], frames[own], args.beta)
    l_joint = args.kappa * l_ppo + l_vae  # eq. 3: the gradients meet at U
    metrics.update(more)  # and, in the backward pass:
    mu_ppo.register_hook(lambda g: metrics.update({"grad/ppo_at_U": g.norm() / args.kappa}))
    mu_vae.register_hook(lambda g: metrics.update({"grad/vae_at_U": g.norm()}))
    return l_joint, metrics


# ---- Environment ----
def make_envs(args):
    """ale-py's games: grey 84x84 frames, frame skip 4, maximum of the last two.
    Returns them and the action FIRE, or NOOP in a game without. Raises UserError."""
    if gym.spec(args.env_id).namespace != "ALE":
        raise UserError(f"--env-id {args.env_id} is not like ALE/Breakout-v5")
    envs = gym.make_vec(
        args.env_id,
        num_envs=args.num_envs,
        num_threads=args.env_threads,
        repeat_action_probability=args.repeat_action_probability,  # else 0.25
        stack_num=1,
        reward_clipping=False,
        life_loss_info=True,  # a lost life ends the episode, and the game goes on
    )
    actions = envs.ale.get_action_set()
    return envs, actions.index(ale_py.Action.FIRE) if ale_py.Action.FIRE in actions else 0


class Games:
    """N games. The step after any `done` is a reset row, which belongs to no episode: after a
    lost life it serves (FIRE), after a game over it shows the new game's first frame."""

    def __init__(self, envs, fire, seeds, scores=()):
        obs, info = envs.reset(seed=seeds)
        self.envs = envs
        self.fire = fire
        self.frame = obs[:, 0]  # (N, 84, 84) uint8, the newest
        self.clock = info["episode_frame_number"]
        self.reset_row = np.zeros(envs.num_envs, dtype=bool)
        self.score = np.zeros(envs.num_envs)
        self.scores = deque(scores, maxlen=100)  # raw, of whole games: all their lives

    def step(self, action):
        """action (N,) -> frame (N, 84, 84), raw reward, terminated, truncated (N,)."""
        action = np.where(self.reset_row, self.fire, action)
        obs, reward, terminated, truncated, info = self.envs.step(action)
        new_game = info["episode_frame_number"] < self.clock
        self.scores.extend(self.score[new_game].tolist())
        self.score = np.where(new_game, 0, self.score) + reward
        self.clock = info["episode_frame_number"]
        self.frame = obs[:, 0]
        self.reset_row = terminated | truncated
        return self.frame, reward, terminated, truncated


def reseed(args, rank, iteration):
    """Seed torch for an iteration: a resumed run draws what it would have drawn. Returns
    seeds for new games (N,), which no other run, process or iteration has."""
    sequence = np.random.SeedSequence([args.seed, rank, iteration])
    seeds = sequence.generate_state(args.num_envs + 1) >> 1  # below 2**31
    torch.manual_seed(int(seeds[-1]))
    return seeds[:-1].astype(np.int64)


# ---- Rollout and GAE ----
class Buffer:
    """T steps of N games. Row C + t of frames and mu is the newest that step t sees; stack has
    the rows of all that it sees, oldest first: indices, not copies."""

    def __init__(self, agent, T, N, device):
        self.T, self.N, self.C = T, N, agent.num_stack - 1
        rows = self.C + T + 1  # C from before the rollout, and one from after it
        with torch.device(device):
            self.frames = torch.zeros(rows, N, 84, 84, dtype=torch.uint8)
            self.mu = torch.zeros(rows, N, agent.mu.out_features)
            self.stack = torch.full((T + 1, N, agent.num_stack), self.C + T)
            self.reset_row = torch.zeros(T + 1, N, dtype=torch.bool)
            self.terminated = torch.zeros(T, N, dtype=torch.bool)
            self.actions = torch.zeros(T, N, dtype=torch.long)
            self.logits = torch.zeros(T, N, agent.actor.out_features)
            self.values = torch.zeros(T + 1, N)
            self.rewards = torch.zeros(T, N)

    def add(self, t, frame, reward, terminated, truncated):
        """What the games answered to the actions of step t, in one copy to the device."""
        flags = np.stack([np.sign(reward) + 1, terminated, terminated | truncated], axis=1)
        answer = np.concatenate([frame.reshape(self.N, -1), flags.astype(np.uint8)], axis=1)
        answer = torch.from_numpy(answer).to(self.frames.device)
        row = self.C + t + 1
        self.frames[row] = answer[:, :-3].view(self.N, 84, 84)
        self.rewards[t] = answer[:, -3].float() - 1  # PPO learns from the sign
        self.terminated[t] = answer[:, -2]
        self.reset_row[t + 1] = answer[:, -1]
        self.stack[t + 1, :, :-1] = self.stack[t, :, 1:]
        self.stack[t + 1, :, -1] = row
        self.stack[t + 1].masked_fill_(self.reset_row[t, :, None], row)  # new episode


@torch.no_grad()
def rollout(agent, games, buffer):
    """Play T steps. The weights stand still, so only a step's newest frame is encoded."""
    C, T = buffer.C, buffer.T
    buffer.frames[:C] = buffer.frames[T : T + C].clone()  # begin at the last one's end
    buffer.frames[C] = torch.from_numpy(games.frame)
    buffer.stack[0] = buffer.stack[T] - T  # in the first rollout row C
    buffer.reset_row[0] = buffer.reset_row[T]
    buffer.mu[:C], _ = agent.encode(buffer.frames[:C])  # with the new weights
    for t in range(T + 1):
        buffer.mu[C + t], _ = agent.encode(buffer.frames[C + t])
        features = stack_features(buffer.mu, buffer.stack[t])
        logits, buffer.values[t] = agent.policy(features)
        if t < T:
            buffer.logits[t] = logits
            buffer.actions[t] = Categorical(logits=logits).sample()
            buffer.add(t, *games.step(buffer.actions[t].cpu().numpy()))


def gae(buffer, gamma, gae_lambda):
    """Advantages and returns (T, N) (Schulman et al. 2016). The step after a done shows the
    true last frame, whose value bootstraps a truncated episode."""
    advantages = torch.zeros_like(buffer.rewards)
    advantage = torch.zeros_like(buffer.rewards[0])
    for t in reversed(range(buffer.T)):
        next_value = buffer.values[t + 1] * ~buffer.terminated[t]
        delta = buffer.rewards[t] + gamma * next_value - buffer.values[t]
        advantage = delta + gamma * gae_lambda * ~buffer.reset_row[t + 1] * advantage
        advantages[t] = advantage
    return advantages, advantages + buffer.values[:-1]


# ---- Update ----
def minibatches(buffer, advantages, returns, args):
    """Epochs: each has every segment of L steps of a game once, in random order."""
    L = args.segment_length
    device = advantages.device
    first_steps = torch.arange(0, buffer.T, L, device=device)
    segments = torch.cartesian_prod(first_steps, torch.arange(buffer.N, device=device))
    rows = torch.arange(buffer.C + L, device=device)[:, None]
    for _ in range(args.update_epochs):
        order = torch.randperm(len(segments), device=device)
        for index in order.chunk(args.num_minibatches):
            first, game = segments[index].unbind(1)  # (B,)
            t = first + rows[:L]  # (L, B)
            yield {
                "rows": (first + rows, game),  # of frames and mu, (C + L, B)
                "stack": buffer.stack[t, game] - first[:, None],  # from the first row
                "actions": buffer.actions[t, game],
                "logits": buffer.logits[t, game],
                "values": buffer.values[t, game],
                "advantages": advantages[t, game],
                "returns": returns[t, game],
                "valid": ~buffer.reset_row[t, game],
            }


def mean_over_ranks(x):
    """The mean of x over the processes of torchrun; x where there is one."""
    if dist.is_initialized():
        x = x / dist.get_world_size()
        dist.all_reduce(x)
    return x


def apply_gradient(optimizer, loss, max_grad_norm=0.0):
    """One step of Adam. Returns the norm of the gradient before it was clipped."""
    parameters = optimizer.param_groups[0]["params"]
    optimizer.zero_grad()
    loss.backward()
    for p in parameters:
        p.grad = mean_over_ranks(p.grad)
    norm = nn.utils.clip_grad_norm_(parameters, max_grad_norm or math.inf)
    optimizer.step()
    return norm


def update(agent, optimizer, buffer, args):
    """PPO until the KL passes --target-kl. Returns metrics of the minibatches, and of all."""
    advantages, returns = gae(buffer, args.gamma, args.gae_lambda)
    seen = []
    for mb in minibatches(buffer, advantages, returns, args):
        loss, metrics = minibatch_loss(agent, buffer, mb, args)
        approx_kl = mean_over_ranks(metrics["losses/approx_kl"])
        kl_stop = len(seen) > 0 and 0 < args.target_kl < approx_kl.item()  # eq. 4
        if kl_stop:
            break
        metrics["grad/norm"] = apply_gradient(optimizer, loss, args.max_grad_norm)
        seen.append(metrics)
    valid = ~buffer.reset_row[:-1]
    unexplained = masked_var(returns - buffer.values[:-1], valid)
    last = {
        "losses/approx_kl": approx_kl,
        "losses/explained_variance": 1 - unexplained / (masked_var(returns, valid) + 1e-8),
        "losses/updates": len(seen),
        "losses/kl_stop": kl_stop,
    }
    return seen, last


# ---- Pretraining ----
def load_player(args, num_actions):
    """The agent of --policy or else one that plays uniformly at random. Raises UserError."""
    player = Agent(num_actions, args.latent_dim, args.num_stack)
    nn.init.zeros_(player.actor.weight)  # all actions are equally likely
    if args.policy:
        saved = load_checkpoint(args.policy, env_id=args.env_id)
        sizes = saved["args"]
        if sizes.get("mode") == "pretrain":
            raise UserError(f"--policy {args.policy} is of --mode pretrain: no policy")
        with reading(args.policy):
            player = Agent(num_actions, sizes["latent_dim"], sizes["num_stack"])
            player.load_state_dict(saved["weights"])
    return player


def collect_frames(player, games, num_frames, device):
    """Frames (num_frames, 84, 84) uint8 of games that the player plays."""
    N = games.envs.num_envs
    buffer = Buffer(player, math.ceil(num_frames / N), N, device)
    rollout(player.to(device), games, buffer)
    return buffer.frames[buffer.C : -1].flatten(0, 1)[:num_frames]


def pretrain_epoch(agent, optimizer, frames, args):
    """One pass over the frames with L_VAE alone. Returns metrics of the minibatches."""
    seen = []
    order = torch.randperm(len(frames), device=frames.device)
    for index in order.split(128):  # authors
        mu, logvar = agent.encode(frames[index])
        l_vae, metrics = vae_loss(agent.decoder, mu, logvar, frames[index], args.beta)
        metrics["grad/norm"] = apply_gradient(optimizer, l_vae)
        seen.append(metrics)
    return seen


# ---- Training ----
def start_process(args):
    """Set torch up and join the other processes of torchrun. Returns the device and the rank."""
    Categorical.set_default_validate_args(False)  # validation waits for the device
    torch.empty(30 * 2**20, dtype=torch.uint8)  # once it is freed, glibc keeps 60 MiB to reuse
    use_cuda = args.cuda and torch.cuda.is_available()
    cpu = torch.cpu.get_capabilities()
    if use_cuda:
        gpu = int(os.environ.get("LOCAL_RANK", "0"))
        if gpu >= torch.cuda.device_count():
            raise UserError("more processes than GPUs: start fewer, or add --no-cuda")
        torch.cuda.set_device(gpu)
        torch.backends.cudnn.deterministic = args.torch_deterministic
    elif cpu.get("avx512_f") and not cpu.get("amx_bf16"):  # AMX would round to bfloat16
        # Lets oneDNN multiply matrices, still in float32: on AMD twice as fast as MKL
        torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    if args.world_size > 1:
        dist.init_process_group("nccl" if use_cuda else "gloo")
        dist.barrier()  # all have looked for the run's folder before it is made
    rank = dist.get_rank() if dist.is_initialized() else 0
    return torch.device("cuda" if use_cuda else "cpu"), rank


def read_metrics(seen, last, device):
    """Means over minibatches and processes, as numbers: an iteration's one wait for the
    device beside those for the KL. Raises UserError where one is not finite."""
    metrics = {name: torch.stack([m[name] for m in seen]).mean() for name in seen[0]}
    metrics.update(last)
    values = [torch.as_tensor(x, dtype=torch.float32, device=device) for x in metrics.values()]
    numbers = mean_over_ranks(torch.stack(values)).tolist()
    metrics = dict(zip(metrics, numbers, strict=True))
    for name, number in metrics.items():
        limit = 1e6 if name == "weights/norm" else math.inf  # some 50 to 300 in a sound run
        if not abs(number) < limit:  # as NaN is not
            raise UserError(f"{name} is {number} (not saved): lower --learning-rate")
    return metrics


def make_agent(args, num_actions, device):
    """The networks, and Adam for those that the mode trains. Returns both."""
    torch.manual_seed(args.seed)
    agent = Agent(num_actions, args.latent_dim, args.num_stack).to(device)
    if args.compile:
        agent.encode = torch.compile(agent.encode)
        agent.policy = torch.compile(agent.policy)
        agent.decoder.forward = torch.compile(agent.decoder.forward)
    networks, _ = MODES[args.mode]
    parameters = [p for name in networks for p in getattr(agent, name).parameters()]
    optimizer = torch.optim.Adam(parameters, args.learning_rate, eps=1e-5, fused=True)
    return agent, optimizer


def train(args):
    """Run a mode from its start, or its checkpoint, to its end. Returns the exit code."""
    device, rank = start_process(args)
    caught = []
    for number in (signal.SIGINT, signal.SIGTERM):  # end after the iteration at hand
        signal.signal(number, lambda signum, _: caught.append(signum))
    envs, fire = make_envs(args)
    agent, optimizer = make_agent(args, int(envs.single_action_space.n), device)
    path = Path(args.runs_dir, args.run_name, "checkpoint.pt")
    start, scores, log_size = restore(agent, optimizer, args, path)
    adam = optimizer.param_groups[0]
    pretrain = args.mode == "pretrain"
    batch = (args.num_frames if pretrain else args.num_envs * args.num_steps) * args.world_size
    num_iterations = args.vae_epochs if pretrain else args.total_timesteps // batch
    if num_iterations == 0:
        raise UserError(f"--total-timesteps must be at least one rollout, {batch} steps")
    if start >= num_iterations:
        print(f"{path.parent} has {start} of {num_iterations} iterations: it is finished")
        return 0
    if pretrain:  # resumed, it plays its frames again
        games = Games(envs, fire, reseed(args, rank, 0))
        player = load_player(args, agent.actor.out_features)
    else:
        games = Games(envs, fire, reseed(args, rank, start), scores)
    if rank == 0:
        log = Log(args, log_size, start * batch, num_iterations * batch)
        where = f"{args.env_id}, {device} x {args.world_size}"
        print(f"{args.mode} on {where}, from iteration {start + 1}", flush=True)
    if pretrain:
        frames = collect_frames(player, games, args.num_frames, device)
    else:
        buffer = Buffer(agent, args.num_steps, args.num_envs, device)

    for iteration in range(start + 1, num_iterations + 1):
        reseed(args, rank, iteration)
        if pretrain:
            seen, last = pretrain_epoch(agent, optimizer, frames, args), {}
        else:
            if args.anneal_lr:
                remaining = 1 - (iteration - 1) / num_iterations
                adam["lr"] = remaining * args.learning_rate
            rollout(agent, games, buffer)
            seen, last = update(agent, optimizer, buffer, args)
        last["weights/norm"] = nn.utils.get_total_norm(agent.parameters())
        last["signals"] = len(caught)
        metrics = read_metrics(seen, last, device)
        ending = metrics.pop("signals") > 0 or iteration == num_iterations
        if rank == 0:
            metrics["charts/learning_rate"] = adam["lr"]
            global_step = iteration * batch
            log.write(metrics, global_step, games.scores)
            if ending or iteration % args.checkpoint_every == 0:
                progress = {
                    "iteration": iteration,
                    "global_step": global_step,
                    "scores": list(games.scores),
                    "log_size": log.file.tell(),
                }
                save_checkpoint(path, agent, optimizer, args, progress)
        if ending:
            break
    if rank == 0:
        log.bar.close()
        print(f"{path.parent} has {iteration} of {num_iterations} iterations")
    return 128 + caught[0] if caught else 0


# ---- Checkpoint and log ----
@contextmanager
def reading(path):
    """Raises UserError for all that fails within: a bad checkpoint shows in many ways."""
    try:
        yield
    except Exception as error:
        raise UserError(f"{path} is no checkpoint of this vae_ppo.py: {error!r:.90}") from None


def load_checkpoint(path, **settings):
    """A checkpoint, of which nothing is executed. Raises UserError at other settings."""
    with reading(path):
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        made_with = dict(checkpoint["args"])
        weights = checkpoint["weights"].items()
        broken = [name for name, x in weights if not x.isfinite().all()]
    for name, value in settings.items():
        if made_with.get(name, value) != value:
            raise UserError(f"{path} is of {name} {made_with[name]}, not {value}")
    if broken:
        raise UserError(f"{path} is of no use: its {broken[0]} is not finite")
    return checkpoint


def restore(agent, optimizer, args, path):
    """Load the run's checkpoint or, at its start, --vae. Returns iteration, scores and the
    size of metrics.csv. Raises UserError."""
    if path.exists():  # else it was killed before its first one
        settings = {k: v for k, v in vars(args).items() if k not in MAY_CHANGE}
        saved = load_checkpoint(path, **settings)
        with reading(path):
            agent.load_state_dict(saved["weights"])
            optimizer.load_state_dict(saved["optimizer"])
            return saved["iteration"], saved["scores"], saved["log_size"]
    if args.vae:
        same = {"env_id": args.env_id, "latent_dim": args.latent_dim}
        weights = load_checkpoint(args.vae, mode="pretrain", **same)["weights"]
        weights.update({k: v for k, v in agent.state_dict().items() if k.startswith(POLICY)})
        with reading(args.vae):
            agent.load_state_dict(weights)
    return 0, [], 0


def save_checkpoint(path, agent, optimizer, args, progress):
    """Replace the checkpoint as a whole, or not at all."""
    checkpoint = {"weights": agent.state_dict(), "optimizer": optimizer.state_dict()}
    checkpoint.update(args=vars(args), **progress)
    data = io.BytesIO()  # torch.save would hide what a full disk says
    torch.save(checkpoint, data)
    temporary = path.with_suffix(".tmp")
    with temporary.open("wb") as file:
        file.write(data.getbuffer())
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def track(args):
    """Let Weights & Biases follow what TensorBoard is told. Raises UserError."""
    try:
        import wandb  # not among the requirements

        wandb.init(name=args.run_name, config=vars(args), sync_tensorboard=True)
    except Exception as error:  # wandb is missing, or has its own reasons
        raise UserError(f"--track: {error} (pip install wandb, wandb login)") from None


class Log:
    """metrics.csv, by which it locks the run; TensorBoard; the progress bar."""

    def __init__(self, args, size, global_step, total):
        if args.track:
            track(args)
        folder = Path(args.runs_dir, args.run_name)
        folder.mkdir(parents=True, exist_ok=True)
        self.file = (folder / "metrics.csv").open("a+", newline="", buffering=1)
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # until this process ends
        except BlockingIOError:
            raise UserError(f"another process is at work in {folder}: wait for it") from None
        self.file.truncate(min(size, self.file.tell()))  # no rows after the checkpoint
        self.file.seek(0)
        self.columns = csv.DictReader(self.file).fieldnames  # None in a new run
        self.file.seek(0, os.SEEK_END)
        self.tensorboard = SummaryWriter(folder, purge_step=global_step + 1)
        self.bar = tqdm(total=total, initial=global_step, unit="step", unit_scale=True)
        self.clock = time.perf_counter()
        self.global_step = global_step

    def write(self, metrics, global_step, scores):
        """One row. Its metrics must be those of the first row, else ValueError."""
        clock = time.perf_counter()
        steps = global_step - self.global_step
        row = {
            "global_step": global_step,
            "charts/episodic_return": sum(scores) / len(scores) if scores else None,
            "charts/SPS": round(steps / (clock - self.clock)),
            **metrics,
        }
        if self.columns is None:
            self.columns = list(row)
            csv.writer(self.file).writerow(self.columns)
        if row.keys() != set(self.columns):
            raise ValueError(f"not the metrics of the first row: {list(row)}")
        csv.DictWriter(self.file, self.columns).writerow(row)
        for name, value in row.items():
            if value is not None:
                self.tensorboard.add_scalar(name, value, global_step)
        self.tensorboard.flush()
        self.bar.set_postfix(score=row["charts/episodic_return"], refresh=False)
        self.bar.update(steps)
        self.clock = clock
        self.global_step = global_step


def main(argv=None):
    """Returns the exit code: 0, 130 after Ctrl-C, 2 with a sentence on stderr."""
    try:
        return train(parse_args(argv))
    except (UserError, gym.error.Error, OSError) as error:
        print(f"vae_ppo.py: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
