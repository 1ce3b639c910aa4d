"""The pictures and the table of experiments/results/, and how a run gets there."""

import csv
import sys
from argparse import ArgumentParser
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

from experiments import evaluate

RESULTS = Path("experiments/results")
FIG3 = {"fixed-10M": "fixed", "adapt-10M": "adapt", "joint-kappa20-10M": "joint, kappa 20"}
FIG5 = {f"joint-kappa{kappa}-1M": f"joint, kappa {kappa}" for kappa in (1, 10, 20, 100)}
FIG5["joint-kappa1e6-1M"] = "plain PPO"  # hardly any VAE
PONG = {f"Pong-{mode}-3M": mode for mode in ("fixed", "adapt", "joint")}
BOXING = {f"Boxing-{mode}-3M": mode for mode in ("fixed", "adapt", "joint")}
GUIDED = {"guide0.5-kappa20-1M": "guided, kappa 20", "guide0.9-kappa1000-1M": "guided, kappa 1000"}
GUIDED |= {f"joint-kappa{kappa}-1M": f"joint, kappa {kappa}" for kappa in (20, 1000)}
GUIDED_10M = {"guide0.5-kappa20-10M": "guided, kappa 20", "joint-kappa20-10M": "joint, kappa 20"}
SCORE = "charts/episodic_return"
LABELS = {"ball_decoded": "decoded brightness near the ball", "r2": "R$^2$ of the ball in mu"}
LABELS |= {SCORE: "score, mean of the last 100 games"}
MARKS = (100_000, 250_000, 500_000, 1_000_000, 3_000_000, 10_000_000)  # of the table


def read(model, column=SCORE):
    """For each seed an array: steps, and a column of its curve or of probe.csv."""
    seeds = {}
    for path in sorted(RESULTS.glob(f"{model}-seed*.csv" if column == SCORE else "probe.csv")):
        for row in csv.DictReader(path.open()):
            run = row.get("run", path.stem).removeprefix("Breakout-")
            if run.startswith(f"{model}-seed") and row[column] not in ("", "nan"):
                seeds.setdefault(run, []).append([float(row["global_step"]), float(row[column])])
    seeds or sys.exit(f"there is no run of {model} in {RESULTS}")
    return [np.array(pairs).T for pairs in seeds.values()]


def draw_curves(axes, curves, ylabel):
    """For each name the median of its seeds, and every seed thin behind it."""
    axes.set(xlabel="steps (4 game frames each)", ylabel=ylabel, ymargin=0.1)
    axes.label_outer()  # only the lowest panel has steps
    names = []
    for number, (name, seeds) in enumerate(curves.items()):
        color = f"C{number}"
        steps = min([seed[0] for seed in seeds], key=max)  # of the seed that ends first
        median = np.median([np.interp(steps, *seed) for seed in seeds], axis=0)
        for seed in seeds:
            axes.plot(*seed, alpha=0.4, lw=0.7, color=color, marker="." if len(seed[0]) < 9 else "")
        axes.plot(steps, median, color=color)
        names.append((median[-1], steps[-1], name, color))
    highest = np.inf
    for y, x, name, color in sorted(names, reverse=True):  # each below the one before
        y = min(y, highest)
        axes.annotate(f" {name}", (x, y), color=color, fontweight="bold", va="center")
        highest = y - 0.06 * np.ptp(axes.get_ylim())
    axes.xaxis.set_major_formatter(lambda x, _: f"{x / 1e6:.3g}M")
    axes.spines[["top", "right"]].set_visible(False)


def draw_models(figure, models, columns=(SCORE,)):
    """A panel for each column, below one another."""
    for column, axes in figure.subplot_mosaic([[x] for x in columns], sharex=True).items():
        curves = {name: read(model, column) for model, name in models.items()}
        if column == "ball_decoded":
            curves["the ball in the frame"] = read(next(iter(models)), "ball_true")
        draw_curves(axes, curves, LABELS[column])


def draw_probe(figure):
    _, frozen = read("pretrain", "r2")[0][:, -1]
    curves = {"fixed": [np.array([[0, 1e7], [frozen, frozen]])]}
    for model in ("adapt-10M", "joint-kappa20-10M", "joint-kappa1-1M"):
        curves[(FIG3 | FIG5)[model]] = read(model, "r2")
    axes = figure.subplots()
    axes.set_xscale("symlog", linthresh=1e5)
    draw_curves(axes, curves, LABELS["r2"])


def draw_dose(figure):
    sizes = (1, 2, 3, 4)
    scores = [[seed[1, -1] for seed in read(f"fixed-ball{size}-1M")] for size in sizes]
    r2 = [[seed[1, -1] for seed in read(f"vae-ball{size}", "r2")] for size in sizes]
    panels = {"score of fixed after 1M steps": scores, f"{LABELS['r2']} of the VAE": r2}
    for number, (label, axes) in enumerate(figure.subplot_mosaic([list(panels)]).items()):
        axes.plot(sizes, panels[label], f"C{number}o", alpha=0.5)
        axes.plot(sizes, np.median(panels[label], axis=1), f"C{number}_", markersize=25)
        axes.set(xticks=sizes, xlim=(0, 5), ylim=0, xlabel="size of the ball", ylabel=label)
        axes.spines[["top", "right"]].set_visible(False)


def draw_overview(figure):
    """The finding in one picture. Draws guided.png, too."""
    args, joint = evaluate.load("experiments/weights/joint-kappa20-10M-seed1.pt")
    _, vae = evaluate.load("experiments/weights/pretrain-seed1.pt")
    _, guided = evaluate.load("experiments/weights/guide0.5-kappa20-10M-seed1.pt")
    stacks, balls, rows = evaluate.watch(joint, args)
    six = rows[torch.linspace(0, len(rows) - 1, 6).long()]
    frames = stacks[six, -1]
    agents = {"VAE alone": vae, "joint": joint, "guided": guided}
    pictures = {name: evaluate.decode(agent, frames) for name, agent in agents.items()}
    evaluate.draw("experiments/guided.png", {"frame": frames / 255} | pictures, balls[six])
    cells = {
        "A frame: the ball\nis in the circle.": frames / 255,
        "The VAE, trained alone,\nleaves the ball out.": pictures["VAE alone"],
        "The value of joint looks\nat the blue pixels.": evaluate.colour_value(joint, stacks[six]),
        "A guided decoder\ndraws the ball.": pictures["guided"],
    }
    figure.set_figheight(6.2)
    top, bottom = figure.subfigures(2, height_ratios=[1, 1.2])
    for title, axes in top.subplot_mosaic([list(cells)]).items():
        evaluate.show(axes, cells[title][2], balls[six[2]])
        axes.set_title(title, fontsize=11)
    draw_models(bottom, FIG3)


def figures(options):
    drawings = {"probe": [draw_probe], "dose": [draw_dose], "overview": [draw_overview]}
    for name, models in {"kappa": FIG5, "pong": PONG, "boxing": BOXING}.items():
        drawings[name] = [draw_models, models]
    for name, models in {"guided_curves": GUIDED, "guided_10M": GUIDED_10M}.items():
        drawings[name] = [draw_models, models, LABELS]
    for name, (draw, *inputs) in drawings.items():
        figure = Figure((8.5, 9 if "guided" in name else 4.5), layout="constrained")
        draw(figure, *inputs)
        figure.savefig(f"experiments/{name}.png", dpi=120)


def table(options):
    print("|run|", *[f"{mark / 1e6:g}M|" for mark in MARKS], sep="")
    print("|---|" + "---|" * len(MARKS))
    for model in options.models:
        cells, seeds = [model], read(model)
        for mark in MARKS:
            if mark < 1.001 * min(seed[0, -1] for seed in seeds):  # to a rollout
                found = [np.interp(mark, *seed) for seed in seeds]
                cells.append(f"{np.median(found):.1f} ({min(found):.1f} to {max(found):.1f})")
        print(f"|{'|'.join(cells)}|")


def publish(options):
    for folder in options.folders:
        name = folder.name.removeprefix("Breakout-")
        lines = [row for path in folder.glob("metrics.csv") for row in csv.reader(path.open())]
        lines[1:] or sys.exit(f"{folder} has no row in metrics.csv")
        thinned = lines[: 0 : -max(1, len(lines) // 200)][::-1]  # the last row stays
        short = [[x if x.isdigit() else f"{float(x):.4g}" for x in row] for row in thinned]
        np.savetxt(RESULTS / f"{name}.csv", [lines[0], *short], fmt="%s", delimiter=",")
        scores = Path("watched", folder.name, f"scores-{lines[-1][0]}-100.json")
        if scores.exists():
            (RESULTS / f"{name}.json").write_text(scores.read_text())
        if options.weights:
            saved = torch.load(folder / "checkpoint.pt", "cpu", weights_only=True)
            saved["weights"] = {key: x.half() for key, x in saved["weights"].items()}
            del saved["optimizer"]
            torch.save(saved, f"experiments/weights/{name}.pt")


if __name__ == "__main__":
    parser = ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    add = commands.add_parser("publish", help="copy what runs have made to results/").add_argument
    add("folders", nargs="+", type=Path, help="of runs, like runs/Breakout-adapt-10M-seed1")
    add("--weights", action="store_true", help="copy the weights, too, in half precision")
    commands.add_parser("figures", help="draw the pictures of the READMEs")
    add = commands.add_parser("table", help="print scores in Markdown").add_argument
    add("models", nargs="*", default=FIG3 | FIG5, help="like adapt-10M; else those of Fig. 3 and 5")
    options = parser.parse_args()
    {"publish": publish, "figures": figures, "table": table}[options.command](options)
