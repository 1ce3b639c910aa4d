"""What vae_ppo.py promises, one claim per test, in the order of its sections.

Run: python -m pytest -q (a few minutes on two CPU cores)."""

import contextlib
import copy
import csv
import functools
import importlib.util
import io
import itertools
import math
import os
import re
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
from types import ModuleType, SimpleNamespace

import ale_py
import cv2
import numpy as np
import pytest
import torch
import torch.nn as nn
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import vae_ppo

settings.register_profile("suite", deadline=None, derandomize=True, database=None, max_examples=25)
settings.load_profile("suite")
torch.set_num_threads(1)
HERE = Path(__file__).resolve().parent


@pytest.fixture(autouse=True)
def alone(tmp_path, monkeypatch):
    """Each test has an empty working folder, so that runs/ is its own, and gives signals back."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    monkeypatch.chdir(tmp_path)
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def tiny(mode, flags="", name="r", vae="vae.pt"):
    """The command line of a run of a second: one iteration, or three epochs of pretraining."""
    sizes = "--num-steps 16 --segment-length 8 --num-minibatches 2 --update-epochs 1"
    sizes += " --total-timesteps 32"
    if mode == "pretrain":
        sizes = "--num-frames 160 --vae-epochs 3"
    if mode in ("fixed", "adapt"):
        sizes += f" --vae {vae}"
    flags = (
        f"--mode {mode} --no-cuda --env-threads 1 --num-envs 2 {sizes} --run-name {name} {flags}"
    )
    return flags.split()


def make_args(mode, flags=""):
    return vae_ppo.parse_args(tiny(mode, flags))


def run_main(argv, signals=()):
    """Run to the end. Returns 0, argparse's 2, or the sentence that ends the program."""
    try:
        vae_ppo.train(vae_ppo.parse_args(argv), signals)
    except SystemExit as stop:
        return stop.code
    return 0


def refused(argv, capsys, *words):
    """argv ends with argparse's error or with a sentence. It has the words, and nothing on disk
    is touched."""
    before = {path: path.is_file() and path.read_bytes() for path in Path().rglob("*")}
    capsys.readouterr()
    with pytest.MonkeyPatch.context() as patch:
        patch.delattr(vae_ppo, "rollout")  # what is not refused must not train for hours
        answer = run_main(argv)
    if answer == 2:
        *_, answer = capsys.readouterr().err.splitlines()
        assert "error: " in answer
    assert isinstance(answer, str) and answer.count("\n") == 0
    for word in words:
        assert word in answer
    assert before == {path: path.is_file() and path.read_bytes() for path in Path().rglob("*")}


def load(folder):
    return torch.load(Path(folder, "checkpoint.pt"), weights_only=True)


def rows_of(folder):
    path = Path(folder, "metrics.csv")
    return list(csv.DictReader(path.open())) if path.exists() else []


def same(a, b):
    """Bitwise equality of two state_dicts."""
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# ---- Arguments ----
BAD = [
    ("", "--mode"),
    ("--mode joint --num-env 1", "--num-env"),
    ("--mode fixed", "--vae pretrain"),
    ("--mode joint --vae x", "joint vae"),
    ("--mode joint --policy x", "joint policy"),
    ("--mode adapt --vae x --num-frames 10", "adapt num_frames"),
    ("--mode adapt --vae x --kappa 1", "adapt kappa"),
    ("--mode fixed --vae x --beta 2", "fixed beta"),
    ("--mode pretrain --no-anneal-lr", "pretrain anneal_lr"),
    ("--mode joint --learning-rate -1", "learning_rate -1"),
    ("--mode joint --kappa inf", "kappa inf"),
    ("--mode joint --kappa 0", "kappa 1e-06"),
    ("--mode joint --ent-coef nan", "ent_coef nan"),
    ("--mode joint --run-name none --resume", "runs/none does not exist --resume"),
    ("--mode joint --gamma 1.5", "gamma 1.5"),
    ("--mode joint --gae-lambda 1.5", "gae_lambda 1.5"),
    ("--mode joint --num-envs 0", "num_envs 0"),
    ("--mode joint --num-envs 10000000000", "num_envs 10000000000"),
    ("--mode joint --seed -1", "seed -1"),
    ("--mode joint --num-steps 100 --num-minibatches 2", "segment_length num_steps"),
    ("--mode joint --num-envs 2 --num-steps 8 --num-minibatches 4", "segment_length num_steps"),
    ("--mode joint --num-minibatches 7", "num_minibatches"),
    ("--mode joint --total-timesteps 2047", "total_timesteps 2048"),
    ("--mode joint --env-id ALE/Breakot-v5", "ALE/Breakot-v5 ALE/Breakout-v5"),
    ("--mode joint --env-id CartPole-v1", "CartPole-v1 ALE/Breakout-v5"),
    ("--mode joint --runs-dir file/below", "file/below"),
]


@pytest.mark.parametrize("flags, words", BAD)
def test_bad_input_is_refused(flags, words, capsys):
    """What makes no sense ends the program with one sentence that names it."""
    Path("file").write_text("a regular file")
    refused(flags.split(), capsys, *words.split())


def test_a_number_of_processes_that_makes_no_sense_is_refused(monkeypatch, capsys):
    """WORLD_SIZE of 0 is refused; an empty one is one process."""
    monkeypatch.setenv("WORLD_SIZE", "")
    assert make_args("joint").world_size == 1
    monkeypatch.setenv("WORLD_SIZE", "0")
    refused(tiny("joint"), capsys, "one iteration")


def test_a_new_mode_that_starts_from_a_vae_needs_one(monkeypatch, capsys):
    """A mode that is added with the flags "vae" does not start silently from random weights."""
    monkeypatch.setitem(vae_ppo.MODES, "new", vae_ppo.MODES["adapt"])
    refused("--mode new".split(), capsys, "--vae")


def test_help_has_a_line_for_each_mode_and_names_each_default(capsys):
    """--help has a usage line, one line a mode, and no empty default."""
    with pytest.raises(SystemExit):
        vae_ppo.parse_args(["--help"])
    text = capsys.readouterr().out
    assert text.startswith("usage: vae_ppo.py --mode")
    assert all(re.search(rf"^{mode} +.*L_", text, re.MULTILINE) for mode in vae_ppo.MODES)
    assert not re.search(r"default:\s*\)", text)


@pytest.mark.parametrize("exists", (False, True))
@pytest.mark.parametrize("name", ("..", ".", "../x", "a/b", "/tmp/x", "a/../../x"))
def test_a_run_never_lies_outside_runs_dir(name, exists, capsys):
    """--run-name is the name of a folder in --runs-dir, whether that exists or not; no path."""
    if exists:
        Path("runs/a").mkdir(parents=True)
    for resume in ([], ["--resume"]):
        refused(["--mode", "joint", "--run-name", name, *resume], capsys, name)


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
    blocks = rng.integers(0, 256, (*shape, 7, 7), dtype=np.uint8)
    return blocks.repeat(12, axis=-2).repeat(12, axis=-1)


@pytest.mark.parametrize("shape", ((6,), (2, 3), (3, 1, 2)))
def test_networks_and_vae_loss_take_any_leading_dimensions(shape):
    """encode, decoder, policy and vae_loss give the same numbers in whatever layout of frames."""
    agent = make_agent()
    frames = torch.from_numpy(noise(6, rng=np.random.default_rng(0)))
    answers = []
    for layout in ((6,), shape):
        x = frames.view(*layout, 84, 84)
        mu, logvar = agent.encode(x)
        p_x = agent.decoder(mu)
        logits, value = agent.policy(mu.repeat_interleave(4, dim=-1))
        torch.manual_seed(0)
        l_vae, metrics = vae_ppo.vae_loss(agent, x, mu, logvar, SimpleNamespace(beta=2.0))
        assert mu.shape == logvar.shape == (*layout, 5) and p_x.shape == x.shape
        assert logits.shape == (*layout, 3) and value.shape == layout
        answers.append([*(y.reshape(-1) for y in (mu, logvar, p_x, logits, value)), l_vae])
    torch.testing.assert_close(*answers)


def test_pixels_are_seen_between_0_and_1():
    """encode hands a white frame to the encoder as ones, a black one as zeros."""
    agent = make_agent()
    frames = torch.stack([black(1)[0], 255 - black(1)[0]])
    hidden = agent.encoder(torch.stack([torch.zeros(1, 84, 84), torch.ones(1, 84, 84)]))
    torch.testing.assert_close(agent.encode(frames), (agent.mu(hidden), agent.logvar(hidden)))


def test_permuting_frames_permutes_blocks_of_u():
    """The frames of a stack share the encoder: in another order, they permute U's blocks."""
    agent = make_agent()
    order = [2, 0, 3, 1]
    frames = torch.from_numpy(noise(4, 1, rng=np.random.default_rng(0)))  # rows of one game
    stack = torch.arange(4)[None]
    u = vae_ppo.stack_features(agent.encode(frames)[0], stack).view(4, 5)
    permuted = vae_ppo.stack_features(agent.encode(frames[order])[0], stack).view(4, 5)
    torch.testing.assert_close(permuted, u[order])
    torch.testing.assert_close(u, agent.encode(frames[:, 0])[0])


# ---- Losses ----
def black(*shape):
    return torch.zeros(*shape, 84, 84, dtype=torch.uint8)


def vae_loss(decoder, mu, logvar, frames, beta):
    """L_VAE and metrics of an agent that has this decoder."""
    agent, args = SimpleNamespace(decoder=decoder), SimpleNamespace(beta=beta)
    return vae_ppo.vae_loss(agent, frames, mu, logvar, args)


def constant(logit):
    """A decoder whose logits are all the same."""
    return lambda z: torch.full((*z.shape[:-1], 84, 84), float(logit))


@pytest.mark.parametrize("mu, var, nats", ((1, 1, 10), (0, 4, 30 - 10 * math.log(4))))
def test_vae_kl_by_hand(mu, var, nats):
    """In 20 dimensions the KL is 10 nats at mu = 1 and 16.1 at a variance of 4; beta weighs it."""
    mu, logvar = torch.full((3, 20), float(mu)), torch.full((3, 20), math.log(var))
    l_vae, metrics = vae_loss(constant(-99), mu, logvar, black(3), beta=3.0)
    assert metrics["vae/kl"].item() == pytest.approx(nats)
    assert l_vae.item() == pytest.approx(3 * nats)


NATS = [(0, 0.5, math.log(2)), (3, 1, 0.0485874), (3, 0, 3.0485874)]


@pytest.mark.parametrize("logit, white, nats", NATS)
def test_reconstruction_by_hand(logit, white, nats):
    """-E[log p(x|z)] sums the pixels' cross-entropies: 84 * 84 * ln 2 where every p is 0.5."""
    frames = black(3)
    frames[:, : int(84 * white)] = 255
    mu, logvar = torch.zeros(3, 5), torch.zeros(3, 5)
    l_vae, metrics = vae_loss(constant(logit), mu, logvar, frames, beta=1.0)
    assert metrics["vae/recon_loss"].item() == pytest.approx(84 * 84 * nats, rel=1e-5)
    assert l_vae.item() == metrics["vae/recon_loss"].item()


def test_latents_are_sampled():
    """The decoder gets z of mean mu and standard deviation exp(logvar / 2)."""
    seen = []
    mu = torch.tensor([-2.0, 0, 1, 2, 3])
    std = torch.tensor([0.1, 0.5, 1, 2, 3])

    def decoder(z):
        seen.append(z)
        return torch.zeros(*z.shape[:-1], 84, 84)

    logvar = (2 * std.log()).expand(500, 5)
    vae_loss(decoder, mu.expand(500, 5), logvar, black(500), beta=1.0)
    assert ((seen[0].mean(0) - mu).abs() < 0.15 * std).all()
    assert (seen[0].std(0) / std - 1).abs().max() < 0.1


def ppo(probability, old=0.5, advantage=1.0, value=0.0, old_value=0.0, ret=0.0, flags=""):
    """L_PPO and metrics of steps that took the first of two actions; lists give several steps."""
    numbers = (probability, old, advantage, value, old_value, ret)
    tensors = [torch.tensor(x, dtype=torch.float64) for x in numbers]
    p, old, advantage, value, old_value, ret = torch.broadcast_tensors(*tensors)
    mb = {
        "actions": torch.zeros_like(p, dtype=torch.long),
        "logits": torch.stack([old, 1 - old], -1).log(),
        "values": old_value,
        "advantages": advantage,
        "returns": ret,
        "reset_row": torch.zeros_like(p, dtype=torch.bool),
    }
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


VALUES_BY_HAND = [("--clip-vloss", 3, 1.62), ("--clip-vloss", 0, 2.0), ("--no-clip-vloss", 3, 0.5)]


@pytest.mark.parametrize("flags, ret, l_v", VALUES_BY_HAND)
def test_value_loss_by_hand(flags, ret, l_v):
    """V that moved from 1 to 2 costs half of the larger of its squared error and that of V moved
    by 0.2 only; without the clip, half of its squared error."""
    flags += " --vf-coef 0.25"
    total, metrics = ppo([0.5], value=[2.0], old_value=1.0, ret=ret, flags=flags)
    assert metrics["losses/value_loss"].item() == pytest.approx(l_v)
    assert total.item() == pytest.approx(-1 + 0.25 * l_v)


def test_entropy_is_rewarded():
    """The entropy of two equal actions is ln 2, and the loss falls by ent_coef times it."""
    total, metrics = ppo([0.5], flags="--ent-coef 0.1")
    assert metrics["losses/entropy"].item() == pytest.approx(math.log(2))
    assert total.item() == pytest.approx(-1 - 0.1 * math.log(2))


def test_advantages_are_normalised():
    """Advantages 2 and 6 become -1 and 1: with ratios 0.9 and 1.1, J_clip is 0.1."""
    total, metrics = ppo([0.45, 0.55], advantage=[2.0, 6.0], flags="--norm-adv")
    assert total.item() == pytest.approx(-0.1)
    assert metrics["losses/clipfrac"].item() == 0


def random_minibatch(seed=0, steps=40):
    """Logits and V of the networks now (leaves), and a minibatch of which some steps are masked."""
    g = torch.Generator().manual_seed(seed)
    old, new = torch.randn(2, steps, 3, generator=g, dtype=torch.float64)
    advantages, returns, values, value = torch.randn(4, steps, generator=g, dtype=torch.float64)
    mb = {
        "actions": torch.randint(3, (steps,), generator=g),
        "logits": old,
        "values": values,
        "advantages": advantages,
        "returns": returns,
        "reset_row": torch.rand(steps, generator=g) > 0.6,
    }
    return new.requires_grad_(), value.clone().requires_grad_(), mb


def test_masked_steps_have_no_influence():
    """Whatever stands in the masked steps, the loss, its metrics and its gradient are the same."""
    results = []
    for other in (False, True):
        logits, value, mb = random_minibatch()
        if other:
            masked = mb["reset_row"]
            logits2, value2, mb2 = random_minibatch(seed=1)
            for key in ("actions", "logits", "values", "advantages", "returns"):
                mb[key][masked] = mb2[key][masked] * (1 if key == "actions" else 50)
            logits.data[masked] = logits2.data[masked]
            value.data[masked] = value2.data[masked]
        loss, metrics = vae_ppo.ppo_loss(logits, value, mb, make_args("joint"))
        loss.backward()
        results.append((loss, logits.grad, value.grad, *metrics.values()))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_reset_rows_alone_cost_nothing():
    """A minibatch without a valid step has a loss of 0, not NaN, and so has its gradient."""
    logits, value, mb = random_minibatch()
    mb["reset_row"][:] = True
    loss, _ = vae_ppo.ppo_loss(logits, value, mb, make_args("joint"))
    loss.backward()
    assert loss == 0 and (logits.grad == 0).all() and (value.grad == 0).all()


def test_approx_kl_is_that_of_torch():
    """approx_kl is KL(pi_old || pi) in closed form, as torch.distributions has it."""
    logits, value, mb = random_minibatch()
    pi_old, pi = (torch.distributions.Categorical(logits=x) for x in (mb["logits"], logits))
    expected = torch.distributions.kl_divergence(pi_old, pi)[~mb["reset_row"]].mean()
    _, metrics = vae_ppo.ppo_loss(logits, value, mb, make_args("joint"))
    assert metrics["losses/approx_kl"].item() == pytest.approx(expected.item())


# ---- Modes ----
@pytest.fixture(scope="module")
def vae_run(tmp_path_factory):
    """The folder of a pretrain run of three epochs."""
    folder = tmp_path_factory.mktemp("vae")
    assert run_main([*tiny("pretrain", name="vae"), "--runs-dir", str(folder)]) == 0
    return folder / "vae"


TRAINED = {
    "pretrain": {"encoder", "mu", "logvar", "decoder"},
    "fixed": {"trunk", "actor", "critic"},
    "adapt": {"encoder", "mu", "trunk", "actor", "critic"},
    "joint": {"encoder", "mu", "logvar", "decoder", "trunk", "actor", "critic"},
}


@pytest.mark.parametrize("mode", TRAINED)
def test_a_mode_moves_exactly_its_networks(mode, vae_run):
    """A run moves every tensor of its mode's networks, at its rate, and no other; fixed and adapt
    begin with the pretrained VAE, bitwise, and with a policy of their own."""
    argv = tiny(mode, "--seed 2", vae=vae_run / "checkpoint.pt")
    begun, _ = vae_ppo.make_agent(vae_ppo.parse_args(argv), 4, "cpu")
    fresh = new_agent(4, 20, 4, 2).state_dict()
    assert run_main(argv) == 0
    pretrained, saved = load(vae_run)["weights"], load("runs/r")
    moved = set()
    for name, x in begun.state_dict().items():
        handed_on = mode in ("fixed", "adapt") and name.split(".")[0] in TRAINED["pretrain"]
        assert torch.equal(x, (pretrained if handed_on else fresh)[name])
        if not torch.equal(x, saved["weights"][name]):
            moved.add(name)
    assert moved == {name for name in fresh if name.split(".")[0] in TRAINED[mode]}
    (group,) = saved["optimizer"]["param_groups"]
    assert len(group["params"]) == len(moved)
    assert (group["lr"], group["eps"]) == (vae_ppo.MODES[mode].learning_rate, 1e-5)


class NoiseEnvs:
    """Random blocks, rewards and ends of episodes, even on reset rows. `seen` keeps them all."""

    single_action_space = SimpleNamespace(n=3)

    def __init__(self, num_envs, seed=0, p=0.15):
        self.num_envs, self.p = num_envs, p
        self.rng = np.random.default_rng(seed)

    def frame(self):
        return noise(self.num_envs, 1, rng=self.rng)

    def reset(self, seed=None):
        self.clock = np.ones(self.num_envs, dtype=np.int32)
        no = np.zeros(self.num_envs, dtype=bool)
        self.seen = [(self.frame(), no * 0, no, no)]
        return self.seen[0][0], {"episode_frame_number": self.clock}

    def step(self, action):
        reward = self.rng.integers(-3, 8, self.num_envs).astype(np.int32)
        terminated, truncated = self.rng.random((2, self.num_envs)) < self.p
        self.clock = self.clock + 4
        self.seen.append((self.frame(), reward, terminated, truncated & ~terminated))
        return *self.seen[-1], {"episode_frame_number": self.clock}


def play(agent, T=16, N=3, seed=0, times=1, p=0.15, device="cpu"):
    """A Buffer filled on NoiseEnvs, and the games it is from."""
    games = vae_ppo.Games(NoiseEnvs(N, seed, p), 1, None)
    buffer = vae_ppo.Buffer(agent, T, N, device)
    torch.manual_seed(seed)
    for _ in range(times):
        vae_ppo.rollout(agent, games, buffer)
    return buffer, games


def one_minibatch(buffer, args):
    """The segments of the first minibatch of an update."""
    vae_ppo.gae(buffer, args.gamma, args.gae_lambda)
    return next(vae_ppo.minibatches(buffer, args))


def naive_loss(agent, buffer, segments, args):
    """The loss of joint the plain way, which encodes and decodes all frames of each stack."""
    mb = vae_ppo.gather(buffer, segments, args.segment_length)
    frames = buffer.frames[mb["rows"]]
    game = torch.arange(frames.shape[1])[:, None]
    stacks = frames[mb["stack"], game]  # (L, B, num_stack, 84, 84)
    mu, logvar = agent.encode(stacks)
    logits, value = agent.policy(mu.flatten(-2))
    l_ppo, metrics = vae_ppo.ppo_loss(logits, value, mb, args)
    l_vae, _ = vae_ppo.vae_loss(agent, *(x.flatten(0, 2) for x in (stacks, mu, logvar)), args)
    return args.kappa * l_ppo + l_vae, metrics


@pytest.fixture
def joint_step():
    """A minibatch of joint with kappa = 3: metrics, and gradients at U and of encoder and mu: of
    its loss, and of either loss taken alone with the same noise."""
    agent = make_agent()
    args = make_args("joint", "--kappa 3 --beta 2 --num-minibatches 1")
    buffer, _ = play(agent)
    segments = one_minibatch(buffer, args)
    agent.actor.weight.data *= 1.5  # now the policy differs from the rollout's
    weights = [*agent.encoder.parameters(), *agent.mu.parameters()]
    torch.manual_seed(7)
    loss, metrics = vae_ppo.minibatch_loss(agent, buffer, segments, args)
    loss.backward()
    joint = torch.cat([p.grad.flatten() for p in weights])
    mb = vae_ppo.gather(buffer, segments, args.segment_length)
    frames = buffer.frames[mb["rows"]]
    mu, logvar = agent.encode(frames)
    logits, value = agent.policy(vae_ppo.stack_features(mu, mb["stack"]))
    l_ppo, _ = vae_ppo.ppo_loss(logits, value, mb, args)
    torch.manual_seed(7)
    l_vae, _ = vae_ppo.vae_loss(agent, frames[3:], mu[3:], logvar[3:], args)
    at_u, alone = [], []
    for l_x in (l_ppo, l_vae):
        g_u, *g = torch.autograd.grad(l_x, [mu, *weights], retain_graph=True)
        at_u.append(g_u)
        alone.append(torch.cat([x.flatten() for x in g]))
    return metrics, at_u, joint, alone


def test_joint_gradient_is_kappa_ppo_plus_vae(joint_step):
    """The encoder's gradient in joint is kappa * g_ppo + g_vae, each taken alone."""
    _, _, joint, (g_ppo, g_vae) = joint_step
    assert 3 * g_ppo.norm() > 1e-3 * g_vae.norm()  # else the sum would not show it
    atol = 1e-3 * g_ppo.abs().max().item()
    torch.testing.assert_close(joint - g_vae, 3 * g_ppo, rtol=1e-2, atol=atol)


def test_logged_gradients_are_those_of_each_loss_at_u(joint_step):
    """grad/ppo_at_U and grad/vae_at_U are the norms of d L_PPO / dU, without kappa, and d L_VAE /
    dU, over the means of all frames."""
    metrics, (g_ppo, g_vae), *_ = joint_step
    torch.testing.assert_close(metrics["grad/ppo_at_U"], g_ppo.norm(), rtol=1e-4, atol=0)
    torch.testing.assert_close(metrics["grad/vae_at_U"], g_vae.norm(), rtol=1e-4, atol=0)


# ---- Environment ----
@pytest.fixture(scope="module")
def breakout():
    """800 steps of 4 real games, whose player never serves: games, and one dict per step."""
    args = make_args("joint", "--num-envs 4 --total-timesteps 64 --runs-dir none")
    envs, fire = vae_ppo.make_envs(args)
    games = vae_ppo.Games(envs, fire, np.arange(4))
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
    return games, log


def ends(log):
    """(step, next step, game) at each end of a life or a game."""
    return [(a, b, n) for a, b in itertools.pairwise(log) for n in np.flatnonzero(a["done"])]


def test_a_lost_life_ends_the_episode_and_fire_serves(breakout):
    """After each lost life, five to none, comes a reset row with FIRE in the same game; no other
    row has FIRE."""
    _, log = breakout
    lost = [(a, b, n) for a, b, n in ends(log) if a["lives"][n] > 0]
    lives = [a["lives"][n] for n in range(4) for a in log if a["done"][n]]
    assert set(itertools.pairwise(lives)) >= {(4, 3), (3, 2), (2, 1), (1, 0), (0, 4)}
    for a, b, n in lost:
        assert b["sent"][n] == 1 and b["lives"][n] == a["lives"][n] and not b["done"][n]
        assert b["episode_frame_number"][n] == a["episode_frame_number"][n] + 4
    for a, b in itertools.pairwise(log):
        assert np.array_equal(b["sent"] == 1, a["done"])
        assert (a["done"] | (b["lives"] == a["lives"]) | b["done"]).all()


def test_a_new_game_follows_a_game_over(breakout):
    """The row after a game over pays nothing and returns the first frame of five new lives."""
    _, log = breakout
    over = [(b, n) for a, b, n in ends(log) if a["lives"][n] == 0]
    assert len(over) > 4
    for b, n in over:
        assert b["reward"][n] == 0 and b["lives"][n] == 5
        assert b["episode_frame_number"][n] <= 30 and not b["done"][n]


def test_scores_are_those_of_whole_games(breakout):
    """`scores` has the sum of raw rewards of every finished game, all five lives, in order."""
    games, log = breakout
    total = np.zeros(4)
    scores = []
    for step in log[:-1]:
        total += step["reward"]
        for n in np.flatnonzero(step["done"] & (step["lives"] == 0)):
            scores.append(total[n])
            total[n] = 0
    assert list(games.scores) == scores and sum(scores) > 0


def test_the_score_is_of_the_last_100_games():
    """A resumed run's scores are those of the last 100 games, which it had before."""
    assert list(vae_ppo.Games(NoiseEnvs(2), 1, None, range(150)).scores) == list(range(50, 150))


def test_rewards_are_raw_and_fire_may_be_missing():
    """A dot in Ms. Pac-Man, which has no FIRE, pays its raw 10, and NOOP stands in for FIRE."""
    envs, fire = vae_ppo.make_envs(make_args("joint", "--env-id ALE/MsPacman-v5 --num-envs 1"))
    games = vae_ppo.Games(envs, fire, np.array([0]))
    rewards = [int(games.step(np.array([3]))[1][0]) for _ in range(100)]
    assert fire == 0 and 10 in rewards and games.score == sum(rewards)


@pytest.mark.parametrize("probability", (0.0, 0.25))
def test_actions_stick_as_often_as_asked(probability):
    """The emulator has --repeat-action-probability, which is 0 where nothing is said."""
    flags = f"--repeat-action-probability {probability}" if probability else ""
    envs, _ = vae_ppo.make_envs(make_args("joint", flags))
    assert envs.spec.kwargs["repeat_action_probability"] == probability


def test_preprocessing_is_that_of_opencv():
    """Frames equal, to the pixel, skip 4, max of two, grey and INTER_AREA on raw ALE screens."""
    envs, fire = vae_ppo.make_envs(make_args("joint", "--num-envs 2"))
    obs, info = envs.reset(seed=np.array([5, 6]))
    noops = info["episode_frame_number"]
    actions = np.random.default_rng(0).integers(0, 4, (60, 2))
    frames = np.stack([obs, *(envs.step(action)[0] for action in actions)])[:, :, 0]
    assert len(set(noops)) == 2
    for n in range(2):
        ale = ale_py.ALEInterface()
        ale.setLoggerMode(ale_py.LoggerMode.Error)
        ale.setFloat("repeat_action_probability", 0.0)
        ale.loadROM(ale_py.roms.get_rom_path("breakout"))
        ale.reset_game()
        buttons = ale.getMinimalActionSet()
        for button in [buttons[fire]] + [buttons[0]] * (noops[n] - 1):
            ale.act(button)
        expected = [ale.getScreenGrayscale()]
        screens = []
        for action in actions[:, n]:
            for _ in range(4):
                ale.act(buttons[action])
                screens.append(ale.getScreenGrayscale())
            expected.append(np.maximum(*screens[-2:]))
        for frame, screen in zip(frames[:, n], expected, strict=True):
            assert np.array_equal(frame, cv2.resize(screen, (84, 84), interpolation=cv2.INTER_AREA))


def test_no_two_runs_processes_or_starts_share_seeds():
    """Seeds of games and torch differ between runs, ranks and starts, and repeat on demand."""
    args = make_args("joint")
    seen = []
    for args.seed, rank, step in itertools.product((1, 2), range(3), (0, 2048, 4096)):
        seeds = vae_ppo.draw_seeds(args, rank, step).tolist()
        seen += [*seeds, torch.initial_seed()]
        assert vae_ppo.draw_seeds(args, rank, step).tolist() == seeds
    assert len(set(seen)) == 18 * 3 and min(seen) >= 0 and max(seen) < 2**31


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
    """A rollout's log pi and V are those of real frame stacks, which a reset row starts afresh."""
    agent = make_agent(num_stack)
    buffer, games = play(agent, T=20)
    log_probs, values = slow_policy(agent, games.envs.seen)
    assert buffer.reset_row.sum() > 5
    torch.testing.assert_close(buffer.logits.log_softmax(-1), log_probs, rtol=0, atol=1e-4)
    torch.testing.assert_close(buffer.values, values, rtol=0, atol=1e-4)


def test_the_next_rollout_carries_frames_over():
    """A second rollout, with new weights, sees the first one's last frames in its first stacks."""
    agent = make_agent()
    buffer, games = play(agent, T=10, p=0.05)
    agent.load_state_dict(make_agent(seed=9).state_dict())
    vae_ppo.rollout(agent, games, buffer)
    log_probs, values = slow_policy(agent, games.envs.seen)
    assert (buffer.stack[0, :, 0] < 3).any()  # an episode goes on
    torch.testing.assert_close(buffer.logits.log_softmax(-1), log_probs[10:], rtol=0, atol=1e-4)
    torch.testing.assert_close(buffer.values, values[10:], rtol=0, atol=1e-4)


def test_a_stack_repeats_the_first_frame_of_an_episode():
    """A stack has the rows of the last frames, oldest first, and none before the reset row's."""
    agent = make_agent()
    buffer = vae_ppo.Buffer(agent, 5, 1, torch.device("cpu"))
    buffer.stack[0] = 3
    buffer.reset_row[2] = True  # step 1 ended an episode
    with torch.no_grad():
        for t in range(6):
            vae_ppo.act(agent, buffer, t)
    expected = [[3, 3, 3, 3], [3, 3, 3, 4], [3, 3, 4, 5], [6, 6, 6, 6], [6, 6, 6, 7], [6, 6, 7, 8]]
    assert buffer.stack[:, 0].tolist() == expected


def test_a_rollout_holds_what_the_games_gave_and_the_sign_of_rewards():
    """Frames, ends of episodes and the signs of rewards are the games' own, in a second rollout,
    too, which begins with the last frame and the reset rows of the first."""
    buffer, games = play(make_agent(), times=2, p=0.6)
    frames, reward, terminated, truncated = map(np.array, zip(*games.envs.seen, strict=True))
    done = terminated | truncated
    assert abs(reward).max() > 1 and done[16].any()
    assert np.array_equal(buffer.frames, frames[13:, :, 0])
    assert np.array_equal(buffer.rewards, np.sign(reward[17:]))
    assert np.array_equal(buffer.terminated, terminated[17:])
    assert np.array_equal(buffer.reset_row, done[16:])


def test_actions_are_sampled_from_the_policy():
    """Actions are as frequent as pi has them."""
    agent = make_agent()
    pi = torch.tensor([0.1, 0.2, 0.7])
    agent.actor.weight.data.zero_()
    agent.actor.bias.data = pi.log()
    buffer, _ = play(agent, T=200)
    frequency = buffer.actions.flatten().bincount() / buffer.actions.numel()
    torch.testing.assert_close(frequency, pi, rtol=0, atol=0.06)


def test_gae_by_hand():
    """GAE gives the numbers of a pencil: on, truncated (bootstrapped) and terminated (not)."""
    no, at_1 = torch.zeros(3, 1, dtype=torch.bool), torch.tensor([[False], [True], [False]])
    cases = [(no, no, [1.5, 2, 2]), (no, at_1, [1.375, 1.5, 2]), (at_1, at_1, [1, 0, 2])]
    for terminated, done, advantages in cases:
        buffer = SimpleNamespace(T=3, terminated=terminated, reset_row=torch.cat([no[:1], done]))
        buffer.rewards = torch.tensor([[1.0], [2], [3]])
        buffer.values = torch.tensor([[1.0], [2], [3], [4]])
        buffer.advantages, buffer.returns = torch.zeros(2, 3, 1)
        vae_ppo.gae(buffer, 0.5, 0.5)
        assert buffer.advantages.flatten().tolist() == advantages
        assert (buffer.returns - buffer.advantages).flatten().tolist() == [1, 2, 3]


@given(st.integers(1, 12), st.integers(1, 3), st.floats(0, 1), st.floats(0, 1), st.integers(0, 999))
def test_gae_is_the_quadratic_sum(T, N, gamma, gae_lambda, seed):
    """On every step but a reset row, GAE is its O(T^2) definition over its own episode alone."""
    rng = np.random.default_rng(seed)
    rewards = rng.normal(size=(T, N))
    values = rng.normal(size=(T + 1, N))
    terminated, truncated = rng.random((2, T, N)) < 0.2
    reset_row = np.vstack([np.zeros((1, N), dtype=bool), terminated | truncated])
    noisy = np.where(reset_row[:-1], 1e6, rewards)  # what a reset row pays belongs to nobody
    buffer = SimpleNamespace(T=T, rewards=torch.tensor(noisy), values=torch.tensor(values))
    buffer.terminated = torch.tensor(terminated)
    buffer.reset_row = torch.tensor(reset_row)
    buffer.advantages, buffer.returns = torch.zeros(2, T, N, dtype=torch.float64)
    vae_ppo.gae(buffer, gamma, gae_lambda)
    advantages = buffer.advantages
    for t, n in itertools.product(range(T), range(N)):
        expected = 0.0
        for k in range(t, T):
            next_value = 0.0 if terminated[k, n] else values[k + 1, n]
            delta = rewards[k, n] + gamma * next_value - values[k, n]
            expected += (gamma * gae_lambda) ** (k - t) * delta
            if reset_row[k + 1, n]:
                break
        if not reset_row[t, n]:
            assert advantages[t, n].item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("T, N", ((1, 1), (1, 2), (2, 1)))
def test_the_smallest_rollouts_work(T, N):
    """Rollouts of one step, of one game, or of both are learnt from."""
    flags = f"--num-steps {T} --num-envs {N} --segment-length 1 --num-minibatches 1"
    assert run_main(tiny("joint", f"{flags} --total-timesteps {3 * T * N}")) == 0
    assert len(rows_of("runs/r")) == 3


# ---- Update ----
def spy(monkeypatch, name, before):
    """Has `before` see the inputs of each call of a function of vae_ppo.py, which goes on."""
    real = getattr(vae_ppo, name)

    def spied(*inputs):
        before(*inputs)
        return real(*inputs)

    monkeypatch.setattr(vae_ppo, name, spied)


@pytest.mark.parametrize("mode", ("fixed", "adapt", "joint"))
def test_minibatches_see_the_stacks_of_the_rollout(mode, monkeypatch):
    """With the weights of the rollout, an update's log pi and V are the rollout's, step by step."""
    agent = make_agent()
    buffer, _ = play(agent, times=2)
    shares = []

    def compare(logits, value, mb, args):
        shares.append(value.numel())
        torch.testing.assert_close(logits, mb["logits"], rtol=0, atol=1e-3)
        torch.testing.assert_close(value, mb["values"], rtol=0, atol=1e-4)

    spy(monkeypatch, "ppo_loss", compare)
    args = make_args(mode)
    if mode == "fixed":
        agent.encode = None  # it reads the means of the rollout
    for segments in vae_ppo.minibatches(buffer, args):
        vae_ppo.minibatch_loss(agent, buffer, segments, args)
    assert shares == [24, 24]


@pytest.mark.parametrize("num_stack", (1, 4))
def test_joint_has_the_loss_of_the_plain_way(num_stack):
    """The naive loss, which encodes every stack, is the script's. Of stacks only PPO's part is,
    since the naive L_VAE counts a frame as often as it is in one."""
    agent = make_agent(num_stack)
    buffer, _ = play(agent)
    args = make_args("joint", f"--num-stack {num_stack}")
    mb = one_minibatch(buffer, args)
    torch.manual_seed(0)
    loss, metrics = vae_ppo.minibatch_loss(agent, buffer, mb, args)
    torch.manual_seed(0)
    plain_loss, plain_metrics = naive_loss(agent, buffer, mb, args)
    if num_stack == 1:
        torch.testing.assert_close(loss, plain_loss)
    for name, x in plain_metrics.items():
        torch.testing.assert_close(metrics[name], x, rtol=1e-4, atol=1e-5)


@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), st.integers(0, 9), st.data())
def test_minibatches_cover_each_step_once(L, pieces, N, seed, data):
    """An epoch has every step of every game once, each with what belongs to it."""
    T = L * pieces
    divisors = [m for m in range(1, pieces * N + 1) if pieces * N % m == 0]
    args = SimpleNamespace(segment_length=L, num_minibatches=data.draw(st.sampled_from(divisors)))
    args.update_epochs = 2
    buffer = vae_ppo.Buffer(make_agent(3), T, N, torch.device("cpu"))
    ids = torch.arange(T * N).view(T, N)
    g = torch.Generator().manual_seed(seed)
    age = (torch.rand(T + 1, N, 3, generator=g) * 3).long()
    belonging = {
        "actions": ids,
        "values": ids + 0.1,
        "logits": (ids + 0.2)[..., None].expand(T, N, 3),
        "advantages": ids + 0.3,
        "returns": ids + 0.4,
        "reset_row": torch.rand(T, N, generator=g) < 0.3,
    }
    for name, x in belonging.items():
        getattr(buffer, name)[:T] = x
    buffer.stack[:] = 2 + torch.arange(T + 1)[:, None, None] - age
    buffer.frames[:] = torch.arange((T + 3) * N).view(T + 3, N, 1, 1)
    torch.manual_seed(seed)
    batches = [vae_ppo.gather(buffer, x, L) for x in vae_ppo.minibatches(buffer, args)]
    assert len(batches) == 2 * args.num_minibatches
    for mb in batches:
        step = mb["actions"]
        assert step.shape == (L, pieces * N // args.num_minibatches)
        for name, x in belonging.items():
            assert torch.equal(mb[name], x.flatten(0, 1)[step])
        seen = vae_ppo.stack_features(buffer.frames[mb["rows"]][..., :1, 0], mb["stack"])
        t, n = step[..., None] // N, step[..., None] % N
        assert torch.equal(seen.long(), buffer.stack[t, n].squeeze(2) * N + n)
    for epoch in (batches[: args.num_minibatches], batches[args.num_minibatches :]):
        steps = torch.cat([mb["actions"].flatten() for mb in epoch])
        assert steps.sort().values.tolist() == list(range(T * N))


def pretrain(agent, optimizer, frames, args, monkeypatch, epochs=1):
    """The metrics of epochs of pretraining on these frames."""
    monkeypatch.setattr(vae_ppo, "collect_frames", lambda *_: frames)
    return list(vae_ppo.learn_vae(agent, optimizer, None, args, range(epochs)))


def test_every_epoch_has_its_own_order(monkeypatch):
    """Two epochs over a rollout, or over pretraining's frames, go through them in other orders."""
    agent = make_agent()
    buffer, _ = play(agent, T=64)
    args = make_args("joint", "--update-epochs 2 --num-minibatches 1")
    one, two = vae_ppo.minibatches(buffer, args)
    assert not torch.equal(one, two)
    orders = []
    spy(monkeypatch, "vae_loss", lambda *inputs: orders.append(inputs[1][:, 0, 0]))
    frames = torch.arange(128, dtype=torch.uint8)[:, None, None].expand(-1, 84, 84)
    optimizer = torch.optim.Adam(agent.encoder.parameters(), 0.0)
    pretrain(agent, optimizer, frames, args, monkeypatch, epochs=2)
    assert not torch.equal(*orders)
    assert all(order.sort().values.tolist() == list(range(128)) for order in orders)


def learn(flags, lr=1e-3):
    """One update of 16 minibatches in adapt: its metrics, number of Adam's steps, and weights."""
    agent = make_agent()
    buffer, _ = play(agent)
    optimizer = torch.optim.Adam(agent.parameters(), lr)
    torch.manual_seed(5)
    args = make_args("adapt", f"--update-epochs 8 {flags}")
    metrics = vae_ppo.update(agent, optimizer, buffer, args)
    steps = {int(state["step"]) for state in optimizer.state.values()}
    return metrics, max(steps), agent.state_dict()


@pytest.mark.parametrize(
    "lr, flags, stops", [(0.1, "", 1), (1e-9, "", 0), (0.1, "--target-kl 0", 0)]
)
def test_the_kl_stops_an_update(lr, flags, stops):
    """A huge learning rate ends the update early, a tiny one never, nor does a target of 0."""
    metrics, steps, _ = learn(flags, lr)
    assert metrics["losses/updates"] == steps
    assert 0 < steps < 16 if stops else steps == 16


def test_the_kl_stop_comes_before_the_step():
    """A minibatch whose KL is past the target is not learnt from: here the second, after one."""
    metrics, steps, weights = learn("--target-kl 1e-5", 0.01)
    assert metrics["losses/approx_kl"] > 1e-5
    assert steps == metrics["losses/updates"] == 1
    args = make_args("adapt")
    agent = make_agent()
    buffer, _ = play(agent)
    optimizer = torch.optim.Adam(agent.parameters(), 0.01)
    torch.manual_seed(5)
    loss, _ = vae_ppo.minibatch_loss(agent, buffer, one_minibatch(buffer, args), args)
    vae_ppo.clipped_gradient(optimizer, loss, args.max_grad_norm)
    optimizer.step()
    assert same(weights, agent.state_dict())


@pytest.mark.parametrize("limit, length", ((0.5, 0.5), (0.0, 5.0), (9.0, 5.0)))
def test_the_gradient_is_clipped(limit, length):
    """A gradient longer than max_grad_norm is shortened to it; 0 leaves it; its norm is logged;
    nothing of it is left for the next step."""
    weight = nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([weight], 1.0)
    for step in (1, 2):
        loss = (weight * torch.tensor([3.0, 4.0])).sum()
        norm = vae_ppo.clipped_gradient(optimizer, loss, limit)
        optimizer.step()
        assert norm.item() == pytest.approx(5)
        assert weight.norm().item() == pytest.approx(step * length, rel=1e-4)


@pytest.mark.parametrize("foresight", (0, 1))
def test_explained_variance_is_1_for_a_perfect_value_and_0_for_a_constant(foresight):
    """Without a future (gamma = 0) a V equal to the rewards explains all, a constant V nothing,
    whatever V is on reset rows, which are not learnt from."""
    agent = make_agent()
    buffer, _ = play(agent)
    buffer.values[:-1] = foresight * buffer.rewards
    assert buffer.reset_row[:-1].any()
    buffer.values[:-1][buffer.reset_row[:-1]] = 100
    optimizer = torch.optim.Adam(agent.parameters())
    metrics = vae_ppo.update(agent, optimizer, buffer, make_args("adapt", "--gamma 0"))
    assert metrics["losses/explained_variance"] == pytest.approx(foresight, abs=1e-5)


# ---- Pretraining ----
def test_pretraining_lowers_the_loss(vae_run):
    """Each epoch of pretraining has a lower L_VAE than the one before."""
    losses = [float(row["vae/recon_loss"]) + float(row["vae/kl"]) for row in rows_of(vae_run)]
    assert len(losses) == 3 and losses[2] < losses[1] < losses[0]


@pytest.mark.parametrize("num_stack, latent_dim", ((None, None), (4, 20), (1, 9)))
def test_pretraining_frames_are_those_of_its_player(num_stack, latent_dim, monkeypatch):
    """The frames are the games' own, num_frames of them, played by --policy, whatever its
    sizes, or by chance."""
    flags = ""
    if num_stack:
        policy = make_agent(num_stack, latent_dim).state_dict()
        saved = vars(make_args("joint", f"--num-stack {num_stack} --latent-dim {latent_dim}"))
        torch.save({"weights": policy, "args": saved}, "policy.pt")
        flags = "--policy policy.pt"
    calls = []
    spy(monkeypatch, "rollout", lambda *inputs: calls.append(inputs))
    envs = NoiseEnvs(2)
    games = vae_ppo.Games(envs, 1, None)
    args = make_args("pretrain", f"{flags} --num-frames 13")
    frames = vae_ppo.collect_frames(args, games, 3, torch.device("cpu"))
    assert np.array_equal(frames, np.concatenate([obs[:, 0] for obs, *_ in envs.seen])[:13])
    ((player, _, buffer),) = calls
    if num_stack:
        assert same(player.state_dict(), policy)
    else:
        assert (buffer.logits == 0).all()


def test_pretraining_weighs_the_kl_by_beta(monkeypatch):
    """--beta is the weight of the KL in pretraining."""
    agent = make_agent()
    optimizer = torch.optim.Adam(agent.encoder.parameters(), 0.0)
    frames = torch.from_numpy(noise(3, rng=np.random.default_rng(0)))
    norms = []
    for beta in (0, 1000):
        args = make_args("pretrain", f"--beta {beta}")
        torch.manual_seed(0)
        (metrics,) = pretrain(agent, optimizer, frames, args, monkeypatch)
        norms.append(metrics["grad/norm"])
    assert norms[1] > 10 * norms[0]


# ---- Training: runs ----
@pytest.fixture(scope="module")
def joint_runs(tmp_path_factory):
    """Folders of joint runs of two iterations: a and b differ in threads alone, c in the seed."""
    folder = tmp_path_factory.mktemp("joint")
    for name, seed, threads in (("a", 1, 1), ("b", 1, 2), ("c", 2, 1)):
        flags = f"--total-timesteps 64 --seed {seed} --env-threads {threads} --runs-dir {folder}"
        assert run_main(tiny("joint", flags, name)) == 0
    return folder


def test_equal_seeds_are_bitwise_equal_and_others_differ(joint_runs):
    """Equal seeds give bitwise equal weights and logs, whatever the number of emulator threads;
    another seed gives other weights, and other games and noise from the first iteration on."""
    a, b, c = (load(joint_runs / name)["weights"] for name in "abc")
    assert same(a, b) and not same(a, c)
    rows = [rows_of(joint_runs / name) for name in "abc"]
    for a, b, c in zip(*rows, strict=True):
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


VISUAL_TASK = """--num-envs 8 --update-epochs 2 --gamma 0.5 --num-stack 2 --latent-dim 8
    --target-kl 0 --no-anneal-lr"""


@pytest.mark.parametrize("mode, at_least, at_most", (("adapt", 6, 8), ("fixed", 0, 4)))
def test_adapt_learns_what_its_vae_left_out_and_fixed_does_not(
    mode, at_least, at_most, monkeypatch
):
    """On an encoder whose mu tells nothing of the square, adapt learns to name its place: 6 of 8
    and more, where chance has 2.7; fixed stays near chance."""
    monkeypatch.setattr(vae_ppo, "make_envs", lambda args: (SquareEnvs(args.num_envs), 0))
    argv = tiny(mode, f"{VISUAL_TASK} --total-timesteps 6144 --learning-rate 1e-3")
    blind = make_agent(2, 8, 3, 1)
    blind.mu.weight.data *= 1e-4  # the square is there, but too faint for a policy to learn from
    saved = vars(make_args("pretrain", "--latent-dim 8"))
    torch.save({"weights": blind.state_dict(), "args": saved}, "vae.pt")
    assert run_main(argv) == 0
    assert at_least * 16 <= sum(load("runs/r")["scores"][-16:]) <= at_most * 16


def test_joint_learns_a_small_visual_task(monkeypatch):
    """In 3 072 steps joint learns to name the square's place: 6 of 8, where chance has 2.7."""
    monkeypatch.setattr(vae_ppo, "make_envs", lambda args: (SquareEnvs(args.num_envs), 0))
    assert run_main(tiny("joint", f"{VISUAL_TASK} --total-timesteps 3072")) == 0
    assert sum(load("runs/r")["scores"][-16:]) > 6 * 16


# ---- Training: stop and resume ----
def test_stop_and_resume_go_on_where_they_were(monkeypatch):
    """A run stopped in its second of four iterations saves, and resumed it has its weights,
    moments, schedule, counters and scores, without a gap or a repeat in metrics.csv."""
    states, rates, signals, seeds = [], [], [], []

    def before_update(agent, optimizer, *_):
        states.append(copy.deepcopy((agent.state_dict(), optimizer.state_dict()["state"])))
        rates.append(optimizer.param_groups[0]["lr"])
        if len(rates) == 2:
            signals.append(signal.SIGTERM)

    spy(monkeypatch, "update", before_update)
    real = vae_ppo.draw_seeds
    monkeypatch.setattr(
        vae_ppo, "draw_seeds", lambda *x: (drawn := real(*x), seeds.append(drawn.tolist()))[0]
    )
    argv = tiny("joint", "--total-timesteps 128 --learning-rate 0.004")
    assert run_main(argv, signals) == 0
    saved = load("runs/r")
    assert saved["global_step"] == 64
    saved["scores"] = [3.0, 4.0]
    torch.save(saved, "runs/r/checkpoint.pt")
    assert run_main([*argv, "--resume"]) == 0
    assert len(seeds) == 2 and not set(seeds[0]) & set(seeds[1])  # it plays new games
    weights, moments = states[2]
    assert same(weights, saved["weights"])
    assert moments.keys() == saved["optimizer"]["state"].keys() != set()
    for key, state in moments.items():
        assert same(state, saved["optimizer"]["state"][key])
    rows = rows_of("runs/r")
    assert [row["global_step"] for row in rows] == ["32", "64", "96", "128"]
    assert rates == pytest.approx([4e-3, 3e-3, 2e-3, 1e-3])
    assert [float(row["charts/learning_rate"]) for row in rows] == pytest.approx(rates)
    assert float(rows[2]["charts/episodic_return"]) == 3.5
    assert load("runs/r")["scores"][:2] == [3, 4]


@pytest.mark.parametrize(
    "flags, rate", (("--total-timesteps 128", 5e-4), ("--learning-rate 1e-4 --no-anneal-lr", 1e-4))
)
def test_a_resumed_run_follows_its_new_settings(flags, rate, joint_runs, capsys):
    """After 64 steps a run is resumed to another length, or with another learning rate: the rate
    is that of the new settings, and what has changed is printed."""
    shutil.copytree(joint_runs / "a", "runs/r")
    assert run_main(tiny("joint", f"--total-timesteps 96 {flags} --resume")) == 0
    assert float(rows_of("runs/r")[2]["charts/learning_rate"]) == pytest.approx(rate)
    assert flags.split()[0].strip("-").replace("-", "_") in capsys.readouterr().out


def resumed(source, name, flags):
    """The checkpoint after a copy of `source` went on."""
    shutil.copytree(source, f"runs/{name}")
    assert run_main(tiny("joint", f"--resume {flags}", name)) == 0
    return load(f"runs/{name}")


def test_two_resumes_of_a_checkpoint_are_bitwise_equal(joint_runs):
    """From equal checkpoints the next update is bitwise equal, for 1 and 2 emulator threads."""
    a = resumed(joint_runs / "a", "x", "--total-timesteps 96 --env-threads 1")
    b = resumed(joint_runs / "a", "y", "--total-timesteps 96 --env-threads 2")
    assert a["global_step"] == b["global_step"] == 96 and a["scores"] == b["scores"]
    assert same(a["weights"], b["weights"])
    for key, state in a["optimizer"]["state"].items():
        assert same(state, b["optimizer"]["state"][key])


@pytest.mark.parametrize("saved", (True, False))
def test_resume_drops_rows_after_the_checkpoint(saved, joint_runs):
    """Rows that a killed run logged after its checkpoint, and half a row, are gone on resuming; a
    run that was killed before its first checkpoint begins anew."""
    shutil.copytree(joint_runs / "a", "runs/r")
    with open("runs/r/metrics.csv", "a") as file:
        file.write("96,1.0,2.0,3.0\n9")
    if not saved:
        Path("runs/r/checkpoint.pt").unlink()
    steps = 96 if saved else 64
    assert run_main(tiny("joint", f"--resume --total-timesteps {steps}")) == 0
    rows = rows_of("runs/r")
    assert [int(row["global_step"]) for row in rows] == list(range(32, steps + 1, 32))
    assert all(row["vae/kl"] for row in rows)
    assert saved or same(load("runs/r")["weights"], load(joint_runs / "a")["weights"])


def test_a_finished_run_says_so_when_it_is_resumed(joint_runs, capsys, monkeypatch):
    """Resuming a finished run says so, ends with 0, plays nothing and changes no file."""
    monkeypatch.delattr(vae_ppo, "rollout")
    folder = shutil.copytree(joint_runs / "a", "runs/r")
    before = {path: path.read_bytes() for path in Path(folder).iterdir()}
    assert run_main(tiny("joint", "--total-timesteps 64 --resume")) == 0
    assert "64 of 64 steps: it is finished" in capsys.readouterr().out
    assert before == {path: path.read_bytes() for path in Path(folder).iterdir()}


def test_a_gradient_that_is_not_finite_ends_the_run_unsaved(monkeypatch):
    """A NaN in the weights ends the run with a sentence; the checkpoint before it stays."""

    def before_update(agent, *_):
        if rows_of("runs/r"):
            agent.critic.weight.data.fill_(math.nan)

    spy(monkeypatch, "update", before_update)
    answer = run_main(tiny("joint", "--checkpoint-every 1 --total-timesteps 64"))
    assert "grad/norm is nan: lower --learning-rate" in answer
    assert load("runs/r")["global_step"] == 32 and len(rows_of("runs/r")) == 1


# ---- Training: processes ----
@contextlib.contextmanager
def started(*argvs, wait=True, **environment):
    """The program as processes, one rank each, which have logged a row; killed at the end."""
    environment |= {**os.environ, "OMP_NUM_THREADS": "1"}
    processes = []
    for rank, argv in enumerate(argvs):
        command = [sys.executable, vae_ppo.__file__, *argv]
        env = {**environment, "RANK": str(rank)}
        processes.append(subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True))
    try:
        while wait and processes[0].poll() is None and not rows_of("runs/r"):
            time.sleep(0.1)
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.communicate()


ENDLESS = "--total-timesteps 1000000 --checkpoint-every 1"


@pytest.mark.parametrize("number", (signal.SIGINT, signal.SIGTERM, signal.SIGHUP))
def test_ctrl_c_saves_and_ends_the_program(number):
    """Ctrl-C, SIGTERM or a closed terminal has a running program say that it will save, save, and
    exit with 128 and the signal's number."""
    with started(tiny("joint", "--total-timesteps 1000000")) as (process,):
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + number and "Traceback" not in errors
    assert "finishing this iteration, then saving; --resume goes on" in errors
    assert load("runs/r")["global_step"] == int(rows_of("runs/r")[-1]["global_step"])


def test_a_second_ctrl_c_ends_the_program_at_once():
    """A second Ctrl-C, in an iteration that would take minutes, ends the program."""
    with started(tiny("joint", "--total-timesteps 9000000 --num-steps 80000"), wait=False) as (p,):
        while not Path("runs/r/metrics.csv").exists():
            time.sleep(0.1)
        time.sleep(1)
        for _ in range(2):
            p.send_signal(signal.SIGINT)
            time.sleep(0.5)
        p.communicate(timeout=30)
    assert p.returncode == -signal.SIGINT and not rows_of("runs/r")


def test_nohup_and_a_closed_pipe_do_not_end_a_run():
    """A run under nohup ignores SIGHUP; one whose stderr is a closed pipe goes on to its end."""
    command = ["nohup", sys.executable, vae_ppo.__file__, *tiny("joint", "--total-timesteps 320")]
    read, write = os.pipe()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=write)
    os.close(write)
    while process.poll() is None and not rows_of("runs/r"):
        time.sleep(0.1)
    os.close(read)
    process.send_signal(signal.SIGHUP)
    process.wait(timeout=120)
    assert load("runs/r")["global_step"] == 320


def test_train_runs_in_a_thread_and_leaves_signals_alone():
    """train() works where signals cannot be caught, and changes no handler."""
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    thread = threading.Thread(target=run_main, args=(tiny("joint"),))
    thread.start()
    thread.join()
    assert len(rows_of("runs/r")) == 1
    assert handlers == [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]


def test_a_second_process_in_a_live_run_is_refused():
    """--resume beside a live run is refused in one sentence and harms nothing; once the first is
    killed, its run goes on."""
    argv = [*tiny("joint", ENDLESS), "--resume"]
    with started(tiny("joint", ENDLESS)) as (process,):
        while process.poll() is None and not Path("runs/r/checkpoint.pt").exists():
            time.sleep(0.1)
        before = Path("runs/r/metrics.csv").read_bytes()
        assert "another process at work" in run_main(argv)
        assert process.poll() is None
        assert Path("runs/r/metrics.csv").read_bytes().startswith(before)
    steps = load("runs/r")["global_step"] + 32
    assert run_main([*argv, "--total-timesteps", str(steps)]) == 0
    logged = [int(row["global_step"]) for row in rows_of("runs/r")]
    assert logged == list(range(32, steps + 1, 32))


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


def loss_of_rank(agent, rank):
    """L_joint of a minibatch of the games of one process."""
    args = make_args("joint", "--run-name other --total-timesteps 256")
    buffer, _ = play(agent, seed=rank)
    return vae_ppo.minibatch_loss(agent, buffer, one_minibatch(buffer, args), args)[0]


def on_rank(rank, port):
    """One of two processes: a run of which rank 1 is stopped in its first iteration, and a step."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    torch.set_num_threads(1)
    kept, signals = {}, []
    real, loss = vae_ppo.update, vae_ppo.minibatch_loss

    def update(agent, optimizer, buffer, args):
        if rank == 1:
            signals.append(signal.SIGINT)
        metrics = real(agent, optimizer, buffer, args)
        kept.update(weights=agent.state_dict(), frames=buffer.frames.clone(), metrics=metrics)
        return metrics

    def keep_kl(*inputs):
        l_joint, metrics = loss(*inputs)
        kept["approx_kl"] = metrics["losses/approx_kl"].item()  # its own
        return l_joint, metrics

    vae_ppo.update, vae_ppo.minibatch_loss = update, keep_kl
    kept["code"] = run_main(tiny("joint", "--total-timesteps 256"), signals)
    vae_ppo.minibatch_loss = loss
    agent = make_agent()
    optimizer = torch.optim.SGD(agent.parameters(), lr=0.0)
    vae_ppo.clipped_gradient(optimizer, loss_of_rank(agent, rank))
    kept["gradient"] = [p.grad for p in agent.parameters()]

    def with_kl(*inputs):
        l_joint, metrics = loss(*inputs)
        return l_joint, metrics | {"losses/approx_kl": torch.tensor(float(rank))}

    vae_ppo.minibatch_loss = with_kl
    buffer, _ = play(agent)
    args = make_args("joint", "--run-name other --total-timesteps 256")
    kept["stopped"] = real(agent, optimizer, buffer, args)
    torch.save(kept, f"rank{rank}.pt")


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """What `on_rank` kept in each of two processes, and the folder of their run."""
    folder = tmp_path_factory.mktemp("ranks")
    with contextlib.chdir(folder):
        torch.multiprocessing.spawn(on_rank, (free_port(),), nprocs=2)
    ranks = [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(2)]
    return *ranks, folder / "runs/r"


def test_two_processes_end_with_equal_weights(two_ranks):
    """Two processes that play different games have bitwise equal weights after an iteration."""
    a, b, folder = two_ranks
    assert not torch.equal(a["frames"][3], b["frames"][3])  # the first, before any action
    assert same(a["weights"], b["weights"])
    assert same(a["weights"], load(folder)["weights"])


def test_two_processes_share_the_kl_that_stops_them(two_ranks):
    """The KL that both compare with the target is the mean of the two processes' own."""
    a, b, _ = two_ranks
    assert a["metrics"]["losses/updates"] == b["metrics"]["losses/updates"] == 2
    assert a["approx_kl"] != b["approx_kl"]
    shared = (a["approx_kl"] + b["approx_kl"]) / 2
    for rank in (a, b):
        assert rank["metrics"]["losses/approx_kl"] == pytest.approx(shared)
        assert rank["stopped"]["losses/updates"] == 1  # by rank 1's KL, which alone is too large


def test_two_processes_follow_the_mean_of_their_gradients(two_ranks):
    """Each steps along the mean of what either would do alone (advantages normalised in each)."""
    alone = []
    for rank in range(2):
        agent = make_agent()
        loss_of_rank(agent, rank).backward()
        alone.append([p.grad for p in agent.parameters()])
    for *shared, g0, g1 in zip(*(rank["gradient"] for rank in two_ranks[:2]), *alone, strict=True):
        for gradient in shared:
            torch.testing.assert_close(gradient, (g0 + g1) / 2, rtol=1e-4, atol=1e-6)


def test_a_signal_to_one_process_ends_all(two_ranks):
    """Ctrl-C that reaches one process alone ends all after the same iteration, saved."""
    a, b, folder = two_ranks
    assert (a["code"], b["code"]) == (0, 0)
    assert load(folder)["global_step"] == 64  # of two processes
    assert [row["global_step"] for row in rows_of(folder)] == ["64"]


# ---- Training: the device ----
WAITS = """_local_scalar_dense item nonzero nonzero_numpy masked_select is_nonzero equal _unique2
    bincount histc repeat_interleave lift_fresh lift_fresh_copy is_pinned""".split()


class NoWaits(TorchDispatchMode):
    """Refuses operators that would wait for a GPU, which a CUDA graph cannot record."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        name = operation.overloadpacket.__name__
        assert name not in WAITS
        if name.startswith("index"):
            indices = [x for x in tree_leaves(args[1]) if isinstance(x, torch.Tensor)]
            assert all(x.dtype == torch.long for x in indices), f"{name} by a mask"
        return operation(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", ("fixed", "adapt", "joint"))
def test_nothing_that_a_graph_would_record_waits_for_the_device(mode):
    """A step's work, GAE, a minibatch's loss, the clipped gradient and Adam's step are free of
    operators that wait for the device."""
    args = make_args(mode)
    vae_ppo.start_process(args)
    agent = make_agent()
    networks = vae_ppo.MODES[mode].networks
    parameters = [p for name in networks for p in getattr(agent, name).parameters()]
    optimizer = torch.optim.Adam(parameters, fused=True)
    buffer, _ = play(agent)
    segments = one_minibatch(buffer, args)
    with NoWaits():
        with torch.no_grad():
            for t in (0, 1, buffer.T):
                vae_ppo.act(agent, buffer, t)
        vae_ppo.gae(buffer, 0.99, 0.95)
        loss, _ = vae_ppo.minibatch_loss(agent, buffer, segments, args)
        vae_ppo.clipped_gradient(optimizer, loss, 0.5)
        optimizer.step()


# ---- Training: the device ----
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@needs_gpu
@pytest.mark.parametrize("mode", ("fixed", "adapt", "joint"))
def test_a_gpu_computes_what_the_cpu_does(mode, monkeypatch):
    """A GPU's rollout, loss, metrics and gradients are the CPU's, but for rounding."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # of 10 bits
    monkeypatch.setattr(torch, "randn_like", torch.ones_like)  # devices draw other noise
    args = make_args(mode, "--num-minibatches 1")
    agent = make_agent()
    cpu, _ = play(agent, times=2)
    gpu, _ = play(copy.deepcopy(agent).to("cuda"), times=2, device="cuda")
    assert torch.equal(cpu.frames, gpu.frames.cpu()) and torch.equal(cpu.stack, gpu.stack.cpu())
    gpu.actions.copy_(cpu.actions)  # and other actions
    agent.actor.weight.data *= 1.5  # now the policy differs from the rollout's
    answers = []
    for buffer, device in ((cpu, "cpu"), (gpu, "cuda")):
        own = copy.deepcopy(agent).to(device)
        torch.manual_seed(0)
        segments = torch.arange(buffer.N * 2, device=device)
        vae_ppo.gae(buffer, args.gamma, args.gae_lambda)
        loss, metrics = vae_ppo.minibatch_loss(own, buffer, segments, args)
        loss.backward()
        gradients = [p.grad for p in own.parameters() if p.grad is not None]
        tensors = [buffer.mu, buffer.logits, buffer.values, loss, *metrics.values(), *gradients]
        answers.append([x.cpu() for x in tensors])
    for x, y in zip(*answers, strict=True):
        assert (x - y).norm() <= 1e-3 * x.norm() + 1e-6


@needs_gpu
@pytest.mark.parametrize("mode", TRAINED)
def test_a_gpu_repeats_bitwise_and_a_cpu_goes_on(mode, vae_run):
    """Equal seeds give bitwise equal weights on a GPU; each device resumes the other's run."""
    for name in "ab":
        argv = tiny(mode, "--cuda", name, vae_run / "checkpoint.pt")
        assert run_main(argv) == 0
    weights = load("runs/a")["weights"]
    assert weights["mu.weight"].is_cuda and same(weights, load("runs/b")["weights"])
    done = len(rows_of("runs/a"))
    for rows, device in ((done + 1, "--no-cuda"), (done + 2, "--cuda")):
        length = f"--vae-epochs {rows}" if mode == "pretrain" else f"--total-timesteps {32 * rows}"
        argv = tiny(mode, f"{device} --resume {length}", "a", vae_run / "checkpoint.pt")
        assert run_main(argv) == 0
        assert len(rows_of("runs/a")) == rows


# ---- Checkpoint and log ----
class Malicious:
    def __reduce__(self):
        return os.system, ("touch harm-done",)


def torch_saved(x):
    torch.save(x, buffer := io.BytesIO())
    return buffer.getvalue()


DAMAGED = {
    "empty": lambda good: b"",
    "truncated": lambda good: good[: len(good) // 2],
    "garbage": lambda good: np.random.default_rng(0).bytes(5000),
    "malicious": lambda good: torch_saved({"weights": {}, "args": Malicious()}),
    "foreign": lambda good: torch_saved({"state_dict": {}}),
    "list": lambda good: torch_saved([1, 2]),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_checkpoint_is_refused(damage, joint_runs):
    """A damaged, foreign or malicious checkpoint is named, and nothing in it is executed."""
    Path("bad.pt").write_bytes(DAMAGED[damage]((joint_runs / "a/checkpoint.pt").read_bytes()))
    with pytest.raises(SystemExit, match="bad.pt is no checkpoint"):
        vae_ppo.load_checkpoint("bad.pt", None)
    assert os.listdir() == ["bad.pt"]


def test_a_save_is_on_the_disk_before_it_replaces_the_old_one(monkeypatch):
    """A checkpoint is flushed and synced before it takes the old one's place, and a save that
    fails leaves the old one as it was."""
    agent = make_agent()
    optimizer = torch.optim.Adam(agent.parameters())
    path, order = Path("checkpoint.pt"), []
    monkeypatch.setattr(os, "fsync", lambda file: order.append(os.fstat(file).st_size))
    replace = Path.replace
    monkeypatch.setattr(Path, "replace", lambda a, b: (order.append("replace"), replace(a, b)))
    vae_ppo.save_checkpoint(path, agent, optimizer, {"global_step": 1})
    old = path.read_bytes()
    assert order == [len(old), "replace"]  # no byte was left in a buffer

    def full(_):
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError):
        vae_ppo.save_checkpoint(path, agent, optimizer, {"global_step": 2})
    assert path.read_bytes() == old


def reading(flag, path):
    """A command line that reads the checkpoint runs/old/checkpoint.pt by --resume, or `path`."""
    if flag == "--resume":
        return tiny("joint", "--resume --total-timesteps 64", "old")
    mode = {"--vae": "adapt", "--policy": "pretrain"}[flag]
    return tiny(mode, f"{flag} {path}", "new")


def keep_changed(source, change):
    """runs/old/checkpoint.pt, a checkpoint that `change` was applied to."""
    checkpoint = load(source)
    change(checkpoint)
    Path("runs/old").mkdir(parents=True)
    torch.save(checkpoint, "runs/old/checkpoint.pt")
    return "runs/old/checkpoint.pt"


OTHER_KINDS = [
    ("--vae", {"env_id": "ALE/Pong-v5"}, ["ALE/Pong-v5", "ALE/Breakout-v5"]),
    ("--vae", {"latent_dim": 9}, ["latent_dim 9", "20"]),
    ("--policy", {"mode": "pretrain"}, ["pretrain"]),
    ("--policy", {"env_id": "ALE/Pong-v5"}, ["ALE/Pong-v5", "ALE/Breakout-v5"]),
    ("--resume", {"mode": "adapt"}, ["mode adapt", "joint"]),
    ("--resume", {"num_stack": 2}, ["num_stack 2", "4"]),
    ("--resume", {"latent_dim": 9}, ["latent_dim 9", "20"]),
]


@pytest.mark.parametrize("flag, settings, words", OTHER_KINDS)
def test_a_checkpoint_of_other_settings_is_refused(flag, settings, words, joint_runs, capsys):
    """A checkpoint of another mode, game, size or setting is refused, which it names."""
    path = keep_changed(joint_runs / "a", lambda saved: saved["args"].update(settings))
    refused(reading(flag, path), capsys, path, *words)


@pytest.mark.parametrize("flag", ("--resume", "--vae", "--policy"))
def test_weights_of_another_network_show_what_does_not_fit(flag, joint_runs, vae_run):
    """A copier who changed a layer sees load_state_dict's own message."""

    def change(saved):
        saved["weights"]["encoder.0.bias"] = torch.zeros(99)

    path = keep_changed(vae_run if flag == "--vae" else joint_runs / "a", change)
    with pytest.raises(RuntimeError, match="encoder.0.bias"):
        run_main(reading(flag, path))


def test_an_optimizer_state_of_another_size_is_refused(joint_runs, capsys):
    """Moments that do not fit their weights, which would crash Adam, are refused."""

    def change(saved):
        saved["optimizer"]["state"][0]["exp_avg"] = torch.zeros(3)

    path = keep_changed(joint_runs / "a", change)
    refused(reading("--resume", path).copy() + ["--total-timesteps", "96"], capsys, path)


@pytest.mark.parametrize("flag", ("--vae", "--policy"))
def test_a_missing_checkpoint_is_refused(flag, capsys):
    """A checkpoint that is not there is named, and the failed start leaves no folder."""
    refused(reading(flag, "runs/old/checkpoint.pt"), capsys, "runs/old/checkpoint.pt")


def test_an_existing_run_is_kept(joint_runs, capsys):
    """A run is never overwritten."""
    shutil.copytree(joint_runs / "a", "runs/r")
    refused(tiny("joint"), capsys, "runs/r exists", "--resume", "--run-name")


def test_a_resumed_run_of_other_metrics_ends_with_a_sentence(joint_runs):
    """A run whose metrics.csv has other columns is not mixed up with them."""
    shutil.copytree(joint_runs / "a", "runs/r")
    path = Path("runs/r/metrics.csv")
    path.write_text(path.read_text().replace("vae/kl", "vae/ab", 1))
    answer = run_main(tiny("joint", "--resume --total-timesteps 96"))
    assert "metrics.csv has other columns" in answer and "--run-name" in answer


def test_the_settings_are_in_tensorboard_as_text(joint_runs):
    """TensorBoard's file has every flag and the version of torch."""
    (path,) = (joint_runs / "a").glob("events.*")
    data = path.read_bytes()
    assert b"'kappa': 20.0" in data and f"'torch': '{torch.__version__}'".encode() in data


def test_a_new_metric_of_a_loss_is_logged(monkeypatch):
    """A number that a loss adds to its metrics is a column of metrics.csv, with nothing else."""
    real = vae_ppo.ppo_loss

    def ppo_loss(*inputs):
        loss, metrics = real(*inputs)
        return loss, {**metrics, "losses/new": torch.tensor(0.5)}

    monkeypatch.setattr(vae_ppo, "ppo_loss", ppo_loss)
    assert run_main(tiny("joint")) == 0
    assert [row["losses/new"] for row in rows_of("runs/r")] == ["0.5"]


def test_the_script_needs_nothing_that_only_unix_has():
    """The script can be imported where there is no fcntl, as on Windows."""
    code = "import sys; sys.modules['fcntl'] = None; import vae_ppo; print(len(vae_ppo.MODES))"
    env = {**os.environ, "PYTHONPATH": str(HERE)}
    answer = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert answer.stdout == "4\n", answer.stderr


class FakeWandb(ModuleType):
    """Remembers whether init came before the TensorBoard writer that it is to follow."""

    def init(self, **settings):
        self.settings = settings
        self.in_time = not Path("runs/r").exists()


def test_track_starts_wandb_before_tensorboard(monkeypatch):
    """--track hands the settings to wandb.init, which is to follow TensorBoard, in time."""
    wandb = FakeWandb("wandb")
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    assert run_main(tiny("joint", "--track")) == 0
    assert wandb.in_time and wandb.settings["sync_tensorboard"]
    assert wandb.settings["name"] == "r" and wandb.settings["config"]["kappa"] == 20


# ---- Experiments ----
def test_the_probe_knows_where_the_ball_is():
    """find_balls is within 2 pixels of the place that the emulator's memory has of the ball."""
    evaluate = pytest.importorskip("experiments.evaluate")
    ale = ale_py.ALEInterface()
    ale.setLoggerMode(ale_py.LoggerMode.Error)
    ale.loadROM(ale_py.roms.get_rom_path("breakout"))
    ale.reset_game()
    fire, right, left = ale.getMinimalActionSet()[1:]
    rng = np.random.default_rng(0)
    frames, places = [], []
    for step in range(300):
        screens, memory = [], []  # x and y; 0 while there is no ball
        for _ in range(2):
            ale.act(fire if step % 40 == 0 else rng.choice([right, left]))
            screens.append(ale.getScreenGrayscale())
            memory.append(ale.getRAM()[[99, 101]].astype(float))
        frames.append(cv2.resize(np.maximum(*screens), (84, 84), interpolation=cv2.INTER_AREA))
        place = np.mean(memory, axis=0) + [-48, 11]  # on the screen
        places.append(place * [84 / 160, 84 / 210] - 0.5 if np.all(memory) else [np.nan] * 2)
    balls = evaluate.find_balls(torch.from_numpy(np.array(frames))).numpy()
    error = np.abs(balls - places)
    assert np.isfinite(error).all(axis=1).sum() > 50
    assert np.nanmax(error) < 2


# ---- README and published weights ----
WEIGHTS = {  # file of experiments/weights/, and what it is for
    "pretrain-seed1.pt": ("fixed", "adapt"),
    "adapt-10M-seed1.pt": ("pretrain",),
    "joint-kappa20-10M-seed1.pt": ("pretrain",),
}


@pytest.mark.skipif(not (HERE / "experiments").exists(), reason="only the repository has them")
@pytest.mark.parametrize("name, mode", [(name, mode) for name in WEIGHTS for mode in WEIGHTS[name]])
def test_published_weights_serve(name, mode):
    """fixed and adapt start from the published VAE, and pretrain's frames are played by the
    published agents: each run ends well, with weights that came from the file."""
    path = HERE / "experiments/weights" / name
    assert path.stat().st_size < 5e6
    flags = f"--policy {path}" if mode == "pretrain" else ""
    assert run_main(tiny(mode, flags, vae=path)) == 0
    published = torch.load(path, weights_only=True)["weights"]
    assert all(x.dtype == torch.float16 for x in published.values())
    if mode == "fixed":
        decoder = "decoder.2.weight"
        assert torch.equal(load("runs/r")["weights"][decoder], published[decoder].float())


def commands():
    """The arguments of each call in the README's code blocks and in the script's docstring."""
    text = (HERE / "README.md").read_text()
    blocks = re.findall(r"^```.*?\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    lines = "\n".join([*blocks, vae_ppo.__doc__]).replace("\\\n", " ").splitlines()
    calls = [line.split("vae_ppo.py ", 1)[1] for line in lines if "vae_ppo.py -" in line]
    return [shlex.split(re.split("&&|;", call)[0], comments=True) for call in calls]


def test_every_command_is_read_and_finds_what_another_left():
    """Every command of the README and of the script's docstring is one that the script takes, and
    each checkpoint that it names is published, or that of a run that another command makes."""
    Path("runs/Breakout-joint-kappa20-seed1").mkdir(parents=True)  # which one command resumes
    runs = [vae_ppo.parse_args(argv) for argv in commands() if "--resume" in argv]
    Path("runs/Breakout-joint-kappa20-seed1").rmdir()
    runs += [vae_ppo.parse_args(argv) for argv in commands() if "--resume" not in argv]
    left = {f"{run.runs_dir}/{run.run_name}/checkpoint.pt" for run in runs}
    left |= {f"experiments/weights/{name}" for name in WEIGHTS}
    assert {run.mode for run in runs} == set(TRAINED)
    assert {run.vae or run.policy for run in runs} <= {"", *left}


def test_the_environment_of_the_readme_plays(monkeypatch):
    """README's make_envs takes a game of gymnasium's own, one process and no vector emulator."""
    (code,) = re.findall(r"^```python\n(.*?)^```", (HERE / "README.md").read_text(), re.M | re.S)
    scope = {"gym": vae_ppo.gym}
    exec(code, scope)
    monkeypatch.setattr(vae_ppo, "make_envs", scope["make_envs"])
    args = make_args("joint", "--env-id ALE/Pong-v5 --num-envs 2")
    games = vae_ppo.Games(*vae_ppo.make_envs(args), vae_ppo.draw_seeds(args, 0, 0))
    for _ in range(1100):  # Pong's first game is over after some 800 to 1 000 steps
        games.step(np.zeros(2, dtype=int))
    assert games.frame.shape == (2, 84, 84) and games.frame.dtype == np.uint8
    assert len(games.scores) >= 1 and max(games.scores) <= -15


# ---- Patches ----
@pytest.fixture
def patched(tmp_path):
    """The script with experiments/guided.patch, as a module."""
    patch = HERE / "experiments/guided.patch"
    if not patch.exists() or not shutil.which("git"):
        pytest.skip("needs the repository and git")
    shutil.copy(HERE / "vae_ppo.py", tmp_path)
    subprocess.run(["git", "apply", str(patch)], cwd=tmp_path, check=True)
    spec = importlib.util.spec_from_file_location("guided", tmp_path / "vae_ppo.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_guide_weighs_pixels_by_the_value_and_0_is_the_papers_loss(patched, joint_runs):
    """With --guide 0 the patched script trains as the script does, bitwise. The weights of pixels
    have a mean of at most 1 a frame, and at least 1 - guide each."""
    argv = tiny("joint", "--total-timesteps 64 --seed 1 --env-threads 1")
    patched.train(patched.parse_args(argv))
    assert same(load("runs/r")["weights"], load(joint_runs / "a")["weights"])
    patched.train(patched.parse_args(tiny("joint", "--guide 0.9", name="guided")))
    assert load("runs/guided")["global_step"] == 32
    buffer, _ = play(make_agent())
    weight = patched.pixel_weights(make_agent(), buffer, 0.9)
    assert weight.shape == buffer.frames.shape and weight.min() >= 0.1 - 1e-6
    assert (weight.mean((-2, -1)) <= 1 + 1e-5).all() and weight.max() > 1
