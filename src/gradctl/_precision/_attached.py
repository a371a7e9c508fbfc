"""A precision at work on one model and its optimizers."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterable
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.optim import Optimizer

from gradctl._errors import PrecisionRefused, UsageError
from gradctl._precision._loss_scale import LossScale, unscale
from gradctl._precision._masters import Masters
from gradctl._precision._mode import Precision
from gradctl._precision._overrides import Island, islands, kept_in_float32, weights_in_16_bits
from gradctl._precision._refusals import STORES_16_BITS, SWAPS_WEIGHTS, parameters_of, refuse, refuse_inside_ddp
from gradctl._precision._sixteen import Sixteen

_attached: weakref.WeakKeyDictionary[Any, str] = weakref.WeakKeyDictionary()  # the mode, by model and by optimizer
_AUTOCAST = {"bf16-autocast": torch.bfloat16, "fp16-scaled": torch.float16, "fp32": None}


class Attached:
    """A precision that a model and its optimizers have, until `remove()`.

    One step of a loop of your own, and the order that `gradctl.Step` keeps:

        attached.zero_grad()
        for x, y in microbatches:
            with attached.forward():
                loss = loss_fn(model(x), y) / len(microbatches)
            attached.scale(loss).backward()        # outside of forward(): backward needs no autocast
            attached.collect()
        found_inf = attached.unscale()
        ...                                        # measure and clip attached.gradients() here
        skip = bool(found_inf)                     # waits for the device, once a step
        if not skip:
            attached.step(optimizer)
        attached.update(skip)

    In the modes without a loss scale (`scales` is False), `scale`, `unscale` and `update` need not be called.
    Made by `Precision.attach`; as a context manager it is removed at the end of the block.

    Args:
        precision: what to do.
        model: the model.
        optimizers: all that step its parameters.
    """

    def __init__(self, precision: Precision, model: Module, optimizers: tuple[Optimizer, ...]) -> None:
        refuse(precision.mode, model, optimizers, allow_slow=precision.allow_slow)
        for thing in (*model.modules(), *optimizers):
            if thing in _attached:
                raise PrecisionRefused(
                    f"{type(thing).__name__} already has precision {_attached[thing]!r}",
                    what="two precisions on one model would cast and scale twice",
                    fix="remove() the first one",
                )
        fp32_modules = islands(model, precision.overrides)
        self.precision = precision
        self.optimizers = optimizers
        self._model = model
        self._removed = False
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        self._device = device
        self._autocast_dtype = _AUTOCAST.get(precision.mode, torch.bfloat16)
        self._autocast_around = True  # nothing is known before the first `forward`
        self._islands = [Island(module, device.type) for module in fp32_modules]
        self._scale = LossScale(precision.scaling, device.type) if precision.scaling is not None else None
        self._masters: Masters | None = None
        self._sixteens: dict[int, Sixteen] = {}
        self._generators: dict[torch.device, torch.Generator] = {}
        self._handles: list[Any] = []
        if precision.mode == "bf16-master":
            self._keep_masters(fp32_modules)
        elif precision.mode in STORES_16_BITS:
            self._store_16_bits(fp32_modules)
        if precision.mode in SWAPS_WEIGHTS and torch.distributed.is_available() and torch.distributed.is_initialized():
            self._handles.append(model.register_forward_pre_hook(self._not_inside_ddp))
        for thing in (model, *optimizers):
            _attached[thing] = precision.mode

    # -- a microbatch --------------------------------------------------------------------------------------------------

    def forward(self) -> AbstractContextManager[Any]:
        """Compute in this precision inside of the block; for training and for evaluation.

        The weights of "bf16-master" are the 16-bit copies from here until `collect`, which runs after the backward.
        """
        if self._autocast_dtype is None:
            return _NOTHING
        if self._removed:
            raise UsageError(
                "this precision was removed", what="forward() was asked for after remove()", fix="attach again"
            )
        for sixteen in self._sixteens.values():
            sixteen.narrow()  # still wide only if an optimizer raised in the middle of its step
        if self._masters is not None:
            self._masters.open()
        self._autocast_around = torch.is_autocast_enabled(self._device.type)
        return torch.autocast(self._device.type, self._autocast_dtype)

    def is_inside_forward(self) -> bool:
        """Whether the block of `forward` is open: there is an autocast, and around the block was none."""
        return not self._autocast_around and torch.is_autocast_enabled(self._device.type)

    def scale(self, loss: Tensor) -> Tensor:
        """Multiply a loss by the loss scale; the loss itself in modes without one."""
        return loss if self._scale is None else self._scale.scale(loss)

    def collect(self) -> None:
        """End a microbatch, after its backward: the weights are float32 again, and so are the gradients, summed up."""
        if self._masters is not None:
            self._masters.close()

    # -- a step --------------------------------------------------------------------------------------------------------

    @property
    def scales(self) -> bool:
        """Whether there is a loss scale, so that gradients must be unscaled before they are measured."""
        return self._scale is not None

    @property
    def loss_scale(self) -> float:
        """The loss scale; 1.0 in modes without one. Known on the host: reading it waits for nothing."""
        return 1.0 if self._scale is None else self._scale.value

    def stepped(self) -> list[Tensor]:
        """Return the parameters of all optimizers as they are now, each once; their `.grad` is what is stepped."""
        found = {id(p): p for optimizer in self.optimizers for p in parameters_of(optimizer)}
        return list(found.values())

    def gradients(self) -> list[Tensor]:
        """Return the gradients of all optimizers, float32 for 16-bit weights too, each once; those that exist."""
        return [parameter.grad for parameter in self.stepped() if parameter.grad is not None]

    def unscale(self) -> Tensor:
        """Divide all gradients by the loss scale, once a step, and look for inf and NaN in them.

        Nothing waits for a device. In a mode without a loss scale it only looks.

        Returns:
            float32 []: 1.0 if any gradient of any optimizer is inf or NaN, else 0.0.
        """
        self.collect()
        if self._scale is None:
            return unscale(self.gradients(), self._device)
        return self._scale.unscale(self.gradients(), self._device)

    def step(self, optimizer: Optimizer) -> Any:
        """Let `optimizer` step in float32, and round the weights that are kept in 16 bits.

        Returns:
            What its `step` returns. Nothing waits for a device.
        """
        self.collect()
        sixteen = self._sixteens.get(id(optimizer))
        if sixteen is None:
            return optimizer.step()
        # Around the whole call and not in its hooks: what listens to the optimizer compares float32 with float32.
        sixteen.widen()
        try:
            return optimizer.step()
        finally:
            sixteen.narrow()

    def skip(self, optimizer: Optimizer) -> None:
        """Say that the update of `optimizer` is left out because of inf or NaN, to whoever records the run."""
        if self._scale is not None:
            self._scale.note_skip(optimizer)

    def update(self, found_inf: Tensor | bool) -> None:
        """Move the loss scale, once a step, after all optimizers.

        Args:
            found_inf: whether the step was skipped; a tensor is read, which waits for its device.
        """
        if self._scale is not None:
            self._scale.update(bool(found_inf))

    def zero_grad(self) -> None:
        """Drop the gradients of all optimizers."""
        self.collect()
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)

    # -- keeping and taking back ---------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs besides the state_dicts of model and optimizers, as copies.

        Empty but for the mode in modes that keep nothing: the others' weights and states are all there is.
        """
        self.collect()
        found: dict[str, Any] = {"mode": self.precision.mode}
        if self._scale is not None:
            found["loss_scale"] = self._scale.state_dict()
        if self._generators:
            found["generators"] = {str(device): g.get_state() for device, g in self._generators.items()}
        remainders = {name: tensor.clone() for s in self._sixteens.values() for name, tensor in s.remainders().items()}
        if remainders:
            found["remainders"] = remainders
        return found

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` returned, after model and optimizers have loaded theirs.

        Raises:
            UsageError: it is that of another mode, or of another model.
        """
        if state.get("mode") != self.precision.mode:
            raise UsageError(
                f"a state of precision {state.get('mode')!r} for {self.precision.mode!r}",
                what="modes keep different things",
                fix="load the state_dicts of model and optimizers only; they fit every mode",
            )
        remainders = {name: tensor for s in self._sixteens.values() for name, tensor in s.remainders().items()}
        given: dict[str, Tensor] = state.get("remainders", {})
        odd = sorted(given.keys() ^ remainders.keys())
        odd = odd or sorted(name for name, tensor in given.items() if tensor.shape != remainders[name].shape)
        if odd:
            raise UsageError(f"the state does not fit: {odd[0]}", what="it is that of another model")
        for name, tensor in given.items():
            remainders[name].copy_(tensor)
        if self._scale is not None:
            self._scale.load_state_dict(state["loss_scale"])
        for device, generator in self._generators.items():
            generator.set_state(state["generators"][str(device)])

    def remove(self) -> None:
        """Take everything back: dtypes of parameters and gradients, hooks. A second call does nothing.

        Weights that were bfloat16 before are rounded to it; optimizer states stay float32.
        """
        if self._removed:
            return
        self._removed = True
        for handle in self._handles:
            handle.remove()
        for island in self._islands:
            island.remove()
        if self._masters is not None:
            self._masters.remove()
        for sixteen in self._sixteens.values():
            sixteen.remove()
        for thing in (self._model, *self.optimizers):
            _attached.pop(thing, None)

    def __enter__(self) -> Attached:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def _not_inside_ddp(self, module: Module, args: Any) -> None:
        refuse_inside_ddp(self.precision.mode)

    # -- attaching -----------------------------------------------------------------------------------------------------

    def _keep_masters(self, fp32_modules: list[Module]) -> None:
        named = weights_in_16_bits(self._model, kept_in_float32(self._model, fp32_modules))
        _states_to_float32(self.optimizers)
        self._masters = masters = Masters(named, torch.bfloat16)

        def close(*_: Any) -> None:
            masters.close()

        # Whoever reads or writes the program's weights meets them in float32, also if a forward had no backward.
        self._handles = [
            self._model.register_state_dict_pre_hook(close),
            self._model.register_load_state_dict_pre_hook(close),
            *(optimizer.register_step_pre_hook(close) for optimizer in self.optimizers),
            *(optimizer.register_load_state_dict_pre_hook(close) for optimizer in self.optimizers),
        ]

    def _store_16_bits(self, fp32_modules: list[Module]) -> None:
        mode = self.precision.mode
        named = weights_in_16_bits(self._model, kept_in_float32(self._model, fp32_modules))
        if mode == "bf16-stochastic":
            for device in {parameter.device for parameter in named.values()}:
                self._generators[device] = torch.Generator(device).manual_seed(self.precision.seed)
        _states_to_float32(self.optimizers)
        left = dict(named)
        for optimizer in self.optimizers:
            held = {id(parameter) for parameter in parameters_of(optimizer)}
            own = {name: parameter for name, parameter in named.items() if id(parameter) in held}
            if own:
                left = {name: parameter for name, parameter in left.items() if name not in own}
                rounding = "stochastic" if mode == "bf16-stochastic" else "compensated"
                self._sixteens[id(optimizer)] = sixteen = Sixteen(own, rounding, self._generators)
                self._handles += _step_hooks(optimizer, sixteen)
        if left:  # in no optimizer, and frozen as likely as not: 16-bit for the forward, all bits kept for `remove`
            self._sixteens[0] = Sixteen(left, "compensated", {})


def _step_hooks(optimizer: Optimizer, sixteen: Sixteen) -> list[Any]:
    """Widen for a bare `optimizer.step()` too, and for loading: torch casts a loaded state to the weights' dtype."""

    def widen(*_: Any) -> None:
        if not sixteen.is_wide:
            sixteen.widen()
            narrow_after.append(True)

    def narrow(*_: Any) -> None:
        if narrow_after:
            narrow_after.clear()
            sixteen.narrow()

    narrow_after: list[bool] = []
    return [
        optimizer.register_step_pre_hook(widen),
        optimizer.register_step_post_hook(narrow),
        optimizer.register_load_state_dict_pre_hook(widen),
        optimizer.register_load_state_dict_post_hook(narrow),
    ]


def _states_to_float32(optimizers: Iterable[Optimizer]) -> None:
    """Widen states that an optimizer has made for 16-bit weights before."""
    for optimizer in optimizers:
        for parameter, state in optimizer.state.items():
            for key, value in state.items():
                if isinstance(value, Tensor) and value.dtype is torch.bfloat16 and value.shape == parameter.shape:
                    state[key] = value.float()


_NOTHING: AbstractContextManager[Any] = contextlib.nullcontext()
