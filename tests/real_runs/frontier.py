"""Reward against KL along runs, on one plot, from what `tests.real_runs.alignment` measured.

    python -m tests.real_runs.frontier docs/runs/frontier.svg DPO=docs/runs/dpo/measured.jsonl \\
        PPO=docs/runs/ppo/measured.jsonl
"""

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw the rule's rate against KL from the start model.")
    parser.add_argument("output", type=Path)
    parser.add_argument("runs", nargs="+", metavar="NAME=FILE")
    arguments = parser.parse_args()
    matplotlib.rcParams.update({"svg.hashsalt": "frontier", "font.size": 9})  # the same figures, the same file
    figure, axes = pyplot.subplots(figsize=(5.5, 3.6), layout="constrained")
    for run in arguments.runs:
        name, _, file = run.partition("=")
        points = [json.loads(line) for line in Path(file).read_text(encoding="utf-8").splitlines()]
        columns = {key: [point[key] for point in points] for key in ("kl", "rule_rate", "kl_error", "rule_rate_error")}
        axes.errorbar(
            columns["kl"],
            columns["rule_rate"],
            xerr=columns["kl_error"],
            yerr=columns["rule_rate_error"],
            marker="o",
            capsize=2,
            label=name,
        )
    axes.set_xlabel("KL(policy || start) of an answer, nats")
    axes.set_ylabel("reward: share of answers that keep the rule")
    axes.set_ylim(0, 1)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(arguments.output, metadata={"Date": None})


if __name__ == "__main__":
    main()
