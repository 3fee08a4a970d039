# Copyright 2026 The msgfm_hf contributors. Licensed under the Apache License, Version 2.0.
"""Pipelines for images of any sensor: what goes in is what the image processor takes, what comes out is what the stock
pipelines of Transformers give.
"""

import copy

import torch
from torch import Tensor
from transformers.image_transforms import to_pil_image
from transformers.pipelines import (
    ImageClassificationPipeline,
    ImageFeatureExtractionPipeline,
    ImageSegmentationPipeline,
    Pipeline,
)
from transformers.utils import ModelOutput

from .image_processing_msgfm import data_collator
from .sensors import get_sensor

_PROCESSOR_OPTIONS = (
    "sensor",
    "bands",
    "unit",
    "scale",
    "offset",
    "level",
    "nodata",
    "reference",
    "check",
    "input_data_format",
)


class _MultisensorPipeline(Pipeline):
    _load_tokenizer = False
    _load_video_processor = False
    _parameters: tuple[str, ...]  # of the call, besides those of the image processor
    _outputs: tuple[str, ...]  # of the model, each with the batch as its first axis

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if self.image_processor.inputs != self.model.config.inputs:
            # A head may have been made for other inputs than the checkpoint whose processor was saved with it.
            self.image_processor = copy.copy(self.image_processor)
            self.image_processor.inputs = dict(self.model.config.inputs)

    def __call__(self, images, **options):
        """Run places through the model, which is put into evaluation mode.

        Args:
            images: a place, or a list, a generator or a dataset of places. A place is an image (numpy array, tensor,
                PIL image or the path of a GeoTIFF) of the checkpoint's single sensor, or `{sensor: image}` with one
                image per sensor on one pixel grid.
            sensor, bands, unit, scale, offset, level, nodata, reference, check, input_data_format: as of
                `MsGFMImageProcessor.preprocess`, here or at construction, for all places. Entries of `{sensor: value}`
                for a sensor that a place lacks are left out there.
            batch_size (`int`, *optional*): places that run together where they have one size and the same sensors;
                results do not depend on it.

        Raises:
            ValueError: for input that is not as described.
        """
        return [] if isinstance(images, list) and not images else super().__call__(images, **options)

    def _sanitize_parameters(self, **parameters):
        known = (*_PROCESSOR_OPTIONS, *self._parameters)
        unknown = sorted(set(parameters) - set(known))
        if unknown:
            raise ValueError(
                f"`{type(self).__name__}` has the arguments {', '.join(known)}, got {', '.join(unknown)}. Correct or "
                "remove them."
            )
        options = {name: value for name, value in parameters.items() if name in _PROCESSOR_OPTIONS}
        rest = {name: value for name, value in parameters.items() if name in self._parameters}
        return options, *self._own_parameters(rest)

    def _own_parameters(self, parameters):
        """The arguments of the task itself -> those of `_forward` and of `postprocess`."""
        return {}, super()._sanitize_parameters(**parameters)[2]

    def preprocess(self, images, sensor=None, bands=None, **options):
        """One place -> `inputs`, as the image processor gives them, and `bands`, both by sensor."""
        sensors = self.image_processor.output_bands(images, sensor)
        if not isinstance(images, dict):
            images = dict.fromkeys(sensors, images)
        # Options are given for a list of places, of which some lack a sensor.
        bands = self._of_place(bands, images)
        options = {name: self._of_place(value, images) for name, value in options.items()}
        inputs = self.image_processor(images, bands=bands, **options, return_tensors="pt")
        counts = {sensor: len(pixels) for sensor, pixels in inputs["pixel_values"].items()}
        if set(counts.values()) != {1}:
            raise ValueError(
                f"`images` of a place must be one per sensor, got {counts}. Give a list of places, [place, ...], where "
                "a place is an image or {sensor: image}."
            )
        return {"inputs": inputs, "bands": self.image_processor.output_bands(images, bands=bands)}

    def _of_place(self, value, images):
        """An option {sensor: value} without the sensors that a place lacks; unknown ones stay, to be refused."""
        if not isinstance(value, dict):
            return value
        known = self.image_processor.sensors
        return {sensor: entry for sensor, entry in value.items() if sensor in images or sensor not in known}

    def _forward(self, model_inputs, **parameters):
        inputs, bands = model_inputs["inputs"], model_inputs["bands"]
        if isinstance(bands, dict):
            return self._predict([inputs], bands, **parameters)
        # A batch: places that differ in size or sensors cannot share a forward, and run apart.
        alike = {}
        for index, place in enumerate(inputs):
            key = tuple(sorted((sensor, pixels.shape) for sensor, pixels in place["pixel_values"].items()))
            alike.setdefault(key, []).append(index)
        rows = {}
        for indices in alike.values():
            outputs = self._predict([inputs[index] for index in indices], bands[indices[0]], **parameters)
            for row, index in enumerate(indices):
                rows[index] = {name: tensor[row] for name, tensor in outputs.items()}
        return ModelOutput({name: [rows[index][name] for index in range(len(inputs))] for name in rows[0]})

    def _predict(self, places, bands) -> ModelOutput:
        # In training, dropout and the capacity of the experts would let an image's result depend on its batch.
        self.model.eval()
        outputs = self.model(**data_collator(places), bands=bands)
        missing = [name for name in self._outputs if outputs.get(name) is None]
        if missing:
            raise ValueError(
                f"`model` must give {', '.join(self._outputs)} for {self.task or type(self).__name__!r}, got "
                f"{type(self.model).__name__} without {', '.join(missing)}. Load one by `pipeline(task, model=folder)`."
            )
        return ModelOutput({name: outputs[name] for name in self._outputs})


class MultisensorImageFeatureExtractionPipeline(_MultisensorPipeline, ImageFeatureExtractionPipeline):
    """Features of places, for the task `multisensor-image-feature-extraction`; `__call__` says what goes in.

    ```python
    extractor = pipeline("multisensor-image-feature-extraction", model=folder)
    vectors = extractor([{"s1": "s1.tif", "s2": "s2.tif"}], offset={"s2": -1000}, pool=True, return_tensors=True)
    ```

    Its own arguments are those of the stock pipeline: `pool` (`bool`, defaults to `False`: whether to give the mean of
    the tokens with a valid pixel) and `return_tensors` (`bool`, defaults to `False`).

    Returns, per place: nested lists or a tensor, (1, tokens, channels), with `pool` (1, channels).
    """

    _parameters = ("pool", "return_tensors")
    _outputs = ("last_hidden_state", "pooler_output")


class MultisensorImageClassificationPipeline(_MultisensorPipeline, ImageClassificationPipeline):
    """Classes of places, for the task `multisensor-image-classification`; `__call__` says what goes in.

    ```python
    classifier = pipeline("multisensor-image-classification", model=folder)
    labels = classifier([{"s1": "a.tif"}, {"s1": "b.tif"}], unit="db", batch_size=2, top_k=3)
    ```

    Its own arguments are those of the stock pipeline: `top_k` (`int`, defaults to 5) and `function_to_apply` (`str`:
    `softmax`, `sigmoid` or `none`; by default sigmoid for several labels at once or a single one, none for regression,
    otherwise softmax).

    Returns, per place: a list of `{"label": str, "score": float}`, the highest score first. A place without a valid
    pixel has the scores of features of zeros: what the classifier thinks of nothing.
    """

    _parameters = ("top_k", "function_to_apply")
    _outputs = ("logits",)


class MultisensorImageSegmentationPipeline(_MultisensorPipeline, ImageSegmentationPipeline):
    """Masks of the classes in places, for the task `multisensor-image-segmentation`; `__call__` says what goes in.

    ```python
    segmenter = pipeline("multisensor-image-segmentation", model=folder)
    masks = segmenter({"s1": "s1.tif", "dsm": "dsm.tif"}, unit={"s1": "power"})
    ```

    Returns, per place: a list of `{"label": str, "mask": PIL.Image.Image, "score": None}`, one for each class that
    occurs. A mask has the size of the image, 255 where the class has the highest logit, else 0. A pixel that is invalid
    in every sensor is in no mask.
    """

    _parameters = ()
    _outputs = ("logits",)

    def check_model_type(self, supported_models):
        """Nothing: the table holds the models of Transformers only, and `_predict` looks at what comes out."""

    def _predict(self, places, bands) -> ModelOutput:
        outputs = super()._predict(places, bands)
        outputs["valid_mask"] = torch.cat([_valid_in_any(place["valid_mask"]) for place in places])
        return outputs

    def postprocess(self, model_outputs):
        classes = self.image_processor.post_process_semantic_segmentation(model_outputs)[0]
        valid = model_outputs["valid_mask"][0]
        return [
            {"score": None, "label": self.model.config.id2label[label], "mask": _picture(valid & (classes == label))}
            for label in classes[valid].unique().tolist()
        ]


class MultisensorImageToImagePipeline(_MultisensorPipeline):
    """Images of one sensor out of those of others, for the task `multisensor-image-to-image`; `__call__` says what goes
    in.

    ```python
    translator = pipeline("multisensor-image-to-image", model=folder)
    images = translator([{"s1": "a.tif"}, {"s1": "b.tif"}], target="s2", target_unit="reflectance", batch_size=2)
    ```

    Its own arguments are `target` (`str`: the sensor to predict), `target_bands` (`list[str]`, by default those of
    `config.inputs`, then all that the level has), `target_level` (`str`, by default the sensor's first), `target_unit`
    (`str`, by default reflectance, dB or metres) and `target_offset` (`float`, for the unit `dn` of a sensor whose
    products differ in it). A sensor of a place that is the target itself is passed over.

    Returns, per place: a list with, for each other sensor of it, `{"sensor": str, "target": str, "bands": list[str],
    "unit": str, "image": np.ndarray}`, the image (bands, height, width) in float32, NaN where the input is invalid.
    Heights are relative: nobody knows the reference of a place without heights.

    The model predicts each from one sensor alone. Checkpoints whose loss counted masked pixels only (the paper's) are
    better at these than at whole images.
    """

    _parameters = ("target", "target_bands", "target_level", "target_unit", "target_offset")

    def _own_parameters(self, parameters):
        chosen = ("target", "target_bands", "target_level")
        return {name: parameters[name] for name in chosen if name in parameters}, parameters

    def _target(self, target, bands, level) -> list[str]:
        """The bands to predict."""
        if target is None:
            raise ValueError(
                f"`target` must name the sensor to predict ({', '.join(self.model.config.sensors)}), got None. For "
                "example target='s2'."
            )
        spec = get_sensor(target, self.model.config.sensors)
        if bands is None:
            bands = self.model.config.inputs.get(target)
        if bands is None:
            level = spec.check_level(level)
            bands = [band.name for band in spec.bands if level is None or level in band.levels]
        return [band.name for band in spec.select(bands)]

    def _predict(self, places, bands, target=None, target_bands=None, target_level=None) -> ModelOutput:
        wanted = self._target(target, target_bands, target_level)
        # Loaded from a head's checkpoint, decoders are as they were made.
        saved_as = self.model.config.architectures or [type(self.model).__name__]
        if not hasattr(self.model, "decoders") or type(self.model).__name__ not in saved_as:
            raise ValueError(
                f"`model` must have trained decoders for {self.task or type(self).__name__!r}, got a "
                f"{', '.join(saved_as)}. Load one by `pipeline(task, model=folder)`."
            )
        self.model.eval()
        batch = data_collator(places)
        pixels, valid = dict(batch["pixel_values"]), dict(batch["valid_mask"])
        sensors = [sensor for sensor in pixels if sensor != target]
        if not sensors:
            raise ValueError(
                f"`images` must hold another sensor than the `target`, got {', '.join(pixels)}. What is masked of an "
                "image is predicted from the rest of it by `MsGFMForPreTraining`."
            )
        # The decoder reads the bands and the size off an image of its sensor: one without a valid pixel.
        like = pixels[sensors[0]]
        pixels = {sensor: pixels[sensor] for sensor in sensors} | {
            target: like.new_zeros(len(like), len(wanted), *like.shape[2:])
        }
        seen = {sensor: valid[sensor] for sensor in sensors}
        outputs = self.model(
            pixels,
            bands={**{sensor: bands[sensor] for sensor in sensors}, target: wanted},
            valid_mask={**seen, target: torch.zeros_like(next(iter(seen.values())))},
            targets=dict.fromkeys(pixels, target),
        )
        return ModelOutput(
            images=torch.stack([outputs.reconstruction[sensor].float() for sensor in sensors], 1),
            valid_mask=torch.stack([seen[sensor] for sensor in sensors], 1),
            sensors=[tuple(sensors)] * len(places),
        )

    def postprocess(
        self, model_outputs, target=None, target_bands=None, target_level=None, target_unit=None, target_offset=None
    ):
        bands, sensors = self._target(target, target_bands, target_level), model_outputs["sensors"]
        # Taken out of a batch it is the entry of its place, else a list of one.
        sensors = sensors[0] if isinstance(sensors, list) else sensors
        spec = get_sensor(target, self.model.config.sensors)
        if target_unit == "dn" and spec.offset is None and target_offset is None:
            raise ValueError(
                f"`target_offset` must be given for digital numbers of {target!r}, whose products differ in it, got "
                "None. For example target_offset=0, or -1000 since processing baseline 04.00."
            )
        results = []
        for number, sensor in enumerate(sensors):
            image = self.image_processor.post_process_image_to_image(
                model_outputs["images"][:, number],
                unit=target_unit,
                sensor=target,
                bands=bands,
                level=target_level,
                offset=target_offset,
                valid_mask=model_outputs["valid_mask"][:, number],
                reference=0.0 if spec.reference else None,
            )
            unit = target_unit or spec.unit
            results.append(
                {"sensor": sensor, "target": target, "bands": bands, "unit": unit, "image": image[0].numpy()}
            )
        return results


def _valid_in_any(masks: dict[str, Tensor]) -> Tensor:
    return torch.stack(list(masks.values())).any(dim=0)


def _picture(mask: Tensor):
    """(H, W), bool -> a PIL image of 0 and 255."""
    pixels = mask.to(torch.uint8).mul(255).numpy()
    return to_pil_image(pixels[None], do_rescale=False, input_data_format="channels_first")


__all__ = [
    "MultisensorImageClassificationPipeline",
    "MultisensorImageFeatureExtractionPipeline",
    "MultisensorImageSegmentationPipeline",
    "MultisensorImageToImagePipeline",
]
