"""The report of a run: one file that opens offline, in which no text is HTML, made of whatever the run has left."""

import io
import json
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import matplotlib.colors
import matplotlib.image
import pytest

from llm.log import UserError
from llm.report.page import write_report
from llm.report.plots import COLOURS, MAX_POINTS, draw, plots_of, thinned
from llm.report.record import differences, read_run

ROOT = Path(__file__).parent.parent.parent
EVIL = '</pre><script src="https://evil.example/x.js">alert(1)</script><img src=x onerror=alert(2)>'
OURS = "html head meta title style body main h1 h2 h3 p div b span img table thead tbody tr th td pre details summary footer"


class Page(HTMLParser):
    """Tags, attributes and visible text of a page."""

    def __init__(self, path: Path):
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.tags, self.attributes, self.words, self.open = set(), [], [], []
        self.feed(self.source)
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.attributes += attributes
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.words.append(data)


def write_lines(path: Path, records: list) -> None:
    path.write_text("".join(f"{json.dumps(record) if isinstance(record, dict) else record}\n" for record in records))


def make_record(folder: Path, lr: float = 1e-3, losses=(5.0, 4.0, 3.0, 2.5), name: str = EVIL) -> Path:
    """What a run leaves, with hostile texts at every place where a text may come from outside."""
    logs = folder / "logs"
    logs.mkdir(parents=True)
    metrics = [
        {"step": step, "time": 1e9, "train/loss": loss, "train/lr": lr, "train/grad_norm": 1.0, "speed/tokens_per_s": 12345.6,
         "time/training_share": 0.9, "time/other_share": 0.1, "memory/host_gb": 1.5,
         f"data/{name}_tokens": 100 * step} for step, loss in enumerate(losses, start=1)
    ]  # fmt: skip
    metrics += [
        {"step": 4, "val/loss": 2.75, "val/bits_per_byte": 1.25},
        {"step": 4, "eval/mmlu-0-shot/all": 0.25},
        {"step": 4, "time": 1e9, "fault/grad_norm_spike": f"norm {EVIL}"},
    ]
    write_lines(logs / "metrics.jsonl", metrics)
    config = {"model": {"d_model": 32}, "train": {"lr": lr}, "checkpoint": {"run_name": name}}
    starts = [
        {"began": f"2026-01-0{day}T10:00:00", "step": 2 * day - 2, "command": ["train.py", EVIL], "ranks": day, "device": f"cpu {EVIL}",
         "versions": {"torch": EVIL}, "config": config | {"train": {"lr": lr, "batch_size": day}}} for day in (1, 2)
    ]  # fmt: skip
    write_lines(logs / "starts.jsonl", starts)
    sitting = {"ended": "2026-01-01T10:05:00", "from_step": 0, "to_step": 2, "tokens": 200, "minutes": 5.0, "seconds_training": 270.0, 
               "loss_first": 5.0, "loss_last": 4.0, "tokens_per_s": 12345.6, "mfu": 0.31, "why": EVIL}  # fmt: skip
    write_lines(logs / "sittings.jsonl", [sitting])
    write_lines(logs / "samples.jsonl", [{"step": step, "prompt": EVIL, "text": f"sample {step} \ud800 {EVIL}"} for step in (2, 4)])
    write_lines(logs / "exit.json", [{"why": EVIL, "code": 3, "kind": EVIL, "step": 4, "time": "2026-01-02T11:00:00"}])
    phase = {"phase": "p0", "dataset": EVIL, "state": "open", "percent_done": 50.0, "epochs": 1, "first_step": 1, "last_step": 4,
             "shares": [{"name": "", "files": 1, "percent_of_draws": 100.0}], 
             "samples_skipped": [{"start": 8, "stop": 12, "step": 3, "reason": EVIL}],
             "files": [{"file": EVIL, "percent_seen": 50.0, "tokens": 800, "samples_drawn": 16}]}  # fmt: skip
    (folder / "seen_datasets.json").write_text(json.dumps({"phases": [phase]}))
    (folder / "evaluations" / "step-4").mkdir(parents=True)
    (folder / "evaluations" / "step-4" / "results.json").write_text(json.dumps({EVIL: {"acc": 0.625, EVIL: 1.0}}))
    return folder


@pytest.fixture(scope="module")
def record(tmp_path_factory) -> Path:
    return make_record(tmp_path_factory.mktemp("report") / "<b>evil$x$<i>")


@pytest.fixture(scope="module")
def page(record) -> Page:
    return Page(write_report([read_run(str(record))], record / "out"))


def test_the_page_loads_nothing_and_every_text_in_it_is_text(page):
    assert page.tags <= set(OURS.split()) and not page.open, "no tag but ours, each closed"
    assert all(not key.startswith("on") and key != "href" for key, _ in page.attributes)
    assert all(value.startswith("data:image/png;base64,") for key, value in page.attributes if key == "src")
    assert ("content", "default-src 'none'; img-src data:; style-src 'unsafe-inline'") in page.attributes
    assert "url(" not in page.source and "@import" not in page.source
    assert "://" not in page.source.replace("https://evil.example", ""), "no address at all but the one in the texts"
    assert page.text.count(EVIL) > 12, "what looks like HTML is shown as it is"


def test_the_page_tells_all_that_the_run_has_left(page):
    for wanted in (
        "<b>evil$x$<i>", "exit code 3", "2.75", "1.25", "12,346", "grad norm spike", "8 to 11", "% seen", "0.625", "sample 2", "sample 4",
        "did not come to its end", "5.0000 to 4.0000", "31", "train.batch_size", "d_model: 32", "4.5",
    ):  # fmt: skip
        assert wanted in page.text, wanted
    assert page.text.index("sample 4") < page.text.index("sample 2"), "the newest first"


def test_a_start_goes_with_the_sitting_that_ended_before_the_next_one(tmp_path):
    (tmp_path / "logs").mkdir()
    starts = [{"began": f"2026-01-01T{hour}:00:00", "step": 5, "ranks": 1, "device": hour} for hour in (10, 11, 12)]
    write_lines(tmp_path / "logs" / "starts.jsonl", starts)
    ends = [{"ended": f"2026-01-01T{hour:02}:30:00", "from_step": 5, "to_step": hour, "why": f"end of {hour}"} for hour in (9, 11)]
    write_lines(tmp_path / "logs" / "sittings.jsonl", ends)
    text = Page(write_report([read_run(str(tmp_path))], tmp_path / "out")).text
    killed = "did not come to its end, or runs still"
    rows = ["5 to 9 end of 9", f"10:00:00 5 to ? 1 x 10 {killed}", "11:00:00 5 to 11 1 x 11 end of 11", f"12:00:00 5 to ? 1 x 12 {killed}"]
    assert sorted(rows, key=text.index) == rows


def test_plots_lie_beside_the_page_as_png(record, page):
    names = {path.name for path in (record / "out").glob("*.png")}
    assert names == {f"{n}.png" for n in ("loss", "bits_per_byte", "learning_rate", "grad_norm", "speed", "time", "memory", "tasks", "data")}
    assert all((record / "out" / name).read_bytes().startswith(b"\x89PNG") for name in names)
    assert page.source.count("data:image/png;base64,") == len(names)


def test_of_steps_that_were_taken_again_the_last_time_counts(tmp_path):
    (tmp_path / "logs").mkdir()
    train = [{"step": s, "train/loss": loss} for s, loss in ((1, 1.0), (2, 2.0), (3, 3.0))]
    val = {"step": 3, "val/loss": 3.5}
    again = [{"step": 2, "train/loss": 20.0}, {"step": 3, "train/loss": 30.0}, {"step": 3, "val/loss": 35.0}]
    write_lines(tmp_path / "logs" / "metrics.jsonl", [*train, val, *again])
    curves = read_run(str(tmp_path)).curves
    assert curves == {"train/loss": [(1, 1.0), (2, 20.0), (3, 30.0)], "val/loss": [(3, 35.0)]}


def test_damaged_lines_are_counted_and_left_out(record, tmp_path, capsys):
    (tmp_path / "logs").mkdir()
    good = {"step": 1, "train/loss": 1.0}
    bad = ["[1, 2]", "5", "not json", "\x00\x01", {"step": "x", "train/loss": 2.0}, {"train/loss": 3.0}, {"step": 2, "train/loss": "high"}]
    write_lines(tmp_path / "logs" / "metrics.jsonl", [good, *bad, {"step": 3, "train/loss": float("nan")}, '{"step": 4, "trai'])
    (tmp_path / "seen_datasets.json").write_text("[")
    (tmp_path / "logs" / "exit.json").write_text("[]")
    run = read_run(str(tmp_path))
    assert [step for step, _ in run.curves["train/loss"]] == [1, 3]
    said = capsys.readouterr().out
    assert "metrics.jsonl: 5 damaged lines left out" in said and "seen_datasets.json: cannot be read" in said
    assert "toy" not in Page(write_report([run], tmp_path / "out")).text


def test_a_run_that_has_only_begun_has_a_report_too(tmp_path):
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "metrics.jsonl").touch()
    assert "Nothing was recorded yet" in Page(write_report([read_run(str(tmp_path))], tmp_path / "out")).text


def test_a_run_with_one_record_shows_it_in_every_plot(tmp_path):
    (tmp_path / "logs").mkdir()
    write_lines(tmp_path / "logs" / "metrics.jsonl", [{"step": 8, "train/loss": 4.9, "train/lr": 1e-3, "time/training_share": 0.9}])
    run = read_run(str(tmp_path))
    plots = plots_of([run])
    assert [plot.name for plot in plots] == ["loss", "learning_rate"]  # an area between one point and itself is none
    for plot in plots:
        assert coloured(draw(plot, [run])) > 20, f"{plot.name}: nothing is drawn"


def coloured(png: bytes) -> int:
    """How many pixels have the colour of the first curve."""
    pixels = matplotlib.image.imread(io.BytesIO(png))[..., :3]
    return int((abs(pixels - matplotlib.colors.to_rgb(COLOURS[0])).max(axis=-1) < 0.05).sum())


def test_a_folder_without_logs_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"no metrics\.jsonl here or in logs/.*checkpoints/toy"):
        read_run(str(tmp_path))


def test_logs_that_lie_apart_find_their_run(tmp_path):
    run = make_record(tmp_path / "runs" / "mine", name="mine")
    logs = run.joinpath("logs").rename(tmp_path / "elsewhere")
    start = json.loads((logs / "starts.jsonl").read_text().splitlines()[-1])
    start["config"]["checkpoint"]["checkpoint_dir"] = str(tmp_path / "runs")
    write_lines(logs / "starts.jsonl", [start])
    found = read_run(str(logs))
    assert found.name == "mine" and found.ledger["phases"] and found.evaluations


def test_a_comparison_holds_final_figures_and_only_what_differs_in_the_configs(record, tmp_path):
    other = make_record(tmp_path / "other", lr=5e-4, losses=(5.0, 4.5, 4.25), name="plain")
    page = Page(write_report([read_run(str(record)), read_run(str(other))], tmp_path / "out"))
    assert page.tags <= set(OURS.split()) and "evil$x$" in page.text and "other" in page.text
    assert "train.lr" in page.text and "0.0005" in page.text and "0.001" in page.text and "checkpoint.run_name" in page.text
    assert "model.d_model" not in page.text and "4.25" in page.text
    assert {p.name for p in (tmp_path / "out").glob("*.png")} >= {"compare-loss.png", "compare-speed.png"}


def test_what_only_one_config_has_is_a_difference():
    assert differences([{"a": 1, "b": [2]}, {"a": 1, "b": [2], "c": 3}]) == [("c", [None, 3])]


def test_long_curves_are_thinned_and_keep_both_ends():
    curve = [(step, 0.0) for step in range(1, 100_001)]
    few = thinned(curve)
    assert len(few) <= MAX_POINTS + 1 and (few[0], few[-1]) == (curve[0], curve[-1])


def report(*words) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "tools/report.py", *map(str, words)], cwd=ROOT, capture_output=True, text=True, timeout=60)


def test_wrong_inputs_get_one_message_and_exit_code_2(record, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    cases = {
        (): "give one run's folder",
        (record, "--compare", record, tmp_path): "give one run's folder",
        ("--compare", record): "two different runs or more",
        ("--compare", record, f"{record}/"): "two different runs or more",
        (tmp_path / "none",): "no metrics.jsonl here",
        (record, "--out", blocked): "cannot be written",
    }
    for words, message in cases.items():
        done = report(*words)
        assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr, (words, done.stderr)
