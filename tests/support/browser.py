"""A headless Chromium that is driven over a pipe, by its own protocol."""

from __future__ import annotations

import base64
import contextlib
import fcntl
import json
import os
import select
import shutil
import subprocess
import time

NAMES = ("chromium", "chromium-headless-shell", "chromium-browser", "google-chrome")


def found():
    """The program, or None. CHROMIUM names one that is not on the path."""
    return os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)


class Page:
    """One page. `said` holds what it complained of: errors, and what its policy forbade."""

    def __init__(self, program, write, read):
        self.program, self.write, self.read = program, write, read
        self.number, self.rest, self.session, self.said = 0, b"", None, []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Runtime", "Log", "Page"):
            self.call(f"{domain}.enable")

    def call(self, method, **said):
        """What a method of the protocol answers."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": said}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.write, json.dumps(message).encode() + b"\0")
        while True:
            got = self._message()
            if got.get("id") == self.number:
                if "error" in got:
                    raise RuntimeError(f"{method}: {got['error']}")
                return got["result"]
            if got.get("method") == "Runtime.exceptionThrown":
                self.said.append(got["params"]["exceptionDetails"])
            if got.get("method") == "Log.entryAdded":
                self.said.append(got["params"]["entry"])

    def _message(self, seconds=30):
        while b"\0" not in self.rest:
            if not select.select([self.read], [], [], seconds)[0]:
                raise TimeoutError("the browser does not answer")
            self.rest += os.read(self.read, 1 << 16) or b"{}\0"
        one, _, self.rest = self.rest.partition(b"\0")
        return json.loads(one)

    def value(self, script):
        """What a script gives."""
        got = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in got:
            raise RuntimeError(got["exceptionDetails"])
        return got["result"].get("value")

    def until(self, script, seconds=30):
        """Wait for a script to give something true."""
        end = time.monotonic() + seconds
        while not self.value(script):
            if time.monotonic() > end:
                raise TimeoutError(f"never true: {script}; {self.said}")
            time.sleep(0.03)

    def picture(self, path, width=1000, height=760):
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))


@contextlib.contextmanager
def browser(folder):
    """A page of a browser whose files lie in this folder."""
    (theirs, write), (read, given) = os.pipe(), os.pipe()
    theirs, given = (fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 20) for fd in (theirs, given))

    def hand_over():
        os.dup2(theirs, 3)
        os.dup2(given, 4)

    command = [
        found(), "--headless", "--remote-debugging-pipe", "--disable-gpu", "--no-first-run", "--disable-extensions",
        f"--user-data-dir={folder}", *(["--no-sandbox"] if os.geteuid() == 0 else []),
    ]  # fmt: skip
    program = subprocess.Popen(
        command, preexec_fn=hand_over, close_fds=False, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        yield Page(program, write, read)
    finally:
        program.terminate()
        program.wait(10)
        for fd in (theirs, given, write, read):
            os.close(fd)
