"""Batches for heads, and training with Transformers' own `Trainer`: one sensor with the stock collator, several with
ours.
"""

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments

import tiny_models
from msgfm_hf import (
    MsGFMConfig,
    MsGFMForImageClassification,
    MsGFMForSemanticSegmentation,
    MsGFMImageProcessor,
    data_collator,
)

DENSE = {**tiny_models.TINY, "moe_blocks": [[], []], "num_labels": 2}
S1 = {"inputs": {"s1": ["VV", "VH"]}}
BOTH = {"inputs": {"s1": ["VV", "VH"], "dsm": ["height"]}}


def backscatter(rng, rows=None, height=16, width=16):
    shape = (2, height, width) if rows is None else (rows, 2, height, width)
    return rng.normal(-12, 3, shape).astype("float32")


def heights(rng, height=16, width=16):
    return rng.normal(300, 10, (height, width)).astype("float32")


# -------------------------------------------------------------------------------------------------- the data collator


def places(rng, count=3):
    processor = MsGFMImageProcessor()
    given = [{"s1": backscatter(rng), "dsm": heights(rng)} for _ in range(count)]
    return processor, given, [processor(images) for images in given]


def test_samples_become_what_the_processor_makes_of_the_batch():
    processor, given, samples = places(np.random.default_rng(0))
    batch = data_collator([{**sample, "labels": label} for sample, label in zip(samples, (4, 0, 2), strict=True)])
    whole = processor({sensor: [place[sensor] for place in given] for sensor in ("s1", "dsm")})
    assert set(batch) == {*whole, "labels"} == {"pixel_values", "valid_mask", "reference", "labels"}
    for key in whole:
        assert set(batch[key]) == set(whole[key])
        for sensor in whole[key]:
            assert torch.equal(batch[key][sensor], whole[key][sensor])
    assert batch["labels"].tolist() == [4, 0, 2] and batch["labels"].dtype == torch.int64
    assert batch.to(torch.float64)["pixel_values"]["dsm"].dtype == torch.float64


def test_samples_of_one_sensor_are_tensors():
    processor = MsGFMImageProcessor(**S1)
    images = backscatter(np.random.default_rng(0), rows=2)
    batch = data_collator([processor(image) for image in images])
    assert torch.equal(batch["pixel_values"], processor(images)["pixel_values"])
    assert batch["valid_mask"].shape == (2, 16, 16) and "labels" not in batch


@pytest.mark.parametrize(
    "labels, shape, dtype",
    [
        ([3, 1], (2,), torch.int64),
        ([np.int64(3), np.int64(1)], (2,), torch.int64),
        ([0.5, 2.0], (2,), torch.float32),
        ([torch.tensor([1.0, 0.0, 1.0]), torch.tensor([0.0, 0.0, 1.0])], (2, 3), torch.float32),
        ([np.zeros((16, 16), np.uint8), np.ones((16, 16), np.uint8)], (2, 16, 16), torch.uint8),
        ([np.eye(16, dtype=np.int16)[::-1], np.asarray(Image.new("L", (16, 16)))], (2, 16, 16), torch.int16),
    ],
)
def test_labels_of_every_head(labels, shape, dtype):
    _, _, samples = places(np.random.default_rng(0), 2)
    batch = data_collator([{**sample, "labels": label} for sample, label in zip(samples, labels, strict=True)])
    assert batch["labels"].shape == shape and batch["labels"].dtype == dtype
    assert batch["labels"].tolist() == [label.tolist() if hasattr(label, "tolist") else label for label in labels]


def one(**entries):
    return {"pixel_values": torch.zeros(1, 2, 8, 8), "valid_mask": torch.ones(1, 8, 8, dtype=torch.bool), **entries}


@pytest.mark.parametrize(
    "samples, message",
    [
        ([], "`samples` must be dictionaries, at least one, got none. Pass what the image processor returns"),
        ([(torch.zeros(1, 2, 8, 8), 3)], "`samples` must be dictionaries, at least one, got tuple"),
        (
            [one(), one(labels=1)],
            "`samples` must have the same entries .* got pixel_values, valid_mask and pixel_values, valid_mask, labels",
        ),
        (
            [one(pixel_values={"s1": torch.zeros(1, 2, 8, 8)}), one(pixel_values={"dsm": torch.zeros(1, 1, 8, 8)})],
            "`pixel_values` must have the same sensors in every sample of a batch, got s1 and dsm. Batch",
        ),
        (
            [one(pixel_values={"s1": torch.zeros(1, 2, 8, 8)}), one()],
            "`pixel_values` must be a tensor whose first axis is 1, .* got dict",
        ),
        (
            [one(), one(pixel_values=torch.zeros(1, 2, 8, 9))],
            r"`pixel_values` must have one shape .* got \(1, 2, 8, 8\), \(1, 2, 8, 9\). Crop the images to one size",
        ),
        (
            [one(pixel_values={"s1": torch.zeros(1, 2, size, 8)}) for size in (8, 6)],
            r"`pixel_values\[s1\]` must have one shape .* got \(1, 2, 6, 8\), \(1, 2, 8, 8\)",
        ),
        ([one(pixel_values=torch.zeros(2, 2, 8, 8))], r"`pixel_values` must .* first axis is 1, .* \(2, 2, 8, 8\)"),
        ([one(pixel_values=torch.zeros(2, 8, 8))], r"`pixel_values` must .* first axis is 1, .* got shape \(2, 8, 8\)"),
        ([one(pixel_values=np.zeros((1, 2, 8, 8)))], "`pixel_values` must be a tensor .* got ndarray"),
        ([one(sensor="s1")], "`sensor` must be a tensor .* got str. Leave out what the model does not read"),
        ([one(label=3)], "`label` must be a tensor .* got int. .* name the target `labels`"),
        (
            [one(labels="forest")],
            "`labels` must be numbers, arrays or tensors, got str 'forest'. Names become ids with",
        ),
        ([one(labels=[0, 1])], r"`labels` must be .* got list \[0, 1\]. .* lists tensors with `torch.tensor`"),
        (
            [one(labels=torch.zeros(8, 8)), one(labels=torch.zeros(8, 7))],
            r"`labels` must have one shape in all samples of a batch, got \(8, 7\), \(8, 8\)",
        ),
    ],
)
def test_samples_that_form_no_batch_are_refused(samples, message):
    with pytest.raises(ValueError, match=message):
        data_collator(samples)


def radar_and_heights(count):
    """Bright radar is class 1; the heights say nothing."""
    _, _, samples = places(np.random.default_rng(0), count)
    for index, sample in enumerate(samples):
        sample["pixel_values"]["s1"] += 1.5 * (index % 2) - 0.75
        sample["labels"] = index % 2
    return samples


def classifier(**fields):
    torch.manual_seed(0)
    return MsGFMForImageClassification(MsGFMConfig(**{**tiny_models.TINY, "num_labels": 2, **fields}))


def test_a_plain_loop_learns_from_several_sensors():
    samples, model = radar_and_heights(8), classifier(**BOTH).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(10):
        for batch in DataLoader(samples, batch_size=4, collate_fn=data_collator):
            loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    assert np.mean(losses[-2:]) < 0.3 * np.mean(losses[:2])


# ------------------------------------------------------------------------------------------------------------ Trainer


def radar(count, seed=0):
    """Bright radar is class 1: what the stock collator takes, without the axis of the batch."""
    processor = MsGFMImageProcessor(**S1)
    images = backscatter(np.random.default_rng(seed), rows=count)
    labels = np.arange(count) % 2
    images += 4.0 * labels[:, None, None, None] - 2
    return [
        {**{name: tensor[0] for name, tensor in processor(image).items()}, "labels": int(label)}
        for image, label in zip(images, labels, strict=True)
    ]


def arguments(folder, **given):
    return TrainingArguments(
        **{
            "output_dir": str(folder),
            "use_cpu": True,
            "report_to": "none",
            "disable_tqdm": True,
            "dataloader_pin_memory": False,
            "per_device_train_batch_size": 4,
            "save_strategy": "no",
            "seed": 0,
            **given,
        }
    )


def accuracy(prediction):
    return {"accuracy": (prediction.predictions.argmax(-1) == prediction.label_ids).mean().item()}


def test_trainer_trains_evaluates_saves_and_resumes(tmp_path):
    def trainer(folder):
        return Trainer(
            # The experts' accounts are no predictions: `compute_metrics` sees logits alone.
            model=classifier(**S1, output_router_logits=True),
            args=arguments(
                folder,
                max_steps=12,
                learning_rate=3e-3,
                logging_steps=1,
                eval_strategy="steps",
                eval_steps=6,
                save_strategy="steps",
                save_steps=6,
            ),
            train_dataset=radar(16),
            eval_dataset=radar(8, seed=1),
            compute_metrics=accuracy,
            processing_class=MsGFMImageProcessor(**S1),
        )

    whole = trainer(tmp_path)
    whole.train()
    losses = [entry["loss"] for entry in whole.state.log_history if "loss" in entry]
    assert len(losses) == 12 and np.mean(losses[-3:]) < 0.5 * np.mean(losses[:3])
    evaluations = [entry for entry in whole.state.log_history if "eval_loss" in entry]
    assert len(evaluations) == 2 and evaluations[1]["eval_loss"] < evaluations[0]["eval_loss"]
    assert evaluations[1]["eval_accuracy"] == 1.0

    # What was saved is a checkpoint like any other, with its processor.
    saved = MsGFMForImageClassification.from_pretrained(tmp_path / "checkpoint-12")
    assert MsGFMImageProcessor.from_pretrained(tmp_path / "checkpoint-12").inputs == S1["inputs"]
    batch = {key: torch.stack([sample[key] for sample in radar(4)]) for key in ("pixel_values", "valid_mask")}
    with torch.no_grad():
        assert torch.equal(saved(**batch).logits, whole.model.eval()(**batch).logits)

    # Resumed halfway, it arrives at the same place: batches, optimiser, schedule and the router's noise.
    resumed = trainer(tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert resumed.state.global_step == 12
    for (name, left), right in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(left, right), name


def segmentation():
    """As many labelled pixels in each image; the rest is ignored."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 2, (4, 16, 16), generator=generator)
    labels[:, :5] = 255
    pixels = torch.randn(4, 3, 16, 16, generator=generator)
    return [{"pixel_values": image, "labels": label} for image, label in zip(pixels, labels, strict=True)]


def multi_label():
    return [{**sample, "labels": torch.tensor([1.0, float(sample["labels"])])} for sample in radar(4)]


@pytest.mark.parametrize(
    "cls, fields, samples",
    [
        (MsGFMForImageClassification, S1, radar(4)),
        (MsGFMForImageClassification, {**S1, "problem_type": "multi_label_classification"}, multi_label()),
        (MsGFMForSemanticSegmentation, {}, segmentation()),
    ],
    ids=["classes", "several labels", "segmentation"],
)
def test_accumulated_gradients_are_those_of_one_large_batch(tmp_path, cls, fields, samples):
    steps = []
    for parts in (1, 2, 4):
        torch.manual_seed(0)
        model = cls(MsGFMConfig(**{**DENSE, **fields}))
        before = [parameter.detach().clone() for parameter in model.parameters()]
        given = arguments(
            tmp_path,
            max_steps=1,
            optim="sgd",
            learning_rate=1.0,
            lr_scheduler_type="constant",
            max_grad_norm=0,
            per_device_train_batch_size=4 // parts,
            gradient_accumulation_steps=parts,
        )
        Trainer(model=model, args=given, train_dataset=samples).train()
        # A step of plain gradient descent with rate 1 is the gradient.
        steps.append([left - right.detach() for left, right in zip(before, model.parameters(), strict=True)])
    assert sum(gradient.abs().sum() for gradient in steps[0]) > 1
    for other in steps[1:]:
        for expected, gradient in zip(steps[0], other, strict=True):
            torch.testing.assert_close(gradient, expected, atol=1e-5, rtol=1e-4)


def test_trainer_takes_batches_of_several_sensors(tmp_path):
    samples = radar_and_heights(8)
    trainer = Trainer(
        model=classifier(**BOTH),
        args=arguments(
            tmp_path, max_steps=16, learning_rate=3e-3, logging_steps=1, remove_unused_columns=False, eval_steps=8
        ),
        train_dataset=samples,
        eval_dataset=samples,
        data_collator=data_collator,
        compute_metrics=accuracy,
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert np.mean(losses[-2:]) < 0.3 * np.mean(losses[:2])
    found = trainer.evaluate()
    assert found["eval_accuracy"] == 1.0 and found["eval_loss"] < 0.3
    predicted = trainer.predict(samples)
    assert predicted.predictions.shape == (8, 2) and predicted.label_ids.tolist() == [0, 1] * 4
