"""Copy what is published of a run to experiments/results/, named as the run without its game.

    python -m experiments.publish runs/Breakout-joint-kappa20-seed1

metrics.csv, thinned to at most 500 rows, becomes joint-kappa20-seed1.csv; eval.json, where
experiments.evaluate has made one, joint-kappa20-seed1.json. With --pictures, its pictures and film follow.
"""

import argparse
import csv
import shutil
from pathlib import Path

RESULTS, MOST = Path(__file__).parent / "results", 500


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--pictures", action="store_true", help="the evaluation's pictures and film, too")
    args = parser.parse_args()
    RESULTS.mkdir(exist_ok=True)
    for folder in args.folders:
        name = folder.name.removeprefix("Breakout-")
        with (folder / "metrics.csv").open() as file:
            header, *rows = csv.reader(file)
        every = -(-len(rows) // MOST)
        with (RESULTS / f"{name}.csv").open("w", newline="") as file:
            csv.writer(file).writerows([header, *rows[::-1][::every][::-1]])  # the last row stays
        pictures = ("reconstruction.png", "jacobian.png", "episode.webm") * args.pictures
        for source in map(folder.joinpath, ("eval.json", *pictures)):
            if source.exists():
                target = f"{name}.json" if source.suffix == ".json" else f"{name}-{source.name}"
                shutil.copyfile(source, RESULTS / target)
        print(RESULTS / f"{name}.csv")


if __name__ == "__main__":
    main()
