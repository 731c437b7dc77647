"""What a run tells of itself: curves, the loss on held-out samples, previews, the tracker."""

import logging
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from threading import Event

import numpy as np
from accelerate import Accelerator
from accelerate.utils import gather_object
from diffusers import FluxTransformer2DModel
from PIL import Image

from urae.config import flatten
from urae.train.config import TrainConfig
from urae.train.departure import warn_of_departure, warn_of_standstill
from urae.train.inputs import Inputs
from urae.train.mesh import Mesh
from urae.train.output import (
    LEVELS,
    PREVIEW_DIR,
    TRACKER_NAME,
    VALIDATION_FILE,
    Curves,
    StepReport,
    find_previews,
    read_validation,
)
from urae.train.preview import Preview, Previewer, list_previews, write_previews
from urae.train.state import TrainingState
from urae.train.validate import measure_loss

logger = logging.getLogger(__name__)


class Monitor:
    """Watches a run from outside: nothing here changes what it trains.

    All processes take part in measuring, the main one writes.
    """

    def __init__(
        self,
        config: TrainConfig,
        inputs: Inputs,
        accelerator: Accelerator,
        mesh: Mesh,
        transformer: FluxTransformer2DModel,
        previewer: Previewer | None,
    ) -> None:
        """Open the curves, dropping what came after the checkpoint, and the tracker.

        Args:
            config: Of the run.
            inputs: Says where the run starts, and what is held out.
            accelerator: Knows the devices and the tracker.
            mesh: The ranks, and what each has to do.
            transformer: In training.
            previewer: What makes previews, if there are to be any.
        """
        self.config = config
        self.inputs = inputs
        self.accelerator = accelerator
        self.mesh = mesh
        self.transformer = transformer
        self.previewer = previewer
        self.curves = None
        self._tracker_failed = False
        if accelerator.is_main_process:
            num_validation = len(inputs.held_out)
            self.curves = Curves(
                config.output_dir, inputs.start.step, num_validation=num_validation
            )
        if config.tracker is not None:
            flat = flatten(asdict(config))
            settings = {key: value for key, value in flat.items() if value is not None}
            # a resumed run's steps after its checkpoint are drawn once
            step = inputs.start.step
            once = {"tensorboard": {"purge_step": step + 1}} if step else {}
            with self._tracker_may_fail():
                accelerator.init_trackers(TRACKER_NAME, config=settings, init_kwargs=once)

    def log_step(self, report: StepReport, stop: Event | None = None) -> None:
        """Write what a step did; where the disk is full wait for room, until `stop` is set."""
        if self.curves is not None:
            self.curves.write_step(report, stop)
        levels = zip(LEVELS, report.level_losses, strict=True)
        figures = {
            "loss": report.loss,
            "grad_norm": report.grad_norm,
            "lr": report.lr,
            "seconds": report.seconds,
            "loader_share": report.loader_seconds / report.seconds,
            **{name: loss for name, loss in levels if loss is not None},
        }
        self._track_figures(figures, report.step)

    def measure(
        self, state: TrainingState, done: Collection[str] = (), stop: Event | None = None
    ) -> None:
        """Take the held-out loss and previews of the weights that the run is for, where due.

        Args:
            state: Of the run.
            done: Files and folders of what is measured already at this step.
            stop: Once it is set on a rank no more previews are begun, and there a full disk is not
                waited for.
        """
        if VALIDATION_FILE not in done and self._validates(state.step):
            with state.averaged():
                self._validate(state.step, stop)
        if PREVIEW_DIR not in done and self._previews(state.step):
            with state.averaged():
                self._preview(state.step, stop)

    def is_due(self, step: int) -> bool:
        """Tell whether there is something to measure after a step."""
        return self._validates(step) or self._previews(step)

    def catch_up(self, state: TrainingState, stop: Event) -> None:
        """Measure what is due where the run begins, unless it was before it was stopped there."""
        self.measure(state, gather_object([self._find_measured(state.step)])[0], stop)

    def agree_to_stop(self, stop: Event) -> bool:
        """Tell whether a rank was asked to stop; all of them ask alike."""
        return any(gather_object([stop.is_set()]))

    def _find_measured(self, step: int) -> list[str]:
        folder, done = self.config.output_dir, []
        if (folder / VALIDATION_FILE).exists() and step in dict(read_validation(folder)):
            done.append(VALIDATION_FILE)
        drawn = {path.parent.name for path, at in find_previews(folder).items() if at == step}
        if drawn >= {each.name for each in list_previews(self.config)}:
            done.append(PREVIEW_DIR)
        return done

    def _validates(self, step: int) -> bool:
        return bool(self.inputs.held_out) and self._is_at(step, self.config.validate_every)

    def _previews(self, step: int) -> bool:
        return self.previewer is not None and self._is_at(step, self.config.preview_every)

    def _is_at(self, step: int, every: int) -> bool:
        return step == self.config.steps or step % every == 0

    def _validate(self, step: int, stop: Event | None) -> None:
        inputs = self.inputs
        losses = measure_loss(
            self.transformer,
            inputs.held_out,
            self.config,
            inputs.draws,
            self.accelerator,
            self.mesh,
        )
        if not bool(losses.isfinite().all()):
            finite = losses.isfinite().all(dim=1).tolist()
            bad = [s.stem for s, ok in zip(inputs.held_out, finite, strict=True) if not ok]
            raise FloatingPointError(
                f"the held-out loss is not finite after step {step}, on {', '.join(bad)}; "
                "look at that sample, or try a lower learning rate"
            )
        if self.curves is not None:
            self.curves.write_validation(step, losses, stop)
            warn_of_departure(self.config.output_dir)
        self._track_figures({"validation_loss": losses.mean().item()}, step)

    def _preview(self, step: int, stop: Event | None) -> None:
        """Share the previews out among the devices, and write them on the main one."""
        accelerator, previewer = self.accelerator, self.previewer
        assert previewer is not None
        mine = [previewer.previews[number] for number in self.mesh.share(len(previewer.previews))]
        drawn = []
        for preview in mine:  # as many on each rank: of a split model all begin it, or none
            if stop is not None and self.agree_to_stop(stop):
                break
            drawn.append((preview, previewer.draw(self.transformer, preview)))
        pictures = dict(gather_object(drawn))
        if accelerator.is_main_process and pictures:
            write_previews(self.config.output_dir, step, pictures, self.config.model)
            self._track_pictures(pictures, step)
            warn_of_standstill(self.config.output_dir)

    def _track_figures(self, figures: Mapping[str, float], step: int) -> None:
        with self._tracker_may_fail():
            self.accelerator.log(dict(figures), step=step)

    def _track_pictures(self, pictures: Mapping[Preview, Image.Image], step: int) -> None:
        values = {
            f"previews/{preview.name}": np.array(image)[None] for preview, image in pictures.items()
        }
        with self._tracker_may_fail():
            for tracker in self.accelerator.trackers:
                if hasattr(tracker, "log_images"):  # trackio's has none
                    options = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                    tracker.log_images(values, step=step, **options)

    @contextmanager
    def _tracker_may_fail(self) -> Iterator[None]:
        """Go on without what a tracker, often another machine, did not take, and say so once."""
        try:
            yield
        except Exception as error:
            if not self._tracker_failed:
                logger.warning(
                    "tracker %s failed (%s: %s); the run continues, and all figures and previews "
                    "are in %s",
                    self.config.tracker,
                    type(error).__name__,
                    error,
                    self.config.output_dir,
                )
            self._tracker_failed = True
