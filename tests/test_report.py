"""The HTML report: it holds what the run says, nothing in the data becomes markup, and its playback works in a browser."""

from __future__ import annotations

import base64
import json
import re
import shutil
import time
from html.parser import HTMLParser

import numpy as np
import pytest
import tiny
from browser import Browser, missing_chromium

from sparse_stgcn import plots, report
from sparse_stgcn.data.clip import Clip
from sparse_stgcn.errors import run
from sparse_stgcn.metrics import confusion_matrix
from sparse_stgcn.reports.clips import LOST, fit, packed
from sparse_stgcn.reports.figures import embedded
from sparse_stgcn.reports.page import Page, Section, Table, render
from sparse_stgcn.reports.samples import telling
from sparse_stgcn.scores import Scores
from sparse_stgcn.sweeps.collect import FORMAT, columns, confidence
from sparse_stgcn.training.run import prepare

HOSTILE = ("</script><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">&amp;{{ 7 * 7 }}"
           "$\\frac{")
NAMES = (HOSTILE, "two", "three")
MARKUP = {"html", "head", "meta", "title", "style", "body", "header", "main", "h1", "h2", "p", "dl", "div", "dt", "dd",
          "strong", "small", "section", "figure", "img", "table", "thead", "tbody", "tr", "th", "td", "canvas", "button",
          "label", "input", "output", "select", "option", "span", "script", "noscript", "details", "summary"}
VOID = ("meta", "img", "input")


class Reader(HTMLParser):
    """Tags with their attributes, the text of cells, and that every tag is closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.cells: list[str] = []
        self.clips: list[dict] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag in ("td", "option"):
            self.cells.append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "td" in self.open or "option" in self.open:
            self.cells[-1] += data
        if self.open[-1:] == ["script"] and self.tags[-1][1].get("id") == "clips":
            self.clips = json.loads(data)


@pytest.fixture(scope="module")
def work_dir(tmp_path_factory):
    """A run whose class, samples and joints have hostile names; 4 frames a second."""
    folder = tmp_path_factory.mktemp("report")
    samples = np.array([f"{HOSTILE}{i}" for i in range(30)])
    joints = np.array([f"{HOSTILE}left_hand", f"{HOSTILE}right_hand", "hip", "chest", "head"])
    data = tiny.write_npz(folder / "data.npz", label_names=np.array(NAMES), sample=samples, joint_names=joints,
                          fps=np.array(4.0))
    job = prepare(tiny.config(data=str(data), work_dir=str(folder / "run"), epochs=2, warmup_epochs=1, eval_every=1))
    job.fit()
    job.finish()
    return folder / "run"


@pytest.fixture(scope="module")
def page(work_dir):
    assert run(report.main, [str(work_dir)]) == 0
    return (work_dir / "report.html").read_text(encoding="utf-8")


def test_nothing_in_the_data_becomes_markup(page):
    parsed = Reader(page)
    assert {tag for tag, _ in parsed.tags} <= MARKUP
    assert [tag for tag, _ in parsed.tags].count("script") == 2  # the clips, and the player
    for tag, attributes in parsed.tags:
        assert not any(name.startswith("on") or name == "style" for name in attributes), (tag, attributes)
    assert "49" not in [cell.strip() for cell in parsed.cells]
    # It is not dropped either: the table has the name as it is.
    assert HOSTILE in parsed.cells
    assert any(cell.startswith(HOSTILE) and cell.endswith(f"– {HOSTILE}") for cell in parsed.cells)


def test_nothing_is_loaded_from_elsewhere(page):
    parsed = Reader(page)
    addresses = [value for _, attributes in parsed.tags for name, value in attributes.items() if name in ("src", "href")]
    assert addresses and all(value.startswith("data:image/svg+xml;base64,") for value in addresses)
    assert not re.search(r"https?://|url\(|@import|\bimport\(|fetch\(|XMLHttpRequest|innerHTML|document\.write", page)
    policy = next(a["content"] for tag, a in parsed.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in policy and "unsafe" not in policy


def test_images_and_controls_are_named(page):
    parsed = Reader(page)
    assert all(attributes.get("alt") for tag, attributes in parsed.tags if tag == "img")
    canvas = next(attributes for tag, attributes in parsed.tags if tag == "canvas")
    assert canvas["role"] == "img" and canvas["tabindex"] == "0" and canvas["aria-label"]
    assert ("html", {"lang": "en"}) in parsed.tags


def test_numbers_are_those_of_the_run(page, work_dir):
    result, scores = json.loads((work_dir / "result.json").read_text()), Scores.load(work_dir / "scores.npz")
    for text in (f"{result['test']['top1']:.2%}", f"{result['file']['bytes'] / 1e3:,.0f} kB",
                 f"{result['weights']['maskable_kept']:,} of {result['weights']['maskable']:,} maskable"):
        assert text in page
    counts, cells = confusion_matrix(scores.probability, scores.label), Reader(page).cells
    for i, name in enumerate(NAMES):
        at = cells.index(name)
        assert cells[at + 1:at + 3] == [str(counts[i].sum()), f"{counts[i, i] / counts[i].sum():.1%}"]


def test_clips_are_those_of_the_archive(page, work_dir):
    clips, scores = Reader(page).clips, Scores.load(work_dir / "scores.npz")
    where = {str(name): i for i, name in enumerate(scores.sample)}
    chosen = telling(scores, 16)
    assert [clip["name"] for clip in clips] == [str(scores.sample[i]) for i, _ in chosen]
    for clip in clips:
        row = where[clip["name"]]
        assert clip["label"] == NAMES[scores.label[row]]
        best, probability = clip["predictions"][0]
        assert best == NAMES[scores.probability[row].argmax()]
        assert probability == pytest.approx(scores.probability[row].max(), abs=1e-4)


def test_telling_samples_are_the_surest_mistakes_and_the_least_sure_answers():
    probability = np.array([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8], [0.45, 0.55], [0.3, 0.7]], np.float32)
    scores = Scores(np.array(list("abcde")), np.array([0, 1, 0, 1, 0]), probability, np.log(probability))
    assert [i for i, _ in telling(scores, 4)] == [2, 4, 3, 1]


def test_the_page_of_an_automatic_run_says_so(work_dir, tmp_path):
    shutil.copytree(work_dir, tmp_path / "run")
    result = json.loads((work_dir / "result.json").read_text())
    result["config"] |= {"sparsity": "auto", "budget": "5%"}
    (tmp_path / "run" / "result.json").write_text(json.dumps(result))
    assert run(report.main, [str(tmp_path / "run"), "--samples", "0"]) == 0
    assert "stgcn, sparsity auto, block 4x1" in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")


# ---- clips ------------------------------------------------------------------------------------------------------

def unpack(clip):
    """The documented format, read independently of the page's own reader."""
    whole = np.frombuffer(base64.b64decode(clip["data"]), "<i2").reshape(clip["shape"]).astype(np.float64)
    return np.where(whole == LOST, np.nan, np.array(clip["origin"]) + clip["step"] * whole)


@pytest.mark.parametrize("channels", [2, 3])
def test_coordinates_come_back_to_half_a_step(channels):
    rng = np.random.default_rng(0)
    keypoint = (100 + 3 * rng.standard_normal((20, 2, 5, channels))).astype(np.float32)
    keypoint[3:6, 1] = 0
    keypoint[2, 0, 4] = np.nan
    clip = Clip.of(keypoint, tiny.SKELETON)
    small = packed(clip)
    back = unpack(small)
    np.testing.assert_array_equal(np.isnan(back), np.isnan(clip.keypoint[..., :channels]))
    rounding = 1e-12 * 100
    assert np.nanmax(np.abs(back - clip.keypoint[..., :channels])) <= small["step"] / 2 + rounding
    assert small["step"] == clip.box[1] / 32767
    assert len(small["data"]) == 4 * -(-2 * 20 * 2 * 5 * channels // 3)


def test_long_clips_lose_frames_and_the_budget_holds():
    keypoint = np.random.default_rng(0).standard_normal((301, 1, 5, 3)).astype(np.float32)
    clip = Clip.of(keypoint, tiny.SKELETON)
    small = packed(clip, frames=150)
    assert small["shape"][0] == 101 and small["fps"] == 10
    np.testing.assert_allclose(unpack(small), clip.keypoint[::3], atol=small["step"])
    size = len(small["data"])
    assert len(fit([small] * 5, 3 * size)) == 3 and len(fit([small] * 5, 3 * size - 1)) == 2


# ---- figures, tables, sweeps --------------------------------------------------------------------------------------

def test_figures_take_the_readers_colours_and_keep_their_text():
    source = embedded(plots.confusion(np.array([[3, 1], [0, 2]]), (HOSTILE[:20], "$x$")))
    drawing = base64.b64decode(source.removeprefix("data:image/svg+xml;base64,")).decode()
    assert "prefers-color-scheme: dark" in drawing and "#000000" not in drawing and "<script" not in drawing
    assert "&lt;/script&gt;&lt;script&gt;do" in drawing and "$x$" in drawing and ">75<" in drawing


def test_cells_of_a_table_are_escaped_and_numbers_stand_right():
    text = render(Page("<b>", "&", sections=[Section("<i>", [Table(("a", "b"), [("<u>", "3 %"), ("x", "−2")])])]))
    assert "<b>" not in text and "<u>" not in text and "<i>" not in text
    assert '<td class="number">3 %</td>' in text and "<td>&lt;u&gt;</td>" in text


def test_a_page_holds_what_can_be_written():
    text = render(Page("a\x08\ud800", "é\n", sections=[Section("\x00", [Table(("a",), [("\x9b2J",)])])]))
    text.encode()
    assert "<title>a\N{REPLACEMENT CHARACTER}\N{REPLACEMENT CHARACTER}</title>" in text and "é\n" in text
    assert not set(text) & set("\x00\x08\x9b")


@pytest.fixture
def sweep(work_dir, tmp_path):
    """Results of two runs, one of them made up from the other."""
    result = json.loads((work_dir / "result.json").read_text())
    entry = {"name": "low", "config": result["config"], "test": result["test"], "weights": result["weights"],
             "confidence": confidence(Scores.load(work_dir / "scores.npz")), "bytes": 5000, "seconds": result["seconds"],
             "environment": result["environment"], "history": columns(result["history"])}
    other = {**entry, "name": HOSTILE, "config": {**entry["config"], "sparsity": 0.99}, "bytes": 1000,
             "test": {**entry["test"], "top1": 0.875}}
    path = tmp_path / "grid.json"
    path.write_text(json.dumps({"format": FORMAT, "grid": "grid", "entries": [entry, other]}))
    return path


def test_a_sweep_has_its_runs(sweep, work_dir, capsys):
    result = json.loads((work_dir / "result.json").read_text())
    assert run(report.main, [str(sweep)]) == 0
    assert "grid.html" in capsys.readouterr().out
    text = sweep.with_suffix(".html").read_text()
    parsed = Reader(text)
    assert parsed.cells[:2] == [HOSTILE, "87.50%"] and {tag for tag, _ in parsed.tags} <= MARKUP
    images = [attributes["alt"] for tag, attributes in parsed.tags if tag == "img"]
    assert len(images) == 4 and f"At 0.8 the cross entropy ends at {columns(result['history'])['loss'][-1]:.3f}." in images[2]
    assert "1 kB" in text and "stgcn 0.99 (1 kB, 87.5%)" in text


def test_former_entries_are_on_no_page(sweep):
    entries = json.loads(sweep.read_text())["entries"]
    entries[1] |= {"former": True, "name": "of another grid"}
    sweep.write_text(json.dumps({"format": FORMAT, "grid": "grid", "entries": entries}))
    assert run(report.main, [str(sweep)]) == 0
    text = sweep.with_suffix(".html").read_text()
    assert "of another grid" not in text and "87.5" not in text and "1 results of a sweep" in text


def test_a_sweep_plays_the_sequences_that_most_runs_get_wrong(sweep, work_dir, tmp_path):
    scores = Scores.load(work_dir / "scores.npz")
    right = np.eye(3, dtype=np.float32)[scores.label]
    entries = json.loads(sweep.read_text())["entries"]
    entries[1]["name"] = "high"
    sweep.write_text(json.dumps({"format": FORMAT, "grid": "grid", "entries": entries}))
    turned = np.arange(len(right)) < 4  # the first four are wrong in "high", the first two in "low" as well
    for name, wrong in (("low", np.arange(len(right)) < 2), ("high", turned)):
        shutil.copytree(work_dir, tmp_path / "runs" / name)
        probability = np.where(wrong[:, None], np.roll(right, 1, axis=1), right)
        Scores(scores.sample, scores.label, probability, probability).save(tmp_path / "runs" / name / "scores.npz")
    assert run(report.main, [str(sweep), "--runs", str(tmp_path / "runs"), "--samples", "5"]) == 0
    clips = Reader(sweep.with_suffix(".html").read_text()).clips
    assert [clip["name"] for clip in clips] == scores.sample[:5].tolist()
    assert [re.search(r"Wrong in (\d) of 2", clip["why"])[1] for clip in clips] == list("22110")
    assert [clip["predictions"][0][1] for clip in clips] == [1, 1, 0.5, 0.5, 1]


# ---- errors -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("arguments", "said"), [
    (["nowhere"], "does not exist"),
    (["."], "without result.json"),
    (["run", "--samples", "-1"], "--samples >= 0"),
    (["run", "--megabytes", "0"], "--megabytes"),
    (["run", "--megabytes", "0.0001"], "room for one sequence"),
    (["run", "--out", "none/page.html"], "create none"),
    (["run", "--runs", "."], "leave it out"),
])
def test_bad_arguments(work_dir, monkeypatch, capsys, arguments, said):
    monkeypatch.chdir(work_dir.parent)
    before = sorted(work_dir.parent.rglob("*"))
    assert run(report.main, arguments) == 2
    assert re.search(said, capsys.readouterr().err)
    assert sorted(work_dir.parent.rglob("*")) == before


def test_a_run_without_its_archive_has_a_page_without_samples(work_dir, tmp_path, capsys):
    data = work_dir.parent / "data.npz"
    data.rename(tmp_path / "away.npz")
    try:
        assert run(report.main, [str(work_dir), "--out", str(tmp_path / "page.html")]) == 2
        assert "--samples 0" in capsys.readouterr().err
        assert run(report.main, [str(work_dir), "--out", str(tmp_path / "page.html"), "--samples", "0"]) == 0
    finally:
        (tmp_path / "away.npz").rename(data)
    assert "canvas" not in {tag for tag, _ in Reader((tmp_path / "page.html").read_text()).tags}


# ---- in the browser -------------------------------------------------------------------------------------------------

# What the canvas shows, and how many of its points are painted.
PICTURE = """(() => {
    const c = document.getElementById("canvas"), all = c.getContext("2d").getImageData(0, 0, c.width, c.height).data;
    return [c.toDataURL(), all.filter((value, i) => i % 4 === 3 && value > 0).length];
})()"""
SCRUB = "(() => { const f = document.getElementById('frame'); f.value = 5; f.dispatchEvent(new Event('input')); })()"


@pytest.mark.skipif(missing_chromium() is not None, reason=str(missing_chromium()))
def test_playback_in_a_browser(page, work_dir, tmp_path):
    clips = Reader(page).clips
    shown = "Number(document.getElementById('frame').value)"
    with Browser(tmp_path) as browser:
        browser.open((work_dir / "report.html").as_uri())
        assert browser.run("document.title").startswith("stgcn")  # not "owned"
        first, inked = browser.run(PICTURE)
        assert inked > 100  # a skeleton is drawn
        assert browser.text("playing").startswith(f"{clips[0]['name']}: {clips[0]['label']}")

        browser.run("document.getElementById('play').click()")
        begin = time.monotonic()
        while browser.run(shown) == 0:  # the next frame is due after 0.25 s
            assert time.monotonic() < begin + 30, "playback does not advance"
            time.sleep(0.02)
        assert time.monotonic() - begin > 0.2
        browser.run("document.getElementById('play').click()")
        still = browser.run(shown)
        time.sleep(0.6)
        assert browser.run(shown) == still and browser.text("play") == "Play"

        browser.run(SCRUB)
        assert browser.text("time") == f"6 of {clips[0]['shape'][0]}, 1.25 s"
        before, _ = browser.run(PICTURE)
        assert before != first
        browser.run("document.getElementById('canvas').focus()")
        browser.press("ArrowRight")
        turned, _ = browser.run(PICTURE)
        assert turned != before and browser.run("document.getElementById('yaw').value") == "-20"
        browser.press(",")
        assert browser.run(shown) == 4

        browser.dark(False)
        light = browser.run("getComputedStyle(document.body).backgroundColor")
        browser.dark(True)
        assert light == "rgb(255, 255, 255)" != browser.run("getComputedStyle(document.body).backgroundColor")

        browser.open((work_dir / "report.html").as_uri() + "#sample=2")
        assert browser.text("playing").startswith(f"{clips[2]['name']}: {clips[2]['label']}")
        assert browser.run("document.images.length && [...document.images].every((i) => i.complete && i.naturalWidth > 0)")
        assert not browser.errors
        assert all(address.startswith(("file:", "data:", "about:")) for address in browser.requests) and browser.requests
