"""One training loop for every experiment (chapter 14).

    result = train({"data": {"name": "cifar100"}, "model": {"name": "small"}, "loss": {"name": "smooth", "k": 5}})

Everything random comes from streams of its own, each a function of the seed, the stream's name and the step: first
weights, order and augmentation of the data, dropout, the loss's noise, mixup. So runs with the same seed and other
losses start from the same weights and see the same batches, and a run that was killed goes on from its checkpoint as
if nothing had happened: on the CPU, with the same number of threads, its result is the same to the last bit.

Under `torchrun` the same loop runs on all processes; `batch` is the size of the whole batch, whose rows they share.
"""

from __future__ import annotations

import hashlib
import json
import math
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from topk.arguments import check_choice, check_count, check_number
from topk.lab import checkpoints, models, objectives
from topk.lab.augment import Augment
from topk.lab.batches import Epochs
from topk.lab.evaluation import Evaluation
from topk.lab.features import pretrained
from topk.lab.optimisation import Average, learning_rate, optimizer
from topk.lab.processes import Processes, joined
from topk.lab.settings import completed
from topk.lab.speed import faster_in_bf16
from topk.lab.streaming import batches_of
from topk.metrics import TopKMeter

if TYPE_CHECKING:
    from topk.lab.data import DataSet, Split

__all__ = ["DEFAULTS", "DivergedError", "complete", "estimate", "train"]

DEFAULTS: dict[str, Any] = {
    "epochs": 30,
    "batch": 128,  # rows a step, over all processes
    "optimizer": "sgd",  # or "adamw"
    "learning_rate": 0.1,
    "momentum": 0.9,
    "weight_decay": 5e-4,  # of matrices and filters; biases and normalisation have none
    "schedule": "cosine",  # or "one_cycle", "constant"
    "warmup": 0.0,  # epochs of linear rise; one_cycle: 0 means 30 % of the run
    "label_smoothing": 0.0,  # for the losses that know it
    "mixup": 0.0,  # both parameters of the Beta distribution; 0 for none
    "ema": 0.0,  # decay of the averaged weights that are evaluated; 0 for none
    "precision": "auto",  # "float32", "bf16"; auto: bf16 on GPUs, and on CPUs where a probe finds it faster
    "compile": None,  # True, False; None: image models on GPUs
    "channels_last": None,  # True, False; None: image models
    "clip": 0.0,  # largest norm of the gradient; 0 for none
    "evaluate_every": 1,  # epochs between looks at the held-out rows; 0: at the end of the run only
    "crop": 4,  # augmentation of images: black pixels around before a random crop,
    "flip": True,  # mirrored or not,
    "cutout": 0,  # side of the square left out
}
_CURVE = 100  # every epoch tells the accuracies up to this k, the final metrics all of them
_LOOK_EVERY = 50  # steps between looks at the loss on a GPU, each of which waits for it
_EVALUATED_AT_ONCE = 256  # rows a process, or the training batch where that is larger
_PROBED = 8  # rows of the batch that decides on bf16
_PACED = 2.0  # seconds that an estimate takes for each kind of batch


class DivergedError(ArithmeticError):
    """The loss is NaN or infinite; the message says where."""


def complete(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration with every default written out; unknown keys and values of a wrong type are refused by name."""
    from topk.lab import data

    if not isinstance(config, Mapping):
        raise TypeError(f"config must be a mapping, got {config!r}")
    full = completed(
        "the configuration", {"data": None, "model": None, "loss": None, "training": None, "seed": 0}, config
    )
    training = completed("training", DEFAULTS, full["training"] or {})
    for name in ("epochs", "batch"):
        check_count(f"training.{name}", training[name])
    for name in ("momentum", "weight_decay", "warmup", "mixup", "clip", "crop", "cutout", "evaluate_every"):
        check_number(f"training.{name}", training[name], least=0.0)
    check_number("training.learning_rate", training["learning_rate"], above=0.0)
    check_number("training.ema", training["ema"], least=0.0, below=1.0)
    check_choice("training.optimizer", training["optimizer"], ("sgd", "adamw"))
    check_choice("training.schedule", training["schedule"], ("cosine", "one_cycle", "constant"))
    check_choice("training.precision", training["precision"], ("auto", "float32", "bf16"))
    for name in ("compile", "channels_last"):
        check_choice(f"training.{name}", training[name], (None, True, False))
    return {
        "data": data.complete(full["data"]),
        "model": models.complete(full["model"]),
        "loss": objectives.complete(full["loss"], training["label_smoothing"]),
        "training": training,
        "seed": check_count("seed", full["seed"], least=0),
    }


def train(
    config: Mapping[str, Any],
    *,
    folder: Path | str | None = None,
    device: str | None = None,
    progress: bool = True,
    data: DataSet | None = None,
    save_every: float = 30.0,
) -> dict[str, Any]:
    """Trains, evaluating every epoch, and returns the run's result as plain numbers, lists and mappings.

    Args:
        config: {"data", "model", "loss", "training", "seed"}; see `complete`.
        folder: where checkpoint.pt and log.jsonl live; a run that finds its own checkpoint there goes on from it.
        device: "cpu", "cuda", ...; None: a GPU if there is one.
        progress: whether to show a bar with the time left.
        data: the data set, for one that is not loaded by `config["data"]`.
        save_every: seconds between checkpoints; several processes write them at the ends of epochs only.

    Returns:
        ``epochs``: for each its ``epoch``, ``learning_rate`` (of the last step), ``training`` (mean ``loss``, ``top1``,
        ``top5`` of the batches as they were trained on) and, where it was evaluated, what `Evaluation.summary` tells of
        the test split, or, where there is a validation split, ``validation`` with what it tells of that;
        ``final``: the same of both at the end; ``seconds``, ``data_fingerprint``, ``parameters``, ``weights`` (the hash
        of pretrained ones, see `topk.lab.features.pretrained`), ``precision``, ``processes``.

    Raises:
        DivergedError: the loss was NaN or infinite.
    """
    full = complete(config)
    with joined(device) as processes, torch.random.fork_rng(_gpus(processes.device)):
        place = None if folder is None else Path(folder)
        return _Run(full, _load(full, data), processes).train(place, progress, save_every)


def estimate(config: Mapping[str, Any], *, device: str | None = None, data: DataSet | None = None) -> float:
    """How many seconds `train` would take, from a few steps of it."""
    full = complete(config)
    with joined(device) as processes, torch.random.fork_rng(_gpus(processes.device)):
        began = time.monotonic()
        run = _Run(full, _load(full, data), processes)
        run.choose_precision()
        epochs: int = full["training"]["epochs"]
        return run.seconds_an_epoch() * epochs + time.monotonic() - began


class _Run:
    """What a run consists of, and the loop over it."""

    def __init__(self, config: Mapping[str, Any], data: DataSet, processes: Processes) -> None:
        settings = config["training"]
        self.config, self.data, self.processes, self.settings = config, data, processes, settings
        self.step, self.seconds, self.epochs, self.bf16 = 0, 0.0, list[dict[str, Any]](), False
        self.device, classes = processes.device, len(data.classes)
        gpu, images = self.device.type == "cuda", data.train.inputs.ndim == 4
        self.channels_last = images and settings["channels_last"] is not False
        self.batches = self._batches(data.train, training=True)
        splits = {"validation": data.validation, "test": data.test}
        self.held_out = {
            name: self._batches(split, training=False) for name, split in splits.items() if len(split.labels)
        }
        self.steps = len(self.batches) * settings["epochs"]
        self._seed("initialisation")  # DDP hands the first process's weights to all
        model = models.build(config["model"], classes, data.train.inputs.shape[1:]).to(self.device)
        if self.channels_last:
            model = model.to(memory_format=torch.channels_last)
        self.network = processes.shared(model)
        self.model = model if processes.count == 1 else self.network.get_submodule("module")
        compiled = gpu and images if settings["compile"] is None else settings["compile"]
        self.forward = torch.compile(self.network) if compiled else self.network
        self.noise = torch.Generator(self.device)
        self.loss = objectives.build(config["loss"], data.counts, generator=self.noise).to(self.device)
        self.optimizer = optimizer(self.model, settings)
        self.average = Average(self.model, settings["ema"]) if settings["ema"] else None
        self.meter = TopKMeter(classes, [k for k in (1, 5) if k <= classes], by_class=False, device=self.device)
        self.losses = torch.zeros(len(self.batches), device=self.device)  # this epoch's, this process's share of them
        self.checked = 0  # so many of them are known to be finite

    def train(self, folder: Path | None, progress: bool, save_every: float) -> dict[str, Any]:
        if not self._restore(folder):
            self.choose_precision()
            self._save(folder)
        before, began = self.seconds, time.monotonic()
        saved = began
        bar = tqdm(
            total=self.steps, initial=self.step, unit="step", disable=not (progress and self.processes.first),
            desc=f"{self.config['loss']['name']}, seed {self.config['seed']}",
        )  # fmt: skip
        look_every = _LOOK_EVERY if self.device.type == "cuda" else 1
        with bar:
            while len(self.epochs) < self.settings["epochs"]:
                self.network.train()
                for inputs, labels in self.batches:
                    self._step(inputs, labels)
                    bar.update()
                    if self.step % look_every == 0:
                        self._check_losses()
                    if self.processes.count == 1 and time.monotonic() - saved >= save_every:
                        saved = time.monotonic()
                        self.seconds = before + saved - began
                        self._save(folder)
                self.epochs.append(self._epoch_metrics())
                bar.set_postfix(self._shown())
                if time.monotonic() - saved >= save_every or len(self.epochs) == self.settings["epochs"]:
                    saved = time.monotonic()
                    self.seconds = before + saved - began
                    self._save(folder)
        validation = {"validation": self._metrics("validation")} if "validation" in self.held_out else {}
        return {
            "epochs": self.epochs,
            "final": self._metrics("test") | validation,
            "seconds": before + time.monotonic() - began,
            "data_fingerprint": self.data.fingerprint,
            "parameters": models.parameters(self.model),
            "weights": pretrained(self.config),
            "precision": "bf16" if self.bf16 else "float32",
            "processes": self.processes.count,
        }

    def _step(self, inputs: Tensor, labels: Tensor) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, self.steps, self.settings)
        self._seed("dropout")
        self.noise.manual_seed(self._stream("noise"))
        others, share = self._partners(len(labels))
        if others is not None:
            inputs = inputs.lerp(inputs[others], 1 - share)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            scores = self.forward(inputs)
        scores = scores.float()
        total, weight = self.loss(scores, labels), self._weight(labels)
        if others is not None:
            total = share * total + (1 - share) * self.loss(scores, labels[others])
            weight = share * weight + (1 - share) * self._weight(labels[others])
        # The mean is over the rows of all processes. DDP averages their gradients, hence the factor.
        mean = total / self.processes.sum(weight)
        self.optimizer.zero_grad(set_to_none=True)
        (mean * self.processes.count).backward()
        if self.settings["clip"]:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.settings["clip"])
        self.optimizer.step()
        if self.average is not None:
            self.average.update(self.model, self.step)
        self.losses[self.step % len(self.losses)] = mean.detach()
        self.meter.update(scores.detach(), labels)
        self.step += 1

    def _partners(self, rows: int) -> tuple[Tensor | None, float]:
        """Mixup: with which row of this process each is mixed, and the larger share, that its own label keeps."""
        if not self.settings["mixup"]:
            return None, 1.0
        draw = np.random.default_rng(self._stream("mixup"))
        share = draw.beta(self.settings["mixup"], self.settings["mixup"])
        return torch.from_numpy(draw.permutation(rows)).to(self.device), max(share, 1 - share)

    def _weight(self, labels: Tensor) -> Tensor:
        """What the sum of the rows' losses is divided by for a mean: their number, or the sum of their weights."""
        weight = self.loss.weight
        if isinstance(weight, Tensor):
            return weight[labels].sum()
        return torch.full((), float(len(labels)), device=self.device)

    def _check_losses(self) -> None:
        """Stops the run where a loss of this epoch is not finite; those known to be are not looked at again."""
        first, end = self.checked, self.step - len(self.epochs) * len(self.losses)
        for place, value in enumerate(self.losses[first:end].tolist(), first):
            if not math.isfinite(value):
                step = len(self.epochs) * len(self.losses) + place
                before = f", {self.losses[place - 1].item():g} a step before" if place else ""
                raise DivergedError(
                    f"the loss {self.config['loss']['name']!r} is {value} at step {place + 1} of {len(self.losses)} in "
                    f"epoch {len(self.epochs) + 1} of {self.settings['epochs']}, at learning rate "
                    f"{learning_rate(step, self.steps, self.settings):g}{before}; a smaller learning rate, a longer "
                    f"training.warmup or training.clip may help"
                )
        self.checked = end

    def _epoch_metrics(self) -> dict[str, Any]:
        self._check_losses()
        self.checked = 0
        accuracy = self.meter.reduce().accuracy()
        self.meter.reset()
        loss = self.processes.sum(self.losses.double()).mean()
        number, every = len(self.epochs) + 1, self.settings["evaluate_every"]
        held_out: dict[str, Any] = {}
        if every and number % every == 0:
            validation = self._metrics("validation", _CURVE)
            held_out = {"validation": validation} if validation else self._metrics("test", _CURVE)
        return {
            "epoch": number,
            "learning_rate": learning_rate(self.step - 1, self.steps, self.settings),
            "training": {"loss": float(loss), **{f"top{k}": float(value) for k, value in accuracy.items()}},
            **held_out,
        }

    @torch.no_grad()
    def _metrics(self, name: str, curve: int | None = None) -> dict[str, Any]:
        if name not in self.held_out:
            return {}
        model = (self.model if self.average is None else self.average.model).eval()
        evaluation = Evaluation(self.data.counts, objectives.scale_of(self.loss), self.device)
        for inputs, labels in self.held_out[name]:
            if len(labels):
                with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
                    scores = model(inputs)
                evaluation.update(scores.float(), labels)
        return evaluation.reduce(self.processes.sum).summary(curve)

    def _shown(self) -> dict[str, str]:
        """Beside the progress bar: how the last epoch went."""
        last = self.epochs[-1]
        held_out = last.get("validation", last)
        shown = {"loss": f"{last['training']['loss']:.3g}"}
        return shown | {f"top-{k}": f"{held_out[f'top{k}']:.1%}" for k in (1, 5) if f"top{k}" in held_out}

    # --- what the loop is made of ---

    def _batches(self, split: Split, *, training: bool) -> Epochs:
        settings, ranks, rows = self.settings, self.processes.count, len(split.labels)
        images = split.inputs.ndim == 4
        if training and (settings["batch"] % ranks or rows < ranks):
            raise ValueError(f"training.batch must be a multiple of the {ranks} processes, got {settings['batch']}")
        if training and not rows:
            raise ValueError("data must have training rows, got none")
        augment = Augment(settings["crop"], settings["flip"], settings["cutout"]) if training and images else None
        return batches_of(
            split,
            settings["batch"] // ranks if training else max(settings["batch"] // ranks, _EVALUATED_AT_ONCE),
            mean=self.data.mean if images else (),
            std=self.data.std if images else (),
            device=self.device,
            shuffle=training,
            augment=augment,
            seed=self._stream("data", rank=0) if training else 0,
            drop_last=training and rows >= settings["batch"],
            channels_last=self.channels_last,
            rank=self.processes.rank,
            ranks=ranks,
        )

    def choose_precision(self) -> None:
        """Decides on bf16. Several processes on a CPU stay with float32: a probe by one would wait for the others."""
        self.bf16 = self.settings["precision"] == "bf16"
        if self.settings["precision"] != "auto" or self.data.train.inputs.ndim != 4:
            return
        self.bf16 = self.device.type == "cuda"
        if self.device.type == "cpu" and self.processes.count == 1:
            height, width, channels = self.data.train.inputs.shape[1:]
            inputs = torch.rand(min(_PROBED, self.batches.batch), channels, height, width)
            layout = torch.channels_last if self.channels_last else torch.contiguous_format
            name = json.dumps(self.config["model"], sort_keys=True)
            self.bf16 = faster_in_bf16(self.model, inputs.to(memory_format=layout), name)

    def seconds_an_epoch(self) -> float:
        """From a few steps and a few evaluated batches; nothing of the run is worth keeping afterwards."""
        self.network.train()
        training = _pace(self.batches, self._step, self.device)
        self.model.eval()
        held_out = self.held_out.get("validation", self.held_out.get("test"))
        if held_out is None:
            return training * len(self.batches)
        with torch.no_grad(), torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            evaluating = _pace(held_out, lambda inputs, labels: self.model(inputs), self.device)
        return training * len(self.batches) + evaluating * len(held_out)

    def _stream(self, name: str, rank: int | None = None) -> int:
        """The seed of a stream at this step on a process, this one or that of the rank."""
        text = f"{self.config['seed']} {name} {self.step} {self.processes.rank if rank is None else rank}"
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest())

    def _seed(self, name: str) -> None:
        """Torch's own generators, which initialisation and dropout draw from."""
        torch.default_generator.manual_seed(self._stream(name))
        if self.device.type == "cuda":
            torch.cuda.default_generators[self.device.index or 0].manual_seed(self._stream(name))

    def _identity(self) -> str:
        text = json.dumps([self.config, self.data.fingerprint], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def _save(self, folder: Path | None) -> None:
        if folder is None or not self.processes.first:
            return
        self._check_losses()
        state = {name: getattr(self, name).state_dict() for name in ("model", "optimizer", "loss", "batches", "meter")}
        state |= {name: getattr(self, name) for name in ("step", "seconds", "epochs", "bf16", "losses")}
        state["average"] = None if self.average is None else self.average.model.state_dict()
        checkpoints.write(folder, state, self._identity())
        checkpoints.write_log(folder, self.epochs)

    def _restore(self, folder: Path | None) -> bool:
        """Goes on from the folder's checkpoint, if there is one."""
        found = checkpoints.read(folder, self._identity()) if folder is not None and self.processes.first else None
        state = self.processes.same(found)
        if state is None:
            return False
        for name in ("model", "optimizer", "loss", "batches", "meter"):
            getattr(self, name).load_state_dict(state[name])
        if self.average is not None:
            self.average.model.load_state_dict(state["average"])
        for name in ("step", "seconds", "epochs", "bf16"):
            setattr(self, name, state[name])
        self.losses.copy_(state["losses"])
        return True


def _pace(batches: Epochs, work: Callable[[Tensor, Tensor], object], device: torch.device) -> float:
    """Seconds a batch: the fastest of a few, after two that set things up, in `_PACED` seconds at most."""
    times: list[float] = []
    began = time.monotonic()
    for number, (inputs, labels) in enumerate(batches):
        work(inputs, labels)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.monotonic() - began - sum(times))
        if number >= 3 and sum(times) > _PACED:
            break
    return float(statistics.median(times[2:] or times))


def _load(config: Mapping[str, Any], data: DataSet | None) -> DataSet:
    if data is not None:
        return data
    from topk.lab.data import load

    return load(config["data"])


def _gpus(device: torch.device) -> list[torch.device]:
    """Those whose random numbers a run uses, and gives back as they were."""
    return [device] if device.type == "cuda" else []
