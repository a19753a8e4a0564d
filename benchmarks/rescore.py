"""Score finished runs again under another rule of the detector, from the bounds and the threshold that they saved.

    python benchmarks/rescore.py RUNS_DIR [--rule repaired] [--output scores.json]

Nothing is learned: for every finished ``mmdf`` run below RUNS_DIR the victim and the bounds are loaded, both networks are run over
the evaluation set, and the decisions follow from S > threshold. Prints a Markdown row for each run. The victims must be in
RUNS_DIR/victims.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from marginclip.clipping import BoundedNetwork
from marginclip.experiment.recipe import find_victim
from marginclip.experiment.setup import build_setup
from marginclip.experiment.spec import run_spec
from marginclip.maxmargin import margin_drop
from marginclip.record import RunRecord
from marginclip.reporting import load_records


def decide(rule: str, logits: Tensor, bounded: Tensor, threshold: float) -> Tensor:
    """Decisions (N,) of ``MarginDropDetector`` with ``correction=exclude``, from a saved threshold."""
    original, chosen = logits.argmax(1), bounded.argmax(1)
    flagged = margin_drop(logits, bounded) > threshold
    if rule == "or_disagree":
        flagged |= chosen != original
    others = bounded.scatter(1, original.unsqueeze(1), float("-inf")).argmax(1)
    return torch.where(flagged, others, chosen if rule == "repaired" else original)


@torch.no_grad()
def decided_batches(record: RunRecord, runs_dir: Path) -> Iterator[tuple[dict[str, Tensor], Tensor, Tensor]]:
    """Every batch of the evaluation set of one run, clean ones first, with the logits (N, K) of its victim and of its repair."""
    spec = run_spec(record.config | {"runs_dir": str(runs_dir)})
    setup = build_setup(spec)
    victim = find_victim(spec)
    model = setup.model.eval()
    model.load_state_dict(load_file(victim.weights))
    repaired = BoundedNetwork(model, torch.zeros(1, *setup.splits.image_shape)).to(memory_format=torch.channels_last)
    repaired.load_bounds(load_file(record.folder / "bounds.safetensors"))
    model = model.to(memory_format=torch.channels_last)
    for loader in setup.data.test_dataloader():
        for raw in loader:
            batch = setup.data.on_after_batch_transfer(raw, 0)
            with torch.autocast("cpu", torch.bfloat16, enabled=record.precision == "bf16-mixed"):
                logits, bounded = model(batch["images"]).float(), repaired(batch["images"]).float()
            yield batch, logits, bounded


def rescore(record: RunRecord, runs_dir: Path, rule: str) -> dict[str, float]:
    """ACC and, under an attack, ASR and PACC of one run, as fractions."""
    hits: dict[str, list[Tensor]] = {"acc": [], "asr": [], "pacc": []}
    for batch, logits, bounded in decided_batches(record, runs_dir):
        decisions = decide(rule, logits, bounded, (record.detector or {})["threshold"])
        for name, key in (("acc", "labels"), ("asr", "targets"), ("pacc", "sources")):
            if key in batch:
                hits[name].append(decisions == batch[key])
    return {name: float(torch.cat(parts).float().mean()) for name, parts in hits.items() if parts}


def main() -> None:
    """Print a row for each run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs_dir", type=Path)
    parser.add_argument("--rule", default="repaired", choices=("repaired", "paper", "or_disagree"))
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    scores = {}
    print("| run | ACC | ASR | PACC |\n|---|---|---|---|", flush=True)
    for record in load_records(options.runs_dir):
        if record.status == "done" and "mmdf" in record.metrics:
            name = record.folder.name
            scores[name] = rescore(record, options.runs_dir, options.rule)
            cells = " | ".join(
                f"{100 * scores[name][key]:.1f}" if key in scores[name] else "-" for key in ("acc", "asr", "pacc")
            )
            print(f"| {name} | {cells} |", flush=True)
    if options.output:
        options.output.write_text(json.dumps(scores, indent=2) + "\n")


if __name__ == "__main__":
    main()
