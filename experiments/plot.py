"""The figures and tables of experiments/results/, and how a run gets there.

    pip install matplotlib==3.11.2
    python -m experiments.plot publish runs/Breakout-adapt-10M-seed1 --pictures --weights
    python -m experiments.plot fig3
    python -m experiments.plot fig5
    python -m experiments.plot probe
    python -m experiments.plot table
    python -m experiments.plot overview runs/<pretrain>/checkpoint.pt runs/<joint>/checkpoint.pt

fig3, fig5, table and overview take the names of other models, too: `fig3 adapt-10M adapt-1M`.
"""

import csv
import io
import json
import shutil
import sys
from pathlib import Path
from zipfile import ZIP_DEFLATED, ZipFile

import numpy as np
import torch

from experiments import UserError, evaluate, main
from vae_ppo import load_checkpoint

HERE = Path(__file__).parent
RESULTS = HERE / "results"
FIG3 = ("fixed-10M", "adapt-10M", "joint-kappa20-10M")
FIG5 = ("joint-kappa1-1M", "joint-kappa10-1M", "joint-kappa20-1M")
MARKS = (100_000, 250_000, 500_000, 1_000_000, 3_000_000)  # steps at which the table has the score


def read_curves(models):
    """{model: {seed: steps, scores, steps/s}} of these models, or of all but the VAEs."""
    curves = {}
    for path in sorted(RESULTS.glob("*-seed*.csv")):
        model, seed = path.stem.rsplit("-seed", 1)
        if model in models or not (models or model.startswith("pretrain")):
            columns = np.genfromtxt(path, delimiter=",", skip_header=1, usecols=(0, 1, 2)).T
            columns = columns[:, np.isfinite(columns[1])]
            if columns.size:  # else no game has ended
                curves.setdefault(model, {})[seed] = columns
    if missing := [model for model in models if model not in curves]:
        print(f"no run of {', '.join(missing)} in {RESULTS}", file=sys.stderr)
    if not curves:
        raise UserError(f"there is nothing to show in {RESULTS}")
    return {model: curves[model] for model in models or curves if model in curves}


def draw_lines(axes, curves, ylabel):
    """For each model the median of its seeds, their 25-75 % band, every seed thin behind."""
    for number, (model, seeds) in enumerate(curves.items()):
        lines = [columns[:2] for columns in seeds.values()]
        start, end = max(x[0] for x, _ in lines), min(x[-1] for x, _ in lines)
        steps = np.unique(np.concatenate([x for x, _ in lines]))
        steps = steps[(start <= steps) & (steps <= end)]  # where all seeds are
        values = [np.interp(steps, x, y) for x, y in lines]
        low, median, high = np.quantile(values, [0.25, 0.5, 0.75], axis=0)
        color = f"C{number}"
        for x, y in lines:
            axes.plot(x, y, alpha=0.25, linewidth=0.8, color=color)
        axes.fill_between(steps, low, high, alpha=0.2, color=color)
        label = f"{model}, {len(lines)} seed{'s' if len(lines) > 1 else ''}"
        axes.plot(steps, median, label=label, color=color)
    axes.set(xlabel="env steps (4 game frames each)", ylabel=ylabel)


def draw(name, curves, ylabel, xscale="linear", **scale):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 5.5), layout="constrained")
    axes = figure.subplots()
    draw_lines(axes, curves, ylabel)
    axes.set_xscale(xscale, **scale)
    figure.legend(loc="outside lower center")  # many names would hide the lines
    figure.savefig(HERE / name, dpi=110)
    print(HERE / name)


def fig3(models: list = FIG3):
    """Scores over steps, of the models of which there are runs."""
    draw("learning_curves.png", read_curves(models), "score, mean of the last 100 games")


def fig5(models: list = FIG5):
    """The same of joint with several kappas."""
    draw("kappa.png", read_curves(models), "score, mean of the last 100 games")


def probe():
    """How the ball enters mu: R^2 of its place over steps, from results/probe.csv."""
    curves = {}
    rows = list(csv.DictReader((RESULTS / "probe.csv").read_text().splitlines()))
    for row in rows:
        if row["mode"] != "pretrain":
            model, _, seed = row["run"].removeprefix("Breakout-").rpartition("-seed")
            player = row["player"].removeprefix("Breakout-")
            points = curves.setdefault(f"{model} in games of {player}", {}).setdefault(seed, [])
            points.append((float(row["global_step"]), float(row["r2"])))
    curves = {
        model: {seed: np.array(sorted(points)).T for seed, points in seeds.items()}
        for model, seeds in curves.items()
    }
    draw("probe.png", curves, "R^2 of the ball's place from mu", "symlog", linthresh=1e5)


def overview(pretrain, joint, models: list = FIG3):
    """The finding in one picture: a frame, what the VAE makes of it, where joint's value looks, and
    Fig. 3. Needs the checkpoints of a pretrain and of a joint run."""
    from matplotlib.figure import Figure

    args, agent = evaluate.load(joint)
    _, vae = evaluate.load(pretrain, mode="pretrain")
    stacks, balls, rows = evaluate.watch(agent, evaluate.new_games(args, 1, seed=1001), 1000)
    t = rows[len(rows) // 2 :][:1]
    frame, _, blue = evaluate.see(agent, stacks[t])
    _, decoded, _ = evaluate.see(vae, stacks[t])
    figure = Figure(figsize=(13, 3.4), layout="constrained")
    *cells, right = figure.subplots(1, 4, width_ratios=[1, 1, 1, 1.6])
    for axes, picture in zip(cells, (frame, decoded, blue), strict=True):
        evaluate.show(axes, picture[0], balls[t[0]])
    cells[0].set_title("a frame, its ball in the circle", fontsize=10)
    cells[1].set_title("the pretrained VAE's picture of it", fontsize=10)
    cells[2].set_title("what joint's value looks at, in blue", fontsize=10)
    draw_lines(right, read_curves(models), "score")
    right.legend()
    figure.savefig(HERE / "overview.png", dpi=100)
    print(HERE / "overview.png")


def row(*texts, numbers=()):
    cells = [*texts, *["" if np.isnan(x) else f"{x:.1f}" for x in numbers]]
    print(f"| {' | '.join(cells)} |")


def table(models: list = ()):
    """Each seed, and the median of each model where all its seeds are, in Markdown. Hours are those
    of all steps at the logged speeds, of which a published CSV has a sample."""
    columns = ["model", "seed", "steps", *[f"at {steps / 1e6:g}M" for steps in MARKS]]
    columns += ["at the end", "hours", "mean of whole games", "from (95 %)", "to", "IQM"]
    row(*columns)
    row(*["---"] * len(columns))
    for model, seeds in read_curves(models).items():
        found = []
        for seed, (steps, scores, speed) in seeds.items():
            reached = np.array(MARKS) < 1.001 * steps[-1]  # to a rollout
            numbers = [*np.where(reached, np.interp(MARKS, steps, scores), np.nan), scores[-1]]
            found.append([*numbers, steps[-1] * np.mean(1 / speed) / 3600])
            path = RESULTS / f"{model}-seed{seed}.json"
            facts = json.loads(path.read_text()) if path.exists() else {"global_step": 0}
            games = []
            if facts["global_step"] == steps[-1]:  # else they are of an older checkpoint
                games = [facts["mean"], *facts["interval"], facts["iqm"]]
            row(model, seed, f"{steps[-1]:,.0f}", numbers=found[-1] + games)
        median = np.median(found, axis=0)
        if len({steps[-1] for steps, _, _ in seeds.values()}) > 1:
            median[-2:] = np.nan  # no two ends are the same
        if len(seeds) > 1:
            row(model, "median", "", numbers=median)


def shorten(cell):
    """A cell of metrics.csv with the fewest digits that give the same float32."""
    return str(np.float32(cell)) if "." in cell else cell


def publish(folders: list, pictures=False, weights=False):
    """Copy metrics.csv, thinned to 500 rows and its numbers shortened, and eval.json of each run to
    results/, under its name without the game; --pictures: its pictures, too; --weights: its
    weights, without Adam's state and in half precision and compressed, to weights/."""
    for folder in map(Path, folders):
        name = folder.name.removeprefix("Breakout-")
        header, *rows = csv.reader((folder / "metrics.csv").read_text().splitlines() or [""])
        if not rows:
            raise UserError(f"{folder} has no iteration yet: wait for its first")
        every = -(-len(rows) // 500)
        thinned = [header, *rows[(len(rows) - 1) % every :: every]]  # the last row stays
        with (RESULTS / f"{name}.csv").open("w", newline="") as file:
            csv.writer(file).writerows([shorten(x) for x in cells] for cells in thinned)
        copies = {"eval.json": f"{name}.json"}
        for picture in ("reconstruction.png", "jacobian.png", "episode.gif") if pictures else ():
            copies[picture] = f"{name}-{picture}"
        for source, target in copies.items():
            if (folder / source).exists():
                shutil.copyfile(folder / source, RESULTS / target)
        if weights:
            path = HERE / "weights" / f"{name}.pt"
            saved = load_checkpoint(folder / "checkpoint.pt")
            saved["weights"] = {key: x.half() for key, x in saved["weights"].items()}
            del saved["optimizer"]
            data = io.BytesIO()
            torch.save(saved, data)
            with ZipFile(data) as plain, ZipFile(path, "w", ZIP_DEFLATED) as small:
                for entry in plain.namelist():
                    small.writestr(entry, plain.read(entry))
        print(RESULTS / f"{name}.csv")


if __name__ == "__main__":
    main(__doc__, publish, fig3, fig5, probe, table, overview)
