"""What Transformers demands of every model: its own test classes, on every msGFM class.

Not collected here: the mixins are not part of the installed package. `test_transformers_contract.py` lays this file
beside them, as `tests/models/msgfm/test_modeling_msgfm.py`, and runs it there.
"""

import copy
import inspect
import unittest

import torch
from transformers import PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.testing_utils import torch_device

import msgfm_hf
from msgfm_hf import (
    SENSORS,
    MsGFMBackbone,
    MsGFMConfig,
    MsGFMForImageClassification,
    MsGFMForPreTraining,
    MsGFMForSemanticSegmentation,
    MsGFMModel,
)

from ... import test_modeling_common
from ...test_backbone_common import BackboneTesterMixin
from ...test_configuration_common import ConfigTester
from ...test_modeling_common import ModelTesterMixin

# The mixins know by name what a class predicts and which labels it takes: each class and the tables it belongs into.
# A head without an Auto class has none, and gets its labels in `_prepare_for_class`.
CLASSES = {
    MsGFMModel: ["MODEL_MAPPING_NAMES"],
    MsGFMBackbone: ["MODEL_FOR_BACKBONE_MAPPING_NAMES"],
    MsGFMForPreTraining: ["MODEL_FOR_PRETRAINING_MAPPING_NAMES", "MODEL_FOR_MASKED_IMAGE_MODELING_MAPPING_NAMES"],
    MsGFMForImageClassification: ["MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES"],
    MsGFMForSemanticSegmentation: ["MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES"],
}
for model_class, tables in CLASSES.items():
    for table in tables:
        getattr(modeling_auto, table)[MsGFMConfig.model_type] = model_class.__name__


def output_tensors(outputs):
    """What two implementations are compared by; the mixin knows only `logits` and `last_hidden_state`."""
    names = ("logits", "last_hidden_state", "reconstruction", "feature_maps")
    return [outputs[name] for name in names if name in outputs]


test_modeling_common._get_output_tensors = output_tensors


class MsGFMModelTester:
    """A tiny model with experts, and a batch for it. One sensor, so that every parameter gets a gradient."""

    batch_size = 3
    is_training = True
    image_size = 32
    patch_size = 4
    window_size = 4
    embed_dim = 16
    depths = [2, 1]
    num_heads = [2, 4]
    num_labels = 3
    # Patches of the image, of which the comparison of attention kernels masks some.
    seq_length = (image_size // patch_size) ** 2
    num_masks = 20

    def __init__(self, parent):
        self.parent = parent

    def get_config(self):
        return MsGFMConfig(
            sensors={"rgb": SENSORS["rgb"].to_dict()},
            image_size=self.image_size,
            patch_size=self.patch_size,
            window_size=self.window_size,
            embed_dim=self.embed_dim,
            depths=self.depths,
            num_heads=self.num_heads,
            moe_blocks=[[1], [0]],
            num_experts=4,
            mask_patch_size=8,
            num_labels=self.num_labels,
            out_features=["stage1", "stage2"],
        )

    def prepare_config_and_inputs_for_common(self):
        pixels = torch.rand(self.batch_size, 3, self.image_size, self.image_size, device=torch_device)
        return self.get_config(), {"pixel_values": pixels}


class MsGFMModelTest(ModelTesterMixin, unittest.TestCase):
    all_model_classes = tuple(CLASSES)
    # As every vision model: there are no embeddings of tokens.
    test_resize_embeddings = False

    def setUp(self):
        self.model_tester = MsGFMModelTester(self)

    def test_every_public_model_is_tested(self):
        public = [getattr(msgfm_hf, name) for name in msgfm_hf.__all__]
        models = {value for value in public if inspect.isclass(value) and issubclass(value, PreTrainedModel)}
        self.assertEqual(models, set(self.all_model_classes))

    def test_config(self):
        ConfigTester(self, config_class=MsGFMConfig, has_text_modality=False, embed_dim=48).run_common_tests()

    # The three that Swin overrides too. The mixin expects one attention and one sequence length for all layers; here
    # attention is inside windows, each stage has its own map, and a backbone returns maps instead of sequences.

    def test_attention_outputs(self):
        config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        tokens = self.model_tester.window_size**2
        for model_class in self.all_model_classes:
            for by_config in (False, True):
                with self.subTest(model_class.__name__, by_config=by_config):
                    model = model_class._from_config(copy.deepcopy(config), attn_implementation="eager").eval()
                    model.to(torch_device)
                    arguments = {} if by_config else {"output_attentions": True}
                    model.config.output_attentions = by_config
                    with torch.no_grad():
                        outputs = model(**inputs, **arguments)
                        more = model(**inputs, **arguments, output_hidden_states=True)
                    self.assertIsNone(outputs.hidden_states)
                    for attentions in (outputs.attentions, more.attentions):
                        self.assertEqual(len(attentions), len(config.depths))
                        for stage, attention in enumerate(attentions):
                            side = self.model_tester.image_size // self.model_tester.patch_size // 2**stage
                            windows = self.model_tester.batch_size * (side // self.model_tester.window_size) ** 2
                            self.assertEqual(attention.shape, (windows, config.num_heads[stage], tokens, tokens))
                            torch.testing.assert_close(attention.sum(-1), torch.ones_like(attention[..., 0]))

    def test_hidden_states_output(self):
        config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        batch_size, dim = self.model_tester.batch_size, self.model_tester.embed_dim
        side = self.model_tester.image_size // self.model_tester.patch_size
        for model_class in self.all_model_classes:
            for by_config in (False, True):
                with self.subTest(model_class.__name__, by_config=by_config):
                    model = model_class(copy.deepcopy(config)).to(torch_device).eval()
                    arguments = {} if by_config else {"output_hidden_states": True}
                    model.config.output_hidden_states = by_config
                    with torch.no_grad():
                        hidden_states = model(**inputs, **arguments).hidden_states
                    if model_class is MsGFMBackbone:
                        expected = [(dim, side, side), (dim, side, side), (2 * dim, side // 2, side // 2)]
                    else:
                        expected = [(side**2, dim), (side**2 // 4, 2 * dim), (side**2 // 4, 2 * dim)]
                    self.assertEqual([state.shape for state in hidden_states], [(batch_size, *e) for e in expected])

    def test_model_get_set_embeddings(self):
        config, _ = self.model_tester.prepare_config_and_inputs_for_common()
        for model_class in self.all_model_classes:
            with self.subTest(model_class.__name__):
                model = model_class(copy.deepcopy(config))
                self.assertIsInstance(model.get_input_embeddings(), torch.nn.Module)
                new = copy.deepcopy(model.get_input_embeddings())
                model.set_input_embeddings(new)
                self.assertIs(model.get_input_embeddings(), new)
                self.assertIsNone(model.get_output_embeddings())


class MsGFMBackboneTest(BackboneTesterMixin, unittest.TestCase):
    all_model_classes = (MsGFMBackbone,)
    config_class = MsGFMConfig

    def setUp(self):
        self.model_tester = MsGFMModelTester(self)
