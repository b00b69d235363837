"""Triton's interpreter, without looking through all of triton.language for every function that a kernel calls.

It replaces the built-in functions of triton.language by its own, anew for every call of a function, and finds them with
inspect.getmembers: a third of the time of the kernel tests. Which names they have does not change, so they are looked
for once. To be imported after TRITON_INTERPRET is set.
"""

import functools
import inspect

from triton.language.core import is_builtin
from triton.runtime import interpreter


@functools.cache
def builtins(package) -> tuple[str, ...]:
    """As they are before anything is replaced: the first call for a package comes before it is changed."""
    return tuple(name for name, member in inspect.getmembers(package) if is_builtin(member))


def patch_builtin(package, builder, scope) -> None:
    for name in builtins(package):
        member = getattr(package, name)
        if is_builtin(member):
            interpreter._patch_attr(package, name, member, builder, scope)


interpreter._patch_builtin = patch_builtin
