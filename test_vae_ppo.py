"""What vae_ppo.py promises, one claim per test, in the order of its sections."""

import contextlib
import copy
import csv
import functools
import itertools
import os
import re
import runpy
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from pathlib import Path
from types import SimpleNamespace

import ale_py
import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils._python_dispatch import TorchDispatchMode

import vae_ppo

settings.register_profile("suite", deadline=None, derandomize=True, database=None, max_examples=25)
settings.load_profile("suite")
torch.set_num_threads(1)
HERE = Path(__file__).resolve().parent
ENDLESS = "--total-timesteps 1000000 --checkpoint-every 1"
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture(autouse=True)
def alone(tmp_path, monkeypatch):
    """Each test has an empty working folder, so that runs/ is its own."""
    monkeypatch.chdir(tmp_path)


def tiny(mode, flags="", name="r", vae="vae.pt"):
    """The command line of a run of a second: one iteration, or three epochs of pretraining."""
    sizes = "--num-steps 16 --num-minibatches 2 --update-epochs 1 --total-timesteps 32"
    if mode == "pretrain":
        sizes = "--num-frames 160 --vae-epochs 3"
    if mode in ("fixed", "adapt", "draw"):
        sizes += f" --vae {vae}"
    common = f"--mode {mode} --no-cuda --env-threads 1 --num-envs 2 --run-name {name}"
    return f"{common} {sizes} {flags}".split()


def make_args(mode, flags=""):
    return vae_ppo.parse_args(tiny(mode, flags))


def run(argv, signals=()):
    """Train. Returns the exit code or the sentence that ended it, or None."""
    try:
        vae_ppo.train(vae_ppo.parse_args(argv), signals)
    except SystemExit as stop:
        return stop.code


def refused(argv, capsys, *words):
    """argv is refused in one sentence that has the words, before anything is played or written."""
    before = {path: path.is_file() and path.read_bytes() for path in Path().rglob("*")}
    with pytest.MonkeyPatch.context() as patch:
        patch.delattr(vae_ppo, "rollout")
        problem = run(argv)
    if problem == 2:
        usage, problem = capsys.readouterr().err.splitlines()
        assert usage.startswith("usage: ") and ": error: " in problem
    assert "\n" not in problem
    assert [word for word in words if word not in problem] == []
    assert before == {path: path.is_file() and path.read_bytes() for path in Path().rglob("*")}


def load(folder):
    return torch.load(Path(folder, "checkpoint.pt"), weights_only=True)


def rows_of(folder):
    path = Path(folder, "metrics.csv")
    return list(csv.DictReader(path.open())) if path.exists() else []


def steps_of(folder):
    return [int(row["global_step"]) for row in rows_of(folder)]


def same(a, b):
    """Bitwise equality of two state_dicts."""
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def spy(monkeypatch, name, before):
    """Has `before` see the inputs of each call of a function of vae_ppo.py, which goes on."""
    real = getattr(vae_ppo, name)

    def spied(*inputs):
        before(*inputs)
        return real(*inputs)

    monkeypatch.setattr(vae_ppo, name, spied)


# ---- Arguments ----
BAD = [  # flags, and words of the sentence
    ("--mode fixed", "--vae pretrain"),
    ("--mode joint --learning-rate -1", "--learning-rate -1"),
    ("--mode joint --kappa 0", "--kappa 1e-06"),
    ("--mode joint --gamma 1.5", "--gamma 1.5"),
    ("--mode joint --gae-lambda 1.01", "--gae-lambda 1.01"),
    ("--mode joint --clip-coef nan", "--clip-coef nan"),
    ("--mode joint --num-envs 5000 --total-timesteps 1", "--num-envs 4096"),
    ("--mode joint --num-steps 100 --num-minibatches 2", "--segment-length --num-steps"),
    ("--mode joint --total-timesteps 2047", "--total-timesteps 2048"),
    ("--mode joint --run-name none --resume", "runs/none --resume"),
    ("--mode joint --run-name old", "runs/old new --resume --run-name"),
    ("--mode joint --env-id ALE/Breakot-v5", "Breakot ALE/Breakout-v5"),
    ("--mode joint --env-id CartPole-v1", "CartPole-v1 ALE/Breakout-v5"),
    ("--mode joint --num-envs 2 --num-minibatches 2 --runs-dir file/below", "file"),
    ("--mode joint --run-name .. --resume", "--run-name new"),
]


@pytest.mark.parametrize("flags, words", BAD)
def test_bad_input_is_refused(flags, words, capsys):
    """What makes no sense is refused in one sentence that names it."""
    Path("file").write_text("a regular file")
    Path("runs/old").mkdir(parents=True)
    refused(flags.split(), capsys, *words.split())


def test_a_new_mode_takes_the_flags_of_its_groups_alone(monkeypatch, capsys):
    """A mode `train` with the flag group "vae" needs --vae, and takes no flag of `pretrain`."""
    monkeypatch.setitem(vae_ppo.MODES, "train", vae_ppo.MODES["fixed"])
    refused("--mode train".split(), capsys, "train", "--vae")
    refused("--mode train --vae x --num-frames 10".split(), capsys, "train", "--num-frames")


# ---- Model ----
@functools.cache
def new_agent(num_stack, latent_dim, num_actions, seed):  # orthogonal_ takes its time
    torch.manual_seed(seed)
    return vae_ppo.Agent(num_actions, latent_dim, num_stack)


def make_agent(num_stack=4, latent_dim=5, num_actions=3, seed=0):
    agent = copy.deepcopy(new_agent(num_stack, latent_dim, num_actions, seed))
    agent.actor.weight.data *= 100  # far from uniform, so that a wrong stack shows
    return agent


def noise(*shape, rng):
    """Frames (*shape, 84, 84) uint8 of random blocks."""
    return rng.integers(0, 256, (*shape, 7, 7), dtype=np.uint8).repeat(12, -2).repeat(12, -1)


# ---- Losses ----
def vae_loss_of(logit, frames, mu, logvar, beta=1.0):
    """L_VAE and metrics with a decoder whose logits are all the same; and the z that it got."""
    samples = []

    def decoder(z):
        samples.append(z)
        return torch.full((*z.shape[:-1], 84, 84), float(logit))

    agent, args = SimpleNamespace(decoder=decoder), SimpleNamespace(beta=beta)
    return *vae_ppo.vae_loss(agent, frames, mu, logvar, args), *samples


VAE_BY_HAND = [  # logit, share of white pixels, mu, variance, nats of a pixel, KL
    (0, 0.5, 0.0, 1, np.log(2), 0),
    (3, 0.0, 0.0, 1, 3.0485874, 0),
    (0, 0.5, 1.0, 1, np.log(2), 10),
    (0, 0.5, 0.0, 4, np.log(2), 30 - 10 * np.log(4)),
]


@pytest.mark.parametrize("logit, white, mu, var, nats, kl", VAE_BY_HAND)
def test_vae_loss_by_hand(logit, white, mu, var, nats, kl):
    """L_VAE sums over 84 * 84 pixels and 20 latents, is a mean over frames, and beta weighs it."""
    frames = torch.zeros(3, 2, 84, 84, dtype=torch.uint8)
    frames[..., : int(84 * white)] = 255
    mu, logvar = torch.full((3, 2, 20), mu), torch.full((3, 2, 20), np.log(var)).requires_grad_()
    l_vae, metrics, _ = vae_loss_of(logit, frames, mu, logvar, beta=3.0)
    assert metrics["vae/recon_loss"].item() == pytest.approx(84 * 84 * nats, rel=1e-5)
    assert metrics["vae/kl"].item() == pytest.approx(kl, abs=1e-5)
    assert l_vae.item() == pytest.approx(84 * 84 * nats + 3 * kl, rel=1e-5)
    assert torch.autograd.grad(l_vae, logvar)[0].sum().item() == pytest.approx(30 * (var - 1), 1e-4)


def test_latents_are_sampled():
    """The decoder gets z of mean mu and standard deviation exp(logvar / 2), with its gradient."""
    mu, std = torch.tensor([[-2.0, 0, 1, 2, 3], [0.1, 0.5, 1, 2, 3]])
    torch.manual_seed(0)
    logvar = (2 * std.log()).expand(500, 5).requires_grad_()
    *_, z = vae_loss_of(0, torch.zeros(500, 84, 84), mu.expand(500, 5), logvar)
    assert ((z.mean(0) - mu).abs() < 0.15 * std).all()
    assert (z.std(0) / std - 1).abs().max() < 0.1
    assert torch.allclose(2 * torch.autograd.grad(z.sum(), logvar)[0], z - mu, atol=1e-5)


def ppo(flags, probability, advantage=1.0, value=0.0, old_value=0.0, ret=0.0):
    """L_PPO and metrics of steps that took the first of two actions, once equally likely."""
    numbers = (probability, advantage, value, old_value, ret)
    tensors = [torch.tensor(x, dtype=torch.float64) for x in numbers]
    p, advantages, value, values, returns = torch.broadcast_tensors(*tensors)
    mb = {"actions": torch.zeros_like(p, dtype=torch.long), "values": values, "returns": returns}
    mb |= {"logits": torch.zeros(*p.shape, 2, dtype=torch.float64), "advantages": advantages}
    mb["reset_row"] = torch.zeros_like(p, dtype=torch.bool)
    args = make_args("joint", f"--no-norm-adv --clip-coef 0.2 --ent-coef 0 --vf-coef 0 {flags}")
    return vae_ppo.ppo_loss(torch.stack([p, 1 - p], -1).log(), value, mb, args)


PPO_BY_HAND = [  # flags, steps, parts of the loss, L_PPO
    # With ratios 1.5 and 0.5 and epsilon 0.2, J_clip is the smaller of ratio and clipped ratio,
    # and the KL is 0.5 * ln(0.5 / 0.75) + 0.5 * ln(0.5 / 0.25).
    ("", [0.75, 2.0], {"policy_loss": -2.4, "clipfrac": 1, "approx_kl": 0.143841}, -2.4),
    ("", [0.25, 2.0], {"policy_loss": -1.0, "clipfrac": 1}, -1.0),
    ("", [0.75, -2.0], {"policy_loss": 3.0, "clipfrac": 1}, 3.0),
    ("", [0.25, -2.0], {"policy_loss": 1.6, "clipfrac": 1}, 1.6),
    # V moved from 1 to 2: L_V is half of the larger of its squared error and that of 1.2.
    ("--vf-coef 0.25", [0.5, 1, 2, 1, 3], {"value_loss": 1.62}, -1 + 0.25 * 1.62),
    ("--vf-coef 0.25", [0.5, 1, 2, 1, 0], {"value_loss": 2.0}, -1 + 0.25 * 2),
    ("--vf-coef 0.25 --no-clip-vloss", [0.5, 1, 2, 1, 3], {"value_loss": 0.5}, -1 + 0.25 * 0.5),
    ("--ent-coef 0.1", [0.75], {"entropy": 0.5623351}, -1.2 - 0.1 * 0.5623351),
    # Advantages 2 and 6 become -1 and 1: with ratios 0.9 and 1.1, J_clip is 0.1.
    ("--norm-adv", [[0.45, 0.55], [2, 6]], {"policy_loss": -0.1, "clipfrac": 0}, -0.1),
]


@pytest.mark.parametrize("flags, steps, parts, loss", PPO_BY_HAND)
def test_ppo_loss_by_hand(flags, steps, parts, loss):
    """L_PPO and its parts are the numbers of a pencil."""
    total, metrics = ppo(flags, *steps)
    assert total.item() == pytest.approx(loss)
    for name, number in parts.items():
        assert metrics[f"losses/{name}"].item() == pytest.approx(number)


def random_minibatch(steps=40):
    """Logits and V of the networks now (leaves), and a minibatch of which some steps are masked."""
    g = torch.Generator().manual_seed(0)
    logits, old = torch.randn(2, steps, 3, generator=g, dtype=torch.float64)
    value, *numbers = torch.randn(4, steps, generator=g, dtype=torch.float64)
    mb = dict(zip(("advantages", "returns", "values", "logits"), [*numbers, old], strict=True))
    mb["actions"] = torch.randint(3, (steps,), generator=g)
    mb["reset_row"] = torch.rand(steps, generator=g) < 0.4
    return logits.requires_grad_(), value.clone().requires_grad_(), mb


def test_masked_steps_have_no_influence():
    """Reset rows change neither loss, metrics nor gradient; alone, they cost 0, not NaN."""
    args = make_args("joint")
    results = []
    for other in (1, 50):
        logits, value, mb = random_minibatch()
        for x in (logits.data, value.data, *(x for x in mb.values() if x.is_floating_point())):
            x[mb["reset_row"]] *= other
        mb["actions"][mb["reset_row"]] = other % 3
        loss, metrics = vae_ppo.ppo_loss(logits, value, mb, args)
        loss.backward()
        results.append((loss, logits.grad, value.grad, *metrics.values()))
    assert all(map(torch.equal, *results))
    logits, value, mb = random_minibatch()
    assert torch.autograd.gradcheck(lambda *x: vae_ppo.ppo_loss(*x, mb, args)[0], (logits, value))
    mb["reset_row"][:] = True
    loss, _ = vae_ppo.ppo_loss(logits, value, mb, args)
    loss.backward()
    assert loss == 0 and (logits.grad == 0).all() and (value.grad == 0).all()


# ---- Modes ----
@pytest.fixture(scope="module")
def vae_run(tmp_path_factory):
    """The folder of a pretrain run of three epochs."""
    folder = tmp_path_factory.mktemp("vae")
    assert run([*tiny("pretrain", name="vae"), "--runs-dir", str(folder)]) is None
    return folder / "vae"


TRAINED = {
    "pretrain": {"encoder", "mu", "logvar", "decoder"},
    "fixed": {"trunk", "actor", "critic"},
    "adapt": {"encoder", "mu", "trunk", "actor", "critic"},
    "joint": {"encoder", "mu", "logvar", "decoder", "trunk", "actor", "critic"},
    "draw": {"decoder", "trunk", "actor", "critic"},  # a copier's mode
}


@pytest.mark.parametrize("mode", TRAINED)
def test_a_mode_moves_exactly_its_networks(mode, vae_run, monkeypatch):
    """A run moves its mode's networks alone; a mode with --vae begins with the VAE, bitwise."""
    draw = vae_ppo.Mode(("decoder", *vae_ppo.POLICY), 1e-3, ("run", "vae", "L_VAE", "L_PPO"))
    monkeypatch.setitem(vae_ppo.MODES, "draw", draw)
    flags = "--seed 2" if mode == "pretrain" else "--seed 2 --num-stack 2"
    args = vae_ppo.parse_args(tiny(mode, flags, vae=vae_run / "checkpoint.pt"))
    begun = copy.deepcopy(vae_ppo.make_agent(args, 4, "cpu")[0].state_dict())
    fresh = new_agent(args.num_stack, 20, 4, 2).state_dict()
    vae_ppo.train(args)
    pretrained, saved = load(vae_run)["weights"], load("runs/r")
    for name, x in begun.items():
        network = name.split(".")[0]
        handed_on = mode not in ("pretrain", "joint") and network in TRAINED["pretrain"]
        assert torch.equal(x, (pretrained if handed_on else fresh)[name])
        assert torch.equal(x, saved["weights"][name]) == (network not in TRAINED[mode])
    (group,) = saved["optimizer"]["param_groups"]
    assert len(group["params"]) == sum(name.split(".")[0] in TRAINED[mode] for name in fresh)
    assert (group["lr"], group["eps"]) == (vae_ppo.MODES[mode].learning_rate, 1e-5)


class NoiseEnvs:
    """Random blocks, rewards and ends of episodes, even on reset rows."""

    single_action_space = SimpleNamespace(n=3)

    def __init__(self, num_envs, seed=0, p=0.15):
        self.num_envs, self.p = num_envs, p
        self.rng = np.random.default_rng(seed)

    def frame(self):
        return noise(self.num_envs, 1, rng=self.rng)

    def reset(self, seed=None):
        self.clock = np.ones(self.num_envs, dtype=np.int32)
        no = np.zeros(self.num_envs, dtype=bool)
        self.seen, self.sent = [(self.frame(), no * 0, no, no)], []
        return self.seen[0][0], {"episode_frame_number": self.clock}

    def step(self, action):
        reward = self.rng.integers(-3, 8, self.num_envs).astype(np.int32)
        terminated, truncated = self.rng.random((2, self.num_envs)) < self.p
        self.clock = self.clock + 4
        self.sent.append(action)
        self.seen.append((self.frame(), reward, terminated, truncated & ~terminated))
        return *self.seen[-1], {"episode_frame_number": self.clock}


def play(agent, T=16, N=3, seed=0, times=1, p=0.15):
    """A Buffer filled on NoiseEnvs, and the games it is from."""
    games = vae_ppo.Games(NoiseEnvs(N, seed, p), 1, None)
    buffer = vae_ppo.Buffer(agent, T, N)
    torch.manual_seed(seed)
    for _ in range(times):
        vae_ppo.rollout(agent, games, buffer)
    return buffer, games


def first_minibatch(buffer, args):
    """The segments of the first minibatch of an update, which has advantages and returns."""
    vae_ppo.gae(buffer, args.gamma, args.gae_lambda)
    return next(vae_ppo.minibatches(buffer, args))


def test_joint_gradient_is_kappa_ppo_plus_vae():
    """The encoder's gradient is kappa * g_ppo + g_vae, and those of either loss at U are logged."""
    agent = make_agent()
    args = make_args("joint", "--kappa 3 --beta 2 --num-minibatches 1")
    buffer, _ = play(agent)
    segments = first_minibatch(buffer, args)
    agent.actor.weight.data *= 1.5  # now the policy differs from the rollout's
    weights = [*agent.encoder.parameters(), *agent.mu.parameters()]
    torch.manual_seed(7)
    loss, metrics = vae_ppo.minibatch_loss(agent, buffer, segments, args)
    loss.backward()
    mb = vae_ppo.gather(buffer, segments, args.segment_length)
    frames = buffer.frames[mb["rows"]]
    mu, logvar = agent.encode(frames)
    logits, value = agent.policy(vae_ppo.stack_features(mu, mb["stack"]))
    l_ppo, _ = vae_ppo.ppo_loss(logits, value, mb, args)
    torch.manual_seed(7)
    l_vae, _ = vae_ppo.vae_loss(agent, frames[3:], mu[3:], logvar[3:], args)
    alone = []
    for name, l_x in (("grad/ppo_at_U", l_ppo), ("grad/vae_at_U", l_vae)):
        g_u, *g = torch.autograd.grad(l_x, [mu, *weights], retain_graph=True)
        torch.testing.assert_close(metrics[name], g_u.norm(), rtol=1e-4, atol=0)
        assert g_u[:3].any() == (l_x is l_ppo)  # earlier frames learn from L_PPO alone
        alone.append(torch.cat([x.flatten() for x in g]))
    joint = torch.cat([p.grad.flatten() for p in weights])
    g_ppo, g_vae = alone
    assert 3 * g_ppo.norm() > 1e-3 * g_vae.norm()  # else the sum would not show it
    atol = 1e-3 * g_ppo.abs().max().item()
    torch.testing.assert_close(joint - g_vae, 3 * g_ppo, rtol=1e-2, atol=atol)


def naive_loss(agent, buffer, segments, args):
    """Joint's loss the plain way: encode and decode all the num_stack frames of each step."""
    mb = vae_ppo.gather(buffer, segments, args.segment_length)
    game = torch.arange(len(segments))[:, None]
    stacks = buffer.frames[mb["rows"]][mb["stack"], game]  # (L, B, num_stack, 84, 84)
    hidden = agent.encoder(stacks.flatten(0, 2)[:, None] / 255).unflatten(0, stacks.shape[:3])
    mu, logvar = agent.mu(hidden), agent.logvar(hidden)
    logits, value = agent.policy(mu.flatten(-2))
    l_ppo, metrics = vae_ppo.ppo_loss(logits, value, mb, args)
    l_vae, _ = vae_ppo.vae_loss(agent, stacks, mu, logvar, args)
    return args.kappa * l_ppo + l_vae, metrics


@pytest.mark.parametrize("num_stack", (1, 4))
def test_joint_has_the_loss_of_the_plain_way(num_stack):
    """Encoding a frame once is encoding all stacks (where L_VAE has frames more than once)."""
    agent = make_agent(num_stack)
    buffer, _ = play(agent)
    args = make_args("joint", f"--num-stack {num_stack}")
    segments = first_minibatch(buffer, args)
    agent.actor.weight.data *= 1.5  # now the policy differs from the rollout's
    torch.manual_seed(0)
    loss, metrics = vae_ppo.minibatch_loss(agent, buffer, segments, args)
    torch.manual_seed(0)
    plain_loss, plain_metrics = naive_loss(agent, buffer, segments, args)
    if num_stack == 1:
        torch.testing.assert_close(loss, plain_loss)
    for name, x in plain_metrics.items():
        torch.testing.assert_close(metrics[name], x, rtol=1e-4, atol=1e-5)


# ---- Environment ----
@pytest.fixture(scope="module")
def breakout():
    """800 steps of 4 real games: games, steps, and (step, next step, game) at ends of a life."""
    args = make_args("joint", "--num-envs 4 --total-timesteps 64 --runs-dir none")
    envs, serve = vae_ppo.make_envs(args)
    games = vae_ppo.Games(envs, serve, np.arange(4))
    log = []
    real = envs.step

    def step(action):
        obs, reward, terminated, truncated, info = real(action)
        log.append({"sent": action.copy(), "reward": reward, "done": terminated, **info})
        return obs, reward, terminated, truncated, info

    envs.step = step
    rng = np.random.default_rng(0)
    for _ in range(800):
        games.step(rng.choice([0, 2, 3], 4))
    envs.close()
    pairs = itertools.pairwise(log)
    return games, log, [(a, b, n) for a, b in pairs for n in np.flatnonzero(a["done"])]


def test_a_lost_life_ends_the_episode_and_fire_serves(breakout):
    """After each lost life the same game goes on with FIRE; after the last, a new game begins."""
    _, log, ends = breakout
    lives = [a["lives"][n] for n in range(4) for a in log if a["done"][n]]
    assert set(itertools.pairwise(lives)) >= {(4, 3), (3, 2), (2, 1), (1, 0), (0, 4)}
    for a, b, n in ends:
        assert b["sent"][n] == 1 and not b["done"][n]
        if a["lives"][n] > 0:
            assert b["lives"][n] == a["lives"][n]
            assert b["episode_frame_number"][n] == a["episode_frame_number"][n] + 4
        else:
            assert b["reward"][n] == 0 and b["lives"][n] == 5
            assert b["episode_frame_number"][n] <= 30
    for a, b in itertools.pairwise(log):
        assert np.array_equal(b["sent"] == 1, a["done"])


def test_scores_are_those_of_whole_games(breakout):
    """Scores are sums of raw rewards over whole games, five lives: of the last 100 games."""
    games, log, _ = breakout
    total, scores = np.zeros(4), []
    for step in log[:-1]:
        total += step["reward"]
        for n in np.flatnonzero(step["done"] & (step["lives"] == 0)):
            scores.append(total[n])
            total[n] = 0
    assert list(games.scores) == scores and sum(scores) > 0
    assert list(vae_ppo.Games(NoiseEnvs(2), 1, None, range(150)).scores) == list(range(50, 150))


def test_rewards_are_raw_and_fire_may_be_missing():
    """A dot in Ms. Pac-Man, which has no FIRE, pays its raw 10. Actions stick only if asked."""
    envs, serve = vae_ppo.make_envs(make_args("joint", "--env-id ALE/MsPacman-v5 --num-envs 1"))
    games = vae_ppo.Games(envs, serve, np.array([0]))
    rewards = [int(games.step(np.array([3]))[0][0]) for _ in range(100)]
    assert serve == 0 and 10 in rewards and games.score == sum(rewards)
    assert envs.spec.kwargs["repeat_action_probability"] == 0
    envs, _ = vae_ppo.make_envs(make_args("joint", "--repeat-action-probability 0.25"))
    assert envs.spec.kwargs["repeat_action_probability"] == 0.25


def test_preprocessing_is_that_of_opencv():
    """Frames equal, to the pixel, skip 4, max of two, grey and INTER_AREA on raw ALE screens."""
    envs, serve = vae_ppo.make_envs(make_args("joint", "--num-envs 2"))
    obs, info = envs.reset(seed=np.array([5, 6]))
    actions = np.random.default_rng(0).integers(0, 4, (60, 2))
    frames = np.stack([obs, *(envs.step(action)[0] for action in actions)])[:, :, 0]
    for n, first in enumerate(info["episode_frame_number"] - 1):
        ale = ale_py.ALEInterface()
        ale.setFloat("repeat_action_probability", 0.0)
        ale.loadROM(ale_py.roms.get_rom_path("breakout"))
        ale.reset_game()
        screens = []
        for button in [serve] + [0] * first + actions[:, n].repeat(4).tolist():
            ale.act(ale.getMinimalActionSet()[button])
            screens.append(ale.getScreenGrayscale())
        pairs = zip(screens[first + 3 :: 4], screens[first + 4 :: 4], strict=True)
        expected = [screens[first], *(np.maximum(a, b) for a, b in pairs)]
        for frame, screen in zip(frames[:, n], expected, strict=True):
            assert np.array_equal(frame, cv2.resize(screen, (84, 84), interpolation=cv2.INTER_AREA))


# ---- Rollout and GAE ----
def slow_policy(agent, seen):
    """Stack, then encode every frame of every stack: log pi and V of each step, by real deques."""
    n = agent.num_stack
    stacks = [deque([frame[0]] * n, n) for frame in seen[0][0]]
    reset_row = np.zeros(len(stacks), dtype=bool)
    log_probs, values = [], []
    for obs, _, terminated, truncated in seen[1:] + seen[-1:]:  # the last step needs no next one
        frames = torch.from_numpy(np.array(stacks))  # (N, num_stack, 84, 84)
        with torch.no_grad():
            features = torch.stack([agent.encode(stack)[0].flatten() for stack in frames])
            logits, value = agent.policy(features)
        log_probs.append(logits.log_softmax(-1))
        values.append(value)
        for stack, frame, afresh in zip(stacks, obs[:, 0], reset_row, strict=True):
            stack.extend([frame] * (n if afresh else 1))
        reset_row = terminated | truncated
    return torch.stack(log_probs[:-1]), torch.stack(values)


@pytest.mark.parametrize("num_stack", (1, 4))
def test_encoding_once_is_stacking_and_encoding(num_stack):
    """log pi and V are those of real frame stacks, in the next rollout with other weights too."""
    agent = make_agent(num_stack)
    buffer, games = play(agent, T=20)
    for start in (0, 20):
        log_probs, values = slow_policy(agent, games.envs.seen)
        assert buffer.reset_row.sum() > 5
        found = buffer.logits.log_softmax(-1)
        torch.testing.assert_close(found, log_probs[start:], rtol=0, atol=1e-4)
        torch.testing.assert_close(buffer.values, values[start:], rtol=0, atol=1e-4)
        agent.load_state_dict(make_agent(num_stack, seed=9).state_dict())
        vae_ppo.rollout(agent, games, buffer)
    assert num_stack == 1 or (buffer.stack[0, :, 0] < 3).any()  # an episode goes on


def test_a_rollout_holds_what_the_games_gave_and_the_sign_of_rewards():
    """Frames, ends and signs of rewards are the games' own, and the step after any end serves."""
    buffer, games = play(make_agent(), times=2, p=0.6)
    frames, reward, terminated, truncated = map(np.array, zip(*games.envs.seen, strict=True))
    done = terminated | truncated
    assert abs(reward).max() > 1 and done[16].any()
    assert np.array_equal(buffer.frames, frames[13:, :, 0])
    assert np.array_equal(buffer.rewards, np.sign(reward[17:]))
    assert np.array_equal(buffer.terminated, terminated[17:])
    assert np.array_equal(buffer.reset_row, done[16:])
    assert truncated[:-1].any() and (np.array(games.envs.sent)[done[:-1]] == 1).all()


def test_actions_are_sampled_from_the_policy():
    """Actions are as frequent as pi has them."""
    agent = make_agent()
    agent.actor.weight.data.zero_()
    agent.actor.bias.data = torch.tensor([0.1, 0.2, 0.7]).log()
    actions = play(agent, T=200)[0].actions.flatten().tolist()
    for action, probability in enumerate((0.1, 0.2, 0.7)):
        assert actions.count(action) / 600 == pytest.approx(probability, abs=0.06)


def gae(rewards, values, terminated, reset_row, gamma, gae_lambda):
    """Advantages and returns (T, N) of numbers of a rollout."""
    buffer = SimpleNamespace(T=len(rewards), rewards=torch.tensor(rewards, dtype=torch.float64))
    buffer.values = torch.tensor(values, dtype=torch.float64)
    buffer.terminated, buffer.reset_row = torch.tensor(terminated), torch.tensor(reset_row)
    buffer.advantages, buffer.returns = map(torch.zeros_like, (buffer.values, buffer.rewards))
    vae_ppo.gae(buffer, gamma, gae_lambda)
    return buffer.advantages[:-1], buffer.returns


def test_gae_by_hand():
    """GAE gives the numbers of a pencil: on, truncated (bootstrapped) and terminated (not)."""
    no, at_1 = [False, False, False], [False, True, False]
    cases = [(no, no, [1.5, 2, 2]), (no, at_1, [1.375, 1.5, 2]), (at_1, at_1, [1, 0, 2])]
    for terminated, done, advantages in cases:
        found, returns = gae([1, 2, 3], [1, 2, 3, 4], terminated, [False, *done], 0.5, 0.5)
        assert found.tolist() == advantages and (returns - found).tolist() == [1, 2, 3]


@given(st.integers(1, 12), st.integers(1, 3), st.floats(0, 1), st.floats(0, 1), st.integers(0, 999))
def test_gae_is_the_quadratic_sum(T, N, gamma, gae_lambda, seed):
    """On every step but a reset row, GAE is its O(T^2) definition over its own episode alone."""
    rng = np.random.default_rng(seed)
    rewards, values = rng.normal(size=(T, N)), rng.normal(size=(T + 1, N))
    terminated, truncated = rng.random((2, T, N)) < 0.2
    reset_row = np.vstack([np.zeros((1, N), dtype=bool), terminated | truncated])
    noisy = np.where(reset_row[:-1], 1e6, rewards)  # what a reset row pays belongs to nobody
    advantages, _ = gae(noisy, values, terminated, reset_row, gamma, gae_lambda)
    for t, n in np.argwhere(~reset_row[:-1]):
        expected = 0.0
        for k in range(t, T):
            next_value = 0.0 if terminated[k, n] else values[k + 1, n]
            delta = rewards[k, n] + gamma * next_value - values[k, n]
            expected += (gamma * gae_lambda) ** (k - t) * delta
            if reset_row[k + 1, n]:
                break
        assert advantages[t, n].item() == pytest.approx(expected, abs=1e-5)


# ---- Update ----
@pytest.mark.parametrize("mode", ("fixed", "adapt", "joint"))
def test_minibatches_see_the_stacks_of_the_rollout(mode, monkeypatch):
    """With the weights of the rollout, an update's log pi and V are the rollout's, step by step."""
    agent = make_agent()
    buffer, _ = play(agent, times=2)

    def compare(logits, value, mb, args):
        torch.testing.assert_close(logits, mb["logits"], rtol=0, atol=1e-3)
        torch.testing.assert_close(value, mb["values"], rtol=0, atol=1e-4)

    spy(monkeypatch, "ppo_loss", compare)
    if mode == "fixed":
        agent.encode = None  # it reads the means of the rollout
    for segments in vae_ppo.minibatches(buffer, make_args(mode)):
        vae_ppo.minibatch_loss(agent, buffer, segments, make_args(mode))


@given(st.integers(1, 4), st.sampled_from((1, 2, 3)), st.integers(1, 3), st.integers(1, 2))
def test_minibatches_cover_each_step_once(L, count, N, pieces):
    """An epoch has every step once, with what belongs to it, in an order of its own."""
    T = L * pieces * count
    args = SimpleNamespace(segment_length=L, num_minibatches=count, update_epochs=2)
    buffer = vae_ppo.Buffer(make_agent(3), T, N)
    ids = torch.arange(T * N).view(T, N)
    buffer.actions[:] = ids
    buffer.logits[:] = ids[..., None] + 0.1
    buffer.values[:T] = ids + 0.2
    assert not buffer.advantages[T].any()  # GAE begins with it
    buffer.advantages[:T] = ids + 0.3
    buffer.returns[:] = ids + 0.4
    buffer.reset_row[:T] = ids % 3 == 0
    steps = []
    for segments in vae_ppo.minibatches(buffer, args):
        mb = vae_ppo.gather(buffer, segments, L)
        steps.append(mb["actions"].flatten().tolist())
        assert len(segments) == pieces * N
        for name in ("logits", "values", "advantages", "returns", "reset_row"):
            assert torch.equal(mb[name], getattr(buffer, name)[:T].flatten(0, 1)[mb["actions"]])
    assert sorted(sum(steps[:count], [])) == sorted(sum(steps[count:], [])) == list(range(T * N))
    assert count * pieces * N < 8 or steps[:count] != steps[count:]


@pytest.mark.parametrize("target, scale, n", ((1e-5, 1, 1), (1e-5, 2, 1), (9, 1, 16), (0, 2, 16)))
def test_the_kl_stops_an_update_before_the_step(target, scale, n):
    """A minibatch past a target but 0 is not learnt from, unless it is the first, nor logged."""
    agent = make_agent()
    buffer, _ = play(agent)
    optimizer = torch.optim.Adam(agent.parameters(), 0.01)
    args = make_args("adapt", f"--update-epochs 8 --target-kl {target}")
    agent.actor.weight.data *= scale  # with 2, even the first minibatch is past the target
    history, numbers = [], []
    real = vae_ppo.minibatch_loss
    with pytest.MonkeyPatch.context() as patch:
        spy(patch, "gae", lambda *inputs: numbers.append(inputs[1:]))
        spy(patch, "clipped_gradient", lambda *inputs: numbers.append(inputs[2]))
        patch.setattr(vae_ppo, "minibatch_loss", lambda *x: history.append(real(*x)) or history[-1])
        metrics = vae_ppo.update(agent, optimizer, buffer, args)
    assert metrics["losses/updates"] == n and numbers == [(0.99, 0.95)] + [0.5] * n
    assert max(int(state["step"]) for state in optimizer.state.values()) == n
    losses = [float(m["losses/value_loss"]) for _, m in history[:n]]
    assert metrics["losses/value_loss"] == pytest.approx(np.mean(losses))
    assert metrics["losses/approx_kl"] == history[-1][1]["losses/approx_kl"]


@pytest.mark.parametrize("limit, length", ((0.5, 0.5), (0.0, 5.0), (9.0, 5.0)))
def test_the_gradient_is_clipped(limit, length):
    """A gradient is shortened to max_grad_norm, unless that is 0; no next step has any of it."""
    weight = torch.nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([weight], 1.0)
    for step in (1, 2):
        loss = (weight * torch.tensor([3.0, 4.0])).sum()
        assert vae_ppo.clipped_gradient(optimizer, loss, limit).item() == pytest.approx(5)
        optimizer.step()
        assert weight.norm().item() == pytest.approx(step * length, rel=1e-4)


# ---- Pretraining ----
@pytest.mark.parametrize("num_stack, latent_dim, n", ((None, None, 1), (4, 20, 1), (1, 9, 2)))
def test_pretraining_frames_are_those_of_its_player(num_stack, latent_dim, n, monkeypatch):
    """--policy, whatever its sizes, or chance plays num_frames, a share for each of n processes."""
    flags = "--num-frames 13"
    if num_stack:
        policy = make_agent(num_stack, latent_dim).state_dict()
        saved = vars(make_args("joint", f"--num-stack {num_stack} --latent-dim {latent_dim}"))
        torch.save({"weights": policy, "args": saved}, "policy.pt")
        flags += " --policy policy.pt"
    monkeypatch.setenv("WORLD_SIZE", str(n))
    calls = []
    spy(monkeypatch, "rollout", lambda *inputs: calls.append(inputs))
    games = vae_ppo.Games(NoiseEnvs(2), 1, None)
    frames = vae_ppo.collect_frames(make_args("pretrain", flags), games, make_agent())
    played = np.concatenate([obs[:, 0] for obs, *_ in games.envs.seen])
    ((player, _, buffer),) = calls
    assert np.array_equal(frames, played[: 13 // n]) and buffer.T == (7, 4)[n - 1]
    assert same(player.state_dict(), policy) if num_stack else (buffer.logits == 0).all()


def test_pretraining_lowers_the_loss(vae_run, monkeypatch):
    """Each epoch lowers L_VAE, in minibatches of 128 in an order of its own."""
    losses = [float(row["vae/recon_loss"]) + float(row["vae/kl"]) for row in rows_of(vae_run)]
    assert len(losses) == 3 and losses[2] < losses[1] < losses[0]
    orders = []
    spy(monkeypatch, "vae_loss", lambda *inputs: orders.append(inputs[1][:, 0, 0]))
    frames = torch.arange(130, dtype=torch.uint8)[:, None, None].expand(-1, 84, 84)
    monkeypatch.setattr(vae_ppo, "collect_frames", lambda *_: frames)
    optimizer = torch.optim.Adam(make_agent().encoder.parameters(), 0.0)
    list(vae_ppo.learn_vae(make_agent(), optimizer, None, make_args("pretrain"), range(2)))
    assert [len(x) for x in orders] == [128, 2, 128, 2] and not torch.equal(orders[0], orders[2])
    assert torch.cat(orders[:2]).sort().values.tolist() == list(range(130))


# ---- Training ----
@pytest.fixture(scope="module")
def joint_runs(tmp_path_factory):
    """Folders of joint runs of two iterations: a and b differ in threads alone, c in the seed."""
    folder = tmp_path_factory.mktemp("joint")
    for name, seed, threads in (("a", 1, 1), ("b", 1, 2), ("c", 2, 1)):
        flags = f"--total-timesteps 64 --seed {seed} --env-threads {threads} --runs-dir {folder}"
        assert run(tiny("joint", flags, name)) is None
    return folder


def test_equal_seeds_are_bitwise_equal_and_others_differ(joint_runs):
    """Equal seeds give bitwise equal weights and logs, with any number of emulator threads."""
    a, b, c = (load(joint_runs / name)["weights"] for name in "abc")
    assert same(a, b) and not same(a, c)
    for a, b, c in zip(*(rows_of(joint_runs / name) for name in "abc"), strict=True):
        assert {**a, "charts/SPS": ""} == {**b, "charts/SPS": ""}
        assert a["vae/kl"] != c["vae/kl"]


class SquareEnvs(NoiseEnvs):
    """A square at the left, middle or right; naming its place pays 1; eight steps make a game."""

    def frame(self):
        self.place = self.rng.integers(0, 3, self.num_envs)
        obs = np.zeros((self.num_envs, 1, 84, 84), dtype=np.uint8)
        for n, place in enumerate(self.place):
            obs[n, 0, 30:50, 28 * place + 4 : 28 * place + 24] = 255
        return obs

    def step(self, action):
        reward = (action == self.place) * (self.clock < 9) * 1  # the ninth step is ignored
        self.clock = self.clock % 9 + 1
        no = np.zeros(self.num_envs, dtype=bool)
        return self.frame(), reward, self.clock == 9, no, {"episode_frame_number": self.clock}


@pytest.mark.parametrize("mode, low, high", (("joint", 6, 8), ("adapt", 6, 8), ("fixed", 0, 4)))
def test_all_but_fixed_learn_what_a_vae_leaves_out(mode, low, high, monkeypatch):
    """With a VAE that is blind to the square, adapt learns its place, but fixed has 2.7 of 8."""
    monkeypatch.setattr(vae_ppo, "make_envs", lambda args: (SquareEnvs(args.num_envs), 0))
    blind = make_agent(2, 8)
    blind.mu.weight.data.zero_()
    settings_of_vae = vars(make_args("pretrain", "--latent-dim 8"))
    torch.save({"weights": blind.state_dict(), "args": settings_of_vae}, "vae.pt")
    flags = """--num-envs 8 --update-epochs 2 --gamma 0.5 --num-stack 2 --latent-dim 8 --target-kl 0
        --total-timesteps 3072 --no-anneal-lr --learning-rate 1e-3"""
    assert run(tiny(mode, flags)) is None
    assert low * 16 < sum(load("runs/r")["scores"][-16:]) < high * 16


@pytest.mark.parametrize("value", (np.nan, 1e25))  # the norm is NaN or infinite
def test_a_gradient_that_is_not_finite_ends_the_run_unsaved(value, monkeypatch):
    """Such a run ends with a sentence. The log before it stays, and the last checkpoint."""

    def before_update(agent, *_):
        if len(rows_of("runs/r")) == 3:
            agent.critic.bias.data.fill_(value)

    spy(monkeypatch, "update", before_update)
    sentence = run(tiny("joint", "--checkpoint-every 2 --total-timesteps 200"))
    assert "grad/norm is not finite: lower --learning-rate" in sentence
    assert load("runs/r")["global_step"] == 64 and steps_of("runs/r") == [32, 64, 96]


def test_stop_and_resume_go_on_where_they_were(monkeypatch):
    """A stopped run goes on with its weights, moments, schedule, scores and log, in new games."""
    states, rates, signals, seeds = [], [], [], []

    def before_update(agent, optimizer, *_):
        states.append(copy.deepcopy((agent.state_dict(), optimizer.state_dict()["state"])))
        rates.append(optimizer.param_groups[0]["lr"])
        if len(rates) == 2:
            signals.append(signal.SIGTERM)

    spy(monkeypatch, "update", before_update)
    spy(monkeypatch, "Games", lambda *inputs: seeds.append(inputs[2]))
    argv = tiny("joint", "--total-timesteps 128 --learning-rate 0.004")
    assert run(argv, signals) is None
    saved = load("runs/r")
    assert saved["global_step"] == 64
    torch.save(saved | {"scores": [3.0, 4.0]}, "runs/r/checkpoint.pt")
    assert run([*argv, "--resume"]) is None
    assert same(states[2][0], saved["weights"])
    for key, state in saved["optimizer"]["state"].items():
        assert same(state, states[2][1][key])
    assert steps_of("runs/r") == [32, 64, 96, 128]
    assert rates == pytest.approx([4e-3, 3e-3, 2e-3, 1e-3])
    assert float(rows_of("runs/r")[2]["charts/episodic_return"]) == 3.5
    assert load("runs/r")["scores"][:2] == [3, 4] and len(set(seeds)) == 2


def resume(source, flags):
    """Go on from a copy of a joint run. Returns what `run` does."""
    shutil.copytree(source, "runs/r")
    return run(tiny("joint", f"--resume {flags}"))


NEW_RATES = [  # flags, and the learning rates of the iterations after
    ("--total-timesteps 140", [1e-3 * 76 / 140, 1e-3 * 44 / 140]),
    ("--total-timesteps 128 --learning-rate 0.01", [5e-3, 2.5e-3]),
    ("--total-timesteps 96 --learning-rate 0.01 --no-anneal-lr", [0.01]),
]


@pytest.mark.parametrize("flags, rates", NEW_RATES)
def test_a_resumed_run_follows_its_new_settings(flags, rates, joint_runs, capsys):
    """A resumed run has the learning rate of its new settings, and says what has changed."""
    assert resume(joint_runs / "a", flags) is None
    rows = rows_of("runs/r")[2:]
    assert [float(row["charts/learning_rate"]) for row in rows] == pytest.approx(rates)
    assert f"('total_timesteps', {flags.split()[1]})" in capsys.readouterr().out


def test_resumed_pretraining_goes_on_from_its_weights():
    """Pretraining that is resumed starts from its checkpoint; a finished one changes nothing."""
    assert run(tiny("pretrain", "--vae-epochs 1")) is None
    weights = load("runs/r")["weights"]
    for _ in range(2):
        assert run(tiny("pretrain", "--vae-epochs 2 --resume --learning-rate 1e-30")) is None
    torch.testing.assert_close(load("runs/r")["weights"], weights)
    assert steps_of("runs/r") == [160, 320]


@pytest.mark.parametrize("lost, first", (("", 32), ("checkpoint.pt", 32), ("metrics.csv", 96)))
def test_resume_drops_rows_after_the_checkpoint(lost, first, joint_runs):
    """Rows after the checkpoint are gone on resuming; all of them, where there was none yet."""
    source = shutil.copytree(joint_runs / "a", "copy")
    with open("copy/metrics.csv", "a") as file:
        file.write("96,1.0,2.0,3.0\n9")
    if lost:
        Path("copy", lost).unlink()
    assert resume(source, "--total-timesteps 96") is None
    assert steps_of("runs/r") == list(range(first, 97, 32))
    assert all(row["vae/kl"] for row in rows_of("runs/r"))


@contextlib.contextmanager
def started(flags, hangup=signal.SIG_DFL):
    """A joint run that is a process of its own and has caught its signals; killed at the end."""

    def as_a_shell_does():
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.signal(signal.SIGHUP, hangup)

    command = [sys.executable, vae_ppo.__file__, *tiny("joint", flags)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "preexec_fn": as_a_shell_does}
    with subprocess.Popen(command, text=True, **pipes) as process, contextlib.ExitStack() as end:
        end.callback(process.kill)
        assert process.stdout.readline().startswith("joint of ALE/Breakout-v5 on cpu")
        yield process


@pytest.mark.parametrize("number", (signal.SIGINT, signal.SIGTERM, signal.SIGHUP))
def test_a_signal_saves_and_ends_the_program(number):
    """A signal, even before the first iteration, has the program say so, save, and end."""
    with started("--total-timesteps 1000000") as process:
        process.send_signal(number)
        assert any("finishing this" in line for line in iter(process.stderr.readline, ""))
        if number != signal.SIGINT:  # a terminal that is closed may send two
            process.send_signal(number)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + number and "Traceback" not in errors
    assert load("runs/r")["global_step"] == steps_of("runs/r")[-1]


def test_a_second_ctrl_c_ends_the_program_at_once():
    """A second Ctrl-C, in an iteration that would take minutes, ends the program."""
    with started("--num-steps 80000 --total-timesteps 1000000") as process:
        process.send_signal(signal.SIGINT)
        assert any("finishing this" in line for line in iter(process.stderr.readline, ""))
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) == -signal.SIGINT
    assert not rows_of("runs/r")


def test_a_run_under_nohup_outlives_its_terminal():
    """Neither SIGHUP, where nohup has it ignored, nor a closed stderr ends a run."""
    with started(ENDLESS, hangup=signal.SIG_IGN) as process:
        for rows in (1, 4):
            while process.poll() is None and len(rows_of("runs/r")) < rows:
                time.sleep(0.1)
            process.stderr.close()
            process.send_signal(signal.SIGHUP)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 128 + signal.SIGTERM


def test_train_runs_in_a_thread():
    """train() works where signals cannot be caught and errors are kept, as in a notebook."""
    thread = threading.Thread(target=run, args=(tiny("joint"),))
    thread.start()
    thread.join()
    argv = tiny("joint", "--resume --total-timesteps 64")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(ZeroDivisionError) as kept:
        spy(patch, "update", lambda *_: 1 / 0)
        run(argv)
    assert kept.tb and run(argv) is None and steps_of("runs/r") == [32, 64]


def test_a_second_process_in_a_live_run_is_refused():
    """--resume beside a live run is refused and harms nothing; once that is killed, it goes on."""
    argv = [*tiny("joint", ENDLESS), "--resume"]
    with started(ENDLESS) as process:
        while process.poll() is None and not Path("runs/r/checkpoint.pt").exists():
            time.sleep(0.1)
        before = Path("runs/r/metrics.csv").read_bytes()
        assert "is in use" in str(run(argv, [2])) and process.poll() is None
        assert Path("runs/r/metrics.csv").read_bytes().startswith(before)
    steps = load("runs/r")["global_step"] + 32
    assert run([*argv, "--total-timesteps", str(steps)]) is None
    assert steps_of("runs/r") == list(range(32, steps + 1, 32))


def on_rank(rank, port):
    """One of two processes: a run that rank 1 is to stop, a gradient, and metrics of its rank."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": str(rank)}
    torch.set_num_threads(1)
    kept = {}
    args = make_args("joint", "--run-name other --total-timesteps 64")
    agent = make_agent()
    buffer, _ = play(agent, seed=rank)
    loss, metrics = vae_ppo.minibatch_loss(agent, buffer, first_minibatch(buffer, args), args)
    loss.backward(retain_graph=True)
    kept["alone"] = [p.grad.clone() for p in agent.parameters()]
    os.environ["WORLD_SIZE"] = "2"
    patch = pytest.MonkeyPatch()
    spy(patch, "update", lambda *inputs: kept.setdefault("played", inputs[2]))
    kept["end"] = run(tiny("joint", "--total-timesteps 256"), [signal.SIGINT] * rank)
    optimizer = torch.optim.Adam(agent.parameters())
    vae_ppo.clipped_gradient(optimizer, loss)
    kept["shared"] = [p.grad.clone() for p in agent.parameters()]
    metrics = {name: torch.tensor(float(rank)) for name in metrics}
    patch.setattr(vae_ppo, "minibatch_loss", lambda *_: (loss, metrics))
    patch.setattr(vae_ppo, "clipped_gradient", lambda *_: torch.tensor(1.0))
    kept["metrics"] = vae_ppo.update(agent, optimizer, buffer, args)
    torch.save(kept, f"rank{rank}.pt")


def test_two_processes_train_one_model():
    """Two processes share the mean of gradients, of metrics and of the KL; a signal ends both."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
    torch.multiprocessing.spawn(on_rank, (port,), nprocs=2)
    a, b = (torch.load(f"rank{rank}.pt", weights_only=False) for rank in range(2))
    assert not torch.equal(a["played"].frames[3], b["played"].frames[3])  # before any action
    assert not torch.equal(a["played"].actions, b["played"].actions)
    assert a["end"] is b["end"] is None
    assert load("runs/r")["global_step"] == 64 and steps_of("runs/r") == [64]  # of two processes
    for g0, g1, *shared in zip(a["alone"], b["alone"], a["shared"], b["shared"], strict=True):
        for gradient in shared:
            torch.testing.assert_close(gradient, (g0 + g1) / 2, rtol=1e-4, atol=1e-6)
    for rank in (a, b):
        assert rank["metrics"]["losses/updates"] == 1
        assert rank["metrics"]["losses/approx_kl"] == rank["metrics"]["vae/kl"] == 0.5


WAITS = """_local_scalar_dense item nonzero masked_select is_nonzero equal _unique2 unique_dim
    bincount histc repeat_interleave lift_fresh lift_fresh_copy pin_memory is_pinned""".split()


class NoWaits(TorchDispatchMode):
    """Refuses operators that wait for the device, which a CUDA graph could not record."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        name = operation.overloadpacket.__name__
        indices = args[1] if name == "index" or name.startswith("index_put") else []
        mask = any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in indices)
        assert name not in WAITS and not mask, f"{name} waits for the device"
        return operation(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", ("fixed", "adapt", "joint"))
def test_nothing_that_a_cuda_graph_would_record_waits_for_the_device(mode):
    """No operator of a step, GAE, a minibatch's loss, gradient or Adam waits for the device."""
    args = make_args(mode)
    torch.distributions.Categorical.set_default_validate_args(True)
    vae_ppo.start_process(args)
    agent = make_agent()
    parameters = [p for name in TRAINED[mode] for p in getattr(agent, name).parameters()]
    optimizer = torch.optim.Adam(parameters, fused=True)
    buffer, _ = play(agent)
    segments = first_minibatch(buffer, args)
    with NoWaits():
        with torch.no_grad():
            for t in (0, 1, buffer.T):
                vae_ppo.act(agent, buffer, t)
        vae_ppo.gae(buffer, args.gamma, args.gae_lambda)
        loss, _ = vae_ppo.minibatch_loss(agent, buffer, segments, args)
        vae_ppo.clipped_gradient(optimizer, loss, args.max_grad_norm)
        optimizer.step()


@needs_gpu
@pytest.mark.parametrize("mode", ("fixed", "adapt", "joint"))
def test_a_gpu_computes_what_the_cpu_does(mode, monkeypatch):
    """A GPU's rollout, loss, metrics and gradients are the CPU's, but for rounding."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # of 10 bits
    monkeypatch.setattr(torch, "randn_like", torch.ones_like)  # devices draw other noise
    args = make_args(mode, "--num-minibatches 1")
    agent = make_agent()
    cpu, _ = play(agent, times=2)
    gpu, _ = play(copy.deepcopy(agent).to("cuda"), times=2)
    assert torch.equal(cpu.frames, gpu.frames.cpu()) and torch.equal(cpu.stack, gpu.stack.cpu())
    gpu.actions.copy_(cpu.actions)  # and other actions
    agent.actor.weight.data *= 1.5  # now the policy differs from the rollout's
    answers = []
    for buffer, device in ((cpu, "cpu"), (gpu, "cuda")):
        own = copy.deepcopy(agent).to(device)
        loss, metrics = vae_ppo.minibatch_loss(own, buffer, first_minibatch(buffer, args), args)
        loss.backward()
        tensors = [buffer.mu, buffer.logits, buffer.values, loss, *metrics.values()]
        tensors += [p.grad for p in own.parameters() if p.grad is not None]
        answers.append([x.cpu() for x in tensors])
    for x, y in zip(*answers, strict=True):
        assert (x - y).norm() <= 1e-3 * x.norm() + 1e-6


@needs_gpu
@pytest.mark.parametrize("mode", ("fixed", "adapt", "joint"))
def test_a_gpu_repeats_bitwise_and_a_cpu_goes_on(mode, vae_run):
    """Equal seeds give bitwise equal weights on a GPU; each device resumes the other's run."""
    for name in "ab":
        assert run(tiny(mode, "--cuda", name, vae_run / "checkpoint.pt")) is None
    weights = load("runs/a")["weights"]
    assert weights["mu.weight"].is_cuda and same(weights, load("runs/b")["weights"])
    for flags in ("--no-cuda --total-timesteps 64", "--cuda --total-timesteps 96"):
        assert run(tiny(mode, f"--resume {flags}", "a", vae_run / "checkpoint.pt")) is None


# ---- Checkpoint and log ----
def test_a_checkpoint_is_on_the_disk_before_it_replaces_the_old_one(monkeypatch):
    """A checkpoint is all on the disk before it takes the old one's place; else this one stays."""
    agent = make_agent()
    optimizer = torch.optim.Adam(agent.parameters())
    path, order = Path("checkpoint.pt"), []
    real = os.replace
    monkeypatch.setattr(os, "fsync", lambda file: order.append(os.fstat(file).st_size))
    monkeypatch.setattr(os, "replace", lambda a, b: order.append("replace") or real(a, b))
    vae_ppo.save_checkpoint(Path(), agent, optimizer, {"global_step": 1})
    old = path.read_bytes()
    assert order == [len(old), "replace"]  # no byte was left in a buffer
    monkeypatch.delattr(os, "fsync")
    with pytest.raises(AttributeError):
        vae_ppo.save_checkpoint(Path(), agent, optimizer, {"global_step": 2})
    assert path.read_bytes() == old


class Malicious:
    def __reduce__(self):
        return os.system, ("touch harm-done",)


DAMAGED = {
    "missing": lambda good: None,
    "truncated": lambda good: Path("bad.pt").write_bytes(good[: len(good) // 2]),
    "malicious": lambda good: torch.save({"weights": {}, "args": Malicious()}, "bad.pt"),
    "foreign": lambda good: torch.save({"args": {}}, "bad.pt"),
}


@pytest.mark.parametrize("damage", DAMAGED)
@pytest.mark.parametrize("flags", ("adapt --vae bad.pt", "pretrain --policy bad.pt"))
def test_a_damaged_checkpoint_is_refused(flags, damage, joint_runs, capsys):
    """A damaged or malicious checkpoint is named, nothing in it is executed, no folder is left."""
    DAMAGED[damage]((joint_runs / "a/checkpoint.pt").read_bytes())
    refused(f"--num-envs 2 --mode {flags}".split(), capsys, "bad.pt is no checkpoint")


def changed(source, flag, change):
    """A command line that reads, by the flag, the source's checkpoint after a change."""
    saved = load(source)
    change(saved)
    Path("runs/old").mkdir(parents=True)
    torch.save(saved, "runs/old/checkpoint.pt")
    if flag == "--resume":
        return tiny("joint", "--resume --total-timesteps 96", "old")
    return tiny("adapt" if flag == "--vae" else "pretrain", f"{flag} runs/old/checkpoint.pt", "new")


OTHER_KINDS = [
    ("--vae", {"env_id": "ALE/Pong-v5"}, "ALE/Pong-v5 ALE/Breakout-v5"),
    ("--vae", {"latent_dim": 9}, "latent_dim 9 20"),
    ("--policy", {"mode": "pretrain"}, "pretrain"),
    ("--policy", {"env_id": "ALE/Pong-v5"}, "ALE/Pong-v5 ALE/Breakout-v5"),
    ("--resume", {"env_id": "ALE/Pong-v5"}, "ALE/Pong-v5 ALE/Breakout-v5"),
    ("--resume", {"mode": "adapt"}, "mode adapt joint"),
    ("--resume", {"num_stack": 2}, "num_stack 2 4"),
    ("--resume", {"latent_dim": 9}, "latent_dim 9 20"),
]


@pytest.mark.parametrize("flag, settings, words", OTHER_KINDS)
def test_a_checkpoint_of_other_settings_is_refused(flag, settings, words, joint_runs, capsys):
    """A checkpoint of another mode, game or size is refused, which it names."""
    argv = changed(joint_runs / "a", flag, lambda saved: saved["args"].update(settings))
    refused(argv, capsys, "runs/old/checkpoint.pt", *words.split())


@pytest.mark.parametrize("flag", ("--resume", "--vae", "--policy"))
def test_weights_of_another_network_show_what_does_not_fit(flag, joint_runs, capsys):
    """Who changed a layer sees torch's own message; a sentence, if only Adam's moments misfit."""
    source = joint_runs / "a"
    argv = changed(source, flag, lambda x: x["weights"]["encoder.0.bias"].resize_(9))
    with pytest.raises(RuntimeError, match="size mismatch for encoder.0.bias"):
        run(argv)
    if flag == "--resume":
        shutil.rmtree("runs")
        argv = changed(source, flag, lambda x: x["optimizer"]["state"][0]["exp_avg"].resize_(3))
        refused(argv, capsys, "runs/old/checkpoint.pt", "optimizer")


def test_tensorboard_has_the_settings_and_all_metrics(joint_runs):
    """TensorBoard has every flag and torch's version as text, and each number of metrics.csv."""
    events = EventAccumulator(str(joint_runs / "a")).Reload()
    (text,) = events.Tensors("args/text_summary")[0].tensor_proto.string_val
    assert b"'kappa': 20.0" in text and f"torch {torch.__version__}".encode() in text
    assert set(events.Tags()["scalars"]) == set(rows_of(joint_runs / "a")[1])


def test_track_starts_wandb_before_tensorboard(monkeypatch):
    """--track hands the settings to wandb.init, which is to follow TensorBoard, in time."""
    calls = []
    wandb = SimpleNamespace(init=lambda **x: calls.append((x, [*Path("runs").rglob("events*")])))
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    assert run(tiny("joint", "--track")) is None
    ((settings, events),) = calls
    assert settings["sync_tensorboard"] and settings["config"]["kappa"] == 20 and not events


def test_the_script_needs_no_fcntl():
    """The script can be imported where there is no fcntl, as on Windows."""
    code = "import sys; sys.modules['fcntl'] = None; import vae_ppo"
    assert subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=HERE).returncode == 0


# ---- README and published weights ----
WEIGHTS = sorted((HERE / "experiments/weights").glob("*.pt"))


@pytest.mark.parametrize("path", WEIGHTS, ids=lambda path: path.stem)
def test_published_weights_serve(path):
    """fixed starts from the published VAE; published agents play for pretrain; none is resumed."""
    mode, flags = ("fixed", "") if "pretrain" in path.name else ("pretrain", f"--policy {path}")
    assert run(tiny(mode, flags, vae=path)) is None
    shutil.copy(path, "runs/r/checkpoint.pt")
    assert "no state of Adam" in run(tiny(load("runs/r")["args"]["mode"], "--resume", vae=path))


@pytest.mark.skipif(not (HERE / "experiments").exists(), reason="only the repository has them")
@pytest.mark.parametrize("model", ("fixed", "adapt", "joint-kappa20", "joint-kappa1e6"))
def test_the_readme_has_the_scores_of_results(model):
    """README's first table has the median and range of three seeds after 1M and 10M steps."""
    curves = []
    for path in (HERE / "experiments/results").glob(f"{model}-10M-seed*.csv"):
        rows = csv.DictReader(path.open())
        curves.append([(row["global_step"], row["charts/episodic_return"] or 0) for row in rows])
    for step in (1e6, 1e7):
        low, median, high = sorted(np.interp(step, *np.array(x, float).T) for x in curves)
        assert f"| {median:.1f} ({low:.1f} to {high:.1f}) |" in (HERE / "README.md").read_text()


def blocks():
    """The README's fenced blocks of code, indented or not."""
    fence = re.compile(r"^ *(```+|~~~+)[^\n]*\n(.*?)^ *\1", re.MULTILINE | re.DOTALL)
    return [match[2] for match in fence.finditer((HERE / "README.md").read_text())]


def commands():
    """The arguments of each call in the README's blocks of code and in the script's docstring."""
    lines = "\n".join([*blocks(), vae_ppo.__doc__]).replace("\\\n", " ").splitlines()
    calls = [line.split("vae_ppo.py ", 1)[1] for line in lines if "vae_ppo.py -" in line]
    return [shlex.split(re.split("&&|;", call)[0], comments=True) for call in calls]


def test_every_command_is_read_and_finds_what_another_left():
    """The script takes all commands of README and docstring, which leave each other's files."""
    runs = [vae_ppo.parse_args([x for x in argv if x != "--resume"]) for argv in commands()]
    left = {f"{run.runs_dir}/{run.run_name}/checkpoint.pt" for run in runs}
    left.add("experiments/weights/pretrain-seed1.pt")
    assert {run.mode for run in runs} == set(vae_ppo.MODES)
    assert {run.vae or run.policy for run in runs} <= {"", *left}


def test_the_environment_of_the_readme_plays():
    """README's make_envs takes a game of gymnasium's own, one process and no vector emulator."""
    (code,) = [block for block in blocks() if "def make_envs(" in block]
    scope = {"gym": vae_ppo.gym}
    exec(code, scope)
    args = make_args("joint", "--env-id ALE/Pong-v5 --num-envs 2")
    games = vae_ppo.Games(*scope["make_envs"](args), args.seed)
    for _ in range(1100):  # Pong's first game is over after some 800 to 1 000 steps
        games.step(np.zeros(2, dtype=int))
    assert games.frame.shape == (2, 84, 84) and games.frame.dtype == np.uint8
    assert len(games.scores) >= 1 and max(games.scores) <= -15


def patched(patch):
    """The script's names, with a patch applied to it."""
    shutil.copy(vae_ppo.__file__, ".")
    subprocess.run(["git", "apply"], input=patch, text=True, check=True)
    return runpy.run_path("vae_ppo.py")


@pytest.mark.skipif(not shutil.which("git"), reason="needs git")
@pytest.mark.parametrize("change", ("Conv2d(64, 64", '"apart"', '"l1"', "FRAME_SIZE = 96"))
def test_each_change_of_the_readme_trains(change):
    """Each diff of the README applies, and joint, or the mode that it adds, trains with it."""
    (patch,) = [block for block in blocks() if "@@" in block and change in block]
    script = patched(patch)
    script["train"](script["parse_args"](tiny("apart" if change == '"apart"' else "joint")))
    (row,) = rows_of("runs/r")
    assert float(row["grad/norm"]) > 0 and ("vae/l1" in row) == (change == '"l1"')
    if change == '"l1"':  # the run has a column that the script itself does not make
        assert "other columns" in run(tiny("joint", "--resume --total-timesteps 64"))


@pytest.mark.skipif(not (HERE / "experiments").exists(), reason="only the repository has them")
def test_a_guide_of_0_is_the_papers_loss(joint_runs):
    """With guided.patch, --guide 0 is bitwise the script; 0.9 leaves a tenth to each pixel."""
    guided = patched((HERE / "experiments/guided.patch").read_text())
    for name, guide in (("a", 0), ("b", 0.9)):
        flags = f"--total-timesteps 64 --guide {guide}"
        guided["train"](guided["parse_args"](tiny("joint", flags, name)))
    a, b = (load(f"runs/{name}")["weights"] for name in "ab")
    assert same(a, load(joint_runs / "a")["weights"]) and not same(a, b)
    weight = guided["pixel_weights"](make_agent(), play(make_agent())[0], 0.9)
    assert weight.min() >= 0.1 - 1e-6 and weight.max() > 1 and weight.mean() <= 1 + 1e-5
