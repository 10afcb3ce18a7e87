"""Two models by name, fetched and loaded when they are needed, and then kept."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from calibrate.pairs.registry import REGISTRY, PairSpec, cached, load_pair, pull, resolve_pair
from calibrate.run.machine import num_cores, threads_told
from calibrate.run.options import check_decoding
from calibrate.run.records import GivenModels
from calibrate.run.watch import Watch

if TYPE_CHECKING:
    from calibrate.pairs.registry import LoadedPair
    from calibrate.run.records import CalibrationRecord

DEFAULT_PAIR = "smollm2"


@dataclass
class Models:
    """A device model and a server model, loaded once and shared by the calls that are given it.

    Parameters
    ----------
    pair : str, optional
        Name of a pair that needs no more; the demonstration pair if nothing is named at all.
    slm, llm : str, optional
        Own device and server model: folder, .gguf file or hub id.
    drop_layers : str, optional
        Layers to leave out of the device model, like "21,22".
    device : str
        auto, cpu, mps, cuda or cuda:N.
    dtype : str
        auto, bfloat16 or float32.
    num_threads : int, optional
        Processor threads; torch's own choice if not given.

    Raises
    ------
    UsageError
        If the names contradict each other or name what does not exist. Nothing is fetched yet.
    """

    pair: str | None = None
    slm: str | None = None
    llm: str | None = None
    drop_layers: str | None = None
    device: str = "auto"
    dtype: str = "auto"
    num_threads: int | None = None
    _loaded: LoadedPair | None = field(default=None, init=False, repr=False, compare=False)
    _attention: bool = field(default=False, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_decoding(device=self.device, dtype=self.dtype, num_threads=self.num_threads)
        if self.pair is None and self.slm is None and self.llm is None:
            self.pair = DEFAULT_PAIR
        self.spec: PairSpec = resolve_pair(self.pair, self.slm, self.llm, self.drop_layers)

    @classmethod
    def of_run(
        cls, calibration: CalibrationRecord, device: str = "auto", num_threads: int | None = None
    ) -> Models:
        """Those that a run was calibrated with, in the same arithmetic."""
        name, given = calibration.settings.pair, calibration.settings.given
        named = name in REGISTRY
        return cls(
            name if named else None, given.slm, given.llm, given.drop_layers, device,
            calibration.pair.dtype, num_threads,
        )  # fmt: skip

    @property
    def given(self) -> GivenModels:
        """As a rerun from another folder finds them; hub ids stay as they are."""
        slm, llm = (absolute(model) for model in (self.slm, self.llm))
        return GivenModels(slm=slm, llm=llm, drop_layers=self.drop_layers)

    def fetch(self, watch: Watch | None = None) -> None:
        """Fetch and convert what the cache lacks.

        Raises
        ------
        UserError
            With what was tried and the way out.
        """
        watch = watch or Watch()
        if not cached(self.spec):
            watch.say(f"fetching {self.spec.name} (once)")
            pull(self.spec, watch.transfer)

    def load(self, attention: bool, watch: Watch | None = None) -> LoadedPair:
        """The pair in memory, able to show its attention if that is asked for."""
        watch = watch or Watch()
        if self._loaded is None or (attention and not self._attention):
            use_threads(self.num_threads)
            self.fetch(watch)
            watch.say(f"loading {self.spec.name}")
            self._loaded = load_pair(
                self.spec, dtype=self.dtype, device=self.device, attention=attention
            )
            self._attention = attention
        return self._loaded


def use_threads(num_threads: int | None) -> None:
    """Let models use so many processor threads.

    If not given, torch's own choice stands, or what the system was told (OMP_NUM_THREADS), but not
    more than the cores that this process may keep busy: more threads than those wait in turn.
    """
    import torch

    if num_threads is not None:
        torch.set_num_threads(num_threads)
    elif threads_told() is None and num_cores() < torch.get_num_threads():
        torch.set_num_threads(num_cores())


def absolute(model: str | None) -> str | None:
    """A path by its full name, where it is one; anything else as it is."""
    return str(Path(model).resolve()) if model is not None and Path(model).exists() else model
