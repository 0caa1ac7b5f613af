"""Predict the memory of each phase of a run and the time of a step.

`Planner` counts the blocks of a job once (train/planner/step_memory.py); a prediction for a choice of the group
`memory` is then a cheap sum. The phases are the encoders, one after the other, before training; the step; and between
steps the update, validation and samples.

If the blocks are divided over several GPUs (flux2/memory/model_split.py), each GPU has a prediction of its own, for its
part of the model.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import cache, cached_property

from torch import nn

from flux2.adapters import adapter_parameters
from flux2.memory.activation_checkpointing import blocks_within, kept_bytes, set_policy
from flux2.memory.block_offload import offloaded_blocks, streamed_tensors
from flux2.memory.kernels import use_kernels
from flux2.memory.ring_buffer import RING, slot_sizes
from flux2.quantization.nf4 import Nf4Linear
from flux2.quantization.precision import set_transposed_cache
from train.config.memory import Choice
from train.optim.optimizers import averages_weights
from train.planner.division import Part, divide, parts_of
from train.planner.optimizer_memory import optimizer_bytes, update_bytes
from train.planner.prediction import ENCODING, Prediction, training_peak
from train.planner.step_memory import (
    Cost,
    Shape,
    Work,
    autoencoder_peaks,
    compiled_copy,
    heaviest,
    infer_block,
    size,
    step,
    train_block,
    train_end,
)
from train.planner.text_encoder_memory import cpu_encoding, prompt_bytes
from train.planner.workload import TextEncoderChoice, Workload, frozen, tokens

LIBRARIES = 0.3e9  # assumed: workspaces of cuBLAS and cuDNN
PROCESS = 3.0e9  # assumed: Python with its libraries and CUDA's share of host memory
GATHERED = 3  # assumed: gathered blocks, the current one and two buffers for the next one
READ_AHEAD = 2.0e9  # maximum of cache entries that data.loader prefetches


class Planner:
    """Predictions for one job; each block and each choice is computed once."""

    def __init__(self, job: Workload) -> None:
        self.job = job
        use_kernels(job.model, job.kernels)
        self.predict, self.blocks, self.cost = cache(self._predict), cache(self._blocks), cache(self._cost)
        self.inference, self.block_weights = cache(self._inference), cache(self._block_weights)
        self.costs, self.peak, self.adapter_of = cache(self._costs), cache(self._peak), cache(self._adapter_of)

    @cached_property
    def kinds(self) -> list[nn.Module]:
        """For each block, the block that is counted in its place: the one of its kind with the largest adapter."""
        model = self.job.model
        double, single = heaviest(model.double_blocks), heaviest(model.single_blocks)
        kinds = [double] * len(model.double_blocks) + [single] * len(model.single_blocks)
        return [block for block in kinds if block is not None]

    @cached_property
    def end(self) -> Cost:
        return train_end(self.job.model, self.job.shape, self.job.dtype, self.job.autocast)

    @cached_property
    def has_layouts(self) -> bool:
        """Whether layers multiply gradients in 8 bits, so that transposed weights can be cached."""
        return set_transposed_cache(self.job.model, enabled=False) > 0

    def _cost(self, policy: str, block: nn.Module, both: bool) -> Cost:
        job = self.job
        set_policy(job.model, policy)  # the model is on the meta device and this job's alone
        set_transposed_cache(job.model, both)
        return train_block(job.model, block, job.model.run_block, job.shape, job.dtype, job.autocast)

    def _costs(self, policy: str, budget_gb: float | None, both: bool, away: bool) -> list[Cost]:
        """Return the cost of each block. Arguments as in `_blocks`."""
        kept = self.kept_within(budget_gb) if policy == "budget" and budget_gb is not None else 0
        policies = ["full" if policy == "budget" else policy] * (len(self.kinds) - kept) + ["none"] * kept
        costs = [self.cost(policy, block, both) for policy, block in zip(policies, self.kinds, strict=True)]
        if away:
            recomputed = [policy != "none" for policy in policies]
            costs = [
                replace(cost, kept=cost.kept - self.boundary * leaves)
                for cost, leaves in zip(costs, recomputed, strict=True)
            ]
        return costs

    def _blocks(
        self,
        policy: str,
        budget_gb: float | None = None,
        both: bool = False,
        away: bool = False,
        part: Part | None = None,
    ) -> tuple[int, int, Work]:
        """Return (kept bytes, working set) at the peak of a step on the device of `part`, and the work of the step.

        `both`: cache transposed weights. `away`: the inputs of recomputed blocks are not kept on the device.
        """
        costs, part = self.costs(policy, budget_gb, both, away), part or self.whole
        work = sum((cost.work for cost in costs), self.end.work)
        for rows in self.job.frozen_rows:
            work += self.inference(replace(self.job.shape, rows=rows), self.job.autocast)[1]
        end = self.end if part.is_last else Cost(0, 0, 0, Work())
        return *step(costs[part.start : part.stop], end), work

    @property
    def whole(self) -> Part:
        return Part(0, len(self.kinds))

    def kept_within(self, budget_gb: float) -> int:
        """Return how many of the last blocks `checkpointing=budget` keeps without recompute."""
        job = self.job
        return blocks_within(job.model.config, budget_gb, job.shape.rows * job.shape.tokens, job.dtype.itemsize)

    def budget_for(self, count: int) -> float:
        """Return the `budget_gb` that keeps exactly `count` of the last blocks, with as few digits as possible."""
        config, needed = self.job.model.config, 0
        stream = self.job.shape.rows * self.job.shape.tokens, self.job.dtype.itemsize
        for i in range(count):
            kind = "single" if i < config.single_blocks else "double"
            needed += kept_bytes(config, kind, "none", *stream) - kept_bytes(config, kind, "full", *stream)
        rounded = (math.ceil(needed / 10 ** (9 - digits)) / 10**digits for digits in range(1, 4))
        return next((budget for budget in rounded if self.kept_within(budget) == count), math.ceil(needed / 1e5) / 1e4)

    @property
    def boundary(self) -> int:
        """Bytes of the tokens between two blocks."""
        shape = self.job.shape
        return shape.rows * shape.tokens * self.job.model.config.hidden * self.job.dtype.itemsize

    def _inference(self, shape: Shape, autocast: bool) -> tuple[int, Work]:
        """Return peak bytes and work of one prediction without gradients."""
        model, dtype = self.job.model, self.job.dtype
        counted = {block: infer_block(model, block, shape, dtype, autocast) for block in {*self.kinds}}
        work = sum((counted[block].work for block in self.kinds), Work())
        stream = shape.rows * shape.tokens * model.config.hidden * dtype.itemsize
        return max(cost.forward for cost in counted.values()) + stream, work

    def _block_weights(self, both: bool) -> list[int]:
        """Return the bytes of the base in each block, with or without cached transposed weights."""
        set_transposed_cache(self.job.model, both)
        return [size(streamed_tensors(block)) for block in self.job.blocks]

    @property
    def weights(self) -> list[int]:
        """Bytes of the base in each block, without transposed weights."""
        return self.block_weights(False)

    @property
    def other_weights(self) -> int:
        """Bytes of the base outside of blocks, and of frozen tensors of adapters."""
        return self.other_weights_of(self.whole)

    def other_weights_of(self, part: Part) -> int:
        return sum(self.adapter_constants[part.start : part.stop]) + sum(
            self.outside[module] for module in self.ends(part)
        )

    @cached_property
    def adapter_constants(self) -> list[int]:
        """Bytes of the frozen tensors of adapters in each block."""
        return [size(frozen(block)) - size(streamed_tensors(block)) for block in self.job.blocks]

    @cached_property
    def outside(self) -> dict[nn.Module, int]:
        """Bytes of the base in each module outside of blocks."""
        return {module: size(frozen(module)) for module in self.ends(self.whole)}

    def ends(self, part: Part) -> list[nn.Module]:
        """Return the modules outside of blocks that are on the device of a part (flux2/memory/model_split.py)."""
        model = self.job.model
        outside = [child for child in model.children() if not isinstance(child, nn.ModuleList)]
        return [child for child in outside if (part.is_last if child is model.final_layer else part.is_first)]

    @property
    def adapter(self) -> dict[str, float]:
        """Bytes of the whole adapter, and of what training keeps for it."""
        return self.adapter_of(self.whole)

    def parameters_of(self, part: Part) -> list[nn.Parameter]:
        modules = [*self.ends(part), *self.job.blocks[part.start : part.stop]]
        return [parameter for module in modules for parameter in adapter_parameters(module)]

    def _adapter_of(self, part: Part) -> dict[str, float]:
        parameters = self.parameters_of(part)
        counted = Counter(tuple(parameter.shape) for parameter in parameters)
        return {
            "adapter": size(parameters),
            "its gradients": size(parameters),
            "optimizer": sum(count * self.optimizer_bytes[shape] for shape, count in counted.items()),
            "its average": 4 * sum(parameter.numel() for parameter in parameters) if self.job.averaged else 0,
        }

    @cached_property
    def optimizer_bytes(self) -> dict[tuple[int, ...], int]:
        """Bytes of the optimizer's state for one parameter of each shape."""
        shapes = {tuple(parameter.shape): parameter for parameter in adapter_parameters(self.job.model)}
        return {shape: optimizer_bytes(self.job.optimizer, [one]) for shape, one in shapes.items()}

    def swapped_of(self, part: Part) -> int:
        """Bytes of the trained weights, stored while their average is validated, sampled and saved."""
        is_kept = self.job.averaged or averages_weights(getattr(self.job.optimizer, "func", None))
        return int(is_kept and self.adapter_of(part)["adapter"])

    @property
    def class_share(self) -> float:
        """Tokens of the class images, which have no references, as a share of the tokens of a micro-batch."""
        shape = self.job.shape
        return self.job.class_rows * (shape.predicted + shape.text) / (shape.rows * shape.tokens)

    @cached_property
    def autoencoder(self) -> tuple[int, int, int]:
        job = self.job
        sizes = [job.pixels, *job.references, job.sample_pixels or (16, 16), job.class_pixels or (16, 16)]
        return autoencoder_peaks(job.variant.autoencoder, *max(sizes, key=tokens))

    @cached_property
    def reference_encoder(self) -> int:
        """Bytes in addition to the autoencoder's weights for encoding the references of a sample grid."""
        largest = max(self.job.sample_references, key=tokens, default=None)
        return 0 if largest is None else autoencoder_peaks(self.job.variant.autoencoder, *largest)[1]

    @cached_property
    def while_loading(self) -> int:
        """Bytes of host memory for the largest parameter in bfloat16, twice."""
        return 2 * 2 * max(parameter.numel() for parameter in self.job.model.parameters())

    @cached_property
    def workspace(self) -> int:
        """Bytes of the permanent buffer that NF4 layers are dequantized into."""
        layers = (layer for layer in self.job.model.modules() if isinstance(layer, Nf4Linear))
        return self.job.dtype.itemsize * max((layer.in_features * layer.out_features for layer in layers), default=0)

    def inputs_of(self, part: Part) -> int:
        """Bytes of what the device of `part` receives: the micro-batch on the first, else tokens and rotary angles."""
        shape = self.job.shape
        if part.is_first:
            returned = shape.rows * shape.predicted * self.job.model.config.channels * 12  # prediction and its gradient
            return self.job.input_bytes + returned * (not part.is_last)
        return self.boundary + shape.tokens * self.job.model.config.head_dim * 8

    def count_streamed(self, given: int | float, weights: Sequence[int]) -> tuple[int, int]:
        """Return the bytes of the streamed blocks, and of the ring buffer they stream through."""
        config = self.job.model.config
        by_name = dict(zip(config.block_names, weights, strict=True))
        sizes = [by_name[name] for name in offloaded_blocks(config, given)]
        return sum(sizes), sum(slot_sizes(sizes, RING)) if sizes else 0

    def count_away(self, choice: Choice) -> int:
        """Return the bytes of the block inputs that are in host memory between forward and backward."""
        if not choice.offload_activations:
            return 0
        whole = len(self.kinds) if choice.checkpointing == "none" else self.kept_within(choice.budget_gb or 0.0)
        return self.boundary * (len(self.kinds) - whole)

    @property
    def twin(self) -> int:
        """Bytes of the model that draws the samples, whose blocks stream to a GPU, without its adapter."""
        blocks = self.count_streamed(1.0, self.weights)[1] if self.job.on_gpu else sum(self.weights)
        return blocks + self.other_weights + self.workspace

    def gathered(self, weights: Sequence[int]) -> int:
        """Return the bytes of the weights that a process with a sharded base gathers; `weights` are those of blocks."""
        layers = [child for child in self.job.model.children() if not isinstance(child, nn.ModuleList)]
        permanent = sum(size(frozen(layer)) for layer in layers if isinstance(layer, nn.Linear))
        return GATHERED * max([*weights, *(size(frozen(layer)) for layer in layers)]) + permanent

    def _predict(self, choice: Choice) -> Prediction:
        job = self.job
        split = (job.split or self.divide(choice)) if job.num_gpus > 1 else ()
        first, *later = [self.phases(choice, part) for part in (parts_of(split) if split else [self.whole])]
        weights = self.block_weights(choice.cache_transposed_weights)
        streamed, away = self.count_streamed(choice.offload_blocks, weights)[0], self.count_away(choice)
        given = choice.checkpointing, choice.budget_gb, choice.cache_transposed_weights, choice.offload_activations
        work = self.blocks(*given)[2]
        work += work * self.class_share
        passes = job.accumulation * (2 if job.class_rows else 1)
        forwards = 2.0 + len(job.frozen_rows)  # and the backward
        moved = forwards * streamed * passes + 2.0 * away * job.accumulation * (1 + self.class_share)
        if job.num_shards > 1:  # all-gathered in forward and backward
            moved += forwards * (sum(weights) - streamed + self.other_weights) * (1 - 1 / job.num_shards) * passes
        crossed = 2.0 + sum(job.frozen_rows) / job.rows
        between = crossed * self.boundary * len(later) * job.accumulation * (1 + self.class_share)
        host = {
            "streamed blocks": streamed,
            "block inputs": away,
            "sampling model": sum(self.weights) if job.twin and job.on_gpu else 0,
            "while loading": self.while_loading,
            "cache entries read": READ_AHEAD,
            "process (assumed)": PROCESS,
        }
        work *= job.accumulation
        found = Prediction(choice, first, host, work, moved, job.compiled, tuple(split), later, between)
        return self.with_text_encoder(found, job.text_encoder)

    def phases(self, choice: Choice, part: Part) -> dict[str, dict[str, float]]:
        """Return the memory of the device of `part` by component, in each phase with the transformer loaded."""
        job, libraries = self.job, self.libraries
        weights = self.block_weights(choice.cache_transposed_weights)
        given = choice.checkpointing, choice.budget_gb, choice.cache_transposed_weights, choice.offload_activations
        kept, working, _ = self.blocks(*given, part)
        kept += min(2 * self.boundary, self.count_away(choice))  # two are being copied
        working += compiled_copy(job.model, job.shape, job.dtype) if job.compiled and job.storage == "int8" else 0
        streamed, ring = self.count_streamed(choice.offload_blocks, weights)
        adapter, others = self.adapter_of(part), self.other_weights_of(part)
        resident: dict[str, float] = {
            "weights of blocks": (sum(weights[part.start : part.stop]) - streamed) / job.num_shards,
            "buffers of streamed blocks": ring,
            "gathered weights": self.gathered(weights) if job.num_shards > 1 else 0,
            "other weights": others / job.num_shards,
            **adapter,
            "dequantized layer": self.workspace,
            "autoencoder": self.autoencoder[0] if job.sample_pixels and part.is_first else 0,
            **libraries,
        }
        inputs = self.inputs_of(part)
        phases: dict[str, dict[str, float]] = {}
        if rows := max(job.frozen_rows, default=0):
            working_then = self.inference(replace(job.shape, rows=rows), job.autocast)[0]
            joined = {"working set": working_then + rows * job.embedding_bytes * part.is_first}
            phases["targets"] = {**resident, "micro-batch": inputs, **joined}
        phases["step"] = {**resident, "micro-batch": inputs, "kept for backward": kept, "working set": working}
        phases["update"] = {**resident, "working set": update_bytes(self.parameters_of(part))}
        idle = {key: value for key, value in resident.items() if key != "its gradients"}
        idle["trained weights"] = self.swapped_of(part)
        if job.validates:
            shape = replace(job.shape, rows=1)
            phases["validation"] = {**idle, "working set": self.inference(shape, job.autocast)[0]}
        if job.sample_pixels:
            predicted, edited = tokens(job.sample_pixels), sum(map(tokens, job.sample_references))
            shape = replace(job.shape, rows=1, image=predicted + edited, predicted=predicted)
            working = self.inference(shape, False)[0]
            noise = 4 * predicted * job.model.config.channels
            images = (self.autoencoder[2] + noise, self.reference_encoder) if part.is_first else ()
            twin = {"sampling model": self.twin + 4 * job.trained_parameters} if job.twin else {}  # in float32
            phases["samples"] = {**idle, **twin, "working set": max([working + self.cached(edited, part), *images])}
        if job.class_pixels:
            predicted = tokens(job.class_pixels)
            shape = replace(job.shape, rows=1, image=predicted, predicted=predicted)
            streamed_then, ring_then = self.count_streamed(choice.offload_blocks, self.weights)
            phases["class images"] = {
                "weights of blocks": sum(self.weights[part.start : part.stop]) - streamed_then,
                "buffers of streamed blocks": ring_then,
                "other weights": others,
                "dequantized layer": self.workspace,
                "working set": self.inference(shape, False)[0],
                **libraries,
            }
        return phases

    def cached(self, references: int, part: Part) -> int:
        """Return the bytes of isolated references' keys and values that sampling keeps on the device of a part."""
        config = self.job.model.config
        one = 2 * references * config.hidden * self.job.dtype.itemsize
        return (part.stop - part.start) * one if config.isolated_references else 0

    @property
    def libraries(self) -> dict[str, float]:
        return {"libraries (assumed)": LIBRARIES} if self.job.on_gpu else {}

    def divide(self, choice: Choice) -> tuple[int, ...]:
        """Return the number of blocks on each of the job's GPUs, as even as their memory allows."""
        return divide(len(self.kinds), self.job.num_gpus, lambda part: self.peak(choice, part))

    def _peak(self, choice: Choice, part: Part) -> float:
        return training_peak(self.phases(choice, part))

    def with_text_encoder(self, prediction: Prediction, choice: TextEncoderChoice) -> Prediction:
        """Return the prediction with the text encoder of `choice` instead of the one that is set."""
        trained = {name: parts for name, parts in prediction.phases.items() if name not in ENCODING}
        in_host = cpu_encoding(self.job, choice, PROCESS)
        return replace(prediction, phases=self.encoders(choice) | trained, host_encoding=in_host)

    def encoders(self, choice: TextEncoderChoice | None = None) -> dict[str, dict[str, float]]:
        """Return the phases that fill the cache; a run with a complete cache skips them."""
        job, libraries, choice = self.job, self.libraries, choice or self.job.text_encoder
        weights, encode, decode = self.autoencoder
        phases: dict[str, dict[str, float]] = {}
        held, activations = prompt_bytes(job, choice.storage)
        if held and not (job.on_gpu and choice.device == "cpu"):
            phases["prompts"] = {"text encoder": held, "working set": activations, **libraries}
        working = max(encode, decode) if job.class_pixels else encode  # class images are decoded
        phases["images"] = {"autoencoder": weights, "working set": working, **libraries}
        return phases
