"""How long it takes to draw a report and to open it, and how large it is, for runs of four sizes.

    python benchmarks/report.py [--rounds 5]

Runs are synthetic (the builders of the tests), so that 100,000 steps of 1,000 tensors take no training. *Draw* is the
whole command `python -m gradctl report`, in a process of its own: CPU seconds, beside the same interpreter that only
imports what drawing needs. *Open* is chromium's time from navigation to the load event and to the next painted frame,
beside an empty page in the same browser. Writes benchmarks/results/report-<date>.json.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from playwright.sync_api import Page, sync_playwright  # noqa: E402

import journals  # noqa: E402  the builders of the tests are no package

FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
IMPORTS = "import numpy, jinja2, click, rich.console, gradctl._journal, gradctl._verdict, gradctl.report._page"
PAINTED = (
    """() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => done(performance.now()))))"""
)
RUNS: dict[str, Callable[[Path], Path]] = {
    "52 tensors, 400 steps": lambda root: journals.healthy(root / "a"),
    "200 tensors, 10,000 steps": lambda root: journals.large(root / "b", tensors=200, steps=10_000),
    "1,000 tensors, 100,000 steps": lambda root: journals.large(root / "c", tensors=1000, steps=100_000),
    "5,000 tensors, 1,000 steps": lambda root: journals.large(root / "d", tensors=5000, steps=1_000),
}
GOALS = {
    "52 tensors, 400 steps": {"kilobytes": 200, "draw_cpu_s": 3.0},
    "1,000 tensors, 100,000 steps": {"kilobytes": 500, "draw_cpu_s": 3.0, "open_ms": 2000},
}


def cpu_seconds(command: list[str]) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"})
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def open_milliseconds(page: Page, address: str) -> float:
    page.goto("about:blank")
    page.goto(address, wait_until="load")
    return float(page.evaluate(PAINTED))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    chromium = shutil.which("chromium")
    if chromium is None:
        print("chromium is missing: apt-get install chromium", file=sys.stderr)
        return 2
    results: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        root = Path(folder)
        empty = root / "empty.html"
        empty.write_text("<!doctype html><title>empty</title>")
        browser = playwright.chromium.launch(executable_path=chromium, args=FLAGS)
        window = browser.new_page(viewport={"width": 1180, "height": 900})
        for name, build in RUNS.items():
            directory = build(root)
            page = root / f"{len(results)}.html"
            draw = [sys.executable, "-m", "gradctl", "report", str(directory), "-o", str(page), "--force"]
            drawn: list[float] = []
            imported: list[float] = []
            opened: list[float] = []
            blank: list[float] = []
            for _ in range(rounds):  # interleaved, so that a busy moment meets all of them
                drawn.append(cpu_seconds(draw))
                imported.append(cpu_seconds([sys.executable, "-c", IMPORTS]))
                opened.append(open_milliseconds(window, page.as_uri()))
                blank.append(open_milliseconds(window, empty.as_uri()))
            journal = sum(file.stat().st_size for file in directory.glob("*.jsonl"))
            results[name] = {
                "kilobytes": round(page.stat().st_size / 1000, 1),
                "journal_kilobytes": round(journal / 1000, 1),
                "draw_cpu_s": round(statistics.median(drawn), 2),
                "imports_cpu_s": round(statistics.median(imported), 2),
                "open_ms": round(statistics.median(opened)),
                "open_empty_ms": round(statistics.median(blank)),
            }
            print(name, results[name])
        version = browser.version
        browser.close()
    missed = [
        f"{name}: {what} {results[name][what]} > {most}"
        for name, goals in GOALS.items()
        for what, most in goals.items()
        if results[name][what] > most
    ]
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    target = ROOT / "benchmarks" / "results" / f"report-{today}.json"
    hardware = {
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
        "chromium": version,
        "rounds": rounds,
    }
    target.parent.mkdir(exist_ok=True)
    target.write_text(json.dumps({"hardware": hardware, "runs": results, "missed": missed}, indent=2) + "\n")
    print(f"written to {target.relative_to(ROOT)}")
    for line in missed:
        print("missed:", line)
    return 1 if missed else 0


if __name__ == "__main__":
    raise SystemExit(main())
