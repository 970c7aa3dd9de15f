"""The page of one run, and the page that holds several against each other."""

import json
import time
from collections.abc import Iterable
from itertools import islice
from pathlib import Path

import yaml

import llm
from llm import durable
from llm.report.html import details, document, esc, images, section, table, tiles
from llm.report.plots import draw, plots_of
from llm.report.record import Run, differences, flat_config

MAX_FILES = 500  # of a phase's shards, in the table
NOTHING = '<p class="soft">Nothing was recorded yet.</p>'


def write_report(runs: list[Run], folder: Path) -> Path:
    """Write the plots as PNG and the page that holds them all into `folder`; returns the page. One run: its report; several: a comparison."""
    folder.mkdir(parents=True, exist_ok=True)
    name = "report" if len(runs) == 1 else "compare"
    pngs = {}
    for plot in plots_of(runs):
        pngs[f"{plot.title}, {plot.unit}"] = png = draw(plot, runs)
        file = f"{plot.name}.png" if len(runs) == 1 else f"compare-{plot.name}.png"
        durable.write_bytes(folder / file, png)
    page = folder / f"{name}.html"
    text = _report(runs[0], pngs) if len(runs) == 1 else _comparison(runs, pngs)
    durable.write_bytes(page, text.encode(errors="replace"))  # a text may hold half a character
    return page


def _report(run: Run, pngs: dict[str, bytes]) -> str:
    return document(
        run.name,
        [
            f"<h1>{esc(run.name)}</h1>",
            _status(run),
            tiles(_figures(run)),
            section("Curves", images(pngs) or NOTHING),
            section("Sittings", table(SITTING_HEADS, _sittings(run))),
            section("Faults and skipped steps", _faults(run)),
            section("What it has seen", *map(_phase, run.ledger.get("phases", []))),
            section("Evaluations", *(_evaluation(*item) for item in run.evaluations.items())),
            section("Samples", *_samples(run)),
            section("Environment", _environment(run)),
            section("Config", _changes(run), _config(run)),
            _footer(),
        ],
    )


def _comparison(runs: list[Run], pngs: dict[str, bytes]) -> str:
    names = [run.name for run in runs]
    figures = [list(row) for row in zip(_figures(runs[0]), *(_figures(run).values() for run in runs), strict=True)]
    changed = differences([run.config for run in runs])
    same = '<p class="soft">Their configs are the same.</p>' if all(run.config for run in runs) else '<p class="soft">Not noted for all of them.</p>'
    evaluated = [{f"{task}: {metric}": v for task, values in _newest(run).items() for metric, v in values.items()} for run in runs]
    tasks = dict.fromkeys(key for values in evaluated for key in values)
    return document(
        " and ".join(names),
        [
            f"<h1>{esc(', '.join(names))}</h1>",
            section("Final figures", table(["", *names], [row for row in figures if any(row[1:])])),
            section("Curves", images(pngs) or NOTHING),
            section("Differences in config", table(["key", *names], [[key, *map(_plain, values)] for key, values in changed]) or same),
            section("Evaluations, newest checkpoint", table(["", *names], [[key, *(values.get(key) for values in evaluated)] for key in tasks])),
            _footer(),
        ],
    )


def _figures(run: Run) -> dict[str, object]:
    speeds = [value for _, value in run.curves.get("speed/tokens_per_s", [])]
    mfu = run.last("speed/mfu")
    return {
        "steps": run.step,
        "tokens": run.tokens,
        "training loss": run.last("train/loss"),
        "validation loss": run.last("val/loss"),
        "bits per byte, validation": run.last("val/bits_per_byte"),
        "tokens/s, median": round(sorted(speeds)[len(speeds) // 2]) if speeds else None,
        "MFU, %": _percent(mfu),
        "GB of GPU memory, at most": run.last("memory/gpu_peak_gb"),
        "minutes in all": round(sum(s.get("minutes") or 0 for s in run.sittings), 1) or None,
        "sittings": max(len(run.sittings), len(run.starts)) or None,
        "faults": len(run.faults) or None,
    }


def _percent(share: float | None) -> float | None:
    return round(100 * share, 1) if share else None


def _status(run: Run) -> str:
    end = run.end
    if not end:
        return '<p class="soft">The newest sitting runs still, or was killed.</p>' if run.starts else ""
    kind = "" if end.get("code") == 0 else f' <span class="bad">exit code {esc(end.get("code"))}, {esc(end.get("kind"))}</span>'
    return f'<p class="soft">The last sitting ended at step {esc(end.get("step"))}, {esc(end.get("time"))}: {esc(end.get("why"))}{kind}</p>'


SPENT = ("training", "validating", "saving")
SITTING_HEADS = ["began", "steps", "tokens", "minutes", *SPENT, "tokens/s", "MFU, %", "loss", "on", "ended because"]


def _sittings(run: Run) -> list[list]:
    """Each start with the sitting that ended before the next one began, if any did; sittings of which no start is known come first."""
    ended, rows = sorted(run.sittings, key=lambda s: str(s.get("ended"))), []
    begins = [str(start.get("began")) for start in run.starts] + ["~"]  # after every time
    rows += [_sitting({}, s) for s in ended if str(s.get("ended")) < begins[0]]
    for start, begin, following in zip(run.starts, begins, begins[1:], strict=False):
        found = [s for s in ended if begin <= str(s.get("ended")) < following]
        rows.append(_sitting(start, found[-1] if found else {"why": "did not come to its end, or runs still"}))
    return rows


def _sitting(start: dict, did: dict) -> list:
    minutes = [round(did[key] / 60, 2) if isinstance(did.get(key), int | float) else None for key in map("seconds_{}".format, SPENT)]
    loss = f"{did['loss_first']:.4f} to {did['loss_last']:.4f}" if did.get("loss_first") and did.get("loss_last") else None
    speed = [round(did["tokens_per_s"]) if did.get("tokens_per_s") else None, _percent(did.get("mfu"))]
    where = f"{start.get('ranks')} x {start.get('device')}" if start else None
    steps = f"{did.get('from_step', start.get('step'))} to {did.get('to_step', '?')}"
    began = str(start.get("began") or "").replace("T", " ")
    return [began, steps, did.get("tokens"), did.get("minutes"), *minutes, *speed, loss, where, did.get("why")]


def _faults(run: Run) -> str:
    noted = [[f["step"], f["kind"].replace("_", " "), _when(f["time"]), f["why"]] for f in run.faults]
    skipped = [
        [s.get("step"), phase.get("phase"), f"{s.get('start')} to {s.get('stop', 0) - 1}", s.get("reason")]
        for phase in run.ledger.get("phases", [])
        for s in phase.get("samples_skipped", [])
    ]
    tables = [table(["step", "what", "when", "why"], noted)]
    if skipped:
        tables += ["<h3>Samples in no update, by the ledger</h3>", table(["step", "phase", "draws", "why"], skipped)]
    return "\n".join(filter(None, tables)) or '<p class="soft">None.</p>'


def _when(seconds) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds)) if isinstance(seconds, int | float) else ""


def _phase(phase: dict) -> str:
    steps = f"steps {phase.get('first_step')} to {phase.get('last_step')}" if phase.get("first_step") else "not begun"
    done = f"{phase.get('percent_done')} % of {phase.get('epochs')} epochs"
    title = f"Phase {phase.get('phase')} ({phase.get('dataset')}), {phase.get('state')}: {done}, {steps}"
    files, shares = iter(phase.get("files", [])), phase.get("shares", [])
    rows = [[share.get("name"), share.get("percent_of_draws"), *_file(file)] for share in shares for file in islice(files, share.get("files", 0))]
    more = f'<p class="soft">and {len(rows) - MAX_FILES:,} more files</p>' if len(rows) > MAX_FILES else ""
    heads = ["share", "% of draws", "file", "tokens", "samples drawn", "% seen"]
    if len(shares) == 1:
        heads, rows = heads[2:], [row[2:] for row in rows]
    return f"<h3>{esc(title)}</h3>\n{table(heads, rows[:MAX_FILES])}{more}"


def _file(file: dict) -> list:
    return [file.get(key) for key in ("file", "tokens", "samples_drawn", "percent_seen")]


def _evaluation(checkpoint: str, results: dict) -> str:
    rows = [[task, metric, value] for task, values in results.items() if isinstance(values, dict) for metric, value in values.items()]
    return f"<h3>{esc(checkpoint)}</h3>\n{table(['task', 'metric', 'value'], rows)}"


def _newest(run: Run) -> dict[str, dict]:
    results = run.evaluations[max(run.evaluations)] if run.evaluations else {}
    return {task: values for task, values in results.items() if isinstance(values, dict)}


def _samples(run: Run) -> Iterable[str]:
    """Newest first, and only these open."""
    by_step: dict = {}
    for sample in run.samples:
        by_step.setdefault(sample.get("step"), {})[sample.get("prompt")] = sample.get("text")
    for number, (step, texts) in enumerate(reversed(by_step.items())):
        inside = "\n".join(f"<pre><b>{esc(prompt)}</b>{esc(text)}</pre>" for prompt, text in texts.items())
        yield details(f"after step {step}", inside, is_open=number == 0)


def _environment(run: Run) -> str:
    if not run.starts:
        return ""
    newest = run.starts[-1]
    versions = ", ".join(f"{name} {number}" for name, number in (newest.get("versions") or {}).items())
    command = " ".join(map(str, newest.get("command") or []))
    rows = [["versions", versions], ["command", command], *([key, newest.get(key)] for key in ("host", "system", "device", "cpus", "ranks", "batch"))]
    return '<p class="soft">As of the newest start.</p>' + table(["", ""], rows)


def _config(run: Run) -> str:
    sections = run.starts[-1].get("config") if run.starts else None
    return f"<pre class=columns>{esc(yaml.safe_dump(sections, sort_keys=False, allow_unicode=True))}</pre>" if sections else ""


def _changes(run: Run) -> str:
    changed = differences([flat_config(start) for start in run.starts])
    heads = ["key", *(f"from step {start.get('step')}" for start in run.starts)]
    return details("Changed between sittings", table(heads, [[key, *map(_plain, values)] for key, values in changed]), is_open=True)


def _plain(value) -> str:
    return "" if value is None else json.dumps(value, ensure_ascii=False)


def _footer() -> str:
    return f"<footer>Tally {esc(llm.__version__)}, tools/report.py, {time.strftime('%Y-%m-%d %H:%M')}</footer>"
