"""The report of a sweep in W&B, sent to a stub of its server on this machine."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest
import wandb
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

from tests.helpers.configs import COMPOSED
from vlm import config
from vlm.cli import wandb_report
from vlm.launch.configs import CONF

PAGE = {"endCursor": None, "hasNextPage": False, "__typename": "PageInfo"}


class Stub(BaseHTTPRequestHandler):
    """Answers the queries of W&B's client; keeps the report that is saved."""

    saved: ClassVar[list[dict[str, Any]]] = []

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        content = json.loads(body) if self.path == "/graphql" else {"query": ""}
        reply = json.dumps({"data": self._answer(content["query"], content.get("variables") or {})}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(reply)))
        self.end_headers()
        self.wfile.write(reply)

    def _answer(self, query: str, variables: dict[str, Any]) -> dict[str, Any]:
        project = {"id": "UA==", "internalId": "UHJvamVjdDox", "name": "vlm", "entityName": "us"}
        if "ProjectInternalId" in query:
            return {"project": project}
        if "GetProjects" in query:
            return {"models": {"edges": [], "pageInfo": PAGE, "__typename": "ModelConnection"}}
        if "upsertModel" in query:
            return {"upsertModel": {"project": project, "model": project, "inserted": True}}
        if "upsertView" in query:
            self.saved.append(variables)
            view = {key: variables[key] for key in ("type", "name", "displayName", "description", "spec")}
            view |= {"id": "Vmlldzox", "project": project, "updatedAt": "2026-11-26T12:00:00Z"}
            return {"upsertView": {"view": view, "inserted": True}}
        viewer = {"id": "u", "entity": "us", "username": "us", "email": "", "flags": "{}", "teams": {"edges": []}}
        return {"viewer": viewer}

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Stub)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    wandb.teardown()
    monkeypatch.delenv("WANDB_MODE", raising=False)
    for name, value in (("HOME", str(tmp_path)), ("WANDB_BASE_URL", address), ("WANDB_API_KEY", "0" * 40)):
        monkeypatch.setenv(name, value)
    yield address
    wandb.teardown()
    server.shutdown()


def sweep(folder: Path, **changed: Any) -> Path:
    """Two jobs that differ in their connector and seed."""
    GlobalHydra.instance().clear()
    with initialize_config_dir(CONF, version_base="1.3"):
        settings = config.plain(compose("train", [*COMPOSED, "recipe=null"]))
    logger = {"_target_": "vlm.loggers.wandb.Wandb", "project": "vlm", "group": "connectors", **changed}
    for seed, connector in enumerate(("linear", "mlp")):
        choices = {"connector": connector, "llm": "tiny", "hydra/launcher": str(seed), "logger": str(seed)}
        job = folder / f"connector={connector},seed={seed}"
        job.mkdir(parents=True)
        config.write_config(job, {**settings, "logger": {"wandb": logger}}, choices)
    return folder


def test_the_report_of_a_sweep_groups_its_runs_by_what_differs(
    server: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("wandb_workspaces", reason="the extra wandb-report is not installed")
    Stub.saved.clear()
    wandb_report.main([str(sweep(tmp_path / "connectors"))])
    assert capsys.readouterr().out.splitlines()[-1].startswith(f"{server}/us/vlm/reports/connectors")
    (saved,) = Stub.saved
    assert (saved["entityName"], saved["projectName"], saved["displayName"]) == ("us", "vlm", "connectors: connector")
    grids = [block["metadata"] for block in json.loads(saved["spec"])["blocks"] if block["type"] == "panel-grid"]
    for grid in grids:
        (runs,) = grid["runSets"]
        (condition,) = runs["filters"]["filters"]
        assert (condition["key"]["name"], condition["op"], condition["value"]) == ("group", "=", "connectors")
        assert runs["grouping"] == [{"section": "config", "name": "choices.value.connector"}]
    panels = [panel for grid in grids for panel in grid["panelBankSectionConfig"]["panels"]]
    bars = [panel["config"] for panel in panels if panel["viewType"] == "Bar Chart"]
    assert [(bar["metrics"], bar["groupBy"], bar["groupAgg"]) for bar in bars] == [
        ([name], "choices.value.connector", "mean") for name in ("val/loss", "val/visual_gain")
    ]
    lines = [panel["config"] for panel in panels if panel["viewType"] == "Run History Line Plot"]
    assert [(line["xAxis"], line["metrics"]) for line in lines] == [
        ("trainer/global_step", [name]) for name in wandb_report.CURVES
    ]
    (axes,) = [panel["config"]["columns"] for panel in panels if panel["viewType"] == "Parallel Coordinates Plot"]
    assert [axis["accessor"] for axis in axes] == ["config:choices.value.connector", "summary:val/loss"]


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"_target_": "lightning.pytorch.loggers.CSVLogger"}, "no run in .* has been logged to W&B; start the sweep"),
        ({"group": None}, r"have 0 values of logger.wandb.group \(\) where the report needs 1"),
    ],
)
def test_runs_without_a_report_are_refused(tmp_path: Path, changed: dict[str, Any], said: str) -> None:
    pytest.importorskip("wandb_workspaces", reason="the extra wandb-report is not installed")
    with pytest.raises(ValueError, match=said):
        wandb_report.report(sweep(tmp_path, **changed))
