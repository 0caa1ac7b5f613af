"""Train a LoRA: `python train/run.py +experiment=tarot [key=value ...]`, or with `accelerate launch` (docs/scaling.md).

Hydra composes the configuration from conf/, `load_config` checks it, and `train` runs the stages of train/stages/.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":  # sys.path begins with the script's folder, whose modules would hide libraries
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    from train.cli.start import start_command

    start_command()  # before the imports below: they take seconds, and --help needs none of them

from omegaconf import DictConfig

from train.checkpoints.checkpointer import Checkpointer
from train.checkpoints.resume import RunLocation
from train.cli.app import command
from train.config.run_config import RunConfig
from train.distributed.sharding import check_processes
from train.loop import Trainer
from train.optim.ema import EvaluationWeights
from train.optim.schedules import LearningRate
from train.stages.data import PreparedData, announce_start, make_objective, prepare_data
from train.stages.finish import announce, write_card_and_report
from train.stages.first_batch import write_first_batch
from train.stages.memory import choose_compile, load_config, memory_advice, settle_memory
from train.stages.model import load_model, load_sampler
from train.stages.run_folder import claim_run_folder, record_start
from train.sweeps.job import check_sweep_job, is_done, is_sweep, sweep_result
from train.sweeps.reuse import SHARED
from train.tracking.metrics import Metrics
from train.utils.memory import free_memory


def train(config: RunConfig, location: RunLocation) -> tuple[Path, PreparedData]:
    """Train the adapter of one configuration in its run folder; return the adapter's folder and the data."""
    settings, processes, accelerator = config.settings, config.processes, config.accelerator
    check_processes(processes)
    config = settle_memory(config, location)
    with memory_advice(config), SHARED.job(keeps=is_sweep()):
        # Fill the cache with encoded samples; this loads and frees both encoders.
        data = prepare_data(config)
        data.check_unchanged(config, location)
        write_first_batch(config, location, data)
        objective = make_objective(config, data)
        config = choose_compile(config, location, data)

        # Load the frozen base in its precision and attach the adapter.
        model = load_model(config, location)
        optimizer = model.build_optimizer(config)
        learning_rate = LearningRate(optimizer, config.schedule, settings.steps)
        evaluation_weights = EvaluationWeights(model.trained_parameters, optimizer, settings.ema_decay)
        config = announce_start(config, location.folder, data, model.parameter_count)
        sampler = load_sampler(config, data.prepared.cached, model.peft_model)

        # Restore the resumed state. Nothing in the run folder changes before it is read.
        metrics = Metrics(location.folder, config.tracker)
        checkpointer = Checkpointer(
            accelerator,
            location,
            model.peft_model,
            optimizer,
            evaluation_weights,
            base=config.variant.repo or config.variant.name,
            license=config.variant.license,
            images_per_step=config.images_per_step,
            metrics=metrics,
            rotation=settings.rotation,
            extra_state={**data.state, **model.state},
        )
        first_step = checkpointer.load()
        if accelerator.is_main_process:
            record_start(config, location, data.manifest, model.state)
            metrics.start(settings.name, config.composed, checkpointer.logged_steps(first_step))

        # Train, then write the model card and the report.
        adapter_folder = Trainer(
            settings=settings,
            processes=processes,
            peft_model=model.peft_model,
            optimizer=optimizer,
            learning_rate=learning_rate,
            evaluation_weights=evaluation_weights,
            objective=objective,
            loader=data.loader,
            sample_names=data.names,
            checkpointer=checkpointer,
            metrics=metrics,
            folder=location.folder,
            validator=data.validator,
            sampler=sampler,
        ).run(first_step)
        write_card_and_report(config, location.folder, len(data.names))
        model.release(config)
    return adapter_folder, data.prepared


def main(composed: DictConfig) -> float | None:
    """Train one configuration; return the last validation loss of a sweep job, if there is one."""
    try:
        config = load_config(composed)
        check_sweep_job(config)
        if not is_done(config):
            with claim_run_folder(config) as location:
                adapter_folder, prepared = train(config, location)
            announce(config, adapter_folder, *prepared.example)
        return sweep_result(config)
    finally:
        free_memory()  # for the next job of a sweep


if __name__ == "__main__":
    command(main)
