"""Which decoder? Trains the VAE with each on the same frames and compares them on frames of other games.

    python -m experiments.decoders --policy runs/Breakout-joint-kappa20-seed1/checkpoint.pt --epochs 5

Prints a Markdown table: L_VAE on held-out frames after equal training, and frames/s forward and backward.
"""

import argparse
import statistics
import sys
import time

import torch
import torch.nn as nn

import vae_ppo
from vae_ppo import init


def mirrored(latent_dim):
    """The encoder's mirror image, in transposed convolutions: latent_dim -> (84, 84) logits."""
    return nn.Sequential(
        *(init(nn.Linear(latent_dim, 512)), nn.ReLU()),
        *(init(nn.Linear(512, 64 * 7 * 7)), nn.ReLU(), nn.Unflatten(1, (64, 7, 7))),
        *(init(nn.ConvTranspose2d(64, 64, 3)), nn.ReLU()),
        *(init(nn.ConvTranspose2d(64, 32, 4, stride=2)), nn.ReLU()),
        *(init(nn.ConvTranspose2d(32, 1, 8, stride=4), 1.0), nn.Flatten(1, 2)),
    )


def patches(latent_dim, channels):
    return nn.Sequential(
        *(init(nn.Linear(latent_dim, 512)), nn.ReLU()),
        *(init(nn.Linear(512, channels * 7 * 7)), nn.ReLU(), nn.Unflatten(1, (channels, 7, 7))),
        *(init(nn.Conv2d(channels, 12 * 12, 1), 1.0), nn.PixelShuffle(12), nn.Flatten(1, 2)),
    )


def mlp(latent_dim, hidden):
    return nn.Sequential(
        *(init(nn.Linear(latent_dim, hidden)), nn.ReLU()),
        *(init(nn.Linear(hidden, 84 * 84), 1.0), nn.Unflatten(1, (84, 84))),
    )


DECODERS = {
    "patches of 64 channels": lambda latent_dim: patches(latent_dim, 64),
    "patches of 32 channels": lambda latent_dim: patches(latent_dim, 32),
    "MLP 512 - 7056": lambda latent_dim: mlp(latent_dim, 512),
    "MLP 256 - 7056 (ours)": lambda latent_dim: mlp(latent_dim, 256),
    "mirrored transposed convolutions": mirrored,
}


def agent_with(decoder, num_actions=4, latent_dim=20, num_stack=4, seed=1):
    torch.manual_seed(seed)
    agent = vae_ppo.Agent(num_actions, latent_dim, num_stack)
    if decoder:
        agent.decoder = decoder(latent_dim).to(memory_format=torch.channels_last)
    return agent


def collect(args, seed):
    envs, fire = vae_ppo.make_envs(args)
    args.seed = seed
    games = vae_ppo.Games(envs, fire, vae_ppo.reseed(args, 0, 0))
    frames = vae_ppo.collect_frames(args, games, torch.device("cpu"))
    envs.close()
    return frames


@torch.no_grad()
def held_out_loss(agent, frames):
    torch.manual_seed(0)  # the same z for every decoder
    parts = [vae_ppo.vae_loss(agent, *agent.encode(b), b) for b in frames.split(500)]
    return [statistics.fmean(p[i].item() for p in parts) for i in (0, 1)]


def frames_per_second(agents, frames):
    """Medians of nine rounds in turn: decoder alone, forward and backward, on 128 frames at a time."""
    mu, logvar = (torch.randn(128, 20, requires_grad=True), torch.zeros(128, 20, requires_grad=True))
    times = {name: [] for name in agents}
    for _ in range(10):
        for name, agent in agents.items():
            start = time.perf_counter()
            vae_ppo.vae_loss(agent, mu, logvar, frames[:128])[0].backward()
            times[name].append(time.perf_counter() - start)
    return {name: 128 / statistics.median(t[1:]) for name, t in times.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--policy", help="checkpoint of the policy that plays; without it, chance")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--num-frames", type=int, default=25_000)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    own = parser.parse_args()
    flags = ["--mode", "pretrain", "--num-frames", str(own.num_frames), "--run-name", "unused"]
    args = vae_ppo.parse_args(flags + (["--policy", own.policy] if own.policy else []))
    train = collect(args, seed=1)
    args.num_frames = 5_000
    test = collect(args, seed=2)
    agents, losses = {}, {}
    for name, decoder in DECODERS.items():
        agent = agents[name] = agent_with(decoder)
        parameters = vae_ppo.trainable_parameters(agent, "pretrain")
        optimizer = torch.optim.Adam(parameters, own.learning_rate, eps=1e-5, fused=True)
        for epoch in range(own.epochs):
            torch.manual_seed(epoch)
            vae_ppo.pretrain_epoch(agent, optimizer, train, args)
        losses[name] = held_out_loss(agent, test)
        print(f"{name}: {losses[name]}", file=sys.stderr)
    speed = frames_per_second(agents, test)
    print("| decoder | weights | held-out -E[log p] | held-out KL | L_VAE | decoder frames/s |")
    print("|---|---|---|---|---|---|")
    for name, (recon, kl) in losses.items():
        size = sum(p.numel() for p in agents[name].decoder.parameters()) / 1e6
        print(f"| {name} | {size:.2f}M | {recon:.1f} | {kl:.1f} | {recon + kl:.1f} | {speed[name]:.0f} |")


if __name__ == "__main__":
    main()
