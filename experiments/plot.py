"""Fig. 3 and Fig. 5 of the paper, and the README's table of results, from experiments/results/*.csv alone.

    pip install matplotlib==3.11.2
    python -m experiments.plot

Median over the seeds, their 25-75 % band, every seed thin behind. What there is no run of is not drawn. The
table has the mean score of the last 100 games of each seed, on the way and at its end, their median, and
what experiments.evaluate found.
"""

import csv
import json
import re
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt

RESULTS = Path(__file__).parent / "results"
MARKS = 100_000, 250_000, 500_000


def read_curves():
    """{model: {seed: (steps, scores, SPS)}}, the model being `fixed`, `adapt`, `joint-kappa20`, ..."""
    curves = {}
    for path in sorted(RESULTS.glob("*-seed*.csv")):
        model, seed = re.fullmatch(r"(.+)-seed(\d+)", path.stem).groups()
        with path.open() as file:
            rows = [r for r in csv.DictReader(file) if r["charts/episodic_return"]]
        names = "global_step", "charts/episodic_return", "charts/SPS"
        columns = ([float(r[name]) for r in rows] for name in names)
        if not model.startswith("pretrain"):
            curves.setdefault(model, {})[seed] = tuple(map(np.array, columns))
    return curves


def draw(curves, models, path, title):
    """One line per model, on the steps that all its seeds have reached."""
    models = [m for m in models if m in curves]
    if not models:
        return
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for color, model in enumerate(models):
        seeds = curves[model].values()
        steps = np.linspace(max(s[0][0] for s in seeds), min(s[0][-1] for s in seeds), 200)
        scores = np.array([np.interp(steps, *seed[:2]) for seed in seeds])
        for seed in seeds:
            axes.plot(*seed[:2], color=f"C{color}", alpha=0.25, linewidth=0.8)
        axes.fill_between(steps, *np.quantile(scores, (0.25, 0.75), axis=0), color=f"C{color}", alpha=0.2)
        label = f"{model} ({len(scores)} seed{'s' * (len(scores) > 1)})"
        axes.plot(steps, np.median(scores, axis=0), color=f"C{color}", label=label)
    axes.set(xlabel="env steps (4 game frames each)", ylabel="score, mean of the last 100 games", title=title)
    axes.legend()
    figure.savefig(path, dpi=110)
    print(path)


def evaluation(model, seed):
    """The mean score of experiments.evaluate's games, and its 95 % interval."""
    path = RESULTS / f"{model}-seed{seed}.json"
    facts = json.loads(path.read_text()) if path.exists() else None
    return "{mean:.1f} ({interval[0]:.1f} to {interval[1]:.1f})".format(**facts) if facts else "not run"


def print_table(curves):
    """Time is that of all steps at the logged speeds, of which a published CSV has a sample."""
    marks = " | ".join(f"at {n // 1000}k" for n in MARKS)
    print(f"| model | seed | steps | {marks} | at the end | 30 games (95 %) | hours |")
    print("|---|---|---|" + "---|" * (len(MARKS) + 3))
    for model, seeds in sorted(curves.items()):
        rows = []
        for seed, (steps, scores, sps) in seeds.items():
            hours = steps[-1] * np.mean(1 / sps) / 3600
            rows.append([*np.interp(MARKS, steps, scores, right=np.nan), scores[-1]])
            cells = " | ".join(f"{x:.1f}" for x in rows[-1]).replace("nan", "not run")
            more = f"{evaluation(model, seed)} | {hours:.1f}"
            print(f"| {model} | {seed} | {int(steps[-1]):,} | {cells} | {more} |")
        if len(rows) > 1:
            cells = " | ".join(f"{x:.1f}" for x in np.median(rows, axis=0)).replace("nan", "not run")
            print(f"| {model} | median | | {cells} | | |")


def main():
    curves = read_curves()
    kappas = [m for m in curves if re.fullmatch(r"joint-kappa[\d.]+", m)]
    kappas.sort(key=lambda m: float(m.split("kappa")[1]))
    here = RESULTS.parent
    models = ["fixed", "adapt", "joint-kappa20", *(m for m in curves if re.search(r"-\d+M$", m))]
    draw(curves, models, here / "learning_curves.png", "Breakout, whole games")
    if len(kappas) > 1:
        draw(curves, kappas, here / "kappa.png", "joint: weight of the policy's loss")
    print_table(curves)


if __name__ == "__main__":
    main()
