"""Five programs around vae_ppo.py; README.md says what each one is for."""

import sys

import gymnasium as gym

from vae_ppo import UserError


def guarded(program, *inputs):
    """Run it. What the user can mend becomes one sentence. Returns the exit code."""
    try:
        return program(*inputs) or 0
    except (UserError, gym.error.Error, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
