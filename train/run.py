"""Train a LoRA: `accelerate launch train/run.py +experiment=tarot [key=value ...]`, or with plain `python`.

Hydra composes the configuration from conf/, `load_config` checks it, and `train` runs the stages of train/stages/.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":  # sys.path begins with the script's folder, whose modules would hide libraries
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    from train.cli.start import start

    start()

from omegaconf import DictConfig

from train.checkpoints.checkpointer import Checkpointer
from train.checkpoints.resume import RunLocation
from train.cli.app import command
from train.config.run_config import RunConfig
from train.distributed.sharding import check_processes
from train.loop import Trainer
from train.optim.ema import EvaluationWeights
from train.optim.optimizers import build
from train.optim.schedules import LearningRate
from train.stages.data import PreparedData, make_objective, prepare_data
from train.stages.finish import announce, write_card_and_report
from train.stages.memory import keep_memory, load_config, memory_advice
from train.stages.model import load_model, load_sampler
from train.stages.run_folder import claim_run_folder, record_start
from train.sweeps.job import check, is_done, is_sweep, result
from train.sweeps.reuse import SHARED
from train.tracking.metrics import Metrics
from train.utils.memory import free_memory
from train.utils.text import many


def train(config: RunConfig, location: RunLocation) -> tuple[Path, PreparedData]:
    """Train the adapter of one configuration in its run folder; return the adapter's folder and the data."""
    settings, processes, accelerator = config.settings, config.processes, config.accelerator
    if processes.sharded:
        check_processes(accelerator.num_processes)
    config = keep_memory(config, location)
    with memory_advice(config), SHARED.job(keeps=is_sweep()):
        # Fill the cache with encoded samples; this loads and frees both encoders.
        data = prepare_data(config)
        data.check_unchanged(config, location)
        objective = make_objective(config, data)

        # Load the frozen base in its precision and attach the adapter.
        model = load_model(config)
        optimizer = build(config.make_optimizer, model.parameters)
        learning_rate = LearningRate(optimizer, config.schedule, settings.steps)
        weights = EvaluationWeights(model.parameters, optimizer, settings.ema_decay)
        config.say(
            f"{many(len(data.names), 'sample')}, {model.parameter_count:,} trained parameters, "
            f"{many(settings.steps, 'step')} in {location.folder}"
        )
        sampler = load_sampler(config, data.prepared.cached)

        # Restore the resumed state. Nothing in the run folder changes before it is read.
        metrics = Metrics(location.folder, config.tracker)
        checkpointer = Checkpointer(
            accelerator,
            location,
            model.peft_model,
            optimizer,
            weights,
            base=config.variant.repo or config.variant.name,
            license=config.variant.license,
            images_per_step=config.images_per_step,
            metrics=metrics,
            rotation=settings.rotation,
            about={"data": data.manifest.digest},
        )
        start = checkpointer.load()
        if accelerator.is_main_process:
            record_start(config, location, data.manifest)
            metrics.start(settings.name, config.config, start)

        # Train, then write the model card and the report.
        adapter = Trainer(
            settings,
            processes,
            model.peft_model,
            optimizer,
            learning_rate,
            weights,
            objective,
            data.loader,
            data.names,
            checkpointer,
            metrics,
            location.folder,
            data.validator,
            sampler,
        ).run(start)
        write_card_and_report(config, location.folder, len(data.names))
        model.release(config)
    return adapter, data.prepared


def main(config: DictConfig) -> float | None:
    """Train one configuration; return the last validation loss of a sweep job, if there is one."""
    try:
        run = load_config(config)
        check(run)
        if not is_done(run):
            with claim_run_folder(run) as location:
                adapter, data = train(run, location)
            announce(run, adapter, data.first_caption)
        return result(run)
    finally:
        free_memory()  # for the next job of a sweep


if __name__ == "__main__":
    command(main)
