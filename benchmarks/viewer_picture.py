"""A picture of `dit-accel view`'s page, with one token clicked, taken in Chromium.

    dit-accel view --prompt "a panda on a blue background" --size 1024x1024 --layer 3 --head 0 --head 1 --step 4 --out view.html
    python benchmarks/viewer_picture.py view.html picture.jpg 0.4 0.42

The numbers say where the token is, as shares of the picture's width and height. Requires playwright, and
Chromium (Debian: apt-get install chromium).
"""

import argparse
import shutil
from pathlib import Path

from playwright.sync_api import sync_playwright

BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", type=Path)
    parser.add_argument("picture", type=Path, help="a .jpg")
    parser.add_argument("across", type=float)
    parser.add_argument("down", type=float)
    args = parser.parse_args()
    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    if program is None:
        parser.error("Chromium was not found: apt-get install chromium")
    with sync_playwright() as running:
        browser = running.chromium.launch(executable_path=program, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": 1000, "height": 1130})
        page.goto(args.page.resolve().as_uri())
        box = page.locator("#left").bounding_box()
        page.mouse.click(box["x"] + box["width"] * args.across, box["y"] + box["height"] * args.down)
        page.screenshot(path=args.picture, type="jpeg", quality=85)
        browser.close()


if __name__ == "__main__":
    main()
