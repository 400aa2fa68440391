"""Two hosts on one machine: network namespaces joined by a virtual wire, each with its own name, processes and sshd.

A host is one `unshare` process: mounts, host name and process ids in it are its own, so that nothing of this machine is
changed (no user, key, package or service), and all that runs in it ends with that process. sshd and pdsh come from the
machine or, where it lacks them, from its package mirror into a folder that only the hosts see.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tests.processes import unlaunched

PACKAGES = {"sshd": "openssh-server", "pdsh": "pdsh"}

SSH_CONFIG = """Host *
    IdentityFile {etc}/ssh/key
    StrictHostKeyChecking no
    UserKnownHostsFile /dev/null
    BatchMode yes
    LogLevel ERROR
"""
SSHD_CONFIG = """HostKey {etc}/ssh/host_key
AuthorizedKeysFile {etc}/ssh/key.pub
PermitRootLogin prohibit-password
StrictModes no
UsePAM no
PidFile none
"""


class CannotError(RuntimeError):
    """Why there can be no hosts here."""


class Host:
    def __init__(self, name: str, address: str, namespace: str) -> None:
        self.name, self.address, self.namespace = name, address, namespace
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, root: Path) -> None:
        """`root`: holds etc/ and perhaps usr/, laid over this machine's own in the host."""
        over = [folder for folder in ("etc", "usr") if (root / folder).exists()]
        script = [
            f"hostname {self.name}",
            *(f"mount -t overlay overlay -o lowerdir={root}/{folder}:/{folder} /{folder}" for folder in over),
            "mount -t tmpfs tmpfs /run",
            "mkdir -m 755 /run/sshd",
            f"exec /usr/sbin/sshd -D -e -f {root}/etc/ssh/sshd_config",
        ]
        new = ["--mount", "--uts", "--ipc", "--pid", "--fork", "--kill-child", "--mount-proc"]
        with (root / f"{self.name}.log").open("wb") as log:
            self._process = subprocess.Popen(
                ["ip", "netns", "exec", self.namespace, "unshare", *new, "sh", "-ec", " && ".join(script)],
                stdout=log, stderr=log,
            )  # fmt: skip

    @property
    def pid(self) -> int:
        """The host's first process, by its number outside."""
        assert self._process is not None
        pid = self._process.pid
        return int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])

    def run(self, command: Sequence[str | Path], cwd: Path, **environment: str) -> subprocess.Popen[str]:
        """Start a command in the host, with output and errors together."""
        inside = ["nsenter", "--target", str(self.pid), "--mount", "--uts", "--ipc", "--net", "--pid"]
        return subprocess.Popen(
            # entering a mount namespace leads to its root
            [*inside, "sh", "-c", 'cd "$0" && exec "$@"', str(cwd), *map(str, command)], env=unlaunched() | environment,
            text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def wire(self, state: str) -> None:
        """Pull the plug (`down`) or put it back (`up`)."""
        _call("ip", "-n", self.namespace, "link", "set", "eth0", state)

    def processes(self, word: str, without: str = "\n") -> list[int]:
        """Processes in the host whose command line holds `word`, and not `without`, by their numbers outside."""
        namespace = Path(f"/proc/{self.pid}/ns/pid").readlink()
        found = []
        for folder in Path("/proc").iterdir():
            try:
                inside = folder.name.isdigit() and (folder / "ns/pid").readlink() == namespace
                command = (folder / "cmdline").read_bytes().decode(errors="replace") if inside else ""
                if word in command and without not in command:
                    found.append(int(folder.name))
            except OSError:  # it has just ended
                continue
        return found

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()  # --kill-child: and with it everything in the host
            self._process.wait()


@contextmanager
def two_hosts(folder: Path) -> Iterator[tuple[Host, Host]]:
    """Two running hosts `a` (10.77.0.1) and `b` (10.77.0.2). CannotError, with the reason, where that cannot be."""
    if os.geteuid() != 0:
        raise CannotError("network namespaces need root")
    for tool in ("ip", "unshare", "nsenter", "ssh-keygen"):
        if shutil.which(tool) is None:
            raise CannotError(f"no `{tool}` on this machine")
    root = folder / "hosts"
    _lay_out(root)
    hosts = tuple(Host(name, f"10.77.0.{i}", f"qatscale-{os.getpid()}-{name}") for i, name in enumerate("ab", 1))
    try:
        _connect(*hosts)
        for host in hosts:
            host.start(root)
        for host in hosts:
            _wait_for_sshd(host, root)
        yield hosts
    finally:
        for host in hosts:
            host.stop()
            subprocess.run(["ip", "netns", "del", host.namespace], capture_output=True, check=False)


def _lay_out(root: Path) -> None:
    """What the hosts see over this machine's /etc and /usr: keys, configurations, sshd's user, tools."""
    ssh = root / "etc" / "ssh"
    ssh.mkdir(parents=True)
    if missing := [package for tool, package in PACKAGES.items() if shutil.which(tool, path=_SYSTEM) is None]:
        _unpack(missing, root)
    for key in ("key", "host_key"):
        _call("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(ssh / key))
    (ssh / "ssh_config").write_text(SSH_CONFIG.format(etc="/etc"))
    (ssh / "sshd_config").write_text(SSHD_CONFIG.format(etc="/etc"))
    users = Path("/etc/passwd").read_text()
    if "\nsshd:" not in users:
        users += "sshd:x:65533:65534::/run/sshd:/usr/sbin/nologin\n"
    (root / "etc" / "passwd").write_text(users)
    shadow = root / "etc" / "shadow"
    shadow.write_text("root:*:19000:0:99999:7:::\n")  # no password, and not locked, which sshd would refuse
    shadow.chmod(0o600)
    (root / "etc" / "hosts").write_text("127.0.0.1 localhost\n10.77.0.1 a\n10.77.0.2 b\n")


_SYSTEM = "/usr/sbin:/usr/bin:/sbin:/bin"


def _unpack(packages: list[str], root: Path) -> None:
    """Fetch Debian packages and what they need, and unpack them; nothing is installed."""
    if shutil.which("apt-get") is None:
        raise CannotError(f"no {' and '.join(packages)} on this machine, and no apt-get to fetch them")
    archives, lists = root / "debs", root / "lists"
    for made in (archives / "partial", lists / "partial"):
        made.mkdir(parents=True)
    fetch = ["apt-get", "-qq", "-y", "-o", f"Dir::Cache::archives={archives}", "-o", "APT::Sandbox::User=root"]
    install = ["install", "--no-install-recommends", "--download-only", *packages]
    try:
        try:
            _call(*fetch, *install)
        except subprocess.CalledProcessError:  # a fresh machine has no package lists, or old ones
            own_lists = ["-o", f"Dir::State::lists={lists}"]
            _call(*fetch, *own_lists, "update")
            _call(*fetch, *own_lists, *install)
    except subprocess.CalledProcessError as error:
        raise CannotError(f"{' and '.join(packages)} could not be fetched: {error.stderr.strip()}") from error
    for archive in archives.glob("*.deb"):
        _call("dpkg", "-x", str(archive), str(root))


def _connect(a: Host, b: Host) -> None:
    try:
        for host in (a, b):
            _call("ip", "netns", "add", host.namespace)
        ends = ["name", "eth0", "netns", a.namespace, "type", "veth", "peer", "name", "eth0", "netns", b.namespace]
        _call("ip", "link", "add", *ends)
        for host in (a, b):
            _call("ip", "-n", host.namespace, "address", "add", f"{host.address}/24", "dev", "eth0")
            _call("ip", "-n", host.namespace, "link", "set", "lo", "up")
            host.wire("up")
    except subprocess.CalledProcessError as error:
        raise CannotError(f"no network namespaces here: {error.stderr.strip()}") from error


def _wait_for_sshd(host: Host, root: Path) -> None:
    log = root / f"{host.name}.log"
    until = time.monotonic() + 20
    while "Server listening" not in log.read_text():
        assert host._process is not None
        if host._process.poll() is not None or time.monotonic() > until:
            raise CannotError(f"host {host.name} did not start: {log.read_text().strip()}")
        time.sleep(0.05)


def _call(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)
