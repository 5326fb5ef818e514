#!/usr/bin/env bash
# A browser without a window, for looking at the built documentation (`make docs`): Debian or Ubuntu, as root.
#   chromium --headless --no-sandbox --window-size=1200,1600 --screenshot=page.png docs/_build/html/index.html
set -euo pipefail
apt-get update
apt-get install --yes --no-install-recommends chromium fonts-dejavu
