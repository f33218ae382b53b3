"""Decoding compiled: one graph for a step of one token with a static cache, or its pieces.

torch.compile checks before each call that nothing has changed which the graph was made from, also
every module and every function of the library: thousands of guards, milliseconds a token. What a
runtime holds changes only through the runtime, which then drops the graph; so here the arguments
alone are checked. The graph calls its kernels from C++ (``cpp_wrapper``), not from Python.
"""

import functools
import warnings
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule

from .pieces import CannotCut
from .streamed_step import StreamedStep
from .tracing import CompileRefused


class CompiledDecoding:
    """A model's forward of which decoding steps are compiled, until ``remove``; all else runs as
    before: prefill, other caches, autocast, gradients. The graph has the weights and buffers that
    the model had at its first step, but for those that move: ``streamed`` is the step with them,
    and ``streams`` says whether there are any.
    """

    def __init__(
        self,
        model: nn.Module,
        streamed: StreamedStep,
        *,
        streams: Callable[[], bool],
        may_compile: Callable[[], bool],
    ) -> None:
        self._model = model
        self.streamed = streamed
        self._streams = streams
        self._may_compile = may_compile
        self._plain: Callable[..., Any] = model.forward
        self._step: Any = None  # what torch.compile made
        self._in_pieces = False
        """It is of a plan that streams."""
        self._fails: set[bool] = set()
        """Steps that stream (True), or those that don't, can't be compiled."""
        # Weights become the graph's own: as its arguments, each is looked up for each token. One
        # object for all calls: torch keeps something of each.
        self._settings_of_dynamo: Any = torch._dynamo.config.patch(install_free_tensors=True)
        self._no_trace: Any = torch._dynamo.config.patch(
            install_free_tensors=True, error_on_recompile=True
        )

        @functools.wraps(self._plain)  # whose signature generate looks at
        def forward(*args: Any, **kwargs: Any) -> Any:
            if args or not self._is_step(kwargs):
                return self._plain(*args, **kwargs)
            return self._run(kwargs)

        self._own = vars(model).get("forward")
        vars(model)["forward"] = forward
        self._settings = getattr(model, "generation_config", None)
        self._cache = getattr(self._settings, "cache_implementation", None)
        if self._settings is not None and self._cache is None:
            self._settings.cache_implementation = "static"

    def follow(self) -> None:
        """Go by another plan."""
        if not (self._in_pieces and self._streams() and self.streamed.follow()):
            self.reset()

    def reset(self) -> None:
        """Forget the graph, which has the model's weights as they were held."""
        if self._step is not None:
            torch._dynamo.eval_frame.remove_from_cache(self._step._torchdynamo_orig_callable)
        self._step, self._in_pieces = None, False
        self.streamed.forget()

    def remove(self) -> None:
        """Let the model compute as before."""
        self.reset()
        del vars(self._model)["forward"]
        if self._own is not None:
            vars(self._model)["forward"] = self._own
        if self._settings is not None:
            self._settings.cache_implementation = self._cache

    def _run(self, kwargs: dict[str, Any]) -> Any:
        """Run a step; before anything of it is computed it is traced, where it hasn't been yet."""
        step = self._step
        try:
            if not self._streams():
                if step is None:
                    step = self._step = _compile(self._plain, "inductor", step_options())
                with self._settings_of_dynamo:
                    return step(**kwargs)
            if step is not None:
                try:
                    with self._no_trace:
                        return step(**kwargs)
                except torch._dynamo.exc.RecompileError:
                    pass  # arguments of another kind
            else:
                step = self._step = _compile(self._plain, _backend(self.streamed), {})
                self._in_pieces = True
            try:
                with self.streamed.tracing(), self._settings_of_dynamo:
                    return step(**kwargs)
            except BaseException:  # such as an interrupt, which leaves half of a trace
                self.reset()
                raise
        except (torch._dynamo.exc.TorchDynamoException, CompileRefused, CannotCut) as error:
            self.reset()
            self._fails.add(self._streams())
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            warnings.warn(
                f"decoding runs as before, since its step can't be compiled: {reason}",
                RuntimeWarning,
                stacklevel=2,
            )
            return self._plain(**kwargs)

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
            and self._streams() not in self._fails
        )


def step_options() -> dict[str, Any]:
    """Return Inductor's settings for a step, or a piece of one."""
    from .graph import DecodingPass  # which imports Inductor

    return {
        "cpp_wrapper": True,
        # Without it g++ takes minutes to optimize the calls of kernels, which take microseconds.
        "cpp_wrapper_build_separate": True,
        # Of the results of operators, whose fakes tests hold to what they return.
        "size_asserts": False,
        "alignment_asserts": False,
        "post_grad_custom_pre_pass": DecodingPass(),
    }


def compile_piece(module: GraphModule, inputs: list[Any]) -> Callable[..., Sequence[Any]]:
    """Compile a piece of a step, for such inputs."""
    compiled: Any = torch._inductor.compile(module, inputs, options=step_options())
    function: Callable[..., Sequence[Any]] = compiled
    return function


def _backend(streamed: StreamedStep) -> Callable[..., Any]:
    """Return a backend for torch.compile, which keeps for good all that it was given."""
    reference = weakref.ref(streamed)

    def backend(traced: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        step = reference()
        assert step is not None
        return step(traced, inputs)

    return backend


def _compile(
    forward: Callable[..., Any], backend: Any, options: dict[str, Any]
) -> Callable[..., Any]:
    def decode_step(**kwargs: Any) -> Any:
        return forward(**kwargs)

    # Graphs are kept with the code of their function: let it be its own.
    decode_step.__code__ = decode_step.__code__.replace()

    compiled: Callable[..., Any] = torch.compile(
        decode_step,
        fullgraph=True,
        dynamic=False,
        backend=backend,
        options={**options, "guard_filter_fn": _keep_arguments},
    )
    return compiled


def _keep_arguments(guards: Sequence[Any]) -> list[bool]:
    """Choose the guards of arguments, and those of torch's global state, which have no name."""
    return [not guard.name or "kwargs" in guard.name for guard in guards]
