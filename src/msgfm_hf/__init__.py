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
from transformers.models.auto import modeling_auto
from transformers.pipelines import PIPELINE_REGISTRY

from .model.configuration_msgfm import MsGFMConfig
from .model.heads_msgfm import MsGFMForImageClassification, MsGFMForSemanticSegmentation
from .model.image_processing_msgfm import MsGFMImageProcessor, data_collator
from .model.modeling_msgfm import (
    MsGFMBackbone,
    MsGFMForPreTraining,
    MsGFMModel,
    count_parameters,
    routing_statistics,
)
from .model.pipeline_msgfm import (
    MultisensorImageClassificationPipeline,
    MultisensorImageFeatureExtractionPipeline,
    MultisensorImageSegmentationPipeline,
    MultisensorImageToImagePipeline,
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
# The stock pipeline looks into this table only, and would log that the model is not supported.
modeling_auto.MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES["msgfm"] = "MsGFMForSemanticSegmentation"
for _task, _pipeline, _model in (
    ("multisensor-image-feature-extraction", MultisensorImageFeatureExtractionPipeline, AutoModel),
    ("multisensor-image-classification", MultisensorImageClassificationPipeline, AutoModelForImageClassification),
    ("multisensor-image-segmentation", MultisensorImageSegmentationPipeline, AutoModelForSemanticSegmentation),
    ("multisensor-image-to-image", MultisensorImageToImagePipeline, AutoModelForPreTraining),
):
    PIPELINE_REGISTRY.register_pipeline(_task, pipeline_class=_pipeline, pt_model=_model, type="image")
    # For this, saving a pipeline would write its file beside the weights, without those of the model that it needs.
    del _pipeline._registered_impl

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
    "data_collator",
    "routing_statistics",
]
