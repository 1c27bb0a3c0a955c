"""Draw ``decode.png`` from the ``decode-MODEL.json`` of random-weight shapes: ``python -m benchmarks.plot_decode``."""

from __future__ import annotations

import json
from typing import Any

from .common import RESULTS

NAMES = {"llama-3.1-8b": "Llama-3.1-8B shape", "llama-2-7b": "Llama-2-7B shape"}


def best_rows(context: dict[str, Any]) -> dict[float, dict[str, Any]]:
    """Of one context's synthetic rows, the fastest number of drafts at each acceptance rate."""
    best: dict[float, dict[str, Any]] = {}
    for row in context["synthetic"]:
        rate = row["synthetic_acceptance_rate"]
        if rate not in best or row["speedup"] > best[rate]["speedup"]:
            best[rate] = row
    return best


def main() -> None:
    """Speed-up over the strong baseline against context, one panel per model."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(NAMES), figsize=(9, 3.6), sharey=True)
    for axis, (name, title) in zip(axes, NAMES.items(), strict=True):
        contexts = json.loads((RESULTS / f"decode-{name}.json").read_text())["rows"]
        lengths = [row["context"] for row in contexts]
        best = [best_rows(row) for row in contexts]
        for number, rate in enumerate(sorted(best[0])):
            shade = 0.35 + 0.6 * number / max(1, len(best[0]) - 1)
            speedups = [rows[rate]["speedup"] for rows in best]
            axis.plot(lengths, speedups, marker="o", color=pyplot.get_cmap("Blues")(shade), label=f"{rate:.2f}")
        axis.axhline(1, color="gray", linewidth=1)
        axis.set(xscale="log", title=f"{title}, random weights", xlabel="context, tokens", ylim=(0.9, 2.3))
        axis.set_xticks(lengths, [f"{length // 1024}k" for length in lengths])
        axis.minorticks_off()
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", alpha=0.3)
    axes[0].set_ylabel("decoding, times the baseline's speed")
    axes[-1].legend(title="synthetic acceptance", loc="lower right", bbox_to_anchor=(1, 0.08), frameon=False, ncols=2)
    figure.tight_layout()
    figure.savefig(RESULTS / "decode.png", dpi=130)


if __name__ == "__main__":
    main()
