"""A browser; its tests are skipped where selenium, chromium or chromedriver is missing."""

import shutil

import pytest


@pytest.fixture
def browser(tmp_path):
    webdriver = pytest.importorskip("selenium.webdriver")
    chromium, chromedriver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (chromium and chromedriver):
        pytest.skip("chromium and chromedriver are not installed")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    switches = [
        "headless",
        "no-sandbox",
        "disable-gpu",
        "disable-background-networking",
        "window-size=1500,1100",
    ]
    for switch in [*switches, f"user-data-dir={tmp_path / 'profile'}"]:
        options.add_argument(f"--{switch}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(
        options=options, service=webdriver.ChromeService(chromedriver)
    )
    yield driver
    assert driver.get_log("browser") == []  # neither errors nor anything blocked
    driver.quit()
