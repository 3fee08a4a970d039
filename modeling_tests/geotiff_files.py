"""Small GeoTIFFs for tests, written by rasterio."""

import warnings

import rasterio
from rasterio.enums import ColorInterp
from rasterio.transform import from_origin

UTM = "EPSG:32631"
ORIGIN = (600_000.0, 5_700_000.0)


def write_geotiff(path, pixels, bands=None, crs=UTM, origin=ORIGIN, gsd=10.0, mask=None, colours=None, **profile):
    """Write pixels (C, H, W), north up; `crs=None` leaves the file without a place on the map."""
    path.parent.mkdir(parents=True, exist_ok=True)
    count, height, width = pixels.shape
    placed = {} if crs is None else {"crs": crs, "transform": from_origin(*origin, gsd, gsd)}
    options = {"driver": "GTiff", "count": count, "height": height, "width": width, "dtype": pixels.dtype.name}
    with warnings.catch_warnings(), rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True):
        warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
        with rasterio.open(path, "w", **(options | placed | profile)) as file:
            file.write(pixels)
            if bands:
                file.descriptions = bands
            if colours:
                file.colorinterp = [ColorInterp[colour] for colour in colours]
            if mask is not None:
                file.write_mask(mask)
    return path
