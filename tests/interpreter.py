"""Triton's interpreter without what it does over and over: a third of the time of kernels in these tests."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from types import FunctionType
from typing import Any

from triton import language
from triton.runtime import interpreter


def patch_once() -> None:
    """Patch the language of a kernel once a launch, not again for each function that the kernel calls."""
    scope = getattr(interpreter, "_LangPatchScope", None)
    if scope is None:
        # Another Triton, which patches in another way.
        return
    patch = interpreter._patch_lang

    def patch_unless_patched(fn: FunctionType) -> Any:
        langs = _languages(fn)
        if langs and not any(language.core.is_builtin(lang.load) for lang in langs):
            return scope()
        return patch(fn)

    interpreter._patch_lang = patch_unless_patched
    interpreter._get_np_dtype = _by_element(interpreter._get_np_dtype)


@functools.cache
def _languages(fn: FunctionType) -> list[Any]:
    """The modules that the interpreter patches for ``fn``."""
    modules = (language, language.core)
    return [each for each in fn.__globals__.values() if inspect.ismodule(each) and each in modules]


def _by_element(np_dtype: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """``np_dtype``, which makes a table of all dtypes in every call, called once for each of them."""
    of_element = functools.cache(np_dtype)

    def of_type(dtype: Any) -> Any:
        element = dtype.scalar
        return np_dtype(element) if element.is_ptr() else of_element(element)

    return of_type
