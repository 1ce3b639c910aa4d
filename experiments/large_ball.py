"""vae_ppo.py with Breakout's ball painted several times as wide and as high.

python -m experiments.large_ball 3 --mode fixed --vae runs/<name>/checkpoint.pt

Give the same size when you resume. `experiments.evaluate play` does not enlarge the ball.
"""

import sys
from argparse import ArgumentParser

import cv2
import numpy as np
import torch

import vae_ppo
from experiments import count


def paint(frames, times):
    """Enlarge the ball in frames (B, 84, 84) uint8, in place, between bricks and paddle."""
    kernel = np.ones((2 * times - 1, times), np.uint8)
    for frame in frames:
        frame[38:75, 5:79] = cv2.dilate(frame[38:75, 5:79], kernel)
    return frames


if __name__ == "__main__":
    parser = ArgumentParser(epilog="All other flags are those of vae_ppo.py.")
    parser.add_argument("times", type=count, help="how many times as wide and as high the ball is")
    options, sys.argv[1:] = parser.parse_known_args()
    step, collect = vae_ppo.Games.step, vae_ppo.collect_frames

    def painted_step(games, action):
        answer = step(games, action)
        games.frame = paint(games.frame.copy(), options.times)
        return answer

    def painted_frames(*inputs):
        return torch.from_numpy(paint(collect(*inputs).cpu().numpy(), options.times)).to(inputs[-1])

    vae_ppo.collect_frames = painted_frames
    if vae_ppo.parse_args().mode != "pretrain":  # whose player sees the frames as they were
        vae_ppo.Games.step = painted_step
    vae_ppo.main()
