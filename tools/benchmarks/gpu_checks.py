"""Checks of the Triton operator in whole models, on the device where it runs; gpu_report.py runs them.

The reference is the plain operator in float64, with random weights that are large enough for every part of a
model to matter. The error of a result is its largest one, relative to its largest true value, or to the
median gradient's if that is more, since some gradients are zero but for rounding. The limit is twice the
error of the plain operator in the same precision; for gradients twice the sum of that and of the median
gradient's, since a gradient of one number may be exact by chance.
"""

import math
import statistics
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor, nn

from models import FocalTransformer
from models.registry import VARIANTS
from utils import Precision

from . import common
from .attention import randomise
from .common import DTYPES
from .entries import CLASSES, FAMILIES, OURS

TINY = (FAMILIES["focal"]["tiny"], FAMILIES["focalv2"]["tiny"])
RELEASED = tuple(FAMILIES[family][size] for size in ("tiny", "base", "small") for family in OURS)
HALF = "bf16"
CHECKED_IMAGES = 2
TOLERANCE = 2.0  # times the error of `plain` in the same precision
LEAST_ERROR = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}  # always allowed
OK, FAILED, NOT_RUN = "ok", "FAILED", "not run"
COLUMNS = ("check", "part", "model", "precision", "result", "error", "limit", "note")

Answer = dict[str, Tensor]  # results in float64 by name: logits, and gradients by their parameters' names


class Case(NamedTuple):
    """What a check is for."""

    check: str  # a key of CHECKS
    variant: str  # a key of `VARIANTS`
    precision: str  # a key of DTYPES; half precisions are autocast
    device: torch.device

    def row(self, what: str, result: str, *more: common.Cell) -> list[common.Cell]:
        """By COLUMNS; `more` are error, limit and note."""
        return [self.check, what, self.variant, self.precision, result, *more]


class Outcome(NamedTuple):
    """What a check found."""

    what: str
    error: float
    limit: float
    note: str = ""


def run(case: Case) -> list[list[common.Cell]]:
    """Rows of the table; in a process of its own, because an error may put the device out of order."""
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    if case.device.type == "cuda":
        torch.cuda.set_device(case.device)
    return [
        case.row(found.what, OK if found.error <= found.limit else FAILED, *found[1:])
        for found in CHECKS[case.check](case)
    ]


def make_model(case: Case, backend: str) -> FocalTransformer:
    """The same model for every operator, in evaluation."""
    torch.manual_seed(0)
    fixed = {"drop_path_rate": 0.0, "num_classes": CLASSES, "attention_backend": backend}
    model = FocalTransformer(**VARIANTS[case.variant] | fixed, device=case.device).eval()
    randomise(model)
    return model


class Subject:
    """A model's inputs, and the results that it should have."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.precision = Precision(DTYPES[case.precision])
        generator = torch.Generator().manual_seed(1)
        side = VARIANTS[case.variant].get("img_size", 224)
        shape = (2, CHECKED_IMAGES, 3, side, side)
        self.images, self.others = torch.randn(shape, generator=generator).to(case.device).unbind()
        self.cotangent = torch.randn(CHECKED_IMAGES, CLASSES, generator=generator).to(case.device)

    def answer(self, call: Callable[[Tensor], Tensor], model: nn.Module) -> Answer:
        """Logits and gradients of `call`: the model, or what was compiled of it."""
        like = next(model.parameters())
        precision = Precision(torch.float32) if like.dtype == torch.float64 else self.precision
        with precision.autocast(like.device):
            logits = call(self.images.to(like.dtype))
        logits.backward(self.cotangent.to(logits.dtype))
        results = {"logits": logits.detach()}
        for name, x in model.named_parameters():
            results[name] = torch.zeros_like(x) if x.grad is None else x.grad
        model.zero_grad()
        return {name: x.double() for name, x in results.items()}

    @cached_property
    def truth(self) -> Answer:
        """Results of plain in float64."""
        model = make_model(self.case, "plain").double()
        return self.answer(model, model)

    @cached_property
    def plain(self) -> Answer:
        """Results of plain in the precision of the case."""
        model = make_model(self.case, "plain")
        return self.answer(model, model)

    def compare(self, found: Answer) -> list[Outcome]:
        """Errors of the logits, and of the gradients where there are some."""
        gradients = [name for name in found if name != "logits"]
        groups = {"logits": ["logits"], "gradients": gradients}
        return [self.judge(what, names, found) for what, names in groups.items() if names]

    def judge(self, what: str, names: Sequence[str], found: Answer) -> Outcome:
        """The named result whose error is the largest share of its limit."""
        largest = {name: float(self.truth[name].abs().max()) for name in names}
        least = statistics.median(largest.values())

        def errors(answer: Answer) -> list[float]:
            off = [float((answer[name] - self.truth[name]).abs().max()) for name in names]
            return [error / max(large, least) for error, large in zip(off, largest.values(), strict=True)]

        off = [math.inf if math.isnan(error) else error for error in errors(found)]
        yardstick = errors(self.plain)
        typical = statistics.median(yardstick) if len(names) > 1 else 0.0
        always = LEAST_ERROR[self.precision.dtype]
        limits = [max(TOLERANCE * (error + typical), always) for error in yardstick]
        worst = max(range(len(names)), key=lambda i: off[i] / limits[i])
        return Outcome(what, off[worst], limits[worst], names[worst] if len(names) > 1 else "")


def forward_backward(case: Case) -> list[Outcome]:
    """The model as it is."""
    subject, model = Subject(case), make_model(case, "triton")
    return subject.compare(subject.answer(model, model))


def compiled(case: Case) -> list[Outcome]:
    """torch.compile with its defaults."""
    subject, model = Subject(case), make_model(case, "triton")
    return subject.compare(subject.answer(torch.compile(model), model))


def reduced_overhead(case: Case) -> list[Outcome]:
    """A mode of torch.compile that records CUDA graphs."""
    subject, model = Subject(case), make_model(case, "triton")
    call = torch.compile(model, mode="reduce-overhead")
    with torch.no_grad(), subject.precision.autocast(case.device):
        for images in (subject.others, subject.others, subject.others, subject.images):
            torch.compiler.cudagraph_mark_step_begin()
            logits = call(images).double()
    return subject.compare({"logits": logits})


def captured(case: Case) -> list[Outcome]:
    """A CUDA graph of a forward pass, captured as PyTorch's notes on CUDA say, replayed with other images."""
    subject, model = Subject(case), make_model(case, "triton")
    images, stream, graph = subject.others.clone(), torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.no_grad():
        with torch.cuda.stream(stream):
            for _ in range(3):
                model(images)
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(graph):
            logits = model(images)
    images.copy_(subject.images)
    graph.replay()
    return subject.compare({"logits": logits.double()})


def same_bits(case: Case) -> list[Outcome]:
    """Two runs give the same bits."""
    subject, model = Subject(case), make_model(case, "triton")
    with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
        first, second = (subject.answer(model, model) for _ in range(2))
    off = {name: float((x - second[name]).abs().max()) for name, x in first.items()}
    worst = max(off, key=off.__getitem__)
    return [Outcome("logits and gradients", off[worst], 0.0, worst if off[worst] else "")]


def other_gpu(case: Case) -> list[Outcome]:
    """On a GPU that is not the current one."""
    return forward_backward(case._replace(device=torch.device("cuda", 0 if case.device.index else 1)))


CHECKS: dict[str, Callable[[Case], list[Outcome]]] = {
    "forward and backward": forward_backward,
    "torch.compile": compiled,
    "torch.compile, reduce-overhead": reduced_overhead,
    "CUDA graph": captured,
    "same bits twice": same_bits,
    "another GPU than the current one": other_gpu,
}


def cases(device: torch.device) -> list[Case]:
    """All checks, those that take long to compile early."""
    more = [name for name in RELEASED if name not in TINY]
    wanted = [
        ("forward and backward", TINY, ("fp32", HALF)),
        ("torch.compile", TINY, (HALF,)),
        ("forward and backward", more, ("fp32", HALF)),
        ("torch.compile, reduce-overhead", TINY, (HALF,)),
        ("CUDA graph", TINY, ("fp32",)),
        ("same bits twice", TINY, (HALF,)),
        ("another GPU than the current one", TINY if torch.cuda.device_count() > 1 else (), (HALF,)),
    ]
    return [
        Case(check, variant, precision, device)
        for check, variants, precisions in wanted
        for variant in variants
        for precision in precisions
    ]
