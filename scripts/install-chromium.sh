#!/usr/bin/env bash
# Install a browser without a window, to look at the pages that `make docs` builds (Debian or Ubuntu,
# as root). A page in a wide window, then in the dark:
#   chromium --headless=new --no-sandbox --window-size=1280,1600 --screenshot=page.png \
#       "file://$PWD/docs/_build/html/index.html"
#   ... --blink-settings=preferredColorScheme=0 ...
# Chromium has no window narrower than 500 pixels: for a phone, put the page in an <iframe width=390>.
set -euo pipefail
apt-get update
apt-get install --yes --no-install-recommends chromium fonts-dejavu
