"""The loss that a step minimizes: the flow loss at random timesteps plus the terms that preserve the base.

`Objective` bundles the groups `timesteps`, `target`, `loss`, `weighting` and `preservation` with the model's guidance
and the precision of matrix products, so that the training loop needs only one call: the losses of a micro-batch. All
predictions of one kind come from one forward: those of the base, without a gradient, and those of the adapter.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import chain

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.loader import Batch, Loader, copy_to_device
from data.sources import Sample
from flux2.adapters import adapters_disabled
from train.objective.loss import DPO, MSE, flow_loss
from train.objective.noise import Noised, NoiseDraw, add_noise, draw, joined, stacked
from train.objective.preservation import BlankPreservation, Preservation
from train.objective.prior import ClassPictures
from train.objective.target import ContrastiveGuidance, Flow, Slider
from train.objective.timesteps import Uniform
from train.objective.weighting import Unweighted


@dataclass(frozen=True)
class MicroBatch:
    """Samples, or class images, with their noise and timesteps from (seed, step, position).

    Attributes:
        weight: Weight of its loss in the step.
        is_prior: Whether these are class images.
        preserved: (P, T, D) embeddings of the prompts with which the first P samples are compared to the base, if any.
        preserved_weights: (P,) their weights in that comparison; None is 1 for all.
        empty: (1, T, D) embedding of the empty prompt for contrastive guidance, if that is the target.
        guides: (B, T, D) embeddings of each list of prompts that the target is made of; the last are trained instead of
            the captions.
        scale: Scale of the adapter.
    """

    batch: Batch
    noise: NoiseDraw
    weight: float = 1.0
    is_prior: bool = False
    preserved: Tensor | None = None
    preserved_weights: Tensor | None = None
    empty: Tensor | None = None
    guides: Sequence[Tensor] = ()
    scale: float = 1.0


@dataclass(frozen=True)
class Inputs:
    """A micro-batch on the device.

    Attributes:
        noised, text: The noisy samples and the (B, T, D) embeddings of their captions; of pairs, the B chosen samples
            and then the B rejected ones.
        weights: (B,) weights of the samples or pairs, which do not apply to preservation; None is 1 for all.
        preserved, preserved_weights, empty, guides, scale: As in `MicroBatch`.
        has_caption: (B,) whether a sample has a caption that is not empty; needed with `empty`.
    """

    noised: Noised
    text: Tensor
    weights: Tensor | None = None
    preserved: Tensor | None = None
    preserved_weights: Tensor | None = None
    empty: Tensor | None = None
    has_caption: Tensor | None = None
    guides: Sequence[Tensor] = ()
    scale: float = 1.0


@dataclass(frozen=True)
class Losses:
    """Losses of a micro-batch or step.

    Attributes:
        total: Loss to differentiate; the others are detached.
        preservation: Preservation loss before its weight; 0 without preservation.
        prior: Weighted loss of the class images (train/objective/prior.py) of a whole step.
        preference: With `loss=dpo`, the share of pairs with a positive margin, and the mean margin.
    """

    total: Tensor
    flow: Tensor
    preservation: Tensor
    prior: Tensor | None = None
    preference: Sequence[Tensor] = ()


def training_loss(
    model: nn.Module,
    inputs: Inputs,
    guidance: float | None,
    loss: MSE | None = None,
    weight: float = 0.0,
    target: Flow | None = None,
) -> Losses:
    """Return the losses of one micro-batch.

    Args:
        model: Transformer with its adapter, or a wrapper around it.
        loss: Distance of predictions and targets; None is the mean squared error.
        weight: Weight of base preservation, which is always a mean squared error.
        target: What predictions are compared to; None is the flow.
    """
    noised, loss = inputs.noised, loss or flow_loss
    preserved = [] if inputs.preserved is None else [inputs.preserved]

    aim, text = noised.target, inputs.guides[-1] if inputs.guides else inputs.text

    # What the adapter is compared to: the base's predictions, which come from one forward without a gradient.
    base: Sequence[Tensor] = []
    if frozen := [*([text] if loss.needs_base else []), *preserved]:
        with torch.no_grad(), adapters_disabled(model):
            base = predict_each(model, noised, frozen, guidance)
    flow_base = base[0] if loss.needs_base else None
    if isinstance(target, Slider) and inputs.guides:
        with torch.no_grad(), adapters_disabled(model):
            positive, negative, neutral = predict_each(model, noised, inputs.guides, guidance)
        aim = target.moved(positive, negative, neutral, inputs.scale)
    if isinstance(target, ContrastiveGuidance):
        assert inputs.empty is not None
        assert inputs.has_caption is not None
        with torch.no_grad(), without_dropout(model):
            unconditional = noised.predict(model, inputs.empty.expand(len(aim), -1, -1), guidance)
        aim = target.guided(aim, unconditional, noised.times, inputs.has_caption)

    # The adapter's own predictions, in one forward.
    trained, *held = predict_each(model, noised, [text, *preserved], guidance)
    preference: Sequence[Tensor] = ()
    if isinstance(loss, DPO):
        assert flow_base is not None
        margins = loss.margins(trained, aim, noised.mask, flow_base)
        losses = -F.logsigmoid(margins)
        flow = (losses if inputs.weights is None else losses * inputs.weights).mean()
        preference = [(margins.detach() > 0).float().mean(), margins.detach().mean()]
    else:
        flow = loss(trained, aim, noised.mask, inputs.weights, noised.times, flow_base)
    if not held:
        return Losses(flow, flow.detach(), torch.zeros_like(flow.detach()), preference=preference)
    difference = flow_loss(held[0], base[-1], None, inputs.preserved_weights)
    return Losses(flow + weight * difference, flow.detach(), difference.detach(), preference=preference)


def check_pairs(loss: MSE, target: Flow, samples: Sequence[Sample]) -> None:
    """Raise ValueError if loss and target need rejected images that samples lack, or samples have what neither uses."""
    lacking = sum(sample.rejected is None for sample in samples)
    group, user = ("target", f"target={target.name}") if target.uses_pairs else ("loss", "loss=dpo")
    is_used = target.uses_pairs or isinstance(loss, DPO)
    if not is_used and lacking < len(samples):
        raise ValueError(
            "dataset=preference has rejected images, which only loss=dpo and target=slider_images train. Set one of "
            "them, or dataset=folder for the chosen images"
        )
    if is_used and lacking:
        raise ValueError(
            f"{user} needs a rejected image for every sample, and {lacking} of {len(samples)} have none. Set "
            f"dataset=preference, or another {group}"
        )


@contextmanager
def without_dropout(model: nn.Module) -> Iterator[None]:
    """Context manager in which the adapter of a model in training has no dropout."""
    is_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(is_training)


def predict_each(model: nn.Module, noised: Noised, texts: Sequence[Tensor], guidance: float | None) -> Sequence[Tensor]:
    """Return the prediction of the first samples with each of the embeddings (R, T, D), all from one forward."""
    rows = [slice(0, len(text)) for text in texts]
    return noised.predict(model, joined(texts), guidance, *rows).split([row.stop for row in rows])


@dataclass(frozen=True)
class Objective:
    """The loss of a run.

    Attributes:
        seed: The run's seed.
        prior: The class images of prior preservation; None without them.
        guidance: The guidance scale for a guidance-distilled model; None for other models.
        dtype: The dtype of matrix products; None is the adapter's.
    """

    seed: int
    timesteps: Uniform
    loss: MSE
    weighting: Unweighted
    preservation: Preservation | BlankPreservation = field(default_factory=Preservation)
    prior: ClassPictures | None = None
    target: Flow = field(default_factory=Flow)
    guidance: float | None = None
    dtype: torch.dtype | None = None

    def metrics(self, losses: Losses) -> dict[str, float]:
        """Return the losses of a step to log; those of preservation and of class images only where there are any."""
        numbers = {"loss": losses.flow.item()}
        if self.preservation.active:
            numbers["preservation_loss"] = losses.preservation.item()
        if self.prior and losses.prior is not None:
            numbers["prior_loss"] = losses.prior.item()
        names = ("preference_accuracy", "preference_margin")  # only with loss=dpo are there values
        return numbers | {name: value.item() for name, value in zip(names, losses.preference, strict=False)}

    def micro_batches(self, loader: Loader, step: int) -> list[MicroBatch]:
        """Return this process's micro-batches of `step` with their noise, those of class images last."""

        def noisy(batch: Batch, seed: int, weight: float, is_prior: bool) -> list[MicroBatch]:
            batch = self.loss.with_drawn_masks(batch, seed, step)
            noise = draw(batch, self.timesteps, seed, step)
            empty = loader.embeddings([""]) if isinstance(self.target, ContrastiveGuidance) else None
            prompts = [] if is_prior else self.target.prompts_for(batch.captions)
            guides = [loader.embeddings(each) for each in prompts]
            parts, preserved = self.target.at_scales(batch, step), self.preserve(loader, batch, step)
            return [
                MicroBatch(one, noise, weight / len(parts), is_prior, *preserved, empty, guides, scale)
                for one, scale in parts
            ]

        def part(batch: Batch, whole: Loader) -> float:  # a micro-batch of several shapes is in several batches
            return len(batch.indices) / whole.batch_size_in(step)

        found = [noisy(batch, self.seed, part(batch, loader), False) for batch in loader.micro_batches(step)]
        if (prior := self.prior) is not None:
            weighted = [(batch, prior.weight * part(batch, prior.loader)) for batch in prior.micro_batches(step)]
            found += [noisy(batch, prior.seed, weight, True) for batch, weight in weighted]
        return list(chain.from_iterable(found))

    def preserve(self, loader: Loader, batch: Batch, step: int) -> tuple[Tensor | None, Tensor | None]:
        """Return the embeddings of the preservation prompts of a batch and their weights, on the CPU."""
        if not self.preservation.active:
            return None, None
        prompts = self.preservation.prompts_for(batch.captions, self.seed, step, batch.positions)
        weights = self.preservation.weights(batch.captions, prompts)
        return loader.embeddings(prompts), None if weights is None else torch.tensor(weights)

    def losses(self, model: nn.Module, inputs: Inputs) -> Losses:
        """Return the losses of a micro-batch; `model` is the transformer with its adapter, or a wrapper around it."""
        with self.autocast(inputs.text.device):
            return training_loss(model, inputs, self.guidance, self.loss, self.preservation.weight, self.target)

    def autocast(self, device: torch.device) -> torch.autocast:
        """Context manager for matrix products in `dtype`; adapter and losses stay in float32."""
        return torch.autocast(device.type, self.dtype or torch.bfloat16, enabled=self.dtype is not None)

    def prepare(self, micro_batch: MicroBatch, device: torch.device) -> Inputs:
        """Copy a micro-batch to `device` and add its noise."""

        def moved(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else copy_to_device(tensor, device).to(torch.float32)

        batch = micro_batch.batch.to(device, torch.float32)
        noised = add_noise(batch, micro_batch.noise)
        weights = self.weighting(noised.times)
        if batch.weights is not None:
            weights = batch.weights if weights is None else weights * batch.weights
        has_caption = None
        if micro_batch.empty is not None:
            has_caption = copy_to_device(torch.tensor([caption != "" for caption in batch.captions]), device)
        preserved = moved(micro_batch.preserved), moved(micro_batch.preserved_weights)
        guides = [tensor for guide in micro_batch.guides if (tensor := moved(guide)) is not None]
        text = batch.embeddings
        if batch.rejected is not None:  # rows of the chosen images, then of the rejected ones with the same noise
            noised = stacked(noised, add_noise(replace(batch, latents=batch.rejected), micro_batch.noise))
            text = torch.cat([text, text])
        empty = moved(micro_batch.empty), has_caption
        return Inputs(noised, text, weights, *preserved, *empty, guides, micro_batch.scale)
