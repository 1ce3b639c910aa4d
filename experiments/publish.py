"""Copy a run's metrics.csv to experiments/results/<mode>[-kappa<k>]-seed<s>.csv, thinned to at most 500 rows.

python -m experiments.publish runs/Breakout-joint-kappa20-seed1
"""

import csv
import sys
from pathlib import Path

import vae_ppo

RESULTS, MOST = Path(__file__).parent / "results", 500


def main(folders):
    RESULTS.mkdir(exist_ok=True)
    for folder in map(Path, folders):
        args = vae_ppo.load_checkpoint(folder / "checkpoint.pt")["args"]
        kappa = f"-kappa{args['kappa']:g}" if args["mode"] == "joint" else ""
        with (folder / "metrics.csv").open() as file:
            header, *rows = csv.reader(file)
        every = -(-len(rows) // MOST)
        target = RESULTS / f"{args['mode']}{kappa}-seed{args['seed']}.csv"
        with target.open("w", newline="") as file:
            csv.writer(file).writerows([header, *rows[::-1][::every][::-1]])  # the last row stays
        print(target)


if __name__ == "__main__":
    main(sys.argv[1:])
