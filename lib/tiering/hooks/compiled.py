"""Decoding compiled: one graph for a step of one token with a static cache.

torch.compile checks before each call that nothing has changed which the graph was made from, also
every module and every function of the library: thousands of guards, milliseconds a token. What a
runtime holds changes only through the runtime, which then drops the graph; so here the arguments
alone are checked. The graph calls its kernels from C++ (``cpp_wrapper``), not from Python.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

_OPTIONS: dict[str, Any] = {
    "cpp_wrapper": True,
    # Without it g++ takes minutes to optimize the calls of kernels, which take microseconds.
    "cpp_wrapper_build_separate": True,
    # Of the results of operators, whose fakes tests hold to what they return.
    "size_asserts": False,
    "alignment_asserts": False,
}


class CompiledDecoding:
    """A model's forward of which decoding steps are compiled, until ``remove``; all else runs as
    before: prefill, other caches, autocast, gradients. The graph has the weights and buffers that
    the model had at its first step.
    """

    def __init__(self, model: nn.Module, *, may_compile: Callable[[], bool]) -> None:
        self._model = model
        self._may_compile = may_compile
        self._plain: Callable[..., Any] = model.forward
        self._step: Any = None  # what torch.compile made
        # Weights become the graph's own: as its arguments, each is looked up for each token. One
        # object for all calls: torch keeps something of each.
        self._settings_of_dynamo: Any = torch._dynamo.config.patch(install_free_tensors=True)

        @functools.wraps(self._plain)  # whose signature generate looks at
        def forward(*args: Any, **kwargs: Any) -> Any:
            if args or not self._is_step(kwargs):
                return self._plain(*args, **kwargs)
            if self._step is None:
                self._step = _compile(self._plain)
            with self._settings_of_dynamo:
                return self._step(**kwargs)

        self._own = vars(model).get("forward")
        vars(model)["forward"] = forward
        self._settings = getattr(model, "generation_config", None)
        self._cache = getattr(self._settings, "cache_implementation", None)
        if self._settings is not None and self._cache is None:
            self._settings.cache_implementation = "static"

    def reset(self) -> None:
        """Forget the graph, which has the model's weights as they were held."""
        if self._step is not None:
            torch._dynamo.eval_frame.remove_from_cache(self._step._torchdynamo_orig_callable)
        self._step = None

    def remove(self) -> None:
        """Let the model compute as before."""
        self.reset()
        del vars(self._model)["forward"]
        if self._own is not None:
            vars(self._model)["forward"] = self._own
        if self._settings is not None:
            self._settings.cache_implementation = self._cache

    def _is_step(self, kwargs: dict[str, Any]) -> bool:
        """Say whether a call is of one token for each sequence, with a cache of fixed size."""
        ids, cache = kwargs.get("input_ids"), kwargs.get("past_key_values")
        return (
            ids is not None
            and ids.dim() == 2
            and ids.shape[1] == 1
            and getattr(cache, "is_compileable", False)
            and not torch.is_grad_enabled()
            and not torch._C._is_any_autocast_enabled()
            and not torch.compiler.is_compiling()
            and self._may_compile()
        )


def _compile(forward: Callable[..., Any]) -> Callable[..., Any]:
    from .graph import DecodingPass  # which imports Inductor

    def decode_step(**kwargs: Any) -> Any:
        return forward(**kwargs)

    # Graphs are kept with the code of their function: let it be its own.
    decode_step.__code__ = decode_step.__code__.replace()

    options = {
        **_OPTIONS,
        "guard_filter_fn": _keep_arguments,
        "post_grad_custom_pre_pass": DecodingPass(),
    }
    compiled: Callable[..., Any] = torch.compile(
        decode_step, fullgraph=True, dynamic=False, options=options
    )
    return compiled


def _keep_arguments(guards: Sequence[Any]) -> list[bool]:
    """Choose the guards of arguments, and those of torch's global state, which have no name."""
    return [not guard.name or "kwargs" in guard.name for guard in guards]
