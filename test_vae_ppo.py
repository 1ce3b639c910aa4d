"""What vae_ppo.py promises, one claim per test. Run: python -m pytest -q (a few minutes on two cores)."""

import argparse
import contextlib
import copy
import csv
import functools
import io
import itertools
import math
import os
import pickle
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import warnings
from collections import deque
from pathlib import Path
from types import SimpleNamespace

import ale_py
import cv2
import numpy as np
import pytest
import torch
import torch.nn as nn
from hypothesis import given, settings
from hypothesis import strategies as st

import vae_ppo

settings.register_profile("suite", deadline=None, derandomize=True, database=None, max_examples=25)
settings.load_profile("suite")
torch.set_num_threads(1)
HERE = Path(__file__).resolve().parent
SMALL = "--no-cuda --env-threads 1 --num-envs 2".split()
TINY = [*SMALL, *"--num-steps 16 --segment-length 8 --num-minibatches 2 --update-epochs 1".split()]
TINY_JOINT = ["--mode", "joint", *TINY, "--total-timesteps", "32"]
TINY_VAE = ["--mode", "pretrain", *SMALL, *"--num-frames 160 --vae-epochs 3".split()]


@pytest.fixture(autouse=True)
def alone(tmp_path, monkeypatch):
    """Each test has an empty working folder, so that runs/ is its own, and gives back the signal handlers."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    monkeypatch.chdir(tmp_path)
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def make_args(mode, flags=""):
    """Parsed arguments, in the sizes of `play`."""
    vae = ["--vae", "vae.pt"] if mode in ("fixed", "adapt") else []
    sizes = "--num-envs 3 --num-steps 16 --segment-length 4 --num-minibatches 4" * (mode != "pretrain")
    return vae_ppo.parse_args(["--mode", mode, *vae, *sizes.split(), *flags.split()])


@functools.cache
def new_agent(num_stack, latent_dim, num_actions, seed):  # orthogonal_ takes its time
    torch.manual_seed(seed)
    return vae_ppo.Agent(num_actions, latent_dim, num_stack)


def make_agent(num_stack=4, latent_dim=5, num_actions=3, seed=0):
    agent = copy.deepcopy(new_agent(num_stack, latent_dim, num_actions, seed))
    agent.actor.weight.data *= 100  # far from uniform, so that a wrong stack shows
    return agent


def load(path):
    return torch.load(path, weights_only=True)


def rows_of(folder):
    with Path(folder, "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def same(a, b):
    """Bitwise equality of two state_dicts."""
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def flat(parameters):
    return torch.cat([p.grad.flatten() for p in parameters])


class NoiseEnvs:
    """Random blocks, rewards and ends of episodes, even on reset rows. `seen` keeps all it returned."""

    single_action_space = SimpleNamespace(n=3)

    def __init__(self, num_envs, seed=0, p=0.15):
        self.num_envs, self.rng, self.p = num_envs, np.random.default_rng(seed), p

    def frame(self):
        blocks = self.rng.integers(0, 256, (self.num_envs, 1, 7, 7), dtype=np.uint8)
        return blocks.repeat(12, axis=2).repeat(12, axis=3)

    def reset(self, seed=None):
        obs, self.clock = self.frame(), np.ones(self.num_envs, dtype=np.int32)
        self.seen = [(obs, np.zeros(self.num_envs), *np.zeros((2, self.num_envs), dtype=bool))]
        return obs, {"episode_frame_number": self.clock}

    def step(self, action):
        reward = self.rng.integers(-3, 8, self.num_envs).astype(np.int32)
        terminated, truncated = self.rng.random((2, self.num_envs)) < self.p
        self.clock = self.clock + 4
        self.seen.append((self.frame(), reward, terminated, truncated & ~terminated))
        return *self.seen[-1], {"episode_frame_number": self.clock}

    def close(self):
        pass


def play(agent, T=16, N=3, seed=0, times=1, p=0.15):
    """A Rollout on NoiseEnvs, and the games it is from."""
    games = vae_ppo.Games(NoiseEnvs(N, seed, p), 1, None)
    ro = vae_ppo.Rollout(agent, T, N, torch.device("cpu"))
    torch.manual_seed(seed)
    for _ in range(times):
        vae_ppo.rollout(agent, games, ro)
    return ro, games


def one_minibatch(agent, args, ro):
    """The first minibatch of an update."""
    advantages, returns = vae_ppo.gae(ro.rewards, ro.values, ro.terminated, ro.done, args.gamma, 0.95)
    return next(vae_ppo.minibatches(ro, advantages, returns, args))


# ---- Runs that several tests read ----
@pytest.fixture(scope="module")
def vae_run(tmp_path_factory):
    """The folder of a pretrain run of three epochs."""
    runs = tmp_path_factory.mktemp("vae")
    assert vae_ppo.main([*TINY_VAE, "--runs-dir", str(runs), "--run-name", "vae"]) == 0
    return runs / "vae"


@pytest.fixture(scope="module")
def joint_runs(tmp_path_factory):
    """Folders of joint runs that differ in the seed or in the emulator's threads alone."""
    runs = tmp_path_factory.mktemp("joint")
    for name, seed, threads in (("a", 1, 1), ("b", 1, 2), ("c", 2, 1)):
        flags = f"--total-timesteps 64 --seed {seed} --env-threads {threads} --run-name {name}".split()
        assert vae_ppo.main([*TINY_JOINT, *flags, "--runs-dir", str(runs)]) == 0
    return runs


# ---- Modes ----
LISTED = {
    "pretrain": ("encoder", "mu", "logvar", "decoder"),
    "fixed": ("trunk", "actor", "critic"),
    "adapt": ("encoder", "mu", "trunk", "actor", "critic"),
    "joint": ("encoder", "mu", "logvar", "decoder", "trunk", "actor", "critic"),
}


@pytest.mark.parametrize("mode", LISTED)
def test_a_mode_moves_exactly_its_tensors(mode, vae_run, monkeypatch):
    """After one iteration of a mode its listed tensors have moved and all others are bitwise the same."""
    before, real = {}, vae_ppo.trainable_parameters

    def trainable_parameters(agent, mode):
        before.update(copy.deepcopy(agent.state_dict()))
        return real(agent, mode)

    monkeypatch.setattr(vae_ppo, "trainable_parameters", trainable_parameters)
    vae = ["--vae", str(vae_run / "checkpoint.pt")] if mode in ("fixed", "adapt") else []
    flags = [*TINY_VAE, "--vae-epochs", "1"] if mode == "pretrain" else [*TINY, "--total-timesteps", "32"]
    assert vae_ppo.main(["--mode", mode, *vae, *flags, "--run-name", "r"]) == 0
    saved = load("runs/r/checkpoint.pt")
    after, owned = saved["weights"], saved["optimizer"]["param_groups"][0]["params"]
    moved = {name for name in after if not torch.equal(before[name], after[name])}
    assert len(owned) == len(moved)
    assert moved == {name for name in after if name.split(".")[0] in LISTED[mode]}


@pytest.mark.parametrize("mode", ("fixed", "adapt"))
def test_pretrained_weights_are_handed_on_exactly(mode, vae_run):
    """fixed and adapt begin with the pretrained encoder and decoder, bitwise, and with a fresh policy."""
    args = make_args(mode, f"--vae {vae_run}/checkpoint.pt")
    fresh, agent, saved = (make_agent(4, 20, 4, seed) for seed in (1, 1, 2))
    vae_ppo.load_vae(agent, args)
    saved.load_state_dict(load(args.vae)["weights"])
    for part in ("encoder", "mu", "logvar", "decoder"):
        assert same(getattr(agent, part).state_dict(), getattr(saved, part).state_dict())
    for part in ("trunk", "actor", "critic"):
        assert same(getattr(agent, part).state_dict(), getattr(fresh, part).state_dict())


@pytest.fixture
def joint_step():
    """A joint minibatch: agent, args, minibatch, loss, metrics; backward is done."""
    agent, args = make_agent(), make_args("joint", "--kappa 3 --beta 2 --num-minibatches 1")
    mb = one_minibatch(agent, args, play(agent)[0])
    agent.actor.weight.data *= 1.5  # now the new policy differs from the rollout's
    torch.manual_seed(7)
    loss, metrics = vae_ppo.minibatch_loss(agent, mb, args)
    loss.backward()
    return agent, args, mb, loss, metrics


def test_joint_gradient_is_kappa_ppo_plus_vae(joint_step):
    """In joint the encoder's gradient is kappa * g_ppo + g_vae, each taken alone with the same noise."""
    agent, args, mb, *_ = joint_step
    encoder = [*agent.encoder.parameters(), *agent.mu.parameters()]
    joint = flat(encoder)
    agent.zero_grad()
    vae_ppo.minibatch_loss(agent, mb, argparse.Namespace(**vars(args) | {"mode": "adapt"}))[0].backward()
    ppo = flat(encoder)
    agent.zero_grad()
    frames = mb["frames"][:, 3:].flatten(0, 1)
    torch.manual_seed(7)
    recon, kl = vae_ppo.vae_loss(agent, *agent.encode(frames), frames)
    (recon + 2 * kl).backward()
    vae = flat(encoder)
    assert 3 * ppo.norm() > 1e-3 * vae.norm()  # else the sum would not show it
    torch.testing.assert_close(joint - vae, 3 * ppo, rtol=1e-2, atol=1e-3 * ppo.abs().max().item())
    torch.testing.assert_close(joint, 3 * ppo + vae, rtol=1e-3, atol=1e-4 * vae.abs().max().item())


def test_taps_hold_the_gradients_at_u(joint_step):
    """The taps' gradients are those of kappa * L_PPO and of L_VAE with respect to the latent means."""
    agent, args, mb, *_ = joint_step
    ppo_tap, vae_tap = mb["taps"].grad
    mu, logvar = (x.unflatten(0, mb["frames"].shape[:2]) for x in agent.encode(mb["frames"].flatten(0, 1)))
    features = vae_ppo.stack_features(mu, mb["stack"])
    ppo = args.kappa * vae_ppo.ppo_loss(*agent.policy(features), mb, args)[0]
    torch.manual_seed(7)
    recon, kl = vae_ppo.vae_loss(agent, *(x[:, 3:].flatten(0, 1) for x in (mu, logvar, mb["frames"])))
    (g_ppo,) = torch.autograd.grad(ppo, mu, retain_graph=True)
    (g_vae,) = torch.autograd.grad(recon + args.beta * kl, mu)
    torch.testing.assert_close(ppo_tap, g_ppo)
    torch.testing.assert_close(vae_tap, g_vae)
    assert (g_vae[:, :3] == 0).all() and (g_ppo[:, :3] != 0).any()


def test_logged_gradients_are_norms_at_u_without_kappa():
    """grad/ppo_at_U and grad/vae_at_U are the norms of the two losses' own gradients at U."""
    args = make_args("joint", "--kappa 7 --num-minibatches 1 --update-epochs 1")
    agent = make_agent()
    ro, twin = play(agent)[0], copy.deepcopy(agent)
    optimizer = torch.optim.Adam(agent.parameters(), 1e-3)
    torch.manual_seed(3)
    metrics = vae_ppo.update(agent, optimizer, ro, args)
    torch.manual_seed(3)
    mb = one_minibatch(twin, args, ro)
    vae_ppo.minibatch_loss(twin, mb, args)[0].backward()
    ppo_tap, vae_tap = mb["taps"].grad
    assert metrics["grad/ppo_at_U"] == pytest.approx(ppo_tap.norm().item() / 7, rel=1e-4)
    assert metrics["grad/vae_at_U"] == pytest.approx(vae_tap.norm().item(), rel=1e-4)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # torch's own, of itself
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler on a CPU")
def test_compiled_loss_is_the_eager_one(joint_step, monkeypatch):
    """torch.compile leaves loss and gradients as they are, in one graph; each call draws z anew."""
    agent, args, mb, loss, _ = joint_step
    eager = flat(agent.parameters())
    monkeypatch.setattr(torch._inductor.config, "fallback_random", True)  # the eager generator's numbers
    compiled = torch.compile(vae_ppo.minibatch_loss, fullgraph=True)
    agent.zero_grad()
    torch.manual_seed(7)
    first, metrics = compiled(agent, mb, args)
    first.backward()
    torch.testing.assert_close(first, loss, rtol=1e-4, atol=0)  # sums in another order
    torch.testing.assert_close(
        flat(agent.parameters()), eager, rtol=1e-4, atol=1e-5 * eager.abs().max().item()
    )
    assert compiled(agent, mb, args)[1]["vae/recon_loss"] != metrics["vae/recon_loss"]


# ---- Stacks ----
def slow_policy(agent, seen):
    """Stack, then encode every frame of every stack: log pi and V of each row, by real deques."""
    n = agent.num_stack
    stacks = [deque([frame[0]] * n, n) for frame in seen[0][0]]
    out, reset_row = [], np.zeros(len(stacks), dtype=bool)
    for obs, _, terminated, truncated in seen[1:] + seen[-1:]:  # the last row needs no next one
        frames = torch.from_numpy(np.array(stacks))  # (N, num_stack, 84, 84)
        with torch.no_grad():
            out.append(agent.policy(torch.stack([agent.encode(stack)[0].flatten() for stack in frames])))
        for stack, frame, afresh in zip(stacks, obs[:, 0], reset_row, strict=True):
            stack.extend([frame] * (n if afresh else 1))
        reset_row = terminated | truncated
    return [torch.stack(x) for x in zip(*out, strict=True)]


@pytest.mark.parametrize("num_stack", (1, 4))
def test_encode_once_is_stack_then_encode(num_stack):
    """A rollout's log pi and V are those of real frame stacks, which a reset row starts afresh."""
    agent = make_agent(num_stack)
    ro, games = play(agent, T=20)
    log_probs, values = slow_policy(agent, games.envs.seen)
    assert ro.done.sum() > 5
    torch.testing.assert_close(ro.log_probs, log_probs[:-1], rtol=0, atol=1e-4)
    torch.testing.assert_close(ro.values, values, rtol=0, atol=1e-4)


def test_next_rollout_carries_frames_over():
    """A second rollout, with new weights, sees the first one's last frames in its first stacks."""
    agent = make_agent()
    ro, games = play(agent, T=10, p=0.05)
    agent.load_state_dict(make_agent(seed=9).state_dict())
    vae_ppo.rollout(agent, games, ro)
    log_probs, values = slow_policy(agent, games.envs.seen)
    assert (ro.first[0] < 3).any()  # an episode goes on
    torch.testing.assert_close(ro.log_probs, log_probs[10:-1], rtol=0, atol=1e-4)
    torch.testing.assert_close(ro.values, values[10:], rtol=0, atol=1e-4)


@pytest.mark.parametrize("mode", ("fixed", "adapt", "joint"))
def test_minibatches_see_the_stacks_of_the_rollout(mode, monkeypatch):
    """With the weights of the rollout, an update's log pi and V are the rollout's, row by row."""
    agent, seen, real = make_agent(), [], vae_ppo.ppo_loss

    def ppo_loss(log_probs, value, mb, args):
        seen.append((log_probs, mb["log_probs"], value, mb["values"]))
        return real(log_probs, value, mb, args)

    monkeypatch.setattr(vae_ppo, "ppo_loss", ppo_loss)
    args = make_args(mode)
    ro, _ = play(agent, times=2)
    for mb in vae_ppo.minibatches(ro, *torch.zeros(2, 16, 3), args):
        vae_ppo.minibatch_loss(agent, mb, args)
    assert len(seen) == 4
    for log_probs, old_log_probs, value, old_value in seen:
        torch.testing.assert_close(log_probs, old_log_probs, rtol=0, atol=1e-4)
        torch.testing.assert_close(value, old_value, rtol=0, atol=1e-4)


def test_stack_index_repeats_the_first_frame():
    """A stack is the last num_stack rows, oldest first, and no row before the episode's first."""
    index = vae_ppo.stack_index(torch.tensor([9, 9]), torch.tensor([8, 0]), 4)
    assert index.tolist() == [[8, 8, 8, 9], [6, 7, 8, 9]]


def test_permuting_frames_permutes_blocks_of_u():
    """The frames of a stack share the encoder: in another order, they permute U's blocks."""
    agent, order = make_agent(), [2, 0, 3, 1]
    frames = torch.from_numpy(NoiseEnvs(4).frame()[:, 0])
    index = torch.arange(4)[None, None]
    u, permuted = (vae_ppo.stack_features(agent.encode(x)[0][None], index) for x in (frames, frames[order]))
    torch.testing.assert_close(permuted.view(4, 5), u.view(4, 5)[order])
    torch.testing.assert_close(u.view(4, 5), agent.encode(frames)[0])


# ---- GAE ----
def test_gae_by_hand():
    """GAE gives the numbers of a pencil: going on, truncated (bootstrapped) and terminated (not)."""
    rewards, values = torch.tensor([[1.0], [2], [3]]), torch.tensor([[1.0], [2], [3], [4]])
    no, at_1 = torch.zeros(3, 1), torch.tensor([[0.0], [1], [0]])
    cases = (no, no, [1.5, 2, 2]), (no, at_1, [1.375, 1.5, 2]), (at_1, at_1, [1, 0, 2])
    for terminated, done, expected in cases:
        advantages, returns = vae_ppo.gae(rewards, values, terminated, done, 0.5, 0.5)
        assert advantages.flatten().tolist() == expected
        assert returns.flatten().tolist() == [a + v for a, v in zip(expected, (1, 2, 3), strict=True)]


@given(st.integers(1, 12), st.integers(1, 3), st.floats(0, 1), st.floats(0, 1), st.integers(0, 10**6))
def test_gae_is_the_quadratic_sum(T, N, gamma, lam, seed):
    """On every row but a reset row, GAE is its O(T^2) definition over the row's own episode alone."""
    rng = np.random.default_rng(seed)
    rewards, values = rng.normal(size=(T, N)), rng.normal(size=(T + 1, N))
    terminated, truncated = rng.random((2, T, N)) < 0.2
    done = terminated | truncated
    reset_row = np.vstack([np.zeros((1, N), dtype=bool), done[:-1]])
    noisy = np.where(reset_row, 1e6, rewards)  # what a reset row pays belongs to nobody
    tensors = (torch.tensor(x, dtype=torch.float64) for x in (noisy, values, terminated, done))
    advantages = vae_ppo.gae(*tensors, gamma, lam)[0].numpy()
    for t, n in itertools.product(range(T), range(N)):
        expected = 0.0
        for k in range(t, T):
            bootstrap = 0.0 if terminated[k, n] else gamma * values[k + 1, n]
            expected += (gamma * lam) ** (k - t) * (rewards[k, n] + bootstrap - values[k, n])
            if done[k, n]:
                break
        if not reset_row[t, n]:
            assert advantages[t, n] == pytest.approx(expected, abs=1e-9)


# ---- PPO loss ----
def ppo(probability, old=0.5, advantage=1.0, value=0.0, old_value=0.0, ret=0.0, flags=""):
    """L_PPO of rows with two actions, of which the first was taken, all valid; lists give several rows."""
    p, old, advantage, value, old_value, ret = torch.broadcast_tensors(
        *(torch.tensor(x, dtype=torch.float64) for x in (probability, old, advantage, value, old_value, ret))
    )
    mb = {"valid": torch.ones_like(p), "actions": torch.zeros_like(p, dtype=torch.long), "values": old_value}
    mb |= {"advantages": advantage, "returns": ret, "log_probs": torch.stack([old, 1 - old], -1).log()}
    args = make_args("joint", f"--no-norm-adv --clip-coef 0.2 --ent-coef 0 --vf-coef 0 {flags}")
    return vae_ppo.ppo_loss(torch.stack([p, 1 - p], -1).log(), value, mb, args)


QUADRANTS = [(2, 0.75, -2.4), (2, 0.25, -1.0), (-2, 0.75, 3.0), (-2, 0.25, 1.6)]


@pytest.mark.parametrize("advantage, probability, loss", QUADRANTS)
def test_ppo_loss_in_each_clip_quadrant(advantage, probability, loss):
    """With ratios 1.5 and 0.5 and epsilon 0.2, -J_clip is the literal of its quadrant."""
    total, metrics = ppo([probability], advantage=[advantage])
    assert total.item() == pytest.approx(loss)
    assert metrics["losses/policy_loss"].item() == pytest.approx(loss)
    assert metrics["losses/clipfrac"].item() == 1


@pytest.mark.parametrize("flags, l_v", [("--clip-vloss", 1.62), ("--no-clip-vloss", 0.5)])
def test_value_loss_by_hand(flags, l_v):
    """V moving from 1 to 2 under a return of 3 costs half of 1.8^2 clipped at 0.2, half of 1 unclipped."""
    total, metrics = ppo([0.5], value=[2.0], old_value=1.0, ret=3.0, flags=flags + " --vf-coef 0.25")
    assert metrics["losses/value_loss"].item() == pytest.approx(l_v)
    assert total.item() == pytest.approx(-1 + 0.25 * l_v)


def test_entropy_is_rewarded():
    """The entropy of two equal actions is ln 2, and the loss falls by ent_coef times it."""
    total, metrics = ppo([0.5], flags="--ent-coef 0.1")
    assert metrics["losses/entropy"].item() == pytest.approx(math.log(2))
    assert total.item() == pytest.approx(-1 - 0.1 * math.log(2))


def test_advantages_are_normalised():
    """Advantages 2 and 6 become -1 and 1: with ratios 0.9 and 1.1, J_clip is 0.1."""
    total, _ = ppo([0.45, 0.55], advantage=[2.0, 6.0], flags="--norm-adv")
    assert total.item() == pytest.approx(-0.1)


def random_minibatch(seed=0, rows=40, actions=3):
    """log pi of the network now (a leaf), V now (a leaf), and a minibatch with rows to be masked."""
    g = torch.Generator().manual_seed(seed)
    old, new = torch.randn(2, rows, actions, generator=g, dtype=torch.float64).log_softmax(-1)
    numbers = torch.randn(4, rows, generator=g, dtype=torch.float64)
    mb = dict(zip(("advantages", "returns", "values"), numbers[:3], strict=True)) | {"log_probs": old}
    mb["actions"] = torch.randint(actions, (rows,), generator=g)
    mb["valid"] = (torch.rand(rows, generator=g) < 0.6).double()
    return new.requires_grad_(), numbers[3].clone().requires_grad_(), mb


def test_masked_rows_have_no_influence():
    """Whatever stands in the masked rows, the loss, its metrics and its gradient are the same."""
    args, results = make_args("joint"), []
    for other in (False, True):
        log_probs, value, mb = random_minibatch()
        if other:
            masked, (log_probs2, value2, mb2) = mb["valid"] == 0, random_minibatch(1)
            for key in ("advantages", "returns", "values", "log_probs", "actions"):
                mb[key][masked] = mb2[key][masked] * (1 if key in ("actions", "log_probs") else 50)
            log_probs.data[masked], value.data[masked] = log_probs2.data[masked], value2.data[masked]
        loss, metrics = vae_ppo.ppo_loss(log_probs, value, mb, args)
        loss.backward()
        results.append((loss, log_probs.grad, value.grad, *metrics.values()))
    assert all(map(torch.equal, *results))


def test_categorical_kl_is_that_of_torch():
    """approx_kl is KL(old || new) in closed form, as torch.distributions has it."""
    log_probs, value, mb = random_minibatch()
    old, new = (torch.distributions.Categorical(logits=x) for x in (mb["log_probs"], log_probs))
    expected = torch.distributions.kl_divergence(old, new)[mb["valid"] > 0].mean()
    metrics = vae_ppo.ppo_loss(log_probs, value, mb, make_args("joint"))[1]
    assert metrics["losses/approx_kl"].item() == pytest.approx(expected.item())


# ---- VAE loss ----
def test_vae_kl_by_hand():
    """KL is exactly 10 nats at mu = 1, logvar = 0 in 20 dimensions."""
    frames = torch.zeros(3, 84, 84, dtype=torch.uint8)
    assert vae_ppo.vae_loss(make_agent(4, 20), torch.ones(3, 20), torch.zeros(3, 20), frames)[1].item() == 10


@pytest.mark.parametrize("logit, white, nats", [(0, 0.5, math.log(2)), (3, 1, 0.0485874), (3, 0, 3.0485874)])
def test_reconstruction_by_hand(logit, white, nats):
    """The reconstruction term sums the pixels' cross-entropies: 84 * 84 * ln 2 where every p is 0.5."""
    agent, frames = make_agent(), torch.zeros(3, 84, 84, dtype=torch.uint8)
    nn.init.zeros_(agent.decoder[-2].weight)
    nn.init.constant_(agent.decoder[-2].bias, logit)
    frames[:, : int(84 * white)] = 255
    recon, _ = vae_ppo.vae_loss(agent, torch.ones(3, 5), torch.zeros(3, 5), frames)
    assert recon.item() == pytest.approx(84 * 84 * nats, rel=1e-5)


def test_latents_are_sampled():
    """The decoder gets z of mean mu and standard deviation exp(logvar / 2)."""
    agent, seen = make_agent(), []
    agent.decoder.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    mu, std = (
        torch.tensor([-2.0, 0, 1, 2, 3]).expand(500, 5),
        torch.tensor([0.1, 0.5, 1, 2, 3]).expand(500, 5),
    )
    with torch.no_grad():
        vae_ppo.vae_loss(agent, mu, 2 * std.log(), torch.zeros(500, 84, 84, dtype=torch.uint8))
    assert ((seen[0].mean(0) - mu[0]).abs() < 0.15 * std[0]).all()
    assert (seen[0].std(0) / std[0] - 1).abs().max() < 0.1


# ---- Update ----
def learn(flags, lr=1e-3):
    """One update of 16 minibatches in adapt mode. Returns metrics, number of Adam steps, weights."""
    args, agent = (
        make_args("adapt", flags),
        make_agent(),
    )
    ro, _ = play(agent)
    optimizer = torch.optim.Adam(agent.parameters(), lr)
    torch.manual_seed(5)
    metrics = vae_ppo.update(agent, optimizer, ro, args)
    steps = max([int(state["step"]) for state in optimizer.state.values()], default=0)
    return metrics, steps, agent.state_dict()


@pytest.mark.parametrize("lr, flags, stops", [(0.1, "", 1), (1e-9, "", 0), (0.1, "--target-kl 0", 0)])
def test_kl_stop(lr, flags, stops):
    """A huge learning rate ends the update early, a tiny one never, and neither does a target of 0."""
    metrics, steps, _ = learn(flags, lr)
    assert metrics["losses/kl_stop"] == stops
    assert metrics["losses/updates"] == steps
    assert 0 < steps < 16 if stops else steps == 16


def test_kl_stop_comes_before_the_update():
    """A minibatch whose KL is past the target is not learnt from: here the second, so one step is applied."""
    metrics, steps, weights = learn("--target-kl 1e-5", 0.01)
    assert metrics["losses/approx_kl"] > 1e-5
    assert (steps, metrics["losses/updates"]) == (1, 1)
    args, agent = make_args("adapt"), make_agent()
    ro, _ = play(agent)
    optimizer = torch.optim.Adam(agent.parameters(), 0.01)
    torch.manual_seed(5)
    mb = one_minibatch(agent, args, ro)
    vae_ppo.apply_gradient(optimizer, vae_ppo.minibatch_loss(agent, mb, args)[0], args.max_grad_norm)
    assert same(weights, agent.state_dict())


def test_gradient_is_clipped():
    """A gradient longer than max_grad_norm is shortened to it; 0 leaves it alone; its norm is logged."""
    for limit, length in ((0.5, 0.5), (0.0, 5.0), (9.0, 5.0)):
        weight = nn.Parameter(torch.zeros(2))
        loss = (weight * torch.tensor([3.0, 4.0])).sum()
        logged = vae_ppo.apply_gradient(torch.optim.SGD([weight], 1.0), loss, limit)
        assert weight.norm().item() == pytest.approx(length, rel=1e-4)
        assert logged["grad/norm"].item() == pytest.approx(5)


def test_learns_from_the_sign_of_rewards():
    """The rollout holds the sign of each raw reward and the ends of episodes as the games gave them."""
    ro, games = play(make_agent())
    _, reward, terminated, truncated = map(np.array, zip(*games.envs.seen[1:], strict=True))
    assert abs(reward).max() > 1
    assert np.array_equal(ro.rewards.numpy(), np.sign(reward))
    assert np.array_equal(ro.terminated.numpy(), terminated)
    assert np.array_equal(ro.done.numpy(), terminated | truncated)
    assert np.array_equal(ro.reset_row[1:].numpy(), terminated | truncated)


@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), st.integers(0, 9), st.data())
def test_minibatches_cover_each_step_once(L, segments, N, seed, data):
    """An epoch has every (t, env) once, with that row's own contents, frames and validity."""
    T = L * segments
    count = data.draw(st.sampled_from([m for m in range(1, segments * N + 1) if segments * N % m == 0]))
    ro = vae_ppo.Rollout(make_agent(3), T, N, torch.device("cpu"))
    ids = torch.arange(T * N).view(T, N)
    ro.actions[:], ro.log_probs[:], ro.values[:T] = ids, ids[..., None], ids
    ro.frames[:] = torch.arange((T + 3) * N).view(T + 3, N, 1, 1)
    generator = torch.Generator().manual_seed(seed)
    ro.reset_row[:] = torch.rand(T + 1, N, generator=generator) < 0.3
    ro.first[:] = (torch.rand(T + 1, N, generator=generator) * (torch.arange(T + 1)[:, None] + 3)).long()
    args, seen = make_args("joint", f"--num-steps {T} --segment-length {L} --num-minibatches 1"), []
    args.num_minibatches = count
    batches = list(vae_ppo.minibatches(ro, ids.float(), ids.float(), args))
    for mb in batches:
        rows = mb["actions"]
        for key in ("advantages", "returns", "values"):
            assert torch.equal(mb[key], rows.float())
        assert torch.equal(mb["log_probs"], rows.float()[..., None].expand(-1, -1, 3))
        assert torch.equal(mb["valid"], 1.0 - ro.reset_row[:T].flatten()[rows].float())
        for b, step in itertools.product(range(len(rows)), range(L)):
            (t, n), stack = divmod(rows[b, step].item(), N), mb["frames"][b, mb["stack"][b, step], 0, 0]
            assert stack.tolist() == [max(t + k, ro.first[t, n].item()) * N + n for k in range(3)]
        seen += rows.flatten().tolist()
    assert sorted(seen) == list(range(T * N))
    assert len(batches) == count and len({mb["actions"].shape for mb in batches}) == 1


# ---- Environment ----
@pytest.fixture(scope="module")
def breakout():
    """800 steps of 4 real games, whose player never serves: a list of one dict of arrays per step."""
    envs, fire = vae_ppo.make_envs(make_args("joint", "--num-envs 4 --env-threads 1 --runs-dir none"))
    games, log, real, rng = vae_ppo.Games(envs, fire, np.arange(4)), [], envs.step, np.random.default_rng(0)

    def step(action):
        obs, reward, terminated, truncated, info = out = real(action)
        log.append({"sent": action.copy(), "obs": obs[:, 0].copy(), "reward": reward, "done": terminated})
        log[-1] |= {"lives": info["lives"], "clock": info["episode_frame_number"], "trunc": truncated}
        return out

    envs.step = step
    for _ in range(800):
        games.step(rng.choice([0, 2, 3], 4))
    envs.close()
    return games, log


def pairs(log):
    """(step, next step, game) at each end of a life or a game."""
    return [(a, b, n) for a, b in itertools.pairwise(log) for n in np.flatnonzero(a["done"])]


def test_a_lost_life_ends_the_episode_and_fire_serves(breakout):
    """After each lost life comes a reset row with FIRE, in the same game, and no other row has FIRE."""
    _, log = breakout
    lost = [(a, b, n) for a, b, n in pairs(log) if a["lives"][n] > 0]
    assert len(lost) > 20
    for a, b, n in lost:
        assert b["sent"][n] == 1 and b["lives"][n] == a["lives"][n] and not b["done"][n]
        assert b["clock"][n] == a["clock"][n] + 4
    for a, b in itertools.pairwise(log):
        assert np.array_equal(b["sent"] == 1, a["done"])
        assert (a["done"] | (b["lives"] == a["lives"]) | b["done"]).all()


def test_a_served_game_goes_on_to_its_last_life(breakout):
    """Games are lost life by life, five to none, which needs a serve after each."""
    lives = [a["lives"][n] for n in range(4) for a in breakout[1] if a["done"][n]]
    assert len(lives) > 20
    assert set(itertools.pairwise(lives)) >= {(4, 3), (3, 2), (2, 1), (1, 0), (0, 4)}


def test_a_new_game_follows_a_game_over(breakout):
    """The row after a game over pays nothing and returns the first frame of a game of five lives."""
    over = [(b, n) for a, b, n in pairs(breakout[1]) if a["lives"][n] == 0]
    assert len(over) > 4
    for b, n in over:
        assert b["reward"][n] == 0 and b["lives"][n] == 5 and b["clock"][n] <= 30 and not b["done"][n]


def test_scores_are_those_of_whole_games(breakout):
    """`scores` has the sum of raw rewards of every finished game, all five lives, in order."""
    games, log = breakout
    total, scores = np.zeros(4), []
    for step, last in zip(log, [None, *log], strict=False):
        for n in np.flatnonzero(last["done"] & (last["lives"] == 0)) if last else ():
            scores.append(total[n])
            total[n] = 0
        total += step["reward"]
    assert list(games.scores) == scores and sum(scores) > 0


def test_rewards_are_raw_and_fire_may_be_missing():
    """A dot in Ms. Pac-Man, which has no FIRE, pays its raw 10, and NOOP stands in for FIRE."""
    envs, fire = vae_ppo.make_envs(make_args("joint", "--env-id ALE/MsPacman-v5 --num-envs 1"))
    games = vae_ppo.Games(envs, fire, np.array([0]))
    rewards = {int(games.step(np.array([3]))[1][0]) for _ in range(100)}
    assert fire == 0 and 10 in rewards


def test_preprocessing_is_that_of_opencv():
    """Frames equal, to the pixel, skip 4, max of the last two, grey and INTER_AREA on raw ALE screens."""
    envs, fire = vae_ppo.make_envs(make_args("joint", "--num-envs 2"))
    obs, info = envs.reset(seed=np.array([5, 6]))
    actions = np.random.default_rng(0).integers(0, 4, (60, 2))
    steps = [envs.step(action) for action in actions]
    frames = np.stack([obs, *(step[0] for step in steps)])[:, :, 0]
    noops = info["episode_frame_number"]
    assert len(set(noops)) == 2
    for n in range(2):
        ale = ale_py.ALEInterface()
        ale.setLoggerMode(ale_py.LoggerMode.Error)
        ale.setFloat("repeat_action_probability", 0.0)
        ale.loadROM(ale_py.roms.get_rom_path("breakout"))
        ale.reset_game()
        buttons, screens = ale.getMinimalActionSet(), []
        for button in [buttons[fire]] + [buttons[0]] * (noops[n] - 1):
            ale.act(button)
        expected = [ale.getScreenGrayscale()]
        for action in actions[:, n]:
            for _ in range(4):
                ale.act(buttons[action])
                screens.append(ale.getScreenGrayscale())
            expected.append(np.maximum(*screens[-2:]))
        for frame, screen in zip(frames[:, n], expected, strict=True):
            assert np.array_equal(frame, cv2.resize(screen, (84, 84), interpolation=cv2.INTER_AREA))


class SquareEnvs:
    """A bright square at the left, middle or right; naming its place pays 1; eight steps make a game."""

    single_action_space = SimpleNamespace(n=3)

    def __init__(self, num_envs):
        self.num_envs, self.rng = num_envs, np.random.default_rng(0)

    def look(self):
        self.place = self.rng.integers(0, 3, self.num_envs)
        obs = np.zeros((self.num_envs, 1, 84, 84), dtype=np.uint8)
        for n, place in enumerate(self.place):
            obs[n, 0, 30:50, 28 * place + 4 : 28 * place + 24] = 255
        return obs

    def reset(self, seed=None):
        self.age = np.zeros(self.num_envs, dtype=np.int32)
        return self.look(), {"episode_frame_number": self.age}

    def step(self, action):
        new_game = self.age == 8  # this step is ignored
        reward = np.where(new_game, 0, action == self.place).astype(np.int32)
        self.age = np.where(new_game, 0, self.age + 1)
        return self.look(), reward, self.age == 8, np.zeros_like(new_game), {"episode_frame_number": self.age}

    def close(self):
        pass


def test_joint_learns_a_small_visual_task(monkeypatch):
    """In some thousand steps joint learns to name the square's place: 8 of 8, where chance has 2.7."""
    monkeypatch.setattr(vae_ppo, "make_envs", lambda args: (SquareEnvs(args.num_envs), 0))
    flags = """--mode joint --no-cuda --run-name square --num-envs 8 --num-steps 16 --segment-length 8
        --num-minibatches 2 --update-epochs 2 --gamma 0.5 --num-stack 2 --latent-dim 8 --target-kl 0
        --total-timesteps 3072 --no-anneal-lr"""
    assert vae_ppo.main(flags.split()) == 0
    assert sum(load("runs/square/checkpoint.pt")["scores"][-16:]) > 6 * 16


# ---- Runs ----
def test_equal_seeds_are_bitwise_equal(joint_runs):
    """Equal seeds give bitwise equal weights and logs, whatever the number of emulator threads."""
    a, b = (load(joint_runs / name / "checkpoint.pt") for name in "ab")
    assert same(a["weights"], b["weights"])
    for x, y in zip(rows_of(joint_runs / "a"), rows_of(joint_runs / "b"), strict=True):
        assert x | {"charts/SPS": ""} == y | {"charts/SPS": ""}


def test_another_seed_differs(joint_runs):
    """Another seed gives other weights, and draws other games and noise in its first iteration."""
    assert not same(*(load(joint_runs / name / "checkpoint.pt")["weights"] for name in "ac"))
    assert rows_of(joint_runs / "a")[0]["vae/kl"] != rows_of(joint_runs / "c")[0]["vae/kl"]


def test_no_two_processes_or_iterations_share_seeds():
    """Seeds of games and torch differ between runs, processes and iterations, and repeat on demand."""
    args, seen = make_args("joint"), []
    for args.seed, rank, iteration in itertools.product((1, 2), range(3), range(3)):
        again = vae_ppo.reseed(args, rank, iteration).tolist()
        seen += [*vae_ppo.reseed(args, rank, iteration).tolist(), torch.initial_seed()]
        assert seen[-4:-1] == again
    assert len(set(seen)) == 18 * 4 and min(seen) >= 0 and max(seen) < 2**31


def stop_in_iteration(number, monkeypatch, sig=signal.SIGINT):
    """Send this process a signal in the middle of the numbered iteration. Returns the list of calls."""
    real, calls = vae_ppo.update, []

    def update(agent, optimizer, *inputs):
        states = agent.state_dict(), optimizer.state_dict()
        calls.append((copy.deepcopy(states), optimizer.param_groups[0]["lr"]))
        if len(calls) == number:
            os.kill(os.getpid(), sig)
        return real(agent, optimizer, *inputs)

    monkeypatch.setattr(vae_ppo, "update", update)
    return calls


def test_stop_and_resume_go_on_where_they_were(monkeypatch):
    """A run stopped in its second of four iterations saves, and resumed has its weights, moments, schedule,
    counters and scores, without a gap or a repeat in metrics.csv."""
    calls = stop_in_iteration(2, monkeypatch)
    flags = [*TINY_JOINT, "--total-timesteps", "128", "--run-name", "r", "--learning-rate", "0.004"]
    assert vae_ppo.main(flags) == 130
    saved = load("runs/r/checkpoint.pt")
    saved["scores"] = [3.0, 4.0]
    torch.save(saved, "runs/r/checkpoint.pt")
    assert (saved["iteration"], saved["global_step"]) == (2, 64)
    assert vae_ppo.main(["--mode", "joint", "--run-name", "r", "--resume"]) == 0
    (weights, optimizer), _ = calls[2]
    assert same(weights, saved["weights"])
    assert optimizer["state"].keys() == saved["optimizer"]["state"].keys() != set()
    for key, state in optimizer["state"].items():
        assert same(state, saved["optimizer"]["state"][key])
    rows = rows_of("runs/r")
    assert [int(row["global_step"]) for row in rows] == [32, 64, 96, 128]
    assert [float(row["charts/learning_rate"]) for row in rows] == pytest.approx([4e-3, 3e-3, 2e-3, 1e-3])
    assert [lr for _, lr in calls] == pytest.approx([4e-3, 3e-3, 2e-3, 1e-3])
    assert load("runs/r/checkpoint.pt")["scores"][:2] == [3, 4]
    assert float(rows[2]["charts/episodic_return"]) == 3.5


def test_two_resumes_of_a_checkpoint_are_bitwise_equal(joint_runs):
    """From equal checkpoints the next updates are bitwise equal, for one and two emulator threads."""
    ends = []
    for name in ("x", "y"):
        shutil.copytree(joint_runs / "a", f"runs/{name}")
        threads = ["--env-threads", str(1 + len(ends))]
        flags = ["--mode", "joint", "--resume", "--run-name", name, "--total-timesteps", "96", *threads]
        assert vae_ppo.main(flags) == 0
        ends.append(load(f"runs/{name}/checkpoint.pt"))
    a, b = ends
    assert a["global_step"] == b["global_step"] == 96 and a["scores"] == b["scores"]
    assert same(a["weights"], b["weights"])
    assert a["optimizer"]["state"].keys() == b["optimizer"]["state"].keys() != set()
    assert all(same(a["optimizer"]["state"][k], b["optimizer"]["state"][k]) for k in a["optimizer"]["state"])


def test_resume_drops_rows_after_the_checkpoint():
    """Rows that a killed run logged after its checkpoint, and half a row, are gone when it is resumed."""
    assert vae_ppo.main([*TINY_JOINT, "--run-name", "r"]) == 0
    with open("runs/r/metrics.csv", "a") as file:
        file.write("64" + "," * (len(vae_ppo.COLUMNS) - 1) + "\n9")
    assert vae_ppo.main([*TINY_JOINT, "--run-name", "r", "--resume", "--total-timesteps", "96"]) == 0
    rows = rows_of("runs/r")
    assert [int(row["global_step"]) for row in rows] == [32, 64, 96]
    assert all(row["vae/kl"] for row in rows)


def test_resumed_pretraining_is_bitwise_the_uninterrupted(vae_run):
    """Pretraining resumed after its first epoch ends with the weights and losses of a run never stopped."""
    flags = [*TINY_VAE, "--run-name", "r", "--vae-epochs"]
    assert vae_ppo.main([*flags, "1"]) == 0
    assert vae_ppo.main([*flags, "3", "--resume"]) == 0
    assert same(*(load(Path(run, "checkpoint.pt"))["weights"] for run in ("runs/r", vae_run)))
    losses = [[row["vae/recon_loss"] for row in rows_of(run)] for run in ("runs/r", vae_run)]
    assert losses[0] == losses[1]


def test_pretraining_lowers_the_loss(vae_run):
    """Each epoch of pretraining has a lower L_VAE than the one before."""
    losses = [float(row["vae/recon_loss"]) + float(row["vae/kl"]) for row in rows_of(vae_run)]
    assert len(losses) == 3 and losses[2] < losses[1] < losses[0]


@pytest.mark.parametrize("policy", (True, False))
def test_pretraining_frames_are_those_of_its_player(policy, monkeypatch, joint_runs):
    """The frames are the games' own, num_frames of them; --policy plays them, or all actions alike likely."""
    envs, players, real = NoiseEnvs(2), [], vae_ppo.rollout
    args = make_args("pretrain", f"--num-envs 2 --num-frames 15 --policy {joint_runs}/a/checkpoint.pt")
    if not policy:
        args.policy = None
    monkeypatch.setattr(vae_ppo, "rollout", lambda *args: (players.append(args), real(*args)))
    envs.single_action_space = SimpleNamespace(n=4)
    frames = vae_ppo.collect_frames(args, vae_ppo.Games(envs, 1, None), torch.device("cpu"))
    seen = np.concatenate([step[0][:, 0] for step in envs.seen])
    assert np.array_equal(frames.numpy(), seen[:15])
    player, _, ro = players[0]
    if policy:
        assert same(player.state_dict(), load(args.policy)["weights"])
    else:
        torch.testing.assert_close(ro.log_probs.exp(), torch.full_like(ro.log_probs, 0.25))


def test_a_failed_save_keeps_the_old_checkpoint(joint_runs, monkeypatch):
    """A disk that fills up while saving leaves the old checkpoint bitwise intact, and no other file."""
    path, agent = Path("checkpoint.pt"), make_agent()
    optimizer, args = torch.optim.Adam(agent.parameters()), make_args("joint")
    vae_ppo.save_checkpoint(path, agent, optimizer, args, 1, 32, [1.0])
    old = path.read_bytes()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError):
        vae_ppo.save_checkpoint(path, agent, optimizer, args, 2, 64, [2.0])
    assert path.read_bytes() == old and os.listdir() == ["checkpoint.pt"]


def test_nan_loss_keeps_the_last_good_checkpoint(monkeypatch, capsys):
    """A loss that is not finite ends the run with 2 and a sentence; checkpoint and log stay as they were."""
    path, real, kept = Path("runs/r/checkpoint.pt"), vae_ppo.vae_loss, []

    def vae_loss(agent, mu, logvar, frames):
        recon, kl = real(agent, mu, logvar, frames)
        if not path.exists():
            return recon, kl
        kept.append(path.read_bytes())
        return recon * math.nan, kl

    monkeypatch.setattr(vae_ppo, "vae_loss", vae_loss)
    flags = "--run-name r --checkpoint-every 1 --total-timesteps 128".split()
    assert vae_ppo.main([*TINY_JOINT, *flags]) == 2
    assert "iteration 2: " in capsys.readouterr().err.splitlines()[-1]
    assert path.read_bytes() == kept[0]
    assert [row["global_step"] for row in rows_of("runs/r")] == ["32"]


@pytest.mark.parametrize("column, ill", [("losses/entropy", 0.001), ("losses/updates", 1), ("vae/kl", 0.001)])
def test_a_symptom_is_said_once(column, ill, tmp_path, capsys):
    """Ten iterations in a row of no entropy, of a KL stop at once, or of a dead VAE: one warning, ever."""
    log = vae_ppo.Log(tmp_path, 0, 100)
    for step, (value, said) in enumerate(
        [(ill, 0)] * 9 + [(9, 0)] + [(ill, 0)] * 9 + [(ill, 1), (9, 1)] + [(ill, 1)] * 12
    ):
        log.write({"global_step": step, column: value})
        if said == 0:
            assert "warning" not in capsys.readouterr().err
    assert capsys.readouterr().err.count(f"warning: {column}") == 1
    vae_ppo.Log(tmp_path, 99, 100).write({"global_step": 100})  # a column without a value is no symptom
    assert "warning" not in capsys.readouterr().err


def test_a_signal_saves_and_ends_the_run():
    """Ctrl-C, or SIGTERM, to a running program has it save a checkpoint and exit with 130, or 143."""
    flags, runs = [*TINY_JOINT, "--total-timesteps", "1000000", "--run-name"], {}
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    for sig in (signal.SIGINT, signal.SIGTERM):
        command = [sys.executable, str(HERE / "vae_ppo.py"), *flags, sig.name]
        runs[sig] = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    for sig, process in runs.items():
        log = Path("runs", sig.name, "metrics.csv")
        while process.poll() is None and not (log.exists() and rows_of(log.parent)):
            time.sleep(0.1)
        process.send_signal(sig)
        errors = process.communicate(timeout=120)[1]
        assert process.returncode == 128 + sig and "Traceback" not in errors
        steps = load(log.parent / "checkpoint.pt")["global_step"]
        assert steps == int(rows_of(log.parent)[-1]["global_step"])


# ---- Data parallel ----
def on_rank(rank, port, data):
    """One of two processes: a gradient of L_PPO on its half of the data, and a run of one iteration."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    torch.set_num_threads(1)
    kept, real = {}, vae_ppo.update

    def update(*inputs):
        metrics, agent, ro = real(*inputs), inputs[0], inputs[2]
        kept.update(weights=agent.state_dict(), frames=ro.frames.clone(), metrics=metrics)
        return metrics

    vae_ppo.update = update
    kept["code"] = vae_ppo.main([*TINY_JOINT, "--total-timesteps", "64", "--run-name", "two"])
    log_probs, value, mb = data
    half = slice(rank * 10, 10 + rank * 30)  # 10 and 30 rows
    mb = {key: x[half] for key, x in mb.items()}
    log_probs, value = (x[half].detach().requires_grad_() for x in (log_probs, value))
    loss, metrics = vae_ppo.ppo_loss(log_probs, value, mb, make_args("joint", "--run-name other"))
    loss.backward()
    kept |= {"grad": (log_probs.grad, value.grad), "loss": vae_ppo.mean_over_ranks(loss.detach())}
    torch.save(kept, f"rank{rank}.pt")


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """What `on_rank` kept in each of two processes."""
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as s, contextlib.chdir(folder):
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
        s.close()
        torch.multiprocessing.spawn(on_rank, (port, random_minibatch()), nprocs=2)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(2)]


def test_two_processes_end_with_equal_weights(two_ranks):
    """Two processes that play different games have bitwise equal weights after an iteration."""
    a, b = two_ranks
    assert a["code"] == b["code"] == 0
    assert not torch.equal(a["frames"], b["frames"])
    assert a["metrics"]["losses/updates"] == 2 and same(a["weights"], b["weights"])


def test_two_process_gradient_is_that_of_all_data(two_ranks):
    """The mean of two processes' L_PPO and gradients is that of one process with the data of both."""
    log_probs, value, mb = random_minibatch()
    loss, _ = vae_ppo.ppo_loss(log_probs, value, mb, make_args("joint"))
    loss.backward()
    for i, x in enumerate((log_probs, value)):
        torch.testing.assert_close(torch.cat([rank["grad"][i] for rank in two_ranks]) / 2, x.grad)
    assert two_ranks[0]["loss"].item() == pytest.approx(loss.item())


def test_a_killed_process_ends_the_others():
    """When one process is killed, the other ends with one sentence and exit code 2, and does not hang."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(s.getsockname()[1]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(HERE / "vae_ppo.py"), *TINY_JOINT, "--total-timesteps", "1000000"]
    command += ["--run-name", "ranks"]
    processes = [
        subprocess.Popen(
            command,
            env=os.environ | where | {"RANK": str(rank), "WORLD_SIZE": "2"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    while processes[0].poll() is None and not (
        Path("runs/ranks/metrics.csv").exists() and rows_of("runs/ranks")
    ):
        time.sleep(0.1)
    processes[1].kill()
    errors = processes[0].communicate(timeout=60)[1]
    processes[1].communicate()
    assert processes[0].returncode == 2
    assert "another process" in errors.splitlines()[-1] and "Traceback" not in errors


# ---- Bad input ----
def refused(argv, capsys, *words):
    """main(argv) exits with 2 and one line on stderr that has the words, and touches nothing on disk."""
    files = {path: path.is_file() and path.read_bytes() for path in Path().rglob("*")}
    capsys.readouterr()
    with warnings.catch_warnings(record=True) as shown, pytest.MonkeyPatch.context() as patch:
        patch.delattr(vae_ppo, "rollout")  # what is not refused must not train for hours
        assert vae_ppo.main(list(map(str, argv))) == 2
    (line,) = [*capsys.readouterr().err.splitlines(), *shown]  # outside pytest, warnings go there, too
    assert line.startswith("vae_ppo.py: error: ")
    for word in words:
        assert str(word) in line
    assert files == {path: path.is_file() and path.read_bytes() for path in Path().rglob("*")}


class Malicious:
    def __reduce__(self):
        return os.system, ("touch harm-done",)


def saved(x):
    torch.save(x, buffer := io.BytesIO())
    return buffer.getvalue()


DAMAGED = {
    "empty": lambda good: b"",
    "truncated": lambda good: good[: len(good) // 2],
    "garbage": lambda good: np.random.default_rng(0).bytes(5000),
    "pickle": lambda good: pickle.dumps(Malicious()),
    "torch": lambda good: saved({"args": Malicious()}),
    "foreign": lambda good: saved({"state_dict": {}}),
    "list": lambda good: saved([1, 2]),
}


def reading(flag, path):
    """A command that reads the checkpoint at `path` by `flag`."""
    mode = {"--resume": "joint", "--vae": "adapt", "--policy": "pretrain"}[flag]
    sizes = TINY if mode == "adapt" else SMALL
    value = ["--run-name", path.parent.name] if flag == "--resume" else [path, *sizes, "--run-name", "new"]
    return ["--mode", mode, flag, *value]


@pytest.mark.parametrize("damage", DAMAGED)
@pytest.mark.parametrize("flag", ("--vae", "--policy", "--resume"))
def test_a_damaged_checkpoint_is_refused(flag, damage, joint_runs, capsys):
    """A damaged, foreign or malicious checkpoint is named and refused, and nothing in it is executed."""
    path = Path("runs/old/checkpoint.pt")
    path.parent.mkdir(parents=True)
    path.write_bytes(DAMAGED[damage]((joint_runs / "a/checkpoint.pt").read_bytes()))
    refused(reading(flag, path), capsys, path)


WRONG = [
    ("iteration", "x"),
    ("iteration", 1.5),
    ("global_step", None),
    ("scores", "abc"),
    ("scores", [["x"]]),
]
WRONG += [("weights", []), ("weights", {}), ("optimizer", 3), ("optimizer", {"state": {}}), ("args", [1])]
WRONG_ARGS = [("num_envs", "x"), ("num_envs", -1), ("num_envs", [1]), ("num_envs", 10**30), ("gamma", 1.5)]
WRONG_ARGS += [("latent_dim", 7), ("latent_dim", 10**9), ("env_id", 5), ("mode", 7), ("kappa", math.nan)]


@pytest.mark.parametrize("key, value", WRONG + WRONG_ARGS)
def test_a_checkpoint_with_a_wrong_value_is_refused(key, value, joint_runs, capsys):
    """Resuming a checkpoint with a value of wrong type, shape or size says so, and harms nothing."""
    checkpoint = load(joint_runs / "a/checkpoint.pt")
    (checkpoint["args"] if (key, value) in WRONG_ARGS else checkpoint)[key] = value
    Path("runs/old").mkdir(parents=True)
    torch.save(checkpoint, "runs/old/checkpoint.pt")
    refused(reading("--resume", Path("runs/old/checkpoint.pt")), capsys)


@given(
    st.lists(st.tuples(st.sampled_from(("head", "tail", "all")), st.floats(0, 1), st.integers(0, 7))),
    st.data(),
)
def test_no_damage_to_a_checkpoint_gives_a_traceback(joint_runs, flips, data):
    """Whatever bits of a checkpoint are flipped and wherever it ends, it is read or refused."""
    good = bytearray((joint_runs / "a/checkpoint.pt").read_bytes())
    for where, place, bit in flips:
        low, high = {"head": (0, 9000), "tail": (len(good) - 9000, len(good)), "all": (0, len(good))}[where]
        good[min(int(low + place * (high - low)), len(good) - 1)] ^= 1 << bit
    length = data.draw(st.sampled_from((len(good), len(good) - 1, len(good) // 2, 100)))
    path = joint_runs / "fuzzed.pt"
    path.write_bytes(good[:length])
    with contextlib.suppress(vae_ppo.UserError), warnings.catch_warnings(action="ignore"):
        vae_ppo.load_checkpoint(path)


@pytest.mark.parametrize("flag", ("--vae", "--policy", "--resume"))
def test_a_missing_checkpoint_is_refused(flag, capsys):
    """A checkpoint, or a run to resume, that is not there is named."""
    refused(reading(flag, Path("runs/old/checkpoint.pt")), capsys, "runs/old")


@pytest.mark.parametrize(
    "flag, change, words",
    [
        ("--vae", {}, ["--mode joint", "pretrain"]),
        ("--vae", {"mode": "pretrain", "env_id": "ALE/Pong-v5"}, ["ALE/Pong-v5", "ALE/Breakout-v5"]),
        ("--vae", {"mode": "pretrain"}, ["--vae", "fit"]),  # it has another latent_dim
        ("--policy", {"mode": "pretrain"}, ["--mode pretrain", "joint"]),
        ("--policy", {"env_id": "ALE/Pong-v5"}, ["ALE/Pong-v5", "ALE/Breakout-v5"]),
        ("--resume", {"mode": "adapt"}, ["mode", "adapt", "joint"]),
        ("--resume", {"latent_dim": 9}, ["checkpoint.pt", "fit"]),
    ],
)
def test_a_checkpoint_of_another_kind_is_refused(flag, change, words, joint_runs, capsys):
    """A checkpoint of another mode, game or size is refused, and the message says which it is of."""
    path = Path("runs/old/checkpoint.pt")
    path.parent.mkdir(parents=True)
    checkpoint = load(joint_runs / "a/checkpoint.pt")
    checkpoint["args"] |= change
    torch.save(checkpoint, path)
    latent = ["--latent-dim", 6] if "fit" in words and flag == "--vae" else []
    refused([*reading(flag, path), *latent], capsys, *words)


JOINT, FIXED, PRETRAIN = (["--mode", mode] for mode in ("joint", "fixed", "pretrain"))
BAD = [
    ([], ["--mode"]),
    (["--mode", "both"], ["both", "joint"]),
    ([*JOINT, "--env-id", "ALE/Breakot-v5"], ["Breakot", "Did you mean: `Breakout`"]),
    ([*JOINT, "--env-id", "CartPole-v1"], ["CartPole-v1", "ALE/Breakout-v5"]),
    ([*JOINT, "--env-id", "ALE/Breakout"], ["ALE/Breakout"]),
    ([*JOINT, "--env-id", "nothing:Breakout-v5"], ["nothing"]),
    (FIXED, ["--vae"]),
    (["--mode", "adapt"], ["--vae"]),
    ([*JOINT, "--vae", "x"], ["--vae", "joint"]),
    ([*JOINT, "--policy", "x"], ["--policy", "joint"]),
    ([*FIXED, "--vae", "x", "--policy", "x"], ["--policy", "fixed"]),
    ([*FIXED, "--vae", "x", "--kappa", "1"], ["--kappa", "fixed"]),
    ([*PRETRAIN, "--gamma", "1"], ["--gamma", "pretrain"]),
    ([*JOINT, "--num-frames", "10"], ["--num-frames", "joint"]),
    ([*JOINT, "--learning-rate", "-1"], ["--learning-rate", "-1"]),
    ([*JOINT, "--learning-rate", "nan"], ["--learning-rate", "nan"]),
    ([*JOINT, "--kappa", "inf"], ["--kappa", "inf"]),
    ([*JOINT, "--gamma", "1.5"], ["--gamma", "1.5"]),
    ([*JOINT, "--ent-coef", "-0.1"], ["--ent-coef", "-0.1"]),
    ([*JOINT, "--num-envs", "0"], ["--num-envs", "0"]),
    ([*JOINT, "--num-envs", "two"], ["--num-envs", "two"]),
    ([*JOINT, "--seed", "-1"], ["--seed", "-1"]),
    ([*JOINT, "--seed", "9999999999"], ["--seed", "9999999999"]),
    ([*JOINT, "--num-steps", "100"], ["--segment-length", "100"]),
    ([*JOINT, "--num-minibatches", "7"], ["--num-minibatches", "64"]),
    ([*JOINT, "--total-timesteps", "2047"], ["--total-timesteps", "2048"]),
    ([*JOINT, "--frames", "1"], ["--frames"]),
    ([*JOINT, "--resume"], ["--resume"]),
    ([*TINY_JOINT, "--runs-dir", "file"], ["file"]),
    ([*TINY_JOINT, "--runs-dir", "file/below"], ["file"]),
]


@pytest.mark.parametrize("argv, words", BAD, ids=[" ".join(argv)[:60] for argv, _ in BAD])
def test_bad_input_is_refused(argv, words, capsys):
    """What makes no sense ends with exit code 2 and one sentence that names it."""
    Path("file").write_text("a regular file")
    refused(argv, capsys, *words)


def test_compile_without_a_compiler_is_refused(monkeypatch, capsys):
    """--compile says which compiler is missing."""
    monkeypatch.setattr(shutil, "which", lambda name: None)
    refused([*JOINT, "--compile"], capsys, "--compile", "g++")


@pytest.mark.parametrize(
    "argv, words",
    [
        ([], ["runs/a exists", "--resume"]),
        (["--resume", "--latent-dim", "9"], ["latent", "20", "9"]),
        (["--resume", "--seed", "9"], ["seed", "1", "9"]),
    ],
)
def test_an_existing_run_is_kept(argv, words, joint_runs, capsys):
    """An existing run is neither overwritten nor resumed with another setting, which is named."""
    Path("runs/a").mkdir(parents=True)
    Path("runs/a/checkpoint.pt").write_bytes((joint_runs / "a/checkpoint.pt").read_bytes())
    refused([*JOINT, "--run-name", "a", *argv], capsys, *words)


FLAGS = [option for action in vae_ppo.build_parser()._actions for option in action.option_strings]
VALUES = st.sampled_from("-1 0 1 2 3 16 0.5 1e999 nan -inf joint pretrain fixed ALE/Pong-v5 x. --".split())


@given(st.lists(st.one_of(st.sampled_from(FLAGS), VALUES, st.text(max_size=8)), max_size=6), st.booleans())
def test_any_command_line_is_read_or_refused(words, joint):
    """Whatever the command line, parse_args returns a Namespace, raises UserError, or has shown the help."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        try:
            args = vae_ppo.parse_args(JOINT * joint + words)
            assert isinstance(args, argparse.Namespace) and args.num_envs >= 1 and 0 <= args.gamma <= 1
        except vae_ppo.UserError as error:
            assert str(error)
        except SystemExit as stop:
            assert stop.code == 0 and "--kappa" in out.getvalue()


# ---- README ----
def commands():
    """The arguments of every call of vae_ppo.py in the README's code blocks and in the script's docstring."""
    blocks = re.findall(r"^```.*?\n(.*?)^```", (HERE / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    lines = "\n".join([*blocks, vae_ppo.__doc__]).replace("\\\n", " ").splitlines()
    calls = (re.split("vae_ppo.py (?=-)", line)[-1] for line in lines if "vae_ppo.py -" in line)
    return [shlex.split(re.split("&&|;", call)[0], comments=True) for call in calls]


def test_readme_commands_parse():
    """Every command of the README and of the script's docstring is one that the script takes."""
    modes = {vae_ppo.build_parser().parse_args(argv).mode for argv in commands()}
    assert modes == {"pretrain", "fixed", "adapt", "joint"}


def test_readme_map_names_the_right_lines():
    """Each row of the README's map of the file names a section's first line and its last."""
    script = (HERE / "vae_ppo.py").read_text().splitlines()
    rows = re.findall(r"^\| (.+?) \| (\d+)-(\d+) \|", (HERE / "README.md").read_text(), re.MULTILINE)
    starts = [i for i, line in enumerate(script, 1) if line.startswith("# ---- ")]
    assert [(f"# ---- {name} ----", int(a)) for name, a, _ in rows] == [(script[i - 1], i) for i in starts]
    assert [int(b) for *_, b in rows] == [i - 3 for i in starts[1:]] + [len(script)]
