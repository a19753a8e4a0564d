"""What a repaired model costs in use: latency of the bounded network and of the whole of MMDF, as multiples of the model's.

    python benchmarks/serving.py
    python benchmarks/serving.py --model torchvision:resnet50 --size 224 --batches 1,8

Weights are random: they change no time. Each ratio is the median over ``--rounds`` rounds, in each of which all variants are timed one
after the other. ``compiled`` is ``torch.compile``, and ``onnx`` the same graph in onnxruntime, each against the model there.
"""

from __future__ import annotations

import argparse
import importlib
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from marginclip.clipping import BoundedNetwork
from marginclip.clipping.serving import ServedNetwork
from marginclip.maxmargin import MarginDropDetector
from marginclip.models import ResNet
from marginclip.service import Artefact, DecisionNetwork, export
from marginclip.silence import silence_lightning

Run = Callable[[], object]


def make_artefact(model: nn.Module, size: int, first: float) -> Artefact:
    """The model with bounds at half of what its maps reach, and a detector of made-up statistics; activations in front of the share
    ``first`` of them are not bounded."""
    images = torch.rand(8, 3, size, size, generator=torch.Generator().manual_seed(0))
    sites = [name for name, _ in BoundedNetwork(model, images[:1]).each()]
    network = BoundedNetwork(model, images[:1], sites=sites[int(first * len(sites)) :]).to(memory_format=torch.channels_last)
    network.set_from_images(images, share=0.5)
    statistics_ = torch.rand(500, generator=torch.Generator().manual_seed(1))
    classes = tuple(str(label) for label in range(len(model(images[:1])[0])))
    detector = MarginDropDetector(model, network, statistics_, statistics_)
    return Artefact(model, network, detector, classes, (3, size, size))


def make_model(name: str) -> nn.Module:
    """``resnet18`` for small images, or ``torchvision:NAME``."""
    torch.manual_seed(0)
    if name.startswith("torchvision:"):
        made: nn.Module = importlib.import_module("torchvision.models").get_model(name.partition(":")[2])
        return made.eval().to(memory_format=torch.channels_last)
    return ResNet(10).eval().to(memory_format=torch.channels_last)


def eager(artefact: Artefact, images: Tensor, *, compiled: bool = False) -> dict[str, Run]:
    """The variants in torch: the model, the bounded network as it is served, and the whole of MMDF; the same compiled."""
    served = ServedNetwork(artefact.network, folded=True).to(memory_format=torch.channels_last)
    mmdf = DecisionNetwork(artefact.detector, images=images).eval().to(memory_format=torch.channels_last)
    networks: dict[str, nn.Module] = {"model": artefact.model, "bounded": served, "MMDF": mmdf}
    calls: dict[str, Callable[[Tensor], object]] = dict(networks)
    if compiled:
        calls = {name: torch.compile(network, dynamic=False) for name, network in networks.items()}
    return {name: (lambda call=call: call(images)) for name, call in calls.items()}  # type: ignore[misc]


def onnx(artefact: Artefact, images: Tensor, folder: Path) -> dict[str, Run]:
    """The variants in onnxruntime; none where it is not installed."""
    try:
        import onnxruntime
    except ImportError:
        return {}
    plain = BoundedNetwork(artefact.model, images[:1])  # infinite bounds: the model itself
    files = {
        "model": export(Artefact(artefact.model, plain, artefact.detector, artefact.classes, artefact.image_shape),
                        folder / "model.onnx", part="repaired"),
        "bounded": export(artefact, folder / "bounded.onnx", part="repaired"),
        "MMDF": export(artefact, folder / "mmdf.onnx", batch_size=len(images)),
    }  # fmt: skip
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    given = {"images": images.numpy()}
    sessions = {
        name: onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        for name, file in files.items()
    }
    return {name: (lambda session=session: session.run(None, given)) for name, session in sessions.items()}  # type: ignore[misc]


def timed(variants: dict[str, Run], rounds: int, repeats: int) -> dict[str, list[float]]:
    """Milliseconds of each variant in each round."""
    found: dict[str, list[float]] = {name: [] for name in variants}
    for run in variants.values():
        run()
    for _ in range(rounds):
        for name, run in variants.items():
            started = time.perf_counter()
            for _ in range(repeats):
                run()
            found[name].append(1000 * (time.perf_counter() - started) / repeats)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--batches", default="1,64")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--first", type=float, default=0.0, help="share of the activations, from the input on, without bounds")
    given = parser.parse_args()
    silence_lightning()
    artefact = make_artefact(make_model(given.model), given.size, given.first)
    print("| runtime | batch | model ms | bounded, times | MMDF, times |\n|---|---|---|---|---|")
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        for size in map(int, given.batches.split(",")):
            images = torch.rand(size, *artefact.image_shape)
            runtimes = {
                "torch": eager(artefact, images),
                "compiled": eager(artefact, images, compiled=True),
                "onnx": onnx(artefact, images, Path(folder)),
            }
            for runtime, variants in runtimes.items():
                if not variants:
                    continue
                found = timed(variants, given.rounds, repeats=max(1, 16 // size))
                ratios = [
                    statistics.median(one / other for one, other in zip(found[name], found["model"], strict=True))
                    for name in ("bounded", "MMDF")
                ]
                print(
                    f"| {runtime} | {size} | {statistics.median(found['model']):.1f} | {ratios[0]:.2f} | {ratios[1]:.2f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
