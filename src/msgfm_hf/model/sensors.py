"""What a sensor is: its bands, units, plausible range and statistics.

Everything the package knows about a sensor is data in this file, and travels inside the configuration of a checkpoint
(`MsGFMConfig.sensors`), so a new sensor never needs a new line of code.

Units: `dn` (stored digital numbers, physical = (dn + offset) * scale), `reflectance` (0..1), `power` (linear
backscatter), `amplitude` (its square root), `db` (10 log10 power), `metres`.
"""

import dataclasses
import difflib
import re
from dataclasses import dataclass, field

UNITS = ("dn", "reflectance", "power", "amplitude", "db", "metres")
# Units that can be turned into the unit a sensor's statistics are in.
CONVERTIBLE_UNITS = {
    "reflectance": ("dn", "reflectance"),
    "db": ("dn", "power", "amplitude", "db"),
    "metres": ("dn", "metres"),
}


@dataclass(frozen=True)
class BandSpec:
    """One band of a sensor.

    Args:
        name (`str`): canonical name, e.g. `B02`, `VV`, `red`.
        mean, std (`float`): statistics in the sensor's `unit`, after clipping.
        clip (`tuple[float, float]`, *optional*): plausible range in the sensor's `unit`; values are clipped to it.
        wavelength (`float`, *optional*): centre wavelength in nanometres.
        gsd (`float`, *optional*): native ground sampling distance in metres.
        aliases (`tuple[str, ...]`): other names found in files and catalogues, matched without case.
        levels (`dict[str, tuple[float, float]]`): `(mean, std)` per processing level, where levels differ. A sensor
            with levels lists here every level in which the band exists.
    """

    name: str
    mean: float
    std: float
    clip: tuple[float, float] | None = None
    wavelength: float | None = None
    gsd: float | None = None
    aliases: tuple[str, ...] = ()
    levels: dict[str, tuple[float, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class SensorSpec:
    """A sensor: named bands in one physical unit.

    Args:
        id (`str`): matches `[a-z][a-z0-9_]*`.
        bands (`tuple[BandSpec, ...]`): in canonical order.
        unit (`str`): the unit of `clip`, `mean` and `std`: `reflectance`, `db` or `metres`.
        default_unit (`str`): the unit an array has when the caller names none.
        scale (`float`, *optional*): physical = (dn + offset) * scale, where the unit is `dn`.
        offset (`float`, *optional*): the offset in digital numbers; `None` means that it differs between products and
            must be given (Sentinel-2: 0, or -1000 since processing baseline 04.00).
        levels (`tuple[str, ...]`): processing levels with statistics of their own; the first is the default.
        reference (`str`, *optional*): `window` if a reference height is subtracted before normalising (elevation).
        source (`str`): where the statistics come from.

    Raises:
        ValueError: if the id, a unit, a name or a statistic is not usable.
    """

    id: str
    bands: tuple[BandSpec, ...]
    unit: str
    default_unit: str
    scale: float | None = None
    offset: float | None = 0.0
    levels: tuple[str, ...] = ()
    reference: str | None = None
    source: str = ""

    def __post_init__(self):
        if not re.fullmatch(r"[a-z][a-z0-9_]*", self.id):
            raise ValueError(f"`id` of a sensor must match [a-z][a-z0-9_]*, got {self.id!r}. Use lower case and '_'.")
        if self.unit not in CONVERTIBLE_UNITS:
            raise ValueError(
                f"`unit` of sensor {self.id!r} must be one of {', '.join(CONVERTIBLE_UNITS)}, got {self.unit!r}. "
                "Statistics are kept in physical units; `dn` belongs in `default_unit`."
            )
        if self.default_unit not in CONVERTIBLE_UNITS[self.unit]:
            raise ValueError(
                f"`default_unit` of sensor {self.id!r} must be one of {', '.join(CONVERTIBLE_UNITS[self.unit])}, "
                f"got {self.default_unit!r}. Only these can be converted to {self.unit!r}."
            )
        if not self.bands:
            raise ValueError(f"`bands` of sensor {self.id!r} must not be empty, got {self.bands!r}. Name its bands.")
        names = [band.name for band in self.bands]
        if len(set(names)) != len(names):
            raise ValueError(f"`bands` of sensor {self.id!r} must have different names, got {names}. Rename one.")
        for band in self.bands:
            if not band.std > 0:
                raise ValueError(
                    f"`std` of band {band.name!r} of sensor {self.id!r} must be above 0, got {band.std}. "
                    "A constant band carries no information: leave it out."
                )
        if self.reference not in (None, "window"):
            raise ValueError(
                f"`reference` of sensor {self.id!r} must be None or 'window', got {self.reference!r}. "
                "Other references are given when the data is preprocessed."
            )

    @property
    def band_names(self) -> list[str]:
        return [band.name for band in self.bands]

    def resolve(self, name: str) -> str:
        """The canonical name of a band, from a name or an alias of this sensor, without case.

        Raises:
            ValueError: if this sensor has no such band; the message lists those it has.
        """
        wanted = str(name).strip().lower()
        for band in self.bands:
            if wanted == band.name.lower():
                return band.name
        for band in self.bands:
            if wanted in (alias.lower() for alias in band.aliases):
                return band.name
        near = difflib.get_close_matches(str(name), self.band_names, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(
            f"`bands` of sensor {self.id!r} must be among {', '.join(self.band_names)}, got {name!r}.{hint} "
            "Aliases such as common names are known too; a new sensor is a `SensorSpec`."
        )

    def select(self, bands: list[str] | tuple[str, ...] | None = None) -> list[BandSpec]:
        """The named bands (all of them for `None`) in the order given, each once.

        Raises:
            ValueError: for an unknown band, one named twice, or a bare string.
        """
        if bands is None:
            return list(self.bands)
        if isinstance(bands, str):
            raise ValueError(f"`bands` of sensor {self.id!r} must be a list of names, got {bands!r}. Use [{bands!r}].")
        names = [self.resolve(name) for name in bands]
        if len(set(names)) != len(names):
            raise ValueError(f"`bands` of sensor {self.id!r} must name each band once, got {list(bands)}. Drop one.")
        by_name = {band.name: band for band in self.bands}
        return [by_name[name] for name in names]

    def index(self, bands: list[str] | tuple[str, ...] | None) -> list[int]:
        """Positions of the named bands in the sensor's canonical order: the kernel slices of the model."""
        names = self.band_names
        return [names.index(band.name) for band in self.select(bands)]

    def statistics(self, bands=None, level: str | None = None) -> tuple[list[float], list[float]]:
        """Mean and standard deviation of the named bands, in the sensor's `unit`.

        Raises:
            ValueError: for an unknown level, or a band that does not exist in it.
        """
        level = self.check_level(level)
        mean, std = [], []
        for band in self.select(bands):
            if level is None:
                values = (band.mean, band.std)
            elif level in band.levels:
                values = band.levels[level]
            else:
                raise ValueError(
                    f"`bands` of sensor {self.id!r} must exist in level {level!r}, got {band.name!r}. "
                    "Leave the band out or name the level of the product with `level=`."
                )
            mean.append(values[0])
            std.append(values[1])
        return mean, std

    def check_level(self, level: str | None) -> str | None:
        """The level to use: the default for `None`.

        Raises:
            ValueError: if the sensor has no such level.
        """
        if level is None:
            return self.levels[0] if self.levels else None
        if level not in self.levels:
            known = ", ".join(self.levels) or "none (this sensor has no levels)"
            raise ValueError(f"`level` of sensor {self.id!r} must be one of {known}, got {level!r}. Correct the level.")
        return level

    def to_dict(self) -> dict:
        """A JSON-able dictionary; `SensorSpec.from_dict` is its inverse."""
        spec = dataclasses.asdict(self)
        spec["levels"] = list(self.levels)
        spec["bands"] = [
            {
                **band,
                "clip": None if band["clip"] is None else list(band["clip"]),
                "aliases": list(band["aliases"]),
                "levels": {level: list(values) for level, values in sorted(band["levels"].items())},
            }
            for band in spec["bands"]
        ]
        return spec

    @classmethod
    def from_dict(cls, spec: dict) -> "SensorSpec":
        """Rebuild a sensor from `to_dict`.

        Raises:
            ValueError: for unknown or missing entries.
        """
        spec = dict(spec)
        bands = tuple(
            _build(
                BandSpec,
                {
                    **band,
                    "clip": None if band.get("clip") is None else tuple(band["clip"]),
                    "aliases": tuple(band.get("aliases", ())),
                    "levels": {level: tuple(values) for level, values in band.get("levels", {}).items()},
                },
            )
            for band in spec.pop("bands", ())
        )
        return _build(cls, {**spec, "levels": tuple(spec.get("levels", ())), "bands": bands})


def _build(cls, entries: dict):
    known = {entry.name: entry for entry in dataclasses.fields(cls)}
    unknown = sorted(set(entries) - set(known))
    if unknown:
        raise ValueError(f"`{cls.__name__}` has the entries {', '.join(known)}, got {', '.join(unknown)}. Remove them.")
    missing = sorted(
        name
        for name, entry in known.items()
        if entry.default is dataclasses.MISSING and entry.default_factory is dataclasses.MISSING and name not in entries
    )
    if missing:
        raise ValueError(f"`{cls.__name__}` needs the entries {', '.join(missing)}, got {sorted(entries)}. Add them.")
    return cls(**entries)


# SSL4EO-S12 v1 statistics in digital numbers without offset (docs of torchgeo and of the data set), as reflectance.
def _s2_band(name, wavelength, gsd, aliases, l1c, l2a=None):
    levels = {"l1c": (l1c[0] / 1e4, l1c[1] / 1e4)}
    if l2a is not None:
        levels["l2a"] = (l2a[0] / 1e4, l2a[1] / 1e4)
    mean, std = levels["l1c"]
    return BandSpec(name, mean, std, (0.0, 1.0), wavelength, gsd, aliases, levels)


_S2 = SensorSpec(
    id="s2",
    bands=(
        _s2_band("B01", 443, 60, ("B1", "coastal", "aerosol"), (1605.575, 786.787), (752.401, 1108.029)),
        _s2_band("B02", 490, 10, ("B2", "blue"), (1390.782, 850.348), (884.297, 1155.152)),
        _s2_band("B03", 560, 10, ("B3", "green"), (1314.873, 875.065), (1144.162, 1183.629)),
        _s2_band("B04", 665, 10, ("B4", "red"), (1363.524, 1138.850), (1297.473, 1368.114)),
        _s2_band("B05", 705, 20, ("B5", "rededge071", "rededge1", "re1"), (1549.444, 1122.178), (1624.910, 1370.265)),
        _s2_band("B06", 740, 20, ("B6", "rededge075", "rededge2", "re2"), (2091.749, 1161.592), (2194.642, 1355.554)),
        _s2_band("B07", 783, 20, ("B7", "rededge078", "rededge3", "re3"), (2371.717, 1274.392), (2422.212, 1416.515)),
        _s2_band("B08", 842, 10, ("B8", "nir"), (2299.905, 1248.429), (2517.761, 1474.789)),
        _s2_band("B8A", 865, 20, ("B08A", "nir08", "nir2", "re4"), (2560.295, 1345.527), (2581.647, 1439.309)),
        _s2_band("B09", 945, 60, ("B9", "nir09", "water_vapour"), (830.066, 577.316), (2645.519, 1582.280)),
        _s2_band("B10", 1375, 60, ("cirrus",), (22.104, 51.154)),
        _s2_band("B11", 1610, 20, ("swir16", "swir1"), (2177.072, 1336.099), (2368.512, 1455.521)),
        _s2_band("B12", 2190, 20, ("swir22", "swir2"), (1524.065, 1136.538), (1805.068, 1343.484)),
    ),
    unit="reflectance",
    default_unit="dn",
    scale=1e-4,
    offset=None,
    levels=("l1c", "l2a"),
    source="SSL4EO-S12 v1, Sentinel-2 L1C and L2A, digital numbers without offset",
)

_S1 = SensorSpec(
    id="s1",
    bands=(
        BandSpec("VV", -11.76858, 4.525339, (-25.0, 0.0), None, 10, ("VV_dB", "sigma0_vv", "gamma0_vv")),
        BandSpec("VH", -18.294598, 4.3586307, (-32.5, 0.0), None, 10, ("VH_dB", "sigma0_vh", "gamma0_vh")),
    ),
    unit="db",
    default_unit="db",
    scale=1.0,
    source="SEN12MS training list, after clipping",
)

_IMAGENET = {"red": (0.485, 0.229), "green": (0.456, 0.224), "blue": (0.406, 0.225)}
_RGB_BANDS = tuple(
    BandSpec(name, *_IMAGENET[name], (0.0, 1.0), wavelength, None, (name[0],))
    for name, wavelength in (("red", 665), ("green", 560), ("blue", 490))
)
_RGB = SensorSpec(
    id="rgb",
    bands=_RGB_BANDS,
    unit="reflectance",
    default_unit="dn",
    scale=1 / 255,
    source="ImageNet",
)

_NAIP = SensorSpec(
    id="naip",
    bands=(*_RGB_BANDS, BandSpec("nir", 0.485, 0.229, (0.0, 1.0), 842, None, ("n", "nir08"))),
    unit="reflectance",
    default_unit="dn",
    scale=1 / 255,
    source="ImageNet; near infrared takes the statistics of red",
)

_DSM = SensorSpec(
    id="dsm",
    bands=(BandSpec("height", 0.0, 15.0, None, None, None, ("dsm", "dem", "elevation", "z")),),
    unit="metres",
    default_unit="metres",
    scale=1.0,
    reference="window",
    source="height above the window's median, divided by 15 m",
)


# Level-1 products: reflectance = 2e-5 dn - 0.1, before the division by the sine of the sun's elevation.
def _landsat_band(name, wavelength, gsd, aliases, like):
    band = {band.name: band for band in _S2.bands}[like]
    return BandSpec(name, band.mean, band.std, (0.0, 1.0), wavelength, gsd, aliases)


_LANDSAT8 = SensorSpec(
    id="landsat8",
    bands=(
        _landsat_band("B1", 443, 30, ("B01", "coastal"), "B01"),
        _landsat_band("B2", 482, 30, ("B02", "blue"), "B02"),
        _landsat_band("B3", 561, 30, ("B03", "green"), "B03"),
        _landsat_band("B4", 655, 30, ("B04", "red"), "B04"),
        _landsat_band("B5", 865, 30, ("B05", "nir", "nir08"), "B8A"),
        _landsat_band("B6", 1609, 30, ("B06", "swir16", "swir1"), "B11"),
        _landsat_band("B7", 2201, 30, ("B07", "swir22", "swir2"), "B12"),
        _landsat_band("B9", 1373, 30, ("B09", "cirrus"), "B10"),
    ),
    unit="reflectance",
    default_unit="dn",
    scale=2e-5,
    offset=-5000.0,
    source="borrowed from the nearest Sentinel-2 L1C band; measure your own for serious work",
)

_LANDSAT8_PAN = SensorSpec(
    id="landsat8_pan",
    bands=(_landsat_band("B8", 590, 15, ("B08", "pan", "panchromatic"), "B03"),),
    unit="reflectance",
    default_unit="dn",
    scale=2e-5,
    offset=-5000.0,
    source="borrowed from Sentinel-2 L1C green; measure your own for serious work",
)

SENSORS: dict[str, SensorSpec] = {spec.id: spec for spec in (_RGB, _S2, _S1, _DSM, _NAIP, _LANDSAT8, _LANDSAT8_PAN)}


def get_sensor(sensor: str, sensors: dict[str, dict] | None = None) -> SensorSpec:
    """The sensor of that id, from a configuration's `sensors` (plain dictionaries) or from the catalogue `SENSORS`.

    Raises:
        ValueError: if there is none; the message lists what there is.
    """
    known = SENSORS if sensors is None else sensors
    if sensor not in known:
        near = difflib.get_close_matches(str(sensor), list(known), n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(
            f"`sensor` must be one of {', '.join(sorted(known))}, got {sensor!r}.{hint} "
            "`msgfm sensors` lists them; a model and its processor learn others by `add_sensor(SensorSpec(...))`."
        )
    spec = known[sensor]
    return spec if isinstance(spec, SensorSpec) else SensorSpec.from_dict(spec)
