"""vlm-report: the page and the Markdown of a sweep, on folders written by hand."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from PIL import Image

from tests.helpers.programs import QUICK
from tests.helpers.reports import write_run, write_sweep
from vlm import build, config
from vlm.cli.report import main
from vlm.launch.configs import CONF

BAD = "<script>alert(1)</script>"


class Tags(HTMLParser):
    """The tags of a page, and how often each is there."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.found.add(tag)


def test_the_page_of_a_sweep(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    write_sweep(tmp_path, {"mlp": [0.5, 0.7, 0.9], "linear": [0.6, 0.9, 1.2]})
    main([str(tmp_path)])
    page, text = (tmp_path / "report.html").read_text(), (tmp_path / "report.md").read_text()
    for found in (page, text.replace("\\", ""), capfd.readouterr().out):
        assert "+0.200 [-0.048, +0.448]" in found
        assert "0.700 ± 0.200" in found
    # 3 curves have no visual gain; val/loss and exact match against 3 costs.
    assert re.findall(r'font-weight="600"[^>]*>([^<]+)<', page) == [
        *("train/loss", "val/loss"),
        *(
            f"val/loss against {cost}"
            for cost in ("trainable parameters", "visual tokens in the input", "seconds per step")
        ),
        *(
            f"val/exact_match against {cost}"
            for cost in ("trainable parameters", "visual tokens in the input", "seconds per step")
        ),
    ]
    assert re.findall(r'(?:src|href)="(?!data:)', page) == []
    assert "http" not in page.replace('xmlns="http://www.w3.org/2000/svg"', "")


def test_a_single_run_has_curves_without_costs(tmp_path: Path) -> None:
    metrics = {"params/trainable": 10.0, "perf/step_seconds": 0.1}
    write_run(tmp_path, lines=({"step": 1, "val/loss": 2.0, "val/other_loss": 1.0},), loss=2.0, **metrics)
    main([str(tmp_path), "--no-images"])
    page = (tmp_path / "report.html").read_text()
    assert "<h2>Curves</h2>" in page
    assert "Quality and cost" not in page
    assert "nats per token" not in page  # another loss is in the sum


def test_a_search_has_parallel_coordinates(tmp_path: Path) -> None:
    for number in range(3):
        write_run(tmp_path / str(number), loss=1.0 - 0.1 * number)
        file = tmp_path / str(number) / "config.yaml"
        file.write_text(file.read_text().replace("stage: {}", f"stage: {{lr: {10.0**-number}, decay: {number % 2}}}"))
    main([str(tmp_path), "--no-images"])
    page = (tmp_path / "report.html").read_text()
    assert "<h2>Search</h2>" in page
    assert "The best val/loss has stage.lr=0.01, stage.decay=0." in page
    assert page.count('stroke="#d55e00"') == 1 + 0  # the best line


def test_text_from_data_is_escaped(tmp_path: Path) -> None:
    write_sweep(tmp_path, {"mlp": [0.5], BAD.replace("/", "_"): [0.6]})
    record = {"id": BAD, "prompt": f"a | b {BAD}", "prediction": BAD, "reference": "\x1b[31m", "correct": False}
    for folder in tmp_path.glob("*/"):
        (folder / "samples.jsonl").write_text(json.dumps(record) + "\n")
    main([str(tmp_path)])
    page, text = (tmp_path / "report.html").read_text(), (tmp_path / "report.md").read_text()
    tags = {"meta", "title", "style", "h1", "h2", "p", "div", "span", "table", "tr", "th", "td"}
    assert Tags(page).found == tags | {"svg", "g", "path", "line", "rect", "circle", "polyline", "text"} | {"title"}
    assert "\x1b" not in page + text
    assert "<script" not in text.replace("\\<", "")
    assert r"a \| b " in text


def test_images_of_the_samples(tmp_path: Path) -> None:
    with initialize_config_dir(CONF, version_base="1.3"):
        settings = config.plain(compose("train", [*QUICK, f"run_dir={tmp_path}"]))
    write_run(tmp_path, loss=1.0)
    config.write_config(tmp_path, settings, {})
    data = build.build_data(settings, None)
    ids = [data.splits["val"][index].id for index in data.val_indices(2)]
    records = [{"id": name, "prompt": "", "prediction": "", "reference": ""} for name in ids]
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    main([str(tmp_path)])
    assert (tmp_path / "report.html").read_text().count('src="data:image/jpeg;base64,') == 2
    with open(tmp_path / "config.yaml", "a") as file:
        file.write("# changed by somebody else\n")
    main([str(tmp_path)])
    page = (tmp_path / "report.html").read_text()
    assert page.count("data:image/jpeg") == 0
    assert f"the config.yaml of {tmp_path.name} was not written by you" in page


def test_refusals(tmp_path: Path, told) -> None:
    with pytest.raises(SystemExit) as end:
        main([str(tmp_path)])
    assert end.value.code == 2
    assert "holds no run" in told()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not installed")
def test_a_browser_shows_the_page(tmp_path: Path) -> None:
    """The curves have the colors of the choices on a white page."""
    write_sweep(tmp_path, {"mlp": [0.5, 0.7, 0.9], "linear": [0.6, 0.9, 1.2]})
    main([str(tmp_path)])
    shot = tmp_path / "page.png"
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--window-size=1500,1600"]
    command = ["chromium", *options, f"--screenshot={shot}", (tmp_path / "report.html").as_uri()]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    colors = {color: num for num, color in Image.open(shot).convert("RGB").getcolors(2**24) or ()}
    assert colors[255, 255, 255] > 1_000_000
    assert min(colors[0x00, 0x72, 0xB2], colors[0xD5, 0x5E, 0x00]) > 100
