"""Write three reports, and look at them: `python scripts/report_pictures.py [FOLDER]`.

The walk-through, 500 steps on the digits, and an attribution of digits some of which are
mislabelled. Where Chromium is installed (`scripts/install-chromium.sh`), each is opened in a wide
window and in one of the size of a phone, in light and dark; that nothing is fetched and that the
browser's console stays empty is checked. Four of the pictures are those of `docs/inspect.md`.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn import functional as F

import innerloop
from innerloop import inspect, walkthrough

STEPS, BATCH, EXAMPLES, QUERIES = 500, 32, 300, 12


def digits() -> tuple[Tensor, Tensor]:
    """Return the images, scaled, and their labels."""
    data = load_digits()
    return torch.tensor(data.images, dtype=torch.float32) / 16, torch.tensor(data.target)


def network(params: Any, x: Tensor) -> Tensor:
    """Return the logits of a network with one hidden layer."""
    h = (x.flatten(1) @ params["first.weight"] + params["first.bias"]).tanh()
    return h @ params["last.weight"] + params["last.bias"]


def start() -> dict[str, Tensor]:
    """Return the first parameters."""
    g = torch.Generator().manual_seed(0)
    return {
        "first.weight": torch.randn(64, 32, generator=g) / 8,
        "first.bias": torch.zeros(32),
        "last.weight": torch.randn(32, 10, generator=g) / 6,
        "last.bias": torch.zeros(10),
    }


def of_digits(file: Path) -> Path:
    """Report on 500 steps of SGD with momentum, whose rate is learned."""
    x, y = digits()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(1))
    train, held = order[:1500], order[1500:]
    g = torch.Generator().manual_seed(2)
    batches = [train[torch.randint(len(train), (BATCH,), generator=g)] for _ in range(STEPS)]

    def loss(params: Any, hyper: Any, i: Tensor) -> Tensor:
        return F.cross_entropy(network(params, x[i]), y[i])

    def held_out_loss(traj: innerloop.Trajectory, hyper: Any) -> Tensor:
        return loss(traj.params, hyper, held)

    problem = innerloop.Problem(loss, innerloop.optim.sgd(momentum=0.9), optimizer_hyper=("lr",))
    traj = innerloop.unroll(
        problem,
        {n: p.requires_grad_() for n, p in start().items()},
        batches,
        hyper={"lr": torch.tensor(0.02, requires_grad=True)},
        strategy=innerloop.Checkpointed(),
    )
    title = f"{STEPS} steps on the digits"
    return inspect.report(traj, file, outer=held_out_loss, title=title).file


def of_attribution(file: Path) -> Path:
    """Report on an attribution of held-out digits to training digits, 5 % of them mislabelled."""
    x, y = digits()
    g = torch.Generator().manual_seed(3)
    order = torch.randperm(len(x), generator=g)
    train, held = order[:EXAMPLES], order[EXAMPLES : EXAMPLES + QUERIES]
    labels = y[train].clone()
    wrong = torch.randperm(EXAMPLES, generator=g)[: EXAMPLES // 20]
    labels[wrong] = (labels[wrong] + torch.randint(1, 10, (len(wrong),), generator=g)) % 10
    batches = [torch.randint(EXAMPLES, (BATCH,), generator=g) for _ in range(200)]

    def loss(params: Any, hyper: Any, i: Tensor) -> Tensor:
        return F.cross_entropy(network(params, x[train[i]]), labels[i], reduction="none")

    def outcomes(params: Any) -> Tensor:
        return F.cross_entropy(network(params, x[held]), y[held], reduction="none")

    found = innerloop.attribute(
        outcomes,
        innerloop.Problem(loss, innerloop.optim.sgd(lr=0.1)),
        start(),
        batches,
        hyper={"weights": torch.ones(EXAMPLES)},
        index=lambda i: i,
    )
    said = [
        f"a {int(true)}" + ("" if true == label else f", labelled {int(label)}")
        for true, label in zip(y[train], labels, strict=True)
    ]
    return inspect.report(
        found,
        file,
        title="Which digits was it?",
        images=x[train],
        labels=said,
        query_images=x[held],
        query_labels=[f"loss on a held-out {int(c)}" for c in y[held]],
    ).file


SHOTS = {
    "wide": (1280, 1500, False),
    "wide-dark": (1280, 1500, True),
    "phone": (390, 1500, False),
    "phone-dark": (390, 1500, True),
}
KEPT = ("digits-wide", "attribution-wide", "digits-phone-dark", "walkthrough-phone")
"""Those that stand in the documentation."""
OUT = Path(__file__).parent.parent / "docs" / "_static"


def shoot(page: Path, folder: Path) -> None:
    """Open a page in four ways, and raise if the console of the browser says anything."""
    for name, (width, height, dark) in SHOTS.items():
        # Chromium has no window narrower than 500 pixels, so the page stands in a frame.
        frame = page.with_suffix(".frame.html")
        frame.write_text(
            f'<body style="margin:0"><iframe style="border:0;width:{width}px;height:{height}px" '
            f'src="{page.name}"></iframe>'
        )
        picture = folder / f"{page.stem}-{name}.png"
        done = subprocess.run(
            [
                "chromium", "--headless=new", "--no-sandbox", "--hide-scrollbars",
                "--enable-logging=stderr", "--v=0", f"--window-size={max(width, 500)},{height}",
                "--host-resolver-rules=MAP * ~NOTFOUND",
                *(["--blink-settings=preferredColorScheme=0"] if dark else []),
                f"--screenshot={picture}",
                frame.resolve().as_uri(),
            ],
            check=True, capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        said = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
        if said:
            raise RuntimeError(f"{page.name} in {name}: {said}")
        image = Image.open(picture).crop((0, 0, width, height))
        image.save(picture)
        if f"{page.stem.removeprefix('report-')}-{name}" in KEPT:
            small = image.resize((width * 3 // 4, height * 3 // 4)) if width > 500 else image
            small.quantize(128).save(OUT / picture.name, optimize=True)


def main() -> None:
    """Write the pages and their pictures."""
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=True)
    pages = [
        walkthrough.write_report(walkthrough.run(), folder / "report-walkthrough.html"),
        of_digits(folder / "report-digits.html"),
        of_attribution(folder / "report-attribution.html"),
    ]
    for page in pages:
        print(f"{page}: {page.stat().st_size / 1e6:.2f} MB")
        if shutil.which("chromium"):
            shoot(page, folder)


if __name__ == "__main__":
    main()
