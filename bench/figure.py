"""The picture of `make bench`: time of a training step, one panel a case."""

import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from clmae.figures import BASELINE, COLOURS, styled

NAMES = {"32": "float32", "bf16": "bfloat16"}


def steps(record: dict) -> pd.DataFrame:
    """Step times of a case in multiples of our own MAE's in its first precision, one row a contestant."""
    unit = next(r["milliseconds"]["median"] for r in record["rows"] if r["contestant"] == "MAE, ours")
    rows = [
        {
            "contestant": r["contestant"],
            "precision": NAMES[r["precision"]],
            **{name: value / unit for name, value in r["milliseconds"].items()},
        }
        for r in record["rows"]
    ]
    return pd.DataFrame(rows)


def draw_case(ax, record: dict, palette: dict[str, str]) -> None:
    """Bars of medians with whiskers from the fastest round to the slowest."""
    table = steps(record)
    order = list(dict.fromkeys(table["contestant"]))
    sns.barplot(
        table, y="contestant", x="median", hue="precision", hue_order=list(palette), palette=palette,
        order=order, ax=ax, legend=False, errorbar=None, gap=0.1,
    )  # fmt: skip
    shift = {name: 0.8 * ((i + 0.5) / len(palette) - 0.5) for i, name in enumerate(palette)}
    y = [order.index(c) + shift[p] for c, p in zip(table["contestant"], table["precision"])]
    spread = [table["median"] - table["low"], table["high"] - table["median"]]
    ax.errorbar(table["median"], y, xerr=spread, fmt="none", ecolor="#333333", elinewidth=1)
    for x, high, place in zip(table["median"], table["high"], y):
        ax.annotate(
            f"{x:.2f}", (high, place), (4, 0), textcoords="offset points", va="center", fontsize=8,
            bbox={"fc": "white", "ec": "none", "pad": 0.5},
        )  # fmt: skip
    ax.axvline(1, color=BASELINE, lw=1, ls="--", zorder=0.5)
    ax.set(xlabel="time of a step (our MAE in float32 = 1)", ylabel="", xlim=(0, 1.12 * table["high"].max()))
    ax.set_title(f"{record['title']}\n{record['machine'].get('gpu', record['machine']['cpu'])}", fontsize=10)


@styled
def draw(records: list[dict]) -> Figure:
    """Step times of all cases side by side."""
    names = dict.fromkeys(NAMES[r["precision"]] for record in records for r in record["rows"])
    palette = dict(zip(names, (COLOURS[1], COLOURS[3])))
    figure = Figure(figsize=(4.2 * len(records) + 2.4, 4.6), layout="constrained")
    panels = figure.subplots(1, len(records), squeeze=False, sharey=True)[0]
    for ax, record in zip(panels, records):
        draw_case(ax, record, palette)
    handles = [panels[0].barh([0], [0], color=colour) for colour in palette.values()]
    figure.legend(handles, list(palette), loc="outside lower center", ncols=len(palette))
    return figure
