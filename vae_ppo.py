"""Guiding Representation Learning in Deep Generative Models with Policy Gradients.
A VAE trained alone on Breakout leaves out the ball. Policy gradients put it in.

    python vae_ppo.py --mode joint --kappa 20 --cuda
    python vae_ppo.py --mode pretrain --policy runs/Breakout-joint-kappa20-seed1/checkpoint.pt
    python vae_ppo.py --mode fixed --vae runs/Breakout-pretrain-seed1/checkpoint.pt
    python vae_ppo.py --mode adapt --vae runs/Breakout-pretrain-seed1/checkpoint.pt

    x           a frame, grey, uint8
    mu, logvar  mean and log-variance of q(z|x), which the encoder gives
    z           a sample of q(z|x), from which the decoder makes p(x|z)
    U           mu of the last num_stack frames: all that the policy sees
    T, N        steps of a rollout, games played at once
    L, B        steps of a segment of one game, segments of a minibatch
    C           num_stack - 1: the frames that a segment needs from before it
"""

import argparse
import os
import signal
import sys
from collections import deque, namedtuple
from contextlib import suppress
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # idle threads sleep
import ale_py
import gymnasium as gym
import numpy as np
import torch
from filelock import FileLock
from torch import distributed, distributions, nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

# ---- Arguments ----
COUNT, FROM_0, SHARE = (1, 1e9), (0, 1e9), (0, 1)
FLAGS = [  # group (see MODES), name, default, limits, help ("authors": as in their code)
    ("run", "env-id", "ALE/Breakout-v5", None, "a game of ale-py (paper: Breakout)"),
    ("run", "seed", 1, FROM_0, "of weights, actions and games"),
    ("run", "cuda", True, None, "use the GPU, if there is one"),
    ("run", "runs-dir", "runs", None, "folder of all runs"),
    ("run", "run-name", "", None, "the run's folder; else named by the flags"),
    ("run", "resume", False, None, "go on from the checkpoint"),
    ("run", "checkpoint-every", 20, COUNT, "iterations, counted from the end"),
    ("run", "track", False, None, "log to Weights & Biases too"),
    ("run", "learning-rate", 0.0, FROM_0, "of Adam; 0: 1e-3 (adapt 5e-4, pretrain 1e-4)"),
    ("run", "num-envs", 16, (1, 4096), "N, games at once (authors)"),
    ("run", "repeat-action-probability", 0.0, SHARE, "sticky actions (paper: none)"),
    ("run", "env-threads", 0, FROM_0, "threads of the emulator; 0: one per core"),
    ("run", "latent-dim", 20, COUNT, "numbers in z (authors)"),
    ("frames", "policy", "", None, "a player's checkpoint; else random actions"),
    ("frames", "num-frames", 25_000, COUNT, "frames to learn from (paper)"),
    ("frames", "vae-epochs", 20, COUNT, "passes over these frames"),
    ("vae", "vae", "", None, "checkpoint of the pretrained VAE"),
    ("kappa", "kappa", 20.0, (1e-6, 1e9), "weight of L_PPO (paper's best)"),
    ("L_VAE", "beta", 1.0, FROM_0, "weight of the KL in L_VAE (paper)"),
    ("L_PPO", "total-timesteps", 10_000_000, COUNT, "steps of 4 game frames (paper)"),
    ("L_PPO", "anneal-lr", True, None, "learning rate falls to 0 (authors)"),
    ("L_PPO", "num-steps", 128, COUNT, "T, steps of a rollout (authors)"),
    ("L_PPO", "num-stack", 4, COUNT, "frames that the policy sees (paper)"),
    ("L_PPO", "num-minibatches", 16, COUNT, "in an epoch"),
    ("L_PPO", "segment-length", 8, COUNT, "L, steps in a row in a minibatch"),
    ("L_PPO", "update-epochs", 4, COUNT, "passes over a rollout (CleanRL)"),
    ("L_PPO", "gamma", 0.99, SHARE, "discount (authors)"),
    ("L_PPO", "gae-lambda", 0.95, SHARE, "lambda of GAE (authors)"),
    ("L_PPO", "norm-adv", True, None, "normalise advantages (CleanRL)"),
    ("L_PPO", "clip-coef", 0.1, FROM_0, "epsilon of J_clip, L_V (authors: falls to 0)"),
    ("L_PPO", "clip-vloss", True, None, "clip the value loss too (authors)"),
    ("L_PPO", "ent-coef", 0.01, FROM_0, "c_H, weight of the entropy (authors)"),
    ("L_PPO", "vf-coef", 0.5, FROM_0, "c2, weight of the value loss (authors)"),
    ("L_PPO", "max-grad-norm", 0.5, FROM_0, "largest gradient norm; 0: none (authors)"),
    ("L_PPO", "target-kl", 0.015, FROM_0, "KL that ends an update; 0: none"),
]


def parse_args(argv=None):
    """The checked command line. What is wrong ends the program with exit code 2."""
    parser = argparse.ArgumentParser(usage="vae_ppo.py --mode MODE [flags]", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--mode", choices=MODES, required=True)
    for group, name, default, _, text in FLAGS:
        users = ", ".join(mode for mode in MODES if group in MODES[mode].flags)
        text += f" [{users}]" if default == "" else f" [{users}; default {default}]"
        switch = {"action": argparse.BooleanOptionalAction}
        kind = switch if isinstance(default, bool) else {"type": type(default)}
        parser.add_argument(f"--{name}", default=default, help=text, **kind)
    args = parser.parse_args(argv)
    mode = MODES[args.mode]
    for group, name, default, limits, _ in FLAGS:
        value = getattr(args, name.replace("-", "_"))
        if group not in mode.flags and value != default:
            parser.error(f"--mode {args.mode} does not use --{name}")
        if limits and not limits[0] <= value <= limits[1]:  # NaN is outside, too
            parser.error(f"--{name} must be from {limits[0]} to {limits[1]:g}, not {value}")
    segments = args.num_steps // args.segment_length * args.num_envs
    if args.num_steps % args.segment_length or segments % args.num_minibatches:
        parser.error("--segment-length must divide --num-steps, and --num-minibatches the segments")
    args.learning_rate = args.learning_rate or mode.learning_rate
    args.world_size = int(os.environ.get("WORLD_SIZE") or 1)  # processes, by torchrun
    args.batch_size = args.num_steps * args.num_envs * args.world_size
    if not 1 <= args.batch_size <= args.total_timesteps:
        parser.error(f"--total-timesteps must be at least {args.batch_size}, an iteration")
    game = args.env_id.split("/")[-1].removesuffix("-v5")
    kappa = f"-kappa{args.kappa:g}" if "kappa" in mode.flags else ""
    args.run_name = args.run_name or f"{game}-{args.mode}{kappa}-seed{args.seed}"
    return args


# ---- Model ----
FRAME_SIZE = 84  # height and width


def layer_init(layer, std=2**0.5):
    nn.init.orthogonal_(layer.weight, std)
    nn.init.zeros_(layer.bias)
    return layer


class Agent(nn.Module):
    """The VAE of one frame, and the policy, which sees nothing but U."""

    def __init__(self, num_actions, latent_dim, num_stack):
        super().__init__()
        self.num_stack = num_stack
        self.encoder = nn.Sequential(  # of A3C (Mnih et al. 2016)
            layer_init(nn.Conv2d(1, 16, 8, stride=4)),
            nn.ReLU(),
            layer_init(nn.Conv2d(16, 32, 4, stride=2)),
            nn.ReLU(),
            nn.Flatten(),
            layer_init(nn.Linear(32 * 9 * 9, 256)),  # 9 x 9 is what 84 x 84 becomes
            nn.ReLU(),
        )
        self.mu = layer_init(nn.Linear(256, latent_dim), std=1.0)
        self.logvar = layer_init(nn.Linear(256, latent_dim), std=0.01)
        self.decoder = nn.Sequential(  # z (..., latent_dim) -> logits of p(x|z)
            layer_init(nn.Linear(latent_dim, 256)),
            nn.ReLU(),
            layer_init(nn.Linear(256, FRAME_SIZE**2), std=1.0),
            nn.Unflatten(-1, (FRAME_SIZE, FRAME_SIZE)),
        )
        self.trunk = nn.Sequential(
            layer_init(nn.Linear(num_stack * latent_dim, 64)),
            nn.Tanh(),
            layer_init(nn.Linear(64, 64)),
            nn.Tanh(),
        )
        self.actor = layer_init(nn.Linear(64, num_actions), std=0.01)
        self.critic = layer_init(nn.Linear(64, 1), std=1.0)
        self.to(memory_format=torch.channels_last)  # faster on a CPU

    def encode(self, frames):
        """q(z|x): frames (..., 84, 84) uint8 -> mu, logvar, each (..., latent_dim)."""
        hidden = self.encoder(frames.reshape(-1, 1, *frames.shape[-2:]) / 255)
        hidden = hidden.reshape(*frames.shape[:-2], hidden.shape[-1])
        return self.mu(hidden), self.logvar(hidden)

    def policy(self, features):
        """U (..., num_stack * latent_dim) -> logits of pi (..., num_actions), V (...)."""
        hidden = self.trunk(features)
        return self.actor(hidden), self.critic(hidden).squeeze(-1)


def stack_features(mu, stack):
    """U (..., N, num_stack * latent_dim): rows `stack` of mu (rows, N, latent_dim)."""
    game = torch.arange(mu.shape[1], device=mu.device)[:, None]
    return mu[stack, game].flatten(-2)


# ---- Losses ----
def vae_loss(agent, frames, mu, logvar, args):
    """L_VAE, metrics: sums over pixels and latents, means over frames (..., 84, 84)."""
    z = mu + (0.5 * logvar).exp() * torch.randn_like(mu)
    nats = nn.BCEWithLogitsLoss(reduction="sum")(agent.decoder(z), frames / 255)
    recon_loss = nats / mu.shape[:-1].numel()  # -E_q[log p(x|z)]
    kl = 0.5 * (mu.square() + logvar.exp() - 1 - logvar).sum(-1).mean()  # KL(q || N(0, I))
    l_vae = recon_loss + args.beta * kl  # eq. 2, negated
    return l_vae, {"vae/recon_loss": recon_loss.detach(), "vae/kl": kl.detach()}


def masked_mean(x, valid):
    """The mean of x over the steps that belong to an episode."""
    return (x * valid).sum() / valid.sum().clamp(min=1)


def ppo_loss(logits, value, mb, args):
    """L_PPO, metrics: logits (..., num_actions), value (...); `mb` has the rollout's."""
    pi = distributions.Categorical(logits=logits)
    pi_old = distributions.Categorical(logits=mb["logits"])
    valid = ~mb["reset_row"]
    advantages = mb["advantages"]
    if args.norm_adv:
        advantages = advantages - masked_mean(advantages, valid)
        advantages = advantages / (masked_mean(advantages.square(), valid).sqrt() + 1e-8)
    ratio = (pi.log_prob(mb["actions"]) - pi_old.log_prob(mb["actions"])).exp()
    clipped = ratio.clamp(1 - args.clip_coef, 1 + args.clip_coef)
    j_clip = masked_mean(torch.minimum(ratio * advantages, clipped * advantages), valid)
    v_error = (value - mb["returns"]).square()
    if args.clip_vloss:
        change = (value - mb["values"]).clamp(-args.clip_coef, args.clip_coef)
        v_error = torch.maximum(v_error, (mb["values"] + change - mb["returns"]).square())
    l_v = 0.5 * masked_mean(v_error, valid)
    entropy = masked_mean(pi.entropy(), valid)
    l_ppo = -(j_clip - args.vf_coef * l_v + args.ent_coef * entropy)  # eq. 5
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
VAE = ("encoder", "mu", "logvar", "decoder")
POLICY = ("trunk", "actor", "critic")  # what is in neither is never trained
Mode = namedtuple("Mode", "networks learning_rate flags")  # flags: groups of FLAGS
MODES = {  # Adam trains `networks`; a mode with the flag --vae starts from that VAE
    "pretrain": Mode(VAE, 1e-4, ("run", "frames", "L_VAE")),  # L_VAE, eq. 2
    "fixed": Mode(POLICY, 1e-3, ("run", "vae", "L_PPO")),  # L_PPO, eq. 5, frozen encoder
    "adapt": Mode(POLICY + ("encoder", "mu"), 5e-4, ("run", "vae", "L_PPO")),  # L_PPO
    "joint": Mode(POLICY + VAE, 1e-3, ("run", "kappa", "L_VAE", "L_PPO")),  # eq. 3
}


def make_agent(args, num_actions, device):
    """The networks at a run's start, and Adam for those that the mode trains."""
    torch.manual_seed(args.seed)
    agent = Agent(num_actions, args.latent_dim, args.num_stack).to(device)
    if args.policy and load_checkpoint(args.policy, args, "env_id")["args"]["mode"] == "pretrain":
        sys.exit(f"--policy {args.policy} is of --mode pretrain, which has no policy")
    if "vae" in MODES[args.mode].flags:
        path = args.vae or sys.exit("--vae must be a checkpoint of pretrain")
        saved = load_checkpoint(path, args, "env_id", "latent_dim")
        new_policy = {k: x for k, x in agent.state_dict().items() if k.startswith(POLICY)}
        agent.load_state_dict(saved["weights"] | new_policy)
    trained = nn.ModuleList(getattr(agent, name) for name in MODES[args.mode].networks)
    return agent, torch.optim.Adam(trained.parameters(), args.learning_rate, eps=1e-5, fused=True)


def minibatch_loss(agent, buffer, segments, args):
    """The loss of fixed, adapt or joint over `segments` (B,) of L steps, and metrics."""
    networks = MODES[args.mode].networks
    mb = gather(buffer, segments, args.segment_length)
    if "encoder" in networks or "decoder" in networks:
        frames = buffer.frames[mb["rows"]]  # (C + L, B, 84, 84): no frame twice
        mu, logvar = agent.encode(frames)  # (C + L, B, latent_dim)
    else:
        mu = buffer.mu[mb["rows"]]  # the encoder stands still
    mu_ppo = mu.clone()  # a copy, whose gradient is of L_PPO alone
    features = stack_features(mu_ppo, mb["stack"])  # U: (L, B, num_stack * latent_dim)
    logits, value = agent.policy(features)
    l_ppo, metrics = ppo_loss(logits, value, mb, args)
    if "decoder" not in networks:
        return l_ppo, metrics
    C = buffer.C  # the first C frames only complete the stacks
    mu_vae = mu[C:]  # its gradient is of L_VAE alone
    l_vae, vae_metrics = vae_loss(agent, frames[C:], mu_vae, logvar[C:], args)
    metrics |= vae_metrics
    mu_ppo.register_hook(lambda g: metrics.update({"grad/ppo_at_U": g.norm() / args.kappa}))
    mu_vae.register_hook(lambda g: metrics.update({"grad/vae_at_U": g.norm()}))
    return args.kappa * l_ppo + l_vae, metrics  # L_joint, eq. 3


# ---- Environment ----
def make_envs(args):
    """ale-py's games and the action that serves the ball: FIRE, or else NOOP."""
    if not args.env_id.startswith("ALE/") or args.env_id not in gym.registry:
        sys.exit(f"--env-id {args.env_id} is not a game of ale-py, like ALE/Breakout-v5")
    envs = gym.make_vec(
        args.env_id,
        num_envs=args.num_envs,
        num_threads=args.env_threads,
        repeat_action_probability=args.repeat_action_probability,  # ale-py: 0.25
        img_height=FRAME_SIZE,
        img_width=FRAME_SIZE,
        stack_num=1,
        reward_clipping=False,
        life_loss_info=True,  # a lost life ends the episode, not the game
    )
    actions = envs.ale.get_action_set()
    return envs, actions.index(ale_py.Action.FIRE) if ale_py.Action.FIRE in actions else 0


class Games:
    """N games. The step after an episode's end is a reset row, which is in no episode:
    after a lost life it serves the ball, after a whole game it begins a new one."""

    def __init__(self, envs, serve, seed, scores=()):
        obs, info = envs.reset(seed=seed)  # game n has seed + n
        self.envs = envs
        self.serve = serve
        self.frame = obs[:, 0]  # (N, 84, 84) uint8, the newest
        self.frame_number = info["episode_frame_number"]
        self.reset_row = np.zeros(envs.num_envs, dtype=bool)
        self.score = np.zeros(envs.num_envs)
        self.scores = deque(scores, maxlen=100)  # raw, of whole games

    def step(self, action):
        """action (N,) -> raw reward, terminated (N,). Sets frame and reset_row."""
        action = np.where(self.reset_row, self.serve, action)
        obs, reward, terminated, truncated, info = self.envs.step(action)
        new_game = info["episode_frame_number"] < self.frame_number
        self.scores.extend(self.score[new_game].tolist())
        self.score = np.where(new_game, 0, self.score) + reward
        self.frame_number = info["episode_frame_number"]
        self.frame = obs[:, 0]
        self.reset_row = terminated | truncated
        return reward, terminated


# ---- Rollout and GAE ----
class Buffer:
    """T steps of N games.

    row of frames and mu   0 ... C-1          C ... C+T-1         C+T
    shows                  what came before   steps 0 ... T-1     the step after, for V

    stack[t] has the rows of the frames that step t sees, oldest first."""

    def __init__(self, agent, T, N):
        self.T, self.N, self.C = T, N, agent.num_stack - 1
        rows = self.C + T + 1
        zeros = agent.mu.weight.new_zeros  # on the same device
        self.frames = zeros(rows, N, FRAME_SIZE, FRAME_SIZE, dtype=torch.uint8)
        self.mu = zeros(rows, N, agent.mu.out_features)
        self.stack = zeros(T + 1, N, agent.num_stack, dtype=torch.long) + self.C + T
        self.reset_row = zeros(T + 1, N, dtype=torch.bool)
        self.terminated = zeros(T, N, dtype=torch.bool)
        self.actions = zeros(T, N, dtype=torch.long)
        self.logits = zeros(T, N, agent.actor.out_features)
        self.values = zeros(T + 1, N)
        self.rewards = zeros(T, N)
        self.advantages = zeros(T + 1, N)  # the last stays 0
        self.returns = zeros(T, N)


def act(agent, buffer, t):
    """Step t on the device: encode the newest frame, evaluate pi and V, draw actions."""
    row = buffer.C + t
    if t > 0:  # stack[t] has the newest rows, but none from before the episode
        oldest = buffer.stack[t - 1, :, 0].masked_fill(buffer.reset_row[t - 1], row)
        newest = torch.arange(t, row + 1, device=oldest.device)
        buffer.stack[t] = newest.maximum(oldest[:, None])
    buffer.mu[row], _ = agent.encode(buffer.frames[row])
    features = stack_features(buffer.mu, buffer.stack[t])
    logits, buffer.values[t] = agent.policy(features)
    if t < buffer.T:
        buffer.logits[t] = logits
        buffer.actions[t] = distributions.Categorical(logits=logits).sample()


@torch.no_grad()
def rollout(agent, games, buffer):
    """Play T steps. The weights stand still, so only the newest frame is encoded."""
    C, T = buffer.C, buffer.T
    buffer.frames[:C] = buffer.frames[T : T + C].clone()  # the last rollout's end
    buffer.stack[0] = buffer.stack[T] - T  # in the first rollout row C, num_stack times
    buffer.mu[:C], _ = agent.encode(buffer.frames[:C])  # with the new weights
    for t in range(T + 1):
        buffer.frames[C + t] = torch.from_numpy(games.frame)
        buffer.reset_row[t] = torch.from_numpy(games.reset_row)
        act(agent, buffer, t)
        if t < T:  # step T begins the next rollout: here its V bootstraps
            reward, terminated = games.step(buffer.actions[t].cpu().numpy())
            buffer.rewards[t] = torch.from_numpy(np.sign(reward))  # PPO sees the sign
            buffer.terminated[t] = torch.from_numpy(terminated)


def gae(buffer, gamma, gae_lambda):
    """Fill in advantages and returns (Schulman et al. 2016)."""
    for t in reversed(range(buffer.T)):
        next_value = buffer.values[t + 1] * ~buffer.terminated[t]  # not 0, if truncated
        delta = buffer.rewards[t] + gamma * next_value - buffer.values[t]
        decay = gamma * gae_lambda * ~buffer.reset_row[t + 1]
        buffer.advantages[t] = delta + decay * buffer.advantages[t + 1]
    buffer.returns[:] = buffer.advantages[:-1] + buffer.values[:-1]


# ---- Update ----
def minibatches(buffer, args):
    """Epochs: each has every segment once, in random order. Yields their numbers (B,)."""
    num_segments = buffer.T // args.segment_length * buffer.N
    for _ in range(args.update_epochs):
        order = torch.randperm(num_segments, device=buffer.frames.device)
        yield from order.chunk(args.num_minibatches)


def gather(buffer, segments, L):
    """The buffer's data of the segments (B,), each L steps of one game."""
    first = segments // buffer.N * L  # step (B,)
    game = segments % buffer.N
    rows = first + torch.arange(buffer.C + L, device=segments.device)[:, None]
    t = rows[:L]  # (L, B): step t sees some of the rows t to C + t
    names = "actions", "logits", "values", "advantages", "returns", "reset_row"
    mb = {name: getattr(buffer, name)[t, game] for name in names}
    mb["rows"] = rows, game  # of frames and mu, (C + L, B)
    mb["stack"] = buffer.stack[t, game] - first[:, None]  # (L, B, num_stack)
    return mb


def mean_over_ranks(x):
    """The mean of x over the processes of torchrun, if any."""
    if distributed.is_initialized():
        x = x / distributed.get_world_size()
        distributed.all_reduce(x)
    return x


def clipped_gradient(optimizer, loss, max_grad_norm=0.0):
    """Compute and clip the mean gradient of all processes. Returns the unclipped norm."""
    parameters = optimizer.param_groups[0]["params"]
    optimizer.zero_grad()
    loss.backward()
    for p in parameters:
        p.grad = mean_over_ranks(p.grad)
    return nn.utils.clip_grad_norm_(parameters, max_grad_norm or np.inf)


def mean_metrics(history):
    """Means of metrics, tensors (), over an iteration's minibatches and all processes."""
    means = [torch.stack([m[name] for m in history]).mean() for name in history[0]]
    numbers = mean_over_ranks(torch.stack(means)).tolist()  # one wait for the device
    return dict(zip(history[0], numbers, strict=True))


def update(agent, optimizer, buffer, args):
    """PPO on a rollout until the KL passes --target-kl. Returns means and the last KL."""
    gae(buffer, args.gamma, args.gae_lambda)
    history = []
    for segments in minibatches(buffer, args):
        loss, metrics = minibatch_loss(agent, buffer, segments, args)
        approx_kl = mean_over_ranks(metrics["losses/approx_kl"]).item()
        if history and 0 < args.target_kl < approx_kl:
            break  # eq. 4: no further step in this iteration
        metrics["grad/norm"] = clipped_gradient(optimizer, loss, args.max_grad_norm)
        optimizer.step()
        history.append(metrics)
    return mean_metrics(history) | {"losses/approx_kl": approx_kl, "losses/updates": len(history)}


def learn_policy(agent, optimizer, games, args, steps):
    """fixed, adapt and joint. Yields the metrics of each iteration."""
    buffer = Buffer(agent, args.num_steps, args.num_envs)
    for global_step in steps:
        remaining = 1 - global_step / args.total_timesteps if args.anneal_lr else 1.0
        optimizer.param_groups[0]["lr"] = remaining * args.learning_rate
        rollout(agent, games, buffer)
        yield update(agent, optimizer, buffer, args)


# ---- Pretraining ----
def collect_frames(args, games, agent):
    """Frames (num_frames / world_size, 84, 84) uint8, played by --policy or at random."""
    num_actions = agent.actor.out_features
    if args.policy:
        saved = load_checkpoint(args.policy, args, "env_id")
        player = Agent(num_actions, saved["args"]["latent_dim"], saved["args"]["num_stack"])
        player.load_state_dict(saved["weights"])
    else:
        player = Agent(num_actions, args.latent_dim, args.num_stack)
        nn.init.zeros_(player.actor.weight)  # all actions are equally likely
    T = int(np.ceil(args.num_frames / args.num_envs / args.world_size))
    buffer = Buffer(player.to(agent.mu.weight.device), T, args.num_envs)
    rollout(player, games, buffer)
    return buffer.frames[buffer.C :].flatten(0, 1)[: args.num_frames // args.world_size]


def learn_vae(agent, optimizer, games, args, steps):
    """pretrain. Yields the metrics of each epoch, a pass over all frames."""
    frames = collect_frames(args, games, agent)
    optimizer.param_groups[0]["lr"] = args.learning_rate  # not the checkpoint's
    for _ in steps:
        history = []
        order = torch.randperm(len(frames), device=frames.device)
        for index in order.split(128):  # authors
            mu, logvar = agent.encode(frames[index])
            l_vae, metrics = vae_loss(agent, frames[index], mu, logvar, args)
            metrics["grad/norm"] = clipped_gradient(optimizer, l_vae)
            optimizer.step()
            history.append(metrics)
        yield mean_metrics(history)


# ---- Training ----
def start_process(args):
    """Set up torch, and join torchrun's processes. Returns device and rank."""
    distributions.Categorical.set_default_validate_args(False)  # checks wait for the GPU
    torch.backends.cudnn.deterministic = True  # equal seeds give equal bits
    use_cuda = args.cuda and torch.cuda.is_available()
    if use_cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    if args.world_size > 1:
        distributed.init_process_group("nccl" if use_cuda else "gloo")
    return torch.device("cuda" if use_cuda else "cpu"), int(os.environ.get("RANK", 0))


def train(args, signals=()):
    """Run a mode, from its checkpoint if any, to its end or the first of `signals`."""
    device, rank = start_process(args)
    folder = Path(os.path.normpath(Path(args.runs_dir, args.run_name)))
    if rank == 0:
        if folder.exists() != args.resume or folder.name != args.run_name:
            sys.exit(f"--run-name must be new, or with --resume an old one, not {folder}")
        print(f"{args.mode} of {args.env_id} on {device}: {folder}", flush=True)
    envs, serve = make_envs(args)
    agent, optimizer = make_agent(args, int(envs.single_action_space.n), device)
    global_step, scores, log_size = restore(agent, optimizer, args, folder / "checkpoint.pt")
    seed = int(np.random.default_rng([args.seed, rank, global_step]).integers(2**30))
    torch.manual_seed(seed)  # another in each process, and after a resume
    games = Games(envs, serve, seed, scores)
    learn, total, batch = learn_policy, args.total_timesteps, args.batch_size
    if args.mode == "pretrain":  # its steps are frames, its iterations epochs
        learn, total, batch = learn_vae, args.vae_epochs * args.num_frames, args.num_frames
    steps = range(global_step, total - batch + 1, batch)  # iterations begin here
    if rank == 0:
        lock, file, writer = open_log(args, folder, log_size, global_step)
        bar = tqdm(initial=global_step, total=total, unit="step", unit_scale=True)
    for metrics in learn(agent, optimizer, games, args, steps):
        if not np.isfinite(metrics["grad/norm"]):  # in all processes at once
            sys.exit("\ngrad/norm is not finite: lower --learning-rate")
        caught = mean_over_ranks(torch.tensor(len(signals), device=device)).item() > 0
        global_step += batch
        if rank == 0:
            charts = {
                "global_step": global_step,
                "charts/episodic_return": np.mean(games.scores or np.nan),
                "charts/SPS": (global_step - steps[0]) / (bar.format_dict["elapsed"] or np.nan),
                "charts/learning_rate": optimizer.param_groups[0]["lr"],
            }
            write_log(file, writer, charts | metrics)
            if caught or (total - global_step) // batch % args.checkpoint_every == 0:
                progress = {"scores": list(games.scores), "log_size": file.tell()}
                progress |= {"global_step": global_step, "args": vars(args)}
                save_checkpoint(folder, agent, optimizer, progress)
            with suppress(OSError):  # the terminal may be gone
                bar.set_postfix(score=charts["charts/episodic_return"], refresh=False)
                bar.update(batch)
        if caught:
            break


# ---- Checkpoint and log ----
def load_checkpoint(path, args, *names):
    """A checkpoint with the settings `names` of args. Nothing in it is executed."""
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        settings, _ = saved["args"], saved["weights"]
    except Exception as error:  # missing, damaged, or not ours
        sys.exit(f"{path} is no checkpoint of vae_ppo.py: {error!r:.90}")
    for name in names:
        if settings.get(name) != getattr(args, name):
            sys.exit(f"{path} is of {name} {settings.get(name)}, not {getattr(args, name)}")
    return saved


def restore(agent, optimizer, args, path):
    """Load the checkpoint, if any. Returns global_step, scores, size of metrics.csv."""
    if not path.exists():  # a new run, or one killed before its first checkpoint
        return 0, [], 0
    saved = load_checkpoint(path, args, "mode", "env_id", "latent_dim", "num_stack")
    agent.load_state_dict(saved["weights"])
    optimizer.load_state_dict(saved.get("optimizer") or sys.exit(f"{path} has no state of Adam"))
    if any(p.shape != state["exp_avg"].shape for p, state in optimizer.state.items()):
        sys.exit(f"{path} has the optimizer's state of another network")  # else a crash
    print("resumed; changed settings:", sorted(vars(args).items() - saved["args"].items()))
    return saved["global_step"], saved["scores"], saved["log_size"]


def save_checkpoint(folder, agent, optimizer, progress):
    """Replace the checkpoint as a whole, or not at all."""
    state = {"weights": agent.state_dict(), "optimizer": optimizer.state_dict()}
    with open(folder / "checkpoint.tmp", "wb") as file:
        torch.save(state | progress, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(file.name, folder / "checkpoint.pt")


def open_log(args, folder, size, global_step):
    """Lock the folder, cut metrics.csv to `size` bytes, open TensorBoard."""
    if args.track:
        import wandb  # not among the requirements

        wandb.init(name=args.run_name, config=vars(args), sync_tensorboard=True)
    try:  # makes the folder; others are kept out while `lock` lives
        lock = FileLock(folder.resolve() / "lock", is_singleton=True).acquire(timeout=0)
    except OSError as error:
        sys.exit(f"{folder} cannot be used, or is in use: {error}")
    file = open(folder / "metrics.csv", "a+", newline="", buffering=1)
    file.seek(file.truncate(min(size, file.tell())))  # drop rows after the checkpoint
    writer = SummaryWriter(folder, purge_step=global_step + 1)
    writer.add_text("args", f"{vars(args)}, torch {torch.__version__}")
    return lock, file, writer


def write_log(file, writer, row):
    """Append a row to both logs. The columns stay those of the first row."""
    if file.tell() == 0:
        print(*row, sep=",", file=file)
    file.seek(0)
    if file.readline().strip() != ",".join(row):
        sys.exit(f"\n{file.name} has other columns: copy checkpoint.pt to another run")
    print(*row.values(), sep=",", file=file)
    for name, value in row.items():
        writer.add_scalar(name, value, row["global_step"])


def main():
    """The first Ctrl-C saves and ends, the second one ends at once."""
    signals = []

    def catch(number, _):
        signals.append(number)
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        with suppress(OSError, RuntimeError):  # stderr is gone or busy
            print("\nfinishing this iteration, then saving; --resume goes on", file=sys.stderr)

    for number in (signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGINT)):
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores SIGHUP
            signal.signal(number, catch)
    train(parse_args(), signals)
    sys.exit(128 + signals[0] if signals else 0)


if __name__ == "__main__":
    main()
