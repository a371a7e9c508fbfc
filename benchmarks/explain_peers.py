"""Which tool names the line where a gradient is lost: 65 broken programs and 8 healthy ones, five tools.

    python3.11 -m venv ../peers
    ../peers/bin/pip install -c constraints.txt torch numpy guardtower torch-preflight
    python benchmarks/explain_peers.py --peers-python ../peers/bin/python [--only 01,80] [--out DIR]

The peers live in an environment of their own, and without --peers-python their rows say "not run". The programs are
those of `tests/cases_explain`, each with a label: the line to blame, and other lines that may be named as well. They
are copied to an empty folder without their labels. Each runs in a process of its own, forked from one that has loaded
torch (`explain_peers_child.py`), for each tool:

- `python`: plain Python. Its answer is the innermost line of the user in the traceback; for a program that ends well,
  the line of a warning. Most warnings are about something else, so one that is not on a line of the label counts as
  no answer rather than as a wrong one.
- `set_detect_anomaly(True)`: the innermost line of the user in the traceback of the forward call, where torch prints
  one; else as for plain Python.
- `torch-preflight`, a linter that runs nothing: `torch-preflight check`, once over the folder.
- `guardtower`, checks at run time: the unedited script is run up to its step, then `guardtower.audit(model, closure,
  optimizer=optimizer)` as in its README. The closure runs the script on from there up to its first backward() and
  returns that loss. The optimizer is the first that steps, or else the first there is; the model is what has parameters
  in it, several modules in one ModuleDict. A script without a module at its top level cannot be attached to.
- `gradctl`: traced from the first line on, as `gradctl explain --full` does; its answer is the first finding.

How an answer is judged, by rule and never by hand:

- line: file and line are the label's; also: they are another line that the label allows.
- named: no line, but the right thing. Only guardtower answers so: one of its findings of level FAIL or WARN is of a
  check that says the label's cause (`SAYS`), or lists at least one of the parameters that the label's check (a Python
  expression over the finished script) calls unsound.
- wrong: it pointed elsewhere. For a traceback that is where torch noticed it, which is not a lie, but not the cause.
  For a linter: a rule about gradients that does not fit the cause, or fits and is on another line. For guardtower: a
  finding that is neither named nor an echo.
- nothing: no answer. What guardtower says of an error that torch raises anyway ("loss does not require grad", "step_fn
  raised ...") is an echo and counts here, as do scripts that it cannot be attached to. Both are counted beside it.

On a healthy program every answer is a false alarm, but for a linter's rules about other things than gradients (speed,
seeds, data loaders), which are counted as advice. Whether gradctl also names the right cause is told below the table.
Results are written to `benchmarks/results/explain-peers-<date>.json` and `.md`.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
CASES = ROOT / "tests" / "cases_explain"
RESULTS = Path(__file__).parent / "results"
CHILD = Path(__file__).with_name("explain_peers_child.py")
VERDICTS = ("line", "also", "named", "nothing", "wrong")
TITLES = {
    "plain": "python: traceback, warnings",
    "anomaly": "`set_detect_anomaly(True)`",
    "preflight": "torch-preflight",
    "guardtower": "guardtower",
    "gradctl": "`gradctl explain`",
}
# The rules of torch-preflight about gradients, with the causes they fit; its other rules are advice.
FITS = {
    "TG001": {"history_kept", "numpy_on_grad", "stale_graph_carried"},
    "TG002": {"history_kept"},
    "TG003": {"missing_zero_grad"},
    "TG005": {"vanished_grad"},
    "TG006": {"vanished_grad"},
    "TG011": set[str](),
    "TG014": set[str](),
}
# What guardtower's checks say, by catalogue id or check and a word of the text, and the causes that it amounts to.
SAYS = {
    ("OPT-001", ""): {"param_not_in_optimizer"},
    ("optimizer_coverage", "frozen"): {"frozen_params"},
    ("loss", "not a scalar"): {"non_scalar_loss"},
    ("dead_relu", ""): {"zero_grad_relu"},
    ("grad_norms", "large"): {"exploded_grad"},
    ("grad_norms", "tiny"): {"vanished_grad"},
    ("DDP-001", ""): {"unused_param"},
}
ECHO = ("raised", "does not require grad", "non-finite")
Label = dict[str, Any]
Answer = dict[str, Any]


# -- running ----------------------------------------------------------------------------------------------------------


def ask(tool: str, python: str, folder: Path) -> dict[str, Any]:
    """Run every program under a tool; return the version of torch and the answers by name."""
    with tempfile.TemporaryDirectory() as place:
        answers = Path(place) / "answers.json"
        subprocess.run(
            [python, str(CHILD), tool, str(folder), str(answers)],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            check=True,
        )
        found: dict[str, Any] = json.loads(answers.read_text(encoding="utf-8"))
        return found


def lint(python: str, folder: Path, names: list[str]) -> dict[str, Answer]:
    """Run torch-preflight over the folder; a helper file `c01_x.py` belongs to the program `01_y.py`."""
    command = [python, "-m", "torch_preflight", "check", "--format", "json", "-j", "1", str(folder)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode in (0, 1), done.stderr
    found: dict[str, Answer] = {name: {"places": [], "findings": []} for name in names}
    for each in json.loads(done.stdout)["diagnostics"]:
        file = Path(each["path"]).name
        owner = next((name for name in names if name[:2] == file.removeprefix("c")[:2]), None)
        if owner is not None:
            found[owner]["findings"].append(
                {"rule": each["code"], "place": [file, each["line"]], "text": each["message"]}
            )
    return found


def version_of(python: str, package: str) -> str:
    command = [python, "-c", f"import importlib.metadata as m; print(m.version({package!r}))"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


# -- judging ----------------------------------------------------------------------------------------------------------


def at(label: Label, place: list[Any]) -> str:
    """Judge one line."""
    if place == [label["file"], label["line"]]:
        return "line"
    return "also" if place in label["also_ok"] else "wrong"


def judge_line(label: Label, answer: Answer) -> str:
    """Judge a tool whose answer is one line, the first place."""
    return at(label, answer["places"][0]) if answer["places"] else "nothing"


def judge_printed(label: Label, answer: Answer) -> str:
    """Judge what Python prints: its traceback, or the best of its warnings where these help."""
    if answer["places"]:
        return judge_line(label, answer)
    hints = [at(label, place) for place in answer.get("hints", ())] if label["cause"] is not None else []
    return min((hint for hint in hints if hint != "wrong"), key=VERDICTS.index, default="nothing")


def judge_lint(label: Label, answer: Answer) -> str:
    """Judge a linter by its best finding about gradients."""
    about = [each for each in answer["findings"] if each["rule"] in FITS]
    if not about:
        answer["advice"] = bool(answer["findings"])
        return "nothing"
    fitting = [at(label, each["place"]) for each in about if label["cause"] in FITS[each["rule"]]]
    return min(fitting, key=VERDICTS.index, default="wrong")


def judge_guardtower(label: Label, answer: Answer) -> str:
    """Judge an audit; see the rules at the top."""
    raised = [each for each in answer.get("findings", ()) if each["level"] != "INFO"]
    for each in raised:
        for (what, word), causes in SAYS.items():
            if what in (each["id"], each["check"]) and word in each["text"] and label["cause"] in causes:
                return "named"
    if any(set(each["params"]) & set(answer.get("concerned", ())) for each in raised):
        return "named"
    answer["echo"] = bool(raised) and all(
        each["check"] in ("loss", "backward") and any(word in each["text"] for word in ECHO) for each in raised
    )
    return "wrong" if raised and not (answer["echo"] and label["cause"] is not None and answer["error"]) else "nothing"


JUDGES = {
    "plain": judge_printed,
    "anomaly": judge_printed,
    "preflight": judge_lint,
    "guardtower": judge_guardtower,
    "gradctl": judge_line,
}


def judged(tool: str, labels: dict[str, Label], answers: dict[str, Answer]) -> dict[str, Any]:
    """Judge all answers of a tool and count."""
    verdicts = {name: JUDGES[tool](labels[name], answer) for name, answer in answers.items()}
    broken = [name for name in verdicts if labels[name]["cause"] is not None]
    healthy = [name for name in verdicts if labels[name]["cause"] is None]
    return {
        "counts": {verdict: sum(verdicts[name] == verdict for name in broken) for verdict in VERDICTS},
        "broken": len(broken),
        "healthy": len(healthy),
        "false_alarms": [name for name in healthy if verdicts[name] != "nothing"],
        "advice_on_healthy": [name for name in healthy if answers[name].get("advice")],
        "echoes": sum(bool(answers[name].get("echo")) and verdicts[name] == "nothing" for name in broken),
        "unattachable": [name for name in verdicts if "unattachable" in answers[name]],
        "right_cause": sum(answers[name].get("causes", [])[:1] == [labels[name]["cause"]] for name in broken),
        "failed": [name for name, answer in answers.items() if answer.get("failed") or answer.get("faults")],
        "verdicts": verdicts,
        "answers": answers,
    }


# -- results ----------------------------------------------------------------------------------------------------------


def table(tools: dict[str, Any]) -> list[str]:
    """Return the table of the tools, ready for a page of the documentation."""
    number, healthy = tools["plain"]["broken"], tools["plain"]["healthy"]
    lines = [
        f"| {number} broken programs, {healthy} healthy | the line | an acceptable line | named without a line "
        "| nothing | wrong | false alarms |",
        "|--|--|--|--|--|--|--|",
    ]
    for tool, title in TITLES.items():
        found = tools.get(tool)
        if found is None:
            lines.append(f"| {title} | not run | | | | | |")
            continue
        cells = [str(found["counts"][verdict]) for verdict in VERDICTS]
        lines.append(f"| {title} | {' | '.join(cells)} | {len(found['false_alarms'])} |")
    return lines


def as_markdown(result: dict[str, Any]) -> str:
    where, tools, labels = result["where"], result["tools"], result["labels"]
    lines = [
        f"# Which tool names the line, {where['date']}",
        "",
        f"{where['processor']}, {where['cores']} cores; Python {where['python']}, "
        + ", ".join(f"{name} {version}" for name, version in where["versions"].items())
        + ". The rules by which answers are judged stand at the top of `benchmarks/explain_peers.py`.",
        "",
        *table(tools),
        "",
        "gradctl was developed on these very programs, the others were not: its row says what it can do, not what it "
        "does on programs that it has never seen. Its first finding also names the right cause in "
        f"{tools['gradctl']['right_cause']} of {tools['gradctl']['broken']}.",
    ]
    if "guardtower" in tools:
        found = tools["guardtower"]
        lines.append(
            f"guardtower: {found['echoes']} of its nothing repeat torch's own error; it could not be attached to "
            f"{len(found['unattachable'])} programs."
        )
    if "preflight" in tools:
        advised = tools["preflight"]["advice_on_healthy"]
        lines.append(f"torch-preflight gives advice on other things than gradients to {len(advised)} of the healthy.")
    lines += ["", f"| program | cause | {' | '.join(TITLES[tool] for tool in tools)} |", "|--" * (len(tools) + 2) + "|"]
    for name, label in labels.items():
        marks = [tools[tool]["verdicts"][name] for tool in tools]
        if label["cause"] is None:
            marks = ["-" if mark == "nothing" else "FALSE ALARM" for mark in marks]
        marks = ["-" if mark == "nothing" else mark for mark in marks]
        lines.append(f"| {name} | {label['cause'] or 'healthy'} | {' | '.join(marks)} |")
    failed = {tool: found["failed"] for tool, found in tools.items() if found["failed"]}
    if failed:
        lines += ["", f"Failed: {failed}"]
    return "\n".join(lines) + "\n"


def processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers-python", help="the interpreter of an environment with guardtower and torch-preflight")
    parser.add_argument("--only", default="", help="numbers of programs, with commas between them")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    peers: str | None = options.peers_python
    labels: dict[str, Label] = {
        path.stem: json.loads(path.read_text(encoding="utf-8"))
        for path in sorted(CASES.glob("*.json"))
        if not options.only or path.stem[:2] in options.only.split(",")
    }
    versions = {"gradctl": version_of(sys.executable, "gradctl"), "torch": version_of(sys.executable, "torch")}
    tools: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place).resolve()
        for path in CASES.glob("*.py"):
            shutil.copy(path, folder)
        checks = [{"name": name, "check": label.get("check", "")} for name, label in labels.items()]
        (folder / "cases.json").write_text(json.dumps(checks), encoding="utf-8")
        for tool in TITLES:
            if tool == "preflight" and peers is not None:
                answers = lint(peers, folder, list(labels))
                versions["torch-preflight"] = version_of(peers, "torch-preflight")
            elif tool == "guardtower" and peers is not None:
                found = ask(tool, peers, folder)
                answers = found["answers"]
                versions["guardtower"] = f"{version_of(peers, 'guardtower')} (torch {found['torch']})"
            elif tool in ("preflight", "guardtower"):
                continue
            else:
                answers = ask(tool, sys.executable, folder)["answers"]
            tools[tool] = judged(tool, labels, answers)
            print(f"{tool}: {Counter(tools[tool]['verdicts'].values())}", file=sys.stderr)
    date = datetime.datetime.now(datetime.UTC).date().isoformat()
    where = {"date": date, "processor": processor(), "cores": os.cpu_count(), "python": platform.python_version()}
    result = {"where": where | {"versions": versions}, "tools": tools, "labels": labels}
    text = as_markdown(result)
    for found in tools.values():  # what a tool printed may name the temporary folder
        found["answers"] = json.loads(json.dumps(found["answers"]).replace(f"{folder}/", ""))
    options.out.mkdir(parents=True, exist_ok=True)
    name = f"explain-peers-{date}{'-part' if options.only else ''}"
    (options.out / f"{name}.json").write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    (options.out / f"{name}.md").write_text(text)
    print(text)
    return 1 if any(found["failed"] for found in tools.values()) else 0


if __name__ == "__main__":
    raise SystemExit(main())
