"""A headless browser that opens a page and tells what is on it and what its console says.

Chromium from the machine or, where root may fetch packages, from its package mirror: unpacked into the virtual
environment, once, and not installed. Without either a test says why it has none.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from html import unescape
from pathlib import Path
from typing import Any

NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
PACKAGE = "chromium-headless-shell"
HOME = Path(sys.prefix) / "browser"
"""Where it is unpacked: lives and dies with the environment, and no git sees it."""

PROBE = """<script>addEventListener("load", async () => {
  await Promise.all([...document.images].map(image => image.decode()));
  const said = {
    images: [...document.images].map(i => ({section: i.closest("section").id, width: i.naturalWidth, shown: i.width})),
    tables: [...document.querySelectorAll("table")].every(t => t.closest(".scroll")),
    sections: [...document.querySelectorAll("section")].map(s => s.id),
    lacking: [...document.querySelectorAll(".lacking")].map(d => d.closest("section").id),
    loaded: performance.getEntriesByType("resource").map(r => r.name.slice(0, 40)),
    page: document.documentElement.scrollWidth, window: innerWidth,
    text: document.body.innerText,
  };
  const told = document.createElement("pre"); told.id = "probe"; told.textContent = JSON.stringify(said);
  document.body.append(told);
});</script>"""
"""Added to a copy of the page: what the browser sees of it, written into it."""


class CannotError(RuntimeError):
    """Why there is no browser here."""


@dataclass(frozen=True)
class Seen:
    """A page as the browser saw it."""

    facts: dict[str, Any]
    console: list[str]
    """Its lines, errors and warnings of the page among them."""


def open_page(page: Path, folder: Path, width: int = 1000) -> Seen:
    """Open a copy of the page, in `folder`, with the probe in it, so many pixels wide.

    CannotError where there is no browser.
    """
    program, environment = find_browser()
    probed = folder / "probed.html"
    html = page.read_text(encoding="utf-8")
    assert html.count("</body>") == 1
    probed.write_text(html.replace("</body>", f"{PROBE}</body>"), encoding="utf-8")
    command = [
        program, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr",
        f"--window-size={width},1400",
        f"--user-data-dir={folder / 'profile'}", "--virtual-time-budget=20000", "--dump-dom", probed.as_uri(),
    ]  # fmt: skip
    ran = subprocess.run(command, capture_output=True, text=True, timeout=180, env=environment, check=True)
    found = re.search(r'<pre id="probe">(.*?)</pre>', ran.stdout, re.DOTALL)
    assert found, f"the probe did not speak: {ran.stderr[-2000:]}"
    told = found[1].replace("&lt;", "<").replace("&gt;", ">").replace("&nbsp;", "\u00a0").replace("&amp;", "&")
    return Seen(json.loads(told), [line for line in ran.stderr.splitlines() if ":CONSOLE" in line])


def open_address(address: str, folder: Path) -> str:
    """The text of an address's page once its scripts have drawn it. CannotError where there is no browser."""
    program, environment = find_browser()
    command = [
        program, "--headless", "--no-sandbox", "--disable-gpu", "--window-size=1280,2400",
        f"--user-data-dir={folder / 'profile'}", "--virtual-time-budget=60000", "--dump-dom", address,
    ]  # fmt: skip
    ran = subprocess.run(command, capture_output=True, text=True, timeout=180, env=environment, check=True)
    body = re.sub(r"<(script|style)\b.*?</\1>", "", ran.stdout, flags=re.DOTALL)
    return re.sub(r"\s+", " ", unescape(re.sub(r"<[^>]*>", " ", body)))


def find_browser() -> tuple[str, dict[str, str]]:
    """(program, environment to start it in)."""
    for name in NAMES:
        if found := shutil.which(name):
            return found, dict(os.environ)
    program = HOME / "usr" / "lib" / "chromium" / PACKAGE
    if not program.exists():
        _unpack()
    libraries = [HOME / "usr" / "lib" / f"{os.uname().machine}-linux-gnu"]
    libraries.append(libraries[0] / "pulseaudio")
    path = os.pathsep.join([*map(str, libraries), os.environ.get("LD_LIBRARY_PATH", "")])
    return str(program), os.environ | {"LD_LIBRARY_PATH": path}


def _unpack() -> None:
    """Fetch Debian's package and what this machine lacks of what it needs, and unpack them into HOME."""
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        raise CannotError("no Chromium on this machine, and it takes root and apt-get to fetch one")
    new = HOME.with_name(f"{HOME.name}.{os.getpid()}")
    archives, lists = new / "debs", new / "lists"
    for made in (archives / "partial", lists / "partial"):
        made.mkdir(parents=True)
    fetch = ["apt-get", "-qq", "-y", "-o", f"Dir::Cache::archives={archives}", "-o", "APT::Sandbox::User=root"]
    fetch += ["-o", "DPkg::Lock::Timeout=60"]  # another test may be fetching, too
    install = ["install", "--no-install-recommends", "--download-only", PACKAGE]
    try:
        try:
            _call(*fetch, *install)
        except subprocess.CalledProcessError:  # a fresh machine has no package lists, or old ones
            own_lists = ["-o", f"Dir::State::lists={lists}"]
            _call(*fetch, *own_lists, "update")
            _call(*fetch, *own_lists, *install)
        for archive in archives.glob("*.deb"):
            _call("dpkg", "-x", str(archive), str(new))
    except subprocess.CalledProcessError as error:
        shutil.rmtree(new)
        raise CannotError(f"no Chromium on this machine, and none could be fetched: {error.stderr.strip()}") from error
    shutil.rmtree(archives)
    shutil.rmtree(lists)
    if HOME.exists():  # another process was faster
        shutil.rmtree(new)
    else:
        new.rename(HOME)


def _call(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)
