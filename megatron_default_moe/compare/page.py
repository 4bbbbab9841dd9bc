"""``report.html``: one file with its pictures inside, readable offline."""

import html
import pathlib
from collections.abc import Mapping, Sequence

from megatron_default_moe.compare.pictures import embedded, pictures
from megatron_default_moe.compare.results import Row, ratio
from megatron_default_moe.compare.statistics import Mean
from megatron_default_moe.compare.study import Study

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1080px; margin: 2em auto; padding: 0 1em;
  color: #222; background: #fff }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: .3em .7em; border-bottom: 1px solid #ddd; text-align: right }
th:first-child, td:first-child { text-align: left }
img { max-width: 100%; height: auto } .wide { overflow-x: auto } .note { color: #666 }
.failed { color: #a00 } code, pre { font-size: 13px } pre { overflow-x: auto }
"""


def write(
    study: Study, table: Sequence[Row], failed: Mapping[str, str], path: pathlib.Path
) -> None:
    """Write the page.

    Args:
        study: what was compared.
        table: every arm.
        failed: why runs failed, by their names.
        path: of the page.
    """
    title = f"{study.path.stem}: {len(study.arms)} arms, {len(study.seeds)} seeds"
    parts = [
        f"<h1>{html.escape(title)}</h1>",
        f"<p>{html.escape(_what(study, table))}</p>",
        *(_failed(name, reason) for name, reason in failed.items()),
        "<h2>What was found</h2><ul>",
        *(f"<li>{html.escape(verdict(row, study.baseline))}</li>" for row in table),
        "</ul>",
        f"<div class=wide>{_table(table, study.baseline)}</div>",
        f"<p class=note>{html.escape(_reading(study.baseline))}</p>",
    ]
    for name, reading, figure in pictures(table, study.baseline):
        parts += [
            f"<h2>{html.escape(name)}</h2><p class=note>{html.escape(reading)}</p>",
            f'<img alt="{html.escape(name)}" src="{embedded(figure)}">',
        ]
    parts += ["<h2>Flags</h2>", _flags(study)]
    body = "\n".join(parts)
    path.write_text(
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head>\n"
        f"<body>\n{body}\n</body></html>\n",
        encoding="utf-8",
    )


def _what(study: Study, table: Sequence[Row]) -> str:
    done = sum(len(row.results) for row in table)
    return (
        f"{done} of {len(study.pairs)} runs are finished, each of {study.steps} steps. Runs of a"
        " seed share initial weights and the order of the data, so that differences are taken"
        f" in pairs. The baseline is {study.baseline}."
    )


def _failed(name: str, reason: str) -> str:
    return f"<p class=failed>Failed: {html.escape(name)}: {html.escape(reason)}</p>"


def verdict(row: Row, baseline: str) -> str:
    """What an arm's difference says, and what it does not."""
    apart = row.difference
    if row.arm == baseline:
        final = row.final
        return f"{row.arm} (baseline): " + (
            "not finished." if final is None else f"{_loss(final)}."
        )
    if apart is None:
        return f"{row.arm}: no seed is finished for it and for {baseline}; nothing can be said."
    text = f"{row.arm}: {apart.mean:+.4f} nats to {baseline}"
    if apart.low is None or apart.high is None:
        return f"{text} in one seed; how much seeds differ is not known, so nothing follows."
    text += f", 95 % interval {apart.low:+.4f} to {apart.high:+.4f} ({apart.count} pairs); "
    if apart.low <= 0 <= apart.high:
        return text + "no difference can be told."
    return text + ("better." if apart.high < 0 else "worse.")


def _loss(mean: Mean) -> str:
    error = "" if mean.error is None else f" (standard error {mean.error:.4f})"
    return f"final validation loss {mean.mean:.4f}{error}"


def _reading(baseline: str) -> str:
    return (
        f"Difference: final validation loss less {baseline}'s of the same seed, mean and 95 %"
        " t-interval; the interval of one comparison, not widened for the number of arms. Tokens:"
        f" until {baseline}'s final loss is first reached, over {baseline}'s own, mean over seeds;"
        " only where every pair reaches it (in brackets: how many do). Step time: median of a run,"
        f" over {baseline}'s of the same seed; of runs side by side it says little."
    )


def _table(table: Sequence[Row], baseline: str) -> str:
    head = (
        *("arm", "seeds", "final loss", "std. error", f"difference to {baseline}", "95 % interval"),
        *("tokens", "step time", "memory (GB)"),
    )
    lines = ["<table><tr>", *(f"<th>{html.escape(name)}</th>" for name in head), "</tr>"]
    for row in table:
        apart, final = row.difference, row.final
        cells = (
            row.arm,
            str(len(row.results)),
            "-" if final is None else f"{final.mean:.4f}",
            "-" if final is None or final.error is None else f"{final.error:.4f}",
            "-" if apart is None else f"{apart.mean:+.4f}",
            "-" if apart is None or apart.low is None else f"{apart.low:+.4f} to {apart.high:+.4f}",
            f"{ratio(row.tokens_ratio)} ({row.reached} of {row.paired})",
            ratio(row.step_time_ratio),
            "-" if row.memory is None else f"{row.memory / 1e9:.2f}",
        )
        lines += ["<tr>", *(f"<td>{html.escape(cell)}</td>" for cell in cells), "</tr>"]
    return "".join([*lines, "</table>"])


def _flags(study: Study) -> str:
    """What arms differ in, and behind a click what they share."""
    arms = list(study.arms.values())
    shared = {
        flag: value
        for flag, value in arms[0].items()
        if all(flag in arm and arm[flag] == value for arm in arms)
    }
    own = [
        f"{name}: " + ", ".join(f"{k}: {_shown(v)}" for k, v in lines.items() if k not in shared)
        for name, lines in study.arms.items()
    ]
    text = "\n".join(f"{flag}: {_shown(value)}" for flag, value in sorted(shared.items()))
    seeds = ", ".join(map(str, study.seeds))
    return (
        f"<pre>{html.escape(chr(10).join(own))}\nseeds: {seeds}</pre>"
        f"<details><summary>of all arms</summary><pre>{html.escape(text)}</pre></details>"
    )


def _shown(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)
