"""The tables of a stage on their way: inputs read ahead of the work, finished parts stored behind it.

A stage's own file does the work; storage/manifest.py says what a finished part is.
"""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa

from dice_core.data import records
from dice_core.progress import log
from dice_core.stages.runner import Input, StageContext
from dice_core.storage import layout
from dice_core.storage.contract import UnfitError
from dice_core.storage.manifest import Metric
from dice_core.storage.transfers import read_ahead, write_behind

if TYPE_CHECKING:
    from dice_core.data.chat import ChatFormat

# Tables of thousands of parts: little is done with each, so that their way here decides.
# Each may take ten of the storage's forty connections.
_NUM_AHEAD = 4


def part_name(index: int) -> str:
    """Return the file name of a part of a sharded table."""
    return f"part-{index:05d}.parquet"


def group_tables(context: StageContext, group: str, schema: pa.Schema) -> Iterator[pa.Table]:
    """Read all tables of a group of inputs, in order, a few ahead of the caller."""
    parts = [(source, name) for source in context.group(group) for name in source.tables()]
    return context.until_end(read_ahead(lambda part: _read(context, part[0], schema, part[1]), parts, _NUM_AHEAD))


def read_input(context: StageContext, source: Input, schema: pa.Schema, prefix: str) -> pa.Table:
    """Read the one table of an input whose name has this prefix; a user's own file may have any name."""
    names = source.tables("" if source.is_users_file else prefix)
    if not names:
        found = ", ".join(source.manifest.files) or "no file"
        raise UnfitError(f"{source.uri}: has no {prefix}*.parquet, its manifest names {found}")
    return _read(context, source, schema, names[0])


def read_data(
    context: StageContext, schema: pa.Schema, prefix: str, template: "Callable[[], ChatFormat]"
) -> tuple[pa.Table, dict[str, Metric]]:
    """Read prompts or pairs from prepare-data, or from a user's own file, which is cleaned as prepare-data does it.

    Args:
        context: with an input `data`.
        schema: of the table.
        prefix: of its name at prepare-data's place.
        template: returns the chat format of the policy; called for a user's own file.

    Returns:
        The table, and numbers for the manifest: what was dropped and cleaned.
    """
    source = context.inputs["data"]
    table = read_input(context, source, schema, prefix)
    if not source.is_users_file:
        return table, {}
    from dice_core.data.own_tables import clean_table

    where = layout.join(source.uri, source.tables()[0])
    table, counts = clean_table(table, template().control_tokens, where)
    if counts:
        told = ", ".join(f"{name} {count}" for name, count in sorted(counts.items()))
        log(f"{context.manifest_fields['stage']}: {where}: {told}")
    return table, dict(counts)


def _read(context: StageContext, source: Input, schema: pa.Schema, name: str) -> pa.Table:
    # A folder of its own: parts of two shards that are read at the same time may have one name.
    with tempfile.TemporaryDirectory(dir=context.folder) as folder:
        path = source.fetch(Path(folder), [name])[name]
        return records.read_table(path, schema, where=layout.join(source.uri, name))


def stored_parts(context: StageContext, schema: pa.Schema) -> Iterator[tuple[str, pa.Table]]:
    """Read the finished parts that are tables, by name."""
    names, stored = sorted(name for name in context.parts if name.endswith(".parquet")), context.stored
    tables = read_ahead(lambda name: _read(context, stored, schema, context.parts[name].key), names, _NUM_AHEAD)
    return zip(names, context.until_end(tables), strict=True)


@contextmanager
def published_behind(
    context: StageContext, schema: pa.Schema, use: Callable[[str, pa.Table], None]
) -> Iterator[Callable[[int, pa.Table], None]]:
    """Yield a function that stores a part while the caller makes the next one; `use` gets each part that counts."""

    def publish(index: int, table: pa.Table) -> None:
        name = part_name(index)
        path = context.write_table(table, schema, name)
        is_ours = context.publish_part(name, path)
        path.unlink()
        use(name, table if is_ours else _read(context, context.stored, schema, context.parts[name].key))

    with write_behind(publish) as begin:
        yield begin
