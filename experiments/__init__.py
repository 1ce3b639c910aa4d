import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # idle threads sleep


def count(text):
    """The number that "500k" or "10M" means, from 1 on: a type for argparse."""
    number = int(float(text.replace("k", "e3").replace("M", "e6")))
    if number < 1:
        raise ValueError
    return number
