"""One configuration, one function: `train(config)` trains, evaluates and returns the run as one row (chapter 14).

    row = train({"data": {"name": "cifar100"}, "model": {"name": "fast"}, "loss": {"name": "smooth", "k": 5}})
    row["top5"], row["train.loss"]

The row is what `topk_lab.records` describes. Everything random comes from streams of its own, each a function of the
seed, the stream's name and the step: first weights, order and augmentation of the data, dropout, the loss's noise. So
runs with the same seed and other losses start from the same weights and see the same batches, and a run that was killed
goes on from its checkpoint as if nothing had happened: on the CPU, with as many threads, to the last bit.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm

import topk
from topk.metrics import TopKMeter, ranks, shot_groups
from topk_lab import data as data_sets
from topk_lab import losses, models, records
from topk_lab.data import Array, Batches, Data, DataSet, Split, Strict
from topk_lab.models import Count, Model, Positive, Share

NotNegative = Annotated[float, Field(ge=0)]

KS = (1, 2, 3, 5, 10, 20, 50, 100)
"""The numbers of guesses that get a column of their own; `curve` has them all."""
BINS = 15
"""Of the confidences, for the calibration error."""
_CURVE_OF_AN_EPOCH = 100
_EVALUATED_AT_ONCE = 256  # rows, or the training batch where that is larger


class Training(Strict):
    """How weights are moved."""

    epochs: Count = 30
    batch: Count = 128
    optimizer: Literal["sgd", "adamw"] = "sgd"
    learning_rate: Positive = 0.1
    momentum: Share = 0.9
    nesterov: bool = False
    weight_decay: NotNegative = 5e-4  # of matrices and filters; biases and normalisation have none
    schedule: Literal["cosine", "one_cycle", "constant"] = "cosine"
    warmup: NotNegative = 0.0  # epochs of linear rise; one_cycle: 0 means 30 % of the run
    clip: NotNegative = 0.0  # largest norm of the gradient; 0 for none
    precision: Literal["auto", "float32", "bf16"] = "auto"  # auto, of images: bf16 on GPUs, on CPUs if a probe likes it
    compile: bool | None = None  # None: images on GPUs
    evaluate_every: Annotated[int, Field(ge=0)] = 1  # epochs; 0: at the end of the run only
    crop: Annotated[int, Field(ge=0)] = 4  # images: pixels moved at most,
    flip: bool = True  # mirrored or not
    reweight_after: Share = 0.0  # share of the run after which loss.weight counts (deferred: Cao et al. 2019)
    logit_adjustment: NotNegative = 0.0  # post hoc: so many times log(class share) less (Menon et al. 2021)


_GONE: dict[
    str, dict[str, Any]
] = {  # settings of older records, which no run made use of: the values with which nothing happened
    "training": {"label_smoothing": 0, "mixup": 0, "ema": 0, "cutout": 0, "channels_last": None},
    "data": {"parts": None},
}


class Config(Strict):
    """What decides a run's numbers."""

    data: Data
    model: Model
    loss: dict[str, Any]
    training: Training = Training()
    seed: Annotated[int, Field(ge=0)] = 0

    @field_validator("loss")
    @classmethod
    def _complete_loss(cls, value: dict[str, Any]) -> dict[str, Any]:
        return losses.complete(value)

    @classmethod
    def of_record(cls, text: str) -> Config:
        """The configuration of a record, which may be older than this program."""
        config = json.loads(text)
        for section, gone in _GONE.items():
            config[section] = {name: x for name, x in config[section].items() if name not in gone or x != gone[name]}
        return cls.model_validate(config)

    def plain(self) -> dict[str, Any]:
        """Every setting, as JSON has it."""
        return dict(records.plain(self.model_dump()))

    @property
    def key(self) -> str:
        """The hash of every setting."""
        return records.key_of(self.plain())


class DivergedError(ArithmeticError):
    """The loss is NaN or infinite; the message says where."""


def train(
    config: Mapping[str, Any] | Config,
    *,
    folder: Path | None = None,
    device: str | None = None,
    threads: int | None = None,
    progress: bool = True,
    save_every: float = 30.0,
    data: DataSet | None = None,
    keep: Callable[[nn.Module], Any] | None = None,
    **about: Any,
) -> records.Row:
    """Trains, evaluates and returns the run as a row of its chapter's table.

    Args:
        config: {"data", "model", "loss", "training", "seed"}.
        folder: where checkpoint.pt lives; a run that finds its own there goes on from it.
        device: "cpu", "cuda", ...; None: a GPU if there is one.
        threads: of torch; None: as they are.
        progress: whether to show a bar with the time left.
        save_every: seconds between checkpoints.
        data: the data set, for one that is not loaded by the configuration.
        keep: is called with the trained model, for what the row does not hold.
        about: further columns of the row, such as sweep, profile, notebook.

    Raises:
        DivergedError: the loss was NaN or infinite.
    """
    full = Config.model_validate(config)
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    with _threads(threads), torch.random.fork_rng([place] if place.type == "cuda" else []):
        run = _Run(full, data or data_sets.load(full.data), place, folder)
        result = run.train(progress, save_every)
        if keep is not None:
            keep(run.model)
        source = provenance(about.pop("profile", None))
        return records.row(full.plain(), result, losses.probe(full.loss), source, **about)


@contextlib.contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class _Run:
    """What a run consists of, and the loop over it."""

    def __init__(self, config: Config, data: DataSet, device: torch.device, folder: Path | None) -> None:
        self.config, self.data, self.device, self.folder = config, data, device, folder
        settings = self.settings = config.training
        self.step, self.seconds, self.epochs = 0, 0.0, list[dict[str, Any]]()
        if not len(data.train):
            raise ValueError("data must have training rows, got none")
        order = self._stream("data")
        self.batches = Batches(
            data.train, settings.batch, data, device, shuffle=order, crop=settings.crop, flip=settings.flip
        )
        self.steps = len(self.batches) * settings.epochs
        first = Split(data.train.inputs[:2048], data.train.labels[:2048])  # FastNet looks at many images
        some = next(iter(Batches(first, 2048, data, device).epoch()))[0]
        self._seed("initialisation")
        self.model = models.build(config.model, len(data.classes), some, data.about).to(device)
        if some.dim() == 4:
            self.model = self.model.to(memory_format=torch.channels_last)
        self.bf16 = settings.precision == "bf16"
        if settings.precision == "auto" and self.batches.images:
            name = json.dumps([config.model.model_dump(), list(some.shape)], sort_keys=True)
            self.bf16 = device.type == "cuda" or faster_in_bf16(self.model, some[:8], name)
        on_gpu = device.type == "cuda" and self.batches.images
        compiled = on_gpu if settings.compile is None else settings.compile
        self.forward = torch.compile(self.model) if compiled else self.model
        self.noise = torch.Generator(device)
        self.losses = [
            losses.build(loss, data.counts, generator=self.noise).to(device)
            for loss in ({**config.loss, "weight": None}, config.loss)
        ]
        self.optimizer = _optimizer(self.model, settings)
        self.schedule = LambdaLR(self.optimizer, self._share_of_peak)
        self.values = torch.zeros(len(self.batches), device=device)  # this epoch's losses
        self.hits = torch.zeros(2, dtype=torch.int64, device=device)  # this epoch's, top-1 and top-5

    def train(self, progress: bool, save_every: float) -> dict[str, Any]:
        self._restore()
        before, began = self.seconds, time.monotonic()
        saved, look_every = began, 1 if self.device.type == "cpu" else 50  # every look waits for a GPU
        title = f"{self.config.loss['name']}, seed {self.config.seed}"
        with tqdm(total=self.steps, initial=self.step, unit="step", desc=title, disable=not progress) as bar:
            while len(self.epochs) < self.settings.epochs:
                self.model.train()
                for inputs, labels in self.batches.epoch(len(self.epochs), self.step % len(self.batches)):
                    self._step(inputs, labels)
                    bar.update()
                    if self.step % look_every == 0:
                        self._check_losses()
                    if time.monotonic() - saved >= save_every:
                        saved = time.monotonic()
                        self.seconds = before + saved - began
                        self._save()
                self.epochs.append(self._end_of_epoch())
        test, rank = self._evaluate(self.data.test, self.data.test.labels)
        return {
            "final": test | self._validation(),
            "epochs": self.epochs,
            "ranks": (rank - 1).clamp(0, 255).to(torch.uint8).numpy().tobytes(),
            "seconds": before + time.monotonic() - began,
            "parameters": models.parameters(self.model),
            "pretrained": self.data.about.get("weights"),
            "data_fingerprint": self.data.fingerprint,
            "precision": "bf16" if self.bf16 else "float32",
        }

    def _step(self, inputs: Tensor, labels: Tensor) -> None:
        self._seed("dropout")
        self.noise.manual_seed(self._stream("noise"))
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            scores = self.forward(inputs)
        scores = scores.float()
        loss = self.losses[self.step >= self.settings.reweight_after * self.steps]
        weight = loss.weight
        rows = weight[labels].sum() if isinstance(weight, Tensor) else float(len(labels))
        mean = loss(scores, labels) / rows
        self.optimizer.zero_grad(set_to_none=True)
        mean.backward()
        if self.settings.clip:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip)
        self.optimizer.step()
        self.schedule.step()
        self.values[self.step % len(self.values)] = mean.detach()
        rank = ranks(scores.detach(), labels)
        self.hits += torch.stack([(rank <= k).sum() for k in (1, 5)])
        self.step += 1

    def _end_of_epoch(self) -> dict[str, Any]:
        self._check_losses()
        settings, number = self.settings, len(self.epochs) + 1
        training = {"loss": float(self.values.double().mean())}
        training |= {f"top{k}": hits / self.batches.rows for k, hits in zip((1, 5), self.hits.tolist(), strict=True)}
        self.hits.zero_()
        held_out: dict[str, Any] = {}
        if settings.evaluate_every and number % settings.evaluate_every == 0:
            test = self.data.test
            held_out = self._validation(_CURVE_OF_AN_EPOCH) or self._evaluate(test, test.labels, _CURVE_OF_AN_EPOCH)[0]
        rate = self._share_of_peak(self.step - 1) * settings.learning_rate
        return {"epoch": number, "learning_rate": rate, "training": training, **held_out}

    def _check_losses(self) -> None:
        """Stops the run where a loss of this epoch is not finite."""
        wrong = (~self.values[: self.step - len(self.epochs) * len(self.values)].isfinite()).nonzero()
        if len(wrong):
            place = int(wrong[0])
            raise DivergedError(
                f"the loss {self.config.loss['name']!r} is {self.values[place].item()} at step {place + 1} of "
                f"{len(self.values)} in epoch {len(self.epochs) + 1} of {self.settings.epochs}; a smaller learning "
                f"rate, a longer training.warmup or training.clip may help"
            )

    # --- evaluation ---

    def _validation(self, curve: int | None = None) -> dict[str, Any]:
        """On the validation split's labels and, where they carry noise, on the true ones."""
        split, found = self.data.validation, dict[str, Any]()
        for name, labels in (("validation", split.labels), ("validation_clean", split.clean)):
            if labels is not None and len(labels):
                found[name] = self._evaluate(split, labels, curve)[0]
        return found

    @torch.no_grad()
    def _evaluate(self, split: Split, labels: Array, curve: int | None = None) -> tuple[dict[str, Any], Tensor]:
        """What is measured on a split, and the rank of every row."""
        self.model.eval()
        batches = Batches(split, max(self.settings.batch, _EVALUATED_AT_ONCE), self.data, self.device)
        measured = Evaluation(self.data.counts, float(getattr(self.losses[0], "scale", 1.0)), self.device)
        prior = torch.as_tensor(self.data.counts, device=self.device).double().clamp(min=1)
        shift = (self.settings.logit_adjustment * (prior / prior.sum()).log()).float()
        right = torch.from_numpy(labels).to(self.device).split(batches.batch)
        for (inputs, _), own in zip(batches.epoch(), right, strict=True):
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
                scores = self.model(inputs)
            measured.update(scores.float() - shift, own)
        return measured.summary(curve), torch.cat(measured.ranks).cpu()

    # --- what the loop is made of ---

    def _share_of_peak(self, step: int) -> float:
        """The learning rate of a step as a share of its peak; torch's OneCycleLR ends one step earlier.

        "constant" and "cosine" rise linearly during the warm-up; "one_cycle" rises from 1/25 and falls to 1e-5 of the
        peak, both along a cosine.
        """
        warm = self.steps * self.settings.warmup / self.settings.epochs
        if self.settings.schedule == "one_cycle":
            warm = warm or 0.3 * self.steps
            low, share = (0.04, 1 - step / warm) if step < warm else (1e-5, (step - warm) / max(1.0, self.steps - warm))
            return low + (1 - low) * (1 + math.cos(math.pi * share)) / 2
        if step < warm:
            return (step + 1) / (warm + 1)
        fallen = (1 + math.cos(math.pi * (step - warm) / max(1.0, self.steps - warm))) / 2
        return fallen if self.settings.schedule == "cosine" else 1.0

    def _stream(self, name: str) -> int:
        """The seed of a stream at this step."""
        text = f"{self.config.seed} {name} {self.step} 0"
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest())

    def _seed(self, name: str) -> None:
        """Torch's own generators, which initialisation and dropout draw from."""
        torch.default_generator.manual_seed(self._stream(name))
        if self.device.type == "cuda":
            torch.cuda.default_generators[self.device.index or 0].manual_seed(self._stream(name))

    def _save(self) -> None:
        self._check_losses()
        if self.folder is None:
            return
        state = {name: getattr(self, name).state_dict() for name in ("model", "optimizer", "schedule")}
        state |= {name: getattr(self, name) for name in ("step", "seconds", "epochs", "values", "hits", "bf16")}
        state |= {"run": [self.config.key, self.data.fingerprint]}
        records.write_whole(self.folder / "checkpoint.pt", lambda file: torch.save(state, file))

    def _restore(self) -> None:
        """Goes on from the folder's checkpoint, if there is one of this run."""
        if self.folder is None or not (self.folder / "checkpoint.pt").is_file():
            return
        state = torch.load(self.folder / "checkpoint.pt", map_location=self.device, weights_only=True)
        if state["run"] != [self.config.key, self.data.fingerprint]:
            raise ValueError(f"{self.folder} has the checkpoint of another run: give this one its own folder")
        for name in ("model", "optimizer", "schedule"):
            getattr(self, name).load_state_dict(state[name])
        for name in ("step", "seconds", "epochs", "values", "hits", "bf16"):
            setattr(self, name, state[name])


def _optimizer(model: nn.Module, settings: Training) -> torch.optim.Optimizer:
    """SGD or AdamW over the model; biases and the factors of normalisations do not decay."""
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in learned if p.dim() > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in learned if p.dim() <= 1], "weight_decay": 0.0},
    ]
    groups, rate = [group for group in groups if group["params"]], settings.learning_rate
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=rate, fused=True)
    return torch.optim.SGD(groups, lr=rate, momentum=settings.momentum, nesterov=settings.nesterov, fused=True)


class Evaluation:
    """Counts over a split; `summary` turns them into numbers.

    Args:
        counts: training rows of each class, which make the groups many (> 100), medium and few (< 20).
        scale: what scores are multiplied by before the softmax: the loss's own factor where scores are cosines.
        device: where the scores will be.
    """

    def __init__(self, counts: Array, scale: float, device: torch.device) -> None:
        self.scale, self.groups, self.ranks = scale, shot_groups(counts.tolist()), list[Tensor]()
        self.meter = TopKMeter(len(counts), [k for k in KS if k <= len(counts)], device=device)
        # Sums of: the negative log-likelihood; then for every bin its rows, its hits and its confidences.
        self.sums = torch.zeros(1 + 3 * BINS, dtype=torch.float64, device=device)

    def update(self, scores: Tensor, labels: Tensor) -> None:
        """Counts a batch of float32 scores."""
        self.meter.update(scores, labels)
        self.ranks.append(ranks(scores, labels))
        scores = scores * self.scale
        self.sums[0] += F.cross_entropy(scores, labels, reduction="none").double().sum()
        confidence = scores.softmax(1).amax(1).double().nan_to_num()
        hit = (self.ranks[-1] == 1).double()
        place = (confidence * BINS).long().clamp(max=BINS - 1)
        for row, value in enumerate((torch.ones_like(hit), hit, confidence)):
            self.sums[1 + row * BINS :][:BINS].index_add_(0, place, value)

    def summary(self, curve: int | None = None) -> dict[str, Any]:
        """Plain numbers: ``top<k>``, ``macro_top<k>`` (average over classes), ``many_``, ``medium_``, ``few_top<k>``,
        ``candidates_<per cent>``, ``nll``, ``ece`` (15 equally wide bins), ``rows``, and ``curve``, k = 1, 2, ...
        """
        meter = self.meter.to("cpu")
        total, bins = self.sums[0].item(), self.sums[1:].view(3, BINS).cpu()
        shares = {"top": meter.accuracy(), "macro_top": meter.macro()}
        shares |= {f"{group}_top": found for group, found in meter.by_group(self.groups).items()}
        result: dict[str, Any] = {"rows": meter.rows, "nll": total / meter.rows}
        result["ece"] = float((bins[1] - bins[2]).abs().sum()) / meter.rows
        result |= {f"{name}{k}": float(x) for name, found in shares.items() for k, x in found.items()}
        result |= {f"candidates_{share}": meter.candidates(share / 100) for share in (90, 95, 99)}
        result = {name: x if math.isfinite(x) else None for name, x in result.items()}
        return result | {"curve": meter.curve()[:curve].tolist()}


def faster_in_bf16(model: nn.Module, inputs: Tensor, name: str) -> bool:
    """Whether a step takes clearly less processor time under bf16 autocast.

    A machine is asked once for a name: runs that are compared must not differ in the answer by chance.
    """
    about = repr((name, torch.get_num_threads(), torch.__version__, hardware()["cpu"]))
    kept = data_sets.cache() / "bf16" / hashlib.sha256(about.encode()).hexdigest()[:20]
    if not kept.exists():
        times: dict[bool, list[float]] = {False: [], True: []}
        state = {key: value.clone() for key, value in model.state_dict().items()}
        for bf16 in (False, True) * 3:
            began = time.process_time()
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                scores = model(inputs)
            scores.float().square().mean().backward()
            times[bf16].append(time.process_time() - began)
        model.load_state_dict(state)
        model.zero_grad(set_to_none=True)
        faster = min(times[True][1:]) < 0.8 * min(times[False][1:])
        records.write_whole(kept, lambda file: file.write(b"faster" if faster else b"slower"))
    return kept.read_bytes() == b"faster"


# --- where a number comes from: no host names, no users, no paths ---


def provenance(profile: str | None = None) -> dict[str, Any]:
    """Commit, date, hardware, versions, threads, profile."""
    date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    about = {"hardware": hardware(), "versions": versions(), "threads": torch.get_num_threads(), "profile": profile}
    return {"commit": commit_here(), "date": date, **about}


@cache
def commit_here() -> str | None:
    """The commit of the checkout this package runs from, `+dirty` where its code differs from it; None outside one."""

    def git(*arguments: str) -> str | None:
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            done = subprocess.run(
                ["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=30
            )
            return done.stdout.strip() if done.returncode == 0 else None
        return None

    if git("ls-files", "--error-unmatch", "train.py") is None:
        return None  # installed, though perhaps inside another project's checkout
    commit = git("rev-parse", "HEAD")
    return f"{commit}+dirty" if commit and git("status", "--porcelain", "--", "../../topk", ".") else commit


@cache
def versions() -> dict[str, str]:
    """Versions of Python, of this package and of what decides a run's numbers."""
    found = {"python": platform.python_version(), "topk": topk.__version__}
    for name in ("torch", "torchvision", "numpy", "triton", "papermill", "ray"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


@cache
def hardware() -> dict[str, Any]:
    """Processor, cores this process may use, memory in GiB, system, and the GPU's name or None."""
    processor, memory = platform.processor() or platform.machine(), None
    with contextlib.suppress(OSError, AttributeError, ValueError):
        memory = round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30)
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), processor)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"cpu": processor, "cores": cores, "memory": memory, "system": platform.system(), "gpu": gpu}
