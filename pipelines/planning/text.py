"""A plan as a person reads it: a table of stages, sums, and what the numbers rest on."""

from collections.abc import Callable, Iterator, Sequence

from pipelines.planning.memory import GIB
from pipelines.planning.ranges import Range
from pipelines.planning.run_plan import RunPlan, StagePlan, Use

UNKNOWN = "?"
"""What nothing tells."""
_HEAD = ("stage", "pods x GPUs", "memory", "host", "disk", "S3 read", "S3 written", "tokens", "time")


def plan_lines(plan: RunPlan, price: float = 0.0) -> Iterator[str]:
    """Yield the lines of a plan.

    Args:
        plan: of a run.
        price: of a GPU for an hour; 0: not known.
    """
    yield f"plan of {plan.name}, on {plan.device}"
    yield ""
    yield from _table([_HEAD, *map(_row, plan.stages)])
    yield ""
    yield "memory of one device, in GiB:"
    yield from (f"  {line}" for line in _memory_lines(plan))
    yield ""
    yield from _sums(plan, price)
    yield ""
    yield "what this rests on:"
    yield from (f"  {note}" for note in plan.notes)
    yield from (
        f"  {rate.what}: {_bounds(rate.value, _plain)} {rate.unit} ({rate.kind}: {rate.source})" for rate in plan.rates
    )
    yield from (f"close: {line}" for line in plan.warnings)
    yield from (f"late: {line}" for line in plan.late)
    yield from (f"cannot fit: {line}" for line in plan.refusals)
    if plan.changes:
        yield f'all of it fits with SET="{" ".join(plan.changes)}"'


def _row(stage: StagePlan) -> tuple[str, ...]:
    use = stage.largest
    return (
        stage.title,
        f"{stage.num_pods} x {stage.gpus_per_pod}",
        _gib(use.memory.total) if use else "small",
        _gib(stage.host_bytes) if stage.host_bytes else "small",
        _gib(stage.disk_bytes) if stage.disk_bytes else "small",
        _bounds(stage.read_bytes, _gb) if stage.read_bytes.high else "small",
        _bounds(stage.written_bytes, _gb) if stage.written_bytes.high else "small",
        _bounds(stage.tokens, _count) if stage.tokens else _of_unknown(stage),
        _bounds(stage.seconds, duration) if stage.seconds else UNKNOWN,
    )


def _of_unknown(stage: StagePlan) -> str:
    return UNKNOWN if stage.seconds is None else "-"


def _memory_lines(plan: RunPlan) -> Iterator[str]:
    seen: set[tuple[str, Use]] = set()
    for stage in plan.stages:
        kind = stage.title.rpartition(": ")[2]
        for use in stage.uses:
            if (kind, use) in seen:
                continue
            seen.add((kind, use))
            parts = ", ".join(f"{name} {value / GIB:.1f}" for name, value in use.memory.parts().items() if value)
            share = use.memory.total / plan.device_bytes
            yield f"{stage.title}, {use.what}: {use.memory.total / GIB:.1f} ({share:.0%} of the device): {parts}"


def _sums(plan: RunPlan, price: float) -> Iterator[str]:
    yield f"time: {_bounds(plan.seconds, duration) if plan.seconds else UNKNOWN}, without waiting for nodes"
    hours = plan.gpu_seconds / 3600 if plan.gpu_seconds else None
    if any(stage.gpus_per_pod for stage in plan.stages):
        yield f"GPU hours: {_bounds(hours, _plain) if hours else UNKNOWN}"
        if price:
            cost = _bounds(hours * price, _plain) if hours else UNKNOWN
            yield f"cost at {price:g} a GPU hour: {cost}, while stages hold GPUs; idle nodes cost too"
        else:
            yield "cost: give PRICE=, of a GPU for an hour"
    yield f"S3: {_bounds(plan.read_bytes, _gb)} read, {_bounds(plan.written_bytes, _gb)} written"
    largest = max((stage.largest.memory.total for stage in plan.stages if stage.largest), default=0.0)
    yield f"peak memory of a device: {_gib(largest)}"


def _table(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEAD))]
    for row in rows:
        yield "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip()


def _bounds(value: Range, text: Callable[[float], str]) -> str:
    """Return both bounds, or one where they read the same."""
    low, high = text(value.low), text(value.high)
    return low if low == high else f"{low} - {high}"


def _plain(value: float) -> str:
    return f"{value:,.3g}" if value < 1000 else f"{value:,.0f}" if value < 1e6 else f"{value:.2e}"


def _gib(value: float) -> str:
    return f"{value / GIB:,.1f} GiB"


def _gb(value: float) -> str:
    return f"{value / 1e9:,.1f} GB"


def _count(value: float) -> str:
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.0f}"


def duration(seconds: float) -> str:
    """Return a time in the two largest units that it has."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"
