"""What a device can do, in figures, and how long a piece of work takes by them.

A roofline: work takes as long as the slower of moving its bytes and doing its operations, in calls of libraries a part
of the faster too, and a fixed time to start it.
The figures are what well-written kernels reach, not what data sheets promise. They are a versioned input of every plan
that depends on them (`DeviceFigures.version`); `DEFAULTS` holds those of known devices, `memplan.calibration` measures
them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from enum import Enum
from types import MappingProxyType

#: Changes whenever the meaning of a figure does, so that figures stored by another version are measured again.
VERSION = 3
#: Part of what is done faster that does not hide behind what is done slower, where both moving and computing take long.
_EXPOSED = 0.5
#: Convolutions without matrix units, by the rate of pointwise kernels: of groups of few channels, and of few channels
#: in all. Both were read off profiles of EfficientNet-B3, ResNet-50 and ViT-L/16 (cuDNN on an H200, bfloat16).
_DEPTHWISE, _NARROW = 0.45, 1.4


class Unit(Enum):
    """What part of the device does the operations of a piece of work."""

    PRODUCT = "product"  # matrix products
    ATTENTION = "attention"
    CONVOLUTION = "convolution"
    DEPTHWISE = "depthwise"  # convolutions in groups of too few channels for matrix units
    NARROW = "narrow"  # convolutions of too few channels
    SCALAR = "scalar"  # everything else


@dataclass(frozen=True, slots=True)
class Work:
    """One kernel or call: bytes that it moves to and from memory, floating point operations, and the unit that does
    them. ``itemsize``: bytes of an element of its factors. ``launches``: kernels that it is made of."""

    nbytes: int
    operations: int = 0
    unit: Unit = Unit.SCALAR
    itemsize: int = 4
    launches: int = 1


@dataclass(frozen=True, slots=True)
class DeviceFigures:
    """Figures of one device, all per microsecond.

    Attributes
    ----------
    bandwidth:
        Bytes read or written.
    half, single, double:
        Operations of matrix products with factors of 2 bytes, 4 bytes (TF32 where it is allowed is not counted) and 8.
    attention, convolution:
        Part of a product's rate that these reach.
    scalar:
        Operations of pointwise and reduction kernels.
    launch:
        Microseconds that starting one kernel takes where nothing hides it.
    host_bandwidth:
        Bytes copied to or from pinned memory of the host.
    """

    name: str
    bandwidth: float
    half: float
    single: float
    double: float
    scalar: float
    launch: float
    attention: float = 0.45
    convolution: float = 0.9
    host_bandwidth: float = 0.0
    version: int = VERSION

    def __post_init__(self) -> None:
        for f in fields(self):
            value = getattr(self, f.name)
            if f.name not in ("name", "version", "launch", "host_bandwidth") and not 0 < value < float("inf"):
                raise ValueError(f"figure {f.name!r} of {self.name!r} is {value!r}, not a positive number")

    def microseconds(self, work: Work) -> float:
        """How long the work takes."""
        return self.launch * work.launches + self.streaming(work)

    def streaming(self, work: Work) -> float:
        """`microseconds` without the launches."""
        moving, computing = work.nbytes / self.bandwidth, work.operations / self.rate(work.unit, work.itemsize)
        exposed = 0.0 if work.unit is Unit.SCALAR else _EXPOSED * min(moving, computing)
        return max(moving, computing) + exposed

    def rate(self, unit: Unit, itemsize: int) -> float:
        """Operations per microsecond of a unit, for factors of that many bytes."""
        product = self.half if itemsize <= 2 else self.single if itemsize <= 4 else self.double
        match unit:
            case Unit.PRODUCT:
                return product
            case Unit.ATTENTION:
                return product * self.attention
            case Unit.CONVOLUTION:
                return product * self.convolution
            case Unit.DEPTHWISE:
                return self.scalar * _DEPTHWISE
            case Unit.NARROW:
                return min(self.scalar * _NARROW, product * self.convolution)
            case Unit.SCALAR:
                return self.scalar

    def as_dict(self) -> dict[str, str | float | int]:
        """Plain data, as stored."""
        return asdict(self)


def figures_from(data: Mapping[str, object]) -> DeviceFigures | None:
    """Stored figures; None if they are of another version or not figures at all."""
    names = {f.name for f in fields(DeviceFigures)}
    if data.get("version") != VERSION or set(data) != names or not isinstance(data["name"], str):
        return None
    numbers = {k: v for k, v in data.items() if k != "name"}
    if any(isinstance(v, bool) or not isinstance(v, (int, float)) for v in numbers.values()):
        return None
    try:
        return DeviceFigures(name=data["name"], **numbers)  # type: ignore[arg-type]
    except ValueError:
        return None


# Bandwidths are about 0.87 of the data sheets', dense matrix rates 0.65 to 0.85.
_KNOWN = (
    DeviceFigures("H100", 2.9e6, 8.0e8, 4.8e7, 4.5e7, 2.5e7, 3.0, host_bandwidth=5.0e4),
    DeviceFigures("H200", 4.1e6, 8.2e8, 4.8e7, 4.5e7, 2.5e7, 3.0, host_bandwidth=5.0e4),
    DeviceFigures("A100", 1.7e6, 2.4e8, 1.8e7, 1.7e7, 1.2e7, 3.5, host_bandwidth=2.2e4),
)
#: One of a desktop's or server's few cores; what differs most from machine to machine, so it is worth calibrating.
CPU = DeviceFigures("cpu", 1.2e4, 8.0e4, 8.0e4, 4.0e4, 2.0e4, 3.0, attention=0.5, convolution=0.6)
DEFAULTS: Mapping[str, DeviceFigures] = MappingProxyType({f.name: f for f in (*_KNOWN, CPU)})
#: Figures of a GPU that is not known.
UNKNOWN_GPU = "A100"


def default_figures(device_name: str) -> DeviceFigures:
    """Figures for ``"cpu"`` or a GPU by its name, such as ``"NVIDIA H100 80GB HBM3"``."""
    if device_name == "cpu":
        return CPU
    for name, figures in DEFAULTS.items():
        if name in device_name:
            return figures
    return DEFAULTS[UNKNOWN_GPU]
