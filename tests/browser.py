"""A headless Chromium for the tests, by chromedriver and plain HTTP (W3C WebDriver)."""

import json
import re
import shutil
import subprocess
import urllib.request

FLAGS = """--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run
    --disable-background-networking --disable-component-update --disable-sync
    --force-prefers-reduced-motion""".split()
KEYS = {"Enter": "\ue007", "Left": "\ue012", "Up": "\ue013", "Right": "\ue014", "Down": "\ue015"}
KEYS |= {"Home": "\ue011", "End": "\ue010", "Tab": "\ue004"}


def missing():
    """What a browser needs and this machine has not; "" where all is there."""
    return ", ".join(name for name in ("chromium", "chromedriver") if not shutil.which(name))


class Browser:
    """One window. profile: a new folder for what the browser writes."""

    def __init__(self, profile):
        command = [shutil.which("chromedriver"), "--port=0"]
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        self.driver = subprocess.Popen(command, **pipes)
        port = None
        while not port:
            port = re.search(r"started successfully on port (\d+)", self.driver.stdout.readline())
        self.base = f"http://127.0.0.1:{port[1]}/session"
        options = {
            "binary": shutil.which("chromium"),
            "args": [*FLAGS, f"--user-data-dir={profile}"],
        }
        wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        wanted = {"capabilities": {"alwaysMatch": wanted}}
        self.base += "/" + self.ask("POST", "", wanted)["sessionId"]

    def ask(self, method, path, data=None):
        body = None if data is None else json.dumps(data).encode()
        head = {"Content-Type": "application/json"}
        request = urllib.request.Request(self.base + path, body, head, method=method)
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with direct.open(request, timeout=300) as answer:
                return json.load(answer)["value"]
        except urllib.error.HTTPError as e:
            raise RuntimeError(json.load(e)["value"]["message"]) from None

    def open(self, path, part="", width=1280, height=900, dark=False):
        """Load a file at a size that the page itself sees."""
        self.cdp("Emulation.setDeviceMetricsOverride", width=width, height=height,
                 deviceScaleFactor=1, mobile=False)  # fmt: skip
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.cdp("Emulation.setEmulatedMedia", features=[scheme])
        self.ask("POST", "/url", {"url": "about:blank"})
        self.ask("POST", "/url", {"url": f"{path.as_uri()}#{part}"})

    def cdp(self, command, **params):
        return self.ask("POST", "/goog/cdp/execute", {"cmd": command, "params": params})

    def run(self, script, *args):
        """The value of a function body in the page."""
        return self.ask("POST", "/execute/sync", {"script": script, "args": list(args)})

    def press(self, *keys):
        """Type keys, by their names or as they are."""
        actions = []
        for key in keys:
            key = KEYS.get(key, key)
            actions += [{"type": "keyDown", "value": key}, {"type": "keyUp", "value": key}]
        keyboard = {"type": "key", "id": "keyboard", "actions": actions}
        self.ask("POST", "/actions", {"actions": [keyboard]})

    def pointer(self, selector, click=False):
        """Move the mouse to the middle of an element, and click there."""
        css = {"using": "css selector", "value": selector}
        origin = self.ask("POST", "/element", css)
        actions = [{"type": "pointerMove", "origin": origin, "x": 0, "y": 0}]
        if click:
            actions += [{"type": "pointerDown", "button": 0}, {"type": "pointerUp", "button": 0}]
        mouse = {"type": "pointer", "id": "mouse", "actions": actions}
        self.ask("POST", "/actions", {"actions": [mouse]})

    def errors(self):
        """What the browser's console has said since the last call."""
        return [entry["message"] for entry in self.ask("POST", "/se/log", {"type": "browser"})]

    def close(self):
        self.ask("DELETE", "")
        self.driver.terminate()
        self.driver.wait(10)
