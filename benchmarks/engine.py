"""What the training engine costs beside what the network costs; one command a question, a Markdown table each.

step    a student's step on synthetic images, beside a bare hand-written loop of the same network and precision; the
        two take turns of --steps steps, --rounds times
epoch   --rounds epochs on a project's real images, beside the same on synthetic ones; the two take turns step by step
answer  a teacher's answers about synthetic images, without anything else
where   what a training step's time goes to, operation by operation
MFU is the share that the network's operations have of the rate of a large matrix product, measured in the same run.
Run: python benchmarks/engine.py step | epoch [--prepared FOLDER] | answer --model ResNet152_vd | where
"""

import argparse
import contextlib
import io
import sys
import tempfile
from collections.abc import Generator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import Dataset
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parent.parent))

from machine import machine
from turns import against, take_turns

import models
from pipeline.core import devices, networks, params, small_maps, teaching
from pipeline.core.data.batches import Batch, Views
from pipeline.core.data.dataset import ImageSet
from pipeline.core.data.views import ViewSpec
from pipeline.core.sections import Machine
from pipeline.core.train import engine
from pipeline.core.train.order import TrainingOrder

ROOT = Path(__file__).parent.parent
CLASSES = 1000
WARM_UP = 3  # turns


class Synthetic(Dataset):
    """Batches of random pixels, made once."""

    def __init__(self, batch_size: int, resolution: int):
        self.pixels = torch.randint(0, 256, (batch_size, 3, resolution, resolution), dtype=torch.uint8)
        self.shares = torch.ones(batch_size)

    def __getitem__(self, batch: tuple[np.ndarray, np.ndarray]) -> Batch:
        return Batch(*batch, self.pixels[: len(batch[0])], batch[0], self.shares[: len(batch[0])])


def loss(network: nn.Module, batch: Batch) -> torch.Tensor:
    """Any loss will do that costs next to nothing."""
    logits = network(batch.pixels).float()
    return F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.int64, device=logits.device))


def make_run(arguments: argparse.Namespace, views: Dataset, count: int, scratch: str, workers: int) -> engine.Run:
    settings = params.load(ROOT / "params.yaml")
    changes = {"epochs": 1, "warmup_epochs": 0, "batch_size": arguments.batch_size, "precision": arguments.precision}
    return engine.Run(
        what="benchmark",
        classifier=(classifier := networks.build(arguments.model, CLASSES, seed=0)),
        part=classifier.network,
        views=views,
        order=TrainingOrder(np.arange(count), arguments.batch_size, 0, 0),
        loss=loss,
        recipe=settings.distill.model_copy(update=changes),
        processes=devices.join(how(arguments)),
        validate=lambda classifier: {},
        scratch=Path(scratch),
        machine=how(arguments).model_copy(update={"workers": workers}),
    )


def how(arguments: argparse.Namespace) -> Machine:
    """The settings of section machine that the arguments give."""
    given = {name: getattr(arguments, name) for name in ("device", "compile", "cuda_graphs", "cudnn_benchmark")}
    return params.load(ROOT / "params.yaml").machine.model_copy(update={"checkpoint_seconds": 1e9, **given})


class BareLoop:
    """The same training, with nothing around it."""

    def __init__(self, arguments: argparse.Namespace):
        self.device = devices.join(how(arguments)).device
        self.bfloat16 = arguments.precision == "bfloat16"
        network = networks.build(arguments.model, CLASSES, seed=0)
        small_maps.restore_convolutions(network)
        self.network = network.to(self.device, memory_format=torch.channels_last).train()
        self.forward = torch.compile(self.network) if arguments.compile else self.network
        self.optimizer = torch.optim.AdamW(self.network.parameters(), fused=True)
        size = (arguments.batch_size, 3, arguments.resolution, arguments.resolution)
        self.pixels = torch.randint(0, 256, size, dtype=torch.uint8).to(self.device)
        self.labels = torch.zeros(arguments.batch_size, dtype=torch.int64, device=self.device)

    def loss(self, network: nn.Module) -> torch.Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bfloat16):
            return F.cross_entropy(network(self.pixels).float(), self.labels)

    def flops(self) -> float:
        """Operations a training step takes for each image."""
        with FlopCounterMode(display=False) as counter:
            self.loss(self.network).backward()
        return counter.get_total_flops() / len(self.pixels)

    def step(self) -> torch.Tensor:
        loss = self.loss(self.forward)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        return loss

    def step_by_step(self) -> Generator[torch.Tensor, None, None]:
        while True:
            yield self.step()


def step(arguments: argparse.Namespace) -> None:
    bare = BareLoop(arguments)
    flops = bare.flops()
    views = Synthetic(arguments.batch_size, arguments.resolution)
    turns, images = arguments.rounds or 60, arguments.steps * arguments.batch_size
    count = (turns + WARM_UP) * images
    with tempfile.TemporaryDirectory() as scratch, contextlib.redirect_stderr(io.StringIO()):
        ours = make_run(arguments, views, count, scratch, workers=0).step_by_step()
        loops = {"this engine": ours, "bare loop": bare.step_by_step()}
        seconds = take_turns(loops, turns, arguments.steps, WARM_UP)
    rates = {name: [images / turn for turn in taken] for name, taken in seconds.items()}
    title(arguments)
    table(rates, "bare loop", flops, matrix_product_tflops(arguments))


def answer(arguments: argparse.Namespace) -> None:
    device = devices.join(how(arguments)).device
    classifier = networks.build(arguments.model, CLASSES, seed=0).eval()
    classifier.to(device, memory_format=torch.channels_last)
    size = (arguments.batch_size, 3, arguments.resolution, arguments.resolution)
    pixels = torch.randint(0, 256, size, dtype=torch.uint8).to(device)

    def ask() -> Generator[torch.Tensor, None, None]:
        while True:
            yield teaching.answer(classifier, pixels, arguments.precision)

    seconds = take_turns({"teacher": ask()}, arguments.rounds or 20, arguments.steps, WARM_UP)
    rates = {name: [arguments.steps * len(pixels) / turn for turn in taken] for name, taken in seconds.items()}
    flops = 2 * models.macs(classifier.network, arguments.resolution)
    title(arguments)
    table(rates, "teacher", flops, matrix_product_tflops(arguments))


def where(arguments: argparse.Namespace) -> None:
    count = 2 * (WARM_UP + arguments.steps) * arguments.batch_size
    views = Synthetic(arguments.batch_size, arguments.resolution)
    kinds = torch.profiler.ProfilerActivity
    cuda = devices.join(how(arguments)).device.type == "cuda"
    with tempfile.TemporaryDirectory() as scratch, contextlib.redirect_stderr(io.StringIO()):
        ours = make_run(arguments, views, count, scratch, workers=0).step_by_step()
        for _ in range(WARM_UP):
            next(ours)
        with torch.profiler.profile(activities=[kinds.CPU, *([kinds.CUDA] if cuda else [])]) as profile:
            for _ in range(arguments.steps):
                next(ours)
            if cuda:
                torch.cuda.synchronize()
        ours.close()
    own = "self_device_time_total" if cuda else "self_cpu_time_total"
    host = torch.autograd.DeviceType.CPU  # what it called, not the kernels that came of that: they would count twice
    calls = [each for each in profile.key_averages() if each.device_type == host]
    spent = sorted(((getattr(each, own), each.key) for each in calls), reverse=True)
    total = sum(time for time, _ in spent)
    title(arguments)
    print(f"| operation | ms a step of {total / arguments.steps / 1000:.1f} | share |\n|---|---|---|")
    for time, name in spent[:15]:
        print(f"| {name[:80]} | {time / arguments.steps / 1000:.2f} | {time / total:.1%} |")


def matrix_product_tflops(arguments: argparse.Namespace) -> float:
    """The rate of a large matrix product in the benchmark's precision: what the device does at best, TFLOP/s."""
    device = devices.join(how(arguments)).device
    side = 8192 if device.type == "cuda" else 2048
    dtype = torch.bfloat16 if arguments.precision == "bfloat16" else torch.float32
    torch.backends.cuda.matmul.allow_tf32 = True  # in float32, as cuDNN's convolutions do
    left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))

    def multiply() -> Generator[torch.Tensor, None, None]:
        while True:
            yield left @ right

    seconds = take_turns({"product": multiply()}, turns=5, steps=10, warm_up=2)["product"]
    return 2 * side**3 * 10 / float(np.median(seconds)) / 1e12


def epoch(arguments: argparse.Namespace) -> None:
    images, settings = ImageSet(arguments.prepared), params.load(ROOT / "params.yaml")
    rows = images.rows("labelled", "unlabelled")
    arguments.resolution = settings.views.resolution
    real = Views(images, ViewSpec.of(settings.seed, settings.views))
    ways = {"real images": real, "synthetic images": Synthetic(arguments.batch_size, arguments.resolution)}
    order = TrainingOrder(rows, arguments.batch_size, 0, 0)
    turns = (arguments.rounds or 3) * order.steps_per_epoch
    with tempfile.TemporaryDirectory() as scratch, contextlib.redirect_stderr(io.StringIO()):
        loops = {}
        for name, views in ways.items():
            run = make_run(arguments, views, len(images.ids), f"{scratch}/{name}", arguments.workers)
            run.order, run.steps = order, turns + WARM_UP
            loops[name] = run.step_by_step()
        seconds = take_turns(loops, turns, steps=1, warm_up=WARM_UP)
    rates = {name: [arguments.batch_size / turn for turn in taken] for name, taken in seconds.items()}
    title(arguments, f"{len(rows)} images, {arguments.workers} workers")
    table(rates, "synthetic images")


def title(arguments: argparse.Namespace, more: str = "") -> None:
    words = [arguments.model, f"{arguments.resolution} pixels", f"batch {arguments.batch_size}", arguments.precision]
    print(", ".join(filter(None, [*words, more, machine(), f"{torch.get_num_threads()} threads"])) + "\n")


def table(rates: dict[str, list[float]], other: str, flops: float = 0, peak_tflops: float = 0) -> None:
    """Print images/s, how many times `other`'s of the same turn, and where they are known FLOP/s, and of the peak."""
    print(f"| | images/s, median | least | most | times {other}, quartiles |{' TFLOP/s | MFU |' if flops else ''}")
    print("|---" * (7 if flops else 5) + "|")
    for name, values in rates.items():
        words = [name, f"{np.median(values):.1f}", f"{min(values):.1f}", f"{max(values):.1f}"]
        words.append(against(values, rates[other]))
        if flops:
            reached = np.median(values) * flops / 1e12
            words += [f"{reached:.2f}", f"{reached / peak_tflops:.1%}" if peak_tflops else ""]
        print("| " + " | ".join(words) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=sorted(COMMANDS))
    parser.add_argument("--model", default="ResNet50_vd")
    parser.add_argument("--resolution", type=int, default=32, help="pixels a side of synthetic images")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--compile", action="store_true", help="machine.compile: of step's both loops")
    parser.add_argument("--cuda-graphs", action="store_true", help="machine.cuda_graphs: of step's and epoch's engine")
    parser.add_argument("--cudnn-benchmark", action="store_true", help="machine.cudnn_benchmark: of all")
    parser.add_argument("--steps", type=int, default=1, help="steps of a turn; several on a GPU, which works ahead")
    parser.add_argument("--rounds", type=int, help="turns that each has (60), or epochs (3)")
    parser.add_argument(
        "--prepared", type=Path, default=ROOT / "data/prepare/images", help="a data set that `prepare` wrote"
    )
    parser.add_argument("--workers", type=int, default=0, help="processes that render real images")
    arguments = parser.parse_args()
    try:
        COMMANDS[arguments.what](arguments)
    except ValueError as error:
        sys.exit(f"engine: {error}")


COMMANDS = {"step": step, "epoch": epoch, "answer": answer, "where": where}

if __name__ == "__main__":
    main()
