"""The one grammar of inputs on the command line: `SENSOR=PATH[,bands=B02+B03][,unit=dn][,scale=..][,offset=..]...`."""

import difflib
from dataclasses import dataclass
from typing import ClassVar

from msgfm_hf.data.geotiff import (
    Header,
    knows_band,
    read_header,
    read_image,
    resolve_bands,
    trusts_names,
    unnamed_bands,
)
from msgfm_hf.data.shards import ShardImage
from msgfm_hf.model.sensors import UNITS, get_sensor

GRAMMAR = "SENSOR=PATH[,bands=B02+B03][,unit=U][,scale=X][,offset=X][,level=L][,nodata=X]"

# Of Sentinel-2 products in digital numbers; `None` where the file may say it.
_OFFSETS = (None, 0.0, -1000.0)


@dataclass(frozen=True)
class Input:
    """One `--input`: a sensor, where its images are, and what their files do not say.

    Args:
        sensor (`str`): id of the sensor.
        path (`str`): a file, or a glob with `{key}`.
        bands (`tuple[str]`, *optional*): the bands to keep, by name, of a file that names its bands; the names of all
            bands in file order of a file that does not, or that has colours only.
        unit (`str`, *optional*): unit of the stored values; default that of the sensor.
        scale, offset (`float`, *optional*): physical = (stored + offset) * scale. The offset of Sentinel-2 products is
            0, or -1000 since processing baseline 04.00.
        level (`str`, *optional*): processing level of a sensor that has levels (Sentinel-2: `l1c` or `l2a`).
        nodata (`float`, *optional*): stored value that marks an invalid pixel; default that of the file.
    """

    sensor: str
    path: str
    bands: tuple[str, ...] | None = None
    unit: str | None = None
    scale: float | None = None
    offset: float | None = None
    level: str | None = None
    nodata: float | None = None

    OPTIONS: ClassVar[tuple[str, ...]] = ("bands", "unit", "scale", "offset", "level", "nodata")


def parse_input(text: str) -> Input:
    """Read one `--input`.

    Raises:
        ValueError: for text that is not of the grammar, an unknown sensor, band, unit or level, a number that is none,
            and an offset that no Sentinel-2 product has.
    """
    sensor, equals, rest = text.partition("=")
    path, *options = rest.split(",")
    if not equals or not sensor or not path:
        raise ValueError(f"`input` must be {GRAMMAR}, got {text!r}. Example: s1=chips/s1/{{key}}.tif,unit=db")
    spec = get_sensor(sensor)
    values: dict = {}
    for option in options:
        name, equals, value = option.partition("=")
        if name not in Input.OPTIONS or not value:
            near = difflib.get_close_matches(name, Input.OPTIONS, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ValueError(
                f"`input` takes the options {', '.join(Input.OPTIONS)} as name=value: got {option!r} in {text!r}."
                f"{hint} Bands are joined by +; a path cannot hold a comma."
            )
        if name == "bands":
            values[name] = tuple(band.name for band in spec.select(value.split("+")))
        elif name in ("unit", "level"):
            known = UNITS if name == "unit" else spec.levels
            if value not in known:
                raise ValueError(
                    f"`{name}` of sensor {sensor!r} must be one of {', '.join(known) or 'none'}, got {value!r} in "
                    f"{text!r}. Correct the option."
                )
            values[name] = value
        else:
            try:
                values[name] = float(value)
            except ValueError:
                raise ValueError(f"`{name}` must be a number, got {value!r} in {text!r}. Correct the option.") from None
    given = Input(sensor, path, **values)
    if spec.offset is None and given.unit in (None, "dn") and given.scale is None and given.offset not in _OFFSETS:
        raise ValueError(
            f"`offset` of sensor {sensor!r} must be 0, or -1000 since processing baseline 04.00, got {given.offset:g} "
            f"in {text!r}. Physical is (stored + offset) * scale: see the metadata, and give scale= too if the product "
            "is another one."
        )
    return given


def parse_inputs(texts: list[str]) -> dict[str, Input]:
    """Read all `--input`s of a command, in their order: the first sets the output grid.

    Raises:
        ValueError: as `parse_input`, for no input at all, and for two of one sensor.
    """
    inputs: dict[str, Input] = {}
    for text in texts:
        found = parse_input(text)
        if found.sensor in inputs:
            raise ValueError(
                f"`input` must name each sensor once, got {found.sensor!r} twice ({text!r}). Give one of them."
            )
        inputs[found.sensor] = found
    if not inputs:
        raise ValueError(f"`input` must be given at least once, got none. Its form is {GRAMMAR}.")
    return inputs


def input_levels(inputs: dict[str, Input]) -> dict[str, str]:
    """The processing level of every sensor that has levels.

    Raises:
        ValueError: where one is not given: statistics differ between levels, and files do not tell.
    """
    levels = {}
    for sensor, given in inputs.items():
        known = get_sensor(sensor).levels
        if known and given.level is None:
            raise ValueError(
                f"`level` of sensor {sensor!r} must be one of {', '.join(known)}, got none. "
                f"Add {' or '.join(f'level={level}' for level in known)} to --input {sensor}=..."
            )
        if given.level is not None:
            levels[sensor] = given.level
    return levels


def input_header(given: Input, path=None) -> Header:
    """What the file of an input says about itself, with the names that `bands=` gives to a file that has none.

    A file counts as unnamed where the sensor knows none of its names; a sensor of one band leaves nothing to confuse.
    Colours, which GDAL gives without being asked, are names for a sensor of red, green and blue alone, and as many
    names in `bands=` overrule them.

    Args:
        given (`Input`): what the command line says.
        path (`str` or `Path`, *optional*): the file; default `given.path`.

    Raises:
        ValueError: if the file cannot be opened, or its bands have no names (or colours only, for a sensor that has
            other bands) and are not given as many.
    """
    header, spec = read_header(given.path if path is None else path), get_sensor(given.sensor)
    named = any(knows_band(given.sensor, name) for name in header.bands)
    if named and not header.coloured:
        return header
    names = given.bands or (spec.band_names if len(spec.bands) == 1 else ())
    if len(names) in (len(header.bands), len(header.bands) + (header.alpha is not None)):
        return header.named(names)
    if named and trusts_names(header, given.sensor):
        return header
    count = unnamed_bands(header, given.sensor)
    found = ", ".join(name or "no name" for name in header.bands) + (", alpha" if count > len(header.bands) else "")
    raise ValueError(
        f"`bands` must name the {count} bands of {header.path} in file order, got "
        f"{'the colours ' if header.coloured else ''}{found}. "
        f"Add ,bands={_paste(given, count)} to --input {given.sensor}=..., in the order that the file has: look it up, "
        "for nothing here can tell."
    )


def input_bands(given: Input, header: Header) -> tuple[list[str], list[int]]:
    """The bands of an input: canonical names, and their positions among `header.bands`.

    Raises:
        ValueError: if the file has bands that the sensor does not know and none are chosen, or not those chosen.
    """
    unknown = [name or "no name" for name in header.bands if not knows_band(given.sensor, name)]
    if given.bands is None and unknown:
        known = [name for name in header.bands if knows_band(given.sensor, name)]
        raise ValueError(
            f"`bands` must choose among those of {header.path} that sensor {given.sensor!r} knows, got also "
            f"{', '.join(unknown)}. Add ,bands={'+'.join(known)} to --input {given.sensor}=..."
        )
    return resolve_bands(header, given.sensor, given.bands)


def read_input(given: Input, path=None) -> ShardImage:
    """Read the image of an input: its own file, or one that its glob stands for.

    Args:
        given (`Input`): what the command line says.
        path (`str` or `Path`, *optional*): the file; default `given.path`.

    Returns:
        `ShardImage`: pixels as stored, with place, unit and factors.

    Raises:
        ValueError: as `read_image`; a file that does not name its bands needs `bands=`, except for a sensor of one
            band.
    """
    path = given.path if path is None else path
    header = input_header(given, path)
    bands, _ = input_bands(given, header)
    return read_image(
        path,
        given.sensor,
        bands=bands,
        names=header.bands,
        unit=given.unit,
        scale=given.scale,
        offset_dn=given.offset,
        nodata=given.nodata,
    )


def _paste(given: Input, count: int) -> str:
    """The text that names `count` bands of the sensor: those of its level, if there are as many."""
    spec = get_sensor(given.sensor)
    bands = [band.name for band in spec.bands if given.level is None or given.level in band.levels]
    return "+".join(bands if len(bands) == count else ["NAME"] * count)
