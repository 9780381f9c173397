"""A browser for tests that look at pages, and where what was seen is kept."""

import contextlib
import os
import pathlib
import shutil

import pytest

SCREENSHOTS = pathlib.Path(os.environ.get("LDM_JAX_SCREENSHOTS", "build/screenshots"))
WIDE, NARROW = 1440, 390


@contextlib.contextmanager
def chromium():
    """Headless Chromium; skips where there is none, and fails instead where `.ci/run` has installed it."""
    paths = [shutil.which(name) for name in ("chromium", "chromedriver")]
    if not all(paths):
        why = "there is no chromium and chromedriver on the path; on Debian: apt-get install chromium chromium-driver"
        (pytest.fail if os.environ.get("LDM_JAX_TESTS_BROWSER") else pytest.skip)(why)
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = paths[0]
    for flag in ("headless=new", "no-sandbox", "disable-gpu", "hide-scrollbars", "disable-dev-shm-usage"):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(paths[1]))
    try:
        yield Browser(driver)
    finally:
        driver.quit()


class Browser:
    """What tests do with a page."""

    def __init__(self, driver):
        self.driver = driver

    def open(self, path, width=WIDE, scheme="light"):
        """Opens a file; returns the seconds of the processor that the page took until it had been drawn."""
        features = [
            {"name": "prefers-color-scheme", "value": scheme},
            {"name": "prefers-reduced-motion", "value": "reduce"},
        ]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        self._resize(width, 900)
        self.driver.execute_cdp_cmd("Performance.enable", {"timeDomain": "threadTicks"})
        self.driver.get(path.resolve().as_uri())
        self.run("return new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
        metrics = self.driver.execute_cdp_cmd("Performance.getMetrics", {})["metrics"]
        return next(each["value"] for each in metrics if each["name"] == "TaskDuration")  # of this page alone

    def run(self, script, *arguments):
        return self.driver.execute_script(script, *arguments)

    def all(self, selector):
        return self.driver.find_elements("css selector", selector)

    def one(self, selector):
        return self.driver.find_element("css selector", selector)

    def texts(self, selector):
        return self.run("return [...document.querySelectorAll(arguments[0])].map((each) => each.textContent)", selector)

    def keep(self, name, width=WIDE):
        """Keeps a picture of the whole page."""
        SCREENSHOTS.mkdir(parents=True, exist_ok=True)
        self._resize(width, self.run("return document.documentElement.scrollHeight"))
        self.driver.save_screenshot(str(SCREENSHOTS / f"{name}.png"))
        self._resize(width, 900)

    def errors(self):
        """What the console has said since the last call."""
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def _resize(self, width, height):
        shape = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width <= NARROW}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", shape)
