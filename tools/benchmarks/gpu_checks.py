"""Checks of the Triton operator in whole models, on the device where it runs; gpu_report.py runs them.

The reference is the plain operator in float64, with random weights that are large enough for every part of a
model to matter. The error of a result is its largest one, relative to its largest true value, or to the
median gradient's if that is more, since some gradients are zero but for rounding. The limit is twice the
error of the plain operator in the same precision, see `attention.limit`; for gradients twice the sum of that
and of the median gradient's, since a gradient of one number may be exact by chance.
"""

import gc
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor, nn

from models import FocalTransformer
from models.registry import VARIANTS
from utils import Precision, synchronize

from . import common
from .attention import errors, limit
from .common import DTYPES
from .entries import CLASSES, FAMILIES, OURS

TINY = (FAMILIES["focal"]["tiny"], FAMILIES["focalv2"]["tiny"])
RELEASED = tuple(FAMILIES[family][size] for size in ("tiny", "base", "small") for family in OURS)
MORE = tuple(name for name in RELEASED if name not in TINY)
QUICK = {  # options of a small model, to try the checks themselves
    **{"img_size": 32, "embed_dim": 8, "depths": (1,), "num_heads": (1,), "window_size": 4},
    **{"focal_stages": (0,), "focal_levels": (2,), "focal_windows": (3,), "expand_sizes": (1,)},
    **{"focal_topk": 12},
}
IMAGES = 2
HALF = {"cuda": "bf16", "cpu": "fp16"}  # by device: Triton's interpreter has no products of bfloat16
STEP = 1e-4  # of finite differences
OK, FAILED, NOT_RUN = "ok", "FAILED", "not run"
COLUMNS = ("check", "model", "precision", "result", "error", "limit", "note")

Answer = dict[str, Tensor]  # results in float64 by name: logits, and gradients by their parameters' names


def precision_on(device: torch.device, name: str) -> str:
    """A key of DTYPES for one, or for `half`."""
    return HALF[device.type] if name == "half" else name


@dataclass(frozen=True)
class Case:
    """What a check is for."""

    variant: str  # a key of `VARIANTS`
    precision: str  # a key of DTYPES; half precisions are autocast
    device: torch.device
    quick: bool = False  # a tiny model in place of the variant


@dataclass(frozen=True)
class Outcome:
    """What a check found."""

    what: str
    error: float
    limit: float
    note: str = ""


@dataclass(frozen=True)
class Check:
    """One check, of some models."""

    name: str
    run: Callable[[Case], list[Outcome]]
    variants: Sequence[str] = TINY
    precisions: Sequence[str] = ("half",)  # keys of DTYPES, or half for HALF
    gpus: int = 0  # that it needs at least
    fresh: bool = False  # needs a process where nothing is cached

    def cases(self, device: torch.device, quick: bool) -> Iterator[Case]:
        """What it is run for; quickly, for one model of each family."""
        for variant in self.variants if not quick else [name for name in self.variants if name in TINY]:
            for precision in self.precisions:
                yield Case(variant, precision_on(device, precision), device, quick)

    def why_not(self, device: torch.device) -> str:
        """Why it cannot run there, or ''."""
        found = torch.cuda.device_count() if device.type == "cuda" else 0
        return f"needs {self.gpus} CUDA device(s), found {found}" if found < self.gpus else ""


def row(check: Check, case: Case, what: str, result: str, *more: common.Cell) -> list[common.Cell]:
    """A row of the table; `more` are error, limit and note."""
    name = f"{check.name}: {what}" if what else check.name
    return [name, case.variant, case.precision, result, *more]


def run(check: Check, case: Case) -> list[list[common.Cell]]:
    """Rows of the table.

    Raises:
        RuntimeError: the device is out of order for this process.
    """
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    if case.device.type == "cuda":
        torch.cuda.set_device(case.device)
    rows = []
    try:
        for found in check.run(case):
            result = OK if found.error <= found.limit else FAILED
            rows.append(row(check, case, found.what, result, found.error, found.limit, found.note))
    except Exception as error:  # whatever compilers and drivers raise, the table goes on
        rows.append(row(check, case, "", FAILED, None, None, common.short_reason(error)))
        error.__traceback__ = None  # it holds tensors
        synchronize(case.device)
    torch.compiler.reset()
    gc.collect()
    if case.device.type == "cuda":
        torch.cuda.empty_cache()
    return rows


def make_model(case: Case, backend: str) -> FocalTransformer:
    """The same model for every operator, in evaluation."""
    torch.manual_seed(0)
    options = VARIANTS[case.variant] | (QUICK if case.quick else {})
    options |= {"drop_path_rate": 0.0, "num_classes": CLASSES, "attention_backend": backend}
    model = FocalTransformer(**options, device=case.device).eval()
    with torch.no_grad():
        for name, x in model.named_parameters():
            if "bias_table" in name:
                x.normal_(std=0.5)
            elif name.endswith("bias"):
                x.normal_(std=0.1)
            elif x.ndim == 1:
                x.normal_(mean=1, std=0.1)
            else:
                scale = 0.2 if "coord2rpb" in name else 1.0  # whose inputs are not normalised
                x.normal_(std=scale * x[0].numel() ** -0.5)
    return model


def side_of(case: Case) -> int:
    """Pixels of an image."""
    return QUICK["img_size"] if case.quick else 224


class Subject:
    """A model's inputs, and the results that it should have."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.precision = Precision(DTYPES[case.precision])
        generator = torch.Generator().manual_seed(1)
        shape = (2, IMAGES, 3, side_of(case), side_of(case))
        images = torch.randn(shape, generator=generator).to(case.device)
        self.images, self.others = images.unbind()
        self.cotangent = torch.randn(IMAGES, CLASSES, generator=generator).to(case.device)

    def answer(self, call: Callable[[Tensor], Tensor], model: nn.Module, few: int = IMAGES) -> Answer:
        """Logits and gradients.

        Args:
            call: the model, or what was compiled of it.
            model: has the parameters.
            few: images.
        """
        like = next(model.parameters())
        precision = Precision(torch.float32) if like.dtype == torch.float64 else self.precision
        with precision.autocast(like.device):
            logits = call(self.images[:few].to(like.dtype))
        logits.backward(self.cotangent[:few].to(logits.dtype))
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
        answers, names = (found, self.truth, self.plain), [name for name in found if name != "logits"]
        outcomes = [self.judge("logits", ["logits"], *answers)]
        return [*outcomes, self.judge("gradients", names, *answers)] if names else outcomes

    def judge(self, what: str, names: Sequence[str], found: Answer, truth: Answer, plain: Answer) -> Outcome:
        """The named result whose error is the largest share of its limit."""
        true = [truth[name] for name in names]
        least = statistics.median(float(x.abs().max()) for x in true)
        off, yardstick = (errors([answer[name] for name in names], true, least) for answer in (found, plain))
        off = [math.inf if math.isnan(error) else error for error in off]
        typical = statistics.median(yardstick) if len(names) > 1 else 0.0
        limits = [limit(error + typical, self.precision.dtype) for error in yardstick]
        worst = max(range(len(names)), key=lambda i: off[i] / limits[i])
        return Outcome(what, off[worst], limits[worst], names[worst] if len(names) > 1 else "")


def forward_backward(case: Case) -> list[Outcome]:
    """The model as it is."""
    subject, model = Subject(case), make_model(case, "triton")
    return subject.compare(subject.answer(model, model))


def compiled(case: Case) -> list[Outcome]:
    """torch.compile with its defaults; on a CPU without the compiler behind it."""
    subject, model = Subject(case), make_model(case, "triton")
    call = torch.compile(model, backend="inductor" if case.device.type == "cuda" else "aot_eager")
    return subject.compare(subject.answer(call, model))


def reduced_overhead(case: Case) -> list[Outcome]:
    """A mode of torch.compile that records CUDA graphs, from the first call of all."""
    subject, model = Subject(case), make_model(case, "triton")
    call = torch.compile(model, mode="reduce-overhead")
    with torch.no_grad(), subject.precision.autocast(case.device):
        for images in (subject.others, subject.others, subject.others, subject.images):
            torch.compiler.cudagraph_mark_step_begin()
            logits = call(images).double()
    skipped = torch._dynamo.utils.counters["inductor"]["cudagraph_skips"]
    outcomes = subject.compare({"logits": logits})
    return [replace(found, note="no CUDA graph was recorded" if skipped else "") for found in outcomes]


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


def forward_mode(case: Case) -> list[Outcome]:
    """torch.func.jvp against finite differences of plain in float64."""
    subject = Subject(case)
    model, images, step = make_model(case, "plain").double(), subject.images.double(), subject.others.double()
    with torch.no_grad():
        true = (model(images + STEP * step) - model(images - STEP * step)) / (2 * STEP)

    def tangent(backend: str) -> Answer:
        model = make_model(case, backend)
        return {"tangent": torch.func.jvp(model, (subject.images,), (subject.others,))[1].detach().double()}

    return [subject.judge("tangent", ["tangent"], tangent("triton"), {"tangent": true}, tangent("plain"))]


def no_images(case: Case) -> list[Outcome]:
    """A batch of no images: no logits, and gradients that are zero."""
    subject, model = Subject(case), make_model(case, "triton")
    found = subject.answer(model, model, few=0)
    logits = found.pop("logits")
    assert logits.shape == (0, model.num_classes), f"logits of shape {tuple(logits.shape)}"
    return [Outcome("gradients", max(float(x.abs().max()) for x in found.values()), 0.0)]


def same_bits(case: Case) -> list[Outcome]:
    """Two runs give the same bits."""
    subject, model = Subject(case), make_model(case, "triton")
    with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
        first, second = (subject.answer(model, model) for _ in range(2))
    off = {name: float((x - second[name]).abs().max()) for name, x in first.items()}
    worst = max(off, key=lambda name: off[name])
    return [Outcome("logits and gradients", off[worst], 0.0, worst if off[worst] else "")]


def other_gpu(case: Case) -> list[Outcome]:
    """On a GPU that is not the current one."""
    return forward_backward(replace(case, device=torch.device("cuda", 0 if case.device.index else 1)))


BOTH = ("fp32", "half")
CHECKS = (  # what takes long to compile comes early
    Check("forward and backward", forward_backward, TINY, BOTH),
    Check("torch.compile", compiled),
    Check("torch.compile, reduce-overhead", reduced_overhead, gpus=1, fresh=True),
    Check("forward and backward", forward_backward, MORE, BOTH),
    Check("CUDA graph", captured, precisions=("fp32",), gpus=1, fresh=True),
    Check("torch.func.jvp", forward_mode, precisions=("fp32",)),
    Check("no images", no_images),
    Check("same bits twice", same_bits),
    Check("another GPU than the current one", other_gpu, gpus=2),
)
