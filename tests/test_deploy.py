"""deploy/: images from the locks and a small context, and manifests that KubeRay and our own command line take.

No container engine runs here: what the images do is read from their files, and their own step is run in a fresh
environment. Nothing is downloaded.
"""

import importlib.metadata
import json
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import kuberay
import pytest
import typer
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from batch_rerank.cli import app
from batch_rerank.config import JobConfig, load_config

ROOT = Path(__file__).parent.parent
DEPLOY = ROOT / "deploy"
IMAGES = [DEPLOY / "Dockerfile", DEPLOY / "Dockerfile.cpu"]
PLACE = {"rayjob.yaml": ("RayJob",), "nightly.yaml": ("RayCronJob", "jobTemplate")}
PAGE = (ROOT / "docs" / "kubernetes.md").read_text(encoding="utf-8")


# ---- the images


def instructions(image: Path) -> list[tuple[str, str]]:
    """What a Dockerfile says, as instruction and value."""
    lines = [line for line in image.read_text().splitlines() if line.strip() and not line.lstrip().startswith("#")]
    return [tuple(line.split(None, 1)) for line in "\n".join(lines).replace("\\\n", " ").splitlines()]  # type: ignore[misc]


@pytest.mark.parametrize("image", IMAGES, ids=lambda image: image.name)
def test_hadolint_has_nothing_to_say(image: Path) -> None:
    hadolint = shutil.which("hadolint", path=str(Path(sys.executable).parent)) or shutil.which("hadolint")
    if hadolint is None:
        pytest.skip("hadolint is not installed: it is a package for Linux on x86_64 and macOS")
    done = subprocess.run([hadolint, "--no-color", str(image)], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize("image", IMAGES, ids=lambda image: image.name)
def test_an_image_is_closed_by_default_runs_as_nobody_and_takes_what_is_locked(image: Path) -> None:
    said = instructions(image)
    final = said[max(index for index, (name, _) in enumerate(said) if name == "FROM") :]
    of = {name: [value for other, value in final if other == name] for name, _ in final}
    assert of["USER"] == ["1000:1000"], "a number, so that runAsNonRoot can be checked"
    assert "RAY_AUTH_MODE=token" in of["ENV"][0]
    assert not {name for name, _ in said} - {
        "ARG",
        "FROM",
        "RUN",
        "ENV",
        "COPY",
        "WORKDIR",
        "USER",
        "ENTRYPOINT",
        "CMD",
    }
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert json.loads(of["ENTRYPOINT"][0])[0] in scripts
    for name, value in said:
        assert not re.search(r"(?i)secret|passw|AWS_|HF_TOKEN|api_?key", value), f"{name} {value}"
    installs = [
        step for name, value in said if name == "RUN" for step in re.split(r"&&", value) if "pip install" in step
    ]
    for step in installs:
        assert "--no-deps" in step
        assert "--require-hashes" in step or "--no-build-isolation ." in step or "TORCH_INDEX" in step


def locked(file: str) -> dict[str, str]:
    lines = [line for line in (DEPLOY / file).read_text().splitlines() if not line.startswith("#")]
    found = [re.fullmatch(r"([a-z0-9-]+)==(\S+) --hash=sha256:[0-9a-f]{64}", line) for line in lines]
    assert all(found)
    return {match[1]: match[2] for match in found if match}


def closure(requirements: list[str], found: dict[str, str]) -> dict[str, str]:
    """Versions of what is needed on Linux, as it is installed here, with what that needs."""
    platform = {"sys_platform": "linux", "platform_system": "Linux", "platform_machine": "x86_64", "os_name": "posix"}
    python = {"python_version": "3.11", "python_full_version": "3.11.9", "implementation_name": "cpython"}
    for text in requirements:
        wanted = Requirement(text)
        for extra in (*wanted.extras, ""):
            if wanted.marker and not wanted.marker.evaluate({**platform, **python, "extra": ""}):
                continue
            name = canonicalize_name(wanted.name)
            inner = importlib.metadata.requires(name) or []
            known = name in found and not extra
            found[name] = importlib.metadata.version(name).partition("+")[0]
            if known:
                continue
            mine = [Requirement(one) for one in inner]
            closure(
                [
                    f"{one.name}{'[' + ','.join(one.extras) + ']' if one.extras else ''}"
                    for one in mine
                    if not one.marker or one.marker.evaluate({**platform, **python, "extra": extra})
                ],
                found,
            )
    return found


@pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="the locks are Python 3.11's")
def test_the_locks_are_what_the_tests_run_with_and_whole() -> None:
    plain, cuda = locked("requirements.lock"), locked("cuda.lock")
    tested = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines())
    tested = {str(canonicalize_name(name)): version for name, version in tested.items()}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    stores = project["optional-dependencies"]
    needed = closure([*project["dependencies"], *stores["gs"], *stores["abfs"]], {})
    both = {**plain, **cuda}
    assert {name: both.get(name) for name in needed} == needed, "run deploy/lock.py"
    assert {name for name in plain if name not in needed} <= {"setuptools"}, "for the build"
    assert [name for name in both if name in tested and both[name] != tested[name]] == []
    assert all(re.fullmatch(r"torch|triton|nvidia-.*|cuda-.*", name) for name in cuda)


def context() -> Iterator[Path]:
    """Files that .dockerignore lets through, as Docker reads it: the last pattern that fits a path or a folder of it
    decides, and a star ends at a slash."""
    rules = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]

    def fits(path: Path, rule: str) -> bool:
        parts, wanted = path.relative_to(ROOT).parts, rule.lstrip("!").split("/")
        if wanted[0] == "**":
            return any(fnmatchcase(part, wanted[1]) for part in parts)
        return len(parts) >= len(wanted) and all(map(fnmatchcase, parts, wanted))

    tops = {rule.lstrip("!").split("/")[0] for rule in rules if rule.startswith("!")}
    for top in sorted(tops):
        for path in [ROOT / top, *(ROOT / top).rglob("*")]:
            last = [rule for rule in rules if fits(path, rule)]
            if path.is_file() and last and last[-1].startswith("!"):
                yield path


def test_the_context_is_small_and_has_what_is_copied() -> None:
    files = list(context())
    assert sum(file.stat().st_size for file in files) < 3 * 2**20
    names = {str(file.relative_to(ROOT)) for file in files}
    assert {name.partition("/")[0] for name in names} <= {
        "batch_rerank",
        "deploy",
        "pyproject.toml",
        "README.md",
        "LICENSE",
    }
    assert {name for name in names if name.startswith("deploy/")} == {"deploy/requirements.lock", "deploy/cuda.lock"}
    assert not [name for name in names if "__pycache__" in name]
    for image in IMAGES:
        copies = [value.split()[:-1] for name, value in instructions(image) if name == "COPY" and "--from" not in value]
        for source in (one for sources in copies for one in sources if "*" not in one):
            assert source in names or any(name.startswith(f"{source}/") for name in names), source


def test_the_images_own_step_installs_a_package_that_runs(tmp_path: Path) -> None:
    """In a fresh environment that finds the other packages where they are installed here."""
    for file in context():
        target = tmp_path / "src" / file.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, target)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "venv")], check=True)
    (site,) = (tmp_path / "venv/lib").glob("python*/site-packages")
    (site / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    (step,) = [value for name, value in instructions(IMAGES[0]) if name == "RUN" and value.endswith("pip check")]
    install = shlex.split(step.split("&&")[0])[1:]
    pip = [sys.executable, "-m", "pip", "--python", str(tmp_path / "venv/bin/python"), "--no-input"]
    done = subprocess.run(
        [*pip, *install, "--no-index", "--quiet"], cwd=tmp_path / "src", capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    said = dict(instructions(IMAGES[0]))
    command = [*json.loads(said["ENTRYPOINT"]), *json.loads(said["CMD"])]
    command[0] = str(tmp_path / "venv/bin" / command[0])
    ran = subprocess.run(command, cwd=tmp_path, env={"PATH": "/usr/bin:/bin"}, capture_output=True, text=True)
    assert ran.returncode == 0 and "Score every candidate" in ran.stdout, ran.stderr
    where = [str(tmp_path / "venv/bin/python"), "-c", "import batch_rerank; print(batch_rerank.__file__)"]
    found = subprocess.run(where, cwd=tmp_path, env={}, capture_output=True, text=True, check=True).stdout
    assert Path(found.strip()).is_relative_to(tmp_path / "venv")


# ---- the manifests


def resources(file: str) -> dict[str, Any]:
    return {one["kind"]: one for one in yaml.safe_load_all((DEPLOY / file).read_text())}


def job_of(file: str) -> dict[str, Any]:
    """The RayJob's spec."""
    kind, *inner = PLACE[file]
    spec: dict[str, Any] = resources(file)[kind]["spec"]
    for name in inner:
        spec = spec[name]
    return spec


def command(line: str) -> list[str]:
    """A command's words; what a shell puts in is in them as a date."""
    return shlex.split(re.sub(r"\$\(date [^)]*\)", "2026-11-26", line))


def refused(words: list[str]) -> str | None:
    """Why our command line does not take a command, None where it does. Nothing is run."""
    verbs: Any = typer.main.get_command(app)
    try:
        verbs.commands[words[1]].make_context(words[1], words[2:])
    except Exception as error:  # click's own, of several kinds
        return f"{type(error).__name__}: {error}"
    return None


@kuberay.needed
@pytest.mark.parametrize("file", PLACE)
def test_kuberay_takes_it_and_drops_nothing(file: str) -> None:
    resource = resources(file)[PLACE[file][0]]
    assert kuberay.problems(resource) == []


@kuberay.needed
@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda spec: spec.update(backofLimit=3), "spec.backofLimit"),
        (lambda spec: spec["rayClusterSpec"]["workerGroupSpecs"][0].update(maxReplica=3), "maxReplica"),
        (lambda spec: spec["rayClusterSpec"]["workerGroupSpecs"][0].update(maxReplicas="8"), "'8' is not of type"),
        (lambda spec: spec["rayClusterSpec"]["authOptions"].update(secret="x"), "authOptions.secret"),
        (lambda spec: pod_of(spec)["containers"][0].update(volumeMount=[]), "containers[].volumeMount"),
        (lambda spec: pod_of(spec)["tolerations"][0].update(value=True), "True is not of type"),
    ],
)
def test_what_kuberay_would_drop_or_refuse_is_seen(change: Any, problem: str) -> None:
    resource = resources("rayjob.yaml")["RayJob"]
    change(resource["spec"])
    (found,) = kuberay.problems(resource)
    assert problem in found


def pod_of(spec: dict[str, Any]) -> dict[str, Any]:
    """The pod of the workers."""
    found: dict[str, Any] = spec["rayClusterSpec"]["workerGroupSpecs"][0]["template"]["spec"]
    return found


@pytest.mark.parametrize("file", PLACE)
def test_the_command_is_the_images_and_its_job_file_is_valid(file: str, tmp_path: Path) -> None:
    spec, found = job_of(file), resources(file)
    words = command(spec["entrypoint"])
    assert words[0] == json.loads(dict(instructions(IMAGES[0]))["ENTRYPOINT"])[0]
    assert refused(words) is None
    assert refused([*words, "--sett", "a=b"]), "an option that is none is seen"
    head = spec["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    (volume,) = [one for one in head["volumes"] if "configMap" in one]
    assert volume["configMap"]["name"] == found["ConfigMap"]["metadata"]["name"]
    (mount,) = [one for one in head["containers"][0]["volumeMounts"] if one["name"] == volume["name"]]
    folder, _, name = words[2].rpartition("/")
    assert (folder, list(found["ConfigMap"]["data"])) == (mount["mountPath"], [name])
    (tmp_path / name).write_text(found["ConfigMap"]["data"][name])
    config = load_config(tmp_path / name, [words[index + 1] for index, word in enumerate(words) if word == "--set"])
    check_gpus(config, spec)
    if config.output.latest:
        assert config.output.path.endswith("/2026-11-26")


def check_gpus(config: JobConfig, spec: dict[str, Any]) -> None:
    (group,) = spec["rayClusterSpec"]["workerGroupSpecs"]
    limits = pod_of(spec)["containers"][0]["resources"]["limits"]
    assert config.cluster.gpus_per_actor == 1, "auto cannot see what a cluster grows to"
    assert config.cluster.max_actors == group["maxReplicas"] * int(limits["nvidia.com/gpu"])
    assert config.cluster.threads < int(limits["cpu"]), "some are left to read and to tokenise"
    assert config.cluster.max_seconds_without_progress


@pytest.mark.parametrize("file", PLACE)
def test_nodes_come_and_go_and_nothing_is_open_or_secret(file: str) -> None:
    spec = job_of(file)
    cluster = spec["rayClusterSpec"]
    assert spec["shutdownAfterJobFinishes"] and spec["backoffLimit"] > 0
    assert cluster["enableInTreeAutoscaling"] and cluster["workerGroupSpecs"][0]["minReplicas"] == 0
    assert cluster["authOptions"] == {"mode": "token"}
    assert cluster["rayVersion"] == locked("requirements.lock")["ray"]
    head, workers = cluster["headGroupSpec"]["template"]["spec"], pod_of(spec)
    assert any("spot" in one["key"] for one in workers["tolerations"]) and "tolerations" not in head
    environment = {one["name"]: one["value"] for one in workers["containers"][0]["env"]}
    assert float(environment["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"]) < workers["terminationGracePeriodSeconds"]
    account = resources(file)["ServiceAccount"]["metadata"]["name"]
    for pod in (head, workers):
        (container,) = pod["containers"]
        assert pod["serviceAccountName"] == account
        assert pod["securityContext"]["runAsNonRoot"] and pod["restartPolicy"] == "Never"
        assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
        assert container["image"] == head["containers"][0]["image"]
    assert "Secret" not in resources(file), "secrets are made by hand, not kept in a file"


def test_both_manifests_describe_one_cluster() -> None:
    one, other = (json.dumps(job_of(file)["rayClusterSpec"]) for file in PLACE)
    assert one.replace('"name": "rerank"', '"name": "nightly"') == other


def test_names_leave_room_for_what_kuberay_appends() -> None:
    assert len(resources("rayjob.yaml")["RayJob"]["metadata"]["name"]) <= 47
    assert len(resources("nightly.yaml")["RayCronJob"]["metadata"]["name"]) <= 36


# ---- the page


def test_the_pages_commands_exist_and_its_table_has_every_exit_code() -> None:
    code = "\n".join(re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)).replace("\\\n", " ")
    ours = [line.strip() for line in code.splitlines() if line.strip().startswith("batch-rerank ")]
    assert ours and [refused(command(line)) for line in ours] == [None] * len(ours)
    for file in re.findall(r"(?:-f|--file|--from-file=\S*=)\s*(deploy/\S+|jobs/\S+)", code):
        assert (ROOT / file).exists(), file
    readme = (ROOT / "README.md").read_text()
    codes = r"^\| (\d+) \|"
    assert set(re.findall(codes, PAGE, re.MULTILINE)) == set(re.findall(codes, readme, re.MULTILINE))


def test_the_script_that_spares_tries_in_vain_does_what_the_table_says(tmp_path: Path) -> None:
    (script,) = re.findall(r"<!-- file: run\.sh -->\n```sh\n(.*?)```", PAGE, re.DOTALL)
    (tmp_path / "run.sh").write_text(script)
    fake = tmp_path / "batch-rerank"
    fake.write_text('#!/bin/sh\n[ "$1 $2 $3" = "run job.yaml a b" ] || exit 99\nexit $CODE\n')
    fake.chmod(0o755)
    rows = re.findall(r"^\| (\d+) \| .* \|(.*)\|$", PAGE, re.MULTILINE)
    for code, again in rows:
        environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "CODE": code}
        done = subprocess.run(["sh", str(tmp_path / "run.sh"), "job.yaml", "a b"], env=environment)
        assert done.returncode == (0 if "in vain" in again else int(code))
