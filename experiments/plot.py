"""The figures and tables of experiments/results/, and how a run gets there.

    pip install matplotlib==3.11.2
    python -m experiments.plot publish runs/Breakout-adapt-10M-seed1 --pictures
    python -m experiments.plot fig3
    python -m experiments.plot fig5
    python -m experiments.plot probe
    python -m experiments.plot table
    python -m experiments.plot overview runs/<pretrain>/checkpoint.pt runs/<joint>/checkpoint.pt

publish: metrics.csv, thinned to 500 rows, and eval.json become results/adapt-10M-seed1.csv and
.json; --pictures: reconstruction.png, jacobian.png and episode.gif, too; --weights: the weights
without Adam's state, in half precision, become weights/adapt-10M-seed1.pt. fig3, fig5: scores over
steps, median of the seeds, their 25-75 % band, every seed thin behind. probe: how the ball enters
mu, from results/probe.csv. table: each seed, and the median of each model, in Markdown. For other
models name them: `fig3 adapt-3M adapt`. overview: the finding in one picture; models as for fig3.
"""

import argparse
import csv
import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import torch

import vae_ppo
from experiments import evaluate, guarded
from vae_ppo import UserError

HERE = Path(__file__).parent
RESULTS = HERE / "results"
FIGURES = {
    "fig3": ("learning_curves.png", ["fixed-10M", "adapt-10M", "joint-kappa20-10M"]),
    "fig5": ("kappa.png", ["joint-kappa1-1M", "joint-kappa10-1M", "joint-kappa20-1M"]),
}
MARKS = (100_000, 250_000, 500_000, 1_000_000, 3_000_000)  # steps at which the table has the score


EVALUATION = ("mean of whole games", "from (95 %)", "to", "IQM")  # by experiments.evaluate


def read_curves(models=()):
    """{model: {seed: its CSV's columns}} of the runs in RESULTS, as arrays."""
    curves = {}
    for path in sorted(RESULTS.glob("*-seed*.csv")):
        model, seed = re.fullmatch(r"(.+)-seed(\d+)", path.stem).groups()
        if model in models or not models and not model.startswith("pretrain"):
            with path.open() as file:
                rows = [row for row in csv.DictReader(file) if row["charts/episodic_return"]]
            names = ("global_step", "charts/episodic_return", "charts/SPS")
            columns = [np.array([float(row[name]) for row in rows]) for name in names]
            curves.setdefault(model, {})[seed] = columns
    if not curves:
        raise UserError(f"there is no run of {', '.join(models)} in {RESULTS}")
    return {model: curves[model] for model in models or curves if model in curves}


def score_lines(models):
    """{model: [(steps, score) of each seed]} of the runs in RESULTS."""
    runs = read_curves(models)
    return {model: [columns[:2] for columns in seeds.values()] for model, seeds in runs.items()}


def draw_lines(axes, curves, ylabel):
    """One line for each model of {model: [(x, y) of each seed]}, where all its seeds are."""
    for number, (model, seeds) in enumerate(curves.items()):
        style = {"color": f"C{number}"}
        start, end = max(x[0] for x, _ in seeds), min(x[-1] for x, _ in seeds)
        steps = np.unique([x for x in np.concatenate([x for x, _ in seeds]) if start <= x <= end])
        values = np.array([np.interp(steps, x, y) for x, y in seeds])
        for x, y in seeds:
            axes.plot(x, y, alpha=0.25, linewidth=0.8, **style)
        axes.fill_between(steps, *np.quantile(values, [0.25, 0.75], axis=0), alpha=0.2, **style)
        label = f"{model}, {len(seeds)} seed{'s' if len(seeds) > 1 else ''}"
        axes.plot(steps, np.median(values, axis=0), label=label, **style)
    axes.set(xlabel="env steps (4 game frames each)", ylabel=ylabel)
    axes.legend()


def draw(path, curves, ylabel, xscale="linear", **scale):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    draw_lines(axes, curves, ylabel)
    axes.set_xscale(xscale, **scale)
    figure.savefig(path, dpi=110)
    print(path)


def overview(own):
    """The finding in one picture: a frame, what the VAE makes of it, where joint's value looks, and
    Fig. 3. Needs the checkpoints of a pretrain and of a joint run."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Circle

    _, args, agent = evaluate.load(own.names[1])
    vae = evaluate.load(own.names[0], mode="pretrain")[2]
    buffer = vae_ppo.Buffer(agent, 1000, 1, "cpu")
    vae_ppo.rollout(agent, evaluate.start_games(args, 1, seed=1001), buffer)
    stacks = buffer.frames[buffer.stack[:-1, 0], 0]  # (1000, num_stack, 84, 84)
    balls = evaluate.find_balls(stacks[:, -1])
    rows = balls[:, 0].isfinite().nonzero()[:, 0]
    t = rows[len(rows) // 2 :][:1]
    pictures = {
        "a frame, its ball in the circle": stacks[t, -1] / 255,
        "the pretrained VAE's picture of it": evaluate.reconstruct(vae, stacks[t, -1]),
        "what joint's value looks at, in blue": evaluate.in_blue(agent, stacks[t]),
    }
    figure = Figure(figsize=(13, 3.4), layout="constrained")
    *cells, right = figure.subplots(1, 4, width_ratios=[1, 1, 1, 1.6])
    for axes, (title, picture) in zip(cells, pictures.items(), strict=True):
        axes.imshow(picture[0], cmap="gray", vmin=0, vmax=1)
        axes.add_patch(Circle(balls[t[0]], 5, fill=False, color="red"))
        axes.set(xticks=[], yticks=[])
        axes.set_title(title, fontsize=10)
    draw_lines(right, score_lines(own.names[2:] or FIGURES["fig3"][1]), "score")
    figure.savefig(HERE / "overview.png", dpi=100)
    print(HERE / "overview.png")


def scores(own):
    """Fig. 3 or Fig. 5: of which models there are no runs, there is no line."""
    picture, models = FIGURES[own.what]
    draw(HERE / picture, score_lines(own.names or models), "score, mean of the last 100 games")


def probe(own):
    """R^2 of the ball's place from mu, over steps."""
    runs = {}
    with (RESULTS / "probe.csv").open() as file:
        for row in csv.DictReader(file):
            if row["mode"] != "pretrain":
                point = (float(row["global_step"]), float(row["r2"]))
                runs.setdefault(row["run"], []).append(point)
    lines = {}
    for run, points in runs.items():
        model = re.sub(r"^Breakout-|-seed\d+$", "", run)
        lines.setdefault(model, []).append(np.array(sorted(points)).T)
    label = "R^2 of the ball's place from mu"
    draw(HERE / "probe.png", lines, label, xscale="symlog", linthresh=1e5)


def row(*texts, numbers=()):
    cells = [*texts, *["" if np.isnan(x) else f"{x:.1f}" for x in numbers]]
    print(f"| {' | '.join(cells)} |")


def table(own):
    """Time is that of all steps at the logged speeds, of which a published CSV has a sample."""
    marks = [f"at {steps / 1e6:g}M" for steps in MARKS]
    row("model", "seed", "steps", *marks, "at the end", "hours", *EVALUATION)
    row(*["---"] * (len(MARKS) + 5 + len(EVALUATION)))
    for model, seeds in read_curves(own.names).items():
        all_numbers = []
        for seed, (steps, scores, speed) in seeds.items():
            numbers = [*np.interp(MARKS, steps, scores, right=np.nan), scores[-1]]
            numbers.append(steps[-1] * np.mean(1 / speed) / 3600)
            all_numbers.append(numbers)
            path = RESULTS / f"{model}-seed{seed}.json"
            if path.exists():
                facts = json.loads(path.read_text())
                numbers = numbers + [facts["mean"], *facts["interval"], facts["iqm"]]
            row(model, seed, f"{int(steps[-1]):,}", numbers=numbers)
        if len(seeds) > 1:
            row(model, "median", "", numbers=np.median(all_numbers, axis=0))


def publish(own):
    """Copy what is published of each run, named as the run without its game."""
    for folder in map(Path, own.names):
        name = folder.name.removeprefix("Breakout-")
        with (folder / "metrics.csv").open() as file:
            header, *rows = csv.reader(file)
        every = -(-len(rows) // 500)
        with (RESULTS / f"{name}.csv").open("w", newline="") as file:
            csv.writer(file).writerows([header, *rows[::-1][::every][::-1]])  # the last row stays
        copies = {"eval.json": f"{name}.json"}
        if own.pictures:
            for picture in ("reconstruction.png", "jacobian.png", "episode.gif"):
                copies[picture] = f"{name}-{picture}"
        for source, target in copies.items():
            if (folder / source).exists():
                shutil.copyfile(folder / source, RESULTS / target)
        if own.weights:
            saved = vae_ppo.load_checkpoint(folder / "checkpoint.pt")
            saved["weights"] = {key: x.half() for key, x in saved["weights"].items()}
            del saved["optimizer"]
            (HERE / "weights").mkdir(exist_ok=True)
            torch.save(saved, HERE / "weights" / f"{name}.pt")
        print(RESULTS / f"{name}.csv")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = {"publish": publish, "fig3": scores, "fig5": scores, "probe": probe, "table": table}
    commands["overview"] = overview
    parser.add_argument("what", choices=commands)
    parser.add_argument("names", nargs="*", help="publish: folders of runs; else models")
    parser.add_argument("--pictures", action="store_true", help="the pictures, too; publish")
    parser.add_argument("--weights", action="store_true", help="the weights, too; publish")
    own = parser.parse_args()
    if own.what == "overview" and len(own.names) < 2:
        parser.error("overview needs two checkpoints, of a pretrain and of a joint run")
    if own.what == "publish" and not own.names:
        parser.error("publish needs the folder of a run, or of several")
    return guarded(commands[own.what], own)


if __name__ == "__main__":
    sys.exit(main())
