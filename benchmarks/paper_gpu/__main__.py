"""What a micro-batch of an update, or a step of sampling, takes on a GPU that is not there.

Counts kernels, waits and memory, and models the time.

    python benchmarks/paper_gpu --models FOLDER --model Qwen2.5-VL-3B --completion 2048
    python benchmarks/paper_gpu --models FOLDER --model Qwen2.5-VL-3B --decode
    python benchmarks/paper_gpu --model builtin --prompt 80 --completion 64

FOLDER is that of `benchmarks/hardware.py`. The built-in model needs no folder. README.md beside this file says what the
figures rest on.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections import Counter as Tally
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from paper_gpu.device import NoDevice, make_device

try:
    make_device()
except NoDevice as error:
    sys.exit(f"no device on paper: {error}")

from hardware import MODELS, folder_of

from paper_gpu.card import CARDS, Card
from paper_gpu.case import Case, Decoding, Paper, decode, measure
from vlmenv.agents.vlm import find_model

_SHIPPED = "builtin"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", type=Path, help="folder of published configurations and processors")
    parser.add_argument("--model", choices=[*MODELS, _SHIPPED], default="Qwen2.5-VL-3B", help="model")
    parser.add_argument("--mode", choices=["full", "lora", "nf4"], default="full", help="what is trained")
    parser.add_argument("--prompt", type=int, default=1000, help="least number of tokens of the prompt")
    parser.add_argument("--completion", type=int, default=2048, help="most tokens of a completion")
    parser.add_argument("--group", type=int, default=8, help="completions of the prompt")
    parser.add_argument("--decode", action="store_true", help="a token's step of sampling, in place of an update")
    parser.add_argument("--even", action="store_true", help="lengths of completions: all the most")
    parser.add_argument("--precision", choices=["bf16", "fp32"], default="bf16", help="precision of the passes")
    parser.add_argument("--keep", action="store_true", help="activations: all kept, no block recomputed")
    parser.add_argument("--blocks", type=int, help="blocks of language model and vision tower; default: all")
    parser.add_argument("--card", choices=list(CARDS), default="h100", help="card")
    parser.add_argument("--places", type=int, default=0, help="number of places in the code with most time to print")
    options = parser.parse_args()
    if options.models is None and options.model != _SHIPPED:
        parser.error(f"{options.model} needs --models, a folder with its configuration and processor")
    with tempfile.TemporaryDirectory() as into:
        shipped = options.model == _SHIPPED
        folder = find_model(_SHIPPED) if shipped else folder_of(options.model, options.models, Path(into))
        lengths = options.prompt, options.completion, options.group
        case = Case(
            folder, options.mode, *lengths, not options.even, options.precision, not options.keep, options.blocks
        )
        card = CARDS[options.card]
        if options.decode:
            sys.exit(print("\n".join(decoding_report(decode(case), card, options.places))))
        paper = measure(case)
    print("\n".join(report(paper, card)))
    print("\n".join(places(paper, card, options.places)))


def decoding_report(found: Decoding, card: Card, most: int) -> Iterator[str]:
    """The figures of a step of sampling, by line, and the places in the code that start the most kernels."""
    yield f"prompt {found.prompt} tokens; a step of sampling, mean of {found.steps}"
    graphs = f", of which {found.whole.replays / found.steps:g} graphs" if found.whole.replays else ""
    yield f"kernels {found.launches:.0f}; operators that the host starts {found.calls:.0f}{graphs}"
    yield f"waits {found.waits:g}"
    yield from (f"  {count / found.steps:g}: {kind}, {place}" for (kind, place), count in found.whole.waits.items())
    yield f"time of the card {1e3 * found.seconds(card):.1f} ms on {card.name} (modelled)"
    yield f"time of the host {1e3 * found.host_seconds:.1f} ms (modelled)"
    places = Tally(f"{one.operator} {one.place}" for one in found.whole.kernels)
    yield from (f"{count / found.steps:.0f} kernels: {place}" for place, count in places.most_common(most))


def report(paper: Paper, card: Card) -> Iterator[str]:
    """The figures, by line."""
    times = paper.seconds(card)
    yield f"prompt {paper.prompt} tokens, completions {paper.completions} tokens"
    yield f"kernels {paper.launches}: forward {paper.forward.launches}, backward {paper.backward.launches}"
    yield f"calls of operators with kernels {len(paper.forward.kernels) + len(paper.backward.kernels)}"
    yield f"waits {paper.waits}"
    for part, waits in (("forward", paper.forward.waits), ("backward", paper.backward.waits)):
        for (kind, place), count in sorted(waits.items(), key=lambda one: -one[1]):
            yield f"  {count} {part}: {kind}, {place}"
    yield f"time {sum(times.values()):.3f} s on {card.name} (modelled), MFU {paper.utilization(card):.1%}"
    kernels = [*paper.forward.kernels, *paper.backward.kernels]
    for kind, time in sorted(times.items(), key=lambda one: -one[1]):
        own = [one for one in kernels if one.kind is kind]
        moved, operations = sum(one.bytes for one in own), sum(one.operations for one in own)
        counts = f"{sum(one.launches for one in own)} kernels, {moved / 1e9:.0f} GB, {operations / 1e12:.1f} TFLOP"
        yield f"  {kind}: {time:.3f} s, {counts}"
    yield from (f"{name}: {size / 1e9:.1f} GB" for name, size in paper.memory.items())


def places(paper: Paper, card: Card, most: int) -> Iterator[str]:
    """The places in the code whose kernels take the most time."""
    seconds: Tally[str] = Tally()
    launches: Tally[str] = Tally()
    for part, kernels in (("forward", paper.forward.kernels), ("backward", paper.backward.kernels)):
        for one in kernels:
            key = f"{part} {one.kind}, {one.place}"
            seconds[key] += one.seconds(card)  # type: ignore[assignment]
            launches[key] += one.launches
    yield from (f"{time:.4f} s, {launches[key]} kernels: {key}" for key, time in seconds.most_common(most))


if __name__ == "__main__":
    main()
