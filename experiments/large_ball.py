"""vae_ppo.py with Breakout's ball painted several times as wide and as high.

python -m experiments.large_ball 3 --mode fixed --vae runs/<name>/checkpoint.pt
"""

import sys

import cv2
import numpy as np

import vae_ppo


def paint(frames, times):
    """Enlarge the ball, some 1 x 2 pixels, in frames (B, 84, 84) uint8, in place. Only between
    bricks and paddle, where nothing else is. Returns the frames."""
    kernel = np.ones((2 * times - 1, times), np.uint8)
    for frame in frames:
        frame[38:75, 5:79] = cv2.dilate(frame[38:75, 5:79], kernel)
    return frames


if __name__ == "__main__":
    times = int(sys.argv[1])
    step, collect_frames = vae_ppo.Games.step, vae_ppo.collect_frames

    def painted_step(games, action):
        frame, *answer = step(games, action)
        games.frame = paint(frame.copy(), times)
        return games.frame, *answer

    def painted_frames(*inputs):  # the player of the data sees them as they were
        return paint(collect_frames(*inputs).numpy(), times)

    if "pretrain" in sys.argv:
        vae_ppo.collect_frames = lambda *inputs: vae_ppo.torch.from_numpy(painted_frames(*inputs))
    else:
        vae_ppo.Games.step = painted_step
    sys.exit(vae_ppo.main(sys.argv[2:]))
