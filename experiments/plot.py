"""Fig. 3 and Fig. 5 of the paper, and the README's table of results, from experiments/results/*.csv alone.

    pip install matplotlib==3.11.2
    python -m experiments.plot

Median over the seeds, their 25-75 % band, every seed thin behind. What there is no run of is not drawn. The
table has the mean score of the last 100 games: of each seed at its end, and at fixed steps on the way.
"""

import csv
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


def print_table(curves):
    """Time is that of all steps at the logged speeds, of which a published CSV has a sample."""
    print(
        "| model | steps | "
        + " | ".join(f"at {n // 1000}k" for n in MARKS)
        + " | end: seeds | median | hours |"
    )
    print("|---|---|" + "---|" * (len(MARKS) + 3))
    for model, seeds in curves.items():
        ends = [int(steps[-1]) for steps, *_ in seeds.values()]
        marks = [np.median([np.interp(n, *s[:2], right=np.nan) for s in seeds.values()]) for n in MARKS]
        final = [scores[-1] for _, scores, _ in seeds.values()]
        hours = np.median([steps[-1] * np.mean(1 / sps) / 3600 for steps, _, sps in seeds.values()])
        cells = [model, f"{min(ends):,}", *(f"{m:.1f}" for m in marks)]
        cells += [", ".join(f"{x:.1f} ({seed})" for seed, x in zip(seeds, final, strict=True))]
        print(f"| {' | '.join(cells)} | {np.median(final):.1f} | {hours:.1f} |".replace("nan", "-"))


def main():
    curves = read_curves()
    kappas = sorted((m for m in curves if m.startswith("joint")), key=lambda m: float(m.split("kappa")[1]))
    here = RESULTS.parent
    draw(curves, ("fixed", "adapt", "joint-kappa20"), here / "learning_curves.png", "Breakout, whole games")
    if len(kappas) > 1:
        draw(curves, kappas, here / "kappa.png", "joint: weight of the policy's loss")
    print_table(curves)


if __name__ == "__main__":
    main()
