"""fastai: every save is x, validation sees x, and `load` goes on from y, bit for bit.

`Learner.save` asks the model for its state dict in the middle of training, from callbacks of any order. So
`ship_x` is on from the first fit.
"""

from __future__ import annotations

try:
    from fastai.callback.core import Callback
    from fastai.callback.schedule import LRFinder, ParamScheduler
except ImportError as error:
    raise ImportError(f"sftorch.trainers.fastai needs fastai, got {error}: pip install fastai") from error

from sfcore.checks import HyperparameterError
from sftorch.shipping import XShipped, ship_x
from sftorch.trainers import unwrap

__all__ = ["ScheduleFreeCallback"]


class ScheduleFreeCallback(Callback):
    """Validates and saves x, and trains at y: `Learner(..., cbs=ScheduleFreeCallback())`.

    `learn.save`, `SaveModelCallback` and `learn.export` write x, during a fit too, and a fit leaves x in the
    model. `learn.load` and `learn.fit(..., start_epoch=...)` go on from y, bit for bit, from what was saved
    with the optimizer. Build the optimizer by `opt_func=partial(OptimWrapper, opt=sftorch.AdamWScheduleFree)`
    and train by `learn.fit`: `fit_one_cycle` and its like schedule lr and beta. Warm-up is the optimizer's.

    Raises:
        HyperparameterError: when a fit begins that schedules hyperparameters; `lr_find` may.
        TypeError: when a fit begins with no optimizer of sftorch's.
    """

    order = -5  # before all that may look at the weights
    _stateattrs = ("_shipped",)  # what `learn.export` leaves out
    _shipped: XShipped | None = None

    def before_fit(self) -> None:
        """Checks who schedules what, and sees to it that every save is x from here on."""
        if self.learn.opt is None:  # a validation of what load_learner returned comes here too
            return
        optimizer = unwrap(self.learn.opt)
        if found := [
            f"fit must schedule nothing, got {type(cb).__name__} with {', '.join(cb.scheds)}: use learn.fit, "
            "and give warmup_steps to the optimizer"
            for cb in self.learn.cbs
            if isinstance(cb, ParamScheduler) and not isinstance(cb, LRFinder)
        ]:
            raise HyperparameterError(found)
        if self._shipped is not None:
            self._shipped.remove()
        self._shipped = ship_x(self.learn.model, optimizer)

    def before_train(self) -> None:
        """Puts y into the weights."""
        unwrap(self.learn.opt).train()

    def before_validate(self) -> None:
        """Puts x into the weights, and leaves it there until training goes on."""
        self._eval()

    def after_fit(self) -> None:
        """Leaves x in the model."""
        self._eval()

    def _eval(self) -> None:
        if self.learn.opt is not None:
            unwrap(self.learn.opt).eval()
