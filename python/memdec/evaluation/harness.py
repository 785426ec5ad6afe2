"""lm-evaluation-harness on base + memory: its tasks, counted as it counts them, run on a MemoryModel.

The harness (``pip install 'memdec[eval]'``) knows the model ``memdec`` once this module is imported. From the shell,
with all options of ``lm_eval``:

    python -m memdec.evaluation.harness --model memdec \\
        --model_args pretrained=path/to/base,memory=run/memory,alpha=0.4 --tasks lambada_openai

From Python:

    >>> results = simple_evaluate("path/to/base", "run/memory", tasks=["lambada_openai"])    # doctest: +SKIP
    >>> results["results"]["lambada_openai"]["acc,none"]                                     # doctest: +SKIP
    0.41

The harness's own class for transformers models (``HFLM``) does the work. Its log-softmax over our logits changes
nothing, since these are log-probs already; it pads scored texts on the right without a mask, which causal models do
not see, and prompts to continue on the left with one.
"""

from __future__ import annotations

import copy
import functools
import importlib.util
from typing import Any

import torch

from memdec.errors import MemdecError
from memdec.modeling.memory_model import MemoryModel
from memdec.pipeline.embed import default_device

NAME = "memdec"
# What HFLM takes besides the model and is of use with a model that is loaded already.
HFLM_OPTIONS = frozenset(
    {
        "add_bos_token",
        "batch_size",
        "chat_template_args",
        "enable_thinking",
        "logits_cache",
        "max_batch_size",
        "max_length",
        "prefix_token_id",
        "softmax_dtype",
        "think_end_token",
        "truncation",
    }
)


def __getattr__(name: str) -> Any:
    """`MemoryLM`, made when it is asked for: this module can be imported without the harness."""
    if name == "MemoryLM":
        return memory_lm()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@functools.cache
def memory_lm() -> Any:
    """The class ``MemoryLM``, under which the harness knows a MemoryModel.

    Raises:
        MemdecError: lm-evaluation-harness is not installed.
    """
    try:
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise MemdecError(
            f"this needs lm-evaluation-harness ({error}). Install it with: pip install 'memdec[eval]'."
        ) from None

    class MemoryLM(HFLM):  # type: ignore[misc]  # the harness is untyped here
        """A MemoryModel for the harness.

        Args:
            pretrained: the base (path, hub id or loaded model), or a MemoryModel.
            memory: the memory (likewise); None with a MemoryModel.
            alpha: weight of the memory; None takes the memory's own, or the MemoryModel's.
            tokenizer: of models that are given loaded.
            dtype: "auto", "float32", "bfloat16" or "float16", of what is loaded here.
            device: such as "cpu" or "cuda:0"; None is an accelerator if there is one.
            decoding: how ``generate`` decodes ("auto", "composite", "parallel", "speculative").
            **options: as HFLM: batch_size, max_length, add_bos_token, prefix_token_id, …

        Raises:
            MemdecError: an option makes no sense here, or base and memory do not fit.
        """

        def __init__(
            self,
            pretrained: Any,
            memory: Any = None,
            alpha: float | None = None,
            *,
            tokenizer: Any = None,
            dtype: str | torch.dtype = "auto",
            device: str | torch.device | None = None,
            decoding: str = "auto",
            **options: Any,
        ) -> None:
            unknown = options.keys() - HFLM_OPTIONS
            if unknown:
                raise MemdecError(
                    f"the harness's model {NAME} does not take {', '.join(sorted(unknown))}; it takes pretrained, "
                    f"memory, alpha, tokenizer, dtype, device, decoding, {', '.join(sorted(HFLM_OPTIONS))}."
                )
            if isinstance(pretrained, MemoryModel):
                if memory is not None or alpha is not None:
                    raise MemdecError("pretrained is a MemoryModel, which has its memory and alpha; leave both out.")
                model = pretrained
            elif memory is None:
                raise MemdecError(f"the harness's model {NAME} wants a memory: pretrained=BASE,memory=DIR.")
            else:
                if tokenizer is not None and isinstance(tokenizer, str):
                    raise MemdecError("tokenizer: wanted a loaded tokenizer; paths and hub ids bring their own.")
                where = device or default_device()
                model = MemoryModel.from_pretrained(
                    pretrained, memory, alpha, tokenizer=tokenizer, dtype=dtype, device=where
                )
            tokenizer = model.tokenizer if tokenizer is None else tokenizer
            if tokenizer is None:
                raise MemdecError("the tokenizer of this MemoryModel is not known; give one: tokenizer=….")
            tokenizer = copy.deepcopy(tokenizer)  # the harness gives it a padding token
            if options.get("add_bos_token") is not None:
                tokenizer.add_bos_token = options["add_bos_token"]
            self.decoding = decoding
            super().__init__(pretrained=model, backend="causal", tokenizer=tokenizer, **options)

        def _model_call(self, inps: torch.Tensor, attn_mask: Any = None, labels: Any = None) -> torch.Tensor:
            with torch.no_grad():
                # Nothing is read twice, so that no cache need be filled.
                logits: torch.Tensor = self.model(inps, use_cache=False).logits
            return logits

        def _model_generate(self, context: Any, max_length: int, stop: list[str], **kwargs: Any) -> Any:
            return super()._model_generate(context, max_length, stop, decoding=self.decoding, **kwargs)

        def get_model_info(self) -> dict[str, Any]:
            """What the harness writes down of the model; it would ask a hub for what was loaded already."""
            return {
                "model_num_parameters": sum(parameter.numel() for parameter in self.model.parameters()),
                "model_dtype": str(self.model.dtype),
                "model_revision": None,
                "model_sha": None,
                "memdec_alpha": self.model.alpha,
            }

    return MemoryLM


@functools.cache
def register() -> None:
    """Makes the harness know the model ``memdec``; a second call does nothing.

    Raises:
        MemdecError: lm-evaluation-harness is not installed.
    """
    made = memory_lm()
    from lm_eval.api.registry import register_model

    register_model(NAME)(made)


def simple_evaluate(base: Any, memory: Any = None, *, tasks: Any, alpha: float | None = None, **options: Any) -> Any:
    """``lm_eval.simple_evaluate`` on a MemoryModel.

    Args:
        base: path, hub id, loaded model, or a MemoryModel.
        memory: likewise; None with a MemoryModel.
        tasks: as the harness takes them: names, configurations, or task objects.
        alpha: weight of the memory; None takes the memory's own.
        **options: ``tokenizer``, ``dtype``, ``device``, ``decoding`` and what HFLM takes go to the model, all others
            to ``lm_eval.simple_evaluate`` (limit, num_fewshot, task_manager, …); batch_size and device to both.

    Returns:
        The harness's results.

    Raises:
        MemdecError: lm-evaluation-harness is not installed, or base and memory do not fit.
    """
    made = memory_lm()
    from lm_eval import simple_evaluate as evaluate

    own = HFLM_OPTIONS | {"tokenizer", "dtype", "device", "decoding"}
    model = made(base, memory, alpha, **{name: options[name] for name in options.keys() & own})
    rest = {name: value for name, value in options.items() if name not in own or name in ("batch_size", "device")}
    return evaluate(model=model, tasks=tasks, **rest)


def main() -> None:
    """``lm_eval`` with the model ``memdec`` registered."""
    register()
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if importlib.util.find_spec("lm_eval") is not None and __name__ != "__main__":
    register()

if __name__ == "__main__":
    from memdec.evaluation.harness import main as run  # one module, not two, holds the class that is registered

    run()
