"""vae_ppo.py with one more flag, --ball: Breakout's ball is so many times as wide and as high.
Give the same --ball when you resume. `experiments.evaluate play` does not enlarge the ball.

python -m experiments.large_ball --ball 3 --mode fixed --vae runs/<name>/checkpoint.pt
"""

import torch
from torch.nn.functional import max_pool2d

import vae_ppo


def paint(frames, times):
    """Enlarge the ball in frames (B, 84, 84) uint8, in place."""
    field = frames[:, 38:75, 5:79]  # between bricks and paddle
    large = max_pool2d(field.float(), (2 * times - 1, times), 1, (times - 1, times // 2))
    field[:] = large[..., :74]
    return frames


if __name__ == "__main__":
    vae_ppo.FLAGS.append(("run", "ball", 1, (1, 9), "size of the ball (paper: 1)"))
    args = vae_ppo.parse_args()
    step, collect = vae_ppo.Games.step, vae_ppo.collect_frames

    def painted_step(games, action):
        answer = step(games, action)
        games.frame = paint(torch.tensor(games.frame), args.ball).numpy()
        return answer

    if args.mode == "pretrain":  # whose player sees the frames as they were
        vae_ppo.collect_frames = lambda *inputs: paint(collect(*inputs), args.ball)
    else:
        vae_ppo.Games.step = painted_step
    vae_ppo.main()
