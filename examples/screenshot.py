"""Photograph the page with a sample inspected, as docs/images/app.jpg shows it.

    python -m examples.screenshot [PATH]

Takes Debian's Chromium: apt-get install chromium.
"""

import shutil
import sys

from playwright.sync_api import sync_playwright

from moeclip_hf.app import build_app, launch_app


def main() -> None:
    path = sys.argv[1] if len(sys.argv) > 1 else "docs/images/app.jpg"
    app = build_app(choose_model=True)
    address = launch_app(app, block=False)
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = chromium.new_page(viewport={"width": 1280, "height": 900})
        page.goto(address)
        page.locator("#samples button").first.click()
        page.locator("#overlay img").wait_for()
        page.wait_for_timeout(1000)  # until all that moves has come to rest
        page.screenshot(path=path, type="jpeg", quality=85, full_page=True, animations="disabled")
        chromium.close()
    app.close()


if __name__ == "__main__":
    main()
