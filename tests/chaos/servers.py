"""Real S3 servers on 127.0.0.1, moto and a one-node Ceph, each in processes and a temporary directory of its own.

with any_server() as server, FaultProxy(server.url) as proxy:
    os.environ.update(proxy.environment)
"""

import os
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
import uuid
from abc import ABC, abstractmethod
from pathlib import Path
from typing import ClassVar, Self

HOST = "127.0.0.1"
TESTS = Path(__file__).resolve().parent.parent  # where `-m` finds the modules of this folder


def free_port() -> int:
    """A free port below the range that outgoing connections take theirs from.

    A client that retries a dead port inside that range can be given the very port it dials, and then it talks to itself
    and the server cannot come back.
    """
    while True:
        port = random.SystemRandom().randrange(20000, 32768)
        with socket.socket() as probe:
            try:
                probe.bind((HOST, port))
            except OSError:
                continue
            return port


def wait_for(url: str, process: subprocess.Popen[bytes], log: Path, seconds: float = 180) -> None:
    """Return once `url` answers 200; raise with the end of the log if the process ends before or time runs out."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and process.poll() is None:
        try:
            urllib.request.urlopen(url, timeout=2).close()
            return
        except OSError:
            time.sleep(0.1)
    raise RuntimeError(f"{url} does not answer, exit code {process.poll()}: {log.read_text(errors='replace')[-2000:]}")


def end(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL, and gone when this returns."""
    process.kill()
    process.wait()


class Server(ABC):
    """What answers S3 inside a `with`, always on the same port; every one has the same keys."""

    name: ClassVar[str]
    ready: ClassVar[str] = "/"

    def __init__(self) -> None:
        self.port = free_port()
        self.url = f"http://{HOST}:{self.port}"
        self.processes: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Self:
        self.directory = Path(tempfile.mkdtemp(prefix=f"{self.name}-"))
        try:
            self.prepare()
            self.restart()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes.values():
            end(process)
        shutil.rmtree(self.directory)

    @property
    def environment(self) -> dict[str, str]:
        """What a client needs, and nothing that sends it to another endpoint or to a metadata service."""
        return {
            "AWS_ENDPOINT_URL": self.url,
            "AWS_ACCESS_KEY_ID": "testing",
            "AWS_SECRET_ACCESS_KEY": "testing-secret",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_REQUEST_CHECKSUM_CALCULATION": "when_required",
            "AWS_RESPONSE_CHECKSUM_VALIDATION": "when_required",
        }

    def kill(self) -> None:
        """SIGKILL what answers S3. What it has acknowledged is there after `restart` where the server is durable."""
        end(self.processes["gateway"])

    def restart(self) -> None:
        """Start what answers S3, killed first where it still runs, and wait until it answers."""
        if "gateway" in self.processes:
            self.kill()
        gateway = self.spawn("gateway", self.gateway())
        wait_for(self.url + self.ready, gateway, self.log("gateway"))

    def spawn(self, name: str, command: list[str]) -> subprocess.Popen[bytes]:
        with self.log(name).open("ab") as log:
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=TESTS)
        self.processes[name] = process
        return process

    def log(self, name: str) -> Path:
        return self.directory / f"{name}.log"

    def prepare(self) -> None:  # noqa: B027  few need it
        """Whatever has to run before the gateway and stays when it is killed."""

    @abstractmethod
    def gateway(self) -> list[str]:
        """The command that answers S3, in the foreground."""


class Moto(Server):
    """moto's server: starts in a second, keeps everything in memory, checks no signature."""

    name = "moto"
    durable = False
    ready = "/moto-api/"

    def gateway(self) -> list[str]:
        return [sys.executable, "-m", "moto.server", "-H", HOST, "-p", str(self.port)]


class Ceph(Server):
    """Ceph of one monitor, one OSD on a sparse file and one radosgw, all with no authentication but S3's own."""

    name = "ceph"
    durable = True

    def prepare(self) -> None:
        fsid, osd = str(uuid.uuid4()), str(uuid.uuid4())
        monitor = f"[v2:{HOST}:{free_port()}]"
        self.configuration.write_text(self.settings(fsid, monitor))
        for folder in ("mon", "osd", "run"):
            (self.directory / folder).mkdir()
        self.call("monmaptool", "--create", "--fsid", fsid, "--addv", "a", monitor, "monmap")
        self.call("ceph-mon", "--mkfs", "-i", "a", "--monmap", "monmap")
        self.spawn("mon", self.command("ceph-mon", "-f", "-i", "a"))
        self.call("ceph", "osd", "new", osd)
        self.call("ceph-osd", "--mkfs", "-i", "0", "--osd-uuid", osd)
        self.spawn("osd", self.command("ceph-osd", "-f", "-i", "0"))
        keys = self.environment
        user = ["user", "create", "--uid=test", "--display-name=test"]
        keys_of_user = [f"--access-key={keys['AWS_ACCESS_KEY_ID']}", f"--secret={keys['AWS_SECRET_ACCESS_KEY']}"]
        self.call("radosgw-admin", "-n", "client.rgw", *user, *keys_of_user)

    def gateway(self) -> list[str]:
        return self.command("radosgw", "-f", "-n", "client.rgw")

    @property
    def configuration(self) -> Path:
        return self.directory / "ceph.conf"

    def settings(self, fsid: str, monitor: str) -> str:
        everywhere = {
            "fsid": fsid,
            "mon host": monitor,
            "mon initial members": "a",
            "public addr": HOST,
            "cluster addr": HOST,
            "ms bind msgr1": "false",
            "auth cluster required": "none",
            "auth service required": "none",
            "auth client required": "none",
            # One copy of everything: there is one OSD, and no manager that would choose numbers of placement groups.
            "osd pool default size": "1",
            "osd pool default min size": "1",
            "osd pool default pg num": "8",
            "osd pool default pgp num": "8",
            "osd pool default pg autoscale mode": "off",
            "osd crush chooseleaf type": "0",
            "mon allow pool size one": "true",
            "mon data avail crit": "1",
            "osd objectstore": "bluestore",
            "bluestore block size": str(10 << 30),
            "osd memory target": str(896 << 20),
            "mon data": str(self.directory / "mon"),
            "osd data": str(self.directory / "osd"),
            "run dir": str(self.directory / "run"),
            "admin socket": "",
            "keyring": str(self.directory / "keyring"),
            "log file": str(self.directory / "$name.log"),
        }
        gateway = {
            "rgw frontends": f"beast endpoint={HOST}:{self.port}",
            "rgw data": str(self.directory / "run"),
            "rgw enable usage log": "false",
            # radosgw wants its link to the monitor encrypted, for which no authentication is too little.
            "ms mon client mode": "crc",
        }
        sections = {"global": everywhere, "client.rgw": gateway}
        return "".join(
            f"[{name}]\n" + "".join(f"{key} = {value}\n" for key, value in keys.items())
            for name, keys in sections.items()
        )

    def command(self, program: str, *arguments: str) -> list[str]:
        return [program, "-c", str(self.configuration), *arguments]

    def call(self, program: str, *arguments: str) -> None:
        """Run a command of the set-up to its end. `ceph` is Python of the system's, not of this one's path."""
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        command = self.command(program, *arguments)
        done = subprocess.run(
            command, cwd=self.directory, env=environment, capture_output=True, text=True, errors="replace", timeout=120
        )
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}: {done.stderr[-2000:]}")


def ceph_installed() -> bool:
    return all(shutil.which(program) for program in ("radosgw", "ceph-mon", "ceph-osd"))


def any_server() -> Moto | Ceph:
    """Ceph where it is installed, else moto, or what S3_SERVER says; its `name` says which."""
    wanted = os.environ.get("S3_SERVER") or ("ceph" if ceph_installed() else "moto")
    return Ceph() if wanted == "ceph" else Moto()
