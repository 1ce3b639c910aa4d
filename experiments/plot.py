"""The pictures and the table of what is in experiments/results/, and how a run gets there.

python -m experiments.plot publish runs/Breakout-adapt-10M-seed1 --weights
python -m experiments.plot figures
python -m experiments.plot table
"""

import csv
import functools
import json
import sys
from argparse import ArgumentParser, RawTextHelpFormatter
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

import vae_ppo
from experiments import evaluate

HERE = Path(__file__).parent
RESULTS = HERE / "results"
FIG3 = {"fixed-10M": "fixed", "adapt-10M": "adapt", "joint-kappa20-10M": "joint, kappa 20"}
FIG5 = {f"joint-kappa{kappa}-1M": f"joint, kappa {kappa}" for kappa in (1, 10, 20, 100)}
FIG5["joint-kappa1e6-1M"] = "plain PPO"  # hardly any VAE
PONG = {"Pong-fixed-1M": "fixed", "Pong-adapt-1M": "adapt", "Pong-joint-1M": "joint"}
BOXING = {model.replace("Pong", "Boxing"): name for model, name in PONG.items()}
MARKS = (100_000, 250_000, 500_000, 1_000_000, 3_000_000, 10_000_000)  # of the table


def read_scores(model):
    """For each seed an array, whose rows are steps and scores."""
    seeds = []
    for path in sorted(RESULTS.glob(f"{model}-seed*.csv")):
        rows = csv.DictReader(path.open())
        pairs = [(row["global_step"], row["charts/episodic_return"] or "nan") for row in rows]
        pairs = np.array(pairs, dtype=float)
        seeds.append(pairs[np.isfinite(pairs[:, 1])].T)  # from the first whole game on
    return seeds or sys.exit(f"there is no run of {model} in {RESULTS}")


def draw_curves(axes, curves, ylabel):
    """For each name the median of its seeds, their 25-75 % band, every seed thin behind."""
    names = []
    for number, (name, seeds) in enumerate(curves.items()):
        color = f"C{number}"
        steps = min([seed[0] for seed in seeds], key=max)  # of the seed that ends first
        values = [np.interp(steps, *seed) for seed in seeds]
        low, median, high = np.quantile(values, [0.25, 0.5, 0.75], axis=0)
        for seed in seeds:
            axes.plot(*seed, alpha=0.3, linewidth=0.6, color=color)
        axes.fill_between(steps, low, high, alpha=0.2, color=color, linewidth=0)
        axes.plot(steps, median, color=color)
        names.append((median[-1], steps[-1], name, color))
    highest = np.inf
    for y, x, name, color in sorted(names, reverse=True):  # each below the one before
        y = min(y, highest)
        axes.annotate(f" {name}", (x, y), color=color, fontweight="bold", va="center")
        highest = y - 0.06 * np.ptp(axes.get_ylim())
    axes.xaxis.set_major_formatter(lambda x, _: f"{x / 1e6:.3g}M")
    axes.set(xlabel="steps (4 game frames each)", ylabel=ylabel)
    axes.spines[["top", "right"]].set_visible(False)


def draw_scores(models, figure):
    curves = {name: read_scores(model) for model, name in models.items()}
    draw_curves(figure.subplots(), curves, "score, mean of the last 100 games")


def draw_probe(figure):
    runs = {}  # of all games by one player
    for row in csv.DictReader((RESULTS / "probe.csv").open()):
        if row["player"] == "Breakout-joint-kappa20-10M-seed1":
            run = row["run"].removeprefix("Breakout-")
            runs.setdefault(run, []).append([int(row["global_step"]), float(row["r2"])])
    _, frozen = runs["pretrain-seed1"][-1]
    curves = {"fixed": [np.array([[0, 1e7], [frozen, frozen]])]}
    for model in ("adapt-10M", "joint-kappa20-10M", "joint-kappa1-1M"):
        curves[(FIG3 | FIG5)[model]] = [np.array(runs[f"{model}-seed{s}"]).T for s in (1, 2, 3)]
    axes = figure.subplots()
    axes.set_xscale("symlog", linthresh=1e5)
    draw_curves(axes, curves, "R$^2$ of the ball's place, read from mu")


def draw_dose(figure):
    rows = list(csv.DictReader((RESULTS / "probe.csv").open()))
    left, right = figure.subplots(1, 2)
    for size in (1, 2, 3, 4):
        scores = [seed[1, -1] for seed in read_scores(f"fixed-ball{size}-1M")]
        r2 = [float(row["r2"]) for row in rows if f"-vae-ball{size}-" in row["run"]]
        for axes, values, color in ((left, scores, "C0"), (right, r2, "C1")):
            axes.plot([size] * len(values), values, f"{color}o", alpha=0.5)
            axes.plot(size, np.median(values), f"{color}_", markersize=25)
    left.set_ylabel("score of fixed after 1M steps")
    right.set_ylabel("R$^2$ of the ball's place, read from the VAE's mu")
    for axes in (left, right):
        axes.set(xticks=[1, 2, 3, 4], xlim=(0, 5), ylim=0, xlabel="size of the ball, times its own")
        axes.spines[["top", "right"]].set_visible(False)


def draw_overview(figure):
    """The finding in one picture. Draws guided.png, too."""
    args, joint = evaluate.load(HERE / "weights/joint-kappa20-10M-seed1.pt")
    _, vae = evaluate.load(HERE / "weights/pretrain-seed1.pt")
    _, guided = evaluate.load(HERE / "weights/guide0.9-kappa1000-1M-seed1.pt")
    stacks, balls, rows = evaluate.watch(joint, args, 1, 2000, evaluate.SEED + 1)
    six = rows[torch.linspace(0, len(rows) - 1, 6).long()]
    frames = stacks[six, -1]
    agents = {"VAE alone": vae, "joint": joint, "guided": guided}
    pictures = {name: evaluate.decode(agent, frames) for name, agent in agents.items()}
    evaluate.draw(HERE / "guided.png", {"frame": frames / 255} | pictures, balls[six])
    cells = {
        "A frame: the ball\nis in the circle.": frames / 255,
        "The VAE, trained alone,\nleaves the ball out.": pictures["VAE alone"],
        "The value of joint looks\nat the blue pixels.": evaluate.colour_value(joint, stacks[six]),
        "A guided decoder\ndraws the ball.": pictures["guided"],
    }
    figure.set_figheight(6.2)
    top, bottom = figure.subfigures(2, height_ratios=[1, 1.2])
    for axes, title in zip(top.subplots(1, len(cells)), cells, strict=True):
        evaluate.show(axes, cells[title][2], balls[six[2]])
        axes.set_title(title, fontsize=11)
    draw_scores(FIG3, bottom)


def figures(options):
    drawers = {"probe": draw_probe, "dose": draw_dose, "overview": draw_overview}
    for name, models in {"kappa": FIG5, "pong": PONG, "boxing": BOXING}.items():
        drawers[name] = functools.partial(draw_scores, models)
    for name, draw in drawers.items():
        figure = Figure(figsize=(8.5, 4.5), layout="constrained")
        draw(figure)
        figure.savefig(HERE / f"{name}.png", dpi=150)


def table(options):
    print(f"| run | seeds | {' | '.join(f'{mark / 1e6:g}M' for mark in MARKS)} | 100 games |")
    print(f"|---|---|{'---|' * len(MARKS)}---|")
    for model in options.models:
        seeds = read_scores(model)
        cells = [model, str(len(seeds))]
        for mark in MARKS:
            found = [np.interp(mark, *seed) for seed in seeds]
            cell = f"{np.median(found):.1f} ({min(found):.1f} to {max(found):.1f})"
            cells.append(cell if mark < 1.001 * seeds[0][0, -1] else "")  # to a rollout
        paths = sorted(RESULTS.glob(f"{model}-seed*.json"))
        cells.append(", ".join(f"{json.loads(path.read_text())['mean']:.1f}" for path in paths))
        print(f"| {' | '.join(cells)} |")


def publish(options):
    for folder in options.folders:
        name = folder.name.removeprefix("Breakout-")
        header, *rows = csv.reader((folder / "metrics.csv").open())
        every = max(1, len(rows) // 200)
        thinned = rows[(len(rows) - 1) % every :: every]  # the last row stays
        short = [[x if x.isdigit() else f"{float(x or 'nan'):.4g}" for x in row] for row in thinned]
        lines = [",".join(row) + "\n" for row in [header, *short]]
        (RESULTS / f"{name}.csv").write_text("".join(lines))
        if (facts := Path("watched", folder.name, "eval.json")).exists():
            (RESULTS / f"{name}.json").write_text(facts.read_text())
        if options.weights:
            saved = vae_ppo.load_checkpoint(folder / "checkpoint.pt", None)
            saved["weights"] = {key: x.half() for key, x in saved["weights"].items()}
            del saved["optimizer"]
            torch.save(saved, HERE / "weights" / f"{name}.pt")


if __name__ == "__main__":
    parser = ArgumentParser(description=__doc__, formatter_class=RawTextHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    add = commands.add_parser("publish", help="copy what runs have made to results/").add_argument
    add("folders", nargs="+", type=Path, help="of the runs, like runs/Breakout-adapt-10M-seed1")
    add("--weights", action="store_true", help="copy their weights to weights/, in half precision")
    commands.add_parser("figures", help="draw the pictures of the READMEs")
    add = commands.add_parser("table", help="print scores in Markdown").add_argument
    add("models", nargs="*", default=FIG3 | FIG5, help="like adapt-10M; if not given, all of both")
    options = parser.parse_args()
    {"publish": publish, "figures": figures, "table": table}[options.command](options)
