"""An open implementation of msGFM (arXiv 2404.01260): a multisensor geospatial foundation model for Transformers.

Importing the package registers the model with Transformers, so that `AutoModel.from_pretrained(...)` and its siblings
load an msGFM checkpoint without remote code.
"""

from transformers import (
    AutoBackbone,
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForMaskedImageModeling,
    AutoModelForPreTraining,
    AutoModelForSemanticSegmentation,
)

from .model.configuration_msgfm import MsGFMConfig
from .model.heads_msgfm import MsGFMForImageClassification, MsGFMForSemanticSegmentation
from .model.image_processing_msgfm import MsGFMImageProcessor
from .model.modeling_msgfm import (
    MsGFMBackbone,
    MsGFMForPreTraining,
    MsGFMModel,
    count_parameters,
    routing_statistics,
)
from .model.sensors import SENSORS, BandSpec, SensorSpec

__version__ = "0.1.0.dev0"

AutoConfig.register(MsGFMConfig.model_type, MsGFMConfig)
AutoModel.register(MsGFMConfig, MsGFMModel)
AutoBackbone.register(MsGFMConfig, MsGFMBackbone)
AutoModelForPreTraining.register(MsGFMConfig, MsGFMForPreTraining)
AutoModelForMaskedImageModeling.register(MsGFMConfig, MsGFMForPreTraining)
AutoModelForImageClassification.register(MsGFMConfig, MsGFMForImageClassification)
AutoModelForSemanticSegmentation.register(MsGFMConfig, MsGFMForSemanticSegmentation)
# Transformers asks for one class per imaging backend; this one needs neither torchvision nor Pillow's arithmetic.
AutoImageProcessor.register(
    MsGFMConfig, image_processor_classes={"torchvision": MsGFMImageProcessor, "pil": MsGFMImageProcessor}
)

__all__ = [
    "SENSORS",
    "BandSpec",
    "MsGFMBackbone",
    "MsGFMConfig",
    "MsGFMForImageClassification",
    "MsGFMForPreTraining",
    "MsGFMForSemanticSegmentation",
    "MsGFMImageProcessor",
    "MsGFMModel",
    "SensorSpec",
    "count_parameters",
    "routing_statistics",
]
