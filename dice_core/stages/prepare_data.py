"""Stage prepare-data: the user's files brought here, identified by content, and made into the tables of a run.

data.preparing decides what is kept, data.sources reads the rows.
"""

import hashlib
import itertools
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from dice_core.data import records
from dice_core.data.settings import ChatConfig, DataConfig
from dice_core.data.source_files import files_below, files_to_read
from dice_core.progress import Progress, doing, log
from dice_core.settings.base import ConfigError, Values
from dice_core.stages.attempts import leaves_reason
from dice_core.stages.place import Artifact, show
from dice_core.stages.run_settings import read_task
from dice_core.stages.runner import StageContext, StageReport, run_stage, scratch_folder
from dice_core.stages.table import PREPARE_DATA
from dice_core.storage.address import open_storage
from dice_core.storage.contract import MissingObjectError, UnfitError
from dice_core.storage.manifest import Manifest
from dice_core.storage.transfers import side_by_side

if TYPE_CHECKING:
    from dice_core.data.sources import Rows

SOURCES = "sources"
"""Where a manifest says what the user called the sources; what identifies them are digests of their content."""


@leaves_reason(PREPARE_DATA)
def prepare_data(
    preferences_source: str,
    output_uri: str,
    *,
    policy_uri: str,
    prompts_source: str = "",
    exclude_source: str = "",
    data: Values = None,
    chat: Values = None,
    seed: int = 0,
    overwrite: bool = False,
) -> StageReport:
    """Check, clean and split the user's preference pairs and prompts.

    Args:
        preferences_source: JSONL or Parquet (a file or a folder) or a Hub data set, with prompt, chosen, rejected.
        output_uri: where prompts, preferences (for replay) and held-out pairs (for evaluation) go.
        policy_uri: the model whose tokenizer measures prompts.
        prompts_source: prompts to generate on; by default those of the preference pairs.
        exclude_source: prompts of benchmarks; matching prompts are left out.
        data: settings, see DataConfig.
        chat: settings, see ChatConfig.
        seed: seed of the run.
        overwrite: first delete what this stage left at its output.
    """
    if not preferences_source:
        raise ConfigError("preferences_source: is empty, name a file, a folder, an s3:// address or a Hub data set")
    data_config, chat_config = DataConfig.parse(data, "data"), ChatConfig.parse(chat, "chat")
    with local_sources(
        {"preferences": preferences_source, "prompts": prompts_source, "exclude": exclude_source}
    ) as sources:
        work = partial(
            _prepare_tables,
            sources=sources,
            data=data_config,
            chat=chat_config,
            seed=PREPARE_DATA.seed(seed),
        )
        return run_stage(
            PREPARE_DATA,
            output_uri,
            work,
            settings={"data": data_config, "chat": chat_config},
            arguments={"seed": seed, **{name: source.digest for name, source in sources.items()}},
            noted={SOURCES: {name: source.shown for name, source in sources.items()}},
            overwrite=overwrite,
            inputs={"policy": policy_uri},
        )


@dataclass(frozen=True)
class LocalSource:
    """A source of user rows on this machine: its path, its name in messages, and the digest that identifies it."""

    path: str
    shown: str
    digest: str


@contextmanager
def local_sources(sources: Mapping[str, str]) -> Iterator[dict[str, LocalSource]]:
    """Bring the user's files to this machine, and identify each by its content; a Hub data set by its name."""
    with scratch_folder() as folder:
        with doing("bringing the user's files here, and reading them once"):
            local = {name: _local_source(source, folder / name) for name, source in sources.items() if source}
        yield local


def _local_source(source: str, folder: Path) -> LocalSource:
    path = _from_s3(source, folder) if source.startswith("s3://") else Path(source)
    # os.path, since a source that is too long for a name raises in pathlib.
    if not os.path.exists(path):
        return LocalSource(source, source, source)
    files = [path / name for name in files_below(path, source)] if path.is_dir() else [path]
    digests = "".join(side_by_side(_digest, files))
    return LocalSource(str(path), source, hashlib.sha256(digests.encode()).hexdigest())


def _from_s3(source: str, folder: Path) -> Path:
    """Bring a file, or the files with rows below a prefix, to this machine and return where they are."""
    storage = open_storage(source)
    if keys := [found.key for found in storage.list()]:
        side_by_side(lambda name: storage.download(name, folder / name), files_to_read(keys, source))
        return folder
    parent, _, name = source.rstrip("/").rpartition("/")
    try:
        open_storage(parent).download(name, folder / name)
    except MissingObjectError:
        raise UnfitError(f"{source}: no such file or folder") from None
    return folder / name


def _digest(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _prepare_tables(
    context: StageContext, *, sources: Mapping[str, LocalSource], data: DataConfig, chat: ChatConfig, seed: int
) -> Manifest:
    """Read, check, clean and split the user's rows."""
    from dice_core.data.chat import chat_format
    from dice_core.data.preparing import prepare
    from dice_core.models.loading import load_tokenizer

    template = chat_format(load_tokenizer(context.fetch_tokenizer("policy")), chat)
    if template.tells_date:
        log(f"prepare-data: the chat template tells the model the date, in all stages {chat.date} (chat.date)")
    unlimited = replace(template, max_prompt_tokens=sys.maxsize)
    rows, benchmark = _read(sources, data)
    num_all = sum(source.table.num_rows for source in rows.values())
    progress, lengths = Progress("prepare-data", "rows", tells_end=False), itertools.count()

    def num_prompt_tokens(prompts: list[str]) -> list[int]:
        counted = []
        for prompt in prompts:
            counted.append(len(unlimited.prompt_token_ids(prompt)))
            progress(next(lengths) + 1, num_all)
        return counted

    prepared = prepare(
        rows.get("prompts"),
        rows["preferences"],
        data,
        seed=seed,
        num_prompt_tokens=num_prompt_tokens,
        max_prompt_tokens=chat.max_prompt_tokens,
        benchmark_prompts=benchmark.table["prompt"].to_pylist() if benchmark else (),
        control_tokens=template.control_tokens,
        tokenise_response=template.response_token_ids,
    )
    files = {
        "prompts.parquet": context.write_table(prepared.prompts, records.PROMPTS, "prompts.parquet"),
        "preferences.parquet": context.write_table(prepared.preferences, records.PREFERENCES, "preferences.parquet"),
        "held_out.parquet": context.write_table(prepared.held_out, records.PREFERENCES, "held_out.parquet"),
    }
    not_looked_for = benchmark.num_dropped if benchmark else {}
    counts = prepared.counts | {f"num_dropped_exclude_{reason}": count for reason, count in not_looked_for.items()}
    return context.publish(files, {**counts, "seconds": context.seconds()})


def _read(sources: Mapping[str, LocalSource], data: DataConfig) -> "tuple[dict[str, Rows], Rows | None]":
    """Return the rows of preferences and prompts, and those of the benchmark."""
    from dice_core.data.sources import read_preferences, read_prompts

    # A benchmark's prompt is looked for whatever the system prompt is that it is asked with.
    configs = {"exclude": data.model_copy(update={"system_prompts": "ignore"})}
    rows = {
        name: (read_preferences if name == "preferences" else read_prompts)(
            source.path, configs.get(name, data), name=source.shown
        )
        for name, source in sources.items()
    }
    benchmark = rows.pop("exclude", None)
    return rows, benchmark


def prepare_data_task(settings_uri: str, place: str, metrics: Artifact) -> None:
    """Prepare the data of a run, as a task of a pipeline; see prepare_data."""
    task = read_task(settings_uri, place)
    report = prepare_data(
        task.plan["preferences_source"],
        task.uri,
        policy_uri=task.imported_uri("policy"),
        prompts_source=task.plan["prompts_source"],
        exclude_source=task.plan["exclude_source"],
        seed=task.plan["seed"],
        **task.settings(PREPARE_DATA),
    )
    show(report, task.place, metrics)
