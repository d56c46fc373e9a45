"""What ``auto`` is on this machine: measured before a run's first step (ours).

Each choice is tried on steps of the run's own model, in turns with the best setting so far, so that a machine that slows down
slows both; a change must pay. How many readers keep up with such steps follows from the time that an image takes to read.
"""

import math
import platform
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from statistics import mean, median
from typing import Any, TypeVar

import psutil
import torch
from torch import nn
from torch.optim import Optimizer

from leanmim.config.base import Computing
from leanmim.device import bf16_in_hardware, cores_of_a_process, cpus, device_name, resolve_precision, threads_given
from leanmim.errors import UserError
from leanmim.processes import Process
from leanmim.progress import console_of, working
from leanmim.step import align_state

ROUNDS = 3  # in which two settings take turns
TARGET = 0.5  # s of a step, which sets its images
IMAGES = {"cpu": 16, "cuda": 256, "mps": 64}  # of a step at most, where they fit
GAIN = {"threads": 1.1, "precision": 1.1, "channels_last": 1.03, "compile": 1.05, "cuda_graph": 1.05}
"""How many times as fast a change must be. Fewer threads lose once other programs end, half precision is less exact, and
compiled steps start late."""
WITHOUT = {"compile": "not compiled", "cuda_graph": "no CUDA graph"}
FAILS_WELL = torch.__version__ >= "2.13"  # earlier ones draw no more random numbers where a recording failed
LONG = 1200.0
"""Seconds of a run on a GPU, from which on compilation is tried, which takes about one minute. On a CPU it is not tried."""
READ = 9  # images, to time that
SPARE = 1.25  # times the readers that keep up on average
Configured = TypeVar("Configured", bound=Computing)


@dataclass(frozen=True)
class Setting:
    """How a run computes. Another setting gives the same results but for rounding."""

    precision: str
    threads: int
    """Of each process that computes, on its CPU."""
    workers: int
    """Processes that read images, for each that computes."""
    channels_last: bool
    """Weights and activations of convolutions with their channels side by side in memory."""
    compile: bool
    cuda_graph: bool = False
    """Whether a step is recorded and repeated."""


NAMES = tuple(field.name for field in fields(Setting))


class Trial(ABC):
    """A model to try settings on.

    Args:
        model: on the device.
        optimizers: of its parameters.
        device: where it computes.
        most: images of a step, at most.
    """

    def __init__(self, model: nn.Module, optimizers: list[Optimizer], device: torch.device, most: int) -> None:
        self.model, self.optimizers, self.device, self.most = model, optimizers, device, most
        self.compiled = self.graphed = False

    def use(self, setting: Setting) -> None:
        """Compute so from now on; what is compiled stays so."""
        torch.set_num_threads(setting.threads)
        self.autocast(resolve_precision(setting.precision, self.device))
        self.model.to(memory_format=torch.channels_last if setting.channels_last else torch.contiguous_format)
        align_state(self.optimizers)
        if setting.compile and not self.compiled:
            self.compile()
            self.compiled = True
        self.graphed = setting.cuda_graph

    @abstractmethod
    def autocast(self, dtype: torch.dtype | None) -> None:
        """Run the forward pass in this precision; None is float32."""

    @abstractmethod
    def compile(self) -> None:
        """Compile what a run compiles."""

    @abstractmethod
    def step(self, images: int) -> None:
        """Forward, backward and update on so many images of noise; wait for the device."""


@dataclass
class Calibration:
    """A setting, where it was measured, and what was tried."""

    setting: Setting
    machine: dict[str, Any]
    tried: list[dict[str, Any]]
    """Values that took turns, images/s of each."""
    read_seconds: float | None = None
    """To read an image, in one process; None if it was not measured."""

    def applied(self, config: Configured) -> Configured:
        """The configuration with a value in place of every ``auto``."""
        return replace(config, **{name: value for name, value in asdict(self.setting).items() if hasattr(config, name)})

    def withdrawn(self, config: Configured, asked: Configured) -> Configured:
        """The configuration with ``auto`` where it was asked for: so it is stored, for another machine measures anew."""
        return replace(config, **{name: getattr(asked, name) for name in NAMES if hasattr(config, name)})

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Compute with these threads."""
        with threads_restored():
            torch.set_num_threads(self.setting.threads)
            yield

    def to_json(self) -> dict[str, Any]:
        """For environment.json."""
        return asdict(self)

    def __str__(self) -> str:
        """The setting, and what was measured for it."""
        own = self.setting
        counts = ((own.threads, "thread"), (own.workers, "reader"))
        words = [own.precision, *(f"{count} {what}{'s' * (count != 1)}" for count, what in counts)]
        switches = {"channels last": own.channels_last, "compiled": own.compile, "as a CUDA graph": own.cuda_graph}
        words += [word for word, on in switches.items() if on]
        lines = [
            f"{one['choice'].replace('_', ' ')} "
            + ", ".join(f"{value} {speed:.3g}" for value, speed in one["images_per_second"].items())
            for one in self.tried
        ]
        if self.read_seconds is not None:
            lines.append(f"an image is read in {1e3 * self.read_seconds:.2g} ms")
        return f"computing: {', '.join(words)}" + (f"; measured, images/s: {'; '.join(lines)}" if lines else "")


@contextmanager
def threads_restored() -> Iterator[None]:
    """Afterwards torch computes with as many threads as before."""
    before = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(before)


def this_machine(device: torch.device, process: Process) -> dict[str, Any]:
    """What must be the same for a calibration to be used again."""
    return {
        "device": device_name(device),
        "cpu": platform.processor() or platform.machine(),
        "cpus": cpus(),
        "processes": process.world,
        "torch": torch.__version__,
    }


def given(config: Computing) -> dict[str, Any]:
    """The choices that are not ``auto``."""
    values = {name: value for name in NAMES if (value := getattr(config, name, "auto")) not in ("auto", -1)}
    if "threads" not in values and threads_given():
        values["threads"] = torch.get_num_threads()
    return values


def kept(stored: Any, machine: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """The choices of an earlier call of the same run: on the same machine all of them, on another one the precision, where that
    does not compute it in software.
    """
    try:
        found = Setting(**stored["setting"])
        Computing(**{name: value for name, value in asdict(found).items() if hasattr(Computing, name)}).check()
        same = stored["machine"] == machine
    except (TypeError, KeyError, UserError):  # of a version without calibration, or damaged
        return {}
    if same:
        return asdict(found)
    return {} if found.precision == "bf16" and not bf16_in_hardware(device) else {"precision": found.precision}


def calibrate(
    config: Computing,
    stored: Any,
    backbone: nn.Module,
    make_trial: Callable[[], Trial],
    read_one: Callable[[], object],
    seconds: Callable[[float], float],
    process: Process,
    device: torch.device,
) -> Calibration:
    """Values in place of every ``auto`` of the machine, alike in all processes.

    Args:
        config: what is given stays.
        stored: the calibration of an earlier call of the same run, as it is in environment.json; None if there is none.
        backbone: of the run, with or without memory.
        make_trial: a fresh model.
        read_one: reads an image as the run does, another one with every call.
        seconds: from images/s of this process to what the whole run takes.
        process: this one among all; all must call this.
        device: where to compute.
    """
    machine = this_machine(device, process)
    asked = given(config)
    fixed = {**process.gather(kept(stored, machine, device))[0], **asked}
    refused: str = getattr(config, "not_recorded", "the command")
    if "cuda_graph" not in asked and (refused or not FAILS_WELL):
        fixed["cuda_graph"] = False
    begin = Setting(**{**first_guess(device), **fixed})
    calibration = Calibration(begin, machine, [])
    measures = not config.deterministic  # a measurement may end otherwise the next time
    choices = [(name, values) for name, values in alternatives(backbone, device) if values and name not in fixed]
    choices = choices if measures else []
    # in several processes one whose compilation fails would leave the others waiting
    alone = measures and device.type == "cuda" and process.world == 1
    compiles = alone and "compile" not in fixed
    records = alone and "cuda_graph" not in fixed
    if not (choices or compiles or records) and "workers" in fixed:
        return calibration
    console = console_of(stderr=True)
    with working("measuring what suits this machine"), torch.random.fork_rng(), threads_restored():
        trial = make_trial()
        turns = Turns(trial, begin, process)
        for choice, values in choices:
            choose(calibration, turns, choice, values)
        speed = turns.images / turns.seconds(calibration.setting)
        tried = {"compile": compiles and seconds(speed) > LONG, "cuda_graph": records}
        for choice in (name for name, wanted in tried.items() if wanted):
            if trial.compiled and not calibration.setting.compile:  # which is not undone
                trial = turns.trial = make_trial()
            try:
                choose(calibration, turns, choice, [True])
            except (RuntimeError, UserError) as error:  # as all that torch.compile raises, and CUDA
                console.print(f"{WITHOUT[choice]}, which failed: {str(error).strip().partition(chr(10))[0]}")
        if "workers" not in fixed:
            calibration.read_seconds = max(process.gather(seconds_to_read(read_one)))
            calibration.setting = replace(calibration.setting, workers=readers(calibration.read_seconds * speed))
    return calibration


def first_guess(device: torch.device) -> dict[str, Any]:
    """A setting to begin with; on a GPU its precision is no matter of measurement."""
    half = device.type == "cuda" and bf16_in_hardware(device)
    return {
        "precision": "bf16" if half else "fp32",
        "threads": torch.get_num_threads(),
        "workers": 0,
        "channels_last": False,
        "compile": False,
    }


def alternatives(backbone: nn.Module, device: torch.device) -> Iterator[tuple[str, list[Any]]]:
    """What else could be faster on this machine, and with this model."""
    if device.type == "cpu":
        most, cores = torch.get_num_threads(), psutil.cpu_count(logical=False) or 1
        yield "threads", sorted({min(most, cores), max(1, most // 2)} - {most}, reverse=True)
        if bf16_in_hardware(device):
            yield "precision", ["bf16"]
    if any(isinstance(layer, nn.Conv2d) and layer.kernel_size != layer.stride for layer in backbone.modules()):
        yield "channels_last", [True]


class Turns:
    """Steps of a trial under two settings in turns.

    Args:
        trial: whose steps.
        setting: to find the images of a step with.
        process: this one among all; the times are means over all.
    """

    def __init__(self, trial: Trial, setting: Setting, process: Process) -> None:
        self.trial, self.process, self.images = trial, process, min(2, trial.most)
        self.seconds(setting)  # the first step chooses kernels
        self.images = max(self.images, min(trial.most, int(TARGET * self.images / self.seconds(setting))))
        self.seconds(setting)

    def seconds(self, setting: Setting) -> float:
        """Of a step."""
        self.trial.use(setting)
        before = time.perf_counter()
        self.trial.step(self.images)
        return mean(self.process.gather(time.perf_counter() - before))

    def of_both(self, one: Setting, other: Setting) -> tuple[float, float]:
        """Seconds of a step of each; in turns, unless the other one is compiled, which is not undone."""
        if other.compile and not one.compile:
            plain = [self.seconds(one) for _ in range(ROUNDS)]
            self.seconds(other)  # compiles
            return median(plain), median(self.seconds(other) for _ in range(ROUNDS))
        self.seconds(other)
        pairs = [(self.seconds(one), self.seconds(other)) for _ in range(ROUNDS)]
        return median(first for first, _ in pairs), median(second for _, second in pairs)


def choose(calibration: Calibration, turns: Turns, choice: str, values: list[Any]) -> None:
    """Take what is faster, and note the speeds."""
    speeds: dict[str, float] = {}
    for value in values:
        best = calibration.setting
        now, then = turns.of_both(best, replace(best, **{choice: value}))
        speeds.setdefault(str(getattr(best, choice)), turns.images / now)
        speeds[str(value)] = turns.images / then
        if now / then > GAIN[choice]:
            calibration.setting = replace(best, **{choice: value})
    chosen = getattr(calibration.setting, choice)
    calibration.tried.append({"choice": choice, "chosen": chosen, "images_per_second": speeds})


def seconds_to_read(read_one: Callable[[], object]) -> float:
    """Of an image."""
    times = []
    for _ in range(READ):
        before = time.perf_counter()
        read_one()
        times.append(time.perf_counter() - before)
    return median(times)


def readers(needed: float) -> int:
    """So many that they keep up with ``needed`` images read at a time, but a core is left for each process that computes."""
    return min(cores_of_a_process() - 1, math.ceil(SPARE * needed))
