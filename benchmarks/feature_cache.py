"""CPU time of an align step with the encoder, and with its features from `data.feature_cache`, in turns.

    python benchmarks/feature_cache.py [encoder=… llm=… data.batch_size=… key=value …]

The weights are random. `stored` encodes new images and writes their features, as the first epoch does; `read` finds the
features of these images, as later epochs and other jobs do. Losses and gradient norms of the three are printed.
"""

from __future__ import annotations

import itertools
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import torch
from hydra import compose, initialize_config_dir

from vlm import build, config
from vlm.launch.configs import CONF
from vlm.training.feature_store import FeatureStore

NUM_STEPS = 5
DEFAULTS = ["encoder=siglip_b16_224", "llm=smollm2_135m", "llm.chat_template=chatml"]
RANDOM = ["encoder.weights=random", "llm.weights=random", "trainer=cpu", "data.num_workers=0", "run_dir=none"]


def main(overrides: list[str]) -> None:
    with initialize_config_dir(CONF, version_base="1.3"):
        cfg = config.plain(compose("train", [*DEFAULTS, *RANDOM, *overrides]))
    model, _ = build.build_model(cfg)
    model.load_tokenizer(cfg)
    objective = build.build_objective(cfg)
    module = build.build_module(cfg, model, objective)
    data = build.connect_data(build.build_data(cfg, None), cfg, model)
    data.with_keys = True
    batches = list(itertools.islice(data.train_dataloader(), NUM_STEPS + 1))
    precision = config.precision(cfg)

    def step(batch: object) -> tuple[float, float, float]:
        module.zero_grad()
        start = time.process_time()
        with torch.autocast("cpu", torch.bfloat16, enabled="bf16" in precision):
            output = objective(model, batch)
        loss = output.sums["lm_loss"] / output.counts["lm_loss"]
        loss.backward()
        seconds = time.process_time() - start
        gradients = [p.grad for p in module.parameters() if p.grad is not None]
        return seconds, loss.item(), float(torch.nn.utils.get_total_norm(gradients))

    with tempfile.TemporaryDirectory() as folder:
        store = FeatureStore(folder=Path(folder), encoder=model.encoder)
        store.max_unflushed = 0
        found: dict[str, list[tuple[float, float, float]]] = {"encoder": [], "stored": [], "read": []}
        for number, batch in enumerate(batches):
            for name, results in found.items():
                model.feature_cache = None if name == "encoder" else store
                result = step(batch)
                if number:  # the first batch warms up
                    results.append(result)
        mega = store.image_bytes / 1e6
    print(f"precision {precision}, batches of {len(batches[0].ids)}, {mega:.2f} MB of features an image")
    base = median(seconds for seconds, _, _ in found["encoder"])
    for name, results in found.items():
        seconds = median(each for each, _, _ in results)
        _, loss, norm = results[-1]
        print(f"{name:8} {seconds:7.3f} s   {base / seconds:5.2f} ×   loss {loss:.6f}   gradient norm {norm:.6f}")


if __name__ == "__main__":
    main(sys.argv[1:])
