"""A hook that checks what training starts from: weights, class weights, the best metric."""

import re
from typing import Any

from mmengine.hooks import Hook
from mmengine.runner import Runner

from openmmlab.check_config import check_saving
from openmmlab.check_data import check_class_weights
from openmmlab.runner import unwrapped
from utils import UserError


class StartChecks(Hook):
    """Refuse options that would fail late, and a checkpoint that would leave the backbone random, but for its
    output norms, which other outputs lack; warn if nothing was loaded.

    Raises:
        UserError: see `check_saving` and `check_class_weights`; weights of the backbone are missing; when
            resuming, any weight or the optimizer.
    """

    loaded = False

    def before_run(self, runner: Runner) -> None:
        """Check what mmengine and mmseg notice only in or after the first epoch."""
        check_saving(runner)
        if runner.cfg.get("default_scope") == "mmseg":
            check_class_weights(unwrapped(runner), runner.train_loop.dataloader.dataset)

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        """Compare the checkpoint's names and shapes with the model's."""
        resumes, model = runner.cfg.get("resume"), unwrapped(runner)
        file = runner.cfg.get("load_from") or f"the newest checkpoint in {runner.work_dir}"
        if resumes and not {"meta", "optimizer"} <= checkpoint.keys():
            raise UserError(f"{file} cannot be resumed: expected one that training wrote, with its optimizer")
        given = {
            name.removeprefix("module."): value.shape
            for name, value in checkpoint.get("state_dict", checkpoint).items()
            if hasattr(value, "shape")
        }
        is_needed = re.compile("" if resumes else r"backbone\.(?!norm\d)").match
        needed = {name: value.shape for name, value in model.state_dict().items() if is_needed(name)}
        wrong = sorted(name for name, shape in needed.items() if given.get(name) != shape)
        if wrong:
            raise UserError(
                f"{file}: {len(wrong)} of {len(needed)} weights are missing or of another shape, such as "
                f"{wrong[0]}; expected a checkpoint of this model; for a classifier's, use --pretrained"
            )
        self.loaded = True

    def before_train(self, runner: Runner) -> None:
        """Warn if the backbone starts from random weights."""
        model = runner.cfg.model
        backbone = model.get("backbone")  # some models hold others, which have one each
        if backbone and not (self.loaded or backbone.get("init_cfg") or model.get("pretrained")):
            runner.logger.warning(
                "the backbone starts from random weights; --pretrained loads a classifier's"
            )
