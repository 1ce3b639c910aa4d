"""vae_ppo.py with a larger ball: python -m experiments.large_ball --ball 3 --mode joint"""

import torch

import vae_ppo


def paint(frames, times):
    """Enlarge Breakout's ball in frames (B, 84, 84) uint8, in place."""
    field = frames[:, 38:75, 5:79]  # between bricks and paddle
    size, margin = (2 * times - 1, times), (times - 1, times // 2)
    field[:] = torch.nn.functional.max_pool2d(field.float(), size, 1, margin)[..., :74]
    return frames


if __name__ == "__main__":
    vae_ppo.FLAGS.append(("run", "ball", 1, (1, 9), "size of the ball; --resume needs it, too"))
    args = vae_ppo.parse_args()
    step, collect = vae_ppo.Games.step, vae_ppo.collect_frames

    def painted_step(games, action):
        answer = step(games, action)
        paint(torch.from_numpy(games.frame), args.ball)
        return answer

    vae_ppo.collect_frames = lambda *inputs: paint(collect(*inputs), args.ball)
    if args.mode != "pretrain":  # whose player sees the frames as they were
        vae_ppo.Games.step = painted_step
    vae_ppo.main()
